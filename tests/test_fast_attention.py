"""extras/fast_attention.py: the attentions of ltmp.py, values and gradients."""

import sys
from types import SimpleNamespace

import pytest
import torch

import extras
import ltmp
from extras import fast_attention


@pytest.fixture(params=[1, 2, 1000])
def images_at_once(request, monkeypatch):
    """Attention takes one image at a time, two, and all together as on a GPU."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def random_inputs(counts, sharpness=1.0, N=9, D=4):
    torch.manual_seed(0)
    B, H = len(counts), 2
    q, k, v = (scale * torch.randn(B, H, N, D) for scale in (2 * sharpness, sharpness, 1))
    mask = (torch.rand(B, N).argsort(1) < torch.tensor(counts)[:, None]).float()
    return q, k, v, torch.randint(1, 5, (B, N)).float(), mask


def results(attention, inputs):
    """out, importance and the gradients of a loss that dead rows of out have no part in."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    out, importance = attention.masked_attention(*inputs)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator) * inputs[4].detach()[:, None, :, None]
    other = torch.randn(importance.shape, generator=generator)
    loss = (out.float() * weight).sum() + (importance * other).sum()
    return [out.detach(), importance.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("counts", [[9, 5, 2, 1], [7, 6, 6, 4], [1, 1, 1, 1], [9, 9, 9, 9]])
def test_training_equals_the_plain_formula(images_at_once, sharpness, counts):
    inputs = random_inputs(counts, sharpness)
    plain, fast = results(ltmp, inputs), results(fast_attention, inputs)
    for i, (wanted, found) in enumerate(zip(plain, fast, strict=True)):
        scale = max(wanted.abs().max().item(), 1e-6)
        torch.testing.assert_close(found, wanted, rtol=0, atol=(1e-5 if i < 2 else 1e-4) * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_about_float32(images_at_once, dtype):
    inputs = random_inputs([40, 31, 12, 1], N=40, D=16)
    half = [t.to(dtype) if i < 3 else t for i, t in enumerate(inputs)]
    exact = results(fast_attention, [t.float() for t in half])
    for wanted, found in zip(exact, results(fast_attention, half), strict=True):
        atol = 16 * torch.finfo(dtype).eps * max(wanted.abs().max().item(), 1e-3)
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("counts", [[40, 1, 17], [5, 5], [1]])
@pytest.mark.parametrize("name", ["ragged_attention", "padded_attention"])
def test_inference_equals_the_plain_one(name, counts):
    torch.manual_seed(0)
    counts = torch.tensor(counts)
    qkv, size = torch.randn(int(counts.sum()), 3, 2, 8), 1.0 + torch.randint(9, (counts.sum(),))
    live = torch.arange(counts.max()) < counts[:, None]
    wanted = ltmp.ragged_attention(qkv, size, live)
    for found, plain in zip(getattr(fast_attention, name)(qkv, size, live), wanted, strict=True):
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("method", ["ltmp", "ltm", "ltp", "ltpm"])
def test_a_whole_model_has_the_same_gradients(images_at_once, method):
    torch.manual_seed(0)
    config = ltmp.ViTConfig(12, 2, 32, 4, 2, 5)
    plain = ltmp.LTMPViT(config, method)
    fast = ltmp.LTMPViT(config, method, attention=fast_attention)
    for name, p in plain.named_parameters():
        if name.endswith("merge_masker.threshold"):
            p.data.fill_(0.95)
        elif name.endswith("prune_masker.threshold"):
            p.data.fill_(0.6 / config.num_tokens)
        elif "qkv.weight" in name:
            p.data = torch.randn_like(p) / 4
    fast.load_state_dict(plain.state_dict())
    images = torch.randn(3, 3, 12, 12)
    for model in (plain, fast):
        logits, kept = model(images)
        assert (kept[-1] < config.num_tokens).any()
        (logits.square().sum() + kept.sum() / 100).backward()
    for (name, p), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        if p.grad is not None:
            scale = p.grad.abs().max().item()
            atol = 1e-4 * scale + 1e-7
            torch.testing.assert_close(other.grad, p.grad, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({}, "kernel"),
        ({"dtype": torch.float64}, "padded"),
        ({"shape": (9, 3, 2, 192)}, "padded"),
        ({"requires_grad": True}, "padded"),
        ({"device": torch.device("mps"), "is_cuda": False}, "padded"),
    ],
)
def test_the_kernel_runs_where_it_can(monkeypatch, changes, wanted):
    def named(name):
        return lambda *inputs: name

    monkeypatch.setattr(fast_attention, "gpu_attention", lambda device: named("kernel"))
    monkeypatch.setattr(fast_attention, "padded_attention", named("padded"))
    qkv = {"device": torch.device("cuda"), "is_cuda": True, "requires_grad": False}
    qkv |= {"dtype": torch.bfloat16, "shape": (9, 3, 2, 64)} | changes
    assert fast_attention.ragged_attention(SimpleNamespace(**qkv), None, None) == wanted


def test_where_triton_cannot_compile_attention_goes_by_padding(monkeypatch):
    def compile_nothing(qkv, size, live):
        assert qkv.shape == (1, 3, 1, 16) and size.shape == (1,) and live.tolist() == [[True]]
        raise RuntimeError("Failed to find C compiler")

    broken = SimpleNamespace(ragged_attention=compile_nothing)
    monkeypatch.setattr(extras, "triton_attention", broken, raising=False)
    monkeypatch.setitem(sys.modules, "extras.triton_attention", broken)
    choose = fast_attention.gpu_attention.__wrapped__
    with pytest.warns(UserWarning, match="slower: no Triton kernel: Failed to find C compiler"):
        assert choose("cpu") is fast_attention.padded_attention
    broken.ragged_attention = lambda qkv, size, live: None
    assert choose("cpu") is broken.ragged_attention
