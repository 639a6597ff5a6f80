"""The detectron2 and mmdet kit: each flag of the paper's fine-tuning, the sentences of wrong use, and the real library.

The first half reads the settings as data and needs no detectron2; the second builds, loads, trains and tests with it.
"""

import copy
import json
import pickle
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from inscon import checkpoint
from inscon.nn.backbones import build_backbone
from inscon.transfer.detectron2 import check, train_net
from inscon.transfer.export import any_backbone, export
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
}
C4 = {"MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm"}
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
}
DEFAULTS = {"INPUT.MIN_SIZE_TEST": 800, "SOLVER.GAMMA": 0.1, "MODEL.RPN.POST_NMS_TOPK_TEST": 1000}
"""detectron2's own, which the YAMLs leave alone; so are these of each kind of model."""
KINDS = {
    "c4": {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES": ["res4"],
           "MODEL.RPN.IN_FEATURES": ["res4"], "MODEL.ROI_HEADS.IN_FEATURES": ["res4"]},
    "fpn": {"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]], "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
            "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead", "SOLVER.WARMUP_ITERS": 1000},
}  # fmt: skip
ONCE = {"SOLVER.MAX_ITER": 90000, "SOLVER.STEPS": [60000, 80000]}
TWICE = {"SOLVER.MAX_ITER": 180000, "SOLVER.STEPS": [120000, 160000]}
TABLE = {
    "voc_faster_rcnn_c4_24k": EVERY | C4 | VOC,
    "coco_mask_rcnn_c4_1x": EVERY | C4 | COCO | ONCE,
    "coco_mask_rcnn_fpn_1x": EVERY | FPN | COCO | ONCE,
    "coco_mask_rcnn_fpn_2x": EVERY | FPN | COCO | TWICE,
}


def read_yaml(name):
    """A file and what it builds on, flat: later files win, the file itself last."""
    held = yaml.safe_load((CONFIGS / name).read_text())
    bases, found = held.pop("_BASE_", []), {}
    for base in [bases] if isinstance(bases, str) else bases:
        found |= read_yaml(base)
    return found | check.flat(held)


@pytest.mark.parametrize("name", TABLE)
def test_every_flag_is_in_the_yaml(name):
    found = read_yaml(f"{name}.yaml")
    assert {flag: found[flag] for flag in TABLE[name]} == TABLE[name]
    assert found["OUTPUT_DIR"] == f"output/{name}" and found["VERSION"] == 2
    assert "MODEL.WEIGHTS" not in found  # it has no default: a forgotten one is refused


def test_the_choices_are_the_tables():
    assert {path.stem for path in CONFIGS.glob("*_*.yaml")} == set(TABLE)


def test_every_flag_is_in_the_mmdet_config():
    config = runpy.run_path(str(TRANSFER / "mmdet/mask_rcnn_r50_fpn_1x.py"))
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
    assert resize["scales"] == [(1333, side) for side in (640, 672, 704, 736, 768, 800)] and resize["keep_ratio"]
    assert config["train_dataloader"] == {"batch_size": 2, "dataset": {"pipeline": config["train_pipeline"]}}
    assert config["auto_scale_lr"] == {"enable": True, "base_batch_size": 16}
    warm_up, steps = config["param_scheduler"]
    assert (warm_up["by_epoch"], warm_up["end"], steps["end"], steps["milestones"]) == (False, 1000, 12, [8, 11])


