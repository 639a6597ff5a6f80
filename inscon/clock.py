"""Where a step's time goes. Parts are marked where they happen, `with part("backward"):`, and cost nothing until somebody measures.

    with StepClock(device) as clock:
        for batch in batches:
            run_step(training, batch)
            clock.lap()
    steps = clock.read()

A part entered within another stops the outer one's clock, so that parts add up to the whole. On a GPU, marks are events in the
stream of the step, read when all is over: nothing waits, and a part's time is the device's, its idle time included.
"""

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WAIT, PREPARE, BACKWARD, WIRE, OPTIMIZER, AFTER_UPDATE, REST = (
    "wait for data", "prepare (keys)", "backward", "all-reduce and queues", "optimizer", "after the update", "rest",
)  # fmt: skip
"""Parts of a step beside the forward passes of its pieces. REST is what no part claims. Pages of figures want these names without
the seconds of importing torch."""


def forward(piece: str) -> str:
    """The part of a piece's forward pass."""
    return f"{piece}, forward"


_nobody = contextlib.nullcontext()
_listening = None


def part(name: str):
    """While the block runs, time counts for this part of the step, if anybody listens."""
    return _nobody if _listening is None else _listening.at(name)


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


class StepClock(_Listener):
    """Time by step and part on `device`; begins when it is entered."""

    def __init__(self, device: "torch.device"):
        self._device = device

    def __enter__(self):
        self.restart()
        return super().__enter__()

    def restart(self) -> None:
        """What was measured so far never was."""
        self._stack, self._steps, self._since = [REST], [[]], now(self._device)

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

    def lap(self) -> None:
        """A step is over."""
        self._turn()
        self._steps.append([])

    def _turn(self) -> None:
        moment = now(self._device)
        self._steps[-1].append((self._stack[-1], self._since, moment))
        self._since = moment

    def read(self) -> list[dict[str, float]]:
        """Of each finished step the seconds by part, without parts that did not occur. On a GPU it must have been waited for."""
        return [_by_part(spans) for spans in self._steps[:-1]]


def _by_part(spans: list[tuple]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, start, end in spans:
        found[name] = found.get(name, 0.0) + seconds(start, end)
    return found
