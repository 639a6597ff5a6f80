"""Measuring where it happens, writing where it is read: data wait, images/s, losses; to the screen, JSONL and trackers."""

import contextlib
import datetime
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from inscon import distributed, guard
from inscon.clock import WAIT, now, part, seconds
from inscon.trackers import Trackers


class Stopwatch:
    """Wall time of the loop since the last reading, and how much of it went into waiting for data, seconds. A GPU waits when it has
    nothing left to do: while it works, its host may wait for the next batch."""

    def __init__(self, device: torch.device):
        self._device = device
        self.restart()

    def waits(self, batches: Iterable) -> Iterator:
        """Pass `batches` through, timing each wait."""
        iterator = iter(batches)
        while True:
            start = now(self._device)
            with part(WAIT):
                batch = next(iterator, None)
            if batch is None:
                return
            self._waits.append((start, now(self._device)))
            yield batch

    def restart(self) -> None:
        """What was measured since the last reading never was."""
        self._waits, self._start = [], time.perf_counter()

    def read(self) -> dict[str, float]:
        """`step_s` (mean) and `data_wait_percent` since the last reading, which this one resets, after a wait for the device."""
        elapsed, waits = time.perf_counter() - self._start, self._waits
        self.restart()
        wait_s = sum(seconds(*wait) for wait in waits)
        return {"step_s": elapsed / max(len(waits), 1), "data_wait_percent": 100 * wait_s / elapsed}


class Pace:
    """How long steps take one by one, without pauses and waits for data, to notice a machine that is shared; on a GPU by events in
    its stream."""

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
        """The sentence about a shared machine, once; called after a wait for the device, with the worst rank's data wait."""
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
    """Means of losses and other figures of steps since the last reading. Sums, and the number of steps, stay on the device until
    they are read, so that a captured step adds its own."""

    def __init__(self):
        self._sums, self._names = None, ()

    def add(self, figures: dict[str, Tensor]) -> None:
        """Of one step, 0-d tensors; the same names every time."""
        values = [value.detach().float() for value in figures.values()]
        stacked = torch.stack([torch.ones_like(values[0]), *values])
        if self._sums is None:
            self._sums, self._names = torch.zeros_like(stacked), tuple(figures)
        self._sums += stacked

    def read(self) -> dict[str, float]:
        """One wait for the device, then the means over the steps since the last reading; resets."""
        steps, *sums = self._sums.tolist()
        self._sums.zero_()
        return {name: total / steps for name, total in zip(self._names, sums, strict=True)}


class MetricsLog:
    """Rank 0's sinks: lines on the screen, `metrics.jsonl`, whose lines of steps after `start_step` are dropped, `warnings.jsonl`,
    and the trackers, which are given the `settings`."""

    def __init__(
        self, run_dir: Path, total_steps: int, start_step: int, trackers: Sequence[str] = (), settings: dict | None = None
    ):  # fmt: skip
        self._run_dir, self._total_steps, self._step = Path(run_dir), total_steps, start_step
        self._quiet = distributed.rank() != 0
        logged_step = 0 if self._quiet else _forget_after(start_step, self._run_dir / "metrics.jsonl")
        names = () if self._quiet else trackers
        self._trackers = Trackers(names, self._run_dir, settings or {}, start_step, logged_step, self.say)

    def say(self, text: str) -> None:
        """One line for the person at the screen, on rank 0."""
        if not self._quiet:
            print(text, flush=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log `values` of the window that ended with `step`, counted from 1."""
        self._append("metrics.jsonl", {"step": step, **values})
        self._trackers.log(step, values)
        self._step = step
        eta = datetime.timedelta(seconds=int(values["step_s"] * (self._total_steps - step)))
        self.say(f"step {step}/{self._total_steps}  {_line(values)}  ETA {eta}")

    def warn(self, step: int, sentence: str) -> None:
        """A sentence about what looks wrong at `step`: on the screen, and a line {"step", "warning"} of `warnings.jsonl`."""
        self._append("warnings.jsonl", {"step": step, "warning": sentence})
        self.say(f"warning at step {step}: {sentence}")

    def close(self) -> None:
        """Tell the trackers that the run ends here, finished or not."""
        self._trackers.close(finished=self._step == self._total_steps)

    def _append(self, name: str, line: dict) -> None:
        if not self._quiet:
            with guard.naming(self._run_dir / name), open(self._run_dir / name, "a") as file:
                file.write(json.dumps(line) + "\n")


def window(
    losses: LossMeter, watch: Stopwatch, images_per_step: int, lr: float, loader: dict[str, float] | None = None,
    full_rate: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Everything logged for one window: losses as means over ranks, times as the worst rank, rate in source images/s, MFU as the
    share of `full_rate`, at which the devices would do nothing but matrix products, and what the pipeline says of itself, `loader`:
    the worst rank too, but for `loader_substituted`, a sum."""
    values = distributed.mean(losses.read())  # waits for the device, so that the watch below sees finished work
    times = distributed.worst(watch.read())
    rate = images_per_step / times["step_s"]
    values |= times | {"images_per_s": rate, "lr": lr}
    if full_rate is not None and rate <= full_rate:  # else others had the machine while the full rate was measured
        values["mfu_percent"] = 100 * rate / full_rate
    if loader:
        counted = distributed.total({"loader_substituted": loader.pop("loader_substituted", 0.0)})
        values |= distributed.worst(loader) | counted
    return values


def _forget_after(step: int, path: Path) -> int:
    """Drop the lines of later steps, and one that a kill cut short. Returns the last step there was."""
    lines = path.read_text().splitlines() if path.exists() else []
    steps = {line: json.loads(line)["step"] for line in lines if line.endswith("}")}
    with guard.whole_file(path) as file:
        file.write("".join(f"{line}\n" for line, of in steps.items() if of <= step).encode())
    return max(steps.values(), default=0)


def _line(values: dict[str, float]) -> str:
    parts = [f"loss {values['loss']:.3f}"]
    for name in (name.removeprefix("loss_") for name in values if name.startswith("loss_")):
        top1 = f" (top-1 {100 * values[f'top1_{name}']:.0f} %)" if f"top1_{name}" in values else ""
        parts.append(f"{name} {values[f'loss_{name}']:.3f}{top1}")
    parts += [f"{values['images_per_s']:.1f} images/s", f"data wait {values['data_wait_percent']:.1f} %"]
    if "mfu_percent" in values:
        parts.append(f"MFU {values['mfu_percent']:.0f} %")
    if "knn" in values:
        parts.append(f"kNN {100 * values['knn']:.1f} %")
    if values.get("loader_substituted"):
        parts.append(f"{values['loader_substituted']:.0f} samples substituted")
    return "  ".join(parts)
