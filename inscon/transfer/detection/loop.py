"""The fine-tuning loop: SGD, warm-up, two steps down; a stopped run goes on as if nothing had been.

What an iteration draws depends on the seed and its number alone, so a checkpoint holds weights, momentum and the scaler.
A folder receives `checkpoints/step-*.pt`, enough to build the detector again, and `metrics.jsonl`.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from inscon import checkpoint, guard
from inscon.precision import Precision
from inscon.transfer.detection.batches import Batch, TrainBatches, load, to_device
from inscon.transfer.detection.coco import CocoSet
from inscon.transfer.detection.models import Design, build

BASE_BATCH = 16
STEPS = (2 / 3, 8 / 9)
"""Shares of the iterations after which the learning rate is a tenth: 60k and 80k of COCO's 90k."""
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
WARMUP_FACTOR = 0.001
"""Of the learning rate, at iteration 0."""
KEPT = 2
"""Checkpoints."""


class FineTuningError(ValueError):
    """A fine-tuning that can't begin or go on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a fine-tuning depends on, beside detector and data."""

    iterations: int = 90_000
    batch_size: int = 16
    base_lr: float = 0.02
    """For 16 images; `lr` is what is used."""
    warmup: int = 1000
    """Iterations in which the learning rate grows linearly; at most a tenth of all."""
    short_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Of the images, px; one is drawn for each."""
    seed: int = 0

    def __post_init__(self):
        for name in ("iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise FineTuningError(f"{name} must be at least 1. Found: {getattr(self, name)}")
        if not (0 < self.base_lr < math.inf):
            raise FineTuningError(f"base_lr must be greater than 0. Found: {self.base_lr}")
        if self.warmup < 0:
            raise FineTuningError(f"warmup must be at least 0. Found: {self.warmup}")
        if not self.short_sides or min(self.short_sides) < 32:
            raise FineTuningError(f"min_size must be sides of at least 32 px. Found: {self.short_sides}")

    @property
    def lr(self) -> float:
        """Of this batch size: proportional to it."""
        return self.base_lr * self.batch_size / BASE_BATCH

    def lr_at(self, iteration: int) -> float:
        lr = self.lr * 0.1 ** sum(iteration >= round(share * self.iterations) for share in STEPS)
        warmup = min(self.warmup, self.iterations // 10)
        if iteration < warmup:
            lr *= WARMUP_FACTOR + (1 - WARMUP_FACTOR) * iteration / warmup
        return lr


class FineTuning:
    """A fine-tuning between two iterations; `iteration` is the next one, counted from 0.

    Args:
        start: what the trunk began as, {"what", "digest"}.
        folder: an earlier part of the same run in it is gone on from; FineTuningError if it is of another run.
    """

    def __init__(
        self, model: GeneralizedRCNN, design: Design, schedule: Schedule, start: dict[str, str], data: CocoSet,
        folder: Path, device: torch.device, precision: Precision,
    ):  # fmt: skip
        if not data.trainable():
            raise FineTuningError(
                f"none of the {len(data)} images of {data.json} has a box to learn from; give another json"
            )
        self.schedule, self.folder, self.device, self.precision = schedule, Path(folder), device, precision
        self.model = model.to(device=device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(_groups(self.model), lr=schedule.lr, momentum=MOMENTUM)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.needs_scaler)
        self.iteration = 0
        self._batches = TrainBatches(data, design.has_masks, schedule.seed, schedule.batch_size, schedule.short_sides)
        self._identity = {
            "arch": design.arch, "trunk": design.trunk, "weights": start["digest"], "train data": data.fingerprint,
            **asdict(schedule), "sides": [design.test_side, design.max_side], "rois": design.rois, "proposals": design.proposals,
        }  # fmt: skip
        self._about = {"design": design.to_dict(), "start": start}
        self._resume()

    def train(
        self, checkpoint_every: int = 1000, log_every: int = 20, workers: int = 0,
        say: Callable[[int, dict[str, float]], None] = lambda done, figures: None, stop: int | None = None,
        stall_timeout: float = 600.0,
    ) -> str | None:  # fmt: skip
        """The iterations that are left, or up to `stop`. `say(done, figures)` is called after each one.

        On SIGTERM or Ctrl-C it finishes the iteration, writes a checkpoint and returns the signal's name.
        """
        total = self.schedule.iterations if stop is None else min(stop, self.schedule.iterations)
        loaded = load(map(self._batches.work, range(self.iteration, total)), workers, stall_timeout)
        clock, since = time.perf_counter(), self.iteration
        with guard.stop_requests() as asked, contextlib.closing(loaded) as batches:
            for iteration, batch in zip(range(self.iteration, total), batches):
                figures = self.step(iteration, batch)
                done = self.iteration = iteration + 1
                stopping = asked.requested
                last = asked.final = stopping or done == total
                if done % log_every == 0 or last:
                    speed = self.schedule.batch_size * (done - since) / (time.perf_counter() - clock)
                    clock, since = time.perf_counter(), done
                    self._record({"iteration": done, **figures, "images_per_s": round(speed, 2)})
                if done % checkpoint_every == 0 or last:
                    self._save()
                say(done, figures)
                if stopping:
                    return asked.name
        return None

    def step(self, iteration: int, batch: Batch) -> dict[str, float]:
        """One iteration; its losses by name, `loss`, their sum, and `lr`. FineTuningError for a loss that is not finite."""
        torch.manual_seed((self.schedule.seed << 32) + iteration)  # of the boxes that are sampled
        self.model.train()
        lr = self.schedule.lr_at(iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, self.precision.autocast_dtype, enabled=self._mixed):
            losses = self.model(*to_device(batch, self.device))
        loss = sum(losses.values())
        figures = {
            "loss": float(loss.detach()),
            **{name: float(value.detach()) for name, value in losses.items()},
            "lr": lr,
        }
        if not math.isfinite(figures["loss"]):
            bad = [name for name in losses if not math.isfinite(figures[name])]
            raise FineTuningError(
                f"the loss is not finite any more. Found: {figures['loss']} ({', '.join(bad)}) at iteration {iteration} with lr "
                f"{lr:g}; {self._slower}"
            )
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return figures

    @property
    def _slower(self) -> str:
        return f"set a smaller --base-lr than {self.schedule.base_lr:g}, or a longer --warmup, and another --out"

    @property
    def _mixed(self) -> bool:
        return self.precision.autocast_dtype is not None

    def _save(self) -> None:
        contents = {
            "step": self.iteration, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "identity": self._identity, **self._about,
        }  # fmt: skip
        try:
            checkpoint.save(self.folder, contents, KEPT)
        except FloatingPointError as error:
            raise FineTuningError(f"{error}; {self._slower}") from None

    def _resume(self) -> None:
        path = checkpoint.latest(self.folder)
        if path is None:
            self._forget_after(0)
            return
        held = checkpoint.load(path, self.device)
        if "identity" not in held:
            raise FineTuningError(f"{path} is a pre-training's; set another --out, where nothing is yet")
        different = [name for name, value in self._identity.items() if held["identity"].get(name) != value]
        if different:
            raise FineTuningError(
                f"{path} is of a fine-tuning with another {' and '.join(different)}; set another --out, or the old settings to go "
                "on"
            )
        self.model.load_state_dict(held["model"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.scaler.load_state_dict(held["scaler"])
        self.iteration = held["step"]
        self._forget_after(self.iteration)

    def _record(self, line: dict[str, int | float]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        with guard.naming(path), open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _forget_after(self, iteration: int) -> None:
        """Drop the metrics of iterations that will be done again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _iteration_of(line) <= iteration]
            with guard.whole_file(path) as file:
                file.write("".join(line + "\n" for line in kept).encode())


def load_detector(folder: Path) -> tuple[GeneralizedRCNN, Design, dict]:
    """The newest detector of a fine-tuning's folder, in eval mode, and {"start", "step"}; `models.build` says how to use it.

    Raises CheckpointError or FineTuningError.
    """
    folder = Path(folder)
    path = checkpoint.latest(folder) or folder / "checkpoints/step-*.pt"
    held = checkpoint.load(path)
    if "design" not in held:
        raise FineTuningError(f"{path} is a pre-training's, no detector; give the --out folder of a fine-tuning")
    design = Design.from_dict(held["design"])
    model = build(design)
    model.load_state_dict(held["model"], strict=True)
    return model.eval(), design, {"start": held["start"], "step": held["step"]}


def _groups(model: nn.Module) -> list[dict]:
    """BatchNorm's own weights are not decayed, as in detectron2."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in norms], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if id(p) in norms], "weight_decay": 0.0},
    ]


def _iteration_of(line: str) -> int | float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError):
        return math.inf  # half a line of a run that was killed
