"""Every claim of the README and of the docstrings, as a test. Run with `pytest`."""

import ast
import csv
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import flops
import ltmp
import train
from ltmp import METHODS, VARIANTS, LTMPViT, ViTConfig, create_model, load_thresholds, load_weights

HERE = Path(__file__).parent
FIXED = ("tome", "topk")


# ---------------------------------------------------------------------------------------------
# Against vectors recorded from the authors' code (demo/reference.npz)

REFERENCE = {name: torch.from_numpy(array) for name, array in np.load(HERE / "demo" / "reference.npz").items()}
REFERENCE_WEIGHTS = {name[8:]: array for name, array in REFERENCE.items() if name.startswith("weights/")}
REFERENCE_CONFIG = ViTConfig(*REFERENCE["config"].tolist())


def reference_model(method, config=REFERENCE_CONFIG):
    r = int(REFERENCE[f"{method}/r"]) if method in FIXED else None
    weights = {name: w for name, w in REFERENCE_WEIGHTS.items()
               if not name.startswith("blocks.") or int(name.split(".")[1]) < config.depth}
    model = load_weights(LTMPViT(config, method, r=r), weights)
    lists = {f"{step}_thresholds": REFERENCE[f"{method}/{step}_thresholds"].tolist()[: config.depth]
             for step in METHODS[method] if method not in FIXED}
    return load_thresholds(model, {"method": method} | lists) if lists else model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("execution", ["single", "batched", "masked"])
def test_forward_matches_the_authors(method, execution):
    model, images = reference_model(method).eval(), REFERENCE["images"]
    with torch.inference_mode():
        if execution == "single":
            logits, kept = (torch.cat(parts, dim) for parts, dim in zip(zip(*(model(i[None]) for i in images)), (0, 1)))
        else:
            logits, kept = model(images, drop=execution == "batched")
    torch.testing.assert_close(logits, REFERENCE[f"{method}/logits"], atol=1e-5, rtol=0)
    assert torch.equal(kept.long().T, REFERENCE[f"{method}/kept"])


def test_gradients_match_the_authors():
    model = reference_model("ltmp", ViTConfig(32, 4, 48, 2, 3, 10)).train()
    logits, _ = model(REFERENCE["images"])
    loss = F.cross_entropy(logits, REFERENCE["train2/labels"])
    loss.backward()
    assert abs(loss.item() - REFERENCE["train2/loss"].item()) < 1e-5
    for step in ("merge", "prune"):
        grad = getattr(model.blocks[0], f"{step}_masker").threshold.grad
        torch.testing.assert_close(grad, REFERENCE[f"train2/grad_{step}0"], rtol=1e-3, atol=0)


# ---------------------------------------------------------------------------------------------
# One semantics: masked = batched = one image at a time


def set_thresholds(model, merge, prune):
    for block in model.blocks:
        for step, value in (("merge", merge), ("prune", prune)):
            if hasattr(getattr(block, f"{step}_masker", None), "threshold"):
                torch.nn.init.constant_(getattr(block, f"{step}_masker").threshold, value)


