"""Every setting of a run, its default, the default's reason, and the checks made before work starts.

Frozen keyword-only groups: `loader, views, model, optim, run`. Recipes at the bottom are functions that return a whole
`Config`; `scripts/train.py --recipe NAME` starts from one and every field can be overridden by a flag of its own name.
"METHOD n" in a docstring is row n of the table of readings in docs/method.md.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

HEADS = ("single", "multi", "cell")
STAGES = {"res4": 16, "res5": 32}
"""Trunk stages that can feed the cell head, with their strides in px."""
Changeable = Literal["lr", "momentum", "weight_decay", "epochs", "schedule"]
"""Settings of the optimizer that a resumed run may change where it says so."""
NORM_GROUP = 32
"""Images normalized together: a GPU's share of the paper's batch of 256 on 8."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Where batches come from."""

    data: Path | None = None
    """Packed set, written by data_prep/make_dali.py or make_ffcv.py. Needed by every pipeline but `synthetic`."""
    pipeline: Literal["dali", "ffcv", "reference", "synthetic"] = "dali"
    """Which engine executes the plan. All of them deliver the same views. ffcv reads a .beton, JPEGs or raw pixels, on the host."""
    threads: int | None = None
    """Loader threads (dali, ffcv) or worker processes (reference) per rank. None: the cores this process may use, divided by
    the ranks on this machine."""
    prefetch: int = 2
    """Finished batches that wait for the trainer at most, at least 1. DALI and FFCV have one or two more in work."""
    shuffle_window: int | None = None
    """None: every epoch is one shuffle of the whole set. For sets larger than memory on disks that seek slowly: shuffle within
    windows of so many samples, whose neighbors are read in long runs; two windows must fit in memory, e.g. 65536."""
    decode: Literal["auto", "cpu", "mixed"] = "auto"
    """Where DALI decodes JPEGs. auto: on a GPU whichever of cpu and mixed (nvJPEG, and the GPU's JPEG engine where it has one)
    a short measurement at the start finds faster; cpu without a GPU."""
    color: Literal["auto", "host", "device"] = "auto"
    """Where color, blur and normalization happen. auto: on the training device. host: finished views travel to a GPU."""
    on_bad_sample: Literal["fail", "substitute"] = "fail"
    """What to do about a sample that changed after it was packed or that a decoder refuses. fail: stop and name it.
    substitute: name it, and show in its place one of the samples that the epoch leaves over."""
    stall_timeout: float = 600.0
    """Seconds without a batch after which the pipeline is given up, with the name of the stage that hangs."""

    def __post_init__(self):
        if self.prefetch < 1:
            raise ValueError(f"prefetch must be at least 1 batch. Found: {self.prefetch}; set --prefetch 2")
        if not self.stall_timeout > 0:
            raise ValueError(
                f"stall_timeout must be more than 0 seconds. Found: {self.stall_timeout}; set --stall-timeout 600"
            )
        if self.decode == "mixed" and self.color == "host":
            raise ValueError(
                "decode=mixed leaves the crops on the GPU, and color=host needs them on the host; set --color device or "
                "--decode cpu"
            )


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How views are drawn: MoCo v2's augmentation for every view, and what counts as an overlap."""

    view_size: int = 224
    """S, the side of a view in px; a multiple of 32."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over height, drawn log-uniformly."""
    flip_probability: float = 0.5
    """Independent for each view (METHOD 7)."""
    jitter_probability: float = 0.8
    """How often color jitter is applied at all."""
    brightness: float = 0.4
    """Factor drawn from 1 +- this."""
    contrast: float = 0.4
    """Factor drawn from 1 +- this, around the mean gray of the view at that point of the order."""
    saturation: float = 0.4
    """Factor drawn from 1 +- this."""
    hue: float = 0.1
    """Shift drawn from +- this, in turns of the color circle; at most 0.5."""
    gray_probability: float = 0.2
    """How often a view becomes gray."""
    gray_first: bool = False
    """Gray before jitter, as MoCo v1 did; MoCo v2 does it after."""
    blur_probability: float = 0.5
    """How often a view is blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation, px of the view."""
    overlap_min_side: float = 32.0
    """Least extent of the region shared by query and key, per axis, px of each view: one res5 cell (METHOD 9)."""
    overlap_min_iou: float = 0.0
    """Least intersection over union of the two crops, source px (METHOD 9)."""
    overlap_candidates: int = 16
    """Pairs of crops drawn at most until one overlaps; 10 candidates all fail for 2e-8 of real images (METHOD 9)."""
    tile: Literal["full", "half"] = "full"
    """full: B/4 canvases of 2S from whole views. half: B canvases of S from halved views (METHOD 1)."""
    tiles_from: Literal["query", "third"] = "query"
    """Which views lie on the mosaic: the query views, or a third independent one (METHOD 2)."""

    def __post_init__(self):
        if self.view_size < 32 or self.view_size % 32:
            raise ValueError(
                f"view_size must be a positive multiple of 32, the trunk's stride. Found: {self.view_size}"
            )
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range 0 < low <= high. Found: {low} {high}")
        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the image area, at most 1. Found: {self.scale[1]}")
        for name in ("flip_probability", "jitter_probability", "gray_probability", "blur_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1. Found: {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative. Found: {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie in 0..0.5 turns. Found: {self.hue}")
        if not 0 <= self.overlap_min_side <= self.view_size:
            raise ValueError(f"overlap_min_side must lie in 0..{self.view_size} px. Found: {self.overlap_min_side}")
        if not 0 <= self.overlap_min_iou <= 1:
            raise ValueError(f"overlap_min_iou must lie in 0..1. Found: {self.overlap_min_iou}")
        if self.overlap_candidates < 1:
            raise ValueError(f"overlap_candidates must be at least 1. Found: {self.overlap_candidates}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Two encoders, their heads, two queues."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """The trunk, as torchvision defines it."""
    heads: tuple[Literal["single", "multi", "cell"], ...] = HEADS
    """Which losses are trained; `single` alone is MoCo (METHOD 16)."""
    mlp: bool = True
    """Two-layer heads (MoCo v2); false: one linear layer (MoCo v1)."""
    embedding_dim: int = 128
    """D of the single and the multi head."""
    cell_dim: int = 256
    """D of the cell head."""
    cell_grid: int = 3
    """G, cells per side of the overlap."""
    cell_stage: Literal["res4", "res5"] = "res5"
    """Which map the cells are pooled from (METHOD 15)."""
    roi_offset: float = 0.0
    """Where feature j sits, in cells: at j + roi_offset. 0 fits a ResNet, 0.5 a patchify trunk (METHOD 8)."""
    roi_border: Literal["zero", "normalize"] = "zero"
    """zero: features are 0 outside the map, as the published op. normalize: divide by the covered weight (METHOD 8)."""
    temperature: float = 0.2
    """Of the single and the multi loss."""
    cell_temperature: float = 0.2
    """Of the cell loss; Table 8 varies it."""
    aggregate: Literal["mean", "literal"] = "mean"
    """Several positives: the mean of separate terms, or one sum inside the log as printed (METHOD 4)."""
    queue_size: int | None = None
    """Keys in queue 1. None: 65536 rounded down to whole global batches (METHOD 11)."""
    cell_queue_size: int | None = None
    """Keys in queue 2. None: 65536 rounded down to whole global batches of cells: 64512 at batch 256 (METHOD 10, 11)."""
    key_momentum: float = 0.999
    """m of key = m*key + (1-m)*query."""
    multi_head_init: Literal["copy", "independent"] = "copy"
    """copy: the multi head starts as the single head, so that both losses start equal (METHOD 12)."""
    norm: Literal["auto", "shuffle", "split", "sync"] = "auto"
    """BatchNorm. auto: split within a rank's batch where it holds four groups of 32 or there is one rank, so that no image
    travels; else shuffle over the ranks (METHOD 13)."""
    split_size: int | None = None
    """Images per BatchNorm group of norm=split. None: 32 as on 8 GPUs, or a quarter of the batch if that is less."""
    mosaic_updates_norm: bool = False
    """Whether the mosaic pass updates BatchNorm's running statistics; linear evaluation reads them (METHOD 14)."""

    def __post_init__(self):
        unknown = [name for name in self.heads if name not in HEADS]
        if unknown or not self.heads or len(set(self.heads)) != len(self.heads):
            raise ValueError(
                f"heads must be a choice of {' '.join(HEADS)}, each at most once. Found: {' '.join(self.heads)}"
            )
        for name in ("embedding_dim", "cell_dim", "cell_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Found: {getattr(self, name)}")
        for name in ("temperature", "cell_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0. Found: {getattr(self, name)}")
        if not 0 <= self.key_momentum <= 1:
            raise ValueError(f"key_momentum must lie in 0..1. Found: {self.key_momentum}")

    @property
    def cells(self) -> int:
        """G*G, cells per image."""
        return self.cell_grid**2

    @property
    def cell_stride(self) -> int:
        """Stride in px of the map that cells are pooled from."""
        return STAGES[self.cell_stage]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Table 1 of the paper."""

    batch_size: int = 256
    """Images per step over all ranks."""
    epochs: int = 200
    """Length of the schedule, in passes over the data."""
    max_steps: int | None = None
    """Stop after this many steps though the schedule goes on. None: run the whole schedule."""
    lr: float = 0.03
    """Initial learning rate at this batch size; it is not rescaled for you."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """On every parameter, biases and BatchNorm included, as MoCo."""
    schedule: Literal["cosine-epoch", "cosine-step"] = "cosine-epoch"
    """The learning rate follows a cosine, changed once per epoch (MoCo) or at every step."""
    optimizer: Literal["auto", "torch-fused", "foreach", "apex"] = "auto"
    """Which implementation of SGD. auto: NVIDIA's apex where it is really there, else torch's fused kernels."""
    gradient_wire: Literal["fp32", "fp16", "bf16"] = "fp32"
    """In which format gradients travel between ranks: half the bytes for their last digits. They are summed in it, too."""
    cut: Literal["joint", "passes", "groups"] = "passes"
    """Into which pieces a step is cut, one's activations alive at a time; losses and gradients add up to the same. joint: none.
    passes: single views, then mosaics. groups: each BatchNorm group of norm = split by itself too: least memory, slower."""
    compile: bool = False
    """Compile both trunks with torch.compile (minutes at the start). Off: on a CPU it made a step 3 % slower, on a GPU it is not
    measured; GPUs older than sm_80 are refused."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: bf16 where the GPU has it, fp16 with a gradient scaler on older ones, fp32 on the CPU."""

    def __post_init__(self):
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Found: {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, or unset for the whole schedule. Found: {self.max_steps}")
        for name in ("lr", "momentum", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative. Found: {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it is watched."""

    run_dir: Path = Path("runs/inscon")
    """Receives config.json, metrics.jsonl, warnings.jsonl if there are any, checkpoints/ and tensorboard/."""
    seed: int = 0
    """Of everything: initial weights, order of samples, every view."""
    log_every: int = 20
    """Steps between log lines; the only moments when the host waits for the device."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; also written at the end and on SIGTERM or Ctrl-C."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint of run_dir if there is one. never: refuse a run_dir that holds any."""
    change_on_resume: tuple[Changeable, ...] = ()
    """Settings that may differ from the checkpoint's, e.g. lr; the new value counts from there on. Others refuse to resume."""
    tensorboard: bool = True
    """Write TensorBoard files too, if the tensorboard package is installed."""
    eval_data: Path | None = None
    """Labelled packed set, held out; every `eval_every` steps each of its pictures is classified by its nearest neighbors among
    the others, on the features of that moment. None: no such monitor."""
    eval_every: int = 1000
    """Steps between two of these, with eval_data."""
    eval_pictures: int = 10000
    """How many of eval_data are taken at most; packing has shuffled them, so the first ones are as good as any."""

    def __post_init__(self):
        unknown = sorted(set(self.change_on_resume) - set(get_args(Changeable)))
        if unknown:
            raise ValueError(
                f"change_on_resume takes {' '.join(get_args(Changeable))}. Found: {' '.join(unknown)}; set another --run-dir"
            )
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Found: {getattr(self, name)}")
        if self.eval_pictures < 2:
            raise ValueError(
                f"eval_pictures must be at least 2, of which one is the other's neighbor. Found: {self.eval_pictures}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative. Found: {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    loader: LoaderConfig = field(default_factory=LoaderConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict:
        """Plain nested dictionaries of JSON types, for config.json and checkpoints."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def resolve(config: Config, world_size: int) -> Config:
    """Fill in every None that depends on the batch and the number of ranks, and check what only shows together.

    Raises ValueError with the value found and what to set instead.
    """
    batch, model, views = config.optim.batch_size, config.model, config.views
    if batch % (4 * world_size):
        nearest = max(batch // (4 * world_size), 1) * 4 * world_size
        raise ValueError(
            f"batch_size must be a multiple of 4 images (one mosaic) times {world_size} rank(s). Found: {batch}; "
            f"set --batch-size {nearest}"
        )
    per_rank = batch // world_size
    alone = world_size == 1 or (per_rank >= 4 * NORM_GROUP and per_rank % NORM_GROUP == 0)
    norm = model.norm if model.norm != "auto" else ("split" if alone else "shuffle")
    if norm == "shuffle" and world_size == 1:
        raise ValueError(
            "norm=shuffle permutes images over ranks and needs at least 2. Found: 1 rank; set --norm split"
        )
    model = dataclasses.replace(
        model,
        norm=norm,
        split_size=_split_size(model.split_size, per_rank) if norm == "split" else None,
        queue_size=_queue_size("queue_size", model.queue_size, batch),
        cell_queue_size=_queue_size("cell_queue_size", model.cell_queue_size, batch * model.cells),
    )
    if "cell" in model.heads and views.view_size // model.cell_stride < 2:
        raise ValueError(
            f"the cell head needs a map of at least 2x2 features; {model.cell_stage} at view_size {views.view_size} has "
            f"{views.view_size // model.cell_stride}; set --view-size {2 * model.cell_stride} or more"
        )
    return dataclasses.replace(config, model=model)


def _queue_size(name: str, asked: int | None, per_step: int) -> int:
    """METHOD 11: whole global batches only, so that a step's keys always lie in one piece."""
    if asked is None:
        return max(65536 // per_step, 1) * per_step
    if asked < per_step or asked % per_step:
        nearest = max(round(asked / per_step), 1) * per_step
        flag = name.replace("_", "-")
        raise ValueError(
            f"{name} must be a multiple of the {per_step} keys of one step. Found: {asked}; set --{flag} {nearest}"
        )
    return asked


def _split_size(asked: int | None, per_rank: int) -> int:
    if asked is None:
        groups = max(per_rank // NORM_GROUP, min(4, per_rank // 4))
        while groups > 1 and per_rank % (4 * groups):
            groups -= 1
        asked = per_rank // groups
    if asked % 4 or per_rank % asked or per_rank // asked < 2:
        raise ValueError(
            f"norm=split needs at least 2 BatchNorm groups of whole mosaics: split_size must be a multiple of 4 that divides "
            f"the {per_rank} images of a rank into 2 or more. Found: {asked}; set --split-size 4, or a larger --batch-size"
        )
    return asked


# Recipes. Hours are predictions from docs/method.md's budget until somebody measures them.


def imagenet_r50() -> Config:
    """InsCon as the paper trains it: ResNet-50, ImageNet-1k, 200 epochs, batch 256 (Table 1).

    `torchrun --nproc_per_node=8 scripts/train.py --pipeline dali --data SHARDS`. Predicted 20 h at the ceiling of 8 V100s,
    target 27 h (not measured: no V100 was at hand). Expected after fine-tuning: VOC 59.1 AP, COCO FPN 1x 40.9 box AP.
    """
    return Config()


def moco_v2() -> Config:
    """The baseline: InsCon with the single head alone. Expected: VOC 57.0 AP, ImageNet linear 67.5 top-1."""
    return Config(model=ModelConfig(heads=("single",)))


def moco_v1() -> Config:
    """MoCo v1: one linear head, temperature 0.07, v1's augmentation (gray first, strong hue, no blur). Expected: VOC 55.9 AP."""
    return Config(
        views=ViewConfig(jitter_probability=1.0, hue=0.4, gray_first=True, blur_probability=0.0),
        model=ModelConfig(heads=("single",), mlp=False, temperature=0.07),
    )


def smoke() -> Config:
    """All three heads in miniature, for the demo and for trying things on a CPU: ResNet-18 at 64 px, minutes on 2 cores.

    What differs from Table 1 makes some 150 steps enough to see all losses fall: queues of two batches, a faster key encoder
    and a lower temperature. With queues of 8 to 16 batches, or rates of 0.03 and more, the losses of short runs rose instead.
    """
    return Config(
        views=ViewConfig(view_size=64),
        model=ModelConfig(
            arch="resnet18",
            queue_size=128,
            cell_queue_size=1152,
            key_momentum=0.99,
            temperature=0.1,
            cell_temperature=0.1,
            split_size=32,
        ),
        optim=OptimConfig(batch_size=64, epochs=10, lr=0.02, schedule="cosine-step"),
        run=RunConfig(run_dir=Path("runs/smoke"), log_every=8, checkpoint_every=80),
    )


# The eight pre-trainings behind Tables 2 to 9: Table 1 of the paper, each with the setting that its rows vary. What each serves,
# what it should give and what it costs: docs/reproduce.md.


def r1() -> Config:
    """Single head alone, MoCo v2 (Table 7). Expected: COCO FPN 1x 39.8 box, 35.9 mask AP."""
    return moco_v2()


def r2() -> Config:
    """Single and multi (Tables 6 and 7). Expected: COCO FPN 1x 40.7, 36.6 AP; ImageNet linear 70.3 top-1."""
    return Config(model=ModelConfig(heads=("single", "multi")))


def r3() -> Config:
    """Single and cell, cell temperature 0.2 (Tables 7 and 8). Expected: COCO FPN 1x 40.3, 36.4 AP."""
    return Config(model=ModelConfig(heads=("single", "cell")))


def r4() -> Config:
    """Single and cell, cell temperature 0.1 (Table 8). Expected: COCO FPN 1x 39.9 box AP."""
    return Config(model=ModelConfig(heads=("single", "cell"), cell_temperature=0.1))


def r5() -> Config:
    """Single and cell, cell temperature 0.3 (Table 8). Expected: COCO FPN 1x 40.3 box AP."""
    return Config(model=ModelConfig(heads=("single", "cell"), cell_temperature=0.3))


def r6() -> Config:
    """Single and cell, cell temperature 0.4 (Table 8). Expected: COCO FPN 1x 40.2 box AP."""
    return Config(model=ModelConfig(heads=("single", "cell"), cell_temperature=0.4))


def r7() -> Config:
    """All heads, cells from res5: InsCon (Tables 2 to 5, 7, 9). Expected: VOC 59.1 AP, COCO FPN 1x 40.9, 36.9 AP."""
    return imagenet_r50()


def r8() -> Config:
    """All heads, cells from res4 (Table 9). Expected: COCO FPN 1x 40.5, 36.6 AP."""
    return Config(model=ModelConfig(cell_stage="res4"))


RECIPES = {
    recipe.__name__: recipe for recipe in (imagenet_r50, moco_v2, moco_v1, smoke, r1, r2, r3, r4, r5, r6, r7, r8)
}
