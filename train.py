"""Learn the thresholds of LTMP.

    python train.py                                      the demo: a small ViT on Fashion-MNIST
    python train.py --data /imagenet --target 0.75       DeiT-S on ImageNet, one epoch
    python train.py --method dense ...                   no thresholds: train all weights instead

Writes to --out: thresholds.json (the result; not of dense), metrics.json, log.csv, last.pt (to resume from).
"""

import io
import json
import math
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import evaluate
import ltmp
from flops import flops_ratio, model_flops

LOG_HEADER = "step,loss,cross_entropy,r,top1"
SAVE_EVERY = 60  # seconds

# How thresholds are learned: learning rates of the (prune, merge) thresholds, or the length of a step; temperature of their gradient.
RECIPES = {
    "paper": {"batch_size": 128, "lr": [5e-6, 5e-3], "tau": 0.1},  # SGD
    "adaptive": {"batch_size": 32, "lr": [0.15, 0.15], "tau": 0.5},  # steer on ranks (see set_ranks), lr / sqrt(steps); tau in interquartile ranges
}


def parse_args(argv=None):
    """The flags, with the recipe's and the model's defaults filled in."""
    parser = evaluate.command_line("Learn the merge and prune thresholds of a ViT so that its FLOPs meet a target. "
                                   "Without --data: a demo on embedded Fashion-MNIST.")
    parser.add_argument("--method", type=evaluate.one_of([m for m in ltmp.METHODS if m not in ("tome", "topk")]), default="ltmp", metavar="METHOD",
                        help="ltmp: merge, then prune; ltm, ltp: one of them; ltpm: prune, then merge; "
                        "dense: neither, and train all weights (default: %(default)s)")
    parser.add_argument("--target", type=evaluate.share, default=0.75, help="FLOPs to end at, as a share of dense (default: %(default)s)")
    parser.add_argument("--epochs", type=evaluate.positive, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--recipe", type=evaluate.one_of(RECIPES), metavar="RECIPE", help="paper: SGD, as published; adaptive: start and end where r is the target, "
                        "learn from the dense predictions, labels unused (default: paper for the models named patch16_224, at 224 pixels, and for dense; else adaptive)")
    parser.add_argument("--lr", type=evaluate.number, nargs=2, metavar=("PRUNE", "MERGE"), help="learning rates of the prune and merge thresholds "
                        "(default: 5e-6 5e-3; adaptive: 0.15 0.15, two times the same: about the length of a step of all ranks together, in shares of what they meet, times the root of the number of steps)")
    parser.add_argument("--lr-backbone", type=evaluate.number, metavar="LR", help="learning rate of the weights: AdamW, 1e-4 by default, for "
                        "--method dense; beside thresholds the weights are frozen unless this is given, then SGD; adaptive teaches them the predictions that they came with, paper the labels")
    parser.add_argument("--patch-drop", type=evaluate.share, default=0.0, metavar="SHARE", help="with --method dense: leave out this share of the "
                        "patches, drawn anew for each image, in the first three quarters of the steps; faster (default: %(default)s)")
    parser.add_argument("--reg-weight", type=evaluate.number, metavar="LAMBDA", help="weight of (r - target)^2 in the loss of the paper's recipe (default: 10)")
    parser.add_argument("--tau", type=evaluate.number, help="temperature of the thresholds' gradient (default: 0.1; adaptive: 0.5, in units of the scores' interquartile range)")
    parser.add_argument("--limit-train", type=evaluate.positive, metavar="N", help="train on N images, evenly spread (default: all)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the results (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --out, which is there from the first step on; where there is none, refuse: the folder may be mistyped")
    parser.add_argument("--overwrite", action="store_true", help="begin anew where --out holds a run already")
    args = parser.parse_args(argv)
    if args.tau == 0:
        parser.error("--tau must be above 0: at 0 there is no gradient")
    if args.method == "dense" and any(flag is not None for flag in (args.recipe, args.lr, args.tau, args.reg_weight)):
        parser.error("--recipe, --lr, --tau and --reg-weight are for thresholds, of which --method dense has none; its learning rate is --lr-backbone")
    if args.patch_drop and args.method != "dense":
        parser.error("--patch-drop goes with --method dense")
    args.model = evaluate.default_model(args)
    published = args.model.endswith("patch16_224") and args.image_size in (None, 224)  # what the paper's numbers were found for
    args.recipe = args.recipe or ("paper" if published or args.method == "dense" else "adaptive")
    args.batch_size = args.batch_size or RECIPES[args.recipe]["batch_size"]
    args.lr = args.lr or RECIPES[args.recipe]["lr"]
    if args.recipe == "adaptive" and args.lr[0] != args.lr[1]:
        parser.error(f"--lr must be two times the same for the recipe adaptive, whose steps have one length for all ranks; got {args.lr[0]:g} {args.lr[1]:g}")
    if args.recipe == "adaptive" and args.reg_weight is not None:
        parser.error("--reg-weight goes with --recipe paper: adaptive is led to the target, not pushed")
    args.reg_weight = 10.0 if args.reg_weight is None else args.reg_weight
    args.tau = RECIPES[args.recipe]["tau"] if args.tau is None else args.tau
    args.lr_backbone = 1e-4 if args.lr_backbone is None and args.method == "dense" else args.lr_backbone
    return args


