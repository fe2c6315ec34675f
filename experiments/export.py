"""Write a reduced ViT to an ONNX file: one image goes in, and tokens are dropped inside the file.

    python -m experiments.export --out demo.onnx                   the demo, its learned thresholds
    python -m experiments.export --model deit_small_patch16_224 --thresholds out/thresholds.json \\
        --data /imagenet --out deit.onnx --dense

Input: `image` (1, 3, S, S), float32 and normalized as the weights want it. With --with-transform
uint8, its pixels. Outputs: `logits` (1, num_classes) and `kept` (depth,), the tokens after each
block, int64. The file's metadata has model, method, thresholds, mean, std, and r of the images that
were checked. Batches of images stay with torch. Needs pip install -e '.[export]'.
"""

import importlib.util
import inspect
import json
import logging
import statistics
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import data
from extras import batching, landing, models, runtime
from flops import flops_ratio

from . import benchmark


def ragged_attention(qkv, size, live):
    """ltmp.ragged_attention for one image: qkv (T, 3, H, D), size (T,) -> (T, H, D), (T,)."""
    q, k, v = qkv.permute(1, 2, 0, 3)  # (H, T, D) each
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)  # (H, T, T)
    attn = (logits + size.log()).softmax(-1)
    return (attn @ v).transpose(0, 1), attn.mean((0, 1))


# No count of tokens becomes a Python number here. Learning is not exported.
ONE_IMAGE = SimpleNamespace(ragged_attention=ragged_attention, masked_attention=None)


class OneImage(nn.Module):
    """An LTMPViT for one image, in a form that torch.export can trace: the same blocks."""

    def __init__(self, model, with_transform=False):
        super().__init__()
        self.model = model
        self.with_transform = with_transform

    def forward(self, image):
        """image (1, 3, S, S) -> logits (1, num_classes), kept (depth,) int64."""
        if self.with_transform:
            mean, std = data.per_channel(self.model.config.mean, self.model.config.std)
            image = (image / 255 - mean) / std
        tokens = self.model.embed(image, drop=True)
        kept = []
        for block in self.model.blocks:
            tokens = block(tokens, ONE_IMAGE)
            tokens = with_spare_place(tokens) if block.steps else tokens
            kept.append(tokens.live.sum())
        return self.model.classify(tokens), torch.stack(kept)


def with_spare_place(tokens):
    """The tokens of one image, numbered by the length of x, and one more place that is dead.

    A traced graph has no branches. With the spare place there is always a set B, even where the
    class token is alone.
    """
    count = tokens.x.shape[0]
    torch._check(count >= 1)
    places = torch.arange(count + 1)[None]  # (1, T + 1)
    return replace(tokens, rows=places.clamp(max=count - 1), live=places < count)


def trace(model, with_transform=False):
    """A torch.export.ExportedProgram of a model for one image, with any number of tokens."""
    image = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
    image = image.byte() if with_transform else image
    return torch.export.export(OneImage(model, with_transform).eval(), (image,), strict=False)


def stable_sort(values, stable=None, dim=-1, descending=False):
    """aten.sort.stable in ONNX, which orders equal values of TopK by their place."""
    from onnxscript import opset18 as op

    length = op.Shape(values, start=dim, end=dim + 1)
    values = op.Cast(values, to=1)
    return op.TopK(values, length, axis=dim, largest=descending)


def to_onnx(model, metadata, with_transform=False):
    """A model for one image -> the bytes of an ONNX file. metadata: a dict of strings."""
    program = torch.onnx.export(
        trace(model, with_transform),
        dynamo=True,
        verbose=False,
        input_names=["image"],
        output_names=["logits", "kept"],
        custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
    )
    # Stack traces, with the paths of this machine, are not for others.
    for node in program.model.graph:
        node.metadata_props.clear()
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def metadata_of(name, model, r):
    """What an ONNX file says of its model: strings, JSON where they are no words."""
    thresholds = {}
    for (_, step), masker in landing.maskers(model).items():
        thresholds.setdefault(f"{step}_thresholds", []).append(round(masker.threshold.item(), 9))
    config = model.config
    numbers = {"thresholds": thresholds, "mean": config.mean, "std": config.std, "r": r}
    words = {"model": name, "method": model.method}
    return words | {key: json.dumps(value) for key, value in numbers.items()}


