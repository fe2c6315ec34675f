"""extras/triton_attention.py: the kernel, run on a CPU by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ltmp
from extras import fast_attention

pytest.importorskip("triton", reason="needs triton, which torch's CUDA wheels bring on Linux")
kernel = pytest.importorskip("extras.triton_attention")


def random_inputs(counts, H, D, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(counts))
    T = sum(counts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv = 2 * torch.randn(T, 3, H, D, generator=generator)
    size = torch.randint(1, 200, (T,), generator=generator).float()
    live = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return qkv.to(device, dtype), size.to(device), live.to(device)


@pytest.mark.parametrize("D", [16, 24, 32, 64, 128])
@pytest.mark.parametrize("counts", [[1], [64, 65, 63], [130, 1, 17]])
def test_it_is_the_plain_attention(counts, D):
    inputs = random_inputs(counts, 2, D)
    out, importance = kernel.ragged_attention(*inputs)
    wanted_out, wanted_importance = ltmp.ragged_attention(*inputs)
    torch.testing.assert_close(out, wanted_out, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(importance, wanted_importance, atol=1e-6, rtol=1e-5)


def test_many_tokens_and_a_huge_size():
    qkv, size, live = random_inputs([600, 1], 1, 16)
    size[3] = 1e30
    for found, wanted in zip(
        kernel.ragged_attention(qkv, size, live),
        ltmp.ragged_attention(qkv, size, live),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_about_float32(dtype):
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    qkv, size, live = random_inputs([70, 9], 2, 32, dtype)
    out, importance = kernel.ragged_attention(qkv, size, live)
    wanted_out, wanted_importance = ltmp.ragged_attention(qkv.float(), size, live)
    assert out.dtype == dtype and importance.dtype == torch.float32
    atol = 4 * torch.finfo(dtype).eps * wanted_out.abs().max().item()
    torch.testing.assert_close(out.float(), wanted_out, atol=atol, rtol=0)
    torch.testing.assert_close(importance, wanted_importance, atol=1e-3, rtol=1e-2)


def test_a_model_computes_the_same_with_it(spread_model):
    model = spread_model(0, "ltmp")
    images = torch.randn(3, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        block.merge_masker.threshold.data.fill_(0.6)
        block.prune_masker.threshold.data.fill_(0.01)
    # TF32, of a GPU's convolutions, is coarser than what is compared.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=False):
        logits, kept = model(images)
        model.attention.ragged_attention = kernel.ragged_attention
        if torch.cuda.is_available():
            model, images = model.cuda(), images.cuda()
        found, found_kept = model(images)
    assert kept[-1].max() < kept[0].max()
    assert torch.equal(found_kept.cpu(), kept)
    torch.testing.assert_close(found.cpu(), logits, atol=1e-5, rtol=1e-5)


# Compute capability -> bytes of shared memory that a program can have there.
SHARED = {75: 65536, 80: 166912, 86: 101376, 90: 232448}
COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from extras.triton_attention import FULL, HALF, QUERIES, attention_kernel

capability, dtype, D = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
options = dict(FULL if dtype == "fp32" else HALF)
constants = {"H": 6, "D": D, "D2": D, "M": QUERIES, "N": options.pop("N")}
types = dict.fromkeys(("qkv", "out"), f"*{dtype}") | dict.fromkeys(("size", "given"), "*fp32")
types |= dict.fromkeys(("count", "end"), "*i64") | {"T": "i32", "scale": "fp32"}
types |= dict.fromkeys(constants, "constexpr")
names = attention_kernel.arg_names
places = {(names.index(name),): value for name, value in constants.items()}
source = ASTSource(attention_kernel, {name: types[name] for name in names}, places)
print(compile(source, GPUTarget("cuda", capability, 32), options).metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("target", ["75 fp16", "80 bf16", "86 fp32", "90 bf16"])
def test_it_compiles_for_gpus_and_fits_their_memory(target, D, tmp_path):
    command = [sys.executable, "-c", COMPILE, *target.split(), str(D)]
    changes = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(kernel.__file__).parent.parent
    found = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | changes, cwd=root, check=False
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) <= SHARED[int(target.split()[0])]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_fast_attention_is_this_kernel():
    inputs = random_inputs([70, 9], 2, 32)
    for found, wanted in zip(
        fast_attention.ragged_attention(*inputs), kernel.ragged_attention(*inputs), strict=True
    ):
        assert torch.equal(found, wanted)