def make_optimizer(model, args, total_steps, ranks):
    """What trains and how: thresholds by SGD without momentum (paper), their ranks (see set_ranks) along steer's directions (adaptive), all weights, if dense, by AdamW."""
    cosine = lambda done: (1 + math.cos(math.pi * done / total_steps)) / 2
    if model.method == "dense":
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}],
                                      lr=args.lr_backbone, betas=(0.9, 0.99), weight_decay=0.05)
        warmup = max(1, total_steps // 20)
        shape = lambda done: min((done + 1) / warmup, cosine(done))
    else:
        model.requires_grad_(args.lr_backbone is not None)
        lr, groups = dict(zip(("prune", "merge"), args.lr)), []
        fineness = 1 if ranks is None else math.sqrt(total_steps)  # the noise of n steps grows with the root of n
        for i, (step, masker) in enumerate(threshold_maskers(model)):
            masker.threshold.requires_grad_()
            groups.append({"params": [masker.threshold if ranks is None else ranks[i]], "lr": lr[step] / fineness})
        if args.lr_backbone is not None:
            groups.append({"params": [p for name, p in model.named_parameters() if not name.endswith("_masker.threshold")], "lr": args.lr_backbone})
        optimizer, shape = torch.optim.SGD(groups), lambda done: 1.0 if ranks is None else cosine(done)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, shape)


def steer(ranks, averages, r_by_rank, distance):
    """Put in place of rank.grad, d KL / d rank, what SGD is to subtract: where the KL rises while r stays, and where r rises if it is above the target (falls if below).

    The gradient is averaged over about thirty steps, in averages: over ten, the demo needed twice the images for the same KL. Then only directions count, so that no learning rate depends on the model, the data or the target.
    The part along r's direction is taken out, since r is to stay; what brings r back is the second term, in full from 0.02 on (batches differ by 0.01 by chance).
    averages: as ranks a list of (1,), changed in place. r_by_rank: (ranks,), d r / d rank. distance: r - target.
    """
    for average, rank in zip(averages, ranks):
        average.lerp_(rank.grad, 0.03)
    kl_by_rank, up = torch.cat(averages), F.normalize(r_by_rank, dim=0)  # (ranks,) each
    along = kl_by_rank - (kl_by_rank @ up) * up
    direction = F.normalize(along, dim=0) + min(max(distance / 0.02, -1), 1) * up
    for rank, d in zip(ranks, direction):
        rank.grad.fill_(d)


