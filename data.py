"""Images: folders of them, the transforms, and the embedded Fashion-MNIST.

A dataset here gives (image, class index) and has `.classes`. Without a transform the image is a
PIL image in RGB; `eval_transform` and `train_transform` make it a tensor (3, S, S) float32.

    python data.py FASHION_MNIST_DIR    makes demo/fashion_mnist.npz from the four original files
"""

import argparse
import gzip
import math
import os
import random
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

DEMO_FILE = Path(__file__).parent / "demo" / "fashion_mnist.npz"
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


# ---------------------------------------------------------------------------------------------
# Transforms: PIL image in RGB in, tensor (3, S, S) out


def eval_transform(size=224, crop_pct=0.9, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """Resize the shorter side to floor(size / crop_pct) pixels (bicubic), crop the centre, scale, normalize.

    Returns a function of the image: bit for bit what torchvision's Resize, CenterCrop, ToTensor and
    Normalize give on PIL images.
    """
    return partial(_resize_and_crop, size, math.floor(size / crop_pct), mean, std)  # unlike a closure, workers can be sent it


def _resize_and_crop(size, short, mean, std, image):
    image = image.convert("RGB")
    width, height = image.size
    if width <= height:
        resized = short, int(short * height / width)
    else:
        resized = int(short * width / height), short
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (int(round((side - size) / 2)) for side in resized)
    return to_tensor(image.crop((left, top, left + size, top + size)), mean, std)


def train_transform(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=(0.08, 1.0), jitter=0.4):
    """Random resized crop, horizontal flip, colour jitter, scale, normalize: timm's defaults.

    scale: area of the crop as a share of the image; jitter: brightness, contrast and saturation are
    multiplied by a factor from 1 - jitter to 1 + jitter. Returns a function of the image and, to
    draw from, a random.Random.
    """
    return partial(_crop_flip_jitter, size, mean, std, scale, jitter)


def _crop_flip_jitter(size, mean, std, scale, jitter, image, rng=random):
    image = image.convert("RGB")
    resample = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    image = image.resize((size, size), resample, box=random_crop(image.size, scale, rng))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color] if jitter else []
    rng.shuffle(enhancers)
    for enhancer in enhancers:
        image = enhancer(image).enhance(rng.uniform(1 - jitter, 1 + jitter))
    return to_tensor(image, mean, std)


def random_crop(image_size, scale, rng, ratio=(3 / 4, 4 / 3)):
    """A box (left, top, right, bottom) of random area (share of the image) and aspect ratio.

    After ten boxes that do not fit, the largest central one with an allowed aspect ratio.
    """
    width, height = image_size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * ratio[1]))), min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_tensor(image, mean, std):
    """RGB image -> (3, H, W) float32, from 0..255 to 0..1, then minus mean, by std, per channel."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, H, W) uint8
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return pixels.float().div_(255).sub_(mean).div_(std)


# ---------------------------------------------------------------------------------------------
# Datasets


def open_image(path):
    """The image in a file (the first, if there are several; not turned as EXIF may say) as a PIL image in RGB.

    Raises ValueError where there is none, it is damaged and its format can tell, has more pixels than Pillow
    allows (179 million), or a side 500 times the other: resized by its shorter side it would fill the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which nobody reads, and images of half the size allowed
            with Image.open(path) as image:
                if max(image.size) > 500 * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels: crop it")
                if image.format == "PNG":
                    with Image.open(path) as again:
                        again.verify()  # its checksums, which are not looked at otherwise
                return image.convert("RGB")
    except Exception as error:  # the readers raise whatever a damaged file provokes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read the image {path}: {reason}") from None


class ImageFolder(torch.utils.data.Dataset):
    """Images under root/CLASS/**, classes and files in the order of torchvision's ImageFolder.

    .classes: sorted names of the folders; .samples: (path, class index). Raises ValueError where
    root is no folder, has no class folders, or a class has no images.
    """

    def __init__(self, root, transform=None):
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"no folder at {root}")
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not self.classes:
            raise ValueError(f"{root} has no class folders: it must hold one folder of images per class")
        self.transform, self.samples = transform, []
        for index, name in enumerate(self.classes):
            found = [(os.path.join(folder, file), index)
                     for folder, _, files in sorted(os.walk(root / name, followlinks=True))
                     for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
            if not found:
                raise ValueError(f"{root / name} holds no images ({' '.join(EXTENSIONS)})")
            self.samples += found

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        image = open_image(path)
        return (self.transform(image) if self.transform else image), label


class FashionMNIST(torch.utils.data.Dataset):
    """Fashion-MNIST in memory, as RGB images of 28 x 28 pixels.

    source: the embedded file (3,000 training and 2,000 test images, balanced), or a folder with the
    four original *-ubyte.gz files (60,000 and 10,000). split: "train" or "test".
    """

    classes = FASHION_CLASSES

    def __init__(self, source, split, transform=None):
        if Path(source).is_dir():
            name = {"train": "train", "test": "t10k"}[split]
            self.images = _read_idx(Path(source) / f"{name}-images-idx3-ubyte.gz", (28, 28))
            self.labels = _read_idx(Path(source) / f"{name}-labels-idx1-ubyte.gz", ())
        else:
            with np.load(source) as arrays:
                self.images, self.labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index]).convert("RGB")
        return (self.transform(image) if self.transform else image), int(self.labels[index])


