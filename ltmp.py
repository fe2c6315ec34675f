"""Learned Thresholds Token Merging and Pruning (LTMP) for Vision Transformers, in one file.

Method: M. Bonnaerens and J. Dambre, "Learned Thresholds Token Merging and Pruning for Vision
Transformers", TMLR 2023, arXiv 2307.10780. Between attention and MLP of every block two learned
scalars decide which tokens are merged into a similar one and which are dropped.

Read from top to bottom: configurations, the masker (the learned threshold), merge and prune,
attention, the block that puts them in order, the model; then, of no interest to the method, the
reading of files. `live_counts`, `live_rows`, `on_live` and `parts_of` only save work, as `counts` and `rows`
do, which they hand from block to block. Only torch is needed, so
this file can be copied alone.

Shapes: B images, N tokens (the class token first), C channels, H heads, D = C / H channels a head.
Three tensors travel together from block to block:

    x     (B, N, C)   the tokens; live ones first, dead ones behind them
    size  (B, N)      how many input patches a token stands for (1 at the start)
    mask  (B, N)      exactly 1 for a live token and exactly 0 for a dead one; differentiable

Inside a block attention adds two more, by which tokens are chosen:

    key         (B, N, D)  the tokens' attention keys, averaged over heads: similar keys merge
    importance  (B, N)     how much attention each token receives (see attend): the least important are pruned

There are two executions of one function. In training (drop=False) dead tokens stay in the tensors
behind the live ones, masked, since a threshold needs their gradient. In inference (drop=True) they are
cut off behind the longest image of the batch, which is the one with the most live tokens.
"""

import hashlib
import json
import math
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

__version__ = "0.1.0"


# ---------------------------------------------------------------------------------------------
# Configurations


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a plain ViT with a class token, and how its images are prepared.

    image_size and patch_size are in pixels (square). num_classes=0 means no head: in place of logits
    the model then returns the class feature (B, dim). layer_scale adds a learned scale per channel to each
    residual branch (`ls1`, `ls2`). mean, std and crop_pct belong to the published weights:
    evaluation resizes to image_size / crop_pct, crops the centre and normalizes.
    """

    image_size: int = 224
    patch_size: int = 16
    dim: int = 384
    depth: int = 12
    heads: int = 6
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    layer_scale: bool = False
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)
    crop_pct: float = 0.9

    def __post_init__(self):
        if self.image_size % self.patch_size or self.dim % self.heads:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}, "
                             f"and dim {self.dim} of heads {self.heads}")

    @property
    def num_tokens(self):
        """Tokens of one image: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


DEIT = ViTConfig()  # DeiT-S; the others differ from it as below
AUGREG = replace(DEIT, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # "How to train your ViT?"
VARIANTS = {
    "deit_tiny_patch16_224": replace(DEIT, dim=192, heads=3),
    "deit_small_patch16_224": DEIT,
    "deit_base_patch16_224": replace(DEIT, dim=768, heads=12),
    "deit_base_patch16_384": replace(DEIT, dim=768, heads=12, image_size=384, crop_pct=1.0),
    "vit_tiny_patch16_224": replace(AUGREG, dim=192, heads=3),
    "vit_small_patch16_224": AUGREG,
    "vit_base_patch16_224": replace(AUGREG, dim=768, heads=12),
    "vit_large_patch16_224": replace(AUGREG, dim=1024, depth=24, heads=16),
    # DINOv2 has no head, and position embeddings for 518 pixels, which load_weights resizes.
    "vit_small_patch14_dinov2": replace(DEIT, patch_size=14, num_classes=0, layer_scale=True, crop_pct=0.875),
    # A 0.6 M ViT for Fashion-MNIST: 14 x 14 patches of 2 x 2 pixels, the token grid of DeiT at 224.
    "demo": ViTConfig(image_size=28, patch_size=2, dim=64, heads=4, num_classes=10, mean=(0.286,) * 3, std=(0.353,) * 3, crop_pct=1.0),
}

# What each method does between attention and MLP, in this order. "tome" and "topk" are "ltm" and
# "ltp" with a fixed count of r tokens per block in place of a learned threshold.
METHODS = {
    "dense": (),
    "ltmp": ("merge", "prune"),
    "ltm": ("merge",),
    "ltp": ("prune",),
    "ltpm": ("prune", "merge"),
    "tome": ("merge",),
    "topk": ("prune",),
}


# ---------------------------------------------------------------------------------------------
# Maskers: scores in, exact zeros and ones out


class ThresholdMasker(nn.Module):
    """The learned threshold: chosen = (score > threshold), with the gradient of a sigmoid (paper: learned thresholds).

    Prune keeps the chosen tokens, merge merges them away. Forward is the hard decision; backward
    sees soft = sigmoid((score - threshold) / tau) alone, since the detached rest is a constant:

        d loss / d threshold = - sum over tokens of d loss / d chosen * soft (1 - soft) / tau

    and d loss / d chosen comes through the mask, from the attention of later blocks and from the
    FLOPs term of the loss, and with whole_gradient through the mean that merge makes. soft + (hard - soft) is exactly 0 or 1 in float arithmetic, since
    hard = 1 only where soft >= 0.5; (hard + soft) - soft is not, and who merged would keep a mask of 6e-8.
    """

    whole_gradient = False  # how merge passes its gradient on; see there, above `gone, weight`

    def __init__(self, threshold, tau):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor([float(threshold)], dtype=torch.float32))
        self.tau = tau

    def _apply(self, fn, recurse=True):
        """Moved to another device as all modules are, but float32 whatever the model becomes: near 1 a bfloat16 has steps of 0.004."""
        as_float32 = lambda t: moved if (moved := fn(t)).dtype == t.dtype else t.to(moved.device)
        return super()._apply(as_float32, recurse)

    def forward(self, scores, mask):
        """scores (B, M) float32, inf or -inf where nothing is to be decided, mask (B, N) unused -> chosen (B, M) float32 of 0 and 1."""
        hard = (scores > self.threshold).float()
        if not torch.is_grad_enabled():
            return hard
        soft = torch.sigmoid((scores - self.threshold) / self.tau)
        return soft + (hard - soft).detach()