def drop_patches(share, block, inputs):
    """Pre-hook of the first block: leave out a random share of each image's patches (PatchDropout, arXiv 2208.07220)."""
    x, size, *rest = inputs  # (B, N, C), (B, N)
    order = torch.rand(size[:, 1:].shape, device=x.device).argsort(1) + 1  # (B, N - 1)
    order = order[:, : round(order.shape[1] * (1 - share))]
    order = torch.cat([torch.zeros_like(order[:, :1]), order], 1)  # the class token stays
    return x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2])), size.gather(1, order), *rest


def learn(model, train_set, args, device, saved=None, teacher=None, scores=None, ranks=None, r_by_threshold=None):
    """Train for --epochs over train_set what make_optimizer chose. Writes log.csv; and last.pt at the start, every minute and at the end.

    saved: a checkpoint to go on from. scores, ranks: from choose; if given, the ranks are what learns, from the predictions of teacher, the
    model as it came, dense, and are changed in place; r_by_threshold: from r_gradient, at the start. Returns what is wrong with the images that were left out, a set.
    """
    me, processes = evaluate.processes()
    batch_size = args.batch_size * processes  # of all together
    batches_per_epoch = math.ceil(len(train_set) / batch_size)
    total_steps = args.epochs * batches_per_epoch
    optimizer, schedule = make_optimizer(model, args, total_steps, ranks)
    thresholds = threshold_maskers(model)
    scaler = torch.amp.GradScaler(device.type, enabled=evaluate.amp_dtype(device, args.amp) == torch.float16)
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # as if in the wrong order, where the first step makes no update
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    step, overflows, skipped, log = 0, 0, set(), args.out / "log.csv"
    averages = [torch.zeros_like(rank) for rank in ranks or []]
    if saved:
        for name, part in parts.items():
            if saved[name]:  # a scaler that had nothing to do saves nothing
                part.load_state_dict(saved[name])
        step, overflows, skipped = saved["step"], saved["overflows"], set(saved["skipped"])
        for tensor, value in zip([*(ranks or []), *averages], saved["ranks"] + saved["averages"]):
            tensor.fill_(value)
    hook = model.blocks[0].register_forward_pre_hook(partial(drop_patches, args.patch_drop)) if args.patch_drop else None

    def save():
        if me > 0:
            return
        save_file(args.out / "last.pt", {name: part.state_dict() for name, part in parts.items()}
                  | {"step": step, "overflows": overflows, "skipped": sorted(skipped), "ranks": [rank.item() for rank in ranks or []],
                     "averages": [average.item() for average in averages], "method": model.method, "settings": settings(args)})

    def leave():
        evaluate.stop(f"stopped after step {step} of {total_steps}; the same command with --resume goes on from there", 130)

    interrupted = []  # Ctrl-C ends the step that runs, or the next, saves, and stops; a second one stops at once
    previous = {number: signal.signal(number, lambda number, _: interrupted.append(signal.signal(number, previous[number])))
                for number in (signal.SIGINT, signal.SIGTERM)}
    model.train()
    progress, saved_at, first = evaluate.Progress(), time.time(), step
    if not saved:
        save()
        if me == 0:  # of a run that this one replaces
            for name in ("thresholds.json", "metrics.json"):
                (args.out / name).unlink(missing_ok=True)
    before = log.read_text().splitlines(True)[: 1 + step] if saved and log.exists() else [LOG_HEADER + "\n"]
    evaluate.write_file(log, "".join(before))  # what a run that was killed did after its last save, this one does again
    while step < total_steps:
        epoch, done = divmod(step, batches_per_epoch)
        batches = data.epoch_batches(len(train_set), batch_size, epoch, args.seed)[done:]
        own = [batch[me::processes] or batch[:1] for batch in batches]  # where there are fewer images than processes, one that does not count
        loader = evaluate.make_loader(train_set, args, device, batch_sampler=own)
        for batch, (images, labels) in zip(batches, loader):
            count = len(labels) if batch[me::processes] else 0
            good = evaluate.total(torch.tensor(count)).item() if args.skip_bad_images else len(batch)
            if good < len(batch):
                skipped |= evaluate.gathered(loader.bad.values())
            if not good:  # a step without an update
                step += 1
                schedule.step()
                evaluate.write_file(log, f"{step},,,,\n", append=True)
                continue
            if not len(labels):
                images, labels = torch.zeros(1, 3, *[model.config.image_size] * 2), torch.zeros(1, dtype=torch.long)  # to take part, without weight
            weight = count / good  # of this process in the mean over the batch
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            torch.manual_seed(args.seed + step)  # what a step draws depends on the step alone
            if hook and step >= 0.75 * total_steps:
                hook.remove()
            with evaluate.amp_context(device, args.amp):
                logits, kept = model(images)  # (B, classes), (depth, B)
                with torch.no_grad():
                    wanted = teacher(images)[0] if ranks else None  # (B, classes)
            cross_entropy = F.cross_entropy(logits.float(), labels, label_smoothing=0.1) * weight
            ratio, hits = flops_ratio(kept, model.config) * weight, (logits.argmax(1) == labels).float().mean() * weight
            quality = evaluate.kl_divergence(logits, wanted) * weight if ranks else cross_entropy
            flag = torch.full_like(hits, len(interrupted))
            all_entropy, all_quality, r, top1, stopped = evaluate.total(torch.stack([cross_entropy, quality, ratio, hits, flag]).detach()).tolist()
            distance = r - args.target + (ratio - ratio.detach())  # over all processes, with the gradient of this one's images
            reg_weight = 0 if ranks or not thresholds else args.reg_weight  # the paper's term of the loss; ranks are steered
            loss = quality + reg_weight * distance**2 if reg_weight else quality
            all_loss = all_quality + reg_weight * (r - args.target) ** 2
            optimizer.zero_grad()
            for _, masker in thresholds:
                masker.threshold.grad = torch.zeros_like(masker.threshold)  # the last block's may have no part in the logits
            scaler.scale(loss).backward()
            add_up(p.grad for p in model.parameters() if p.grad is not None)
            if ranks:
                slopes = rank_slopes(model, scores, ranks)
                for rank, slope, (_, masker) in zip(ranks, slopes, thresholds):
                    rank.grad = masker.threshold.grad * slope
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], math.inf if thresholds else 1.0)
            if not math.isfinite(all_loss) or not (math.isfinite(norm) or scaler.get_scale() > 1):  # a scale above 1 can still be lowered
                save()
                evaluate.stop(f"the loss is {all_loss:g}, the norm of its gradient {norm:g} at step {step + 1}; last.pt holds the state before it", 1)
            if ranks and math.isfinite(norm):
                steer(ranks, averages, r_by_threshold * torch.cat(slopes), r - args.target)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            overflows += scaler.get_scale() < scale  # float16: no update then
            schedule.step()
            if ranks:
                for rank in ranks:
                    rank.clamp_(0, 1)
                set_ranks(model, scores, ranks)
            else:
                for _, masker in thresholds:
                    masker.threshold.data.clamp_(0, 1)
            step += 1

            evaluate.write_file(log, f"{step},{all_loss:.6g},{all_entropy:.6g},{r:.6f},{100 * top1:.3f}\n", append=True)
            speed = (step - first) * batch_size / (time.time() - progress.start)
            goal = f"r {r:.3f} (target {args.target:g})" if thresholds else f"top-1 {100 * top1:.1f} %"
            progress.show(f"train: step {step}/{total_steps}, {speed:.0f} images/s, loss {all_loss:.3g}, {goal}", step - first, total_steps - first)
            if stopped or time.time() - saved_at > SAVE_EVERY:
                save()
                saved_at = time.time()
            if stopped:
                leave()
    save()
    if evaluate.total(torch.tensor(len(interrupted))).item():  # in the last step
        leave()
    for number, handler in previous.items():
        signal.signal(number, handler)
    if hook:
        hook.remove()
    if overflows:
        evaluate.say(f"{overflows} of {total_steps} steps made no update: their gradients overflowed float16")
    return skipped


