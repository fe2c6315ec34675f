"""What accuracy is left at what FLOPs: top-1, and KL from the dense predictions, against r.

    python -m experiments.frontier --out out/frontier
    python -m experiments.frontier --out out/deit --data /imagenet --targets 0.5 0.75 --seeds 1

Thresholds for every method, target and seed are learned by train.py, then all are evaluated on the
same images. The folder --out gets a folder for each run; frontier.csv and frontier.png show those
of the last command. The same command goes on where it was stopped.
"""

import io
import json
import statistics
import subprocess
import sys
from pathlib import Path

import ltmp
from extras import batching, measuring, models, runtime
from flops import model_flops

TRAIN = Path(__file__).parent.parent / "train.py"
FIXED = ("tome", "topk")
# Flags that decide what a run finds, and that train.py gets too.
DECISIVE = ("data", "model", "weights", "num_classes", "image_size", "val_fraction")
DECISIVE += ("limit_train", "recipe", "amp")


def planned_runs(args):
    """Every run as (method, target, seed); a fixed count needs one seed: it draws nothing."""
    runs = [("dense", 1.0, 0)]
    for method in sorted(args.methods, key=FIXED.__contains__, reverse=True):
        seeds = [0] if method in FIXED else range(args.seed, args.seed + args.seeds)
        runs += [(method, target, seed) for seed in seeds for target in args.targets]
    return runs


def fixed_count(config, target):
    """How many tokens tome or topk must remove per block for the r that is nearest to target."""

    def distance(count):
        tokens = config.num_tokens
        kept = []
        for _ in range(config.depth):
            tokens -= min(count, (tokens - config.prefix_tokens) // 2)
            kept.append(tokens)
        return abs(model_flops(config, kept) / model_flops(config) - target)

    return min(range(config.num_tokens // 2 + 1), key=distance)


def ended(command):
    """Run a program, and return its exit code. Ctrl-C reaches it, too: wait until it has saved."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def learn(method, target, seed, folder, args):
    """Learn thresholds by train.py, which goes on where it was stopped, or end the program."""
    command = [sys.executable, str(TRAIN), f"--method={method}", f"--target={target}"]
    command += [f"--seed={seed}", f"--out={folder}", "--limit-val=1"]
    for name in (*DECISIVE, "workers", "device"):
        value = getattr(args, name)
        if name != "amp" and value is not None:
            command.append(f"--{name.replace('_', '-')}={value}")
    command += ["--no-amp"] * (args.amp is False)
    command += ["--skip-bad-images"] * args.skip_bad_images
    command += ["--resume"] * (folder / "last.pt").exists()
    code = ended(command)
    if code:
        runtime.stop(
            f"{folder.name}: train.py ended with code {code}; once the reason that it gave is "
            "gone, the same command goes on from there"
        )


def reduced_model(dense, method, target, seed, folder, args):
    """The dense model's weights with the thresholds, or the fixed count, for this target."""
    r = fixed_count(dense.config, target) if method in FIXED else None
    model = ltmp.LTMPViT(dense.config, method, r=r, attention=dense.attention)
    ltmp.load_weights(model, dense.state_dict())
    if method not in FIXED:
        path = folder / "thresholds.json"
        if not path.exists():
            learn(method, target, seed, folder, args)
        ltmp.load_thresholds(model, models.read_thresholds(path))
    return model


def frontier(dense, dataset, args, device):
    """Learn and evaluate what is not there yet; write and return the rows, one for each run.

    Raises ValueError where --out holds the frontier of other flags.
    """
    check_settings(args)
    known = {}
    rows, skipped = [], set()

    def dense_logits(number, images):
        # The dense predictions are asked for once, for all runs.
        if number not in known:
            known[number] = dense(images)[0]
        return known[number]  # (B, classes)

    runs = planned_runs(args)
    for i, (method, target, seed) in enumerate(runs, 1):
        folder = args.out / f"{method}-{target:g}-{seed}"
        path = folder / f"metrics-{len(dataset)}.json"
        if not path.exists():
            runtime.say(f"{i}/{len(runs)}: {folder.name}")
            model = dense
            if method != "dense":
                model = reduced_model(dense, method, target, seed, folder, args).to(device)
            metrics, bad = measuring.measure(model, dataset, args, device, dense_logits)
            skipped |= bad
            runtime.write_file(path, json.dumps(metrics, indent=1))
        metrics = json.loads(path.read_text())
        row = {"method": method, "target": target, "seed": seed, "r": metrics["flops_ratio"]}
        rows.append(row | {key: metrics[key] for key in ("top1", "top5", "kl", "images")})
        lines = [",".join(map(str, line)) for line in (rows[0], *map(dict.values, rows))]
        runtime.write_file(args.out / "frontier.csv", "\n".join(lines) + "\n")
    runtime.say_skipped(skipped)
    return rows


def check_settings(args):
    """Write down the flags that decide what runs find. Raises ValueError where others are there."""
    path = args.out / "settings.json"
    settings = {name: getattr(args, name) for name in DECISIVE}
    # The seed draws the validation images where --val-fraction sets them aside.
    settings["seed"] = args.val_fraction and args.seed
    before = json.loads(path.read_text()) if path.exists() else settings
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{args.out} was made with {name} = {before.get(name)}, not {value}: "
                "name another --out, or use the same flags"
            )
    runtime.write_file(path, json.dumps(settings, indent=1))


def points_of(rows):
    """The rows of frontier, seeds together: one dict for each method and target.

    r is a mean; top1 and kl are (mean, half of the range over seeds).
    """
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["target"]), []).append(row)
    points = []
    for (method, target), group in sorted(groups.items()):
        r = statistics.mean(row["r"] for row in group)
        point = {"method": method, "target": target, "seeds": len(group), "r": r}
        for key in ("top1", "kl"):
            values = [row[key] for row in group]
            point[key] = (statistics.mean(values), (max(values) - min(values)) / 2)
        points.append(point)
    return points


