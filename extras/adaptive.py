"""The recipe for short runs: thresholds start where r is the target, and are led back to it.

What is learned is each threshold's rank: the share that it removes of the scores met at the start.
The loss is the root of the KL from the dense predictions, so labels are not used. Each step moves
one rank after another and measures what that does to the loss, tokens really dropped. Then it goes
where the loss falls and r hardly moves, and a little to where r is the target.

Why no gradient? That of the mask takes a token that is gone for one that no later block would
remove. In truth, what one block leaves the next ones often merge.
"""

import math
from functools import partial

import torch
from torch import nn

from flops import model_flops
from ltmp import METHODS

from . import landing, measuring, models, runtime
from .run import Run

STEP = 0.24  # of a rank whose price is sure, times min(1 - target, 0.5) / sqrt(steps)
MEMORY = 0.03  # weight of the newest price in the averages: they reach back some thirty steps


def learn(model, train_set, clean, args, device):
    """Learn the thresholds of model, in place, on a batching.Augmented. Returns the Run.

    clean (n, 3, S, S): training images as validation sees them. Raises OutOfReach.
    """
    teacher = models.with_method(model, "dense").eval()
    maskers = landing.maskers(model)
    shares = runtime.agreed(choose(model, teacher, clean[:128], args.target))
    scores = runtime.agreed(start_scores(model, clean[:128], shares))
    ranks = torch.tensor([shares[key] for key in maskers]).clamp(max=1)  # (n,)
    learned = (ranks < 1) & ((ranks > 0) | late_prunes(maskers))  # (n,)
    wanted = measuring.predict(teacher, clean[:64]).float().to(device)
    *_, saved = differences(model, clean[:64], wanted, scores, ranks, learned, up=True)
    # What each rank saves, at the start: agreed by way of the CPU, as GPUs differ.
    saved = runtime.agreed(-saved.mean(0).cpu()).clamp(min=1e-4)  # (n,)

    state = nn.Module()
    state.register_buffer("ranks", ranks)
    for name in ("average", "square"):
        state.register_buffer(name, torch.zeros_like(ranks))
    steps = args.epochs * math.ceil(len(train_set) / (args.batch_size * runtime.processes()[1]))
    # Noise lifts what starts at 0, and cannot lower it: such steps are shorter.
    longest = STEP * min(1 - args.target, 0.5) / math.sqrt(steps) * torch.where(ranks > 0, 1.0, 0.3)
    with Run(args, {"model": model, "ranks": state}, steps, ("kl", "r", "top1")) as run:
        for images, labels in run.batches(train_set, model.config.image_size, device):
            with torch.no_grad():
                wanted = teacher(images)[0]  # (B, classes)
            # Up in one step, down in the next where it can: the mean is the cost at this place.
            up = run.step % 2 == 0
            logits, *found = differences(model, images, wanted, scores, state.ranks, learned, up)
            kl, r, cost = (run.mean(values) for values in found[:3])  # (), (), (n,)
            run.check_finite(kl, [])
            kl, r = kl.item(), r.item()

            weights = saved * learned * (state.ranks > 0)
            price = neutral(cost.cpu() / saved, weights, learned)
            state.average.lerp_(price, MEMORY)
            state.square.lerp_(price**2, MEMORY)
            direction = steer(state.average, state.square, weights, learned, r - args.target)
            # Short at first, and at the end.
            length = longest * math.sin(math.pi * (run.step + 0.5) / steps)  # (n,)
            state.ranks.sub_(length * direction).clamp_(0, 1)
            set_ranks(maskers, scores, state.ranks)

            top1 = 100 * run.mean((logits.argmax(1) == labels).float()).item()
            run.end_step((kl, r, top1), f"KL {kl:.2g}, r {r:.3f} (target {args.target:g})")
    return run


def late_prunes(maskers):
    """Which thresholds (n,) prune in the second half, the last block apart: learned even from 0."""
    last = max(block for block, _ in maskers)
    return torch.tensor([step == "prune" and last / 2 < block < last for block, step in maskers])


