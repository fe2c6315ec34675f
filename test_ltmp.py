"""Every claim of the README and of the docstrings, as a test. Run with `pytest`."""

import ast
import contextlib
import csv
import gzip
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import flops
import ltmp
import train
from ltmp import METHODS, VARIANTS, LTMPViT, ViTConfig, create_model, load_thresholds, load_weights

HERE = Path(__file__).parent
FIXED = ("tome", "topk")
settings.register_profile("the same every time", deadline=None, derandomize=True, database=None)
settings.load_profile("the same every time")


# ---------------------------------------------------------------------------------------------
# Against vectors recorded from the authors' code (demo/reference.npz)

REFERENCE = {
    name: torch.from_numpy(array)
    for name, array in np.load(HERE / "demo" / "reference.npz").items()
}
REFERENCE_WEIGHTS = {
    name[8:]: array for name, array in REFERENCE.items() if name.startswith("weights/")
}
REFERENCE_CONFIG = ViTConfig(*REFERENCE["config"].tolist())


def reference_model(method, config=REFERENCE_CONFIG):
    r = int(REFERENCE[f"{method}/r"]) if method in FIXED else None
    weights = {
        name: w
        for name, w in REFERENCE_WEIGHTS.items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < config.depth
    }
    model = load_weights(LTMPViT(config, method, r=r), weights)
    lists = {
        f"{step}_thresholds": REFERENCE[f"{method}/{step}_thresholds"].tolist()[: config.depth]
        for step in METHODS[method]
        if method not in FIXED
    }
    return load_thresholds(model, {"method": method} | lists) if lists else model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("execution", ["single", "batched", "masked"])
def test_forward_matches_the_authors(method, execution):
    model, images = reference_model(method).eval(), REFERENCE["images"]
    with torch.inference_mode():
        if execution == "single":
            logits, kept = (
                torch.cat(parts, dim)
                for parts, dim in zip(zip(*(model(i[None]) for i in images)), (0, 1))
            )
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


def spread_weights(model, seed, sharpness=1.5):
    """Random weights whose attention is far from uniform, so that scores differ between tokens, and no more: rounding grows with it."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
        elif "threshold" not in name and p.dim() > 1:
            p.data = (
                torch.randn(p.shape, generator=generator)
                * (sharpness if "qkv" in name else 1)
                * p[0].numel() ** -0.5
            )


def all_executions(model, images):
    """logits and kept of the masked, the batched and the image by image execution."""
    model.eval()
    with torch.inference_mode():
        single = [model(image[None]) for image in images]
        return [
            model(images, drop=False),
            model(images),
            (
                torch.cat([logits for logits, _ in single]),
                torch.cat([kept for _, kept in single], 1),
            ),
        ]


def assert_one_function(model, images):
    """The three executions agree; the masked one, in training, has finite gradients. Returns kept."""
    (logits, kept), *others = all_executions(model, images)
    assert torch.isfinite(logits).all()
    for other_logits, other_kept in others:
        torch.testing.assert_close(
            other_logits, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item()
        )
        assert torch.equal(other_kept, kept)
    model.train()
    train_logits, train_kept = model(images)
    torch.testing.assert_close(
        train_logits, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item()
    )
    assert torch.equal(train_kept, kept)
    (
        F.cross_entropy(train_logits, torch.zeros(len(images), dtype=torch.long))
        + flops.flops_ratio(train_kept, model.config)
    ).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    return kept


def random_model(seed, method, **changes):
    rng = random.Random(seed)
    heads, grid = (
        rng.choice([1, 2, 3]),
        rng.choice([2, 3, 4, 5, 6, 7]),
    )  # 5 to 50 tokens, odd and even
    fields = dict(
        image_size=2 * grid,
        patch_size=2,
        dim=8 * heads,
        depth=rng.choice([2, 3, 5]),
        heads=heads,
        num_classes=7,
        layer_scale=rng.random() < 0.3,
    )
    model = LTMPViT(
        ViTConfig(**fields | changes),
        method,
        r=rng.choice([1, 2, 3, 99]) if method in FIXED else None,
    )
    spread_weights(model, seed)
    set_thresholds(
        model,
        rng.choice([0.5, 0.8, 0.9, 0.97]),
        rng.choice([0.2, 0.5, 0.9]) / model.config.num_tokens,
    )
    images = torch.randn(
        rng.choice([2, 3, 5]),
        3,
        *[model.config.image_size] * 2,
        generator=torch.Generator().manual_seed(seed),
    )
    return model, images


@pytest.fixture(params=[1, 2, 1000])
def images_at_once(request, monkeypatch):
    """The test runs with attention image by image, as on a CPU with one thread, by two, and all together, as on a GPU."""
    monkeypatch.setattr(ltmp, "CACHED_LOGITS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def test_attention_takes_every_image_once_and_no_more_at_a_time_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for images, longest in ((1, 257), (2, 1), (3, 1000), (64, 257), (64, 50), (500, 20)):
        counts = [random.Random(i).randint(1, longest) for i in range(images)]
        parts = ltmp.parts_of(counts, 6, torch.device("cpu"), training=False)
        assert sum((counts[part] for part, _, _ in parts), []) == counts
        for part, shortest, n in parts:
            taken = counts[part]
            assert (shortest, n) == (min(taken), max(taken))
            assert len(taken) <= 2 or 6 * len(taken) * n * n <= ltmp.CACHED_LOGITS
        assert len(ltmp.parts_of(counts, 6, torch.device("meta"), training=False)) == 1
        assert (
            len(ltmp.parts_of(counts, 6, torch.device("cpu"), training=True)) == (images + 1) // 2
        )


@pytest.mark.parametrize("method", METHODS)
def test_one_semantics_on_random_models(images_at_once, method):
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
def test_every_patch_is_held_by_one_live_token_or_was_pruned(method):
    for seed in range(10):
        model, images = random_model(seed, method)
        sizes = []  # of the live tokens after each block
        for block in model.blocks:
            block.register_forward_hook(
                lambda block, inputs, out: sizes.append(
                    out[1] if out[2] is None else out[1] * out[2]
                )
            )
        model.eval()
        with torch.inference_mode():
            logits, kept, held_by = model(images, trace=True)
            assert torch.equal(logits, model(images)[0])
            masked, single = (
                model(images, drop=False, trace=True)[2],
                [model(image[None], trace=True)[2] for image in images],
            )
        assert torch.equal(held_by, masked) and torch.equal(held_by, torch.cat(single, 1))
        assert held_by.shape == (model.config.depth, len(images), model.config.num_tokens - 1)
        pruned = (held_by < 0).float()
        assert (pruned[1:] >= pruned[:-1]).all()  # what was pruned stays pruned
        assert method not in ("dense", "ltm", "tome") or not pruned.any()
        for block, size in enumerate(sizes[: model.config.depth]):
            for i, n in enumerate(kept[block].int().tolist()):
                held = held_by[block, i][held_by[block, i] >= 0]
                assert torch.equal(
                    held.bincount(minlength=n)[1:].float(), size[i, 1:n]
                )  # of each token, and none of a dead one
                assert size[i, 0] == 1 and (held > 0).all()  # the class token holds no patch


@pytest.mark.parametrize("method", METHODS)
def test_attention_logits_of_ten_thousand(method, monkeypatch):
    model, images = random_model(3, method)
    spread_weights(model, 3, sharpness=150.0)
    seen, original = [], ltmp.attend

    def spy(q, k, v, size, mask, training):
        seen.append(
            (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1))
            .masked_fill(mask[:, None, None] == 0, -math.inf)
            .max()
            .item()
        )  # of live keys
        return original(q, k, v, size, mask, training)

    monkeypatch.setattr(ltmp, "attend", spy)
    assert_one_function(model, images)
    assert method == "dense" or max(seen) > 1e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_thresholds_and_counts_are_float32_whatever_the_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = create_model("demo").eval()
        with torch.inference_mode():
            logits, kept = model(torch.zeros(1, 3, 28, 28))
    finally:
        torch.set_default_dtype(before)
    assert (
        logits.dtype == dtype
        and kept.dtype == model.blocks[0].merge_masker.threshold.dtype == torch.float32
    )
    assert model.blocks[0].merge_masker.threshold.item() == torch.tensor(0.9).item()


def plain_step(key, importance, merge_at, prune_at, r):
    """Merge and prune of one image of n live tokens, token by token: key (n, D), importance (n,) -> what is left, in order, each as its sources."""
    key, importance, tokens, nearest = (
        F.normalize(key, dim=-1),
        importance.tolist(),
        {i: [i] for i in range(len(key))},
        {},
    )
    for a in range(2, len(key), 2):  # the class token does not merge
        nearest[a] = max(
            (min((key[a] @ key[b]).item(), 1), -b) for b in range(1, len(key), 2)
        )  # of equal ones the first
    most_similar = sorted(nearest, key=lambda a: -nearest[a][0])
    for a in (
        most_similar[:r] if r is not None else [a for a in nearest if nearest[a][0] > merge_at]
    ):
        tokens[-nearest[a][1]] += tokens.pop(a)
    order = [tokens[i] for i in sorted(tokens, key=lambda i: (i % 2, i))]  # set A, then set B
    score = lambda sources: max(importance[i] for i in sources)
    dropped = (
        [t for t in order if score(t) <= prune_at]
        if r is None
        else sorted(order, key=score)[: min(r, (len(order) - 1) // 2)]
    )
    return [t for t in order if t not in dropped]


A_THRESHOLD = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]) | st.floats(-1, 1, width=32)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0),
    st.booleans(),
    A_THRESHOLD,
    A_THRESHOLD,
    st.none() | st.integers(0, 12),
)
def test_a_step_of_a_batch_is_a_loop_over_the_tokens_of_each_image(
    live, dead, seed, equal, merge_at, prune_at, r
):
    """Images of `live` tokens each, the rest dead; equal: many have the same key or importance, some keys are 0. r: tome and topk in place of thresholds."""
    B, N, generator = len(live), max(live) + dead, torch.Generator().manual_seed(seed % 2**63)
    randint = lambda high: torch.randint(high, (B, N), generator=generator)
    key = torch.eye(5)[randint(5), :4] if equal else torch.randn(B, N, 4, generator=generator)
    importance, size = (randint(4 if equal else 2**20) / (4 if equal else 2**20)), 1.0 + randint(9)
    importance[:, 0] = math.inf
    mask = (torch.arange(N) < torch.tensor(live)[:, None]).float()
    maskers = [ltmp.ThresholdMasker(t, 0.1) for t in (merge_at, prune_at)]
    if r is not None:
        maskers = [ltmp.FixedCountMasker(r, which) for which in ("most similar", "least important")]
    expected = [
        plain_step(key[i, :n], importance[i, :n], merge_at, prune_at, r) for i, n in enumerate(live)
    ]
    longest = max(map(len, expected))

    x, new_size, merged, most = ltmp.merge(
        torch.eye(N).expand(B, N, N), key, size, mask, importance, maskers[0]
    )  # each token knows whence it is
    assert torch.equal((new_size * merged).sum(1), (size * mask).sum(1))  # merging loses no patch
    pruned = ltmp.prune(merged, most, maskers[1])
    assert set(merged.unique().tolist()) | set(pruned.unique().tolist()) <= {0.0, 1.0}
    for drop in (False, True):
        new_mask, (x_out, size_out, most_out), counts = ltmp.live_first(
            pruned, (x, new_size, most), drop
        )
        assert new_mask.shape[1] == (longest if drop else N) and counts == list(map(len, expected))
        for i, tokens in enumerate(expected):
            n = len(tokens)
            assert tokens[0] == [0] and new_mask[i].tolist() == [1.0] * n + [0.0] * (
                new_mask.shape[1] - n
            )
            assert [sorted(sources) for sources in tokens] == [
                row.nonzero().flatten().tolist() for row in x_out[i, :n]
            ]
            for j, sources in enumerate(tokens):
                assert (
                    size_out[i, j] == size[i, sources].sum()
                    and most_out[i, j] == importance[i, sources].max()
                )
                torch.testing.assert_close(
                    x_out[i, j, sources], size[i, sources] / size[i, sources].sum()
                )


def test_a_merge_threshold_of_one_merges_not_even_equal_tokens():
    key, ones = (
        torch.randn(500, 1, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 10, -1),
        torch.ones(500, 10),
    )
    cosines = F.normalize(key, dim=-1) @ F.normalize(key, dim=-1).transpose(1, 2)
    assert (cosines > 1).any()  # by rounding
    assert torch.equal(
        ltmp.merge(key, key, ones, ones, ones, ltmp.ThresholdMasker(1, 0.1))[2], ones
    )


@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
    st.floats(-2, 2, width=32),
    st.sampled_from([1e-6, 0.1, 0.5, 1e6]),
)
def test_masks_are_exactly_zero_and_one_for_any_scores(scores, threshold, tau):
    scores, masker = torch.tensor([scores]), ltmp.ThresholdMasker(threshold, tau)
    assert torch.equal(masker(scores, None), (scores > threshold).float())


@pytest.mark.parametrize("method", FIXED)
def test_fixed_count_removes_r_but_never_half(method):
    model, images = random_model(1, method, image_size=14, depth=5)  # 50 tokens
    for block in model.blocks:
        (block.merge_masker if method == "tome" else block.prune_masker).r = 13
    kept = assert_one_function(model, images)
    assert kept[:, 0].tolist() == [37, 24, 13, 7, 4]  # 13, 13, then at most (n - 1) // 2 of n


def plain_attention(q, k, v, size, mask, counts):
    """The formula of MaskedAttention as one would write it down."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + size.log()[:, None, None]
    live = mask[:, None, None]
    log_sum = logits.masked_fill(live == 0, -math.inf).logsumexp(-1, keepdim=True).detach()
    weights = (logits - log_sum).clamp(max=math.log(ltmp.MAX_RATIO)).exp() * live
    attn = weights / weights.sum(-1, keepdim=True)
    return attn @ v, (attn.mean(1) * (mask / mask.sum(1, keepdim=True))[:, :, None]).sum(1)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("counts", [[9, 5, 2, 1], [7, 6, 6, 4], [1, 1, 1, 1], [9, 9, 9, 9]])
def test_attention_and_its_gradient_equal_the_plain_formula(images_at_once, sharpness, counts):
    torch.manual_seed(0)
    B, H, N, D = 4, 2, 9, 4
    q, k, v = (torch.randn(B, H, N, D) * scale for scale in (2 * sharpness, sharpness, 1))
    mask = (torch.arange(N) < torch.tensor(counts)[:, None]).float()
    size = torch.randint(1, 5, (B, N)).float()
    weight_out, weight_importance = (
        torch.randn(B, H, N, D) * mask[:, None, :, None],
        torch.randn(B, N),
    )
    results = []
    for function in (plain_attention, ltmp.MaskedAttention.apply):
        inputs = [t.clone().requires_grad_() for t in (q, k, v, size, mask)]
        out, importance = function(*inputs, counts)
        loss = (out * weight_out).sum() + (importance * weight_importance).sum()
        results.append([out, importance, *torch.autograd.grad(loss, inputs)])
    for ours, plain in zip(results[1], results[0]):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("method", ["ltmp", "ltm", "ltp", "ltpm"])
def test_gradients_without_the_dead_equal_those_with_all(images_at_once, method, monkeypatch):
    def gradients(model, images):
        model.zero_grad()
        logits, kept = model.train()(images)
        (
            F.cross_entropy(logits, torch.zeros(len(images), dtype=torch.long))
            + flops.flops_ratio(kept, model.config)
        ).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    for seed in range(10):
        model, images = random_model(seed, method)
        for block in model.blocks:
            if "merge" in block.steps:
                block.merge_masker.whole_gradient = seed % 2 == 1
        ours = gradients(model, images)
        with monkeypatch.context() as plain:  # every layer on every token, attention by autograd
            plain.setattr(ltmp, "on_live", lambda layer, x, rows: layer(x))
            plain.setattr(ltmp.MaskedAttention, "apply", plain_attention)
            theirs = gradients(model, images)
        assert ours.keys() == theirs.keys() and any("threshold" in name for name in ours)
        for name in ours:
            torch.testing.assert_close(
                ours[name],
                theirs[name],
                rtol=1e-4,
                atol=1e-4 * theirs[name].abs().max().item() + 1e-7,
                msg=name,
            )


def test_masks_are_exactly_zero_and_one_with_the_slope_of_a_sigmoid():
    masker = ltmp.ThresholdMasker(0.3, tau=0.1)
    scores = torch.cat([torch.linspace(-1, 2, 10001), torch.tensor([0.3, -math.inf, math.inf])])[
        None
    ]
    mask = masker(scores, None)
    assert set(mask.unique().tolist()) == {0.0, 1.0} and torch.equal(
        mask > 0, scores > masker.threshold
    )
    mask.sum().backward()
    soft = torch.sigmoid((scores - 0.3) / 0.1)
    torch.testing.assert_close(
        masker.threshold.grad, -(soft * (1 - soft) / 0.1).sum()[None], rtol=1e-4, atol=0
    )


