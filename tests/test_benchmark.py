"""experiments/benchmark.py: like is compared with like, and what is timed is what is said."""

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import ltmp
from experiments import benchmark
from extras import fast_attention, landing, runtime

SMALL = ["--weights", "none", "--workers", "0", "--repeats", "1"]
SHARED = [*SMALL, "--share", "0.25"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The demo's ViT, but with 49 patches in place of 196, and two blocks."""
    config = replace(ltmp.VARIANTS["demo"], patch_size=4, dim=32, depth=2)
    monkeypatch.setitem(ltmp.VARIANTS, "demo", config)


@pytest.fixture
def compared(monkeypatch):
    """The arguments of each call of benchmark.benchmark."""
    calls = []
    original = benchmark.benchmark

    def spy(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(benchmark, "benchmark", spy)
    return calls


def refusal(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(list(flags))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()


def dense_model():
    return ltmp.create_model("demo", "dense").eval()


# --------------------------------------------------------------------------------------------------
# The table


def test_every_execution_has_a_row(tmp_path, capsys):
    path = tmp_path / "rows.json"
    benchmark.main([*SHARED, "--batch-sizes", "1", "3", "--json", str(path)])
    found = json.loads(path.read_text())
    rows = found["rows"]
    executions = ("dense", "cut", "reduced", "plain")
    runs = [("inference", count, run) for count in (1, 3) for run in executions]
    runs += [("training", 16, run) for run in ("dense", "reduced", "plain")]
    assert [(row["what"], row["images"], row["run"]) for row in rows] == runs
    for row in rows[:8]:
        dense = rows[0] if row["images"] == 1 else rows[4]
        assert row["speed-up"] == pytest.approx(dense["ms"] / row["ms"])
        assert row["efficiency"] == pytest.approx(row["speed-up"] * row["r"])
        assert row["r"] == 1 if row is dense else 0.2 < row["r"] < 0.9
    assert [row["r"] for row in rows[8:]] == [1, None, None]

    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}, device cpu, threads {torch.get_num_threads()}" in lines[0]
    assert ["agree: 16 images within" in line for line in lines[1:4]] == [True, True, False]
    assert len(lines) == 4 + len(rows)


def test_compiled_models_have_rows_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    monkeypatch.setattr(benchmark, "compile_blocks", copy.deepcopy)
    path = tmp_path / "rows.json"
    benchmark.main([*SHARED, "--batch-sizes", "1", "--compile", "--json", str(path)])
    dense, _, reduced, _, *both = json.loads(path.read_text())["rows"][:6]
    assert [row["run"] for row in both] == ["dense compiled", "reduced compiled"]
    assert [row["r"] for row in both] == [dense["r"], reduced["r"]]
    assert "reduced, compiled and not agree" in capsys.readouterr().out


def test_a_failed_compilation_is_one_line(monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(benchmark, "compile_blocks", copy.deepcopy)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: SimpleNamespace(eval=lambda: fail))
    lines = refusal(capsys, *SHARED, "--compile")
    assert len(lines) == 1 and "torch.compile failed: no C++ compiler" in lines[0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_blocks_are_the_same_function():
    model, images = ltmp.create_model("demo").eval(), torch.randn(3, 3, 28, 28)
    logits = benchmark.infer(benchmark.compile_blocks(model), images)[0]
    torch.testing.assert_close(logits, benchmark.infer(model, images)[0], atol=1e-5, rtol=1e-5)


def test_a_fixed_count_has_no_thresholds_to_train(tmp_path):
    path = tmp_path / "rows.json"
    flags = ["--method", "tome", "--r", "8", "--batch-sizes", "2", "--json", str(path)]
    benchmark.main([*SMALL, *flags])
    assert {row["what"] for row in json.loads(path.read_text())["rows"]} == {"inference"}


def test_share_is_what_each_threshold_removes(compared):
    benchmark.main([*SHARED, "--batch-sizes", "1"])
    model, images, _ = compared[0]
    shares, _ = landing.shares_of(model, images)
    assert len(shares) == 4 and list(shares.values()) == pytest.approx([0.25] * 4, abs=0.01)


def test_the_training_step_is_that_of_the_thresholds(compared):
    benchmark.main([*SHARED, "--batch-sizes", "1"])
    with_gradient = {name for name, p in compared[0][0].named_parameters() if p.grad is not None}
    steps = [f"blocks.{i}.{step}_masker.threshold" for i in (0, 1) for step in ("merge", "prune")]
    assert with_gradient == set(steps)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "dense"], "--method dense has nothing to compare"),
        (["--share", "0.1", "--method", "tome"], "--share places thresholds itself"),
        (["--share", "0.1", "--thresholds", "file"], "--share places thresholds itself"),
        (["--share", "2"], "2 is not above 0 and at most 1"),
        (["--batch-sizes", "0"], "0 is no whole number from 1 on"),
        (["--method", "tome"], "--method tome needs --r"),
    ],
)
def test_wrong_flags_are_one_line(capsys, flags, message):
    lines = refusal(capsys, *SMALL, *flags)
    assert len(lines) == 1 and message in lines[0]


