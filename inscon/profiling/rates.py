"""What a run's metrics say about its speed: rates from enough steps, warm-up left out, or no rate at all."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path

WARM_UP_WINDOWS = 1
"""Log windows left out at the start: compilation, memory pools, the first batch."""
FEWEST_WINDOWS = 5
"""Log windows below which no rate is given."""
FEWEST_STEPS = 10
"""Measured steps below which no rate is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpeed:
    """Medians over log windows, and how the losses moved."""

    windows: int
    steps: int
    images_per_s: float
    step_ms: float
    step_ms_p99: float
    data_wait_percent: float
    mfu_percent: float | None
    """None for runs of before it was logged, and where a window is above 100 %: the rate it is a share of was measured too low."""
    loader: dict[str, float]
    """What the pipeline said of itself, without the loader_ of its names: see `pipelines.feed.Pipeline.read`."""
    first: dict[str, float]
    """The values of the first window in which every negative was a real key: fresh queues hold noise, an easy start."""
    last: dict[str, float]
    """The values of the last window."""


def read_metrics(run_dir: Path) -> list[dict]:
    """The windows of a run, oldest first. Raises ValueError if there is no metrics.jsonl."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"there are no metrics at {path}; give the --run-dir of a run")
    lines, windows = path.read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            windows.append(json.loads(line))
        except ValueError:
            if number < len(lines):  # the last one may have been cut short by a kill
                raise ValueError(f"line {number} of {path} is broken; remove it, and report again") from None
    return windows


def run_speed(windows: list[dict], fill_steps: int) -> RunSpeed:
    """Summarise the windows of one run whose queues are full of keys after `fill_steps` steps.

    Raises ValueError if the windows are too few to give a rate.
    """
    steady = windows[WARM_UP_WINDOWS:]
    if len(steady) < FEWEST_WINDOWS:
        raise ValueError(
            f"a rate needs at least {FEWEST_WINDOWS + WARM_UP_WINDOWS} log windows, the first of them warm-up. "
            f"Found: {len(windows)}; train longer or set a smaller --log-every"
        )
    step_ms = sorted(1000 * window["step_s"] for window in steady)
    return RunSpeed(
        windows=len(steady),
        steps=steady[-1]["step"] - windows[WARM_UP_WINDOWS - 1]["step"],
        images_per_s=statistics.median(window["images_per_s"] for window in steady),
        step_ms=statistics.median(step_ms),
        step_ms_p99=step_ms[min(round(0.99 * (len(step_ms) - 1)), len(step_ms) - 1)],
        data_wait_percent=statistics.median(window["data_wait_percent"] for window in steady),
        mfu_percent=_mfu(steady),
        loader={
            name.removeprefix("loader_"): statistics.median(window.get(name, 0.0) for window in steady)
            for name in steady[-1]
            if name.startswith("loader_")
        },
        first=next((now for before, now in itertools.pairwise(windows) if before["step"] >= fill_steps), windows[-1]),
        last=windows[-1],
    )


def _mfu(windows: list[dict]) -> float | None:
    logged = [window.get("mfu_percent") for window in windows]
    return None if any(mfu is None or mfu > 100 for mfu in logged) else statistics.median(logged)


def check_steps(steps: int, warm_up: int, fewest: int = FEWEST_STEPS) -> None:
    """ValueError where so many steps would give no rate worth printing."""
    if steps < fewest:
        raise ValueError(
            f"a rate needs at least {fewest} steps after the warm-up. Found: {steps}; set --steps {fewest} or more"
        )
    if warm_up < 2:
        raise ValueError(f"the first 2 steps at least are warm-up. Found: {warm_up}; set --warm-up 2 or more")


PACKAGES = ("numpy", "numba", "torch", "torchvision", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "ffcv")
"""Whose versions a figure depends on."""


def machine() -> dict[str, str | int]:
    """The hardware that a figure was measured on: CPU, cores this process may use, system, GPU if there is one."""
    import torch  # seconds, which a refusal does not wait for

    model = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {"cpu": model, "cores": cores, "system": platform.system()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Python's, and those of the installed ones of PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
