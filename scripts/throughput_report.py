"""How fast this machine trains, what holds it back, and what to do about it: one page.

    python scripts/throughput_report.py --data SHARDS                                # measures; report.md, .json, .png in report/
    python scripts/throughput_report.py --data BETON --pipelines ffcv,dali,reference # engines side by side
    torchrun --nproc_per_node=8 scripts/throughput_report.py --data SHARDS           # all ranks together
    python scripts/throughput_report.py --run RUN_DIR                                # of a run's metrics, nothing is measured
    python scripts/throughput_report.py --compare before.json after.json             # ends with 1 where something became slower
    python scripts/throughput_report.py --predict v100x8                             # a prediction, with formula and inputs

Every flag of scripts/train.py is taken too (--recipe, --batch-size, ...): measured is what would be trained.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon import clock, distributed, guard, train
from inscon.clock import REST, WAIT, WIRE
from inscon.config import Config, resolve
from inscon.profiling import comparison, measure, page, prediction, sections, verdict
from inscon.profiling.flops import image_flops, matrix_rate
from inscon.profiling.page import Section
from inscon.profiling.rates import machine, read_metrics, run_speed, versions
from inscon.profiling.sections import END_TO_END, LOADER, REAL, SYNTHETIC
from pipelines import check_engine, open_pipeline
from pipelines.facts import data_facts
from pipelines.feed import threads_per_rank
from pipelines.stages import stages_alone
from scripts.train import parse

CACHED = 4
"""Real batches that the model is measured on over and over."""


def main(arguments: list[str]) -> int:
    own, rest = options().parse_known_args(arguments)
    if own.compare:
        return show_comparison(*own.compare, own.tolerance)
    if own.run:
        return report_on_run(own.run, own.out)
    config = parse(rest)
    if own.predict and config.loader.data is None and own.pipelines is None:
        for name in own.predict:
            print(prediction.predict(name, config.model.heads, verdict.OVERHEAD, ASSUMED).sentence())
        return 0
    engines = own.pipelines.split(",") if own.pipelines else [config.loader.pipeline]
    for name in engines:
        check_engine(name)
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, pipeline=engines[0]))
    for name in own.predict:
        prediction.predict(name, config.model.heads, verdict.OVERHEAD, ASSUMED)  # refused before work, not after
    measure.check_steps(own.steps, own.warm_up)
    out = own.out or Path("report")
    device = distributed.start()
    try:
        report = Measurement(config, device, out, own.steps, own.warm_up).report(engines, own.trace)
        if distributed.rank() == 0:
            report["predictions"] = predictions(own.predict, report)
            publish(report, out)
    finally:
        distributed.stop()
    return 0


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


class Measurement:
    """All that is measured, one after the other: nothing runs beside what is timed.

    Args:
        config: of the run, not resolved.
        out: folder of the report; traces go there.
    """

    def __init__(self, config: Config, device: torch.device, out: Path, steps: int, warm_up: int):
        world = distributed.world_size()
        # A folder that does not exist: nothing is continued, nothing is written.
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=out / "no-run"))
        self.config, self.device, self.out, self.steps, self.warm_up = (
            resolve(config, world),
            device,
            out,
            steps,
            warm_up,
        )
        self.facts = data_facts(self.config)
        self.training = train.set_up(self.config, device, self.facts.fingerprint)

    def open(self, config: Config, start_step: int, total_steps: int):
        return open_pipeline(
            config.loader.pipeline, config=config, rank=distributed.rank(), world_size=distributed.world_size(),
            device=self.device, dtype=self.training.precision.pixel_dtype, start_step=start_step,
            total_steps=start_step + total_steps,
        )  # fmt: skip

    def report(self, engines: list[str], trace: int) -> dict:
        """Everything, as what goes to report.json."""
        config, world = self.config, distributed.world_size()
        with self.open(with_engine(config, "synthetic"), 0, self.warm_up + self.steps) as batches:
            synthetic = self.run(batches)
        by_engine = {name: self.engine(with_engine(config, name)) for name in engines}
        first = by_engine[engines[0]]
        cached = self.run(itertools.cycle(first.pop("cached"))) if first["loader"] else None
        for found in by_engine.values():
            found.pop("cached", None)
        memory = measure.memory(self.device)
        if trace:
            self.trace(trace)
        scaling = self.scaling()
        end_to_end: measure.StepFigures = first["end_to_end"]
        flops = image_flops(config.model, config.views)
        rate = matrix_rate(self.device, self.training.precision.pixel_dtype)
        rates = {
            LOADER: first["loader"].images_per_s if first["loader"] else None,
            SYNTHETIC: synthetic.images_per_s,
            REAL: cached.images_per_s if cached else None,
            END_TO_END: end_to_end.images_per_s,
        }
        copies = measure.copy_rate(self.device)
        view_bytes = 3 * config.views.view_size**2 * (3 if config.views.tiles_from == "third" else 2)
        shares = measure.shares(end_to_end)
        evidence = verdict.Evidence(
            on_gpu=self.device.type == "cuda",
            end_to_end=end_to_end.images_per_s,
            loader=rates[LOADER],
            model=synthetic.images_per_s,
            copies=None if copies is None else world * copies / view_bytes,
            shares=shares,
            stages_ms=sections.stages_in_run(first["said"]),
            starved=sections.starved(first["said"], end_to_end.ready_percent),
            scaling=scaling,
        )
        found = verdict.judge(evidence)
        steps = config.optim.epochs * self.facts.steps_per_epoch
        per_epoch = self.facts.steps_per_epoch * config.optim.batch_size
        report = {
            "report_version": comparison.VERSION,
            "date": datetime.date.today().isoformat(),
            "machine": machine(), "versions": versions(), "ranks": world, "precision": self.training.precision.name,
            "optimizer": self.training.optimizer_name, "torch_threads": torch.get_num_threads(),
            "settings": config.to_dict(),
            "verdict": dataclasses.asdict(found) | {"sentence": found.sentence()},
            "ceilings": rates,
            "efficiency": end_to_end.images_per_s / min(rate for rate in (rates[LOADER], synthetic.images_per_s) if rate),
            "steps": {
                SYNTHETIC: dataclasses.asdict(synthetic),
                REAL: dataclasses.asdict(cached) if cached else None,
                END_TO_END: dataclasses.asdict(end_to_end),
            },
            "shares": shares,
            "sum_of_shares": sum(shares.values()),
            "own_overhead_percent": sections.own_overhead(end_to_end, config.optim.batch_size // world),
            "scaling": scaling and dataclasses.asdict(scaling) | {"fixed_percent": scaling.fixed_percent},
            "flops": dataclasses.asdict(flops) | {"step": flops.step, "views_trained": flops.views_trained},
            "matrix_flops_per_s": rate,
            "mfu_percent": 100 * end_to_end.images_per_s * flops.step / (world * rate),
            "memory": dataclasses.asdict(memory), "cores_of_rank": measure.cores_of_rank(),
            "copy_bytes_per_s": copies,
            "stages_alone_ms": first["stages_alone_ms"],
            "threads": threads_per_rank(config.loader.threads),
            "images_per_epoch": per_epoch,
            "left_out": self.facts.left_out,
            "hours": steps * end_to_end.wall_ms / 3.6e6,
            "hours_imagenet_200": prediction.IMAGENET * prediction.EPOCHS / end_to_end.images_per_s / 3600,
            "engines": {name: jsonable(found) for name, found in by_engine.items()},
        }  # fmt: skip
        report["settings"]["loader"].pop("data"), report["settings"]["run"].pop("run_dir")  # paths of this machine
        return report

    def run(self, batches, after_warm_up=lambda: None) -> measure.StepFigures:
        return measure.run_steps(
            self.training, batches, steps=self.steps, warm_up=self.warm_up,
            steps_per_epoch=self.facts.steps_per_epoch, after_warm_up=after_warm_up,
        )  # fmt: skip

    def engine(self, config: Config) -> dict:
        """The loader alone and training through it."""
        total, epoch = self.warm_up + self.steps, self.facts.steps_per_epoch
        found = {"loader": None, "health": None, "cached": [], "stages_alone_ms": {}}
        if config.loader.pipeline != "synthetic":
            # So that an epoch ends in the middle of what is measured.
            start = max(epoch - self.warm_up - self.steps // 2, 0)
            found["loader"], found["health"], found["cached"] = measure.run_loader(
                lambda: self.open(config, start, total + CACHED), batches=self.steps, warm_up=self.warm_up, start_step=start,
                steps_per_epoch=epoch, batch_size=config.optim.batch_size, views=config.views, keep=CACHED,
            )  # fmt: skip
            found["stages_alone_ms"] = stages_alone(config, 0, self.device, self.training.precision.pixel_dtype)
        with self.open(config, 0, total) as pipeline:
            found["described"] = pipeline.describe().replace(str(config.loader.data), "DATA")
            found["end_to_end"] = self.run(pipeline, pipeline.read)
            found["said"] = distributed.worst(pipeline.read())
        return found

    def scaling(self) -> verdict.Scaling | None:
        """The step at half the batch, or twice a small one; None where no such batch is possible."""
        batch, world = self.config.optim.batch_size, distributed.world_size()
        other = batch // 2 if batch // world >= 64 else 2 * batch
        try:
            config = resolve(with_batch(self.config, other), world)
        except ValueError:
            return None
        training = train.set_up(config, self.device, self.facts.fingerprint)
        # By turns, and the fastest of each: what else a machine does is not the batch's.
        runs = [
            [computing(self.short_run(*which)) for which in ((self.training, self.config), (training, config))]
            for _ in range(3)
        ]
        here, there = (min(times) for times in zip(*runs))
        return verdict.Scaling(batch_size=batch, other_batch_size=other, compute_ms=here, other_compute_ms=there)

    def short_run(self, training: train.Training, config: Config) -> measure.StepFigures:
        steps, warm_up = 4, 2
        with self.open(with_engine(config, "synthetic"), 0, warm_up + steps) as batches:
            return measure.run_steps(
                training, batches, steps=steps, warm_up=warm_up, steps_per_epoch=10**6, fewest=steps
            )

    def trace(self, steps: int) -> None:
        """OUT/trace-rankN.json, for chrome://tracing or Perfetto."""
        self.out.mkdir(parents=True, exist_ok=True)
        model = train.over_ranks(self.training.model, self.config.optim.gradient_wire).train()
        with self.open(self.config, 0, 2 + steps) as pipeline, clock.Labels():
            batches, meter = iter(pipeline), train.LossMeter()
            for number, batch in enumerate(batches):
                if number == 2:
                    profiler = torch.profiler.profile(activities=torch_activities(self.device), acc_events=True)
                    profiler.start()
                train.take_step(self.training, model, batch, self.facts.steps_per_epoch, meter)
            meter.read()
            profiler.stop()
        profiler.export_chrome_trace(str(self.out / f"trace-rank{distributed.rank()}.json"))


