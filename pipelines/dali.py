"""DALI executing the plan: each JPEG is read from its mapped shard, decoded once, cropped as often as needed.

On the CPU, DALI's threads decode and then call the compiled tail of pipelines/kernels.py: finished uint8 views. On a GPU
two arrangements, chosen by `loader.decode`: "mixed" decodes with nvJPEG and cuts the crops on the device, "cpu" decodes
and cuts on the host and sends crops; colour and blur happen on the device in both (pipelines/colour.py).

The order, the bytes and the plan come from our own source, one call per batch, never from a DALI reader: the step is
`start_step` plus DALI's iteration, so resuming needs no state.
"""

import ctypes
import functools
import importlib.metadata
import re
from collections import deque
from collections.abc import Iterator

import numpy as np
import nvidia.dali
import torch
from jaxtyping import Float, UInt8
from nvidia.dali import Pipeline as Graph
from nvidia.dali import fn, types
from nvidia.dali.plugin.numba import NumbaFunction
from torch import Tensor

from data_prep.index import ShardError
from inscon.batch import Batch
from inscon.config import Config
from pipelines.colour import colour_views, normalise
from pipelines.feed import Feed, Pipeline, Work, check_sizes, make_batch, open_feed, threads_per_rank
from pipelines.kernels import render_views
from pipelines.reference import decode


class Source:
    """Called by DALI once per batch, ahead of the consumer; keeps the work of the batches in flight for it."""

    def __init__(self, feed: Feed, start_step: int, total_steps: int):
        self._feed, self._start_step, self._total_steps = feed, start_step, total_steps
        self.in_flight: deque[Work] = deque()

    def __call__(self, batch_info):
        step = self._start_step + batch_info.iteration
        if step >= self._total_steps:
            raise StopIteration
        work = self._feed.work(step)
        jpegs = [self._feed.index.jpeg_bytes(sample_id) for sample_id in work.sample_ids]
        self.in_flight.append(work)
        return jpegs, work.rows()


