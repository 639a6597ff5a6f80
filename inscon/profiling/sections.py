"""What a report says, section by section, from report.json alone."""

from inscon.clock import EMA, HEADS, OPTIMIZER, PARTS, REST, WAIT
from inscon.profiling import prediction, verdict
from inscon.profiling.page import Section
from inscon.profiling.rates import RunSpeed

LOADER, SYNTHETIC, REAL, END_TO_END = CEILINGS = (
    "loader alone", "model on synthetic batches", "model on cached batches", "end to end",
)  # fmt: skip
BATCH_OF_OVERHEAD = 256
"""Images per rank at which the step's own overhead is estimated where the batch is another."""
CPU_WARNING = 40.0
"""Percent of its cores from which on a rank's load is a warning: little is left for a slow disk or a hiccup."""
HUNGRY = 50.0
"""Percent of the times that a queue is empty when asked, from which on it is called starved."""


def stages_in_run(said: dict[str, float]) -> dict[str, float]:
    """Milliseconds per image by stage, of what a pipeline says of itself."""
    stages = ("read", "decode", "finish")
    return {name: said[f"loader_{name}_ms"] for name in stages if f"loader_{name}_ms" in said}


def starved(said: dict[str, float], ready_percent: float) -> dict[str, float]:
    """How often a queue was empty, in percent, from the disk to the trainer."""
    found = {"decoded": said["loader_graph_starved_percent"]} if "loader_graph_starved_percent" in said else {}
    return found | {"finished": said.get("loader_starved_percent", 100 - ready_percent)}


def own_overhead(parts_ms: dict[str, float], per_rank: int) -> dict[str, float]:
    """Percent of the step's work that is not the trunk's, as measured, and as estimated for a batch of 256."""
    own = {name: parts_ms[name] for name in verdict.OWN}
    trunk = sum(parts_ms[name] for name in verdict.TRUNK)
    times, fixed = BATCH_OF_OVERHEAD / per_rank, own[OPTIMIZER] + own[EMA] + own[REST]
    return {
        "measured": 100 * sum(own.values()) / (sum(own.values()) + trunk),
        "estimated_at_256_per_rank": 100 * (own[HEADS] * times + fixed) / ((own[HEADS] + trunk) * times + fixed),
    }


def title_of(report: dict) -> str:
    s = report["settings"]
    where = report["machine"].get("gpu") or report["machine"]["cpu"]
    return (
        f"Throughput: {s['model']['arch']} at {s['views']['view_size']} px through {s['loader']['pipeline']}, batch "
        f"{s['optim']['batch_size']} on {report['ranks']} x {where}, {report['precision']}, {report['date']}"
    )


def sections(report: dict) -> list[Section]:
    """The page."""
    parts = (speed, ceilings, step_parts, loader_stages, machine_use, health, side_by_side, predicted, basis)
    return [part(report) for part in parts]


def _engine(report: dict) -> dict:
    return report["engines"][report["settings"]["loader"]["pipeline"]]


def _on_gpu(report: dict) -> bool:
    return "gpu" in report["machine"]


def speed(report: dict) -> Section:
    steps, ranks, rate = report["steps"][END_TO_END], report["ranks"], report["ceilings"][END_TO_END]
    over = f"n = {steps['steps']}, {steps['warm_up']} of warm-up left out"
    target = prediction.target_of(report["machine"].get("gpu"), ranks)
    if target:
        met = "met" if rate >= target[0] else "missed"
        aim = f"{target[0]:,.0f} images/s ({target[1]}): {met}, {100 * rate / target[0]:.0f} %"
    else:
        share = _of_ceiling(100 * rate / report["ceilings"][SYNTHETIC])
        aim = f"none set for this machine; 95 % of the model alone is good. Here: {share}"
    epochs = report["settings"]["optim"]["epochs"]
    rows = [
        ("source images/s, total", f"{rate:,.1f}", over),
        ("source images/s, per device", f"{rate / ranks:,.1f}", f"{ranks} rank(s)"),
        ("step, ms, median", f"{steps['step_ms']:,.1f}", over),
        ("step, ms, 99th percentile", f"{steps['step_ms_p99']:,.1f}", over),
        (
            "this recipe on this data, h",
            f"{report['hours']:,.2f}",
            f"{epochs} epochs of {report['images_per_epoch']:,} images",
        ),
        ("200 epochs of ImageNet at this rate, h", f"{report['hours_imagenet_200']:,.1f}", "computed from the rate"),
        ("target", "", aim),
    ]
    return Section("Speed", ("", "value", "over"), rows)


