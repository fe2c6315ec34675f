"""The two attentions of ltmp.py, faster: the same functions, values and gradients.

    LTMPViT(config, attention=fast_attention)

Training: the gradient is written out. Autograd would keep and walk through (B, H, N, N) several
times more; here one such tensor is kept, of the keys that are alive. On a CPU a few images are
taken at a time, so that they stay in the cache. Inference: on a CPU no needless copy of the
logits; on a GPU the kernel of triton_attention.py; without Triton all images at once, padded to the
longest.
"""

import functools
import math
import warnings

import torch
from torch.autograd.function import once_differentiable

# --------------------------------------------------------------------------------------------------
# Inference


def ragged_attention(qkv, size, live):
    """ltmp.ragged_attention: qkv (T, 3, H, D), size (T,), live (B, N) -> (T, H, D), (T,)."""
    if qkv.device.type != "cpu":
        # The kernel has no gradient, no float64 and no large heads: padding has.
        no_gradient = not (torch.is_grad_enabled() and qkv.requires_grad)
        fits = no_gradient and qkv.dtype != torch.float64 and qkv.shape[-1] <= 128
        attention = gpu_attention(qkv.device) if qkv.is_cuda and fits else padded_attention
        return attention(qkv, size, live)
    counts, scale = live.sum(1).tolist(), qkv.shape[-1] ** -0.5
    outs, importances = [], []
    with torch.autocast("cpu", enabled=False):
        for qkv_i, log_size in zip(qkv.split(counts), size.log().split(counts), strict=True):
            q, k, v = qkv_i.permute(1, 2, 0, 3)  # (H, n, D) each
            # One operation for scale, product and log size.
            keys = k.transpose(1, 2).float()
            logits = torch.baddbmm(log_size[None, None], q.float(), keys, alpha=scale)  # (H, n, n)
            attn = softmax(logits)
            outs.append((attn.to(v.dtype) @ v).transpose(0, 1))  # (n, H, D)
            # As a product, a mean is faster.
            rows = attn.flatten(0, 1)  # (H n, n)
            importances.append(rows.new_full((len(rows),), 1 / len(rows)) @ rows)  # (n,)
    return torch.cat(outs), torch.cat(importances)


@functools.cache
def gpu_attention(device):
    """The kernel; padded_attention without Triton, or without the C compiler that it needs."""
    try:
        from . import triton_attention

        # The first launch compiles.
        qkv = torch.ones(1, 3, 1, 16, device=device)
        triton_attention.ragged_attention(qkv, qkv[:, 0, 0, 0], qkv[:, 0, 0, :1] > 0)
    except Exception as error:  # whatever Triton raises where it cannot compile
        message = f"attention by padding, which is slower: no Triton kernel: {error}"
        warnings.warn(message, stacklevel=2)
        return padded_attention
    return triton_attention.ragged_attention


def softmax(logits):
    """softmax over the last dimension, in place where nobody asks for a gradient."""
    in_place = not (torch.is_grad_enabled() and logits.requires_grad)
    return torch.softmax(logits, -1, out=logits) if in_place else logits.softmax(-1)


def padded_attention(qkv, size, live):
    """ragged_attention with all images at once: one batched product in place of B small ones."""
    place = live.flatten().nonzero()[:, 0]  # (T,), of each token among the B N
    padded = qkv.new_zeros(live.numel(), *qkv.shape[1:]).index_copy(0, place, qkv)
    log_size = size.new_full((live.numel(),), -math.inf).index_copy(0, place, size.log())
    q, k, v = padded.unflatten(0, live.shape).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
    logits = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).float()  # (B, H, N, N)
    attn = softmax(logits.add_(log_size.view(live.shape)[:, None, None]))
    query_weight = (live / live.sum(1, keepdim=True))[:, :, None]  # (B, N, 1)
    importance = (attn.mean(1) * query_weight).sum(1)  # (B, N)
    out = (attn.to(v.dtype) @ v).transpose(1, 2).flatten(0, 1)  # (B N, H, D)
    return out.index_select(0, place), importance.flatten().index_select(0, place)