def choose(model, teacher, images, target):
    """The shares to start from. Those between 0 and 1 are learned, and late_prunes even from 0.

    Nothing reads what the last block could remove, so tokens go there first. Starts at the same r
    are compared by the root of their KL. First: merging in the other blocks, equal shares. Second:
    none in the first; kept if a tenth better, since that is not learned. Third: half as much in the
    first half; kept if better. Where that cannot reach the target, all steps start in all blocks.
    """
    wanted = measuring.predict(teacher, images)
    reach = partial(at_target, model, images, wanted, target)
    steps, last = METHODS[model.method], len(model.blocks) - 1
    parts = {"merge": landing.SHARE, "prune": 0.3 * landing.SHARE}
    both = {(i, step): parts[step] * (i < last) for i, step in landing.maskers(model)}
    # All that can go, unless the others remove next to nothing.
    both[last, "prune" if "prune" in steps else "merge"] = 1000.0
    start = both | {(i, "prune"): 0.0 for i in range(last) if "prune" in steps}
    kl, shares = reach(start) if "merge" in steps else (math.inf, both)
    if kl == math.inf:
        return landing.scale(model, images, target, both)[1]
    runtime.say(f"start: merging, root of the KL {kl:.3g}")
    # How much stays of the share that merges; in how many blocks; how large the loss may be.
    half = math.ceil(last / 2)
    trials = [("none in the first", 0.0, 1, 0.9), ("half in the first half", 0.5, half, 1.0)]
    for name, part, blocks, most in trials:
        early = {(i, "merge"): part * shares[i, "merge"] for i in range(blocks)}
        trial_kl, trial = reach(shares | early)
        pays = trial_kl < most * kl
        runtime.say(f"start: {name}, {trial_kl:.3g}: {'kept' if pays else 'dropped'}")
        kl, shares = (trial_kl, trial) if pays else (kl, shares)
    return shares


def at_target(model, images, wanted, target, shares):
    """Scale shares until r is the target. Returns the root of the KL from wanted, and them."""
    try:
        shares = landing.scale(model, images, target, shares)[1]
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
    """Put each threshold where it removes its rank (n,), a share of its scores."""
    for (key, masker), rank in zip(maskers.items(), ranks.tolist(), strict=True):
        masker.threshold.data.copy_(landing.threshold_at(key[1], scores[key], rank))


@torch.no_grad()
def differences(model, images, wanted, scores, ranks, learned, up):
    """Move each rank (n,) that is learned (n,), alone, and see what becomes of the images.

    A rank moves by half of what is between it and the nearer end, at least 0.02; near 0 always up.
    images (B, 3, S, S); wanted (B, classes): dense logits. Returns logits (B, classes), KL (B,) and
    r (B,) at ranks; by how much the root of the KL and r rise for a unit of each rank, (B, n) each.
    """
    full = model_flops(model.config)
    before, kept = run_from(model.eval(), 0, model.embed(images, drop=True), [])

    def outcome(tokens, kept):
        logits = model.classify(tokens)  # (B, classes)
        kl = measuring.kl_divergence(logits.float(), wanted.float())  # (B,)
        return logits, kl, model_flops(model.config, torch.stack(kept)) / full

    logits, kl, r = outcome(before[-1], kept)
    rises = kl.new_zeros(2, len(images), len(ranks))
    for i, ((block, step), masker) in enumerate(landing.maskers(model).items()):
        if not learned[i]:
            continue
        rank, threshold = ranks[i].item(), masker.threshold.data.clone()
        move = max(0.5 * min(rank, 1 - rank), 0.02)
        if rank + move > 1 or (rank >= move and not up):
            move = -move
        there = landing.threshold_at(step, scores[block, step], rank + move)
        masker.threshold.data.copy_(there)
        # Before this block nothing changes.
        tokens, new_kept = run_from(model, block, before[block], kept[:block])
        masker.threshold.data.copy_(threshold)
        _, new_kl, new_r = outcome(tokens[-1], new_kept)
        rises[0, :, i] = (measuring.root(new_kl) - measuring.root(kl)) / move
        rises[1, :, i] = (new_r - r) / move
    return logits, kl, r, *rises


def run_from(model, first, tokens, kept):
    """Run the blocks from `first` on. Returns the Tokens before each and at the end, and kept."""
    before = [tokens]
    for block in model.blocks[first:]:
        before.append(block(before[-1], model.attention))
        kept = [*kept, before[-1].kept()]
    return before, kept


def neutral(values, weights, learned):
    """values (n,) less their mean, so that a step of the ranks along them leaves r as it is.

    weights (n,): what each rank saves, 0 where it cannot go down. Gives 0 where not learned (n,).
    """
    return (values - (values * weights).sum() / weights.sum().clamp(min=1e-4)) * learned


def steer(average, square, weights, learned, distance):
    """What to subtract from the ranks (n,): dear ones go down, cheap ones up, and r to the target.

    The price of a rank is how much loss it adds for each FLOP that it saves. At the best ranks
    between 0 and 1 all have one price. average, square (n,): of prices, less their mean. The ratio
    is small where a price changes its sign, as noise does. distance: r - target. 0.01, by which
    batches differ by chance, counts half of a sure price.
    """
    dear = neutral(average / square.sqrt().clamp(min=1e-12), weights, learned)
    return dear - 0.5 * min(max(distance / 0.01, -3), 3) * learned