def add_up(tensors):
    """Replace each of the tensors by its sum over all processes."""
    if evaluate.processes()[1] > 1:
        tensors = list(tensors)
        flat = evaluate.total(torch.cat([t.flatten() for t in tensors]))
        for t, found in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(found.view_as(t))


def agreed(found):
    """What the first process found, for all of them."""
    box = [found]
    if evaluate.processes()[1] > 1:
        torch.distributed.broadcast_object_list(box, 0)
    return box[0]


def threshold_maskers(model):
    """("merge" or "prune", masker) of every learned threshold, block by block."""
    return [(name.split(".")[-1].removesuffix("_masker"), module) for name, module in model.named_modules() if isinstance(module, ltmp.ThresholdMasker)]


@torch.no_grad()
def measured_r(model, batches):
    """r over batches of images (B, 3, S, S), tokens really dropped."""
    flops = torch.cat([model_flops(model.config, model(images)[1].cpu().double()) for images in batches])  # (images,)
    return flops.mean().item() / model_flops(model.config)


def set_ranks(model, scores, ranks):
    """Put each threshold where it removes a share of its scores: its rank.

    Ranks know no scale: a step of 0.001 is one token in a thousand, for importances of 1/197 as for
    similarities of 0.99. scores, ranks: from start.
    """
    for (step, masker), rank in zip(threshold_maskers(model), ranks):
        masker.threshold.data.copy_(evaluate.at_rank(step, scores[masker], rank.item()))


