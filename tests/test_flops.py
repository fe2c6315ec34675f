"""flops.py: DeiT-S has its published FLOPs, r is a mean over images, the table adds up."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flops
from ltmp import VARIANTS, ViTConfig

HERE = Path(__file__).parent.parent


def test_deit_small_has_4_6_gflops():
    assert flops.model_flops(VARIANTS["deit_small_patch16_224"]) / 1e9 == pytest.approx(4.6, 0.01)


def test_ratio_is_per_image_and_differentiable():
    config = ViTConfig(32, 4, 48, 4, 3, 10)
    kept = torch.tensor([[65.0, 40], [50, 30], [45, 2], [45, 1]], requires_grad=True)
    r = flops.flops_ratio(kept, config)
    dense = flops.model_flops(config)
    per_image = [flops.model_flops(config, kept[:, i].tolist()) / dense for i in (0, 1)]
    assert r.item() == pytest.approx(sum(per_image) / 2)
    # The paper's formula takes the batch's mean counts.
    assert flops.model_flops(config, kept.mean(1)) / dense < r
    r.backward()
    assert (kept.grad > 0).all()
    assert flops.flops_ratio(torch.full((4, 3), 65.0), config).item() == 1


def test_the_table_adds_up_and_refuses_nonsense():
    def table(*flags):
        command = [sys.executable, "flops.py", "demo", *flags]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True)

    lines = table("--kept", *["150"] * 6).stdout.splitlines()
    total = sum(float(line.split()[2]) for line in lines[1:-1])
    assert len(lines) == 16 and total == pytest.approx(float(lines[-1].split()[1]), abs=2)
    refused = table("--kept", "3", "3")
    assert refused.returncode == 2
    assert "demo keeps 1 to 197 tokens in each of 6 blocks; got 3 3" in refused.stderr
