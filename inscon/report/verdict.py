"""What holds a run back, from what report.json holds of it: the kind of bound, the stage that binds, what to do and what it gives.
And whether two reports may be compared, and what became slower."""

import contextlib
import json
from pathlib import Path

from inscon.clock import AFTER_UPDATE, OPTIMIZER, REST, WAIT, WIRE

VERSION = 5  # Of report.json; another one is not compared.
CEILINGS = LOADER, MODEL, END_TO_END = "loader alone", "model alone, on synthetic batches", "end to end"
OWN = (OPTIMIZER, AFTER_UPDATE, REST)  # Neither passes through the networks nor waiting.
NOTICED = 5.0  # Percent of a step from which on waiting, for whatever, is what to mend first.
OVERHEAD = 10.0  # Percent of a step that OWN should stay under.
LAUNCHING = 90.0  # Percent of a step that the host needs to launch it, from which on the device waits for that.
HUNGRY = 50.0  # Percent of the times that a queue is empty when asked, from which on it is starved.
NOISE = 1.1  # What is up to so many times its ceiling is so by noise; if it is more, the ceiling is wrong.
ADVICE = {
    "read": "bring the data nearer: a local SSD, or memory that holds the set",
    "decode": "more cores for --threads, --pipeline ffcv where the host decodes, --decode auto on a GPU, or a set packed with "
    "--short-side 400",
    "finish": "--color device if the host colors, --color host if the device does",
    "unknown": "see the loader by stage",
}
"""By the loader's stage."""
BESIDE = "--color host and --decode cpu, if the host has cores for that"


def conclusions(report: dict) -> dict:
    """What follows from what was measured: MFU, the same of copies within memory, None where not known, and the verdict: the `kind`
    of bound, the `stage` or part that binds, the `advice` what to do next, the `gain` at best, images/s then over images/s now, and
    all that as a `sentence`. A "disturbed" one says what cannot be true instead."""
    rate, device, copied = report["ceilings"][END_TO_END], report["device"], report["copy_bytes_per_s"]
    mfu = 100 * rate * report["flops_per_image"] / (report["ranks"] * report["matrix_flops_per_s"])
    memory = 1e5 * device["bytes"] / (copied * report["end_to_end"]["wall_ms"]) if device else None
    mfu, memory = (percent if percent is not None and percent <= 100 else None for percent in (mfu, memory))
    return {"mfu_percent": mfu, "memory_percent": memory, "verdict": disturbed(report) or judge(report)}


def alone_ms(report: dict) -> float:
    """Milliseconds of a step on synthetic batches."""
    return 1e3 * report["settings"]["optim"]["batch_size"] / report["ceilings"][MODEL]


def _launching(report: dict) -> tuple[float, str]:
    """Percent of a step for which a GPU waits for launches, 0 where they don't bind; and what to say of them."""
    if report["device"] is None or report["graphed"]:
        return 0.0, ""
    step, ms = report["device"]["step"], alone_ms(report)
    idle = 100 * max(1 - step["busy_ms"] / ms, 0.0) if step["host_ms"] >= LAUNCHING / 100 * ms else 0.0
    launches, host = f"{step['launches']:,.0f} launches", f"{step['host_ms']:.1f} of its {ms:.1f} ms"
    return idle, f"{launches} a step, for which the host needs {host}"


def judge(report: dict) -> dict:
    """What to mend first: what the step waits for; if it waits for nothing, its own work."""
    *waits, own, healthy = _cases(report)
    waits.sort(key=lambda case: case[0], reverse=True)
    _, _, kind, stage, advice, saved = next(case for case in (*waits, own, healthy) if case[0] >= case[1])
    gain = 100 / (100 - min(saved, 99.0))
    gives = f"up to {gain:.2f} times the images/s" if gain >= 1.005 else "no more images/s by itself"
    sentence = f"{kind}. What binds: {stage}. Next: {advice} ({gives})."
    return {"kind": kind, "stage": stage, "advice": advice, "gain": gain, "sentence": sentence}