def rank_slopes(model, scores, ranks, width=0.05):
    """d threshold / d rank of each, a list of (1,): over `width` to both sides, as far as there are any. scores, ranks: from start."""
    slopes = []
    for (step, masker), rank in zip(threshold_maskers(model), ranks):
        low, high = max(rank.item() - width, 0.0), min(rank.item() + width, 1.0)
        slopes.append((evaluate.at_rank(step, scores[masker], high) - evaluate.at_rank(step, scores[masker], low))[None] / (high - low))
    return slopes


def r_gradient(model, images):
    """d r / d threshold of all, (thresholds,), by the gradient that learning goes by, over images (B, 3, S, S).

    What is wrong with that gradient of a decision is wrong with the KL's in the same way, so that steer can weigh the one with the other:
    differences of r itself are truer, but with them learning ends at up to twice the KL. Leaves the model in training mode, all but thresholds frozen.
    """
    model.train().requires_grad_(False)
    thresholds = [masker.threshold.requires_grad_() for _, masker in threshold_maskers(model)]
    found = [torch.cat(torch.autograd.grad(flops_ratio(model(some)[1], model.config), thresholds, materialize_grads=True)) * len(some) / len(images)
             for some in images.split(8)]
    return torch.stack(found).sum(0)


class OutOfReach(ValueError):
    """No thresholds give the target."""


def start(model, batches, target, tolerance=0.01):
    """Where learning starts: in all blocks merging removes the same share of what it meets, and pruning a tenth of that share, those that make r the target.

    Where there is no merging, or that is not enough, pruning removes the same share. batches: images (B, 3, S, S); scores are those of the first, r that of all.
    Returns r; the scores that each threshold met, masker -> sorted (n,); and the shares as ranks of these scores, a list of (1,).
    """
    scores, ranks = {}, []

    def place(moving, t):
        share = max(-t, 0.0)
        shares = {"merge": share, "prune": share if "prune" in moving else share / 10}
        scores.update(evaluate.set_shares(model, batches[0], shares))
        ranks[:] = [torch.full_like(masker.threshold.data, shares[step]) for step, masker in threshold_maskers(model)]

    return reach(model, batches, place, target, tolerance), scores, ranks


