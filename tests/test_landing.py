"""Placing thresholds by shares, and landing: r is the target."""

import pytest
import torch

from extras import landing


@pytest.fixture
def images():
    return torch.randn(16, 3, 14, 14, generator=torch.Generator().manual_seed(0))  # (B, 3, S, S)


def values(model):
    """All thresholds, by (block, step)."""
    return {key: masker.threshold.item() for key, masker in landing.maskers(model).items()}


@pytest.mark.parametrize("method", ["ltmp", "ltm", "ltp", "ltpm"])
def test_place_removes_the_share_that_was_asked_for(spread_model, images, method):
    model = spread_model(0, method)
    asked = {(i, step): 0.05 + 0.03 * i for i, step in landing.maskers(model)}
    r = landing.place(model, images, asked)
    found, measured = landing.shares_of(model, images)
    assert found == pytest.approx(asked, abs=0.01)
    assert r == measured < 1


def test_share_0_is_off_and_share_1_is_all(spread_model, images):
    model = spread_model(0, "ltmp")
    assert landing.place(model, images, dict.fromkeys(landing.maskers(model), 0.0)) == 1
    assert set(values(model).values()) == {0.0, 1.0}
    assert values(model)[0, "merge"] == 1 and values(model)[0, "prune"] == 0
    scores = torch.tensor([0.2, 0.6, 0.9])
    assert landing.threshold_at("merge", scores, 1.0) < 0.2
    assert landing.threshold_at("prune", scores, 1.0) >= 0.9


@pytest.mark.parametrize("step, middle", [("merge", 0.65), ("prune", 0.2)])
def test_a_threshold_is_halfway_between_two_scores(step, middle):
    scores = torch.tensor([0.1, 0.3, 0.5, 0.8])
    assert landing.threshold_at(step, scores, 0.25).item() == pytest.approx(middle)


def test_placed_thresholds_do_not_hang_on_rounding(spread_model, images):
    model = spread_model(0, "ltmp")
    landing.start(model, images, 0.6)
    wanted = model(images)[1]  # (depth, B)

    def shake(masker, inputs):
        noise = torch.rand(inputs[0].shape, generator=generator) * 2 - 1
        return (inputs[0] + 1e-7 * noise,)

    generator = torch.Generator().manual_seed(1)
    for masker in landing.maskers(model).values():
        masker.register_forward_pre_hook(shake)
    with torch.no_grad():
        assert torch.equal(model(images)[1], wanted)


@pytest.mark.parametrize("method", ["ltmp", "ltm", "ltp"])
def test_start_gives_equal_shares_that_make_r_the_target(spread_model, images, method):
    model = spread_model(1, method)
    r, shares = landing.start(model, images, 0.6)
    assert r == pytest.approx(0.6, abs=0.003) and r == landing.measure(model, images)
    assert len(set(shares.values())) == 1 and shares.keys() == landing.maskers(model).keys()


def test_start_leaves_other_steps_off(spread_model, images):
    model = spread_model(1, "ltmp")
    _, shares = landing.start(model, images, 0.7, steps=("merge",))
    assert {shares[key] for key in shares if key[1] == "prune"} == {0.0}
    assert {value for key, value in values(model).items() if key[1] == "prune"} == {0.0}


def test_landing_is_exact_and_leaves_what_is_off_exactly_off(spread_model, images):
    model = spread_model(2, "ltmp")
    shares = {key: 0.02 + 0.02 * key[0] for key in landing.maskers(model)}
    off = [(0, "merge"), (1, "prune"), (4, "merge")]
    landing.place(model, images, shares | dict.fromkeys(off, 0.0))
    learned = values(model)
    found = {}
    for target in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        for key, masker in landing.maskers(model).items():
            masker.threshold.data.fill_(learned[key])
        after = landing.land(model, images, target)[1]
        assert after == pytest.approx(target, abs=0.003)
        assert after == landing.measure(model, images)
        found[target] = landing.shares_of(model, images)[0]
        assert all(found[target][key] == 0 for key in off)
        # Where nothing is left to prune, all of it is.
        scores = landing.scores_met(model, images)[0]
        pruned = {key: 1.0 for key in scores if key[1] == "prune" and not len(scores[key])}
        found[target] |= pruned
    # A larger target removes less.
    removed = [sum(shares.values()) for shares in found.values()]
    assert removed == sorted(removed, reverse=True)


@pytest.mark.parametrize("target", [0.55, 0.6, 0.7, 0.75])
def test_landing_from_nearby_looks_few_times(spread_model, images, monkeypatch, target):
    model = spread_model(2, "ltmp")
    landing.start(model, images, 0.65)
    # One threshold that removes next to nothing must not mislead the search.
    shares = landing.shares_of(model, images)[0]
    landing.place(model, images, shares | {(0, "merge"): 0.01})
    calls = []
    place = landing.place
    monkeypatch.setattr(landing, "place", lambda *found: calls.append(found) or place(*found))
    assert landing.land(model, images, target)[1] == pytest.approx(target, abs=0.003)
    assert len(calls) <= 5


@pytest.mark.parametrize("share", [1e-3, 0.01])
def test_a_target_next_to_1_ends(spread_model, images, monkeypatch, share):
    model = spread_model(2, "ltmp")
    calls = []
    place = landing.place

    def counted(*found):
        calls.append(found)
        assert len(calls) < 40
        return place(*found)

    monkeypatch.setattr(landing, "place", counted)
    shares = {key: share * (key == (0, "merge")) for key in landing.maskers(model)}
    r, _ = landing.scale(model, images, 0.9995, shares)
    assert 0 < 1 - r < 0.01


def test_what_is_at_the_target_stays_as_it_is(spread_model, images):
    model = spread_model(2, "ltmp")
    r, _ = landing.start(model, images, 0.6)
    before = values(model)
    assert landing.land(model, images, r + 0.001) == (r, r)
    assert values(model) == before


def test_where_nothing_is_removed_all_get_equal_shares(spread_model, images):
    model = spread_model(2, "ltmp")
    landing.place(model, images, dict.fromkeys(landing.maskers(model), 0.0))
    before, after = landing.land(model, images, 0.7)
    assert before == 1 and after == pytest.approx(0.7, abs=0.003)


def test_out_of_reach_names_the_lowest_r(spread_model, images):
    model = spread_model(2, "ltm")
    lowest = landing.place(model, images, dict.fromkeys(landing.maskers(model), 1.0))
    with pytest.raises(landing.OutOfReach, match=f"0.05 is out of reach: .* {lowest:.3f}"):
        landing.start(model, images, 0.05)


@pytest.mark.parametrize("off", [True, False])
def test_where_landing_fails_thresholds_stay_as_they_were(spread_model, images, off):
    model = spread_model(2, "ltmp")
    few = {key: 0.1 * (key == (5, "merge") or not off) for key in landing.maskers(model)}
    landing.place(model, images, few)
    before = values(model)
    with pytest.raises(landing.OutOfReach):
        landing.land(model, images, 0.05)
    assert values(model) == before


def test_a_threshold_that_is_off_stays_off_where_it_meets_nothing(spread_model, images):
    model = spread_model(2, "ltp")
    # Block 3 prunes all patches, so the blocks behind it meet none.
    r = landing.place(model, images, {key: float(key[0] == 3) for key in landing.maskers(model)})
    assert [round(share, 6) for share in landing.shares_of(model, images)[0].values()] == [
        0, 0, 0, 1, 0, 0
    ]  # fmt: skip
    landing.land(model, images, r + 0.03)
    assert [model.blocks[i].prune_masker.threshold.item() for i in (0, 1, 2, 4, 5)] == [0] * 5
