"""Analytic FLOPs of a ViT whose blocks keep fewer and fewer tokens.

FLOPs are multiply-adds of the linear layers, the convolution and the two attention products, as in
the paper (DeiT-S at 224 pixels: 4.6 G). Norms, softmax, GELU and biases are left out, as there, and
so is what finds the scores: the matching takes D n^2 / 4 multiply-adds a block, 0.16 % of DeiT-S.

    python flops.py deit_small_patch16_224                       a table per layer
    python flops.py deit_small_patch16_224 --kept 190 180 ...    with tokens kept after each block

A config here is anything with the fields of ltmp.ViTConfig that count: image_size, patch_size, dim,
depth, num_classes, mlp_ratio, prefix_tokens and head_tokens.
"""

import argparse

import torch


def layer_flops(config, kept=None):
    """Multiply-adds per image of every layer, in order: (name, tokens that go in, multiply-adds).

    kept: tokens after each block, prefix tokens included, each a number or a tensor of any one
    shape (all tokens if None). Attention still sees what the block before kept; the MLP sees what
    this block keeps.
    """
    d, patches = config.dim, (config.image_size // config.patch_size) ** 2
    n = patches + config.prefix_tokens
    kept = [n] * config.depth if kept is None else list(kept)
    if len(kept) != config.depth:
        raise ValueError(f"kept must hold one count per block: {config.depth}, not {len(kept)}")
    layers = [("patch_embed", patches, patches * 3 * config.patch_size**2 * d)]
    for i, m in enumerate(kept):
        # qkv and proj; q k^T and attn v.
        layers.append((f"blocks.{i}.attn", n, 4 * n * d * d + 2 * n * n * d))
        layers.append((f"blocks.{i}.mlp", m, 2 * m * d * int(d * config.mlp_ratio)))
        n = m
    read = config.head_tokens
    return layers + [("head", read, read * d * config.num_classes)]


def model_flops(config, kept=None):
    """Multiply-adds per image. kept: None (all), (depth,) or (depth, B) -> a number or (B,)."""
    return sum(flops for _, _, flops in layer_flops(config, kept))


def flops_ratio(kept, config):
    """r, the model's FLOPs as a share of the dense model's: (depth, B) -> scalar, differentiable.

    Counted per image, then averaged: the true mean FLOPs of the batch. The paper puts the batch's
    mean token counts into its formula. Attention is quadratic in them, so the paper's number is a
    little smaller where images keep different counts.
    """
    return (model_flops(config, torch.as_tensor(kept)) / model_flops(config)).mean()


def main():
    """The command line: a table of one model."""
    from ltmp import VARIANTS

    parser = argparse.ArgumentParser(description="FLOPs (multiply-adds) per image, layer by layer.")
    parser.add_argument("model", choices=VARIANTS, metavar="MODEL", help=", ".join(VARIANTS))
    what = "tokens kept after each block, prefix tokens included (default: all)"
    parser.add_argument("--kept", nargs="+", type=float, metavar="N", help=what)
    args = parser.parse_args()
    config, kept = VARIANTS[args.model], args.kept
    possible = all(config.prefix_tokens <= n <= config.num_tokens for n in kept or ())
    if kept is not None and not (len(kept) == config.depth and possible):
        counts = f"{config.prefix_tokens} to {config.num_tokens} tokens"
        allowed = f"{counts} in each of {config.depth} blocks"
        parser.error(f"{args.model} keeps {allowed}; got {' '.join(f'{n:g}' for n in kept)}")
    total, dense = model_flops(config, kept), model_flops(config)
    print(f"{'layer':<16}{'tokens':>8}{'MFLOPs':>10}{'share':>8}")
    for name, tokens, flops in layer_flops(config, kept):
        print(f"{name:<16}{tokens:>8g}{flops / 1e6:>10.1f}{100 * flops / total:>7.1f}%")
    summary = f"{total / 1e9:.3g} GFLOPs per image, r = {total / dense:.3f}"
    print(f"{'total':<24}{total / 1e6:>10.1f}   {summary}")


if __name__ == "__main__":
    main()
