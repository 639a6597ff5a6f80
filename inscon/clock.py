"""Where a step's time goes. Parts are marked where they happen, `with part("backward"):`, and cost nothing until somebody listens.

    clock = StepClock(device)
    with listen(clock.at):
        for batch in batches:
            run_step(training, batch)
            clock.lap()
    steps = clock.read()

A part entered within another stops the outer one's clock, so that parts add up to the whole. On a GPU, marks are events in the
stream of the step, read when all is over: nothing waits, and a part's time is the device's, its idle time included.
"""

import contextlib
import time
from collections import Counter

WAIT, PREPARE, BACKWARD, WIRE, OPTIMIZER, AFTER_UPDATE, REST = (
    "wait for data", "prepare (keys)", "backward", "all-reduce and queues", "optimizer", "after the update", "rest",
)  # fmt: skip
"""Parts of a step beside the forward passes of its pieces. REST is what no part claims. Pages of figures want these names without
the seconds of importing torch."""

_hear = contextlib.nullcontext


def forward(piece: str) -> str:
    """The part of a piece's forward pass."""
    return f"{piece}, forward"


def part(name: str):
    """While the block runs, time counts for this part of the step, if anybody listens."""
    return _hear(name)


@contextlib.contextmanager
def listen(hear):
    """While the block runs, parts are entered as `hear(name)`: a clock's `at`, or torch.profiler.record_function."""
    assert _hear is contextlib.nullcontext, "two clocks at once"
    with _heard_by(hear):
        yield


def unheard():
    """While the block runs, nobody listens: where work is only noted down, its moments are none."""
    return _heard_by(contextlib.nullcontext)


@contextlib.contextmanager
def _heard_by(hear):
    global _hear
    before, _hear = _hear, hear
    try:
        yield
    finally:
        _hear = before


def now(device):
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


class StepClock:
    """Time by step and part on `device`; begins when it is made."""

    def __init__(self, device):
        self._device, self._stack, self._steps, self._since = device, [REST], [[]], now(device)

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

    def read(self) -> list[Counter]:
        """Of each finished step the seconds by part, without parts that did not occur. On a GPU it must have been waited for."""
        found = [Counter() for _ in self._steps[1:]]
        for spent, spans in zip(found, self._steps):
            for name, start, end in spans:
                spent[name] += seconds(start, end)
        return found
