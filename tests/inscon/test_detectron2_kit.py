"""The detectron2 and mmdet kit: each flag of the paper's fine-tuning, the sentences of wrong use, and the real library.

The first half reads the settings as data and needs no detectron2; the second builds, loads, trains and tests with it.
"""

import copy
import functools
import json
import pickle
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image, ImageDraw

from inscon import checkpoint
from inscon.nn.backbones import build_backbone
from inscon.transfer.backbone import load_backbone
from inscon.transfer.detectron2 import identity, settings, train_net, weights
from inscon.transfer.export import export
from tests.inscon.test_export import make_run

ROOT = Path(__file__).resolve().parents[2]
TRANSFER = ROOT / "inscon/transfer"
CONFIGS = TRANSFER / "detectron2/configs"

EVERY = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 200,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.REFERENCE_WORLD_SIZE": 8,
    "INPUT.MIN_SIZE_TEST": 800,
}
C4 = {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm"}
FPN = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
}
VOC = {
    "MODEL.MASK_ON": False,
    "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    "INPUT.MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    "DATASETS.TRAIN": ["voc_2007_trainval", "voc_2012_trainval"],
    "DATASETS.TEST": ["voc_2007_test"],
    "SOLVER.MAX_ITER": 24000,
    "SOLVER.STEPS": [18000, 22000],
    "SOLVER.WARMUP_ITERS": 100,
}
COCO = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_HEADS.NUM_CLASSES": 80,
    "INPUT.MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800],
    "DATASETS.TRAIN": ["coco_2017_train"],
    "DATASETS.TEST": ["coco_2017_val"],
    "SOLVER.WARMUP_ITERS": 1000,
}
ONCE = {"SOLVER.MAX_ITER": 90000, "SOLVER.STEPS": [60000, 80000]}
TWICE = {"SOLVER.MAX_ITER": 180000, "SOLVER.STEPS": [120000, 160000]}
TABLE = {
    "voc_faster_rcnn_c4_24k": EVERY | C4 | VOC,
    "coco_mask_rcnn_c4_1x": EVERY | C4 | COCO | ONCE,
    "coco_mask_rcnn_c4_2x": EVERY | C4 | COCO | TWICE,
    "coco_mask_rcnn_fpn_1x": EVERY | FPN | COCO | ONCE,
    "coco_mask_rcnn_fpn_2x": EVERY | FPN | COCO | TWICE,
}


def flat(tree, prefix=""):
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def read_yaml(name):
    """A file and what it builds on, flat: later files win, the file itself last."""
    held = yaml.safe_load((CONFIGS / name).read_text())
    bases, found = held.pop("_BASE_", []), {}
    for base in [bases] if isinstance(bases, str) else bases:
        found |= read_yaml(base)
    return found | flat(held)


@pytest.mark.parametrize("name", TABLE)
def test_every_flag_is_in_the_yaml(name):
    found = read_yaml(f"{name}.yaml")
    assert {flag: found[flag] for flag in TABLE[name]} == TABLE[name]
    assert found["OUTPUT_DIR"] == f"output/{name}" and found["VERSION"] == 2
    assert "MODEL.WEIGHTS" not in found  # it has no default: a forgotten one is refused


def test_the_choices_are_the_tables():
    assert settings.choices() == sorted(f"{name}.yaml" for name in TABLE)


@pytest.mark.parametrize(("name", "epochs", "milestones"), [("1x", 12, [8, 11]), ("2x", 24, [16, 22])])
def test_every_flag_is_in_the_mmdet_config(name, epochs, milestones):
    path = TRANSFER / f"mmdet/mask_rcnn_r50_fpn_{name}.py"
    config = runpy.run_path(str(path))
    schedule = config
    if name == "2x":
        assert config["_base_"] == "./mask_rcnn_r50_fpn_1x.py" and "model" not in config
        config = runpy.run_path(str(path.with_name("mask_rcnn_r50_fpn_1x.py")))
    assert config["_base_"] == "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
    model, sync = config["model"], {"type": "SyncBN", "requires_grad": True}
    assert model["data_preprocessor"] == {
        "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True,
    }  # fmt: skip
    assert model["backbone"] == {
        "style": "pytorch", "frozen_stages": -1, "norm_eval": False, "norm_cfg": sync,
        "init_cfg": {"type": "Pretrained", "checkpoint": "r50.pth"},
    }  # fmt: skip
    assert model["neck"]["norm_cfg"] == sync
    head = model["roi_head"]["bbox_head"]
    assert (head["type"], head["norm_cfg"]) == ("Shared4Conv1FCBBoxHead", sync)
    assert model["roi_head"]["mask_head"]["norm_cfg"] == sync
    resize = next(step for step in config["train_pipeline"] if step["type"] == "RandomChoiceResize")
    assert resize["scales"] == [(1333, side) for side in range(640, 801, 32)] and resize["keep_ratio"]
    assert config["train_dataloader"]["dataset"]["pipeline"] is config["train_pipeline"]
    assert config["optim_wrapper"]["optimizer"]["lr"] == 0.02 and config["train_dataloader"]["batch_size"] == 2
    assert config["auto_scale_lr"] == {"enable": True, "base_batch_size": 16}
    warm_up, steps = schedule["param_scheduler"]
    assert (warm_up["by_epoch"], warm_up["end"]) == (False, 1000)
    assert (steps["end"], steps["milestones"], schedule["train_cfg"]["max_epochs"]) == (epochs, milestones, epochs)


