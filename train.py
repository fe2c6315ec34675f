"""Learn the thresholds of LTMP.

    python train.py                                      the demo: a small ViT on Fashion-MNIST
    python train.py --data /imagenet --target 0.75       DeiT-S on ImageNet, one epoch
    python train.py --method dense ...                   no thresholds: train all weights instead

Writes to --out: thresholds.json (the result), metrics.json, log.csv, last.pt (to resume from).
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import evaluate
import ltmp
from flops import flops_ratio

LOG_HEADER = "step,loss,cross_entropy,r,top1"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Learn the merge and prune thresholds of a ViT so that its FLOPs meet a target. "
                                     "Without --data: a demo on embedded Fashion-MNIST.")
    evaluate.add_common_arguments(parser)
    parser.add_argument("--method", choices=[m for m in ltmp.METHODS if m not in ("tome", "topk")], default="ltmp",
                        help="ltmp: merge, then prune; ltm, ltp: one of them; ltpm: prune, then merge; "
                        "dense: neither, and train all weights (default: %(default)s)")
    parser.add_argument("--target", type=float, default=0.75, help="FLOPs to end at, as a share of dense (default: %(default)s)")
    parser.add_argument("--epochs", type=evaluate.positive, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--lr", type=float, nargs=2, default=(5e-6, 5e-3), metavar=("PRUNE", "MERGE"),
                        help="learning rates of the prune and merge thresholds, SGD (default: 5e-6 5e-3)")
    parser.add_argument("--lr-backbone", type=float, default=1e-4, metavar="LR",
                        help="learning rate of all weights, AdamW, for --method dense (default: %(default)s)")
    parser.add_argument("--patch-drop", type=float, default=0.0, metavar="SHARE", help="with --method dense: leave out this share of the "
                        "patches, drawn anew for each image, in the first three quarters of the steps; faster (default: %(default)s)")
    parser.add_argument("--reg-weight", type=float, default=10.0, metavar="LAMBDA", help="weight of (r - target)^2 in the loss (default: %(default)s)")
    parser.add_argument("--tau", type=float, default=0.1, help="temperature of the thresholds' gradient (default: %(default)s)")
    parser.add_argument("--limit-train", type=evaluate.positive, metavar="N", help="train on N images, evenly spread (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="order of the images and their augmentation (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the results (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    return parser.parse_args(argv)


def make_optimizer(model, args, total_steps):
    """What trains and how: SGD without momentum for thresholds (paper: training), AdamW for all weights if dense."""
    if model.method == "dense":
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=args.lr_backbone, betas=(0.9, 0.99), weight_decay=0.05)
        warmup = max(1, total_steps // 20)
        shape = lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / total_steps)) / 2)
    else:
        model.requires_grad_(False)
        groups = []
        for step, lr in zip(("prune", "merge"), args.lr):
            thresholds = [p for name, p in model.named_parameters() if name.endswith(f"{step}_masker.threshold")]
            groups += [{"params": [p.requires_grad_() for p in thresholds], "lr": lr}] if thresholds else []
        optimizer, shape = torch.optim.SGD(groups), lambda step: 1.0
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, shape)


def drop_patches(block, inputs):
    """Pre-hook of the first block: keep the class token and a random share of the patches (PatchDropout, arXiv 2208.07220)."""
    x, size, mask, drop = inputs  # (B, N, C), (B, N), None: the method is dense
    keep = 1 + round((x.shape[1] - 1) * (1 - block.patch_drop))
    order = torch.rand(size[:, 1:].shape, device=x.device).argsort(1)[:, : keep - 1] + 1
    order = torch.cat([torch.zeros_like(order[:, :1]), order], 1)  # (B, keep)
    return x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2])), size[:, :keep], mask, drop


def learn(model, train_set, args, device):
    """Train what requires a gradient, for --epochs over train_set; write log.csv and last.pt as it goes."""
    batches_per_epoch = math.ceil(len(train_set) / args.batch_size)
    total_steps = args.epochs * batches_per_epoch
    optimizer, schedule = make_optimizer(model, args, total_steps)
    thresholds = [p for name, p in model.named_parameters() if name.endswith("threshold")]
    scaler = torch.amp.GradScaler(device.type, enabled=evaluate.amp_dtype(device, args.amp) == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    step, log = 0, [LOG_HEADER]
    if args.resume:
        saved = load_checkpoint(args)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        step, log = saved["step"], saved["log"]
    hook = model.blocks[0].register_forward_pre_hook(drop_patches) if args.patch_drop else None

    def save():
        save_file(args.out / "last.pt", {name: part.state_dict() for name, part in parts.items()}
                  | {"step": step, "log": log, "settings": settings(args)})
        evaluate.write_file(args.out / "log.csv", "\n".join(log) + "\n")

    model.train()
    progress, saved_at, first = evaluate.Progress(), time.time(), step
    try:
        while step < total_steps:
            epoch, batch = divmod(step, batches_per_epoch)
            batches = data.epoch_batches(len(train_set), args.batch_size, epoch, args.seed)[batch:]
            for images, labels in evaluate.make_loader(train_set, args, device, batch_sampler=batches):
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                torch.manual_seed(args.seed + step)  # whatever a step draws depends on the step alone
                if hook and step >= 0.75 * total_steps:
                    hook.remove()
                with evaluate.amp_context(device, args.amp):
                    logits, kept = model(images)  # (B, classes), (depth, B)
                ratio = flops_ratio(kept, model.config)
                cross_entropy = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
                loss = cross_entropy + (args.reg_weight * (ratio - args.target) ** 2 if thresholds else 0)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                if model.method == "dense":
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                with torch.no_grad():
                    for threshold in thresholds:
                        threshold.clamp_(0, 1)
                step += 1
                top1 = (logits.argmax(1) == labels).float().mean().item() * 100
                log.append(f"{step},{loss.item():.6f},{cross_entropy.item():.6f},{ratio.item():.6f},{top1:.3f}")
                speed = (step - first) * args.batch_size / (time.time() - progress.start)
                goal = f"r {ratio.item():.3f} (target {args.target:g})" if thresholds else f"top-1 {top1:.1f} %"
                progress.show(f"train: step {step}/{total_steps}, {speed:.0f} images/s, loss {loss.item():.3f}, {goal}",
                              step - first, total_steps - first)
                if time.time() - saved_at > 60:
                    save()
                    saved_at = time.time()
    except KeyboardInterrupt:
        save()
        sys.exit(f"\nstopped after step {step} of {total_steps}; the same command with --resume goes on from there")
    save()


def settings(args):
    """What must be the same when a run is resumed."""
    return {name: value for name, value in vars(args).items()
            if name not in ("resume", "out", "workers", "device", "limit_val")}


def load_checkpoint(args):
    """The state in --out/last.pt. Raises ValueError where there is none or it has other settings."""
    path = args.out / "last.pt"
    if not path.is_file():
        raise ValueError(f"nothing to resume: no {path}")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in settings(args).items():
        if saved["settings"].get(name) != value:
            raise ValueError(f"{path} was made with {name} = {saved['settings'].get(name)}, not {value}: resume with the same settings")
    return saved


def save_file(path, content):
    """torch.save under a temporary name, then rename."""
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def result(model, name, args, images):
    """The content of thresholds.json: the thresholds and how they came about."""
    found = {f"{step}_thresholds": [round(getattr(block, f"{step}_masker").threshold.item(), 9) for block in model.blocks]
             for step in ("merge", "prune") if step in ltmp.METHODS[model.method]}
    return {"model": name, "method": model.method, "target": args.target} | found | {
        "data": args.data or "embedded Fashion-MNIST", "weights": args.weights or "the model's own", "images": images,
        "epochs": args.epochs, "batch_size": args.batch_size, "lr": list(args.lr), "reg_weight": args.reg_weight,
        "tau": args.tau, "seed": args.seed, "version": ltmp.__version__}


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device, name = torch.device(args.device), evaluate.default_model(args)
    try:
        model = evaluate.build_model(name, args.method, args.weights, args.tau).to(device)
        config = model.config
        train_set, val_set = (data.open_split(args.data, split) for split in ("train", "val"))
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    # Fashion-MNIST's objects are centred and fill the image: of the augmentation only the flip makes sense.
    milder = {"scale": (1, 1), "jitter": 0} if isinstance(train_set, data.FashionMNIST) else {}
    train_set = data.Augmented(data.subset(train_set, args.limit_train),
                               data.train_transform(config.image_size, config.mean, config.std, **milder), args.seed)
    val_set.transform = data.eval_transform(config.image_size, config.crop_pct, config.mean, config.std)
    val_loader = evaluate.make_loader(data.subset(val_set, args.limit_val), args, device, batch_size=args.batch_size)
    model.blocks[0].patch_drop = args.patch_drop
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        learn(model, train_set, args, device)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    if model.method != "dense":
        evaluate.write_file(args.out / "thresholds.json", json.dumps(result(model, name, args, len(train_set)), indent=1))
    metrics = {"model": name, "method": model.method, "target": args.target} | evaluate.measure_both(model, val_loader, device, args.amp)
    evaluate.write_file(args.out / "metrics.json", json.dumps(metrics, indent=1))
    print(evaluate.report(metrics, name, model.method))


if __name__ == "__main__":
    main()