def choose(model, teacher, batches, target, chosen=None):
    """What is learned: a model that merges and prunes, or its twin that merges alone (prune thresholds then end as 0).

    A gradient sees what the next token costs, not what all tokens up to a rank do together, and beside merging it lets thresholds prune what
    had better stay. So two starts at the same r are compared: the twin it is where the one with a little pruning is more than a tenth further
    from teacher, in the root of the KL, averaged over images (the KL's own mean hangs on a few of them).
    teacher, batches: as in learn and land. chosen: the method that a run to be resumed had chosen. Returns the model, and r, scores and ranks of its start.
    """
    few = batches[:2]  # enough for r
    if len(ltmp.METHODS[model.method]) == 1:
        return model, *start(model, few, target)
    twin = evaluate.with_method(model, "ltm")
    try:
        r, scores, ranks = start(twin, few, target)
        set_ranks(twin, scores, [torch.ones_like(rank) for rank in ranks])
        enough = measured_r(twin, batches) <= target  # for land, too
        set_ranks(twin, scores, ranks)
    except OutOfReach:
        enough = False
    if not enough:
        return model, *start(model, few, target)
    starts = {model.method: (model, *start(model, few, r, 0.002)), "ltm": (twin, r, scores, ranks)}
    if chosen is None:
        far = {method: [] for method in starts}
        with torch.no_grad(), torch.autocast(batches[0].device.type, enabled=False):  # half precision differs from itself by more
            for images in batches:
                wanted = teacher(images)[0]  # (B, classes)
                for method, (each, *_) in starts.items():
                    far[method] += [evaluate.kl_divergence(one[None], other[None]).clamp(min=0).sqrt().item() for one, other in zip(each(images)[0], wanted)]
        both, alone = (sum(distances) / len(distances) for distances in far.values())
        chosen = agreed(model.method if both < 1.1 * alone else "ltm")
        evaluate.say(f"root of the KL {alone:.3g} with merging alone, {both:.3g} with a little pruning: {'merging alone is' if chosen == 'ltm' else 'both are'} learned")
    return starts[chosen]


def land(model, batches, scores, ranks, target):
    """Shift the ranks of merging by one number, or, where that is not enough, all ranks, so that r is the target. Returns r.

    batches: images (B, 3, S, S); scores, ranks: from start; the ranks are changed in place, and end between 0 and 1.
    """
    steps, before = [step for step, _ in threshold_maskers(model)], [rank.clone() for rank in ranks]

    def place(moving, t):
        for step, rank, old in zip(steps, ranks, before):
            rank.copy_((old - t).clamp(0, 1) if step in moving else old)
        set_ranks(model, scores, ranks)

    return reach(model, batches, place, target, 0.002)


@torch.no_grad()
def reach(model, batches, place, target, tolerance):
    """Find the t for which place({"merge"}, t), if need be place({"merge", "prune"}, t), gives r = target. Returns r. Says every ten seconds where it is.

    More t, more tokens. Where r jumps over the target, since equal scores go together, it ends beside the jump.
    Raises OutOfReach, a ValueError, where even removing all that may go leaves a larger r.
    """
    said = time.time()

    def r_at(moving, t):
        nonlocal said
        place(moving, t)
        r = measured_r(model, batches)
        if time.time() - said > 10:
            evaluate.say(f"looking for r = {target:g} on {sum(map(len, batches))} training images: {r:.3f}")
            said = time.time()
        return r

    model.eval()
    for moving in ({"merge"}, {"merge", "prune"}):
        if moving & set(ltmp.METHODS[model.method]) and (r := find(partial(r_at, moving), target, tolerance)) is not None:
            return r
    raise OutOfReach(f"the target {target:g} is out of reach: the lowest r is {r_at(moving, -1):.3f}")


