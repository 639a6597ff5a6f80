"""A report as a page: what report.json says, in sections, as Markdown, as tables on the screen, and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from rich.console import Console
from rich.table import Table

from inscon.report import verdict
from inscon.report.prediction import EPOCHS, IMAGENET, MACHINES, target_of

CPU_WARNING = 40.0
"""Percent of its cores from which on a rank's load is a warning: little is left for a slow disk or a hiccup."""


@dataclass(frozen=True, slots=True)
class Section:
    """A table with a title; the first column is text, the others are figures. `notes` stand below it."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()


def markdown(title: str, line: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    lines = [f"# {title}", "", f"**{line}**", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.rows:
            lines += ["| " + " | ".join(section.columns) + " |", "|" + "---|" * len(section.columns)]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows]
            lines.append("")
        for note in section.notes:
            lines += [note, ""]
    return "\n".join(lines)


def show(console: Console, title: str, line: str, sections: Sequence[Section]) -> None:
    """The same on a screen."""
    console.rule()
    console.print(title, highlight=False, markup=False)
    console.print(line, style="bold", highlight=False, markup=False)
    for section in sections:
        if section.rows:
            table = Table(title=section.title, title_justify="left")
            for number, column in enumerate(section.columns):
                table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
            for row in section.rows:
                table.add_row(*row)
            console.print(table, markup=False)
        for note in section.notes:
            console.print(note, highlight=False, markup=False)


def draw(report: dict, file: BinaryIO) -> bool:
    """Ceilings, the step's parts and the loader's stages as a PNG in `file`; False, and no picture, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = verdict.engine_of(report)["stages_alone_ms"] or {"not measured": 0.0}
    rates = {name: rate for name, rate in report["ceilings"].items() if rate}
    titles = "source images/s", "the step, %", "the loader's stages alone, ms per image"
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for axis, title, values in zip(axes, titles, (rates, report["shares"], stages)):
        bars = axis.barh(list(values), list(values.values()))
        axis.bar_label(bars, fmt="%.4g", padding=3)
        axis.set(title=title, xlim=(0, 1.2 * max(values.values()) or 1))
        axis.invert_yaxis()
    figure.suptitle(report["verdict"]["kind"] + ": " + report["verdict"]["stage"], x=0.01, ha="left")
    figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)
    return True


def title_of(settings: dict) -> str:
    return (
        f"{settings['method']['name']}, {settings['model']['backbone']} at {settings['views']['view_size']} px through "
        f"{settings['loader']['pipeline']}, batch {settings['optim']['batch_size']}"
    )


def sections(report: dict) -> list[Section]:
    """The page."""
    parts = (speed, ceilings, step_parts, loader_stages, machine_use, data, side_by_side, predicted, basis)
    return [part(report) for part in parts]


def _share(percent: float) -> str:
    """One that 100 % bounds: noise reaches above it, and what is further above was never measured."""
    return f"{min(percent, 100.0):.1f} %" if percent <= 100 * verdict.NOISE else "not known"


def _known(value: float | None, form: str = "{:.1f}") -> str:
    return "not known" if value is None else form.format(value)


def speed(report: dict) -> Section:
    steps, rate = verdict.engine_of(report)["end_to_end"], report["ceilings"][verdict.END_TO_END]
    optim = report["settings"]["optim"]
    images, hours = report["steps_per_epoch"] * optim["batch_size"], 1 / rate / 3600
    over = f"n = {steps['steps']}, {steps['warm_up']} of warm-up left out"
    whole = f"{optim['epochs']} epochs of {images:,} images"
    rows = [
        ("source images/s, total", f"{rate:,.1f}", over),
        ("source images/s, per device", f"{rate / report['ranks']:,.1f}", f"{report['ranks']} rank(s)"),
        ("step, ms", f"{steps['step_ms']:,.1f}", f"median; 99th percentile {steps['step_ms_p99']:,.1f}"),
        ("this recipe on this data, h", f"{optim['epochs'] * images * hours:,.2f}", whole),
        (f"{EPOCHS} epochs of ImageNet, h", f"{EPOCHS * IMAGENET * hours:,.1f}", "computed from the rate"),
    ]
    target = target_of(report["machine"].get("gpu"), report["ranks"])
    return Section("Speed", ("", "value", "over"), rows, [f"Target: {target}."] if target else ())


