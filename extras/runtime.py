"""What every program here needs to run well: flags, messages, whole files, torchrun, devices."""

import argparse
import atexit
import errno
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --------------------------------------------------------------------------------------------------
# Flags


def command_line(description, left_out=()):
    """An ArgumentParser with the flags of every program, less those that are left out.

    It refuses wrong ones in one line.
    """
    for stream in (sys.stdout, sys.stderr):
        # A file name that the terminal's encoding lacks must not end a run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(description=description)
    parser.error = stop

    def add(*names, **options):
        if names[0] not in left_out:
            parser.add_argument(*names, **options)

    add(
        "--data",
        metavar="DIR",
        help="image folder: train/ and val/ with one folder per class in each; or a folder with "
        "Fashion-MNIST's original files (default: the embedded Fashion-MNIST)",
    )
    add(
        "--val-fraction",
        type=share,
        metavar="SHARE",
        help="where --data has no val/: set this share of its images aside, drawn by --seed",
    )
    add("--limit-val", type=at_least(1), metavar="N", help="use N validation images (default: all)")
    add("--seed", type=int, default=0, help="order, augmentation and split (default: %(default)s)")
    add(
        "--workers",
        type=at_least(0),
        metavar="N",
        help="processes that load images (default: one per core, at most 8; 0 for Fashion-MNIST)",
    )
    add(
        "--skip-bad-images",
        action="store_true",
        help="leave out images that cannot be read and list them (default: stop at the first)",
    )
    add(
        "-b",
        "--batch-size",
        type=at_least(1),
        default=128,
        metavar="N",
        help="images per step and process (default: 128; 32 to train by the adaptive recipe)",
    )
    add("--device", default=DEVICE, help="(%(default)s)")
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="mixed precision, on CUDA alone: bfloat16, or float16 where the GPU lacks it "
        "(default: on)",
    )
    return parser


def at_least(least, kind=int):
    """An argparse type: a finite number of this kind, `least` or more."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text} is no {name} from {least} on")
        return value

    return parse


def share(text):
    """An argparse type: a number above 0, at most 1."""
    value = at_least(0, float)(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


# --------------------------------------------------------------------------------------------------
# Messages


def stop(message, code=2, speaker=0):
    """End the program with one line on stderr. Code 2 means wrong input."""
    say(f"{Path(sys.argv[0]).name}: {message}", speaker=speaker)
    sys.exit(code)


def say(text, file=None, speaker=0):
    """Print, on stderr by default. Of several processes only one speaks."""
    if processes()[0] == speaker:
        write(f"{text}\n", file or sys.stderr)


def write(text, file):
    """Write text to a stream, at once; nothing where nobody reads: `| head`, a closed terminal."""
    try:
        print(text, end="", file=file, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # Python must not fail on it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def say_skipped(messages):
    """List the images that were left out, if any."""
    if messages:
        say("\n  ".join([f"{len(messages)} images were left out:", *sorted(messages)]))


class Progress:
    """One line that renews itself in a terminal; elsewhere a line every `every` seconds."""

    def __init__(self, every=10):
        self.live = sys.stderr.isatty()
        self.every = 0.1 if self.live else every
        self.start = self.shown = time.time()

    def show(self, text, done=None, total=None):
        """Show text, and the time left where `done` of `total` is done."""
        now = time.time()
        finished = done is not None and done == total
        if processes()[0] > 0 or (now - self.shown < self.every and not finished):
            return
        self.shown = now
        if finished:
            text = f"{text}  {now - self.start:.0f} s"
        elif done:
            left = int((now - self.start) / done * (total - done))
            text = f"{text}  {left // 60}:{left % 60:02d} left"
        if self.live:
            write(f"\r{text}\x1b[K" + "\n" * finished, sys.stderr)
        else:
            write(text + "\n", sys.stderr)


# What an error says when the machine gives out, and what to do: the first that fits.
EXHAUSTED = {
    "shared memory|shm|Bus error": "/dev/shm is full: make it larger, or load with --workers 0",
    "CUDA out of memory|OutOfMemoryError": "the GPU's memory is full: take fewer images at once",
    r"DataLoader worker \(pid": "the system ended a process that loads images, as where memory is "
    "full: take fewer --workers",
    "MemoryError|allocate memory|not enough memory": "memory is full: take fewer images at once",
    "No space left": "the disk is full, or /dev/shm: make room",
    "Too many open files": "too many files are open: raise the limit by ulimit -n",
}


def run_main(main, hint=""):
    """Run a program. Ctrl-C, and a machine that gives out, end it with one line and a hint."""
    hint = f"; {hint}" if hint else ""
    try:
        main()
    except KeyboardInterrupt:
        stop(f"stopped{hint}", 130)
    except (RuntimeError, MemoryError, OSError) as error:
        text = f"{type(error).__name__}: {error}"
        advice = next((line for fault, line in EXHAUSTED.items() if re.search(fault, text)), None)
        if advice is None:
            raise
        stop(advice + hint, 1, speaker=processes()[0])


class Interrupts:
    """Inside, Ctrl-C and SIGTERM are only noted, so a step can end; a second Ctrl-C stops at once.

    In a thread that is not the main one signals are left alone.
    """

    def __enter__(self):
        self.noted = []
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self.note)
        return self

    def note(self, number, _):
        self.noted.append(number)
        # SIGTERM to all reaches a process of torchrun twice: directly, and from torchrun.
        if number == signal.SIGINT:
            signal.signal(number, self.previous[number])

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def any(self):
        """Whether any process was asked to stop."""
        return total(torch.tensor(len(self.noted))).item() > 0


# --------------------------------------------------------------------------------------------------
# Files


def make_folder(path):
    """Make a folder for results. What cannot be made ends the program with one line."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"cannot write to {path}: {error.strerror}")


