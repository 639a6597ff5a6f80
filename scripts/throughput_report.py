"""The throughput of a run, from the metrics it wrote: rate, step time, data wait, and how the losses moved.

python scripts/throughput_report.py --run RUN_DIR
"""

import dataclasses
import datetime
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon.profiling import RunSpeed, machine, read_metrics, run_speed, versions


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to report on."""

    run: Path
    """Folder of a run of scripts/train.py."""
    out: Path | None = None
    """Write the figures as JSON too, with the machine and versions of now: report where you ran."""


LOADER = {
    "starved_percent": "batches not ready when asked for, %",
    "graph_starved_percent": "runs of the loader's graph not ready, %",
    "read_ms": "read and plan, ms per image",
    "decode_ms": "decode and crop, ms per image",
    "finish_ms": "colour and copy, ms per image",
    "substituted": "samples substituted so far, all ranks",
    "device_mb": "device memory, MB",
}
"""What the pipeline says of itself, in words."""


def table(speed: RunSpeed, settings: dict) -> Table:
    """One page: how fast, waiting for what, learning what."""
    title = (
        f"{settings['model']['arch']} at {settings['views']['view_size']} px through {settings['loader']['pipeline']}"
    )
    page = Table(title=f"Throughput: {title}, batch {settings['optim']['batch_size']}", title_justify="left")
    page.add_column("")
    page.add_column("value", justify="right")
    page.add_column("over")
    over = f"median of {speed.windows} windows, {speed.steps} steps, warm-up left out"
    page.add_row("source images/s", f"{speed.images_per_s:.1f}", over)
    page.add_row("step, ms", f"{speed.step_ms:.1f}", f"the same; 99th percentile {speed.step_ms_p99:.1f}")
    page.add_row("data wait, % of the step", f"{speed.data_wait_percent:.2f}", "the same; worst rank")
    for name, value in speed.loader.items():
        page.add_row(f"loader: {LOADER.get(name, name)}", f"{value:.2f}", "the same; worst rank")
    over_time = f"windows that end with steps {speed.first['step']} (queues full) and {speed.last['step']}"
    for name in ("single", "multi", "cell"):
        if f"loss_{name}" in speed.last:
            before, after = speed.first[f"loss_{name}"], speed.last[f"loss_{name}"]
            top1 = 100 * speed.last[f"top1_{name}"]
            page.add_row(f"loss, {name} head", f"{before:.3f} -> {after:.3f}", f"{over_time}; top-1 now {top1:.0f} %")
    return page


def main(config: ReportConfig) -> None:
    windows = read_metrics(config.run)
    settings = json.loads((config.run / "config.json").read_text())
    model, batch_size = settings["model"], settings["optim"]["batch_size"]
    cells_each = batch_size * model["cell_grid"] ** 2
    fill_steps = max(model["queue_size"] // batch_size, model["cell_queue_size"] // cells_each)
    speed = run_speed(windows, fill_steps)
    Console().print(table(speed, settings))
    if config.out is not None:
        report = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()}
        settings["loader"].pop("data"), settings["run"].pop("run_dir")  # paths of this machine
        figures = {"speed": dataclasses.asdict(speed), "settings": settings}
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(report | figures, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(ReportConfig, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"throughput_report.py: {error}") from None
