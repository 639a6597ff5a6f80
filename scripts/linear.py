"""The linear probe on the frozen features of a run, or of an exported file (MoCo's protocol; Table 6 of the paper).

    python scripts/linear.py --checkpoint RUN_DIR --train SHARDS --val SHARDS --out probe
    torchrun --nproc_per_node=8 scripts/linear.py --checkpoint RUN_DIR --train SHARDS --val SHARDS --out probe

The same command goes on after a stop. The learning rate is that for 256 images and is rescaled to the batch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

from rich.console import Console
from torch import Tensor

from inscon import distributed, guard
from inscon.nn.backbones import check_side
from inscon.precision import choose_precision
from inscon.transfer.export import any_backbone
from inscon.transfer.linear import Probe, Protocol
from pipelines.evaluation import Engine, LabelledViews, joined_classes


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """A linear probe."""

    checkpoint: Annotated[Path, tyro.conf.arg(aliases=("--run",))]
    """A run folder, whose newest checkpoint is taken, a checkpoint, or a file of scripts/export.py. (torchrun takes --run for an
    option of its own.)"""
    train: Path
    """Labelled shards to learn from."""
    val: Path
    """Labelled shards to be tested on."""
    out: Path = Path("probe")
    """Receives result.json, metrics.jsonl and probe.pt."""
    untrained: bool = False
    """The network before training instead."""
    epochs: int = 100
    """The learning rate falls to a tenth at 60 % and 80 % of them."""
    batch_size: int = 256
    """Over all ranks."""
    base_lr: float = 30.0
    """For 256 images; what is used is this times batch_size / 256."""
    view_size: int | None = None
    """Side of the crops, px. None: as the run was trained."""
    evaluate_every: int = 10
    """Epochs between evaluations; the last one is always evaluated."""
    pipeline: Engine = "auto"
    """Engine that reads the shards."""
    threads: int | None = None
    """Of the loader, per rank. None: its share of the cores."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of the backbone; the layer is always trained in float32."""
    seed: int = 0
    """Of the layer's start, the order and the crops."""


def main(config: LinearConfig) -> None:
    device = distributed.start()
    try:
        with distributed.hold(config.out, "--out"):
            probe(config, device)
    finally:
        distributed.stop()


def open_sets(config: LinearConfig, side: int, device, dtype) -> tuple[LabelledViews, LabelledViews, Tensor]:
    """Training and validation set, and the label in the first of each class of the second; `side`: of the views, px.

    ValueError where they do not fit each other or the batch.
    """
    rank, world = distributed.rank(), distributed.world_size()
    if config.batch_size % world:
        raise ValueError(
            f"batch_size must be a multiple of the {world} ranks. Found: {config.batch_size}; set --batch-size "
            f"{max(config.batch_size // world, 1) * world}"
        )
    train, val = (
        LabelledViews(
            data, side, config.batch_size, config.pipeline, threads=config.threads, device=device,
            dtype=dtype, seed=config.seed, rank=rank, world_size=world,
        )
        for data in (config.train, config.val)
    )  # fmt: skip
    if config.batch_size > len(train.index):
        raise ValueError(
            f"batch_size must be at most the {len(train.index)} pictures of {config.train}. Found: {config.batch_size}; set "
            f"--batch-size {max(len(train.index) // 4, 1)}"
        )
    return train, val, joined_classes(train, val)


def probe(config: LinearConfig, device) -> None:
    console, rank = Console(), distributed.rank()
    backbone, facts = any_backbone(config.checkpoint, config.untrained)
    side = config.view_size or facts["config"]["views"]["view_size"]
    check_side(facts["config"]["model"]["backbone"], side)
    precision = choose_precision(config.precision, device)
    train, val, joined = open_sets(config, side, device, precision.pixel_dtype)
    protocol = Protocol(
        num_classes=train.num_classes, epochs=config.epochs, batch_size=config.batch_size, base_lr=config.base_lr,
        seed=config.seed,
    )  # fmt: skip
    run = Probe(backbone, protocol, config.out, device, train.fingerprint, precision.autocast_dtype)
    if rank == 0:
        rescaled = (
            "" if protocol.lr == protocol.base_lr else f" (the protocol's {protocol.base_lr:g} is for 256 images)"
        )
        console.print(
            f"Linear probe of {facts['what']}: {protocol.num_classes} classes, {protocol.epochs} epochs, batch "
            f"{protocol.batch_size}, lr {protocol.lr:g}{rescaled}, {precision.name}, from epoch "
            f"{run.step // train.steps_per_epoch}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip

    def say(epoch: int, figures: dict[str, float]) -> None:
        if rank == 0:
            tops = "  ".join(f"{name} {100 * figures[name]:.1f} %" for name in ("top1", "top5") if name in figures)
            console.print(
                f"epoch {epoch}/{protocol.epochs}  loss {figures['loss']:.3f}  lr {figures['lr']:g}  {tops}",
                highlight=False,
            )

    def evaluate() -> dict[str, float]:
        return run.evaluate((pixels, joined[labels]) for pixels, labels in val.center_crops())

    found = run.train(train.random_crops, train.steps_per_epoch, evaluate, say, config.evaluate_every)
    if found is None:
        guard.ignore_stops()
        if rank == 0:
            epoch, step = divmod(run.step, train.steps_per_epoch)
            where = f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"
            print(f"Stopped after {where}; {config.out / 'probe.pt'} keeps it. The same command goes on.")
        return
    result = {
        "what": facts["what"], "step": facts["step"], "backbone": run.before, "protocol": protocol.__dict__ | {"lr": protocol.lr},
        "view_size": side, "pictures": {"train": len(train.index), "val": len(val.index)}, **found,
    }  # fmt: skip
    if rank == 0:
        with guard.whole_file(config.out / "result.json") as file:
            file.write(json.dumps(result, indent=2).encode() + b"\n")
        print(f"linear probe: {100 * found['top1']:.1f} % of {len(val.index)} pictures; backbone unchanged.")


if __name__ == "__main__":
    guard.run_script("linear.py", lambda: main(tyro.cli(LinearConfig, description=__doc__)))
