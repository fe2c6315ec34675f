"""Accuracy, FLOPs and kept tokens of a ViT, dense and with its tokens reduced.

    python evaluate.py                                            the demo and its learned thresholds
    python evaluate.py --data /imagenet --model deit_small_patch16_224 --thresholds out/thresholds.json
    python evaluate.py --method tome --r 8                        the same ViT with a fixed count instead
    python evaluate.py --picture photo.jpg                        what becomes of its patches, block by block
    python evaluate.py --benchmark                                is it as fast as the FLOPs promise?
    python evaluate.py --frontier out/frontier                    accuracy against FLOPs, all methods
"""

import argparse
import atexit
import ctypes
import difflib
import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import ltmp
from flops import flops_ratio, model_flops

DEMO = Path(__file__).parent / "demo"
DEMO_WEIGHTS, DEMO_THRESHOLDS = DEMO / "vit_demo.pth", DEMO / "thresholds.json"


# ---------------------------------------------------------------------------------------------
# What train.py and evaluate.py share: flags, the model, the progress line, files


def command_line(description):
    """A parser with the flags that train.py and evaluate.py have in common; what it refuses, it refuses in one line."""
    parser = argparse.ArgumentParser(description=description)
    parser.error = stop
    parser.add_argument("--data", metavar="DIR", help="image folder with train/ and val/, one folder per class in each, "
                        "or a folder with Fashion-MNIST's original files (default: the embedded Fashion-MNIST)")
    parser.add_argument("--model", type=one_of(ltmp.VARIANTS), metavar="NAME",
                        help=f"one of {', '.join(ltmp.VARIANTS)} (default: demo; with --data deit_small_patch16_224)")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint of the ViT, a path or URL, or none for random weights "
                        "(default: the demo's own, or DeiT's official ones, downloaded once)")
    parser.add_argument("--num-classes", type=positive, metavar="N", help="classes (default: as many as the weights have); "
                        "another number than theirs makes a new head, to be trained with train.py --method dense")
    parser.add_argument("--image-size", type=positive, metavar="PIXELS", help="side of the images; position embeddings are resized (default: the model's)")
    parser.add_argument("--val-fraction", type=share, metavar="SHARE", help="where --data has no val/: use this share of its images instead, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, help="order, augmentation and split of the images (default: %(default)s)")
    parser.add_argument("-b", "--batch-size", type=positive, metavar="N", help="images per step (default: 128; 32 to train by the adaptive recipe)")
    parser.add_argument("--limit-val", type=positive, metavar="N", help="evaluate on N images, evenly spread (default: all)")
    parser.add_argument("--workers", type=partial(positive, least=0), metavar="N",
                        help="processes that load images (default: one per core, at most 8; none for Fashion-MNIST)")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on without the images that cannot be read, and list them at the end (default: stop at the first)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None,
                        help="mixed precision, CUDA only: bfloat16, or float16 where the GPU lacks it (default: on)")
    return parser


def one_of(names):
    """argparse type: one of the names; another is refused with the nearest one."""
    def check(text):
        if text not in names:
            near = difflib.get_close_matches(text, names, 1)
            raise argparse.ArgumentTypeError(f"unknown name {text!r}" + (f", did you mean {near[0]}?" if near else "") + f" Known: {', '.join(names)}")
        return text
    return check


def positive(text, least=1):
    """argparse type: a whole number above 0, or from `least` on."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
    return int(text)


def share(text):
    """argparse type: a number above 0, at most 1."""
    if not 0 < number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)


def number(text):
    """argparse type: a finite number, not negative."""
    try:
        if 0 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")


def default_model(args):
    """Name of the model that the flags ask for."""
    return args.model or ("deit_small_patch16_224" if args.data else "demo")


def processes():
    """(rank, count) of the processes that work together: those of torchrun, which meet at the first call, or (0, 1)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        import torch.distributed.nn  # noqa: F401  its default arguments keep the group that is there at its import, which torch.optim
        # causes: destroy_process_group would leave gloo's threads running, and Python would crash, now and then, at its end
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def total(tensor):
    """The sum of a tensor over all processes, in place. Where one of them is gone, the others end too."""
    if processes()[1] > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            if "by peer" not in str(error):  # gloo: connection reset, or closed, by peer
                raise
            stop("another process has ended: this one cannot go on without", 1, speaker=processes()[0])
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
        raise ValueError(f"the data has {count} classes, the model has {config.num_classes}: --num-classes {count} makes "
                         "a new head, to be trained with train.py --method dense")
    if count < config.num_classes:
        say(f"note: the data has {count} classes, the model has {config.num_classes}: labels are taken as their first {count}")
    dataset.transform = clean_transform(config)
    return dataset


def clean_transform(config):
    """data.eval_transform as the weights of a ViTConfig want it."""
    return data.eval_transform(config.image_size, config.crop_pct, config.mean, config.std)


def with_method(model, method):
    """The same weights with another method. Thresholds that the model has none for are those of a new one: 0 for pruning, off; 0.9 for merging."""
    other = ltmp.LTMPViT(model.config, method).to(next(model.parameters()).device)
    return ltmp.load_weights(other, model.state_dict())


