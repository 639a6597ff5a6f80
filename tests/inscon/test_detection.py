"""Detection without detectron2: against torchvision's own model, pycocotools' masks, closed forms, and every wrong use."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

pytest.importorskip("pycocotools", reason="comes with the transfer extra")
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from data_prep.make_scenes import draw_scene, make_scenes, run_lengths
from inscon import guard
from inscon.precision import choose_precision
from inscon.transfer import export
from inscon.transfer.detection import batches, coco, loop, schema, weights
from inscon.transfer.detection.evaluate import NAMES, detections, evaluate, score
from inscon.transfer.detection.models import ARCHES, MEAN, STD, Design, Protocol, build
from scripts import finetune_detection
from tests.inscon.test_export import make_run

ROOT = Path(__file__).resolve().parents[2]
COCO_MINI = ROOT.parent / "shared/data/coco_mini"
CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "s", num_images=2, num_val=3, num_classes=3, size=96)


def scene_set(scenes, split="train", masks=True):
    name = {"train": "annotations.json", "val": "annotations_val.json"}[split]
    return coco.read_coco(scenes / name, scenes / split, masks)


SMALL = {
    "iterations": 6, "batch_size": 2, "base_lr": 0.08, "warmup": 0, "min_size": (64, 96), "test_size": 96, "max_size": 192,
    "rois": 16, "proposals": 4,
}  # fmt: skip


def design(categories, arch="maskrcnn-fpn", **changed):
    return Design(arch=arch, categories=categories, **{"backbone": "resnet18", **SMALL, **changed})


class Tiny(torch.nn.Module):
    """Stands in for a detector where it doesn't matter what is learned; draws numbers as one does."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, images, targets):
        made = [self.norm(self.layer(image[None])) for image in images]
        return {"loss_a": sum((m - torch.rand(())).square().mean() for m in made), "loss_b": self.layer.bias.sum() ** 2}


def begin(scenes, folder, make=lambda plan: Tiny(), **changed):
    data = scene_set(scenes)
    torch.manual_seed(1)
    plan = design(data.categories, **changed)
    return loop.FineTuning(make(plan), plan, {"what": "noise", "digest": "random"}, data, folder, CPU, FP32)


def first_batch(data, masks, min_size=(64, 96)):
    data = data.part(data.trainable())
    return batches.work_of(data, batches.decide(0, 0, 2, len(data), min_size), masks)()


def write(path, contents):
    path.write_text(json.dumps(contents))
    return path


# The data set.


