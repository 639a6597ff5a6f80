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
from inscon.report import page, prediction, verdict
from inscon.report.run import read_metrics, run_speed

FEWEST_STEPS, LEAST_WARM_UP = 10, 2
"""Below which no rate is given."""


def main(arguments: list[str]) -> int:
    own, rest = options().parse_known_args(arguments)
    if own.compare:
        return show_comparison(*own.compare, own.tolerance)
    if own.run:
        return report_on_run(own.run)
    check(own)
    # PyTorch and the engines take seconds to import, which no refusal above waits for.
    from inscon import distributed
    from inscon.methods.method import resolve
    from inscon.report.flops import step_flops
    from inscon.report.measure import Measurement
    from pipelines import check_engine
    from scripts.train import feed_of, parse

    config = parse(rest)
    engines = own.pipelines.split(",") if own.pipelines else [config.loader.pipeline]
    for name in engines:
        check_engine(name)
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, pipeline=engines[0]))
    predictions = []
    if own.predict:
        prediction.check_comparable(config.model.backbone, config.views.view_size)
        predictions = [prediction.predict(name, step_flops(resolve(config, 1)).trainings) for name in own.predict]
    if predictions and config.loader.data is None and own.pipelines is None:
        print("\n".join(predictions))
        return 0
    guard.check_output_folder(own.out)
    device = distributed.start()
    try:
        measurement = Measurement(config, feed_of, device, own.out, own.steps, own.warm_up)
        report = measurement.report(engines) | {"predictions": predictions}
        if own.trace:
            measurement.trace(own.trace)
        if distributed.rank() == 0:
            publish(report, own.out)
    finally:
        distributed.stop()
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")
    add("--steps", type=int, default=30, help="measured, of each of the measurements")
    add("--warm-up", type=int, default=6, help="steps before these, left out")
    add("--pipelines", help="engines to set side by side, with commas; the verdict is on the first")
    add("--trace", type=int, default=0, metavar="N", help="write a torch profiler trace of N steps, too")
    add("--predict", action="append", default=[], metavar="MACHINE", help=", ".join(prediction.MACHINES))
    add("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two report.json")
    add("--tolerance", type=float, default=5.0, help="percent by which a figure may be worse in --compare")
    add("--run", type=Path, help="folder of a run of scripts/train.py")
    return parser


def check(own: argparse.Namespace) -> None:
    """ValueError for what this script's own flags cannot be."""
    if own.steps < FEWEST_STEPS:
        raise ValueError(
            f"a rate needs at least {FEWEST_STEPS} steps after the warm-up. Found: {own.steps}; set --steps {FEWEST_STEPS} or more"
        )
    if own.warm_up < LEAST_WARM_UP:
        raise ValueError(
            f"the first {LEAST_WARM_UP} steps at least are warm-up. Found: {own.warm_up}; set --warm-up {LEAST_WARM_UP} or more"
        )
    for name in own.predict:
        prediction.machine_of(name)
    if own.trace < 0:
        raise ValueError(f"a trace is of 1 step or more. Found: {own.trace}; set --trace 3, or leave it out")


def publish(report: dict, out: Path) -> None:
    """report.json, report.md and report.png in `out`, each whole or not there, and the page on the screen."""
    where = report["machine"].get("gpu") or report["machine"]["cpu"]
    title = (
        f"{page.title_of(report['settings'])} on {report['ranks']} x {where}, {report['precision']}, {report['date']}"
    )
    parts, sentence, picture = page.sections(report), report["verdict"]["sentence"], io.BytesIO()
    drawn = page.draw(report, picture)
    shown = "![](report.png)" if drawn else "No report.png: pip install matplotlib, and run again."
    text = page.markdown(title, sentence, [*parts, page.Section("Picture", notes=[shown])])
    files = {"report.json": (json.dumps(report, indent=1) + "\n").encode(), "report.md": text.encode()}
    for name, content in (files | ({"report.png": picture.getvalue()} if drawn else {})).items():
        with guard.whole_file(out / name) as file:
            file.write(content)
    page.show(Console(), title, sentence, parts)
    print(f"{out}/report.md, report.json" + (", report.png" if drawn else "; for report.png: pip install matplotlib"))


def show_comparison(before: Path, after: Path, tolerance: float) -> int:
    """0, or 1 where a figure became worse by more than `tolerance` percent."""
    changes = verdict.compare(verdict.load_report(before), verdict.load_report(after))
    rows = [(name, f"{a:,.1f}", f"{b:,.1f}", f"{worse:+.1f}") for name, a, b, worse in changes]
    slower = [name for name, _, _, worse in changes if worse > tolerance]
    found = f"Worse by more than {tolerance:g} %: {', '.join(slower)}."
    line = found if slower else f"Nothing is worse by more than {tolerance:g} %."
    table = page.Section("Figures", ("", "before", "after", "worse by, %"), rows)
    page.show(Console(), f"{before} -> {after}", line, [table])
    return 1 if slower else 0


def report_on_run(run: Path) -> int:
    """From the metrics that the run wrote."""
    speed = run_speed(read_metrics(run))
    title = page.title_of(json.loads((run / "config.json").read_text()))
    where = "Of a run's metrics; what holds it back is measured by --data SHARDS."
    page.show(Console(), title, where, [page.run_section(speed)])
    return 0


if __name__ == "__main__":
    guard.run_script("throughput_report.py", lambda: main(sys.argv[1:]))
