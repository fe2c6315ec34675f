"""Images: folders of them, the transforms, and the embedded Fashion-MNIST.

A dataset here gives (image, class index) and has `.classes`; dataset.item(index, transform) is an
item under another transform than its own. Without a transform the image is a PIL image in RGB;
`eval_transform` and `train_transform` make it a tensor (3, S, S) float32.

    python data.py FASHION_MNIST_DIR    makes demo/fashion_mnist.npz from the four original files
    python data.py --benchmark DIR      images/s of a folder with one folder of images per class
"""

import argparse
import gzip
import math
import os
import random
import time
import warnings
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

DEMO_FILE = Path(__file__).parent / "demo" / "fashion_mnist.npz"
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

GREY = torch.tensor([0.299, 0.587, 0.114])  # red, green and blue in grey, as Pillow has it


# ---------------------------------------------------------------------------------------------
# Transforms: PIL image in, tensor (3, S, S) out


def eval_transform(size=224, crop_pct=0.9, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """Resize the shorter side to floor(size / crop_pct) pixels (bicubic), crop the centre, scale, normalize.

    Returns a function of the image: bit for bit what torchvision's Resize, CenterCrop, ToTensor and
    Normalize give on PIL images.
    """
    return partial(_resize_and_crop, size, math.floor(size / crop_pct), *per_channel(mean, std))  # unlike a closure, workers can be sent it


def _resize_and_crop(size, short, mean, std, image):
    image = to_rgb(image)
    width, height = image.size
    if width <= height:
        resized = short, int(short * height / width)
    else:
        resized = int(short * width / height), short
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (int(round((side - size) / 2)) for side in resized)
    return to_tensor(image.crop((left, top, left + size, top + size))).sub_(mean).div_(std)


def train_transform(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=(0.08, 1.0), jitter=0.4):
    """Random resized crop, horizontal flip, colour jitter, scale, normalize: timm's defaults.

    scale: area of the crop as a share of the image; jitter: brightness, contrast and saturation are
    multiplied by a factor from 1 - jitter to 1 + jitter. Returns a function of the image and, to
    draw from, a random.Random. A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size
    if that leaves `size` pixels across the crop.
    """
    return partial(_crop_flip_jitter, size, *per_channel(mean, std), scale, jitter)


def _crop_flip_jitter(size, mean, std, scale, jitter, image, rng=random):
    resample = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    box = draft(image, random_crop(image.size, scale, rng), size)
    image = to_rgb(image).resize((size, size), resample, box=box)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    pixels = to_tensor(image)
    # Brightness is the distance from black, contrast that from the image's mean grey, saturation that from each pixel's grey.
    origins = [lambda: pixels.new_zeros(()), lambda: GREY @ pixels.flatten(1).mean(1), lambda: torch.tensordot(GREY, pixels, 1)]
    origins = origins if jitter else []
    rng.shuffle(origins)
    for origin in origins:
        torch.lerp(origin(), pixels, rng.uniform(1 - jitter, 1 + jitter), out=pixels).clamp_(0, 1)
    return pixels.sub_(mean).div_(std)


def draft(image, box, size):
    """Have the decoder of a JPEG shrink it while the box keeps `size` pixels across. Returns the box in the image as it then is."""
    width, height = image.size
    times = max(1, min(box[2] - box[0], box[3] - box[1]) // size)
    drafted = image.draft("RGB", (width // times, height // times))  # (mode, (0, 0, width and height by 1, 2, 4 or 8)); None if no JPEG or decoded
    return tuple(side * drafted[1][2] / width for side in box) if drafted else box


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


def to_rgb(image):
    """The image in RGB; the image itself, without the copy that convert makes, if it already is. Raises ImageError where it cannot be decoded."""
    with reading(getattr(image, "filename", "image in memory")):
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def to_tensor(image):
    """RGB image -> (3, H, W) float32, 0..255 become 0..1."""
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")  # one pass for the order of axes and the type
    return torch.from_numpy(pixels).div_(255)


def per_channel(*triples):
    """Each triple of numbers as a tensor (3, 1, 1)."""
    return [torch.tensor(triple)[:, None, None] for triple in triples]


# ---------------------------------------------------------------------------------------------
# Datasets


class ImageError(ValueError):
    """A file that is no image, or none that can be read to its end."""


@contextmanager
def reading(path):
    """Inside, whatever goes wrong is an ImageError that names the file: readers raise all kinds of errors on damaged ones. Warnings are dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which nobody reads, and images of half the size allowed
            yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(f"cannot read the image {path}: {reason}") from None


def open_image(path, transform=to_rgb):
    """What transform makes of the image in a file, given before it is decoded (by to_rgb); as it is a PIL image in RGB.

    The first image, if there are several; not turned as EXIF may say. Raises ImageError where there is none, it is
    damaged and its format can tell, has more pixels than Pillow allows (179 million), or a side 500 times the other:
    resized by its shorter side it would fill the memory.
    """
    with reading(path):
        image = Image.open(path)
    with image:
        with reading(path):
            if max(image.size) > 500 * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels: crop it")
            if image.format == "PNG":
                with Image.open(path) as again:
                    again.verify()  # its checksums, which are not looked at otherwise
        return transform(image)


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
        return self.item(index, self.transform)

    def item(self, index, transform):
        path, label = self.samples[index]
        return open_image(path, transform or to_rgb), label


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
        return self.item(index, self.transform)

    def item(self, index, transform):
        image = Image.fromarray(self.images[index]).convert("RGB")
        return (transform(image) if transform else image), int(self.labels[index])


def _read_idx(path, item_shape):
    """An IDX file of bytes: a header of 4 bytes and 4 more per dimension, then the items. Raises ValueError where it is none."""
    try:
        content = gzip.decompress(path.read_bytes())
        return np.frombuffer(content, np.uint8, offset=8 + 4 * len(item_shape)).reshape(-1, *item_shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


class Augmented(torch.utils.data.Dataset):
    """A dataset, or `limit` items of it, under a random transform whose draws depend on (seed, epoch, index) alone.

    Item number epoch * len(self) + index: the same whichever worker makes it, and when.
    """

    def __init__(self, dataset, transform, seed, limit=None):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.indices = evenly(len(dataset), limit)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, number):
        transform = partial(self.transform, rng=random.Random(f"{self.seed} {number}"))
        return self.dataset.item(self.indices[number % len(self)], transform)


class Readable(torch.utils.data.Dataset):
    """A dataset that gives (None, (index, what is wrong)) in place of an item that cannot be read: from a worker, an error would be a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except ImageError as error:
            return None, (index, str(error))


def collate(items):
    """Items of Readable -> images (B, 3, S, S) and labels (B,) of the good ones, and what is wrong with the others by index."""
    bad = dict(found for image, found in items if image is None)
    good = [item for item in items if item[0] is not None]
    return *(torch.utils.data.default_collate(good) if good else (torch.empty(0), torch.empty(0, dtype=torch.long))), bad


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
    return torch.utils.data.Subset(dataset, evenly(len(dataset), limit))


def evenly(length, limit):
    """The indices of `limit` of length items, spread evenly (all if None)."""
    count = length if limit is None else min(limit, length)
    return [i * length // count for i in range(count)]


def sample(dataset, count, seed):
    """Up to `count` items of the dataset in random order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.Subset(dataset, order[:count].tolist())


def epoch_batches(length, batch_size, epoch, seed):
    """The batches of one epoch as lists of item numbers (see Augmented), shuffled by seed and epoch."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch)) + epoch * length
    return [batch.tolist() for batch in order.split(batch_size)]


# ---------------------------------------------------------------------------------------------


def benchmark(folder, count=256, repeats=7):
    """Print how many images of a folder, one folder per class in it, are read and transformed in a second, beside torchvision if it is installed.

    In this process, one thread: medians of `repeats` times `count` images, both in turn. Raises ValueError where there are none.
    """
    torch.set_num_threads(1)
    sides = [{"evaluation": ImageFolder(folder, eval_transform()), "training": Augmented(ImageFolder(folder), train_transform(), seed=0)}]
    try:
        sides.append(torchvision_folders(folder))
    except (ImportError, RuntimeError) as error:
        print(f"no torchvision to compare with: {error}")
    for name in sides[0]:
        found = np.array([[speed(side[name], count) for side in sides] for _ in range(repeats)])  # (repeats, 2), or (repeats, 1) without torchvision
        line = f"{name:<10} {np.median(found[:, 0]):.0f} images/s"
        print(line if len(sides) == 1 else f"{line}, torchvision {np.median(found[:, 1]):.0f}, ratio {np.median(found[:, 0] / found[:, 1]):.2f}", flush=True)


def speed(dataset, count):
    """Items per second of this process's CPU time: other programs, and a disk that is waited for, do not count."""
    indices = evenly(len(dataset), count)
    start = time.process_time()
    for index in indices:
        dataset[index]
    return len(indices) / (time.process_time() - start)


def torchvision_folders(folder):
    """The folder under torchvision's counterparts of eval_transform() and train_transform()."""
    from torchvision import datasets, transforms as T

    ways = T.InterpolationMode.BILINEAR, T.InterpolationMode.BICUBIC
    finish = T.ToTensor(), T.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    clean = T.Resize(248, ways[1]), T.CenterCrop(224)
    random_view = T.RandomChoice([T.RandomResizedCrop(224, interpolation=way) for way in ways]), T.RandomHorizontalFlip(), T.ColorJitter(0.4, 0.4, 0.4)
    return {"evaluation": datasets.ImageFolder(folder, T.Compose([*clean, *finish])),
            "training": datasets.ImageFolder(folder, T.Compose([*random_view, *finish]))}


def main(argv=None):
    """The command line: make the embedded data, or measure how fast images load."""
    parser = argparse.ArgumentParser(description="Make the embedded data: a balanced part of Fashion-MNIST.")
    parser.add_argument("folder", help="folder with Fashion-MNIST's four *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=DEMO_FILE, help="file to write (default: %(default)s)")
    parser.add_argument("--benchmark", action="store_true",
                        help="measure images/s instead; folder holds one folder of images per class; beside torchvision, if it is installed")
    args = parser.parse_args(argv)
    if args.benchmark:
        try:
            return benchmark(args.folder)
        except ValueError as error:
            parser.exit(2, f"data.py: {error}\n")
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