def test_masks_of_every_kind_are_pycocotools_own(tmp_path):
    drawn = draw_scene(seed=1, split="train", number=0, num_classes=3, size=64).masks[0]
    height, width = drawn.shape
    plain = {"size": [height, width], "counts": run_lengths(drawn)}
    packed = coco_mask.encode(np.asfortranarray(drawn.astype(np.uint8)))
    text = packed | {"counts": packed["counts"].decode()}
    polygons = [[3, 3, 20, 4, 18, 30.5], [30, 10, 40, 10, 40, 22, 30, 22]]
    for segmentation in (plain, packed, text):
        assert np.array_equal(coco.decode_mask(segmentation, height, width), drawn)
    there = COCO()
    there.dataset = {
        "images": [{"id": 1, "height": height, "width": width}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": polygons}],
        "categories": [{"id": 1, "name": "a"}],
    }
    there.createIndex()
    ours = coco.decode_mask(polygons, height, width)
    assert np.array_equal(ours, there.annToMask(there.anns[1])) and ours[15, 35] == 1 and ours[50, 50] == 0


def test_scenes_are_read_as_they_were_drawn(scenes):
    data = scene_set(scenes)
    for number in range(2):
        drawn = draw_scene(seed=0, split="train", number=number, num_classes=3, size=96)
        target = data.target(number, masks=True)
        assert np.array_equal(target["masks"].numpy().astype(bool), drawn.masks)
        assert target["labels"].tolist() == (drawn.classes + 1).tolist()
        y, x = np.nonzero(drawn.masks[0])
        assert target["boxes"][0].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        pixels = data.pixels(number)
        assert pixels.shape == (3, *drawn.pixels.shape[:2])
        assert abs(pixels.permute(1, 2, 0).numpy() - drawn.pixels / 255).mean() < 0.05


def gapped(tmp_path):
    """Three pictures, categories 3, 1, 90: a crowd, a box without area, a picture with nothing."""
    for number in range(3):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.png")
    square = [[5, 5, 15, 5, 15, 15, 5, 15]]
    about = {"image_id": 7, "iscrowd": 0, "segmentation": square, "bbox": [5, 5, 10, 10], "area": 100}
    contents = {
        "images": [{"id": 7 + n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(3)],
        "annotations": [
            about | {"id": 0, "category_id": 90},
            about | {"id": 1, "category_id": 3, "iscrowd": 1},
            about | {"id": 2, "category_id": 3, "bbox": [5, 5, 0, 10]},
            about | {"id": 3, "category_id": 1, "bbox": [30, 20, 20, 20]},
            about | {"id": 4, "category_id": 1, "iscrowd": 1, "image_id": 8},
        ],
        "categories": [{"id": i, "name": n} for i, n in ((3, "car"), (1, "person"), (90, "brush"))],
    }
    return contents


def test_category_ids_with_gaps_come_back(tmp_path):
    data = coco.read_coco(write(tmp_path / "a.json", gapped(tmp_path)), tmp_path, masks=True)
    assert list(data.categories.items()) == [(1, "person"), (3, "car"), (90, "brush")]
    target = data.target(0, masks=True)
    assert target["labels"].tolist() == [3, 1]  # no crowd, nothing without an area
    assert target["boxes"].tolist() == [[5, 5, 15, 15], [30, 20, 40, 30]]  # cut at the border
    assert data.trainable() == (0,)
    found = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(2)}
    back = detections(found, 7, data.categories)
    assert [entry["category_id"] for entry in back] == [90, 1] and back[0]["bbox"] == [5, 5, 10, 10]


def test_what_has_no_area_is_left_out_of_training_and_counted(tmp_path):
    contents = gapped(tmp_path)
    first = contents["annotations"][0]
    thin = {"bbox": [20, 5, 1e-7, 10]}, {"bbox": [60, 5, 10, 10]}, {"bbox": [-20, 5, 20, 10]}
    for number, changed in enumerate(thin):
        contents["annotations"].append(first | {"id": 10 + number} | changed)
    first["segmentation"] = [*first["segmentation"], [5, 5, 9, 9]]  # a line beside a polygon
    for annotation in contents["annotations"][3:]:
        annotation.pop("iscrowd", None)
    data = coco.read_coco(write(tmp_path / "a.json", contents), tmp_path, masks=True)
    assert [entry["id"] for entry in data.objects[0]] == [0, 3] and len(data.annotations[0]) == 7
    assert data.left_out == (
        "a.json: 4 of 8 annotations are left out of training, with a side below 0.1 px inside the image; the first is annotation 2"
    )
    assert data.target(0, True)["masks"][0].sum() == 100
    model = build(design(data.categories, "fasterrcnn-fpn")).train()
    losses = model(*first_batch(data, False))  # torchvision asserts areas
    assert all(torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_by_exif_and_must_then_be_of_the_jsons_size(orientation, tmp_path):
    contents = gapped(tmp_path)
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:15, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    seen = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "0.png")))
    sides = {"height": seen.shape[0], "width": seen.shape[1]}
    turned = contents | {"images": [contents["images"][0] | sides, *contents["images"][1:]]}
    data = coco.read_coco(write(tmp_path / "turned.json", turned), tmp_path, False)
    assert np.array_equal((data.pixels(0) * 255).byte().permute(1, 2, 0).numpy(), seen)
    if orientation > 4:
        data = coco.read_coco(write(tmp_path / "plain.json", contents), tmp_path, False)
        with pytest.raises(coco.CocoError, match=r"is 30 x 40 px where .*says 40 x 30; its EXIF data turn it.*without"):
            data.pixels(0)
        Image.fromarray(pixels).save(tmp_path / "0.png")
        assert data.pixels(0).shape == (3, 30, 40)


def test_16_bit_pictures_are_scaled(tmp_path):
    contents = gapped(tmp_path)
    levels = np.linspace(0, 65_535, 1200).reshape(30, 40).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "0.png")
    pixels = coco.read_coco(write(tmp_path / "a.json", contents), tmp_path, False).pixels(0)
    assert (pixels - torch.from_numpy(levels / 65_535)).abs().max() < 1 / 250


def test_a_flip_turns_boxes_with_their_masks(scenes):
    data = scene_set(scenes)
    image, target = data.pixels(0), data.target(0, masks=True)
    turned, flipped = batches.flip(image, target)
    assert torch.equal(turned[:, :, 0], image[:, :, -1])
    for box, mask in zip(flipped["boxes"], flipped["masks"]):
        y, x = torch.nonzero(mask, as_tuple=True)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    again = batches.flip(turned, flipped)
    assert torch.equal(again[0], image) and torch.equal(again[1]["boxes"], target["boxes"])


