"""What `auto` means on a GPU: ways to load are tried out before training, and what each one makes is remembered on this machine.

Where JPEGs are decoded is chosen by trials alone (`steadiest`). Where views are colored, by what the training leaves free: color on
the GPU takes time from it. So the host colors the first batches of a run, until some steps have shown how fast they are taken.
"""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.index import ShardError
from inscon import guard
from inscon.batch import Batch
from inscon.clock import now, seconds
from inscon.config import LoaderConfig
from pipelines import open_pipeline
from pipelines.feed import Feed, color_on_host, threads_per_rank

LOG = logging.getLogger(__name__)
TRIAL_S = 0.5
"""How long each way to load is tried, seconds."""
IN_WORK = 2
"""Batches that come first and may have been ready, which tells nothing about a rate."""
WORTH_THE_GPU = 1.1
"""Decoding on the GPU takes time from the training there, so it must be this much faster than on the host to be chosen."""
FREE = 0.9
"""The host colors where it alone makes so many times the images that the steps take. Color on an H200 took 2 % of a step, but
the loader's kernels waited for the step's, so that 0.73 to 0.84 of the images were made (docs/measured.md)."""
SETTLING, TIMED = 5, 5
"""Steps of a run in which libraries look for algorithms and a graph is captured; and those after them whose time counts."""

FIRST_STEP = "the first step, in which kernels are compiled and libraries look for their fastest algorithms"


class Trial(NamedTuple):
    """What a way to load has made."""

    images_per_s: float
    """Source images; 0 where it failed."""
    p99_s: float
    """99th percentile of the times that a batch was waited for."""


def tried(feed: Feed, loader: LoaderConfig, *, device: torch.device, dtype: torch.dtype, start_step: int) -> Trial:
    """What `loader` makes alone of the run's own batches: as it was found on this machine before, or tried out now."""
    way = [loader.pipeline, loader.decode, loader.jpeg_engine, color_on_host(loader, device, feed.views)]
    of = {
        "machine": platform.node(), "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "data": feed.index.fingerprint, "made": repr((feed.views, feed.mosaics, feed.batch_size, dtype)), "way": way,
        "threads": threads_per_rank(loader.threads), "ranks": feed.world_size,
    }  # fmt: skip
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "inscon")
    path = cache / f"trial-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none there, or not ours
        found = json.loads(path.read_bytes())
        if found["of"] == of and found["trial"]["images_per_s"] > 0:
            return Trial(**found["trial"])
    trial = try_out(feed, loader, device=device, dtype=dtype, start_step=start_step)
    if trial.images_per_s:
        with contextlib.suppress(OSError), guard.whole_file(path) as file:
            file.write(json.dumps({"of": of, "trial": trial._asdict()}).encode())
    return trial


def try_out(feed: Feed, loader: LoaderConfig, **where) -> Trial:
    """Open `loader` and take batches for `TRIAL_S`; `where`: as of `tried`.

    What a trial stumbles over is no verdict on a sample: the way that is taken meets it again, or decodes it.
    """
    loader = dataclasses.replace(loader, prefetch=1, stall_timeout=60.0)
    try:
        with open_pipeline(copy.copy(feed), loader, total_steps=where["start_step"] + 10**6, **where) as batches:
            for _ in itertools.islice(batches, IN_WORK):
                pass
            took, images = [], 0
            while sum(took) < TRIAL_S:
                start = time.perf_counter()
                images += next(batches).size
                took.append(time.perf_counter() - start)
        return Trial(images / sum(took), float(np.percentile(took, 99)))
    except (
        RuntimeError,
        MemoryError,
        TimeoutError,
        ShardError,
    ) as error:  # no nvJPEG for this driver, or too little memory, say
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        LOG.warning("decode %s is left out, it fails: %s", loader.decode, reason)
        return Trial(0.0, 0.0)