# --------------------------------------------------------------------------------------------------
# Training


def masked_attention(q, k, v, size, mask):
    """ltmp.masked_attention: q, k, v (B, H, N, D), size, mask (B, N) -> (B, H, N, D), (B, N)."""
    # Live tokens first, so that the keys are cut behind the longest image.
    order = mask.detach().argsort(dim=1, descending=True, stable=True)  # (B, N)
    in_order = [take_tokens(t, order) for t in (q, k, v)]
    size, mask = size.gather(1, order), mask.gather(1, order)
    out, importance = MaskedAttention.apply(*in_order, size, mask)
    back = order.argsort(dim=1)
    return take_tokens(out, back), importance.gather(1, back)


def take_tokens(t, order):
    """t (B, H, N, D), order (B, N) -> t with its tokens in this order."""
    B, H, N, D = t.shape
    rows = order + N * torch.arange(B, device=order.device)[:, None]  # (B, N)
    flat = t.transpose(1, 2).reshape(B * N, H * D).index_select(0, rows.flatten())
    return flat.view(B, N, H, D).transpose(1, 2)


def parts_of(counts, device):
    """Which images are taken at once: on a CPU one for each thread, elsewhere all.

    counts: live tokens of each image -> [(images, tokens of the shortest, and of the longest)].
    """
    step = torch.get_num_threads() if device.type == "cpu" else len(counts)
    starts = range(0, len(counts), step)
    return [
        (slice(i, i + step), min(counts[i : i + step]), max(counts[i : i + step])) for i in starts
    ]


def attend(q, k, v, size, mask):
    """Values of masked_attention for M queries and the first N keys; the other keys are dead.

    q (B, H, M, D), k, v (B, H, N, D), size, mask (B, N) -> out (B, H, M, D), importance (B, N),
    attn (B, H, M, N), log_sum (B, H, M, 1): attn = exp(logits - log_sum).
    """
    N = k.shape[2]
    logits = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float()  # (B, H, M, N)
    logits += (size * mask).log()[:, None, None]
    largest = logits.amax(-1, keepdim=True)  # (B, H, M, 1)
    attn = torch.softmax(logits, -1, out=logits)
    query_weight = (mask / mask.sum(1, keepdim=True))[:, None, None] / q.shape[1]  # (B, 1, 1, N)
    with torch.autocast(q.device.type, enabled=False):
        importance = (query_weight @ attn[:, :, :N]).sum((1, 2))  # (B, N)
    log_sum = largest - attn.amax(-1, keepdim=True).log()
    return attn.to(v.dtype) @ v, importance, attn, log_sum


