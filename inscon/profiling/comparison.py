"""Two reports against each other: what became slower, and whether they may be compared at all."""

import json
from dataclasses import dataclass
from pathlib import Path

from inscon.profiling import verdict

VERSION = 1
"""Of report.json; another one is not compared."""
HIGHER_IS_BETTER = {
    "end to end": ("ceilings", "end to end"),
    "loader alone": ("ceilings", "loader alone"),
    "model on synthetic batches": ("ceilings", "model on synthetic batches"),
    "model on cached batches": ("ceilings", "model on cached batches"),
}
LOWER_IS_BETTER = {
    "host memory at its peak, MB": ("memory", "host_peak_mb"),
    "PyTorch's device memory at its peak, MB": ("memory", "torch_peak_mb"),
}
"""What is said -> where it is in report.json."""
SAME = {
    "machine": ("machine",),
    "model": ("settings", "model"),
    "views": ("settings", "views"),
    "batch size": ("settings", "optim", "batch_size"),
    "precision": ("precision",),
    "ranks": ("ranks",),
    "pipeline": ("settings", "loader", "pipeline"),
}
"""What must be equal for a comparison to mean anything."""


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in both reports."""

    name: str
    before: float
    after: float
    worse_percent: float
    """By how much it became worse; negative: better."""


def load_report(path: Path) -> dict:
    """ValueError, naming the file, for what is no report of this version, and for one whose figures cannot be true."""
    try:
        report = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give two report.json files") from None
    except ValueError:
        report = None
    found = report.get("report_version") if isinstance(report, dict) else None
    if found != VERSION:
        raise ValueError(
            f"{path} must be a report.json of version {VERSION}. Found: {found}; make it anew with scripts/throughput_report.py"
        )
    found = verdict.disturbed(verdict.contradictions(report))
    if found:
        raise ValueError(f"{path} cannot be compared. {found.sentence()}")
    return report


def compare(before: dict, after: dict) -> list[Change]:
    """Every figure that both have. ValueError where machine or settings differ, naming which."""
    differ = [name for name, keys in SAME.items() if _at(before, keys) != _at(after, keys)]
    if differ:
        one, other = (_at(report, SAME[differ[0]]) for report in (before, after))
        raise ValueError(
            f"two reports are compared on one machine with one set-up; these differ in: {', '.join(differ)}. Found: "
            f"{_short(one, other)}; measure both in the same way"
        )
    changes = []
    for table, sign in ((HIGHER_IS_BETTER, -1), (LOWER_IS_BETTER, 1)):
        for name, keys in table.items():
            a, b = _at(before, keys), _at(after, keys)
            if a and b:
                changes.append(Change(name, a, b, sign * 100 * (b - a) / a))
    return changes


def _at(report: dict, keys: tuple[str, ...]):
    for key in keys:
        report = report.get(key) if isinstance(report, dict) else None
    return report


def _short(one, other) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(key for key in [*one, *other] if one.get(key) != other.get(key))
        return f"{key} {one.get(key)} and {other.get(key)}"
    return f"{one} and {other}"