def steadiest(trials: Mapping[str, Trial]) -> str:
    """The way to decode. The first of `trials` is the host's, which wins unless the GPU is `WORTH_THE_GPU` times as fast; of the
    GPU's ways that come so near to the fastest, that with the shortest waits at their 99th percentile."""
    host, *others = trials
    best = max(trials[name].images_per_s for name in others)
    if best <= WORTH_THE_GPU * trials[host].images_per_s:
        return host
    near = [name for name in others if WORTH_THE_GPU * trials[name].images_per_s >= best]
    return min(near, key=lambda name: trials[name].p99_s)


def undecided(feed: Feed, loader: LoaderConfig, device: torch.device) -> bool:
    """Whether it depends on the speed of the steps where views are colored."""
    asked = loader.color == "auto" and loader.decode != "mixed" and loader.pipeline != "synthetic"
    return asked and device.type == "cuda" and not color_on_host(loader, device, feed.views)


def host_rate(feed: Feed, loader: LoaderConfig, **where) -> float:
    """Images/s that the host makes alone, decoded and colored there; `where`: as of `tried`."""
    return tried(feed, dataclasses.replace(loader, decode="cpu", color="host"), **where).images_per_s


def color_place(host: float, step: float) -> tuple[str, str]:
    """Where to color, "host" or "device", and a sentence why: the host alone makes `host` images/s, steps take `step`."""
    place = "host" if host >= FREE * step else "device"
    return place, (
        f"color on the {place}: the host alone makes {host:.0f} images/s, {host / step:.2f} times the {step:.0f} that the steps "
        f"take; it colors from {FREE} times on (--color host or device fixes the place)"
    )


def placed(feed: Feed, loader: LoaderConfig, step: float, **where) -> str:
    """`--color` as a training finds it whose steps take `step` images/s of this rank; `where`: as of `tried`."""
    if not undecided(feed, loader, where["device"]):
        return loader.color
    return color_place(host_rate(feed, loader, **where), step)[0]


class TrainingBatches:
    """`open_pipeline`'s batches for a run, once through. Where views are colored may change between two of them, which pixels do
    not show: the host begins where it is `undecided`. `say` gets sentences for the log."""

    def __init__(
        self, feed: Feed, loader: LoaderConfig, say: Callable[[str], None], *, device: torch.device, dtype: torch.dtype,
        start_step: int, total_steps: int,
    ):  # fmt: skip
        self._feed, self._loader, self._say = feed, loader, say
        self._where, self._steps = {"device": device, "dtype": dtype}, range(start_step, total_steps)
        self._host, color = 0.0, loader.color
        if undecided(feed, loader, device):
            self._host = host_rate(feed, loader, **self._where, start_step=start_step)
            color = "host" if self._host else "device"
        self._open(color, start_step)

    def _open(self, color: str, step: int) -> None:
        loader = dataclasses.replace(self._loader, color=color)
        self._pipeline = open_pipeline(self._feed, loader, **self._where, start_step=step, total_steps=self._steps.stop)
        self._say(self._pipeline.description)

    def __iter__(self) -> Iterator[Batch]:
        if self._host:
            yield from self._timed()
        yield from self._pipeline

    def _timed(self) -> Iterator[Batch]:
        """The first batches; from how long their steps take follows the place of color."""
        device, marks = self._where["device"], []
        for batch in itertools.islice(self._pipeline, SETTLING + TIMED):
            start = now(device)
            with contextlib.nullcontext() if marks else guard.say_if_long(FIRST_STEP):
                yield batch
            marks.append((start, now(device)))
            del batch
        step = self._steps.start + len(marks)
        if step == self._steps.stop:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        step_s = statistics.median(seconds(*mark) for mark in marks[SETTLING:])
        place, why = color_place(self._host, self._feed.batch_size / step_s)
        self._say(why)
        if place == "device":
            self._pipeline.close()
            self._open(place, step)

    def read(self) -> dict[str, float]:
        """See `Pipeline.read`."""
        return self._pipeline.read()

    def close(self) -> None:
        """See `Pipeline.close`."""
        self._pipeline.close()
