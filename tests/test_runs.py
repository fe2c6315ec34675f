"""train.py and evaluate.py from end to end, and what happens to real runs."""

import contextlib
import csv
import errno
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

import data
import evaluate
import flops
import ltmp
import train
from extras import adaptive, batching, landing, measuring, models, run, runtime, splits

ROOT = Path(__file__).parent.parent
TINY = ltmp.ViTConfig(image_size=28, patch_size=7, dim=16, depth=2, heads=2, num_classes=10)
TINY_MODEL = ["--model", "tiny", "--weights", "none"]
# Eight steps, on Fashion-MNIST.
TINY_RUN = [*TINY_MODEL, "--limit-train", "8", "-b", "2", "--epochs", "2", "--limit-val", "10"]
TINY_RUN += ["--target", "0.75"]
FEW = ["--limit-val", "4"]
RECIPES = {"paper": train, "adaptive": adaptive}
METRICS = {"top1", "top5", "dense_top1", "dense_top5", "flops_ratio", "gflops", "kl", "kept"}


def read(path):
    return json.loads(Path(path).read_text())


def stopped(main, flags, code=2):
    """Run a program that must end with this code."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, flags)))
    assert end.value.code == code


# What each recipe calls once in every step.
IN_A_STEP = {train: "model_flops", adaptive: "steer"}


def at_step(monkeypatch, module, number, action):
    """Let action(what IN_A_STEP gave) replace it in the step with this number."""
    name, steps = IN_A_STEP[module], []
    original = getattr(module, name)

    def called(*args):
        found = original(*args)
        # FLOPs of the dense model belong to no step.
        steps.extend([1] * (len(args) > 1))
        return action(found) if len(args) > 1 and len(steps) == number else found

    monkeypatch.setattr(module, name, called)


def ctrl_c(r):
    signal.raise_signal(signal.SIGINT)
    return r


# --------------------------------------------------------------------------------------------------
# From end to end


def test_part_of_imagenet_is_learned_and_evaluated_by_its_class_numbers(
    tiny, image_folder, tmp_path
):
    root = image_folder(tmp_path / "data", ("n02123045",))
    model = ltmp.create_model("tiny", "ltmp", num_classes=1000)
    model.head.bias.data[281] = 100
    torch.save(model.state_dict(), tmp_path / "w.pth")
    flags = ["--data", root, "--model", "tiny", "--weights", tmp_path / "w.pth", "-b", "4"]
    run_flags = ["--recipe", "paper", "--no-landing", "--out", tmp_path / "run"]
    train.main(list(map(str, [*flags, *run_flags])))
    evaluate.main(list(map(str, [*flags, "--json", tmp_path / "metrics.json"])))
    with open(tmp_path / "run" / "log.csv") as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [100]
    for path in (tmp_path / "run" / "metrics.json", tmp_path / "metrics.json"):
        assert read(path)["dense_top1"] == 100


def test_images_drawn_by_another_seed_may_have_been_learned(image_folder, tiny, tmp_path, capsys):
    root = image_folder(tmp_path / "data", per_class=10)
    shutil.rmtree(root / "val")
    flags = ["--data", str(root), "--val-fraction", "0.5", "--model", "tiny", "-b", "4"]
    path = tmp_path / "run" / "last.pt"
    run_flags = ["--weights", "none", "--recipe", "paper", "--num-classes", "2", "--workers", "0"]
    train.main([*flags, *run_flags, "--out", str(path.parent)])
    flags[1] += "/"
    for seed, share, leaks in ((0, 0.5, False), (0, 0.4, False), (0, 0.6, True), (1, 0.5, True)):
        flags[3] = str(share)
        evaluate.main([*flags, "--weights", str(path), "--seed", str(seed)])
        assert ("may have learned from images of this val" in capsys.readouterr().err) == leaks


def test_thresholds_go_with_their_weights(tmp_path, capsys):
    path = tmp_path / "thresholds.json"
    content = {"merge_thresholds": [0.9] * 6, "prune_thresholds": [0.0] * 6}
    path.write_text(json.dumps({"method": "ltmp", "weights": "mine.pth"} | content))
    flags = ["--thresholds", path, "--limit-val", "10"]
    stopped(evaluate.main, flags)
    assert "learned for other weights: --weights mine.pth" in capsys.readouterr().err
    evaluate.main(list(map(str, [*flags, "--weights", "none"])))


def test_another_size_than_was_learned_is_named(capsys):
    evaluate.main(["--image-size", "14", "--thresholds", str(models.DEMO_THRESHOLDS), *FEW])
    said = capsys.readouterr().err
    assert "note: the thresholds were learned at 28 pixels, not 14" in said
    assert "note: the weights are for 197 tokens, the model has 50: position embeddings" in said
    evaluate.main(FEW)
    assert "note: " not in capsys.readouterr().err


@pytest.mark.slow
def test_thresholds_of_a_deit_on_a_folder_of_jpegs(image_folder, tmp_path, capsys):
    root = image_folder(tmp_path / "images", ("a", "b", "c"), 4, (250, 188), ".jpg")
    torch.manual_seed(0)
    source = ltmp.create_model("deit_tiny_patch16_224", "dense", num_classes=3)
    torch.save({"model": source.state_dict()}, tmp_path / "deit.pth")
    common = ["--model", "deit_tiny_patch16_224", "--weights", tmp_path / "deit.pth"]
    common = list(map(str, [*common, "--data", root, "--workers", "1"]))
    train.main([*common, "--target", "0.75", "-b", "4", "--out", str(tmp_path / "out")])

    found, metrics = (read(tmp_path / "out" / f"{n}.json") for n in ("thresholds", "metrics"))
    assert metrics.keys() >= METRICS and metrics["images"] == 12 and len(metrics["kept"]) == 12
    assert found["recipe"] == "paper" and found["lr"] == [5e-6, 5e-3] and found["tau"] == 0.1
    assert metrics["flops_ratio"] == pytest.approx(0.75, abs=0.03)
    rows = list(csv.DictReader((tmp_path / "out" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    trained = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["model"]
    # The backbone is as it was, to the bit.
    assert all(torch.equal(w, trained[name]) for name, w in source.state_dict().items())
    assert f"r = {metrics['flops_ratio']:.3f}" in capsys.readouterr().out

    thresholds = ["--thresholds", str(tmp_path / "out" / "thresholds.json")]
    for flags in (thresholds, ["--weights", str(tmp_path / "out" / "last.pt")]):
        evaluate.main([*common, *flags, "--json", str(tmp_path / "again.json")])
        again = read(tmp_path / "again.json")
        for key in METRICS:
            assert again[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-9), key


def test_evaluation_of_what_was_learned_gives_the_same_metrics(tiny, tmp_path):
    torch.manual_seed(0)
    torch.save(ltmp.create_model("tiny", "dense").state_dict(), tmp_path / "vit.pth")
    common = ["--model", "tiny", "--weights", str(tmp_path / "vit.pth"), "--limit-val", "10"]
    train.main([*common, "--limit-train", "8", "--out", str(tmp_path)])
    metrics = read(tmp_path / "metrics.json")
    for flag, name in (("--thresholds", "thresholds.json"), ("--weights", "last.pt")):
        evaluate.main([*common, flag, str(tmp_path / name), "--json", str(tmp_path / "again.json")])
        assert read(tmp_path / "again.json") == {k: metrics[k] for k in metrics if k != "target"}


@pytest.mark.parametrize("method", ["ltpm", "ltm", "dense"])
def test_last_pt_knows_its_model_size_and_method(tiny, tmp_path, capsys, method):
    flags = ["--recipe", "paper"] if method == "dense" else []
    flags += [*TINY_RUN, "--target", "0.9", "--method", method]
    train.main([*flags, "--image-size", "14", "--out", str(tmp_path)])
    metrics = read(tmp_path / "metrics.json")
    last, again = str(tmp_path / "last.pt"), str(tmp_path / "again.json")
    evaluate.main(["--weights", last, "--limit-val", "10", "-b", "2", "--json", again])
    found = read(again)
    assert found["model"] == "tiny" and found["method"] == method
    assert found == {key: metrics[key] for key in metrics if key != "target"}

    capsys.readouterr()
    stopped(evaluate.main, ["--weights", last, "--model", "deit_tiny_patch16_224"])
    assert "is of the model tiny: leave out --model deit_tiny" in capsys.readouterr().err
    evaluate.main(["--weights", last, "--limit-val", "1", "--image-size", "28"])
    assert "note: " + last + " was learned at 14 pixels, not 28" in capsys.readouterr().err
    # The next run goes on at that size.
    train.main([*TINY_RUN[4:], "--target", "0.9", "--weights", last, "--out", str(tmp_path / "b")])
    assert read(tmp_path / "b" / "thresholds.json")["image_size"] == 14


@pytest.mark.parametrize(
    "flags, recipe",
    [
        (["--model", "deit_base_patch16_224"], "paper"),
        (["--model", "deit_base_patch16_224", "--image-size", "224"], "paper"),
        (["--data", "mine"], "paper"),
        (["--model", "deit_base_patch16_224", "--image-size", "160"], "adaptive"),
        (["--model", "vit_small_patch14_dinov2"], "adaptive"),
        ([], "adaptive"),
        (["--recipe", "paper"], "paper"),
    ],
)
def test_the_papers_recipe_is_the_default_where_the_paper_used_it(flags, recipe):
    args = train.parse_args(flags)
    assert args.recipe == recipe
    assert args.batch_size == {"paper": 128, "adaptive": 32}[recipe]


def test_r_in_the_metrics_is_what_inference_kept(tmp_path):
    evaluate.main(["--limit-val", "10", "-b", "1", "--json", str(tmp_path / "m.json")])
    model = models.build_model("demo", "ltmp", models.read_weights("demo", None)).eval()
    ltmp.load_thresholds(model, models.DEMO_THRESHOLDS)
    val = splits.open_split(None, "val", models.clean_transform(model.config))
    images = torch.stack([image for image, _ in batching.subset(val, 10)])
    with torch.no_grad():
        kept = model(images)[1].double()
    metrics = read(tmp_path / "m.json")
    assert metrics["flops_ratio"] == pytest.approx(flops.flops_ratio(kept, model.config).item())
    assert metrics["kept"] == kept.mean(1).tolist()
    assert metrics["flops_ratio"] < 0.9


@pytest.mark.parametrize("method, r", [("dense", None), ("tome", 8), ("topk", 8)])
def test_evaluation_of_other_methods_equals_a_direct_computation(tmp_path, method, r):
    flags = ["--method", method, "--limit-val", "20", "--json", str(tmp_path / "m.json")]
    evaluate.main(flags + (["--r", str(r)] if r else []))
    metrics = read(tmp_path / "m.json")
    assert metrics["kept"] == [197.0 - (r or 0) * (i + 1) for i in range(6)]
    val = splits.open_split(None, "val", models.clean_transform(ltmp.VARIANTS["demo"]))
    images, labels = zip(*batching.subset(val, 20), strict=True)
    state = models.read_weights("demo", None)
    model = models.build_model("demo", method, state, r=r).eval()
    twin = models.build_model("demo", "dense", state).eval()
    with torch.no_grad():
        ours, dense = (m(torch.stack(images))[0].double().log_softmax(1) for m in (model, twin))
    kl = (dense.exp() * (dense - ours)).sum(1).mean().item()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-9)
    assert (metrics["kl"] > 0) == (method != "dense")
    for key, log_p in (("", ours), ("dense_", dense)):
        rank = (log_p > log_p.gather(1, torch.tensor(labels)[:, None])).sum(1)
        assert metrics[key + "top1"] == pytest.approx(5 * (rank < 1).sum().item())
        assert metrics[key + "top5"] == pytest.approx(5 * (rank < 5).sum().item())
    # README's number.
    assert metrics["dense_gflops"] == pytest.approx(0.292, abs=5e-4)
    assert metrics["gflops"] == pytest.approx(metrics["flops_ratio"] * metrics["dense_gflops"])


def test_hits_are_the_best_and_the_five_best():
    # The label of row i is the one that i others are above.
    logits = -torch.arange(10.0).expand(10, 10)
    assert measuring.hits(logits, torch.arange(10)) == (1, 5)
    assert measuring.hits(logits[:3, :3], torch.arange(3)) == (1, 3)


def test_the_report_shows_what_was_measured():
    metrics = {"model": "m", "method": "ltmp", "images": 7, "target": 0.5, "kl": 0.0123}
    metrics |= {"top1": 61.0, "top5": 82.0, "gflops": 2.0, "flops_ratio": 0.507, "kept": [9.6, 3.0]}
    metrics |= {"dense_top1": 63.5, "dense_top5": 84.0, "dense_gflops": 4.0}
    assert measuring.report(metrics).splitlines() == [
        "m, ltmp, 7 validation images",
        "  dense    top-1  63.50 %   top-5  84.00 %   4 GFLOPs per image",
        "  reduced  top-1  61.00 %   top-5  82.00 %   2 GFLOPs per image",
        "  r = 0.507 (target 0.5): 49.3 % fewer FLOPs, top-1 changes by -2.50 points",
        "  predictions differ from the dense ones by a KL of 0.012 nats",
        "  tokens after each block: 10 3",
    ]


def test_evaluation_says_how_fast_both_are(monkeypatch, capsys):
    def timed(run, device):
        result = run()
        return result, 0.25 if isinstance(result, tuple) else 0.5

    monkeypatch.setattr(runtime, "timed", timed)
    evaluate.main(["--limit-val", "8", "-b", "4"])
    assert "not counted: 8 dense, 16 ltmp" in capsys.readouterr().err


def test_landing_can_follow_later_but_not_be_undone(tiny, tmp_path, capsys):
    flags = [*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)]
    train.main([*flags, "--no-landing"])
    learned = read(tmp_path / "thresholds.json")
    train.main([*flags, "--resume"])
    landed = read(tmp_path / "thresholds.json")
    assert landed["merge_thresholds"] != learned["merge_thresholds"]
    assert landed["landing"] and not learned["landing"]
    stopped(train.main, [*flags, "--resume", "--no-landing"])
    assert "have landed: --no-landing comes too late" in capsys.readouterr().err


def test_landing_meets_the_target_and_can_be_left_out(tiny, tmp_path):
    flags = [*TINY_RUN, "--limit-train", "64", "-b", "16", "--limit-val", "64", "--lr", "0", "0"]
    found = {}
    for name, more in (("landed", []), ("learned", ["--no-landing"])):
        out = str(tmp_path / name)
        train.main([*flags, "--recipe", "paper", "--target", "0.75", *more, "--out", out])
        found[name] = read(tmp_path / name / "thresholds.json")["merge_thresholds"]
    # Without a learning rate learning leaves the thresholds at their start.
    start = [b.merge_masker.threshold.item() for b in ltmp.create_model("tiny").blocks]
    assert found["learned"] == pytest.approx(start)
    assert found["landed"] != found["learned"]
    state = models.read_weights("tiny", tmp_path / "landed" / "last.pt")
    model = models.build_model("tiny", "ltmp", state)
    train_set = splits.open_split(None, "train", models.clean_transform(TINY))
    images = torch.stack([image for image, _ in batching.subset(train_set, 64)])
    assert landing.measure(model, images) == pytest.approx(0.75, abs=0.003)


def test_dense_training_changes_all_weights(tiny, tmp_path):
    train.main([*TINY_RUN, "--method", "dense", "--out", str(tmp_path)])
    assert read(tmp_path / "metrics.json")["flops_ratio"] == 1
    assert not (tmp_path / "thresholds.json").exists()
    torch.manual_seed(0)
    initial = ltmp.create_model("tiny", "dense").state_dict()
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert all(not torch.equal(w, trained[name]) for name, w in initial.items())


# --------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_runs_end_as_whole_ones(tiny, tmp_path, monkeypatch, capsys, recipe):
    def learned(out, *flags):
        train.main([*TINY_RUN, "--recipe", recipe, "--out", str(tmp_path / out), *flags])
        return [(tmp_path / out / name).read_text() for name in ("thresholds.json", "log.csv")]

    whole = learned("a")
    assert learned("b") == whole
    assert learned("c", "--seed", "1")[1] != whole[1]
    for number in (3, 8):
        with monkeypatch.context() as until, pytest.raises(SystemExit) as end:
            at_step(until, RECIPES[recipe], number, ctrl_c)
            learned(f"d{number}")
        assert end.value.code == 130
        assert f"stopped after step {number} of 8" in capsys.readouterr().err
        assert not (tmp_path / f"d{number}" / "thresholds.json").exists()
        assert learned(f"d{number}", "--resume") == whole


def test_a_second_ctrl_c_ends_at_once(tiny, tmp_path, monkeypatch, capsys, request):
    def twice(r):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise KeyboardInterrupt

    flags = [*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)]
    at_step(monkeypatch, train, 3, twice)
    # A shell starts what runs in the background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, before))
    with pytest.raises(SystemExit) as end:
        runtime.run_main(partial(train.main, flags), train.HINT)
    assert end.value.code == 130
    assert "stopped; --resume goes on from the last save" in capsys.readouterr().err
    assert (tmp_path / "log.csv").read_text().count("\n") == 3


def test_sigterm_twice_is_sigterm_once(tiny, tmp_path, monkeypatch, request):
    def twice(r):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        return r

    def not_noted(*_):
        raise AssertionError("the second one was not noted")

    before = signal.signal(signal.SIGTERM, not_noted)
    request.addfinalizer(partial(signal.signal, signal.SIGTERM, before))
    at_step(monkeypatch, train, 3, twice)
    stopped(train.main, [*TINY_RUN, "--recipe", "paper", "--out", tmp_path], 130)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3


def test_resuming_with_other_settings_or_nothing_is_refused(tiny, tmp_path, capsys):
    flags = [*TINY_RUN, "--recipe", "paper", "--resume", "--out"]
    stopped(train.main, [*flags, tmp_path])
    assert "nothing to resume" in capsys.readouterr().err
    train.main([*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)])
    capsys.readouterr()
    stopped(train.main, [*flags, tmp_path, "--target", "0.5"])
    assert "target = 0.75, not 0.5" in capsys.readouterr().err


def test_a_run_saved_without_a_scaler_goes_on_in_float16_and_back(tiny, tmp_path, monkeypatch):
    flags = [*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)]
    for number, half in ((2, False), (5, True), (None, False)):
        with monkeypatch.context() as until:
            if half:
                in_float16(until)
            more = ["--resume"] if (tmp_path / "last.pt").exists() else []
            if number is None:
                train.main([*flags, *more])
                break
            at_step(until, train, 3, ctrl_c)
            stopped(train.main, [*flags, *more], 130)
        saved = torch.load(tmp_path / "last.pt", weights_only=True)
        assert bool(saved["scaler"]) == half
    assert (tmp_path / "log.csv").read_text().count("\n") == 9


@pytest.mark.parametrize("recipe", RECIPES)
def test_last_pt_does_not_grow(tiny, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(run, "SAVE_EVERY", 0)
    sizes, save = [], run.Run.save

    def save_and_look(self):
        save(self)
        sizes.append((tmp_path / "last.pt").stat().st_size)

    monkeypatch.setattr(run.Run, "save", save_and_look)
    train.main([*TINY_RUN, "--recipe", recipe, "--epochs", "8", "--out", str(tmp_path)])
    # The optimizer begins to keep its state in the first step; numbers may take a byte more.
    assert len(sizes) > 30 and max(sizes[1:]) - min(sizes[1:]) < 100


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_images_of_limit_train_are_read(image_folder, tiny, tmp_path, monkeypatch, recipe):
    folder = image_folder(tmp_path / "images")
    opened, open_image = set(), data.open_image
    monkeypatch.setattr(data, "open_image", lambda *a: (opened.add(a[0]), open_image(*a))[1])
    flags = [*TINY_MODEL, "--data", str(folder), "--workers", "0", "--recipe", recipe]
    train.main([*flags, "--limit-train", "3", "--epochs", "2", "--out", str(tmp_path / "out")])
    samples = data.ImageFolder(folder / "train").samples
    wanted = {samples[i][0] for i in batching.evenly(len(samples), 3)}
    assert {path for path in opened if f"{os.sep}train{os.sep}" in str(path)} == wanted


@pytest.mark.parametrize("damage", ["cut", "foreign", "text"])
def test_a_damaged_last_pt_is_refused(tiny, tmp_path, capsys, damage):
    train.main([*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)])
    path = tmp_path / "last.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "foreign":
        torch.save(ltmp.create_model("tiny").state_dict(), path)
    else:
        path.write_text("text")
    capsys.readouterr()
    stopped(train.main, [*TINY_RUN, "--recipe", "paper", "--out", tmp_path, "--resume"])
    printed = capsys.readouterr().err
    assert "last.pt" in printed and len(printed.splitlines()) == 1


def test_a_run_is_not_overwritten_in_silence(tiny, tmp_path, capsys):
    flags = [*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)]
    train.main(flags)
    before = (tmp_path / "thresholds.json").read_bytes()
    stopped(train.main, [*flags, "--target", "0.5"])
    assert "--overwrite" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "thresholds.json").read_bytes() == before
    train.main([*flags, "--target", "0.5", "--overwrite"])
    assert (tmp_path / "thresholds.json").read_bytes() != before


def test_no_result_of_an_earlier_run_lies_beside_a_new_last_pt(tiny, tmp_path, monkeypatch):
    flags = [*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)]
    train.main(flags)
    at_step(monkeypatch, train, 1, ctrl_c)
    stopped(train.main, [*flags, "--overwrite"], 130)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "log.csv"}


# --------------------------------------------------------------------------------------------------
# Lives: runs in processes of their own

# A process with the modules loaded, from which others are forked.
LIVES = multiprocessing.get_context("forkserver")
LIVES.set_forkserver_preload(["torch._dynamo", "test_runs"])


def live(flags, moment=None, count=1, said=os.devnull, environment=()):
    """train.py, saving after every step; it kills itself when the moment comes for the count-th
    time. Moments: "step"; "half of", "all of" and "new" with the name of a file that is written.
    """
    os.setsid()
    os.environ.update(environment)
    sys.argv, sys.stderr = ["train.py"], open(said, "a", buffering=1)
    torch.set_num_threads(1)
    runtime.DEVICE = "cpu"
    ltmp.VARIANTS["tiny"] = TINY
    run.SAVE_EVERY = 0
    left = [count]

    def tick(name):
        left[0] -= name == moment
        if left[0] == 0 and name == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def in_halves(path, content, write=Path.write_bytes):
        write(path, bytes(content)[: len(content) // 2])
        tick(f"half of {path.stem}")
        return write(path, content)

    def renamed(source, target, replace=os.replace):
        tick(f"all of {Path(target).name}")
        replace(source, target)
        tick(f"new {Path(target).name}")

    def ticking(original):
        def called(*args):
            # FLOPs of the dense model belong to no step.
            if len(args) > 1:
                tick("step")
            return original(*args)

        return called

    Path.write_bytes, os.replace = in_halves, renamed
    for module, name in IN_A_STEP.items():
        setattr(module, name, ticking(getattr(module, name)))
    runtime.run_main(partial(train.main, flags), train.HINT)


def started(*args, **named):
    """live() in a new process."""
    process = LIVES.Process(target=live, args=args, kwargs=named)
    process.start()
    return process


def ended(process, after=60):
    """The exit code of a process, which is killed if it lasts longer; its workers are ended too."""
    process.join(after)
    process.kill()
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.exitcode


SHORT = [("step", 3)]
LONG = [
    ("half of last.pt", 1),
    ("new last.pt", 1),
    ("step", 2),
    ("all of last.pt", 2),
    ("half of last.pt", 3),
    ("half of log.csv", 1),
    ("half of thresholds.json", 1),
    ("new thresholds.json", 1),
    ("half of metrics.json", 1),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("moments", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_ends_the_same(tmp_path, recipe, moments):
    flags = [*TINY_RUN, "--recipe", recipe]
    out, said = tmp_path / "killed", tmp_path / "said"
    assert ended(started([*flags, "--out", str(tmp_path / "whole")])) == 0
    for life, moment in enumerate([*moments, *[None] * (3 if moments is LONG else 0)]):
        more = ["--resume"] if (out / "last.pt").exists() else []
        more += ["--workers", str(2 * (life % 2)), "--out", str(out)]
        process = started([*flags, *more], *(moment or ()), said=said)
        code = ended(process, 60 if moment else random.uniform(0.05, 0.6))
        assert code == -signal.SIGKILL or (code == 0 and not moment), said.read_text()
    for last in ("finishes", "begins where all is done"):
        again = started([*flags, "--resume", "--out", str(out)], said=said)
        assert ended(again) == 0, (last, said.read_text())
        for name in ("thresholds.json", "metrics.json", "log.csv"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), last


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_and_stops(tmp_path, number):
    flags = [*TINY_RUN, "--limit-train", "400", "--epochs", "10", "--workers", "2"]
    process = started([*flags, "--out", str(tmp_path)], said=tmp_path / "said")
    log = tmp_path / "log.csv"
    while not log.exists() or log.read_text().count("\n") < 5:
        assert process.is_alive(), (tmp_path / "said").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert ended(process) == 130
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert f"stopped after step {step} of 2000; the same command with --resume" in last
    assert log.read_text().count("\n") == 1 + step


def two_processes(flags, said, **named):
    """live() as torchrun starts it, twice; the second is killed as `named` says. Exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = []
    for rank in (0, 1):
        own = {"environment": world | {"RANK": str(rank)}} | (named if rank else {})
        both.append(started(flags, said=said, **own))
    return [ended(process) for process in both]