class FixedCountMasker(nn.Module):
    """The rule of ToMe and top-k pruning: r tokens per image, whatever their scores.

    which="most similar" puts 1 on the r highest scores (they merge), which="least important" puts
    0 on the r lowest (they are dropped). At most (n - 1) // 2 of n live tokens are taken.
    """

    whole_gradient = False  # there is none

    def __init__(self, r, which):
        super().__init__()
        self.r, self.which = r, which

    def forward(self, scores, mask):
        """scores (B, M) float32, -inf (to merge) or inf (to prune) where nothing is to be decided, mask (B, N) -> chosen (B, M) float32 of 0 and 1."""
        r = ((mask.sum(1, keepdim=True) - 1) // 2).clamp(min=0, max=self.r)  # (B, 1)
        if self.which == "most similar":  # tokens that may not merge have the score -inf: last
            return (_rank(scores, descending=True) < r).float()
        return (_rank(scores, descending=False) >= r).float()  # dead tokens have the score inf: last


def _rank(scores, descending):
    """Position of each score in its sorted row; the earlier of two equal scores comes first."""
    return scores.sort(dim=1, descending=descending, stable=True).indices.argsort(dim=1)


# ---------------------------------------------------------------------------------------------
# Merge, prune, and the order of the tokens


def flat_index(index, n):
    """index (B, M) of tokens within images of n tokens -> (B M,) of the same in all images, one after the other."""
    if len(index) == 1:  # nothing to add, and with one image every small operation counts
        return index[0]
    return (index + n * torch.arange(len(index), device=index.device)[:, None]).flatten()


def merge(x, key, size, mask, importance, masker):
    """Merge every other token, where `masker` says so, into the most similar of the rest (paper: token merging; the matching is ToMe's, arXiv 2210.09461).

    Tokens at positions 0, 2, 4 ... are set A, those at 1, 3, 5 ... set B. Each A token looks for the
    B token with the most similar key (cosine) and merges into it where `masker` says 1. The class
    token (position 0) never merges; the dead take no part. Several A tokens may merge into one B token: its
    feature becomes the mean of all, weighted by size, its importance their maximum, so that what
    was important to somebody is not pruned for the company that it keeps.

    x (B, N, C), key (B, N, D) averaged over heads, size, mask, importance (B, N), live tokens first; masker: a ThresholdMasker or FixedCountMasker
    -> x, size, mask, importance in the new order: set A, then set B. A tokens that merged are dead.
    """
    if x.shape[1] < 3:  # the class token and at most one partner: nothing can merge
        return x, size, mask, importance
    x_a, x_b = x[:, 0::2], x[:, 1::2]  # (B, Na, C), (B, Nb, C)
    size_a, size_b = size[:, 0::2], size[:, 1::2]
    mask_a, mask_b = mask[:, 0::2], mask[:, 1::2]
    importance_a, importance_b = importance[:, 0::2], importance[:, 1::2]

    with torch.autocast(x.device.type, enabled=False):  # float32 under AMP too: half would round the similarities
        key = F.normalize(key.float(), dim=-1)
        similarity = key[:, 0::2] @ key[:, 1::2].transpose(1, 2)  # (B, Na, Nb)
    # At most 1, since rounding can lift a cosine above it, and a threshold of 1 is to mean: never merge. With dead B tokens -inf: nobody's partner.
    similarity = similarity.clamp(max=(1 + mask_b.detach().log())[:, None])
    similarity, partner = similarity.max(dim=2)  # (B, Na), (B, Na)
    cannot_merge = mask_a.logical_not()
    cannot_merge[:, 0] = True  # neither dead tokens nor the class token
    merged = masker(similarity.masked_fill(cannot_merge, -math.inf), mask)  # (B, Na) of 0 and 1

    # That a token merges matters in two ways: its mask ends (FLOPs fall, later attention misses it), and it lives on in the mean.
    # `gone` carries the gradient of the first, `weight` that of the second. The paper has the first alone, and only of tokens that merged.
    if masker.whole_gradient or not merged.requires_grad:
        gone, weight = merged, merged * size_a  # (B, Na)
    else:
        gone, weight = torch.where(merged > 0, merged, merged.detach()), merged.detach() * size_a
    mask_a = mask_a * (1 - gone)
    total = size_b.scatter_add(1, partner, weight)  # (B, Nb); size_a stays: who merged is dead
    share_a, share_b = weight / total.gather(1, partner), size_b / total  # (B, Na), (B, Nb)
    target = flat_index(partner, x_b.shape[1])[:, None].expand(-1, x.shape[2])  # (B Na, C); along dimension 0 torch adds whole rows, on a CPU ten times as fast
    x_b = (x_b * share_b[:, :, None]).flatten(0, 1).scatter_add_(0, target, (x_a * share_a[:, :, None]).flatten(0, 1)).view_as(x_b).to(x.dtype)
    importance_b = importance_b.scatter_reduce(
        1, partner, importance_a.masked_fill(merged.logical_not(), 0), "amax")  # (B, Nb)

    return (torch.cat([x_a, x_b], 1), torch.cat([size_a, total], 1),
            torch.cat([mask_a, mask_b], 1), torch.cat([importance_a, importance_b], 1))


def prune(mask, importance, masker):
    """Drop the tokens whose importance is not above the threshold (paper: token pruning).

    The dead pass with a factor of 1 (score inf), so that their mask goes on collecting gradient
    from later blocks. The class token has importance inf: it always stays. At a threshold of 0 only that goes to which nobody attends at all.

    mask, importance (B, N) -> mask (B, N).
    """
    return mask * masker(importance.masked_fill(mask.logical_not(), math.inf), mask)


def live_counts(mask):
    """mask (B, N) -> the number of live tokens of each image, as a list: what a GPU must be waited for."""
    return mask.sum(1).int().tolist()


def live_first(mask, tensors, drop):
    """Move the dead behind the live, whose order stays; with drop=True cut off what no image of the batch needs.

    With the mask, this makes the masked and the dropping execution one function: "every other token"
    means the same live tokens in both. mask (B, N), tensors (B, N) or (B, N, C) -> mask, tensors, counts, those of live_counts.
    """
    order, counts = mask.argsort(dim=1, descending=True, stable=True), live_counts(mask)  # (B, N), and a list
    if drop:
        order = order[:, : max(counts)]  # (B, N'), N' the longest image
    rows = flat_index(order, mask.shape[1])
    ordered = lambda t: t.flatten(0, 1).index_select(0, rows).unflatten(0, order.shape)  # whole rows: faster than gather, which moves single numbers
    return mask.gather(1, order), [t.gather(1, order) if t.dim() == 2 else ordered(t) for t in tensors], counts


def live_rows(mask, counts, drop):
    """mask (B, N), counts of live_first -> (live, dead, drop): which of the B N positions hold live tokens, which dead ones, and drop as given, for on_live. None if all are live."""
    live = sum(counts)
    if live == mask.numel():
        return None
    order = mask.flatten().argsort(descending=True, stable=True)
    return order[:live], order[live:], drop


def on_live(layer, x, rows):
    """layer, which sees one token at a time, on x (B, N, C): the live tokens without the gaps between images.

    In training the dead are computed too, without a graph: the gradient of their mask needs their
    keys and values, but nothing flows back through what they become. In inference, where the tail
    of shorter images is padding, they become 0.
    """
    if rows is None:
        return layer(x)
    (live, dead, drop), flat = rows, x.flatten(0, 1)
    out = layer(flat.index_select(0, live))  # (live tokens of the batch, C'); first, since autocast keeps a weight that it cast, and one cast without a graph gets no gradient
    both = out.new_empty(len(flat), out.shape[1])
    with torch.no_grad():
        both[dead] = 0 if drop else layer(flat.index_select(0, dead))
    return both.index_copy_(0, live, out).unflatten(0, x.shape[:2])  # (B, N, C')


# ---------------------------------------------------------------------------------------------
# The ViT


class PatchEmbed(nn.Module):
    """Image to patches to tokens: (B, 3, S, S) -> (B, (S / patch_size)^2, C)."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


def attend(q, k, v, size, mask, training):
    """Proportional attention (ToMe, arXiv 2210.09461) to the live tokens, and the importance of each token (paper).

        attn_ij = m_j s_j exp(q_i k_j) / sum_n m_n s_n exp(q_i k_n)        m: mask, s: size, q k over sqrt(D)
        importance_j = mean over heads and over live queries i of attn_ij

    A token that stands for s patches is attended to s times: log s joins the logits. Only live
    queries count for importance, because when tokens are really dropped there are no others.

    q (B, H, M, D), k, v (B, H, N, D), size, mask (B, N); the first N of the M >= N queries are the same tokens as the keys, the others
    are dead in all images, and asked for only in training (a gradient is wanted), where their mask needs to know what they attend to
    -> out (B, H, M, D), importance (B, N) float32, attn (B, H, M, N) float32, and in training log_sum (B, H, M, 1), the log of the sum in attn's denominator.
    Not for autograd, for which a mask that enters as -inf has no gradient: see MaskedAttention.
    """
    scaled = torch.baddbmm(q.new_zeros(()), q.flatten(0, 1), k.transpose(-2, -1).flatten(0, 1), beta=0, alpha=q.shape[-1] ** -0.5)  # q k, scaled on its way
    logits = scaled.view(*q.shape[:3], -1).float()  # (B, H, M, N)
    logits += (size * mask).log()[:, None, None]  # in place, as softmax is: fresh memory is slow on a CPU
    largest = logits.amax(-1, keepdim=True) if training else None  # (B, H, M, 1)
    attn = torch.softmax(logits, -1, out=logits)
    query_weight = (mask / mask.sum(1, keepdim=True))[:, None, None] / q.shape[1]  # (B, 1, 1, N), for the mean
    with torch.autocast(q.device.type, enabled=False):  # averaged in float32 under AMP too: half would round the scores
        importance = (query_weight @ attn[:, :, : k.shape[2]]).sum((1, 2))  # (B, N)
    log_sum = largest - attn.amax(-1, keepdim=True).log() if training else None  # attn = exp(logits - log_sum), where it is largest
    return attn.to(v.dtype) @ v, importance, attn, log_sum


# The largest `ratio` in attend_backward, of a dead token to all living ones. Brought back, it would take ratio / (1 + ratio) of the attention,
# never more than all; the derivative at 0 is ratio, which has no bound. Without a cut it drowns everything else in early blocks.
MAX_RATIO = 1.0


def attend_backward(q, k, v, size, mask, out, attn, log_sum, d_out, d_importance, first):
    """The gradient of attend, that of the mask included.

    The mask is a factor, so that it has a gradient also where it is 0: what a dead token would add.

        d attn_ij / d m_n = ratio_in ((n = j) - attn_ij)        ratio_in = s_n exp(q_i k_n) / sum_l m_l s_l exp(q_i k_l), at most 1

    M tokens an image: before `first` they are alive in every image, from N on they are dead in every image.

    q, k, v, out (B, H, M, D), size, mask (B, M), attn (B, H, M, N), log_sum (B, H, M, 1) with attn = exp(logits - log_sum),
    d_out (B, H, M, D), 0 for the dead, d_importance (B, M)
    -> d_q, d_k, d_v (B, H, N, D), d_size (B, N), of the first N tokens (those of the others are 0), and d_mask (B, M).
    """
    H, D, N = q.shape[1], q.shape[3], attn.shape[3]
    count = mask.sum(1, keepdim=True)  # (B, 1)
    seen = attn @ d_importance[:, None, :N, None]  # (B, H, M, 1), sum over j of attn_ij d_importance_j
    q, d_out, attn = q[:, :, :N] * D**-0.5, d_out[:, :, :N], attn[:, :, :N]  # queries up to the longest image; for the dead of shorter ones d_out and `live` are 0
    # d loss / d attn_ij = d_out_i v_j + m_i / (count H) d_importance_j, one product of D + 1 columns; softmax takes off the row's mean
    live, each = mask[:, None, :N, None], (d_importance / (count * H))[:, None, :, None]  # (B, 1, N, 1), (B, 1, M, 1)
    left = torch.cat([d_out, live.expand(-1, H, -1, -1).to(q.dtype)], -1)  # (B, H, N, D + 1)
    right = torch.cat([v, each.expand(-1, H, -1, -1).to(q.dtype)], -1)  # (B, H, M, D + 1)
    row_mean = (d_out.float() * out[:, :, :N]).sum(-1, keepdim=True) + live / (count * H)[:, None, None] * seen[:, :, :N]
    d_attn = (left @ right.transpose(-2, -1)).float().sub_(row_mean)  # (B, H, N, M)
    d_logits = attn * d_attn[..., :N]  # (B, H, N, N)
    d_log_weight = d_logits.sum((1, 2))  # (B, N), d loss / d log(m_j s_j)
    ratio = (q @ k[:, :, first:].transpose(-2, -1)).float()  # (B, H, N, M - first): all the dead are there, and some of the living, set to 0 below
    ratio.add_(size[:, None, None, first:].log()).sub_(log_sum[:, :, :N]).clamp_(max=math.log(MAX_RATIO)).exp_()
    d_mask = F.pad((ratio * d_attn[..., first:]).sum((1, 2)), (first, 0)).masked_fill_(mask > 0, 0)  # (B, M)
    d_mask[:, :N] += d_log_weight  # for the live, whose ratio is attn
    # importance_j = sum_i m_i attn_ij / sum_i m_i: m_i is a query's weight too (mean over heads)
    gained = seen.mean((1, 3))  # (B, M), what each query adds to the loss by its part in the importance
    d_mask += (gained - (mask * gained).sum(1, keepdim=True) / count) / count
    d_logits = d_logits.to(q.dtype)
    d_v = attn.to(d_out.dtype).transpose(-2, -1) @ d_out
    return d_logits @ k[:, :, :N] * D**-0.5, d_logits.transpose(-2, -1) @ q, d_v, d_log_weight / size[:, :N], d_mask


CACHED_LOGITS = 2**19  # 2 MB of float32, what is taken to stay in a CPU's cache


def parts_of(counts, heads, device, training):
    """counts of live_first -> what attention takes at once: [(images, live tokens of the shortest, and of the longest of them)].

    On a CPU an image for each thread, and in inference as many as have CACHED_LOGITS: fewer leave the threads idle or busy with small
    steps, more are slower again (measured with two threads). Training would gain 3 %, and its rounding hang on how many tokens are left. Elsewhere all.
    """
    fitting = 0 if training else CACHED_LOGITS // (heads * max(counts) ** 2)
    step = max(torch.get_num_threads(), fitting) if device.type == "cpu" else len(counts)
    return [(slice(i, i + step), min(counts[i : i + step]), max(counts[i : i + step])) for i in range(0, len(counts), step)]


class MaskedAttention(torch.autograd.Function):
    """attend, with its gradient. Tokens must come live first, and d_out be 0 for the dead, as it is where they are never attended to, merged or read.

    Written out because autograd gives a logit of -inf no gradient, and with a mask that multiplies would keep
    and walk through (B, H, N, N) several times more; here one is kept, of the keys up to the longest image.
    """

    @staticmethod
    def forward(ctx, q, k, v, size, mask, counts):
        """q, k, v (B, H, N, D), size, mask (B, N), counts of live_first -> out (B, H, N, D), importance (B, N) float32. The dead have queries too where a gradient is wanted."""
        B, H, N, D = q.shape
        training = any(ctx.needs_input_grad)
        ctx.parts, kept, together = parts_of(counts, H, mask.device, training), [], None
        for images, _, n in ctx.parts:
            queries = N if training else n  # the mask of the dead is their weight in the importance too: its gradient needs what they attend to
            out, importance, *found = attend(q[images, :, :queries], k[images, :, :n], v[images, :, :n], size[images, :n], mask[images, :n], training)
            if len(out) < B or n < N:  # else this is all there is, nothing to put together
                together = together or (q.new_zeros(B, N, H, D).transpose(1, 2), torch.zeros_like(size))
                together[0][images, :, :queries], together[1][images, :n] = out, importance
            if training:
                kept += found  # attn, log_sum
        out, importance = together or (out, importance)
        ctx.save_for_backward(q, k, v, size, mask, out, *kept)
        return out, importance

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_importance):
        q, k, v, size, mask, out, *kept = ctx.saved_tensors
        inputs = (q, k, v, size, mask)
        grads = [torch.zeros_like(t) for t in inputs]
        for (images, first, n), attn, log_sum in zip(ctx.parts, kept[::2], kept[1::2]):
            found = attend_backward(*(t[images] for t in inputs), out[images], attn, log_sum, d_out[images], d_importance[images], first)
            for grad, part in zip(grads[:3], found):
                grad[images, :, :n] = part
            grads[3][images, :n], grads[4][images] = found[3:]
        return *grads, None


def masked_attention(q, k, v, size, mask, counts=None):
    """attend, with a gradient if one is wanted. The class token's importance is inf: it is never pruned.

    q, k, v (B, H, N, D), size, mask (B, N), live tokens first, counts of live_first, if at hand: else a GPU is waited for once more
    -> out (B, H, N, D), importance (B, N) float32; the dead rows of out mean nothing.
    """
    out, importance = MaskedAttention.apply(q, k, v, size, mask, counts or live_counts(mask))
    importance[:, 0] = math.inf
    return out, importance


class Attention(nn.Module):
    """Multi-head self-attention that also returns what merging and pruning decide by."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, size, mask, counts, rows):
        """x (B, N, C), size, mask (B, N), counts of live_first, rows for on_live -> out (B, N, C), key (B, N, D), importance (B, N).

        Where mask is None (the dense method), torch's fused attention; key and importance, for which nobody asks, are None too.
        """
        B, N, C = x.shape
        qkv = on_live(self.qkv, x, rows).reshape(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        if mask is None:
            out, key, importance = F.scaled_dot_product_attention(q, k, v), None, None
        else:
            out, importance = masked_attention(q, k, v, size, mask, counts)
            key = k.mean(1, dtype=torch.float32)  # (B, N, D)
        return on_live(self.proj, out.transpose(1, 2).reshape(B, N, C), rows), key, importance


class MLP(nn.Module):
    """Two linear layers with exact GELU between: (B, N, C) -> (B, N, C)."""

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
    """Attention; merge and prune as the method says; MLP (paper: the LTMP module)."""

    def __init__(self, config, method, tau, r):
        super().__init__()
        dim = config.dim
        self.steps = METHODS[method]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, config.heads)
        self.ls1 = LayerScale(dim) if config.layer_scale else nn.Identity()
        if "merge" in self.steps:
            self.merge_masker = ThresholdMasker(0.9, tau) if r is None else FixedCountMasker(r, "most similar")
        if "prune" in self.steps:
            self.prune_masker = ThresholdMasker(0.0, tau) if r is None else FixedCountMasker(r, "least important")
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio))
        self.ls2 = LayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x, size, mask, counts, rows, drop, patches):
        """x (B, N, C), size, mask (B, N), live tokens first -> x, size, mask, counts, rows, patches after the block, cut to the longest image if drop.

        counts: live tokens of each image, a list, read only where there is a mask. rows: live_rows(mask, counts, drop), None if all are live. patches (B, N, P): above 0 where the token holds
        the patch, or None where nobody asks. They travel as further channels of x, so that what becomes of a token becomes of its patches.
        """
        out, key, importance = self.attn(self.norm1(x), size, mask, counts, rows)
        x = x + self.ls1(out)
        if patches is not None:
            x = torch.cat([x, patches.to(x.dtype)], 2)  # (B, N, C + P)
        for step in self.steps:
            if step == "merge":
                x, size, mask, importance = merge(x, key, size, mask, importance, self.merge_masker)
            else:
                mask = prune(mask, importance, self.prune_masker)
            if step == self.steps[-1]:
                mask, (x, size), counts = live_first(mask, (x, size), drop)
            elif step == "prune":  # merge pairs every other live token: the dead must be behind before it
                mask, (x, size, importance, key), counts = live_first(mask, (x, size, importance, key), drop)
        if patches is not None:
            x, patches = x.split([out.shape[2], patches.shape[2]], 2)
        rows = None if mask is None else live_rows(mask, counts, drop)
        return x + self.ls2(on_live(self.mlp, self.norm2(x), rows)), size, mask, counts, rows, patches


