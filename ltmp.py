"""Learned Thresholds Token Merging and Pruning (LTMP) for Vision Transformers, in one file.

Method: M. Bonnaerens and J. Dambre, "Learned Thresholds Token Merging and Pruning for Vision
Transformers", TMLR 2023, arXiv 2307.10780. Between attention and MLP of every block each token gets
two scores: similarity, the cosine of its key and another token's, and importance, the attention
that it receives. A learned threshold on each decides: very similar tokens merge, unimportant ones
are pruned.

Read from top to bottom: configurations, the threshold, the tokens, merge, prune, attention, the
block, the model, loading. Only torch is needed, so this file can be copied alone.

Shapes: B images, N places an image (the class token first; in inference as many as the image with
most tokens needs), T tokens of all images together, C channels, H heads, D = C / H channels a head,
P prefix tokens an image: the class token and what stands between it and the patches (often P = 1),
M tokens or pairs that a step decides on, S pixels a side.

One function has two executions. In training a token that merged or was pruned is dead: it stays in
the tensors, with a mask of 0, because a threshold learns from the tokens that it removed. In
inference dead tokens are dropped from the tensors. Both compute the same logits.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

__version__ = "0.2.0"


# --------------------------------------------------------------------------------------------------
# Configurations


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a plain ViT with a class token, and how its images are prepared.

    image_size and patch_size are in pixels; images are square. num_classes=0 means no head: the
    model then returns what a head would read, (B, head_tokens * dim), in place of logits.
    layer_scale multiplies each residual branch by a learned factor per channel. prefix_tokens stand
    in front of the patches and always stay: the class token, then registers or a distillation
    token. The head reads the first head_tokens of them. mean, std and crop_pct belong to the
    weights: resize the shorter side to image_size / crop_pct, crop the centre, normalize.
    """

    image_size: int = 224
    patch_size: int = 16
    dim: int = 384
    depth: int = 12
    heads: int = 6
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    layer_scale: bool = False
    prefix_tokens: int = 1
    head_tokens: int = 1
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)
    crop_pct: float = 0.9

    def __post_init__(self):
        if self.image_size % self.patch_size or self.dim % self.heads:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}, "
                f"and dim {self.dim} of heads {self.heads}"
            )
        if not 1 <= self.head_tokens <= self.prefix_tokens:
            counts = f"head_tokens {self.head_tokens}, prefix_tokens {self.prefix_tokens}"
            raise ValueError(f"{counts}: the head reads one prefix token at least, at most all")

    @property
    def num_tokens(self):
        """Tokens of one image: its patches and the prefix tokens."""
        return (self.image_size // self.patch_size) ** 2 + self.prefix_tokens


DEIT_S = ViTConfig()
DEIT3_S = replace(DEIT_S, layer_scale=True)
DINOV2_S = replace(DEIT3_S, patch_size=14, num_classes=0, crop_pct=0.875)
AUGREG_S = replace(DEIT_S, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
DEMO = ViTConfig(28, 2, 128, 6, 2, 10, mean=(0.286,) * 3, std=(0.353,) * 3, crop_pct=1.0)
VARIANTS = {
    "deit_tiny_patch16_224": replace(DEIT_S, dim=192, heads=3),
    "deit_small_patch16_224": DEIT_S,
    "deit_base_patch16_224": replace(DEIT_S, dim=768, heads=12),
    "deit_base_patch16_384": replace(DEIT_S, dim=768, heads=12, image_size=384, crop_pct=1.0),
    "deit_small_distilled_patch16_224": replace(DEIT_S, prefix_tokens=2, head_tokens=2),
    "deit3_small_patch16_224": DEIT3_S,
    "deit3_small_patch16_384": replace(DEIT3_S, image_size=384, crop_pct=1.0),
    "deit3_base_patch16_224": replace(DEIT3_S, dim=768, heads=12),
    "deit3_base_patch16_384": replace(DEIT3_S, dim=768, heads=12, image_size=384, crop_pct=1.0),
    "deit3_large_patch16_224": replace(DEIT3_S, dim=1024, depth=24, heads=16),
    "deit3_large_patch16_384": replace(
        DEIT3_S, dim=1024, depth=24, heads=16, image_size=384, crop_pct=1.0
    ),
    "vit_tiny_patch16_224": replace(AUGREG_S, dim=192, heads=3),
    "vit_small_patch16_224": AUGREG_S,
    "vit_base_patch16_224": replace(AUGREG_S, dim=768, heads=12),
    "vit_large_patch16_224": replace(AUGREG_S, dim=1024, depth=24, heads=16),
    "vit_large_patch16_384": replace(
        AUGREG_S, dim=1024, depth=24, heads=16, image_size=384, crop_pct=1.0
    ),
    "vit_small_patch14_dinov2": DINOV2_S,
    "vit_small_patch14_reg4_dinov2": replace(DINOV2_S, prefix_tokens=5),
    # Fashion-MNIST in patches of 2 x 2 pixels: the token grid of DeiT at 224 pixels.
    "demo": DEMO,
}

# What each method does between attention and MLP, in this order. "tome" and "topk" remove a fixed
# count of tokens per block, where "ltm" and "ltp" have a learned threshold.
METHODS = {
    "ltmp": ("merge", "prune"),
    "ltm": ("merge",),
    "ltp": ("prune",),
    "ltpm": ("prune", "merge"),
    "tome": ("merge",),
    "topk": ("prune",),
    "dense": (),
}


# --------------------------------------------------------------------------------------------------
# The threshold: scores in, exact zeros and ones out


class ThresholdMasker(nn.Module):
    """A learned threshold: 1 where score > threshold, trained with a straight-through estimator.

    The value is the hard decision, the gradient that of soft = sigmoid((score - threshold) / tau):

        d loss / d threshold = - sum over tokens of (d loss / d decision) * soft (1 - soft) / tau

    A decision reaches the loss through the mask, which later attention and `kept` see, the mean and
    the size that merging makes, and later scores. For merge 1 means: it merges; prune: it stays.
    The threshold stays float32 whatever the model becomes: near 1 a bfloat16 has steps of 0.004.
    """

    def __init__(self, threshold, tau):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor([threshold], dtype=torch.float32))
        self.tau = tau

    def forward(self, scores):
        """scores (B, M) float32 -> (B, M) of 0 and 1.

        -inf always gives 0, and inf 1, where there is nothing to decide. Where no gradient is asked
        for, the decision is a bool.
        """
        hard = scores > self.threshold
        if not torch.is_grad_enabled():
            return hard
        soft = torch.sigmoid((scores - self.threshold) / self.tau)
        # Subtract first: then the sum is exactly 0 or 1. (hard + soft) - soft can be off by 6e-8.
        return soft + (hard.float() - soft).detach()

    # .to(), .half() and .cuda() call this: move the threshold, but do not round it.
    def _apply(self, fn, recurse=True):
        def without_rounding(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(without_rounding, recurse)


class FixedCountMasker(nn.Module):
    """The rule of ToMe (arXiv 2210.09461) and of top-k pruning: r tokens of each image.

    step="merge" puts 1 on the r highest scores: these tokens merge. step="prune" puts 0 on the r
    lowest: these are pruned. Of n live tokens at most (n - P) // 2 go.
    """

    def __init__(self, r, step):
        super().__init__()
        self.r = r
        self.step = step

    def forward(self, scores):
        """scores (B, M) float32, -inf or inf where nothing is decided -> bool (B, M)."""
        candidate = scores.isfinite()
        order = scores.sort(dim=1, descending=self.step == "merge", stable=True).indices
        rank = order.argsort(dim=1)  # (B, M), 0 for the first to go
        if self.step == "merge":
            # No limit is needed: set A has (n - P) // 2 tokens.
            return candidate & (rank < self.r)
        most = candidate.sum(1, keepdim=True) // 2
        return rank >= most.clamp(max=self.r)


# --------------------------------------------------------------------------------------------------
# The tokens of a batch are the rows of one matrix


@dataclass
class Tokens:
    """What travels from block to block.

    Every linear layer runs on x as it is. `rows` says which row belongs to which image, in which
    order. In training rows of x never move: only `rows`, `live` and `mask` change. In inference
    dead rows are left out of x, and `rows` is numbered anew.
    """

    x: torch.Tensor  # (T, C) the tokens of all images
    size: torch.Tensor  # (T,) how many patches a token stands for
    mask: torch.Tensor | None  # (T,) in training, else None: exactly 0 or 1, differentiable
    rows: torch.Tensor  # (B, N) which row of x holds each image's tokens, the class token first
    live: torch.Tensor  # (B, N) whether there is a live token at this place
    holes: bool = True  # whether a dead token may have a place before a live one
    merges: tuple | None = None  # rows_a, partner, merged, as merge saw them; for pictures
    prefix_tokens: int = 1  # how many tokens of each image always stay: they come first

    def kept(self):
        """Live tokens of each image (B,), prefix tokens included; differentiable in training."""
        if self.mask is None:
            return self.live.sum(1).float()
        return self.mask.view_as(self.rows).sum(1)


def take(values, rows):
    """values (T, ...), rows (B, M) -> values of these rows (B, M, ...)."""
    # index_select has a fast gradient on a CPU; values[rows] has a slow one.
    return values.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def multiply(mask, rows, factor):
    """mask (T,) with a factor (B, M) on the given rows (B, M), 1 on all others -> (T,)."""
    return mask * torch.ones_like(mask).scatter(0, rows.flatten(), factor.flatten())


def live_first(tokens):
    """Order each image's places: live tokens first, in the order that they had."""
    order = tokens.live.byte().argsort(dim=1, descending=True, stable=True)  # (B, N)
    rows, live = tokens.rows.gather(1, order), tokens.live.gather(1, order)
    return replace(tokens, rows=rows, live=live, holes=False)


def drop_dead(tokens):
    """Inference: leave the dead rows out of x, and number the rest anew, image after image."""
    live = tokens.live.flatten()  # (B N,)
    count = tokens.live.sum(1, keepdim=True)  # (B, 1)
    number = live.cumsum(0)  # (B N,), 1 for the first live place
    # Here the CPU waits for the GPU; beside this, only the plain attention makes it wait.
    total, longest = torch.stack([number[-1], count.max()]).tolist()
    # All dead places go to row 0, which is cut off.
    alive = number.new_empty(total + 1).scatter_(0, number * live, tokens.rows.flatten())
    alive = alive.narrow(0, 1, total)  # (T',)
    x, size = tokens.x.index_select(0, alive), tokens.size.index_select(0, alive)
    live = torch.arange(longest, device=count.device) < count  # (B, N')
    # A place without a token repeats the row of the image's last token.
    rows = (live.flatten().cumsum(0) - 1).view_as(live)
    return replace(tokens, x=x, size=size, rows=rows, live=live, holes=False)


# --------------------------------------------------------------------------------------------------
# Merge


def bipartite_matching(key_a, key_b, bias_a, bias_b):
    """For each token of set A (see merge) the most similar live one of B, by the cosine of keys.

    key_a (B, Na, D), key_b (B, Nb, D), both of length 1; bias_a (B, Na), bias_b (B, Nb): 0 for the
    live and -inf for the dead -> similarity (B, Na), -inf for the dead, and place in B (B, Na).
    """
    # In float32 under autocast too: half precision would round the similarities.
    with torch.autocast(key_a.device.type, enabled=False):
        cosine = torch.baddbmm(bias_b[:, None], key_a, key_b.transpose(1, 2))  # (B, Na, Nb)
    similarity, place = cosine.max(dim=2)
    # Rounding can lift a cosine above 1, and a threshold of 1 means: never merge.
    return similarity.clamp(max=1) + bias_a, place


def merge(tokens, key, importance, masker):
    """Merge every other token into its most similar partner, where the masker says so.

    Behind the prefix tokens, live tokens alternate: the first is in set B, the second in set A, and
    so on (ToMe, arXiv 2210.09461). An A token whose similarity to its partner is above the
    threshold merges into it; several may merge into one B token. That becomes the mean of all of
    them, weighted by size. Sizes add up, and its importance becomes the largest of theirs. The new
    order is prefix tokens, A, B.

    key (T, D) averaged over heads, importance (T,) -> tokens, importance (T,).
    """
    if tokens.holes:
        tokens = live_first(tokens)
    P = tokens.prefix_tokens
    set_a, set_b = slice(P + 1, None, 2), slice(P, None, 2)
    rows_a, rows_b = tokens.rows[:, set_a], tokens.rows[:, set_b]  # (B, Na), (B, Nb)
    live_a, live_b = tokens.live[:, set_a], tokens.live[:, set_b]
    if rows_b.shape[1] == 0:
        return replace(tokens, merges=None), importance

    # Which A tokens merge, and into which B tokens?
    key = take(F.normalize(key, dim=-1), tokens.rows)  # (B, N, D)
    bias = tokens.live.log().to(key.dtype)  # (B, N), 0 for the live and -inf for the dead
    sets = key[:, set_a], key[:, set_b], bias[:, set_a], bias[:, set_b]
    similarity, nearest = bipartite_matching(*sets)
    partner = rows_b.gather(1, nearest)  # (B, Na)
    decision = masker(similarity)  # (B, Na) of 0 and 1
    merged = decision.bool()  # (B, Na)

    # All pairs, not only those that merge: to pick these out, the CPU would wait for the GPU.
    a, b, decided = (t.flatten() for t in (rows_a, partner, decision))  # (M,) each

    # The mean of all that merge into b, weighted by size.
    added = decided * tokens.size[a]  # (M,)
    size = tokens.size.index_add(0, b, added)  # (T,)
    x = tokens.x * (tokens.size / size).to(tokens.x.dtype)[:, None]  # (T, C)
    others = tokens.x.index_select(0, a) * (added / size[b]).to(x.dtype)[:, None]  # (M, C)
    x = x.index_add_(0, b, others)
    # Where nothing merges the product is 0, which changes nothing: importance is at least 0.
    importance = importance.scatter_reduce(0, b, decided.detach() * importance[a], "amax")  # (T,)

    mask = tokens.mask
    if mask is not None:
        mask = multiply(mask, rows_a, 1 - decision.to(mask.dtype))
    rows = torch.cat([tokens.rows[:, :P], rows_a, rows_b], 1)
    live = torch.cat([tokens.live[:, :P], live_a ^ merged, live_b], 1)
    merges = rows_a, partner, merged
    tokens = replace(tokens, x=x, size=size, mask=mask, rows=rows, live=live)
    return replace(tokens, holes=True, merges=merges), importance


# --------------------------------------------------------------------------------------------------
# Prune


def prune(tokens, importance, masker):
    """Prune the tokens whose importance is not above the threshold; prefix tokens always stay.

    importance (T,) -> tokens.
    """
    P = tokens.prefix_tokens
    live = tokens.live[:, P:]  # (B, N - P)
    # A dead token scores inf, so its factor is 1. 0 would cut the gradient of what killed it.
    scores = torch.where(live, take(importance, tokens.rows)[:, P:], math.inf)
    decision = masker(scores)  # (B, N - P) of 0 and 1
    mask = tokens.mask
    if mask is not None:
        mask = multiply(mask, tokens.rows[:, P:], decision.to(mask.dtype))
    live = torch.cat([tokens.live[:, :P], live & decision.bool()], 1)  # (B, N)
    return replace(tokens, mask=mask, live=live, holes=True)


# --------------------------------------------------------------------------------------------------
# Attention, and the importance of each token


def ragged_attention(qkv, size, live):
    """Inference: proportional attention, image by image; every row is alive.

        attn_ij = softmax over j of (q_i k_j / sqrt(D) + log size_j)
        importance_j = mean over heads and queries i of attn_ij

    A token of size s is attended to like s equal tokens: s exp(logit) = exp(logit + log s) (ToMe).

    qkv (T, 3, H, D), size (T,), live (B, N): the rows of image i are the next live[i].sum() ones
    -> out (T, H, D), importance (T,) float32.
    """
    counts = live.sum(1).tolist()
    outs, importances = [], []
    for qkv_i, log_size in zip(qkv.split(counts), size.log().split(counts), strict=True):
        q, k, v = qkv_i.permute(1, 2, 0, 3)  # (H, n, D) each
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)  # (H, n, n)
        attn = (logits.float() + log_size).softmax(-1)
        outs.append((attn.to(v.dtype) @ v).transpose(0, 1))  # (n, H, D)
        importances.append(attn.mean((0, 1)))  # (n,)
    return torch.cat(outs), torch.cat(importances)


def masked_attention(q, k, v, size, mask):
    """Training: the same function, dead tokens masked; differentiable in the mask.

        attn_ij = m_j exp(logit_ij) / sum over u of m_u exp(logit_iu)      m: the mask
        importance_j = mean over heads and over live queries i of attn_ij

    Only live queries count, because inference has no others. The mask is a factor: at 0 it still
    has a gradient, what the token's return would change, which a logit of -inf would not have. In
    that gradient a dead token weighs at most as much as all live ones together. Without this bound
    a dead token far above them would drown all other gradients.

    q, k, v (B, H, N, D), size, mask (B, N) -> out (B, H, N, D), importance (B, N) float32.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, N, N)
    logits = logits.float() + size.log()[:, None, None]
    live_logits = logits.detach().masked_fill(mask[:, None, None] == 0, -math.inf)
    # A shift of all logits cancels in attn, so log_sum needs no gradient.
    log_sum = live_logits.logsumexp(-1, keepdim=True)  # (B, H, N, 1)
    weight = (logits - log_sum).clamp(max=0).exp() * mask[:, None, None]
    attn = weight / weight.sum(-1, keepdim=True)  # (B, H, N, N)
    query_weight = mask / mask.sum(1, keepdim=True)  # (B, N)
    importance = (attn.mean(1) * query_weight[:, :, None]).sum(1)  # (B, N)
    return attn.to(v.dtype) @ v, importance


# Another implementation with these two functions can be passed to LTMPViT as `attention`.
PLAIN_ATTENTION = SimpleNamespace(
    masked_attention=masked_attention, ragged_attention=ragged_attention
)


class Attention(nn.Module):
    """Multi-head self-attention that also returns keys, for merging, and importance."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, tokens, attention):
        """x (T, C) normalized; attention: what has masked_attention and ragged_attention, or None.

        -> out (T, C), key (T, D) float32 averaged over heads, importance (T,) float32. A dense
        block uses torch's fused attention and returns None for the last two.
        """
        qkv = self.qkv(x).unflatten(1, (3, self.heads, -1))  # (T, 3, H, D)
        if attention is not None and tokens.mask is None:
            out, importance = attention.ragged_attention(qkv, tokens.size, tokens.live)
        else:
            # In training, and in a dense block, the rows of x are B images of N tokens each.
            shape = tokens.rows.shape
            q, k, v = qkv.unflatten(0, shape).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
            if attention is None:
                out, importance = F.scaled_dot_product_attention(q, k, v), None
            else:
                size, mask = tokens.size.view(shape), tokens.mask.view(shape)
                out, importance = attention.masked_attention(q, k, v, size, mask)
                importance = importance.flatten()  # (T,)
            out = out.transpose(1, 2).flatten(0, 1)  # (T, H, D)
        key = None if attention is None else qkv[:, 1].mean(1, dtype=torch.float32)  # (T, D)
        return self.proj(out.flatten(1)), key, importance


# --------------------------------------------------------------------------------------------------
# The ViT


class MLP(nn.Module):
    """Two linear layers with exact GELU between: (T, C) -> (T, C)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Attention; merge and prune, as the method says; MLP."""

    def __init__(self, config, method, tau, r):
        super().__init__()
        dim = config.dim
        self.steps = METHODS[method]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, config.heads)
        self.ls1 = LayerScale(dim) if config.layer_scale else nn.Identity()
        fixed = r is not None
        if "merge" in self.steps:
            self.merge_masker = FixedCountMasker(r, "merge") if fixed else ThresholdMasker(0.9, tau)
        if "prune" in self.steps:
            self.prune_masker = FixedCountMasker(r, "prune") if fixed else ThresholdMasker(0.0, tau)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio))
        self.ls2 = LayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, tokens, attention):
        """Tokens in, tokens out. attention: as for Attention; a block without steps is dense."""
        attention = attention if self.steps else None
        out, key, importance = self.attn(self.norm1(tokens.x), tokens, attention)
        tokens = replace(tokens, x=tokens.x + self.ls1(out))
        for step in self.steps:
            if step == "merge":
                tokens, importance = merge(tokens, key, importance, self.merge_masker)
            else:
                tokens = prune(tokens, importance, self.prune_masker)
        if self.steps and tokens.mask is None:
            tokens = drop_dead(tokens)
        return replace(tokens, x=tokens.x + self.ls2(self.mlp(self.norm2(tokens.x))))


