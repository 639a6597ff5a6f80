"""What holds a run back, from what was measured of it: the kind of bound, the stage that binds, what to do and what it gives."""

from dataclasses import dataclass

from inscon.clock import BACKWARD, EMA, HEADS, KEY, MOSAIC, OPTIMIZER, QUERY, REST, WAIT, WIRE

TRUNK = (QUERY, MOSAIC, KEY, BACKWARD)
"""The parts that the machine is there for."""
OWN = (HEADS, OPTIMIZER, EMA, REST)
"""The step's own overhead."""
NOTICED = 5.0
"""Percent of a step from which on waiting for data, for other ranks or for nothing is what to mend first."""
OVERHEAD = 10.0
"""Percent of a step that its own overhead should stay under."""
FIXED = 35.0
"""Percent of the computing that does not shrink with the batch, from which on the batch is too small."""
FED = 1.05
"""A loader that is no faster than so many times the step has nothing in hand."""
NOISE = 1.1
"""What is up to so many times its ceiling differs from it by noise; what is more cannot be, so that the ceiling is wrong."""

GPU, LOADER, COPY, LAUNCH, COMMUNICATION, HOST = (
    "GPU-bound", "loader-bound", "copy-bound", "launch-bound", "communication-bound", "host-bound",
)  # fmt: skip
"""The last: time goes by in the step and no part of it claims it."""
DISTURBED = "disturbed"
"""No bound: the figures contradict each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """The same step at another batch size, on synthetic batches."""

    batch_size: int
    """Of all ranks."""
    other_batch_size: int
    compute_ms: float
    """Of a step, its computing parts alone."""
    other_compute_ms: float

    @property
    def fixed_percent(self) -> float:
        """What of `compute_ms` would be left at no images, by the line through both; 0..100."""
        slope = (self.other_compute_ms - self.compute_ms) / (self.other_batch_size - self.batch_size)
        return min(max(100 * (1 - slope * self.batch_size / self.compute_ms), 0.0), 100.0)

    def gain_of_doubling(self) -> float:
        """images/s at twice the batch over those at this one, by the same line."""
        return 2 / (2 - self.fixed_percent / 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a verdict rests on."""

    on_gpu: bool
    end_to_end: float
    """images/s, and so are the next three."""
    loader: float | None
    """None for a pipeline that needs no data."""
    model: float
    """On synthetic batches."""
    copies: float | None
    """How many images a second the bus would carry; None where none are copied."""
    shares: dict[str, float]
    """Percent of the step by part."""
    stages_ms: dict[str, float]
    """Of the loader in the run, by stage: milliseconds per image."""
    starved: dict[str, float]
    """Percent of the times that a queue was empty when asked, in the order from the disk to the trainer."""
    scaling: Scaling | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One line of a report."""

    kind: str
    stage: str
    """Which stage or part binds."""
    advice: str
    """The next thing to do."""
    gain: float
    """images/s at best, once it is done, over those of now."""

    def sentence(self) -> str:
        if self.kind == DISTURBED:
            return f"No verdict: the machine was disturbed, {self.advice}. Found: {self.stage}."
        gives = f"up to {self.gain:.2f} times the images/s" if self.gain >= 1.005 else "no more images/s by itself"
        return f"{self.kind}. What binds: {self.stage}. Next: {self.advice} ({gives})."


ADVICE = {
    "read": "bring the data nearer: a local SSD, or memory that holds the set; on a slow disk --shuffle-window 65536",
    "decode": "more cores for --threads, --pipeline ffcv where the host decodes, --decode auto on a GPU, or a set packed with "
    "--short-side 400",
    "finish": "--color device if the host colors, --color host if the device does",
}
"""By the loader's stage."""


