"""Where a step's time goes. Parts are marked where they happen, `with part("backward"):`, and cost nothing until somebody measures.

    clock = StepClock(device)
    with clock:
        for batch in batches:
            run_step(training, model, batch)
            clock.lap()
    seconds = clock.read()

A part entered within another stops the outer one's clock, so that parts add up to the whole. On a GPU, marks are events in the
stream of the step, read when all is over: nothing waits, and a part's time is the device's, its idle time included.
"""

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WAIT, QUERY, MOSAIC, KEY, HEADS, BACKWARD, WIRE, OPTIMIZER, EMA, REST = PARTS = (
    "wait for data",
    "query pass",
    "mosaic pass",
    "key pass",
    "heads and losses",
    "backward",
    "exposed all-reduce and gathers",
    "optimizer",
    "EMA",
    "rest",
)
"""Of a step, in order. REST is what no part claims. Pages of figures want these names without the seconds of importing torch."""

_nobody = contextlib.nullcontext()
_listening = None


def part(name: str):
    """While the block runs, time counts for this part of the step, if anybody listens."""
    return _nobody if _listening is None else _listening.at(name)


def gradients_handed_over() -> None:
    """The last gradients of a backward pass have set out to the other ranks: what it does from now on is wait for them."""
    if isinstance(_listening, StepClock):
        _listening.hand_over()


def now(device: "torch.device"):
    """A moment: of the host, or in the stream of a GPU, which nobody waits for."""
    if device.type != "cuda":
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start, end) -> float:
    """Between two moments of `now`; on a GPU they must have passed."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


class _Listener:
    """Hears of parts while it is entered as a context; one at a time in a process."""

    def __enter__(self):
        global _listening
        assert _listening is None, "two clocks at once"
        _listening = self
        return self

    def __exit__(self, *_: object) -> None:
        global _listening
        _listening = None


class Labels(_Listener):
    """Names the parts in a trace of torch.profiler."""

    def at(self, name: str):
        import torch

        return torch.profiler.record_function(name)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of the steps between two readings, seconds."""

    steps: list[float]
    """Each step from lap to lap."""
    parts: list[dict[str, float]]
    """The same, by part; a part that did not occur is missing."""
    marks: int
    """How often time was taken."""


class StepClock(_Listener):
    """Time by step and part on `device`; begins when it is entered."""

    def __init__(self, device: "torch.device"):
        self._device = device
        self._begin()

    def __enter__(self):
        super().__enter__()
        self._begin()
        return self

    def _begin(self) -> None:
        self._stack, self._spans, self._laps, self._marks = [REST], [[]], [], 0
        self._handed_over = None
        self._since = self._now()
        self._laps.append(self._since)

    def _now(self):
        self._marks += 1
        return now(self._device)

    @contextlib.contextmanager
    def at(self, name: str):
        """See `part`."""
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def hand_over(self) -> None:
        """See `gradients_handed_over`."""
        self._handed_over = self._now()

    def lap(self) -> None:
        """A step is over."""
        self._turn()
        self._laps.append(self._since)
        self._spans.append([])

    def _turn(self) -> None:
        now, current = self._now(), self._stack[-1]
        if current == BACKWARD and self._handed_over is not None:
            self._spans[-1].append((BACKWARD, self._since, self._handed_over))
            self._spans[-1].append((WIRE, self._handed_over, now))
            self._handed_over = None
        else:
            self._spans[-1].append((current, self._since, now))
        self._since = now

    def read(self) -> StepTimes:
        """What was measured since the clock was entered or read; on a GPU this waits for the device."""
        self._turn()
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        steps = [seconds(a, b) for a, b in zip(self._laps, self._laps[1:])]
        parts = []
        for spans in self._spans[: len(steps)]:
            found: dict[str, float] = {}
            for name, start, end in spans:
                found[name] = found.get(name, 0.0) + seconds(start, end)
            parts.append(found)
        times = StepTimes(steps, parts, self._marks)
        self._begin()
        return times

    def cost_s(self, repeats: int = 1000) -> float:
        """What one mark costs, measured now; forgets what was measured before."""
        start = time.perf_counter()
        for _ in range(repeats):
            with self.at(REST):
                pass
        cost = (time.perf_counter() - start) / (2 * repeats)
        self._begin()
        return cost