def spread_weights(model, seed, sharpness=3.0):
    """Random weights whose attention is far from uniform, so that scores differ between tokens."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "threshold" not in name and p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * (sharpness if "qkv" in name else 1) * p[0].numel() ** -0.5


def all_executions(model, images):
    """logits and kept of the masked, the batched and the image by image execution."""
    model.eval()
    with torch.inference_mode():
        single = [model(image[None]) for image in images]
        return [model(images, drop=False), model(images),
                (torch.cat([logits for logits, _ in single]), torch.cat([kept for _, kept in single], 1))]


def assert_one_function(model, images):
    """The three executions agree; the masked one, in training, has finite gradients. Returns kept."""
    (logits, kept), *others = all_executions(model, images)
    assert torch.isfinite(logits).all()
    for other_logits, other_kept in others:
        torch.testing.assert_close(other_logits, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())
        assert torch.equal(other_kept, kept)
    model.train()
    train_logits, train_kept = model(images)
    torch.testing.assert_close(train_logits, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())
    assert torch.equal(train_kept, kept)
    (F.cross_entropy(train_logits, torch.zeros(len(images), dtype=torch.long))
     + flops.flops_ratio(train_kept, model.config)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    return kept


def random_model(seed, method, **changes):
    rng = random.Random(seed)
    heads, grid = rng.choice([1, 2, 3]), rng.choice([2, 3, 4, 5, 6, 7])  # 5 to 50 tokens, odd and even
    fields = dict(image_size=2 * grid, patch_size=2, dim=8 * heads, depth=rng.choice([2, 3, 5]), heads=heads,
                  num_classes=7, layer_scale=rng.random() < 0.3)
    model = LTMPViT(ViTConfig(**fields | changes), method, r=rng.choice([1, 2, 3, 99]) if method in FIXED else None)
    spread_weights(model, seed)
    set_thresholds(model, rng.choice([0.5, 0.8, 0.9, 0.97]), rng.choice([0.2, 0.5, 0.9]) / model.config.num_tokens)
    images = torch.randn(rng.choice([2, 3, 5]), 3, *[model.config.image_size] * 2, generator=torch.Generator().manual_seed(seed))
    return model, images


@pytest.mark.parametrize("method", METHODS)
def test_one_semantics_on_random_models(method):
    reduced = 0
    for seed in range(25):
        model, images = random_model(seed, method)
        kept = assert_one_function(model, images)
        assert (kept >= 1).all() and (kept[1:] <= kept[:-1]).all()
        reduced += (kept[-1] < model.config.num_tokens).any().item()
    assert reduced == 0 if method == "dense" else reduced > 15  # the thresholds above do cut


EXTREMES = {  # merge threshold, prune threshold -> does it end with the class token alone?
    "all merge": (-2.0, -1.0),
    "none merge, none pruned": (2.0, -1.0),
    "all pruned": (2.0, 2.0),
    "all merge, all pruned": (-2.0, 2.0),
    "as training starts": (0.9, 0.0),
}


@pytest.mark.parametrize("method", ["ltmp", "ltm", "ltp", "ltpm"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_one_semantics_at_the_extremes(method, extreme):
    for grid in (1, 2, 3, 4):  # 2, 5, 10, 17 tokens
        model, images = random_model(grid, method, image_size=2 * grid, depth=5)
        set_thresholds(model, *EXTREMES[extreme])
        kept, n = assert_one_function(model, images), model.config.num_tokens
        if "none merge" in extreme:
            assert (kept == n).all()
        elif "all pruned" in extreme and method != "ltm":
            assert (kept == 1).all()
        elif extreme == "all merge" and method != "ltp":
            assert (kept[0] == n - (n - 1) // 2).all()  # every A token but the class token
            assert (kept[-1] == min(n, 2)).all()


@pytest.mark.parametrize("method", METHODS)
def test_attention_logits_of_ten_thousand(method):
    model, images = random_model(3, method)
    spread_weights(model, 3, sharpness=100.0)
    seen = []
    original = ltmp.MaskedAttention.forward

    class Spy(ltmp.MaskedAttention):
        @staticmethod
        def forward(ctx, q, k, *rest):
            seen.append((q @ k.transpose(-2, -1)).abs().max().item())
            return original(ctx, q, k, *rest)

    ltmp.MaskedAttention, kept_class = Spy, ltmp.MaskedAttention
    try:
        assert_one_function(model, images)
    finally:
        ltmp.MaskedAttention = kept_class
    assert method == "dense" or max(seen) > 1e4


@pytest.mark.parametrize("method", FIXED)
def test_fixed_count_removes_r_but_never_half(method):
    model, images = random_model(1, method, image_size=14, depth=5)  # 50 tokens
    for block in model.blocks:
        (block.merge_masker if method == "tome" else block.prune_masker).r = 13
    kept = assert_one_function(model, images)
    assert kept[:, 0].tolist() == [37, 24, 13, 7, 4]  # 13, 13, then at most (n - 1) // 2 of n


def plain_attention(q, k, v, size, mask):
    """The formula of MaskedAttention as one would write it down."""
    logits = q @ k.transpose(-2, -1) + size.log()[:, None, None]
    live = mask[:, None, None]
    log_sum = logits.masked_fill(live == 0, -math.inf).logsumexp(-1, keepdim=True).detach()
    weights = (logits - log_sum).clamp(max=ltmp.MaskedAttention.LIMIT).exp() * live
    attn = weights / weights.sum(-1, keepdim=True)
    return attn @ v, (attn.mean(1) * (mask / mask.sum(1, keepdim=True))[:, :, None]).sum(1)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
def test_attention_and_its_gradient_equal_the_plain_formula(sharpness):
    torch.manual_seed(0)
    B, H, N, D = 4, 2, 9, 4
    q, k, v = (torch.randn(B, H, N, D) * scale for scale in (sharpness, sharpness, 1))
    mask = (torch.arange(N) < torch.tensor([[9], [5], [2], [1]])).float()
    size = torch.randint(1, 5, (B, N)).float()
    weight_out, weight_importance = torch.randn(B, H, N, D), torch.randn(B, N)
    results = []
    for function in (plain_attention, ltmp.MaskedAttention.apply):
        inputs = [t.clone().requires_grad_() for t in (q, k, v, mask)]
        out, importance = function(*inputs[:3], size, inputs[3])
        loss = (out * weight_out).sum() + (importance * weight_importance).sum()
        results.append([out, importance, *torch.autograd.grad(loss, inputs)])
    for ours, plain in zip(results[1], results[0]):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


def test_masks_are_exactly_zero_and_one_with_the_slope_of_a_sigmoid():
    masker = ltmp.ThresholdMasker(0.3, tau=0.1)
    scores = torch.cat([torch.linspace(-1, 2, 10001), torch.tensor([0.3, -math.inf, math.inf])])[None]
    mask = masker(scores, None)
    assert set(mask.unique().tolist()) == {0.0, 1.0} and torch.equal(mask > 0, scores > masker.threshold)
    mask.sum().backward()
    soft = torch.sigmoid((scores - 0.3) / 0.1)
    torch.testing.assert_close(masker.threshold.grad, -(soft * (1 - soft) / 0.1).sum()[None], rtol=1e-4, atol=0)


def test_scores_masks_and_thresholds_are_float32_under_amp(monkeypatch):
    model, images = random_model(4, "ltmp")
    seen = []
    forward = ltmp.ThresholdMasker.forward
    monkeypatch.setattr(ltmp.ThresholdMasker, "forward", lambda self, scores, live: seen.append(scores) or forward(self, scores, live))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, kept = model.train()(images)
    assert logits.dtype == torch.bfloat16 and kept.dtype == torch.float32 and torch.isfinite(logits).all()
    for scores in seen:  # not merely stored in float32: rounding to bfloat16 would change them
        finite = scores[scores.isfinite() & (scores > 0)]
        assert scores.dtype == torch.float32 and (finite != finite.bfloat16().float()).float().mean() > 0.9


def test_class_feature_without_head_and_layer_scale():
    model, images = random_model(5, "ltmp", num_classes=0, layer_scale=True)
    assert model(images)[0].shape == (len(images), model.config.dim)
    names = model.state_dict().keys()
    assert {"blocks.0.ls1.gamma", "blocks.1.ls2.gamma"} <= names and not any("head" in name for name in names)
    before = model.eval()(images)[0]
    for block in model.blocks:
        block.ls1.gamma.data.fill_(0.5)
    assert not torch.allclose(before, model(images)[0])


@pytest.mark.parametrize("bad", [dict(method="ltmpp"), dict(method="tome"), dict(method="ltmp", r=3), dict(method="topk", r=[1, 2]), dict(name="deit")])
def test_wrong_models_are_refused_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        create_model(**{"name": "demo"} | bad)
    assert "\n" not in str(error.value)
