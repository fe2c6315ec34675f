"""ltmp.ragged_attention as one kernel for NVIDIA GPUs, in Triton.

Triton comes with torch's CUDA wheels on Linux. TRITON_INTERPRET=1 runs the kernel on a CPU.

It takes float32 and half precision, and heads of at most 128 channels.

Each program takes 64 queries of one head of one image. A first loop over the keys finds the output
and the log of the sum of exp(logits), as in FlashAttention (arXiv 2205.14135). A second loop knows
that sum, and adds up the attention that each key gets. Logits never leave the chip.
"""

import torch
import triton
import triton.language as tl

# How many a program takes at once; in float32 fewer keys, as memory on the chip is small.
QUERIES = 64
HALF = {"N": 64}
FULL = {"N": 32, "num_warps": 8, "num_stages": 2}


# T, the number of all rows, differs from batch to batch: no variant of its own.
@triton.jit(do_not_specialize=["T"])
def attention_kernel(
    qkv, size, count, end, out, given, T, scale,
    H: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """qkv (T, 3, H, D), size (T,), count, end (B,) -> out (T, H, D), given (blocks, H, T).

    count: rows of each image; end: the row behind its last one. given: the part in each key's
    importance that comes from the queries of a block. D2: the power of 2 from D on.
    """
    block, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(count + image)
    if block * M >= n:
        return
    row0 = tl.load(end + image).to(tl.int64) - n
    i, j, d = block * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, D2)
    q_rows = qkv + (row0 + i)[:, None] * (3 * H * D) + head * D + d[None]
    q = tl.load(q_rows, mask=(i[:, None] < n) & (d[None] < D), other=0)  # (M, D2)

    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D2], tl.float32)
    for start in range(0, n, N):
        key = start + j
        k_rows = qkv + (row0 + key)[:, None] * (3 * H * D) + (H + head) * D + d[None]
        there = (key[:, None] < n) & (d[None] < D)
        k = tl.load(k_rows, mask=there, other=0)  # (N, D2)
        v = tl.load(k_rows + H * D, mask=there, other=0)
        bias = tl.log(tl.load(size + row0 + key, mask=key < n, other=0))
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None]  # (M, N)
        higher = tl.maximum(largest, tl.max(logits, 1))
        weight = tl.exp(logits - higher[:, None])
        shrink = tl.exp(largest - higher)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        largest = higher
    out_rows = out + (row0 + i)[:, None] * (H * D) + head * D + d[None]
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out_rows, result, mask=(i[:, None] < n) & (d[None] < D))

    log_sum = largest + tl.log(total)  # (M,)
    for start in range(0, n, N):
        key = start + j
        k_rows = qkv + (row0 + key)[:, None] * (3 * H * D) + (H + head) * D + d[None]
        k = tl.load(k_rows, mask=(key[:, None] < n) & (d[None] < D), other=0)
        bias = tl.log(tl.load(size + row0 + key, mask=key < n, other=0))
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None]
        attn = tl.where(i[:, None] < n, tl.exp(logits - log_sum[:, None]), 0.0)  # (M, N)
        to = given + (block * H + head).to(tl.int64) * T + row0 + key
        tl.store(to, tl.sum(attn, 0) / (H * n), mask=key < n)


def ragged_attention(qkv, size, live):
    """ltmp.ragged_attention: qkv (T, 3, H, D), size (T,), live (B, N) -> (T, H, D), (T,) float32.

    The sums have a fixed order, so the same input gives the same output to the last bit.
    """
    T, _, H, D = qkv.shape
    counts = live.sum(1)  # (B,)
    blocks = triton.cdiv(live.shape[1], QUERIES)
    out = qkv.new_empty(T, H, D)
    given = torch.zeros(blocks, H, T, dtype=torch.float32, device=qkv.device)
    grid = (blocks, H, len(counts))
    D2 = max(16, triton.next_power_of_2(D))
    tensors = qkv.contiguous(), size, counts, counts.cumsum(0), out, given
    settings = FULL if qkv.dtype == torch.float32 else HALF
    # Triton launches on the current GPU, whichever holds the tensors.
    with torch.cuda.device_of(qkv):
        attention_kernel[grid](*tensors, T, D**-0.5, H=H, D=D, D2=D2, M=QUERIES, **settings)
    return out, given.sum((0, 1))