def find(f, target, tolerance):
    """Look for the t from -1 to 1 at which f, which grows with t, is the target, or jumps over it. Returns f(t), called last; None where f does not get there."""
    last, t = (0.0, f(0.0)), 0.02
    sign = 1 if last[1] < target else -1
    while abs(last[1] - target) > tolerance:  # step by step until the target is passed
        here = (sign * t, f(sign * t))
        if sign * (here[1] - target) >= 0:
            low, high = sorted([last, here])
            break
        if t == 1 and abs(here[1] - target) > tolerance:
            return None
        last, t = here, min(1, 3 * t)
    else:
        return last[1]
    while high[0] - low[0] > 1e-6:  # between two that enclose it: where a straight line meets it, but a tenth of the way at least
        share = (target - low[1]) / max(high[1] - low[1], 1e-9)
        t = low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])
        value = f(t)
        if abs(value - target) <= tolerance:
            break
        low, high = ((t, value), high) if value < target else (low, (t, value))
    return value


def settings(args):
    """What must be the same when a run is resumed."""
    return {"processes": evaluate.processes()[1]} | {name: value for name, value in vars(args).items()
            if name not in ("resume", "overwrite", "out", "workers", "device", "limit_val", "skip_bad_images")}


def load_checkpoint(args):
    """The state in --out/last.pt. Raises ValueError where there is none or it has other settings."""
    path = args.out / "last.pt"
    if not path.is_file():
        raise ValueError(f"nothing to resume: no {path}; without --resume a run begins")
    saved = ltmp.read_file(path)
    if not isinstance(saved, dict) or not {"model", "optimizer", "schedule", "scaler", "step", "overflows", "skipped", "ranks", "averages", "method", "settings"} <= saved.keys():
        raise ValueError(f"{path} is no last.pt of this version of train.py: begin anew, with --overwrite in place of --resume, or without this file")
    for name, value in settings(args).items():
        if saved["settings"].get(name) != value:
            raise ValueError(f"{path} was made with {name} = {saved['settings'].get(name)}, not {value}: resume with the same settings")
    return saved


