"""Make what is in demo/: the embedded part of Fashion-MNIST, and the demo's ViT.

    python -m experiments.make_demo data FOLDER          writes demo/fashion_mnist.npz
    python -m experiments.make_demo vit --data FOLDER    trains such a ViT: OUT/vit_demo.pth

FOLDER holds Fashion-MNIST's four original *-ubyte.gz files.
"""

import argparse
import io
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import ltmp
from extras import batching, runtime, weights
from extras.fashion_mnist import DEMO_FILE, FashionMNIST

SAVE_EVERY = 60  # seconds

# What must be the same when a run is resumed.
SETTINGS = ("data", "weights", "epochs", "lr", "patch_drop", "batch_size", "seed")


# --------------------------------------------------------------------------------------------------
# The data


def make_data(args):
    """Write the first 300 training and 200 test images of each class, as numpy.savez does."""
    arrays = {}
    for split, per_class in (("train", 300), ("test", 200)):
        full = FashionMNIST(args.folder, split)
        of_class = [np.flatnonzero(full.labels == label)[:per_class] for label in range(10)]
        chosen = np.sort(np.concatenate(of_class))
        arrays[f"{split}_images"] = full.images[chosen]  # (n, 28, 28) uint8
        arrays[f"{split}_labels"] = full.labels[chosen]  # (n,) uint8
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    runtime.write_file(args.out, buffer.getbuffer())
    print(f"{args.out}: {len(arrays['train_labels'])} and {len(arrays['test_labels'])} images")


# --------------------------------------------------------------------------------------------------
# The ViT: dense, from random weights


def make_vit(args):
    """Train the demo's ViT and write its weights in half precision."""
    if (args.out / "last.pt").exists() and not args.resume:
        raise ValueError(f"{args.out} holds a run: --resume goes on, --out DIR begins another")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = ltmp.create_model("demo", "dense")
    if args.weights:
        ltmp.load_weights(model, args.weights)
    config = model.config
    # The clothes are centred and fill the image: of the augmentation only the flip makes sense.
    flip = data.train_transform(config.image_size, config.mean, config.std, (1, 1), jitter=0)
    dataset = FashionMNIST(args.data or DEMO_FILE, "train")
    train(model, batching.Augmented(dataset, flip, args.seed), args)
    path = args.out / "vit_demo.pth"
    write_torch(path, {name: value.half() for name, value in model.state_dict().items()})
    print(f"{path}: measure it by evaluate.py --model demo --method dense --weights {path}")


def drop_patches(tokens, share):
    """Leave out a random share of each image's patches (PatchDropout, arXiv 2208.07220).

    tokens: the Tokens that a dense model's embed gives. The class token stays.
    """
    images, count = tokens.rows.shape
    kept = round((count - 1) * (1 - share))
    patches = torch.rand(images, count - 1).argsort(1)[:, :kept] + 1  # (B, kept)
    places = torch.cat([patches.new_zeros(images, 1), patches], 1)  # (B, 1 + kept)
    chosen = tokens.rows.gather(1, places).flatten()
    rows = torch.arange(len(chosen)).view(images, -1)  # (B, 1 + kept)
    x, size = tokens.x.index_select(0, chosen), tokens.size[chosen]
    return replace(tokens, x=x, size=size, rows=rows, live=rows >= 0)


def forward(model, images, patch_drop):
    """Logits (B, num_classes) of a dense model that sees a random part of the patches."""
    tokens = drop_patches(model.embed(images, drop=True), patch_drop)
    for block in model.blocks:
        tokens = block(tokens, model.attention)
    return model.classify(tokens)


