"""The recipe for short runs: thresholds start where r is the target, and are led back to it.

What is learned is each threshold's rank: the share that it removes of the scores met at the start.
The loss is the root of the KL from the dense predictions, so labels are not used. A step has two
parts: one goes where the loss falls and r stays, the other leads r back to the target.
"""

import math
from functools import partial

import torch
from torch import nn

from flops import flops_ratio, model_flops
from ltmp import METHODS

from . import landing, measuring, models, runtime
from .run import Run

STEP = 0.16  # of a rank whose price is sure, times min(1 - target, 0.5) / sqrt(steps)
MEMORY = 0.03  # weight of the newest price in the averages: they reach back some thirty steps
LITTLE = 0.3  # a start with pruning prunes this much of what it merges


def learn(model, train_set, clean, args, device):
    """Learn the thresholds of model, in place, on a batching.Augmented. Returns the Run.

    clean (n, 3, S, S): training images as validation sees them. Raises OutOfReach.
    """
    teacher = models.with_method(model, "dense").eval()
    maskers = landing.maskers(model)
    shares = runtime.agreed(choose(model, teacher, clean[:128], args.target))
    scores = runtime.agreed(start_scores(model, clean[:128], shares))
    ranks = torch.tensor([shares[key] for key in maskers], device=device).clamp(max=1)  # (n,)
    learned = (ranks > 0) & (ranks < 1)
    model.requires_grad_(False)
    slopes = set_ranks(maskers, scores, ranks)  # (n,)
    thresholds = [masker.threshold.requires_grad_() for masker in maskers.values()]
    # What each rank saves, at the start: agreed by way of the CPU, as GPUs differ.
    saved = (-r_gradient(model, clean[:64], thresholds) * slopes).clamp(min=1e-4)  # (n,)
    saved = runtime.agreed(saved.cpu()).to(device)

    state = nn.Module()
    state.register_buffer("ranks", ranks)
    for name in ("average", "square"):
        state.register_buffer(name, torch.zeros_like(ranks))
    steps = args.epochs * math.ceil(len(train_set) / (args.batch_size * runtime.processes()[1]))
    with Run(args, {"model": model, "ranks": state}, steps, ("kl", "r", "top1")) as run:
        if not run.landed:
            slopes = set_ranks(maskers, scores, state.ranks)
        model.train()
        for images, labels in run.batches(train_set, model.config.image_size, device):
            logits, kept = model(images)  # (B, classes), (depth, B)
            with torch.no_grad():
                wanted = teacher(images)[0]  # (B, classes)
            kl = measuring.kl_divergence(logits.float(), wanted.float())  # (B,)
            loss = run.mean(measuring.root(kl))
            r = run.mean(model_flops(model.config, kept) / model_flops(model.config)).item()
            for threshold in thresholds:
                # The last block's may have no part in the logits.
                threshold.grad = torch.zeros_like(threshold)
            # Only ratios of gradients count. In float16 small ones would be 0 without the factor.
            (1024 * loss).backward()
            runtime.sum_gradients(thresholds)
            run.check_finite(loss, thresholds)

            cost = torch.cat([threshold.grad for threshold in thresholds]) * slopes  # (n,)
            price = neutral(cost / saved, saved * learned)
            state.average.lerp_(price, MEMORY)
            state.square.lerp_(price**2, MEMORY)
            direction = steer(state.average, state.square, saved * learned, r - args.target)
            # Short at first, and at the end.
            longest = STEP * min(1 - args.target, 0.5) / math.sqrt(steps)
            length = longest * math.sin(math.pi * (run.step + 0.5) / steps)
            state.ranks.sub_(length * direction).clamp_(0, 1)
            slopes = set_ranks(maskers, scores, state.ranks)

            kl = run.mean(kl).item()
            top1 = 100 * run.mean((logits.argmax(1) == labels).float()).item()
            run.end_step((kl, r, top1), f"KL {kl:.2g}, r {r:.3f} (target {args.target:g})")
    return run


