"""The fine-tuning loop: SGD, warm-up, two steps down; a stopped run goes on as if nothing had been.

What an iteration draws depends on the seed and its number alone, so a checkpoint holds weights, momentum and the scaler.
A folder receives `checkpoints/step-*.pt`, enough to build the detector again, and `metrics.jsonl`.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN

from inscon import checkpoint, guard
from inscon.precision import Precision
from inscon.transfer.detection.batches import Batch, decide, load, to_device, work_of
from inscon.transfer.detection.coco import CocoSet
from inscon.transfer.detection.models import Design, Protocol, build

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


def full_lr(protocol: Protocol) -> float:
    """The learning rate of this batch size: proportional to it."""
    return protocol.base_lr * protocol.batch_size / BASE_BATCH


def lr_at(protocol: Protocol, iteration: int) -> float:
    lr = full_lr(protocol) * 0.1 ** sum(iteration >= round(share * protocol.iterations) for share in STEPS)
    warmup = min(protocol.warmup, protocol.iterations // 10)
    if iteration < warmup:
        lr *= WARMUP_FACTOR + (1 - WARMUP_FACTOR) * iteration / warmup
    return lr


class FineTuning:
    """A fine-tuning between two iterations; `iteration` is the next one, counted from 0.

    Args:
        model: (images, targets) -> losses by name.
        start: what the backbone began as, {"what", "digest"}.
        folder: an earlier part of the same run in it is gone on from; FineTuningError if it is of another run.
    """

    def __init__(
        self, model: nn.Module, design: Design, start: dict[str, str], data: CocoSet, folder: Path,
        device: torch.device, precision: Precision,
    ):  # fmt: skip
        self.data = data.part(data.trainable())
        if not len(self.data):
            raise FineTuningError(
                f"none of the {len(data)} images of {data.json} has a box to learn from; give another json"
            )
        self.design, self.folder, self.device, self.precision = design, Path(folder), device, precision
        self.model = model.to(device=device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(_groups(self.model), lr=full_lr(design), momentum=MOMENTUM)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.needs_scaler)
        self.iteration = 0
        self._about = {"design": dataclasses.asdict(design), "start": start, "train data": data.fingerprint}
        self._resume()

    def train(
        self, checkpoint_every: int = 1000, log_every: int = 20, workers: int = 0,
        say: Callable[[int, dict[str, float]], None] = lambda done, figures: None, stop: int | None = None,
        stall_timeout: float = 600.0,
    ) -> str | None:  # fmt: skip
        """The iterations that are left, or up to `stop`. `say(done, figures)` is called after each one.

        On SIGTERM or Ctrl-C it finishes the iteration, writes a checkpoint and returns the signal's name.
        """
        left = range(self.iteration, self.design.iterations if stop is None else stop)
        clock, since = time.perf_counter(), self.iteration
        loaded = load(map(self._work, left), workers, stall_timeout)
        with guard.stop_requests() as asked, contextlib.closing(loaded) as batches:
            for iteration, batch in zip(left, batches):
                figures = self.step(iteration, batch)
                done = self.iteration = iteration + 1
                stopping = asked.requested
                last = asked.final = stopping or done == left.stop
                if done % log_every == 0 or last:
                    speed = self.design.batch_size * (done - since) / (time.perf_counter() - clock)
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
        torch.manual_seed((self.design.seed << 32) + iteration)  # of the boxes that are sampled
        self.model.train()
        lr, amp_dtype = lr_at(self.design, iteration), self.precision.autocast_dtype
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, amp_dtype, enabled=amp_dtype is not None):
            losses = self.model(*to_device(batch, self.device))
        loss = sum(losses.values())
        figures = {name: float(value.detach()) for name, value in {"loss": loss, **losses}.items()}
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            raise FineTuningError(
                f"the loss is not finite any more. Found: {figures['loss']} ({', '.join(bad[1:])}) at iteration {iteration} with "
                f"lr {lr:g}; {self._slower}"
            )
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {**figures, "lr": lr}

    def _work(self, iteration: int) -> Callable[[], Batch]:
        design = self.design
        draws = decide(design.seed, iteration, design.batch_size, len(self.data), design.min_size)
        return work_of(self.data, draws, design.has_masks)

    @property
    def _slower(self) -> str:
        return f"set a smaller --base-lr than {self.design.base_lr:g}, or a longer --warmup, and another --out"

    def _save(self) -> None:
        contents = {
            "step": self.iteration, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), **self._about,
        }  # fmt: skip
        try:
            checkpoint.save(self.folder, contents, KEPT)
        except FloatingPointError as error:
            raise FineTuningError(f"{error}; {self._slower}") from None

    def _resume(self) -> None:
        path = checkpoint.latest(self.folder)
        if path is not None:
            held = checkpoint.load(path, self.device)
            self._check_same(path, held)
            self.model.load_state_dict(held["model"])
            self.optimizer.load_state_dict(held["optimizer"])
            self.scaler.load_state_dict(held["scaler"])
            self.iteration = held["step"]
        self._forget_after(self.iteration)

    def _check_same(self, path: Path, held: dict) -> None:
        if "design" not in held:
            raise FineTuningError(f"{path} is a pre-training's; set another --out, where nothing is yet")
        before, now = (
            {**about["design"], "weights": about["start"]["digest"], "train data": about["train data"]}
            for about in (held, self._about)
        )
        different = [name for name, value in now.items() if before.get(name) != value]
        if different:
            raise FineTuningError(
                f"{path} is of a fine-tuning with another {' and '.join(different)}; set another --out, or the old settings to go "
                "on"
            )

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


def load_detector(folder: Path) -> tuple[FasterRCNN, Design, dict]:
    """The newest detector of a fine-tuning's folder, in eval mode, and {"start", "step"}; `models.build` says how to use it.

    Raises CheckpointError or FineTuningError.
    """
    path = checkpoint.latest(folder) or Path(folder) / "checkpoints/step-*.pt"
    held = checkpoint.load(path)
    if "design" not in held:
        raise FineTuningError(f"{path} is a pre-training's, no detector; give the --out folder of a fine-tuning")
    design = Design(**held["design"])
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