def make_optimizer(model):
    """AdamW; vectors, such as biases, do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


def learning_rate(step, steps, peak):
    """Linear warm-up over a twentieth of the steps, under a cosine that ends at 0."""
    warm_up = max(1, steps // 20)
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return peak * min((step + 1) / warm_up, cosine)


def train(model, dataset, args):
    """Train all weights over dataset, a batching.Augmented. Ctrl-C saves last.pt and stops.

    What a step draws depends on the seed and the step alone, so a resumed run ends as one that was
    not interrupted. Raises ValueError where --resume finds no run of the same settings.
    """
    optimizer = make_optimizer(model)
    per_epoch = math.ceil(len(dataset) / args.batch_size)
    steps = args.epochs * per_epoch
    first = 0
    if args.resume:
        first = load_run(model, optimizer, args)
    else:
        save_run(model, optimizer, first, args)
    progress, saved_at = runtime.Progress(), time.time()
    model.train()
    with runtime.Interrupts() as interrupts:
        for step in range(first, steps):
            epoch, place = divmod(step, per_epoch)
            batch = batching.epoch_batches(len(dataset), args.batch_size, epoch, args.seed)[place]
            images, labels = torch.utils.data.default_collate([dataset[i] for i in batch])
            torch.manual_seed(args.seed + step)
            # The last quarter sees whole images, as inference does.
            patch_drop = args.patch_drop if step < 0.75 * steps else 0
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args.lr)

            logits = forward(model, images, patch_drop)
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not (loss.isfinite() and norm.isfinite()):
                runtime.stop(f"loss or gradient are not finite at step {step + 1}: lower --lr", 1)
            optimizer.step()

            text = f"step {step + 1}/{steps}, loss {loss.item():.3f}"
            progress.show(text, step + 1 - first, steps - first)
            if interrupts.any() or step + 1 == steps or time.time() - saved_at > SAVE_EVERY:
                save_run(model, optimizer, step + 1, args)
                saved_at = time.time()
            if interrupts.any():
                runtime.stop(f"stopped after step {step + 1} of {steps}; --resume goes on", 130)


# --------------------------------------------------------------------------------------------------
# The file to resume from


def save_run(model, optimizer, step, args):
    """Write last.pt, whole."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    write_torch(args.out / "last.pt", content | {"step": step, "settings": settings})


def load_run(model, optimizer, args):
    """Load last.pt into model and optimizer. Returns how many steps are done.

    Raises ValueError where there is none, or where its settings are others.
    """
    path = args.out / "last.pt"
    if not path.is_file():
        raise ValueError(f"nothing to resume: no {path}; without --resume a run begins")
    saved = weights.read_file(path)
    if not isinstance(saved, dict) or not {"model", "step", "settings"} <= saved.keys():
        raise ValueError(f"{path} is no run of make_demo: begin another with --out DIR")
    for name in SETTINGS:
        before, now = saved["settings"].get(name), getattr(args, name)
        if before != now:
            raise ValueError(f"{path} was made with {name} = {before}, not {now}: use the same")
    ltmp.load_weights(model, saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def write_torch(path, content):
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    runtime.write_file(path, buffer.getbuffer())


# --------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv=None):
    """The flags; .make is the function to call with them."""
    parser = argparse.ArgumentParser(description="Make the demo's data, or the demo's ViT.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("data", help="the embedded part of Fashion-MNIST")
    command.add_argument("folder", help="folder with the four *-ubyte.gz files")
    command.add_argument("--out", type=Path, default=DEMO_FILE, help="default: %(default)s")
    command.set_defaults(make=make_data)
    command.error = runtime.stop

    command = commands.add_parser("vit", help="train the demo's ViT from scratch")
    add = command.add_argument
    add("--data", metavar="DIR", help="folder with the four *-ubyte.gz files (default: embedded)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="default: %(default)s")
    add("--weights", metavar="FILE", help="start from these (default: random weights)")
    add("--epochs", type=runtime.at_least(1), default=20, metavar="N", help="default: %(default)s")
    add("--lr", type=runtime.at_least(0, float), default=2e-3, help="peak (default: %(default)s)")
    add("--patch-drop", type=runtime.at_least(0, float), default=0.67, metavar="SHARE",
        help="patches to leave out in the first three quarters (default: %(default)s)")  # fmt: skip
    add("-b", "--batch-size", type=runtime.at_least(1), default=32, metavar="N",
        help="default: %(default)s")  # fmt: skip
    add("--seed", type=int, default=0, help="weights, order, what is drawn (default: %(default)s)")
    add("--threads", type=runtime.at_least(1), metavar="N", help="default: torch's own choice")
    add("--resume", action="store_true", help="go on from last.pt in --out")
    command.set_defaults(make=make_vit)
    command.error = parser.error = runtime.stop

    args = parser.parse_args(argv)
    if getattr(args, "patch_drop", 0) >= 1:
        parser.error("--patch-drop must be below 1")
    return args


def main(argv=None):
    """The command line: make the data, or the ViT."""
    args = parse_args(argv)
    try:
        args.make(args)
    except ValueError as error:
        runtime.stop(error)


if __name__ == "__main__":
    runtime.run_main(main)
