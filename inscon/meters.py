"""Measuring where it happens, writing where it is read: data wait, images/s, losses; to the screen, JSONL and TensorBoard."""

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from inscon import distributed, guard
from inscon.clock import WAIT, now, part, seconds


class Stopwatch:
    """Wall time of the loop since the last reading, and how much of it went into waiting for data, seconds."""

    def __init__(self):
        self.steps, self.wait_s, self._start = 0, 0.0, time.perf_counter()

    def waits(self, batches: Iterable) -> Iterator:
        """Pass `batches` through, timing each wait."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                with part(WAIT):
                    batch = next(iterator)
            except StopIteration:
                return
            self.wait_s += time.perf_counter() - start
            self.steps += 1
            yield batch

    def restart(self) -> None:
        """The time since the last reading never was."""
        self._start = time.perf_counter() - self.wait_s

    def read(self) -> dict[str, float]:
        """`step_s` (mean) and `data_wait_percent` since the last reading, which this one resets."""
        elapsed, steps = time.perf_counter() - self._start, max(self.steps, 1)
        reading = {"step_s": elapsed / steps, "data_wait_percent": 100 * self.wait_s / elapsed}
        self.steps, self.wait_s, self._start = 0, 0.0, time.perf_counter()
        return reading


class Pace:
    """How long steps take one by one, to notice a machine that is shared. Pauses between steps, and waits for data, are left out.

    On a GPU the times are the device's, by events in its stream; they are read when it has been waited for anyway.
    """

    FIRST, ENOUGH, KEPT = 10, 40, 200
    """Steps: left out at the start, where everything happens for the first time; needed for a verdict; that it is about."""
    LITTLE_WAIT = 5.0
    """Percent of the time that steps may wait for data at most: where they wait longer, the loader is what varies."""

    def __init__(self, device: torch.device):
        self._device, self._steps, self._said = device, 0, False
        self._marks, self._took_s = deque(maxlen=self.KEPT), deque(maxlen=self.KEPT)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        start = now(self._device)
        yield
        self._steps += 1
        if self._steps > self.FIRST and not self._said:
            self._marks.append((start, now(self._device)))

    def look(self, data_wait_percent: float) -> list[str]:
        """The sentence about a shared machine, once; to be called after a wait for the device, with the worst rank's data wait
        since the last look."""
        if data_wait_percent <= self.LITTLE_WAIT:
            self._took_s.extend(seconds(*mark) for mark in self._marks)
        self._marks.clear()
        sentence = unsteady(self._took_s) if len(self._took_s) >= self.ENOUGH and not self._said else None
        self._said = self._said or sentence is not None
        return [sentence] if sentence else []


SEVERAL = 3.0
"""How many times as long as the fastest tenth of steps the slowest one takes, at least, where a machine is shared."""


def unsteady(took_s: Sequence[float]) -> str | None:
    """What to say of steps that took so long, or None where they took about equally long. A few slow ones are always met."""
    ordered = sorted(took_s)
    fast, slow = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    if slow < SEVERAL * fast:
        return None
    return (
        f"this machine seems to be shared: of {len(ordered)} steps that hardly waited for data, the slowest tenth took "
        f"{slow:.3g} s and more, {slow / fast:.1f} times the {fast:.3g} s of the fastest tenth, so the speeds logged here are not "
        "the machine's own; end what else runs on it, or ask for cores and GPUs of your own"
    )


class LossMeter:
    """Means of losses and other figures of steps since the last reading; sums stay on the device until they are read."""

    def __init__(self):
        self._sum, self._steps, self._names = None, 0, ()

    def add(self, figures: dict[str, Tensor]) -> None:
        """Of one step, 0-d tensors; the same names every time."""
        stacked = torch.stack([value.detach().float() for value in figures.values()])
        self._sum = stacked if self._sum is None else self._sum + stacked
        self._names, self._steps = tuple(figures), self._steps + 1

    def read(self) -> dict[str, float]:
        """One wait for the device, then the means over the steps since the last reading; resets."""
        means = (self._sum / self._steps).tolist()
        self._sum, self._steps = None, 0
        return dict(zip(self._names, means))


class MetricsLog:
    """Rank 0's sinks: a progress bar and log lines (rich), `metrics.jsonl`, TensorBoard if installed and wanted.

    Args:
        run_dir: receives the files.
        total_steps: of the whole run.
        start_step: lines of later steps in an existing metrics.jsonl are dropped: they will be written again.
    """

    def __init__(
        self, run_dir: Path, total_steps: int, start_step: int, tensorboard: bool, console: Console | None = None
    ):
        self._quiet = distributed.rank() != 0
        self._total_steps, self._tensorboard = total_steps, None
        if self._quiet:
            return
        self.console = console or Console()
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._file = _open_jsonl(run_dir / "metrics.jsonl", start_step)
        if tensorboard:
            self._tensorboard = _open_tensorboard(run_dir / "tensorboard", start_step, self.console)
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total_steps, completed=start_step)
        self._progress.start()

    def say(self, text: str) -> None:
        """One line for the person at the screen, on rank 0."""
        if not self._quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log `values` of the window that ended with `step`, counted from 1."""
        if self._quiet:
            return
        with guard.naming(self._run_dir / "metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(_tag(name), value, step)
        eta_s = values["step_s"] * (self._total_steps - step)
        self._progress.update(self._task, completed=step, description=f"ETA {_clock(eta_s)}")
        self.say(f"step {step}/{self._total_steps}  {_line(values)}  ETA {_clock(eta_s)}")

    def warn(self, step: int, sentence: str) -> None:
        """A sentence about what looks wrong at `step`: on the screen, and a line {"step", "warning"} of `warnings.jsonl`."""
        if self._quiet:
            return
        path = self._run_dir / "warnings.jsonl"
        with guard.naming(path), open(path, "a") as file:
            file.write(json.dumps({"step": step, "warning": sentence}) + "\n")
        self.say(f"warning at step {step}: {sentence}")

    def close(self) -> None:
        if self._quiet:
            return
        self._progress.stop()
        with contextlib.suppress(OSError):  # what cannot be written has been told by `write`
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def window(
    losses: LossMeter,
    watch: Stopwatch,
    images_per_step: int,
    lr: float,
    loader: dict[str, float] | None = None,
    full_rate: float | None = None,
) -> dict[str, float]:
    """Everything logged for one window: losses as means over ranks, times as the worst rank, rate in source images/s.

    `full_rate` is the rate at which the devices would do nothing but matrix products: MFU is the share of it.
    `loader` is what the pipeline says of itself: the worst rank too, but for `loader_substituted`, a sum.
    """
    values = distributed.mean(losses.read())  # waits for the device, so that the watch below sees finished work
    times = distributed.worst(watch.read())
    values = {**values, **times, "images_per_s": images_per_step / times["step_s"], "lr": lr}
    if full_rate is not None:
        mfu = 100 * values["images_per_s"] / full_rate
        values |= (
            {"mfu_percent": mfu} if mfu <= 100 else {}
        )  # above: others had the machine while the full rate was measured
    if loader:
        counted = distributed.total({"loader_substituted": loader.pop("loader_substituted", 0.0)})
        values |= distributed.worst(loader) | counted
    return values


def _open_jsonl(path: Path, start_step: int):
    kept = []
    if path.exists() and start_step:
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
    path.write_text("".join(line + "\n" for line in kept))
    return open(path, "a")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # a line cut short by a kill
        return math.inf


def _open_tensorboard(folder: Path, start_step: int, console: Console):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("TensorBoard files are not written: the tensorboard package is not installed")
        return None
    return SummaryWriter(str(folder), purge_step=start_step + 1)


def _tag(name: str) -> str:
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in ("loss", "top1") and rest else f"run/{name}"


def _line(values: dict[str, float]) -> str:
    losses = "  ".join(_part(name[5:], values) for name in values if name.startswith("loss_"))
    return (
        f"loss {values['loss']:.3f}  {losses}  {values['images_per_s']:.1f} images/s  "
        f"data wait {values['data_wait_percent']:.1f} %"
        + (f"  MFU {values['mfu_percent']:.0f} %" if "mfu_percent" in values else "")
        + (f"  kNN {100 * values['knn']:.1f} %" if "knn" in values else "")
        + (f"  {values['loader_substituted']:.0f} samples substituted" if values.get("loader_substituted") else "")
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _part(name: str, values: dict[str, float]) -> str:
    top1 = values.get(f"top1_{name}")
    return f"{name} {values[f'loss_{name}']:.3f}" + ("" if top1 is None else f" (top-1 {100 * top1:.0f} %)")
