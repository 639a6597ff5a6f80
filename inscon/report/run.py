"""What a run's own metrics say about its speed: rates from enough log windows, the warm-up left out, or no rate at all."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

WARM_UP_WINDOWS, FEWEST_WINDOWS = 1, 5
"""Log windows left out at the start (pools, the first batch), and how many more a rate needs."""


def read_metrics(run_dir: Path) -> list[dict]:
    """The windows of a run, oldest first. ValueError where there are none, or a line is broken."""
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


def run_speed(windows: list[dict]) -> dict:
    """Medians over log windows, by the names that they have in metrics.jsonl; `step_ms`, `step_ms_p99`; `losses`: the highest and
    the last of each, since early ones are low where queues still hold noise. ValueError where windows are too few for a rate.

    mfu_percent is None for a run of before it was logged, and where a window is above 100 %: its full rate was measured too low.
    """
    steady = windows[WARM_UP_WINDOWS:]
    if len(steady) < FEWEST_WINDOWS:
        raise ValueError(
            f"a rate needs at least {FEWEST_WINDOWS + WARM_UP_WINDOWS} log windows, the first of them warm-up. "
            f"Found: {len(windows)}; train longer or set a smaller --log-every"
        )
    last, mfu = windows[-1], [window.get("mfu_percent") for window in steady]
    names = [name for name in last if name in ("images_per_s", "data_wait_percent") or name.startswith("loader_")]
    step_ms = [1e3 * window["step_s"] for window in steady]
    return {
        "windows": len(steady),
        "steps": last["step"] - windows[WARM_UP_WINDOWS - 1]["step"],
        **{name: statistics.median(window.get(name, 0.0) for window in steady) for name in names},
        "step_ms": statistics.median(step_ms),
        "step_ms_p99": percentile_99(step_ms),
        "mfu_percent": None if any(one is None or one > 100 for one in mfu) else statistics.median(mfu),
        "losses": {
            name: (max(window.get(name, last[name]) for window in windows), last[name])
            for name in last
            if name.startswith("loss_")
        },
    }


def percentile_99(values: Sequence[float]) -> float:
    return sorted(values)[round(0.99 * (len(values) - 1))]
