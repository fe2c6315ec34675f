"""The adaptive recipe: where it starts, where a step goes, and what it ends with."""

import csv
import json
import os
import random
import re
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import ltmp
import train
from extras import adaptive, batching, landing, measuring, models, splits
from flops import flops_ratio, model_flops

ALL = torch.ones(6, dtype=torch.bool)


def demo(method):
    """The demo model with random thresholds."""
    return models.build_model("demo", method, models.read_weights("demo", None)).eval()


def demo_images(split, count):
    """Images (count, 3, 28, 28) of the demo, as validation sees them."""
    images = splits.open_split(None, split, models.clean_transform(ltmp.VARIANTS["demo"]))
    return torch.stack([image for image, _ in batching.subset(images, count)])


def random_prices():
    """Of six ranks: what each costs, less the mean, for the FLOPs that it saves; what it saves."""
    generator = torch.Generator().manual_seed(0)
    cost, saved = torch.randn(6, generator=generator), 0.1 + torch.rand(6, generator=generator)
    return adaptive.neutral(cost / saved, saved, ALL), saved


def test_steer_goes_where_the_kl_falls_and_r_stays():
    price, saved = random_prices()
    along = adaptive.steer(price, torch.ones(6), saved, ALL, 0.0)
    assert along @ saved == pytest.approx(0, abs=1e-6)
    # steer's result is subtracted. What a rank costs is its price times what it saves.
    assert along @ (price * saved) > 0
    # The loss may have any factor, and r as well.
    found = adaptive.steer(1e-4 * price, torch.full((6,), 1e-8), 7 * saved, ALL, 0.0)
    torch.testing.assert_close(found, along)


def test_prices_compare_what_the_same_flops_cost():
    # The last rank saves little and costs little, but more than the others for each FLOP.
    cost, saved = torch.tensor([1.0, 1.0, 0.02]), torch.tensor([1.0, 1.0, 0.01])
    price = adaptive.neutral(cost / saved, saved, ALL[:3])
    assert price[2] > 0 and (price[:2] < 0).all() and price.abs().argmax() == 2
    assert price @ saved == pytest.approx(0, abs=1e-6)


def test_a_price_that_is_noise_moves_its_rank_little():
    generator = torch.Generator().manual_seed(0)
    sure, saved = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.ones(4)
    noise = torch.tensor([0.1, 0.1, 1.0, 100.0])
    average, square = torch.zeros(4), torch.zeros(4)
    for _ in range(300):
        price = sure + noise * torch.randn(4, generator=generator)
        average.lerp_(price, adaptive.MEMORY)
        square.lerp_(price**2, adaptive.MEMORY)
    moved = adaptive.steer(average, square, saved, ALL[:4], 0.0).abs()
    assert (moved[:2] > 0.8).all() and (moved[2:] < 0.4).all()


@pytest.mark.parametrize("distance, back", [(0.005, 0.25), (-0.01, -0.5), (0.7, 1.5), (-0.7, -1.5)])
def test_steer_leads_back_to_the_target(distance, back):
    price, saved = random_prices()
    there, here = (adaptive.steer(price, price**2, saved, ALL, far) for far in (distance, 0.0))
    torch.testing.assert_close(there - here, torch.full((6,), -back))


def test_steer_moves_only_what_is_learned():
    learned = torch.tensor([True, False, True, True, False, True])
    price, saved = random_prices()
    moved = adaptive.steer(price, torch.ones(6), saved * learned, learned, 0.01)
    assert torch.equal(moved != 0, learned)
    # Without a part that leads back, what is learned leaves r.
    moved = adaptive.steer(price, torch.ones(6), saved * learned, learned, 0.0)
    assert moved @ (saved * learned) == pytest.approx(0, abs=1e-6)


def test_a_dear_rank_at_0_moves_no_other():
    # The last two are at 0, and dear: what they can give is nothing.
    price, saved, above = torch.tensor([1.0, 0, 2, 3, 60, 90]), torch.ones(6), torch.arange(6) < 4
    price = adaptive.neutral(price, saved * above, ALL)
    moved = adaptive.steer(price, price**2, saved * above, ALL, 0.0)
    assert moved[:4].sum() == pytest.approx(0, abs=1e-6) and (moved[4:] > 0).all()
    assert (moved[:2] < 0).all() and (moved[2:4] > 0).all()
    # A cheap one leaves 0.
    price = adaptive.neutral(price - 100 * (torch.arange(6) == 5), saved * above, ALL)
    assert adaptive.steer(price, price**2, saved * above, ALL, 0.0)[5] < 0