BACKBONE = ("backbone.stem.conv1.weight", "backbone.res2.0.conv1.norm.running_var", "roi_heads.res5.2.conv3.weight")
NAMES = (*BACKBONE, "roi_heads.res5.norm.weight", "backbone.fpn_lateral2.weight")


def judge(held, missing, **facts):
    return weights.judge("r50.pth", held, NAMES, set(missing), **facts)


def test_a_match_counts_the_backbone_apart():
    assert judge(["x"], [BACKBONE[1], NAMES[4]]) == (  # statistics alone: weights of before BatchNorm was trained
        "r50.pth: 2 of the backbone's 3 tensors match, and 1 of the other 2; what is left begins at random."
    )
    assert judge(["x"], [], whole=True) == "r50.pth: 3 of the backbone's 3 tensors match, and 2 of the other 2."


NONE = r"r50.pth has none of the backbone's 3 tensors, and detectron2 would train from noise. Found: "
WRITE = r"write it with scripts/export.py --run RUN_DIR --format detectron2 --out r50.pkl$"


@pytest.mark.parametrize(
    ("held", "facts", "sentence"),
    [
        (["conv1.weight", "layer1.0.conv1.weight"], {}, r"torchvision's names, conv1.weight say; " + WRITE),
        (["conv1.weight"], {"written_for": "torchvision"},
         r"an export for torchvision, conv1.weight say; export the same run with scripts/export.py --format detectron2 "),
        (["conv1.weight"], {"written_for": "mmdet"}, r"an export for mmdet, .* scripts/export.py --format detectron2 "),
        (["backbone.network.conv1.weight"], {"written_for": "run"}, r"a checkpoint of the pre-training, .*; " + WRITE),
        (["backbone.bottom_up.stem.conv1.weight"], {}, r"a detector with FPN, .*; set --config-file to one with fpn in its name,"),
        (["backbone.res2.0.conv1.weight"], {}, r"a detector with C4, .*; set --config-file to one with c4 in its name, or MODEL"),
        (["backbone.body.conv1.weight"], {}, r"a detector of scripts/finetune_detection.py, .*; test it with scripts/finetune"),
        (["fc.bias"], {}, r"other names, fc.bias say; " + WRITE),
        ([], {}, r"other names, no tensor say; " + WRITE),
    ],
)  # fmt: skip
def test_weights_that_match_nothing_are_refused(held, facts, sentence):
    with pytest.raises(settings.SettingsError, match=NONE + sentence):
        judge(held, NAMES, **facts)


def test_weights_that_match_in_part_are_refused():
    for facts, words in (
        ({}, r"has 2 of the backbone's 3 tensors, .* without roi_heads.res5.2.conv3.weight; "),
        ({"written_for": "detectron2"}, r"an export for detectron2 without .*; take one of a resnet50"),
        ({"whole": True}, r"a test needs a whole model. Found: r50.pth, without 2 of its 5 tensors, roi"),
    ):
        with pytest.raises(ValueError, match=words):
            judge(["x"], [NAMES[2], NAMES[3]], **facts)
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is empty, .* add MODEL.WEIGHTS r50.pkl to the command"):
        weights.check_weights("", None)


def test_data_sets_that_do_not_fit_are_refused():
    settings.judge("a_set", 80, True, True, 80, True)
    settings.judge("a_set", 20, True, False, 20, False)
    for given, words in (
        ((20, True, False, 80, True), r"a_set has 20 classes and the config 80; .* or --config-file voc_f"),
        (
            (80, True, True, 20, False),
            r"a_set has 80 classes and the config 20; .*NUM_CLASSES 80, or --config-file coco_",
        ),
        ((3, True, True, 80, False), r"a_set has 3 classes and the config 80; set MODEL.ROI_HEADS.NUM_CLASSES 3$"),
        ((80, False, True, 80, True), r"a_set holds no instances, only images; take the annotations named instances_"),
        ((80, True, False, 80, True), r"a_set has boxes only, and the config wants masks; set MODEL.MASK_ON False"),
    ):
        with pytest.raises(settings.SettingsError, match=words):
            settings.judge("a_set", *given)


def test_a_file_of_annotations_is_described():
    box = {"bbox": [0, 0, 2, 2], "category_id": 1}
    held = {"categories": [{"id": 1}, {"id": 2}], "annotations": [box]}
    assert settings.describe_annotations(held) == (2, True, False)
    held["annotations"] = [box | {"segmentation": [[0, 0, 2, 0, 2, 2]]}]
    assert settings.describe_annotations(held) == (2, True, True)
    for nothing in ({}, {"annotations": []}, {"annotations": [{"caption": "a cat"}]}):
        assert settings.describe_annotations(nothing) == (0, False, False)


