"""experiments/frontier.py: every run is learned and evaluated once, and the table is right."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import flops
import ltmp
from experiments import frontier

EVALUATE = Path(frontier.__file__).parent.parent / "evaluate.py"
FLAGS = ["--weights", "none", "--workers", "0", "--limit-val", "20", "-b", "8", "--targets", "0.6"]


@pytest.fixture
def small(monkeypatch):
    """The demo's ViT, but with 16 patches in place of 196, and two blocks."""
    config = replace(ltmp.VARIANTS["demo"], patch_size=7, dim=32, depth=2)
    monkeypatch.setitem(ltmp.VARIANTS, "demo", config)


@pytest.fixture
def commands(monkeypatch):
    """The commands of train.py, which here only writes thresholds; nothing is plotted."""
    found = []

    def train(command):
        found.append(command)
        flags = dict(flag.lstrip("-").split("=", 1) for flag in command if "=" in flag)
        thresholds = {"merge_thresholds": [0.1, 0.1], "prune_thresholds": [0.01, 0.01]}
        Path(flags["out"]).mkdir(parents=True)
        path = Path(flags["out"], "thresholds.json")
        path.write_text(json.dumps({"method": flags["method"]} | thresholds))
        return 0

    monkeypatch.setattr(frontier, "ended", train)
    monkeypatch.setattr(frontier, "plot", lambda points, path: None)
    return found


def run(folder, *flags):
    frontier.main([*FLAGS, "--out", str(folder), *map(str, flags)])


def table(folder):
    """The rows of frontier.csv."""
    with open(folder / "frontier.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k == "method" else float(v) for k, v in row.items()} for row in rows]


def refusal(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def parsed(*flags):
    return frontier.parse_args([*FLAGS, "--out", "out", *flags])


# --------------------------------------------------------------------------------------------------
# The plan


def test_only_what_is_learned_is_run_for_each_seed():
    flags = ["--methods", "ltm", "topk", "--targets", "0.3", "0.6", "--seed", "4", "--seeds", "2"]
    assert frontier.planned_runs(parsed(*flags)) == [
        ("dense", 1.0, 0),
        ("topk", 0.3, 0),
        ("topk", 0.6, 0),
        ("ltm", 0.3, 4),
        ("ltm", 0.6, 4),
        ("ltm", 0.3, 5),
        ("ltm", 0.6, 5),
    ]


@pytest.mark.parametrize("method", ["tome", "topk"])
@pytest.mark.parametrize("image_size", [28, 56])
def test_a_fixed_count_is_the_one_nearest_to_the_target(method, image_size):
    config = replace(ltmp.VARIANTS["demo"], image_size=image_size, patch_size=4, dim=16, depth=3)
    images = torch.randn(1, 3, image_size, image_size)
    found = []
    for r in range(config.num_tokens // 2 + 2):
        with torch.inference_mode():
            kept = ltmp.LTMPViT(config, method, r=r).eval()(images)[1]
        found.append(flops.flops_ratio(kept, config).item())
    for target in (0.2, 0.5, 0.75, 1.0):
        nearest = min(abs(r - target) for r in found)
        assert abs(found[frontier.fixed_count(config, target)] - target) == nearest


def test_train_gets_the_flags(small, commands, tmp_path, capsys):
    flags = ["--limit-train", 9, "--no-amp", "--skip-bad-images"]
    run(tmp_path, "--methods", "ltm", "--seeds", 1, *flags)
    assert set(commands[0][2:]) == {
        "--method=ltm",
        "--target=0.6",
        "--seed=0",
        f"--out={tmp_path / 'ltm-0.6-0'}",
        "--limit-val=1",
        "--model=demo",
        "--weights=none",
        "--limit-train=9",
        "--workers=0",
        "--device=cpu",
        "--no-amp",
        "--skip-bad-images",
    }


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    commands = []

    def failing(command):
        commands.append(command)
        return 130

    monkeypatch.setattr(frontier, "ended", failing)
    for _ in range(2):
        with pytest.raises(SystemExit):
            frontier.learn("ltm", 0.6, 0, tmp_path, parsed())
        (tmp_path / "last.pt").touch()
    assert ["--resume" in command for command in commands] == [False, True]
    assert f"{tmp_path.name}: train.py ended with code 130; once" in capsys.readouterr().err


def test_ctrl_c_waits_until_the_run_has_saved(tmp_path, request):
    saved, began = tmp_path / "saved", tmp_path / "began"
    program = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(1.5); "
    program += "pathlib.Path(sys.argv[2]).touch()"

    def ctrl_c():
        while not began.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell starts what runs in the background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, before))
    threading.Thread(target=ctrl_c).start()
    with pytest.raises(KeyboardInterrupt):
        frontier.ended([sys.executable, "-c", program, str(began), str(saved)])
    assert saved.exists()


# --------------------------------------------------------------------------------------------------
# What it finds


def test_every_run_is_a_row_and_nothing_is_done_twice(small, commands, tmp_path, monkeypatch):
    calls = []
    original = ltmp.LTMPViT.forward

    def counted(model, images, drop=None):
        calls.append(model.method)
        return original(model, images, drop)

    monkeypatch.setattr(ltmp.LTMPViT, "forward", counted)
    flags = ["--methods", "ltm", "tome", "--seeds", 2]
    run(tmp_path, *flags)
    rows = table(tmp_path)
    runs = [(row["method"], row["target"], row["seed"]) for row in rows]
    assert runs == [("dense", 1.0, 0), ("tome", 0.6, 0), ("ltm", 0.6, 0), ("ltm", 0.6, 1)]
    assert [row["images"] for row in rows] == [20] * 4
    assert rows[0]["kl"] == 0 and rows[0]["r"] == 1
    assert all(row["kl"] > 0 and row["r"] < 1 for row in rows[1:])
    lines = (tmp_path / "frontier.csv").read_text().splitlines()
    assert lines[0] == "method,target,seed,r,top1,top5,kl,images" and len(lines) == 5
    assert lines[2].startswith(f"tome,0.6,0,{rows[1]['r']},")
    # Three batches: once as a run of its own, and once for all.
    assert [calls.count(method) for method in ("dense", "tome", "ltm")] == [6, 3, 6]
    assert len(commands) == 2

    run(tmp_path, *flags)
    assert len(commands) == 2 and len(calls) == 15
    assert table(tmp_path) == rows


def test_a_reduced_model_has_the_dense_weights_and_what_was_learned(small, commands, tmp_path):
    dense = ltmp.create_model("demo", "dense")
    model = frontier.reduced_model(dense, "ltm", 0.6, 0, tmp_path / "run", parsed())
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in dense.state_dict().items())
    assert [block.merge_masker.threshold.item() for block in model.blocks] == pytest.approx(
        [0.1] * 2
    )