def ceilings(report: dict) -> Section:
    rates = report["ceilings"]
    shares = {name: _share(100 * rates[verdict.END_TO_END] / rate) if rate else "" for name, rate in rates.items()}
    rows = [(name, _known(rates[name], "{:,.1f}"), shares[name]) for name in verdict.CEILINGS]
    notes = [f"Efficiency, end to end over the smaller of the first two: {_share(100 * report['efficiency'])}."]
    if "gpu" not in report["machine"] and rates[verdict.LOADER]:
        both = 1 / (1 / rates[verdict.LOADER] + 1 / rates[verdict.SYNTHETIC])
        notes.append(f"Loader and model share the processor here: busy all the time it gives {both:,.1f} images/s.")
    return Section("Four ceilings, source images/s", ("", "images/s", "end to end, of it"), rows, notes)


def step_parts(report: dict) -> Section:
    steps, shares, scaling = verdict.engine_of(report)["end_to_end"], report["shares"], report["scaling"]
    rows = [(name, f"{ms:,.2f}", f"{shares[name]:.2f}") for name, ms in steps["parts_ms"].items()]
    rows.append(("sum", f"{sum(steps['parts_ms'].values()):,.2f}", f"{sum(shares.values()):.2f}"))
    notes = [
        f"Mean of {steps['steps']} steps, of the rank that waited least for others; the whole step is {steps['wall_ms']:,.2f} ms "
        f"by a clock of its own. {', '.join(verdict.OWN)}: {sum(shares.get(name, 0.0) for name in verdict.OWN):.1f} %.",
    ]
    if scaling:
        fixed = f"; {scaling['fixed_percent']:.0f} % of it does not depend on the batch"
        notes.append(
            f"Computing takes {scaling['compute_ms']:,.1f} ms at batch {scaling['batch_size']} and "
            f"{scaling['other_compute_ms']:,.1f} ms at batch {scaling['other_batch_size']} (synthetic batches)"
            f"{'' if report['verdict']['kind'] == 'disturbed' else fixed}."
        )
    return Section("The step by part", ("", "ms", "% of the step"), rows, notes)


def loader_stages(report: dict) -> Section:
    engine = verdict.engine_of(report)
    alone, within, queues = engine["stages_alone_ms"], verdict.stages_in_run(engine), verdict.starved(engine)
    if not alone:
        return Section("The loader by stage", notes=["No loader: the pipeline needs no data."])
    cores = min(report["threads"], report["cores_of_rank"])
    rows = []
    for stage in dict.fromkeys([*alone, *within]):
        rate = 1e3 / alone[stage] * (1 if stage == "finish" else cores) if alone.get(stage) else None
        cells = (alone.get(stage), "{:.3f}"), (rate, "{:,.0f}"), (within.get(stage), "{:.3f}")
        rows.append((stage, *("" if value is None else form.format(value) for value, form in cells)))
    hungry = next((name for name, percent in queues.items() if percent >= verdict.HUNGRY), None)
    starving = f"First starved: {hungry} batches; the stage in front of it that takes longest: {verdict.starving_stage(engine)}."
    if hungry is None or engine["end_to_end"]["wait_percent"] < 1:
        starving = "No queue kept the trainer waiting."
    ready = ", ".join(f"{name} batches {100 - empty:.0f} %" for name, empty in queues.items())
    notes = [
        f"{engine['described']}.",
        f"Alone: one thread, nothing beside it; images/s of {cores:g} core(s). In the run, as the engine counts: read with plan, "
        "decode with views; ffcv and reference add up their threads, dali's is how long its graph was waited for.",
        f"Readiness of the queues in the run: {ready}. {starving}",
    ]
    columns = "stage", "alone, ms per image", "alone, images/s", "in the run, ms per image"
    return Section("The loader by stage", columns, rows, notes)


