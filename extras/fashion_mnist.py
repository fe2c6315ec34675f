"""Fashion-MNIST, the demo's data: a part of it is embedded in demo/."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

DEMO_FILE = Path(__file__).parent.parent / "demo" / "fashion_mnist.npz"


class FashionMNIST(torch.utils.data.Dataset):
    """Fashion-MNIST in memory, as RGB images of 28 x 28 pixels.

    source: the embedded .npz (3,000 training and 2,000 test images, balanced), or a folder with the
    four original *-ubyte.gz files (60,000 and 10,000). split: "train" or "test". Raises ValueError
    where the folder lacks them.
    """

    classes = [
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ]  # fmt: skip

    def __init__(self, source, split, transform=None):
        if Path(source).suffix != ".npz":
            prefix = {"train": "train", "test": "t10k"}[split]
            self.images = read_idx(Path(source) / f"{prefix}-images-idx3-ubyte.gz", (28, 28))
            self.labels = read_idx(Path(source) / f"{prefix}-labels-idx1-ubyte.gz", ())
        else:
            with np.load(source) as arrays:
                self.images = arrays[f"{split}_images"]  # (n, 28, 28) uint8
                self.labels = arrays[f"{split}_labels"]  # (n,) uint8
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.item(index, self.transform)

    def item(self, index, transform):
        image = Image.fromarray(self.images[index]).convert("RGB")
        return (transform(image) if transform else image), int(self.labels[index])


def read_idx(path, item_shape):
    """An IDX file of bytes -> (n, *item_shape) uint8. Raises ValueError where it is none.

    Its header has 4 bytes, and 4 more per dimension.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        pixels = np.frombuffer(content, np.uint8, offset=8 + 4 * len(item_shape))
        return pixels.reshape(-1, *item_shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
