"""Accuracy, FLOPs and kept tokens of a ViT, dense and with its tokens reduced.

    python evaluate.py                                            the demo and its learned thresholds
    python evaluate.py --data /imagenet --model deit_small_patch16_224 --thresholds out/thresholds.json
    python evaluate.py --method tome --r 8                        the same ViT with a fixed count instead
"""

import argparse
import atexit
import ctypes
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import data
import ltmp
from flops import flops_ratio, model_flops

DEMO = Path(__file__).parent / "demo"
DEMO_WEIGHTS, DEMO_THRESHOLDS = DEMO / "vit_demo.pth", DEMO / "thresholds.json"


# ---------------------------------------------------------------------------------------------
# What train.py and evaluate.py share: flags, the model, the progress line, files


def add_common_arguments(parser):
    """The flags that train.py and evaluate.py have in common."""
    parser.add_argument("--data", metavar="DIR", help="image folder with train/ and val/, one folder per class in each, "
                        "or a folder with Fashion-MNIST's original files (default: the embedded Fashion-MNIST)")
    parser.add_argument("--model", choices=ltmp.VARIANTS, metavar="NAME",
                        help="one of %(choices)s (default: demo; with --data deit_small_patch16_224)")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint of the ViT, a path or URL, or none for random weights "
                        "(default: the demo's own, or DeiT's official ones, downloaded once)")
    parser.add_argument("--num-classes", type=positive, metavar="N", help="classes (default: as many as the weights have); "
                        "another number than theirs makes a new head, to be trained with train.py --method dense")
    parser.add_argument("--image-size", type=positive, metavar="PIXELS", help="side of the images; position embeddings are resized (default: the model's)")
    parser.add_argument("--val-fraction", type=share, metavar="SHARE", help="where --data has no val/: use this share of its images instead, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, help="order, augmentation and split of the images (default: %(default)s)")
    parser.add_argument("-b", "--batch-size", type=positive, metavar="N", help="images per step (default: 128; 32 to train by the adaptive recipe)")
    parser.add_argument("--limit-val", type=positive, metavar="N", help="evaluate on N images, evenly spread (default: all)")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes that load images (default: one per core, at most 8; none for Fashion-MNIST)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None,
                        help="mixed precision, CUDA only: bfloat16, or float16 where the GPU lacks it (default: on)")


def positive(text):
    """argparse type: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def share(text):
    """argparse type: a number above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def default_model(args):
    """Name of the model that the flags ask for."""
    return args.model or ("deit_small_patch16_224" if args.data else "demo")


def processes():
    """(rank, count) of the processes that work together: those of torchrun, which meet at the first call, or (0, 1)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def total(tensor):
    """The sum of a tensor over all processes, in place."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def find_device(name):
    """torch.device by name; of several processes each takes its own GPU. Raises ValueError where it is not there."""
    if name == "cuda" and processes()[1] > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name}: {str(error).splitlines()[0]}") from None


def read_weights(name, weights):
    """The checkpoint that --weights names: a path or URL, None for the model's own; "none" gives None."""
    if weights == "none":
        return None
    if weights is not None:
        return ltmp.read_checkpoint(weights)
    return ltmp.read_checkpoint(DEMO_WEIGHTS) if name == "demo" else ltmp.read_checkpoint(ltmp.official_weights(name))


def build_model(name, method, state, tau=0.1, r=None, num_classes=None, image_size=None):
    """create_model with the weights in state (see read_weights), random ones if None.

    num_classes=None takes as many as the weights have. Raises ValueError where something does not fit.
    """
    changes = {"image_size": image_size} if image_size else {}
    if state is None:
        return ltmp.create_model(name, method, num_classes, tau, r, **changes)
    found = len(state["head.weight"]) if "head.weight" in state else None
    model = ltmp.create_model(name, method, num_classes or found, tau, r, **changes)
    if num_classes and num_classes != found:
        say(f"note: the head for {num_classes} classes is new (the weights have {found or 'none'}): train it with --method dense")
    return ltmp.load_weights(model, state, new_head=num_classes is not None)


def open_split(args, split):
    """data.open_split as the flags say."""
    return data.open_split(args.data, split, None, args.val_fraction, args.seed)


def still(dataset, model):
    """The dataset under the transform that belongs to the model's weights.

    Raises ValueError where the data has classes that the model does not know.
    """
    count, config = len(dataset.classes), model.config
    if count > config.num_classes:
        raise ValueError(f"the data has {count} classes, the weights have {config.num_classes}: --num-classes {count} makes "
                         "a new head, to be trained with train.py --method dense")
    if count < config.num_classes:
        say(f"note: the data has {count} classes, the weights have {config.num_classes}: labels are taken as their first {count}")
    dataset.transform = clean_transform(config)
    return dataset


