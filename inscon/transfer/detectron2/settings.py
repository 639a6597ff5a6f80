"""The settings of a fine-tuning: its YAML file, the schedule for the GPUs there are, and whether the data sets fit."""

import contextlib
import difflib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

CONFIGS = Path(__file__).with_name("configs")
STARTS = ("coco_", "voc_")
"""How the files in CONFIGS begin that a user may choose; the others are their parts."""
WHERE = "set the environment's DETECTRON2_DATASETS to the folder that holds coco/, VOC2007/ and VOC2012/, or bring what is missing"
OF_THE_BACKBONE = {
    "MODEL.RESNETS.STRIDE_IN_1X1": False, "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}  # fmt: skip
"""How a backbone of ours was trained: with other values its tensors load as well, and the network computes something else."""


class SettingsError(ValueError):
    """Settings, weights or data that do not fit together; the message says what was found and what to set."""


@contextlib.contextmanager
def telling(what: str, remedy: str) -> Iterator[None]:
    """A SettingsError that says what detectron2 `what` ("can't build the model") for whatever it raises: of YAML, yacs, torch."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SettingsError(f"detectron2 {what} ({type(error).__name__}: {reason}); {remedy}") from error


def installed() -> bool:
    """Is there a detectron2? This folder, which is called the same, is none."""
    spec = importlib.util.find_spec("detectron2")
    return spec is not None and str(CONFIGS.parent) not in (spec.submodule_search_locations or [])


def require_detectron2() -> None:
    if not installed():
        raise SettingsError(
            "detectron2 is not installed; compile it against the torch that is here, as docs/reproduce.md says, or fine-tune with "
            "mmdet (inscon/transfer/mmdet)"
        )


def choices() -> list[str]:
    """Names of our configs."""
    return sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name.startswith(STARTS))


def read_config(file: str, options: list[str], num_gpus: int):
    """detectron2's configuration: its defaults, `file`, `options` (key, value, ...), fitted to the GPUs, frozen."""
    late = next((option for option in options if option.startswith("--")), None)
    if late:
        raise SettingsError(f"detectron2 reads flags in front of KEY VALUE pairs only; put {late} before {options[0]}")
    choose = f"set --config-file to one of {CONFIGS}: {', '.join(choices())}"
    if not Path(file).is_file():
        raise SettingsError(f'there is no config "{file}"; {choose}')
    if Path(file).resolve().parent == CONFIGS and Path(file).name not in choices():
        raise SettingsError(f"{Path(file).name} is a part of other configs; {choose}")
    from detectron2.config import get_cfg

    cfg = get_cfg()
    with telling(f"can't read the config {file}", f"mend it, or {choose}"):
        cfg.merge_from_file(file)
    merge_options(cfg, options)
    if not cfg.DATASETS.TRAIN:
        raise SettingsError(f"{file} names no data set to train on, it may be a part of a config; {choose}")
    cfg = adapt_schedule(cfg, num_gpus)
    cfg.freeze()
    return cfg


def merge_options(cfg, options: list[str]) -> None:
    """Set `options` in `cfg`. SettingsError, naming the key, for one that there is not and for a value of another type."""
    if len(options) % 2:
        raise SettingsError(f"settings come as pairs of KEY VALUE. Found: no value for {options[-1]}; add it")
    for key, value in zip(options[::2], options[1::2]):
        there = flat(cfg)
        if key not in there:
            like = difflib.get_close_matches(key, there, n=1, cutoff=0)[0]
            raise SettingsError(f"detectron2 has no setting {key}; the one most like it is {like}")
        try:
            cfg.merge_from_list([key, value])
        except Exception:  # of yacs, which names no key
            kind = type(there[key]).__name__
            raise SettingsError(f"{key} must be of type {kind}. Found: {value}; write it like {there[key]!r}") from None


def flat(tree, prefix: str = "") -> dict:
    """{"SOLVER.BASE_LR": 0.02, ...} of settings in groups, with lists for tuples, as JSON has them."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: _plain(value)}
    return found


def _plain(value):
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def adapt_schedule(cfg, num_gpus: int):
    """`cfg` for another number of GPUs than SOLVER.REFERENCE_WORLD_SIZE, each with as many images as before.

    Images and learning rate of a step in proportion, steps, milestones and warm-up in inverse proportion: detectron2's own
    rule, applied here so that the config.yaml of the run says what was done. With REFERENCE_WORLD_SIZE 0: `cfg` as it is.
    """
    if num_gpus < 1:
        raise SettingsError(f"a schedule is for 1 GPU or more. Found: {num_gpus}; set --num-gpus 8")
    check_batch(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE, num_gpus)
    from detectron2.engine import DefaultTrainer

    return DefaultTrainer.auto_scale_workers(cfg, num_gpus)


def check_batch(images: int, reference: int, num_gpus: int) -> None:
    """SettingsError where the GPUs that a schedule is for can't share its `images` of a step (SOLVER.IMS_PER_BATCH) evenly."""
    sharing = reference or num_gpus
    if images < 1 or images % sharing:
        each = max(round(images / num_gpus), 1)
        raise SettingsError(
            f"SOLVER.IMS_PER_BATCH counts the images of all {sharing} GPUs that the schedule is for, which share them evenly. "
            f"Found: {images}; for {each} on each GPU set SOLVER.IMS_PER_BATCH {each * sharing}"
        )


def describe_schedule(cfg) -> str:
    s = cfg.SOLVER
    drops = f"times {s.GAMMA:g} at {' and '.join(map(str, s.STEPS))}" if s.STEPS else "never lowered"
    return f"{s.IMS_PER_BATCH} images a step, learning rate {s.BASE_LR:g} after {s.WARMUP_ITERS} steps, {drops}, {s.MAX_ITER} steps"


def check_backbone(cfg) -> None:
    """SettingsError where the network would not be the one that our backbones were trained in."""
    found = flat(cfg)
    for key, value in OF_THE_BACKBONE.items():
        if found[key] != value:
            raise SettingsError(
                f"{key} must be {value} for a backbone of ours; another value loads as well and computes something else. "
                f"Found: {found[key]}; leave it out"
            )


def check_schedule(cfg) -> None:
    """SettingsError for numbers of SOLVER from which detectron2 makes no schedule."""
    import torch
    from detectron2.solver import build_lr_scheduler

    with telling(
        f"makes no schedule from SOLVER, {describe_schedule(cfg)}",
        "set MAX_ITER to 1 or more and STEPS to rising numbers up to it",
    ):
        build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], lr=cfg.SOLVER.BASE_LR))