def machine_use(report: dict) -> Section:
    engine, memory, on_gpu = verdict.engine_of(report), report["memory"], "gpu" in report["machine"]
    cores, busy = report["cores_of_rank"], engine["end_to_end"]["cpu_cores"]
    used = f"{busy:.1f} of {cores:g} cores"
    if on_gpu and 100 * busy / cores > CPU_WARNING:
        used += f"; WARNING: more than {CPU_WARNING:.0f} %, a slow disk or a hiccup will be felt"
    cost = f"{report['trainings']:.2f} times a forward and backward pass of a view, counted"
    matrices = f"measured twice in this run, {report['precision']}"
    rows = [
        ("arithmetic of a source image, GFLOP", f"{report['flops_per_image'] / 1e9:.1f}", cost),
        ("matrix products here, TFLOP/s", f"{report['matrix_flops_per_s'] / 1e12:.3f}", matrices),
        ("model-FLOP utilisation, %", _known(report["mfu_percent"]), "end to end, of that rate"),
        ("host memory at its peak, MB", f"{memory['host_peak_mb']:,.0f}", "this process, without workers"),
        ("processor of a rank, %", f"{100 * busy / cores:.0f}", used),
    ]
    if on_gpu:
        of_loader, copies = engine["said"].get("loader_device_mb"), report["copy_bytes_per_s"] / 1e9
        rows += [
            ("PyTorch's device memory at its peak, MB", f"{memory['torch_peak_mb']:,.0f}", "of rank 0"),
            ("loader's device memory, MB", _known(of_loader, "{:,.0f}"), "beside PyTorch's"),
            ("bus to the GPU, GB/s", f"{copies:.1f}", "page-locked memory, measured in this run"),
        ]
    return Section("The machine", ("", "value", "over"), rows)


def data(report: dict) -> Section:
    found = verdict.engine_of(report)["loader"]
    if not found:
        return Section("Data", notes=["No data: the pipeline makes them up."])
    once = "yes" if not found["repeated"] else f"NO: {found['repeated']} seen again"
    batch = f"median of {found['batches']}, loader alone; 99th percentile {found['batch_ms_p99']:.1f}"
    rows = [
        ("each image once per epoch", once, f"{found['images']:,} images of {found['epochs']} epoch(s)"),
        ("pairs of views that overlap, %", _known(found["overlap_percent"], "{:.2f}"), "of these"),
        ("samples substituted for bad ones", str(found["substituted"]), "of these"),
        ("images left out when the set was packed", str(report["left_out"]), "of the whole set"),
        ("first batch, s", f"{found['first_batch_s']:.2f}", f"after {found['opened_s']:.2f} s of opening"),
        ("a batch, ms", f"{found['batch_ms']:.1f}", batch),
        (
            "longer at an epoch's start, ms",
            _known(found["seam_stall_ms"], "{:+.1f}"),
            f"medians; {found['seams']} such",
        ),
    ]
    return Section("Data", ("", "value", "over"), rows)


def side_by_side(report: dict) -> Section:
    title, rows = "Engines side by side", []
    if len(report["engines"]) < 2:
        return Section(title, notes=["One engine was measured; --pipelines dali,reference sets two side by side."])
    for name, found in report["engines"].items():
        loader, steps = found["loader"], found["end_to_end"]
        alone = f"{loader['images_per_s']:,.1f}" if loader else ""
        start = f"{loader['opened_s'] + loader['first_batch_s']:.2f}" if loader else ""
        wait, ready = f"{steps['wait_percent']:.2f}", f"{steps['ready_percent']:.0f}"
        rows.append((name, alone, f"{steps['images_per_s']:,.1f}", wait, ready, start))
    columns = "engine", "alone, images/s", "end to end", "data wait, %", "batches ready, %", "first batch, s"
    return Section(title, columns, rows)


def predicted(report: dict) -> Section:
    return Section("Predictions", notes=report["predictions"] or [f"None asked for: --predict {', '.join(MACHINES)}."])


def basis(report: dict) -> Section:
    rows = [*report["machine"].items(), *report["versions"].items(), ("ranks", report["ranks"])]
    rows += [("torch's threads", report["torch_threads"]), ("SGD", report["optimizer"])]
    return Section("Measured on", ("", "value"), [(name, str(value)) for name, value in rows])


def run_section(speed: dict) -> Section:
    """How fast a run was by its own metrics (`inscon.report.run.run_speed`), and how its losses moved."""
    over = f"median of {speed['windows']} windows, {speed['steps']} steps, warm-up left out"
    rows = [
        ("source images/s", f"{speed['images_per_s']:.1f}", over),
        ("step, ms", f"{speed['step_ms']:.1f}", f"the same; 99th percentile {speed['step_ms_p99']:.1f}"),
        ("data wait, % of the step", f"{speed['data_wait_percent']:.2f}", "the same; worst rank"),
        ("model-FLOP utilisation, %", _known(speed["mfu_percent"]), "the same; of the rate measured at its start"),
    ]
    loader = {name: value for name, value in speed.items() if name.startswith("loader_")}
    rows += [(name, f"{value:.2f}", "the same; worst rank") for name, value in loader.items()]
    rows += [(name, f"{most:.3f} -> {last:.3f}", "highest and last") for name, (most, last) in speed["losses"].items()]
    return Section("The run", ("", "value", "over"), rows)
