"""A report's measurement, from a configuration to what report.json holds."""

import dataclasses
import datetime
import itertools
from pathlib import Path

import torch

from inscon import clock, distributed, guard, train
from inscon.clock import REST, WAIT, WIRE
from inscon.config import Config, resolve
from inscon.profiling import comparison, measure, prediction, sections, verdict
from inscon.profiling.flops import image_flops, measure_matrix_rate
from inscon.profiling.rates import machine, versions
from inscon.profiling.sections import END_TO_END, LOADER, REAL, SYNTHETIC
from pipelines import open_pipeline
from pipelines.facts import data_facts
from pipelines.feed import threads_per_rank
from pipelines.stages import stages_alone

CACHED = 4
"""Real batches that the model is measured on over and over."""


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
        rate_before = self.matrix_rate()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # the matrices are not the run's
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
        rate = max(rate_before, self.matrix_rate())  # what the device can do, not what others left of it
        mfu = 100 * end_to_end.images_per_s * flops.step / (world * rate)
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
        steps = config.optim.epochs * self.facts.steps_per_epoch
        per_epoch = self.facts.steps_per_epoch * config.optim.batch_size
        report = {
            "report_version": comparison.VERSION,
            "date": datetime.date.today().isoformat(),
            "machine": machine(), "versions": versions(), "ranks": world, "precision": self.training.precision.name,
            "optimizer": self.training.optimizer_name, "torch_threads": torch.get_num_threads(),
            "settings": config.to_dict(),
            "ceilings": rates,
            "efficiency": end_to_end.images_per_s / min(rate for rate in (rates[LOADER], synthetic.images_per_s) if rate),
            "steps": {
                SYNTHETIC: dataclasses.asdict(synthetic),
                REAL: dataclasses.asdict(cached) if cached else None,
                END_TO_END: dataclasses.asdict(end_to_end),
            },
            "shares": shares,
            "sum_of_shares": sum(shares.values()),
            "own_overhead_percent": sections.own_overhead(end_to_end.parts_ms, config.optim.batch_size // world),
            "scaling": scaling and dataclasses.asdict(scaling) | {"fixed_percent": scaling.fixed_percent},
            "flops": dataclasses.asdict(flops) | {"step": flops.step, "views_trained": flops.views_trained},
            "matrix_flops_per_s": rate,
            "mfu_percent": mfu if mfu <= 100 else None,
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
        found = verdict.disturbed(verdict.contradictions(report)) or verdict.judge(evidence)
        return report | {"verdict": dataclasses.asdict(found) | {"sentence": found.sentence()}}

    def matrix_rate(self) -> float:
        return measure_matrix_rate(self.device, self.training.precision.pixel_dtype)

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
        with guard.whole_file(self.out / f"trace-rank{distributed.rank()}.json") as file:
            profiler.export_chrome_trace(file.name)


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