class LTMPViT(nn.Module):
    """A ViT whose blocks merge and prune tokens by learned thresholds.

    config: a ViTConfig. method: one of METHODS. tau: temperature of the threshold's gradient.
    r: for the methods "tome" and "topk", how many tokens each block removes at most: one number, or one per block.
    """

    def __init__(self, config, method="ltmp", tau=0.1, r=None):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        if (method in ("tome", "topk")) != (r is not None):
            raise ValueError(f"r, the tokens removed per block, goes with tome and topk alone; got {method} with r={r}")
        counts = list(r) if isinstance(r, (list, tuple)) else [r] * config.depth
        if len(counts) != config.depth or (r is not None and not all(isinstance(c, int) and c >= 0 for c in counts)):
            raise ValueError(f"r must be one count >= 0 or {config.depth} of them, one per block; got {r}")
        self.config, self.method = config, method
        self.patch_embed = PatchEmbed(config.patch_size, config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(_sincos_positions(config))
        self.blocks = nn.ModuleList(Block(config, method, tau, count) for count in counts)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_classes) if config.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images, drop=None, trace=False):
        """images (B, 3, S, S), normalized -> logits (B, num_classes), kept (depth, B).

        kept: live tokens after each block, the class token included; differentiable in training.
        drop: cut dead tokens off (default in eval mode), or keep them, masked (default in training,
        where a threshold needs the gradient of the tokens that it removed; with drop=True its gradient
        means nothing). The logits agree to rounding.
        trace: return a third tensor, held_by (depth, B, patches): for each patch of the input the
        position, after each block, of the token that holds it, or -1 if that was pruned.
        """
        S = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, S, S) or not len(images):
            raise ValueError(f"images must be (B, 3, {S}, {S}), B at least 1; got {tuple(images.shape)}")
        drop = not self.training if drop is None else drop
        x = self.patch_embed(images)  # (B, N - 1, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed  # (B, N, C)
        size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)  # (B, N)
        mask = None if self.method == "dense" else torch.ones_like(size)  # (B, N)
        patches = torch.eye(x.shape[1], device=x.device)[:, 1:].expand(len(x), -1, -1) if trace else None  # (B, N, N - 1)
        kept, held_by, rows, counts = [], [], None, [x.shape[1]] * len(x)
        for block in self.blocks:
            x, size, mask, counts, rows, patches = block(x, size, mask, counts, rows, drop, patches)
            kept.append((size if mask is None else mask).sum(1))  # dense: all sizes are 1
            if trace:
                share, token = (patches if mask is None else patches * mask[:, :, None]).max(1)  # (B, N - 1) each
                held_by.append(token.masked_fill(share == 0, -1))
        logits = self.head(self.norm(x[:, 0]))
        return (logits, torch.stack(kept), torch.stack(held_by)) if trace else (logits, torch.stack(kept))