def test_draws_depend_on_the_iteration_alone_and_every_epoch_shows_all():
    drawn = [batches.decide(3, i, 4, 10, (64, 96)) for i in range(10)]
    assert drawn[7] == batches.decide(3, 7, 4, 10, (64, 96)) and drawn != [
        batches.decide(4, i, 4, 10, (64, 96)) for i in range(10)
    ]
    flat = [draw for batch in drawn for draw in batch]
    for epoch in range(4):
        assert sorted(draw.position for draw in flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert {draw.short_side for draw in flat} == {64, 96} and {draw.flipped for draw in flat} == {True, False}


def test_an_image_is_resized_to_its_own_side_with_boxes_and_masks(scenes):
    data = scene_set(scenes)
    model = build(design(data.categories))
    image, target = data.pixels(0), data.target(0, masks=True)
    target |= {"short_side": 64}
    seen, (after,) = model.train().transform([image], [target])
    resized, (shape,) = seen.tensors[0], seen.image_sizes
    assert min(shape) == 64 and after["masks"].shape[1:] == shape and set(after["masks"].unique().tolist()) == {0, 1}
    for box, mask in zip(after["boxes"], after["masks"]):
        y, x = torch.nonzero(mask, as_tuple=True)
        edges = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
        assert (box - edges).abs().max() <= 1.5
    plain = torchvision.transforms.functional.resize(image, list(shape), antialias=True)
    normal = (plain - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(resized[:, : shape[0], : shape[1]], normal, atol=1e-4, rtol=0)
    assert min(model.eval().transform([image])[0].image_sizes[0]) == 96


# The detectors.


def test_the_fpn_detector_is_torchvisions():
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=81)
        ours = build(design(dict(enumerate(map(str, range(80)), 1)), backbone="resnet50"))
    shapes = [{n.replace("body.network.", "body."): v.shape for n, v in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1] and all(p.requires_grad for p in ours.parameters())
    assert repr(ours.backbone.fpn) == repr(theirs.backbone.fpn)
    for part in ("rpn", "roi_heads"):
        assert repr(getattr(ours, part)) == repr(getattr(theirs, part))


@pytest.mark.parametrize(
    ("arch", "backbone"),
    [("maskrcnn-fpn", "resnet18"), ("fasterrcnn-fpn", "resnet18"), ("maskrcnn-fpn", "convnext_atto")],
)
def test_forward_and_backward_reach_every_weight(arch, backbone, scenes):
    data, masks = scene_set(scenes), arch.startswith("mask")
    model = build(design(data.categories, arch, backbone=backbone)).train()
    torch.manual_seed(0)
    losses = model(*first_batch(data, masks))
    assert ("loss_mask" in losses) == masks and len(losses) == 4 + masks
    sum(losses.values()).backward()
    unreached = {"resnet18": [], "convnext_atto": ["backbone.body.network.head.norm"]}[backbone]
    assert {n.rpartition(".")[0] for n, p in model.named_parameters() if p.grad is None} == set(unreached)
    image = data.pixels(0)
    model.eval()
    model.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        (made,) = model([image])
    count = len(made["boxes"])
    assert 4 <= count <= 12 and made["labels"].min() >= 1 and made["labels"].max() <= 3
    assert made["boxes"][:, [0, 2]].max() <= image.shape[2] and made["boxes"][:, [1, 3]].max() <= image.shape[1]
    if masks:
        assert made["masks"].shape == (count, 1, *image.shape[1:])
    model.roi_heads.score_thresh = 1.0  # nothing found
    with torch.inference_mode():
        (nothing,) = model([image])
    assert nothing["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ("vit_tiny_patch16_224", r"maps of strides \(4, 8, 16, 32\) px. Found: vit_tiny_patch16_224 with \(16,\); .* these four"),
        ("maxvit_tiny_tf_224", "pictures of many sizes, and maxvit_tiny_tf_224 takes one; give another"),
        ("resnet19", "there is no backbone resnet19"),
    ],
)  # fmt: skip
def test_backbones_that_no_detector_takes_are_refused(backbone, words):
    with pytest.raises(ValueError, match=words):
        design({1: "a"}, backbone=backbone)


def test_boxes_stay_float32_in_mixed_precision(scenes):
    data = scene_set(scenes)
    model = build(design(data.categories, "fasterrcnn-fpn", test_size=32)).eval()
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 2  # bfloat16 is slow on most CPUs
    seen = {}
    model.rpn.register_forward_hook(lambda module, given, made: seen.update(boxes=made[0][0]))
    model.rpn.anchor_generator.register_forward_hook(lambda module, given, made: seen.update(anchors=made[0]))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        (made,) = model([data.pixels(0)])
    assert {seen["boxes"].dtype, seen["anchors"].dtype, made["boxes"].dtype, made["scores"].dtype} == {torch.float32}


# Weights.


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run"))
    for name, form in (("r18.pth", "torchvision"), ("r18.pkl", "detectron2")):
        export.export(folder, form, folder / name)
    return folder


@pytest.mark.parametrize(("name", "count"), [("resnet18", 120), ("convnext_atto", 126)])
def test_the_backbone_in_the_detector_is_the_files(name, count, exported, tmp_path):
    file = exported / "r18.pth"
    if name != "resnet18":
        file = tmp_path / "a.pth"
        export.export(make_run(tmp_path, name), "timm", file)
    start = weights.read_start(str(file))
    network = build(design({1: "a"}, backbone=start.backbone)).backbone.body.network
    assert start.backbone == name and weights.start_from(network, start) == (count, count)
    held, _ = export.read(file)
    assert all(torch.equal(value, held[n]) for n, value in network.state_dict().items())


def test_a_supervised_resnet_is_taken_and_its_classifier_dropped(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "r50.pth")
    start = weights.read_start(str(tmp_path / "r50.pth"))
    assert (start.backbone, len(start.tensors)) == ("resnet50", 318)
    assert torch.equal(start.tensors["layer4.2.conv3.weight"], theirs.layer4[2].conv3.weight)
    old = {n: v for n, v in theirs.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert len(weights.read_start(str(tmp_path / "old.pth")).tensors) == 318


def test_noise_is_for_those_who_ask():
    start = weights.read_start("random")
    assert (start.backbone, start.tensors, start.digest) == ("resnet50", None, "random")
    assert weights.read_start("random", "resnet18").backbone == "resnet18"
    network = build(design({1: "a"})).backbone.body.network
    assert weights.start_from(network, weights.read_start("random", "resnet18")) == (0, 120)


def test_wrong_weights_are_refused(tmp_path, exported):
    state = torchvision.models.resnet50(weights=None).state_dict()
    files = {
        "detector": {"backbone.body.conv1.weight": torch.zeros(1), "rpn.head.conv.weight": torch.zeros(1)},
        "their": {export.to_detectron2(name): value for name, value in state.items()},
        "prefixed": {"module." + name: value for name, value in state.items()},
        "short": {name: value for name, value in state.items() if name != "layer4.2.conv3.weight"},
        "more": state | {"layer5.weight": torch.zeros(1)},
        "nan": state | {"conv1.weight": torch.full((64, 3, 7, 7), torch.nan)},
        "checkpoint": {"version": 2, "step": 3, "model": state},
    }
    for name, contents in files.items():
        torch.save(contents, tmp_path / f"{name}.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for source, backbone, words in (
        (
            tmp_path / "their.pth",
            None,
            r"matches 0 of the 318 tensors of a resnet50.* write the backbone with scripts/export.py",
        ),
        (tmp_path / "prefixed.pth", None, r"matches 0 of the 318 tensors"),
        (
            tmp_path / "detector.pth",
            None,
            r"matches 0 of the 318 .* backbone.body.conv1.weight; set --backbone .* or write",
        ),
        (tmp_path / "short.pth", None, r"matches 317 of the 318 tensors .*differs at layer4.2.conv3.weight"),
        (tmp_path / "more.pth", None, r"differs at layer5.weight"),
        (tmp_path / "nan.pth", None, r"not finite, the first in conv1.weight"),
        (
            tmp_path / "checkpoint.pth",
            None,
            r"is a checkpoint of a run, with heads and queues; write the backbone with",
        ),
        (tmp_path / "text.pth", None, r"can't be read as weights"),
        (tmp_path / "gone.pth", None, r"there is no file .*or set --weights random to start from noise"),
        (tmp_path, None, r"there is no file .*; write the backbone with scripts/export.py"),
        (exported / "r18.pkl", None, r"is written for detectron2.*--format torchvision"),
        (
            exported / "r18.pth",
            "resnet50",
            r"holds a resnet18 and --backbone asks for a resnet50; leave --backbone out",
        ),
    ):
        with pytest.raises(export.ExportError, match=words):
            weights.read_start(str(source), backbone)


def test_a_detector_is_no_backbone(scenes, tmp_path, exported):
    begin(scenes, tmp_path / "d", iterations=1, arch="fasterrcnn-fpn").train()
    for given in (tmp_path / "d", tmp_path / "d/checkpoints/step-00000001.pt"):
        with pytest.raises(
            export.ExportError, match=r"is a detector \(fasterrcnn-fpn, iteration 1\).* began with \(noise\)"
        ):
            weights.read_start(str(given))
        with pytest.raises(ValueError, match="is a detector of scripts/finetune_detection.py.*scripts/train.py"):
            export.any_backbone(given)
    with pytest.raises(export.ExportError, match="is a checkpoint of a run, with heads"):
        weights.read_start(str(exported))
    with pytest.raises(loop.FineTuningError, match="is a pre-training's; set another --out"):
        begin(scenes, exported)
    with pytest.raises(loop.FineTuningError, match="is a pre-training's, no detector; give the --out folder"):
        loop.load_detector(exported)


# AP.


def as_found(data, masks):
    """The truth as a detector's output."""
    found = []
    for position, image in enumerate(data.images):
        target = data.target(position, masks)
        made = target | {"scores": torch.ones(len(target["labels"]))}
        if masks:
            made["masks"] = made["masks"][:, None].float()
        found += detections(made, image["id"], data.categories)
    return found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_has_an_ap_of_100(kind, scenes):
    data = scene_set(scenes, "val")
    found = as_found(data, kind == "segm")
    numbers = score(data, found, kind)
    assert tuple(numbers) == NAMES
    assert numbers["AP"] == numbers["AP50"] == numbers["AR100"] == pytest.approx(100)
    assert numbers["APl"] is None  # no object is larger than 96 x 96 px
    wrong = [entry | {"category_id": entry["category_id"] % 3 + 1} for entry in found]
    assert score(data, wrong, kind)["AP"] < 30
    assert score(data, [], kind)["AP"] == 0 and score(data, [], kind)["AR100"] == 0


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_first_annotation_may_have_the_id_0_and_crowds_are_no_misses(kind, tmp_path):
    contents = gapped(tmp_path)
    contents["annotations"] = [a for a in contents["annotations"] if a["id"] in (0, 4)]
    for annotation in contents["annotations"]:
        del annotation["area"]
    data = coco.read_coco(write(tmp_path / "a.json", contents), tmp_path, masks=True)
    assert score(data, as_found(data, kind == "segm"), kind)["AP"] == pytest.approx(100)


def test_half_the_objects_found_recall_a_half(scenes):
    data = scene_set(scenes, "val")
    entry = data.objects[0][0]
    only = replace(data.part([0, 1]), annotations=((entry,), (entry | {"image_id": 1},)))
    box = {"category_id": entry["category_id"], "bbox": entry["bbox"], "score": 1.0}
    numbers = score(only, [box | {"image_id": data.images[0]["id"]}], "bbox")
    assert numbers["AR100"] == pytest.approx(50)
    assert numbers["AP"] == pytest.approx(100 * 51 / 101)  # precision 1 at the 51 recalls 0, .01, ... .5


# The loop.


def test_the_learning_rate():
    protocol = Protocol(batch_size=8)
    assert loop.full_lr(protocol) == pytest.approx(0.01)
    table = {0: 1e-5, 500: 0.005005, 1000: 0.01, 59_999: 0.01, 60_000: 1e-3, 79_999: 1e-3, 80_000: 1e-4, 89_999: 1e-4}
    assert {i: loop.lr_at(protocol, i) for i in table} == pytest.approx(table)
    assert loop.lr_at(Protocol(iterations=20), 2) == 0.02  # warm-up is at most a tenth


def test_only_convolutions_and_linear_layers_are_decayed(scenes, tmp_path):
    run = begin(scenes, tmp_path, build)
    decayed, others = run.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0) and decayed["momentum"] == 0.9
    assert all(p.dim() == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(run.model.parameters()))


def test_two_scenes_are_learnt_and_the_detector_is_rebuilt_from_its_folder(scenes, tmp_path):
    figures = []
    run = begin(scenes, tmp_path, build, iterations=8, min_size=(64,))
    run.train(checkpoint_every=100, log_every=1, say=lambda done, found: figures.append(found["loss"]))
    assert sum(figures[-2:]) < 0.8 * sum(figures[:2]), figures
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 9)) and lines[0]["loss"] == figures[0]
    assert {"loss_mask", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} < set(lines[0])
    model, plan, facts = loop.load_detector(tmp_path)
    assert plan == run.design and facts["step"] == 8
    data = scene_set(scenes, "val")
    model.to(memory_format=torch.channels_last)  # as it was trained, or sums are taken in another order
    for detector in (model, run.model.eval()):
        detector.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        (one,), (other,) = model([data.pixels(0)]), run.model([data.pixels(0)])
    assert all(torch.equal(one[name], other[name]) for name in one)
    numbers = evaluate(model, data, ("bbox", "segm"), CPU)
    assert set(numbers) == {"bbox", "segm"} and all(0 <= numbers[k]["AP"] <= 100 for k in numbers)
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        loop.load_detector(tmp_path / "elsewhere")