def test_a_folder_of_other_flags_is_left_alone(small, commands, tmp_path, capsys):
    run(tmp_path, "--methods", "tome")
    before = (tmp_path / "frontier.csv").read_bytes()
    message = refusal(capsys, tmp_path, "--methods", "tome", "--limit-train", 5)
    assert f"{tmp_path} was made with limit_train = None, not 5: name another" in message
    assert (tmp_path / "frontier.csv").read_bytes() == before
    # More images, methods and seeds are welcome.
    run(tmp_path, "--methods", "tome", "topk", "--limit-val", 21, "--seed", 1)
    assert [row["images"] for row in table(tmp_path)] == [21] * 3
    flags = ["--val-fraction", 0.1, "--seeds", 1, "--methods", "tome"]
    run(tmp_path / "split", *flags)
    message = refusal(capsys, tmp_path / "split", *flags, "--seed", 1)
    assert "split was made with seed = 0, not 1" in message


def test_points_are_means_over_seeds_with_half_of_their_range():
    rows = [{"method": "dense", "target": 1.0, "r": 1.0, "top1": 90.0, "kl": 0.0}]
    for r, top1, kl in ((0.5, 88.0, 0.002), (0.51, 89.0, 0.004)):
        rows.append({"method": "ltmp", "target": 0.5, "r": r, "top1": top1, "kl": kl})
    point = frontier.points_of(rows)[1]
    assert point == {
        "method": "ltmp",
        "target": 0.5,
        "seeds": 2,
        "r": pytest.approx(0.505),
        "top1": (88.5, 0.5),
        "kl": pytest.approx((0.003, 0.001)),
    }
    line = "ltmp 0.5 2 0.505 88.50 +- 0.50 0.003 +- 0.001"
    assert frontier.report([point]).splitlines()[1].split() == line.split()


POINTS = [
    {"method": "dense", "target": 1.0, "seeds": 1, "r": 1.0, "top1": (90, 0), "kl": (0, 0)},
    {"method": "ltm", "target": 0.3, "seeds": 2, "r": 0.3, "top1": (80, 1), "kl": (0.1, 0.01)},
    {"method": "ltm", "target": 0.6, "seeds": 2, "r": 0.6, "top1": (85, 1), "kl": (0.01, 0.001)},
]


def test_the_plot_is_a_png_of_top1_and_kl(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, savefig = [], figure.savefig

    def saving(self, *args, **options):
        drawn.extend([line.get_xydata().tolist() for line in axes.lines] for axes in self.axes)
        return savefig(self, *args, **options)

    monkeypatch.setattr(figure, "savefig", saving)
    frontier.plot(POINTS, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    top1, kl = drawn
    assert [[0, 90], [1, 90]] in top1 and [[0.3, 80], [0.6, 85]] in top1
    assert [[0.3, 0.1], [0.6, 0.01]] in kl and [[0.3, 80], [0.6, 85]] not in kl


def test_without_matplotlib_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        frontier.plot(POINTS, tmp_path / "frontier.png")
    assert "frontier.png needs matplotlib: pip install -e '.[plots]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--val-fraction", "0.1"], "--val-fraction needs --seeds 1"),
        (["--methods", "dense"], "invalid choice: 'dense'"),
        (["--targets", "0"], "0 is not above 0 and at most 1"),
        (["--data", "nowhere"], "no data folder at nowhere"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, flags, message):
    assert message in refusal(capsys, tmp_path, *flags)


def test_torchrun_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frontier.runtime, "processes", lambda: (0, 2))
    assert "start it without torchrun" in refusal(capsys, tmp_path)


@pytest.mark.slow
def test_what_train_learns_is_what_evaluate_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "plot", lambda points, path: None)
    flags = ["--methods=ltm", "--targets=0.6", "--seeds=1", "--limit-train=64", "--limit-val=50"]
    frontier.main([*flags, "--recipe=paper", "--out", str(tmp_path)])
    row = table(tmp_path)[1]
    thresholds = tmp_path / "ltm-0.6-0" / "thresholds.json"
    command = [sys.executable, str(EVALUATE), "--thresholds", str(thresholds), "--limit-val=50"]
    subprocess.run([*command, "--json", str(tmp_path / "alone.json")], check=True)
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert row["r"] == alone["flops_ratio"] == pytest.approx(0.6, abs=0.05)
    assert row["top1"] == alone["top1"] and row["kl"] == alone["kl"]