def check_data_sets(cfg, test_only: bool = False) -> None:
    """SettingsError where a data set is not there, holds no instances, or has other classes than the model."""
    for name in (*(() if test_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        judge(name, *read_data_set(name), cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON)


def read_data_set(name: str) -> tuple[int, bool, bool]:
    """(classes, whether there are instances, whether they have masks): what detectron2 knows, and what files of COCO's hold."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if name not in DatasetCatalog.list():
        raise SettingsError(
            f'detectron2 knows no data set "{name}"; register it, or set DATASETS.TRAIN and DATASETS.TEST'
        )
    known = MetadataCatalog.get(name)
    if known.get("evaluator_type") == "pascal_voc":
        root = Path(known.dirname)
        require_files(name, root, [f"ImageSets/Main/{known.split}.txt"])
        lines = (root / f"ImageSets/Main/{known.split}.txt").read_text().splitlines()
        pictures = [line.split()[0] for line in lines if line.strip()]
        require_files(name, root, [f"Annotations/{each}.xml" for each in pictures])
        require_files(name, root, [f"JPEGImages/{each}.jpg" for each in pictures])
        return len(known.thing_classes), bool(pictures), False
    if known.get("evaluator_type") != "coco":
        raise SettingsError(
            f"{name} is tested in neither COCO's nor VOC's way. Found: evaluator_type \"{known.get('evaluator_type')}\"; set it in "
            'MetadataCatalog to "coco" or "pascal_voc"'
        )
    file = Path(known.json_file)
    require_files(name, file.parent, [file.name])
    held = read_annotations(file)
    require_files(name, Path(known.image_root), [image["file_name"] for image in held["images"]])
    return describe_annotations(held)


def read_annotations(file: Path) -> dict:
    """SettingsError for what is no file of annotations in COCO's format."""
    try:
        held = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} can't be read as json ({error}); bring it anew") from None
    images = held.get("images") if isinstance(held, dict) else None
    if not isinstance(images, list) or not all(isinstance(each, dict) and "file_name" in each for each in images):
        raise SettingsError(
            f"{file} has no list of images with a file_name each; take the annotations named instances_*.json"
        )
    return held


def require_files(name: str, root: Path, files: Iterable[str]) -> None:
    """SettingsError, with their number and the first of them, where `files` are missing in `root`. Lists each folder once."""
    files, there = list(files), set()
    for folder in {file.rpartition("/")[0] for file in files}:
        if (root / folder).is_dir():
            there |= {f"{folder}/{entry}" if folder else entry for entry in os.listdir(root / folder)}
    missing = [file for file in files if file not in there]
    if missing:
        raise SettingsError(
            f"{len(missing)} of the {len(files)} files of {name} are missing. Found: no {root / missing[0]}; {WHERE}"
        )


def describe_annotations(held: dict) -> tuple[int, bool, bool]:
    """Of a file of annotations in COCO's format what `read_data_set` returns."""
    instances = [each for each in held.get("annotations", ()) if "bbox" in each]
    return len(held.get("categories", ())), bool(instances), any(each.get("segmentation") for each in instances)


def judge(name: str, classes: int, instances: bool, masks: bool, num_classes: int, mask_on: bool) -> None:
    """SettingsError where a model of `num_classes`, with or without masks, doesn't fit a data set."""
    if not instances:
        raise SettingsError(f"{name} holds no instances, only images; take the annotations named instances_*.json")
    if classes != num_classes:
        start = {80: "coco_", 20: "voc_"}.get(classes)
        ours = next((f", or --config-file {c}" for c in choices() if start and c.startswith(start)), "")
        raise SettingsError(
            f"{name} has {classes} classes and the config {num_classes}; set MODEL.ROI_HEADS.NUM_CLASSES {classes}{ours}"
        )
    if mask_on and not masks:
        raise SettingsError(f"{name} has boxes only, and the config wants masks; set MODEL.MASK_ON False")