def _read_idx(path, item_shape):
    """An IDX file of bytes: a header of 4 bytes and 4 more per dimension, then the items. Raises ValueError where it is none."""
    try:
        content = gzip.decompress(path.read_bytes())
        return np.frombuffer(content, np.uint8, offset=8 + 4 * len(item_shape)).reshape(-1, *item_shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


class Augmented(torch.utils.data.Dataset):
    """A dataset under a random transform whose draws depend on (seed, epoch, index) alone.

    Item number epoch * len(dataset) + index: the same whichever worker makes it, and when.
    """

    def __init__(self, dataset, transform, seed):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, number):
        image, label = self.dataset[number % len(self.dataset)]
        return self.transform(image, random.Random(f"{self.seed} {number}")), label


def open_split(root, split, transform=None, val_fraction=None, seed=0):
    """The "train" or "val" part of a data set.

    root: None for the embedded Fashion-MNIST, a folder with its original files, or a folder that
    holds `train` and `val`, each with one folder per class. Where there is no `val`, val_fraction (a
    share) of the images in `train`, or in root itself, becomes it: of every class its share, drawn by
    seed. Raises ValueError where root is none of them.
    """
    if root is None or (Path(root) / "t10k-images-idx3-ubyte.gz").is_file():
        return FashionMNIST(DEMO_FILE if root is None else root, {"train": "train", "val": "test"}[split], transform)
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"no data folder at {root}")
    if (root / split).is_dir() and (root / "val").is_dir():
        return ImageFolder(root / split, transform)
    if (root / "val").is_dir() or val_fraction is None:
        lacks = "train" if (root / "val").is_dir() else "val"
        raise ValueError(f"{root} has no folder {lacks}: it must hold train and val, each with one folder per class; "
                         "without val, --val-fraction 0.1 sets a tenth of the images aside")
    folder = ImageFolder(root / "train" if (root / "train").is_dir() else root, transform)
    chosen = []
    for label in range(len(folder.classes)):
        samples = [sample for sample in folder.samples if sample[1] == label]
        random.Random(f"{seed} {label}").shuffle(samples)
        count = max(1, round(val_fraction * len(samples)))
        chosen += samples[:count] if split == "val" else samples[count:]
    folder.samples = sorted(chosen, key=lambda sample: (sample[1], sample[0]))
    if len({label for _, label in folder.samples}) < len(folder.classes):
        raise ValueError(f"{root}: a class has too few images to split, two at least")
    return folder


def subset(dataset, limit):
    """`limit` items spread evenly over the dataset (all if None), so that every class has its share."""
    if limit is None or limit >= len(dataset):
        return dataset
    indices = [i * len(dataset) // limit for i in range(limit)]
    return torch.utils.data.Subset(dataset, indices)


def sample(dataset, count, seed):
    """Up to `count` items of the dataset in random order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.Subset(dataset, order[:count].tolist())


def epoch_batches(length, batch_size, epoch, seed):
    """The batches of one epoch as lists of item numbers (see Augmented), shuffled by seed and epoch."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch)) + epoch * length
    return [batch.tolist() for batch in order.split(batch_size)]


# ---------------------------------------------------------------------------------------------


def main():
    """The command line: make the embedded data."""
    parser = argparse.ArgumentParser(description="Make the embedded data: a balanced part of Fashion-MNIST.")
    parser.add_argument("folder", help="folder with Fashion-MNIST's four *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=DEMO_FILE, help="file to write (default: %(default)s)")
    args = parser.parse_args()
    arrays = {}
    for split, per_class in (("train", 300), ("test", 200)):  # the first of each class, in their order
        full = FashionMNIST(args.folder, split)
        chosen = np.sort(np.concatenate([np.flatnonzero(full.labels == c)[:per_class] for c in range(10)]))
        arrays |= {f"{split}_images": full.images[chosen], f"{split}_labels": full.labels[chosen]}
    args.out.parent.mkdir(exist_ok=True)
    with open(f"{args.out}.tmp", "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(f"{args.out}.tmp", args.out)
    print(f"{args.out}: {len(arrays['train_labels'])} training and {len(arrays['test_labels'])} test images, "
          f"{args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