def test_scores_masks_and_thresholds_are_float32_under_amp(monkeypatch):
    model, images = random_model(4, "ltmp")
    seen = []
    forward = ltmp.ThresholdMasker.forward
    monkeypatch.setattr(
        ltmp.ThresholdMasker,
        "forward",
        lambda self, scores, live: seen.append(scores) or forward(self, scores, live),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, kept = model.train()(images)
    assert (
        logits.dtype == torch.bfloat16
        and kept.dtype == torch.float32
        and torch.isfinite(logits).all()
    )
    for scores in seen:  # not merely stored in float32: rounding to bfloat16 would change them
        finite = scores[scores.isfinite() & (scores > 0)]
        assert (
            scores.dtype == torch.float32
            and (finite != finite.bfloat16().float()).float().mean() > 0.9
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_amp_are_about_those_of_float32(images_at_once, dtype):
    def gradients(context):
        model = demo_model("ltmp").train()
        set_thresholds(model, 0.97, 0.001)
        with context:
            logits, kept = model(images)
        loss = (
            F.cross_entropy(logits.float(), torch.arange(8))
            + 10 * (flops.flops_ratio(kept, model.config) - 0.5) ** 2
        )
        (1024 * loss).backward()  # as scaled as gradients in float16 are
        return torch.cat([p.grad.flatten() for p in model.parameters()]), torch.stack(
            [p.grad for name, p in model.named_parameters() if "threshold" in name]
        )

    images = torch.stack(
        [
            image
            for image, _ in data.subset(
                data.open_split(None, "train", evaluate.clean_transform(VARIANTS["demo"])), 8
            )
        ]
    )
    for exact, rounded in zip(
        gradients(contextlib.nullcontext()), gradients(torch.autocast("cpu", dtype=dtype))
    ):
        assert (
            torch.isfinite(rounded).all()
            and F.cosine_similarity(exact.flatten(), rounded.flatten(), 0) > 0.9
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_and_its_gradient_in_half_precision_are_about_those_of_float32(
    images_at_once, dtype
):
    torch.manual_seed(0)
    B, H, N, D = 4, 3, 40, 16
    q, k, v, weight_out = (torch.randn(B, H, N, D).to(dtype) for _ in range(4))
    mask = (torch.arange(N) < torch.tensor([40, 31, 12, 1])[:, None]).float()
    size, weight_importance = (
        torch.randint(1, 5, (B, N)).float(),
        1e3 * torch.randn(B, N) * mask,
    )  # tall, as scores' gradients are with a small tau
    weight_importance[:, 0] = 0  # nothing depends on the class token's
    results = []
    for exact in (torch.float32, dtype):
        inputs = [
            t.detach().clone().requires_grad_()
            for t in (q.to(exact), k.to(exact), v.to(exact), size, mask)
        ]
        out, importance = ltmp.MaskedAttention.apply(*inputs, ltmp.live_counts(mask))
        loss = (out * weight_out * mask[:, None, :, None]).float().sum() + (
            importance * weight_importance
        ).sum()
        results.append(
            [out * mask[:, None, :, None], importance, *torch.autograd.grad(64 * loss, inputs)]
        )
    for exact, rounded in zip(*results):
        torch.testing.assert_close(
            rounded.float(),
            exact,
            rtol=0,
            atol=8 * torch.finfo(dtype).eps * exact.abs().max().item(),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_thresholds_as_they_are(dtype):
    model, images = random_model(4, "ltmp")
    before = [masker.threshold.clone() for _, masker in train.threshold_maskers(model)]
    logits, kept = model.to(dtype).eval()(images.to(dtype))
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    assert all(
        torch.equal(masker.threshold, old)
        for old, (_, masker) in zip(before, train.threshold_maskers(model))
    )
    assert next(iter(model.to("meta").blocks[0].merge_masker.parameters())).device.type == "meta"


def test_class_feature_without_head_and_layer_scale():
    model, images = random_model(5, "ltmp", num_classes=0, layer_scale=True)
    assert model(images)[0].shape == (len(images), model.config.dim)
    names = model.state_dict().keys()
    assert {"blocks.0.ls1.gamma", "blocks.1.ls2.gamma"} <= names and not any(
        "head" in name for name in names
    )
    before = model.eval()(images)[0]
    for block in model.blocks:
        block.ls1.gamma.data.fill_(0.5)
    assert not torch.allclose(before, model(images)[0])


@pytest.mark.parametrize(
    "bad",
    [
        dict(method="ltmpp"),
        dict(method="tome"),
        dict(method="ltmp", r=3),
        dict(method="topk", r=[1, 2]),
        dict(name="deit"),
    ],
)
def test_wrong_models_are_refused_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        create_model(**{"name": "demo"} | bad)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# FLOPs


def counted(model, image):
    """Multiply-adds of one image as torch counts them on what really runs; and the tokens kept."""
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # torch 2.4 cannot count inference_mode, nor fused attention
        _, kept = model.eval()(image[None])
    return counter.get_total_flops() / 2, kept


def score_flops(model, kept):
    """What r leaves out, for one image: the mean over queries that gives importance, and the matching where merging comes first."""
    n = torch.tensor(
        [model.config.num_tokens] + kept[:-1, 0].int().tolist()
    )  # tokens that enter each block
    importance = 0 if model.method == "dense" else model.config.heads * (n**2).sum().item()
    matching = (
        (((n + 1) // 2) * (n // 2)).sum().item() * model.config.dim // model.config.heads
        if "merge" in METHODS[model.method]
        else 0
    )
    return importance, matching


def test_deit_small_has_4_6_gflops():
    assert flops.model_flops(VARIANTS["deit_small_patch16_224"]) / 1e9 == pytest.approx(
        4.6, abs=0.01
    )
    assert flops.model_flops(VARIANTS["deit_tiny_patch16_224"]) / 1e9 == pytest.approx(
        1.26, abs=0.01
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "reference"])
def test_flops_are_what_torch_counts(method, name):
    if name == "reference":
        model, image = reference_model(method), REFERENCE["images"][0]
    else:
        model = create_model(name, method, r=12 if method in FIXED else None, depth=3)
        spread_weights(model, 0)
        set_thresholds(model, 0.2, 1 / 220)
        image = torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(0))
    count, kept = counted(model, image)
    ours = flops.model_flops(model.config, kept)
    assert method == "dense" or ours < 0.97 * flops.model_flops(model.config)
    # To the last multiply-add, but for what r leaves out.
    importance, matching = score_flops(model, kept)
    if method == "ltpm":  # matches what it has pruned already: fewer
        assert 0 < count - ours.item() - importance < matching
    else:
        assert count == ours.item() + importance + matching
    assert importance + matching < 0.01 * count or name == "reference"


def test_ratio_is_per_image_and_differentiable():
    config = ViTConfig(32, 4, 48, 4, 3, 10)
    kept = torch.tensor([[65.0, 40.0], [50.0, 30.0], [45.0, 2.0], [45.0, 1.0]], requires_grad=True)
    r = flops.flops_ratio(kept, config)
    per_image = [
        flops.model_flops(config, kept[:, i].tolist()) / flops.model_flops(config) for i in (0, 1)
    ]
    assert r.item() == pytest.approx(sum(per_image) / 2)
    of_the_mean = flops.model_flops(config, kept.mean(1)) / flops.model_flops(config)
    assert of_the_mean < r  # the paper's formula, on the batch's mean counts
    r.backward()
    assert (kept.grad > 0).all()
    nudged = kept.detach().clone()
    nudged[1, 0] += 1
    slope = (
        flops.flops_ratio(nudged.double(), config)
        - flops.flops_ratio(kept.detach().double(), config)
    ).item()
    assert kept.grad[1, 0].item() == pytest.approx(slope, rel=0.02)
    assert flops.flops_ratio(torch.full((4, 3), 65.0), config).item() == 1


def test_flops_table_adds_up():
    run = subprocess.run(
        [sys.executable, "flops.py", "deit_small_patch16_224", "--kept"] + ["150"] * 12,
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    rows = [float(line.split()[2]) for line in run[1:-1]]
    assert len(rows) == 26 and sum(rows) == pytest.approx(float(run[-1].split()[1]), abs=2)
    assert (
        f"r = {flops.model_flops(VARIANTS['deit_small_patch16_224'], [150] * 12) / flops.model_flops(VARIANTS['deit_small_patch16_224']):.3f}"
        in run[-1]
    )


@pytest.mark.parametrize(
    "flags, message",
    {
        "--kept 3 3": "demo keeps 1 to 197 tokens in each of 12 blocks; got 3 3",
        "--kept " + "198 " * 12: "demo keeps 1 to 197 tokens",
        "--kept " + "nan " * 12: "demo keeps 1 to 197 tokens",
        "--metrics absent.json": "absent.json is no metrics.json of train.py or evaluate.py: FileNotFoundError",
        "--metrics demo/thresholds.json": "demo/thresholds.json is no metrics.json of train.py or evaluate.py: KeyError('kept')",
        "--metrics demo/frontier.csv": "demo/frontier.csv is no metrics.json",
    }.items(),
)
def test_a_flops_table_of_nonsense_is_refused(monkeypatch, capsys, flags, message):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", ["flops.py", "demo", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        flops.main()
    assert stopped.value.code == 2 and f"error: {message}" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Weights and thresholds


def deit_names(depth):
    """The names in DeiT's published state dicts."""
    block = [
        "norm1.weight",
        "norm1.bias",
        "attn.qkv.weight",
        "attn.qkv.bias",
        "attn.proj.weight",
        "attn.proj.bias",
        "norm2.weight",
        "norm2.bias",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
    ]
    return {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
        *(f"blocks.{i}.{name}" for i in range(depth) for name in block),
    }


def test_state_dict_names_are_deits_and_the_authors():
    assert set(create_model("deit_tiny_patch16_224", "dense").state_dict()) == deit_names(12)
    extra = set(create_model("deit_tiny_patch16_224", "ltmp").state_dict()) - deit_names(12)
    assert extra == {
        f"blocks.{i}.{step}_masker.threshold" for i in range(12) for step in ("merge", "prune")
    }
    assert create_model("demo").blocks[3].prune_masker.threshold.shape == (1,)


@pytest.mark.parametrize(
    "name, params",
    [
        ("deit_tiny_patch16_224", 5.7),
        ("deit_small_patch16_224", 22.1),
        ("deit_base_patch16_224", 86.6),
        ("deit_base_patch16_384", 86.9),
        ("vit_large_patch16_224", 304.3),
        ("demo", 0.62),
    ],
)
def test_variants_have_their_published_size(name, params):
    with torch.device("meta"):
        model = create_model(name, "dense")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.06)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}])
def test_weights_load_from_file_and_dict(tmp_path, wrap):
    source, images = create_model("demo"), torch.randn(2, 3, 28, 28)
    files = [
        tmp_path / name for name in ("w.pth", "w.safetensors", "w")
    ]  # the content says what it is
    for file in files:
        torch.save(
            wrap({name: w for name, w in source.state_dict().items() if "threshold" not in name}),
            file,
        )
    for given in (*files, wrap(source.state_dict())):
        model = load_weights(create_model("demo"), given)
        assert torch.equal(model.eval()(images)[0], source.eval()(images)[0])


def damaged(state, damage):
    if damage == "missing":
        del state["blocks.2.mlp.fc1.bias"]
    elif damage == "unexpected":
        state["blocks.12.norm1.bias"] = torch.zeros(64)
    else:
        state["head.weight"] = torch.zeros(1000, 64)
    return state


@pytest.mark.parametrize(
    "damage, named",
    [
        ("missing", "missing blocks.2.mlp.fc1.bias (256,)"),
        ("unexpected", "unexpected blocks.12.norm1.bias (64,)"),
        ("shape", "head.weight is (1000, 64), not (10, 64)"),
    ],
)
def test_weights_that_do_not_fit_are_named(damage, named):
    model = create_model("demo")
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(named)):
        load_weights(model, damaged(create_model("demo").state_dict(), damage))
    assert all(
        torch.equal(w, before[name]) for name, w in model.state_dict().items()
    )  # nothing half loaded


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text").write_text("hello")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"model": random.Random()}, tmp_path / "code")
    for name in ("text", "list", "code", "absent"):
        with pytest.raises(ValueError) as error:
            load_weights(create_model("demo"), tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_official_weights_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(
        ltmp.WEIGHTS, "deit_tiny_patch16_224", f"file://{tmp_path}/absent-a1311bcf.pth"
    )
    with pytest.raises(ValueError, match="cannot download .* pass the file"):
        ltmp.official_weights("deit_tiny_patch16_224")


def test_official_weights_are_checked_by_hash(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    torch.save({"model": create_model("demo", "dense").state_dict()}, tmp_path / "w.pth")
    import hashlib

    digits = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:8]
    for name, works in ((f"good-{digits}.pth", True), ("bad-00000000.pth", False)):
        (tmp_path / name).write_bytes((tmp_path / "w.pth").read_bytes())
        monkeypatch.setitem(ltmp.WEIGHTS, "demo", f"file://{tmp_path / name}")
        if works:
            load_weights(create_model("demo"), ltmp.official_weights("demo"))
        else:
            with pytest.raises(ValueError, match="hash"):
                ltmp.official_weights("demo")


# One set of weights in the clothes of every library; each writer is the inverse of a table in ltmp.py, written by hand.


def split_qkv(state, pattern):
    """blocks.i.attn.qkv -> three entries named by pattern, with {i}, {part} of q, k, v."""
    out = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", value.chunk(3)):
                out[pattern.format(i=name.split(".")[1], part=part) + "." + name.split(".")[-1]] = (
                    piece
                )
        else:
            out[name] = value
    return out


def replace_names(state, pairs):
    for old, new in pairs:
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return state


HF_COMMON = [
    (r"^cls_token", "embeddings.cls_token"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed.proj", "embeddings.patch_embeddings.projection"),
    (r"^head", "classifier"),
    (r"^norm", "layernorm"),
]


def as_hugging_face(state, prefix="vit."):
    state = split_qkv(state, "blocks.{i}.attention.attention.{part}")
    state = replace_names(
        state,
        HF_COMMON
        + [
            (r"attention.q\.", "attention.query."),
            (r"attention.k\.", "attention.key."),
            (r"attention.v\.", "attention.value."),
            (r"attn.proj", "attention.output.dense"),
            (r"mlp.fc1", "intermediate.dense"),
            (r"mlp.fc2", "output.dense"),
            (r"\.norm1", ".layernorm_before"),
            (r"\.norm2", ".layernorm_after"),
            (r"^blocks", "encoder.layer"),
        ],
    )
    return {
        name if "classifier" in name else prefix + name: value for name, value in state.items()
    } | {prefix + "pooler.dense.weight": torch.zeros(2, 2)}


def as_transformers_5(state):
    state = split_qkv(state, "blocks.{i}.attention.{part}_proj")
    state = replace_names(
        state,
        HF_COMMON
        + [
            (r"attn.proj", "attention.o_proj"),
            (r"\.norm1", ".layernorm_before"),
            (r"\.norm2", ".layernorm_after"),
            (r"^blocks", "layers"),
        ],
    )
    return {name if "classifier" in name else "vit." + name: value for name, value in state.items()}


def as_dinov2_of_hugging_face(state):
    state = split_qkv(state, "blocks.{i}.attention.attention.{part}")
    return replace_names(
        state,
        HF_COMMON
        + [
            (r"attention.q\.", "attention.query."),
            (r"attention.k\.", "attention.key."),
            (r"attention.v\.", "attention.value."),
            (r"attn.proj", "attention.output.dense"),
            (r"ls(\d).gamma", r"layer_scale\1.lambda1"),
            (r"^blocks", "encoder.layer"),
        ],
    ) | {"embeddings.mask_token": torch.zeros(1, 32)}


def as_flax(state, heads=2):
    out = {}
    for name, value in split_qkv(state, "blocks.{i}.attn.{part}").items():
        if name.endswith("weight") and "norm" not in name:
            if ".attn.proj" in name:  # (H, D, C)
                value = value.T.unflatten(0, (heads, -1))
            elif ".attn." in name:  # (C, H, D)
                value = value.T.unflatten(1, (heads, -1))
            else:
                value = value.permute(2, 3, 1, 0) if value.dim() == 4 else value.T
        elif re.search(r"attn\.[qkv]\.bias", name):
            value = value.unflatten(0, (heads, -1))
        for old, new in [
            (r"^blocks.(\d+)", r"Transformer/encoderblock_\1"),
            (r"^norm", "Transformer/encoder_norm"),
            (r"^patch_embed.proj", "embedding"),
            (r"^pos_embed", "Transformer/posembed_input/pos_embedding"),
            (r"^cls_token", "cls"),
            (r"attn.proj", "MultiHeadDotProductAttention_1/out"),
            (r"attn.q\b", "MultiHeadDotProductAttention_1/query"),
            (r"attn.k\b", "MultiHeadDotProductAttention_1/key"),
            (r"attn.v\b", "MultiHeadDotProductAttention_1/value"),
            (r"mlp.fc1", "MlpBlock_3/Dense_0"),
            (r"mlp.fc2", "MlpBlock_3/Dense_1"),
            (r"norm1.weight", "LayerNorm_0/scale"),
            (r"norm1", "LayerNorm_0"),
            (r"norm2.weight", "LayerNorm_2/scale"),
            (r"norm2", "LayerNorm_2"),
            (r"norm.weight", "norm/scale"),
            (r"weight", "kernel"),
            (r"\.", "/"),
        ]:
            name = re.sub(old, new, name)
        out[name] = value
    return out


FORMATS = {
    "deit": lambda state: {"model": state},
    "timm": dict,
    "ours, or the authors'": lambda state: {
        "model": state
        | {
            f"blocks.{i}.{step}_masker.threshold": torch.tensor([0.01 + 0.94 * (step == "merge")])
            for i in range(2)
            for step in ("merge", "prune")
        }
    },
    "state_dict of DDP": lambda state: {
        "state_dict": {"module." + name: w for name, w in state.items()},
        "epoch": 3,
    },
    "compiled, averaged": lambda state: {
        "model_ema": {"_orig_mod." + name: w for name, w in state.items()},
        "model": {},
    },
    "hugging face": as_hugging_face,
    "hugging face, deit": lambda state: as_hugging_face(state, "deit."),
    "hugging face, 5": as_transformers_5,
    "half precision": lambda state: {name: w.half() for name, w in state.items()},
}


def format_model(**changes):
    model = LTMPViT(
        ViTConfig(
            **dict(image_size=12, patch_size=4, dim=32, depth=2, heads=2, num_classes=5) | changes
        )
    )
    spread_weights(model, 1)
    for name, p in model.named_parameters():
        p.data = (
            p.data.half().float() if "threshold" not in name else p.data
        )  # exact in half precision
    return model


def logits_after_loading(source, **changes):
    fresh = LTMPViT(
        ViTConfig(
            **dict(image_size=12, patch_size=4, dim=32, depth=2, heads=2, num_classes=5) | changes
        ),
        "dense",
    )
    return load_weights(fresh, source).eval()(torch.arange(432.0).sin().view(1, 3, 12, 12))[0]


def plain_state(model):
    return {name: w for name, w in model.state_dict().items() if "threshold" not in name}


@pytest.mark.parametrize("how", FORMATS)
def test_every_format_gives_the_same_logits(how, tmp_path):
    state = plain_state(format_model())
    torch.save(FORMATS[how](state), tmp_path / "weights.anything")
    assert torch.equal(
        logits_after_loading(str(tmp_path / "weights.anything")), logits_after_loading(state)
    )


def test_flax_npz_gives_the_same_logits(tmp_path):
    state = plain_state(format_model())
    with open(tmp_path / "weights.bin", "wb") as file:  # by content, not by name
        np.savez(file, **{name: value.numpy() for name, value in as_flax(state).items()})
    assert torch.equal(logits_after_loading(tmp_path / "weights.bin"), logits_after_loading(state))


@pytest.mark.parametrize("write", [dict, as_dinov2_of_hugging_face])
def test_dinov2_with_layer_scale_gives_the_same_features(write):
    state = plain_state(format_model(layer_scale=True, num_classes=0))
    state["blocks.1.ls2.gamma"] += 0.5
    extra = {"mask_token": torch.zeros(1, 32)} if write is dict else {}
    options = dict(layer_scale=True, num_classes=0)
    assert torch.equal(
        logits_after_loading(write(state) | extra, **options),
        logits_after_loading(state, **options),
    )


def test_a_model_without_a_head_has_none_to_keep():
    state = plain_state(format_model())
    model = load_weights(format_model(num_classes=0), state, new_head=True)
    assert torch.equal(model.norm.weight, state["norm.weight"]) and isinstance(
        model.head, torch.nn.Identity
    )


def test_safetensors_or_one_line_that_names_it(tmp_path, monkeypatch):
    state = {name: w.contiguous() for name, w in plain_state(format_model()).items()}
    header, blob = {}, b""  # the format: length of the header, header, raw data
    for name, w in state.items():
        raw = w.numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(w.shape),
            "data_offsets": [len(blob), len(blob) + len(raw)],
        }
        blob += raw
    header = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + blob)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ValueError, match="pip install safetensors"):
            ltmp.read_checkpoint(tmp_path / "model.safetensors")
    pytest.importorskip("safetensors")
    assert torch.equal(
        logits_after_loading(tmp_path / "model.safetensors"), logits_after_loading(state)
    )


