"""The result of benchmarks/study.py: means and intervals over seeds, the table study.md, the curves study.png."""

import statistics
from pathlib import Path

from benchmarks.study_run import lines_of, results_of

UNTRAINED = "untrained"
PAPER = {"moco": 39.8, "single": 39.8, "single+cell": 40.3, "single+multi": 40.7, "all": 40.9, "inscon": 40.9, "densecl": 40.1,
         "resim": 40.0, "detco": 40.1, "pixpro": 40.6}  # fmt: skip
"""Box AP on COCO, Mask R-CNN FPN 1x (Tables 4 and 7; of pixpro after 400 epochs)."""
PAPER_LINEAR = {"moco": 67.5, "single": 67.5, "single+multi": 70.3, "simclr": 66.6}
"""Top-1 on ImageNet (Table 6)."""
FIGURES = {"knn": "kNN, %", "linear": "linear probe, %", "frozen": "box AP, frozen", "full": "box AP, full"}
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1 to 9 degrees of freedom."""
SHOWN = ("step", "loss", "lr", "knn", "top1_", "length_", "rank_", "key_distance")
"""How the names begin of what study.json has of every log line."""
DRAWN = {
    "knn": "kNN within the held-out set", "loss": "loss", "top1_single": "single top-1", "length_single": "length of the mean key",
    "loss_single": "single loss", "loss_multi": "multi loss", "loss_cell": "cell loss", "rank_single": "effective rank of the keys",
}  # fmt: skip


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval by Student's t; None of one value."""
    half = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), half


def cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.1f}" + ("" if half is None else f" ± {half:.1f}")


def gathered(jobs: list[dict]) -> dict[str, list[dict]]:
    """By method, what there is of each seed."""
    runs = {job["method"]: [] for job in jobs}
    for job in jobs:
        lines, warnings = (lines_of(Path(job["folder"], "run", name)) for name in ("metrics.jsonl", "warnings.jsonl"))
        curve = [{name: round(line[name], 4) for name in line if name.startswith(SHOWN)} for line in lines]
        made = {"seed": job["seed"], "figures": results_of(job), "warnings": warnings, "curve": curve}
        runs[job["method"]].append(made)
    return runs


def values_of(runs: list[dict], figure: str, start: list[dict] | None = None) -> list[float]:
    """Of the seeds that have it; less that of the same seed in `start`, if given."""
    found, before = (
        {run["seed"]: run["figures"][figure] for run in of if figure in run["figures"]} for of in (runs, start or [])
    )
    return [value - before.get(seed, 0) for seed, value in found.items() if start is None or seed in before]


def page(result: dict) -> str:
    """study.md."""
    runs = result["runs"]
    figures = [name for name in FIGURES if any(values_of(of, name) for of in runs.values())]
    starts = [UNTRAINED, *[name for name in runs if name != UNTRAINED][:1]]
    compared = [f"over {start}" for start in starts]
    heads = [head for name in figures for head in (FIGURES[name], *compared)] + ["paper: box AP", "linear"]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, of in runs.items():
        cells = [cell(values_of(of, figure, start)) for figure in figures for start in (None, *map(runs.get, starts))]
        cells += [str(table.get(name, "-")) for table in (PAPER, PAPER_LINEAR)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    means = {name: statistics.mean(values) for name, of in runs.items() if (values := values_of(of, "knn"))}
    orders = {"Here, by kNN": means, "In the paper, by box AP": {name: PAPER[name] for name in runs if name in PAPER}}
    lines += ["", *(f"{where}: {' > '.join(sorted(of, key=of.get, reverse=True))}." for where, of in orders.items())]
    return "\n".join(
        [*lines, "", f"Of {len(result['settings']['seeds'])} seeds; ± is half of the 95 % interval over them.", ""]
    )


def draw(result: dict, path: Path) -> None:
    """Curves over steps: the mean of the seeds, in a band from the least to the greatest."""
    from matplotlib import pyplot

    curves = {
        name: [run["curve"] for run in of if run["curve"]] for name, of in result["runs"].items() if name != UNTRAINED
    }
    figure, axes = pyplot.subplots(2, 4, figsize=(15, 6.4), layout="constrained")
    for axis, (name, title) in zip(axes.flat, DRAWN.items()):
        for method, of in curves.items():
            found = [{line["step"]: line[name] for line in curve if name in line} for curve in of]
            steps = sorted(set.intersection(*map(set, found))) if found else []
            values = [[one[step] for one in found] for step in steps]
            axis.plot(steps, list(map(statistics.mean, values)), marker="." if name == "knn" else None, label=method)
            axis.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.2)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
