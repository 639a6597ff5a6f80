"""How fast this machine trains, what holds it back, and what to do about it: one page.

    python scripts/throughput_report.py --data SHARDS                                # measures; report.md, .json, .png in report/
    python scripts/throughput_report.py --data BETON --pipelines ffcv,dali,reference # engines side by side
    torchrun --nproc_per_node=8 scripts/throughput_report.py --data SHARDS           # all ranks together
    python scripts/throughput_report.py --run RUN_DIR                                # of a run's metrics, nothing is measured
    python scripts/throughput_report.py --compare before.json after.json             # status 1 where something became slower
    python scripts/throughput_report.py --predict v100x8                             # a prediction, with formula and inputs

Every flag of scripts/train.py is taken too (--recipe, --batch-size, ...): measured is what would be trained.
"""

import argparse
import dataclasses
import io
import json
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon import guard
from inscon.profiling import comparison, page, prediction, sections, verdict
from inscon.profiling.page import Section
from inscon.profiling.rates import check_steps, machine, read_metrics, run_speed, versions


def main(arguments: list[str]) -> int:
    own, rest = options().parse_known_args(arguments)
    if own.compare:
        return show_comparison(*own.compare, own.tolerance)
    if own.run:
        return report_on_run(own.run, own.out)
    check(own)
    # PyTorch and the engines take seconds to import, which no refusal above waits for.
    from inscon import distributed
    from inscon.profiling.report import Measurement
    from pipelines import check_engine
    from scripts.train import parse

    config = parse(rest)
    if own.predict and config.loader.data is None and own.pipelines is None:
        for name in own.predict:
            print(prediction.predict(name, config.model.heads, verdict.OVERHEAD, ASSUMED).sentence())
        return 0
    engines = own.pipelines.split(",") if own.pipelines else [config.loader.pipeline]
    for name in engines:
        check_engine(name)
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, pipeline=engines[0]))
    out = own.out or Path("report")
    guard.check_output_folder(out)
    device = distributed.start()
    try:
        report = Measurement(config, device, out, own.steps, own.warm_up).report(engines, own.trace)
        if distributed.rank() == 0:
            report["predictions"] = predictions(own.predict, report)
            publish(report, out)
    finally:
        distributed.stop()
    return 0


def check(own: argparse.Namespace) -> None:
    """ValueError for what this script's own flags cannot be."""
    check_steps(own.steps, own.warm_up)
    for name in own.predict:
        prediction.check_machine(name)
    if own.trace < 0:
        raise ValueError(f"a trace is of 1 step or more. Found: {own.trace}; set --trace 3, or leave it out")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, help="folder of the report (default: report); with --run, a JSON file")
    parser.add_argument("--steps", type=int, default=30, help="measured, of each of the measurements")
    parser.add_argument("--warm-up", type=int, default=6, help="steps before these, left out")
    parser.add_argument("--pipelines", help="engines to set side by side, with commas; the verdict is on the first")
    parser.add_argument(
        "--trace", type=int, default=0, metavar="N", help="write a torch profiler trace of N steps, too"
    )
    parser.add_argument(
        "--predict", action="append", default=[], metavar="MACHINE", help=", ".join(prediction.MACHINES)
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two report.json")
    parser.add_argument(
        "--tolerance", type=float, default=5.0, help="percent by which a figure may be worse in --compare"
    )
    parser.add_argument("--run", type=Path, help="folder of a run of scripts/train.py")
    return parser


ASSUMED = "the most that the project allows itself; not measured on such a machine"


def predictions(names: list[str], report: dict) -> list[dict]:
    """Of each machine, with the overhead that a GPU here showed, or the one assumed."""
    overhead, source = verdict.OVERHEAD, ASSUMED
    if "gpu" in report["machine"]:
        overhead, source = report["own_overhead_percent"]["measured"], f"measured on {report['machine']['gpu']}"
    made = [prediction.predict(name, tuple(report["settings"]["model"]["heads"]), overhead, source) for name in names]
    return [dataclasses.asdict(one) | {"sentence": one.sentence()} for one in made]


def publish(report: dict, out: Path) -> None:
    """report.json, report.md and report.png in `out`, each whole or not there, and the page on the screen."""
    title, parts, picture = sections.title_of(report), sections.sections(report), io.BytesIO()
    drawn = page.draw(report, picture)
    shown = "![](report.png)" if drawn else "No report.png: pip install matplotlib, and run again."
    text = page.markdown(title, report["verdict"]["sentence"], [*parts, Section("Picture", (), (), [shown])])
    files = {"report.json": (json.dumps(report, indent=1) + "\n").encode(), "report.md": text.encode()}
    for name, content in (files | ({"report.png": picture.getvalue()} if drawn else {})).items():
        with guard.whole_file(out / name) as file:
            file.write(content)
    page.show(Console(), title, report["verdict"]["sentence"], parts)
    print(f"{out}/report.md, report.json" + (", report.png" if drawn else "; for report.png: pip install matplotlib"))


def show_comparison(before: Path, after: Path, tolerance: float) -> int:
    """0, or 1 where a figure became worse by more than `tolerance` percent."""
    changes = comparison.compare(comparison.load_report(before), comparison.load_report(after))
    rows = [(c.name, f"{c.before:,.1f}", f"{c.after:,.1f}", f"{c.worse_percent:+.1f}") for c in changes]
    worse = [c.name for c in changes if c.worse_percent > tolerance]
    line = (
        f"Worse by more than {tolerance:g} %: {', '.join(worse)}."
        if worse
        else f"Nothing is worse by more than {tolerance:g} %."
    )
    page.show(
        Console(), f"{before} -> {after}", line, [Section("Figures", ("", "before", "after", "worse by, %"), rows)]
    )
    return 1 if worse else 0


def report_on_run(run: Path, out: Path | None) -> int:
    """From the metrics that the run wrote."""
    if out is not None:
        guard.check_output_file(out)
    windows = read_metrics(run)
    settings = json.loads((run / "config.json").read_text())
    model, batch_size = settings["model"], settings["optim"]["batch_size"]
    cells_each = batch_size * model["cell_grid"] ** 2
    fill_steps = max(model["queue_size"] // batch_size, model["cell_queue_size"] // cells_each)
    speed = run_speed(windows, fill_steps)
    title = f"{model['arch']} at {settings['views']['view_size']} px through {settings['loader']['pipeline']}, batch {batch_size}"
    where = "Of a run's metrics; what holds it back is measured by --data SHARDS."
    page.show(Console(), f"Throughput: {title}", where, [sections.run_section(speed)])
    if out is not None:
        report = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()}
        settings["loader"].pop("data"), settings["run"].pop("run_dir")  # paths of this machine
        text = json.dumps(report | {"speed": dataclasses.asdict(speed), "settings": settings}, indent=1) + "\n"
        with guard.whole_file(out) as file:
            file.write(text.encode())
    return 0


if __name__ == "__main__":
    guard.run_script("throughput_report.py", lambda: main(sys.argv[1:]))
