"""What is refused before a fine-tuning starts: detectron2 would give a traceback, or, worse, go on to another number."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

CONFIGS = Path(__file__).with_name("configs")
OF_THE_BACKBONE = {
    "MODEL.RESNETS.STRIDE_IN_1X1": False, "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}  # fmt: skip
"""How a backbone of ours was trained: with other values its tensors load as well, and the network computes something else."""
FREE = ("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_", "SOLVER.MAX_ITER", "SOLVER.STEPS", "DATASETS.TEST", "TEST.")
"""How settings begin that may change on --resume: how long, where, and how it is tested."""
BACKBONE = re.compile(r"(^|\.)(stem\.conv1|res[2-5]\.\d+)\.")
"""Names of a ResNet's tensors inside a model, wherever it keeps them: the C4 models have res5 in their head."""


class SettingsError(ValueError):
    """Settings, weights or data that do not fit together; the message says what was found and what to set."""


@contextlib.contextmanager
def telling(what: str, remedy: str) -> Iterator[None]:
    """A SettingsError that says what detectron2 `what` ("can't read r50.pkl") for whatever it raises: of YAML, yacs, torch."""
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SettingsError(f"detectron2 {what} ({type(error).__name__}: {reason}); {remedy}") from error


def flat(tree: dict, prefix: str = "") -> dict:
    """{"SOLVER.BASE_LR": 0.02, ...} of settings in groups, with lists for tuples, as YAML has them."""
    found = {}
    for key, value in json.loads(json.dumps(tree)).items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def require(cfg, expected: dict, reason: str) -> None:
    """SettingsError, beginning with `reason`, that names every setting of `cfg` with another value than `expected`."""
    found = flat(cfg)
    wrong = [f"{key} {found.get(key)} instead of {value}" for key, value in expected.items() if found.get(key) != value]
    if wrong:
        raise SettingsError(f"{reason}. Found: {', '.join(wrong)}")


def read_config(file: str, options: list[str], num_gpus: int):
    """detectron2's settings: its defaults, `file`, `options` (key, value, ...), and the schedule for so many GPUs (all machines')
    by its own rule, applied here so that config.yaml says it. SettingsError for what it makes no settings or no schedule of."""
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultTrainer
    from detectron2.solver import build_lr_scheduler

    ours = ", ".join(sorted(path.name for path in CONFIGS.glob("*_*.yaml")))
    remedy = f"put flags before KEY VALUE pairs, mend these, and set --config-file to one of {CONFIGS}: {ours}"
    cfg = get_cfg()
    with telling(f'can\'t take the config "{file}" with {" ".join(options) or "no pairs"}', remedy):
        cfg.merge_from_file(file)
        cfg.merge_from_list(options)
        if not cfg.DATASETS.TRAIN:
            raise ValueError("it names no data set to train on")
        require(cfg, OF_THE_BACKBONE, "a backbone of ours computes something else with other values; leave them out")
        sharing = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_gpus
        if num_gpus < 1 or cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % sharing:
            raise SettingsError(
                f"SOLVER.IMS_PER_BATCH counts the images of all {sharing} GPUs that the schedule is for, and must be a multiple "
                f"of {sharing}. Found: {cfg.SOLVER.IMS_PER_BATCH} and --num-gpus {num_gpus}; leave it out for 2 on each GPU"
            )
        cfg = DefaultTrainer.auto_scale_workers(cfg, num_gpus)
        build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], lr=cfg.SOLVER.BASE_LR))
    return cfg


def check_output(cfg, resume: bool, eval_only: bool) -> Path | None:
    """The checkpoint in OUTPUT_DIR to go on from, if `resume`; MODEL.WEIGHTS is set to what the fine-tuning there began with.
    SettingsError where it is another than this one, which would be replaced or tested in its place."""
    folder = Path(cfg.OUTPUT_DIR)
    if not any(folder.glob("model_*.pth")):
        return None
    before = flat(yaml.safe_load((folder / "config.yaml").read_text()))
    whose = f"{folder} holds a fine-tuning of {before['MODEL.WEIGHTS']}"
    if resume:
        cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS or before["MODEL.WEIGHTS"]
        kept = {key: value for key, value in before.items() if not key.startswith(FREE)}
        if not eval_only:
            require(cfg, kept, f"{whose}; set all else (and --num-gpus) as it was, or OUTPUT_DIR to another folder")
        return folder / (folder / "last_checkpoint").read_text().strip()
    if not eval_only or folder.resolve() not in Path(cfg.MODEL.WEIGHTS).resolve().parents:
        raise SettingsError(
            f"{whose}. Found: MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}; leave it out and add --resume to go on there, test a model of "
            "that folder with --eval-only, or set OUTPUT_DIR to another folder"
        )
    return None


def check_data_set(cfg, name: str) -> None:
    """SettingsError where a data set is not there, or has other classes than the model, or no masks for it. COCO's takes 20 s."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    with telling(f"can't read the data set {name}", "set DETECTRON2_DATASETS to the folder of coco/ or VOC2007/"):
        images = DatasetCatalog.get(name)
        folders = {os.path.dirname(image["file_name"]) for image in images}
        there = {os.path.join(folder, entry) for folder in folders for entry in os.listdir(folder)}
        if missing := [image["file_name"] for image in images if image["file_name"] not in there]:
            raise ValueError(f"{len(missing)} of {len(images)} images are missing, {missing[0]} say")
    boxes = [box for image in images for box in image.get("annotations", ()) if "bbox" in box]
    if not boxes:
        raise SettingsError(f"{name} has no boxes. Found: {len(images)} images; take the file named instances_*.json")
    fits = {"MODEL.ROI_HEADS.NUM_CLASSES": len(MetadataCatalog.get(name).get("thing_classes", ()))}
    if not any(box.get("segmentation") for box in boxes):
        fits["MODEL.MASK_ON"] = False
    require(cfg, fits, f"the model must fit {name}; set what differs, or --config-file to one for this data set")


def check_weights(cfg, file: str, whole: bool) -> str:
    """Build the model and load `file` into it as detectron2 does, which is silent about what doesn't match; say what it has.
    SettingsError where a tensor of the backbone (`whole`: of the model) isn't reached or finite, or the file has more blocks."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    surplus = []

    class Quiet(DetectionCheckpointer):
        def _log_incompatible_keys(self, incompatible):  # the checkpointer that loads the file for training does that
            surplus.extend(filter(BACKBONE.search, incompatible.unexpected_keys))

    what, remedy = "backbone", "set MODEL.WEIGHTS to what scripts/export.py --format detectron2 wrote of a resnet50"
    if whole:
        what, remedy = "model", "set MODEL.WEIGHTS to the model_final.pth of a fine-tuning with this config"
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    with telling(f'can\'t load "{file}" into the model', f"leave out what you changed of MODEL, and {remedy}"):
        model = build_model(cfg)
        tensors = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        for value in tensors.values():
            value.fill_(torch.nan)
        Quiet(model, save_to_disk=False).load(file, checkpointables=[])
    wanted = [name for name in tensors if whole or BACKBONE.search(name)]
    if wrong := [name for name in wanted if not tensors[name].isfinite().all()] + surplus:
        needed = f"MODEL.WEIGHTS must have finite values for the {len(wanted)} tensors of the {what}, and no others"
        found = f'"{file}", which fails for {len(wrong)}, {wrong[0]} say'
        raise SettingsError(f"{needed}, or training would begin from noise. Found: {found}; {remedy}")
    return f"{file} has all {len(wanted)} tensors of the {what}."