def choose(model, teacher, images, target):
    """The shares to start from. Shares of 0 and 1 are not learned.

    Nothing reads what the last block could remove, so tokens go there first. A gradient tells what
    the next token costs, not what all up to a rank cost. So starts at the same r are compared by
    the root of their KL. First: merging in the other blocks, equal shares. Second: none in the
    first; kept if a tenth better, since what is off is not learned. Third: a little pruning in the
    second half; kept if at most a tenth worse. Without merging, or where merging alone misses the
    target, all steps start in all blocks.
    """
    wanted = measuring.predict(teacher, images)
    reach = partial(at_target, model, images, wanted, target)
    steps, last = METHODS[model.method], len(model.blocks) - 1
    parts = {"merge": 1, "prune": LITTLE}
    both = {key: landing.SHARE * parts[key[1]] for key in landing.maskers(model)}
    both |= {(last, step): 0.0 for step in steps}
    # All that can go, unless the others remove next to nothing.
    both[last, "prune" if "prune" in steps else "merge"] = 1000.0
    prunes = [key for key in both if key[1] == "prune" and key[0] < last]
    kl, shares = reach(both | dict.fromkeys(prunes, 0.0)) if "merge" in steps else (math.inf, both)
    if kl == math.inf:
        return landing.scale(model, images, target, both)[1]
    runtime.say(f"start: merging, root of the KL {kl:.3g}")
    late = [key for key in prunes if key[0] > last / 2]
    # What to try; its share, of the share that merges; where; how much worse it may be.
    trials = [("none in the first", 0.0, [(0, "merge")], 0.9)]
    trials += [("a little pruning", LITTLE, late, 1.1)] if late else []
    for name, part, keys, most in trials:
        trial_kl, trial = reach(shares | {key: part * shares[key[0], "merge"] for key in keys})
        pays = trial_kl < most * kl
        runtime.say(f"start: {name}, {trial_kl:.3g}: {'kept' if pays else 'dropped'}")
        kl, shares = (trial_kl, trial) if pays else (kl, shares)
    return shares


def at_target(model, images, wanted, target, shares):
    """Scale shares until r is the target. Returns the root of the KL from wanted, and them."""
    near = min(0.002, 0.02 * (1 - target))
    try:
        shares = landing.scale(model, images, target, shares, near)[1]
    except landing.OutOfReach:
        return math.inf, shares
    kl = measuring.kl_divergence(measuring.predict(model, images), wanted)  # (n,)
    return measuring.root(kl).mean().item(), shares


def start_scores(model, images, shares):
    """Place the thresholds at their shares. Returns the scores (n,) that each meets, sorted."""
    with landing.Placing(model, shares):
        scores, _ = landing.scores_met(model, images)
    return {key: found.sort().values.cpu() for key, found in scores.items()}


def set_ranks(maskers, scores, ranks):
    """Put each threshold where it removes its rank (n,), a share of its scores, and set its tau.

    Its gradient sees scores around it, as many below as above: half of those between it and the
    nearer end, a hundredth at least. Where few tokens go, more of those that stay would hide what
    they cost. Returns d threshold / d rank there (n,).
    """
    slopes = []
    for (key, masker), rank in zip(maskers.items(), ranks.tolist(), strict=True):
        half = max(0.5 * min(rank, 1 - rank), 0.01)
        # At rank 0 a threshold is far from all scores: from there it sees the first hundredth.
        low, high = max(rank - half, 0.0), min(rank + half, 1.0)
        at = partial(landing.threshold_at, key[1], scores[key])
        rise = at(high) - at(low)
        masker.threshold.data.copy_(at(rank))
        masker.tau = max(0.5 * abs(rise).item(), 1e-6)
        slopes.append(rise / (high - low))
    return torch.stack(slopes).to(ranks.device)


def r_gradient(model, images, thresholds):
    """d r / d threshold of all (n,), by the gradient that learning goes by."""
    model.train()
    found = torch.zeros(len(thresholds), device=images.device)
    for batch in images.split(8):
        r = flops_ratio(model(batch)[1], model.config)
        grads = torch.autograd.grad(r, thresholds, materialize_grads=True)
        found += torch.cat(grads) * len(batch) / len(images)
    return found


def neutral(values, saved):
    """values (n,) less their mean, so that a step of the ranks along them leaves r as it is.

    saved (n,): what each rank saves, by which the mean is weighted; 0 where it may not move.
    """
    return (values - (values * saved).sum() / saved.sum().clamp(min=1e-4)) * (saved > 0)


def steer(average, square, saved, distance):
    """What to subtract from the ranks (n,): dear ones go down, cheap ones up, and r to the target.

    The price of a rank is how much loss it adds for each FLOP that it saves. At the best ranks
    between 0 and 1 all have one price. average, square (n,): averages of prices, less the mean of
    all, and of their squares. Their ratio is small where a price changes its sign, as noise does.
    distance: r - target. 0.01, by which batches differ by chance, counts half of a sure price.
    """
    dear = neutral(average / square.sqrt().clamp(min=1e-12), saved)
    return dear - 0.5 * min(max(distance / 0.01, -3), 3) * (saved > 0)
