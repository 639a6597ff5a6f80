"""What holds a run back, from what report.json holds of it: the kind of bound, the stage that binds, what to do and what it gives.
And whether two reports may be compared, and what became slower."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from inscon.clock import AFTER_UPDATE, OPTIMIZER, REST, WAIT, WIRE

VERSION = 2
"""Of report.json; another one is not compared."""
LOADER, SYNTHETIC, REAL, END_TO_END = CEILINGS = (
    "loader alone", "model on synthetic batches", "model on cached batches", "end to end",
)  # fmt: skip
OWN = (OPTIMIZER, AFTER_UPDATE, REST)
"""Parts of a step that are neither passes through the networks nor waiting."""
NOTICED = 5.0
"""Percent of a step from which on waiting for data, for other ranks or for nothing is what to mend first."""
OVERHEAD = 10.0
"""Percent of a step that OWN should stay under."""
FIXED = 35.0
"""Percent of the computing that does not shrink with the batch, from which on the batch is too small."""
HUNGRY = 50.0
"""Percent of the times that a queue is empty when asked, from which on it is called starved."""
FED = 1.05
"""A bus that carries no more than so many times what the loader makes has nothing in hand."""
NOISE = 1.1
"""What is up to so many times its ceiling differs from it by noise; what is more cannot be, so that the ceiling is wrong."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of a report."""

    kind: str
    """GPU-bound, CPU-bound, loader-bound, copy-bound, launch-bound, communication-bound; host-bound, where time goes by in the
    step and no part of it claims it; or disturbed."""
    stage: str
    """Which stage or part binds; of a disturbed report, what cannot be true of it."""
    advice: str
    """The next thing to do."""
    gain: float = 1.0
    """images/s at best, once it is done, over those of now."""

    def sentence(self) -> str:
        if self.kind == "disturbed":
            return f"No verdict: the machine was disturbed, {self.advice}. Found: {self.stage}."
        gives = f"up to {self.gain:.2f} times the images/s" if self.gain >= 1.005 else "no more images/s by itself"
        return f"{self.kind}. What binds: {self.stage}. Next: {self.advice} ({gives})."


ADVICE = {
    "read": "bring the data nearer: a local SSD, or memory that holds the set",
    "decode": "more cores for --threads, --pipeline ffcv where the host decodes, --decode auto on a GPU, or a set packed with "
    "--short-side 400",
    "finish": "--color device if the host colors, --color host if the device does",
}
"""By the loader's stage."""


def conclusions(report: dict) -> dict:
    """What follows from what was measured."""
    rates, world = report["ceilings"], report["ranks"]
    bound = min(rate for rate in (rates[LOADER], rates[SYNTHETIC]) if rate)
    mfu = 100 * rates[END_TO_END] * report["flops_per_image"] / (world * report["matrix_flops_per_s"])
    found = disturbed(report) or judge(report)
    return {
        "efficiency": rates[END_TO_END] / bound,
        "mfu_percent": mfu if mfu <= 100 else None,
        "verdict": asdict(found) | {"sentence": found.sentence()},
    }


def judge(report: dict) -> Verdict:
    """What to mend first: what the step waits for; if it waits for nothing, whether its batch is too small; else its own work."""
    shares, scaling = report["shares"], report["scaling"]
    worst = max((WAIT, WIRE, REST), key=lambda name: shares.get(name, 0.0))
    if shares.get(worst, 0.0) >= NOTICED:
        return _waiting(report, worst, 100 / (100 - min(shares[worst], 99.0)))
    if scaling and scaling["fixed_percent"] >= FIXED:
        fixed, batch_size = scaling["fixed_percent"], scaling["batch_size"]
        stage = f"launches and the optimizer, {fixed:.0f} % of the computing, the same for any batch"
        return Verdict("launch-bound", stage, f"--batch-size {2 * batch_size} or more", 2 / (2 - fixed / 100))
    kind, own = "GPU-bound" if "gpu" in report["machine"] else "CPU-bound", sum(shares.get(name, 0.0) for name in OWN)
    if own >= OVERHEAD:
        largest = max(OWN, key=lambda name: shares.get(name, 0.0))
        stage = f"the step's own overhead ({own:.0f} %), most of all {largest}"
        return Verdict(kind, stage, f"look into {largest}: --trace 3", 100 / (100 - shares[largest]))
    advice = (
        "nothing in the data path; see MFU for what the kernels leave, and --compare before and after a change"
        if kind == "GPU-bound"
        else "a GPU; on this CPU the loader is fast enough"
    )
    return Verdict(kind, "the passes through the networks", advice)


def _waiting(report: dict, for_what: str, gain: float) -> Verdict:
    if for_what == WIRE:
        advice = "--gradient-compression fp16, a larger --batch-size, or a faster link between the ranks"
        return Verdict("communication-bound", WIRE, advice, gain)
    if for_what == REST:
        advice = "look at what the host does there: --trace 3"
        return Verdict("host-bound", "time in the step outside of all its parts", advice, gain)
    rates = report["ceilings"]
    gain = min(gain, max(rates[SYNTHETIC] / rates[END_TO_END], 1.0))
    copies = report["copy_bytes_per_s"] and report["ranks"] * report["copy_bytes_per_s"] / report["view_bytes"]
    if copies and rates[LOADER] and copies <= FED * rates[LOADER]:
        return Verdict("copy-bound", "the bus to the GPU", "--decode mixed, so that JPEGs travel", gain)
    stage = starving_stage(engine_of(report))
    return Verdict("loader-bound", f"the loader's stage {stage}", ADVICE.get(stage, "see the loader by stage"), gain)


