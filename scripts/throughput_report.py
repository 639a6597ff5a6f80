"""How fast this machine trains, what holds it back, and what to do about it: one page.

    python scripts/throughput_report.py --data SHARDS   # measures; report.md, report.json in report/
    torchrun --nproc_per_node=8 scripts/throughput_report.py --data SHARDS   # all ranks together
    python scripts/throughput_report.py --run RUN_DIR                                # of a run's metrics, nothing is measured
    python scripts/throughput_report.py --compare before.json after.json             # status 1 where something became slower
    python scripts/throughput_report.py --run RUN_DIR --html run.html                # its curves, for a browser
    python scripts/throughput_report.py --predict v100x8                             # a prediction, with formula and inputs

Every flag of scripts/train.py is taken too (--recipe, --batch-size, ...): measured is what would be trained.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

if not __package__:  # run as a script, beside which Python looks
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon import guard
from inscon.report import page, verdict
from inscon.report.prediction import MACHINES, predict
from inscon.report.run import read_metrics, run_speed
from inscon.report.web_page import web_page


def main(arguments: list[str]) -> int:
    own, rest = options().parse_known_args(arguments)
    if own.html and own.compare:
        raise ValueError("--html shows a report or a run, no comparison; leave --html or --compare out")
    if own.compare:
        return show_comparison(*own.compare, own.tolerance)
    if own.html:
        guard.check_output_file(own.html, "--html")
    if own.run and not rest:
        return show_run(own.run, own.html)
    if own.run and not (own.html and read_metrics(own.run)):
        raise ValueError("--run beside a measurement is for its curves in --html FILE; set that, or leave --run out")
    guard.check_ranges(own, steps=10, warm_up=2, trace=0)  # fewer give no rate
    # PyTorch and the engines take seconds to import, which no refusal above waits for.
    from inscon import distributed
    from inscon.methods.method import resolve
    from inscon.report.flops import step_flops
    from inscon.report.measure import Measurement
    from inscon.scripts.train import feed_of, fitted, parse

    config = parse(rest)
    predictions = [predict(name, config, step_flops(resolve(config, 1)).trainings) for name in own.predict]
    if predictions and config.loader.data is None:
        if own.html:
            raise ValueError("a prediction is no page; set --data SHARDS to measure, or leave --html out")
        print("\n".join(predictions))
        return 0
    guard.check_output_folder(own.out)
    device = distributed.start()
    try:
        config = fitted(config, rest, distributed.world_size())
        measurement = Measurement(config, feed_of, device, own.out, own.steps, own.warm_up)
        report = measurement.report() | {"predictions": predictions}
        if own.trace:
            measurement.trace(own.trace)
        measurement.training.close()
        if distributed.rank() == 0:
            publish(report, own.out)
            if own.html:
                write(own.html, web_page(report, own.run))
    finally:
        distributed.stop()
    return 0


def options() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")
    add("--steps", type=int, default=30, help="measured, of each of the measurements")
    add("--warm-up", type=int, default=6, help="steps before these, left out")
    add("--trace", type=int, default=0, metavar="N", help="write a torch profiler trace of N steps, too")
    add("--predict", action="append", default=[], choices=MACHINES, help="what a machine should do")
    add("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two report.json")
    add("--tolerance", type=float, default=5.0, help="percent by which a figure may be worse in --compare")
    add("--run", type=Path, help="folder of a run of scripts/train.py; alone, nothing is measured")
    add("--html", type=Path, help="file for a browser: the report, the curves of --run, or both")
    return parser


def publish(report: dict, out: Path) -> None:
    """report.json and report.md in `out`, and the page on the screen."""
    text = page.page(report)
    Console().print(Markdown(text))
    write(out / "report.json", json.dumps(report, indent=1) + "\n")
    write(out / "report.md", text)


def show_comparison(before: Path, after: Path, tolerance: float) -> int:
    """0, or 1 where a figure became worse by more than `tolerance` percent."""
    changes = verdict.compare(verdict.load_report(before), verdict.load_report(after))
    rows = [(name, f"{a:,.1f}", f"{b:,.1f}", f"{worse:+.1f}") for name, a, b, worse in changes]
    slower = [name for name, _, _, worse in changes if worse > tolerance]
    found = f"Worse by more than {tolerance:g} %: {', '.join(slower) or 'nothing'}."
    Console().print(Markdown(page.table(f"{before} -> {after}", ("", "before", "after", "worse by, %"), rows, found)))
    return 1 if slower else 0


def show_run(run: Path, html: Path | None) -> int:
    """From the metrics that the run wrote."""
    rows = [(name, f"{value:,.3f}") for name, value in run_speed(read_metrics(run)).items()]
    title = page.title_of(json.loads((run / "config.json").read_text()))
    note = "Rates are in source images/s. What holds a run back is measured by --data SHARDS."
    Console().print(Markdown(title + "\n\n" + page.table("Medians of log windows", ("", "median"), rows, note)))
    if html:
        write(html, web_page(None, run))
    return 0


def write(path: Path, text: str) -> None:
    """A file that is whole or not there."""
    with guard.whole_file(path) as file:
        file.write(text.encode())
    print(path)


if __name__ == "__main__":
    guard.run_script("throughput_report.py", lambda: main(sys.argv[1:]))
