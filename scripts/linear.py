"""The linear probe on the frozen features of a run, or of an exported file (MoCo's protocol; Table 6 of the paper).

    python scripts/linear.py --checkpoint RUN_DIR --train SHARDS --val SHARDS --out probe
    torchrun --nproc_per_node=8 scripts/linear.py --checkpoint RUN_DIR --train SHARDS --val SHARDS --out probe

The same command goes on from the last whole epoch. The learning rate is that for 256 images and is rescaled to the batch.
"""

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

if not __package__:  # run as a script, beside which Python looks
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from inscon import distributed, guard
from inscon.scripts.knn import FrozenConfig, open_frozen
from inscon.transfer.linear import Probe, Protocol


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Protocol, FrozenConfig):
    """A linear probe."""

    out: Path = Path("probe")  # Receives result.json, metrics.jsonl and probe.pt.
    untrained: bool = False  # The network before training instead.


def main(config: LinearConfig) -> None:
    device = distributed.start()
    try:
        with distributed.hold(config.out, "--out"):
            probe(config, device)
    finally:
        distributed.stop()


def probe(config: LinearConfig, device: torch.device) -> None:
    say = functools.partial(print, flush=True) if distributed.rank() == 0 else lambda text: None
    backbone, facts, precision, sets = open_frozen(config, device, config.untrained, config.seed)
    run = Probe(backbone, config, sets, config.out, device, precision.autocast_dtype)
    lr, num_classes = config.lr_at(0), run.layer.out_features
    rescaled = "" if lr == config.base_lr else f" (the protocol's {config.base_lr:g} is for 256 images)"
    say(
        f"Linear probe of {facts['what']}: {num_classes} classes, {config.epochs} epochs, batch {config.batch_size}, lr {lr:g}"
        f"{rescaled}, {precision.name}, from epoch {run.epoch}"
    )
    for figures in run.train():
        say("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    found = run.evaluate()
    train, val = (len(views.index) for views in sets)
    result = {
        "what": facts["what"], "step": facts["step"], "backbone": run.before,
        "protocol": {"num_classes": num_classes, **config.settings(), "lr": lr}, "view_size": sets[0].view_size,
        "pictures": {"train": train, "val": val}, **found,
    }  # fmt: skip
    if distributed.rank() == 0:
        with guard.whole_file(config.out / "result.json") as file:
            file.write(json.dumps(result, indent=2).encode() + b"\n")
    say(f"linear probe: {100 * found['top1']:.1f} % of {val} pictures; backbone unchanged.")


if __name__ == "__main__":
    guard.run_script("linear.py", lambda: main(tyro.cli(LinearConfig, description=__doc__)))