class Settings(dict):
    """Stands in for detectron2's: groups and attributes."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


def made_up_settings(weights, folder):
    return Settings(
        MODEL=Settings(WEIGHTS=str(weights), DEVICE="cuda", MASK_ON=True), OUTPUT_DIR=str(folder),
        SOLVER=Settings(BASE_LR=0.02, MAX_ITER=90000, STEPS=(60000, 80000)),
    )  # fmt: skip


def test_settings_that_differ_are_all_named():
    cfg = made_up_settings("r50.pkl", "out")
    check.require(cfg, {"MODEL.MASK_ON": True, "SOLVER.STEPS": [60000, 80000]}, "why")
    with pytest.raises(
        check.SettingsError, match=r"^why. Found: MODEL.MASK_ON True instead of False, A.B None instead of 3$"
    ):
        check.require(cfg, {"MODEL.MASK_ON": False, "SOLVER.BASE_LR": 0.02, "A.B": 3}, "why")
    assert {key: read_yaml("base.yaml")[key] for key in check.OF_THE_BACKBONE} == check.OF_THE_BACKBONE


@pytest.fixture
def begun(tmp_path):
    """A fine-tuning of r7.pkl with a checkpoint: its settings."""
    cfg, out = made_up_settings(tmp_path / "r7.pkl", tmp_path / "out"), tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text(json.dumps(cfg))  # which is YAML too
    assert check.check_output(cfg, resume=False, eval_only=False) is None  # killed before its first checkpoint
    (out / "model_0000009.pth").write_bytes(b"trained")
    (out / "last_checkpoint").write_text("model_0000009.pth")
    return cfg


def with_weights(cfg, weights):
    cfg = copy.deepcopy(cfg)
    cfg["MODEL"]["WEIGHTS"] = str(weights)
    return cfg


def test_a_fine_tuning_is_laid_over_no_other(begun, tmp_path):
    for cfg in (begun, with_weights(begun, "r2.pkl")):
        with pytest.raises(
            ValueError, match=r"out holds a fine-tuning of .*r7.pkl. .*add --resume .*set OUTPUT_DIR to an"
        ):
            check.check_output(cfg, resume=False, eval_only=False)
    (tmp_path / "out/last_checkpoint").unlink()
    with pytest.raises(ValueError, match="add --resume"):  # its model is there all the same
        check.check_output(begun, resume=False, eval_only=False)
    with pytest.raises(FileNotFoundError, match="last_checkpoint"):
        check.check_output(begun, resume=True, eval_only=False)


def test_resume_goes_on_with_the_same_weights_and_settings_only(begun, tmp_path):
    newest, unnamed = tmp_path / "out/model_0000009.pth", with_weights(begun, "")
    for cfg in (begun, unnamed):
        assert check.check_output(cfg, resume=True, eval_only=False) == newest
    assert unnamed.MODEL.WEIGHTS == begun.MODEL.WEIGHTS  # as config.yaml is going to say again
    with pytest.raises(
        ValueError, match=r"a fine-tuning of .*r7.pkl; .* Found: MODEL.WEIGHTS r2.pkl instead of .*r7.pkl$"
    ):
        check.check_output(with_weights(begun, "r2.pkl"), resume=True, eval_only=False)
    longer, steeper = copy.deepcopy(begun), copy.deepcopy(begun)
    longer.SOLVER.MAX_ITER, steeper.SOLVER.BASE_LR = 180000, 0.1
    assert check.check_output(longer, resume=True, eval_only=False) == newest
    with pytest.raises(
        ValueError, match=r"all else \(and --num-gpus\) as it was, .* SOLVER.BASE_LR 0.1 instead of 0.02$"
    ):
        check.check_output(steeper, resume=True, eval_only=False)
    assert check.check_output(steeper, resume=True, eval_only=True) == newest


def test_a_test_of_another_model_needs_another_folder(begun, tmp_path):
    own = with_weights(begun, tmp_path / "out/model_0000009.pth")
    assert check.check_output(own, resume=False, eval_only=True) is None
    with pytest.raises(ValueError, match=r"Found: MODEL.WEIGHTS .*r7.pkl; .*set OUTPUT_DIR to another folder"):
        check.check_output(begun, resume=False, eval_only=True)


def test_the_script_finds_the_real_detectron2_beside_the_folder_of_its_name():
    command = [sys.executable, TRANSFER / "detectron2/train_net.py", "--help"]
    done = subprocess.run(command, cwd=TRANSFER, capture_output=True, text=True)
    if find_spec("detectron2"):
        assert done.returncode == 0 and "--config-file FILE" in done.stdout
    else:
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(
            "train_net.py: detectron2 is not installed; compile it as docs/reproduce.md says, or"
        )


# ------------------------------------------------------------------------------------------- with detectron2 itself


@pytest.fixture(scope="module")
def detectron2():
    return pytest.importorskip("detectron2", reason="detectron2 is not installed; it is compiled from its source")


def config(name, *options, num_gpus=8):
    return check.read_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu", *map(str, options)], num_gpus)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """Of a resnet50 whose BatchNorms all do something, and differently."""
    return make_run(tmp_path_factory.mktemp("run"), "resnet50")


@pytest.fixture(scope="module")
def backbone(a_run):
    return any_backbone(a_run)[0]


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
    found, wanted = check.flat(config(name)), TABLE[name] | DEFAULTS | KINDS["fpn" if "fpn" in name else "c4"]
    assert {flag: found[flag] for flag in wanted} == wanted


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


def test_what_matched_is_said_and_files_for_others_are_refused(detectron2, a_run, exported, tmp_path):
    cfg = config("voc_faster_rcnn_c4_24k")
    assert check.check_weights(cfg, str(exported), whole=False).endswith("r50.pkl has all 265 tensors of the backbone.")

    def refused(file, words, whole=False):
        with pytest.raises(check.SettingsError, match=words):
            check.check_weights(cfg, str(file), whole)

    of = r"for the 265 tensors of the backbone, and no others, .* noise. Found: "
    model = r"for the \d+ tensors of the model, .*r50.pkl\", which fails for \d+, .* model_final.pth of"
    refused(exported, model, whole=True)
    refused(
        "", of + '"", which fails for 265, .*; set MODEL.WEIGHTS to what scripts/export.py --format detectron2 wrote'
    )
    export(a_run, "torchvision", tmp_path / "r50.pth")
    refused(tmp_path / "r50.pth", of + '.*r50.pth", which fails for 265,')
    refused(f"{tmp_path / 'r50.pth'}?matching_heuristics=True", f"can't load|{of}")
    refused(checkpoint.latest(a_run), f"can't load|{of}.*265")
    tensors = {name_there(n): v.numpy() for n, v in any_backbone(a_run)[0].network.state_dict().items()}
    small = {name_there(n): v.numpy() for n, v in build_backbone("resnet18").network.state_dict().items()}
    large = {n.replace("res4.5.", "res4.22."): value for n, value in tensors.items() if n.startswith("res4.5.")}
    for held, words in (
        (tensors | {"stem.fc.bias": np.zeros(9)}, None),
        (small, of),
        (tensors | {"res3.0.conv1.norm.running_var": np.full(128, np.nan)},
         of + ".*, which fails for 1, backbone.res3.0.conv1.norm.running_var say"),
        (tensors | large, of + ".*, which fails for 18, res4.22.conv1"),
    ):  # fmt: skip
        file = tmp_path / "someones.pkl"
        file.write_bytes(pickle.dumps({"model": held, "__author__": "someone", "matching_heuristics": True}))
        if words:
            refused(file, words)
        else:
            check.check_weights(cfg, str(file), whole=False)
    for name in ("missing.pkl", "broken.pkl", "broken.pth"):
        if name.startswith("broken"):
            (tmp_path / name).write_bytes(b"no weights")
        refused(tmp_path / name, rf"detectron2 can't load .*{name}.* into the model .*scripts/export.py")


def test_the_schedule_follows_the_gpus(detectron2):
    s = config("coco_mask_rcnn_fpn_2x", num_gpus=2).SOLVER
    found = (s.IMS_PER_BATCH, s.BASE_LR, s.MAX_ITER, s.STEPS, s.WARMUP_ITERS)
    assert found == (4, 0.005, 720000, (480000, 640000), 4000)
    assert config("coco_mask_rcnn_fpn_2x").SOLVER.MAX_ITER == 180000
    assert config("coco_mask_rcnn_fpn_2x", "SOLVER.REFERENCE_WORLD_SIZE", 0, num_gpus=2).SOLVER.MAX_ITER == 180000
    assert config("coco_mask_rcnn_fpn_2x", "SOLVER.STEPS", ()).SOLVER.STEPS == ()


@pytest.mark.parametrize(("options", "gpus", "sentence"), [
    (["SOLVER.IMS_PER_BACH", 2], 8, "AssertionError: Non-existent key: SOLVER.IMS_PER_BACH.; put flags before"),
    (["SOLVER.MAX_ITER", "many"], 8, r"Type mismatch .* with values \(90000 vs. many\) for config key: SOLVER.MAX_ITER"),
    (["SOLVER.MAX_ITER", 0], 8, "can't take the config .*SOLVER.MAX_ITER 0"),
    (["SOLVER.STEPS", "(9, 5)"], 8, "can't take the config .*SOLVER.STEPS"),
    (["MODEL.MASK_ON", True, "--resume", 3], 8, "Non-existent key: --resume.; put flags before KEY VALUE"),
    (["MODEL.WEIGHTS"], 8, "odd length"),
    (["SOLVER.IMS_PER_BATCH", 2], 1, "all 8 GPUs .* a multiple of 8. Found: 2 and --num-gpus 1; leave it out for 2 on each"),
    (["SOLVER.IMS_PER_BATCH", 3, "SOLVER.REFERENCE_WORLD_SIZE", 0], 2, "all 2 GPUs .* a multiple of 2. Found: 3"),
    (["SOLVER.IMS_PER_BATCH", 0], 8, "Found: 0"),
    ([], 0, "Found: 16 and --num-gpus 0"),
    (["MODEL.RESNETS.STRIDE_IN_1X1", True, "INPUT.FORMAT", "BGR"], 8,
     "something else .*STRIDE_IN_1X1 True instead of False, INPUT.FORMAT BGR instead of RGB"),
])  # fmt: skip
def test_settings_that_detectron2_would_trip_over_are_sentences(detectron2, options, gpus, sentence):
    with pytest.raises(check.SettingsError, match=sentence):
        config("coco_mask_rcnn_fpn_1x", *options, num_gpus=gpus)


@pytest.mark.parametrize(("text", "sentence"), [
    ("VERSION: 2\nSOLVER:\n  BASE_LR: 0.1\n", "mine.yaml.* names no data set to train on"),
    ("SOLVER:\n  IMS_PER_BACH: 3\n", "can't take the config .*IMS_PER_BACH"),
    ("_BASE_: nothing.yaml\n", "can't take the config .*nothing.yaml"),
    ("a: [", "can't take the config"),
    (None, "can't take the config .*mine.yaml.*set --config-file to one of .*coco_mask_rcnn_c4_1x.yaml, coco"),
])  # fmt: skip
def test_configs_that_are_none_are_sentences(detectron2, tmp_path, text, sentence):
    if text:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(check.SettingsError, match=sentence):
        check.read_config(str(tmp_path / "mine.yaml"), [], 8)
    with pytest.raises(check.SettingsError, match="base.yaml.* names no data set to train on"):
        check.read_config(str(CONFIGS / "base.yaml"), [], 8)
    with pytest.raises(check.SettingsError, match="PIXEL_MEAN"):
        check.read_config(str(CONFIGS / "coco.yaml"), [], 8)


def test_a_network_that_detectron2_cannot_build_and_gpus_that_are_not_there(detectron2, tiny):
    with pytest.raises(ValueError, match=r"can't load .* \(.*51.*\); leave out what you changed of MODEL"):
        check.check_weights(config("coco_mask_rcnn_fpn_1x", "MODEL.RESNETS.DEPTH", 51), "r50.pkl", whole=False)
    with pytest.raises(
        ValueError, match="--num-gpus must be at most 1 here. Found: 2; lower it, or set it to 1 and MODEL"
    ):
        train_net.main(
            ["--config-file", str(CONFIGS / "coco_mask_rcnn_fpn_1x.yaml"), "--num-gpus", "2", "MODEL.DEVICE", "cpu"]
        )


@pytest.mark.parametrize(("change", "config_", "sentence"), [
    (lambda held: held.pop("categories"), "coco_mask_rcnn_fpn_1x", "can't read the data set tiny .*set DETECTRON2_DATASETS"),
    (lambda held: held["annotations"].clear(), "coco_mask_rcnn_fpn_1x", "tiny has no boxes. Found: 4 images; take the"),
    (lambda held: held["images"].append({"id": 9, "file_name": "9.png", "width": 8, "height": 8}), "coco_mask_rcnn_fpn_1x",
     "1 of 5 images are missing, .*9.png say"),
    (lambda held: [box.pop("segmentation") for box in held["annotations"]], "coco_mask_rcnn_fpn_1x",
     "must fit tiny; .*NUM_CLASSES 80 instead of 2, MODEL.MASK_ON True instead of False$"),
    (lambda held: None, "voc_faster_rcnn_c4_24k", "NUM_CLASSES 20 instead of 2$"),
])  # fmt: skip
def test_data_sets_that_do_not_fit_are_refused(detectron2, tiny, tmp_path, change, config_, sentence):
    held = json.loads((tmp_path / "instances.json").read_text())
    change(held)
    (tmp_path / "instances.json").write_text(json.dumps(held))
    with pytest.raises(check.SettingsError, match=sentence):
        check.check_data_set(config(config_), "tiny")
    with pytest.raises(check.SettingsError, match="can't read the data set coco_17 .*coco_17"):
        check.check_data_set(config(config_), "coco_17")


def test_voc_is_read_too(detectron2, tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_pascal_voc

    register_pascal_voc("some_voc", str(tmp_path), "trainval", 2007)
    cfg = config("voc_faster_rcnn_c4_24k")
    try:
        with pytest.raises(
            check.SettingsError, match="can't read the data set some_voc .*trainval.txt.*DETECTRON2_DATASETS"
        ):
            check.check_data_set(cfg, "some_voc")
        for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (tmp_path / folder).mkdir(parents=True)
        (tmp_path / "ImageSets/Main/trainval.txt").write_text("000001\n000002\n")
        box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>8</xmax><ymax>8</ymax></bndbox>"
        for name in ("000001", "000002"):
            (tmp_path / f"Annotations/{name}.xml").write_text(
                f"<a><size><width>9</width><height>9</height></size><object><name>cat</name>{box}</object></a>"
            )
        (tmp_path / "JPEGImages/000002.jpg").write_text("")
        with pytest.raises(check.SettingsError, match="1 of 2 images are missing, .*000001.jpg say"):
            check.check_data_set(cfg, "some_voc")
        (tmp_path / "JPEGImages/000001.jpg").write_text("")
        check.check_data_set(cfg, "some_voc")
        with pytest.raises(
            check.SettingsError, match="NUM_CLASSES 80 instead of 20, MODEL.MASK_ON True instead of False"
        ):
            check.check_data_set(config("coco_mask_rcnn_c4_1x"), "some_voc")
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

    with pytest.raises(ValueError, match=r"must fit tiny; .* MODEL.ROI_HEADS.NUM_CLASSES 80 instead of 2$"):
        train_net.main([*command, *options, "MODEL.WEIGHTS", str(exported), "MODEL.ROI_HEADS.NUM_CLASSES", "80"])
    with pytest.raises(ValueError, match='from noise. Found: "", which fails for 265,'):
        train_net.main([*command, *options])
    assert not out.exists()  # nothing was begun

    train_net.main([*command, *options, "MODEL.WEIGHTS", str(exported)])
    said = capsys.readouterr().out
    assert (
        "all 265 tensors of the backbone" in said
        and "2 images a step, learning rate 0.02, lower after (1,), 2 st" in said
    )
    assert {"config.yaml", "model_final.pth", "metrics.json"} <= {path.name for path in out.iterdir()}

    cfg = get_cfg()
    cfg.merge_from_file(str(out / "config.yaml"))
    assert check.check_weights(cfg, str(out / "model_final.pth"), whole=True).endswith("tensors of the model.")
    DetectionCheckpointer(build_model(cfg)).load(str(out / "model_final.pth"))
    assert TABLE[name]["MODEL.ROI_HEADS.NAME"] == cfg.MODEL.ROI_HEADS.NAME

    with pytest.raises(ValueError, match="for the .* tensors of the model"):
        elsewhere = ["MODEL.WEIGHTS", str(exported), "OUTPUT_DIR", str(tmp_path / "elsewhere")]
        train_net.main([*command, "--eval-only", *options, *elsewhere])
    with pytest.raises(ValueError, match="out holds a fine-tuning of .*add --resume"):
        train_net.main([*command, *options, "MODEL.WEIGHTS", str(exported)])
    written = (out / "config.yaml").read_bytes()
    train_net.main([*command, "--eval-only", *options, "MODEL.WEIGHTS", str(out / "model_final.pth")])
    assert (out / "config.yaml").read_bytes() == written
    assert (out / "inference/coco_instances_results.json").exists()
    train_net.main([*command, "--resume", *options, "SOLVER.MAX_ITER", "3"])  # needs no MODEL.WEIGHTS
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    assert f"WEIGHTS: {exported}" in (out / "config.yaml").read_text()
