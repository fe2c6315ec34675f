"""The adaptive recipe: where it starts, where a step goes, and what it ends with."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import ltmp
import train
from extras import adaptive, batching, landing, measuring, models, splits


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
    return adaptive.neutral(cost / saved, saved), saved


def test_steer_goes_where_the_kl_falls_and_r_stays():
    price, saved = random_prices()
    along = adaptive.steer(price, torch.ones(6), saved, 0.0)
    assert along @ saved == pytest.approx(0, abs=1e-6)
    # steer's result is subtracted. What a rank costs is its price times what it saves.
    assert along @ (price * saved) > 0
    # The loss may have any factor, and r as well.
    found = adaptive.steer(1e-4 * price, torch.full((6,), 1e-8), 7 * saved, 0.0)
    torch.testing.assert_close(found, along)


def test_prices_compare_what_the_same_flops_cost():
    # The last rank saves little and costs little, but more than the others for each FLOP.
    cost, saved = torch.tensor([1.0, 1.0, 0.02]), torch.tensor([1.0, 1.0, 0.01])
    price = adaptive.neutral(cost / saved, saved)
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
    moved = adaptive.steer(average, square, saved, 0.0).abs()
    assert (moved[:2] > 0.8).all() and (moved[2:] < 0.4).all()


@pytest.mark.parametrize("distance, back", [(0.005, 0.25), (-0.01, -0.5), (0.7, 1.5), (-0.7, -1.5)])
def test_steer_leads_back_to_the_target(distance, back):
    price, saved = random_prices()
    there, here = (adaptive.steer(price, price**2, saved, far) for far in (distance, 0.0))
    torch.testing.assert_close(there - here, torch.full((6,), -back))


def test_steer_moves_only_what_is_learned():
    learned = torch.tensor([True, False, True, True, False, True])
    price, saved = random_prices()
    moved = adaptive.steer(price, torch.ones(6), saved * learned, 0.01)
    assert torch.equal(moved != 0, learned)
    # Without a part that leads back, what is learned leaves r.
    moved = adaptive.steer(price, torch.ones(6), saved * learned, 0.0)
    assert moved @ (saved * learned) == pytest.approx(0, abs=1e-6)


def test_steer_moves_nothing_where_nothing_is_learned():
    assert not adaptive.steer(*(torch.zeros(6),) * 3, 0.01).any()


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
    slopes = adaptive.set_ranks(maskers, scores, torch.full((6,), 0.5))
    assert slopes.isfinite().all() and all(masker.tau > 0 for masker in maskers.values())
    assert model.blocks[2].prune_masker.threshold == 0


def test_ranks_are_shares_of_the_scores_met(spread_model):
    model = spread_model(0, "ltmp")
    images = torch.randn(8, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    maskers = landing.maskers(model)
    # A number that float32 holds exactly.
    shares = dict.fromkeys(maskers, 0.125)
    scores = adaptive.start_scores(model, images, shares)
    placed = [masker.threshold.item() for masker in maskers.values()]
    slopes = adaptive.set_ranks(maskers, scores, torch.full((12,), 0.125))
    assert [masker.threshold.item() for masker in maskers.values()] == placed
    # A higher rank means a lower merge threshold, and a higher prune threshold.
    assert (slopes[::2] < 0).all() and (slopes[1::2] > 0).all()


@pytest.mark.parametrize("rank, half", [(0.01, 0.01), (0.1, 0.05), (0.5, 0.25), (0.9, 0.05)])
def test_a_gradient_sees_as_many_scores_below_its_threshold_as_above(spread_model, rank, half):
    maskers = landing.maskers(spread_model(0, "ltmp", depth=1))
    scores = {key: torch.linspace(0, 1, 100_000) ** 2 for key in maskers}
    slopes = adaptive.set_ranks(maskers, scores, torch.full((2,), rank))
    low, high = rank - half, rank + half
    rises = {"merge": (1 - high) ** 2 - (1 - low) ** 2, "prune": high**2 - low**2}
    for (_, step), slope in zip(maskers, slopes, strict=True):
        assert slope == pytest.approx(rises[step] / (high - low), rel=0.02)
        assert maskers[0, step].tau == pytest.approx(0.5 * abs(rises[step]), rel=0.02)


def test_a_threshold_that_removes_nothing_sees_the_first_scores(spread_model):
    maskers = landing.maskers(spread_model(0, "ltmp", depth=1))
    scores = {key: torch.linspace(0.2, 0.8, 100_000) for key in maskers}
    adaptive.set_ranks(maskers, scores, torch.zeros(2))
    merge, prune = maskers.values()
    assert (merge.threshold, prune.threshold) == (1, 0)
    # The hundredth that would go first ends at 0.794 and at 0.206.
    assert merge.tau == pytest.approx(0.5 * (1 - 0.794), rel=0.01)
    assert prune.tau == pytest.approx(0.5 * 0.206, rel=0.01)


def test_what_a_little_pruning_costs_is_near_its_differences():
    model, images = demo("ltmp"), demo_images("train", 64)
    maskers = landing.maskers(model)
    merging = {key: 0.1 * (key[1] == "merge" and key[0] > 0) for key in maskers}
    _, shares = landing.scale(model, images, 0.6, merging)
    scores = adaptive.start_scores(model, images, shares)
    wanted = measuring.predict(demo("dense"), images)

    def root(logits):
        return measuring.root(measuring.kl_divergence(logits, wanted)).mean()

    for block in (1, 2, 3, 4):

        def pruning(rank, block=block):
            ranks = shares | {(block, "prune"): rank}
            return adaptive.set_ranks(maskers, scores, torch.tensor(list(ranks.values())).float())

        ends = []
        for rank in (0.025, 0.075):
            pruning(rank)
            ends.append(root(measuring.predict(model, images)).item())
        slope = pruning(0.05)[2 * block + 1]
        threshold = maskers[block, "prune"].threshold
        (gradient,) = torch.autograd.grad(root(model.train()(images)[0]), threshold)
        # Windows as wide as half of all scores give less than a fifth.
        assert 0.4 < gradient * slope / ((ends[1] - ends[0]) / 0.05) < 2.5


@pytest.mark.parametrize(
    "seed, target, part, first, prunes",
    [(0, 0.8, 0.3, False, True), (3, 0.5, 0.3, True, True), (1, 0.8, 1.0, False, False)],
)
@pytest.mark.parametrize("method", ["ltmp", "ltpm"])
def test_a_start_has_what_pays_at_the_same_r(
    spread_model, capsys, monkeypatch, method, seed, target, part, first, prunes
):
    monkeypatch.setattr(adaptive, "LITTLE", part)
    model = spread_model(seed, method, image_size=10, depth=5)
    images = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    teacher = models.with_method(model, "dense").eval()
    shares = adaptive.choose(model, teacher, images, target)
    assert landing.place(model, images, shares) == pytest.approx(target, abs=0.002)
    *merged, last = (shares[i, "merge"] for i in range(5))
    assert merged[1:] == pytest.approx([merged[3]] * 3)
    assert merged[0] == pytest.approx(merged[3] if first else 0)
    pruned = [shares[i, "prune"] for i in range(5)]
    assert pruned[:4] == [0, 0, 0, pytest.approx(prunes * part * merged[3])]
    # All go in the last block: nothing reads them.
    assert last == 0 and pruned[4] >= 1

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
    start = scaled if first else scaled_without
    roots = [whole, without, root(start | {(3, "prune"): part * start[3, "merge"]})[0]]
    assert (roots[2] < 1.1 * roots[0 if first else 1]) == prunes
    told = [float(value) for value in re.findall(r"[ ](0\.\d+)", capsys.readouterr().err)]
    assert told == pytest.approx(roots, rel=0.01)


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
    slopes = adaptive.set_ranks(maskers, scores, ranks)
    slopes = slopes * adaptive.r_gradient(model, images, thresholds)
    differences = []
    for i, rank in enumerate(ranks.tolist()):
        found, ends = [], (rank + 0.05, max(rank - 0.05, 0.0))
        for end in ends:
            moved = ranks.clone()
            moved[i] = end
            adaptive.set_ranks(maskers, scores, moved)
            found.append(landing.measure(model, images))
        differences.append((found[0] - found[1]) / (ends[0] - ends[1]))
    # steer takes the direction alone.
    assert F.cosine_similarity(slopes, torch.tensor(differences), dim=0) > cosine


@pytest.mark.parametrize("recipe, scale", [("adaptive", (0.81, 0.81)), ("paper", (0.08, 1))])
def test_learning_sees_objects_as_large_as_landing_does(recipe, scale):
    transform = train.augmentation(None, ltmp.VARIANTS["deit_small_patch16_224"], recipe)
    image = Image.new("RGB", (300, 300))
    areas = []

    def crop(size, share, rng):
        areas.append(share)
        return 0, 0, 300, 300

    with pytest.MonkeyPatch.context() as until:
        until.setattr(data, "random_crop", crop)
        transform(image)
    assert areas[0] == pytest.approx(scale)
