"""Is a reduced ViT as fast as its FLOPs promise? Time and memory of inference and of learning.

    python -m experiments.benchmark                         the demo and its learned thresholds
    python -m experiments.benchmark --model vit_small_patch14_dinov2 --weights FILE --share 0.1

Four executions run in turn in one process, on validation images:

    dense      all tokens, with torch's fused attention
    cut        the dense blocks on as many tokens as reduced keeps, nothing decided: the bound
    reduced    the model, with the attention of extras/fast_attention.py
    plain      the model, with the attention of ltmp.py

With --compile, which on a CPU needs a C++ compiler, two more run:

    dense compiled      dense by torch.compile
    reduced compiled    reduced, all but its attention by torch.compile

efficiency = dense seconds / seconds * r, where r is the model's share of the dense FLOPs; 1 is all
that the FLOPs promise.
"""

import copy
import ctypes
import json
import re
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import ltmp
from extras import batching, landing, models, runtime
from flops import flops_ratio

# Images of a training step, and images that --share places thresholds on.
TRAINING, PLACING = 16, 32
DIGITS = {"ms": 1, "speed-up": 2, "r": 3, "efficiency": 2, "MB": 0}


def peak_memory(run, device):
    """MB that run() needs at its peak, beyond what was there; None if the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    status = Path("/proc/self/status")
    try:
        # Free memory goes back to the system: else it would count as there before.
        ctypes.CDLL(None).malloc_trim(0)
        # The peak starts anew.
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    before = re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]
    run()
    return (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - int(before)) / 1024


def compare(what, images, runs, r, repeats):
    """Run functions in turn, `repeats` times. Prints a row for each, with medians; returns them.

    runs: name -> function, "dense" among them; r: the reduced FLOPs' share of dense, or None.
    """
    for run in runs.values():
        # What is allocated once and for all, such as gradients, is no part of the peak.
        run()
    memory = {name: peak_memory(run, images.device) for name, run in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(runtime.timed(run, images.device)[1])
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, median in medians.items():
        speedup = medians["dense"] / median
        share = 1.0 if name.startswith("dense") else r
        row = {"what": what, "images": len(images), "run": name, "ms": 1e3 * median}
        row |= {"speed-up": speedup, "r": share, "efficiency": share and speedup * share}
        rows.append(row | {"MB": memory[name]})
        runtime.say(row_text(rows[-1]), sys.stdout)
    return rows


def row_text(row):
    """A row of the table; a number that is None is a dash."""
    cells = []
    for name, digits in DIGITS.items():
        cell = "-" if row[name] is None else f"{row[name]:.{digits}f}"
        cells.append(f"{cell:>12}")
    return f"{row['what']:<10}{row['images']:>7}  {row['run']:<17}{''.join(cells)}"


def compile_blocks(model):
    """A copy whose blocks are compiled, for any number of tokens, all but their attention."""
    model = copy.deepcopy(model)
    # It goes image by image, or is one kernel.
    model.attention.ragged_attention = torch.compiler.disable(model.attention.ragged_attention)
    for block in model.blocks:
        block.compile(dynamic=True)
    return model


def launches(run):
    """What run() starts on the GPU: kernels, copies, fills."""
    with torch.profiler.profile() as profile:
        run()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@torch.inference_mode()
def infer(model, images, amp=False, drop=None):
    """The output of a model in inference: logits (B, classes), kept (depth, B)."""
    with runtime.amp_context(images.device, amp):
        return model.eval()(images, drop)


@torch.inference_mode()
def infer_cut(dense, images, counts, amp=False):
    """Logits of a dense model whose block i goes on with the first counts[i] tokens."""
    with runtime.amp_context(images.device, amp):
        tokens = dense.eval().embed(images, drop=True)
        for block, count in zip(dense.blocks, counts, strict=True):
            out = block.attn(block.norm1(tokens.x), tokens, None)[0]
            x = (tokens.x + block.ls1(out)).unflatten(0, tokens.rows.shape)  # (B, N, C)
            x = x[:, :count].flatten(0, 1)  # (T, C)
            rows = torch.arange(len(x), device=x.device).view(-1, count)  # (B, count)
            tokens = replace(tokens, x=x + block.ls2(block.mlp(block.norm2(x))), rows=rows)
        return dense.classify(tokens)


def training_step(model, images, amp):
    """Forward and backward of a loss of logits and FLOPs."""
    with runtime.amp_context(images.device, amp):
        logits, kept = model.train()(images)
    (logits.float().logsumexp(1).mean() + flops_ratio(kept, model.config)).backward()


def check_same(names, wanted, found):
    """Say how near two logits (B, classes) are. Raises ValueError where they are not the same.

    Distances are relative to the largest logit. Rounding may turn a score that lies at its
    threshold, so up to half of the images may differ.
    """
    distance = (found - wanted).abs().amax(1) / wanted.abs().max()  # (B,)
    same = distance <= 1e-4
    if same.sum() <= len(same) / 2:
        raise ValueError(f"{names} differ: by {distance.median():.1g} of the largest logit")
    rest = "" if same.all() else f"; {(~same).sum()} others by up to {distance.max():.0e}"
    text = f"{same.sum()} images within {distance[same].max():.0e} of the largest logit{rest}"
    runtime.say(f"{names} agree: {text}", sys.stdout)


def benchmark(model, images, args):
    """Check that fast and plain attention agree, then print the table and return its rows.

    images (B, 3, S, S): each row's are taken from these, evenly spread.
    """
    dense = models.with_method(model, "dense")
    model.requires_grad_(False)
    for masker in landing.maskers(model).values():
        masker.threshold.requires_grad_()
    plain = copy.deepcopy(model)
    plain.attention = ltmp.PLAIN_ATTENTION

    some = images[batching.evenly(len(images), TRAINING)]
    # Without cuDNN a convolution does not round to TF32.
    with torch.backends.cudnn.flags(enabled=False):
        for drop, how in ((True, "dropping"), (False, "masking")):
            logits = infer(model, some, drop=drop)[0]  # (B, classes)
            check_same(f"{how}, fast and plain", infer(plain, some, drop=drop)[0], logits)
            if images.is_cuda:
                on_cpu = infer(copy.deepcopy(plain).cpu(), some.cpu(), drop=drop)[0]
                check_same(f"{how}, CUDA and CPU", on_cpu, logits.cpu())

    compiled = {}
    if args.compile:
        compiled["dense"] = torch.compile(dense, dynamic=False)
        compiled["reduced"] = compile_blocks(model)
    for name, net in compiled.items():
        try:
            logits = infer(net, some)[0]
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"--compile: torch.compile failed: {reason}") from None
        wanted = infer(dense if name == "dense" else model, some)[0]
        check_same(f"{name}, compiled and not", wanted, logits)

    head = "".join(f"{name:>12}" for name in DIGITS)
    runtime.say(f"{'':<10}{'images':>7}  {'run':<17}{head}", sys.stdout)
    rows = []
    for count in args.batch_sizes:
        batch = images[batching.evenly(len(images), count)]
        kept = infer(model, batch, args.amp)[1].cpu().double()  # (depth, B)
        counts = kept.mean(1).round().int().tolist()
        runs = {
            "dense": partial(infer, dense, batch, args.amp),
            "cut": partial(infer_cut, dense, batch, counts, args.amp),
            "reduced": partial(infer, model, batch, args.amp),
            "plain": partial(infer, plain, batch, args.amp),
        }
        for name, net in compiled.items():
            runs[f"{name} compiled"] = partial(infer, net, batch, args.amp)
        r = flops_ratio(kept, model.config).item()
        rows += compare("inference", batch, runs, r, args.repeats)
        if images.is_cuda:
            depth = model.config.depth
            found = [f"{name} {launches(run) / depth:.0f}" for name, run in runs.items()]
            runtime.say(f"launches per block: {', '.join(found)}", sys.stdout)
    if landing.maskers(model):
        steps = {"dense": dense, "reduced": model, "plain": plain}
        runs = {name: partial(training_step, net, some, args.amp) for name, net in steps.items()}
        rows += compare("training", some, runs, None, args.repeats)
    return rows


def load_images(dataset, count, args, device):
    """`count` images evenly spread over the dataset, repeated where it has fewer."""
    spread = [i * len(dataset) // count for i in range(count)]
    spread = torch.utils.data.Subset(dataset, spread)
    loader = batching.make_loader(spread, args, device, batch_size=count)
    images = torch.cat([images for images, _ in loader])
    runtime.say_skipped(set(loader.bad.values()))
    if not len(images):
        raise ValueError("none of the images could be read")
    return images.to(device)


def choose_model(args):
    """The model that the flags ask for, and its name. Raises ValueError."""
    if args.method == "dense":
        raise ValueError("--method dense has nothing to compare: name another method")
    if not args.share:
        return models.chosen_model(args)
    if args.thresholds or args.method in ("tome", "topk"):
        raise ValueError("--share places thresholds itself: leave --thresholds, tome and topk out")
    models.settle_model(args)
    name, sizes = args.model, (args.num_classes, args.image_size)
    state = models.read_weights(name, args.weights)
    return models.build_model(name, args.method or "ltmp", state, 0.1, None, *sizes), name


def main(argv=None):
    """The command line: build, check, measure, print."""
    parser = runtime.command_line("Time and memory of a ViT, dense and reduced.", ("-b",))
    models.model_flags(parser)
    models.threshold_flags(parser)
    what = "place every threshold so that it removes this share of what it meets"
    add, number = parser.add_argument, runtime.at_least(1)
    add("--share", type=runtime.share, metavar="SHARE", help=what)
    add("--batch-sizes", type=number, nargs="+", default=[1, 8, 32, 64], metavar="N", help="images")
    add("--repeats", type=number, default=7, metavar="N", help="medians are shown (%(default)s)")
    add("--compile", action="store_true", help="run compiled models too")
    add("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    try:
        device = runtime.find_device(args.device)
        dataset = models.open_split(args, "val")
        model, name = choose_model(args)
        dataset.transform = models.clean_transform(model.to(device).config)
        count = max(PLACING, *args.batch_sizes)
        images = load_images(batching.subset(dataset, args.limit_val), count, args, device)
        if args.share:
            some, shares = images[batching.evenly(len(images), PLACING)], landing.maskers(model)
            landing.place(model, some, dict.fromkeys(shares, args.share))
        dtype = runtime.amp_dtype(device, args.amp) or torch.float32
        found = {
            "model": name,
            "method": model.method,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if images.is_cuda else str(device),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
        }
        runtime.say(", ".join(f"{key} {value}" for key, value in found.items()), sys.stdout)
        found["rows"] = benchmark(model, images, args)
    except ValueError as error:
        runtime.stop(error)
    if args.json:
        runtime.write_file(args.json, json.dumps(found, indent=1))


if __name__ == "__main__":
    runtime.run_main(main)