def ceilings(report: dict) -> Section:
    rates = report["ceilings"]
    rows = [
        (name, f"{rate:,.1f}", _of_ceiling(100 * rates[END_TO_END] / rate))
        if rate
        else (name, "not measured: needs no data", "")
        for name, rate in rates.items()
    ]
    notes = [f"Efficiency, end to end over the smaller of the first two: {_of_ceiling(100 * report['efficiency'])}."]
    if not _on_gpu(report) and rates[LOADER]:
        both = 1 / (1 / rates[LOADER] + 1 / rates[SYNTHETIC])
        notes.append(
            "Loader and model share the processor here: if neither leaves any of it idle, the first two figures allow "
            f"{both:,.1f} images/s end to end."
        )
    return Section(
        "Four ceilings, source images/s, measured in this run", ("", "images/s", "end to end, of it"), rows, notes
    )


def _of_ceiling(percent: float) -> str:
    """A share that 100 % bounds, in words: noise reaches above it, and what is further above was never measured."""
    return f"{min(percent, 100.0):.1f} %" if percent <= 100 * verdict.NOISE else "not known"


def step_parts(report: dict) -> Section:
    steps, on_gpu = report["steps"][END_TO_END], _on_gpu(report)
    parts = steps["parts_ms"]
    rows = [(name, f"{parts[name]:,.2f}", f"{report['shares'][name]:.2f}") for name in PARTS]
    batch = report["settings"]["optim"]["batch_size"] // report["ranks"]
    rows[1:1] = _beside_the_step(report["stages_alone_ms"], batch, on_gpu)
    rows.append(("sum", f"{sum(parts.values()):,.2f}", f"{report['sum_of_shares']:.2f}"))
    notes = [
        f"Mean of {steps['steps']} steps, of the rank that waited least for others; the whole step is {steps['wall_ms']:,.2f} ms "
        f"by a clock of its own. Timing took {steps['timing_percent']:.3f} % of it ({steps['marks_per_step']:.0f} marks per step).",
        _overhead_note(report["own_overhead_percent"], batch, on_gpu),
        "Copies and device augmentation run on the loader's own stream, beside the step: what they delay shows as waiting for data."
        if on_gpu
        else "Nothing here says how these parts relate on a GPU.",
    ]
    if report["scaling"]:
        s = report["scaling"]
        notes.append(
            f"Computing takes {s['compute_ms']:,.1f} ms at batch {s['batch_size']} and {s['other_compute_ms']:,.1f} ms at batch "
            f"{s['other_batch_size']} (synthetic batches)"
            + (
                "."
                if report["verdict"]["kind"] == verdict.DISTURBED
                else f": {s['fixed_percent']:.0f} % of it does not depend on the batch."
            )
        )
    return Section("The step by part", ("", "ms", "% of the step"), rows, notes)


def _beside_the_step(alone: dict[str, float], batch: int, on_gpu: bool) -> list[tuple[str, str, str]]:
    copied, augmented = "host-to-device", "device augmentation and mosaic"
    if not on_gpu:
        return [(copied, "none: there is no device", "0.00"), (augmented, "in the loader's kernel", "0.00")]
    found = ((copied, alone.get("copy")), (augmented, alone.get(augmented)))
    return [
        (name, "not measured" if ms is None else f"{ms * batch:,.2f} beside the step", "0.00") for name, ms in found
    ]


def _overhead_note(own: dict[str, float], batch: int, on_gpu: bool) -> str:
    text = (
        f"The step's own overhead (heads, losses, optimizer, EMA, rest): {own['measured']:.1f} % of its work at {batch} images "
        "per rank"
    )
    if batch == BATCH_OF_OVERHEAD:
        return text + "."
    where = "" if on_gpu else ", on this CPU; a GPU's is not known here"
    return (
        f"{text}. ESTIMATED at {BATCH_OF_OVERHEAD} per rank: {own['estimated_at_256_per_rank']:.1f} % (trunk, heads and losses in "
        f"proportion to the images, the rest as it is{where})."
    )


