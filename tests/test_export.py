"""experiments/export.py: an ONNX file does what the model does, image after image."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

import ltmp
from experiments import benchmark, export
from extras import models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

METHODS = ["ltm", "ltp", "ltpm", "tome", "topk"]
# Two blocks, so that the second meets what the first left.
SHAPE = {"image_size": 14, "patch_size": 2, "dim": 32, "depth": 2, "heads": 2, "num_classes": 10}


def need(*packages):
    for package in packages or ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def run_all(model, images):
    """What ONNX Runtime gives for each of the images: logits (B, classes), kept (depth, B)."""
    run = export.open_session(export.to_onnx(model, {}))
    outputs = [run(image[None]) for image in images]
    logits = torch.cat([torch.from_numpy(logits) for logits, _ in outputs])
    return logits, torch.stack([torch.from_numpy(kept) for _, kept in outputs], 1)


def refusal(capsys, code, *flags):
    with pytest.raises(SystemExit) as stopped:
        export.main(["--out", "never.onnx", "--workers", "0", *flags])
    assert stopped.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --------------------------------------------------------------------------------------------------
# The same function


@pytest.mark.parametrize(
    "method", ["ltmp", *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS)]
)
def test_a_file_gives_what_the_model_gives(spread_model, method):
    need()
    model = spread_model(0, "ltmp", **SHAPE)
    images = torch.randn(20, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    images *= torch.linspace(0.2, 3, 20)[:, None, None, None]
    r = 7 if method in ("tome", "topk") else None
    model = ltmp.load_weights(ltmp.LTMPViT(model.config, method, r=r), model.state_dict())
    for block in model.blocks:
        if method in ("ltmp", "ltm", "ltpm"):
            torch.nn.init.constant_(block.merge_masker.threshold, 0.6)
        if method in ("ltmp", "ltp", "ltpm"):
            torch.nn.init.constant_(block.prune_masker.threshold, 0.015)
    wanted, kept = benchmark.infer(model, images)
    assert r or len(kept[-1].unique()) > 5
    logits, counts = run_all(model, images)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    assert torch.equal(counts.float(), kept)


@pytest.mark.slow
def test_nothing_merges_and_the_class_token_alone_is_left(spread_model):
    need()
    model = spread_model(0, "ltmp", **SHAPE)
    for masker in (model.blocks[0].merge_masker, model.blocks[0].prune_masker):
        torch.nn.init.ones_(masker.threshold)
    images = torch.randn(1, 3, 14, 14)
    logits, counts = run_all(model, images)
    torch.testing.assert_close(logits, benchmark.infer(model, images)[0], rtol=0, atol=1e-4)
    assert counts.tolist() == [[1], [1]]


# --------------------------------------------------------------------------------------------------
# The program


@pytest.fixture
def small(monkeypatch):
    """The demo's ViT, but with fewer patches and one block."""
    config = replace(ltmp.VARIANTS["demo"], patch_size=4, dim=32, depth=1)
    monkeypatch.setitem(ltmp.VARIANTS, "demo", config)


def test_the_program_writes_what_it_checked(small, tmp_path, capsys):
    need()
    import onnx

    out = tmp_path / "model.onnx"
    thresholds = {"method": "ltmp", "merge_thresholds": [0.8], "prune_thresholds": [0.02]}
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps(thresholds))
    flags = ["--weights", "none", "--thresholds", str(path), "--image-size", "24", "--workers", "0"]
    export.main([*flags, "--with-transform", "--benchmark", "--check", "3", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert "ONNX Runtime and torch agree: 3 images" in lines[0]
    assert "the same for 3 of 3 images" in lines[1]
    assert [line.split(",")[0] for line in lines[4:]] == ["torch", "ONNX Runtime"]
    assert all("; efficiency " in line for line in lines[4:])

    found = {m.key: m.value for m in onnx.load(out).metadata_props}
    assert found["model"] == "demo" and found["method"] == "ltmp"
    loaded = json.loads(found["thresholds"])
    assert loaded["merge_thresholds"] == pytest.approx([0.8])
    assert loaded["prune_thresholds"] == pytest.approx([0.02])
    assert json.loads(found["mean"]) == [0.286] * 3 and json.loads(found["std"]) == [0.353] * 3
    assert 0 < json.loads(found["r"]) < 1
    dense = onnx.load(tmp_path / "model.dense.onnx")
    assert {m.key: m.value for m in dense.metadata_props}["r"] == "1.0"
    (image,) = dense.graph.input
    assert image.name == "image" and image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in image.type.tensor_type.shape.dim] == [1, 3, 24, 24]


def test_a_file_that_differs_is_refused(spread_model):
    model = spread_model(0, "ltmp", **SHAPE)
    images = torch.randn(3, 3, 14, 14)

    def wrong(image):
        logits, kept = benchmark.infer(model, image)
        return 1.01 * logits.numpy(), kept[:, 0].long().numpy()

    with pytest.raises(ValueError, match="ONNX Runtime and torch differ"):
        export.check(wrong, model, images)


def test_pixels_come_back_from_normalized_images():
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    image = pixels[0].permute(1, 2, 0).numpy()
    config = replace(ltmp.DEIT_S, image_size=4, patch_size=2, crop_pct=1.0)
    from PIL import Image

    normalized = models.clean_transform(config)(Image.fromarray(image))
    assert torch.equal(export.to_pixels(normalized[None], config)[0], pixels[0])


def test_a_missing_package_is_one_line(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n.startswith("onnx") else find(n)
    )
    line = refusal(capsys, 1)
    assert "onnx, onnxscript, onnxruntime missing: pip install -e '.[export]'" in line


def test_an_old_torch_is_one_line(capsys, monkeypatch):
    need()
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, f: None)
    assert "2.13 will do" in refusal(capsys, 1)