class PatchEmbed(nn.Module):
    """Image to patches to tokens: (B, 3, S, S) -> (B, (S / patch_size)^2, C)."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class LTMPViT(nn.Module):
    """A ViT whose blocks merge and prune tokens by learned thresholds.

    method: one of METHODS. tau: temperature of the thresholds' gradient. r, for "tome" and "topk"
    alone: how many tokens each block removes at most (not the r of flops.py), one number or one per
    block. attention: anything with masked_attention and ragged_attention, such as the module
    extras.fast_attention; None for the plain ones of this file. Raises ValueError where these do
    not fit together.
    """

    def __init__(self, config, method="ltmp", tau=0.1, r=None, attention=None):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        if (method in ("tome", "topk")) != (r is not None):
            raise ValueError(f"r, tokens removed per block, is for tome and topk; {method}: r={r}")
        counts = list(r) if isinstance(r, (list, tuple)) else [r] * config.depth
        is_count = [r is None or (isinstance(count, int) and count >= 0) for count in counts]
        if len(counts) != config.depth or not all(is_count):
            raise ValueError(f"r must be a count >= 0 or a list of {config.depth} counts; got {r}")
        attention = attention or PLAIN_ATTENTION
        # The functions, not a Python module: copy.deepcopy and pickle refuse Python modules.
        self.attention = SimpleNamespace(
            masked_attention=attention.masked_attention,
            ragged_attention=attention.ragged_attention,
        )
        self.config = config
        self.method = method
        self.patch_embed = PatchEmbed(config.patch_size, config.dim)
        # All prefix tokens; the name is DeiT's.
        self.cls_token = nn.Parameter(torch.zeros(1, config.prefix_tokens, config.dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, config.num_tokens, config.dim))
        self.blocks = nn.ModuleList(Block(config, method, tau, count) for count in counts)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        has_head = config.num_classes > 0
        width = config.head_tokens * config.dim
        self.head = nn.Linear(width, config.num_classes) if has_head else nn.Identity()

    def forward(self, images, drop=None):
        """images (B, 3, S, S), normalized -> logits (B, num_classes), kept (depth, B).

        kept: live tokens after each block, prefix tokens included; differentiable in training.
        drop: whether dead tokens are left out (the default in eval mode) or stay, masked (the
        default in training mode: thresholds need their gradient). The logits agree to rounding,
        unless rounding moves a score across a threshold. In half precision kept can differ between
        a batch and an image alone.
        """
        tokens = self.embed(images, not self.training if drop is None else drop)
        kept = []
        for block in self.blocks:
            tokens = block(tokens, self.attention)
            kept.append(tokens.kept())
        return self.classify(tokens), torch.stack(kept)

    def embed(self, images, drop):
        """images (B, 3, S, S) -> the Tokens that enter the first block."""
        S = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, S, S) or not len(images):
            raise ValueError(f"images must be (B, 3, {S}, {S}), B >= 1; got {tuple(images.shape)}")
        x = self.patch_embed(images)  # (B, N - P, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed  # (B, N, C)
        shape = x.shape[:2]
        rows = torch.arange(shape.numel(), device=x.device).view(shape)  # (B, N)
        size = torch.ones(shape.numel(), dtype=torch.float32, device=x.device)  # (T,)
        mask = None if drop else size
        live = torch.ones_like(rows, dtype=torch.bool)
        prefix = self.config.prefix_tokens
        return Tokens(x.flatten(0, 1), size, mask, rows, live, holes=False, prefix_tokens=prefix)

    def classify(self, tokens):
        """Tokens after the last block -> logits (B, num_classes)."""
        read = take(tokens.x, tokens.rows[:, : self.config.head_tokens])  # (B, head_tokens, C)
        return self.head(self.norm(read).flatten(1))


def create_model(name, method="ltmp", num_classes=None, tau=0.1, r=None, attention=None, **changes):
    """A model by its name in VARIANTS, random weights; `changes` replace fields of its config."""
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(VARIANTS)}")
    if num_classes is not None:
        changes["num_classes"] = num_classes
    return LTMPViT(replace(VARIANTS[name], **changes), method, tau, r, attention)


# --------------------------------------------------------------------------------------------------
# Loading


def load_weights(model, source):
    """Load a state dict in the names of DeiT and timm. Returns the model.

    source: the dict, or a file that torch wrote, also with the state dict as its entry "model". All
    weights must be there, with their shape, and finite. A step's thresholds may be missing, but
    then in all blocks. Thresholds and a head that the model has no use for are left out. Raises
    ValueError and names what does not fit; the model is then as before. extras/weights.py reads
    other formats.
    """
    where = "the state dict" if isinstance(source, Mapping) else source
    if not isinstance(source, Mapping):
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ValueError(f"no file at {where}") from None
        except Exception:  # whatever a damaged file provokes
            raise ValueError(f"{where} is no state dict that torch wrote") from None
    state = source.get("model", source) if isinstance(source, Mapping) else {}
    is_state = isinstance(state, Mapping) and state
    if not is_state or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{where} is no state dict: names of weights and their tensors")

    own = model.state_dict()
    thresholds = {name for name in (*own, *state) if name.endswith("_masker.threshold")}
    in_both = {name.split(".")[-2] for name in thresholds if name in own and name in state}
    optional = {name for name in thresholds if name.split(".")[-2] not in in_both}
    if not model.config.num_classes:
        optional |= {"head.weight", "head.bias"}
    problems = [f"missing {n}" for n in own if n not in state and n not in optional]
    problems += [f"unexpected {n}" for n in state if n not in own and n not in optional]
    for name in [name for name in own if name in state]:
        if state[name].shape != own[name].shape:
            problems.append(f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}")
        elif not state[name].isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where} does not fit the model: {'; '.join(problems[:5])}{more}")
    model.load_state_dict({name: state.get(name, own[name]) for name in own})
    return model


def load_thresholds(model, source):
    """Set the thresholds that training found. Returns the model.

    source: the path of a thresholds.json, or its content: "method", and "merge_thresholds" and
    "prune_thresholds" with one number per block; "model", one of VARIANTS, and "image_size" say for
    which model they are, if they are there. Raises ValueError where they do not fit.
    """
    found = source
    if not isinstance(source, Mapping):
        try:
            found = dict(json.loads(Path(source).read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"cannot read thresholds from {source}: {error}") from None
    method, config = found.get("method"), model.config
    if method != model.method or method in ("dense", "tome", "topk"):
        raise ValueError(f"thresholds of the method {method} do not fit the method {model.method}")
    learned = VARIANTS.get(str(found.get("model")), config)
    if (learned.depth, learned.dim) != (config.depth, config.dim):
        here = f"this model has {config.depth} blocks and {config.dim} channels"
        raise ValueError(f"the thresholds were learned for {found['model']}, {here}")
    size = found.get("image_size", config.image_size)
    if size != config.image_size:
        here = f"this model has {config.image_size}"
        raise ValueError(f"the thresholds were learned at {size} pixels, {here}")
    steps = METHODS[method]
    # All are checked before the first is set.
    for step in steps:
        values = found.get(f"{step}_thresholds")
        numbers = isinstance(values, list) and len(values) == config.depth
        if not numbers or not all(isinstance(v, (int, float)) and abs(v) < 1e38 for v in values):
            needed = f"{config.depth} numbers, one per block"
            raise ValueError(f"{step}_thresholds must be {needed}; got {values}")
    for step in steps:
        for block, value in zip(model.blocks, found[f"{step}_thresholds"], strict=True):
            nn.init.constant_(getattr(block, f"{step}_masker").threshold, value)
    return model