def _sincos_positions(config):
    """Where position embeddings start when trained from scratch: sines of 2-D positions. (1, N, C)"""
    grid, quarter = config.image_size // config.patch_size, config.dim // 4
    angle = torch.arange(grid)[:, None] * 1e-4 ** (torch.arange(quarter) / quarter)  # (grid, C / 4)
    row, column = angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)
    waves = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 2).flatten(0, 1)  # (N - 1, C')
    return 0.5 * F.pad(waves, (0, config.dim - 4 * quarter, 1, 0))[None]  # zeros for the class token


def create_model(name, method="ltmp", num_classes=None, tau=0.1, r=None, **changes):
    """A model by its name in VARIANTS, with random weights; `changes` replace fields of its ViTConfig."""
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(VARIANTS)}")
    if num_classes is not None:
        changes["num_classes"] = num_classes
    return LTMPViT(replace(VARIANTS[name], **changes), method, tau, r)


# ---------------------------------------------------------------------------------------------
# Weights: whatever a published ViT came in, by its content

DEIT_URL = "https://dl.fbaipublicfiles.com/deit/"
WEIGHTS = {  # the digits are the start of the file's SHA-256, checked after download
    "deit_tiny_patch16_224": DEIT_URL + "deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": DEIT_URL + "deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": DEIT_URL + "deit_base_patch16_224-b5f2ef4d.pth",
    "deit_base_patch16_384": DEIT_URL + "deit_base_patch16_384-8de9b5d1.pth",
}

