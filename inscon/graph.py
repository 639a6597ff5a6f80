"""A whole step as one CUDA graph: captured once, replayed with every batch, so that no host has to launch its thousands of kernels.

What changes from step to step lives on the device: the batch is copied into the graph's inputs, the learning rate is a tensor,
queues move their own pointers, the gradient scaler decides there, and losses come out in tensors that the next replay overwrites.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from inscon.batch import Batch

Step = Callable[[Batch], dict[str, Tensor]]
"""One update from a batch: its losses and figures by name, on the device."""
WARM_UP = 3
"""Steps before the capture, in which libraries choose their algorithms and allocate what stays."""


class GraphedStep:
    """A step of that kind, of batches of one shape, which are copied to where the captured one reads.

    Args:
        step: what is captured; it must not ask the device anything.
        capture: gets a function without arguments, and returns one that does the same work again.
        refused: called with the reason, once, where `capture` fails; from then on steps are taken one by one.
    """

    def __init__(self, step: Step, capture: Callable[[Callable], Callable], refused: Callable[[str], None]):
        self._step, self._capture, self._refused = step, capture, refused
        self._inputs: Batch | None = None
        self._again: Callable[[], dict[str, Tensor]] | None = None
        self._steps = 0

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        if self._inputs is None:
            self._inputs = batch.each(torch.clone)
        else:
            for own, given in zip(self._inputs.tensors(), batch.tensors(), strict=True):
                own.copy_(given, non_blocking=True)
        one_step = lambda: self._step(self._inputs)  # noqa: E731
        if self._again is None and self._steps == WARM_UP:
            try:
                self._again = self._capture(one_step)
            except RuntimeError as error:  # of CUDA, or of a library that does what cannot be captured
                self._refused(str(error).splitlines()[0])
                self._again = one_step
        self._steps += 1
        return self._again() if self._again else one_step()


def captured(work: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """`work` as a CUDA graph; nothing of it happens before the first replay. RuntimeError for what cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader's threads go on copying
        found = work()

    def again():
        graph.replay()
        return found

    return again