def test_thresholds_of_a_checkpoint_are_taken_over():
    model = format_model()
    set_thresholds(model, 0.25, 0.125)
    other = load_weights(LTMPViT(model.config), model.state_dict())
    assert [m.threshold.item() for _, m in train.threshold_maskers(other)] == [0.25, 0.125] * 2


def test_positions_are_resized_for_another_grid_and_checked():
    state = plain_state(format_model())
    for size in (24, 20, 8):  # 3 x 3 -> 6 x 6, 5 x 5, 2 x 2
        model = load_weights(LTMPViT(ViTConfig(size, 4, 32, 2, 2, 5)), state)
        assert torch.isfinite(model.eval()(torch.randn(1, 3, size, size))[0]).all()
        assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
    flat = state | {
        "pos_embed": torch.cat([state["pos_embed"][:, :1], torch.full((1, 9, 32), 0.25)], 1)
    }
    resized = load_weights(LTMPViT(ViTConfig(20, 4, 32, 2, 2, 5)), flat).pos_embed[:, 1:]
    torch.testing.assert_close(resized, torch.full((1, 25, 32), 0.25))  # a constant stays itself
    ramp = (
        torch.linspace(0, 1, 14)[None, :, None].expand(14, -1, 8).reshape(1, 196, 8)
    )  # grows along the columns
    larger = ltmp.resize_positions(torch.cat([torch.zeros(1, 1, 8), ramp], 1), 577)[:, 1:].view(
        24, 24, 8
    )
    assert (
        torch.allclose(larger[0], larger[23], atol=1e-6)
        and (larger[0, 1:, 0] > larger[0, :-1, 0]).all()
    )
    with pytest.raises(
        ValueError, match="11 positions, not those of a class token and a square grid"
    ):
        load_weights(format_model(), state | {"pos_embed": torch.zeros(1, 11, 32)})


def test_a_url_is_downloaded_once_and_its_hash_checked(tmp_path, monkeypatch):
    import hashlib
    import http.server
    import threading

    state = plain_state(format_model())
    torch.save(state, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    try:
        digits, base = (
            hashlib.sha256(content).hexdigest()[:8],
            f"http://127.0.0.1:{server.server_port}",
        )
        for _ in range(2):
            assert torch.equal(
                logits_after_loading(f"{base}/vit-{digits}.pth"), logits_after_loading(state)
            )
        assert requests == [f"/vit-{digits}.pth"]
        with pytest.raises(ValueError, match="hash"):
            ltmp.read_checkpoint(f"{base}/vit-00000000.pth")
        assert not list((tmp_path / "hub" / "checkpoints").glob("vit-0000*"))
        one, other = (
            ltmp.download(f"{base}/{model}/model.safetensors") for model in ("one", "other")
        )
        assert one != other and requests[-2:] == [
            "/one/model.safetensors",
            "/other/model.safetensors",
        ]  # the same name, not the same file
    finally:
        server.shutdown()
    assert torch.equal(
        logits_after_loading(f"file://{tmp_path}/w.pth"), logits_after_loading(state)
    )


def test_another_number_of_classes_says_what_to_do(tmp_path, capsys):
    make_folder(
        tmp_path / "images",
        classes=[f"class {i:02d}" for i in range(12)],
        per_class=2,
        size=(28, 28),
        suffix=".png",
    )
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "demo", "--method", "dense", "--data", str(tmp_path / "images")])
    assert "the data has 12 classes, the model has 10: --num-classes 12" in capsys.readouterr().err
    with pytest.raises(ValueError, match=re.escape("head.weight is (10, 64), not (7, 64)")):
        load_weights(
            create_model("demo", num_classes=7),
            torch.load(evaluate.DEMO_WEIGHTS, weights_only=True),
        )
    model = demo_model("dense", num_classes=7)
    assert (
        model.head.weight.shape == (7, 64)
        and "the head for 7 classes is new" in capsys.readouterr().err
    )


def test_fine_tuning_then_thresholds_on_own_data(tmp_path):
    """Colours in place of clothes, no val/ folder: dense fine-tuning learns them, thresholds keep them."""
    make_folder(
        tmp_path / "images",
        classes=("red", "green", "blue"),
        per_class=16,
        size=(28, 28),
        suffix=".png",
    )
    common = [
        "--model",
        "demo",
        "--data",
        str(tmp_path / "images" / "train"),
        "--val-fraction",
        "0.25",
        "-b",
        "8",
    ]
    train.main(
        common
        + [
            "--method",
            "dense",
            "--num-classes",
            "3",
            "--epochs",
            "8",
            "--lr-backbone",
            "1e-3",
            "--out",
            str(tmp_path / "dense"),
        ]
    )
    assert read(tmp_path / "dense" / "metrics.json")["top1"] > 80
    train.main(
        common
        + [
            "--target",
            "0.6",
            "--weights",
            str(tmp_path / "dense" / "last.pt"),
            "--out",
            str(tmp_path / "ltmp"),
        ]
    )
    metrics = read(tmp_path / "ltmp" / "metrics.json")
    assert (
        metrics["top1"] > 80
        and metrics["dense_top1"] == read(tmp_path / "dense" / "metrics.json")["top1"]
    )
    assert metrics["flops_ratio"] == pytest.approx(0.6, abs=0.05) and metrics["images"] == 12

    train.main(
        common
        + [
            "--lr-backbone",
            "1e-4",
            "--weights",
            str(tmp_path / "dense" / "last.pt"),
            "--out",
            str(tmp_path / "both"),
        ]
    )
    before, after = (
        torch.load(tmp_path / out / "last.pt", weights_only=True)["model"]
        for out in ("dense", "both")
    )
    assert not torch.equal(before["blocks.0.mlp.fc1.weight"], after["blocks.0.mlp.fc1.weight"])


def test_a_split_is_fixed_by_its_seed_and_never_overlaps(tmp_path):
    make_folder(tmp_path, per_class=10)
    splits = {
        (split, seed): {
            path for path, _ in data.open_split(tmp_path / "train", split, None, 0.3, seed).samples
        }
        for split in ("train", "val")
        for seed in (0, 1)
    }
    for seed in (0, 1):
        assert (
            len(splits["val", seed]) == 9
            and len(splits["train", seed]) == 21
            and not splits["val", seed] & splits["train", seed]
        )
    assert splits["val", 0] != splits["val", 1]
    assert splits["val", 0] == {
        path for path, _ in data.open_split(tmp_path / "train", "val", None, 0.3, 0).samples
    }
    with pytest.raises(ValueError, match="--val-fraction 0.1"):
        data.open_split(tmp_path / "train", "val")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"method": "ltm"}',
        '{"method": "ltmp", "merge_thresholds": [0.9]}',
        json.dumps(
            {"method": "ltmp", "merge_thresholds": [0.9] * 12, "prune_thresholds": [None] * 12}
        ),
    ],
)
def test_broken_thresholds_are_refused(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError):
        load_thresholds(create_model("demo"), tmp_path / "t.json")
    with pytest.raises(ValueError, match="absent.json"):
        load_thresholds(create_model("demo"), tmp_path / "absent.json")


def test_thresholds_of_another_model_are_refused():
    model, found = (
        create_model("deit_tiny_patch16_224", num_classes=3),
        {"method": "ltmp", "merge_thresholds": [0.5] * 12, "prune_thresholds": [0.1] * 12},
    )
    with pytest.raises(
        ValueError, match="were learned for demo, this model has 12 blocks and 192 channels"
    ):
        load_thresholds(model, found | {"model": "demo"})
    assert model.blocks[0].merge_masker.threshold == 0.9
    for name in ("deit_tiny_patch16_224", "vit_tiny_patch16_224", "a model of one's own", ["?"]):
        assert (
            load_thresholds(model, found | {"model": name}).blocks[0].merge_masker.threshold == 0.5
        )


def test_thresholds_that_were_changed_are_refused(tmp_path):
    written = ltmp.seal(
        {
            "method": "ltmp",
            "merge_thresholds": [0.9] * 12,
            "prune_thresholds": [0.001] * 12,
            "image_size": 28,
        }
    )
    for change, works in (
        ({}, True),
        ({"merge_thresholds": [0.9] * 11 + [0.8]}, False),
        ({"image_size": 24}, False),
        ({"sha256": "0" * 16}, False),
    ):
        (tmp_path / "t.json").write_text(
            json.dumps(written | change, indent=2)
        )  # laid out in another way: no change
        if works:
            load_thresholds(create_model("demo"), tmp_path / "t.json")
        else:
            with pytest.raises(
                ValueError,
                match='t.json is not what train.py wrote: damaged, or edited; it is accepted without its entry "sha256"',
            ):
                ltmp.read_thresholds(tmp_path / "t.json")
        (tmp_path / "t.json").write_text(
            json.dumps(
                {name: value for name, value in (written | change).items() if name != "sha256"}
            )
        )
        load_thresholds(create_model("demo"), tmp_path / "t.json")
    assert all(
        "sha256" in ltmp.read_thresholds(path) for path in (HERE / "demo").glob("*thresholds.json")
    )


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda state: state["norm.bias"].fill_(math.nan), "norm.bias holds NaN or infinity"),
        (
            lambda state: state["head.weight"][1:].fill_(-math.inf),
            "head.weight holds NaN or infinity",
        ),
        (
            lambda state: state.pop("blocks.1.merge_masker.threshold"),
            "missing blocks.1.merge_masker.threshold",
        ),
        (
            lambda state: state.update({"blocks.9.prune_masker.threshold": torch.ones(1)}),
            "unexpected blocks.9.prune_masker.threshold",
        ),
    ],
)
def test_weights_that_nothing_could_run_with_are_refused(change, named):
    state = {name: w.clone() for name, w in format_model().state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=named):
        load_weights(LTMPViT(format_model().config), state)


def test_a_damaged_or_foreign_last_pt_is_refused(tmp_path):
    torch.save({"settings": {}, "model": plain_state(format_model())}, tmp_path / "last.pt")
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(content)
    args = train.parse_args(["--out", str(tmp_path)])
    with pytest.raises(
        ValueError,
        match="last.pt is no checkpoint, or damaged .then copy it again.: the checksum of .* does not fit",
    ):
        train.load_checkpoint(args)
    for content in (
        plain_state(format_model()),
        {"settings": {}, "model": {}, "step": 3},
    ):  # of another program; of an older version
        torch.save(content, tmp_path / "last.pt")
        with pytest.raises(ValueError, match="last.pt is no last.pt of this version of train.py"):
            train.load_checkpoint(args)


def saved_weights(path, how):
    """The weights of format_model in a file. Returns what loads them, how many bytes from the start on have to be right, and what they were."""
    state = format_model().state_dict()
    if how == "npz":
        with open(path, "wb") as file:
            np.savez(
                file,
                **{
                    name: value.numpy()
                    for name, value in as_flax(plain_state(format_model())).items()
                },
            )
    elif how == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=how == "torch")
    content = path.read_bytes()
    guarded = {"torch before 1.6": 0, "safetensors": 8 + int.from_bytes(content[:8], "little")}.get(
        how, len(content)
    )  # the others have checksums
    return lambda: [
        w.tolist() for w in load_weights(LTMPViT(format_model().config), path).state_dict().values()
    ], guarded


def saved_thresholds(path, how):
    path.write_text(
        json.dumps(
            ltmp.seal(
                {
                    "method": "ltmp",
                    "merge_thresholds": [0.25, 0.75],
                    "prune_thresholds": [0.001, 0.0],
                    "seed": 0,
                }
            ),
            indent=1,
        )
    )
    load = lambda: [
        m.threshold.item()
        for _, m in train.threshold_maskers(load_thresholds(LTMPViT(format_model().config), path))
    ]
    return load, path.stat().st_size


def saved_image(path, how):
    exif = Image.Exif()
    exif.update({271: "camera", 282: 72.0})
    odd_image("RGB", (97, 61)).save(path, how, exif=exif)
    cropped = partial(
        data.train_transform(8), rng=random.Random(0)
    )  # a JPEG is decoded at a part of its size
    return lambda: (
        data.open_image(path).tobytes(),
        data.open_image(path, cropped).shape,
    ), path.stat().st_size if how == "PNG" else 0


SAVED = {
    saved_weights: ["torch", "torch before 1.6", "npz", "safetensors"],
    saved_thresholds: ["json"],
    saved_image: ["JPEG", "PNG", "TIFF", "WEBP"],
}


@pytest.mark.parametrize("save, how", [(save, how) for save in SAVED for how in SAVED[save]])
def test_fuzz_damaged_files_are_refused_in_one_line_or_hold_what_was_saved(save, how, tmp_path):
    """LTMP_FUZZ files each: cut off, with flipped bits, with flipped bits near the start. Where a format has no checksum, other values may come out, but nothing else."""
    path = tmp_path / "file"
    load, guarded = save(path, how)
    content, saved, rng, refused = path.read_bytes(), load(), random.Random(how), 0

    def fuzz():
        nonlocal refused
        for i in range(3 * int(os.environ.get("LTMP_FUZZ", 15))):
            damaged, places = bytearray(content), []
            if i % 3 == 0:
                del damaged[rng.randrange(len(content)) :]
            else:
                places = [
                    rng.randrange(len(content) if i % 3 == 1 else min(len(content), 512))
                    for _ in range(rng.choice([1, 1, 1, 4, 16]))
                ]
            for place in places:
                damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                found = load()
            except ValueError as error:
                assert type(error) in (ValueError, data.ImageError) and "\n" not in str(error)
                refused += 1
            else:
                assert found == saved or (places and min(places) >= guarded), (i, places)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used = evaluate.peak_memory(fuzz, torch.device("cpu"))
    assert refused and (used is None or used < 300)  # MB


def test_ltmp_and_flops_stand_alone():
    for name, allowed in (("ltmp.py", {"torch"}), ("flops.py", {"torch"})):
        for node in ast.parse((HERE / name).read_text()).body:
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert {m.split(".")[0] for m in modules} <= allowed | sys.stdlib_module_names


# ---------------------------------------------------------------------------------------------
# Data

ODD_IMAGES = [
    ("RGB", (40, 30)),
    ("L", (17, 61)),
    ("P", (33, 33)),
    ("RGBA", (100, 21)),
    ("CMYK", (16, 16)),
    ("RGB", (2, 7)),
    ("1", (50, 49)),
]


def odd_image(mode, size):
    """A picture of waves, the same on every machine, in any mode of Pillow."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = np.stack([(x * 7 + y * 3) % 256, (x * y) % 256, (x * x + 11 * y) % 256], -1).astype(
        np.uint8
    )
    image = Image.fromarray(waves)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(((x + y) % 256).astype(np.uint8)))
    return image if mode in ("RGB", "RGBA") else image.convert(mode)


def test_eval_transform_is_torchvisions_to_the_bit():
    """demo/torchvision.npz: Resize, CenterCrop, ToTensor, Normalize of torchvision 0.28 and Pillow 13 on these images.

    Before Pillow 13, resizing an image more than three times as long as wide gave other last bits: one level of 255.
    """
    recorded = np.load(HERE / "demo" / "torchvision.npz")
    assert len(recorded.files) == 3 * len(ODD_IMAGES)
    for name in recorded.files:
        mode, size, crop, crop_pct = name.split("/")
        image = odd_image(mode, tuple(map(int, size.split("x"))))
        ours = data.eval_transform(int(crop), float(crop_pct))(image).numpy()
        if int(PIL.__version__.split(".")[0]) >= 13 or max(image.size) <= 3 * min(image.size):
            assert np.array_equal(ours, recorded[name]), name
        else:
            assert np.abs(ours - recorded[name]).max() < 1.01 / 255 / 0.224, name


def import_torchvision():
    """torchvision, where it is installed and fits the installed torch."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision to compare with: {error}")
    return torchvision


def test_eval_transform_beside_torchvision():
    transforms = import_torchvision().transforms
    rng = np.random.default_rng(0)
    for mode, size in ODD_IMAGES + [
        ("RGB", tuple(rng.integers(1, 700, 2).tolist())) for _ in range(20)
    ]:
        theirs = transforms.Compose(
            [
                transforms.Resize(248, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.4, 0.3), (0.3, 0.2, 0.1)),
            ]
        )
        image = odd_image(mode, size)
        assert torch.equal(
            data.eval_transform(224, 0.9, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))(image),
            theirs(image.convert("RGB")),
        )