# Names of other libraries -> ours (those of DeiT and timm): regular expressions, applied in this order.
HUGGING_FACE = [
    (r"^(vit|deit|dinov2)\.", ""),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.(attention\.)?(query|q_proj)", "attn.q"),
    (r"attention\.(attention\.)?(key|k_proj)", "attn.k"),
    (r"attention\.(attention\.)?(value|v_proj)", "attn.v"),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^layernorm", "norm"),
    (r"^classifier", "head"),
]
FLAX = [  # Google's AugReg .npz
    (r"/", "."),
    (r"^cls$", "cls_token"),
    (r"^embedding", "patch_embed.proj"),
    (r"^Transformer\.posembed_input\.pos_embedding", "pos_embed"),
    (r"^Transformer\.encoderblock_", "blocks."),
    (r"^Transformer\.encoder_norm", "norm"),
    (r"LayerNorm_0", "norm1"),
    (r"LayerNorm_2", "norm2"),
    (r"MultiHeadDotProductAttention_1\.out", "attn.proj"),
    (r"MultiHeadDotProductAttention_1\.(q|k|v)(uery|ey|alue)", r"attn.\1"),
    (r"MlpBlock_3\.Dense_0", "mlp.fc1"),
    (r"MlpBlock_3\.Dense_1", "mlp.fc2"),
    (r"(scale|kernel)$", "weight"),
]
UNUSED = r"mask_token$|^(vit\.|deit\.)?pooler\.|^pre_logits/"  # of pretraining; not part of inference