def loader_stages(report: dict) -> Section:
    alone = report["stages_alone_ms"]
    if not alone:
        return Section("The loader by stage", (), (), ["No loader: the pipeline needs no data."])
    engine, ready = _engine(report), report["steps"][END_TO_END]["ready_percent"]
    said, cores = stages_in_run(engine["said"]), min(report["threads"], report["cores_of_rank"])
    in_run = {
        "read": said.get("read"),
        "decode": said.get("decode"),
        "copy": said.get("finish") if _on_gpu(report) else None,
    }
    rows = []
    for stage, ms in alone.items():
        on_device = stage in ("copy", "device augmentation and mosaic")
        rate = f"{1e3 / ms * (1 if on_device else cores):,.0f}" if ms else ""
        elsewhere = "within decode" if stage in ("crop", "color") else "not told apart"
        told = in_run.get(stage)
        rows.append((stage, f"{ms:.3f}", rate, elsewhere if told is None else f"{told:.3f}"))
    queues = starved(engine["said"], ready)
    notes = [
        f"{engine['described']}.",
        f"Alone: one thread, nothing beside it; images/s for {cores:g} core(s) at that rate. In the run: as the engine counts, "
        "which for ffcv and reference adds up its threads and for dali is the time its graph was waited for.",
        "Readiness of the queues in the run: "
        + ", ".join(f"{name} batches {100 - empty:.0f} %" for name, empty in queues.items())
        + f". {_first_starved(queues, said, report['shares'][WAIT])}",
    ]
    columns = ("stage", "alone, ms per image", "alone, images/s", "in the run, ms per image")
    return Section("The loader by stage", columns, rows, notes)


def _first_starved(queues: dict[str, float], said: dict[str, float], wait_percent: float) -> str:
    hungry = next((name for name, percent in queues.items() if percent >= HUNGRY), None)
    if hungry is None or wait_percent < 1:
        return "No queue kept the trainer waiting."
    stage = verdict.starving_stage(queues, said)
    return f"First starved: {hungry} batches; the stage in front of it that takes longest: {stage}."


def machine_use(report: dict) -> Section:
    steps, memory, cores, on_gpu = (
        report["steps"][END_TO_END],
        report["memory"],
        report["cores_of_rank"],
        _on_gpu(report),
    )
    said, flops, copies = _engine(report)["said"], report["flops"], report["copy_bytes_per_s"]
    load = 100 * steps["cpu_cores"] / cores
    matrices = report["matrix_flops_per_s"] / 1e12
    used = f"{steps['cpu_cores']:.1f} of {cores:g} cores"
    if not on_gpu:
        used += "; the model runs on them too, so nothing is said of the loader"
    elif load > CPU_WARNING:
        used += f"; WARNING: more than {CPU_WARNING:.0f} %, a slow disk or a hiccup will be felt"
    no_device = "not known" if on_gpu else "no device"
    of_loader = f"{said['loader_device_mb']:,.0f}" if "loader_device_mb" in said else no_device
    passes = f"{flops['views_trained']:.2f} forward and backward passes of a view, and the heads"
    rows = [
        ("arithmetic of a source image, GFLOP", f"{flops['step'] / 1e9:.1f}", passes),
        (
            "matrix products here, TFLOP/s",
            f"{matrices:.3f}",
            f"measured in this run, {report['precision']}",
        ),
        ("model-FLOP utilisation, %", _mfu(report["mfu_percent"]), "end to end, of that rate"),
        (
            "PyTorch's device memory at its peak, MB",
            f"{memory['torch_peak_mb']:,.0f}" if on_gpu else no_device,
            "of rank 0",
        ),
        ("loader's device memory, MB", of_loader, "beside PyTorch's"),
        (
            "host memory now / at its peak, MB",
            f"{memory['host_mb']:,.0f} / {memory['host_peak_mb']:,.0f}",
            "this process (RSS), without the reference's workers",
        ),
        ("processor of a rank, % of its cores", f"{load:.0f}", used),
        (
            "bus to the GPU, GB/s",
            f"{copies / 1e9:.1f}" if copies else "no device",
            "page-locked memory, measured in this run",
        ),
    ]
    return Section("The machine", ("", "value", "over"), rows)


def _mfu(percent: float | None) -> str:
    return "not known" if percent is None else f"{percent:.1f}"