def open_session(content):
    """A function of ONNX Runtime: image (1, 3, S, S) -> logits, kept; torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.numpy()})


def to_pixels(images, config):
    """Normalized images (B, 3, S, S) -> their pixels, uint8."""
    mean, std = data.per_channel(config.mean, config.std)
    return ((images * std + mean) * 255).round().byte()


def check(run, model, images, with_transform=False):
    """Raise ValueError unless ONNX Runtime's `run` gives what the model gives; say how near."""
    logits, kept = benchmark.infer(model, images)  # (B, num_classes), (depth, B)
    inputs = to_pixels(images, model.config) if with_transform else images
    outputs = [run(image[None]) for image in inputs]
    found = torch.cat([torch.from_numpy(logits) for logits, _ in outputs])
    benchmark.check_same("ONNX Runtime and torch", logits, found)
    counts = torch.stack([torch.from_numpy(kept) for _, kept in outputs], 1)  # (depth, B)
    same, last = (counts == kept).all(0).sum(), counts[-1]
    text = f"kept tokens are the same for {same} of {len(images)} images"
    runtime.say(f"{text}; {last.min()} to {last.max()} are left at the end", sys.stdout)


def measure(what, runs, images, r):
    """Run functions "dense" and "reduced" in turn on one image after another; print medians."""
    times = {name: [] for name in runs}
    for image in images.repeat(7, 1, 1, 1)[:, None]:
        for name, run in runs.items():
            times[name].append(runtime.timed(partial(run, image), image.device)[1])
    dense, reduced = (1e3 * statistics.median(times[name]) for name in ("dense", "reduced"))
    times = f"dense {dense:.1f} ms an image, reduced {reduced:.1f}"
    runtime.say(f"{what}: {times}; efficiency {dense / reduced * r:.2f} at r {r:.3f}", sys.stdout)


def main(argv=None):
    """The command line: trace, check, write, measure."""
    what = "Write a reduced ViT to an ONNX file, for one image at a time."
    parser = runtime.command_line(what, ("-b", "--device", "--amp"))
    models.model_flags(parser)
    models.threshold_flags(parser)
    add, number = parser.add_argument, runtime.at_least(1)
    add("--out", required=True, metavar="FILE", help="the ONNX file to write")
    add("--dense", action="store_true", help="write the dense model too, as FILE.dense.onnx")
    add("--with-transform", action="store_true", help="the input is uint8: pixels of that size")
    what = "validation images on which ONNX Runtime must agree; r is theirs (default: %(default)s)"
    add("--check", type=number, default=20, metavar="N", help=what)
    what = "time both, ONNX Runtime and torch, on the checked images, one by one; means --dense"
    add("--benchmark", action="store_true", help=what)
    args = parser.parse_args(argv)
    out = Path(args.out)
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(n)]
    if missing:
        runtime.stop(f"{', '.join(missing)} missing: pip install -e '.[export]'", 1)
    if "custom_translation_table" not in inspect.signature(torch.onnx.export).parameters:
        runtime.stop(f"the exporter of torch {torch.__version__} is too old; 2.13 will do", 1)
    # What exporters note about themselves is no news of this model.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        dataset = models.open_split(args, "val")
        model, name = models.chosen_model(args)
        dataset.transform = models.clean_transform(model.config)
        dataset = batching.subset(dataset, args.limit_val)
        images = benchmark.load_images(dataset, args.check, args, torch.device("cpu"))
        r = flops_ratio(benchmark.infer(model, images)[1].double(), model.config).item()
        files, sessions = {"reduced": (out, model)}, {}
        if args.dense or args.benchmark:
            dense = models.with_method(model, "dense")
            files["dense"] = out.with_suffix(".dense.onnx"), dense
        for kind, (path, net) in files.items():
            share = r if net is model else 1.0
            content = to_onnx(net, metadata_of(name, net, share), args.with_transform)
            sessions[kind] = open_session(content)
            check(sessions[kind], net, images, args.with_transform)
            runtime.write_file(path, content)
            what = f"{net.method}, r {share:.3f}"
            runtime.say(f"wrote {path}: {what}; one image at a time, for batches use torch")
    except ValueError as error:
        runtime.stop(error)
    if args.benchmark:
        threads = torch.get_num_threads()
        nets = {kind: partial(benchmark.infer, net) for kind, (_, net) in files.items()}
        measure(f"torch, threads {threads}", nets, images, r)
        images = to_pixels(images, model.config) if args.with_transform else images
        measure(f"ONNX Runtime, threads {threads}", sessions, images, r)


if __name__ == "__main__":
    runtime.run_main(main)