def test_a_stopped_run_goes_on_as_if_undisturbed(scenes, tmp_path):
    changed = {"iterations": 3, "arch": "fasterrcnn-fpn", "min_size": (64,)}
    whole = begin(scenes, tmp_path / "whole", **changed)
    whole.train(log_every=1)
    begin(scenes, tmp_path / "parts", **changed).train(checkpoint_every=1, log_every=1, stop=2)
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "loss": 0}\n{"iterat')  # of iterations after the checkpoint
    torch.rand(7)
    again = begin(scenes, tmp_path / "parts", **changed)
    assert again.iteration == 2
    again.train(log_every=1)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    lines = [
        [{**json.loads(line), "images_per_s": 0} for line in (tmp_path / p / "metrics.jsonl").read_text().splitlines()]
        for p in ("whole", "parts")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 3
    assert len(list((tmp_path / "parts/checkpoints").iterdir())) == loop.KEPT
    with pytest.raises(loop.FineTuningError, match="with another base_lr and seed; set another --out"):
        begin(scenes, tmp_path / "parts", **changed, seed=1, base_lr=0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_iteration_end(number, scenes, tmp_path):
    stopped = begin(scenes, tmp_path, iterations=3, arch="fasterrcnn-fpn", min_size=(64,))
    repeated = lambda done, figures: os.kill(os.getpid(), number)  # noqa: E731
    assert stopped.train(say=repeated) == number.name
    assert stopped.iteration == 2 and (tmp_path / "checkpoints/step-00000002.pt").exists()


def test_what_cannot_be_written_is_named(scenes, tmp_path):
    run = begin(scenes, tmp_path, iterations=1, arch="fasterrcnn-fpn")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics.jsonl'"):
        run.train()


def test_workers_make_the_same_batches_and_raise_the_users_sentence(scenes, tmp_path):
    data = scene_set(scenes)
    works = [batches.work_of(data, batches.decide(0, iteration, 2, 2, (64, 96)), True) for iteration in (1, 2)]
    for (images, targets), (more, others) in zip(batches.load(works, 0), batches.load(works, 1)):
        assert all(torch.equal(a, b) for a, b in zip(images, more))
        assert all(torch.equal(a["masks"], b["masks"]) for a, b in zip(targets, others))
    contents = gapped(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no picture")
    data = coco.read_coco(write(tmp_path / "a.json", contents), tmp_path, True)
    with pytest.raises(coco.CocoError) as caught:
        next(batches.load([batches.work_of(data, batches.decide(0, 0, 2, 1, (64,)), True)], 1))
    assert str(caught.value).startswith(f"{tmp_path}/0.png: not a picture") and "DataLoader" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops(scenes, tmp_path):
    run = begin(scenes, tmp_path, arch="fasterrcnn-fpn")
    with torch.no_grad():
        run.model.layer.bias.fill_(torch.nan)
    with pytest.raises(
        loop.FineTuningError, match=r"not finite any more. Found: nan \(loss_a, loss_b\) at iteration 0 .*set a"
    ):
        run.train()
    assert not (tmp_path / "checkpoints").exists()


def test_weights_that_are_not_finite_are_not_saved(scenes, tmp_path):
    run = begin(scenes, tmp_path, arch="fasterrcnn-fpn")
    with torch.no_grad():
        run.model.layer.bias.fill_(torch.inf)
    with pytest.raises(loop.FineTuningError, match=r"layer.bias is not finite.* smaller --base-lr .*another --out"):
        run._save()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"iterations": 0}, "iterations must be at least 1. Found: 0"),
        ({"batch_size": 0}, "batch_size must be at least 1. Found: 0"),
        ({"base_lr": 0.0}, "base_lr must be greater than 0. Found: 0.0"),
        ({"warmup": -1}, "warmup must be at least 0. Found: -1"),
        ({"min_size": (8,)}, r"min_size must be sides of at least 32 px. Found: \(8,\)"),
        ({"rois": 3}, "rois must be at least 4. Found: 3"),
    ],
)
def test_wrong_protocols_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        Protocol(**changed)


