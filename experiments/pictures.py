"""Draw which patches merge and which are dropped: of single images, and of a whole data set.

    python -m experiments.pictures photo.jpg --out out      its patches, block by block
    python -m experiments.pictures --chart chart.png        thresholds and kept tokens per block
    python -m experiments.pictures --gallery gallery.png    the images that keep fewest, most tokens

The flags that name a model are those of evaluate.py; without them it is the demo.
"""

import io
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

import data
import flops
from extras import batching, models, runtime
from extras.fashion_mnist import FashionMNIST

INK, FADED, LINE, PAPER = (30, 30, 30), (110, 110, 110), (200, 200, 200), (255, 255, 255)
GREEN, RED, BLUE, SHADE = (0, 120, 40), (200, 20, 20), (0, 90, 180), (200, 225, 245)
DROPPED = (205, 215, 235)
OUTLINES = "#00c8ff #ff0096 #ffe100 #5ae100 #ff7800 #aa6eff #ff3c3c #00e1aa"
OUTLINES = np.array([ImageColor.getrgb(colour) for colour in OUTLINES.split()], np.uint8)
# In pixels: a sheet, what lies between two panels, and the room for one of four side by side.
WIDTH, GAP, COLUMNS = 850, 10, 4
ROOM = (WIDTH - (COLUMNS + 1) * GAP) // COLUMNS


# --------------------------------------------------------------------------------------------------
# The trace: which token holds each patch


@torch.inference_mode()
def held_by(model, images):
    """Follow every patch through the blocks, in one masked run.

    images (B, 3, S, S) normalized -> logits (B, num_classes), kept (depth, B) and
    held_by (depth, B, patches): the position, after each block, of the token that holds the patch,
    counted among the live tokens of its image; -1 where that token was pruned.
    """
    blocks = []
    hooks = [
        block.register_forward_hook(lambda block, inputs, tokens: blocks.append(tokens))
        for block in model.blocks
    ]
    try:
        # Here a token keeps its row of x in all blocks.
        logits, kept = model(images, drop=False)
    finally:
        for hook in hooks:
            hook.remove()

    own_row = torch.arange(blocks[0].rows.numel(), device=images.device)  # (T,)
    holder = own_row
    positions = []
    for tokens in blocks:
        if tokens.merges is not None:
            rows_a, partner, merged = tokens.merges
            goes_to = own_row.clone()
            goes_to[rows_a[merged]] = partner[merged]
            holder = goes_to[holder]  # (T,)
        position = torch.full_like(own_row, -1)
        position[tokens.rows[tokens.live]] = (tokens.live.cumsum(1) - 1)[tokens.live]
        # Prefix tokens are no patches.
        patches = position[holder].view_as(tokens.rows)[:, tokens.prefix_tokens :]
        positions.append(patches)
    return logits, kept, torch.stack(positions)


# --------------------------------------------------------------------------------------------------
# Drawing


def pixels_of(image, config):
    """What the model sees, as pixels: (3, S, S) normalized -> (S, S, 3) uint8."""
    image = image.permute(1, 2, 0).cpu() * torch.tensor(config.std) + torch.tensor(config.mean)
    return image.mul(255).round().clamp(0, 255).byte().numpy()


def scaled(pixels, side):
    """pixels (S, S, 3) uint8 -> (side, side, 3): repeated where it grows, averaged otherwise."""
    grows = side >= len(pixels)
    how = Image.Resampling.NEAREST if grows else Image.Resampling.BOX
    return np.array(Image.fromarray(pixels).resize((side, side), how))


def enlarged(values, cell):
    """values (G, G) -> (G cell, G cell)."""
    return values.repeat(cell, 0).repeat(cell, 1)


def differs(token, y, x):
    """Where the pixel y below and x to the right is of another token; outside counts as dropped.

    token (H, W), -1 where dropped; y, x from -2 to 2 -> (H, W) bool.
    """
    H, W = token.shape
    around = np.pad(token, 2, constant_values=-1)
    return around[2 + y : 2 + y + H, 2 + x : 2 + x + W] != token