def report(points):
    """The points as a table, +- half of the range over seeds."""
    lines = [f"{'method':<8}{'target':>7}{'seeds':>7}{'r':>8}{'top-1 (%)':>17}{'KL (nats)':>23}"]
    for point in points:
        head = f"{point['method']:<8}{point['target']:>7g}{point['seeds']:>7}{point['r']:>8.3f}"
        top1 = "{:.2f} +- {:.2f}".format(*point["top1"])
        kl = "{:.2g} +- {:.1g}".format(*point["kl"])
        lines.append(f"{head}{top1:>17}{kl:>23}")
    return "\n".join(lines)


def plot(points, path):
    """Draw top-1 and KL against r to a PNG; without matplotlib end the program with one line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        runtime.stop(f"{path} needs matplotlib: pip install -e '.[plots]'; frontier.csv is there")
    figure = Figure((11, 4.5), layout="constrained")
    top1, kl = figure.subplots(1, 2)
    for method in dict.fromkeys(point["method"] for point in points):
        own = [point for point in points if point["method"] == method]
        if method == "dense":
            top1.axhline(own[0]["top1"][0], color="black", linewidth=1, label="dense")
            continue
        r, form = [point["r"] for point in own], "s--" if method in FIXED else "o-"
        for axes, key in ((top1, "top1"), (kl, "kl")):
            values, spreads = zip(*(point[key] for point in own), strict=True)
            axes.errorbar(r, values, spreads, fmt=form, markersize=4, capsize=3, label=method)
    top1.set(ylabel="top-1 (%)")
    kl.set(ylabel="KL from the dense predictions (nats per image)", yscale="log")
    for axes in (top1, kl):
        axes.set_xlabel("r, share of the dense FLOPs")
        axes.grid(alpha=0.3)
    top1.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    runtime.write_file(path, content.getvalue())


def parse_args(argv):
    """The flags."""
    parser = runtime.command_line("Top-1, and KL from the dense predictions, against r.")
    models.model_flags(parser)
    methods = [method for method in ltmp.METHODS if method != "dense"]
    targets = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    number = runtime.at_least(1)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for runs, table and plot")
    add("--targets", type=runtime.share, nargs="+", default=targets, metavar="R", help=f"{targets}")
    add("--methods", choices=methods, nargs="+", default=methods, help="(default: all)")
    add("--seeds", type=number, default=3, metavar="N", help="from --seed on (%(default)s)")
    add("--limit-train", type=number, metavar="N", help="learn on N images, evenly spread")
    add("--recipe", choices=("paper", "adaptive"), help="how to learn (default: as train.py)")
    args = parser.parse_args(argv)
    try:
        models.settle_model(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv=None):
    """The command line: learn, evaluate, print, draw."""
    args = parse_args(argv)
    try:
        if runtime.processes()[1] > 1:
            raise ValueError("runs cannot be shared among processes: start it without torchrun")
        if args.val_fraction and args.seeds > 1:
            raise ValueError("--val-fraction needs --seeds 1: each seed draws other images")
        device = runtime.find_device(args.device)
        dataset = models.open_split(args, "val")
        state = models.read_weights(args.model, args.weights)
        sizes = {"num_classes": args.num_classes, "image_size": args.image_size}
        dense = models.build_model(args.model, "dense", state, **sizes).to(device).eval()
        models.number_classes(dense, dataset)
        models.check_classes(dataset, dense)
        dataset.transform = models.clean_transform(dense.config)
        rows = frontier(dense, batching.subset(dataset, args.limit_val), args, device)
    except ValueError as error:
        runtime.stop(error)
    points = points_of(rows)
    runtime.say(report(points), sys.stdout)
    plot(points, args.out / "frontier.png")


if __name__ == "__main__":
    runtime.run_main(main, "the same command goes on from there")