def make_folder(root, classes=("a", "b", "c"), per_class=4, size=(40, 30), suffix=".jpg"):
    """An image folder with train/ and val/ whose classes differ in colour."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for index, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 80, (size[1], size[0], 3))
                pixels[..., index % 3] += 170
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}{suffix}")
    return root


def test_image_folder_has_torchvisions_order(tmp_path):
    for path in ("b/10.JPG", "b/9.png", "a/x/deep.jpeg", "a/z.bmp", "B/1.webp", "b/readme.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    folder = data.ImageFolder(tmp_path)
    assert folder.classes == ["B", "a", "b"]
    assert [(str(Path(path).relative_to(tmp_path)), label) for path, label in folder.samples] == [
        ("B/1.webp", 0),
        ("a/z.bmp", 1),
        ("a/x/deep.jpeg", 1),
        ("b/10.JPG", 2),
        ("b/9.png", 2),
    ]
    assert folder.samples == import_torchvision().datasets.ImageFolder(tmp_path).samples


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda root: None, "no folder"),
        (lambda root: root.mkdir(), "class folders"),
        (lambda root: (root / "empty").mkdir(parents=True), "empty holds no images"),
    ],
)
def test_image_folder_says_what_is_wrong(tmp_path, make, named):
    make(tmp_path / "images")
    with pytest.raises(ValueError, match=named):
        data.ImageFolder(tmp_path / "images")


def test_a_damaged_image_is_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "val" / "a" / "0.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="0.jpg"):
        data.ImageFolder(tmp_path / "val")[0]


def header_of_a_bomb():
    """A PNG of 69 bytes that claims to be 30,000 x 30,000 pixels."""
    chunk = lambda name, content: (
        len(content).to_bytes(4, "big")
        + name
        + content
        + zlib.crc32(name + content).to_bytes(4, "big")
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", 2 * (30000).to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_images_that_would_fill_the_memory_are_refused(tmp_path):
    (tmp_path / "bomb.png").write_bytes(header_of_a_bomb())
    Image.new("L", (1, 30000)).save(tmp_path / "long.png")
    Image.new("L", (30000, 60)).save(tmp_path / "wide.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, reason in (
            ("bomb.png", "900000000 pixels"),
            ("long.png", "1 x 30000 pixels: crop it"),
        ):
            with pytest.raises(ValueError, match=f"cannot read the image .*{name}: .*{reason}"):
                data.open_image(tmp_path / name)
        assert data.eval_transform(28)(data.open_image(tmp_path / "wide.png")).shape == (
            3,
            28,
            28,
        )  # 500 times as wide as high


def test_images_are_read_as_torchvisions_loader_reads_them(tmp_path):
    """convert("RGB") of the first image, not turned by EXIF; and no warnings."""
    turned, transparent = Image.Exif(), {"transparency": bytes(range(256))}
    turned[274] = 6
    rgb, deep = (
        odd_image("RGB", (40, 30)),
        Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16)),
    )
    more = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180)]}
    files = [
        (odd_image(mode, (40, 30)), "TIFF", {})
        for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I", "F")
    ]
    files += [
        (deep, "PNG", {}),
        (odd_image("P", (40, 30)), "PNG", transparent),
        (rgb, "JPEG", {"exif": turned}),
        (rgb, "GIF", more),
        (rgb, "PNG", more),
        (rgb.crop((0, 0, 1, 1)), "PNG", {}),
    ]
    for image, format, options in files:
        image.save(tmp_path / "image.png", format, **options)  # the content says what it is
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(tmp_path / "image.png") as opened:
                expected = opened.convert("RGB")
            warnings.simplefilter("error")
            found = data.open_image(tmp_path / "image.png")
        assert (
            found.mode == "RGB"
            and found.size == image.size
            and found.tobytes() == expected.tobytes()
        ), (image.mode, format)


@given(
    st.sampled_from(
        ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
    ),
    st.integers(1, 80),
    st.integers(1, 80),
    st.integers(1, 40),
    st.integers(50, 100),
    st.integers(0),
)
def test_transforms_take_any_image(mode, width, height, size, crop_percent, seed):
    image, rng = odd_image("L" if mode == "I;16" else mode, (width, height)), random.Random(seed)
    image = Image.fromarray(np.array(image).astype(np.uint16) * 200) if mode == "I;16" else image
    train_transform = data.train_transform(size)
    first, again = (train_transform(image, random.Random(seed)) for _ in range(2))
    assert torch.equal(first, again)  # drawn from rng alone
    for out in (first, data.eval_transform(size, crop_percent / 100)(image)):
        assert out.shape == (3, size, size) and out.dtype == torch.float32 and out.isfinite().all()
    left, top, right, bottom = data.random_crop((width, height), (0.08, 1), rng)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_damaged_fashion_mnist_is_named(tmp_path):
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(
            gzip.compress(
                bytes(8 if "labels" in name else 16) + bytes(784 if "images" in name else 1)
            )
        )
    assert len(data.FashionMNIST(tmp_path, "test")) == 1
    content = (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes()
    for damaged in (
        content[:-1],
        content[:-6] + b"000000",
        gzip.compress(bytes(100)),
        b"no gzip",
        b"",
    ):
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot read .*t10k-images"):
            data.FashionMNIST(tmp_path, "test")
    with pytest.raises(ValueError, match="cannot read .*train-images"):
        data.FashionMNIST(tmp_path, "train")


def test_what_is_wrong_with_a_transform_is_not_blamed_on_the_image(tmp_path):
    with pytest.raises(ZeroDivisionError):
        data.ImageFolder(make_folder(tmp_path) / "val", lambda image: 1 / 0)[0]


def test_train_transform_draws_from_seed_epoch_and_index_alone():
    dataset = data.FashionMNIST(data.DEMO_FILE, "train")
    transform = data.train_transform(28, (0.5,) * 3, (0.5,) * 3)
    first, again, other = (data.Augmented(dataset, transform, seed) for seed in (0, 0, 1))
    n = len(dataset)
    assert torch.equal(first[5][0], again[5][0]) and first[5][1] == first[5 + n][1] == dataset[5][1]
    assert not torch.equal(first[5][0], first[5 + n][0]) and not torch.equal(
        first[5][0], other[5][0]
    )
    assert first[5][0].shape == (3, 28, 28) and first[5][0].dtype == torch.float32
    batches = data.epoch_batches(10, 4, epoch=2, seed=0)
    assert [len(b) for b in batches] == [4, 4, 2] and sorted(sum(batches, [])) == list(
        range(20, 30)
    )
    assert batches == data.epoch_batches(10, 4, 2, 0) != data.epoch_batches(10, 4, 2, 1)


def test_train_transform_crops_flips_and_jitters():
    rng, (width, height) = random.Random(0), (60, 40)
    boxes = [data.random_crop((width, height), (0.08, 1.0), rng) for _ in range(2000)]
    areas = np.array([(r - l) * (b - t) for l, t, r, b in boxes]) / (width * height)
    aspects = np.array([(r - l) / (b - t) for l, t, r, b in boxes])
    assert (
        min(min(box) for box in boxes) >= 0
        and max(b[2] for b in boxes) == width
        and max(b[3] for b in boxes) == height
    )
    assert (
        0.07 < areas.min() < 0.1
        and areas.max() > 0.8
        and 0.7 < aspects.min()
        and aspects.max() < 1.45
    )
    assert data.random_crop((28, 28), (1, 1), rng) == (0, 0, 28, 28) and data.random_crop(
        (1, 1), (0.08, 1), rng
    ) == (0, 0, 1, 1)

    half = Image.fromarray(np.repeat(np.repeat([[[200, 10, 60]]], 8, 0), 8, 1).astype(np.uint8))
    half.paste((0, 0, 0), (0, 0, 4, 8))
    plain = data.train_transform(8, (0,) * 3, (1,) * 3, scale=(1, 1), jitter=0)
    flips = [plain(half, random.Random(seed))[0, 0, 0].item() > 0.5 for seed in range(200)]
    assert 70 < sum(flips) < 130
    jittered = data.train_transform(8, (0,) * 3, (1,) * 3, scale=(1, 1), jitter=0.4)
    assert (
        len({round(jittered(half, random.Random(seed)).max().item(), 3) for seed in range(50)}) > 20
    )


def test_train_transform_is_pillows_but_for_rounding_and_draws_in_a_fixed_order():
    image, worst = odd_image("RGB", (90, 70)), []
    for seed in range(40):
        rng, same = random.Random(seed), random.Random(seed)
        found = data.train_transform(32, (0,) * 3, (1,) * 3)(image, same)
        resample = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
        expected = image.resize(
            (32, 32), resample, box=data.random_crop(image.size, (0.08, 1.0), rng)
        )
        expected = ImageOps.mirror(expected) if rng.random() < 0.5 else expected
        enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        rng.shuffle(enhancers)
        for enhancer in enhancers:
            expected = enhancer(expected).enhance(rng.uniform(0.6, 1.4))
        worst.append(
            (found.permute(1, 2, 0) * 255 - torch.from_numpy(np.array(expected))).abs().max()
        )
        assert rng.random() == same.random()
    assert (
        max(worst) < 5
    )  # Pillow rounds down after each of the three steps, and a later one multiplies that by up to 1.4


def test_training_decodes_a_large_jpeg_smaller_and_sees_the_same(tmp_path):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "large.jpg"
    odd_image("RGB", (24, 18)).resize((1203, 901), Image.Resampling.BICUBIC).save(
        path, quality=95
    )  # sides that 8 does not divide
    divisors, whole = set(), data.open_image(path)
    for seed in range(40):
        size = (32, 100, 250, 500)[seed % 4]
        with Image.open(path) as image:
            left, top, right, bottom = box = data.random_crop(
                image.size, (0.08, 1.0), random.Random(seed)
            )
            shrunk = data.draft(image, box, size)
            image.load()
        divisor, across = round(1203 / image.width), min(right - left, bottom - top)
        assert shrunk == tuple(side / divisor for side in box) and image.size == (
            math.ceil(1203 / divisor),
            math.ceil(901 / divisor),
        )
        assert divisor == 1 or across / divisor >= size
        assert divisor == 8 or across / (2 * divisor) < size
        divisors.add(divisor)
    assert divisors == {1, 2, 4, 8} and data.draft(whole, box, 32) == box

    transform, folder = data.train_transform(64, (0,) * 3, (1,) * 3), data.ImageFolder(tmp_path)
    for number in range(10):
        view, label = data.Augmented(folder, transform, seed=1)[number]
        undrafted = transform(whole, random.Random(f"1 {number}"))
        assert (
            label == 0
            and (view - undrafted).abs().max() < 0.05
            and (view - undrafted).abs().mean() < 0.005
        )
        assert torch.equal(view, data.Augmented(folder, transform, seed=1)[number][0])


def test_a_jpeg_cut_short_is_named_whatever_the_transform(tmp_path):
    make_folder(tmp_path, size=(400, 300))
    path = tmp_path / "val" / "a" / "0.jpg"
    path.write_bytes(path.read_bytes()[:5000])
    folder = data.ImageFolder(tmp_path / "val")
    for transform in (None, data.eval_transform(32)):
        with pytest.raises(ValueError, match="0.jpg"):
            folder.item(0, transform)
    with pytest.raises(ValueError, match="0.jpg"):
        data.Augmented(folder, data.train_transform(32), seed=0)[0]


def test_the_benchmark_of_the_images(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)  # the other tests keep theirs
    data.main(["--benchmark", str(tmp_path / "val")])
    first, *lines = capsys.readouterr().out.splitlines()
    assert "torchvision" in first and [
        re.fullmatch(r"(\w+) +[1-9]\d* images/s", line)[1] for line in lines
    ] == ["evaluation", "training"]
    assert threads == [1]
    with pytest.raises(SystemExit) as stopped:
        data.main(["--benchmark", str(tmp_path / "absent")])
    assert (
        stopped.value.code == 2
        and capsys.readouterr().err == f"data.py: no folder at {tmp_path / 'absent'}\n"
    )


def test_embedded_data_is_balanced_and_the_splits_share_nothing():
    train_set, test_set = (data.FashionMNIST(data.DEMO_FILE, split) for split in ("train", "test"))
    assert (
        np.bincount(test_set.labels).tolist() == [200] * 10
        and len(set(np.bincount(train_set.labels))) == 1
    )
    assert not {i.tobytes() for i in train_set.images} & {i.tobytes() for i in test_set.images}
    assert data.DEMO_FILE.stat().st_size <= 4e6
    evenly = data.subset(test_set, 100)
    assert len(evenly) == 100 and len({evenly[i][1] for i in range(100)}) == 10
    image, label = train_set[0]
    assert image.mode == "RGB" and image.size == (28, 28) and 0 <= label < 10


# ---------------------------------------------------------------------------------------------
# The loop, end to end


def demo_model(method, **options):
    return evaluate.build_model("demo", method, evaluate.read_weights("demo", None), **options)


METRICS = {
    "top1",
    "top5",
    "dense_top1",
    "dense_top5",
    "kl",
    "flops_ratio",
    "gflops",
    "kept",
    "images",
}


TINY = {
    "tiny": ViTConfig(image_size=28, patch_size=7, dim=16, depth=2, heads=2, num_classes=10)
}  # 17 tokens
TINY_MODEL = ["--model", "tiny", "--weights", "none"]
TINY_RUN = [
    *TINY_MODEL,
    "--limit-train",
    "8",
    "-b",
    "2",
    "--epochs",
    "2",
    "--limit-val",
    "10",
]  # eight steps, on Fashion-MNIST


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(VARIANTS, "tiny", TINY["tiny"])


def read(path):
    return json.loads(Path(path).read_text())


def test_thresholds_of_a_deit_on_a_folder_of_jpegs(tmp_path, capsys):
    make_folder(tmp_path / "images", size=(500, 375))
    source = create_model("deit_tiny_patch16_224", "dense")
    spread_weights(source, 0)
    torch.save({"model": source.state_dict()}, tmp_path / "deit.pth")
    common = [
        "--model",
        "deit_tiny_patch16_224",
        "--weights",
        str(tmp_path / "deit.pth"),
        "--data",
        str(tmp_path / "images"),
        "--workers",
        "1",
    ]
    train.main(common + ["--target", "0.75", "-b", "4", "--out", str(tmp_path / "out")])

    found, metrics = (
        read(tmp_path / "out" / "thresholds.json"),
        read(tmp_path / "out" / "metrics.json"),
    )
    assert METRICS <= metrics.keys() and metrics["images"] == 12 and len(metrics["kept"]) == 12
    assert {"model", "method", "target", "data", "seed", "version"} <= found.keys()
    assert found["recipe"] == "paper" and found["lr"] == [5e-6, 5e-3] and found["tau"] == 0.1
    assert len(found["prune_thresholds"]) == 12 and any(
        value != 0.9 for value in found["merge_thresholds"]
    )
    rows = list(csv.DictReader((tmp_path / "out" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    trained = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["model"]
    assert all(
        torch.equal(w, trained[name]) for name, w in source.state_dict().items()
    )  # the backbone, to the bit
    told = capsys.readouterr()
    printed = told.out.strip().splitlines()
    assert (
        len(printed) == 6
        and f"r = {metrics['flops_ratio']:.3f}" in printed[3]
        and f"{metrics['kl']:.2g}" in printed[4]
    )
    assert ("--recipe adaptive" in told.err) == (abs(metrics["flops_ratio"] - 0.75) > 0.01)

    last = [
        "--weights",
        str(tmp_path / "out" / "last.pt"),
    ]  # the same thresholds, inside a checkpoint
    for flags in (["--thresholds", str(tmp_path / "out" / "thresholds.json")], last):
        evaluate.main(common + flags + ["--json", str(tmp_path / "again.json")])
        again = read(tmp_path / "again.json")
        for key in METRICS:
            assert again[key] == pytest.approx(metrics[key], rel=1e-4 if key == "kl" else None), key


@pytest.mark.parametrize(
    "flags, recipe",
    [
        (["--model", "deit_base_patch16_224"], "paper"),
        (["--model", "deit_base_patch16_224", "--image-size", "224"], "paper"),
        (["--data", "mine"], "paper"),
        (["--model", "deit_base_patch16_224", "--image-size", "160"], "adaptive"),
        (["--model", "deit_base_patch16_384"], "adaptive"),
        (["--model", "vit_small_patch14_dinov2"], "adaptive"),
        ([], "adaptive"),
        (["--recipe", "paper"], "paper"),
    ],
)
def test_the_papers_recipe_is_the_default_where_the_paper_used_it(flags, recipe):
    args = train.parse_args(flags)
    assert (
        args.recipe == recipe
        and args.tau == train.RECIPES[recipe]["tau"]
        and args.batch_size == train.RECIPES[recipe]["batch_size"]
    )


def test_r_in_the_metrics_is_what_inference_ran(tmp_path):
    evaluate.main(["--limit-val", "10", "-b", "1", "--json", str(tmp_path / "m.json")])
    metrics = read(tmp_path / "m.json")
    model = load_thresholds(demo_model("ltmp"), evaluate.DEMO_THRESHOLDS)
    images = data.subset(
        data.open_split(
            None, "val", data.eval_transform(28, 1.0, model.config.mean, model.config.std)
        ),
        10,
    )
    counts = []
    for i in range(10):
        count, kept = counted(model, images[i][0])
        counts.append(count - sum(score_flops(model, kept)))
    dense = counted(evaluate.with_method(model, "dense"), images[0][0])[0]
    assert metrics["flops_ratio"] == pytest.approx(np.mean(counts) / dense, rel=1e-6)
    assert metrics["flops_ratio"] < 0.8


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_same_seed_same_thresholds_and_interrupted_runs_end_the_same(
    tiny, tmp_path, monkeypatch, capsys, recipe
):
    torch.save(create_model("tiny", "dense").state_dict(), tmp_path / "weights")

    def run(out, *flags):
        train.main(
            [
                *TINY_RUN,
                "--weights",
                str(tmp_path / "weights"),
                "--recipe",
                recipe,
                "--out",
                str(tmp_path / out),
                *flags,
            ]
        )
        return read(tmp_path / out / "thresholds.json"), (tmp_path / out / "log.csv").read_text()

    whole = run("a")
    assert run("b") == whole
    assert run("c", "--seed", "1")[0]["merge_thresholds"] != whole[0]["merge_thresholds"]

    calls, ratio = [], train.flops_ratio

    def interrupted(*args):
        calls.append(1)
        if len(calls) == (3 if recipe == "paper" else 4):  # adaptive: r_gradient asked before
            signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of the third step
        return ratio(*args)

    with monkeypatch.context() as until, pytest.raises(SystemExit):
        until.setattr(train, "flops_ratio", interrupted)
        run("d")
    assert "stopped after step 3 of 8" in capsys.readouterr().err
    assert not (tmp_path / "d" / "thresholds.json").exists()
    for out, flags, message in (
        ("d", ["--target", "0.5"], "target = 0.75, not 0.5"),
        ("e", [], "nothing to resume"),
    ):
        with pytest.raises(SystemExit):
            run(out, "--resume", *flags)
        assert message in capsys.readouterr().err
    assert run("d", "--resume") == whole


def test_ctrl_c_in_the_last_step_stops_too(tiny, tmp_path, monkeypatch, capsys):
    def run(out, *flags):
        train.main([*TINY_RUN, "--out", str(tmp_path / out), *flags])
        return read(tmp_path / out / "thresholds.json")

    whole, calls, add_up = run("a"), [], train.add_up

    def interrupted(tensors):  # after the processes have told each other whether to stop
        calls.append(1)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        add_up(tensors)

    with monkeypatch.context() as until, pytest.raises(SystemExit) as stopped:
        until.setattr(train, "add_up", interrupted)
        run("b")
    assert stopped.value.code == 130 and "stopped after step 8 of 8" in capsys.readouterr().err
    assert not (tmp_path / "b" / "thresholds.json").exists()
    assert run("b", "--resume") == whole


@pytest.mark.parametrize("method", ["ltmp", "ltm", "ltp", "ltpm"])
def test_the_adaptive_recipe_meets_the_target_on_the_demo(tmp_path, method):
    train.main(
        [
            "--limit-train",
            "96",
            "--limit-val",
            "200",
            "--method",
            method,
            "--target",
            "0.6",
            "--out",
            str(tmp_path),
        ]
    )
    metrics, found = read(tmp_path / "metrics.json"), read(tmp_path / "thresholds.json")
    assert metrics["flops_ratio"] == pytest.approx(
        0.6, abs=0.03
    )  # 200 images; on all of them it is closer
    assert {key for key in found if key.endswith("_thresholds")} == {
        f"{step}_thresholds" for step in METHODS[method]
    }
    measured = ltmp.read_file(tmp_path / "last.pt")["model"]
    for step in METHODS[method]:  # written to the last bit
        assert torch.equal(
            torch.tensor(found[f"{step}_thresholds"]),
            torch.cat([measured[f"blocks.{i}.{step}_masker.threshold"] for i in range(12)]),
        )


def test_steer_goes_where_the_kl_falls_and_r_stays_and_back_to_the_target():
    torch.manual_seed(0)
    gradient, d_r = torch.randn(6), torch.randn(6)

    def direction(gradient, distance, averages=None):
        ranks = [torch.zeros(1) for _ in gradient]
        for rank, value in zip(ranks, gradient):
            rank.grad = value[None].clone()
        train.steer(ranks, averages or [torch.zeros(1) for _ in ranks], d_r, distance)
        return torch.cat([rank.grad for rank in ranks])

    along, unit = direction(gradient, 0.0), F.normalize(d_r, dim=0)
    assert (
        along.norm() == pytest.approx(1)
        and along @ d_r == pytest.approx(0, abs=1e-6)
        and along @ gradient > 0
    )  # against it SGD goes
    torch.testing.assert_close(direction(1e-4 * gradient, 0.0), along)  # no scale matters
    for distance, back in ((0.01, 0.5), (-0.01, -0.5), (0.7, 1), (-0.7, -1)):
        torch.testing.assert_close(direction(gradient, distance) - along, back * unit)
    averages = [torch.zeros(1) for _ in gradient]
    direction(gradient, 0.0, averages), direction(-2 * gradient, 0.0, averages)
    torch.testing.assert_close(torch.cat(averages), 0.97 * 0.03 * gradient - 0.03 * 2 * gradient)


@pytest.mark.parametrize("method, cosine", [("ltm", 0.95), ("ltmp", 0.8), ("ltp", 0.8)])
def test_the_gradient_of_r_is_near_its_differences(method, cosine):
    images = data.open_split(None, "train", evaluate.clean_transform(VARIANTS["demo"]))
    batch = torch.stack([image for image, _ in data.subset(images, 16)])
    model = demo_model(method)
    _, scores, ranks = train.start(model, [batch], 0.5)
    if method == "ltmp":  # where nothing is pruned
        for rank in ranks[1::2]:
            rank.zero_()
        train.set_ranks(model, scores, ranks)
    for masker, found in scores.items():
        masker.whole_gradient, masker.tau = True, found.std().item() / 2
    slopes = train.r_gradient(model, batch) * torch.cat(train.rank_slopes(model, scores, ranks))
    differences = []
    for rank in ranks:
        there = rank.item()
        around = [there + 0.05, max(there - 0.05, 0)]
        r = [
            (
                rank.fill_(x),
                train.set_ranks(model, scores, ranks),
                train.measured_r(model, [batch]),
            )[-1]
            for x in around
        ]
        differences.append((r[0] - r[1]) / (around[0] - around[1]))
        rank.fill_(there)
    assert (
        F.cosine_similarity(slopes, torch.tensor(differences), dim=0) > cosine
    )  # steer takes the direction alone


def test_learning_betters_where_it_starts(tmp_path):
    train.main(
        [
            "--limit-train",
            "160",
            "--limit-val",
            "10",
            "--method",
            "ltp",
            "--target",
            "0.5",
            "--out",
            str(tmp_path),
        ]
    )
    images = data.open_split(None, "val", evaluate.clean_transform(VARIANTS["demo"]))
    batch = torch.stack([image for image, _ in data.subset(images, 200)])
    model = load_thresholds(demo_model("ltp"), tmp_path / "thresholds.json").eval()

    @torch.inference_mode()
    def kl_and_r():
        logits, kept = model(batch)
        return evaluate.kl_divergence(
            logits, demo_model("dense")(batch)[0]
        ).item(), flops.flops_ratio(kept, model.config).item()

    learned, r = kl_and_r()
    _, scores, ranks = train.start(model, [batch], r)
    train.land(model, [batch], scores, ranks, r)  # start ends within 0.01 of r, this within 0.002
    started, r_there = kl_and_r()
    assert learned < 0.9 * started and r == pytest.approx(r_there, abs=0.0025)


def torchrun(processes, script, *flags):
    """Run a script of the project under torchrun; what it wrote to stdout."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        str(Path(__file__).parent / script),
        *flags,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def has_learned(out, recipe):
    """Whether the run in the folder out is off where it started: at 0.9, or where all merge ranks are the same."""
    last = torch.load(out / "last.pt", weights_only=True)
    if recipe == "adaptive":
        merging = last["ranks"] if last["method"] == "ltm" else last["ranks"][0::2]
        return max(merging) - min(merging) > 1e-5
    return (
        max(
            abs(threshold - 0.9)
            for name, threshold in last["model"].items()
            if name.endswith("merge_masker.threshold")
        )
        > 1e-3
    )


