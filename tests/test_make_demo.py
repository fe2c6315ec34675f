"""experiments/make_demo.py: the embedded data, and a small ViT from scratch that can be resumed."""

import gzip
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import ltmp
from experiments import make_demo
from extras import batching, runtime, splits
from extras.fashion_mnist import FashionMNIST


@pytest.fixture
def small(monkeypatch):
    """The demo's ViT, but with 16 patches in place of 196, and two blocks."""
    config = replace(ltmp.VARIANTS["demo"], patch_size=7, dim=32, depth=2)
    monkeypatch.setitem(ltmp.VARIANTS, "demo", config)


def train(out, *flags):
    """Train on the embedded data; returns the weights that were written."""
    make_demo.main(["vit", "--out", str(out), "--epochs", "1", "-b", "250", *flags])
    return torch.load(out / "vit_demo.pth", weights_only=True)


def refusal(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        make_demo.main(list(map(str, flags)))
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


# --------------------------------------------------------------------------------------------------
# The data


def test_embedded_data_is_the_first_of_each_class_in_their_order(tmp_path, capsys):
    rng = np.random.default_rng(0)
    full = {}
    for split, count in (("train", 4000), ("t10k", 3000)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        for name, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            content = gzip.compress(bytes(header) + values.tobytes(), 1)
            (tmp_path / f"{split}-{name}-ubyte.gz").write_bytes(content)
        full[split] = images, labels
    make_demo.main(["data", str(tmp_path), "--out", str(tmp_path / "embedded.npz")])
    for split, source, per_class in (("train", "train", 300), ("test", "t10k", 200)):
        found = FashionMNIST(tmp_path / "embedded.npz", split)
        images, labels = full[source]
        assert np.bincount(found.labels).tolist() == [per_class] * 10
        for label in range(10):
            expected = images[labels == label][:per_class]
            assert np.array_equal(found.images[found.labels == label], expected)
        # An image is its own name: all are different.
        place = {image.tobytes(): i for i, image in enumerate(images)}
        places = [place[image.tobytes()] for image in found.images]
        assert places == sorted(places)
    assert "3000 and 2000 images" in capsys.readouterr().out


def test_data_that_is_not_there_is_one_line(tmp_path, capsys):
    assert f"cannot read {tmp_path}" in refusal(capsys, "data", tmp_path)
    assert "cannot read" in refusal(capsys, "vit", "--data", tmp_path, "--out", tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# The ViT


def test_patch_dropout_keeps_the_class_token_and_a_random_share_of_the_patches():
    config = ltmp.ViTConfig(8, 2, dim=8, depth=1, heads=2, num_classes=3)
    model = ltmp.LTMPViT(config, "dense")
    images = torch.randn(3, 3, 8, 8)
    whole = model.embed(images, drop=True)
    torch.manual_seed(0)
    few = make_demo.drop_patches(whole, 0.75)
    assert few.rows.tolist() == torch.arange(15).view(3, 5).tolist() and few.live.all()
    patches = set()
    for before, after in zip(whole.x.view(3, 17, 8), few.x.view(3, 5, 8), strict=True):
        place = (after[:, None] == before).all(2).float().argmax(1).tolist()
        assert torch.equal(before[place], after) and place[0] == 0 and len(set(place)) == 5
        patches.add(tuple(place))
    assert len(patches) == 3


def test_without_patch_dropout_training_sees_the_model_that_inference_runs():
    model = ltmp.create_model("demo", "dense", depth=2)
    images = torch.randn(2, 3, 28, 28)
    difference = make_demo.forward(model, images, 0.0) - model(images)[0]
    assert difference.abs().max() < 1e-5
    assert (make_demo.forward(model, images, 0.5) - model(images)[0]).abs().max() > 1e-3


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [make_demo.learning_rate(step, 200, 2.0) for step in range(201)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == max(rates) == pytest.approx(2.0, rel=0.01)
    assert rates[100] == pytest.approx(1.0) and rates[200] == 0


def test_the_vit_learns_from_every_image_and_is_written_in_half_precision(
    small, tmp_path, monkeypatch
):
    forward, seen, shares = make_demo.forward, set(), []

    def recorded(model, images, patch_drop):
        seen.update(image.numpy().tobytes() for image in images)
        shares.append(patch_drop)
        return forward(model, images, patch_drop)

    monkeypatch.setattr(make_demo, "forward", recorded)
    state = train(tmp_path, "-b", "50", "--lr", "5e-3", "--patch-drop", "0.3")
    assert len(seen) == 3000 and shares == [0.3] * 45 + [0] * 15
    assert all(value.dtype == torch.float16 for value in state.values())
    model = ltmp.load_weights(ltmp.create_model("demo", "dense"), tmp_path / "vit_demo.pth").eval()
    config = model.config
    clean = data.eval_transform(config.image_size, config.crop_pct, config.mean, config.std)
    test_set = batching.subset(splits.open_split(None, "val", clean), 500)
    images, labels = torch.utils.data.default_collate([test_set[i] for i in range(500)])
    with torch.no_grad():
        hits = model(images)[0].argmax(1) == labels
    assert hits.float().mean() > 0.45


def test_training_starts_from_the_weights_that_are_given(small, tmp_path):
    first = train(tmp_path / "first")
    path = str(tmp_path / "first" / "vit_demo.pth")
    again = train(tmp_path / "again", "--weights", path, "--lr", "0")
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_an_interrupted_run_ends_as_one_that_was_not(small, tmp_path, monkeypatch, capsys):
    expected = train(tmp_path / "whole")

    def interrupt(progress, text, done, total):
        if done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.Progress, "show", interrupt)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "cut")
    assert stopped.value.code == 130 and not (tmp_path / "cut" / "vit_demo.pth").exists()
    assert "stopped after step 5 of 12" in capsys.readouterr().err
    found = train(tmp_path / "cut", "--resume")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(small, tmp_path, capsys):
    flags = ["vit", "--out", tmp_path]
    assert "nothing to resume" in refusal(capsys, *flags, "--resume")
    train(tmp_path)
    capsys.readouterr()
    assert "holds a run" in refusal(capsys, *flags)
    line = refusal(capsys, *flags, "--epochs", 1, "-b", 250, "--lr", 1, "--resume")
    assert "made with lr = 0.002, not 1.0" in line
    (tmp_path / "last.pt").write_bytes(b"no run")
    assert "last.pt" in refusal(capsys, *flags, "--resume")


@pytest.mark.parametrize(
    "flags, named",
    [
        ([], "command"),
        (["data"], "folder"),
        (["vit", "--patch-drop", "1"], "--patch-drop"),
        (["vit", "--lr", "-1"], "--lr"),
        (["vit", "-b", "0"], "--batch-size"),
    ],
)
def test_wrong_flags_are_one_line(capsys, flags, named):
    assert named in refusal(capsys, *flags)


def test_a_loss_that_is_not_finite_stops_before_it_is_learned_from(small, tmp_path, monkeypatch):
    def broken(model, images, patch_drop):
        return model(images)[0] * float("nan")

    monkeypatch.setattr(make_demo, "forward", broken)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert stopped.value.code == 1 and saved["step"] == 0
    assert all(value.isfinite().all() for value in saved["model"].values())