def token_picture(pixels, holders, cell):
    """Draw the tokens of one image after a block, each patch as a square of `cell` pixels.

    A token of one patch shows its pixels. The patches of a merged token have their mean colour and,
    beside a patch of another token, an outline; each token has one outline colour.

    pixels (S, S, 3) uint8, holders (G, G): the token that holds each patch, -1 where dropped
    -> (G cell, G cell, 3) uint8.
    """
    G = len(holders)
    patch = len(pixels) // G
    patches = pixels.reshape(G, patch, G, patch, 3).mean((1, 3))  # (G, G, 3)

    # Number the tokens. Of each: its first patch, how many it has, their mean colour.
    _, first, number, count = np.unique(
        holders, return_index=True, return_inverse=True, return_counts=True
    )
    number = number.reshape(G, G)
    mean = np.zeros((len(count), 3))
    np.add.at(mean, number, patches)
    mean = (mean / count[:, None]).round()
    # Tokens that start close to each other seldom share an outline colour.
    colour = OUTLINES[(first % G + 3 * (first // G)) % len(OUTLINES)]  # (tokens, 3)

    token = enlarged(np.where(holders < 0, -1, number), cell)  # (G cell, G cell)
    merged = enlarged((count[number] > 1) & (holders >= 0), cell)
    picture = scaled(pixels, G * cell)
    picture[merged] = mean[token[merged]]
    picture[token < 0] = DROPPED

    # A thin grid between tokens: lighter on dark patches, darker on light ones.
    grid = differs(token, -1, 0) | differs(token, 0, -1)
    dark = enlarged((patches.mean(2) < 128) & (holders >= 0), cell)
    picture[grid] = 0.65 * picture[grid] + 90 * dark[grid][:, None]
    thick = 2 if cell >= 10 else 1
    steps = range(-thick, thick + 1)
    outline = merged & np.any([differs(token, y, x) for y in steps for x in steps], 0)
    picture[outline] = colour[token[outline]]
    return picture


def write(draw, x, y, text, size=13, fill=INK, width=math.inf, anchor="la"):
    """Write text, cut where it would be wider than `width` pixels; anchor: Pillow's, of (x, y)."""
    font = ImageFont.load_default(size)
    while draw.textlength(text, font) > width:
        text = text.removesuffix("...")[:-1] + "..."
    draw.text((x, y), text, fill, font, anchor)


def panel(sheet, x, y, array, left="", right=""):
    """Put a picture (H, W, 3) on the sheet in a thin frame, with captions above its corners."""
    draw = ImageDraw.Draw(sheet)
    height, width = array.shape[:2]
    sheet.paste(Image.fromarray(array), (x, y))
    draw.rectangle((x - 1, y - 1, x + width, y + height), outline=LINE)
    write(draw, x, y - 5, left, anchor="ls")
    write(draw, x + width, y - 5, right, anchor="rs")


def class_name(classes, index):
    """The name of a class, its number where there is no name."""
    return classes[index] if index < len(classes) else f"class {index}"


def save(sheet, path):
    """Write a PIL image as PNG, and say where."""
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    runtime.write_file(path, content.getvalue())
    runtime.say(path, sys.stdout)


# --------------------------------------------------------------------------------------------------
# One image, block by block


LEGEND = {
    "patches, each still a token of its own": [[0, 1], [2, 3]],
    "patches of one token: their mean colour, outlined": [[0, 0], [0, 0]],
    "dropped patches": [[-1, -1], [-1, -1]],
}


def strip(pixels, holders, kept, lines, num_tokens):
    """One image on its way through the blocks, as a PIL image.

    pixels (S, S, 3) uint8, holders (depth, patches), kept: tokens after each block, lines: what to
    write beside the image; the first is the heading, the second is grey.
    """
    depth, patches = holders.shape
    G = math.isqrt(patches)
    cell = max(6, ROOM // G)
    side = G * cell
    step = max(side + 2, ROOM) + GAP
    top = GAP + 20
    rise = side + GAP + 24
    height = top + rise * (1 + math.ceil(depth / COLUMNS)) - 20
    sheet = Image.new("RGB", (COLUMNS * step + GAP, height), PAPER)
    panel(sheet, GAP, top, scaled(pixels, side), "input, as the model sees it")
    start = token_picture(pixels, np.arange(patches).reshape(G, G), cell)
    panel(sheet, GAP + step, top, start, f"{patches} patches", f"{num_tokens} tokens")
    for i in range(depth):
        x = GAP + i % COLUMNS * step
        y = top + rise * (1 + i // COLUMNS)
        picture = token_picture(pixels, holders[i].reshape(G, G), cell)
        panel(sheet, x, y, picture, f"block {i + 1}", f"{kept[i]:.0f} tokens")

    draw = ImageDraw.Draw(sheet)
    x = GAP + 2 * step
    width = 2 * step - GAP
    last = f"{kept[-1]:.0f} of {num_tokens} tokens are left, the class token among them"
    write(draw, x, top - 5, lines[0], 17, INK, width)
    for i, line in enumerate([*lines[1:], last], 1):
        write(draw, x, top - 1 + 20 * i, line, 14, FADED if i == 1 else INK, width)

    # The legend shows two by two patches from the middle of the image.
    patch = len(pixels) // G
    middle = slice((G // 2 - 1) * patch, (G // 2 + 1) * patch)
    for i, (text, sample) in enumerate(LEGEND.items()):
        y = top + side - 68 + 24 * i
        panel(sheet, x + 1, y, token_picture(pixels[middle, middle], np.array(sample), 10))
        write(draw, x + 30, y + 10, text, 14, INK, width - 30, "lm")
    return sheet


def draw_strips(model, name, images, paths, classes, out):
    """Write NAME_tokens.png to the folder `out` for each image (3, S, S), as its path is named."""
    config = model.config
    dense = models.with_method(model, "dense").eval()
    written = []
    for path, image in zip(paths, images, strict=True):
        batch = image[None].to(model.cls_token.device)
        logits, kept, holders = held_by(model, batch)  # (1, classes), (depth, 1), (depth, 1, P)
        dense_logits, _ = dense(batch)
        r = flops.flops_ratio(kept.cpu().double(), config).item()
        saved = f"r = {r:.3f}: {100 - 100 * r:.1f} % fewer FLOPs than dense"
        lines = [Path(path).name, f"{name}, {model.method}", saved]
        outputs = {"dense": dense_logits, "reduced": logits} if config.num_classes else {}
        for which, output in outputs.items():
            probability, guess = output[0].float().softmax(0).max(0)
            lines.append(f"{which}: {class_name(classes, guess)}, {100 * probability:.1f} %")
        target = out / f"{Path(path).stem}_tokens.png"
        if target in written:
            # An image of another folder has the same name.
            target = target.with_stem(f"{target.stem}_{len(written) + 1}")
        written.append(target)
        holders = holders[:, 0].cpu().numpy()
        pixels, counts = pixels_of(image, config), kept[:, 0].tolist()
        save(strip(pixels, holders, counts, lines, config.num_tokens), target)


# --------------------------------------------------------------------------------------------------
# A whole data set: its gallery


def predict(model, loader, text):
    """What inference finds for the images that can be read; text names the progress line.

    -> kept (depth, images), and (images,) each: the class guessed, its probability, the label.
    """
    progress = runtime.Progress()
    found = []
    for step, (images, labels) in enumerate(loader, 1):
        if len(images):
            logits, kept = model(images.to(model.cls_token.device))  # (B, classes), (depth, B)
            probability, guess = logits.float().softmax(1).max(1)
            found.append((kept.cpu().double(), guess.cpu(), probability.cpu(), labels))
        progress.show(f"{text}: {step} of {len(loader)} batches", step, len(loader))
    if not found:
        runtime.stop("no image could be read")
    return [torch.cat(part, -1) for part in zip(*found, strict=True)]


def gallery(model, dataset, classes, dense, reduced, title):
    """The images that keep fewest and most tokens, and those whose prediction changes: a PIL image.

    classes: the names that are known; dense, reduced: what predict found for the dataset.
    """
    config = model.config
    kept, guess, _, labels = reduced
    _, dense_guess, dense_probability, _ = dense
    r = flops.model_flops(config, kept) / flops.model_flops(config)  # (images,)
    order = r.argsort(stable=True).tolist()
    changed = (guess != dense_guess).nonzero()[:, 0]
    right, now_right = ((g == labels)[changed].sum() for g in (dense_guess, guess))
    surest = changed[dense_probability[changed].argsort(descending=True, stable=True)].tolist()
    change = f"{len(changed)} of {len(r)} images ({right} right before, {now_right} after)"
    sections = {
        "Fewest tokens kept": order[:4],
        "Most tokens kept": order[:-5:-1],
        f"Prediction changed: {change}, the surest first": surest[:8],
    }

    G = config.image_size // config.patch_size
    cell = max(4, 98 // G)
    side = G * cell
    step = max(2 * side + 4, ROOM) + GAP
    rise = side + 80
    rows = sum(math.ceil(len(chosen) / COLUMNS) for chosen in sections.values())
    height = 42 + 26 * len(sections) + rise * rows
    sheet = Image.new("RGB", (COLUMNS * step + GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    note = (
        f"Each image, and its tokens after block {config.depth}. r: FLOPs as a share of dense, "
        f"{r.mean():.3f} on average. Predictions: green is right, red is wrong."
    )
    write(draw, GAP, 10, title, 17)
    write(draw, GAP, 36, note, 13, FADED)
    top = 62
    for heading, chosen in sections.items():
        write(draw, GAP, top, heading, 15)
        top += 26
        for place, i in enumerate(chosen):
            x = GAP + place % COLUMNS * step
            y = top + place // COLUMNS * rise
            image, _ = dataset[i]
            pixels = pixels_of(image, config)
            _, _, holders = held_by(model, image[None].to(model.cls_token.device))
            holders = holders[-1, 0].reshape(G, G).cpu().numpy()
            panel(sheet, x, y, scaled(pixels, side))
            panel(sheet, x + side + 4, y, token_picture(pixels, holders, cell))
            y += side + 6
            write(draw, x, y, f"r = {r[i]:.3f}, {kept[-1, i]:.0f} tokens")
            for which, (_, guess, sure, _) in {"dense": dense, "reduced": reduced}.items():
                y += 18
                text = f"{which}: {class_name(classes, guess[i])}, {100 * sure[i]:.0f} %"
                write(draw, x, y, text, 13, GREEN if guess[i] == labels[i] else RED, step - GAP)
        top += rise * math.ceil(len(chosen) / COLUMNS)
    return sheet


# --------------------------------------------------------------------------------------------------
# A whole data set: its chart


def ticks(low, high):
    """Round numbers from low or below to high or above, at most six steps."""
    span = high - low or abs(high) or 1
    step = 10 ** math.floor(math.log10(span / 2))
    step *= next(factor for factor in (1, 2, 5) if span / (factor * step) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def plot(draw, box, title, note, values, band=None, limits=()):
    """Draw one value per block as a line with dots.

    box: left, top, right, bottom in pixels; band: two lists to shade between; limits: numbers that
    the axis must include.
    """
    left, top, right, bottom = box
    shown = [*values, *limits, *(band[0] + band[1] if band else ())]
    marks = ticks(min(shown), max(shown))

    def place(i, value):
        x = left + (right - left) * (i + 0.5) / len(values)
        y = bottom - (bottom - top) * (value - marks[0]) / (marks[-1] - marks[0] or 1)
        return x, y

    write(draw, left, top - 42, title, 15)
    write(draw, left, top - 22, note, 12, FADED)
    for mark in marks:
        _, y = place(0, mark)
        draw.line((left, y, right, y), LINE)
        write(draw, left - 6, y, f"{mark:.6g}", 12, FADED, anchor="rm")
    if band:
        low, high = ([place(*point) for point in enumerate(edge)] for edge in band)
        draw.polygon(low + high[::-1], SHADE)
    points = [place(*point) for point in enumerate(values)]
    draw.line(points, BLUE, 2)
    for i, (x, y) in enumerate(points):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), BLUE)
        if i % math.ceil(len(values) / 12) == 0:
            write(draw, x, bottom + 6, str(i + 1), 12, FADED, anchor="ma")
    write(draw, (left + right) / 2, bottom + 24, "block", 12, FADED, anchor="ma")


THRESHOLD_NOTES = {
    "merge": "more similar than this: merge",
    "prune": "not more important than this: drop",
}


def chart(model, kept, title):
    """The thresholds that the method has and the kept tokens (depth, images): a PIL image."""
    plots = []
    for step, note in THRESHOLD_NOTES.items():
        maskers = [getattr(block, f"{step}_masker", None) for block in model.blocks]
        if hasattr(maskers[0], "threshold"):
            thresholds = [masker.threshold.item() for masker in maskers]
            plots.append((f"{step} threshold", note, thresholds))
    note = "mean; shaded: 5th to 95th percentile"
    band = torch.quantile(kept, kept.new_tensor([0.05, 0.95]), dim=1).tolist()
    plots.append(("tokens kept", note, kept.mean(1).tolist(), band, (0, model.config.num_tokens)))

    sheet = Image.new("RGB", (WIDTH, 320), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, GAP, 10, title, 17)
    width = WIDTH // len(plots)
    for i, parts in enumerate(plots):
        plot(draw, (i * width + 56, 90, (i + 1) * width - GAP, 270), *parts)
    return sheet


def draw_sheets(model, name, dataset, args, device):
    """Write --chart and --gallery, of --limit-val images of the dataset."""
    dataset.transform = models.clean_transform(model.config)
    images = batching.subset(dataset, args.limit_val)
    loader = batching.make_loader(images, args, device, batch_size=args.batch_size)
    reduced = predict(model, loader, "images")
    kept = reduced[0]
    title = f"{name}, {model.method}: {kept.shape[1]} validation images"
    if args.chart:
        save(chart(model, kept, title), args.chart)
    if args.gallery:
        dense = predict(models.with_method(model, "dense").eval(), loader, "images, dense")
        good = [i for i in range(len(images)) if i not in loader.bad]
        images = torch.utils.data.Subset(images, good)
        save(gallery(model, images, dataset.classes, dense, reduced, title), args.gallery)
    runtime.say_skipped(loader.bad.values())


def main(argv=None):
    """The command line."""
    parser = runtime.command_line("Draw which patches merge and which are dropped.")
    models.model_flags(parser)
    models.threshold_flags(parser)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="draw its patches; --data has the class names")
    add("--out", type=Path, default="out", metavar="DIR", help="for NAME_tokens.png (%(default)s)")
    add("--chart", metavar="FILE.png", help="draw thresholds and kept tokens of every block")
    add(
        "--gallery",
        metavar="FILE.png",
        help="draw the validation images that keep fewest and most tokens, and changed predictions",
    )
    args = parser.parse_intermixed_args(argv)
    try:
        if not (args.images or args.chart or args.gallery):
            raise ValueError("nothing to draw: name an IMAGE, --chart or --gallery")
        device = runtime.find_device(args.device)
        needs_data = args.data or args.chart or args.gallery
        dataset = models.open_split(args, "val") if needs_data else None
        model, name = models.chosen_model(args)
        transform = models.clean_transform(model.config)
        images = [data.open_image(path, transform) for path in args.images]
        if args.data:
            models.number_classes(model, dataset)
        if args.gallery:
            models.check_classes(dataset, model)
    except ValueError as error:
        runtime.stop(error)

    classes = dataset.classes if args.data else []
    if name == "demo" and not (args.data or args.weights):
        classes = FashionMNIST.classes
    model.to(device).eval()
    with torch.inference_mode(), runtime.amp_context(device, args.amp):
        draw_strips(model, name, images, args.images, classes, args.out)
        if args.chart or args.gallery:
            draw_sheets(model, name, dataset, args, device)


if __name__ == "__main__":
    runtime.run_main(main)