def health(report: dict) -> Section:
    found, loader = _engine(report)["health"], _engine(report)["loader"]
    if not found:
        return Section("Data", (), (), ["No data: the pipeline makes them up."])
    stall = "no seam in what was measured" if loader["seam_stall_ms"] is None else f"{loader['seam_stall_ms']:+.1f}"
    once = "yes" if not found["repeated"] else f"NO: {found['repeated']} seen again"
    batch = f"median of {loader['batches']}; 99th percentile {loader['batch_ms_p99']:.1f}"
    rows = [
        ("each image once per epoch", once, f"{found['images']:,} images of {found['epochs']} epoch(s)"),
        ("pairs of views that overlap, %", f"{found['overlap_percent']:.2f}", "of these"),
        ("samples substituted for bad ones", str(found["substituted"]), "of these"),
        ("pictures left out when the set was packed", str(report["left_out"]), "of the whole set"),
        ("first batch, s", f"{loader['first_batch_s']:.2f}", f"after {loader['opened_s']:.2f} s of opening"),
        ("first batch of an epoch, ms longer than others", stall, f"{loader['seams']} seam(s), loader alone, medians"),
        ("a batch of the loader alone, ms", f"{loader['batch_ms']:.1f}", batch),
    ]
    return Section("Data", ("", "value", "over"), rows)


def side_by_side(report: dict) -> Section:
    if len(report["engines"]) < 2:
        return Section(
            "Engines side by side",
            (),
            (),
            ["One engine was measured; --pipelines dali,reference sets two side by side."],
        )
    rows = []
    for name, found in report["engines"].items():
        loader, steps = found["loader"], found["end_to_end"]
        rows.append(
            (
                name,
                f"{loader['images_per_s']:,.1f}" if loader else "",
                f"{steps['images_per_s']:,.1f}",
                f"{steps['worst_wait_percent']:.2f}",
                f"{steps['ready_percent']:.0f}",
                f"{loader['opened_s'] + loader['first_batch_s']:.2f}" if loader else "",
            )
        )
    columns = (
        "engine",
        "alone, images/s",
        "end to end",
        "data wait, %",
        "batches ready, %",
        "opening and first batch, s",
    )
    return Section("Engines side by side", columns, rows)


def predicted(report: dict) -> Section:
    notes = [one["sentence"] for one in report["predictions"]]
    return Section("Predictions", (), (), notes or [f"None asked for: --predict {', '.join(prediction.MACHINES)}."])


def basis(report: dict) -> Section:
    rows = [(name, str(value)) for name, value in [*report["machine"].items(), *report["versions"].items()]]
    rows += [
        ("ranks", str(report["ranks"])),
        ("torch's threads", str(report["torch_threads"])),
        ("SGD", report["optimizer"]),
    ]
    return Section("Measured on", ("", "value"), rows)


LOADER_WORDS = {
    "starved_percent": "batches not ready when asked for, %",
    "graph_starved_percent": "runs of the loader's graph not ready, %",
    "read_ms": "read and plan, ms per image",
    "decode_ms": "decode and crop, ms per image",
    "finish_ms": "color and copy, ms per image",
    "substituted": "samples substituted so far, all ranks",
    "device_mb": "device memory, MB",
}
"""What the pipeline says of itself, in words."""


def run_section(speed: RunSpeed) -> Section:
    """How fast a run was, waiting for what, learning what."""
    over = f"median of {speed.windows} windows, {speed.steps} steps, warm-up left out"
    rows = [
        ("source images/s", f"{speed.images_per_s:.1f}", over),
        ("step, ms", f"{speed.step_ms:.1f}", f"the same; 99th percentile {speed.step_ms_p99:.1f}"),
        ("data wait, % of the step", f"{speed.data_wait_percent:.2f}", "the same; worst rank"),
    ]
    rows.append(("model-FLOP utilisation, %", _mfu(speed.mfu_percent), "the same; of the rate measured at its start"))
    rows += [
        (f"loader: {LOADER_WORDS.get(name, name)}", f"{value:.2f}", "the same; worst rank")
        for name, value in speed.loader.items()
    ]
    over_time = f"windows that end with steps {speed.first['step']} (queues full) and {speed.last['step']}"
    for name in ("single", "multi", "cell"):
        if f"loss_{name}" in speed.last:
            before, after = speed.first[f"loss_{name}"], speed.last[f"loss_{name}"]
            top1 = 100 * speed.last[f"top1_{name}"]
            rows.append((f"loss, {name} head", f"{before:.3f} -> {after:.3f}", f"{over_time}; top-1 now {top1:.0f} %"))
    return Section("The run", ("", "value", "over"), rows)