# Wrong data.


def test_wrong_data_is_refused(scenes, tmp_path):
    good = json.loads((scenes / "annotations.json").read_text())
    voc = tmp_path / "VOC2007"
    (voc / "Annotations").mkdir(parents=True)
    (voc / "Annotations/000005.xml").write_text("<annotation/>")
    (tmp_path / "broken.json").write_text("{")
    plain = [{n: v for n, v in a.items() if n != "segmentation"} for a in good["annotations"]]
    named = {
        "other": {"type": "voc", "data": []},
        "list": [],
        "nothing": good | {"images": []},
        "plain": good | {"annotations": plain},
        "strange": good | {"annotations": [good["annotations"][0] | {"category_id": 99}]},
    }
    for name, contents in named.items():
        write(tmp_path / f"{name}.json", contents)
    count = len(good["annotations"])
    for path, folder, words in (
        (voc, scenes / "train", r"is VOC's format, .*convert VOC.s XML to one COCO json first"),
        (voc / "Annotations/000005.xml", scenes / "train", r"is VOC's format"),
        (tmp_path / "gone.json", scenes / "train", r"there is no file .*instances_val2017.json"),
        (tmp_path / "broken.json", scenes / "train", r"is no json"),
        (
            tmp_path / "other.json",
            scenes / "train",
            r"no images and no annotations and no categories. Found: data, type; give",
        ),
        (tmp_path / "list.json", scenes / "train", r"not in COCO's format.* Found: a list"),
        (tmp_path / "nothing.json", scenes / "train", r"has 0 images and 3 categories"),
        (tmp_path / "plain.json", scenes / "train", rf"{count} of the {count} annotations .*set --arch fasterrcnn-fpn"),
        (tmp_path / "strange.json", scenes / "train", r"category_id must be the id of one of the 3 .*Found: 99"),
        (
            scenes / "annotations.json",
            scenes,
            r"2 of the 2 pictures of .*the first is .*scene_000000.jpg; give the folder",
        ),
    ):
        with pytest.raises(coco.CocoError, match=words):
            coco.read_coco(path, folder, True)
    assert len(coco.read_coco(tmp_path / "plain.json", scenes / "train", False)) == 2
    torn = tmp_path / "torn"
    for image in good["images"]:
        (torn / image["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        (torn / image["file_name"]).write_bytes(b"no jpeg")
    with pytest.raises(coco.CocoError, match=r"scene_000000.jpg: not a picture: .*; copy it again"):
        coco.read_coco(scenes / "annotations.json", torn, True).pixels(0)
    with pytest.raises(
        coco.CocoError, match=r"is \d+ x \d+ px where annotations.json says \d+ x \d+; use the pictures"
    ):
        coco.read_coco(scenes / "annotations.json", scenes / "val", True).pixels(0)


FIRST, LAST = ("annotations", 0), ("annotations", 4)


@pytest.mark.parametrize(
    ("place", "changed", "words"),
    [
        ((*FIRST, "bbox"), None, "annotation 0: bbox .* Found: null"),
        ((*FIRST, "bbox"), ..., "annotation 0: bbox must be .x, y, width, height.* Found: none"),
        ((*FIRST, "bbox"), [5, 5, 10], r"annotation 0: bbox .* Found: \[5, 5, 10\]"),
        ((*FIRST, "bbox"), [5, 5, "10", 10], 'annotation 0: bbox .* Found: .*"10"'),
        ((*FIRST, "bbox"), [15, 5, -10, 10], "annotation 0: bbox .* Found: .*-10"),
        ((*FIRST, "bbox"), [5, 5, float("nan"), 10], "annotation 0: bbox .* Found: .*NaN"),
        ((*FIRST, "bbox"), [5, 5, 10**400, 10], "annotation 0: bbox"),
        ((*LAST, "bbox"), None, "annotation 4: bbox .* Found: null"),
        ((*FIRST, "area"), None, "annotation 0: area .* Found: null"),
        ((*FIRST, "area"), -1, "annotation 0: area .* Found: -1"),
        ((*FIRST, "iscrowd"), "0", 'annotation 0: iscrowd .* Found: "0"'),
        ((*FIRST, "image_id"), "7", 'annotation 0: image_id .* of the 3 images .* Found: "7"'),
        ((*FIRST, "image_id"), [7], r"annotation 0: image_id .* Found: \[7\]"),
        ((*FIRST, "category_id"), 2, "annotation 0: category_id .* of the 3 categories .* Found: 2"),
        ((*FIRST, "category_id"), True, "annotation 0: category_id .* Found: true"),
        ((*FIRST, "id"), 3, "lists annotation 3 of image 7 twice"),
        ((*FIRST, "segmentation"), [], "no segmentation, the first is annotation 0; .*fasterrcnn-fpn"),
        ((*FIRST, "segmentation"), "abc", 'annotation 0: segmentation must be polygons .* or an RLE .* Found: "abc"'),
        ((*FIRST, "segmentation"), [5, 5, 15, 5, 15, 15], "annotation 0: segmentation must be polygons.* Found: .5, 5, 15"),
        ((*FIRST, "segmentation"), [[5, 5], [15, 5], [15, 15]], r"segmentation .* Found: \[\[5, 5\]"),
        ((*FIRST, "segmentation"), [[[5, 5], [15, 5], [15, 15]]], "segmentation must be polygons"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 15]], r"segmentation .* Found: \[\[5, 5, 15, 15\]\]"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, 15, 5]], "segmentation must be polygons"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, None]], "segmentation must be polygons"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, float("nan")]], "segmentation must be polygons in px.* NaN"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, 1e9]], "segmentation must be polygons in px.* 1000000000"),
        ((*FIRST, "segmentation"), {"counts": [1200]}, 'an RLE of the image.s size.* Found: ."counts": .1200'),
        ((*FIRST, "segmentation"), {"size": [40, 30], "counts": [1200]}, 'an RLE of the image.s size.* Found: .*.40, 30.'),
        ((*FIRST, "segmentation"), {"size": [30, 40], "counts": [100, 5]}, 'counts add up to its px. Found: .*.100, 5.'),
        ((*FIRST, "segmentation"), {"size": [30, 40], "counts": [1300, -100]}, "an RLE of the image.s size"),
        ((*FIRST, "segmentation"), {"size": [30, 40], "counts": "k36h000000m"}, "an RLE of the image.s size"),
        ((*FIRST, "segmentation"), {"size": [30, 40], "counts": "zz é"}, "an RLE of the image.s size"),
        ((*FIRST, "segmentation"), {"size": [30, 40], "counts": None}, 'Found: .*"counts": null'),
        (("images", 0, "width"), ..., "image 7: width .* Found: none"),
        (("images", 0, "height"), None, "image 7: height .* Found: null"),
        (("images", 0, "height"), 0, "image 7: height .* above 0. Found: 0"),
        (("images", 0, "width"), "40", 'image 7: width .* Found: "40"'),
        (("images", 0, "file_name"), ..., "image 7: file_name .* Found: none"),
        (("images", 0, "id"), ..., "image number 1: id .* Found: none"),
        (("images", 1, "id"), "8", 'image 8: id .* alike. Found: "8"'),
        (("images", 1, "id"), 7, "lists image 7 twice; give every one an id of its own"),
        (("images", 1, "file_name"), "0.png", "lists the picture 0.png twice; list it once"),
        (("images", 1), 5, "images must be a list of objects. Found: 5"),
        (("annotations",), {"0": 1}, "annotations must be a list of objects"),
        (("categories", 0, "name"), ..., "category 3: name .* Found: none"),
        (("categories", 0, "id"), "3", 'category 3: id .* Found: "3"'),
        (("categories", 1, "id"), 3, "lists category 3 twice"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_before_anything_starts(place, changed, words, tmp_path):
    contents = gapped(tmp_path)
    *way, field = place
    holder = contents
    for key in way:
        holder = holder[key]
    if changed is ...:
        del holder[field]
    else:
        holder[field] = changed
    path = write(tmp_path / "a.json", contents)
    with pytest.raises(coco.CocoError, match=f"{path}.*{words}"):
        coco.read_coco(path, tmp_path, masks=True)


def test_json_of_another_kind_is_named(tmp_path):
    good = gapped(tmp_path)
    segments = [{"image_id": 7, "category_id": 1, "file_name": "0.png", "segments_info": []}]
    kinds = {
        "no images .*Found: a list; give an instances json": [{"image_id": 7, "category_id": 1, "bbox": [1, 1, 2, 2]}],
        "annotation number 1: bbox .*as in an instances json. Found: none": good | {"annotations": segments},
        "no annotations. Found": {name: good[name] for name in ("images", "categories")},
        "not all of one": json.dumps(good).encode()[:-40],
        "no json in UTF-8.*byte 0xe9": '{"images": "\u00e9"}'.encode("latin-1"),
        "no json": b"",
        "nested|recursion|no json": b"[" * 100_000,
    }
    for words, contents in kinds.items():
        path = tmp_path / "a.json"
        path.write_bytes(contents if isinstance(contents, bytes) else json.dumps(contents).encode())
        with pytest.raises(coco.CocoError, match=words):
            coco.read_coco(path, tmp_path, masks=False)


def test_compressed_run_lengths_are_pycocotools_own():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = (rng.random((50, 70)) < share).astype(np.uint8)
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        assert schema.runs_of(counts) == run_lengths(mask.astype(bool)) and sum(schema.runs_of(counts)) == mask.size


def test_missing_pictures_are_counted_in_every_folder(tmp_path):
    contents = gapped(tmp_path)
    (tmp_path / "sub").mkdir()
    names = ("sub/0.png", "elsewhere/1.png", "sub/2.png")
    for image, name in zip(contents["images"], names, strict=True):
        image["file_name"] = name
    path = write(tmp_path / "a.json", contents)
    (tmp_path / "0.png").rename(tmp_path / "sub/0.png")
    (tmp_path / "sub/2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(coco.CocoError, match="2 of the 3 pictures .* the first is elsewhere/1.png"):
        coco.read_coco(path, tmp_path, masks=False)


def test_other_categories_are_refused(scenes, tmp_path):
    data = scene_set(scenes)
    other = dict(zip((1, 2, 4), data.categories.values()))
    with pytest.raises(coco.CocoError, match=r"must be the same. Found: 3 in a, 3 in b, and 3 \(.*\) is not in both"):
        coco.check_same_categories(data.categories, other, "a", "b")
    coco.check_same_categories(data.categories, scene_set(scenes, "val").categories, "a", "b")


def test_a_set_without_boxes_is_refused(scenes, tmp_path):
    contents = json.loads((scenes / "annotations.json").read_text()) | {"annotations": []}
    empty = coco.read_coco(write(tmp_path / "a.json", contents), scenes / "train", False)
    plan = design(empty.categories, "fasterrcnn-fpn")
    with pytest.raises(loop.FineTuningError, match="none of the 2 images of .* has a box to learn from"):
        loop.FineTuning(build(plan), plan, {"what": "", "digest": ""}, empty, tmp_path, CPU, FP32)


def test_without_pycocotools_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(coco.CocoError, match="need the package pycocotools: pip install pycocotools"):
        coco.mask_tools()


# The command.


def config_of(scenes, out, **changed):
    """Of the command, for the small scenes."""
    return finetune_detection.DetectionConfig(
        **SMALL | {
            "val_json": scenes / "annotations_val.json", "val_images": scenes / "val", "train_json": scenes / "annotations.json",
            "train_images": scenes / "train", "out": out, "arch": "maskrcnn-fpn", "weights": "random", "iterations": 2,
            "min_size": (64,), "test_size": 64, "base_lr": 0.02, "log_every": 1,
        } | changed
    )  # fmt: skip


def test_the_command_trains_goes_on_and_judges(scenes, exported, tmp_path, capsys):
    config = config_of(scenes, tmp_path, weights=str(exported / "r18.pth"))
    finetune_detection.main(config)
    said = capsys.readouterr().out
    assert "backbone: 120 of 120 tensors, r18.pth, the backbone of step 7" in said
    assert "lr 0.0025 (0.02 is for 16 images)" in said and "from iteration 0" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert tuple(results["bbox"]) == tuple(results["segm"]) == NAMES and results["iteration"] == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    (tmp_path / "results.json").unlink()
    judging = {"eval_only": True, "arch": None, "train_json": None, "weights": None}
    finetune_detection.main(replace(config, **judging))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    with pytest.raises(ValueError, match="holds a maskrcnn-fpn. Found: --arch fasterrcnn-fpn; leave it out"):
        finetune_detection.main(replace(config, **judging | {"arch": "fasterrcnn-fpn"}))
    with pytest.raises(ValueError, match="with another seed; set another --out"):
        finetune_detection.main(replace(config, seed=1))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"log_every": 0}, "--log-every must be at least 1. Found: 0"),
        ({"workers": -1}, "--workers must be at least 0. Found: -1"),
        ({"out": Path("/proc/none")}, "/proc/none cannot be written .*set another --out"),
        (
            {"weights": None},
            "--weights must be set to train; --weights takes a file of scripts/export.py, or the word random",
        ),
    ],
)
def test_settings_and_outputs_are_tried_first(changed, words, tmp_path):
    """Before the files, none of which is there."""
    with pytest.raises(ValueError, match=words):
        finetune_detection.main(config_of(tmp_path, **{"out": tmp_path / "out", **changed}))
    assert not any(tmp_path.iterdir())