def official_weights(name):
    """The published state dict of a DeiT, downloaded once into torch.hub's folder.

    Raises ValueError where there is none, and where it cannot be downloaded.
    """
    if name not in WEIGHTS:
        raise ValueError(f"no official weights are known for {name}: pass a checkpoint")
    try:
        return torch.hub.load_state_dict_from_url(WEIGHTS[name], map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, or the wrong hash
        raise ValueError(f"cannot download {WEIGHTS[name]} ({error}): pass the file as a checkpoint") from None


def download(url):
    """Fetch url once into torch.hub's folder and return the path.

    A name like vit-0123abcd.pth (eight or more digits of the SHA-256) has its content checked; other names,
    such as model.safetensors, do not say which file it is, and get the hash of the url in front.
    Raises ValueError where the file cannot be had or the hash is another.
    """
    name = Path(url).name
    digits = re.search(r"-([0-9a-f]{8,64})\.", name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name if digits else f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digits and digits[1])
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot download {url}: {error}") from None
    return path


def read_checkpoint(source):
    """Names and tensors of a checkpoint, in the names of DeiT and timm; nothing in it is ever run.

    source: a path, a URL (http, https, file), or the dict itself. Read by content: torch's files, .npz of
    Google's AugReg, .safetensors (with the package safetensors). Raises ValueError where it is none of them.
    """
    state, where = source, "the state dict"
    if not isinstance(source, dict):
        where = str(source)
        state = read_file(download(where) if re.match(r"(https?|file)://", where) else source)
    for wrapper in ("model_ema", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) and torch.is_tensor(value) for name, value in state.items()):
        raise ValueError(f"{where} holds no state dict: names of weights and their tensors")
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not re.search(UNUSED, name)}
    if "embedding/kernel" in state:
        return _join_qkv({_rename(name, FLAX): _from_flax(name, value) for name, value in state.items()})
    if any("embeddings.patch_embeddings" in name for name in state):
        return _join_qkv({_rename(name, HUGGING_FACE): value for name, value in state.items()})
    return state