def test_steer_moves_nothing_where_nothing_is_learned():
    assert not adaptive.steer(*(torch.zeros(6),) * 3, ~ALL, 0.01).any()


@pytest.mark.parametrize("method", ["ltmp", "ltm", "ltp", "ltpm"])
def test_what_the_last_block_removes_changes_no_prediction(spread_model, method):
    model = spread_model(0, method, depth=3, prefix_tokens=2, head_tokens=2)
    size, maskers = model.config.image_size, landing.maskers(model)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    found = {}
    for share in (0.0, 1.0):
        landing.place(model, images, {key: share if key[0] == 2 else 0.1 for key in maskers})
        with torch.no_grad():
            found[share] = model(images)
    assert (found[1.0][1][2] < found[0.0][1][2]).all()
    torch.testing.assert_close(found[1.0][0], found[0.0][0])


def test_thresholds_that_only_the_class_token_reaches_can_start(spread_model):
    model = spread_model(0, "ltpm", depth=3)
    size, maskers = model.config.image_size, landing.maskers(model)
    images = torch.randn(4, 3, size, size)
    scores = adaptive.start_scores(model, images, {key: 1.0 for key in maskers})
    assert scores.keys() == maskers.keys() and not len(scores[2, "prune"])
    adaptive.set_ranks(maskers, scores, torch.full((6,), 0.5))
    assert model.blocks[2].prune_masker.threshold == 0


