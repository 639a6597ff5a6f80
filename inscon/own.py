"""`--recipe own`: settings for a set of one's own, from how many pictures it has, how large they are, and how many ranks share it.
ImageNet's numbers give the paper's. The rules, and what was measured on small sets, are in docs/own-pictures.md."""

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np

from inscon import checkpoint
from inscon.config import Config

STEPS, EPOCHS = 50_000, 800  # A run of a small set comes as near to so many steps as so many epochs allow.
LEAST = 8  # Images of a rank in a step: BatchNorm needs two groups of a whole mosaic.
USUAL_CROP = 0.76  # Mean side of a crop that covers 20 to 100 % of a square: 2/3 * (1 - 0.2 ** 1.5) / 0.8.
FAR = 2.5  # How many times too high or low a learning rate is, to be warned of.


def fit(config: Config, start: Config, given: set[str], index, ranks: int) -> tuple[Config, list[str]]:
    """`config` with what suits the pictures of `index` in all fields that are not `given`; a line about each, and warnings. `start`
    has the method's settings for ImageNet. A run that has begun keeps its own, whatever `ranks` is now. ValueError where the set
    does not fill four batches."""
    newest = checkpoint.latest(config.run.run_dir)
    run, lines, begun = SimpleNamespace(config=config), [], checkpoint.load(newest).get("config", {}) if newest else {}
    for group, name, value, reason in _suited(run, start, index, ranks):
        before = getattr(run.config, group)
        if name in given:
            value, reason = getattr(before, name), "as given"
        elif name in begun.get(group, {}):
            value, reason = begun[group][name], f"as {config.run.run_dir} began"
        run.config = dataclasses.replace(run.config, **{group: dataclasses.replace(before, **{name: value})})
        lines.append(f"--{name.replace('_', '-')} {value}: {reason}")
    return run.config, lines + list(_warnings(run.config, start, len(index)))


def _suited(run, start: Config, index, ranks: int) -> Iterator[tuple[str, str, object, str]]:
    """(group, field, value, why), one after the other: `run.config` has by then what was made of those before."""
    images, most, batch = len(index), min(start.optim.batch_size, 256 * ranks), LEAST * ranks
    while 2 * batch <= min(most, images // 64):
        batch *= 2
    why = f"{images} pictures should make 64 steps; {LEAST} for each of {ranks} rank(s) at least, {most} at most"
    yield "optim", "batch_size", batch, why
    batch = run.config.optim.batch_size
    if images < 4 * batch:
        smaller = images // 4 // (LEAST * ranks) * LEAST * ranks
        remedy = f"set --batch-size {smaller}" if smaller else "add pictures" + " or take fewer ranks" * (ranks > 1)
        raise ValueError(f"a set must fill four batches, here {4 * batch} pictures. Found: {images}; {remedy}")
    steps = images // batch
    epochs = max(min(STEPS // steps, EPOCHS), start.optim.epochs)
    yield "optim", "epochs", epochs, f"of {steps} steps, to come near {STEPS} steps in {EPOCHS} epochs at most"
    epochs = run.config.optim.epochs
    why = f"{start.optim.lr} suits batch {start.optim.batch_size}; times the root of their ratio"
    yield "optim", "lr", _rate(run.config, start), why
    warm_up = min(max(start.optim.warmup_epochs, 1), epochs // 20)
    yield "optim", "warmup_epochs", warm_up, "queues fill before the rate is high; a twentieth of the run at most"
    yield "optim", "schedule", "cosine-step", "an epoch may be too long for one rate"
    short = int(np.median(index.sizes(np.arange(min(images, 10_000))).min(1)))  # packing has shuffled them
    size = min(max(round(USUAL_CROP * short / 32) * 32, 64), start.views.view_size)
    why = f"a usual crop's side, as the median picture is {short} px high or wide; 64 at least"
    yield "views", "view_size", size, why
    for name, (value, reason) in run.config.method.suited(images, batch, epochs * steps).items():
        yield "method", name, value, reason


def _rate(config: Config, start: Config) -> float:
    return round(start.optim.lr * (config.optim.batch_size / start.optim.batch_size) ** 0.5, 6)


def _warnings(config: Config, start: Config, images: int) -> Iterator[str]:
    batch, rate = config.optim.batch_size, _rate(config, start)
    steps = config.method.memory(batch)
    if steps * batch > images / 2:
        found = f"warning: the queue holds {steps * batch} keys and the set {images} pictures"
        remedy = f"set --queue-size {max(images // 4 // batch, 1) * batch}"
        yield f"{found}, so many a picture meets its own older key as a negative; {remedy}"
    if not rate / FAR <= config.optim.lr <= rate * FAR:
        yield f"warning: --lr {config.optim.lr} is far from the {rate:g} that suits batch {batch}; nothing rescales it"
    if steps:
        yield f"The loss rises at first, while the queue fills ({steps} steps): look at it after that"
