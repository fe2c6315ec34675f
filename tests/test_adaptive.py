"""The adaptive recipe: where it starts, where a step goes, and what it ends with."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import ltmp
import train
from extras import adaptive, landing, measuring, models

ALL = torch.ones(6, dtype=torch.bool)


def demo(method):
    """The demo model with random thresholds."""
    return models.build_model("demo", method, models.read_weights("demo", None)).eval()


def demo_images(split, count):
    """Images (count, 3, 28, 28) of the demo, as validation sees them."""
    images = data.open_split(None, split, models.clean_transform(ltmp.VARIANTS["demo"]))
    return torch.stack([image for image, _ in data.subset(images, count)])


def test_steer_goes_where_the_kl_falls_and_r_stays():
    torch.manual_seed(0)
    kl, r = torch.randn(6), torch.randn(6)
    along = adaptive.steer(kl, r, 0.0, ALL)
    assert along.norm() == pytest.approx(1)
    assert along @ r == pytest.approx(0, abs=1e-6)
    # steer's result is subtracted.
    assert along @ kl > 0
    # Only the direction of the gradient counts.
    torch.testing.assert_close(adaptive.steer(1e-4 * kl, 7 * r, 0.0, ALL), along)


@pytest.mark.parametrize("distance, back", [(0.005, 0.5), (-0.01, -1), (0.7, 3), (-0.7, -3)])
def test_steer_leads_back_to_the_target(distance, back):
    torch.manual_seed(0)
    kl, r = torch.randn(6), torch.randn(6)
    moved = adaptive.steer(kl, r, distance, ALL) - adaptive.steer(kl, r, 0.0, ALL)
    torch.testing.assert_close(moved, back * F.normalize(r, dim=0))


def test_steer_moves_only_what_is_learned():
    torch.manual_seed(0)
    learned = torch.tensor([True, False, True, True, False, True])
    direction = adaptive.steer(torch.randn(6), torch.randn(6), 0.01, learned)
    assert torch.equal(direction != 0, learned)


def test_thresholds_that_only_the_class_token_reaches_can_start(spread_model):
    model = spread_model(0, "ltpm", depth=3)
    size, maskers = model.config.image_size, landing.maskers(model)
    images = torch.randn(4, 3, size, size)
    scores = adaptive.start_scores(model, images, {key: 1.0 for key in maskers})
    assert scores.keys() == maskers.keys() and not len(scores[2, "prune"])
    assert all(adaptive.interquartile_range(found) > 0 for found in scores.values())
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
    slopes = adaptive.rank_slopes(maskers, scores, torch.full((12,), 0.125))
    assert (slopes[::2] < 0).all() and (slopes[1::2] > 0).all()


@pytest.mark.parametrize("seed, pays", [(0, True), (5, False)])
@pytest.mark.parametrize("method", ["ltmp", "ltpm"])
def test_pruning_is_learned_where_a_little_of_it_costs_hardly_more(
    spread_model, capsys, method, seed, pays
):
    model = spread_model(seed, method, image_size=10, depth=4)
    images = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    teacher = models.with_method(model, "dense").eval()
    shares = adaptive.choose(model, teacher, images, 0.6)
    merging = {share for (_, step), share in shares.items() if step == "merge"}
    pruning = {share for (_, step), share in shares.items() if step == "prune"}
    assert len(merging) == len(pruning) == 1
    assert pruning.pop() == pytest.approx(merging.pop() / 10 if pays else 0)
    assert landing.place(model, images, shares) == pytest.approx(0.6, abs=0.006)

    # The comparison, computed directly: both starts at the same r.
    merges = {key: landing.SHARE * (key[1] == "merge") for key in shares}
    little = {key: landing.SHARE * (1 if key[1] == "merge" else 0.1) for key in shares}
    alone = landing.scale(model, images, 0.6, merges, 0.005)
    roots = []
    for start in (alone[1], landing.scale(model, images, alone[0], little)[1]):
        landing.place(model, images, start)
        with torch.no_grad():
            p, q = (each(images)[0].double().log_softmax(1) for each in (teacher, model))
        roots.append((p.exp() * (p - q)).sum(1).sqrt().mean().item())
    assert (roots[1] < 1.1 * roots[0]) == pays
    assert f"{roots[0]:.3g} by merging alone, {roots[1]:.3g} with" in capsys.readouterr().err


def test_one_step_alone_and_a_target_that_merging_misses_leave_nothing_to_choose(spread_model):
    images = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    for method in ("ltm", "ltp", "ltmp"):
        model = spread_model(5, method, image_size=10, depth=4)
        teacher = models.with_method(model, "dense").eval()
        target = 0.2 if method == "ltmp" else 0.6
        shares = adaptive.choose(model, teacher, images, target)
        assert min(shares.values()) > 0
        assert landing.place(model, images, shares) == pytest.approx(target, abs=0.006)


def learned(out, *flags):
    """train.py on the demo; returns the contents of thresholds.json and metrics.json."""
    train.main([*flags, "--out", str(out)])
    names = ("thresholds.json", "metrics.json")
    return [json.loads((out / name).read_text()) for name in names]


def test_where_merging_alone_is_learned_nothing_is_ever_pruned(tiny, tmp_path, monkeypatch):
    def merging_alone(model, teacher, images, target):
        return landing.start(model, images, target, steps=("merge",))[1]

    monkeypatch.setattr(adaptive, "choose", merging_alone)
    flags = ["--model", "tiny", "--weights", "none", "--limit-train", "64", "-b", "8"]
    found, metrics = learned(tmp_path, *flags, "--limit-val", "10")
    assert found["prune_thresholds"] == [0.0, 0.0]
    assert max(found["merge_thresholds"]) < 1 and metrics["flops_ratio"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ltmp", "ltm", "ltp", "ltpm"])
def test_learning_meets_the_target_on_the_demo(tmp_path, method):
    flags = ["--limit-train", "96", "--limit-val", "200", "--method", method, "--target", "0.6"]
    found, metrics = learned(tmp_path, *flags)
    # 200 images differ from the training images by chance.
    assert metrics["flops_ratio"] == pytest.approx(0.6, abs=0.03)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    for step in ltmp.METHODS[method]:
        values = [saved[f"blocks.{i}.{step}_masker.threshold"] for i in range(12)]
        assert torch.equal(torch.tensor(found[f"{step}_thresholds"]), torch.cat(values))


@pytest.mark.slow
def test_learning_betters_where_it_starts(tmp_path):
    learned(
        tmp_path, "--limit-train", "160", "--limit-val", "10", "--method", "ltp", "--target", "0.5"
    )
    images, model = demo_images("val", 200), demo("ltp")
    ltmp.load_thresholds(model, tmp_path / "thresholds.json")
    with torch.no_grad():
        wanted = demo("dense")(images)[0]

    @torch.no_grad()
    def kl():
        return measuring.kl_divergence(model(images)[0], wanted).mean().item()

    after, r = kl(), landing.measure(model, images)
    assert landing.start(model, images, r)[0] == pytest.approx(r, abs=0.0025)
    assert after < 0.9 * kl()


@pytest.mark.slow
@pytest.mark.parametrize("method, cosine", [("ltm", 0.95), ("ltmp", 0.8), ("ltp", 0.8)])
def test_the_gradient_of_r_is_near_its_differences(method, cosine):
    model, images = demo(method), demo_images("train", 16)
    maskers = landing.maskers(model)
    _, shares = landing.start(model, images, 0.5, steps=(ltmp.METHODS[method][0],))
    scores = adaptive.start_scores(model, images, shares)
    ranks = torch.tensor(list(shares.values()))
    for key, masker in maskers.items():
        quarter = len(scores[key]) // 4
        masker.tau = 0.5 * (scores[key][3 * quarter] - scores[key][quarter]).item()
    model.requires_grad_(False)
    thresholds = [masker.threshold.requires_grad_() for masker in maskers.values()]
    adaptive.set_ranks(maskers, scores, ranks)
    slopes = adaptive.r_gradient(model, images, thresholds)
    slopes = slopes * adaptive.rank_slopes(maskers, scores, ranks)
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
