"""Accuracy, FLOPs and kept tokens of a ViT, dense and with its tokens reduced.

    python evaluate.py                                            the demo and its learned thresholds
    python evaluate.py --data /imagenet --model deit_small_patch16_224 --thresholds out/thresholds.json
    python evaluate.py --method tome --r 8                        the same ViT with a fixed count instead
"""

import argparse
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

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


def find_device(name):
    """torch.device by name. Raises ValueError where it is not there."""
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
        print(f"note: the head for {num_classes} classes is new (the weights have {found or 'none'}): train it with --method dense", file=sys.stderr)
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
        print(f"note: the data has {count} classes, the weights have {config.num_classes}: labels are taken as their first {count}", file=sys.stderr)
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

    def show(self, text, done, total):
        """Show text with the share done and an estimate of the time left."""
        now = time.time()
        if now - self.shown < (0.1 if self.live else self.every) and done < total:
            return
        self.shown = now
        left = (now - self.start) / done * (total - done)
        line = f"{text}  {int(left) // 60}:{int(left) % 60:02d} left" if done < total else f"{text}  {now - self.start:.0f} s"
        print(f"\r{line}\x1b[K" if self.live else line, end="" if self.live and done < total else "\n", file=sys.stderr, flush=True)


def stop(message, code=2):
    """End the program with one line on stderr (code 2: bad input)."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


def write_file(path, text):
    """Write under a temporary name, then rename: the file is whole at every moment."""
    Path(f"{path}.tmp").write_text(text)
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------------------------------------
# Measuring


@torch.inference_mode()
def measure(model, loader, device, amp=None, name="evaluate"):
    """Run inference, tokens really dropped, over a loader of (images, labels).

    Returns a dict: top1, top5 (percent), flops_ratio (r per image, averaged), gflops (multiply-adds
    per image / 1e9), kept (mean tokens after each block), images.
    """
    model.eval()
    hits, kept_sum, ratio_sum, images_seen = torch.zeros(2), torch.zeros(model.config.depth, dtype=torch.float64), 0.0, 0
    progress, batches = Progress(), len(loader)
    for step, (images, labels) in enumerate(loader, 1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with amp_context(device, amp):
            logits, kept = model(images)  # (B, classes), (depth, B)
        best = logits.float().topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        hits += torch.stack([best[:, 0].sum(), best.sum()]).cpu()
        kept = kept.cpu().double()
        kept_sum += kept.sum(1)
        ratio_sum += flops_ratio(kept, model.config).item() * len(images)
        images_seen += len(images)
        progress.show(f"{name}: {images_seen} images, top-1 {100 * hits[0] / images_seen:.2f} %", step, batches)
    top1, top5 = (100 * hits / images_seen).tolist()
    ratio = ratio_sum / images_seen
    return {"top1": top1, "top5": top5, "flops_ratio": ratio, "gflops": ratio * model_flops(model.config) / 1e9,
            "kept": (kept_sum / images_seen).tolist(), "images": images_seen}


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
    args = parser.parse_args(argv)
    try:
        device = find_device(args.device)
        val_set = open_split(args, "val")
        model, name = chosen_model(args)
        loader = make_loader(data.subset(still(val_set, model), args.limit_val), args, device, batch_size=args.batch_size or 128)
    except ValueError as error:
        stop(error)
    metrics = {"model": name, "method": model.method} | measure_both(model.to(device), loader, device, args.amp)
    print(report(metrics, name, model.method))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        write_file(args.json, json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