def amp_dtype(device, amp):
    """bfloat16 on CUDA, float16 where the GPU lacks it, None (float32) elsewhere or with --no-amp."""
    if device.type != "cuda" or amp is False:
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def amp_context(device, amp):
    """Autocast to amp_dtype."""
    dtype = amp_dtype(device, amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def gathered(names):
    """The union of the processes' names, as a set."""
    if processes()[1] > 1:
        parts = [None] * processes()[1]
        dist.all_gather_object(parts, list(names))
        names = sum(parts, [])
    return set(names)


def own_share(dataset):
    """The items of a dataset that this one of several processes is to evaluate: each is somebody's, and one's alone."""
    rank, count = processes()
    return dataset if count == 1 else torch.utils.data.Subset(dataset, range(rank, len(dataset), count))


class Loader(torch.utils.data.DataLoader):
    """Batches (images, labels) of the images that can be read; the others are in .bad: index -> what is wrong.

    skip=False: the first that cannot be read ends the program, told by the process that met it. A batch without any good image is there, but empty.
    """

    def __init__(self, dataset, skip, **options):
        super().__init__(data.Readable(dataset), collate_fn=data.collate, **options)
        self.skip, self.bad = skip, {}

    def __iter__(self):
        for images, labels, bad in super().__iter__():
            if bad and not self.skip:
                stop(f"{next(iter(bad.values()))}; --skip-bad-images goes on without such", speaker=processes()[0])
            self.bad |= bad
            yield images, labels


def make_loader(dataset, args, device, **options):
    """A Loader with the workers that --workers says, or that suit the data; pinned memory on CUDA."""
    innermost = dataset
    while hasattr(innermost, "dataset"):
        innermost = innermost.dataset
    workers = args.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # a scheduler may grant fewer than there are
        workers = 0 if isinstance(innermost, data.FashionMNIST) else min(8, cores)
    context = "fork" if workers and sys.platform == "linux" else None  # those of a forkserver, Python 3.14's default, outlive a run that is killed
    return Loader(dataset, args.skip_bad_images, num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
                  multiprocessing_context=context, **options)


def ignore_signals(worker):
    """Ctrl-C, or a scheduler's SIGTERM to all, reaches the workers too; they end with the main process, which decides when."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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


def stop(message, code=2, speaker=0):
    """End the program with one line on stderr (code 2: bad input)."""
    say(f"{Path(sys.argv[0]).name}: {message}", speaker=speaker)
    sys.exit(code)


def say(text, file=None, speaker=0):
    """print, on stderr by default; of several processes only one speaks."""
    if processes()[0] == speaker:
        print(text, file=file or sys.stderr)


def say_skipped(messages):
    """List the images that were left out, if any."""
    if messages:
        say("\n  ".join([f"{len(messages)} images were left out:", *sorted(messages)]))


def write_file(path, content, append=False):
    """Write text or bytes under a temporary name, then rename: the file is whole at every moment. append: add text at its end instead.

    Only the first process writes. What cannot be written ends the program with one line, and leaves what was there.
    """
    if processes()[0] > 0:
        return
    try:
        if append:
            with open(path, "a") as file:
                file.write(content)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.tmp").write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        stop(f"cannot write {path}: {error.strerror}")


# ---------------------------------------------------------------------------------------------
# Measuring


@torch.inference_mode()
def measure(model, loader, device, amp=None, name="evaluate", dense=None):
    """Run inference, tokens really dropped, over a loader of (images, labels): of several processes each over its own.

    Returns a dict: top1, top5 (percent), flops_ratio (r per image, averaged), gflops (multiply-adds
    per image / 1e9), kept (mean tokens after each block), images. With dense, which gives the dense twin's logits for (step, images),
    also dense_top1, dense_top5, dense_gflops, and kl, how far the predictions are from the dense ones (nats per image).
    """
    model.eval()
    sums = torch.zeros(7 + model.config.depth, dtype=torch.float64)  # images; top-1, top-5 hits; dense ones; r; KL; tokens kept
    progress, batches = Progress(), len(loader)
    for step, (images, labels) in enumerate(loader, 1):
        if not len(images):  # none that could be read
            continue
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with amp_context(device, amp):
            logits, kept = model(images)  # (B, classes), (depth, B)
            wanted = dense(step, images) if dense else logits  # (B, classes)
        best = [some.float().topk(min(5, some.shape[1])).indices == labels[:, None] for some in (logits, wanted)]  # (B, 5) each
        hits = [hit for some in best for hit in (some[:, 0].sum(), some.sum())]
        kept, logits, wanted = (some.cpu().double() for some in (kept, logits, wanted))  # in float32 a KL of 4e-07 would be wrong by a quarter
        means = torch.stack([flops_ratio(kept, model.config), kl_divergence(logits, wanted)])
        sums += torch.cat([torch.tensor([len(images), *hits], dtype=torch.float64), means * len(images), kept.sum(1)])
        progress.show(f"{name}: {int(sums[0])} images, top-1 {100 * sums[1] / sums[0]:.2f} %", step, batches)
    sums = total(sums)
    images, *hits, ratio, kl = sums[:7].tolist()
    if not images:
        stop("none of the images could be read")
    top1, top5, dense_top1, dense_top5 = (100 * count / images for count in hits)
    gflops = model_flops(model.config) / 1e9
    beside = {"dense_top1": dense_top1, "dense_top5": dense_top5, "dense_gflops": gflops, "kl": kl / images} if dense else {}
    return {"top1": top1, "top5": top5, "flops_ratio": ratio / images, "gflops": ratio / images * gflops,
            "kept": (sums[7:] / images).tolist(), "images": int(images)} | beside


def measure_both(model, loader, device, amp=None, dense=None):
    """measure() of the model beside its dense twin. dense: as there, by default the twin itself."""
    if model.method == "dense":
        found = measure(model, loader, device, amp, "dense")
        return found | {f"dense_{key}": found[key] for key in ("top1", "top5", "gflops")} | {"kl": 0.0}
    twin = None if dense else with_method(model, "dense").eval()
    return measure(model, loader, device, amp, model.method, dense or (lambda step, images: twin(images)[0]))


def kl_divergence(logits, wanted):
    """How far predictions are from wanted ones: the mean over images of sum_c p_c log(p_c / q_c), in nats; p, q: softmax of wanted, logits (B, classes), at least in float32."""
    logits, wanted = (some.to(torch.promote_types(some.dtype, torch.float32)).log_softmax(1) for some in (logits, wanted))
    return F.kl_div(logits, wanted, reduction="batchmean", log_target=True)


def report(metrics, name, method, tokens=None):
    """The lines that say what came out. tokens: those of the dense model, to draw the kept ones as bars beside."""
    kept, target = metrics["kept"], f" (target {metrics['target']:g})" if "target" in metrics else ""
    counts = f": {' '.join(f'{count:.0f}' for count in kept)}" if tokens is None else f", of {tokens}\n{bars(kept, tokens)}"
    return (f"{name}, {method}, {metrics['images']} validation images\n"
            f"  dense    top-1 {metrics['dense_top1']:6.2f} %   top-5 {metrics['dense_top5']:6.2f} %   {metrics['dense_gflops']:.3g} GFLOPs per image\n"
            f"  reduced  top-1 {metrics['top1']:6.2f} %   top-5 {metrics['top5']:6.2f} %   {metrics['gflops']:.3g} GFLOPs per image\n"
            f"  r = {metrics['flops_ratio']:.3f}{target}: {100 - 100 * metrics['flops_ratio']:.1f} % fewer FLOPs, top-1 changes by {metrics['top1'] - metrics['dense_top1']:+.2f} points\n"
            f"  predictions differ from the dense ones by a KL divergence of {metrics['kl']:.2g} nats\n"
            f"  tokens after each block{counts}")


def bars(kept, tokens, width=50):
    """Tokens after each block as lines of text: a bar of `width` characters for all `tokens`."""
    return "\n".join(f"  {i:>4} {'#' * round(width * count / tokens):<{width}} {count:.0f}" for i, count in enumerate(kept, 1))


# ---------------------------------------------------------------------------------------------
# Pictures: which patches became one token, which were dropped, in which block

INK, FADED, LINE, PAPER, BLANK = (30, 30, 30), (110, 110, 110), (200, 200, 200), (255, 255, 255), (205, 215, 235)
GREEN, RED, BLUE, SHADE = (0, 120, 40), (200, 20, 20), (0, 90, 180), (200, 225, 245)
WIDTH, GAP = 850, 10  # pixels: a README's width, and what lies between two panels
OUTLINES = np.array([(0, 200, 255), (255, 0, 150), (255, 225, 0), (90, 225, 0), (255, 120, 0), (170, 110, 255), (255, 60, 60), (0, 225, 170)], np.uint8)


def pixels_of(image, config):
    """What the model sees, as pixels again: (3, S, S) normalized -> (S, S, 3) uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return (image.cpu() * std + mean).mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def scaled(pixels, side):
    """pixels (S, S, 3) uint8 -> (side, side, 3): whole pixels where it grows, averages where it shrinks."""
    how = Image.Resampling.NEAREST if side >= len(pixels) else Image.Resampling.BOX
    return np.array(Image.fromarray(pixels).resize((side, side), how))


def token_picture(pixels, held_by, cell):
    """Draw the state after a block, each patch as a square of `cell` pixels.

    A token of one patch shows its pixels; the patches of a merged token have their mean colour and, wherever
    a patch beside them is not of the same token, an outline in a colour of its own; what was dropped is BLANK.

    pixels (S, S, 3) uint8, held_by (G, G): the token that holds each patch, -1 for none -> (G cell, G cell, 3) uint8.
    """
    G, patch = len(held_by), len(pixels) // len(held_by)
    _, first, token, count = np.unique(held_by, return_index=True, return_inverse=True, return_counts=True)
    token = token.reshape(G, G)  # numbers from 0 on; first, count: its first patch, and how many it has
    patches = pixels.reshape(G, patch, G, patch, 3).mean((1, 3))  # (G, G, 3)
    mean = np.stack([np.bincount(token.ravel(), patches[..., c].ravel()) for c in range(3)], 1) / count[:, None]  # (tokens, 3)
    colour = OUTLINES[(first % G + 3 * (first // G)) % len(OUTLINES)]  # (tokens, 3); those close by seldom share one

    spread = lambda values: values.repeat(cell, 0).repeat(cell, 1)  # (G, G) -> (G cell, G cell)
    side, owner = G * cell, spread(np.where(held_by < 0, -1, token))
    merged, dropped = spread(count[token] > 1) & (owner >= 0), owner < 0
    picture = scaled(pixels, side)
    picture[merged] = mean.round()[owner[merged]]
    picture[dropped] = BLANK

    thick = 2 if cell >= 10 else 1
    beyond = np.pad(owner, thick, constant_values=-1)
    differs = lambda y, x: beyond[thick + y : thick + y + side, thick + x : thick + x + side] != owner
    grid, dark = differs(-1, 0) | differs(0, -1), spread((patches.mean(2) < 128) & (held_by >= 0))
    picture[grid] = 0.65 * picture[grid] + 90 * dark[grid][:, None]  # thin: lighter on dark patches, darker on light ones
    steps = range(-thick, thick + 1)
    outline = merged & np.any([differs(y, x) for y in steps for x in steps], 0)
    picture[outline] = colour[owner[outline]]
    return picture


def write(draw, x, y, text, size=13, fill=INK, width=math.inf, anchor="la"):
    """Text on a drawing, cut where it would be wider than `width` pixels. anchor: Pillow's, of (x, y)."""
    font = ImageFont.load_default(size)
    while draw.textlength(text, font) > width:
        text = text.removesuffix("...")[:-1] + "..."
    draw.text((x, y), text, fill, font, anchor)


def panel(sheet, x, y, array, left="", right=""):
    """Put a picture (H, W, 3) on the sheet at (x, y) in a thin frame, with captions above its corners."""
    draw, width = ImageDraw.Draw(sheet), array.shape[1]
    sheet.paste(Image.fromarray(array), (x, y))
    draw.rectangle((x - 1, y - 1, x + width, y + len(array)), outline=LINE)
    write(draw, x, y - 5, left, anchor="ls")
    write(draw, x + width, y - 5, right, anchor="rs")


def strip(pixels, held_by, kept, lines):
    """One image on its way through the blocks, as a PIL image.

    pixels (S, S, 3) uint8, held_by (depth, patches), kept (depth,) of that image, lines: what to write beside it.
    """
    depth, G = len(held_by), math.isqrt(held_by.shape[1])
    cell, columns = max(6, (WIDTH - 5 * GAP) // 4 // G), 4
    step, top = max(G * cell + 2, (WIDTH - 5 * GAP) // columns) + GAP, GAP + 20
    rise = G * cell + GAP + 24  # from row to row
    sheet = Image.new("RGB", (columns * step + GAP, top + rise * (1 + math.ceil(depth / columns)) - 20), PAPER)
    draw = ImageDraw.Draw(sheet)
    alone = np.arange(G * G).reshape(G, G)
    panel(sheet, GAP, top, scaled(pixels, G * cell), "input, as the model sees it")
    panel(sheet, GAP + step, top, token_picture(pixels, alone, cell), f"{G * G} patches", f"{G * G + 1} tokens")
    for i in range(depth):
        x, y = GAP + i % columns * step, top + rise * (1 + i // columns)
        panel(sheet, x, y, token_picture(pixels, held_by[i].reshape(G, G), cell), f"block {i + 1}", f"{kept[i]:.0f} tokens")

    x, width = GAP + 2 * step, 2 * step - GAP
    for i, line in enumerate([*lines, f"{kept[-1]:.0f} of {G * G + 1} tokens are left, the class token among them"]):
        write(draw, x, top - 5 + (20 * i + 4 if i else 0), line, 17 if i == 0 else 14, FADED if i == 1 else INK, width)
    corner, sample = (G // 2 - 1) * len(pixels) // G, 2 * len(pixels) // G
    sample = pixels[corner : corner + sample, corner : corner + sample]  # two by two patches from the middle
    for i, (held, text) in enumerate((([0, 1, 2, 3], "patches, each still a token of its own"),
                                      ([0, 0, 0, 0], "patches of one token: their mean colour, outlined"),
                                      ([-1] * 4, "dropped patches"))):
        y = top + G * cell - 68 + 24 * i
        panel(sheet, x + 1, y, token_picture(sample, np.array(held).reshape(2, 2), 10))
        write(draw, x + 30, y + 10, text, 14, INK, width - 30, "lm")
    return sheet


def class_name(classes, index):
    """classes: the names that are known."""
    return classes[index] if index < len(classes) else f"class {index}"


def save_picture(sheet, path):
    """Write a PIL image as PNG, whatever the file is called."""
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    write_file(path, content.getvalue())


@torch.inference_mode()
def draw_pictures(model, images, classes, args, device, name):
    """A strip of each of the PIL images, the files in --picture, written to --out as NAME_tokens.png."""
    model, dense, config, written = model.eval(), with_method(model, "dense").eval(), model.config, []
    for path, image in zip(args.picture, images):
        image = clean_transform(config)(image)  # (3, S, S)
        with amp_context(device, args.amp):
            logits, kept, held_by = model(image[None].to(device), trace=True)  # (1, classes), (depth, 1), (depth, 1, patches)
            whole, _ = dense(image[None].to(device))
        r = flops_ratio(kept.double().cpu(), config).item()
        lines = [Path(path).name, f"{name}, {model.method}", f"r = {r:.3f}: {100 - 100 * r:.1f} % fewer FLOPs than dense"]
        for way, output in (("dense", whole), ("reduced", logits)) if config.num_classes else ():
            probability, index = output[0].float().softmax(0).max(0)
            lines.append(f"{way}: {class_name(classes, index)}, {100 * probability:.1f} %")
        target = args.out / f"{Path(path).stem}_tokens.png"
        if target in written:  # of the same name in another folder
            target = target.with_stem(f"{target.stem}_{len(written) + 1}")
        save_picture(strip(pixels_of(image, config), held_by[:, 0].cpu().numpy(), kept[:, 0].tolist(), lines), target)
        written.append(target)
        print(target)


@torch.inference_mode()
def image_by_image(model, loader, device, amp=None, name="images"):
    """What inference does with each image: kept (depth, images), the class given, its probability and the label (images,) each."""
    model.eval()
    progress, found = Progress(), []
    for step, (images, labels) in enumerate(loader, 1):
        with amp_context(device, amp):
            logits, kept = model(images.to(device))  # (B, classes), (depth, B)
        probability, given = logits.float().softmax(1).max(1)
        found.append((kept.double().cpu(), given.cpu(), probability.cpu(), labels))
        progress.show(f"{name}: {step} of {len(loader)} batches", step, len(loader))
    return [torch.cat(part, -1) for part in zip(*found)]


@torch.inference_mode()
def gallery(model, dataset, classes, dense, reduced, title):
    """The images of a dataset where most and least is saved, and those whose prediction changes, as one PIL image.

    classes: their names; dense, reduced: what image_by_image found for the two.
    """
    config, (kept, given, probability, labels), (_, before, dense_probability, _) = model.config, reduced, dense
    r = model_flops(config, kept) / model_flops(config)  # (images,)
    order, changed = r.argsort(stable=True).tolist(), (given != before).nonzero()[:, 0].tolist()
    changed.sort(key=lambda i: -dense_probability[i])
    right = [int((guess == labels)[changed].sum()) for guess in (before, given)]
    sections = [("Fewest tokens kept", order[:4]), ("Most tokens kept", order[:-5:-1]),
                (f"Prediction changed: {len(changed)} of {len(r)} images ({right[0]} right before, {right[1]} after), the surest first", changed[:8])]
    G = config.image_size // config.patch_size
    cell = max(4, 98 // G)
    step, rise = max(2 * G * cell + 4, (WIDTH - 5 * GAP) // 4) + GAP, G * cell + 80
    rows = sum(math.ceil(len(chosen) / 4) for _, chosen in sections)
    sheet = Image.new("RGB", (4 * step + GAP, 42 + 26 * len(sections) + rise * rows), PAPER)
    draw, y = ImageDraw.Draw(sheet), 62
    write(draw, GAP, 10, title, 17)
    write(draw, GAP, 36, f"Each image, and its tokens after block {config.depth}. r: FLOPs as a share of dense, {r.mean():.3f} on average. "
          "Predictions: green is right, red is wrong.", 13, FADED)
    for heading, chosen in sections:
        write(draw, GAP, y, heading, 15)
        y += 26
        for k, i in enumerate(chosen):
            x, image = GAP + k % 4 * step, dataset[i][0]
            held_by = model(image[None].to(next(model.parameters()).device), trace=True)[2][-1, 0].reshape(G, G).cpu().numpy()
            pixels = pixels_of(image, config)
            panel(sheet, x, y, scaled(pixels, G * cell))
            panel(sheet, x + G * cell + 4, y, token_picture(pixels, held_by, cell))
            write(draw, x, y + G * cell + 6, f"r = {r[i]:.3f}, {kept[-1, i]:.0f} tokens")
            for line, (way, guess, sure) in enumerate((("dense", before, dense_probability), ("reduced", given, probability)), 1):
                write(draw, x, y + G * cell + 6 + 18 * line, f"{way}: {class_name(classes, guess[i])}, {100 * sure[i]:.0f} %",
                      13, GREEN if guess[i] == labels[i] else RED, step - GAP)
            y += rise if k % 4 == 3 or k == len(chosen) - 1 else 0
    return sheet


def ticks(low, high):
    """Round numbers from low or below to high or above, two to six steps."""
    span = high - low or abs(high) or 1
    step = 10 ** math.floor(math.log10(span / 2))
    step *= next(factor for factor in (1, 2, 5) if span / (factor * step) <= 5)
    return [step * i for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def plot(draw, box, title, note, values, band=None, limits=()):
    """Draw one value per block as a line with dots; band: lists (low, high) to shade between.

    box (left, top, right, bottom) in pixels; limits: numbers that the axis must include.
    """
    left, top, right, bottom = box
    marks = ticks(*(f([*values, *limits, *(v for side in band or () for v in side)]) for f in (min, max)))
    place = lambda i, v: (left + (right - left) * (i + 0.5) / len(values), bottom - (bottom - top) * (v - marks[0]) / (marks[-1] - marks[0] or 1))
    write(draw, left, top - 42, title, 15)
    write(draw, left, top - 22, note, 12, FADED)
    for mark in marks:
        y = place(0, mark)[1]
        draw.line((left, y, right, y), LINE)
        write(draw, left - 6, y, f"{mark:.6g}", 12, FADED, anchor="rm")
    if band:
        draw.polygon([place(i, v) for i, v in enumerate(band[0])] + [place(i, v) for i, v in enumerate(band[1])][::-1], SHADE)
    points = [place(i, v) for i, v in enumerate(values)]
    draw.line(points, BLUE, 2)
    for i, (x, y) in enumerate(points):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), BLUE)
        if i % math.ceil(len(values) / 12) == 0:
            write(draw, x, bottom + 6, str(i + 1), 12, FADED, anchor="ma")
    write(draw, (left + right) / 2, bottom + 24, "block", 12, FADED, anchor="ma")


def chart(model, kept, title):
    """The thresholds of every block, as far as the method learns any, and its kept tokens (depth, images), as a PIL image."""
    notes = {"merge": "more similar than this: merge", "prune": "not more important than this: drop"}
    plots = [(f"{step} threshold", note, [getattr(block, f"{step}_masker").threshold.item() for block in model.blocks])
             for step, note in notes.items() if hasattr(getattr(model.blocks[0], f"{step}_masker", None), "threshold")]
    low, high = torch.quantile(kept, torch.tensor([0.05, 0.95], dtype=kept.dtype), dim=1).tolist()
    plots.append(("tokens kept", "mean; shaded: 5th to 95th percentile", kept.mean(1).tolist(), (low, high), (0, model.config.num_tokens)))
    sheet = Image.new("RGB", (WIDTH, 320), PAPER)
    draw, width = ImageDraw.Draw(sheet), WIDTH // len(plots)
    write(draw, GAP, 10, title, 17)
    for i, parts in enumerate(plots):
        plot(draw, (i * width + 56, 90, (i + 1) * width - GAP, 270), *parts)
    return sheet


def draw_overview(model, loader, classes, args, device, name):
    """The sheets that --gallery and --chart ask for, of the images that the loader did not find bad."""
    if loader.bad:
        good = [i for i in range(len(loader.dataset)) if i not in loader.bad]
        loader = make_loader(torch.utils.data.Subset(loader.dataset, good), args, device, batch_size=loader.batch_size)
    reduced = image_by_image(model, loader, device, args.amp, "image by image")
    title = f"{name}, {model.method}: {len(loader.dataset)} validation images"
    if args.chart:
        save_picture(chart(model, reduced[0], title), args.chart)
        print(args.chart)
    if args.gallery:
        dense = image_by_image(with_method(model, "dense"), loader, device, args.amp, "dense, image by image")
        save_picture(gallery(model, loader.dataset, classes, dense, reduced, title), args.gallery)
        print(args.gallery)


# ---------------------------------------------------------------------------------------------
# Thresholds by the share that they remove


def at_rank(step, scores, rank):
    """The threshold () by which "merge" or "prune" removes a share of its scores (see set_shares). rank: that share, from 0 (off) to 1 (all; of similarities those above the lowest, and above 0)."""
    place = (1 - rank if step == "merge" else rank) * (len(scores) - 1)  # the most similar merge, the least important go
    return torch.lerp(scores[math.floor(place)], scores[math.ceil(place)], place % 1).clamp(0, 1)


@torch.no_grad()
def set_shares(model, images, shares):
    """Set each threshold, block after block, where it removes a share of what the blocks before leave of images (B, 3, S, S).

    shares: {"merge": share, "prune": share}, from 0 to 1. Returns the scores that each met: masker -> sorted (n,), with
    the threshold that is off at their end, 1 for merge, 0 for prune, so that rank 0 is off.
    """
    scores, hooks = {}, []

    def place(step, masker, inputs):
        found = inputs[0][inputs[0].isfinite()]
        scores[masker] = torch.cat([found, found.new_tensor([float(step == "merge")])]).sort().values
        masker.threshold.data.copy_(at_rank(step, scores[masker], shares[step]))

    for block in model.blocks:
        for step in ltmp.METHODS[model.method]:
            masker = getattr(block, f"{step}_masker")
            place(step, masker, [masker.threshold.new_empty(0)])  # for one that is never asked
            hooks.append(masker.register_forward_pre_hook(partial(place, step)))
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return scores


# ---------------------------------------------------------------------------------------------
# Speed


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
    for run in runs:  # what is allocated once and for all, such as gradients, is no part of the peak
        run()
    memory = [peak_memory(run, device) for run in runs]
    times = [[timed(run, device) for run in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)], memory


def benchmark(model, dataset, args, device):
    """Print and return rows of dense (torch's fused attention) against reduced, in turn in this process.

    efficiency = dense seconds / reduced seconds * r: 1 is all that the FLOPs promise. Inference at each
    of --batch-sizes; and one training step of 16 images: all weights of the dense ViT against the
    thresholds alone, for which r says nothing and is None.
    """
    twin, rows = with_method(model, "dense"), []
    heads = ("images", "dense ms", "reduced ms", "speed-up", "r", "efficiency", "dense MB", "reduced MB")
    print(f"{'':<10}" + "".join(f"{head:>12}" for head in heads))

    def row(name, count, runs, r):
        (dense, reduced), memory = compare(runs, args.repeats, device)
        found = (count, 1e3 * dense, 1e3 * reduced, dense / reduced, r, r and dense / reduced * r, *memory)
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
        set_shares(model, first(min(32, len(dataset))), {"merge": args.share, "prune": args.share})
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
    row("training", 16, [lambda: step(twin.train().requires_grad_(), images), lambda: step(model, images)], None)
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


def frontier(name, state, dense, loader, args, device):
    """Top-1, and KL from the dense predictions, against r of all methods at --targets, thresholds by train.py, one run a method, target and seed.

    Writes into the folder --frontier: the runs, frontier.csv and frontier.json (a row for each), and
    frontier.png where matplotlib is at hand. What is there already is not made again. name, state: of the model dense. Returns the rows.
    """
    folder, rows = Path(args.frontier), []
    build = partial(build_model, name, state=state, num_classes=args.num_classes, image_size=args.image_size)  # and the method
    known = {}  # the dense logits of every batch, asked once for all reduced runs

    def dense_logits(step, images):
        if step not in known:
            known[step] = dense(images)[0]
        return known[step]  # (B, classes)

    fixed = ("tome", "topk")  # no chance in these: one seed
    plan = [("dense", 1.0, 0)] + [(method, target, 0) for method in args.methods if method in fixed for target in args.targets]
    plan += [(method, target, seed) for seed in range(args.seed, args.seed + args.seeds)
             for method in args.methods if method not in fixed for target in args.targets]
    shared = [f"--{flag.replace('_', '-')}={value}" for flag in ("data", "model", "weights", "num_classes", "image_size", "val_fraction", "workers", "device", "limit_train", "recipe")
              if (value := getattr(args, flag)) is not None] + (["--no-amp"] if args.amp is False else []) + ["--skip-bad-images"] * args.skip_bad_images
    for i, (method, target, seed) in enumerate(plan, 1):
        run = folder / f"{method}-{target:g}-{seed}"
        found = run / f"metrics-{len(loader.dataset)}.json"
        if not found.exists():
            print(f"{i}/{len(plan)}: {run.name}", file=sys.stderr, flush=True)
            if method == "dense":
                model = dense
            elif method in fixed:
                model = build(method, r=fixed_count(dense.config, target))
            else:
                if not (run / "thresholds.json").exists():
                    again = ["--resume"] if (run / "last.pt").exists() else []
                    learn = [f"--method={method}", f"--target={target}", f"--seed={seed}", f"--out={run}", "--limit-val=1", *shared, *again]
                    code = subprocess.run([sys.executable, str(Path(__file__).with_name("train.py")), *learn], stdout=subprocess.DEVNULL).returncode
                    if code:
                        stop(f"{run.name}: train.py ended with code {code}; the same command goes on from there, once the reason that it gave, if any, is gone")
                model = ltmp.load_thresholds(build(method), run / "thresholds.json")
            write_file(found, json.dumps(measure_both(model.to(device), loader, device, args.amp, dense_logits), indent=1))
        metrics = json.loads(found.read_text())
        rows.append({"method": method, "target": target, "seed": seed, "r": metrics["flops_ratio"], "top1": metrics["top1"],
                     "top5": metrics["top5"], "kl": metrics["kl"], "images": metrics["images"]})
        write_file(folder / "frontier.json", json.dumps(rows, indent=1))
        write_file(folder / "frontier.csv", "\n".join(",".join(map(str, row)) for row in [list(rows[0]), *map(dict.values, rows)]) + "\n")
    return rows


def frontier_points(rows):
    """Rows of frontier -> {method: [(target, mean r, {"top1": (mean, half the range over seeds), "kl": the same of it})]}."""
    groups = {}
    for row in rows:
        groups.setdefault(row["method"], {}).setdefault(row["target"], []).append(row)

    def of_seeds(values):
        return statistics.mean(values), (max(values) - min(values)) / 2

    return {method: [(target, statistics.mean(row["r"] for row in some), {key: of_seeds([row[key] for row in some]) for key in ("top1", "kl")})
                     for target, some in sorted(targets.items())] for method, targets in groups.items()}


def frontier_report(points):
    """The two tables of frontier_points as text, one column a method."""
    dense, methods, lines = points["dense"][0][2]["top1"][0], [method for method in points if method != "dense"], []
    for key, digits, head in (("top1", 2, f"top-1 at r, +- half the range over seeds; dense {dense:.2f} %"), ("kl", 5, "KL from the dense predictions (nats per image) at r, the same")):
        lines += [head, f"{'target':<8}" + "".join(f"{method:>29}" for method in methods)]
        for row in zip(*(points[method] for method in methods)):
            cells = [f"{found[key][0]:.{digits}f} +- {found[key][1]:.{digits}f} at {r:.3f}" for _, r, found in row]
            lines.append(f"{row[0][0]:<8g}" + "".join(f"{cell:>29}" for cell in cells))
    return "\n".join(lines)


def plot_frontier(points, path):
    """Draw frontier_points to a PNG. Without matplotlib it ends the program with one line."""
    try:
        import matplotlib
    except ImportError:
        stop("the plot needs matplotlib: pip install -e '.[plots]'; the numbers are in frontier.csv")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, key in zip(panels, ("top1", "kl")):
        for method, some in points.items():
            if method == "dense":
                continue
            r, values, spread = zip(*((r, *found[key]) for _, r, found in some))
            learned = method not in ("tome", "topk")
            axes.errorbar(r, values, spread, marker="o" if learned else "s", markersize=4, linestyle="-" if learned else "--", capsize=3, label=method)
        axes.grid(alpha=0.3)
        axes.set_xlabel("r, share of the dense FLOPs")
    panels[0].axhline(points["dense"][0][2]["top1"][0], color="black", linewidth=1, label="dense")
    panels[0].set_ylabel("top-1 (%)")
    panels[1].set(ylabel="KL from the dense predictions (nats per image)", yscale="log")
    panels[0].legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    write_file(path, content.getvalue())


# ---------------------------------------------------------------------------------------------


def chosen_model(args):
    """The model that the flags ask for, with weights and thresholds, and its name."""
    name = default_model(args)
    state = read_weights(name, args.weights)
    build = partial(build_model, name, state=state, num_classes=args.num_classes, image_size=args.image_size)  # and the method
    if args.method in ("tome", "topk") and not args.r:
        raise ValueError(f"--method {args.method} needs --r, the tokens to remove per block")
    if args.method in ("dense", "tome", "topk") and args.thresholds:
        raise ValueError(f"--method {args.method} has no thresholds: leave --thresholds out, or --method")
    if args.r and args.method not in ("tome", "topk"):
        raise ValueError("--r goes with --method tome or --method topk")
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
    parser = command_line("Evaluate a ViT, dense and with its tokens reduced. Without arguments: the demo.")
    parser.add_argument("--method", type=one_of(ltmp.METHODS), metavar="METHOD", help=f"one of {', '.join(ltmp.METHODS)} (default: that of the thresholds)")
    parser.add_argument("--thresholds", metavar="FILE", help="thresholds.json from training (default: those in the checkpoint; the demo's own)")
    parser.add_argument("--r", type=partial(positive, least=0), nargs="+", metavar="N", help="tokens that tome or topk removes per block: one number, or one per block")
    parser.add_argument("--json", metavar="FILE", help="write the metrics there")
    group = parser.add_argument_group("pictures")
    group.add_argument("--picture", nargs="+", metavar="IMAGE", help="draw what becomes of these images' patches, block by block, "
                       "instead of evaluating; needs no --data, which gives the names of the classes")
    group.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for --picture: NAME_tokens.png for each (default: %(default)s)")
    group.add_argument("--gallery", metavar="FILE.png", help="draw the validation images that keep fewest and most tokens, and those whose prediction changes")
    group.add_argument("--chart", metavar="FILE.png", help="draw the thresholds and the kept tokens of every block")
    group = parser.add_argument_group("speed")
    group.add_argument("--benchmark", action="store_true", help="time and memory, dense with torch's fused attention against reduced")
    group.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8, 32, 64], metavar="N", help="images (default: 1 8 32 64)")
    group.add_argument("--share", type=share, metavar="SHARE", help="no --thresholds, but each merges or prunes this share of what it meets")
    group.add_argument("--repeats", type=positive, default=7, metavar="N", help="medians are shown (default: %(default)s)")
    group = parser.add_argument_group("frontier")
    group.add_argument("--frontier", metavar="DIR", help="top-1 and KL against r of every method: learn thresholds for --targets by train.py, evaluate, "
                       "and write a table and a plot there; goes on where it was stopped")
    group.add_argument("--targets", type=share, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], metavar="R", help="(default: 0.3 0.4 ... 0.9)")
    group.add_argument("--methods", type=one_of([m for m in ltmp.METHODS if m != "dense"]), nargs="+", default=["ltmp", "ltm", "ltp", "ltpm", "tome", "topk"],
                       metavar="METHOD", help="(default: all six)")
    group.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs for each method and target (default: %(default)s)")
    group.add_argument("--limit-train", type=positive, metavar="N", help="learn on N images, evenly spread (default: all)")
    group.add_argument("--recipe", type=one_of(("paper", "adaptive")), metavar="RECIPE", help="how to learn them: paper or adaptive (default: as train.py)")
    args = parser.parse_args(argv)
    try:  # whatever is wrong with the input
        device = find_device(args.device)
        if processes()[1] > 1 and (args.picture or args.gallery or args.chart or args.benchmark or args.frontier):
            raise ValueError("only plain evaluation can be shared among processes: run this without torchrun")
        if args.picture and (args.gallery or args.chart or args.json):
            raise ValueError("--picture draws instead of evaluating: --gallery, --chart and --json go without it")
        pictures = [data.open_image(path) for path in args.picture or ()]
        val_set = open_split(args, "val") if args.data or not args.picture else None
        if args.frontier:
            name = default_model(args)
            state = read_weights(name, args.weights)
            model = build_model(name, "dense", state, num_classes=args.num_classes, image_size=args.image_size)
        else:
            model, name = chosen_model(args)
        if args.benchmark:
            val_set.transform = clean_transform(model.config)
        elif not args.picture:
            val_set = still(val_set, model)
    except ValueError as error:
        stop(error)

    model.to(device)
    if args.picture:
        classes = val_set.classes if val_set else data.FASHION_CLASSES if name == "demo" and not args.weights else []
        return draw_pictures(model, pictures, classes, args, device, name)
    if args.benchmark:
        try:
            rows = benchmark(model, val_set, args, device)
        except data.ImageError as error:
            stop(error)
        return args.json and write_file(args.json, json.dumps(rows, indent=1))
    loader = make_loader(own_share(data.subset(val_set, args.limit_val)), args, device, batch_size=args.batch_size or 128)
    if args.frontier:
        points = frontier_points(frontier(name, state, model.eval(), loader, args, device))
        print(frontier_report(points))
        say_skipped(loader.bad.values())
        return plot_frontier(points, Path(args.frontier) / "frontier.png")
    metrics = {"model": name, "method": model.method} | measure_both(model, loader, device, args.amp)
    say(report(metrics, name, model.method, model.config.num_tokens if sys.stdout.isatty() else None), sys.stdout)
    if args.json:
        write_file(args.json, json.dumps(metrics, indent=1))
    if args.gallery or args.chart:
        draw_overview(model, loader, val_set.classes, args, device, name)
    say_skipped(gathered(loader.bad.values()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("stopped", 130)
