"""extras/fashion_mnist.py: the embedded data, and the original files."""

import gzip

import numpy as np
from test_data import refusal

from extras.fashion_mnist import DEMO_FILE, FashionMNIST


def test_embedded_data_is_balanced_and_the_splits_share_nothing():
    train_set, test_set = (FashionMNIST(DEMO_FILE, split) for split in ("train", "test"))
    assert np.bincount(train_set.labels).tolist() == [300] * 10
    assert np.bincount(test_set.labels).tolist() == [200] * 10
    images = {split: {i.tobytes() for i in split.images} for split in (train_set, test_set)}
    assert not images[train_set] & images[test_set]
    image, label = train_set[0]
    assert image.mode == "RGB" and image.size == (28, 28) and 0 <= label < 10


def test_original_fashion_mnist_is_read_and_damage_is_named(tmp_path):
    pixels = bytes(range(256)) * 7
    images = tmp_path / "t10k-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(bytes(16) + pixels[: 2 * 784]))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([3, 9])))
    dataset = FashionMNIST(tmp_path, "test")
    assert len(dataset) == 2 and dataset[1][1] == 9
    assert np.asarray(dataset[1][0])[..., 0].tobytes() == pixels[784 : 2 * 784]
    whole = images.read_bytes()
    odd = [whole[:-1], whole[:-6] + b"000000", whole[:10] + b"\xff" + whole[11:], b"no gzip", b""]
    for damaged in (*odd, gzip.compress(bytes(100))):
        images.write_bytes(damaged)
        assert f"cannot read {images}" in refusal(FashionMNIST, tmp_path, "test")
    assert "train-images" in refusal(FashionMNIST, tmp_path, "train")
