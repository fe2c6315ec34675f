"""Learn the thresholds of LTMP.

    python train.py                                      the demo: a small ViT on Fashion-MNIST
    python train.py --data /imagenet --target 0.75       DeiT-S on ImageNet, one epoch
    python train.py --method dense ...                   no thresholds: fine-tune all weights

Writes to --out: thresholds.json (the result), metrics.json, log.csv, last.pt (to resume from).
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import ltmp
from extras import adaptive, batching, landing, measuring, models, runtime
from extras.fashion_mnist import FashionMNIST
from extras.run import Run, check_folder
from flops import model_flops

# What to do where a run was cut off.
HINT = "--resume goes on from the last save, if there is one"


def learn(model, train_set, args, device):
    """The paper's loop: one loss for accuracy and FLOPs. Returns the Run."""
    optimizer = make_optimizer(model, args)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    dtype = runtime.amp_dtype(device, args.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    steps = args.epochs * math.ceil(len(train_set) / (args.batch_size * runtime.processes()[1]))
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    with Run(args, parts, steps, ("loss", "cross_entropy", "r", "top1")) as run:
        model.train()
        for images, labels in run.batches(train_set, model.config.image_size, device):
            set_learning_rate(optimizer, run.step / steps, args)
            with runtime.amp_context(device, args.amp):
                logits, kept = model(images)  # (B, classes), (depth, B)
            flops = model_flops(model.config, kept) / model_flops(model.config)  # (B,)
            entropy = F.cross_entropy(logits.float(), labels, label_smoothing=0.1, reduction="none")
            cross_entropy, r = run.mean(entropy), run.mean(flops)
            loss = cross_entropy + args.reg_weight * (r - args.target) ** 2

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            runtime.sum_gradients(parameters)
            run.check_finite(loss, parameters, scaler)
            scaler.step(optimizer)
            scaler.update()
            for masker in landing.maskers(model).values():
                masker.threshold.data.clamp_(0, 1)

            top1 = 100 * run.mean((logits.argmax(1) == labels).float())
            values = [value.item() for value in (loss, cross_entropy, r, top1)]
            run.end_step(values, f"loss {loss:.3g}, r {r:.3f}, top-1 {top1:.1f} %")
    if run.overflows:
        runtime.say(f"{run.overflows} of {steps} steps made no update: float16 overflowed")
    return run


def make_optimizer(model, args):
    """Thresholds alone, by SGD without momentum; all weights, by AdamW, for the method dense."""
    model.requires_grad_(model.method == "dense")
    if model.method == "dense":
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.05)
    groups = {"prune": [], "merge": []}
    for (_, step), masker in landing.maskers(model).items():
        groups[step].append(masker.threshold.requires_grad_())
    return torch.optim.SGD([{"params": group} for group in groups.values() if group], lr=0)


def set_learning_rate(optimizer, done, args):
    """A cosine from the learning rate to 0; for the method dense behind a short linear rise."""
    scale = (1 + math.cos(math.pi * done)) / 2
    rates = {"ltm": args.lr[1:], "ltp": args.lr[:1]}.get(args.method, args.lr)
    if args.method == "dense":
        scale = min(scale, (done + 1e-3) / 0.05)
        rates = [args.lr_backbone] * 2
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * scale


def land(run, model, images, args):
    """Scale what the thresholds remove until r is the target, measured by really dropping."""
    try:
        before, after = landing.land(model, images, args.target)
        runtime.say(f"landing: r {before:.3f} -> {after:.3f} on {len(images)} training images")
    except landing.OutOfReach as error:
        runtime.say(f"note: the thresholds stay as they were learned: {error}")
    for masker in landing.maskers(model).values():
        masker.threshold.data.fill_(runtime.agreed(masker.threshold.item()))
    run.landed = True
    run.save()


def main(argv=None):
    """The command line: build, learn, land, evaluate, write."""
    args = parse_args(argv)
    runtime.repeatable(args.seed, args.device)
    try:
        device = runtime.find_device(args.device)
        check_folder(args)
        train_set, val_set = models.open_both(args)
        state = models.read_weights(args.model, args.weights)
        sizes = {"num_classes": args.num_classes, "image_size": args.image_size}
        model = models.build_model(args.model, args.method, state, args.tau, **sizes).to(device)
        models.number_classes(model, train_set, val_set)
        models.check_classes(val_set, model)
    except ValueError as error:
        runtime.stop(error)
    runtime.make_folder(args.out)

    # Adaptive learning, and landing, look at images as validation sees them.
    train_set.transform = val_set.transform = models.clean_transform(model.config)
    if args.method != "dense":
        images = batching.load_images(train_set, args, device, model.config.num_tokens)
    transform = augmentation(train_set, model.config, args.recipe)
    augmented = batching.Augmented(train_set, transform, args.seed, args.limit_train)
    try:
        if args.recipe == "adaptive":
            with runtime.amp_context(device, args.amp):
                run = adaptive.learn(model, augmented, images, args, device)
        else:
            run = learn(model, augmented, args, device)
    except landing.OutOfReach as error:
        runtime.stop(error)

    if args.method != "dense":
        if args.landing and not run.landed:
            with runtime.amp_context(device, args.amp):
                land(run, model, images, args)
        thresholds = json.dumps(result(model, args, len(augmented)), indent=1)
        runtime.write_file(args.out / "thresholds.json", thresholds)
    val_set = batching.subset(val_set, args.limit_val)
    metrics, bad = measuring.measure(model, val_set, args, device)
    goal = {} if args.method == "dense" else {"target": args.target}
    metrics = {"model": args.model, "method": args.method} | goal | metrics
    runtime.write_file(args.out / "metrics.json", json.dumps(metrics, indent=1))
    runtime.say(measuring.report(metrics), sys.stdout)
    runtime.say_skipped(run.skipped | bad)


