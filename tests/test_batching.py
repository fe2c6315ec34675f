"""The batches of a run: their order, the files that cannot be read, the processes that load."""

import subprocess
import sys

import torch

import data
from extras import batching
from extras.fashion_mnist import DEMO_FILE, FashionMNIST


def test_augmented_items_depend_on_seed_epoch_and_index_alone():
    dataset = FashionMNIST(DEMO_FILE, "train")
    first, again, other = (
        batching.Augmented(dataset, data.train_transform(28), seed) for seed in (0, 0, 1)
    )
    n = len(dataset)
    assert first[5][1] == first[5 + n][1] == dataset[5][1]
    again[7]
    assert torch.equal(first[5][0], again[5][0])
    assert not torch.equal(first[5][0], first[5 + n][0])
    assert not torch.equal(first[5][0], other[5][0])
    few = batching.Augmented(dataset, data.train_transform(28), 0, limit=10)
    assert len(few) == 10 and few[13][1] == dataset[900][1]


def test_an_epoch_has_every_item_once_in_an_order_of_its_own():
    batches = batching.epoch_batches(10, 4, epoch=2, seed=0)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(number for batch in batches for number in batch) == list(range(20, 30))
    assert batches == batching.epoch_batches(10, 4, 2, 0)
    other = [[number + 10 for number in batch] for batch in batching.epoch_batches(10, 4, 1, 0)]
    assert batches != other and batches != batching.epoch_batches(10, 4, 2, 1)


def test_subsets_are_even():
    dataset = FashionMNIST(DEMO_FILE, "test")
    assert batching.evenly(10, 4) == [0, 2, 5, 7]
    assert batching.evenly(3, None) == batching.evenly(3, 9) == [0, 1, 2]
    assert batching.subset(dataset, 4).indices == [0, 500, 1000, 1500]


def test_a_sample_is_drawn_by_its_seed():
    dataset = FashionMNIST(DEMO_FILE, "test")
    drawn = batching.sample(dataset, 50, seed=0).indices
    assert len(set(drawn)) == 50 and drawn != sorted(drawn)
    assert drawn == batching.sample(dataset, 50, seed=0).indices
    assert drawn != batching.sample(dataset, 50, seed=1).indices


def test_images_that_cannot_be_read_are_told_beside_the_good_ones(image_folder, tmp_path):
    root = image_folder(tmp_path, per_class=1) / "train"
    (root / "a" / "1.png").write_bytes(b"not a picture")
    readable = batching.Readable(data.ImageFolder(root, data.eval_transform(8)))
    items = [readable[i] for i in range(len(readable))]
    images, labels, bad = batching.collate(items)
    assert images.shape == (2, 3, 8, 8) and labels.tolist() == [0, 1]
    assert list(bad) == [1] and "1.png" in bad[1]
    images, labels, bad = batching.collate(items[1:2])
    assert len(images) == len(labels) == 0 and labels.dtype == torch.long and list(bad) == [1]


MANY_BATCHES = """
import resource
from types import SimpleNamespace
import torch
from extras import batching

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
items = torch.utils.data.TensorDataset(torch.zeros(200, 1), torch.arange(200))
args = SimpleNamespace(workers=1, skip_bad_images=False)
loader = batching.make_loader(items, args, torch.device("cpu"), batch_size=1)
kept = [labels for _, labels in loader]
print(torch.cat(kept).sum().item())
"""


def test_labels_that_are_kept_keep_no_files_open():
    done = subprocess.run([sys.executable, "-c", MANY_BATCHES], capture_output=True, text=True)
    assert done.stdout.strip() == str(sum(range(200))), done.stderr