def test_ranks_are_shares_of_the_scores_met(spread_model):
    model = spread_model(0, "ltmp")
    images = torch.randn(8, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    maskers = landing.maskers(model)
    # A number that float32 holds exactly.
    shares = dict.fromkeys(maskers, 0.125)
    scores = adaptive.start_scores(model, images, shares)
    placed = [masker.threshold.item() for masker in maskers.values()]
    adaptive.set_ranks(maskers, scores, torch.full((12,), 0.125))
    assert [masker.threshold.item() for masker in maskers.values()] == placed
    # A higher rank means a lower merge threshold, and a higher prune threshold.
    adaptive.set_ranks(maskers, scores, torch.full((12,), 0.5))
    moved = [masker.threshold.item() for masker in maskers.values()]
    assert all(now < before for now, before in zip(moved[::2], placed[::2], strict=True))
    assert all(now > before for now, before in zip(moved[1::2], placed[1::2], strict=True))


@pytest.mark.parametrize("method", ["ltmp", "ltpm"])
@pytest.mark.parametrize("up", [True, False])
def test_differences_are_those_of_the_whole_model(spread_model, method, up):
    model = spread_model(1, method)
    images = torch.randn(6, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    wanted = measuring.predict(models.with_method(model, "dense"), images)
    maskers = landing.maskers(model)
    scores = adaptive.start_scores(model, images, dict.fromkeys(maskers, 0.2))
    ranks = torch.tensor([0.0, 0.01, 0.2, 0.5, 0.6, 0.99, 1.0, 0.3, 0.2, 0.1, 0.4, 0.05])
    learned = torch.tensor([True] * 10 + [False] * 2)
    adaptive.set_ranks(maskers, scores, ranks)
    placed = [masker.threshold.item() for masker in maskers.values()]
    logits, kl, r, *rises = adaptive.differences(model, images, wanted, scores, ranks, learned, up)
    assert [masker.threshold.item() for masker in maskers.values()] == placed

    def outcome(ranks):
        adaptive.set_ranks(maskers, scores, ranks)
        with torch.no_grad():
            logits, kept = model(images)
        kl = measuring.kl_divergence(logits, wanted.float())
        return logits, kl, model_flops(model.config, kept) / model_flops(model.config)

    moves = torch.tensor([0.02, 0.02, 0.1, 0.25, 0.2, -0.02, -0.02, 0.15, 0.1, 0.05])
    moves = torch.where((ranks[:10] >= moves.abs()) & (not up), -moves.abs(), moves)
    torch.testing.assert_close((logits, kl, r), outcome(ranks))
    for i, move in enumerate(moves):
        moved = ranks.clone()
        moved[i] += move
        _, new_kl, new_r = outcome(moved)
        root = measuring.root(new_kl) - measuring.root(kl)
        torch.testing.assert_close(rises[0][:, i], root / move, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(rises[1][:, i], (new_r - r) / move)
    assert not rises[0][:, 10:].any() and rises[1][:, :10].any(0).sum() > 5


@pytest.mark.parametrize(
    "seed, target, first, halved",
    [(0, 0.8, False, True), (3, 0.5, True, False), (1, 0.8, False, True)],
)
@pytest.mark.parametrize("method", ["ltmp", "ltpm"])
def test_a_start_has_what_pays_at_the_same_r(
    spread_model, capsys, method, seed, target, first, halved
):
    model = spread_model(seed, method, image_size=10, depth=5)
    images = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    teacher = models.with_method(model, "dense").eval()
    shares = adaptive.choose(model, teacher, images, target)
    assert landing.place(model, images, shares) == pytest.approx(target, abs=0.002)
    *merged, last = (shares[i, "merge"] for i in range(5))
    assert merged[2] == pytest.approx(merged[3])
    assert merged[1] == pytest.approx(merged[3] / (2 if halved else 1))
    assert merged[0] == pytest.approx(merged[1] if first else 0)
    pruned = [shares[i, "prune"] for i in range(5)]
    # All go in the last block: nothing reads them.
    assert pruned[:4] == [0, 0, 0, 0] and last == 0 and pruned[4] >= 1

    # The comparison, computed directly.
    def root(start):
        scaled = landing.scale(model, images, target, start)[1]
        with torch.no_grad():
            p, q = (each(images)[0].double().log_softmax(1) for each in (teacher, model))
        return (p.exp() * (p - q)).sum(1).sqrt().mean().item(), scaled

    start = {key: 0.1 * (key[1] == "merge") for key in shares}
    whole, scaled = root(start | {(4, "merge"): 0.0, (4, "prune"): 1000.0})
    without, scaled_without = root(scaled | {(0, "merge"): 0.0})
    assert (without >= 0.9 * whole) == first
    best, start = (whole, scaled) if first else (without, scaled_without)
    half, _ = root(start | {(i, "merge"): 0.5 * start[i, "merge"] for i in (0, 1)})
    assert (half < best) == halved
    told = [float(value) for value in re.findall(r"[ ](0\.\d+)", capsys.readouterr().err)]
    assert told == pytest.approx([whole, without, half], rel=0.01)


@pytest.mark.parametrize(
    "method, depth, target",
    [("ltmp", 4, 0.2), ("ltp", 4, 0.6), ("ltp", 1, 0.9), ("ltp", 4, 1.0), ("ltmp", 4, 1.0)],
)
def test_where_merging_misses_the_target_both_start_in_all_blocks(
    spread_model, method, depth, target
):
    images = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    model = spread_model(5, method, image_size=10, depth=depth)
    shares = adaptive.choose(model, models.with_method(model, "dense").eval(), images, target)
    assert landing.place(model, images, shares) == pytest.approx(target, abs=0.002)
    if target < 1:
        off = [key for key in shares if not shares[key]]
        assert off == ([(depth - 1, "merge")] if method == "ltmp" else [])


@pytest.mark.parametrize("depth, target", [(1, 0.95), (2, 0.9), (4, 0.99), (4, 0.7)])
def test_merging_alone_starts_at_the_target_with_or_without_the_first_block(
    spread_model, depth, target
):
    images = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    model = spread_model(5, "ltm", image_size=10, depth=depth)
    shares = adaptive.choose(model, models.with_method(model, "dense").eval(), images, target)
    assert landing.place(model, images, shares) == pytest.approx(target, abs=0.002)
    assert min(list(shares.values())[1:], default=1) > 0
    # One block alone cannot go without.
    assert shares[0, "merge"] > 0 or depth > 1


def learned(out, *flags):
    """train.py on the demo; returns the contents of thresholds.json and metrics.json."""
    train.main([*flags, "--out", str(out)])
    names = ("thresholds.json", "metrics.json")
    return [json.loads((out / name).read_text()) for name in names]


def test_what_starts_with_a_share_of_0_stays_off(tiny, tmp_path, monkeypatch):
    def one_of_four(model, teacher, images, target):
        shares = dict.fromkeys(landing.maskers(model), 0.0) | {(1, "merge"): 0.1}
        return landing.scale(model, images, target, shares)[1]

    monkeypatch.setattr(adaptive, "choose", one_of_four)
    flags = ["--model", "tiny", "--weights", "none", "--limit-train", "64", "-b", "8"]
    found, metrics = learned(tmp_path, *flags, "--limit-val", "10", "--target", "0.95")
    assert found["prune_thresholds"] == [0.0, 0.0]
    assert found["merge_thresholds"][0] == 1 and found["merge_thresholds"][1] < 1
    assert metrics["flops_ratio"] == pytest.approx(0.95, abs=0.02)


def learned_at(price, out, *flags, interrupted=None):
    """Learn with given prices (8,). Returns thresholds.json, and the ranks after each step.

    interrupted: the step that a Ctrl-C ends.
    """
    measured, set_ranks, ranks, ups = adaptive.differences, adaptive.set_ranks, [], []

    def priced(model, *args, **options):
        ups.append(options.get("up", args[-1]))
        *found, _, saved = measured(model, *args, **options)
        return *found, -saved * torch.tensor(price), saved

    def noted(maskers, scores, now):
        ranks.append(now.clone())
        set_ranks(maskers, scores, now)
        if len(ranks) == interrupted:
            os.kill(os.getpid(), signal.SIGINT)

    options = ["--model", "tiny", "--weights", "none", "--limit-train", "256", "-b", "8"]
    options += ["--limit-val", "10", "--target", "0.6", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ltmp.VARIANTS, "tiny", replace(ltmp.VARIANTS["tiny"], depth=4))
        patch.setattr(adaptive, "differences", priced)
        patch.setattr(adaptive, "set_ranks", noted)
        found, _ = learned(out, *options)
    # The first is before learning.
    assert ups[1:] == [step % 2 == 0 for step in range(32)][-len(ranks) :]
    return found, ranks


@pytest.mark.parametrize("pays", [True, False])
def test_a_late_prune_threshold_leaves_0_where_pruning_pays(tiny, tmp_path, pays):
    # Merging costs 1 for all that it saves, pruning in block 3 nothing, or 3.
    price = [1.0] * 5 + [0.0 if pays else 3.0] + [1.0] * 2
    found, _ = learned_at(price, tmp_path)
    prune = found["prune_thresholds"]
    assert prune[:2] == [0, 0] and (prune[2] > 0) == pays and prune[3] > 0


def test_what_starts_at_0_moves_slowly(tiny, tmp_path):
    # Merging in block 2 and pruning in block 3 have one price, so one direction.
    price = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    whole, ranks = learned_at(price, tmp_path / "whole")
    moved = ranks[-1] - ranks[len(ranks) // 2]
    assert moved[2] > 0 and moved[5] == pytest.approx(0.3 * moved[2].item(), rel=1e-3)
    # A run that is resumed still knows what started at 0.
    with pytest.raises(SystemExit):
        learned_at(price, tmp_path / "cut", interrupted=18)
    assert learned_at(price, tmp_path / "cut", "--resume")[0] == whole


def test_learning_leads_r_to_the_target(tiny, tmp_path, monkeypatch):
    choose = adaptive.choose
    monkeypatch.setattr(adaptive, "choose", lambda *args: choose(*args[:3], 0.75))
    learned_at([1.0] * 8, tmp_path, "--no-landing")
    with open(tmp_path / "log.csv", newline="") as file:
        r = [float(row["r"]) for row in csv.DictReader(file)]
    assert r[0] > 0.7 and sum(r[-16:]) / 16 == pytest.approx(0.6, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ltmp", "ltm", "ltp", "ltpm"])
def test_learning_meets_the_target_on_the_demo(tmp_path, method):
    flags = ["--limit-train", "96", "--limit-val", "200", "--method", method, "--target", "0.6"]
    found, metrics = learned(tmp_path, *flags)
    # 200 images differ from the training images by chance.
    assert metrics["flops_ratio"] == pytest.approx(0.6, abs=0.03)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    for step in ltmp.METHODS[method]:
        values = [saved[f"blocks.{i}.{step}_masker.threshold"] for i in range(6)]
        assert torch.equal(torch.tensor(found[f"{step}_thresholds"]), torch.cat(values))


@pytest.mark.slow
def test_learning_betters_where_it_starts(tmp_path):
    flags = ["--limit-train", "320", "--limit-val", "10", "--method", "ltp", "--target", "0.5"]
    learned(tmp_path, *flags)
    images, model = demo_images("val", 200), demo("ltp")
    ltmp.load_thresholds(model, tmp_path / "thresholds.json")
    with torch.no_grad():
        wanted = demo("dense")(images)[0]

    @torch.no_grad()
    def kl():
        return measuring.kl_divergence(model(images)[0], wanted).mean().item()

    after, r = kl(), landing.measure(model, images)
    adaptive.choose(model, demo("dense"), images, r)
    assert landing.measure(model, images) == pytest.approx(r, abs=0.0025)
    assert after < 0.9 * kl()


@pytest.mark.slow
@pytest.mark.parametrize("method, cosine", [("ltm", 0.95), ("ltmp", 0.8), ("ltp", 0.8)])
def test_the_gradient_of_r_is_near_its_differences(method, cosine):
    model, images = demo(method), demo_images("train", 16)
    maskers = landing.maskers(model)
    _, shares = landing.start(model, images, 0.5, steps=(ltmp.METHODS[method][0],))
    scores = adaptive.start_scores(model, images, shares)
    ranks = torch.tensor(list(shares.values()))
    model.requires_grad_(False)
    thresholds = [masker.threshold.requires_grad_() for masker in maskers.values()]
    adaptive.set_ranks(maskers, scores, ranks)
    slopes = []
    for (key, masker), rank in zip(maskers.items(), shares.values(), strict=True):
        # The gradient sees as many scores below the threshold as above.
        half = max(0.5 * min(rank, 1 - rank), 0.01)
        low, high = max(rank - half, 0.0), min(rank + half, 1.0)
        ends = [landing.threshold_at(key[1], scores[key], end) for end in (low, high)]
        masker.tau = 0.5 * abs(ends[1] - ends[0]).item()
        slopes.append((ends[1] - ends[0]) / (high - low))
    r = flops_ratio(model.train()(images)[1], model.config)
    gradient = torch.cat(torch.autograd.grad(r, thresholds, materialize_grads=True))
    slopes = torch.stack(slopes) * gradient
    differences = []
    for i, rank in enumerate(ranks.tolist()):
        found, ends = [], (rank + 0.05, max(rank - 0.05, 0.0))
        for end in ends:
            moved = ranks.clone()
            moved[i] = end
            adaptive.set_ranks(maskers, scores, moved)
            found.append(landing.measure(model, images))
        differences.append((found[0] - found[1]) / (ends[0] - ends[1]))
    assert F.cosine_similarity(slopes, torch.tensor(differences), dim=0) > cosine
    if method == "ltmp":
        # A token that is gone counts as one that no later block would remove.
        first = list(maskers).index((0, "prune"))
        assert slopes[first] / differences[first] > 2


@pytest.mark.parametrize("recipe", ["adaptive", "paper"])
@pytest.mark.parametrize("size", [(300, 300), (400, 300), (300, 533)])
def test_learning_sees_objects_as_large_as_landing_does(recipe, size, monkeypatch):
    transform = train.augmentation(None, ltmp.VARIANTS["deit_small_patch16_224"], recipe)
    image, rng, sides, crop = Image.new("RGB", size), random.Random(0), [], data.random_crop

    def noted(*args):
        left, top, right, bottom = crop(*args)
        sides.append(((right - left) * (bottom - top)) ** 0.5)
        return left, top, right, bottom

    monkeypatch.setattr(data, "random_crop", noted)
    for _ in range(100):
        transform(image, rng)
    if recipe == "adaptive":
        # Landing crops 0.9 of the shorter side.
        assert min(sides) > 269 and max(sides) < 271
    else:
        assert min(sides) < 150 and max(sides) > 280