def clean_transform(config):
    """data.eval_transform as the weights of a ViTConfig want it."""
    return data.eval_transform(config.image_size, config.crop_pct, config.mean, config.std)


def dense_twin(model):
    """The same weights without merging or pruning."""
    dense = ltmp.LTMPViT(model.config, "dense").to(next(model.parameters()).device)
    return ltmp.load_weights(dense, model.state_dict())


def amp_dtype(device, amp):
    """bfloat16 on CUDA, float16 where the GPU lacks it, None (float32) elsewhere or with --no-amp."""
    if device.type != "cuda" or amp is False:
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def amp_context(device, amp):
    """Autocast to amp_dtype."""
    dtype = amp_dtype(device, amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def own_share(dataset):
    """The items of a dataset that this one of several processes is to evaluate: each is somebody's, and one's alone."""
    rank, count = processes()
    return dataset if count == 1 else torch.utils.data.Subset(dataset, range(rank, len(dataset), count))


def make_loader(dataset, args, device, **options):
    """A DataLoader with the workers that --workers says, or that suit the data; pinned memory on CUDA."""
    innermost = dataset
    while hasattr(innermost, "dataset"):
        innermost = innermost.dataset
    workers = args.workers
    if workers is None:
        workers = 0 if isinstance(innermost, data.FashionMNIST) else min(8, os.cpu_count() or 1)
    return torch.utils.data.DataLoader(dataset, num_workers=workers, pin_memory=device.type == "cuda",
                                       worker_init_fn=ignore_interrupt, **options)


def ignore_interrupt(worker):
    """Ctrl-C reaches the workers too; they end with the main process, which decides when."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Progress:
    """One line that renews itself in a terminal; elsewhere a plain line every `every` seconds."""

    def __init__(self, every=10):
        self.live, self.every, self.start, self.shown = sys.stderr.isatty(), every, time.time(), time.time()
        self.silent = processes()[0] > 0

    def show(self, text, done, total):
        """Show text with the share done and an estimate of the time left."""
        now = time.time()
        if self.silent or (now - self.shown < (0.1 if self.live else self.every) and done < total):
            return
        self.shown = now
        left = (now - self.start) / done * (total - done)
        line = f"{text}  {int(left) // 60}:{int(left) % 60:02d} left" if done < total else f"{text}  {now - self.start:.0f} s"
        print(f"\r{line}\x1b[K" if self.live else line, end="" if self.live and done < total else "\n", file=sys.stderr, flush=True)


def stop(message, code=2):
    """End the program with one line on stderr (code 2: bad input)."""
    say(f"{Path(sys.argv[0]).name}: {message}")
    sys.exit(code)


def say(text, file=None):
    """print, on stderr by default; of several processes only the first one speaks."""
    if processes()[0] == 0:
        print(text, file=file or sys.stderr)


def write_file(path, text):
    """Write under a temporary name, then rename: the file is whole at every moment. Only the first process writes."""
    if processes()[0] > 0:
        return
    Path(f"{path}.tmp").write_text(text)
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------------------------------------
# Measuring


@torch.inference_mode()
def measure(model, loader, device, amp=None, name="evaluate"):
    """Run inference, tokens really dropped, over a loader of (images, labels): of several processes each over its own.

    Returns a dict: top1, top5 (percent), flops_ratio (r per image, averaged), gflops (multiply-adds
    per image / 1e9), kept (mean tokens after each block), images. Raises ValueError without images.
    """
    model.eval()
    sums = torch.zeros(4 + model.config.depth, dtype=torch.float64)  # images, top-1 hits, top-5 hits, r, tokens kept
    progress, batches = Progress(), len(loader)
    for step, (images, labels) in enumerate(loader, 1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with amp_context(device, amp):
            logits, kept = model(images)  # (B, classes), (depth, B)
        best = logits.float().topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        kept = kept.cpu().double()
        sums += torch.cat([torch.tensor([len(images), best[:, 0].sum(), best.sum(), flops_ratio(kept, model.config) * len(images)], dtype=torch.float64), kept.sum(1)])
        progress.show(f"{name}: {int(sums[0])} images, top-1 {100 * sums[1] / sums[0]:.2f} %", step, batches)
    images, top1, top5, ratio, *kept = total(sums).tolist()
    if not images:
        raise ValueError("no images to evaluate")
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "flops_ratio": ratio / images,
            "gflops": ratio / images * model_flops(model.config) / 1e9, "kept": [tokens / images for tokens in kept], "images": int(images)}


def measure_both(model, loader, device, amp=None):
    """measure() of the model, and of its dense twin as dense_top1, dense_top5 and dense_gflops."""
    dense = measure(dense_twin(model), loader, device, amp, "dense")
    reduced = dense if model.method == "dense" else measure(model, loader, device, amp, model.method)
    return reduced | {f"dense_{key}": dense[key] for key in ("top1", "top5", "gflops")}


def report(metrics, name, method):
    """The five lines that say what came out."""
    kept, target = metrics["kept"], f" (target {metrics['target']:g})" if "target" in metrics else ""
    return (f"{name}, {method}, {metrics['images']} validation images\n"
            f"  dense    top-1 {metrics['dense_top1']:6.2f} %   top-5 {metrics['dense_top5']:6.2f} %   {metrics['dense_gflops']:.3g} GFLOPs per image\n"
            f"  reduced  top-1 {metrics['top1']:6.2f} %   top-5 {metrics['top5']:6.2f} %   {metrics['gflops']:.3g} GFLOPs per image\n"
            f"  r = {metrics['flops_ratio']:.3f}{target}: {100 - 100 * metrics['flops_ratio']:.1f} % fewer FLOPs, top-1 changes by {metrics['top1'] - metrics['dense_top1']:+.2f} points\n"
            f"  tokens after each block: {' '.join(f'{tokens:.0f}' for tokens in kept)}")


# ---------------------------------------------------------------------------------------------
# Speed


@torch.no_grad()
def set_shares(model, images, share):
    """Set each threshold, block after block, where it merges or prunes `share` of what it meets on images (B, 3, S, S)."""
    def place(step, masker, inputs):
        scores = inputs[0][inputs[0].isfinite()]
        if len(scores):
            masker.threshold.fill_(scores.quantile(1 - share if step == "merge" else share))

    hooks = [getattr(block, f"{step}_masker").register_forward_pre_hook(partial(place, step))
             for block in model.blocks for step in ltmp.METHODS[model.method]]
    model.eval()(images)
    for hook in hooks:
        hook.remove()


def timed(run, device):
    """Seconds that run() takes, the work of a GPU included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def peak_memory(run, device):
    """MB that run() needs at its peak, beyond what was there before; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, or it would count as there before
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return None
    status = lambda field: int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def compare(runs, repeats, device):
    """Run the functions in turn, `repeats` times after one to warm up. Returns median seconds and peak MB of each."""
    memory = [peak_memory(run, device) for run in runs]
    times = [[timed(run, device) for run in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)], memory


def benchmark(model, dataset, args, device):
    """Print and return rows of dense (torch's fused attention) against reduced, in turn in this process.

    efficiency = dense seconds / reduced seconds * r: 1 is all that the FLOPs promise. Inference at each
    of --batch-sizes; and one training step of 16 images: all weights of the dense ViT against the thresholds alone.
    """
    twin, rows = dense_twin(model), []
    heads = ("images", "dense ms", "reduced ms", "speed-up", "r", "efficiency", "dense MB", "reduced MB")
    print(f"{'':<10}" + "".join(f"{head:>12}" for head in heads))

    def row(name, count, runs, r):
        (dense, reduced), memory = compare(runs, args.repeats, device)
        found = (count, 1e3 * dense, 1e3 * reduced, dense / reduced, r, dense / reduced * r, *memory)
        rows.append({"what": name} | dict(zip(heads, found)))
        digits = (0, 1, 1, 2, 3, 2, 0, 0)
        print(f"{name:<10}" + "".join(f"{'-' if x is None else format(x, f'.{d}f'):>12}" for x, d in zip(found, digits)), flush=True)

    def first(count):
        return torch.stack([dataset[i * len(dataset) // count][0] for i in range(count)]).to(device)

    @torch.inference_mode()
    def infer(net, images):
        with amp_context(device, args.amp):
            return net(images)

    if args.share:
        set_shares(model, first(min(32, len(dataset))), args.share)
    for count in args.batch_sizes:
        images = first(count)
        r = flops_ratio(infer(model.eval(), images)[1].cpu().double(), model.config).item()
        row("inference", count, [lambda: infer(twin.eval(), images), lambda: infer(model, images)], r)

    def step(net, images):
        with amp_context(device, args.amp):
            logits, kept = net(images)
        (logits.float().logsumexp(1).mean() + flops_ratio(kept, net.config)).backward()

    model.train().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("threshold"))
    images = first(16)
    row("training", 16, [lambda: step(twin.train().requires_grad_(), images), lambda: step(model, images)], r)
    return rows


# ---------------------------------------------------------------------------------------------
# The frontier: what accuracy is left at what FLOPs


def fixed_count(config, target):
    """The tokens to remove per block, tome or topk, whose r is nearest to target."""
    def r(count):
        tokens, kept = config.num_tokens, []
        for _ in range(config.depth):
            tokens -= min(count, (tokens - 1) // 2)
            kept.append(tokens)
        return model_flops(config, kept) / model_flops(config)

    return min(range(config.num_tokens // 2 + 1), key=lambda count: abs(r(count) - target))


def frontier(name, state, loader, args, device):
    """Top-1 against r of all methods at --targets, thresholds by train.py, one run a method, target and seed.

    Writes into the folder --frontier: the runs, frontier.csv and frontier.json (a row for each), and
    frontier.png where matplotlib is at hand. What is there already is not made again. Returns the rows.
    """
    folder, rows = Path(args.frontier), []
    folder.mkdir(parents=True, exist_ok=True)
    build = partial(build_model, name, state=state, num_classes=args.num_classes, image_size=args.image_size)  # and the method
    fixed = ("tome", "topk")  # no chance in these: one seed
    plan = [("dense", 1.0, 0)] + [(method, target, 0) for method in args.methods if method in fixed for target in args.targets]
    plan += [(method, target, seed) for seed in range(args.seed, args.seed + args.seeds)
             for method in args.methods if method not in fixed for target in args.targets]
    shared = [f"--{flag.replace('_', '-')}={value}" for flag in ("data", "model", "weights", "num_classes", "image_size", "val_fraction", "workers", "device", "limit_train")
              if (value := getattr(args, flag)) is not None] + (["--no-amp"] if args.amp is False else [])
    for i, (method, target, seed) in enumerate(plan, 1):
        run = folder / f"{method}-{target:g}-{seed}"
        found = run / f"test-{len(loader.dataset)}.json"
        if not found.exists():
            print(f"{i}/{len(plan)}: {run.name}", file=sys.stderr, flush=True)
            run.mkdir(exist_ok=True)
            if method in ("dense", "tome", "topk"):
                model = build(method, r=None if method == "dense" else fixed_count(ltmp.VARIANTS[name], target))
            else:
                if not (run / "thresholds.json").exists():
                    again = ["--resume"] if (run / "last.pt").exists() else []
                    learn = [f"--method={method}", f"--target={target}", f"--seed={seed}", f"--out={run}", "--limit-val=1", *shared, *again]
                    subprocess.run([sys.executable, str(Path(__file__).with_name("train.py")), *learn], check=True, stdout=subprocess.DEVNULL)
                model = ltmp.load_thresholds(build(method), run / "thresholds.json")
            write_file(found, json.dumps(measure(model.to(device), loader, device, args.amp, run.name), indent=1))
        metrics = json.loads(found.read_text())
        rows.append({"method": method, "target": target, "seed": seed, "r": metrics["flops_ratio"], "top1": metrics["top1"],
                     "top5": metrics["top5"], "images": metrics["images"]})
        write_file(folder / "frontier.json", json.dumps(rows, indent=1))
        write_file(folder / "frontier.csv", "\n".join(",".join(map(str, row)) for row in [list(rows[0]), *map(dict.values, rows)]) + "\n")
    return rows


def frontier_points(rows):
    """Rows of frontier -> {method: [(target, mean r, mean top-1, half the range of top-1 over seeds)]}."""
    groups = {}
    for row in rows:
        groups.setdefault(row["method"], {}).setdefault(row["target"], []).append(row)
    return {method: [(target, statistics.mean(row["r"] for row in some), statistics.mean(row["top1"] for row in some),
                      (max(row["top1"] for row in some) - min(row["top1"] for row in some)) / 2)
                     for target, some in sorted(targets.items())] for method, targets in groups.items()}


def frontier_report(points):
    """The table of frontier_points as text, one column a method."""
    dense, methods = points["dense"][0][2], [method for method in points if method != "dense"]
    lines = [f"top-1 at r, +- half the range over seeds; dense {dense:.2f} %",
             f"{'target':<8}" + "".join(f"{method:>22}" for method in methods)]
    for row in zip(*(points[method] for method in methods)):
        lines.append(f"{row[0][0]:<8g}" + "".join(f"{f'{top1:.2f} +- {spread:.2f} at {r:.3f}':>22}" for _, r, top1, spread in row))
    return "\n".join(lines)


def plot_frontier(points, path):
    """Draw frontier_points to a PNG or SVG. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install -e '.[plots]'; the numbers are in frontier.csv") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, some in points.items():
        if method == "dense":
            axes.axhline(some[0][2], color="black", linewidth=1, label="dense")
            continue
        _, r, top1, spread = zip(*some)
        learned = method not in ("tome", "topk")
        axes.errorbar(r, top1, spread, marker="o" if learned else "s", markersize=4, linestyle="-" if learned else "--", capsize=3, label=method)
    axes.set(xlabel="r, share of the dense FLOPs", ylabel="top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------


def chosen_model(args):
    """The model that the flags ask for, with weights and thresholds, and its name."""
    name = default_model(args)
    state = read_weights(name, args.weights)
    build = partial(build_model, name, state=state, num_classes=args.num_classes, image_size=args.image_size)  # and the method
    if args.method in ("dense", "tome", "topk"):
        return build(args.method, r=args.r[0] if args.r and len(args.r) == 1 else args.r), name
    inside = [step for step in ("merge", "prune") if state and f"blocks.0.{step}_masker.threshold" in state]
    if inside and not args.thresholds:
        return build(args.method or {"merge": "ltm", "prune": "ltp", "merge prune": "ltmp"}[" ".join(inside)]), name
    if args.benchmark and args.share:
        return build(args.method or "ltmp"), name
    if not args.thresholds and name != "demo":
        raise ValueError("--thresholds FILE is needed: the thresholds.json that train.py wrote")
    found = ltmp.read_thresholds(args.thresholds or DEMO_THRESHOLDS)
    image_size = args.image_size or found.get("image_size")
    if found.get("model", name) != name:
        raise ValueError(f"the thresholds were learned for {found['model']}, the model is {name}: pass --model {found['model']}")
    return ltmp.load_thresholds(build(args.method or found["method"], image_size=image_size), found), name


def main(argv=None):
    """The command line: evaluate, print, write the metrics."""
    parser = argparse.ArgumentParser(description="Evaluate a ViT, dense and with its tokens reduced. Without arguments: the demo.")
    add_common_arguments(parser)
    parser.add_argument("--method", choices=ltmp.METHODS, help="default: that of the thresholds")
    parser.add_argument("--thresholds", metavar="FILE", help="thresholds.json from training (default: those in the checkpoint; the demo's own)")
    parser.add_argument("--r", type=int, nargs="+", metavar="N", help="tokens that tome or topk removes per block: one number, or one per block")
    parser.add_argument("--json", metavar="FILE", help="write the metrics there")
    parser.add_argument("--frontier", metavar="DIR", help="top-1 against r of every method: learn thresholds for --targets by train.py, evaluate, "
                        "and write a table and a plot there; goes on where it was stopped")
    parser.add_argument("--targets", type=share, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], metavar="R", help="of --frontier (default: 0.3 0.4 ... 0.9)")
    parser.add_argument("--methods", choices=[m for m in ltmp.METHODS if m != "dense"], nargs="+", default=["ltmp", "ltm", "ltp", "ltpm", "tome", "topk"],
                        metavar="METHOD", help="of --frontier (default: all six)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="of --frontier: runs for each method and target (default: %(default)s)")
    parser.add_argument("--limit-train", type=positive, metavar="N", help="of --frontier: learn on N images, evenly spread (default: all)")
    parser.add_argument("--benchmark", action="store_true", help="time and memory, dense with torch's fused attention against reduced")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8, 32, 64], metavar="N", help="of --benchmark, images (default: 1 8 32 64)")
    parser.add_argument("--share", type=share, metavar="SHARE", help="with --benchmark: no --thresholds, but each merges or prunes this share of what it meets")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="of --benchmark; medians are shown (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        device = find_device(args.device)
        val_set = open_split(args, "val")
        if args.frontier:
            name = default_model(args)
            state = read_weights(name, args.weights)
            val_set = still(val_set, build_model(name, "dense", state, num_classes=args.num_classes, image_size=args.image_size))
            loader = make_loader(data.subset(val_set, args.limit_val), args, device, batch_size=args.batch_size or 128)
            points = frontier_points(frontier(name, state, loader, args, device))
            print(frontier_report(points))
            return plot_frontier(points, Path(args.frontier) / "frontier.png")
        model, name = chosen_model(args)
        if args.benchmark:
            rows = benchmark(model.to(device), still(val_set, model), args, device)
            return args.json and write_file(args.json, json.dumps(rows, indent=1))
        loader = make_loader(own_share(data.subset(still(val_set, model), args.limit_val)), args, device, batch_size=args.batch_size or 128)
    except ValueError as error:
        stop(error)
    metrics = {"model": name, "method": model.method} | measure_both(model.to(device), loader, device, args.amp)
    say(report(metrics, name, model.method), sys.stdout)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        write_file(args.json, json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