def test_wrong_settings_are_refused_before_detectron2_is_needed():
    with pytest.raises(
        ValueError, match=r'there is no config "1x.yaml"; set --config-file to one of .*coco_mask_rcnn_c4_1'
    ):
        settings.read_config("1x.yaml", [], 8)
    with pytest.raises(ValueError, match=r"a schedule is for 1 GPU or more. Found: 0; set --num-gpus 8"):
        settings.adapt_schedule(None, 0)


def test_a_part_of_a_config_and_late_flags_are_refused():
    for part in ("base.yaml", "fpn.yaml", "c4.yaml", "coco.yaml"):
        with pytest.raises(
            ValueError, match=rf"{part} is a part of other configs; set --config-file to one of .*coco_mask"
        ):
            settings.read_config(str(CONFIGS / part), [], 8)
    with pytest.raises(ValueError, match="in front of KEY VALUE pairs only; put --config-file before MODEL.WEIGHTS"):
        settings.read_config("", ["MODEL.WEIGHTS", "r50.pkl", "--config-file", "x.yaml"], 8)


class Settings(dict):
    """Stands in for detectron2's: groups, attributes, and the type of a value is kept."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def merge_from_list(self, pair):
        *groups, key = pair[0].split(".")
        inner = self
        for group in groups:
            inner = inner[group]
        value = yaml.safe_load(pair[1])
        if type(value) is not type(inner[key]):
            raise ValueError(f"Type mismatch ({type(inner[key])} vs. {type(value)})")
        inner[key] = value


def made_up_settings(**changes):
    made = Settings(
        MODEL=Settings(
            WEIGHTS="r50.pkl", DEVICE="cuda", PIXEL_MEAN=[123.675, 116.28, 103.53], PIXEL_STD=[58.395, 57.12, 57.375],
            RESNETS=Settings(STRIDE_IN_1X1=False),
        ),
        SOLVER=Settings(BASE_LR=0.02, MAX_ITER=90000, STEPS=[60000, 80000], IMS_PER_BATCH=16, GAMMA=0.1, WARMUP_ITERS=10),
        INPUT=Settings(FORMAT="RGB"), OUTPUT_DIR="output",
    )  # fmt: skip
    for key, value in changes.items():
        *groups, last = key.split("__")
        functools.reduce(dict.__getitem__, groups, made)[last] = value
    return made


@pytest.mark.parametrize(("options", "sentence"), [
    (["SOLVER.IMS_PER_BACH", "2"], "no setting SOLVER.IMS_PER_BACH; the one most like it is SOLVER.IMS_PER_BATCH"),
    (["SOLVR.BASE_LR", "0.1"], "no setting SOLVR.BASE_LR; the one most like it is SOLVER.BASE_LR"),
    (["SOLVER", "0.1"], "no setting SOLVER; the one most like it is SOLVER."),
    (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER must be of type int. Found: many; write it like 90000"),
    (["SOLVER.BASE_LR", "1"], "SOLVER.BASE_LR must be of type float. Found: 1; write it like 0.02"),
    (["SOLVER.STEPS", "3"], "SOLVER.STEPS must be of type list. Found: 3; write it like [60000"),
    (["MODEL.WEIGHTS"], "no value for MODEL.WEIGHTS; add it"),
])  # fmt: skip
def test_options_that_detectron2_would_trip_over_are_named(options, sentence):
    with pytest.raises(settings.SettingsError) as refused:
        settings.merge_options(made_up_settings(), options)
    assert sentence in str(refused.value)


def test_options_are_set():
    cfg = made_up_settings()
    settings.merge_options(cfg, ["SOLVER.MAX_ITER", "3", "MODEL.WEIGHTS", "r7.pkl"])
    assert (cfg.SOLVER.MAX_ITER, cfg.MODEL.WEIGHTS) == (3, "r7.pkl")


@pytest.mark.parametrize(("images", "reference", "gpus", "found"), [
    (2, 8, 1, "all 8 GPUs .* Found: 2; for 2 on each GPU set SOLVER.IMS_PER_BATCH 16$"),
    (4, 8, 2, "Found: 4; for 2 on each GPU set SOLVER.IMS_PER_BATCH 16$"),
    (3, 0, 2, "all 2 GPUs .* Found: 3; for 2 on each GPU set SOLVER.IMS_PER_BATCH 4$"),
    (0, 0, 1, "Found: 0; for 1 on each GPU set SOLVER.IMS_PER_BATCH 1$"),
])  # fmt: skip
def test_images_of_a_step_that_gpus_cannot_share_are_refused(images, reference, gpus, found):
    with pytest.raises(settings.SettingsError, match=found) as refused:
        settings.check_batch(images, reference, gpus)
    settings.check_batch(int(str(refused.value).split()[-1]), reference, gpus)  # the remedy
    settings.check_batch(16, 8, 1)


def test_settings_under_which_a_backbone_computes_something_else_are_refused():
    settings.check_backbone(made_up_settings())
    with pytest.raises(
        ValueError, match=r"STRIDE_IN_1X1 must be False for a backbone of ours; .* Found: True; leave it out"
    ):
        settings.check_backbone(made_up_settings(MODEL__RESNETS__STRIDE_IN_1X1=True))
    with pytest.raises(ValueError, match=r"INPUT.FORMAT must be RGB .* Found: BGR; leave it out"):
        settings.check_backbone(made_up_settings(INPUT__FORMAT="BGR"))
    assert {key: read_yaml("base.yaml")[key] for key in settings.OF_THE_BACKBONE} == settings.OF_THE_BACKBONE


def test_a_schedule_without_steps_is_told():
    assert settings.describe_schedule(made_up_settings(SOLVER__STEPS=[])) == (
        "16 images a step, learning rate 0.02 after 10 steps, never lowered, 90000 steps"
    )


def test_several_processes_on_a_cpu_are_refused():
    args = types.SimpleNamespace(num_gpus=2)
    with pytest.raises(ValueError, match="MODEL.DEVICE cpu is for one process. Found: --num-gpus 2; set --num-gpus 1"):
        train_net.check_devices(made_up_settings(MODEL__DEVICE="cpu"), args)


def test_missing_files_are_counted_at_the_start(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    for name in ("1.jpg", "train/a/2.jpg"):
        (tmp_path / name).write_bytes(b"")
    settings.require_files("a_set", tmp_path, ["1.jpg", "train/a/2.jpg"])
    with pytest.raises(
        ValueError, match=rf"2 of the 3 files of a_set are missing. Found: no {tmp_path}/train/a/3.jpg; set"
    ):
        settings.require_files("a_set", tmp_path, ["1.jpg", "train/a/3.jpg", "gone/4.jpg"])


@pytest.mark.parametrize(("text", "found"), [
    ('{"images": [', "can't be read as json"), ("[]", "no list of images"), ('{"images": [{"id": 1}]}', "no list of images"),
    ('{"images": 3}', "no list of images"), ('{"annotations": []}', "no list of images"),
])  # fmt: skip
def test_a_file_that_is_no_annotations_is_named(tmp_path, text, found):
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(settings.SettingsError, match=f"instances.json .*{found}|{found}"):
        settings.read_annotations(tmp_path / "instances.json")


@pytest.fixture
def begun(tmp_path):
    """A fine-tuning of r7.pkl with a checkpoint: its settings."""
    (tmp_path / "r7.pkl").write_bytes(b"seven")
    cfg = made_up_settings(MODEL__WEIGHTS=str(tmp_path / "r7.pkl"), OUTPUT_DIR=str(tmp_path / "out"))
    identity.write_identity(cfg)
    assert identity.check_output(cfg, resume=False, eval_only=False) is None  # killed before its first checkpoint
    (tmp_path / "out/model_0000009.pth").write_bytes(b"trained")
    (tmp_path / "out/last_checkpoint").write_text("model_0000009.pth")
    return cfg


def with_weights(cfg, weights):
    cfg = copy.deepcopy(cfg)
    cfg["MODEL"]["WEIGHTS"] = str(weights)
    return cfg


def test_a_fine_tuning_is_laid_over_no_other(begun, tmp_path):
    (tmp_path / "r2.pkl").write_bytes(b"two")
    other = with_weights(begun, tmp_path / "r2.pkl")
    for cfg in (begun, other):
        with pytest.raises(
            ValueError, match=r"out holds a fine-tuning of .*r7.pkl; add --resume without MODEL.WEIGHTS .*OUTPUT"
        ):
            identity.check_output(cfg, resume=False, eval_only=False)
    (tmp_path / "out/last_checkpoint").unlink()
    with pytest.raises(ValueError, match="add --resume"):  # its model is there all the same
        identity.check_output(begun, resume=False, eval_only=False)
    with pytest.raises(ValueError, match="last_checkpoint must name what --resume goes on from"):
        identity.check_output(begun, resume=True, eval_only=False)


@pytest.mark.parametrize("eval_only", [False, True])
def test_resume_goes_on_with_the_same_weights_only(begun, tmp_path, eval_only):
    newest = tmp_path / "out/model_0000009.pth"
    (tmp_path / "r2.pkl").write_bytes(b"two")
    (tmp_path / "copy.pkl").write_bytes(b"seven")
    for weights_ in (tmp_path / "r7.pkl", tmp_path / "copy.pkl", "", newest):
        assert identity.check_output(with_weights(begun, weights_), resume=True, eval_only=eval_only) == newest
    for weights_ in (tmp_path / "r2.pkl", tmp_path / "nothing.pkl"):
        with pytest.raises(
            ValueError, match=rf"holds a fine-tuning of .*r7.pkl, .* Found: {weights_}; leave MODEL.WEIGHTS out"
        ):
            identity.check_output(with_weights(begun, weights_), resume=True, eval_only=eval_only)


def test_resume_goes_on_with_the_same_settings_only(begun):
    longer, steeper = copy.deepcopy(begun), copy.deepcopy(begun)
    longer["SOLVER"]["MAX_ITER"], steeper["SOLVER"]["BASE_LR"] = 180000, 0.1
    assert identity.check_output(longer, resume=True, eval_only=False)
    with pytest.raises(
        ValueError, match=r"other settings. Found: SOLVER.BASE_LR was 0.02 and is 0.1; set them .* as they were"
    ):
        identity.check_output(steeper, resume=True, eval_only=False)


def test_a_test_of_another_model_needs_another_folder(begun, tmp_path):
    own = with_weights(begun, tmp_path / "out/model_0000009.pth")
    assert identity.check_output(own, resume=False, eval_only=True) is None
    with pytest.raises(
        ValueError, match=r"MODEL.WEIGHTS is from elsewhere. Found: .*r7.pkl; set OUTPUT_DIR to another folder"
    ):
        identity.check_output(begun, resume=False, eval_only=True)


def test_without_detectron2_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(settings, "installed", lambda: False)
    with pytest.raises(
        settings.SettingsError, match=r"detectron2 is not installed; compile it .* or fine-tune with mmdet"
    ):
        train_net.main([])


def test_the_script_finds_the_real_detectron2_beside_the_folder_of_its_name():
    command = [sys.executable, TRANSFER / "detectron2/train_net.py", "--help"]
    done = subprocess.run(command, cwd=TRANSFER, capture_output=True, text=True)
    if settings.installed():
        assert done.returncode == 0 and "--config-file FILE" in done.stdout
    else:
        assert done.returncode == 1 and done.stderr.startswith("train_net.py: detectron2 is not installed; ")
        assert len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------- with detectron2 itself


@pytest.fixture(scope="module")
def detectron2():
    return pytest.importorskip("detectron2", reason="detectron2 is not installed; it is compiled from its source")


def config(name, *options):
    return settings.read_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu", *map(str, options)], 8)


def as_list(value):
    return [as_list(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """Of a resnet50 whose BatchNorms all do something, and differently."""
    return make_run(tmp_path_factory.mktemp("run"), "resnet50")


@pytest.fixture(scope="module")
def backbone(a_run):
    return load_backbone(a_run)[0]


@pytest.fixture(scope="module")
def exported(a_run):
    export(a_run, "detectron2", a_run / "r50.pkl")
    return a_run / "r50.pkl"


def name_there(name):
    """detectron2's name, piece by piece, of a tensor of torchvision's ResNet."""
    first, *rest = name.split(".")
    if first in ("conv1", "bn1"):
        return ".".join(["stem", "conv1", *(["norm"] if first == "bn1" else []), *rest])
    block, layer, *rest = rest
    if layer == "downsample":
        place, *rest = rest
        layers = {"0": ["shortcut"], "1": ["shortcut", "norm"]}[place]
    else:
        layers = {f"conv{n}": [f"conv{n}"] for n in "123"} | {f"bn{n}": [f"conv{n}", "norm"] for n in "123"}
        layers = layers[layer]
    return ".".join(
        [{"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}[first], block, *layers, *rest]
    )


def name_in_model(name, kind):
    there = name_there(name)
    return (
        "backbone.bottom_up." if kind == "fpn" else "roi_heads." if there.startswith("res5") else "backbone."
    ) + there


@pytest.mark.parametrize("name", TABLE)
def test_every_flag_is_effective(detectron2, name):
    cfg = config(name)
    for flag, value in TABLE[name].items():
        found = cfg
        for part in flag.split("."):
            found = found[part]
        assert as_list(found) == value, flag


@pytest.mark.parametrize("name", TABLE)
def test_a_model_of_each_config_runs(detectron2, name):
    from detectron2.layers import FrozenBatchNorm2d
    from detectron2.modeling import build_model

    model = build_model(config(name)).eval()
    kinds = {type(layer) for layer in model.modules() if "BatchNorm" in type(layer).__name__}
    assert kinds == {torch.nn.SyncBatchNorm} and FrozenBatchNorm2d not in kinds
    assert all(p.requires_grad for p in model.parameters())
    resnet = model.backbone.bottom_up if "fpn" in name else model.backbone
    assert (resnet.res3[0].conv1.stride, resnet.res3[0].conv2.stride) == ((1, 1), (2, 2))
    heads = model.roi_heads
    if "c4" in name:
        assert type(heads).__name__ == "Res5ROIHeadsExtraNorm" and (heads.res5[0].conv1.stride, len(heads.res5)) == (
            (1, 1),
            4,
        )
        assert isinstance(heads.res5.norm, torch.nn.SyncBatchNorm) and heads.res5.norm.num_features == 2048
        regions = torch.rand(2, 1024, 14, 14)
        plain = torch.nn.Sequential(*list(heads.res5)[:3])
        torch.testing.assert_close(heads.res5(regions), heads.res5.norm(plain(regions)))
    else:
        layers = [type(layer).__name__ for layer in heads.box_head]
        assert (layers.count("Conv2d"), layers.count("Linear")) == (4, 1)
        normed = [*heads.box_head.conv_norm_relus, *heads.mask_head.conv_norm_relus, model.backbone.fpn_lateral2]
        assert len(normed) == 9 and all(isinstance(layer.norm, torch.nn.SyncBatchNorm) for layer in normed)
    assert heads.num_classes == (20 if "voc" in name else 80) and heads.mask_on == ("coco" in name)
    pixels = torch.randint(256, (3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (found,) = model([{"image": pixels, "height": 96, "width": 128}])
    assert found["instances"].image_size == (96, 128)


@pytest.mark.parametrize("name", ["voc_faster_rcnn_c4_24k", "coco_mask_rcnn_c4_1x", "coco_mask_rcnn_fpn_1x"])
def test_a_backbone_arrives_whole_and_computes_the_same(detectron2, backbone, exported, name):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    reported = []

    class Listening(DetectionCheckpointer):
        def _log_incompatible_keys(self, incompatible):
            reported.append(incompatible)

    torch.manual_seed(1)
    model, kind = build_model(config(name)).eval(), "fpn" if "fpn" in name else "c4"
    Listening(model).load(str(exported))
    (report,) = reported
    expected = {name_in_model(n, kind): value for n, value in backbone.network.state_dict().items()}
    assert len(expected) == 318 and not report.incorrect_shapes and not report.unexpected_keys
    counts = {n for n in model.state_dict() if n.endswith("num_batches_tracked")}  # PyTorch fills those in unasked
    assert set(report.missing_keys) - counts == set(model.state_dict()) - set(expected) - counts
    state = model.state_dict()
    assert all(torch.equal(state[n], value) for n, value in expected.items())

    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        ours = dict(zip(("res2", "res3", "res4", "res5"), backbone(((image / 255 - mean) / std)[None]).values()))
        pixels = model.preprocess_image([{"image": image}]).tensor
        theirs = model.backbone.bottom_up(pixels) if kind == "fpn" else model.backbone(pixels)
        if kind == "c4":
            theirs["res5"] = torch.nn.Sequential(*list(model.roi_heads.res5)[:3])(theirs["res4"])
    for stage in ("res2", "res3", "res4", "res5") if kind == "fpn" else ("res4", "res5"):
        assert float((theirs[stage] - ours[stage]).abs().max() / ours[stage].abs().max()) < 1e-5, stage


@pytest.fixture(scope="module")
def model(detectron2):
    from detectron2.modeling import build_model

    return build_model(config("voc_faster_rcnn_c4_24k"))


def test_what_matched_is_reported(model, exported):
    found = weights.check_weights(str(exported), model)
    assert "318 of the backbone's 318 tensors match, and 0 of the other" in found
    with pytest.raises(ValueError, match=r"a test needs a whole model. Found: .*r50.pkl, without \d+ of its"):
        weights.check_weights(str(exported), model, whole=True)


def test_files_for_others_are_refused(model, a_run, tmp_path):
    for form in ("torchvision", "mmdet"):
        file = tmp_path / f"{form}.pth"
        export(a_run, form, file)
        with pytest.raises(
            ValueError, match=rf"none of the backbone's 318 .* an export for {form}, .* --format detectron2 "
        ):
            weights.check_weights(str(file), model)
        with pytest.raises(ValueError, match=r"can't read|has \d+ of the backbone's 318 tensors"):
            weights.check_weights(f"{file}?matching_heuristics=True", model)
    plain = tmp_path / "resnet50.pth"
    torch.save(torchvision.models.resnet50().state_dict(), plain)
    with pytest.raises(ValueError, match=r"none of the backbone's 318 .* Found: torchvision's names, conv1.weight say"):
        weights.check_weights(str(plain), model)
    with pytest.raises(ValueError, match="Found: a checkpoint of the pre-training"):
        weights.check_weights(str(checkpoint.latest(a_run)), model)
    other = tmp_path / "r18.pkl"
    small = {name_there(n): v.numpy() for n, v in build_backbone("resnet18").network.state_dict().items()}
    other.write_bytes(pickle.dumps({"model": small, "__author__": "someone", "matching_heuristics": True}))
    with pytest.raises(ValueError, match=r"has \d+ of the backbone's 318 tensors, and the others would begin as noise"):
        weights.check_weights(str(other), model)
    for name in ("missing.pkl", "broken.pkl", "broken.safetensors"):
        if name.startswith("broken"):
            (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(
            ValueError, match=rf"detectron2 can't read .*{name} \(.*\); write it with scripts/export.py"
        ):
            weights.check_weights(str(tmp_path / name), model)


def test_the_schedule_follows_the_gpus(detectron2):
    cfg = config("coco_mask_rcnn_fpn_2x")
    s = settings.adapt_schedule(cfg, 2).SOLVER
    assert (s.IMS_PER_BATCH, s.BASE_LR, s.MAX_ITER, s.STEPS, s.WARMUP_ITERS) == (
        4,
        0.005,
        720000,
        (480000, 640000),
        4000,
    )
    assert settings.adapt_schedule(cfg, 8).SOLVER == cfg.SOLVER
    assert settings.describe_schedule(settings.adapt_schedule(cfg, 1)) == (
        "2 images a step, learning rate 0.0025 after 8000 steps, times 0.1 at 960000 and 1280000, 1440000 steps"
    )


def test_data_sets_are_read(detectron2, tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances, register_pascal_voc

    with pytest.raises(ValueError, match=r'detectron2 knows no data set "coco_17"; register it, or set DATASETS.TRAIN'):
        settings.read_data_set("coco_17")
    register_pascal_voc("gone_voc", str(tmp_path), "trainval", 2007)
    MetadataCatalog.get("gone_voc").evaluator_type = "pascal_voc"
    register_coco_instances("gone_coco", {}, str(tmp_path / "instances.json"), str(tmp_path))
    sets = {"voc": ("DATASETS.TRAIN", ("gone_voc",)), "coco": ("DATASETS.TEST", ("gone_coco",))}
    try:
        with pytest.raises(
            ValueError,
            match=r"1 of the 1 files of gone_voc are missing. Found: no .*trainval.txt; set the environment's",
        ):
            settings.check_data_sets(config("voc_faster_rcnn_c4_24k", *sets["voc"]))
        with pytest.raises(
            ValueError, match=r"1 of the 1 files of gone_coco are missing. Found: no .*instances.json; set the env"
        ):
            settings.check_data_sets(config("coco_mask_rcnn_fpn_1x", *sets["coco"]), test_only=True)
        (tmp_path / "instances.json").write_text('{"images": [{"id": 1, "file_name": "1.jpg"}]}')
        with pytest.raises(
            ValueError, match=r"1 of the 1 files of gone_coco are missing. Found: no .*1.jpg; set the env"
        ):
            settings.check_data_sets(config("coco_mask_rcnn_fpn_1x", *sets["coco"]), test_only=True)
        (tmp_path / "ImageSets/Main").mkdir(parents=True)
        (tmp_path / "ImageSets/Main/trainval.txt").write_text("000001\n")
        with pytest.raises(
            ValueError, match=r"1 of the 1 files of gone_voc are missing. Found: no .*Annotations/000001.xml"
        ):
            settings.check_data_sets(config("voc_faster_rcnn_c4_24k", *sets["voc"]))
    finally:
        for name in ("gone_voc", "gone_coco"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_settings_that_detectron2_refuses_are_sentences(detectron2, tmp_path):
    with pytest.raises(ValueError, match="Found: 2; for 2 on each GPU set SOLVER.IMS_PER_BATCH 16"):
        settings.read_config(str(CONFIGS / "coco_mask_rcnn_fpn_1x.yaml"), ["SOLVER.IMS_PER_BATCH", "2"], 1)
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER must be of type int. Found: many; write it like 90000"):
        config("coco_mask_rcnn_fpn_1x", "SOLVER.MAX_ITER", "many")
    with pytest.raises(ValueError, match="no setting MODEL.MASK; the one most like it is MODEL.MASK_ON"):
        config("coco_mask_rcnn_fpn_1x", "MODEL.MASK", "True")
    for text, said in (
        ("VERSION: 2\nSOLVER:\n  BASE_LR: 0.1\n", "mine.yaml names no data set to train on"),
        ("SOLVER:\n  IMS_PER_BACH: 3\n", "can't read the config .*IMS_PER_BACH"),
        ("_BASE_: nothing.yaml\n", "can't read the config .*nothing.yaml"),
        ("a: [", "can't read the config"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(settings.SettingsError, match=said):
            settings.read_config(str(tmp_path / "mine.yaml"), [], 8)
    settings.check_schedule(config("coco_mask_rcnn_fpn_1x", "SOLVER.STEPS", ()))
    with pytest.raises(ValueError, match="makes no schedule from SOLVER, .*; set MAX_ITER to 1 or more"):
        settings.check_schedule(config("coco_mask_rcnn_fpn_1x", "SOLVER.MAX_ITER", 0))
    with pytest.raises(ValueError, match="can't build the model of these settings .*51"):
        train_net.build(config("coco_mask_rcnn_fpn_1x", "MODEL.RESNETS.DEPTH", 51))


def test_voc_under_a_coco_config_is_refused(detectron2, tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_pascal_voc

    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("000001\n")
    for name in ("Annotations/000001.xml", "JPEGImages/000001.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    register_pascal_voc("some_voc", str(tmp_path), "trainval", 2007)
    MetadataCatalog.get("some_voc").evaluator_type = "pascal_voc"
    try:
        cfg = config("coco_mask_rcnn_c4_1x", "DATASETS.TRAIN", ("some_voc",))
        with pytest.raises(ValueError, match=r"some_voc has 20 classes and the config 80; .* --config-file voc_faster"):
            settings.check_data_sets(cfg)
    finally:
        DatasetCatalog.remove("some_voc")
        MetadataCatalog.remove("some_voc")


@pytest.fixture
def tiny(detectron2, tmp_path):
    """Four pictures of one rectangle each, in COCO's format, registered; its name."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    images, instances, draw = [], [], np.random.default_rng(0)
    for number in range(1, 5):
        left, top, wide, high = (int(v) for v in (*draw.integers(4, 30, 2), *draw.integers(20, 30, 2)))
        picture = Image.new("RGB", (80, 64), (90, 90, 90))
        ImageDraw.Draw(picture).rectangle([left, top, left + wide, top + high], fill=(200, 40, 40))
        picture.save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 64})
        corners = [left, top, left + wide, top, left + wide, top + high, left, top + high]
        instances.append({
            "id": number, "image_id": number, "category_id": 1 + number % 2, "iscrowd": 0, "area": wide * high,
            "bbox": [left, top, wide, high], "segmentation": [corners],
        })  # fmt: skip
    held = {
        "info": {},
        "images": images,
        "annotations": instances,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(held))
    register_coco_instances("tiny", {}, str(tmp_path / "instances.json"), str(tmp_path))
    yield "tiny"
    DatasetCatalog.remove("tiny")
    MetadataCatalog.remove("tiny")


