"""One training run in the folder --out: its log, its saves, resuming, Ctrl-C."""

import io
import math
import time

import torch

from . import batching, runtime, weights

SAVE_EVERY = 60  # seconds


class Run:
    """Counts steps, writes log.csv, and last.pt at the start, every minute and at the end.

    parts: name -> what has state_dict and load_state_dict; columns: those of log.csv. With --resume
    all parts are as they were when last.pt was saved. Use it in a `with`: inside, Ctrl-C ends the
    step that runs, saves and stops.
    """

    def __init__(self, args, parts, total_steps, columns):
        self.args = args
        self.parts = parts
        self.total_steps = total_steps
        self.columns = ("step", *columns)
        self.step = 0
        self.landed = False
        self.overflows = 0
        self.skipped = set()
        self.interrupts = runtime.Interrupts()
        log = args.out / "log.csv"
        lines = [",".join(self.columns) + "\n"]
        saved = load_checkpoint(args) if args.resume else None
        if saved:
            for name, part in parts.items():
                if saved[name]:  # a scaler that had nothing to do saves nothing
                    part.load_state_dict(saved[name])
            self.step, self.landed = saved["step"], saved["landed"]
            self.overflows, self.skipped = saved["overflows"], set(saved["skipped"])
            if log.exists():
                # Steps after the last save are done again, and logged again.
                lines = log.read_text().splitlines(True)[: 1 + self.step]
        self.first_step = self.step
        self.progress = runtime.Progress()
        self.saved_at = time.time()
        if not saved:
            self.save()
            if runtime.processes()[0] == 0:
                for name in ("thresholds.json", "metrics.json"):
                    (args.out / name).unlink(missing_ok=True)
        runtime.write_file(log, "".join(lines))

    def __enter__(self):
        self.interrupts.__enter__()
        return self

    def __exit__(self, *error):
        self.interrupts.__exit__(*error)

    def save(self):
        """Write last.pt, whole."""
        if runtime.processes()[0] > 0:
            return
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"step": self.step, "landed": self.landed, "overflows": self.overflows}
        content |= {"skipped": sorted(self.skipped), "settings": settings(self.args)}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        runtime.write_file(self.args.out / "last.pt", buffer.getbuffer())
        self.saved_at = time.time()

    def end_step(self, values, text):
        """Count a step, log values (in the order of columns), show text; save if it is time."""
        self.step += 1
        cells = ["" if value is None else f"{value:.6g}" for value in values]
        row = ",".join([str(self.step), *cells])
        runtime.write_file(self.args.out / "log.csv", row + "\n", append=True)
        done, total = self.step - self.first_step, self.total_steps - self.first_step
        interrupted = self.interrupts.any()
        if interrupted:
            self.save()
        self.progress.show(f"train: step {self.step}/{self.total_steps}, {text}", done, total)
        if interrupted:
            runtime.stop(
                f"stopped after step {self.step} of {self.total_steps}; the same command with "
                "--resume goes on from there",
                130,
            )
        if self.step == self.total_steps or time.time() - self.saved_at > SAVE_EVERY:
            self.save()

    def batches(self, dataset, image_size, device):
        """Images (B, 3, S, S) and labels (B,) of every step that is left, of this process.

        dataset: a batching.Augmented. A process without an image of a batch gets another's, which
        `mean` leaves out. A batch without any good image is skipped.
        """
        me, count = runtime.processes()
        size = self.args.batch_size * count
        per_epoch = math.ceil(len(dataset) / size)
        while self.step < self.total_steps:
            epoch, done = divmod(self.step, per_epoch)
            batches = batching.epoch_batches(len(dataset), size, epoch, self.args.seed)[done:]
            own = [batch[me::count] or batch[:1] for batch in batches]
            loader = batching.make_loader(dataset, self.args, device, batch_sampler=own)
            for batch, (images, labels) in zip(batches, loader, strict=True):
                self.count = len(labels) if batch[me::count] else 0
                if self.args.skip_bad_images:
                    self.skipped |= runtime.gathered(loader.bad.values())
                    if not runtime.total(torch.tensor(self.count)).item():
                        self.end_step([None] * (len(self.columns) - 1), "no image could be read")
                        continue
                if not len(labels):
                    images = torch.zeros(1, 3, image_size, image_size)
                    labels = torch.zeros(1, dtype=torch.long)
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def mean(self, values):
        """values (B,) of this step's images -> their mean over all processes; see batch_mean."""
        return runtime.batch_mean(values[: self.count])

    def check_finite(self, loss, parameters, scaler=None):
        """Stop the run, saved as it is, where the loss or a gradient is not finite."""
        norms = [p.grad.norm() for p in parameters if p.grad is not None]
        finite = all(norm.isfinite() for norm in norms)
        # Infinity in a float16 gradient is no fault while the scale can still be lowered.
        if loss.isfinite() and (finite or (scaler and scaler.get_scale() > 1)):
            self.overflows += not finite
            return
        self.save()
        what = f"the loss is {loss.item():g}" if finite else "a gradient is not finite"
        runtime.stop(f"{what} at step {self.step + 1}; last.pt holds the state before it", 1)


def check_folder(args):
    """Raise ValueError where --out holds a run, and neither --resume nor --overwrite is given."""
    if args.resume:
        load_checkpoint(args)
    elif (args.out / "last.pt").exists() and not args.overwrite:
        raise ValueError(
            f"{args.out} holds a run already: --resume goes on with it, --out DIR begins another, "
            "--overwrite replaces it"
        )


def settings(args):
    """What must be the same when a run is resumed."""
    free = ("resume", "overwrite", "out", "workers", "device", "skip_bad_images")
    # What comes behind learning.
    free += ("landing", "limit_val")
    found = {name: value for name, value in vars(args).items() if name not in free}
    return {"processes": runtime.processes()[1]} | found


def load_checkpoint(args):
    """The content of last.pt in --out. Raises ValueError where it is none, or of another run."""
    path = args.out / "last.pt"
    if not path.is_file():
        raise ValueError(f"nothing to resume: no {path}; without --resume a run begins")
    saved = weights.read_file(path)
    expected = {"model", "step", "landed", "overflows", "skipped", "settings"}
    if not isinstance(saved, dict) or not expected <= saved.keys():
        raise ValueError(
            f"{path} is no last.pt of this version of train.py: begin anew, with --overwrite in "
            "place of --resume, or without this file"
        )
    if saved["landed"] and not args.landing:
        raise ValueError(f"{path} holds thresholds that have landed: --no-landing comes too late")
    for name, value in settings(args).items():
        before = saved["settings"].get(name)
        if before != value:
            raise ValueError(
                f"{path} was made with {name} = {before}, not {value}: "
                "resume with the same settings"
            )
    return saved
