"""What a GPU and its host do in a step, from a trace by torch.profiler; and how many bytes a step moves."""

import contextlib
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST, DEVICE = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")
"""Kinds of events: calls by the host, work of the device."""
LAUNCH, WAIT = re.compile("Launch|Memcpy|Memset"), re.compile("Synchronize")
"""In the names of the host's calls."""
ROOM = 500
"""So many launches fit into the device's queue for certain; later ones may have to wait until there is room."""
CLASSES = {
    "BatchNorm": r"^_(of_slices|of_group|follow|forward|backward_of_slices|summed|backward)$|batch_?norm|\bbn_(fw|bw)|welford",
    "color": r"^_(sum_gray|rows|columns)$",
    "pooling": r"pool|_of_windows$",
    "copies": r"mem(cpy|set)|copy|CatArray|FillFunctor|nchwToNhwc|nhwcToNchw",
    "convolution": r"conv|fprop|dgrad|wgrad|winograd|cudnn",
    "losses and matrix products": r"gemm|gemv|nvjet|cublas|cutlass|splitK|softmax|nll_loss|dot_kernel",
    "elementwise": r"elementwise|multi_tensor_apply|reduce_kernel",
}
"""Class -> what is in a kernel's name, the first that fits: of our Triton kernels, cuDNN, CUTLASS, cuBLAS, ATen."""


class Event(NamedTuple):
    """Of a trace, in microseconds."""

    name: str
    kind: str
    start: float
    duration: float


def read_trace(path: Path) -> list[Event]:
    """All that lasts, of a trace that torch.profiler wrote."""
    lines = json.loads(path.read_text())["traceEvents"]
    return [Event(line["name"], line["cat"], line["ts"], line["dur"]) for line in lines if line.get("ph") == "X"]


def summary(events: Iterable[Event], steps: int) -> dict:
    """Per step: `launches` by the host, `host_ms` for them, `busy_ms` in which the device works, its `kernel_ms` by class, longest
    first, of which some may run at once. The host waits for the device before each step."""
    events = sorted(events, key=lambda event: event.start)
    calls, work = ([event for event in events if event.kind in kinds] for kinds in (HOST, DEVICE))
    kernels = Counter()
    for event in work:
        kernels[class_of(event.name)] += event.duration
    (launches, host), per_step = _launching(calls), 1e3 * steps
    busy = sum(event.duration for event in work) - _overlap(work)
    figures = {"launches": launches / steps, "host_ms": host / per_step, "busy_ms": busy / per_step}
    return figures | {"kernel_ms": {name: us / per_step for name, us in kernels.most_common()}}


def class_of(kernel: str) -> str:
    """A key of CLASSES, or "other"."""
    return next((name for name, found in CLASSES.items() if re.search(found, kernel, re.IGNORECASE)), "other")


def _launching(calls: list[Event]) -> tuple[int, float]:
    """How many launches there are, and the host's time for them and between them, without waiting: a launch counts as long as is
    usual while the device's queue has room."""
    calls = [call for call in calls if LAUNCH.search(call.name) or WAIT.search(call.name)]
    between = sum(max(after.start - before.start - before.duration, 0.0) for before, after in itertools.pairwise(calls))
    launches, queued, took = 0, 0, []
    for call in calls:
        queued = 0 if WAIT.search(call.name) else queued + 1
        launches += queued > 0
        if 0 < queued <= ROOM:
            took.append(call.duration)
    return launches, between + (launches * statistics.median(took) if took else 0.0)


def _overlap(work: list[Event]) -> float:
    """Time that counts more than once, where kernels run at once."""
    twice, end = 0.0, float("-inf")
    for event in work:
        twice += min(max(end - event.start, 0.0), event.duration)
        end = max(end, event.start + event.duration)
    return twice


class Traffic(TorchDispatchMode):
    """Counts, while it is entered, the bytes that operators and our Triton kernels move at least: each reads what it is given, and
    writes what it makes, once. Views move nothing."""

    moved = 0

    def __enter__(self):
        for kernel in _triton_kernels():
            kernel.add_pre_run_hook(self._ran)
        return super().__enter__()

    def __exit__(self, *raised):
        for kernel in _triton_kernels():
            kernel.pre_run_hooks.remove(self._ran)
        return super().__exit__(*raised)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        is_view = not operator._schema.is_mutable and _memory(made) <= _memory((args, kwargs))
        if not is_view and "empty" not in operator.name():
            self.moved += sum(_sizes((args, kwargs))) + sum(_sizes(made))
        return made

    def _ran(self, *args, **kwargs):
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        self.moved += sum(_sizes({tensor.data_ptr(): tensor for tensor in tensors}))  # x stands in for what is absent


def _sizes(nest) -> list[int]:
    """Bytes of all tensors in it; an expanded one has no more than lie in memory."""
    tensors = [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]
    return [min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors]


def _memory(nest) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)}


def _triton_kernels() -> list:
    with contextlib.suppress(ImportError):
        from triton.runtime import KernelInterface

        from inscon.nn import fused_norm, fused_pool

        ours = (vars(fused_norm) | vars(fused_pool)).values()
        return [value for value in ours if isinstance(value, KernelInterface)]
    return []