def read_file(path):
    """What is in the file of a checkpoint (formats: see read_checkpoint). Raises ValueError where it is none, or damaged.

    A changed weight cannot be seen in .safetensors, nor in what torch wrote before 1.6: they have no checksums.
    """
    try:
        return _read_file(path)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}") from None
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # the readers raise whatever a damaged file provokes
        if code := re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} holds more than tensors, {code[1]}, which is not loaded since it could run code: save its state dict alone") from None
        cause = re.search(r"WeightsUnpickler error:\s*(\S.*)", str(error))  # without torch's advice to load it all the same
        reason = cause[1] if cause else (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no checkpoint, or damaged (then copy it again): {reason}") from None


def _read_file(path):
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:2] == b"PK":  # a zip archive: .npz, or torch's format, whose checksums torch does not look at
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            wrong = archive.testzip() if any(entry.CRC for entry in entries) else None  # torch can be told to write none
        if wrong:
            raise ValueError(f"the checksum of {wrong} in it does not fit")
        if any(entry.filename.endswith(".npy") for entry in entries):
            import numpy

            with numpy.load(path) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if start[8:] == b"{":  # eight bytes of length, then JSON
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError("reading .safetensors needs the package safetensors: pip install safetensors") from None
        return load_file(path)
    with open(path, "rb") as file:  # given the name, torch would go by its ending
        return torch.load(file, map_location="cpu", weights_only=True)


def _rename(name, table):
    for pattern, ours in table:
        name = re.sub(pattern, ours, name)
    return name