def judge(evidence: Evidence) -> Verdict:
    """What to mend first: what the step waits for; if it waits for nothing, whether its batch is too small; else its own work."""
    shares = evidence.shares
    reachable = max(evidence.model / evidence.end_to_end, 1.0)
    waits = {WAIT: shares.get(WAIT, 0.0), WIRE: shares.get(WIRE, 0.0), REST: shares.get(REST, 0.0)}
    worst = max(waits, key=lambda name: waits[name])
    if waits[worst] >= NOTICED:
        without = 100 / (100 - min(waits[worst], 99.0))
        if worst == WAIT:
            return _starving(evidence, min(without, reachable))
        if worst == WIRE:
            return Verdict(
                kind=COMMUNICATION,
                stage=WIRE,
                advice="--gradient-wire fp16, a larger --batch-size, or a faster link between the ranks",
                gain=without,
            )
        return Verdict(
            kind=HOST,
            stage="time in the step outside of all its parts",
            advice="look at what the host does there: --trace 3",
            gain=without,
        )
    scaling = evidence.scaling
    if scaling is not None and scaling.fixed_percent >= FIXED:
        return Verdict(
            kind=LAUNCH,
            stage=f"launches, optimizer and EMA, {scaling.fixed_percent:.0f} % of the computing, the same for any batch",
            advice=f"--batch-size {2 * scaling.batch_size} or more, on as many ranks",
            gain=scaling.gain_of_doubling(),
        )
    own = sum(shares.get(name, 0.0) for name in OWN)
    kind = GPU if evidence.on_gpu else "CPU-bound"
    if own >= OVERHEAD:
        largest = max(OWN, key=lambda name: shares.get(name, 0.0))
        return Verdict(
            kind=kind,
            stage=f"the step's own overhead ({own:.0f} %), most of all {largest}",
            advice=f"look into {largest}: --trace 3",
            gain=100 / (100 - shares[largest]),
        )
    return Verdict(
        kind=kind,
        stage="the trunk's passes",
        advice=(
            "nothing in the data path; see MFU for what the kernels leave, and --compare before and after a change"
            if evidence.on_gpu
            else "a GPU; on this CPU the loader is fast enough"
        ),
        gain=1.0,
    )


def _starving(evidence: Evidence, gain: float) -> Verdict:
    if evidence.copies is not None and evidence.loader is not None and evidence.copies <= FED * evidence.loader:
        return Verdict(kind=COPY, stage="the bus to the GPU", advice="--decode mixed, so that JPEGs travel", gain=gain)
    stage = starving_stage(evidence.starved, evidence.stages_ms)
    return Verdict(
        kind=LOADER,
        stage=f"the loader's stage {stage}",
        advice=ADVICE.get(stage, "look at the table of the loader's stages"),
        gain=gain,
    )


def starving_stage(starved: dict[str, float], stages_ms: dict[str, float]) -> str:
    """The stage in front of the first starved queue: of those before it, the one that takes longest.

    `starved` lists the queues in order: "decoded", behind read and decode, and "finished", behind all. A queue that is seldom
    empty clears every stage before it.
    """
    cleared: set[str] = set()
    if "decoded" in starved and starved["decoded"] < 50 <= starved.get("finished", 100.0):
        cleared = {"read", "decode"}
    left = {name: ms for name, ms in stages_ms.items() if name not in cleared} or stages_ms
    return max(left, key=lambda name: left[name]) if left else "unknown"


def contradictions(report: dict) -> list[str]:
    """What cannot be true of a report.json: ceilings beaten by what they bound, shares above 100 %, negative time per image."""
    found, ceilings = [], report.get("ceilings", {})
    rate = ceilings.get("end to end") or 0.0
    found += [
        f"{rate:,.1f} images/s end to end, above the {ceiling:,.1f} of the {name}"
        for name, ceiling in ceilings.items()
        if ceiling and rate > NOISE * ceiling
    ]
    for name, engine in report.get("engines", {}).items():
        alone, fed = ((engine.get(key) or {}).get("images_per_s") for key in ("loader", "end_to_end"))
        if alone and fed and fed != rate and fed > NOISE * alone:
            found.append(f"{fed:,.1f} images/s through {name}, above the {alone:,.1f} of that loader alone")
    if report.get("matrix_flops_per_s"):
        used = rate * report["flops"]["step"] / report["ranks"]
        if used > NOISE * report["matrix_flops_per_s"]:
            found.append(
                f"{used / 1e12:.3f} TFLOP/s in the step, above the {report['matrix_flops_per_s'] / 1e12:.3f} of matrix products"
            )
    shares = {"all parts": report.get("sum_of_shares", 0.0)} | report.get("shares", {})
    found += [f"{name} above 100 % of the step" for name, share in shares.items() if share > 100 * NOISE]
    if report.get("scaling"):
        s = report["scaling"]
        (few, short), (many, long) = sorted(
            ((s["batch_size"], s["compute_ms"]), (s["other_batch_size"], s["other_compute_ms"]))
        )
        if short > NOISE * long:
            found.append(f"{long:,.1f} ms for a batch of {many}, less than the {short:,.1f} ms for one of {few}")
    return found


def disturbed(found: list[str]) -> Verdict | None:
    """Instead of a verdict, where there are `contradictions`."""
    if not found:
        return None
    advice = "measure again, with nothing beside it and more --steps"
    return Verdict(kind=DISTURBED, stage="; ".join(found), advice=advice, gain=1.0)