def attend_backward(q, k, v, size, mask, out, attn, log_sum, d_out, d_importance, first):
    """The gradient of attend, that of the mask included.

    The mask is a factor, so a dead token has a gradient too: what it would add.

        d attn_ij / d m_n = ratio_in ((n = j) - attn_ij)
        ratio_in = s_n exp(q_i k_n) / sum_l m_l s_l exp(q_i k_l), at most 1

    M tokens an image: before `first` all are alive in every image, from N on all are dead.

    q, k, v, out (B, H, M, D), size, mask (B, M), attn (B, H, M, N), log_sum (B, H, M, 1),
    d_out (B, H, M, D), d_importance (B, M)
    -> d_q, d_k, d_v (B, H, N, D), d_size (B, N), of the first N tokens, and d_mask (B, M).
    """
    H, D, N = q.shape[1], q.shape[3], attn.shape[3]
    count = mask.sum(1, keepdim=True)  # (B, 1)
    # What each query adds to the loss by its part in the importance.
    seen = attn @ d_importance[:, None, :N, None]  # (B, H, M, 1)
    q, d_out, attn = q[:, :, :N] * D**-0.5, d_out[:, :, :N], attn[:, :, :N]

    # d loss / d attn_ij = d_out_i v_j + m_i d_importance_j / (count H): a product of D + 1 columns.
    live = mask[:, None, :N, None]  # (B, 1, N, 1)
    each = (d_importance / (count * H))[:, None, :, None]  # (B, 1, M, 1)
    left = torch.cat([d_out, live.expand(-1, H, -1, -1).to(q.dtype)], -1)  # (B, H, N, D + 1)
    right = torch.cat([v, each.expand(-1, H, -1, -1).to(q.dtype)], -1)  # (B, H, M, D + 1)
    # Softmax takes off the mean of each row.
    row_mean = (d_out.float() * out[:, :, :N]).sum(-1, keepdim=True)  # (B, H, N, 1)
    row_mean = row_mean + live / (count * H)[:, None, None] * seen[:, :, :N]
    d_attn = (left @ right.transpose(-2, -1)).float().sub_(row_mean)  # (B, H, N, M)
    d_logits = attn * d_attn[..., :N]  # (B, H, N, N)
    d_log_weight = d_logits.sum((1, 2))  # (B, N), d loss / d log(m_j s_j)

    # The mask of the dead, behind `first`. That of the live has a ratio equal to attn.
    ratio = (q @ k[:, :, first:].transpose(-2, -1)).float()  # (B, H, N, M - first)
    ratio.add_(size[:, None, None, first:].log()).sub_(log_sum[:, :, :N]).clamp_(max=0).exp_()
    d_mask = torch.zeros_like(mask)  # (B, M)
    d_mask[:, first:] = (ratio * d_attn[..., first:]).sum((1, 2))
    d_mask.masked_fill_(mask > 0, 0)
    d_mask[:, :N] += d_log_weight
    gained = seen.mean((1, 3))  # (B, M)
    d_mask += (gained - (mask * gained).sum(1, keepdim=True) / count) / count

    d_logits = d_logits.to(q.dtype)
    d_q = d_logits @ k[:, :, :N] * D**-0.5
    d_k = d_logits.transpose(-2, -1) @ q
    d_v = attn.to(d_out.dtype).transpose(-2, -1) @ d_out
    return d_q, d_k, d_v, d_log_weight / size[:, :N], d_mask


class MaskedAttention(torch.autograd.Function):
    """attend, with its gradient, a part of the batch at a time. Live tokens come first.

    d_out must be 0 for the dead. It is, because nothing attends to them, merges with them or reads
    them.
    """

    @staticmethod
    def forward(ctx, q, k, v, size, mask):
        """q, k, v (B, H, N, D), size, mask (B, N) -> out (B, H, N, D), importance (B, N)."""
        ctx.parts = parts_of((mask > 0).sum(1).tolist(), mask.device)
        B, H, N, D = q.shape
        out, importance = q.new_empty(B, N, H, D).transpose(1, 2), torch.zeros_like(size)
        kept = []
        for images, _, n in ctx.parts:
            keys, values = k[images, :, :n], v[images, :, :n]
            found = attend(q[images], keys, values, size[images, :n], mask[images, :n])
            out[images], importance[images, :n] = found[:2]
            kept += found[2:]
        ctx.save_for_backward(q, k, v, size, mask, out, *kept)
        return out, importance

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_importance):
        *inputs, out = ctx.saved_tensors[:6]
        kept = ctx.saved_tensors[6:]
        grads = [torch.zeros_like(t) for t in inputs]
        parts = zip(ctx.parts, kept[0::2], kept[1::2], strict=True)
        for (images, first, n), attn, log_sum in parts:
            part = [t[images] for t in (*inputs, out)]
            d_part = d_out[images], d_importance[images]
            *d_qkv, d_size, d_mask = attend_backward(*part, attn, log_sum, *d_part, first)
            for grad, found in zip(grads[:3], d_qkv, strict=True):
                grad[images, :, :n] = found
            grads[3][images, :n], grads[4][images] = d_size, d_mask
        return tuple(grads)
