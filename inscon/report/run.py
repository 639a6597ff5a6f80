"""What a run's own metrics say about its speed: medians over enough log windows, the warm-up left out, or nothing at all."""

import json
import statistics
from pathlib import Path

WARM_UP_WINDOWS, FEWEST_WINDOWS = 1, 5
"""Log windows left out at the start (pools, the first batch), and how many more a rate needs."""


def read_metrics(run_dir: Path) -> list[dict]:
    """The windows of a run, oldest first, but for lines that a kill cut short. ValueError for none, or another broken line."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"there are no metrics at {path}; give the --run-dir of a run")
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    except ValueError as error:
        raise ValueError(f"a line of {path} is broken ({error}); remove it, and report again") from None


def run_speed(windows: list[dict]) -> dict[str, float]:
    """The median of each figure that every window has, by its name in metrics.jsonl. ValueError where they are too few."""
    steady = windows[WARM_UP_WINDOWS:]
    if len(steady) < FEWEST_WINDOWS:
        needed = f"a rate needs at least {FEWEST_WINDOWS + WARM_UP_WINDOWS} log windows, the first of them warm-up"
        raise ValueError(f"{needed}. Found: {len(windows)}; train longer or set a smaller --log-every")
    names = [name for name in steady[0] if name != "step" and all(name in window for window in steady)]
    return {name: statistics.median(window[name] for window in steady) for name in names}
