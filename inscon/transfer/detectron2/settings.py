"""The settings of a fine-tuning: its YAML file, the schedule for the GPUs there are, and whether the data sets fit."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).with_name("configs")
STARTS = ("coco_", "voc_")
"""How the files in CONFIGS begin that a user may choose; the others are their parts."""


class SettingsError(ValueError):
    """Settings that do not fit together; the message says what was found and what to set."""


@dataclass(frozen=True)
class DataSet:
    """What a data set holds, as far as a model has to fit it."""

    name: str
    kind: str | None
    """detectron2's evaluator_type: "coco", "pascal_voc", or another, or None."""
    classes: int
    instances: bool
    """Are there boxes in it?"""
    masks: bool


def installed() -> bool:
    """Is there a detectron2? This folder, which is called the same, is none."""
    spec = importlib.util.find_spec("detectron2")
    return spec is not None and str(CONFIGS.parent) not in (spec.submodule_search_locations or [])


def require_detectron2() -> None:
    if not installed():
        raise SettingsError(
            "detectron2 is not installed; compile it against the torch that is here, as its INSTALL.md says, or fine-tune with "
            "mmdet (inscon/transfer/mmdet)"
        )


def choices() -> list[str]:
    """Names of our configs."""
    return sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name.startswith(STARTS))


def read_config(file: str, options: list[str], num_gpus: int):
    """detectron2's configuration: its defaults, `file`, `options` (key, value, ...), fitted to the GPUs, frozen."""
    if not Path(file).is_file():
        raise SettingsError(
            f'there is no config "{file}"; set --config-file to one of {CONFIGS}: {", ".join(choices())}'
        )
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(file)
    cfg.merge_from_list(options)
    cfg = adapt_schedule(cfg, num_gpus)
    cfg.freeze()
    return cfg


def adapt_schedule(cfg, num_gpus: int):
    """`cfg` for another number of GPUs than SOLVER.REFERENCE_WORLD_SIZE, each with as many images as before.

    Images and learning rate of a step in proportion, steps, milestones and warm-up in inverse proportion: detectron2's own
    rule, applied here so that the config.yaml of the run says what was done. With REFERENCE_WORLD_SIZE 0: `cfg` as it is.
    """
    if num_gpus < 1:
        raise SettingsError(f"a schedule is for 1 GPU or more. Found: {num_gpus}; set --num-gpus 8")
    from detectron2.engine import DefaultTrainer

    return DefaultTrainer.auto_scale_workers(cfg, num_gpus)


def describe_schedule(cfg) -> str:
    s = cfg.SOLVER
    return (
        f"{s.IMS_PER_BATCH} images a step, learning rate {s.BASE_LR:g} after {s.WARMUP_ITERS} steps, times {s.GAMMA:g} at "
        f"{' and '.join(map(str, s.STEPS))}, {s.MAX_ITER} steps"
    )


def check_data_sets(cfg, test_only: bool = False) -> None:
    """Raise SettingsError where a data set is not there, holds no instances, or has other classes than the model."""
    names = (*(() if test_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)
    for name in names:
        judge(read_data_set(name), cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON)


def read_data_set(name: str) -> DataSet:
    """What detectron2 knows of a data set and, for COCO's format, what its file of annotations holds."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if name not in DatasetCatalog.list():
        raise SettingsError(
            f'detectron2 knows no data set "{name}"; register it, or set DATASETS.TRAIN and DATASETS.TEST'
        )
    known = MetadataCatalog.get(name)
    kind, file = known.get("evaluator_type"), known.get("json_file")
    if kind == "pascal_voc":
        listing = Path(known.dirname, "ImageSets", "Main", f"{known.split}.txt")
        _require_file(name, listing)
        return DataSet(name, kind, len(known.thing_classes), bool(listing.read_text().split()), masks=False)
    if kind == "coco":
        _require_file(name, Path(file))
        return describe_annotations(name, json.loads(Path(file).read_bytes()))
    return DataSet(name, kind, len(known.get("thing_classes", ())), True, True)


def describe_annotations(name: str, held: dict) -> DataSet:
    """`held`: a file of annotations in COCO's format."""
    instances = [each for each in held.get("annotations", ()) if "bbox" in each]
    masks = any(each.get("segmentation") for each in instances)
    return DataSet(name, "coco", len(held.get("categories", ())), bool(instances), masks)


def judge(data: DataSet, num_classes: int, mask_on: bool) -> None:
    """Raise SettingsError where a model of so many classes, with or without masks, doesn't fit `data`."""
    if data.kind not in ("coco", "pascal_voc"):
        raise SettingsError(
            f"{data.name} is tested in neither COCO's nor VOC's way. Found: evaluator_type \"{data.kind}\"; set it in "
            'MetadataCatalog to "coco" or "pascal_voc"'
        )
    if not data.instances:
        raise SettingsError(f"{data.name} holds no instances, only images; take the annotations named instances_*.json")
    if data.classes != num_classes:
        start = {80: "coco_", 20: "voc_"}.get(data.classes)
        ours = next((f", or --config-file {c}" for c in choices() if start and c.startswith(start)), "")
        raise SettingsError(
            f"{data.name} has {data.classes} classes and the config {num_classes}; set MODEL.ROI_HEADS.NUM_CLASSES "
            f"{data.classes}{ours}"
        )
    if mask_on and not data.masks:
        raise SettingsError(f"{data.name} has boxes only, and the config wants masks; set MODEL.MASK_ON False")


def _require_file(name: str, file: Path) -> None:
    if not file.is_file():
        raise SettingsError(
            f"{name} is not there. Found: no {file}; set the environment's DETECTRON2_DATASETS to the folder that holds coco/, "
            "VOC2007/ and VOC2012/"
        )
