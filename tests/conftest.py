"""What several test files share: models of a few tokens, and folders of images."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import ltmp
from extras import runtime

# Without a GPU Triton's kernels run in its interpreter. Triton looks when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# 17 tokens.
TINY = ltmp.ViTConfig(image_size=28, patch_size=7, dim=16, depth=2, heads=2, num_classes=10)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Programs run on a CPU by default, whatever there is: numbers are compared to the last bit."""
    monkeypatch.setattr(runtime, "DEVICE", "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: small models are fastest so, and forked workers cannot wait for others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch):
    """The model named tiny, in this test alone."""
    monkeypatch.setitem(ltmp.VARIANTS, "tiny", TINY)


@pytest.fixture
def spread_model():
    """A function (seed, method, **changes) -> a model whose scores differ between tokens."""

    def make(seed, method, **changes):
        config = {"image_size": 14, "patch_size": 2, "dim": 32, "depth": 6, "heads": 2}
        config |= {"num_classes": 10} | changes
        model = ltmp.LTMPViT(ltmp.ViTConfig(**config), method)
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.data = 0.1 * torch.randn(p.shape, generator=generator)
            elif "threshold" not in name and p.dim() > 1:
                scale = (1.5 if "qkv" in name else 1) * p[0].numel() ** -0.5
                p.data = scale * torch.randn(p.shape, generator=generator)
        return model.eval()

    return make


@pytest.fixture
def image_folder():
    """A function that makes train/ and val/ with noise images of each class; returns the root."""

    def make(root, classes=("a", "b"), per_class=4, size=(28, 28), suffix=".png"):
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            for name in classes:
                (root / split / name).mkdir(parents=True, exist_ok=True)
                for i in range(per_class):
                    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
                    Image.fromarray(pixels).save(root / split / name / f"{i}{suffix}")
        return root

    return make