@pytest.mark.parametrize("name", ["coco_mask_rcnn_c4_1x", "coco_mask_rcnn_fpn_1x"])
def test_a_fine_tuning_from_command_to_rebuilt_model(detectron2, tiny, exported, tmp_path, name, capsys):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    out = tmp_path / "out"
    command = ["--config-file", str(CONFIGS / f"{name}.yaml"), "--num-gpus", "1"]
    changes = {
        "MODEL.DEVICE": "cpu", "MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "BN", "MODEL.ROI_BOX_HEAD.NORM": "BN",
        "MODEL.ROI_MASK_HEAD.NORM": "BN", "MODEL.ROI_HEADS.NUM_CLASSES": 2, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50, "MODEL.RPN.POST_NMS_TOPK_TEST": 5, "TEST.DETECTIONS_PER_IMAGE": 3,
        "INPUT.MIN_SIZE_TRAIN": (64,), "INPUT.MIN_SIZE_TEST": 64, "DATASETS.TRAIN": (tiny,), "DATASETS.TEST": (tiny,),
        "DATALOADER.NUM_WORKERS": 0, "SOLVER.REFERENCE_WORLD_SIZE": 0, "SOLVER.IMS_PER_BATCH": 2, "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": (1,), "TEST.PRECISE_BN.NUM_ITER": 1, "OUTPUT_DIR": out,
    }  # fmt: skip
    options = [str(part) for pair in changes.items() for part in pair]

    with pytest.raises(ValueError, match=r"tiny has 2 classes and the config 80; set MODEL.ROI_HEADS.NUM_CLASSES 2$"):
        train_net.main([*command, *options, "MODEL.WEIGHTS", str(exported), "MODEL.ROI_HEADS.NUM_CLASSES", "80"])
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is empty"):
        train_net.main([*command, *options])
    assert not out.exists()  # nothing was begun

    train_net.main([*command, *options, "MODEL.WEIGHTS", str(exported)])
    assert "318 of the backbone's 318 tensors match" in capsys.readouterr().out
    assert {"config.yaml", "model_final.pth", "metrics.json"} <= {path.name for path in out.iterdir()}

    cfg = get_cfg()
    cfg.merge_from_file(str(out / "config.yaml"))
    again = build_model(cfg)
    assert "at random" not in weights.check_weights(str(out / "model_final.pth"), again, whole=True)
    DetectionCheckpointer(again).load(str(out / "model_final.pth"))
    assert TABLE[name]["MODEL.ROI_HEADS.NAME"] == cfg.MODEL.ROI_HEADS.NAME

    with pytest.raises(ValueError, match="a test needs a whole model"):
        elsewhere = ["MODEL.WEIGHTS", str(exported), "OUTPUT_DIR", str(tmp_path / "elsewhere")]
        train_net.main([*command, "--eval-only", *options, *elsewhere])
    with pytest.raises(ValueError, match="out holds a fine-tuning of .*; add --resume"):
        train_net.main([*command, *options, "MODEL.WEIGHTS", str(exported)])
    with pytest.raises(ValueError, match="Found: nothing.pkl; leave MODEL.WEIGHTS out"):
        train_net.main([*command, "--eval-only", "--resume", *options, "MODEL.WEIGHTS", "nothing.pkl"])
    written = (out / "config.yaml").read_bytes()
    train_net.main([*command, "--eval-only", *options, "MODEL.WEIGHTS", str(out / "model_final.pth")])
    assert (out / "config.yaml").read_bytes() == written
    assert (out / "inference/coco_instances_results.json").exists()
    train_net.main([*command, "--resume", *options, "SOLVER.MAX_ITER", "3"])  # needs no MODEL.WEIGHTS
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