def _cases(report: dict) -> list[tuple]:
    """(percent found, percent from which on it binds, kind, stage, advice, percent of the step that mending saves at most)."""
    shares, rates = {name: report["shares"].get(name, 0.0) for name in (WAIT, WIRE, *OWN)}, report["ceilings"]
    own, largest, loader = sum(map(shares.get, OWN)), max(OWN, key=shares.get), starving_stage(report["loader"])
    taken = 100 * (report["device"] or {}).get("taken_ms", 0.0) / report["end_to_end"]["wall_ms"]
    waiting, launches = _launching(report)
    computing, idle = "CPU-bound", "a GPU; on this CPU the loader is fast enough"
    if "gpu" in report["machine"]:
        computing, idle = "GPU-bound", "nothing in the data path; see the kernels, MFU and memory for what is left"
    stage, advice = f"the loader's stage {loader}", ADVICE[loader]
    colors = (report["device"] or {}).get("fed_kernel_ms", {}).get("color", 0.0)
    if colors and rates[LOADER] > NOISE * rates[MODEL]:  # fast enough while the GPU does nothing else
        stage, advice = "the loader's work on the GPU, which waits for the step's", BESIDE
    more = min(shares[WAIT], 100 * max(1 - rates[END_TO_END] / rates[MODEL], 0.0))  # the model alone is a ceiling
    return [
        (shares[WAIT], NOTICED, "loader-bound", stage, advice, more),
        (shares[WIRE], NOTICED, "communication-bound", WIRE,
         "--gradient-compression fp16, a larger --batch-size, or a faster link between the ranks", shares[WIRE]),
        (shares[REST], NOTICED, "host-bound", "time in the step outside of all its parts",
         "look at what the host does there: --trace 3", shares[REST]),
        (waiting, NOTICED, "host-bound", launches, "--graph auto, one launch for all of them, or a larger --batch-size", waiting),
        (taken, NOTICED, "loader-bound", f"the loader's work on the GPU beside the step, {taken:.0f} % of it", BESIDE, taken),
        (own, OVERHEAD, computing, f"the step's own overhead ({own:.0f} %), most of all {largest}",
         f"a larger --batch-size, whose images share it, or look into {largest}: --trace 3", shares[largest]),
        (100.0, 0.0, computing, "the passes through the networks", idle, 0.0),
    ]  # fmt: skip


def stages(said: dict) -> dict[str, float]:
    """Milliseconds per image by stage, of what a pipeline says of itself."""
    return {name: said[f"loader_{name}_ms"] for name in ADVICE if f"loader_{name}_ms" in said}


def starving_stage(said: dict) -> str:
    """The stage in front of the first queue that is seldom ready: of those before it, the one that takes longest. A queue that is
    mostly ready clears every stage before it: that of decoded pictures is behind read and decode, that of batches behind all."""
    took = stages(said)
    decoded, finished = said.get("loader_graph_starved_percent", HUNGRY), said.get("loader_starved_percent", HUNGRY)
    return "finish" if "finish" in took and decoded < HUNGRY <= finished else max(took, key=took.get, default="unknown")


def disturbed(report: dict) -> dict | None:
    """Instead of a verdict, where figures cannot be true: a ceiling beaten by what it bounds."""
    rates = report["ceilings"]
    rate, used = rates[END_TO_END], rates[END_TO_END] * report["flops_per_image"] / report["ranks"]
    claims = [
        *[(rate, "images/s end to end", rates[name], f"of the {name}") for name in CEILINGS if rates[name]],
        (used / 1e9, "GFLOP/s in the step", report["matrix_flops_per_s"] / 1e9, "of matrix products"),
        (sum(report["shares"].values()), "% of the step in all its parts", 100.0, "% of the step itself"),
    ]
    found = "; ".join(f"{a:,.1f} {what}, above the {b:,.1f} {of}" for a, what, b, of in claims if a > NOISE * b)
    sentence = f"No verdict: the machine was disturbed, measure again, with nothing beside it and more --steps. Found: {found}."
    return {"kind": "disturbed", "stage": found, "sentence": sentence} if found else None


def load_report(path: Path) -> dict:
    """ValueError, naming the file, for what is no report of this version, and for one whose figures cannot be true."""
    report = None
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}; give the report.json in the --out of a measurement")
    with contextlib.suppress(ValueError):
        report = json.loads(Path(path).read_text())
    version = report.get("report_version") if isinstance(report, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} must be a report.json of version {VERSION}. Found: {version}; make it anew")
    if found := disturbed(report):
        raise ValueError(f"{path} cannot be compared. {found['sentence']}")
    return report


def compare(before: dict, after: dict) -> list[tuple[str, float, float, float]]:
    """(figure, before, after, percent by which it became worse) of all that both have. ValueError where machine or settings
    differ, naming which."""
    one, other = _set_up(before), _set_up(after)
    names = [name for name in one | other if one.get(name) != other.get(name)]
    if differ := [f"{name} {one.get(name)} and {other.get(name)}" for name in names]:
        raise ValueError(f"two reports must be of one set-up. Found: {', '.join(differ)}; measure both in the same way")
    found = []
    for group, sign in (("ceilings", -1), ("memory", 1)):
        pairs = [(name, before[group][name], after[group][name]) for name in before[group]]
        found += [(name, a, b, sign * 100 * (b - a) / a) for name, a, b in pairs if a and b]
    return found


def _set_up(report: dict) -> dict:
    """What must be equal for a comparison to mean anything."""
    settings, run = report["settings"], {name: report[name] for name in ("precision", "ranks")}
    groups = {name: settings[name] for name in ("method", "model", "views")} | {"machine": report["machine"]}
    groups["run"] = run | {"batch size": settings["optim"]["batch_size"]}
    return {f"{group} {name}": value for group, values in groups.items() for name, value in values.items()}
