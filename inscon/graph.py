"""A whole step as one CUDA graph: captured once, replayed with every batch, so that no host has to launch its thousands of kernels.

What changes from step to step lives on the device: the batch is copied into the graph's inputs, the learning rate is a tensor,
queues move their own pointers, the gradient scaler decides there, and losses are added up there.
"""

import contextlib
from collections import deque
from collections.abc import Callable

import torch

from inscon import clock
from inscon.batch import Batch

Work = Callable[[], None]
WARM_UP = 3
"""Steps before the capture, in which libraries choose their algorithms and allocate what stays."""
AHEAD = 2
"""Replays that the host is ahead of the device at most: with more, batches pile up, and computing would pass as data wait."""


class NotCaptured(RuntimeError):
    """Why a step could not become a graph, in a few words. Nothing of it has happened."""


class CudaGraphs:
    """Captures on a stream of its own, on which the steps before are taken, too: libraries keep memory for each stream."""

    def __init__(self):
        self._stream = torch.cuda.Stream()

    def warm(self, work: Work) -> None:
        """`work`, done now."""
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            work()
        before.wait_stream(self._stream)

    def capture(self, work: Work) -> Work:
        """What does `work` as often as it is called; nothing of it happens before. Raises NotCaptured."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # The stream around it comes back also where the capture does not end well; threads of the loader go on copying.
        capture = torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(self._stream), capture:
                work()
        except RuntimeError as error:
            self._give_back(graph, pool)
            raise NotCaptured(str(error.__context__ or error).splitlines()[0]) from error
        under_way = deque()

        def again() -> None:
            if len(under_way) == AHEAD:
                under_way.popleft().synchronize()
            graph.replay()
            under_way.append(torch.cuda.Event(blocking=True))
            under_way[-1].record()

        return again

    def _give_back(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        """What a capture that failed has taken, which PyTorch keeps: memory, and the default generator (until 2.11)."""
        device = torch.cuda.current_device()
        # PyTorch 2.7 and before have the second name for it.
        end = getattr(torch._C, "_cuda_endAllocateToPool", None) or torch._C._cuda_endAllocateCurrentStreamToPool
        with contextlib.suppress(RuntimeError):  # else no memory that two streams have shared would ever be free again
            end(device, pool)
        graph.reset()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_releasePool(device, pool)
        sound = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local")
        with contextlib.suppress(RuntimeError), torch.cuda.stream(self._stream), sound:
            torch.zeros((), device=device)  # a capture that ends well lets go of the generator


class GraphedStep:
    """Steps of one kind, with batches of one shape, which are copied to where the captured one reads.

    Args:
        graphs: CudaGraphs, or what stands in for them.
    """

    def __init__(self, graphs: CudaGraphs):
        self._graphs = graphs
        self.forget()

    def forget(self) -> None:
        """What was captured; the next steps warm up again."""
        self._steps = 0
        self._inputs: Batch | None = None
        self._again: Work | None = None

    def __call__(self, step: Callable[[Batch], None], batch: Batch) -> None:
        """`step(batch)`, which must not ask the device anything, and does the same every time. Nobody hears the parts of a replayed
        step. Raises NotCaptured."""
        self._take(batch)
        work = lambda: step(self._inputs)  # noqa: E731
        if self._steps < WARM_UP:
            self._steps += 1
            self._graphs.warm(work)
            return
        if self._again is None:
            with clock.unheard():
                self._again = self._graphs.capture(work)
        self._again()

    def _take(self, batch: Batch) -> None:
        if self._inputs is None:
            self._inputs = batch.each(torch.clone)
            return
        for own, given in zip(self._inputs.tensors(), batch.tensors(), strict=True):
            own.copy_(given, non_blocking=True)
