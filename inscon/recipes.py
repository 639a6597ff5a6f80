"""Whole configurations to start from: `scripts/train.py --recipe NAME`. Each says its command, cost and expected result.

Hours are predictions by the formula in docs/reproduce.md until somebody measures them.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from inscon.config import Config, ModelConfig, OptimConfig, RunConfig, ViewConfig
from inscon.methods import byol, densecl, detco, infomin, inscon, moco, pixpro, resim, simclr


def imagenet_r50() -> Config:
    """InsCon as the paper trains it: ResNet-50, ImageNet-1k, 200 epochs, batch 256 (Table 1).

    `torchrun --nproc_per_node=8 scripts/train.py --pipeline dali --data SHARDS`. Predicted 20 h at the ceiling of 8 V100s,
    target 27 h (not measured: no V100 was at hand). Expected after fine-tuning: VOC 59.1 AP, COCO FPN 1x 40.9 box AP.
    """
    return Config(method=inscon.Settings())


def moco_v2() -> Config:
    """The baseline. Expected: VOC 57.0 AP, COCO FPN 1x 39.8 box, 35.9 mask AP, ImageNet linear 67.5 top-1."""
    return Config(method=moco.Settings())


def moco_v1() -> Config:
    """MoCo v1: one linear head, temperature 0.07, v1's augmentation (gray first, strong hue, no blur). Expected: VOC 55.9 AP."""
    return Config(
        method=moco.Settings(mlp=False, temperature=0.07),
        views=ViewConfig(jitter_probability=1.0, hue=0.4, gray_first=True, blur_probability=0.0),
    )


def densecl_r50() -> Config:
    """DenseCL: `scripts/train.py --recipe densecl_r50 --data SHARDS`. 1.47 trainings per image. Expected: VOC 58.7 AP, COCO FPN 1x
    40.1 box, 36.2 mask AP, ImageNet linear 63.5 top-1."""
    return Config(method=densecl.Settings())


def resim_r50() -> Config:
    """ReSim-FPN: `scripts/train.py --recipe resim_r50 --data SHARDS`. 1.64 trainings per image. Expected: VOC 58.7 AP, COCO FPN 1x
    40.0 box, 36.2 mask AP, ImageNet linear 66.1 top-1.

    Unchecked: where the grids of windows begin, and that the three losses weigh alike. Colors come after the crop, there before it.
    """
    return Config(method=resim.Settings())


def detco_r50() -> Config:
    """DetCo: `scripts/train.py --recipe detco_r50 --data SHARDS`. 2.33 trainings per image. Expected: VOC 57.8 AP, COCO FPN 1x 40.1
    box, 36.4 mask AP, ImageNet linear 68.6 top-1.

    Unchecked: the levels' weights, eight heads without sharing, how patches are joined and colored, the learning rate (here 0.03 at
    batch 256; perhaps 0.06 at 512). Its code was never released.
    """
    return Config(method=detco.Settings())


def infomin_r50() -> Config:
    """InfoMin: `scripts/train.py --recipe infomin_r50 --data SHARDS`. 2.07 trainings per image. Expected: VOC 57.6 AP, COCO FPN 1x
    40.6 box, 36.7 mask AP, ImageNet linear 70.1 top-1.

    RandAugment is not theirs to the last detail (docs/methods.md). The learning rate ends at 0, there at a thousandth of its start.
    """
    strong = ViewConfig(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, randaugment=2)
    return Config(method=infomin.Settings(), views=strong)


LARS = {"optimizer": "lars", "decay_norm_and_bias": False, "schedule": "cosine-step"}
"""SGD for large batches: no decay and no adaptation of biases and BatchNorm."""
BYOLS_VIEWS = ViewConfig(scale=(0.08, 1.0), saturation=0.2, blur_probability=1.0)
"""Of BYOL and PixPro; the second view is blurred less and sometimes solarized (the method's settings)."""


