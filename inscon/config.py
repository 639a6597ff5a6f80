"""Every setting of a run that is no method's own, its default, the default's reason, and the checks made before work starts.

Frozen keyword-only groups: `loader, views, model, optim, run`, and `method`, whose class a method brings (inscon/methods/).
inscon/recipes.py has functions that return a whole `Config`; every field can be overridden by a flag of its own name. "METHOD n"
in a docstring is row n of the table of readings in docs/method.md.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

from inscon.guard import check_ranges
from inscon.plan import ColorSpec, OverlapRule, ViewSpec

Changeable = Literal["lr", "momentum", "weight_decay", "epochs", "schedule", "warmup_epochs"]
"""Settings of the optimizer that a resumed run may change where it says so."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Where batches come from."""

    data: Path | None = None
    """Packed set, written by data_prep/make_dali.py or make_ffcv.py: a folder, or an address (s3://, https://, ...) that is fetched
    before the first step. Needed by every pipeline but `synthetic`."""
    cache_dir: Path | None = None
    """Where sets that were fetched are kept. None: inscon-stores in ~/.cache, or in $XDG_CACHE_HOME."""
    cache_gb: float = 200.0
    """GB (of 10^9 bytes) that they may take together; the longest unused go first. The set must fit as a whole, for every epoch is
    one shuffle of all of it."""
    pipeline: Literal["dali", "ffcv", "reference", "synthetic"] = "dali"
    """Which engine executes the plan. All of them deliver the same views. ffcv reads a .beton, JPEGs or raw pixels, on the host."""
    threads: int | None = None
    """Loader threads (dali, ffcv) or worker processes (reference) per rank. None: the cores this process may use, divided by
    the ranks on this machine."""
    prefetch: int = 2
    """Finished batches that wait for the trainer at most, at least 1. DALI and FFCV have one or two more in work; of
    the reference each worker has one."""
    decode: Literal["auto", "cpu", "mixed"] = "auto"
    """Where DALI decodes JPEGs. auto: mixed (nvJPEG, and the GPU's JPEG engine where it has one) where the GPU colors and a short
    measurement at the first start on a machine finds it 1.1 times as fast as cpu; else cpu."""
    jpeg_engine: float = 0.65
    """Share of the JPEGs that the GPU's JPEG engine, where it has one, decodes with decode=mixed; auto finds its own."""
    color: Literal["auto", "host", "device"] = "auto"
    """Where color, blur and normalization happen. auto: on the host, if there is no GPU, with RandAugment, or if the host alone
    makes the images/s that the first steps take; else on the GPU. host: finished views travel to a GPU."""
    on_bad_sample: Literal["fail", "substitute"] = "fail"
    """What to do about a sample that changed after it was packed or that a decoder refuses. fail: stop and name it.
    substitute: name it, and show in its place one that the same epoch shows half an epoch away."""
    stall_timeout: float = 600.0
    """Seconds, at least 1, without a batch after which the pipeline is given up, with the name of the stage that hangs."""

    def __post_init__(self):
        check_ranges(self, threads=0, prefetch=1, stall_timeout=1, jpeg_engine=(0, 1), cache_gb=0)
        if self.threads == 0 and self.pipeline in ("dali", "ffcv"):
            raise ValueError(f"the pipeline {self.pipeline} needs at least 1 thread. Found: 0; set --threads 1 or more")
        if self.decode == "mixed" and self.color == "host":
            raise ValueError(
                "decode=mixed leaves the crops on the GPU, and color=host needs them on the host; set --color device or "
                "--decode cpu"
            )


