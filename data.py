"""Images: files and folders of them, and their transforms.

Read from top to bottom: image files, transforms, datasets.

A dataset here gives (image, class index) and has `.classes`; dataset.item(index, transform) is an
item under another transform. Without a transform an image is a PIL image in RGB; `eval_transform`
and `train_transform` make it a tensor (3, S, S) float32.
"""

import math
import os
import random
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# ImageNet's, per channel.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What red, green and blue are worth in grey, as in Pillow.
GREY = torch.tensor([0.299, 0.587, 0.114])


# --------------------------------------------------------------------------------------------------
# Image files: a path in, RGB out


class ImageError(ValueError):
    """A file that is no image, or that cannot be read to its end."""


@contextmanager
def reading(path):
    """Inside, every error becomes an ImageError that names the file, and warnings are dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    # Pillow raises all kinds of errors on damaged files.
    except Exception as error:  # noqa: BLE001
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(f"cannot read the image {path}: {reason}") from None


def to_rgb(image):
    """The image in RGB with 8 bits a channel. Raises ImageError where it cannot be decoded.

    Grey of 16 bits keeps its upper 8, like Pillow's colour images of 16 bits. Floats are refused,
    because their scale is not known.
    """
    with reading(getattr(image, "filename", "image in memory")):
        image.load()
        if image.mode == "F":
            raise ValueError("its pixels are floats (mode F): save it with 8 or 16 bits")
        if image.mode.startswith("I"):
            pixels = np.asarray(image)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError(
                    f"its pixels go from {pixels.min()} to {pixels.max()} (mode {image.mode}): "
                    "save it with 8 or 16 bits"
                )
            # 32 bits can hold numbers of 8 bits.
            upper = pixels if image.mode == "I" and pixels.max() < 256 else pixels >> 8
            image = Image.fromarray(upper.astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path, transform=to_rgb):
    """What transform makes of the image in a file, which is not decoded yet when it gets it.

    Of several images in a file the first is taken. EXIF does not turn it. Raises ImageError where
    there is no image, where it is damaged and its format can tell, where it has more pixels than
    Pillow allows (179 million), or where one side is more than 500 times the other: once its
    shorter side is resized, such an image would fill the memory.
    """
    with reading(path):
        image = Image.open(path)
    with image:
        with reading(path):
            if max(image.size) > 500 * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels: crop it")
            if image.format == "PNG":
                # Decoding alone does not look at the checksums.
                with Image.open(path) as again:
                    again.verify()
        return transform(image)


# --------------------------------------------------------------------------------------------------
# Transforms: PIL image in, tensor (3, S, S) out


def eval_transform(size=224, crop_pct=0.9, mean=MEAN, std=STD):
    """Resize the shorter side to floor(size / crop_pct) (bicubic), crop the centre, normalize.

    Returns a function of the image. It gives bit for bit what torchvision's Resize, CenterCrop,
    ToTensor and Normalize give on PIL images.
    """
    # Unlike a closure, a partial can be sent to the processes that load images.
    return partial(resize_and_crop, size, math.floor(size / crop_pct), *per_channel(mean, std))


def resize_and_crop(size, short, mean, std, image):
    """The centre, size x size pixels, of the image with a shorter side of `short` pixels."""
    image = to_rgb(image)
    width, height = image.size
    if width <= height:
        resized = short, int(short * height / width)
    else:
        resized = int(short * width / height), short
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in resized)
    return to_tensor(image.crop((left, top, left + size, top + size))).sub_(mean).div_(std)


def train_transform(size=224, mean=MEAN, std=STD, scale=(0.08, 1.0), jitter=0.4, of_square=False):
    """Random resized crop, horizontal flip, colour jitter, normalize: timm's defaults.

    scale: area of the crop as a share of the image, or with of_square of the largest square in it.
    jitter: brightness, contrast and saturation are multiplied by factors from 1 - jitter to
    1 + jitter. Returns a function of the image and of the random.Random to draw from.
    """
    return partial(crop_flip_jitter, size, *per_channel(mean, std), scale, jitter, of_square)


def crop_flip_jitter(size, mean, std, scale, jitter, of_square, image, rng=random):
    """A random view of the image; everything random is drawn from rng."""
    resample = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    box = draft(image, random_crop(image.size, scale, rng, of_square), size)
    image = to_rgb(image).resize((size, size), resample, box=box)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    pixels = to_tensor(image)  # (3, S, S)
    if jitter:
        jitter_colours(pixels, jitter, rng)
    return pixels.sub_(mean).div_(std)


def random_crop(image_size, scale, rng, of_square=False, ratio=(3 / 4, 4 / 3)):
    """A box (left, top, right, bottom) of random area and aspect ratio, as train_transform says.

    After ten boxes that do not fit, the largest central one with an allowed aspect ratio.
    """
    width, height = image_size
    whole = min(width, height) ** 2 if of_square else width * height
    for _ in range(10):
        area = whole * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = rng.randint(0, width - w)
            top = rng.randint(0, height - h)
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left = (width - w) // 2
    top = (height - h) // 2
    return left, top, left + w, top + h


def draft(image, box, size):
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size where the box keeps `size` pixels across.

    Returns the box in the pixels of the image as it will be decoded.
    """
    width, height = image.size
    times = max(1, min(box[2] - box[0], box[3] - box[1]) // size)
    # (mode, (0, 0, width, height)), each side divided by 1, 2, 4 or 8; None for other formats.
    drafted = image.draft("RGB", (width // times, height // times))
    return tuple(side * drafted[1][2] / width for side in box) if drafted else box


def jitter_colours(pixels, jitter, rng):
    """Change brightness, contrast and saturation of pixels (3, H, W) in place, in random order."""
    changes = ["brightness", "contrast", "saturation"]
    rng.shuffle(changes)
    for change in changes:
        # Each is a distance: from black, from the image's mean grey, or from the pixel's own grey.
        if change == "brightness":
            origin = pixels.new_zeros(())
        elif change == "contrast":
            origin = GREY @ pixels.flatten(1).mean(1)
        else:
            origin = torch.tensordot(GREY, pixels, 1)  # (H, W)
        factor = rng.uniform(1 - jitter, 1 + jitter)
        torch.lerp(origin, pixels, factor, out=pixels).clamp_(0, 1)


def to_tensor(image):
    """RGB image -> (3, H, W) float32, 0..255 become 0..1."""
    # One pass for both the order of the axes and the type.
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
    return torch.from_numpy(pixels).div_(255)


def per_channel(*triples):
    """Each triple of numbers as a tensor (3, 1, 1)."""
    return [torch.tensor(triple)[:, None, None] for triple in triples]


# --------------------------------------------------------------------------------------------------
# Datasets


class ImageFolder(torch.utils.data.Dataset):
    """Images under root/CLASS/**, classes and files in the order of torchvision's ImageFolder.

    .classes: sorted names of the folders; .samples: (path, class index); .passed_over: how many
    files are of no type in EXTENSIONS. Files and folders whose name starts with a dot are left out.
    Raises ValueError where root is no folder, has no class folders, or a class has no images.
    """

    def __init__(self, root, transform=None):
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"no folder at {root}")
        folders = [entry.name for entry in os.scandir(root) if entry.is_dir()]
        self.classes = sorted(name for name in folders if not name.startswith("."))
        if not self.classes:
            raise ValueError(f"{root} has no class folders: it must hold one folder per class")
        self.transform = transform
        self.samples, self.passed_over = [], 0
        for index, name in enumerate(self.classes):
            paths, others = image_paths(root / name)
            self.passed_over += others
            if not paths:
                raise ValueError(f"{root / name} holds no images ({' '.join(EXTENSIONS)})")
            self.samples += [(path, index) for path in paths]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.item(index, self.transform)

    def item(self, index, transform):
        path, label = self.samples[index]
        return open_image(path, transform or to_rgb), label


def image_paths(top):
    """The images under a class folder, and how many other files there are.

    Links are followed, but no folder is read twice.
    """
    # A link to a folder around this one would lead back here and to the other classes.
    seen = {*top.resolve().parents, *(top.parent.resolve() / top.name).parents}
    found, others = [], 0
    for folder, subfolders, files in os.walk(top, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = sorted(name for name in files if not name.startswith("."))
        images = [name for name in files if name.lower().endswith(EXTENSIONS)]
        others += len(files) - len(images)
        found.append((folder, images))
    return [os.path.join(folder, name) for folder, names in sorted(found) for name in names], others
