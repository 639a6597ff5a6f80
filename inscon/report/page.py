"""A report as a page of Markdown: what report.json says, in tables."""

from collections.abc import Iterable, Sequence

from inscon.report import verdict
from inscon.report.prediction import EPOCHS, IMAGENET


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence], note: str = "") -> str:
    """A heading, a table whose first column is text and whose others are figures, and what is to be said. No table without rows."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    lines = lines if len(lines) > 2 else []
    cells = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([f"## {title}", "", *cells, "", note, ""])


def title_of(settings: dict) -> str:
    return (
        f"# {settings['method']['name']}, {settings['model']['backbone']} at {settings['views']['view_size']} px through "
        f"{settings['loader']['pipeline']}, batch {settings['optim']['batch_size']}"
    )


def page(report: dict) -> str:
    """All of it."""
    where = report["machine"].get("gpu") or report["machine"]["cpu"]
    title = f"{title_of(report['settings'])} on {report['ranks']} x {where}, {report['precision']}, {report['date']}\n"
    sections = [part(report) for part in (ceilings, figures, step_parts, device, loader_stages)]
    measured_on = table("Measured on", ("", "version"), (report["machine"] | report["versions"]).items())
    sentence = f"**{report['verdict']['sentence']}**\n"
    return "\n".join([title, sentence, *sections, *[f"{line}\n" for line in report["predictions"]], measured_on])


def ceilings(report: dict) -> str:
    rates = {name: rate for name, rate in report["ceilings"].items() if rate}
    rows = [(name, f"{rate:,.1f}", f"{100 * rates[verdict.END_TO_END] / rate:.1f} %") for name, rate in rates.items()]
    return table("Ceilings", ("", "source images/s", "end to end, of it"), rows)


def figures(report: dict) -> str:
    steps, optim, cores = report["end_to_end"], report["settings"]["optim"], report["cores_of_rank"]
    rate, images = steps["images_per_s"], report["steps_per_epoch"] * optim["batch_size"]
    mfu = "not known" if report["mfu_percent"] is None else f"{report['mfu_percent']:.1f}"
    rows = [
        ("source images/s per device", f"{rate / report['ranks']:,.1f}"),
        (f"step, median of {steps['steps']}, ms", f"{steps['step_ms']:,.1f}"),
        ("step, 99th percentile, ms", f"{steps['step_ms_p99']:,.1f}"),
        (f"{optim['epochs']} epochs of these {images:,} images, h", f"{optim['epochs'] * images / rate / 3600:,.2f}"),
        (f"{EPOCHS} epochs of ImageNet, h", f"{EPOCHS * IMAGENET / rate / 3600:,.1f}"),
        ("arithmetic of a source image, GFLOP", f"{report['flops_per_image'] / 1e9:.1f}"),
        ("the same, in forward and backward passes of one view", f"{report['trainings']:.2f}"),
        ("matrix products here and now, TFLOP/s", f"{report['matrix_flops_per_s'] / 1e12:.3f}"),
        ("model-FLOP utilization (MFU), % of that", mfu),
        ("memory copied here and now, GB/s read and written", f"{report['copy_bytes_per_s'] / 1e9:,.1f}"),
        (f"processor, cores busy of the {cores:g} of a rank", f"{steps['cpu_cores']:.1f}"),
        *[(name, f"{value:,.0f}") for name, value in report["memory"].items()],
    ]
    return table("Figures", ("end to end", "value"), rows)


def device(report: dict) -> str:
    found = report["device"]
    if found is None:
        return "## The GPU\n\nno GPU\n"
    step, fed = found["step"], found.get("fed_kernel_ms", {})
    busy = min(100 * step["busy_ms"] / verdict.alone_ms(report), 100.0)
    memory = "not known" if report["memory_percent"] is None else f"{report['memory_percent']:.1f}"
    rows = [
        ("launches", f"{step['launches']:,.0f}", ""), ("host's time for them, ms", f"{step['host_ms']:,.1f}", ""),
        ("GPU busy, % of the step as the run takes it", f"{busy:.1f}", ""),
        ("bytes that a step moves at least, GB", f"{found['bytes'] / 1e9:,.1f}", ""),
        ("copying as many, % of the step", memory, ""),
        *[(f"{name}, ms", f"{step['kernel_ms'].get(name, 0):,.2f}", f"{fed[name]:,.2f}" if name in fed else "")
          for name in step["kernel_ms"] | fed],
    ]  # fmt: skip
    if "taken_ms" in found:
        rows.append(("taken by the loader from a step of the run, ms", "", f"{found['taken_ms']:,.2f}"))
    return table("The GPU, in eager steps", ("", "alone", "with the loader"), rows)


def step_parts(report: dict) -> str:
    steps, shares = report["end_to_end"], report["shares"]
    parts = [*steps["parts_ms"].items(), ("sum", sum(steps["parts_ms"].values()))]
    rows = [(name, f"{ms:,.2f}", f"{100 * ms / steps['wall_ms']:.2f}") for name, ms in parts]
    own = sum(shares.get(name, 0.0) for name in verdict.OWN)
    note = (
        f"Means, of the rank that waited least for others; by a clock of its own the whole step is {steps['wall_ms']:,.2f} ms. "
        f"The step's own overhead ({', '.join(verdict.OWN)}) is {own:.1f} %."
    )
    if report["graphed"]:
        note += " It is a CUDA graph: its time is divided here as eager steps divide theirs."
    return table("The step by part", ("", "ms", "% of the step"), rows, note)


def loader_stages(report: dict) -> str:
    said = report["loader"]
    labels = {
        "loader_graph_starved_percent": "no decoded picture when asked, %", "loader_starved_percent": "no batch when asked, %",
        "first_batch_s": "first batch, s", "loader_device_mb": "device memory beside PyTorch's, MB",
    }  # fmt: skip
    rows = [(f"{stage}, ms per image", f"{ms:.3f}") for stage, ms in verdict.stages(said).items()]
    rows += [(label, f"{said[key]:,.1f}") for key, label in labels.items() if key in said]
    note = (
        f"{report['described']}. As the engine counts: read with plan, decode with views; ffcv and reference add up their threads, "
        f"dali's is how long its graph was waited for. First to mend if the step waits: {verdict.starving_stage(said)}."
    )
    return table("The loader by stage, in the run", ("", "value"), rows, note)