def build_graph(
    source,
    *,
    batch_size: int,
    num_views: int,
    view_size: int,
    threads: int,
    device_id: int | None,
    decode: str,
    colour: bool,
    prefetch: int,
) -> Graph:
    """The DALI pipeline: (JPEG bytes, rows) from `source` -> (views [V S S 3] uint8 per sample, shape of the picture).

    `device_id` is the GPU the views come to, None for the CPU; `decode` is "cpu", or "mixed" on a GPU. `colour` finishes
    the views on the host; without it they are crops, mirrored and no more, as they always are with "mixed".
    """
    assert not (colour and decode == "mixed") and (decode == "cpu" or device_id is not None)
    graph = Graph(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    with graph:
        jpegs, rows = fn.external_source(
            source=source, num_outputs=2, batch=True, batch_info=True, dtype=[types.UINT8, types.FLOAT], ndim=[1, 2]
        )
        # Boxes are in px as stored; DALI would turn the picture by its EXIF tag.
        images = fn.decoders.image(
            jpegs, device="mixed" if decode == "mixed" else "cpu", output_type=types.RGB, adjust_orientation=False
        )
        if decode == "mixed":
            crops = [crop_by_dali(images, rows[view], view_size) for view in range(num_views)]
            views = fn.stack(*crops)
        else:
            views = _render_on_host(num_views, view_size, colour=colour)(images, rows)
            views = views if device_id is None else views.gpu()
        graph.set_outputs(views, images.shape(device="cpu"))
    graph.build()
    return graph


def crop_by_dali(images, row, view_size: int):
    """DALI mirrors a crop whose two ends are swapped."""
    low, high, flipped = row[0:2], row[2:4], row[4:5]
    left, right = low[0:1] + flipped * (high[0:1] - low[0:1]), high[0:1] - flipped * (high[0:1] - low[0:1])
    return fn.resize(
        images,
        size=[view_size, view_size],
        roi_start=fn.cat(low[1:2], left),
        roi_end=fn.cat(high[1:2], right),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


@functools.cache
def _render_on_host(num_views: int, view_size: int, *, colour: bool) -> NumbaFunction:
    """The operator (picture, rows) -> views; kept, because DALI takes seconds to wrap a compiled function."""

    # numba freezes what these two find around them, which is meant here.
    def shape(outs, ins):
        for out in outs[0]:
            out[0], out[1], out[2], out[3] = num_views, view_size, view_size, 3

    def render(out, image, row):
        render_views(image, row, out, colour)

    return NumbaFunction(
        run_fn=render,
        setup_fn=shape,
        out_types=[types.UINT8],
        in_types=[types.UINT8, types.FLOAT],
        outs_ndim=[4],
        ins_ndim=[3, 2],
        device="cpu",
    )


class _Engine:
    """A running graph and the batches it makes."""

    def __init__(
        self, feed: Feed, start_step: int, total_steps: int, device: torch.device, dtype: torch.dtype, threads: int
    ):
        loader, self._feed, self._device, self._dtype = feed.config.loader, feed, device, dtype
        self.decode = loader.decode
        if self.decode == "auto":
            self.decode = "mixed" if device.type == "cuda" else "cpu"
        self._steps = range(start_step, total_steps)
        self._source = Source(feed, start_step, total_steps)
        self._held: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._graph = build_graph(
            self._source,
            batch_size=feed.batch_size,
            num_views=feed.num_views,
            view_size=feed.config.views.view_size,
            threads=threads,
            device_id=_device_id(device),
            decode=self.decode,
            colour=device.type == "cpu",
            prefetch=loader.prefetch,
        )

    def batches(self) -> Iterator[Batch]:
        # Exactly as many runs as there are batches, so the source's StopIteration never comes up here.
        for step in self._steps:
            try:
                views, shapes = self._graph.run()
            except RuntimeError as error:
                raise self._explain(error) from None
            work = self._source.in_flight.popleft()
            assert work.step == step
            check_sizes(self._feed.index, work, np.asarray(shapes.as_array())[:, :2])
            yield make_batch(work, self._finish(torch.from_dlpack(views.as_tensor()), work), self._feed)

    def end(self) -> None:
        """DALI's threads end with the last reference to the graph."""
        self._graph = None
        self._held.clear()

    def _finish(self, views: UInt8[Tensor, "B V S S 3"], work: Work) -> list[Float[Tensor, "B 3 S S"]]:
        if self._device.type == "cpu":
            return [normalise(views[:, v], self._dtype) for v in range(self._feed.num_views)]
        pixels = [colour_views(views[:, v], plan, self._dtype) for v, plan in enumerate(work.views)]
        # DALI writes its buffer again when `views` is gone, so it stays until the device has read it. Asking an event
        # does not wait.
        read = torch.cuda.Event()
        read.record()
        self._held.append((read, views))
        while self._held and self._held[0][0].query():
            self._held.popleft()
        return pixels

    def _explain(self, error: RuntimeError) -> Exception:
        """DALI does not say whose bytes it could not decode: look for them among the batches in flight."""
        for work in self._source.in_flight:
            for sample_id in work.sample_ids:
                try:
                    decode(self._feed.index, sample_id)
                except ShardError as found:
                    return found
        return error


def open_dali(
    *,
    config: Config,
    rank: int,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
    start_step: int,
    total_steps: int,
) -> Pipeline:
    """See `pipelines.open_pipeline`. `loader.threads` are DALI's threads; compiling is over when this returns."""
    feed = open_feed(config, rank, world_size)
    threads = threads_per_rank(config.loader.threads)
    if threads < 1:
        raise ValueError(f"the pipeline dali needs at least 1 thread. Found: {threads}; set --threads 1 or more")
    if config.loader.prefetch < 1:
        raise ValueError(f"prefetch must be at least 1 batch. Found: {config.loader.prefetch}; set --prefetch 2")
    if device.type == "cuda":
        check_dali(driver_cuda_version(), installed_flavour())
    elif config.loader.decode == "mixed":
        raise ValueError("decode=mixed needs a GPU, and the device is cpu; set --decode cpu or auto")
    engine = _Engine(feed, start_step, total_steps, device, dtype, threads)
    description = (
        f"dali {nvidia.dali.__version__}: decode {engine.decode}, views on the {device.type}, {threads} threads, "
        f"prefetch {config.loader.prefetch}, {feed.index.path}"
    )
    return Pipeline(engine.batches(), engine.end, feed.steps_per_epoch, description)


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


def check_dali(driver_cuda_version: int, flavour: str) -> None:
    """Refuse a DALI built for a newer CUDA than the driver offers: it would fail later with a bare error code.

    Args:
        driver_cuda_version: 1000 * major + 10 * minor, e.g. 12040, as cuDriverGetVersion gives it.
        flavour: what follows "nvidia-dali-" in the name of the installed package, e.g. "cuda120".

    Raises ValueError naming the package to install.
    """
    offered, built_for = driver_cuda_version // 1000, int(re.fullmatch(r"cuda(\d+)0", flavour)[1])
    if built_for > offered:
        raise ValueError(
            f"DALI for CUDA {built_for} is installed (nvidia-dali-{flavour}) and this driver offers CUDA {offered}: "
            f"pip uninstall nvidia-dali-{flavour} && pip install nvidia-dali-cuda{offered}0"
        )


def installed_flavour() -> str:
    """ "cuda120" or "cuda130", from the name of the installed distribution."""
    names = importlib.metadata.packages_distributions()["nvidia"]
    return next(match[1] for name in names if (match := re.fullmatch(r"nvidia-dali-(?:\w+-)?(cuda\d+)", name)))


def driver_cuda_version() -> int:
    """The newest CUDA that the installed driver runs, as 1000 * major + 10 * minor."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value