# --------------------------------------------------------------------------------------------------
# What is timed


def test_cut_is_dense_where_nothing_is_cut():
    model, images = dense_model(), torch.randn(3, 3, 28, 28)
    logits = benchmark.infer_cut(model, images, [50, 50])
    torch.testing.assert_close(logits, benchmark.infer(model, images)[0])


def test_cut_goes_on_with_the_first_tokens_of_each_image():
    model, images = dense_model(), torch.randn(3, 3, 28, 28)
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda mlp, inputs, out: seen.append(inputs[0]))
    benchmark.infer_cut(model, images, [20, 7])
    assert [len(x) for x in seen] == [60, 21]
    benchmark.infer(model, images)
    # In the first block attention has seen all tokens.
    whole = seen[2].view(3, 50, -1)[:, :20].flatten(0, 1)
    torch.testing.assert_close(seen[0], whole)


def test_cut_has_as_many_tokens_as_reduced_keeps(monkeypatch, compared):
    cuts = []
    original = benchmark.infer_cut

    def spy(dense, images, counts, amp):
        cuts.append((images, counts))
        return original(dense, images, counts, amp)

    monkeypatch.setattr(benchmark, "infer_cut", spy)
    benchmark.main([*SHARED, "--batch-sizes", "5"])
    images, counts = cuts[0]
    kept = benchmark.infer(compared[0][0], images)[1].mean(1)
    assert len(images) == 5 and counts == pytest.approx(kept.tolist(), abs=0.5)


@pytest.mark.parametrize("name", ["ragged_attention", "masked_attention"])
def test_nothing_is_timed_where_fast_attention_is_another_function(monkeypatch, capsys, name):
    original = getattr(fast_attention, name)

    def wrong(*args):
        out, importance = original(*args)
        return 1.01 * out, importance

    monkeypatch.setattr(fast_attention, name, wrong)
    lines = refusal(capsys, *SHARED)
    assert len(lines) == 1 and "fast and plain differ: by" in lines[0]


def test_single_images_may_differ(capsys):
    logits = torch.ones(3, 5)
    benchmark.check_same("they", logits, logits + torch.tensor([[0.0], [0.1], [1e-5]]))
    assert capsys.readouterr().out == (
        "they agree: 2 images within 1e-05 of the largest logit; 1 others by up to 1e-01\n"
    )
    with pytest.raises(ValueError, match="they differ: by 0.1 of the largest logit"):
        benchmark.check_same("they", logits, logits + torch.tensor([[0.0], [0.1], [0.1]]))


def test_images_are_repeated_where_there_are_too_few():
    args = runtime.command_line("").parse_args(["--workers", "0"])
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    dataset = [(image, 0) for image in images]
    found = benchmark.load_images(dataset, 7, args, torch.device("cpu"))
    assert found[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_peak_memory_is_that_of_the_run(monkeypatch):
    def allocate():
        torch.ones(64, 2**18)

    found = benchmark.peak_memory(allocate, torch.device("cpu"))
    if found is None:
        pytest.skip("this system does not tell the peak")
    assert 60 < found < 80

    def no_library(name):
        raise OSError

    monkeypatch.setattr(benchmark.ctypes, "CDLL", no_library)
    assert benchmark.peak_memory(allocate, torch.device("cpu")) is None
