"""The batches of a run: which images, in which order, and the processes that load them."""

import atexit
import multiprocessing
import os
import random
import signal
import sys
from functools import partial

import torch

import data

from . import runtime
from .fashion_mnist import FashionMNIST


def evenly(length, limit):
    """The indices of `limit` of length items, spread evenly (all if None)."""
    count = length if limit is None else min(limit, length)
    return [i * length // count for i in range(count)]


def subset(dataset, limit):
    """`limit` items spread evenly over the dataset (all if None), so every class has its share."""
    return torch.utils.data.Subset(dataset, evenly(len(dataset), limit))


def sample(dataset, count, seed):
    """Up to `count` items of the dataset in random order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.Subset(dataset, order[:count].tolist())


class Augmented(torch.utils.data.Dataset):
    """A dataset, or `limit` items of it, under a random transform.

    Item number epoch * len(self) + index depends on (seed, epoch, index) alone: it is the same
    whichever process makes it, and when.
    """

    def __init__(self, dataset, transform, seed, limit=None):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.indices = evenly(len(dataset), limit)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, number):
        transform = partial(self.transform, rng=random.Random(f"{self.seed} {number}"))
        return self.dataset.item(self.indices[number % len(self)], transform)


def epoch_batches(length, batch_size, epoch, seed):
    """The batches of one epoch as lists of item numbers (see Augmented), in random order."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch))
    return [batch.tolist() for batch in (order + epoch * length).split(batch_size)]


class Readable(torch.utils.data.Dataset):
    """A dataset that gives (None, (index, what is wrong)) for an item that cannot be read.

    An error in a process that loads images would end the run with a traceback.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except data.ImageError as error:
            return None, (index, str(error))


def collate(items):
    """Items of Readable -> images (B, 3, S, S), labels (B,), {index: what is wrong with it}."""
    bad = dict(problem for image, problem in items if image is None)
    good = [item for item in items if item[0] is not None]
    if not good:
        return torch.empty(0), torch.empty(0, dtype=torch.long), bad
    images, labels = torch.utils.data.default_collate(good)
    return images, labels, bad


class Loader(torch.utils.data.DataLoader):
    """Batches (images, labels) of the images that can be read; .bad has what is wrong with others.

    skip=False: the first image that cannot be read ends the program, told by the process that met
    it. A batch without any good image is empty.
    """

    def __init__(self, dataset, skip, **options):
        super().__init__(Readable(dataset), collate_fn=collate, **options)
        self.skip = skip
        self.speaker = runtime.processes()[0]
        self.bad = {}

    def __iter__(self):
        for images, labels, bad in super().__iter__():
            if bad and not self.skip:
                first = next(iter(bad.values()))
                runtime.stop(f"{first}; --skip-bad-images goes on without it", speaker=self.speaker)
            self.bad |= bad
            # A worker's tensor keeps a file open as long as it is kept, and labels often are.
            yield images, labels.clone()


def make_loader(dataset, args, device, **options):
    """A Loader with the workers that --workers says, or that suit the data; pinned for CUDA."""
    innermost = dataset
    while hasattr(innermost, "dataset"):
        innermost = innermost.dataset
    workers = args.workers
    if workers is None:
        # A scheduler may grant fewer cores than there are.
        granted = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if granted else os.cpu_count() or 1
        workers = 0 if isinstance(innermost, FashionMNIST) else min(8, cores)
    if workers:
        atexit.register(end_workers)
    return Loader(
        dataset,
        args.skip_bad_images,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        # Workers of a forkserver, the default from Python 3.14 on, outlive a run that is killed.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        **options,
    )


def load_images(dataset, args, device, num_tokens):
    """Images of the first --limit-train, drawn by --seed, all for one batch -> (n, 3, S, S).

    n is 512, or fewer where an image has many tokens. The same in every process. Ends the program
    where none can be read.
    """
    limited = subset(dataset, args.limit_train)
    count = min(512, 150_000 // num_tokens)
    loader = make_loader(sample(limited, count, args.seed), args, device, batch_size=64)
    loader.speaker = 0
    batches = [images for images, _ in loader if len(images)]
    if not batches:
        runtime.stop(f"none of {len(limited)} training images could be read")
    return torch.cat(batches).to(device)


def ignore_signals(worker):
    """Ctrl-C, or a scheduler's SIGTERM to all, reaches workers too; the main process ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At the end of the program, whatever ended it: Python would wait for workers for ever."""
    # torch would take their end for a failure.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()