def augmentation(train_set, config, recipe):
    """timm's default; for adaptive and Fashion-MNIST crops about as large as validation's, flipped.

    Zoomed images merge more easily. So the adaptive recipe sees images as landing does. The objects
    of Fashion-MNIST fill the image.
    """
    options = {}
    if recipe == "adaptive" or isinstance(train_set, FashionMNIST):
        options = {"scale": (config.crop_pct**2,) * 2, "of_square": True, "jitter": 0}
    return data.train_transform(config.image_size, config.mean, config.std, **options)


def result(model, args, images):
    """The content of thresholds.json: the thresholds, and how they came about."""
    found = {"model": args.model, "method": args.method, "target": args.target}
    for step in ltmp.METHODS[args.method]:
        values = [getattr(block, f"{step}_masker").threshold.item() for block in model.blocks]
        # Nine digits hold a float32.
        found[f"{step}_thresholds"] = [float(f"{value:.9g}") for value in values]
    found |= {
        "data": args.data or "embedded Fashion-MNIST",
        "weights": args.weights or "the model's own",
        "images": images,
        "image_size": model.config.image_size,
        "recipe": args.recipe,
        "seed": args.seed,
        "processes": runtime.processes()[1],
        "version": ltmp.__version__,
    }
    names = ["epochs", "batch_size", "landing"]
    if args.recipe == "paper":
        names += ["lr", "reg_weight", "tau"]
    return models.seal(found | {name: getattr(args, name) for name in names})


def parse_args(argv=None):
    """The flags, with the recipe's and the model's defaults filled in."""
    parser = runtime.command_line(
        "Learn the merge and prune thresholds of a ViT so that its FLOPs meet a target. "
        "Without --data: a demo on embedded Fashion-MNIST."
    )
    models.model_flags(parser)
    parser.set_defaults(batch_size=None)
    positive = runtime.at_least(0, float)
    methods = [method for method in ltmp.METHODS if method not in ("tome", "topk")]
    add = parser.add_argument
    add(
        "--method",
        choices=methods,
        default="ltmp",
        help="ltmp: merge, then prune; ltm, ltp: one of them; ltpm: prune, then merge; dense: "
        "neither, and fine-tune all weights (default: %(default)s)",
    )
    add(
        "--target",
        type=runtime.share,
        default=0.5,
        help="FLOPs to end at, as a share of dense (default: %(default)s)",
    )
    add(
        "--recipe",
        choices=("paper", "adaptive"),
        help="paper: SGD, as published, for an epoch of ImageNet; adaptive: for few images, from "
        "the dense predictions, labels unused (default: paper for the models named patch16_224 "
        "at 224 pixels, else adaptive)",
    )
    add("--epochs", type=runtime.at_least(1), default=1, metavar="N", help="default: %(default)s")
    add(
        "--lr",
        type=positive,
        nargs=2,
        default=[5e-6, 5e-3],
        metavar=("PRUNE", "MERGE"),
        help="learning rates of the thresholds, paper alone (default: 5e-6 5e-3)",
    )
    add(
        "--reg-weight",
        type=positive,
        default=10.0,
        metavar="LAMBDA",
        help="weight of (r - target)^2 in the loss, paper alone (default: %(default)s)",
    )
    add(
        "--tau",
        type=positive,
        default=0.1,
        help="temperature of the thresholds' gradient, paper alone (default: %(default)s)",
    )
    add(
        "--no-landing",
        dest="landing",
        action="store_false",
        help="leave thresholds as learned (default: scale what they remove until r is the target)",
    )
    add(
        "--lr-backbone",
        type=positive,
        default=1e-4,
        metavar="LR",
        help="learning rate of all weights, for --method dense alone (default: %(default)s)",
    )
    add("--limit-train", type=runtime.at_least(1), metavar="N", help="images to use (default: all)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="(default: %(default)s)")
    add("--resume", action="store_true", help="go on from last.pt in --out")
    add("--overwrite", action="store_true", help="begin anew where --out holds a run already")
    args = parser.parse_args(argv)
    if args.tau == 0:
        parser.error("--tau must be above 0: at 0 there is no gradient")
    try:
        models.settle_model(args)
    except ValueError as error:
        parser.error(str(error))
    published = args.model.endswith("patch16_224") and args.image_size in (None, 224)
    args.recipe = args.recipe or ("paper" if published or args.method == "dense" else "adaptive")
    args.batch_size = args.batch_size or (32 if args.recipe == "adaptive" else 128)
    if args.method == "dense":
        if args.recipe == "adaptive":
            parser.error("--recipe adaptive is for thresholds: --method dense has none")
        args.reg_weight = 0.0
    return args


if __name__ == "__main__":
    runtime.run_main(main, HINT)
