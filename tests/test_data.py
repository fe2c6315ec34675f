"""data.py: images are read as torchvision reads them; random draws depend on the seed alone."""

import os
import random
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

import data
import ltmp
from extras import models

ODD_IMAGES = [
    ("RGB", (40, 30)), ("L", (17, 61)), ("P", (33, 33)), ("RGBA", (100, 21)),
    ("CMYK", (16, 16)), ("RGB", (2, 7)), ("1", (50, 49)),
]  # fmt: skip


def odd_image(mode, size):
    """A picture of waves, the same on every machine, in any mode of Pillow."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = [(x * 7 + y * 3) % 256, (x * y) % 256, (x * x + 11 * y) % 256]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 200)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(((x + y) % 256).astype(np.uint8)))
    return image if mode in ("RGB", "RGBA") else image.convert(mode)


def save_images(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / path)
    return root


def names(folder, root):
    """The paths of an ImageFolder's images, under root."""
    return [Path(path).relative_to(root).as_posix() for path, _ in folder.samples]


def refusal(call, *args):
    """The one line with which a call refuses what it gets."""
    with pytest.raises(ValueError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------------
# Image files


def test_images_are_read_as_torchvisions_loader_reads_them(tmp_path):
    """convert("RGB") of the first image, not turned by EXIF; and no warnings."""
    turned, transparent = Image.Exif(), {"transparency": bytes(range(256))}
    turned[274] = 6
    rgb = odd_image("RGB", (40, 30))
    more = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180)]}
    files = [(odd_image(m, (40, 30)), "TIFF", {}) for m in ("1", "L", "LA", "P", "RGBA", "CMYK")]
    files += [(odd_image("P", (40, 30)), "PNG", transparent), (rgb, "JPEG", {"exif": turned})]
    files += [(rgb, "GIF", more), (rgb, "PNG", more), (rgb.crop((0, 0, 1, 1)), "PNG", {})]
    # The content says which format it is, not the name.
    path = tmp_path / "image.png"
    for image, file_format, options in files:
        image.save(path, file_format, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as opened:
                expected = opened.convert("RGB")
            warnings.simplefilter("error")
            found = data.open_image(path)
        assert found.mode == "RGB" and found.size == image.size, (image.mode, file_format)
        assert found.tobytes() == expected.tobytes(), (image.mode, file_format)


@pytest.mark.parametrize(
    "dtype, file_format",
    [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<u2", "PPM"), ("<i4", "TIFF")],
)
def test_16_bit_grey_is_scaled_to_8_bits(tmp_path, dtype, file_format):
    ramp = np.arange(0, 65536, 64).reshape(32, 32)
    Image.fromarray(ramp.astype(dtype)).save(tmp_path / "image", file_format)
    found = np.asarray(data.open_image(tmp_path / "image"))
    assert np.array_equal(found, np.repeat(ramp[..., None] // 256, 3, 2))


def test_8_bit_grey_in_32_bits_stays_as_it_is(tmp_path):
    ramp = np.arange(256, dtype=np.int32).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    found = np.asarray(data.open_image(tmp_path / "a.tif"))
    assert np.array_equal(found, np.repeat(ramp[..., None], 3, 2))


@pytest.mark.parametrize(
    "pixels, named",
    [
        (np.float32([[0.5]]), r"floats \(mode F\): save it with 8 or 16 bits"),
        (np.int32([[70000]]), r"from 70000 to 70000 \(mode I\): save it with 8 or 16 bits"),
        (np.int32([[-1]]), r"from -1 to -1 \(mode I\)"),
    ],
)
def test_pixels_of_unknown_scale_are_refused(tmp_path, pixels, named):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(data.ImageError, match=f"cannot read the image .*a.tif: .*{named}"):
        data.open_image(tmp_path / "a.tif")


def png_chunk(name, content):
    check = zlib.crc32(name + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + name + content + check


def test_images_that_would_fill_the_memory_are_refused(tmp_path):
    header = png_chunk(b"IHDR", 2 * (30000).to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
    content = header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    Image.new("L", (1, 501)).save(tmp_path / "long.png")
    Image.new("L", (500, 1)).save(tmp_path / "wide.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "bomb.png: " in refusal(data.open_image, tmp_path / "bomb.png")
        assert "1 x 501 pixels: crop it" in refusal(data.open_image, tmp_path / "long.png")
        assert data.open_image(tmp_path / "wide.png").size == (500, 1)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_damaged_image_is_named_whatever_the_transform(tmp_path, suffix):
    path = tmp_path / "a" / f"0{suffix}"
    path.parent.mkdir()
    odd_image("RGB", (400, 300)).save(path)
    content = bytearray(path.read_bytes())
    if suffix == ".jpg":
        path.write_bytes(content[:5000])
    else:
        # One bit of a checksum, which decoding alone does not look at.
        content[-5] ^= 1
        path.write_bytes(content)
    folder = data.ImageFolder(tmp_path)
    for transform in (None, data.eval_transform(32), data.train_transform(32)):
        with pytest.raises(data.ImageError, match=f"cannot read the image .*0{suffix}"):
            folder.item(0, transform)


def test_what_is_wrong_with_a_transform_is_not_blamed_on_the_image(tmp_path):
    save_images(tmp_path, "a/0.png")
    with pytest.raises(ZeroDivisionError):
        data.ImageFolder(tmp_path, lambda image: 1 / 0)[0]


# --------------------------------------------------------------------------------------------------
# Transforms


def test_eval_transform_is_torchvisions_to_the_bit():
    """demo/torchvision.npz: Resize, CenterCrop, ToTensor, Normalize of torchvision 0.28, Pillow 13.

    Older ones of Pillow resize an image more than three times as long as wide a little differently:
    by one level of 255.
    """
    exact = int(PIL.__version__.split(".")[0]) >= 13
    recorded = np.load(models.DEMO / "torchvision.npz")
    assert len(recorded.files) == 3 * len(ODD_IMAGES)
    for name in recorded.files:
        mode, size, crop, crop_pct = name.split("/")
        image = odd_image(mode, tuple(map(int, size.split("x"))))
        found = data.eval_transform(int(crop), float(crop_pct))(image).numpy()
        if exact or max(image.size) <= 3 * min(image.size):
            assert np.array_equal(found, recorded[name]), name
        else:
            assert np.abs(found - recorded[name]).max() < 1.01 / 255 / 0.224, name


def test_eval_transform_beside_torchvision():
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision to compare with: {error}")
    rng = np.random.default_rng(0)
    mean, std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
    theirs = transforms.Compose(
        [
            transforms.Resize(248, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    sizes = [("RGB", tuple(rng.integers(1, 700, 2).tolist())) for _ in range(20)]
    for mode, size in ODD_IMAGES + sizes:
        image = odd_image(mode, size)
        found = data.eval_transform(224, 0.9, mean, std)(image)
        assert torch.equal(found, theirs(image.convert("RGB")))


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    mode=st.sampled_from(MODES),
    width=st.integers(1, 80),
    height=st.integers(1, 80),
    size=st.integers(1, 40),
    crop_percent=st.integers(50, 100),
    seed=st.integers(0),
)
def test_transforms_take_any_image(mode, width, height, size, crop_percent, seed):
    image = odd_image(mode, (width, height))
    transform = data.train_transform(size)
    first, again = (transform(image, random.Random(seed)) for _ in range(2))
    assert torch.equal(first, again)
    for out in (first, data.eval_transform(size, crop_percent / 100)(image)):
        assert out.shape == (3, size, size) and out.dtype == torch.float32 and out.isfinite().all()
    box = data.random_crop((width, height), (0.08, 1), random.Random(seed))
    left, top, right, bottom = box
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_crops_have_the_areas_and_aspect_ratios_asked_for():
    rng = random.Random(0)
    left, top, right, bottom = np.array(
        [data.random_crop((60, 40), (0.08, 1.0), rng) for _ in range(2000)]
    ).T
    areas = (right - left) * (bottom - top) / 2400
    aspects = (right - left) / (bottom - top)
    assert 0.07 < areas.min() < 0.1 and areas.max() > 0.8
    assert 0.7 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.45
    assert min(left) == min(top) == 0 and max(right) == 60 and max(bottom) == 40
    assert data.random_crop((28, 28), (1, 1), rng) == (0, 0, 28, 28)


def test_train_transform_is_pillows_but_for_rounding_and_draws_in_a_fixed_order():
    image = odd_image("RGB", (90, 70))
    for seed in range(40):
        rng, same = random.Random(seed), random.Random(seed)
        found = data.train_transform(32, (0,) * 3, (1,) * 3)(image, same)
        resample = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
        box = data.random_crop(image.size, (0.08, 1.0), rng)
        expected = image.resize((32, 32), resample, box=box)
        if rng.random() < 0.5:
            expected = ImageOps.mirror(expected)
        enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        rng.shuffle(enhancers)
        for enhancer in enhancers:
            expected = enhancer(expected).enhance(rng.uniform(0.6, 1.4))
        # Pillow rounds down after each step, and a later step multiplies that by up to 1.4.
        far = found.permute(1, 2, 0) * 255 - torch.from_numpy(np.array(expected))
        assert far.abs().max() < 5
        assert rng.random() == same.random()


def test_without_crop_and_jitter_half_of_the_images_are_mirrored_and_nothing_else():
    image = odd_image("RGB", (8, 8))
    transform = data.train_transform(8, (0,) * 3, (1,) * 3, scale=(1, 1), jitter=0)
    plain = data.to_tensor(image)
    views = [transform(image, random.Random(seed)) for seed in range(200)]
    mirrored = sum(torch.equal(view, plain.flip(2)) for view in views)
    assert 70 < mirrored < 130 and mirrored + sum(torch.equal(v, plain) for v in views) == 200


def test_training_decodes_a_large_jpeg_smaller_and_sees_the_same(tmp_path):
    path = tmp_path / "large.jpg"
    # Sides that 8 does not divide.
    image = odd_image("RGB", (24, 18)).resize((1203, 901), Image.Resampling.BICUBIC)
    image.save(path, quality=95)
    divisors = set()
    for seed in range(24):
        size = (32, 100, 250, 500)[seed % 4]
        with Image.open(path) as image:
            box = data.random_crop(image.size, (0.08, 1.0), random.Random(seed))
            shrunk = data.draft(image, box, size)
        divisor = round(1203 / image.width)
        across = min(box[2] - box[0], box[3] - box[1])
        assert shrunk == tuple(side / divisor for side in box)
        assert divisor == 1 or across / divisor >= size
        assert divisor == 8 or across / (2 * divisor) < size
        divisors.add(divisor)
    assert divisors == {1, 2, 4, 8}

    whole = data.open_image(path)
    assert data.draft(whole, box, 32) == box
    transform = data.train_transform(64, (0,) * 3, (1,) * 3)
    for seed in range(4):
        view = data.open_image(path, lambda image, seed=seed: transform(image, random.Random(seed)))
        far = (view - transform(whole, random.Random(seed))).abs()
        assert 0 < far.max() < 0.05 and far.mean() < 0.005


# --------------------------------------------------------------------------------------------------
# Datasets


def test_image_folder_has_torchvisions_order(tmp_path):
    save_images(
        tmp_path, "b/10.JPG", "b/9.png", "a/x/y/0.jpeg", "a/x-/0.png", "a/z.bmp", "B/1.webp"
    )
    (tmp_path / "b" / "readme.txt").write_text("no image")
    folder = data.ImageFolder(tmp_path)
    assert folder.classes == ["B", "a", "b"]
    assert [label for _, label in folder.samples] == [0, 1, 1, 1, 2, 2]
    expected = ["B/1.webp", "a/z.bmp", "a/x-/0.png", "a/x/y/0.jpeg", "b/10.JPG", "b/9.png"]
    assert names(folder, tmp_path) == expected
    image, label = folder[4]
    assert image.mode == "RGB" and image.size == (8, 8) and label == 2


def test_links_are_followed_but_no_folder_is_read_twice(tmp_path):
    save_images(tmp_path, "images/a/0.png", "images/a/deep/1.png", "images/b/2.png", "more/3.png")
    root = tmp_path / "images"
    for link, target in {
        "a/deep/to_class": root / "a",
        "a/to_root": root,
        "a/to_parent": tmp_path,
        "a/to_deep": root / "a" / "deep",
        "b/to_more": tmp_path / "more",
        "c": tmp_path / "more",
        "../more/to_root": root,
    }.items():
        os.symlink(target, root / link)
    expected = ["a/0.png", "a/deep/1.png", "b/2.png", "b/to_more/3.png", "c/3.png"]
    assert names(data.ImageFolder(root), root) == expected


def test_files_of_other_types_are_counted_in_one_line(tmp_path, capsys):
    save_images(tmp_path, "train/a/0.png", "val/a/0.png", "val/a/deep/1.png", "val/a/._0.png")
    for name in ("a/2.heic", "a/deep/3.avif", "a/.DS_Store"):
        (tmp_path / "val" / name).touch()
    args = SimpleNamespace(data=str(tmp_path), val_fraction=None, seed=0)
    train_set, val_set = models.open_both(args)
    assert (len(train_set), len(val_set), val_set.passed_over) == (1, 2, 2)
    said = capsys.readouterr().err.splitlines()
    types = " ".join(data.EXTENSIONS)
    assert said == [f"note: 2 files beside the val images are none of {types}"]


def test_hidden_folders_are_left_out(tmp_path):
    hidden = ".ipynb_checkpoints"
    save_images(tmp_path, "a/0.png", f"a/{hidden}/0.png", f"{hidden}/0.png")
    folder = data.ImageFolder(tmp_path)
    assert folder.classes == ["a"] and names(folder, tmp_path) == ["a/0.png"]


IMAGENET = {"n01440764": 0, "n02123045": 281, "n03388043": 562, "n15075141": 999}


def numbered(root, names, num_classes):
    """The folder of these classes as a model with num_classes takes it."""
    save_images(root, *[f"{name}/0.png" for name in names])
    folder = data.ImageFolder(root)
    config = ltmp.ViTConfig(8, 8, dim=2, depth=1, heads=1, num_classes=num_classes)
    models.number_classes(ltmp.LTMPViT(config, "dense"), folder)
    return folder


def test_folders_of_imagenet_get_its_class_numbers(tmp_path, capsys):
    folder = numbered(tmp_path, IMAGENET, 1000)
    assert [label for _, label in folder.samples] == list(IMAGENET.values())
    assert [folder.classes[label] for label in IMAGENET.values()] == list(IMAGENET)
    line = "note: the 4 classes are ImageNet's: labels are their numbers there\n"
    assert len(folder.classes) == 1000 and capsys.readouterr().err == line


@pytest.mark.parametrize("names, num_classes", [([*IMAGENET, "n99999999"], 1000), (IMAGENET, 4)])
def test_other_folders_and_other_heads_keep_their_numbers(names, num_classes, tmp_path, capsys):
    folder = numbered(tmp_path, names, num_classes)
    assert [label for _, label in folder.samples] == list(range(len(names)))
    assert capsys.readouterr().err == ""


def test_an_installed_copy_has_imagenets_ids():
    ids = models.IMAGENET_IDS.read_text().split()
    assert len(set(ids)) == 1000 and ids == sorted(ids)
    pyproject = (models.IMAGENET_IDS.parent.parent / "pyproject.toml").read_text()
    assert f'package-data = {{ ltmp_extras = ["{models.IMAGENET_IDS.name}"] }}' in pyproject


def test_image_folder_says_what_is_wrong(tmp_path):
    root = tmp_path / "images"
    assert f"no folder at {root}" in refusal(data.ImageFolder, root)
    root.mkdir()
    assert "no class folders" in refusal(data.ImageFolder, root)
    (root / "empty").mkdir()
    assert "empty holds no images" in refusal(data.ImageFolder, root)