def test_where_one_process_dies_the_other_ends_too(tmp_path):
    flags = [*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)]
    codes = two_processes(flags, tmp_path / "said", moment="step", count=3)
    assert codes == [1, -signal.SIGKILL]
    assert "another process has ended" in (tmp_path / "said").read_text().splitlines()[-1]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_learn_what_one_learns_with_twice_the_batch(tiny, tmp_path, recipe):
    # Odd: the last batch is one image.
    flags = [*TINY_MODEL, "--recipe", recipe, "--limit-train", "33", "--limit-val", "51"]
    flags += ["--lr", "0.001", "0.05"]
    two = [*flags, "-b", "8", "--out", str(tmp_path / "two")]
    assert two_processes(two, tmp_path / "said") == [0, 0], (tmp_path / "said").read_text()
    train.main([*flags, "-b", "16", "--out", str(tmp_path / "one")])
    one, two = (read(tmp_path / name / "thresholds.json") for name in ("one", "two"))
    for step in ("merge", "prune"):
        key = f"{step}_thresholds"
        assert two[key] == pytest.approx(one[key], abs=1e-5)
    one, two = (read(tmp_path / name / "metrics.json") for name in ("one", "two"))
    assert two["images"] == one["images"] == 51 and two["dense_top1"] == one["dense_top1"]
    logs = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "log.csv").read_text().splitlines()[1:]
        logs.append([float(cell) for line in lines for cell in line.split(",")])
    assert len(logs[0]) % 3 == 0 and logs[1] == pytest.approx(logs[0], rel=1e-3, abs=1e-6)