def write_file(path, content, append=False):
    """Write text or bytes under a temporary name, then rename: the file is whole at every moment.

    append=True adds text at the end instead. Of several processes only the first writes. What
    cannot be written ends the program with one line, and leaves what was there.
    """
    if processes()[0] > 0:
        return
    try:
        if append:
            with open(path, "a") as file:
                file.write(content)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{path}.tmp")
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        stop(f"cannot write {path}: {error.strerror}")


# --------------------------------------------------------------------------------------------------
# Devices and processes


def processes():
    """(rank, count) of torchrun's processes, which meet at the first call; else (0, 1)."""
    count = os.environ.get("WORLD_SIZE") or "1"
    if count == "1":
        return 0, 1
    if not dist.is_initialized():
        if not os.environ.get("RANK"):
            sys.exit(
                f"WORLD_SIZE is {count} but RANK is not set: use torchrun, or unset WORLD_SIZE"
            )
        # An import that torch.optim would do too late: gloo's threads would outlive their group.
        import torch.distributed.nn  # noqa: F401

        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def total(tensor):
    """The sum of a tensor over all processes, in place. Where one is gone, the others end too."""
    if processes()[1] > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            # gloo says: connection reset, or closed, by peer.
            if "by peer" not in str(error):
                raise
            stop("another process has ended: this one cannot go on", 1, speaker=processes()[0])
    return tensor


def batch_mean(values):
    """values (B, ...), of this process's images -> the mean over the images of all processes.

    Its gradient is that of this process's images alone: sum_gradients puts all together.
    """
    own = values.sum(0)
    sums = total(torch.cat([own.detach().flatten(), own.new_tensor([len(values)])]))  # (n + 1,)
    return (own + (sums[:-1].view_as(own) - own).detach()) / sums[-1]


def sum_gradients(parameters):
    """Replace each gradient by its sum over all processes."""
    if processes()[1] > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = total(torch.cat([grad.flatten() for grad in grads]))
        for grad, found in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(found.view_as(grad))


def agreed(found):
    """What the first process found, for all of them."""
    box = [found]
    if processes()[1] > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def gathered(names):
    """The union of the processes' names, as a set."""
    if processes()[1] > 1:
        parts = [None] * processes()[1]
        dist.all_gather_object(parts, list(names))
        names = sum(parts, [])
    return set(names)


def own_share(dataset):
    """The items that this process evaluates: each item belongs to exactly one process."""
    rank, count = processes()
    return torch.utils.data.Subset(dataset, range(rank, len(dataset), count))


def find_device(name):
    """torch.device by name; under torchrun each process takes its own GPU. Raises ValueError."""
    if name == "cuda" and processes()[1] > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            # What names no GPU, such as pinned memory, goes to the current one.
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name}: {str(error).splitlines()[0]}") from None


def timed(run, device):
    """run() -> its result, and the seconds that it took, the work of a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def repeatable(seed, device):
    """The same seed gives the same results: on CUDA, sums in a fixed order."""
    torch.manual_seed(seed)
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def amp_dtype(device, amp):
    """bfloat16 on CUDA, float16 where the GPU lacks it, None elsewhere and with --no-amp."""
    if device.type != "cuda" or amp is False:
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def amp_context(device, amp):
    """Autocast to amp_dtype."""
    dtype = amp_dtype(device, amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
