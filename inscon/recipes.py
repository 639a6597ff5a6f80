"""Whole configurations to start from: `scripts/train.py --recipe NAME --data SHARDS`. Commands, costs (predicted, until somebody
measures them) and what is to be expected are in docs/reproduce.md; what is unchecked, in docs/methods.md."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from inscon.config import Config, ModelConfig, OptimConfig, RunConfig, ViewConfig
from inscon.methods import byol, densecl, detco, infomin, inscon, moco, pixpro, resim, simclr


def of(method: ModuleType, **settings: object) -> Callable[[], Config]:
    """A recipe: ResNet-50, ImageNet-1k, 200 epochs, batch 256, as Table 1 of the paper, with the method's own settings."""
    return lambda: Config(method=method.Settings(**settings))


def imagenet_r50() -> Config:
    """InsCon as the paper trains it (Table 1). Predicted: 20 h at the ceiling of 8 V100s, target 27 h (no V100 was at hand)."""
    return Config(method=inscon.Settings())


def moco_v1() -> Config:
    """One linear head, temperature 0.07, v1's augmentation (gray first, strong hue, no blur). The rate follows v2's cosine;
    theirs fell to a tenth at epochs 120 and 160."""
    return Config(
        method=moco.Settings(mlp=False, temperature=0.07),
        views=ViewConfig(jitter_probability=1.0, hue=0.4, gray_first=True, blur_probability=0.0),
    )


def infomin_r50() -> Config:
    """RandAugment is not theirs to the last detail, and the learning rate ends at 0, there at a thousandth of its start."""
    strong = ViewConfig(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, randaugment=2)
    return Config(method=infomin.Settings(), views=strong)


LARS = {"optimizer": "lars", "decay_norm_and_bias": False, "schedule": "cosine-step"}
"""SGD for large batches: no decay and no adaptation of biases and BatchNorm."""
BYOLS_VIEWS = ViewConfig(scale=(0.08, 1.0), saturation=0.2, blur_probability=1.0)
"""Of BYOL and PixPro; the second view is blurred less and sometimes solarized (the method's settings)."""


def simclr_r50() -> Config:
    """SimCLR v1: batch 4096, LARS, strong colors; published results are of 1000 epochs. Predicted: 137 GPU hours of V100s."""
    return Config(
        method=simclr.Settings(),
        views=ViewConfig(scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
        optim=OptimConfig(batch_size=4096, lr=4.8, weight_decay=1e-6, warmup_epochs=10, **LARS),
    )


def byol_r50() -> Config:
    """BYOL for 300 epochs: batch 4096, LARS at 0.3 per 256 images; 1000 epochs have 0.2 per 256 (--lr 3.2) and --target-momentum
    0.996. Predicted: 275 GPU hours of V100s."""
    return Config(
        method=byol.Settings(),
        views=BYOLS_VIEWS,
        optim=OptimConfig(batch_size=4096, epochs=300, lr=4.8, weight_decay=1.5e-6, warmup_epochs=10, **LARS),
    )


def pixpro_r50() -> Config:
    """PixPro for 100 epochs: batch 1024, LARS at 1.0 per 256 images (settings of the official repository). Predicted: 102 GPU hours
    of V100s."""
    return Config(
        method=pixpro.Settings(),
        views=BYOLS_VIEWS,
        optim=OptimConfig(batch_size=1024, epochs=100, lr=4.0, weight_decay=1e-5, warmup_epochs=5, **LARS),
    )


def demo() -> Config:
    """`smoke` with a network of 0.4 million weights: what `make demo` trains, minutes on 2 cores. Found by a search on other scenes
    and seeds than those of the README's figures (docs/measured.md)."""
    run = {"run_dir": Path("runs/demo"), "log_every": 16, "checkpoint_every": 10_000}
    return smoke().replaced(backbone="test_resnet", split_size=16, lr=0.03, **run)


def smoke() -> Config:
    """All three heads in miniature, for trying things on a CPU: ResNet-18 at 64 px, minutes on 2 cores. Queues of two batches, a
    faster key encoder and a lower temperature make some 150 steps enough to see all losses fall; with queues of 8 to 16 batches, or
    rates of 0.03 and more, those of short runs rose instead."""
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


RECIPES: dict[str, Callable[[], Config]] = {
    "imagenet_r50": imagenet_r50,
    "moco_v2": of(moco),
    "moco_v1": moco_v1,
    "densecl_r50": of(densecl),
    "resim_r50": of(resim),
    "detco_r50": of(detco),
    "infomin_r50": infomin_r50,
    "simclr_r50": simclr_r50,
    "byol_r50": byol_r50,
    "pixpro_r50": pixpro_r50,
    "own": of(inscon),  # batch, epochs, queues and more as the number of pictures asks (inscon/own.py)
    "demo": demo,
    "smoke": smoke,
    "r2": of(inscon, heads=("single", "multi")),
    "r3": of(inscon, heads=("single", "cell")),
    "r4": of(inscon, heads=("single", "cell"), cell_temperature=0.1),
    "r5": of(inscon, heads=("single", "cell"), cell_temperature=0.3),
    "r6": of(inscon, heads=("single", "cell"), cell_temperature=0.4),
    "r8": of(inscon, cell_stage="res4"),
}
"""By name, the first of each method where `--method` starts. r2 to r8 are the other pre-trainings behind Tables 2 to 9."""
