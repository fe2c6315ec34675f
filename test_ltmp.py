"""The claims of ltmp.py and flops.py, as tests: two oracles first, then in the order of ltmp.py."""

import ast
import copy
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import flops
import ltmp
from extras import fast_attention
from ltmp import (
    METHODS,
    FixedCountMasker,
    LTMPViT,
    ThresholdMasker,
    Tokens,
    ViTConfig,
    load_thresholds,
    load_weights,
)

HERE = Path(__file__).parent
FIXED = ("tome", "topk")
LEARNED = ("ltmp", "ltm", "ltp", "ltpm")
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


# --------------------------------------------------------------------------------------------------
# Two oracles


def plain_step(key, importance, merge_at, prune_at, r, P):
    """Merge and prune of one image, token by token: key (n, D), importance (n,).

    Returns what is left, in order, each token as the list of its sources. r: the fixed counts of
    tome and topk in place of the thresholds. P: prefix tokens.
    """
    key = F.normalize(key, dim=-1)
    importance = importance.tolist()
    tokens = {i: [i] for i in range(len(key))}
    nearest = {}
    # Prefix tokens do not merge. Of equal partners the first is taken.
    for a in range(P + 1, len(key), 2):
        nearest[a] = max((min((key[a] @ key[b]).item(), 1), -b) for b in range(P, len(key), 2))
    chosen = [a for a in nearest if nearest[a][0] > merge_at]
    if r is not None:
        chosen = sorted(nearest, key=lambda a: -nearest[a][0])[:r]
    for a in chosen:
        tokens[-nearest[a][1]] += tokens.pop(a)
    # Prefix tokens, set A, set B.
    order = [tokens[i] for i in sorted(tokens, key=lambda i: (i >= P and (i - P) % 2 == 0, i))]

    def score(sources):
        return max(importance[i] for i in sources)

    dropped = [t for t in order[P:] if score(t) <= prune_at]
    if r is not None:
        dropped = sorted(order[P:], key=score)[: min(r, (len(order) - P) // 2)]
    return [t for t in order if t not in dropped]


def plain_attention(q, k, v, size):
    """One image, every token alive: q, k, v (H, n, D), size (n,) -> out (H, n, D), importance."""
    attn = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + size.log(), -1)
    return attn @ v, attn.mean(0).mean(0)


# --------------------------------------------------------------------------------------------------
# Helpers


def spread_weights(model, seed, sharpness=1.5):
    """Random weights whose attention is far from uniform, so that scores differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
        elif "threshold" not in name and p.dim() > 1:
            scale = (sharpness if "qkv" in name else 1) * p[0].numel() ** -0.5
            p.data = torch.randn(p.shape, generator=generator) * scale


def set_thresholds(model, merge, prune):
    for name, p in model.named_parameters():
        if name.endswith("threshold"):
            p.data.fill_(merge if "merge" in name else prune)


def random_model(seed, method, attention=None, **changes):
    rng = random.Random(seed)
    heads, grid = rng.choice([1, 2, 3]), rng.choice([2, 3, 4, 5, 6, 7])
    fields = {"image_size": 2 * grid, "patch_size": 2, "dim": 8 * heads, "heads": heads}
    fields |= {"depth": rng.choice([2, 3, 5]), "num_classes": 7, "layer_scale": seed % 3 == 0}
    fields |= {"prefix_tokens": (1, 5, 2, 1)[seed % 4], "head_tokens": (1, 1, 2, 1)[seed % 4]}
    r = rng.choice([1, 2, 3, 99]) if method in FIXED else None
    model = LTMPViT(ViTConfig(**fields | changes), method, r=r, attention=attention)
    spread_weights(model, seed)
    prune_at = rng.choice([0.2, 0.5, 0.9]) / model.config.num_tokens
    set_thresholds(model, rng.choice([0.5, 0.8, 0.9, 0.97]), prune_at)
    generator = torch.Generator().manual_seed(seed)
    shape = (rng.choice([2, 3, 5]), 3, *[model.config.image_size] * 2)
    return model, torch.randn(shape, generator=generator)


def learning_loss(model, images):
    logits, kept = model.train()(images)
    labels = torch.zeros(len(images), dtype=torch.long)
    return F.cross_entropy(logits, labels) + flops.flops_ratio(kept, model.config)


def assert_one_function(model, images):
    """Masked, batched, image by image and training agree; gradients are finite. Returns kept."""
    model.eval()
    with torch.inference_mode():
        logits, kept = model(images, drop=False)
        singles = [model(image[None]) for image in images]
        single = torch.cat([a for a, _ in singles]), torch.cat([b for _, b in singles], 1)
        others = [model(images), single, model.train()(images)]
    assert torch.isfinite(logits).all()
    for other_logits, other_kept in others:
        close = {"rtol": 1e-4, "atol": 1e-5 * logits.abs().max().item()}
        torch.testing.assert_close(other_logits, logits, **close)
        assert torch.equal(other_kept, kept)
    learning_loss(model, images).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    return kept


# --------------------------------------------------------------------------------------------------
# Maskers


SCORES = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20)


@given(SCORES, st.floats(-2, 2, width=32), st.sampled_from([1e-6, 0.1, 1e6]))
def test_masks_are_exactly_zero_and_one_for_any_scores(scores, threshold, tau):
    scores, masker = torch.tensor([scores]), ThresholdMasker(threshold, tau)
    assert torch.equal(masker(scores), (scores > threshold).float())


def test_a_threshold_has_the_slope_of_a_sigmoid():
    masker = ThresholdMasker(0.3, tau=0.1)
    scores = torch.cat([torch.linspace(-1, 2, 1001), torch.tensor([-math.inf, math.inf])])[None]
    masker(scores).sum().backward()
    soft = torch.sigmoid((scores - 0.3) / 0.1)
    slope = -(soft * (1 - soft) / 0.1).sum()[None]
    torch.testing.assert_close(masker.threshold.grad, slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_runs_and_leaves_thresholds_as_they_are(dtype):
    model, images = random_model(4, "ltmp")
    before = model.blocks[0].merge_masker.threshold.clone()
    logits, kept = model.to(dtype).eval()(images.to(dtype))
    assert logits.dtype == dtype and logits.isfinite().all() and kept.dtype == torch.float32
    assert torch.equal(model.blocks[0].merge_masker.threshold, before)
    assert model.to("meta").blocks[0].merge_masker.threshold.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_thresholds_and_masks_are_float32_whatever_the_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model, images = random_model(4, "ltmp")
        masker = model.blocks[0].merge_masker
        decision = masker(torch.zeros(1, 3, dtype=torch.float32))
        kept = model.train()(images)[1]
        fresh = ThresholdMasker(0.9, 0.1).threshold
    finally:
        torch.set_default_dtype(before)
    found = {masker.threshold.dtype, decision.dtype, kept.dtype, fresh.dtype}
    assert found == {torch.float32} and fresh.item() == torch.tensor(0.9).item()


@pytest.mark.parametrize("method", FIXED)
def test_a_fixed_count_removes_r_but_never_half(method):
    changes = {"image_size": 14, "depth": 5, "prefix_tokens": 1}  # 50 tokens
    model, images = random_model(1, method, **changes)
    for block in model.blocks:
        (block.merge_masker if method == "tome" else block.prune_masker).r = 13
    kept = assert_one_function(model, images)
    assert kept[:, 0].tolist() == [37, 24, 13, 7, 4]


# --------------------------------------------------------------------------------------------------
# Merge and prune

THRESHOLD = st.sampled_from([-2.0, 0.0, 0.5, 1.0, 2.0]) | st.floats(-1, 1, width=32)
LIVE = st.lists(st.integers(1, 12), min_size=1, max_size=4)
COUNT = st.none() | st.integers(0, 12)


PREFIX = st.just(1) | st.integers(1, 5)
DEAD, SEED = st.integers(0, 3), st.integers(0, 10**6)


@settings(max_examples=80)
@given(LIVE, DEAD, SEED, st.booleans(), THRESHOLD, THRESHOLD, COUNT, PREFIX)
def test_a_step_is_a_loop_over_tokens(live, dead, seed, equal, merge_at, prune_at, r, P):
    """Images with `live` tokens in some of their places. equal: many keys and scores are equal."""
    live = [n + P - 1 for n in live]
    B, N = len(live), max(live) + dead
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(B, N, 4, generator=generator)
    importance = torch.rand(B, N, generator=generator)
    if equal:
        key = torch.eye(5)[torch.randint(5, (B, N), generator=generator), :4]
        importance = torch.randint(4, (B, N), generator=generator) / 4
    size = 1.0 + torch.randint(9, (B, N), generator=generator)
    # Prefix tokens are first; live and dead are mixed behind them.
    lot = torch.rand(B, N, generator=generator)
    lot[:, :P] = -1
    is_live = lot.argsort(1).argsort(1) < torch.tensor(live)[:, None]
    # The rows of an image lie in any order.
    rows = torch.rand(B, N, generator=generator).argsort(1) + N * torch.arange(B)[:, None]
    x = torch.eye(N).expand(B, N, N)  # each token knows whence it is
    at_rows = rows.flatten().argsort()
    x_t, key_t, importance_t, size_t, mask_t = (
        t.flatten(0, 1)[at_rows] for t in (x, key, importance, size, is_live.float())
    )
    maskers = ThresholdMasker(merge_at, 0.1), ThresholdMasker(prune_at, 0.1)
    if r is not None:
        maskers = FixedCountMasker(r, "merge"), FixedCountMasker(r, "prune")
    masked = Tokens(x_t, size_t, mask_t, rows, is_live, prefix_tokens=P)
    merged, most = ltmp.merge(masked, key_t, importance_t, maskers[0])
    pruned = ltmp.live_first(ltmp.prune(merged, most, maskers[1]))
    # Inference has the same tokens in the same order, and no others.
    dropped, score = ltmp.merge(replace(masked, mask=None), key_t, importance_t, maskers[0])
    dropped = ltmp.drop_dead(ltmp.prune(dropped, score, maskers[1]))
    alive = pruned.rows[pruned.live]
    assert torch.equal(dropped.kept(), pruned.kept())
    assert torch.equal(dropped.rows[dropped.live], torch.arange(len(alive)))
    assert torch.equal(dropped.size, pruned.size[alive])
    torch.testing.assert_close(dropped.x, pruned.x[alive])
    assert (merged.size * merged.mask).sum() == (size * is_live).sum()
    assert torch.equal(pruned.mask, pruned.mask.bool().float())
    for i in range(B):
        places = is_live[i].nonzero()[:, 0]
        left = plain_step(key[i, places], importance[i, places], merge_at, prune_at, r, P)
        assert pruned.live[i].tolist() == [True] * len(left) + [False] * (N - len(left))
        assert pruned.kept()[i] == len(left)
        for j, sources in enumerate(left):
            row, sources = pruned.rows[i, j], places[sources]
            assert pruned.size[row] == size[i, sources].sum()
            assert most[row] == importance[i, sources].max()
            share = torch.zeros(N)
            share[sources] = size[i, sources] / size[i, sources].sum()
            torch.testing.assert_close(pruned.x[row], share)


@pytest.mark.parametrize("method", LEARNED)
def test_prefix_tokens_stay_as_they_are_and_in_front(method):
    model, images = random_model(0, method, image_size=12, prefix_tokens=4)
    # All that can merge merges, and all that can be pruned is pruned.
    set_thresholds(model, -2, 2)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, tokens: seen.append(tokens))
    model.train()(images)
    rows = torch.arange(len(images) * model.config.num_tokens).view(len(images), -1)[:, :4]
    for tokens in seen:
        assert torch.equal(tokens.rows[:, :4], rows) and tokens.live[:, :4].all()
        assert (tokens.mask[rows] == 1).all() and (tokens.size[rows] == 1).all()
    assert (tokens.kept() < model.config.num_tokens).all()


def test_a_merge_threshold_of_one_merges_not_even_equal_tokens():
    key = torch.randn(500, 1, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 10, -1)
    unit = F.normalize(key, dim=-1)
    assert (unit @ unit.transpose(1, 2) > 1).any()  # by rounding
    rows = torch.arange(5000).view(500, 10)
    ones = torch.ones(5000)
    tokens = Tokens(key.flatten(0, 1), ones, ones, rows, rows >= 0)
    assert ltmp.merge(tokens, tokens.x, ones, ThresholdMasker(1.0, 0.1))[0].live.all()


class Given(torch.nn.Module):
    """A masker whose decision is given, so that differences can be taken."""

    def __init__(self, decision):
        super().__init__()
        self.decision = decision

    def forward(self, scores):
        return self.decision


def test_the_gradient_of_decisions_is_that_of_differences():
    torch.manual_seed(0)
    rows = torch.arange(14).view(2, 7)
    x, key = torch.randn(14, 3).double(), torch.randn(14, 3).double()
    size, mask = torch.randint(1, 4, (14,)).double(), torch.ones(14).double()
    importance = torch.rand(14).double()

    def step(merged, kept):
        tokens = Tokens(x, size, mask, rows, rows >= 0)
        tokens, most = ltmp.merge(tokens, key, importance, Given(merged))
        tokens = ltmp.prune(tokens, most, Given(kept))
        # In one tensor: gradcheck passes over an output that lost its gradient.
        return torch.cat([tokens.x.flatten(), tokens.size, tokens.mask])

    merged = torch.tensor([[0.5, 1, 0.2], [0.9, 0.3, 0.6]]).double().requires_grad_()
    kept = torch.rand(2, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(step, (merged, kept))


def test_a_threshold_that_merges_nothing_has_a_gradient():
    model, images = random_model(2, "ltm", image_size=10)
    set_thresholds(model, 0.9999, 0)
    logits, kept = model.train()(images)
    assert (kept == model.config.num_tokens).all()
    logits.square().sum().backward()
    assert model.blocks[0].merge_masker.threshold.grad.abs() > 0


# --------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("attention", [ltmp, fast_attention])
def test_attention_equals_the_plain_formula(attention):
    torch.manual_seed(0)
    B, H, N, D = 4, 2, 9, 4
    qkv = torch.randn(B * N, 3, H, D)
    size = torch.randint(1, 5, (B * N,)).float()
    live = torch.rand(B, N).argsort(1) < torch.tensor([9, 5, 2, 1])[:, None]
    alive = live.flatten()
    q, k, v = qkv.view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    out, importance = attention.masked_attention(q, k, v, size.view(B, N), live.float())
    found = attention.ragged_attention(qkv[alive], size[alive], live)
    torch.testing.assert_close(out.transpose(1, 2)[live], found[0])
    torch.testing.assert_close(importance[live], found[1])
    for i in range(B):
        parts = (t[i][:, live[i]] for t in (q, k, v))
        wanted = plain_attention(*parts, size.view(B, N)[i][live[i]])
        torch.testing.assert_close(out[i][:, live[i]], wanted[0])
        torch.testing.assert_close(importance[i][live[i]], wanted[1])


def test_the_gradient_of_a_mask_is_that_of_differences():
    torch.manual_seed(0)
    # Small logits: no dead token is above all live ones together, where its part would be cut.
    q, k, v = (0.1 * torch.randn(2, 2, 6, 4).double() for _ in range(3))
    size = torch.ones(2, 6).double()
    mask = torch.tensor([[1, 1, 0, 1, 0.5, 1], [1, 0.7, 1, 1, 0, 0]]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: ltmp.masked_attention(q, k, v, size, m), mask)


def test_a_dead_token_above_all_live_ones_counts_like_all_of_them():
    q, k = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 20.0]).view(1, 1, 2, 1)
    v = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    mask = torch.tensor([[1.0, 0.0]], requires_grad=True)
    out, _ = ltmp.masked_attention(q, k, v, torch.ones(1, 2), mask)
    out[0, 0, 0].sum().backward()
    assert out[0, 0, 0] == 0 and mask.grad[0, 1] == 1


# --------------------------------------------------------------------------------------------------
# One function, two executions

EXTREMES = {  # merge threshold, prune threshold
    "all merge": (-2.0, -1.0),
    "nothing happens": (2.0, -1.0),
    "all pruned": (2.0, 2.0),
    "all merge, all pruned": (-2.0, 2.0),
    "as training starts": (0.9, 0.0),
}


def check_random_models(method, seeds, attention=None):
    reduced = 0
    for seed in seeds:
        model, images = random_model(seed, method, attention)
        kept = assert_one_function(model, images)
        assert (kept >= 1).all() and (kept[1:] <= kept[:-1]).all()
        reduced += (kept[-1] < model.config.num_tokens).any().item()
    assert reduced == 0 if method == "dense" else reduced > len(seeds) / 2


@pytest.mark.parametrize("attention", [None, fast_attention])
@pytest.mark.parametrize("method", METHODS)
def test_one_semantics_on_random_models(method, attention):
    check_random_models(method, range(6), attention)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_semantics_on_many_random_models(method):
    check_random_models(method, range(60))


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_one_semantics_at_the_extremes(method, extreme):
    for grid in (1, 2, 3, 4):
        model, images = random_model(grid, method, image_size=2 * grid, depth=5)
        set_thresholds(model, *EXTREMES[extreme])
        kept = assert_one_function(model, images)
        n, P = model.config.num_tokens, model.config.prefix_tokens
        if extreme == "nothing happens":
            assert (kept == n).all()
        elif "all pruned" in extreme and method != "ltm":
            assert (kept == P).all()
        elif extreme == "all merge" and method != "ltp":
            assert (kept[0] == n - (n - P) // 2).all() and (kept[-1] == P + 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_logits_of_ten_thousand(method):
    model, images = random_model(3, method)
    spread_weights(model, 3, sharpness=150.0)
    largest = []

    def measure(attn, inputs, output):
        q, k, _ = attn.qkv(inputs[0]).unflatten(1, (3, attn.heads, -1)).unbind(1)
        largest.append(((q * k).sum(-1) * q.shape[-1] ** -0.5).abs().max().item())

    for block in model.blocks:
        block.attn.register_forward_hook(measure)
    assert_one_function(model, images)
    assert max(largest) > 1e4


@pytest.mark.parametrize("method", LEARNED)
def test_the_same_call_gives_the_same_bits_on_a_cpu(method):
    model, images = random_model(5, method)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = learning_loss(model, images)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), *grads, model.eval()(images)[0].detach()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Operations(TorchDispatchMode):
    """Counts what starts work on a GPU, and that for which a CPU must wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        starts = name not in ("_unsafe_view", "new_empty", "_local_scalar_dense")
        self.count += starts and not function.is_view
        self.waits += by_mask or name in ("nonzero", "_local_scalar_dense")
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_block_needs_few_operations_in_inference(monkeypatch):
    # On a GPU attention is one kernel; here it is none, so all that is counted is of ltmp.py.
    kernel = SimpleNamespace(
        masked_attention=None, ragged_attention=lambda qkv, size, live: (qkv[:, 2], size)
    )
    model, images = random_model(4, "ltmp", kernel)
    tokens = model.embed(images, drop=True)
    to_list = torch.Tensor.tolist
    with Operations() as operations:

        def waiting(tensor):
            operations.waits += 1
            return to_list(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", waiting)
        model.blocks[0](tokens, kernel)
    assert operations.count <= 56 and operations.waits == 1


@pytest.mark.parametrize("attention", [None, fast_attention])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("how", ["autocast", torch.bfloat16, torch.float16])
def test_scores_and_sizes_are_float32_in_half_precision(how, drop, attention, monkeypatch):
    model, images = random_model(4, "ltmp", attention, heads=3, dim=24)
    dtype = torch.bfloat16 if how == "autocast" else how
    if how != "autocast":
        model, images = model.to(dtype), images.to(dtype)
    scores, masks, sizes = [], [], []
    forward = ThresholdMasker.forward

    def spy(self, found):
        scores.append(found[found.isfinite()])
        masks.append(forward(self, found))
        return masks[-1]

    def keep_scores(attn, inputs, output):
        scores.extend(output[1:])

    monkeypatch.setattr(ThresholdMasker, "forward", spy)
    for block in model.blocks:
        block.attn.register_forward_hook(keep_scores)
        block.register_forward_hook(lambda block, inputs, tokens: sizes.append(tokens.size))
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
        logits, kept = model(images, drop=drop)
    assert logits.dtype == dtype and len(masks) == 2 * model.config.depth == 2 * len(sizes)
    thresholds = [p for name, p in model.named_parameters() if name.endswith("threshold")]
    assert {t.dtype for t in [kept, *scores, *masks, *sizes, *thresholds]} == {torch.float32}
    for found in scores:
        # Rounding to half precision would change most: they are more than stored in float32.
        changed = found != found.to(dtype).float()
        assert not found.numel() or changed.float().mean() > 0.5
    assert sum(len(found) for found in scores) > 100


# --------------------------------------------------------------------------------------------------
# Vectors recorded from the authors' code

FILE = np.load(HERE / "demo" / "reference.npz")
REFERENCE = {name: torch.from_numpy(array) for name, array in FILE.items()}
WEIGHTS = {name[8:]: array for name, array in REFERENCE.items() if name.startswith("weights/")}


def reference_model(method, attention=None):
    r = int(REFERENCE[f"{method}/r"]) if method in FIXED else None
    config = ViTConfig(*REFERENCE["config"].tolist())
    model = load_weights(LTMPViT(config, method, r=r, attention=attention), WEIGHTS)
    if method not in LEARNED:
        return model.eval()
    found = {"method": method}
    for step in METHODS[method]:
        found[f"{step}_thresholds"] = REFERENCE[f"{method}/{step}_thresholds"].tolist()
    return load_thresholds(model, found).eval()


@pytest.mark.parametrize("attention", [None, fast_attention])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("execution", ["single", "batched", "masked"])
def test_forward_matches_the_authors(method, execution, attention):
    model, images = reference_model(method, attention), REFERENCE["images"]
    with torch.inference_mode():
        if execution == "single":
            parts = [model(image[None]) for image in images]
            logits = torch.cat([part[0] for part in parts])
            kept = torch.cat([part[1] for part in parts], 1)
        else:
            logits, kept = model(images, drop=execution == "batched")
    torch.testing.assert_close(logits, REFERENCE[f"{method}/logits"], atol=1e-5, rtol=0)
    assert torch.equal(kept.long().T, REFERENCE[f"{method}/kept"])


def test_a_model_can_be_copied():
    model, images = random_model(0, "ltmp", fast_attention)
    copied = copy.deepcopy(model).eval()
    assert torch.equal(copied(images)[0], model.eval()(images)[0])


def test_ltmp_and_flops_stand_alone():
    for name in ("ltmp.py", "flops.py"):
        for node in ast.parse((HERE / name).read_text()).body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {m.split(".")[0] for m in modules} <= {"torch"} | sys.stdlib_module_names


# --------------------------------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_what_torch_counts(method):
    model, image = reference_model(method), REFERENCE["images"][:1]
    # torch 2.4 cannot count fused attention, nor under inference_mode.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        kept = model(image)[1]
    # What r leaves out: the matching, of all places of the tokens that enter.
    n = torch.tensor([model.config.num_tokens] + kept[:-1, 0].int().tolist())
    matching = (((n - 1) // 2) * (n // 2)).sum().item() * model.config.dim // model.config.heads
    rest = counter.get_total_flops() / 2 - flops.model_flops(model.config, kept).item()
    assert rest == (matching if "merge" in METHODS[method] else 0)


@pytest.mark.parametrize("method", ["dense", "ltp"])
def test_prefix_tokens_and_what_the_head_reads_are_counted(method):
    model, images = random_model(2, method, prefix_tokens=4, head_tokens=3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        kept = model.eval()(images[:1])[1]
    assert counter.get_total_flops() / 2 == flops.model_flops(model.config, kept).item()
