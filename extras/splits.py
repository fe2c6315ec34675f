"""The training and the validation part of a data set."""

import random
from pathlib import Path

import data

from .fashion_mnist import DEMO_FILE, FashionMNIST

# A folder that begins so, and holds folders, is a part of the data, not a class.
PARTS = ("train", "training", "test", "testing", "val", "valid", "validation")


def open_split(root, split, transform=None, val_fraction=None, seed=0):
    """The "train" or "val" part of a data set.

    root: None for the embedded Fashion-MNIST, a folder with its original files, or a folder that
    holds `train` and `val`, each with one folder per class. Where there is no `val`, a share
    val_fraction of every class in `train`, or in root itself, becomes it, drawn by seed. Raises
    ValueError where root is none of them.
    """
    if root is None or (Path(root) / "t10k-images-idx3-ubyte.gz").is_file():
        part = {"train": "train", "val": "test"}[split]
        return FashionMNIST(DEMO_FILE if root is None else root, part, transform)
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"no data folder at {root}")
    if (root / split).is_dir() and (root / "val").is_dir():
        return data.ImageFolder(root / split, transform)

    train = first_folder(root, "train", "training")
    val = first_folder(root, "val", "validation", "valid")
    names = {"train": train, "val": val}
    renames = [f"{found} to {name}" for name, found in names.items() if found not in (None, name)]
    if renames and train and (val or val_fraction is not None):
        raise ValueError(f"{root} must hold train and val: rename {' and '.join(renames)}")
    if val or val_fraction is None:
        raise ValueError(
            f"{root} has no folder {'train' if val else 'val'}: it must hold train and val, each "
            "with one folder per class; without val, --val-fraction 0.1 sets a tenth of the images "
            "aside"
        )
    folder = data.ImageFolder(root / "train" if train else root, transform)
    if not train:
        refuse_parts(root, folder.classes)
    folder.samples = draw_split(folder.samples, split, val_fraction, seed)
    if len({label for _, label in folder.samples}) < len(folder.classes):
        raise ValueError(f"{root}: a class has too few images to split, two at least")
    return folder


def refuse_parts(root, classes):
    """Raise ValueError where classes are parts of a data set, such as Training and Testing."""
    for name in classes:
        is_part = name.lower().split("_")[0] in PARTS
        if is_part and any(path.is_dir() for path in (root / name).iterdir()):
            raise ValueError(
                f"{root} must hold train and val: {name} holds folders: it is no class"
            )


def first_folder(root, *names):
    """The first of these names that is a folder in root, None if there is none."""
    return next((name for name in names if (root / name).is_dir()), None)


def draw_split(samples, split, val_fraction, seed):
    """The part of samples (path, class index) that is "train" or "val", class by class."""
    by_label = {}
    for path, label in samples:
        by_label.setdefault(label, []).append((path, label))
    chosen = []
    for label, own in by_label.items():
        random.Random(f"{seed} {label}").shuffle(own)
        count = max(1, round(val_fraction * len(own)))
        chosen += sorted(own[:count] if split == "val" else own[count:])
    return chosen
