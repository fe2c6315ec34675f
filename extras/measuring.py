"""How good a model is: accuracy, r, kept tokens, and how far it is from its dense twin."""

from functools import partial

import torch
import torch.nn.functional as F

from flops import flops_ratio, model_flops

from . import batching, models, runtime


@torch.inference_mode()
def measure(model, dataset, args, device, dense=None):
    """Run inference, tokens really dropped, over (image, label) items, beside the dense twin.

    dense: gives the twin's logits for (batch number, images); by default the twin is run. Under
    torchrun each process takes its share. Says how fast both are. Returns a dict, and what is wrong
    with images left out. In the dict: top1, top5, dense_top1, dense_top5 in percent; flops_ratio, r
    per image, averaged; gflops and dense_gflops, multiply-adds per image / 1e9; kl, how far
    predictions are from the dense ones, in nats; kept, mean tokens after each block; images.
    """
    model.eval()
    both = dense is None and model.method != "dense"
    if dense is None:
        twin = models.with_method(model, "dense").eval() if both else model

        def dense(_, images):
            return twin(images)[0]

    own = runtime.own_share(dataset)
    loader = batching.make_loader(own, args, device, batch_size=args.batch_size)
    # Images; top-1 and top-5 hits; those of the twin; seconds of both; r; KL; tokens kept.
    sums = torch.zeros(9 + model.config.depth, dtype=torch.float64)
    progress = runtime.Progress()
    for number, (images, labels) in enumerate(loader):
        if not len(images):
            continue
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with runtime.amp_context(device, args.amp):
            if number == 0 and device.type == "cuda":
                # The first call loads and compiles kernels: not timed.
                model(images), dense(number, images)
            # logits and wanted (B, classes), kept (depth, B)
            (logits, kept), seconds = runtime.timed(partial(model, images), device)
            wanted, dense_seconds = runtime.timed(partial(dense, number, images), device)
        times = [seconds, dense_seconds]
        counts = [len(images), *hits(logits, labels), *hits(wanted, labels), *times]
        # float32 would be too coarse for a KL of 4e-07.
        kept, logits, wanted = kept.cpu().double(), logits.cpu().double(), wanted.cpu().double()
        means = torch.stack([flops_ratio(kept, model.config), kl_divergence(logits, wanted).mean()])
        counts = torch.tensor(counts, dtype=torch.float64)
        sums += torch.cat([counts, means * len(images), kept.sum(1)])
        text = f"{model.method}: {int(sums[0])} images, top-1 {100 * sums[1] / sums[0]:.2f} %"
        progress.show(text, number + 1, len(loader))
    sums = runtime.total(sums)
    images, top1, top5, dense_top1, dense_top5 = sums[:5].tolist()
    seconds, dense_seconds, ratio, kl = sums[5:9].tolist()
    if not images:
        runtime.stop("none of the images could be read")
    if both:
        speeds = f"{images / dense_seconds:.3g} dense, {images / seconds:.3g} {model.method}"
        runtime.say(f"images per second and process, their loading not counted: {speeds}")
    gflops = model_flops(model.config) / 1e9
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "dense_top1": 100 * dense_top1 / images,
        "dense_top5": 100 * dense_top5 / images,
        "flops_ratio": ratio / images,
        "gflops": ratio / images * gflops,
        "dense_gflops": gflops,
        "kl": kl / images,
        "kept": (sums[9:] / images).tolist(),
        "images": int(images),
    }, runtime.gathered(loader.bad.values())


def hits(logits, labels):
    """How many labels are the best, and among the five best, of logits (B, classes)."""
    best = logits.float().topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
    return best[:, 0].sum().item(), best.sum().item()


def kl_divergence(logits, wanted):
    """How far predictions are from wanted ones: sum_c p_c log(p_c / q_c) in nats, (B,).

    p and q are the softmax of wanted and of logits (B, classes).
    """
    logits, wanted = logits.log_softmax(1), wanted.log_softmax(1)
    return F.kl_div(logits, wanted, reduction="none", log_target=True).sum(1)


def root(kl):
    """Of KLs (n,), flat near 0, where noise is. The mean KL itself would depend on a few images."""
    return (kl.clamp(min=0) + 1e-6).sqrt()


@torch.no_grad()
def predict(model, images):
    """Logits (n, classes), float64 on the CPU, of images (n, 3, S, S), without autocast."""
    with torch.autocast(images.device.type, enabled=False):
        return torch.cat([model.eval()(batch)[0].cpu().double() for batch in images.split(64)])


def report(metrics):
    """metrics as lines of text."""
    target = f" (target {metrics['target']:g})" if "target" in metrics else ""
    lines = [f"{metrics['model']}, {metrics['method']}, {metrics['images']} validation images"]
    for name, key in (("dense", "dense_"), ("reduced", "")):
        top1, top5, gflops = (metrics[key + what] for what in ("top1", "top5", "gflops"))
        accuracy = f"top-1 {top1:6.2f} %   top-5 {top5:6.2f} %"
        lines.append(f"  {name:8} {accuracy}   {gflops:.3g} GFLOPs per image")
    r, change = metrics["flops_ratio"], metrics["top1"] - metrics["dense_top1"]
    saved = f"{100 - 100 * r:.1f} % fewer FLOPs"
    lines.append(f"  r = {r:.3f}{target}: {saved}, top-1 changes by {change:+.2f} points")
    lines.append(f"  predictions differ from the dense ones by a KL of {metrics['kl']:.2g} nats")
    lines.append(f"  tokens after each block: {' '.join(f'{n:.0f}' for n in metrics['kept'])}")
    return "\n".join(lines)
