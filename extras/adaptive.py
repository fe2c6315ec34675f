"""The recipe for short runs: thresholds start and end where r is the target.

What is learned is each threshold's rank: the share that it removes of the scores met at the start.
The loss is the KL from the predictions of the same ViT without merging and pruning, so labels are
not used. A step goes where the KL falls while r stays; a second part leads back to the target.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from flops import flops_ratio, model_flops

from . import landing, measuring, models, runtime
from .run import Run

STEP = 0.15  # length of a step of all ranks together, times the root of the number of steps
MEMORY = 0.03  # weight of the newest gradient in the average: it reaches back some thirty steps
WIDTH = 0.05  # of ranks, to both sides, over which the slope of a threshold is taken
LITTLE = 0.1  # how much is pruned at a start with pruning, as a share of what merges


def learn(model, train_set, images, args, device):
    """Learn the thresholds of model, in place, on a data.Augmented. Returns the Run.

    images (n, 3, S, S): as validation sees them, for the start. Raises OutOfReach.
    """
    teacher = models.with_method(model, "dense").eval()
    maskers = landing.maskers(model)
    shares = runtime.agreed(choose(model, teacher, images, args.target))
    scores = start_scores(model, images[:128], shares)
    # A share of 0 for all prune thresholds means that merging alone is learned.
    learned = torch.tensor([shares[key] > 0 for key in maskers], device=device)
    ranks = torch.tensor(list(shares.values()), device=device)
    for key, masker in maskers.items():
        masker.tau = 0.5 * interquartile_range(scores[key])
    model.requires_grad_(False)
    thresholds = [masker.threshold.requires_grad_() for masker in maskers.values()]
    # By way of the CPU: another process has another GPU.
    r_by_threshold = runtime.agreed(r_gradient(model, images[:64], thresholds).cpu()).to(device)

    state = nn.Module()
    for name, value in (("ranks", ranks), ("average", torch.zeros_like(ranks))):
        state.register_buffer(name, value)
    batch = args.batch_size * runtime.processes()[1]
    steps = args.epochs * math.ceil(len(train_set) / batch)
    with Run(args, {"model": model, "ranks": state}, steps, ("kl", "r", "top1")) as run:
        for images, labels in run.batches(train_set, model.config.image_size, device):
            model.train()
            logits, kept = model(images)  # (B, classes), (depth, B)
            with torch.no_grad():
                wanted = teacher(images)[0]  # (B, classes)
            kl = run.mean(measuring.kl_divergence(logits.float(), wanted.float()))
            r = run.mean(model_flops(model.config, kept) / model_flops(model.config)).item()
            for threshold in thresholds:
                # The last block's may have no part in the logits.
                threshold.grad = torch.zeros_like(threshold)
            kl.backward()
            runtime.sum_gradients(thresholds)
            run.check_finite(kl, thresholds)

            slopes = rank_slopes(maskers, scores, state.ranks)  # (n,)
            state.average.lerp_(torch.cat([t.grad for t in thresholds]) * slopes, MEMORY)
            direction = steer(state.average, r_by_threshold * slopes, r - args.target, learned)
            length = STEP / math.sqrt(steps) * (1 + math.cos(math.pi * run.step / steps)) / 2
            state.ranks.sub_(length * direction).clamp_(0, 1)
            set_ranks(maskers, scores, state.ranks)

            top1 = 100 * run.mean((logits.argmax(1) == labels).float()).item()
            text = f"KL {kl:.2g}, r {r:.3f} (target {args.target:g})"
            run.end_step((kl.item(), r, top1), text)
    return run


def choose(model, teacher, images, target):
    """The shares to start from: equal in all blocks; of merging alone where pruning would not pay.

    A gradient sees what the next token costs, not what all up to a rank cost together. So two
    starts at the same r are compared: merging alone, and with a little pruning. Pruning is learned
    where that is at most a tenth further from the dense predictions, in the root of the KL.
    """
    keys = landing.maskers(model)
    few = images[:128]
    if len({step for _, step in keys}) == 1:
        return landing.scale(model, few, target, dict.fromkeys(keys, landing.SHARE), 0.005)[1]
    little = {key: landing.SHARE * (1 if key[1] == "merge" else LITTLE) for key in keys}
    alone = {key: landing.SHARE * (key[1] == "merge") for key in keys}
    try:
        r, alone = landing.scale(model, few, target, alone, 0.005)
    except landing.OutOfReach:
        return landing.scale(model, few, target, little, 0.005)[1]
    wanted = predict(teacher, images)
    distance_alone = root_kl(model, images, wanted)
    both = landing.scale(model, few, r, little, 0.002)[1]
    distance_both = root_kl(model, images, wanted)
    pays = distance_both < 1.1 * distance_alone
    runtime.say(
        f"start: root of the KL {distance_alone:.3g} by merging alone, {distance_both:.3g} with a "
        f"little pruning: {'both are' if pays else 'merging alone is'} learned"
    )
    return both if pays else alone


@torch.no_grad()
def predict(model, images):
    """Logits (n, classes) of images (n, 3, S, S), in inference and in float32."""
    with torch.autocast(images.device.type, enabled=False):
        return torch.cat([model.eval()(batch)[0].double() for batch in images.split(64)])


def root_kl(model, images, wanted):
    """The root of the KL from wanted logits (n, classes), averaged over images (n, 3, S, S).

    The mean of the KL itself hangs on a few images.
    """
    return measuring.kl_divergence(predict(model, images), wanted).clamp(min=0).sqrt().mean().item()


@torch.no_grad()
def start_scores(model, images, shares):
    """Place the thresholds at their shares. Returns the scores that each meets, sorted (n,)."""
    # A threshold that only the class token reaches meets no scores.
    scores = {key: images.new_empty(0) for key in landing.maskers(model)}
    hooks = []

    def recording(key):
        def record(masker, inputs):
            scores[key] = inputs[0][inputs[0].isfinite()].sort().values

        return record

    for key, masker in landing.maskers(model).items():
        hooks.append(masker.register_forward_pre_hook(recording(key)))
    landing.place(model, images, shares)
    for hook in hooks:
        hook.remove()
    return scores


def interquartile_range(scores):
    """Of sorted scores (n,), above 0 also where there are none, or all are equal."""
    n = len(scores)
    return max((scores[n * 3 // 4] - scores[n // 4]).item(), 1e-6) if n else 1e-6


def set_ranks(maskers, scores, ranks):
    """Put each threshold where it removes its rank (n,), a share of its scores."""
    for (key, masker), rank in zip(maskers.items(), ranks.tolist(), strict=True):
        masker.threshold.data.copy_(landing.threshold_at(key[1], scores[key], rank))


def rank_slopes(maskers, scores, ranks):
    """d threshold / d rank of each (n,), over WIDTH to both sides, as far as there are any."""
    slopes = []
    for key, rank in zip(maskers, ranks.tolist(), strict=True):
        low, high = max(rank - WIDTH, 0.0), min(rank + WIDTH, 1.0)
        rise = [landing.threshold_at(key[1], scores[key], end) for end in (low, high)]
        slopes.append((rise[1] - rise[0]) / (high - low))
    return torch.stack(slopes)


def r_gradient(model, images, thresholds):
    """d r / d threshold of all (n,), by the gradient that learning goes by.

    What is wrong with that gradient of a decision is wrong with the KL's in the same way.
    """
    model.train()
    found = torch.zeros(len(thresholds), device=images.device)
    for batch in images.split(8):
        r = flops_ratio(model(batch)[1], model.config)
        grads = torch.autograd.grad(r, thresholds, materialize_grads=True)
        found += torch.cat(grads) * len(batch) / len(images)
    return found


def steer(kl_by_rank, r_by_rank, distance, learned):
    """What to subtract from the ranks (n,): where the KL rises while r stays, and back to r.

    kl_by_rank, r_by_rank (n,): gradients. distance: r - target; at 0.01, by which batches differ by
    chance, the way back is as long as the way down, and from 0.03 on three times as long. learned
    (n,): ranks that may move.
    """
    up = F.normalize(r_by_rank * learned, dim=0)  # (n,)
    kl_by_rank = kl_by_rank * learned
    along = kl_by_rank - (kl_by_rank @ up) * up
    return F.normalize(along, dim=0) + min(max(distance / 0.01, -3), 3) * up