def simclr_r50() -> Config:
    """SimCLR v1: batch 4096, LARS, strong colors. Unchecked against the paper: temperature, weight decay, the head's layers.

    `torchrun --nproc_per_node=8 scripts/train.py --recipe simclr_r50 --data SHARDS`. Predicted 137 GPU hours of V100s. Expected
    after 1000 epochs: VOC 56.3 AP, COCO FPN 1x 39.8 box, 35.9 mask AP (PixPro's README), ImageNet linear 69.3 top-1.
    """
    return Config(
        method=simclr.Settings(),
        views=ViewConfig(scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
        optim=OptimConfig(batch_size=4096, lr=4.8, weight_decay=1e-6, warmup_epochs=10, **LARS),
    )


def byol_r50() -> Config:
    """BYOL for 300 epochs: batch 4096, LARS at 0.3 per 256 images. Unchecked against the paper: rate, weight decay and momentum,
    which differ between the paper and its ports; 1000 epochs have 0.2 per 256 (--lr 3.2) and --target-momentum 0.996.

    `torchrun --nproc_per_node=8 scripts/train.py --recipe byol_r50 --data SHARDS`. Predicted 275 GPU hours of V100s. No result
    after fine-tuning by the tables' protocol is known to us.
    """
    return Config(
        method=byol.Settings(),
        views=BYOLS_VIEWS,
        optim=OptimConfig(batch_size=4096, epochs=300, lr=4.8, weight_decay=1.5e-6, warmup_epochs=10, **LARS),
    )


def pixpro_r50() -> Config:
    """PixPro for 100 epochs: batch 1024, LARS at 1.0 per 256 images (settings of the official repository).

    `torchrun --nproc_per_node=8 scripts/train.py --recipe pixpro_r50 --data SHARDS`. Predicted 102 GPU hours of V100s. Expected
    (its README): VOC 58.8 AP, COCO C4 40.0 box, FPN 1x 40.8 box, 36.8 mask AP; with --instance 41.3, 37.1. With --epochs 400: VOC
    60.2, C4 40.5, FPN 1x 40.6 box AP by the InsCon paper.
    """
    return Config(
        method=pixpro.Settings(),
        views=BYOLS_VIEWS,
        optim=OptimConfig(batch_size=1024, epochs=100, lr=4.0, weight_decay=1e-5, warmup_epochs=5, **LARS),
    )


def own() -> Config:
    """InsCon on pictures of one's own, batch, epochs, queues and more as their number asks (inscon/own.py): `scripts/train.py
    --recipe own --data SHARDS`, with `--method` for another one. Expected: nothing yet, for no set is like yours."""
    return Config(method=inscon.Settings())


def demo() -> Config:
    """`smoke` with a network of 0.4 million weights: what `make demo` trains, minutes on 2 cores.

    Found by a search (docs/measured.md) on other scenes and seeds than those of the README's figures: with queues of 16 batches
    a query may be told from its negatives by their age alone.
    """
    start = smoke()
    return dataclasses.replace(
        start,
        model=ModelConfig(backbone="test_resnet", split_size=16),
        optim=dataclasses.replace(start.optim, lr=0.03),
        run=RunConfig(run_dir=Path("runs/demo"), log_every=16, checkpoint_every=10_000),
    )


def smoke() -> Config:
    """All three heads in miniature, for trying things on a CPU: ResNet-18 at 64 px, minutes on 2 cores.

    What differs from Table 1 makes some 150 steps enough to see all losses fall: queues of two batches, a faster key encoder
    and a lower temperature. With queues of 8 to 16 batches, or rates of 0.03 and more, the losses of short runs rose instead.
    """
    settings = inscon.Settings(
        queue_size=128, cell_queue_size=1152, key_momentum=0.99, temperature=0.1, cell_temperature=0.1
    )
    return Config(
        method=settings,
        views=ViewConfig(view_size=64),
        model=ModelConfig(backbone="resnet18", split_size=32),
        optim=OptimConfig(batch_size=64, epochs=10, lr=0.02, schedule="cosine-step"),
        run=RunConfig(run_dir=Path("runs/smoke"), log_every=8, checkpoint_every=80),
    )


def varied(**settings: object) -> Callable[[], Config]:
    """A recipe: Table 1 of the paper with other settings of the method."""
    return lambda: Config(method=inscon.Settings(**settings))


CELLS = ("single", "cell")
OF_METHODS = (densecl_r50, resim_r50, detco_r50, infomin_r50, simclr_r50, byol_r50, pixpro_r50)
RECIPES = {recipe.__name__: recipe for recipe in (imagenet_r50, moco_v2, moco_v1, *OF_METHODS, own, demo, smoke)} | {
    "r2": varied(
        heads=("single", "multi")
    ),  # COCO FPN 1x 40.7, 36.6 AP (Table 7); ImageNet linear 70.3 top-1 (Table 6)
    "r3": varied(heads=CELLS),  # COCO FPN 1x 40.3, 36.4 AP (Tables 7 and 8)
    "r4": varied(heads=CELLS, cell_temperature=0.1),  # COCO FPN 1x 39.9 box AP (Table 8)
    "r5": varied(heads=CELLS, cell_temperature=0.3),  # 40.3 box AP
    "r6": varied(heads=CELLS, cell_temperature=0.4),  # 40.2 box AP
    "r8": varied(cell_stage="res4"),  # COCO FPN 1x 40.5, 36.6 AP (Table 9)
}
"""By name. r2 to r8 are the other pre-trainings behind Tables 2 to 9, with the paper's results (docs/reproduce.md)."""