@dataclass(frozen=True, kw_only=True)
class ViewConfig(ColorSpec):
    """How views are drawn: MoCo v2's augmentation for every view, and what counts as an overlap."""

    view_size: int = 224
    """S, the side of a view in px; a multiple of 32."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over height, drawn log-uniformly."""
    flip_probability: float = 0.5
    """Independent for each view (METHOD 7)."""
    overlap_min_side: float = 32.0
    """Least extent of the region shared by query and key, per axis, px of each view: one res5 cell (METHOD 9)."""
    overlap_min_iou: float = 0.0
    """Least intersection over union of the two crops, source px (METHOD 9)."""
    overlap_candidates: int = 16
    """Pairs of crops drawn at most until one overlaps; 10 candidates all fail for 2e-8 of real images (METHOD 9)."""

    def __post_init__(self):
        super().__post_init__()
        if self.view_size < 32 or self.view_size % 32:
            raise ValueError(
                f"view_size must be a positive multiple of 32, the backbone's stride. Found: {self.view_size}"
            )
        check_ranges(self, overlap_min_iou=(0, 1), overlap_candidates=1)
        self.spec("view", self.overlap(""))  # which checks the rest

    def color(self) -> ColorSpec:
        """What happens to colors."""
        return ColorSpec(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ColorSpec)})

    def spec(self, name: str, overlap: OverlapRule | None = None, **color: float) -> ViewSpec:
        """A view as these settings say; `color` are fields of ColorSpec in which it differs."""
        return ViewSpec(
            name=name, size=self.view_size, scale=self.scale, ratio=self.ratio, flip=self.flip_probability,
            color=dataclasses.replace(self.color(), **color), overlap=overlap,
        )  # fmt: skip

    def overlap(self, view: str) -> OverlapRule:
        """The rule about the region shared with `view`."""
        return OverlapRule(
            view=view, min_side=self.overlap_min_side, min_iou=self.overlap_min_iou, candidates=self.overlap_candidates
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone and its normalization."""

    backbone: str = "resnet50"
    """A ResNet, ResNeXt or Wide ResNet of torchvision, or a network of timm that gives feature maps (convnext_tiny, say)."""
    norm: Literal["auto", "shuffle", "split", "sync", "none"] = "auto"
    """BatchNorm. auto: split within a rank's batch where it holds four groups of 32 or there is one rank, so that no image
    travels; else shuffle over the ranks (METHOD 13). Methods without keys want sync, over the whole batch of all ranks. none: as
    it is, also what a backbone without BatchNorm gets."""
    split_size: int | None = None
    """Images per BatchNorm group of norm=split. None: 32 as on 8 GPUs, or a quarter of the batch if that is less."""


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
    decay_norm_and_bias: bool = True
    """false: no weight decay on vectors, which biases and the weights of BatchNorm are, as the recipes with LARS have it."""
    schedule: Literal["cosine-epoch", "cosine-step"] = "cosine-epoch"
    """The learning rate follows a cosine, changed once per epoch (MoCo) or at every step."""
    warmup_epochs: int = 0
    """Over so many the rate rises from 0, in a line, step by step; the cosine takes the rest."""
    optimizer: Literal["auto", "torch-fused", "foreach", "apex", "lars"] = "auto"
    """Which implementation of SGD. auto: torch's fused kernels, the only ones of them that a CUDA graph can hold. apex: NVIDIA's.
    lars: SGD whose step of each weight tensor is in proportion to that tensor's length, for batches of thousands."""
    graph: Literal["auto", "off"] = "auto"
    """auto: on a GPU a step is captured as one CUDA graph and replayed, so that the host has nothing to launch. off: never."""
    gradient_compression: Literal["none", "fp16", "bf16"] = "none"
    """In which format gradients travel between ranks: half the bytes for their last digits. They are summed in it, too."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: bf16 where the GPU has it, fp16 with a gradient scaler on older ones, fp32 on the CPU."""

    def __post_init__(self):
        check_ranges(self, batch_size=1, epochs=1, max_steps=1, lr=0, momentum=0, weight_decay=0)
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs must lie in 0..{self.epochs - 1}, below the {self.epochs} epochs of the run. Found: "
                f"{self.warmup_epochs}; set --warmup-epochs 0"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it is watched."""

    run_dir: Path = Path("runs/inscon")
    """Receives config.json, metrics.jsonl, warnings.jsonl if there are any, checkpoints/ and what trackers write. A run goes on
    from the newest checkpoint there."""
    seed: int = 0
    """Of everything: initial weights, order of samples, every view."""
    log_every: int = 20
    """Steps between log lines; the only moments when the host waits for the device."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; also written at the end and on SIGTERM, SIGUSR1 or Ctrl-C."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    change_on_resume: tuple[Changeable, ...] = ()
    """Settings that may differ from the checkpoint's, e.g. lr; the new value counts from there on. Others refuse to resume."""
    tracker: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """What gets the figures of metrics.jsonl, too: TensorBoard, Weights & Biases, MLflow, or several; each needs its package."""
    eval_data: Path | None = None
    """Labelled packed set, held out; every `eval_every` steps each of its pictures is classified by its nearest neighbors among
    the others, on the features of that moment. None: no such monitor."""
    eval_every: int = 1000
    """Steps between two of these, with eval_data."""
    eval_pictures: int = 10000
    """How many of eval_data are taken at most; packing has shuffled them, so the first ones are as good as any."""

    def __post_init__(self):
        check_ranges(self, log_every=1, checkpoint_every=1, keep_checkpoints=1, eval_every=1, eval_pictures=2, seed=0)


MethodType = TypeVar("MethodType")


@dataclass(frozen=True, kw_only=True)
class Config(Generic[MethodType]):
    """A whole run."""

    method: MethodType
    """A method's settings (`inscon.methods.method.MethodSettings`)."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def replaced(self, **settings: Any) -> "Config":
        """A copy with other settings, by their names in any group: `replaced(data="shards", epochs=5)`. ValueError for a name that
        no group has."""
        kinds = {
            field.name: (group, field.type) for group, held in vars(self).items() for field in dataclasses.fields(held)
        }
        groups: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            if name not in kinds:
                nearest = ", ".join(difflib.get_close_matches(name, kinds, 3, cutoff=0))
                raise ValueError(f"there is no setting {name}; the nearest are {nearest}")
            group, kind = kinds[name]
            is_path = isinstance(value, str) and Path in (kind, *get_args(kind))
            groups.setdefault(group, {})[name] = Path(value) if is_path else value
        made = {group: dataclasses.replace(getattr(self, group), **changed) for group, changed in groups.items()}
        return dataclasses.replace(self, **made)

    def to_dict(self) -> dict:
        """Plain nested dictionaries of JSON types, for config.json and checkpoints; `method.name` says whose settings they are."""
        module = type(self.method).__module__.removeprefix("inscon.methods.")
        plain = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain | {"method": {"name": module, **plain["method"]}}


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """A group of settings from what `Config.to_dict` made of it: lists become tuples again, and settings that are gone go."""
    kept = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()})
