"""experiments/pictures.py: the pictures show what the model does, and nothing else."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import flops
import ltmp
from experiments import pictures
from extras import batching, models, splits
from extras.fashion_mnist import FashionMNIST

THRESHOLDS = {
    "method": "ltmp",
    "merge_thresholds": [0.98] * 6,
    "prune_thresholds": [0.005 + 0.0001 * i for i in range(6)],
}


def record(monkeypatch, name):
    """The list that the arguments of each call of a function in pictures.py go to from now on."""
    calls = []
    original = getattr(pictures, name)

    def spy(*args, **named):
        calls.append(args)
        return original(*args, **named)

    monkeypatch.setattr(pictures, name, spy)
    return calls


def main(*flags):
    pictures.main([str(flag) for flag in flags])


def demo_model(method="ltmp"):
    return models.build_model("demo", method, models.read_weights("demo", None)).eval()


def texts_of(calls):
    """What was written on the sheets, from calls of write: (text, colour) each."""
    return [(call[3], call[5] if len(call) > 5 else pictures.INK) for call in calls]


def write_thresholds(folder, **changes):
    path = folder / "thresholds.json"
    path.write_text(json.dumps(THRESHOLDS | changes))
    return path


# --------------------------------------------------------------------------------------------------
# The trace


@pytest.mark.parametrize("method", ltmp.METHODS)
@pytest.mark.parametrize("grid", [3, 6])
def test_each_token_holds_the_patches_whose_sizes_add_up_to_its_own(method, grid):
    torch.manual_seed(grid)
    P = grid // 3
    config = ltmp.ViTConfig(2 * grid, 2, dim=24, depth=4, heads=3, num_classes=7, prefix_tokens=P)
    model = ltmp.LTMPViT(config, method, r=3 if method in ("tome", "topk") else None).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
        for masker, threshold in (("merge_masker", 0.6), ("prune_masker", 0.8 / config.num_tokens)):
            if hasattr(getattr(block, masker, None), "threshold"):
                torch.nn.init.constant_(getattr(block, masker).threshold, threshold)
    images = torch.randn(4, 3, config.image_size, config.image_size)
    # Patches of different sizes: the sum says which of them are in a token.
    start = 0.5 + torch.rand(4, config.num_tokens)
    embed = model.embed
    model.embed = lambda *args: replace(embed(*args), size=start.flatten())

    logits, kept, held_by = pictures.held_by(model, images)
    blocks = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, tokens: blocks.append(tokens))
    with torch.inference_mode():
        dropping_logits, dropping_kept = model(images)
    torch.testing.assert_close(logits, dropping_logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(kept, dropping_kept)
    assert held_by.shape == (4, 4, config.num_tokens - P)
    for depth, tokens in enumerate(blocks):
        for i, positions in enumerate(held_by[depth]):
            size = tokens.size[tokens.rows[i, tokens.live[i]]]
            found = torch.zeros_like(size)
            found[:P] = start[i, :P]
            found.index_add_(0, positions[positions >= 0], start[i, P:][positions >= 0])
            torch.testing.assert_close(found, size, rtol=1e-5, atol=0)
    # The case says something: what the method does has happened.
    steps = ltmp.METHODS[method]
    assert (held_by[-1] < 0).any() == ("prune" in steps)
    assert (kept[-1] < (held_by[-1] >= 0).sum(1) + P).any() == ("merge" in steps)


def test_a_trace_leaves_no_hooks():
    model = ltmp.LTMPViT(ltmp.ViTConfig(4, 2, 8, 1, 1, 3)).eval()
    pictures.held_by(model, torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError):
        pictures.held_by(model, torch.randn(1, 3, 6, 6))
    assert not model.blocks[0]._forward_hooks


# --------------------------------------------------------------------------------------------------
# The map of tokens


def is_outline(part):
    return (part[..., None, :] == pictures.OUTLINES).all(-1).any(-1)


def assert_shows(picture, pixels, holders, cell):
    """The picture shows the map holders (G, G); in pixels (S, S, 3) no outline colour occurs."""
    G, thick = len(holders), 2 if cell >= 10 else 1
    patch = len(pixels) // G
    inner = slice(thick, cell - thick)
    patches = pixels.reshape(G, patch, G, patch, 3).swapaxes(1, 2)  # (G, G, patch, patch, 3)
    cells = picture.reshape(G, cell, G, cell, 3).swapaxes(1, 2)
    plain = pictures.scaled(pixels, G * cell).reshape(G, cell, G, cell, 3).swapaxes(1, 2)
    around = np.pad(holders, 1, constant_values=-1)
    outlines = {}
    for row, column in np.ndindex(G, G):
        token, drawn = holders[row, column], cells[row, column]
        merged = token >= 0 and (holders == token).sum() > 1
        expected = plain[row, column]
        if token < 0:
            expected = np.broadcast_to(pictures.DROPPED, drawn.shape)
        elif merged:
            mean = patches[holders == token].mean((0, 1, 2)).round()
            expected = np.broadcast_to(mean, drawn.shape)
        # Sums in another order may round to another side.
        assert np.abs(drawn[inner, inner] - expected[inner, inner].astype(float)).max() <= 1
        edges = (
            (-1, 0, drawn[:thick, inner]),
            (1, 0, drawn[-thick:, inner]),
            (0, -1, drawn[inner, :thick]),
            (0, 1, drawn[inner, -thick:]),
        )
        for y, x, edge in edges:
            outlined = merged and around[row + 1 + y, column + 1 + x] != token
            assert is_outline(edge).all() if outlined else not is_outline(edge).any()
        if merged and is_outline(drawn).any():
            colours = outlines.setdefault(token, set())
            colours.update(map(tuple, drawn[is_outline(drawn)]))
        # The thin grid is the first row and column of a cell.
        grid = (
            (-1, 0, drawn[0, inner], expected[0, inner]),
            (0, -1, drawn[inner, 0], expected[inner, 0]),
        )
        for y, x, edge, clean in grid if not merged else ():
            beside = around[row + 1 + y, column + 1 + x] != token
            assert (edge != clean).any(-1).all() if beside else (edge == clean).all()
    # A token has one colour wherever its patches lie.
    assert all(len(colours) == 1 for colours in outlines.values())


@pytest.mark.parametrize("tokens", [1, 3, 12, 40])
@pytest.mark.parametrize("cell", [7, 12])
def test_a_picture_shows_the_map_of_tokens(cell, tokens):
    rng = np.random.default_rng(tokens)
    pixels = rng.integers(1, 200, (24, 24, 3)).astype(np.uint8)
    holders = rng.integers(-1, tokens, (6, 6))
    assert_shows(pictures.token_picture(pixels, holders, cell), pixels, holders, cell)


def test_a_picture_shows_a_token_around_a_hole():
    pixels = np.full((24, 24, 3), 100, np.uint8)
    ring = np.zeros((6, 6), int)
    ring[2:4, 2:4] = -1
    assert_shows(pictures.token_picture(pixels, ring, 12), pixels, ring, 12)


def test_long_text_is_cut_to_its_width():
    sheet = Image.new("RGB", (300, 40), pictures.PAPER)
    pictures.write(ImageDraw.Draw(sheet), 0, 0, "a very long name " * 20, width=100)
    ink = np.array(sheet).min((0, 2)) < 128
    assert ink[60:100].any() and not ink[100:].any()


# --------------------------------------------------------------------------------------------------
# One image


@pytest.fixture
def shirt(tmp_path):
    splits.open_split(None, "val")[0][0].save(tmp_path / "shirt.png")
    return tmp_path / "shirt.png"


def test_a_strip_shows_every_block(shirt, tmp_path, monkeypatch, capsys):
    strips, panels = record(monkeypatch, "strip"), record(monkeypatch, "panel")
    main(shirt, "--out", tmp_path / "new" / "out")
    written = tmp_path / "new" / "out" / "shirt_tokens.png"
    assert capsys.readouterr().out.strip() == str(written)
    [(pixels, holders, kept, _, _)] = strips
    assert np.array_equal(pixels, np.array(Image.open(shirt)))
    sheet = np.array(Image.open(written))
    blocks = [panel[1:] for panel in panels if panel[4:] and panel[4].startswith("block ")]
    assert len(blocks) == len(holders) == 6
    for i, (x, y, picture, left, right) in enumerate(blocks):
        state = holders[i].reshape(14, 14)
        assert np.array_equal(picture, pictures.token_picture(pixels, state, 14))
        assert np.array_equal(sheet[y : y + 196, x : x + 196], picture)
        tokens = len(set(state[state >= 0])) + 1
        assert (left, right, kept[i]) == (f"block {i + 1}", f"{tokens} tokens", tokens)


def test_a_strip_says_what_inference_finds(shirt, tmp_path, monkeypatch):
    strips, thresholds = record(monkeypatch, "strip"), write_thresholds(tmp_path)
    main(shirt, "--out", tmp_path, "--thresholds", thresholds)
    [(_, _, kept, (heading, note, saved, *guesses), _)] = strips
    model = ltmp.load_thresholds(demo_model(), thresholds)
    batch = models.clean_transform(model.config)(Image.open(shirt).convert("RGB"))[None]
    with torch.inference_mode():
        logits, counts = model(batch)
        dense_logits, _ = demo_model("dense")(batch)
    assert kept == counts[:, 0].tolist()
    assert (heading, note) == ("shirt.png", "demo, ltmp")
    assert saved.startswith(f"r = {flops.flops_ratio(counts.double(), model.config):.3f}: ")
    for which, line, output in zip(
        ("dense", "reduced"), guesses, (dense_logits, logits), strict=True
    ):
        probability, index = output[0].softmax(0).max(0)
        assert line == f"{which}: {FashionMNIST.classes[index]}, {100 * probability:.1f} %"


def test_images_with_the_same_name_are_both_drawn(tmp_path, monkeypatch, capsys):
    strips = record(monkeypatch, "strip")
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.jpg"]
    for path, mode, size in zip(paths, ("RGBA", "CMYK"), ((31, 47), (50, 30)), strict=True):
        path.parent.mkdir()
        Image.linear_gradient("L").convert("RGB").resize(size).convert(mode).save(path)
    main(*paths, "--out", tmp_path)
    written = capsys.readouterr().out.split()
    assert len(set(written)) == 2
    assert all(Image.open(path).format == "PNG" for path in written)
    for path, (pixels, *_) in zip(paths, strips, strict=True):
        seen = data.open_image(path, models.clean_transform(ltmp.VARIANTS["demo"]))
        assert np.array_equal(pixels, (seen * 0.353 + 0.286).mul(255).round().permute(1, 2, 0))


def test_a_model_without_head_has_a_strip_without_classes(shirt, tmp_path, monkeypatch):
    config = ltmp.ViTConfig(28, 7, 16, 2, 2, num_classes=0)
    monkeypatch.setitem(ltmp.VARIANTS, "headless", config)
    strips = record(monkeypatch, "strip")
    headless = ["--model", "headless", "--weights", "none", "--method", "tome", "--r", "2"]
    main(shirt, "--out", tmp_path, *headless)
    [(_, holders, kept, lines, _)] = strips
    assert holders.shape == (2, 16) and kept == [15, 13] and len(lines) == 3


def make_folder(root, classes, images=2):
    """An image folder of Fashion-MNIST with train/ and val/; returns its images of val."""
    samples = splits.open_split(None, "val")
    paths = []
    for i in range(len(classes) * images):
        for split in ("train", "val"):
            path = root / split / classes[i // images] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            samples[i][0].save(path)
        paths.append(path)
    return paths


def test_data_names_the_classes_that_it_has(shirt, tmp_path, monkeypatch):
    make_folder(tmp_path / "images", [f"{i} clothes" for i in range(5)], 1)
    strips = record(monkeypatch, "strip")
    shoe = tmp_path / "shoe.png"
    samples = splits.open_split(None, "val")
    next(samples[i][0] for i in range(99) if samples[i][1] == 9).save(shoe)
    top = next(samples[i][0] for i in range(99) if samples[i][1] == 1)
    top.save(shirt)
    main(shirt, shoe, "--out", tmp_path, "--model", "demo", "--data", tmp_path / "images")
    assert [strip[3][3].split(",")[0] for strip in strips] == ["dense: 1 clothes", "dense: class 9"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere.png"], "cannot read the image "),
        (["shirt.png", "text.txt"], "cannot read the image "),
        (["shirt.png", "--out", "text.txt"], "cannot write "),
        ([], "nothing to draw"),
        (["shirt.png", "--thresholds", "text.txt"], "cannot read thresholds from "),
        (["--gallery", "g.png", "--num-classes", "7"], "the data has 10 classes, the model has 7"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(shirt, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(SystemExit) as stopped:
        main(*flags)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "note: " not in line]
    assert stopped.value.code == 2 and not printed.out
    assert len(lines) == 1 and message in lines[0]


# --------------------------------------------------------------------------------------------------
# A data set


@pytest.fixture(scope="module")
def found():
    """60 images under THRESHOLDS: kept (6, 60), logits, dense logits, labels, the images."""
    model = ltmp.load_thresholds(demo_model(), THRESHOLDS)
    samples = splits.open_split(None, "val", models.clean_transform(model.config))
    images, labels = zip(*batching.subset(samples, 60), strict=True)
    batch = torch.stack(images)
    with torch.inference_mode():
        logits, kept = model(batch)
        dense_logits, _ = demo_model("dense")(batch)
    return kept.double(), logits, dense_logits, labels, images


def test_the_gallery_shows_the_extremes_and_what_changed(tmp_path, monkeypatch, capsys, found):
    writes, panels = record(monkeypatch, "write"), record(monkeypatch, "panel")
    target = tmp_path / "new" / "gallery.png"
    flags = ["--limit-val", 60, "-b", 7, "--gallery", target]
    main("--thresholds", write_thresholds(tmp_path), *flags)
    assert capsys.readouterr().out.strip() == str(target)
    assert Image.open(target).format == "PNG"

    kept, logits, dense_logits, labels, images = found
    config = ltmp.VARIANTS["demo"]
    r = flops.model_flops(config, kept) / flops.model_flops(config)
    order = sorted(range(60), key=lambda i: r[i])
    outputs = {"dense": dense_logits, "reduced": logits}
    guesses = {which: output.argmax(1).tolist() for which, output in outputs.items()}
    changed = [i for i in range(60) if guesses["dense"][i] != guesses["reduced"][i]]
    changed.sort(key=lambda i: -dense_logits[i].softmax(0).max())
    assert 0 < len(changed) < 60
    chosen = order[:4] + order[:-5:-1] + changed[:8]
    model = ltmp.load_thresholds(demo_model(), THRESHOLDS)
    holders = pictures.held_by(model, torch.stack(images))[2][-1]  # (60, 196)
    assert len(panels) == 2 * len(chosen)
    for i, (left, right) in zip(chosen, zip(panels[0::2], panels[1::2], strict=True), strict=True):
        pixels, cell = pictures.pixels_of(images[i], config), len(left[3]) // 14
        assert np.array_equal(left[3], pictures.scaled(pixels, 14 * cell))
        tokens = pictures.token_picture(pixels, holders[i].reshape(14, 14).numpy(), cell)
        assert np.array_equal(right[3], tokens)
    expected = []
    for i in chosen:
        expected.append((f"r = {r[i]:.3f}, {kept[-1, i]:.0f} tokens", pictures.INK))
        for which, output in outputs.items():
            guess = guesses[which][i]
            text = (
                f"{which}: {FashionMNIST.classes[guess]}, {100 * output[i].softmax(0).max():.0f} %"
            )
            expected.append((text, pictures.GREEN if guess == labels[i] else pictures.RED))
    texts = texts_of(writes)
    assert [text for text in texts if re.match("r = |dense: |reduced: ", text[0])] == expected
    right = [sum(guess[i] == labels[i] for i in changed) for guess in guesses.values()]
    heading = f"{len(changed)} of 60 images ({right[0]} right before, {right[1]} after)"
    assert any(heading in text for text, _ in texts)


def test_the_chart_shows_thresholds_and_kept_tokens(tmp_path, monkeypatch, found):
    plots = record(monkeypatch, "plot")
    flags = ["--limit-val", 60, "--chart", tmp_path / "chart.png"]
    main("--thresholds", write_thresholds(tmp_path), *flags)
    merge, prune, tokens = (plot[2:] for plot in plots)
    assert merge[0] == "merge threshold" and merge[2] == pytest.approx([0.98] * 6)
    assert prune[0] == "prune threshold"
    assert prune[2] == pytest.approx(THRESHOLDS["prune_thresholds"])
    assert tokens[0] == "tokens kept" and tokens[2] == pytest.approx(found[0].mean(1).tolist())
    assert np.allclose(tokens[3], np.percentile(found[0].numpy(), [5, 95], axis=1))


@pytest.mark.parametrize(
    "method, titles",
    [("ltp", ["prune threshold", "tokens kept"]), ("tome", ["tokens kept"])],
)
def test_the_chart_has_the_thresholds_of_its_method(monkeypatch, method, titles):
    plots = record(monkeypatch, "plot")
    model = ltmp.create_model("demo", method, r=8 if method == "tome" else None)
    pictures.chart(model, torch.full((6, 5), 150.0), "title")
    assert [plot[2] for plot in plots] == titles


def test_images_that_cannot_be_read_are_left_out(tmp_path, capsys):
    # The first of each of three classes.
    bad = make_folder(tmp_path / "images", [f"class {i}" for i in range(5)])[0:6:2]
    flags = ["--model", "demo", "--data", tmp_path / "images", "--workers", 0, "-b", 1]
    flags += ["--thresholds", write_thresholds(tmp_path), "--gallery", tmp_path / "gallery.png"]
    for path in bad:
        path.write_text("text")
    with pytest.raises(SystemExit):
        main(*flags)
    assert str(bad[0]) in capsys.readouterr().err
    main(*flags, "--skip-bad-images")
    assert "3 images were left out" in capsys.readouterr().err
    skipped = Image.open(tmp_path / "gallery.png").tobytes()
    for path in bad:
        path.unlink()
    main(*flags)
    gone = Image.open(tmp_path / "gallery.png")
    assert "left out" not in capsys.readouterr().err and skipped == gone.tobytes()


def test_a_plot_is_to_scale():
    sheet = Image.new("RGB", (400, 300), pictures.PAPER)
    band = ([0, 0.6, 0], [0.1, 1, 0.4])
    pictures.plot(ImageDraw.Draw(sheet), (50, 50, 350, 250), "", "", [0.0, 1.0, 0.25], band)
    for place in ((100, 250), (200, 50), (300, 200)):
        assert sheet.getpixel(place) == pictures.BLUE
    assert sheet.getpixel((200, 100)) == pictures.SHADE
    assert sheet.getpixel((200, 150)) != pictures.SHADE


@pytest.mark.parametrize(
    "low, high",
    [(0, 1), (0.9913, 0.9985), (0.00094, 0.0033), (0, 197), (0.9, 0.9), (0, 0), (5, 5.1)],
)
def test_ticks_enclose_the_values_in_equal_steps(low, high):
    marks = pictures.ticks(low, high)
    assert marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12
    assert len(marks) <= 7 and np.allclose(np.diff(marks, 2), 0)
