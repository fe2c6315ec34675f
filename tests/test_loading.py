"""The model's names and sizes, and what ltmp.load_weights and load_thresholds accept."""

import copy
import math
import random

import pytest
import torch

from ltmp import create_model, load_thresholds, load_weights


@pytest.mark.parametrize(
    "name, millions",
    [
        ("deit_tiny_patch16_224", 5.7),
        ("deit_base_patch16_384", 86.9),
        ("deit_small_distilled_patch16_224", 22.4),
        ("deit3_base_patch16_224", 86.6),
        ("deit3_large_patch16_384", 304.8),
        ("demo", 1.22),
    ],
)
def test_variants_have_their_published_size(name, millions):
    with torch.device("meta"):
        model = create_model(name, "dense")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_state_dict_names_are_deits_and_the_authors():
    names = set(create_model("demo", "ltmp").state_dict())
    block = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()
    layers = [f"blocks.{i}.{layer}" for i in range(6) for layer in block]
    layers += ["patch_embed.proj", "norm", "head"]
    deit = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    authors = {f"blocks.{i}.{s}_masker.threshold" for i in range(6) for s in ("merge", "prune")}
    assert names == deit | authors | {"cls_token", "pos_embed"}


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "ltmpp"},
        {"method": "tome"},
        {"method": "ltmp", "r": 3},
        {"method": "topk", "r": [1, 2]},
        {"method": "tome", "r": [None] * 6},
        {"name": "deit"},
        {"dim": 63},
        {"prefix_tokens": 0},
        {"prefix_tokens": 2, "head_tokens": 3},
    ],
)
def test_wrong_models_are_refused_in_one_line(bad):
    with pytest.raises(ValueError, match="^[^\n]+$"):
        create_model(**{"name": "demo"} | bad)


DAMAGES = {
    "missing blocks.1.mlp.fc1.bias": lambda s: s.pop("blocks.1.mlp.fc1.bias"),
    "unexpected blocks.12.norm1.bias": lambda s: s.update({"blocks.12.norm1.bias": s["norm.bias"]}),
    r"head.weight is \(3, 128\), not \(10, 128\)": lambda s: s.update(
        {"head.weight": torch.ones(3, 128)}
    ),
    "norm.bias holds NaN or infinity": lambda s: s["norm.bias"].fill_(math.nan),
    "missing blocks.1.merge_masker.threshold": lambda s: s.pop("blocks.1.merge_masker.threshold"),
}


@pytest.mark.parametrize("named", DAMAGES)
def test_weights_that_do_not_fit_are_named(named):
    model = create_model("demo")
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(create_model("demo").state_dict())
    DAMAGES[named](state)
    with pytest.raises(ValueError, match=named):
        load_weights(model, state)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_weights_load_from_a_file_and_a_dict(tmp_path):
    source = create_model("demo")
    for block in source.blocks:
        block.merge_masker.threshold.data.fill_(0.25)
        block.prune_masker.threshold.data.fill_(0.125)
    torch.save({"model": source.state_dict()}, tmp_path / "weights")
    for given_source in (tmp_path / "weights", source.state_dict()):
        model = load_weights(create_model("demo"), given_source)
        assert all(torch.equal(w, model.state_dict()[n]) for n, w in source.state_dict().items())
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is no state dict"):
        load_weights(create_model("demo"), {"model": torch.ones(1)})
    torch.save({"model": random.Random()}, tmp_path / "code")
    for name in ("text", "code", "absent"):
        with pytest.raises(ValueError, match=f"^[^\n]*{name}[^\n]*$"):
            load_weights(create_model("demo"), tmp_path / name)
    with pytest.raises(ValueError, match="the state dict is no state dict"):
        load_weights(create_model("demo"), {0: torch.zeros(1)})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"method": "ltm"}, "of the method ltm do not fit the method ltmp"),
        ({"merge_thresholds": [0.9]}, "merge_thresholds must be 6 numbers"),
        ({"merge_thresholds": [math.nan] * 6}, "merge_thresholds must be 6 numbers"),
        ({"prune_thresholds": [math.inf] * 6}, "prune_thresholds must be 6 numbers"),
        ({"prune_thresholds": [None] * 6}, "prune_thresholds must be 6 numbers"),
        ({"model": "deit_tiny_patch16_224"}, "were learned for deit_tiny_patch16_224"),
        ({"image_size": 384}, "learned at 384 pixels, this model has 28"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(change, named):
    found = {"method": "ltmp", "merge_thresholds": [0.5] * 6, "prune_thresholds": [0.1] * 6}
    model = create_model("demo")
    with pytest.raises(ValueError, match=named):
        load_thresholds(model, found | change)
    assert model.blocks[0].merge_masker.threshold == torch.tensor(0.9)
    assert load_thresholds(model, found).blocks[0].merge_masker.threshold == 0.5