GLOO = """
import atexit
import sys
from pathlib import Path

def threads():
    tasks = Path("/proc/self/task").glob("*/comm")
    return sum("gloo" in task.read_text() for task in tasks)

# The first to be registered is the last to run.
atexit.register(lambda: sys.stdout.write(f"after {threads()}\\n"))
import torch
from extras import runtime
runtime.total(torch.ones(1))
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
sys.stdout.write(f"before {threads() > 0}\\n")
"""


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_thread_of_gloo_outlives_its_group(tmp_path):
    (tmp_path / "end.py").write_text(GLOO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command.append(str(tmp_path / "end.py"))
    options = {"capture_output": True, "text": True, "timeout": 120, "env": environment()}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", *["after 0"] * 2, *["before True"] * 2]


def test_world_size_without_rank_is_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="^WORLD_SIZE is 2 but RANK is not set: use torchrun"):
        train.main([*TINY_RUN, "--out", str(tmp_path)])


def test_a_run_in_another_thread_works(tiny, tmp_path):
    flags = [*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)]
    thread = threading.Thread(target=train.main, args=(flags,))
    thread.start()
    thread.join(60)
    assert (tmp_path / "metrics.json").exists()


# --------------------------------------------------------------------------------------------------
# Runs that fail

FAILING = """
import os
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import data, ltmp, train
from extras import runtime
from conftest import TINY

def fail(*args, **options):
    raise RuntimeError("deep inside")

ltmp.VARIANTS["tiny"] = TINY
if {where!r} == "model":
    forward = ltmp.LTMPViT.forward
    def forward_once(self, *args, **options):
        return fail() if self.training else forward(self, *args, **options)
    ltmp.LTMPViT.forward = forward_once
elif {where!r} == "transform":
    data.train_transform = lambda *args, **options: fail
else:
    # As the system does where memory is full.
    data.train_transform = lambda *args, **options: lambda *_, **__: os.kill(os.getpid(), 9)
if __name__ == "__main__":
    runtime.run_main(lambda: train.main({flags!r}))
"""