def _from_flax(name, value):
    """Flax keeps (in, out), and heads as an axis of their own: q, k, v (C, H, D), out (H, D, C)."""
    if name.endswith("kernel"):
        if value.dim() == 4:
            return value.permute(3, 2, 0, 1)
        return value.flatten(0, -2).T if "out/" in name else value.flatten(1).T
    return value.flatten() if "MultiHead" in name else value


def _join_qkv(state):
    """attn.q, attn.k, attn.v -> attn.qkv."""
    for name in [name for name in state if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in state for part in parts):
            state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([state.pop(part) for part in parts])
    return state


def resize_positions(pos_embed, num_tokens):
    """Position embeddings (1, 1 + g * g, C) for another square grid: bicubic, anti-aliased -> (1, num_tokens, C)."""
    old, new = (math.isqrt(n - 1) for n in (pos_embed.shape[1], num_tokens))
    if old * old != pos_embed.shape[1] - 1:
        raise ValueError(f"pos_embed has {pos_embed.shape[1]} positions, not those of a class token and a square grid")
    grid = pos_embed[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, C, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)


def load_weights(model, source, new_head=False):
    """Load the weights of a published ViT, whatever library it comes from. Returns the model.

    source: as for read_checkpoint. Strict: every weight must be there with its shape, and finite; only the thresholds
    of a step may be missing, all of them. Position embeddings of another grid are resized. Left out is what the model has no use for:
    thresholds of another method, the head where num_classes=0. new_head=True keeps the model's own head
    where the checkpoint has none or one for another number of classes. Raises ValueError naming what does not fit.
    """
    state, where = dict(read_checkpoint(source)), source if not isinstance(source, dict) else "the state dict"
    own = model.state_dict()
    if "pos_embed" in state and state["pos_embed"].dim() == 3 and state["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
        state["pos_embed"] = resize_positions(state["pos_embed"], own["pos_embed"].shape[1])
    if new_head and model.config.num_classes and ("head.weight" not in state or state["head.weight"].shape != own["head.weight"].shape):
        state |= {"head.weight": own["head.weight"], "head.bias": own["head.bias"]}
    both = {name.split(".")[-2] for name in own if name.endswith("_masker.threshold") and name in state}  # maskers that model and source have
    optional = lambda name: ((name.endswith("_masker.threshold") and name.split(".")[-2] not in both)
                             or (name.startswith("head.") and not model.config.num_classes))
    problems = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in state and not optional(name)]
    problems += [f"unexpected {name} {tuple(state[name].shape)}" for name in state if name not in own and not optional(name)]
    problems += [f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
                 for name in own if name in state and state[name].shape != own[name].shape]
    problems += [f"{name} holds NaN or infinity" for name in own if name in state and not state[name].float().sum().isfinite()]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where} does not fit the model: {'; '.join(problems[:5])}{more}")
    model.load_state_dict({name: state.get(name, own[name]) for name in own})
    return model


# ---------------------------------------------------------------------------------------------
# Thresholds


def seal(content):
    """The content of a thresholds.json with the start of its SHA-256 as "sha256", by which read_thresholds sees damage."""
    plain = {name: value for name, value in content.items() if name != "sha256"}
    return plain | {"sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]}


def read_thresholds(path):
    """The content of a thresholds.json as a dict. Raises ValueError where there is none, or it is not what was written."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read thresholds from {path}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("method"), str) or found["method"] not in METHODS:
        raise ValueError(f"{path} is no thresholds.json: it names none of the methods {', '.join(METHODS)}")
    if "sha256" in found and found != seal(found):
        raise ValueError(f'{path} is not what train.py wrote: damaged, or edited; it is accepted without its entry "sha256"')
    return found


def load_thresholds(model, source):
    """Set the thresholds that training found. Returns the model.

    source: the path of a thresholds.json, or a dict with "method" and the lists "merge_thresholds"
    and "prune_thresholds", one number per block; where it has "model", one of VARIANTS, its depth and
    width must be the model's. Raises ValueError where they do not fit.
    """
    found = source if isinstance(source, dict) else read_thresholds(source)
    if model.method in ("tome", "topk"):
        raise ValueError(f"the method {model.method} has no thresholds")
    if found.get("method") != model.method:
        raise ValueError(f"the thresholds belong to the method {found.get('method')}, the model runs {model.method}")
    known, config = VARIANTS.get(str(found.get("model"))), model.config
    if known and (known.depth, known.dim) != (config.depth, config.dim):
        raise ValueError(f"the thresholds were learned for {found['model']}, this model has {config.depth} blocks and {config.dim} channels")
    for step in METHODS[model.method]:  # all are checked before the first is set
        values = found.get(f"{step}_thresholds")
        if (not isinstance(values, list) or len(values) != len(model.blocks)
                or not all(isinstance(value, (int, float)) and abs(value) < 1e38 for value in values)):
            raise ValueError(f"{step}_thresholds must be {len(model.blocks)} numbers, one per block; got {values}")
    for step in METHODS[model.method]:
        for block, value in zip(model.blocks, found[f"{step}_thresholds"]):
            nn.init.constant_(getattr(block, f"{step}_masker").threshold, value)
    return model