def test_a_second_process_in_a_folder_is_refused(scenes, tmp_path):
    with (
        guard.only_process(tmp_path, "--out"),
        pytest.raises(ValueError, match=f"another process works in {tmp_path} .process {os.getpid()}.*another --out"),
    ):
        finetune_detection.main(config_of(scenes, tmp_path))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.slow
def test_coco_mini_is_learnt_from_and_judged(arch, tmp_path):
    if not COCO_MINI.exists():
        pytest.skip(f"there is no {COCO_MINI}")
    masks = arch.startswith("mask")
    train, val = (
        coco.read_coco(COCO_MINI / f"annotations/instances_{name}.json", COCO_MINI / name, masks)
        for name in ("train2017", "val2017")
    )
    assert len(train.categories) == 80 and max(train.categories) == 90 and len(train.trainable()) == 47
    plan = design(train.categories, arch, iterations=2, min_size=(96,))
    run = loop.FineTuning(build(plan), plan, {"what": "noise", "digest": "random"}, train, tmp_path, CPU, FP32)
    run.train(log_every=1)
    few = val.part(range(4))
    run.model.roi_heads.score_thresh = 0.0
    numbers = evaluate(run.model, few, ("bbox", "segm") if masks else ("bbox",), CPU)
    assert all(tuple(found) == NAMES and 0 <= found["AP"] <= 100 for found in numbers.values())
    kind = "segm" if masks else "bbox"
    assert score(val, as_found(val, masks), kind)["AP"] == pytest.approx(100)
