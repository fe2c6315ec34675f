"""Thresholds by the share that they remove, and the one number that brings r to a target.

A share knows no scale: importances of 1/197 and similarities of 0.99 are steered alike. Shares are
a dict {(block, "merge" or "prune"): share}, 0 for off, 1 and more for all.
"""

import math

import torch

from flops import model_flops
from ltmp import ThresholdMasker

from . import runtime

# Of each threshold, where a search for equal shares begins.
SHARE = 0.1


class OutOfReach(ValueError):
    """No thresholds give the target."""


def maskers(model):
    """Every learned threshold: {(block, "merge" or "prune"): ThresholdMasker}."""
    found = {}
    for i, block in enumerate(model.blocks):
        for step in block.steps:
            masker = getattr(block, f"{step}_masker")
            if isinstance(masker, ThresholdMasker):
                found[i, step] = masker
    return found


def threshold_at(step, scores, share):
    """The threshold () between scores (n,), sorted from low to high, that removes this share.

    The most similar tokens merge, the least important are dropped. Share 0 gives 1 for merge and 0
    for prune, where both are off; 1 and more removes all that are not below 0.
    """
    count = round(min(share, 1.0) * len(scores))
    if count == 0:
        return scores.new_tensor(1.0 if step == "merge" else 0.0)
    end = scores.new_tensor(0.0 if step == "merge" else 1.0)
    # Those who go first are the highest for merge, the lowest for prune.
    last, following = (-count, -count - 1) if step == "merge" else (count - 1, count)
    following = scores[following] if count < len(scores) else end
    # A threshold halfway between two scores does not hang on rounding.
    return ((scores[last] + following) / 2).clamp(0, 1)


class Placing:
    """Inside, each threshold is placed when its scores come, block after block, in one pass."""

    def __init__(self, model, shares):
        self.model = model
        self.shares = shares

    def __enter__(self):
        self.hooks = []
        for key, masker in maskers(self.model).items():
            self.hooks.append(masker.register_forward_pre_hook(self.hook(*key)))

    def hook(self, block, step):
        def place(masker, inputs):
            scores = inputs[0][inputs[0].isfinite()].sort().values  # (n,)
            masker.threshold.data.copy_(threshold_at(step, scores, self.shares[block, step]))

        return place

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def place(model, images, shares):
    """Place every threshold so that it removes its share of what it meets. Returns r.

    images (B, 3, S, S); what a block meets is what the blocks before it leave of them.
    """
    with Placing(model, shares):
        return measure(model, images)


@torch.no_grad()
def measure(model, images):
    """r over images (B, 3, S, S), tokens really dropped."""
    kept = model.eval()(images)[1].cpu().double()  # (depth, B)
    return (model_flops(model.config, kept).mean() / model_flops(model.config)).item()


@torch.no_grad()
def scores_met(model, images):
    """The scores (n,) that each threshold meets, as a dict, and r."""
    # A threshold that only the class token reaches meets none.
    found = {key: images.new_empty(0) for key in maskers(model)}
    hooks = []

    def recording(key):
        def record(masker, inputs):
            found[key] = inputs[0][inputs[0].isfinite()]

        return record

    for key, masker in maskers(model).items():
        hooks.append(masker.register_forward_pre_hook(recording(key)))
    r = measure(model, images)
    for hook in hooks:
        hook.remove()
    return found, r


def shares_of(model, images):
    """The share that each threshold now removes of what it meets, as a dict, and r."""
    scores, r = scores_met(model, images)
    shares = {}
    for key, masker in maskers(model).items():
        found = scores[key]
        gone = found > masker.threshold if key[1] == "merge" else found <= masker.threshold
        # What meets nothing prunes all, unless it is off.
        pruned = float(key[1] == "prune" and masker.threshold.item() > 0)
        shares[key] = gone.cpu().double().mean().item() if len(gone) else pruned
    return shares, r


def tolerance(target):
    """How far from the target r may stay; near 1 little, as there is little to remove."""
    return min(0.002, 0.02 * (1 - target))


def scale(model, images, target, shares, now=None):
    """Multiply all shares by one number so that r is the target; 0 stays 0. Returns r and shares.

    now: r at these shares, where it is known. Raises OutOfReach where even the largest shares leave
    a larger r.
    """
    largest = 1 / min((share for share in shares.values() if share > 0), default=1)

    def scaled(factor):
        return {key: factor * share for key, share in shares.items()}

    low, factor = (0.0, 1.0), 1.0
    r = place(model, images, shares) if now is None else now
    # log r falls nearly straight. A little further than that, until r is beyond the target.
    while r > target + tolerance(target) and factor < largest:
        low = (factor, r)
        times = math.log(target) / min(math.log(r), 0.01 * math.log(target))
        factor = min(largest, 1.1 * times * factor)
        r = place(model, images, scaled(factor))
    if r > target + tolerance(target):
        raise OutOfReach(f"the target {target:g} is out of reach: the lowest r found is {r:.3f}")
    high = (factor, r)
    progress = runtime.Progress()
    # False position, in the Illinois form: the weight of a side that stays twice is halved.
    weights, moved = [1.0, 1.0], None
    for _ in range(30):
        if abs(r - target) <= tolerance(target) or high[0] - low[0] < 1e-6:
            break
        above = weights[0] * math.log(low[1] / target)
        below = weights[1] * math.log(target / high[1])
        part = min(max(above / max(above + below, 1e-9), 0.05), 0.95)
        factor = low[0] + part * (high[0] - low[0])
        r = place(model, images, scaled(factor))
        side = 0 if r > target else 1
        weights[side] = 1.0
        weights[1 - side] = weights[1 - side] / 2 if side == moved else 1.0
        moved = side
        low, high = ((factor, r), high) if side == 0 else (low, (factor, r))
        progress.show(f"looking for r = {target:g}: {r:.3f}")
    return r, scaled(factor)


def start(model, images, target, steps=("merge", "prune")):
    """Equal shares in all blocks, those that make r the target. Returns r and shares."""
    return scale(model, images, target, {key: SHARE * (key[1] in steps) for key in maskers(model)})


def land(model, images, target):
    """Scale what the thresholds remove until r is the target. Returns r before and after.

    A threshold that removes nothing stays off. Where none removes anything, all get equal shares.
    Raises OutOfReach, the thresholds then as before.
    """
    shares, before = shares_of(model, images)
    if abs(before - target) <= tolerance(target):
        return before, before
    thresholds = {masker: masker.threshold.clone() for masker in maskers(model).values()}
    try:
        if not any(shares.values()):
            return before, start(model, images, target)[0]
        return before, scale(model, images, target, shares, now=before)[0]
    except OutOfReach:
        for masker, threshold in thresholds.items():
            masker.threshold.data.copy_(threshold)
        raise