def engine_of(report: dict) -> dict:
    """What was measured of the engine that the verdict is on."""
    return report["engines"][report["settings"]["loader"]["pipeline"]]


def stages_in_run(engine: dict) -> dict[str, float]:
    """Milliseconds per image by stage, of what a pipeline says of itself."""
    names = {name: f"loader_{name}_ms" for name in ("read", "decode", "finish")}
    return {name: engine["said"][key] for name, key in names.items() if key in engine["said"]}


def starved(engine: dict) -> dict[str, float]:
    """How often a queue was empty when asked, in percent, from the disk to the trainer: "decoded" is behind read and decode,
    "finished" behind all."""
    said, late = engine["said"], 100 - engine["end_to_end"]["ready_percent"]
    found = {"decoded": said["loader_graph_starved_percent"]} if "loader_graph_starved_percent" in said else {}
    return found | {"finished": said.get("loader_starved_percent", late)}


def starving_stage(engine: dict) -> str:
    """The stage in front of the first starved queue: of those before it, the one that takes longest. A queue that is seldom empty
    clears every stage before it."""
    queues, stages = starved(engine), stages_in_run(engine)
    if queues.get("decoded", HUNGRY) < HUNGRY <= queues["finished"]:
        stages = {name: ms for name, ms in stages.items() if name == "finish"} or stages
    return max(stages, key=stages.get, default="unknown")


def fixed_percent(batch_size: int, compute_ms: float, other_batch_size: int, other_compute_ms: float) -> float:
    """What would be left of a step's computing at no images, by the line through two batch sizes; 0..100."""
    slope = (other_compute_ms - compute_ms) / (other_batch_size - batch_size)
    return min(max(100 * (1 - slope * batch_size / compute_ms), 0.0), 100.0)


def contradictions(report: dict) -> list[str]:
    """What cannot be true of a report: ceilings beaten by what they bound, shares above 100 %, negative time per image."""
    ceilings, s, of_parts = report["ceilings"], report["scaling"], sum(report["shares"].values())
    rate, matrices = ceilings[END_TO_END], report["matrix_flops_per_s"] / 1e12
    used = rate * report["flops_per_image"] / report["ranks"] / 1e12
    found = [
        f"{rate:,.1f} images/s end to end, above the {ceiling:,.1f} of the {name}"
        for name, ceiling in ceilings.items()
        if ceiling and rate > NOISE * ceiling
    ]
    for name, engine in report["engines"].items():
        alone, fed = engine["loader"] and engine["loader"]["images_per_s"], engine["end_to_end"]["images_per_s"]
        if alone and fed != rate and fed > NOISE * alone:
            found.append(f"{fed:,.1f} images/s through {name}, above the {alone:,.1f} of that loader alone")
    if used > NOISE * matrices:
        found.append(f"{used:.3f} TFLOP/s in the step, above the {matrices:.3f} of matrix products")
    if of_parts > 100 * NOISE:
        found.append(f"{of_parts:.0f} % of the step in all its parts")
    if s:
        sizes = (s["batch_size"], s["compute_ms"]), (s["other_batch_size"], s["other_compute_ms"])
        (few, short), (many, long) = sorted(sizes)
        if short > NOISE * long:
            found.append(f"{long:,.1f} ms for a batch of {many}, less than the {short:,.1f} ms for one of {few}")
    return found


def disturbed(report: dict) -> Verdict | None:
    """Instead of a verdict, where there are `contradictions`."""
    found = "; ".join(contradictions(report))
    return Verdict("disturbed", found, "measure again, with nothing beside it and more --steps") if found else None


# -------------------------------------------------------------------------------------------------------- two reports

MEMORY = {"host memory at its peak, MB": "host_peak_mb", "PyTorch's device memory at its peak, MB": "torch_peak_mb"}


def load_report(path: Path) -> dict:
    """ValueError, naming the file, for what is no report of this version, and for one whose figures cannot be true."""
    try:
        report = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give two report.json files") from None
    except ValueError:
        report = None
    version = report.get("report_version") if isinstance(report, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{path} must be a report.json of version {VERSION}. Found: {version}; make it anew with scripts/throughput_report.py"
        )
    found = disturbed(report)
    if found:
        raise ValueError(f"{path} cannot be compared. {found.sentence()}")
    return report


def compare(before: dict, after: dict) -> list[tuple[str, float, float, float]]:
    """(figure, before, after, percent by which it became worse) of all that both have. ValueError where machine or settings
    differ, naming which."""
    one, other = _set_up(before), _set_up(after)
    differ = [
        f"{name} {one.get(name)} and {other.get(name)}" for name in one | other if one.get(name) != other.get(name)
    ]
    if differ:
        raise ValueError(
            f"two reports are compared on one machine with one set-up. Found: {', '.join(differ)}; measure both in the same way"
        )
    figures = [(name, -1, [report["ceilings"][name] for report in (before, after)]) for name in CEILINGS]
    figures += [(name, 1, [report["memory"][key] for report in (before, after)]) for name, key in MEMORY.items()]
    return [(name, a, b, sign * 100 * (b - a) / a) for name, sign, (a, b) in figures if a and b]


def _set_up(report: dict) -> dict:
    """What must be equal for a comparison to mean anything."""
    settings, found = report["settings"], {name: report[name] for name in ("precision", "ranks")}
    groups = {name: settings[name] for name in ("method", "model", "views")} | {"machine": report["machine"]}
    found |= {f"{group} {name}": value for group, values in groups.items() for name, value in values.items()}
    return found | {"pipeline": settings["loader"]["pipeline"], "batch size": settings["optim"]["batch_size"]}