def torch_activities(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    on_gpu = [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    return [torch.profiler.ProfilerActivity.CPU, *on_gpu]


def with_engine(config: Config, name: str) -> Config:
    return dataclasses.replace(config, loader=dataclasses.replace(config.loader, pipeline=name))


def with_batch(config: Config, batch_size: int) -> Config:
    """The same at another batch size: as many BatchNorm groups, queues of as nearly the same size as whole batches allow."""
    model, ratio = config.model, batch_size / config.optim.batch_size
    cells = batch_size * model.cells
    model = dataclasses.replace(
        model,
        queue_size=max(round(model.queue_size / batch_size), 1) * batch_size,
        cell_queue_size=max(round(model.cell_queue_size / cells), 1) * cells,
        split_size=model.split_size and int(model.split_size * ratio),
    )
    return dataclasses.replace(config, model=model, optim=dataclasses.replace(config.optim, batch_size=batch_size))


def computing(figures: measure.StepFigures) -> float:
    """Milliseconds of a step that go into computing: not into waiting, and not into what no part claims."""
    return sum(ms for name, ms in figures.parts_ms.items() if name not in (WAIT, WIRE, REST))


def jsonable(found: dict) -> dict:
    return {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value for name, value in found.items()
    }


ASSUMED = "the most that the project allows itself; not measured on such a machine"


def predictions(names: list[str], report: dict) -> list[dict]:
    """Of each machine, with the overhead that a GPU here showed, or the one assumed."""
    overhead, source = verdict.OVERHEAD, ASSUMED
    if "gpu" in report["machine"]:
        overhead, source = report["own_overhead_percent"]["measured"], f"measured on {report['machine']['gpu']}"
    made = [prediction.predict(name, tuple(report["settings"]["model"]["heads"]), overhead, source) for name in names]
    return [dataclasses.asdict(one) | {"sentence": one.sentence()} for one in made]


def publish(report: dict, out: Path) -> None:
    """report.json, report.md and report.png in `out`, and the page on the screen."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    title, parts = sections.title_of(report), sections.sections(report)
    drawn = page.draw(report, out / "report.png")
    parts.append(
        Section(
            "Picture", (), (), ["![](report.png)" if drawn else "No report.png: pip install matplotlib, and run again."]
        )
    )
    (out / "report.md").write_text(page.markdown(title, report["verdict"]["sentence"], parts))
    page.show(Console(), title, report["verdict"]["sentence"], parts[:-1])
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
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report | {"speed": dataclasses.asdict(speed), "settings": settings}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    guard.run_script("throughput_report.py", lambda: main(sys.argv[1:]))