@pytest.mark.parametrize("recipe, lr", [("paper", "0.05"), ("adaptive", "0.001")])
def test_two_processes_learn_what_one_learns_with_twice_the_batch(tmp_path, recipe, lr):
    flags = [
        "--recipe",
        recipe,
        "--limit-train",
        "33",
        "--limit-val",
        "51",
        "--target",
        "0.6",
        "--lr",
        "0.001",
        lr,
    ]  # odd: the last batch is one image
    printed = torchrun(2, "train.py", *flags, "-b", "8", "--out", str(tmp_path / "two"))
    train.main([*flags, "-b", "16", "--out", str(tmp_path / "one")])
    assert printed.count("demo, ltmp, 51 validation images") == 1  # one of them speaks
    one, two = (read(tmp_path / name / "thresholds.json") for name in ("one", "two"))
    for step in ("merge", "prune"):
        assert two[f"{step}_thresholds"] == pytest.approx(one[f"{step}_thresholds"], abs=1e-5)
    assert has_learned(tmp_path / "one", recipe)
    one, two = (read(tmp_path / name / "metrics.json") for name in ("one", "two"))
    assert two["images"] == one["images"] == 51 and two["dense_top1"] == one["dense_top1"]
    assert two["flops_ratio"] == pytest.approx(one["flops_ratio"], abs=1e-3)
    log = [
        [line.split(",") for line in (tmp_path / name / "log.csv").read_text().splitlines()[1:]]
        for name in ("one", "two")
    ]
    assert [len(lines) for lines in log] == [3, 3]
    assert [float(x) for x in log[1][0][1:]] == pytest.approx(
        [float(x) for x in log[0][0][1:]], rel=1e-4
    )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_thread_of_torchruns_processes_outlives_their_group(tmp_path):
    (tmp_path / "end.py").write_text("""
import atexit, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])

def threads():
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]

atexit.register(lambda: sys.stdout.write(f"at the end {threads()}\\n"))  # the first to be registered is the last to run
import evaluate, torch
evaluate.total(torch.ones(1))
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
sys.stdout.write(f"before {len(threads())}\\n")
""")
    printed = torchrun(2, tmp_path / "end.py", str(Path(__file__).parent)).splitlines()
    assert printed.count("at the end []") == 2
    assert "before 0" not in printed and sum(line.startswith("before ") for line in printed) == 2


def test_a_run_is_not_overwritten_in_silence(tiny, tmp_path, capsys):
    flags = [*TINY_RUN, "--out", str(tmp_path)]
    train.main(flags)
    before = (tmp_path / "thresholds.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        train.main(flags + ["--target", "0.5"])
    assert stopped.value.code == 2 and "--overwrite" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "thresholds.json").read_bytes() == before
    with pytest.raises(
        SystemExit
    ):  # out of reach, or stopped: no result of the run before lies beside the new last.pt
        train.main(
            flags
            + [
                "--target",
                "0.5",
                "--overwrite",
                "--recipe",
                "paper",
                "--lr",
                "1e30",
                "1e30",
                "--reg-weight",
                "1e38",
            ]
        )
    assert not (tmp_path / "thresholds.json").exists() and not (tmp_path / "metrics.json").exists()
    train.main(flags + ["--target", "0.5", "--overwrite"])
    assert (tmp_path / "thresholds.json").read_bytes() != before


def test_landing_is_exact_and_refuses_what_cannot_be():
    model, _ = random_model(3, "ltmp", image_size=14, depth=8)
    batch = torch.randn(32, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    maskers = train.threshold_maskers(model)

    def measured():
        with torch.inference_mode():
            return flops.flops_ratio(model.eval()(batch)[1].double(), model.config).item()

    for target in (1.0, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15):
        r, scores, ranks = train.start(model, [batch], target)
        assert measured() == pytest.approx(r, abs=1e-6) and r == pytest.approx(target, abs=0.011)
        shares = {
            step: {rank.item() for (kind, _), rank in zip(maskers, ranks) if kind == step}
            for step in ("merge", "prune")
        }
        assert (
            len(shares["merge"]) == 1
        )  # every block merges the same share, prunes a tenth of it, and as much where that is not enough ...
        assert (
            shares["prune"] == shares["merge"]
            if target <= 0.15
            else [*shares["prune"]] == pytest.approx([share / 10 for share in shares["merge"]])
        )
        for (step, masker), rank in zip(maskers, ranks):  # ... of the scores that it met
            found = (
                scores[masker][:-1] if step == "merge" else scores[masker][1:]
            )  # without the one that is off
            if not len(found):  # blocks before left nobody to ask about
                continue
            removed = (
                (found > masker.threshold if step == "merge" else found <= masker.threshold)
                .float()
                .mean()
                .item()
            )
            ties = (found == masker.threshold).float().mean().item()  # equal scores go together
            asked = (
                min(rank.item(), (found > 0).float().mean().item())
                if step == "merge"
                else rank.item()
            )  # thresholds end at 0
            assert removed - ties - 2 / len(found) <= asked <= removed + ties + 2 / len(found)
        ranks[3] += 0.2
        for other in (target, 0.3, 0.6, 0.95):
            r = train.land(model, [batch], scores, ranks, other)
            assert measured() == pytest.approx(r, abs=1e-6) and r == pytest.approx(other, abs=0.003)
    with pytest.raises(ValueError, match="out of reach: the lowest r is 0.101"):
        train.start(model, [batch], 0.09)


@pytest.mark.parametrize("seed, pays", [(2, True), (0, False)])
@pytest.mark.parametrize("method", ["ltmp", "ltpm"])
def test_pruning_is_learned_beside_merging_where_a_little_of_it_costs_hardly_more(
    capsys, method, seed, pays
):
    model, _ = random_model(seed, method, image_size=10, depth=4, layer_scale=False)
    batches = list(
        torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0)).split(24)
    )  # the last one shorter
    teacher = evaluate.with_method(model.eval(), "dense").eval()
    learner, r, scores, ranks = train.choose(model, teacher, batches, 0.6)
    assert learner.method == (method if pays else "ltm") and len(scores) == len(ranks) == (
        8 if pays else 4
    )
    assert r == pytest.approx(0.6, abs=0.011) and train.measured_r(
        learner, batches[:2]
    ) == pytest.approx(r, abs=1e-6)

    alone, both = (evaluate.with_method(model, other).eval() for other in ("ltm", method))
    train.start(both, batches[:2], train.start(alone, batches[:2], 0.6)[0], 0.002)
    with torch.no_grad():
        logits, *found = (
            torch.cat([each(images)[0] for images in batches]).log_softmax(1)
            for each in (teacher, alone, both)
        )
        merging, pruning = (
            (logits.exp() * (logits - other)).sum(1).sqrt().mean().item() for other in found
        )
    assert (
        (pruning < 1.1 * merging) == pays
        and f"root of the KL {merging:.3g} with merging alone, {pruning:.3g} with a little pruning"
        in capsys.readouterr().err
    )
    kind = {
        step: [
            rank.item()
            for (name, _), rank in zip(train.threshold_maskers(learner), ranks)
            if name == step
        ]
        for step in ("merge", "prune")
    }
    assert len(set(kind["merge"])) == 1 and kind["prune"] == pytest.approx(
        [rank / 10 for rank in kind["merge"][: 4 * pays]]
    )
    if method == "ltmp" and pays:
        for only in ("ltm", "ltp"):
            single = evaluate.with_method(model, only).eval()
            assert train.choose(single, teacher, batches, 0.6)[0] is single  # nothing to choose
        assert (
            train.choose(model, teacher, batches, 0.2)[0] is model
        )  # not to be had by merging alone
        _, scores, ranks = train.start(alone, batches[:2], 0.6)
        train.set_ranks(alone, scores, [torch.ones(1) for _ in ranks])
        assert (
            train.choose(model, teacher, batches, train.measured_r(alone, batches) - 0.005)[0]
            is model
        )  # near enough to start, not to land
        assert (
            train.choose(model, teacher, batches, 0.6, chosen="ltm")[0].method == "ltm"
        )  # as a run that is resumed had it
        assert train.choose(model, teacher, batches, 0.6, chosen=method)[0] is model


@pytest.mark.parametrize("seed, pays", [(10, True), (3, False)])
def test_where_pruning_does_not_pay_ltmp_learns_what_ltm_learns(tmp_path, monkeypatch, seed, pays):
    source, _ = random_model(
        seed, "dense", image_size=10, depth=4, layer_scale=False, num_classes=2
    )
    monkeypatch.setitem(VARIANTS, "random", source.config)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    for i, path in enumerate(
        sorted(make_folder(tmp_path, ("a", "b"), 32, (10, 10), ".png").rglob("*.png"))
    ):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (10, 10, 3), np.uint8)).save(
            path
        )  # noise: in plain colours merging costs nothing
    found, run = (
        {},
        [
            "--model",
            "random",
            "--weights",
            str(tmp_path / "weights.pth"),
            "--data",
            str(tmp_path),
            "-b",
            "8",
            "--target",
            "0.6",
        ],
    )
    for method in ("ltmp", "ltm"):
        train.main([*run, "--method", method, "--out", str(tmp_path / method)])
        found[method] = read(tmp_path / method / "thresholds.json")
        again = load_weights(create_model("random", method), tmp_path / method / "last.pt")
        other = load_thresholds(
            create_model("random", method), tmp_path / method / "thresholds.json"
        )
        assert all(
            torch.equal(w, other.state_dict()[name])
            for name, w in again.state_dict().items()
            if name.endswith("threshold")
        )
    assert (found["ltmp"]["merge_thresholds"] == found["ltm"]["merge_thresholds"]) == (not pays)
    assert (
        any(found["ltmp"]["prune_thresholds"]) == pays
        and len(found["ltmp"]["prune_thresholds"]) == 4
    )
    assert has_learned(tmp_path / "ltm", "adaptive")


def test_a_threshold_has_about_the_gradient_of_finite_differences():
    model = demo_model("ltmp")
    images = data.subset(data.open_split(None, "train", evaluate.clean_transform(model.config)), 96)
    batch, labels = (
        torch.stack([image for image, _ in images]),
        torch.tensor([label for _, label in images]),
    )
    scores = evaluate.set_shares(model, batch, {"merge": 0.0, "prune": 0.0})
    for masker, found in scores.items():
        masker.whole_gradient, masker.tau = (
            True,
            0.5 * (found.quantile(0.75) - found.quantile(0.25)).item(),
        )
    masker = model.blocks[0].prune_masker

    def terms(rank, images, labels):
        train.set_ranks(
            model, scores, [torch.tensor([rank if each is masker else 0.33]) for each in scores]
        )  # r = 0.3
        logits, kept = model(images)
        return torch.stack(
            [
                F.cross_entropy(logits, labels, label_smoothing=0.1),
                flops.flops_ratio(kept, model.config),
            ]
        )

    with torch.inference_mode():
        model.eval()
        low, high = ((terms(rank, batch, labels), masker.threshold.item()) for rank in (0.23, 0.43))
    slope = (high[0] - low[0]) / (high[1] - low[1])
    model.train()
    gradient = (
        sum(
            torch.tensor(
                [
                    torch.autograd.grad(term, masker.threshold, retain_graph=True)[0].item()
                    for term in terms(0.33, x, y)
                ]
            )
            for x, y in zip(batch.split(32), labels.split(32))
        )
        / 3
    )
    assert 0.2 < gradient[0] / slope[0] < 5  # without the cut at a ratio of 1 it is -20
    assert 0.5 < gradient[1] / slope[1] < 2