def alive_in_group(group):
    """Processes of a group that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = path.read_text().rsplit(") ", 1)[1].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(path.parent.name)
    return found


SLOW = pytest.mark.slow


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted in /proc")
@pytest.mark.parametrize(
    "where, workers",
    [
        ("model", 2),
        ("transform", 2),
        ("killed worker", 2),
        *[pytest.param(*case, marks=SLOW) for case in product(("model", "transform"), (0, 1))],
    ],
)
def test_a_run_that_fails_never_hangs(tmp_path, where, workers):
    flags = [*TINY_RUN, "--recipe", "paper", "--limit-train", "64", "--workers", str(workers)]
    flags += ["--out", str(tmp_path / "out")]
    names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "where": where, "flags": flags}
    (tmp_path / "fail.py").write_text(FAILING.format(**names))
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "fail.py")],
            stdout=said,
            stderr=said,
            start_new_session=True,
            env=environment(),
        )
        try:
            assert process.wait(60) == 1
            deadline = time.time() + 5
            while alive_in_group(process.pid) and time.time() < deadline:
                time.sleep(0.05)
            assert alive_in_group(process.pid) == []
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    printed = (tmp_path / "said").read_text()
    if where == "killed worker":
        assert "Traceback" not in printed
        assert "the system ended a process that loads images" in printed.splitlines()[-1]
    else:
        assert "Traceback" in printed and "RuntimeError: deep inside" in printed


def test_where_nobody_reads_a_program_goes_on(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        progress = runtime.Progress(every=0)
        progress.show("a step", 1, 2)
        runtime.say("a line")
        progress.show("the last step", 2, 2)


def test_where_the_terminal_is_gone_a_program_goes_on(monkeypatch):
    terminal, window = os.openpty()
    with open(window, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        os.close(terminal)
        runtime.say("a line")
        runtime.say("another")


@pytest.mark.parametrize(
    "error, advice",
    [
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "--workers 0"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--workers 0"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "fewer --workers"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "the GPU's memory is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory is full: take fewer"),
        (MemoryError(), "memory is full: take fewer images at once"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
    ],
)
def test_a_machine_that_gives_out_is_one_line(tiny, tmp_path, monkeypatch, capsys, error, advice):
    def give_out(r):
        raise error

    at_step(monkeypatch, train, 3, give_out)
    with pytest.raises(SystemExit) as end:
        flags = [*TINY_RUN, "--recipe", "paper", "--out", str(tmp_path)]
        runtime.run_main(partial(train.main, flags), train.HINT)
    assert end.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert advice in last and "--resume goes on from the last save" in last
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 0


@pytest.mark.parametrize(
    "main, module, name",
    [
        (evaluate.main, measuring, "measure"),
        (train.main, train, "learn"),
        (train.main, adaptive, "learn"),
    ],
)
def test_what_nobody_foresaw_keeps_its_traceback(tiny, tmp_path, monkeypatch, main, module, name):
    def deep_inside(*args):
        raise ValueError("deep inside")

    monkeypatch.setattr(module, name, deep_inside)
    recipe = "paper" if module is train else "adaptive"
    flags = [*TINY_RUN, "--recipe", recipe, "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="deep inside"):
        main(flags if main is train.main else [*TINY_MODEL, "--method", "dense"])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_never_learned_from(tiny, tmp_path, monkeypatch, capsys, what):
    flags = [*TINY_RUN, "--recipe", "paper", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    capsys.readouterr()

    def broken(r):
        if what == "loss":
            return r * math.nan
        r.register_hook(infinite)
        return r

    with monkeypatch.context() as until:
        at_step(until, train, 3, broken)
        stopped(train.main, [*flags, tmp_path / "out"], 1)
    printed = capsys.readouterr().err
    assert "at step 3; last.pt holds the state before it" in printed.splitlines()[-1]
    train.main([*flags, str(tmp_path / "out"), "--resume"])
    for name in ("thresholds.json", "log.csv"):
        found = [(tmp_path / out / name).read_bytes() for out in ("out", "whole")]
        assert found[0] == found[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_features_that_are_nan_are_one_line(tiny, tmp_path, monkeypatch, capsys, recipe):
    embed, steps = ltmp.LTMPViT.embed, []

    def broken(model, images, drop):
        tokens = embed(model, images, drop)
        # Only training steps of the reduced model have batches of two.
        steps.extend([1] * (model.method == "ltmp" and len(images) == 2))
        if len(steps) >= 3:
            tokens.x = tokens.x * math.nan
        return tokens

    monkeypatch.setattr(ltmp.LTMPViT, "embed", broken)
    stopped(train.main, [*TINY_RUN, "--recipe", recipe, "--out", tmp_path], 1)
    assert "last.pt holds the state before it" in capsys.readouterr().err.splitlines()[-1]


def infinite(gradient):
    return gradient * math.inf


def in_float16(monkeypatch):
    """The scaler of float16, on a model in float32."""
    monkeypatch.setattr(runtime, "amp_dtype", lambda device, amp: torch.float16)
    monkeypatch.setattr(runtime, "amp_context", lambda device, amp: contextlib.nullcontext())


def test_steps_that_overflow_float16_are_counted(tiny, tmp_path, monkeypatch, capsys):
    in_float16(monkeypatch)
    # Too large for float32 until it was halved some times.
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**126)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (steps.append(1), step(self))[1])
    train.main([*TINY_RUN, "--recipe", "paper", "--epochs", "8", "--out", str(tmp_path)])
    assert 0 < len(steps) < 32
    assert f"{32 - len(steps)} of 32 steps made no update" in capsys.readouterr().err


def test_gradients_that_no_scale_makes_finite_stop_the_run(tiny, tmp_path, monkeypatch, capsys):
    in_float16(monkeypatch)
    original = train.model_flops

    def model_flops(config, kept=None):
        if kept is None:
            return original(config)
        r = original(config, kept)
        r.register_hook(infinite)
        return r

    monkeypatch.setattr(train, "model_flops", model_flops)
    flags = [*TINY_RUN, "--recipe", "paper", "--epochs", "8", "--out", tmp_path]
    stopped(train.main, flags, 1)
    # The scale is 2^16 at first.
    assert "at step 17; last.pt" in capsys.readouterr().err.splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# Files that cannot be read or written


def test_a_full_disk_is_one_line_and_leaves_the_last_save(tiny, tmp_path, monkeypatch, capsys):
    flags = [*TINY_RUN, "--recipe", "paper", "--out"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    train.main([*flags, str(tmp_path / "whole")])
    capsys.readouterr()

    def full(r):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return r

    with monkeypatch.context() as until:
        at_step(until, train, 4, full)
        until.setattr(run, "SAVE_EVERY", 0)
        try:
            stopped(train.main, [*flags, tmp_path / "out"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].endswith("last.pt: File too large")
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 3
    train.main([*flags, str(tmp_path / "out"), "--resume"])
    for name in ("thresholds.json", "log.csv"):
        found = [(tmp_path / out / name).read_bytes() for out in ("out", "whole")]
        assert found[0] == found[1]


@pytest.mark.parametrize("path", ["file/inside", "."])
def test_what_cannot_be_written_is_one_line(tiny, tmp_path, capsys, path):
    (tmp_path / "file").write_text("")
    flags = [*TINY_MODEL, "--method", "dense", "--limit-val", "20", "--json", tmp_path / path]
    stopped(evaluate.main, flags)
    assert f"cannot write {tmp_path / path}" in capsys.readouterr().err.splitlines()[-1]


def spoil(root):
    """Damage some images of a folder. Their paths, those in train first."""
    whole = (root / "train" / "a" / "0.png").read_bytes()
    names = ("train/a/1.png", "train/b/0.png", "val/a/0.png", "val/b/1.png")
    contents = (whole[:-40], b"no image", b"", whole[: len(whole) // 2])
    for name, content in zip(names, contents, strict=True):
        (root / name).write_bytes(content)
    return [root / name for name in names]


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("recipe", ["paper", "adaptive", None])
def test_a_bad_image_is_one_line(image_folder, tiny, tmp_path, capsys, recipe, workers):
    spoil(image_folder(tmp_path / "images"))
    flags = [*TINY_MODEL, "--num-classes", "2", "--data", tmp_path / "images"]
    flags += ["--workers", workers]
    if recipe:
        stopped(train.main, [*flags, "--recipe", recipe, "--out", tmp_path / "out"])
    else:
        stopped(evaluate.main, [*flags, "--method", "dense"])
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1, printed
    assert "cannot read the image " in printed and "; --skip-bad-images goes on" in printed


def test_evaluation_without_bad_images_is_that_of_the_good_ones(
    image_folder, tiny, tmp_path, capsys
):
    bad = spoil(image_folder(tmp_path / "bad"))
    shutil.copytree(tmp_path / "bad", tmp_path / "good")
    for path in bad:
        (tmp_path / "good" / path.relative_to(tmp_path / "bad")).unlink()
    for name in ("bad", "good"):
        flags = [*TINY_MODEL, "--method", "tome", "--r", "3", "--data", tmp_path / name, "-b", 3]
        flags += ["--workers", 1, "--skip-bad-images", "--json", tmp_path / f"{name}.json"]
        # The random weights.
        torch.manual_seed(0)
        evaluate.main(list(map(str, flags)))
        said = capsys.readouterr().err
        listed = [said.count(f"cannot read the image {path}:") for path in bad]
        assert listed == ([0, 0, 1, 1] if name == "bad" else [0] * 4)
    bad, good = (read(tmp_path / f"{name}.json") for name in ("bad", "good"))
    # In batches of other sizes sums round otherwise.
    assert good["images"] == 6 and bad.pop("kl") == pytest.approx(good.pop("kl"), abs=1e-6)
    assert bad == good


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_leave_out_the_same_bad_images_as_one(
    image_folder, tiny, tmp_path, capsys, recipe
):
    folder = image_folder(tmp_path / "images")
    first, second = batching.epoch_batches(8, 4, epoch=0, seed=0)
    samples = data.ImageFolder(folder / "train").samples
    # All of one process in one batch, and all of another batch.
    bad = [samples[i][0] for i in first[1::2] + second]
    bad.append(str(folder / "val" / "a" / "1.png"))
    for path in bad:
        Path(path).write_bytes(b"no image")
    flags = [*TINY_MODEL, "--data", str(folder), "--epochs", "3", "--recipe", recipe]
    flags += ["--lr", "1e-3", "0.05", "--skip-bad-images", "--workers", "0"]
    two = [*flags, "-b", "2", "--out", str(tmp_path / "two")]
    assert two_processes(two, tmp_path / "said") == [0, 0], (tmp_path / "said").read_text()
    train.main([*flags, "-b", "4", "--out", str(tmp_path / "one")])
    one, two = (read(tmp_path / name / "thresholds.json") for name in ("one", "two"))
    for step in ("merge", "prune"):
        key = f"{step}_thresholds"
        assert two[key] == pytest.approx(one[key], abs=1e-5)
    for name in ("one", "two"):
        assert read(tmp_path / name / "metrics.json")["images"] == 7
        lines = (tmp_path / name / "log.csv").read_text().splitlines()
        # The batch without a good image makes no update.
        assert len(lines) == 7 and lines[2].rstrip(",") == "2"
    for said in (capsys.readouterr().err, (tmp_path / "said").read_text()):
        assert "7 images were left out" in said
        assert [said.count(f"cannot read the image {path}:") for path in bad] == [1] * 7


@pytest.mark.parametrize("method", ["ltmp", "dense"])
def test_a_bad_image_of_one_process_ends_both(image_folder, tiny, tmp_path, method):
    folder = image_folder(tmp_path / "images")
    first = batching.epoch_batches(8, 4, epoch=0, seed=0)[0]
    # Of the second process.
    bad = data.ImageFolder(folder / "train").samples[first[1]][0]
    Path(bad).write_bytes(b"no image")
    flags = [*TINY_MODEL, "--data", str(folder), "--recipe", "paper", "--workers", "0", "-b", "2"]
    flags += ["--method", method, "--out", str(tmp_path / "out")]
    codes = two_processes(flags, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert 2 in codes and 0 not in codes, (codes, said)
    assert said.count(f"cannot read the image {bad}:") == 1 and "Traceback" not in said


def test_where_every_image_is_bad_it_says_so(image_folder, tiny, tmp_path, capsys):
    for path in image_folder(tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"")
    common = [*TINY_MODEL, "--data", tmp_path / "images", "--workers", "0", "--skip-bad-images"]
    stopped(evaluate.main, [*common, "--method", "dense"])
    assert "none of the images could be read" in capsys.readouterr().err
    stopped(train.main, [*common, "--recipe", "adaptive", "--out", tmp_path / "out"])
    assert "none of 8 training images could be read" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Wrong input

# Flags of both programs, and what they say to them.
WRONG_INPUT = {
    "--model deit_smal_patch16_224": "invalid choice: 'deit_smal_patch16_224'",
    "--method ltmpp": "invalid choice: 'ltmpp'",
    "--device abacus": "no device abacus",
    "--no-such-flag": "unrecognized arguments",
    "--workers -1": "-1 is no whole number from 0 on",
    "--data {}/nowhere": "no data folder at",
    "--data {}/empty": "empty has no folder val: it must hold train and val",
    "--data {}/images --val-fraction 2": "2 is not above 0 and at most 1",
    "--data {}/images --num-classes 1": "the data has 2 classes, the model has 1: --num-classes 2",
    "--image-size 0": "0 is no whole number from 1 on",
    "--image-size 30": "image_size 30 must be a multiple of patch_size 7",
    "--batch-size -8": "-8 is no whole number from 1 on",
    "--limit-val 0.5": "0.5 is no whole number from 1 on",
    "--seed one": "invalid int value: 'one'",
    "--weights {}/nowhere.pth": "no checkpoint at",
    "--weights {}/text": "text is no checkpoint, or damaged",
    "--weights {}/code": "code holds random.Random, which could run code",
    "--weights {}/deeper": "blocks.2.",
    "--weights {}/wider": "does not fit the model: ",
    "--model vit_tiny_patch16_224 --weights {}/nowhere": "no checkpoint at",
}
WRONG_TRAINING = {
    "--data {}/val-only": "val-only has no folder train",
    "--data {}/odd": "train and val have different classes: c, d in one alone",
    "--target 0": "0 is not above 0 and at most 1",
    "--target nan": "nan is no number",
    "--target half": "half is no number",
    "--target 1.5": "1.5 is not above 0 and at most 1",
    "--target 0.01 --recipe adaptive": "out of reach: the lowest r found is 0.",
    "--lr 1e-3 -1": "-1 is no number from 0 on",
    "--tau 0": "--tau must be above 0",
    "--epochs 0": "0 is no whole number from 1 on",
    "--recipe papr": "invalid choice: 'papr'",
    "--method dense --recipe adaptive": "--recipe adaptive is for thresholds",
    "--out {}/text": "cannot write to",
    "--resume": "nothing to resume",
}
WRONG_EVALUATION = {
    "--thresholds {}/absent": "cannot read thresholds from ",
    "--thresholds {}/text": "cannot read thresholds from ",
    "--thresholds {}/deeper.json": "merge_thresholds must be 2 numbers",
    "--thresholds {}/ltm.json": "thresholds of the method ltm do not fit the method ltmp",
    "--thresholds {}/other.json": "learned for demo, the model is tiny: pass --model demo",
    "--method tome": "--method tome needs --r",
    "--method tome --r 1 2 3": "r must be",
    "--method tome --r 1 --thresholds {}/good.json": "--method tome has no thresholds",
    "--r 1": "--r goes with --method tome or --method topk",
}
WRONG = [(train, *wrong) for wrong in (WRONG_INPUT | WRONG_TRAINING).items()]
WRONG += [(evaluate, *wrong) for wrong in (WRONG_INPUT | WRONG_EVALUATION).items()]


@pytest.fixture
def wrong_files(image_folder, tiny, tmp_path):
    """The files that the flags above name."""
    for name in ("empty", "val-only/val/a"):
        (tmp_path / name).mkdir(parents=True)
    image_folder(tmp_path / "images", per_class=1)
    shutil.copytree(tmp_path / "images", tmp_path / "odd")
    for old, new in (("train/b", "train/c"), ("val/b", "val/d")):
        (tmp_path / "odd" / old).rename(tmp_path / "odd" / new)
    (tmp_path / "text").write_text("text")
    torch.save({"model": random.Random()}, tmp_path / "code")
    torch.save(ltmp.create_model("tiny", depth=3).state_dict(), tmp_path / "deeper")
    torch.save(ltmp.create_model("tiny", dim=24).state_dict(), tmp_path / "wider")
    contents = {
        "deeper": {"merge_thresholds": [0.9] * 3, "prune_thresholds": [0.0] * 3},
        "ltm": {"method": "ltm", "merge_thresholds": [0.9] * 2},
        "other": {"model": "demo"},
        "good": {"merge_thresholds": [0.9] * 2, "prune_thresholds": [0.0] * 2},
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"method": "ltmp"} | content))
    return tmp_path


@pytest.mark.parametrize("script, flags, message", WRONG)
def test_what_is_wrong_is_said_in_one_line(wrong_files, capsys, script, flags, message):
    if script is train:
        more = ["--limit-train", "64", "--out", str(wrong_files / "out")]
    else:
        more = [] if "tome" in flags else ["--thresholds", str(wrong_files / "good.json")]
    flags = [flag.format(wrong_files) for flag in flags.split()]
    stopped(script.main, [*TINY_MODEL, "--method", "ltmp", *more, *flags])
    printed = capsys.readouterr()
    assert message in printed.err, printed.err
    assert len(printed.err.splitlines()) == 1 and not printed.out, printed.err