def save_file(path, content):
    """torch.save by evaluate.write_file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    evaluate.write_file(path, buffer.getbuffer())


def result(model, name, args, images):
    """The content of thresholds.json: the thresholds and how they came about."""
    found = {f"{step}_thresholds": [float(f"{getattr(block, f'{step}_masker').threshold.item():.9g}") for block in model.blocks]  # nine digits hold a float32
             for step in ("merge", "prune") if step in ltmp.METHODS[model.method]}
    return ltmp.seal({"model": name, "method": model.method, "target": args.target} | found | {
        "data": args.data or "embedded Fashion-MNIST", "weights": str(args.out / "last.pt") if args.lr_backbone is not None else args.weights or "the model's own", "images": images, "image_size": model.config.image_size,
        "epochs": args.epochs, "batch_size": args.batch_size, "processes": evaluate.processes()[1], "recipe": args.recipe, "lr": args.lr} | ({"reg_weight": args.reg_weight} if args.recipe == "paper" else {}) | {
        "tau": args.tau, "seed": args.seed, "version": ltmp.__version__})


def main(argv=None):
    """The command line: learn, evaluate, write the results."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    if args.device.startswith("cuda"):  # sums in a fixed order, where torch has a kernel for it: the same seed gives the same thresholds
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    name = args.model
    try:
        device = evaluate.find_device(args.device)
        if (args.out / "last.pt").exists() and not args.resume and not args.overwrite:
            raise ValueError(f"{args.out} holds a run already: --resume goes on with it, --out DIR begins another, --overwrite replaces it")
        saved = load_checkpoint(args) if args.resume else None
        train_set, val_set = (evaluate.open_split(args, split) for split in ("train", "val"))
        if train_set.classes != val_set.classes:
            odd = sorted(set(train_set.classes) ^ set(val_set.classes))
            raise ValueError(f"train and val have different classes: {', '.join(odd[:5])} in one alone")
        model = evaluate.build_model(name, args.method, evaluate.read_weights(name, args.weights), args.tau, None,
                                     args.num_classes, args.image_size).to(device)
        val_set = data.subset(evaluate.still(val_set, model), args.limit_val)
    except ValueError as error:
        evaluate.stop(error)
    config = model.config
    # Fashion-MNIST's objects are centred and fill the image: of the augmentation only the flip makes sense.
    milder = {"scale": (1, 1), "jitter": 0} if isinstance(train_set, data.FashionMNIST) else {}
    transform = data.train_transform(config.image_size, config.mean, config.std, **milder)
    augmented = data.Augmented(train_set, transform, args.seed, args.limit_train)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        evaluate.stop(f"cannot write to {args.out}: {error.strerror}")
    try:
        if args.recipe == "paper" or model.method == "dense":
            skipped = learn(model, augmented, args, device, saved)
        else:
            train_set.transform = evaluate.clean_transform(config)  # augmented has its own
            plain = data.sample(data.subset(train_set, args.limit_train), 512, args.seed)
            loader = evaluate.make_loader(plain, args, device, batch_size=64)  # every process loads the same
            batches = [images.to(device) for images, _ in loader if len(images)]
            if not batches:
                evaluate.stop(f"none of {len(plain)} training images could be read")
            teacher = evaluate.with_method(model, "dense").eval()
            with evaluate.amp_context(device, args.amp):
                learner, r, scores, ranks = choose(model, teacher, batches, args.target, saved and saved["method"])
                evaluate.say(f"start: r = {r:.3f}")
            met, shares = agreed(([found.cpu() for found in scores.values()], [rank.item() for rank in ranks]))
            scores = {masker: found.to(device) for masker, found in zip(scores, met)}
            for rank, share in zip(ranks, shares):
                rank.fill_(share)
            set_ranks(learner, scores, ranks)
            for masker, found in scores.items():
                masker.whole_gradient = True
                masker.tau = args.tau * (found[len(found) * 3 // 4] - found[len(found) // 4]).clamp(min=1e-6).item()
            with evaluate.amp_context(device, args.amp):
                r_by_threshold = agreed(r_gradient(learner, batches[0]).cpu()).to(device)
            if saved:  # a run that was at its end has thresholds that learner has none for
                saved["model"] = {name: saved["model"][name] for name in learner.state_dict()}
            skipped = learn(learner, augmented, args, device, saved, teacher, scores, ranks, r_by_threshold) | set(loader.bad.values())
            with evaluate.amp_context(device, args.amp):
                r = land(learner, batches, scores, ranks, args.target)
                evaluate.say(f"landing: r = {r:.3f} on {sum(map(len, batches))} training images")
            for masker, threshold in zip(scores, agreed([masker.threshold.item() for masker in scores])):
                masker.threshold.data.fill_(threshold)
            model = evaluate.with_method(learner, args.method)
            if evaluate.processes()[0] == 0:
                last = torch.load(args.out / "last.pt", map_location="cpu", weights_only=True)
                save_file(args.out / "last.pt", last | {"model": model.state_dict()})  # with the ranks before: resumed, it lands again, and the same
    except OutOfReach as error:
        evaluate.stop(error)
    if model.method != "dense":
        evaluate.write_file(args.out / "thresholds.json", json.dumps(result(model, name, args, len(augmented)), indent=1))
    goal = {} if model.method == "dense" else {"target": args.target}
    loader = evaluate.make_loader(evaluate.own_share(val_set), args, device, batch_size=args.batch_size)
    metrics = {"model": name, "method": model.method} | goal | evaluate.measure_both(model, loader, device, args.amp)
    evaluate.write_file(args.out / "metrics.json", json.dumps(metrics, indent=1))
    evaluate.say(evaluate.report(metrics, name, model.method), sys.stdout)
    if goal and args.recipe == "paper" and abs(metrics["flops_ratio"] - args.target) > 0.01:
        evaluate.say("note: r missed the target: the paper's recipe is for an epoch of ImageNet, some 10,000 steps; --recipe adaptive lands on the target with any data")
    evaluate.say_skipped(evaluate.gathered(skipped | set(loader.bad.values())))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # outside of learn
        evaluate.stop("stopped; --resume goes on from the last save, if there is one", 130)