def test_dense_training_changes_all_weights_and_learns(tmp_path):
    make_folder(
        tmp_path / "images",
        classes=("red", "green", "blue"),
        per_class=8,
        size=(28, 28),
        suffix=".png",
    )
    train.main(
        [
            "--model",
            "demo",
            "--method",
            "dense",
            "--weights",
            "none",
            "--data",
            str(tmp_path / "images"),
            "--epochs",
            "8",
            "-b",
            "6",
            "--lr-backbone",
            "1e-3",
            "--patch-drop",
            "0.5",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    metrics = read(tmp_path / "out" / "metrics.json")
    assert metrics["top1"] == metrics["dense_top1"] > 60 and metrics["flops_ratio"] == 1
    torch.manual_seed(0)
    initial = create_model("demo", "dense").state_dict()
    trained = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["model"]
    assert all(not torch.equal(w, trained[name]) for name, w in initial.items())


@pytest.mark.parametrize("method, r", [("dense", None), ("tome", "8"), ("topk", "8")])
def test_evaluate_other_methods_on_the_demo(tmp_path, method, r):
    evaluate.main(
        ["--method", method, "--limit-val", "40", "--json", str(tmp_path / "m.json")]
        + (["--r", r] if r else [])
    )
    metrics = read(tmp_path / "m.json")
    assert METRICS <= metrics.keys() and metrics["method"] == method
    expected = [197.0] * 12 if r is None else [197.0 - 8 * (i + 1) for i in range(12)]
    assert metrics["kept"] == expected
    config = VARIANTS["demo"]
    val = data.subset(data.open_split(None, "val", evaluate.clean_transform(config)), 40)
    images, labels = (
        torch.stack([image for image, _ in val]),
        torch.tensor([label for _, label in val]),
    )
    model = evaluate.build_model(
        "demo", method, ltmp.read_checkpoint(evaluate.DEMO_WEIGHTS), r=r and int(r)
    ).eval()
    with torch.inference_mode():
        ours, dense = (
            some(images)[0].double().log_softmax(1) for some in (model, demo_model("dense").eval())
        )
    assert metrics["kl"] == pytest.approx(
        (dense.exp() * (dense - ours)).sum(1).mean().item(), rel=1e-3, abs=1e-9
    )
    assert (metrics["kl"] > 0) == (method != "dense")
    for key, log_p in (("top1", ours), ("dense_top1", dense)):
        assert metrics[key] == 100 * (log_p.argmax(1) == labels).sum().item() / 40


def test_the_demo_vit_is_a_good_one():
    """90.24 % on all 10,000 test images, 91.30 % on the embedded 2,000 (README); here 500 of those."""
    model = demo_model("dense")
    config = model.config
    val = data.subset(
        data.open_split(
            None, "val", data.eval_transform(28, config.crop_pct, config.mean, config.std)
        ),
        500,
    )
    metrics = evaluate.measure(model, torch.utils.data.DataLoader(val, 100), torch.device("cpu"))
    assert metrics["top1"] >= 88 and sum(p.numel() for p in model.parameters()) <= 0.7e6
    assert (
        evaluate.DEMO_WEIGHTS.stat().st_size < 1.5e6
        and torch.load(evaluate.DEMO_WEIGHTS, weights_only=True)["head.weight"].dtype
        == torch.float16
    )


def test_frontier_learns_evaluates_and_goes_on(tmp_path, capsys, monkeypatch):
    flags = [
        "--frontier",
        str(tmp_path),
        "--methods",
        "ltm",
        "tome",
        "--targets",
        "0.6",
        "--limit-train",
        "64",
        "--limit-val",
        "100",
        "--workers",
        "0",
    ]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        evaluate.main(flags + ["--seeds", "1"])
    first, message = capsys.readouterr()
    assert "matplotlib" in message.splitlines()[-1] and "dense" in first
    rows = read(tmp_path / "frontier.json")
    assert [(row["method"], row["target"]) for row in rows] == [
        ("dense", 1.0),
        ("tome", 0.6),
        ("ltm", 0.6),
    ]
    assert all(
        row["images"] == 100 and row["r"] == pytest.approx(row["target"], abs=0.05) for row in rows
    )
    assert (tmp_path / "frontier.csv").read_text().count("\n") == 4
    evaluate.main(
        [
            "--thresholds",
            str(tmp_path / "ltm-0.6-0" / "thresholds.json"),
            "--limit-val",
            "100",
            "--json",
            str(tmp_path / "alone.json"),
        ]
    )
    alone = read(tmp_path / "alone.json")
    assert (
        capsys.readouterr().out
        and rows[2]["kl"] == pytest.approx(alone["kl"], rel=1e-3)
        and rows[2]["top1"] == alone["top1"]
    )
    assert (
        rows[0]["kl"] == 0 < min(row["kl"] for row in rows[1:])
        and rows[0]["top1"] == alone["dense_top1"]
    )

    monkeypatch.setattr(evaluate.subprocess, "run", None)  # nothing is learned or evaluated twice
    with pytest.raises(SystemExit):
        evaluate.main(flags + ["--seeds", "1"])
    assert capsys.readouterr().out == first and read(tmp_path / "frontier.json") == rows


def test_frontier_counts_the_tokens_of_the_image_size_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        evaluate.main(
            [
                "--frontier",
                str(tmp_path),
                "--methods",
                "tome",
                "--targets",
                "0.6",
                "--limit-val",
                "4",
                "--image-size",
                "56",
                "--workers",
                "0",
            ]
        )
    assert read(tmp_path / "frontier.json")[1]["r"] == pytest.approx(0.6, abs=0.03)


def test_where_a_run_of_the_frontier_fails_it_says_how_to_go_on(
    tiny, tmp_path, capsys, monkeypatch
):
    commands = []
    monkeypatch.setattr(
        evaluate.subprocess,
        "run",
        lambda command, **options: (
            commands.append(command) or subprocess.CompletedProcess(command, 2)
        ),
    )
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(
            [
                *TINY_MODEL,
                "--frontier",
                str(tmp_path),
                "--methods",
                "ltm",
                "--targets",
                "0.6",
                "--limit-val",
                "10",
                "--recipe",
                "paper",
            ]
        )
    assert {"--method=ltm", "--target=0.6", "--recipe=paper"} < set(commands[0])
    assert (
        stopped.value.code == 2
        and "ltm-0.6-0: train.py ended with code 2; the same command goes on from there, once the reason that it gave, if any, is gone"
        in capsys.readouterr().err.splitlines()[-1]
    )


def test_frontier_points_are_means_over_seeds_with_their_spread():
    rows = [{"method": "dense", "target": 1.0, "seed": 0, "r": 1.0, "top1": 90.0, "kl": 0.0}]
    rows += [
        {
            "method": "ltmp",
            "target": 0.5,
            "seed": seed,
            "r": 0.5 + 0.01 * seed,
            "top1": 88.0 + seed,
            "kl": 0.002 * (1 + seed),
        }
        for seed in (0, 1)
    ]
    points = evaluate.frontier_points(rows)
    assert points["ltmp"] == [
        (0.5, pytest.approx(0.505), {"top1": (88.5, 0.5), "kl": pytest.approx((0.003, 0.001))})
    ]
    assert all(
        cell in evaluate.frontier_report(points)
        for cell in ("88.50 +- 0.50 at 0.505", "0.00300 +- 0.00100 at 0.505")
    )


def test_fixed_count_is_the_nearest():
    config = VARIANTS["deit_small_patch16_224"]
    assert evaluate.fixed_count(config, 1.0) == 0
    for target in (0.3, 0.5, 0.75):
        count = evaluate.fixed_count(config, target)
        error = []
        for other in (count - 1, count, count + 1):
            model = create_model("deit_tiny_patch16_224", "topk", r=other, dim=24)
            with torch.inference_mode():
                kept = model.eval()(torch.randn(1, 3, 224, 224))[1]
            error.append(abs(flops.flops_ratio(kept, config).item() - target))
        assert error[1] == min(error)


def test_the_benchmark_compares_like_with_like(tmp_path):
    evaluate.main(
        [
            "--benchmark",
            "--batch-sizes",
            "1",
            "3",
            "--repeats",
            "1",
            "--share",
            "0.2",
            "--json",
            str(tmp_path / "rows.json"),
        ]
    )
    rows = read(tmp_path / "rows.json")
    assert [(row["what"], row["images"]) for row in rows] == [
        ("inference", 1),
        ("inference", 3),
        ("training", 16),
    ]
    assert all(
        row["speed-up"] == pytest.approx(row["dense ms"] / row["reduced ms"]) for row in rows
    )
    assert all(
        0.05 < row["r"] < 0.6 and row["efficiency"] == pytest.approx(row["speed-up"] * row["r"])
        for row in rows[:2]
    )
    assert rows[2]["r"] is rows[2]["efficiency"] is None


def test_shares_are_what_each_block_removes():
    model = demo_model("ltmp")
    images = torch.stack(
        [
            data.subset(evaluate.still(data.open_split(None, "val"), model), 8)[i][0]
            for i in range(8)
        ]
    )
    evaluate.set_shares(model, images, {"merge": 0.25, "prune": 0.25})
    with torch.inference_mode():
        kept = model.eval()(images)[1].mean(1)
    left = torch.cat([torch.tensor([197.0]), kept])
    assert ((left[1:6] - 1) / (left[:5] - 1)).tolist() == pytest.approx(
        [0.875 * 0.75] * 5, abs=0.03
    )  # a quarter of half, then a quarter


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "nowhere"], "no data folder at nowhere"),
        (["--weights", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--model", "vit_tiny_patch16_224"], "no official weights are known"),
    ],
)
def test_wrong_input_is_one_line(flags, message, tmp_path):
    for script, more in (
        ("train.py", ["--out", str(tmp_path)]),
        ("evaluate.py", ["--method", "dense"]),
    ):
        run = subprocess.run(
            [sys.executable, script, *flags, *more], cwd=HERE, capture_output=True, text=True
        )
        assert (
            run.returncode == 2
            and message in run.stderr
            and len(run.stderr.strip().splitlines()) == 1
        ), run.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "deit_smal_patch16_224"], "did you mean deit_small_patch16_224?"),
        (["--method", "ltmpp"], "did you mean"),
        (["--batch-size", "0"], "0 is no whole number from 1 on"),
        (["--workers", "-1"], "-1 is no whole number from 0 on"),
        (["--device", "abacus"], "no device abacus"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
@pytest.mark.parametrize("script", [train, evaluate])
def test_wrong_flags_are_one_line(script, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(flags)
    printed = capsys.readouterr()
    assert (
        stopped.value.code == 2
        and message in printed.err
        and len(printed.err.strip().splitlines()) == 1
        and not printed.out
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--target", "0"], "0 is not above 0 and at most 1"),
        (["--target", "nan"], "nan is no number"),
        (["--target", "half"], "half is no number"),
        (["--lr", "1e-3", "nan"], "nan is no number"),
        (["--recipe", "papr"], "did you mean paper?"),
        (["--target", "0.01", "--limit-train", "64"], "out of reach: the lowest r is 0.0"),
        (["--out", __file__], "cannot write to"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_wrong_training_is_refused_in_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        train, "time", SimpleNamespace(time=lambda: 0.0)
    )  # on a slow machine start would say where it is
    with pytest.raises(SystemExit) as stopped:
        train.main(["--limit-val", "8", "--out", str(tmp_path), *flags])
    printed = capsys.readouterr()
    assert (
        stopped.value.code == 2
        and message in printed.err
        and len(printed.err.strip().splitlines()) == 1
        and not printed.out
    )


# ---------------------------------------------------------------------------------------------
# What happens to real runs

LIVES = multiprocessing.get_context(
    "forkserver"
)  # a process with the modules loaded, from which others are forked
LIVES.set_forkserver_preload(
    ["torch._dynamo", "test_ltmp"]
)  # _dynamo: what an optimizer would import, slowly


def live(flags, moment=None, count=1, said=os.devnull, environment={}):
    """train.py in a process of its own, saving after every step; it sends itself SIGKILL when that moment (see below) comes for the count-th time."""
    os.setsid()
    os.environ.update(environment)
    sys.argv, sys.stderr = ["train.py"], open(said, "a", buffering=1)
    torch.set_num_threads(1)
    VARIANTS.update(TINY)
    train.SAVE_EVERY, left = 0, [count]

    def tick(name):
        left[0] -= name == moment
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def ticking(name, function):
        return lambda *args: (tick(name), function(*args))[1]

    def in_halves(path, content, write=Path.write_bytes):
        write(path, bytes(content)[: len(content) // 2])
        tick(f"half of {path.stem}")
        write(path, content)

    def renamed(source, target, replace=os.replace):
        tick(f"all of {Path(target).name}")
        replace(source, target)
        tick(f"new {Path(target).name}")

    Path.write_bytes, os.replace = in_halves, renamed
    train.flops_ratio, train.measured_r = (
        ticking("step", train.flops_ratio),
        ticking("r", train.measured_r),
    )
    train.main(flags)


def started(*args, **named):
    """live() in a new process."""
    process = LIVES.Process(target=live, args=args, kwargs=named)
    process.start()
    return process


def ended(process, after=60):
    """The exit code of a process, which is killed if it lasts longer than that many seconds. Its workers are ended too."""
    process.join(after)
    process.kill()
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.exitcode


def spoil(root):
    """Damage images of make_folder(root, suffix=".png") in four ways. Their paths, those in train first."""
    header = (
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (30000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    )
    bomb = (
        header
        + zlib.crc32(header[12:]).to_bytes(4, "big")
        + b"\0\0\0\0IDAT"
        + zlib.crc32(b"IDAT").to_bytes(4, "big")
    )
    whole = (root / "train" / "a" / "0.png").read_bytes()
    paths = [
        root / name
        for name in (
            "train/a/1.png",
            "train/b/0.png",
            "train/b/1.png",
            "val/a/0.png",
            "val/b/1.png",
        )
    ]
    for path, content in zip(
        paths, (whole[:-40], b"no image", bomb, b"", whole[: len(whole) // 2])
    ):
        path.write_bytes(content)
    return paths


MOMENTS = {  # one life after the other, the next with --resume where there is something to resume
    "paper": [
        ("half of last.pt", 1),
        ("new last.pt", 1),
        ("step", 3),
        ("all of last.pt", 3),
        ("half of log.csv", 1),
        ("half of thresholds.json", 1),
    ],
    "adaptive": [
        ("r", 2),
        ("all of last.pt", 1),
        ("step", 2),
        ("half of last.pt", 3),
        ("r", 3),
        ("half of last.pt", 2),
        ("new last.pt", 2),
        ("half of thresholds.json", 1),
        ("new thresholds.json", 1),
        ("half of metrics.json", 1),
    ],
    "dense": [("step", 3), ("half of last.pt", 3)],
}


@pytest.mark.parametrize("what", MOMENTS)
def test_killed_at_any_moment_a_run_ends_with_the_same_thresholds(tmp_path, what):
    """kill -9 at the moments above and at random ones, with and without workers; paper: on a folder with bad images; dense: the same weights."""
    if what == "paper":
        bad = spoil(
            make_folder(tmp_path / "images", classes=("a", "b"), size=(28, 28), suffix=".png")
        )
        flags = [
            *TINY_MODEL,
            "--data",
            str(tmp_path / "images"),
            "-b",
            "2",
            "--epochs",
            "2",
            "--skip-bad-images",
            "--recipe",
            what,
        ]
    elif what == "adaptive":
        flags = [
            *TINY_RUN,
            "--limit-train",
            "4",
            "--epochs",
            "4",
            "--target",
            "0.81",
            "--recipe",
            what,
        ]
    else:
        flags = [*TINY_RUN, "--method", what, "--patch-drop", "0.5"]
    out, said = tmp_path / "killed", tmp_path / "said"
    assert ended(started([*flags, "--workers", "0", "--out", str(tmp_path / "whole")])) == 0
    for life, moment in enumerate([*MOMENTS[what], None, None, None]):
        again = ["--resume"] if (out / "last.pt").exists() else []
        process = started(
            [*flags, *again, "--workers", str(2 * (life % 2)), "--out", str(out)],
            *(moment or ()),
            said=said,
        )
        code = ended(process, 30 if moment else random.uniform(0.05, 0.6))
        assert code == -signal.SIGKILL if moment else code in (-signal.SIGKILL, 0), said.read_text()
    for last in ("finishes", "begins where all is done"):
        assert ended(started([*flags, "--resume", "--out", str(out)], said=said)) == 0, (
            said.read_text()
        )
        for name in ("metrics.json", "log.csv", "thresholds.json")[: 2 if what == "dense" else 3]:
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (
                last,
                name,
            )
    whole, killed = (
        torch.load(folder / "last.pt", weights_only=True)["model"]
        for folder in (tmp_path / "whole", out)
    )
    assert all(torch.equal(w, killed[name]) for name, w in whole.items())
    if (
        what == "adaptive"
    ):  # with four images landing ends too far from this target to stay there if it were done twice
        assert abs(float(re.findall(r"landing: r = (\S+)", said.read_text())[-1]) - 0.81) > 0.003
    if what == "paper":
        listed = said.read_text().rsplit("images were left out:", 1)[1]
        assert [listed.count(f"cannot read the image {path}:") for path in bad] == [1] * 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_and_stops(tmp_path, number):
    process = started(
        [
            *TINY_RUN,
            "--limit-train",
            "400",
            "--epochs",
            "10",
            "--workers",
            "2",
            "--out",
            str(tmp_path),
        ],
        said=tmp_path / "said",
    )
    while not (tmp_path / "log.csv").exists() or (tmp_path / "log.csv").read_text().count("\n") < 8:
        assert process.is_alive(), (tmp_path / "said").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert ended(process) == 130
    said, log = (tmp_path / "said").read_text().splitlines(), (tmp_path / "log.csv").read_text()
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert (
        f"stopped after step {step} of 2000; the same command with --resume goes on from there"
        in said[-1]
        and log.count("\n") == 1 + step
    )
    on_one_core = (
        "This DataLoader will create 2 worker processes",
        "check_worker_number",
    )  # torch warns
    assert all(
        line.startswith(("root of the KL", "start: r", "train"))
        or any(text in line for text in on_one_core)
        for line in said
    )


def two_processes(flags, said, **named):
    """live() as torchrun starts it, twice; the second of the two is killed as `named` says. Their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    both = [
        started(
            flags, **named if rank else {}, said=said, environment=environment | {"RANK": str(rank)}
        )
        for rank in (0, 1)
    ]
    return [ended(process, 30) for process in both]


def test_where_one_process_dies_the_other_ends_too(tmp_path):
    flags = [*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)]
    assert two_processes(flags, tmp_path / "said", moment="step", count=3) == [1, -signal.SIGKILL]
    assert "another process has ended" in (tmp_path / "said").read_text().splitlines()[-1]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize(
    "recipe, codes, told", [("paper", [1, 2], 1), ("adaptive", [2, 2], 2)]
)  # adaptive: both meet it before the first step
def test_a_bad_image_of_one_process_is_told_and_ends_both(tmp_path, recipe, codes, told):
    folder = make_folder(tmp_path / "images", classes=("a", "b"), size=(28, 28), suffix=".png")
    bad = Path(
        data.ImageFolder(folder / "train").samples[data.epoch_batches(8, 4, epoch=0, seed=0)[1][1]][
            0
        ]
    )  # met by the second, in its second step
    bad.write_bytes(b"no image")
    flags = [
        *TINY_MODEL,
        "--num-classes",
        "2",
        "--data",
        str(folder),
        "--workers",
        "1",
        "-b",
        "2",
        "--recipe",
        recipe,
        "--out",
        str(tmp_path),
    ]
    assert two_processes(flags, tmp_path / "said") == codes
    said = (tmp_path / "said").read_text().splitlines()
    assert len(said) == 2 and sum(f"cannot read the image {bad}: " in line for line in said) == told


@pytest.mark.parametrize(
    "recipe, lr", [("paper", ["1e-3", "0.05"]), ("adaptive", ["0.01", "0.01"])]
)
def test_two_processes_leave_out_the_same_bad_images_as_one(tiny, tmp_path, capsys, recipe, lr):
    folder = make_folder(tmp_path / "images", classes=("a", "b"), size=(28, 28), suffix=".png")
    first, second = data.epoch_batches(8, 4, epoch=0, seed=0)
    bad = [
        data.ImageFolder(folder / "train").samples[i][0] for i in first[1::2] + second
    ]  # all of one process in one batch, and all of another batch
    bad.append(str(folder / "val" / "a" / "1.png"))
    for path in bad:
        Path(path).write_bytes(b"no image")
    flags = [
        *TINY_MODEL,
        "--data",
        str(folder),
        "--epochs",
        "3",
        "--recipe",
        recipe,
        "--lr",
        *lr,
        "--skip-bad-images",
        "--workers",
        "0",
    ]
    assert two_processes(
        [*flags, "-b", "2", "--out", str(tmp_path / "two")], tmp_path / "said"
    ) == [0, 0]
    train.main([*flags, "-b", "4", "--out", str(tmp_path / "one")])
    one, two = (read(tmp_path / name / "thresholds.json") for name in ("one", "two"))
    for step in ("merge", "prune"):
        assert two[f"{step}_thresholds"] == pytest.approx(one[f"{step}_thresholds"], abs=1e-5)
    assert has_learned(tmp_path / "one", recipe)
    assert [read(tmp_path / name / "metrics.json")["images"] for name in ("one", "two")] == [7, 7]
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("one", "two")]
    assert [len(log) for log in logs] == [7, 7] and [log.index("2,,,,") for log in logs] == [
        2,
        2,
    ]  # the batch without a good image: no update
    for said in (capsys.readouterr().err, (tmp_path / "said").read_text()):
        assert (
            "7 images were left out" in said
            and [said.count(f"cannot read the image {path}:") for path in bad] == [1] * 7
        )


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    "script, flags",
    [
        (train, ["--recipe", "paper"]),
        (train, ["--recipe", "adaptive"]),
        (evaluate, ["--method", "dense"]),
        (evaluate, ["--method", "dense", "--benchmark", "--batch-sizes", "8"]),
    ],
)
def test_a_bad_image_is_one_line_from_any_process(tiny, tmp_path, capsys, script, flags, workers):
    spoil(make_folder(tmp_path / "images", classes=("a", "b"), size=(28, 28), suffix=".png"))
    more = ["--out", str(tmp_path / "out")] if script is train else []
    with pytest.raises(SystemExit) as stopped:
        script.main(
            [
                *TINY_MODEL,
                "--num-classes",
                "2",
                "--data",
                str(tmp_path / "images"),
                "--workers",
                workers,
                *flags,
                *more,
            ]
        )
    printed = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and len(printed.splitlines()) == 1
        and "cannot read the image " in printed
    )
    assert "--benchmark" in flags or "; --skip-bad-images goes on" in printed


def test_evaluation_without_bad_images_is_that_of_the_good_ones(tiny, tmp_path, capsys):
    bad = spoil(make_folder(tmp_path / "bad", classes=("a", "b"), size=(28, 28), suffix=".png"))
    shutil.copytree(tmp_path / "bad", tmp_path / "good")
    for path in bad:
        (tmp_path / "good" / path.relative_to(tmp_path / "bad")).unlink()
    for name in ("bad", "good"):
        flags = [
            f
            for kind in ("json", "gallery", "chart")
            for f in (f"--{kind}", str(tmp_path / f"{name}.{kind}"))
        ]
        torch.manual_seed(0)  # the random weights
        evaluate.main(
            [
                *TINY_MODEL,
                "--method",
                "tome",
                "--r",
                "3",
                "--data",
                str(tmp_path / name),
                "-b",
                "3",
                "--workers",
                "1",
                "--skip-bad-images",
                *flags,
            ]
        )
        said = capsys.readouterr().err
        assert [said.count(f"cannot read the image {path}:") for path in bad] == (
            [0, 0, 0, 1, 1] if name == "bad" else [0] * 5
        )
        assert ("2 images were left out" in said) == (name == "bad")
    bad, good = (read(tmp_path / f"{name}.json") for name in ("bad", "good"))
    assert (
        good["images"] == 6
        and bad.pop("kl") == pytest.approx(good.pop("kl"), abs=1e-6)
        and bad == good
    )  # in batches of other sizes sums round otherwise
    for kind in ("gallery", "chart"):
        assert (tmp_path / f"bad.{kind}").read_bytes() == (tmp_path / f"good.{kind}").read_bytes()


def test_where_every_image_is_bad_it_says_so(tiny, tmp_path, capsys):
    for path in make_folder(tmp_path / "images", size=(28, 28), suffix=".png").rglob("*.png"):
        path.write_bytes(b"")
    for script, flags in (
        (evaluate, ["--method", "dense"]),
        (train, ["--recipe", "adaptive", "--out", str(tmp_path / "out")]),
    ):
        with pytest.raises(SystemExit) as stopped:
            script.main(
                [
                    *TINY_MODEL,
                    "--data",
                    str(tmp_path / "images"),
                    "--workers",
                    "0",
                    "--skip-bad-images",
                    *flags,
                ]
            )
        assert stopped.value.code == 2 and re.search(
            "none of .*could be read", capsys.readouterr().err
        )


def test_a_full_disk_is_one_line_and_leaves_the_last_save(tiny, tmp_path, monkeypatch, capsys):
    flags, limits = (
        [*TINY_RUN, "--recipe", "paper", "--out"],
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    train.main([*flags, str(tmp_path / "whole")])
    capsys.readouterr()
    steps, ratio = [], train.flops_ratio

    def full(*args):
        steps.append(1)
        if len(steps) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return ratio(*args)

    with monkeypatch.context() as until:
        until.setattr(train, "flops_ratio", full)
        until.setattr(train, "SAVE_EVERY", 0)
        try:
            with pytest.raises(SystemExit) as stopped:
                train.main([*flags, str(tmp_path / "out")])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and printed.endswith("last.pt: File too large\n")
        and len(printed.splitlines()) == 1
    )
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 3
    train.main([*flags, str(tmp_path / "out"), "--resume"])
    for name in ("thresholds.json", "log.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "flag, path",
    [
        ("--json", "file/inside"),
        ("--json", "."),
        ("--chart", "file/inside"),
        ("--chart", "."),
        ("--gallery", "."),
        ("--frontier", "file/inside"),
    ],
)
def test_what_cannot_be_written_is_one_line(tiny, tmp_path, capsys, flag, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(
            [*TINY_MODEL, "--method", "dense", "--limit-val", "20", flag, str(tmp_path / path)]
        )
    printed = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and f"cannot write {tmp_path / path}" in printed[-1]
    assert all(
        re.match(r"(dense|dense-1-0|image by image|dense, image by image): \d+|1/\d+: dense", line)
        for line in printed[:-1]
    )  # progress


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_never_learned_from(tiny, tmp_path, monkeypatch, capsys, what):
    flags, steps, ratio = [*TINY_RUN, "--recipe", "paper", "--out"], [], train.flops_ratio
    train.main([*flags, str(tmp_path / "whole")])
    capsys.readouterr()

    def broken(*args):
        steps.append(1)
        r = ratio(*args)
        if len(steps) == 3:
            if what == "loss":
                return r * math.nan
            r.register_hook(lambda gradient: gradient * math.inf)
        return r

    with monkeypatch.context() as until:
        until.setattr(train, "flops_ratio", broken)
        with pytest.raises(SystemExit) as stopped:
            train.main([*flags, str(tmp_path / "out")])
    printed = capsys.readouterr().err.splitlines()
    assert (
        stopped.value.code == 1
        and len(printed) == 1
        and "at step 3; last.pt holds the state before it" in printed[0]
    )
    train.main([*flags, str(tmp_path / "out"), "--resume"])
    for name in ("thresholds.json", "log.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_steps_that_overflow_float16_are_counted(tiny, tmp_path, monkeypatch, capsys, recipe):
    monkeypatch.setattr(evaluate, "amp_dtype", lambda device, amp: torch.float16)
    monkeypatch.setattr(evaluate, "amp_context", lambda device, amp: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**126)
    )  # too large for float32 until halved some times
    monkeypatch.setattr(
        evaluate, "kl_divergence", lambda *logits, kl=evaluate.kl_divergence: 1e6 * kl(*logits)
    )  # of so small a model it is tiny
    steps = []
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, step=torch.optim.SGD.step: (steps.append(1), step(self))[1],
    )
    train.main([*TINY_RUN, "--recipe", recipe, "--epochs", "8", "--out", str(tmp_path)])  # 32 steps
    told = re.search(
        r"(\d+) of 32 steps made no update: their gradients overflowed float16",
        capsys.readouterr().err,
    )
    assert 0 < int(told[1]) == 32 - len(steps) < 32


def test_gradients_that_no_scale_makes_finite_stop_the_run(tiny, tmp_path, monkeypatch, capsys):
    ratio = train.flops_ratio

    def broken(*args):
        r = ratio(*args)
        r.register_hook(lambda gradient: gradient * math.inf)
        return r

    monkeypatch.setattr(train, "flops_ratio", broken)
    monkeypatch.setattr(evaluate, "amp_dtype", lambda device, amp: torch.float16)
    monkeypatch.setattr(evaluate, "amp_context", lambda device, amp: contextlib.nullcontext())
    with pytest.raises(SystemExit) as stopped:
        train.main(
            [*TINY_RUN, "--recipe", "paper", "--epochs", "8", "--out", str(tmp_path)]
        )  # the scale is 2^16 at first
    assert (
        stopped.value.code == 1
        and "at step 17; last.pt" in capsys.readouterr().err.splitlines()[-1]
    )


def test_a_run_without_a_scaler_goes_on_with_one(tiny, tmp_path, monkeypatch):
    train.main([*TINY_RUN, "--out", str(tmp_path)])
    monkeypatch.setattr(evaluate, "amp_dtype", lambda device, amp: torch.float16)
    monkeypatch.setattr(evaluate, "amp_context", lambda device, amp: contextlib.nullcontext())
    train.main([*TINY_RUN, "--resume", "--out", str(tmp_path)])
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 8


def test_only_the_limited_images_are_looked_at(tiny, tmp_path, monkeypatch):
    seen, item = set(), data.FashionMNIST.item
    monkeypatch.setattr(
        data.FashionMNIST,
        "item",
        lambda self, index, transform: (
            len(self) == 3000 and seen.add(index),
            item(self, index, transform),
        )[1],
    )
    train.main([*TINY_RUN, "--recipe", "adaptive", "--out", str(tmp_path)])
    assert seen == set(data.evenly(3000, 8))


@pytest.mark.parametrize(
    "script, name", [(evaluate, "measure"), (train, "learn"), (train, "start")]
)
def test_what_nobody_foresaw_keeps_its_traceback(tiny, tmp_path, monkeypatch, script, name):
    def deep_inside(*args):
        raise ValueError("deep inside")

    monkeypatch.setattr(script, name, deep_inside)
    flags = (
        ["--recipe", "adaptive", "--out", str(tmp_path)]
        if script is train
        else ["--method", "dense"]
    )
    with pytest.raises(ValueError, match="deep inside"):
        script.main([*TINY_RUN[:6], *flags] if script is train else [*TINY_MODEL, *flags])


def test_what_is_saved_does_not_grow(tiny, tmp_path):
    for epochs in ("1", "40"):
        train.main([*TINY_RUN, "-b", "8", "--epochs", epochs, "--out", str(tmp_path / epochs)])
    assert (
        abs(
            (tmp_path / "1" / "last.pt").stat().st_size
            - (tmp_path / "40" / "last.pt").stat().st_size
        )
        < 200
    )
    assert (tmp_path / "40" / "log.csv").read_text().count("\n") == 41


WRONG_INPUT = {  # what train.py and evaluate.py, a tiny model, say to these flags; files: see below
    "--data {}/empty": "empty has no folder val: it must hold train and val",
    "--data {}/no images": "b holds no images (.jpg",
    "--data {}/images --val-fraction 2": "2 is not above 0 and at most 1",
    "--data {}/images --num-classes 1": "the data has 2 classes, the model has 1: --num-classes 2 makes a new head",
    "--image-size 0": "0 is no whole number from 1 on",
    "--image-size 30": "image_size 30 must be a multiple of patch_size 7",
    "--batch-size -8": "-8 is no whole number from 1 on",
    "--limit-val 0.5": "0.5 is no whole number from 1 on",
    "--seed one": "invalid int value: 'one'",
    "--weights {}/text": "text is no checkpoint, or damaged",
    "--weights {}/cut": "cut is no checkpoint, or damaged",
    "--weights {}/good.json": "good.json is no checkpoint, or damaged (then copy it again): Unsupported operand",  # and no advice of torch's to load it all the same
    "--weights {}/code": "code holds more than tensors, random.Random, which is not loaded since it could run code",
    "--weights {}/deeper": "does not fit the model: unexpected blocks.2.",
    "--weights {}/wider": "does not fit the model: cls_token is (1, 1, 24), not (1, 1, 16)",
}
WRONG_TRAINING = {
    "--data {}/val only": "val only has no folder train",
    "--data {}/odd": "train and val have different classes: c, d in one alone",
    "--target 1.5": "1.5 is not above 0 and at most 1",
    "--target -1": "-1 is no number from 0 on",
    "--lr 1e-3 -1": "-1 is no number from 0 on",
    "--epochs 0": "0 is no whole number from 1 on",
    "--patch-drop 0.5": "--patch-drop goes with --method dense",
    "--method dense --recipe adaptive": "--recipe, --lr, --tau and --reg-weight are for thresholds",
}
WRONG_EVALUATION = {
    "--thresholds {}/absent": "cannot read thresholds from ",
    "--thresholds {}/text": "cannot read thresholds from ",
    "--thresholds {}/deeper.json": "merge_thresholds must be 2 numbers, one per block; got [0.9, 0.9, 0.9]",
    "--thresholds {}/ltm.json": "the thresholds belong to the method ltm, the model runs ltmp",
    "--thresholds {}/other.json": "learned for demo, the model is tiny: pass --model demo",
    "--method tome": "--method tome needs --r",
    "--method tome --r 1 2 3": "r must be one count >= 0 or 2 of them",
    "--method tome --r 1 --thresholds {}/good.json": "--method tome has no thresholds",
    "--r 1": "--r goes with --method tome or --method topk",
}


@pytest.mark.parametrize(
    "script, flags, message",
    [(train, *wrong) for wrong in (WRONG_INPUT | WRONG_TRAINING).items()]
    + [(evaluate, *wrong) for wrong in (WRONG_INPUT | WRONG_EVALUATION).items()],
)
def test_what_is_wrong_is_said_in_one_line(tiny, tmp_path, capsys, script, flags, message):
    for name in (
        "empty",
        "val only/val/a",
        "no images/train/a",
        "no images/train/b",
        "no images/val/a",
        "no images/val/b",
    ):
        (tmp_path / name).mkdir(parents=True)
    make_folder(tmp_path / "images", classes=("a", "b"), per_class=1, size=(28, 28), suffix=".png")
    shutil.copytree(tmp_path / "images", tmp_path / "odd")
    for old, new in (("train/b", "train/c"), ("val/b", "val/d")):
        (tmp_path / "odd" / old).rename(tmp_path / "odd" / new)
    shutil.copy(tmp_path / "images/train/a/0.png", tmp_path / "no images/train/a")
    shutil.copy(tmp_path / "images/train/a/0.png", tmp_path / "no images/val/a")
    (tmp_path / "text").write_text("text")
    torch.save({"model": random.Random()}, tmp_path / "code")
    torch.save(create_model("tiny", depth=3).state_dict(), tmp_path / "deeper")
    torch.save(create_model("tiny", dim=24).state_dict(), tmp_path / "wider")
    (tmp_path / "cut").write_bytes((tmp_path / "wider").read_bytes()[:20_000])
    for name, found in (
        ("deeper", {"merge_thresholds": [0.9] * 3, "prune_thresholds": [0.0] * 3}),
        ("ltm", {"method": "ltm", "merge_thresholds": [0.9] * 2}),
        ("other", {"model": "demo"}),
        ("good", {"merge_thresholds": [0.9] * 2, "prune_thresholds": [0.0] * 2}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"method": "ltmp"} | found))
    more = (
        ["--out", str(tmp_path / "out")]
        if script is train
        else []
        if "tome" in flags
        else ["--thresholds", str(tmp_path / "good.json")]
    )
    with pytest.raises(SystemExit) as stopped:
        script.main(
            [
                *TINY_MODEL,
                "--method",
                "ltmp",
                *more,
                *(flag.format(tmp_path) for flag in re.split(r" (?!only|images)", flags)),
            ]
        )
    printed = capsys.readouterr()
    assert (
        stopped.value.code == 2
        and message in printed.err
        and len(printed.err.splitlines()) == 1
        and not printed.out
    ), printed.err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# What the README says


def test_the_readme_example_of_another_vit():
    code = re.search(
        r"```python\n(from ltmp import.*?)```", (HERE / "README.md").read_text(), re.S
    ).group(1)
    names = {}
    exec(code, names)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        32, 2, 64, activation="gelu", norm_first=True, batch_first=True
    ).eval()
    maskers = lambda merge, prune: (
        ltmp.ThresholdMasker(merge, 0.1),
        ltmp.ThresholdMasker(prune, 0.1),
    )
    x, ones = torch.randn(3, 18, 32), torch.ones(3, 18)
    with torch.no_grad():
        same, size, mask = names["reduced_layer"](layer, x, ones, ones, *maskers(2, 0), drop=True)
        torch.testing.assert_close(
            same[:, 0], layer(x)[:, 0]
        )  # nothing merged, nothing pruned: the layer itself
        cut, _, cut_mask = names["reduced_layer"](
            layer, x, ones, ones, *maskers(0.3, 0.05), drop=True
        )
        whole, _, whole_mask = names["reduced_layer"](
            layer, x, ones, ones, *maskers(0.3, 0.05), drop=False
        )
    assert cut.shape[1] < 18 == whole.shape[1] and torch.equal(cut_mask.sum(1), whole_mask.sum(1))
    torch.testing.assert_close(cut[cut_mask > 0], whole[whole_mask > 0])


def test_the_readme_walks_through_one_image_with_its_true_numbers(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    code, printed = re.search(
        r"## The method in the code.*?```python\n(.*?)```\s*```\n(.*?)```",
        (HERE / "README.md").read_text(),
        re.S,
    ).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_the_readme_names_tests_that_there_are():
    named = set(re.findall(r"`(test_\w+)`", (HERE / "README.md").read_text())) - {"test_ltmp"}
    assert len(named) > 10 and named <= globals().keys()


def test_the_readme_names_every_flag_that_it_uses():
    text = (HERE / "README.md").read_text()
    known = {"--help"}
    for script in ("train.py", "evaluate.py", "flops.py", "data.py"):
        known |= set(
            re.findall(
                r'"(--?[a-z][a-z0-9-]*)"',
                (HERE / script).read_text() + (HERE / "evaluate.py").read_text(),
            )
        )
    for command in re.findall(r"python (?:train|evaluate|flops|data)\.py([^\n`]*)", text):
        assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", command)) <= known, command


# ---------------------------------------------------------------------------------------------
# Pictures


def assert_shows(picture, pixels, held_by, cell):
    """The picture (G cell, G cell, 3) shows the map held_by (G, G) of pixels (S, S, 3) up to 200, in which no outline colour occurs."""
    G, patch, thick = len(held_by), len(pixels) // len(held_by), 2 if cell >= 10 else 1
    is_outline = lambda part: (part[..., None, :] == evaluate.OUTLINES).all(-1).any(-1)
    patches = pixels.reshape(G, patch, G, patch, 3).swapaxes(1, 2)  # (G, G, patch, patch, 3)
    cells = picture.reshape(G, cell, G, cell, 3).swapaxes(1, 2)
    plain = evaluate.scaled(pixels, G * cell).reshape(G, cell, G, cell, 3).swapaxes(1, 2)
    outside = np.pad(held_by, 1, constant_values=-1)  # nothing, as where tokens were dropped
    inner, outlines = slice(thick, cell - thick), {}
    for row, column in np.ndindex(G, G):
        token, drawn = held_by[row, column], cells[row, column]
        merged = token >= 0 and (held_by == token).sum() > 1
        beside = {
            side: outside[row + 1 + y, column + 1 + x] != token
            for side, y, x in (("top", -1, 0), ("bottom", 1, 0), ("left", 0, -1), ("right", 0, 1))
        }
        if token < 0:
            expected = np.broadcast_to(evaluate.BLANK, drawn.shape)
        elif merged:
            expected = np.broadcast_to(
                patches[held_by == token].mean((0, 1, 2)).round(), drawn.shape
            )
        else:
            expected = plain[row, column]
        assert (
            np.abs(drawn[inner, inner] - expected[inner, inner].astype(float)).max() <= 1
        )  # rounded from sums in another order
        edges = {
            "top": drawn[:thick, inner],
            "bottom": drawn[-thick:, inner],
            "left": drawn[inner, :thick],
            "right": drawn[inner, -thick:],
        }
        for (
            side,
            edge,
        ) in (
            edges.items()
        ):  # an outline exactly where another token, or nothing, is beside a merged one
            assert is_outline(edge).all() if merged and beside[side] else not is_outline(edge).any()
        if not merged:  # the thin grid, on the first row and column of a cell
            for side, edge, clean in (
                ("top", drawn[0, inner], expected[0, inner]),
                ("left", drawn[inner, 0], expected[inner, 0]),
            ):
                assert (edge != clean).any(-1).all() if beside[side] else (edge == clean).all()
        elif is_outline(drawn).any():
            outlines.setdefault(token, set()).update(map(tuple, drawn[is_outline(drawn)]))
    assert all(
        len(colours) == 1 for colours in outlines.values()
    )  # one token, one colour, wherever its patches lie


@pytest.mark.parametrize("cell", [7, 12])
def test_a_picture_shows_the_map_of_tokens(cell):
    rng = np.random.default_rng(0)
    for tokens in (1, 3, 12, 40):
        pixels = rng.integers(1, 200, (24, 24, 3)).astype(np.uint8)
        held_by = rng.integers(-1, tokens, (6, 6))
        assert_shows(evaluate.token_picture(pixels, held_by, cell), pixels, held_by, cell)
    ring = np.zeros((6, 6), int)
    ring[2:4, 2:4] = -1  # one token around a hole
    assert_shows(evaluate.token_picture(pixels, ring, cell), pixels, ring, cell)


def demo_strip(monkeypatch, flags):
    """Run evaluate.py --picture and return what each strip was drawn from: pixels, held_by, kept, lines and the sheet (H, W, 3)."""
    drawn, strip = [], evaluate.strip

    def record(*parts):
        sheet = strip(*parts)
        drawn.append((*parts, np.array(sheet)))
        return sheet

    monkeypatch.setattr(evaluate, "strip", record)
    evaluate.main(["--picture", *map(str, flags)])
    return drawn


def test_picture_of_the_demo_shows_every_block(tmp_path, monkeypatch, capsys):
    image = data.open_split(None, "val")[0][0]
    image.save(tmp_path / "shirt.png")
    [(pixels, held_by, kept, lines, sheet)] = demo_strip(
        monkeypatch, [tmp_path / "shirt.png", "--out", tmp_path / "new" / "out"]
    )
    written = tmp_path / "new" / "out" / "shirt_tokens.png"
    assert capsys.readouterr().out.strip() == str(written)
    assert (
        np.array_equal(np.array(Image.open(written)), sheet)
        and 800 < sheet.shape[1] < 900
        and written.stat().st_size < 300_000
    )
    assert np.array_equal(pixels, np.array(image))  # the normalisation is undone, to the bit

    model = load_thresholds(demo_model("ltmp"), evaluate.DEMO_THRESHOLDS)
    batch = evaluate.clean_transform(model.config)(image)[None]
    with torch.inference_mode():
        logits, counts, holders = model.eval()(batch, trace=True)
        whole, _ = evaluate.with_method(model, "dense").eval()(batch)
    assert np.array_equal(held_by, holders[:, 0]) and kept == counts[:, 0].tolist()
    assert f"r = {flops.flops_ratio(counts.double(), model.config):.3f}" in lines[2]
    for line, output in zip(lines[3:], (whole, logits), strict=True):
        probability, index = output[0].softmax(0).max(0)
        assert line.split(": ")[1] == f"{data.FASHION_CLASSES[index]}, {100 * probability:.1f} %"

    places = [
        sheet.shape[:2]
    ]  # the twelve states are on the sheet, in reading order, the last of it: what a block left whole is shown before them too
    for i in reversed(range(12)):
        dim = np.minimum(pixels, 200)
        state = held_by[i].reshape(14, 14)
        assert [len(set(state[state >= 0])) + 1] == [kept[i]]
        assert_shows(evaluate.token_picture(dim, state, 14), dim, state, 14)
        panel = evaluate.token_picture(pixels, state, 14)
        places.append(
            max(
                (y, x)
                for y in range(len(sheet) - 195)
                for x in range(sheet.shape[1] - 195)
                if (y, x) < places[-1]
                and sheet[y, x : x + 196].tobytes() == panel[0].tobytes()
                and np.array_equal(sheet[y : y + 196, x : x + 196], panel)
            )
        )
    assert len({y for y, _ in places[1:]}) == 3


def test_pictures_of_any_mode_size_and_name(tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3)).astype(np.uint8)
    paths = []
    for i, (mode, size, suffix) in enumerate(
        [
            ("L", (28, 28), "png"),
            ("P", (50, 30), "png"),
            ("RGBA", (31, 47), "png"),
            ("CMYK", (40, 40), "jpg"),
            ("1", (9, 9), "png"),
            ("RGB", (1, 300), "png"),
            ("RGB", (300, 1), "bmp"),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        paths.append(tmp_path / str(i) / f"x.{suffix}")  # all are called x
        Image.fromarray(pixels[: size[1], : size[0]]).convert(mode).save(paths[-1])
    drawn = demo_strip(monkeypatch, [*paths, "--out", tmp_path])
    written = capsys.readouterr().out.split()
    assert len(drawn) == len(set(written)) == len(paths) and all(
        Image.open(path).format == "PNG" for path in written
    )
    for path, (pixels, *_) in zip(paths, drawn):
        image = evaluate.clean_transform(VARIANTS["demo"])(Image.open(path))
        assert np.array_equal(
            pixels, ((image * 0.353 + 0.286) * 255).round().byte().permute(1, 2, 0)
        )


def test_pictures_of_a_model_without_head_and_of_other_classes(tmp_path, monkeypatch):
    """The DINOv2 variant takes weights made for 518 pixels; --data names the classes that it knows."""
    config = VARIANTS["vit_small_patch14_dinov2"]
    assert evaluate.clean_transform(config).args[:2] == (224, 256) and config.layer_scale
    torch.save(
        create_model("vit_small_patch14_dinov2", "dense", image_size=518).state_dict(),
        tmp_path / "dinov2.pth",
    )
    Image.new("RGB", (60, 50), (200, 100, 50)).save(tmp_path / "plain.png")
    thresholds = {"method": "ltmp", "merge_thresholds": [0.9] * 12, "prune_thresholds": [0.0] * 12}
    (tmp_path / "t.json").write_text(json.dumps(thresholds))
    flags = [tmp_path / "plain.png", "--out", tmp_path]
    [(_, held_by, kept, lines, _)] = demo_strip(
        monkeypatch,
        [
            *flags,
            "--model",
            "vit_small_patch14_dinov2",
            "--weights",
            tmp_path / "dinov2.pth",
            "--thresholds",
            tmp_path / "t.json",
        ],
    )
    assert held_by.shape == (12, 256) and len(lines) == 3 and kept[-1] < 257
    make_folder(tmp_path / "images", classes=("blue", "green", "red"))
    common = [*flags, "--model", "demo", "--data", tmp_path / "images"]
    [(*_, lines, _)] = demo_strip(monkeypatch, common)
    names = [line.split(": ")[1].split(",")[0] for line in lines[3:]]
    assert len(names) == 2 and all(
        re.fullmatch(r"blue|green|red|class [3-9]", name) for name in names
    )


def texts_of(monkeypatch):
    """The list that every text written on a drawing goes to from now on, with its colour."""
    texts, write = [], evaluate.write

    def record(draw, x, y, text, size=13, fill=evaluate.INK, *more, **named):
        texts.append((text, fill))
        write(draw, x, y, text, size, fill, *more, **named)

    monkeypatch.setattr(evaluate, "write", record)
    return texts


def test_gallery_and_chart_of_the_demo(tmp_path, monkeypatch, capsys):
    texts, plots, plot = texts_of(monkeypatch), [], evaluate.plot
    monkeypatch.setattr(
        evaluate, "plot", lambda draw, box, *parts: (plots.append(parts), plot(draw, box, *parts))
    )
    thresholds = {
        "method": "ltmp",
        "merge_thresholds": [0.98] * 12,
        "prune_thresholds": [0.005 + 0.0001 * i for i in range(12)],
    }
    (tmp_path / "t.json").write_text(json.dumps(thresholds))
    evaluate.main(
        [
            "--thresholds",
            str(tmp_path / "t.json"),
            "--limit-val",
            "60",
            "-b",
            "7",
            "--json",
            str(tmp_path / "m.json"),
            "--gallery",
            str(tmp_path / "a" / "gallery.png"),
            "--chart",
            str(tmp_path / "chart.png"),
        ]
    )
    printed = capsys.readouterr().out.splitlines()
    for path in (tmp_path / "a" / "gallery.png", tmp_path / "chart.png"):
        assert str(path) in printed
        assert Image.open(path).format == "PNG" and abs(Image.open(path).width - 850) < 50

    model = load_thresholds(demo_model("ltmp"), thresholds).eval()
    dense, val = (
        evaluate.with_method(model, "dense").eval(),
        data.subset(data.open_split(None, "val", evaluate.clean_transform(model.config)), 60),
    )
    with torch.inference_mode():
        runs = []  # logits (10,), kept (12, 1), the dense logits (10,), label of each
        for image, label in val:
            logits, kept = model(image[None])
            runs.append((logits[0], kept, dense(image[None])[0][0], label))
    r = [flops.flops_ratio(kept.double(), model.config).item() for _, kept, _, _ in runs]
    changed = [
        i for i, (logits, _, whole, _) in enumerate(runs) if logits.argmax() != whole.argmax()
    ]
    assert 0 < len(changed) < 60
    changed.sort(key=lambda i: -runs[i][2].softmax(0).max())
    order = sorted(range(60), key=lambda i: r[i])
    expected = []
    for i in order[:4] + order[:-5:-1] + changed[:8]:
        logits, kept, whole, label = runs[i]
        expected.append((f"r = {r[i]:.3f}, {kept[-1, 0]:.0f} tokens", evaluate.INK))
        for way, output in (("dense", whole), ("reduced", logits)):
            expected.append(
                (
                    f"{way}: {data.FASHION_CLASSES[output.argmax()]}, {100 * output.softmax(0).max():.0f} %",
                    evaluate.GREEN if output.argmax() == label else evaluate.RED,
                )
            )
    assert [text for text in texts if re.match(r"r = |dense: |reduced: ", text[0])] == expected
    assert any(f"{len(changed)} of 60 images" in text for text, _ in texts)

    kept = torch.cat([kept for _, kept, _, _ in runs], 1).double().numpy()  # (12, 60)
    assert [parts[0] for parts in plots] == ["merge threshold", "prune threshold", "tokens kept"]
    assert plots[0][2] == pytest.approx([0.98] * 12) and plots[1][2] == pytest.approx(
        thresholds["prune_thresholds"]
    )
    assert plots[2][2] == pytest.approx(kept.mean(1)) and plots[2][2] == pytest.approx(
        read(tmp_path / "m.json")["kept"]
    )
    assert np.allclose(plots[2][3], np.percentile(kept, [5, 95], axis=1))


@pytest.mark.parametrize(
    "method, r, titles",
    [
        ("ltp", None, ["prune threshold", "tokens kept"]),
        ("tome", 8, ["tokens kept"]),
        ("dense", None, ["tokens kept"]),
    ],
)
def test_chart_of_other_methods(monkeypatch, method, r, titles):
    texts = texts_of(monkeypatch)
    evaluate.chart(create_model("demo", method, r=r), torch.full((12, 5), 150.0), "title")
    assert [text for text, _ in texts if text.endswith((" threshold", " kept"))] == titles


def test_plots_are_to_scale():
    sheet = Image.new("RGB", (400, 300), evaluate.PAPER)
    evaluate.plot(
        ImageDraw.Draw(sheet),
        (50, 50, 350, 250),
        "",
        "",
        [0.0, 1.0, 0.25],
        ([0, 0.6, 0], [0.1, 1, 0.4]),
    )
    for x, y in ((100, 250), (200, 50), (300, 200)):
        assert sheet.getpixel((x, y)) == evaluate.BLUE
    assert (
        sheet.getpixel((200, 100)) == evaluate.SHADE
        and sheet.getpixel((200, 150)) != evaluate.SHADE
    )
    for low, high in (
        (0, 1),
        (0.9913, 0.9985),
        (0.00094, 0.0033),
        (0, 197),
        (0.9, 0.9),
        (0, 0),
        (5, 5.1),
    ):
        marks = evaluate.ticks(low, high)
        assert (
            marks[0] <= low + 1e-12
            and marks[-1] >= high - 1e-12
            and len(marks) <= 7
            and np.allclose(np.diff(marks, 2), 0)
        )


def test_bars_of_the_tokens_kept_are_for_terminals(monkeypatch, capsys):
    run = lambda: (evaluate.main(["--limit-val", "10"]), capsys.readouterr().out.splitlines())[1]
    plain = run()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    live = run()
    assert len(plain) == 6 and len(live) == 18 and live[:5] == plain[:5]
    for i, (line, count) in enumerate(zip(live[6:], plain[5].split(": ")[1].split()), 1):
        number, bar, shown = line.split()
        assert (
            (int(number), shown) == (i, count)
            and len(bar) == pytest.approx(50 * float(count) / 197, abs=1)
            and len(line) < 80
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere.png"], "cannot read the image "),
        (["image.png", "no image.txt"], "cannot read the image "),
        (["image.png", "--chart", "chart.png"], "--picture draws instead of evaluating"),
        (["image.png", "--out", "no image.txt"], "cannot write "),
        (["image.png", "--model", "vit_small_patch14_dinov2"], "no official weights are known"),
    ],
)
def test_a_picture_that_cannot_be_is_one_line(tmp_path, capsys, flags, message):
    Image.new("L", (28, 28)).save(tmp_path / "image.png")
    (tmp_path / "no image.txt").write_text("text")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(
            ["--picture", *(str(tmp_path / flag) if "." in flag else flag for flag in flags)]
        )
    printed = capsys.readouterr()
    assert (
        stopped.value.code == 2
        and message in printed.err
        and len(printed.err.strip().splitlines()) == 1
        and not printed.out
    )
