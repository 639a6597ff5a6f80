"""Detection without detectron2: against torchvision's own model, pycocotools' masks, closed forms, and every wrong use."""

import copy
import json
import os
import resource
import signal
import subprocess
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
from inscon.transfer.detection.models import ARCHES, MEAN, STD, Design, build, trunk_of
from inscon.transfer.detection.pictures import samples
from inscon.transfer.trunk import load_trunk
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


def design(arch, categories, trunk="resnet18", side=96):
    return Design(
        arch=arch, trunk=trunk, categories=categories, test_side=side, max_side=2 * side, rois=16, proposals=24
    )


def small_schedule(**changed):
    return loop.Schedule(
        **{"iterations": 6, "batch_size": 2, "base_lr": 0.08, "warmup": 0, "short_sides": (64, 96), **changed}
    )


def begin(scenes, folder, schedule, arch="maskrcnn-c4"):
    data = scene_set(scenes)
    torch.manual_seed(1)
    plan = design(arch, data.categories)
    about = {"what": "noise", "digest": "random"}
    return loop.FineTuning(build(plan), plan, schedule, about, data, folder, CPU, FP32)


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
    assert data.categories.ids == (1, 3, 90) and data.categories.names == ("person", "car", "brush")
    assert [data.categories.label(i) for i in (1, 3, 90)] == [1, 2, 3]
    assert [data.categories.category_id(data.categories.label(i)) for i in data.categories.ids] == [1, 3, 90]
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
    flat = {"segmentation": [[5, 5, 10, 10, 15, 15]]}, {"segmentation": {"size": [30, 40], "counts": [1200]}}
    thin = {"bbox": [20, 5, 1e-7, 10]}, {"bbox": [60, 5, 10, 10]}, {"bbox": [-20, 5, 20, 10]}
    for number, changed in enumerate((*flat, *thin)):
        contents["annotations"].append(first | {"id": 10 + number} | changed)
    path = write(tmp_path / "a.json", contents)
    data = coco.read_coco(path, tmp_path, masks=True)
    assert [entry["id"] for entry in data.objects[0]] == [0, 3] and len(data.annotations[0]) == 9
    assert data.left_out == (
        "a.json: 6 of 10 annotations are left out of training: 4 with a side below 0.1 px inside the image, 2 with a flat mask; "
        "the first is annotation 2"
    )
    boxes = coco.read_coco(path, tmp_path, masks=False)
    assert [entry["id"] for entry in boxes.objects[0]] == [0, 3, 10, 11]
    model = build(design("fasterrcnn-c4", boxes.categories)).train()
    losses = model(*batches.TrainBatches(boxes, False, 0, 2, (64, 96)).work(0).make())  # torchvision asserts areas
    assert all(torch.isfinite(value) for value in losses.values())
    first["segmentation"] = [*first["segmentation"], [5, 5, 9, 9]]  # a line beside a polygon
    for annotation in contents["annotations"]:
        del annotation["iscrowd"]
    assert coco.read_coco(write(tmp_path / "b.json", contents), tmp_path, True).target(0, True)["masks"][0].sum() == 100


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
    model = build(design("maskrcnn-c4", data.categories))
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
    categories = coco.Categories(tuple(range(1, 81)), tuple(map(str, range(80))))
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=81)
        ours = build(design("maskrcnn-fpn", categories, "resnet50"))
    shapes = [{n: v.shape for n, v in model.state_dict().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1] and all(p.requires_grad for p in ours.parameters())
    for part in ("backbone", "rpn", "roi_heads"):
        assert repr(getattr(ours, part)) == repr(getattr(theirs, part))


@pytest.mark.parametrize("trunk", ["resnet18", "resnet50"])
@pytest.mark.parametrize("arch", ARCHES)
def test_trunks_of_all_detectors_have_the_resnets_names(arch, trunk):
    with torch.device("meta"):
        model = build(design(arch, coco.Categories((1,), ("a",)), trunk))
        theirs = torchvision.models.get_model(trunk, weights=None)
    theirs.fc = torch.nn.Identity()
    assert {n: v.shape for n, v in trunk_of(model).state_dict().items()} == {
        n: v.shape for n, v in theirs.state_dict().items()
    }
    assert all(p.requires_grad for p in model.parameters())
    assert not any("Frozen" in type(m).__name__ for m in model.modules())


@pytest.mark.parametrize("arch", ARCHES)
def test_forward_and_backward_reach_every_weight(arch, scenes):
    data = scene_set(scenes)
    model = build(design(arch, data.categories)).train()
    train = batches.TrainBatches(data, arch.startswith("mask"), 0, 2, (64, 96))
    torch.manual_seed(0)
    losses = model(*train.work(0).make())
    assert ("loss_mask" in losses) == arch.startswith("mask") and len(losses) == 4 + arch.startswith("mask")
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    image = data.pixels(0)
    model.eval()
    model.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        (made,) = model([image])
    count = len(made["boxes"])
    assert 10 < count <= 100 and made["labels"].min() >= 1 and made["labels"].max() <= 3
    assert made["boxes"][:, [0, 2]].max() <= image.shape[2] and made["boxes"][:, [1, 3]].max() <= image.shape[1]
    if arch.startswith("mask"):
        assert made["masks"].shape == (count, 1, *image.shape[1:])
    model.roi_heads.score_thresh = 1.0  # nothing found
    with torch.inference_mode():
        (nothing,) = model([image])
    assert nothing["boxes"].shape == (0, 4)


def test_the_c4_shapes_and_its_shared_res5(scenes):
    data = scene_set(scenes)
    model = build(design("maskrcnn-c4", data.categories)).train()
    assert model.rpn.anchor_generator.num_anchors_per_location() == [15]
    features = model.backbone(torch.randn(2, 3, 64, 96))
    assert features.shape == (2, 256, 4, 6)
    boxes = [torch.tensor([[0.0, 0, 64, 64], [16, 0, 96, 32]]), torch.tensor([[8.0, 8, 40, 40]])]
    heads = model.roi_heads
    pooled = heads.box_roi_pool({"0": features}, boxes, [(64, 96)] * 2)
    assert pooled.shape == (3, 256, 14, 14) and heads.box_head.maps(pooled).shape == (3, 512, 7, 7)
    assert heads.box_head(pooled).shape == (3, 512)
    assert heads.mask_predictor(heads.box_head.maps(pooled)).shape == (3, 4, 14, 14)
    assert not any("mask_roi_pool" in name for name in model.state_dict())

    # In training res5 sees every RoI once: its BatchNorm counts one batch, and masks learn from the maps of the objects.
    seen = []
    heads.box_head.layer4.register_forward_hook(lambda module, given, made: seen.append(made))
    chosen = []
    heads.mask_predictor.register_forward_hook(lambda module, given, made: chosen.append(given[0]))
    before = int(heads.box_head.norm.num_batches_tracked)
    model(*batches.TrainBatches(data, True, 0, 2, (64,)).work(0).make())
    assert len(seen) == 1 and int(heads.box_head.norm.num_batches_tracked) == before + 1
    assert 0 < len(chosen[0]) < len(seen[0]) and chosen[0].shape[1:] == (512, 7, 7)
    copied = copy.deepcopy(model)
    assert copied.roi_heads.mask_roi_pool._head[0] is copied.roi_heads.box_head


def test_res4_align_reads_the_middle_of_a_cell():
    ramp = torch.arange(8.0)[None, None, None, :].expand(1, 1, 8, 8) * 16 + 8  # the x of each cell's middle, px
    pooled = build(design("fasterrcnn-c4", coco.Categories((1,), ("a",)))).roi_heads.box_roi_pool(
        {"0": ramp.contiguous()}, [torch.tensor([[20.0, 20.0, 104.0, 104.0]])], [(128, 128)]
    )
    bins = 20 + (torch.arange(14) + 0.5) * (104 - 20) / 14
    torch.testing.assert_close(pooled[0, 0, 3], bins, atol=1e-3, rtol=0)


@pytest.mark.parametrize("arch", ["maskrcnn-fpn", "fasterrcnn-c4"])
def test_boxes_stay_float32_in_mixed_precision(arch, scenes):
    data = scene_set(scenes)
    model = build(design(arch, data.categories, side=32)).eval()
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


@pytest.mark.parametrize("arch", ARCHES)
def test_the_trunk_in_the_detector_is_the_files(arch, exported):
    start = weights.read_start(str(exported / "r18.pth"))
    model = build(design(arch, coco.Categories((1,), ("a",)), start.trunk))
    assert start.trunk == "resnet18" and weights.start_from(trunk_of(model), start) == (120, 120)
    held = torch.load(exported / "r18.pth", weights_only=True)
    parts = model.state_dict()
    for name, value in held.items():
        prefix = "backbone.body." if arch.endswith("fpn") else "backbone."
        if arch.endswith("c4") and name.startswith("layer4"):
            prefix = "roi_heads.box_head."
        assert torch.equal(parts[prefix + name], value)


def test_a_supervised_resnet_is_taken_and_its_classifier_dropped(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "r50.pth")
    start = weights.read_start(str(tmp_path / "r50.pth"))
    assert (start.trunk, len(start.tensors)) == ("resnet50", 318)
    model = build(design("fasterrcnn-c4", coco.Categories((1,), ("a",)), "resnet50"))
    assert weights.start_from(trunk_of(model), start) == (318, 318)
    assert torch.equal(model.roi_heads.box_head.layer4[2].conv3.weight, theirs.layer4[2].conv3.weight)
    old = {n: v for n, v in theirs.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert len(weights.read_start(str(tmp_path / "old.pth")).tensors) == 318


def test_noise_is_for_those_who_ask(tmp_path):
    start = weights.read_start("random")
    assert (start.trunk, start.tensors, start.digest) == ("resnet50", None, "random")
    assert weights.read_start("random", "resnet18").trunk == "resnet18"
    model = build(design("fasterrcnn-c4", coco.Categories((1,), ("a",))))
    assert weights.start_from(trunk_of(model), weights.read_start("random", "resnet18")) == (0, 120)


def test_wrong_weights_are_refused(tmp_path, exported):
    state = torchvision.models.resnet50(weights=None).state_dict()
    files = {
        "their": {export.to_detectron2(name): value for name, value in state.items()},
        "prefixed": {"module." + name: value for name, value in state.items()},
        "short": {name: value for name, value in state.items() if name != "layer4.2.conv3.weight"},
        "more": state | {"layer5.weight": torch.zeros(1)},
        "nan": state | {"conv1.weight": torch.full((64, 3, 7, 7), torch.nan)},
        "checkpoint": {"version": 1, "step": 3, "model": state},
    }
    for name, contents in files.items():
        torch.save(contents, tmp_path / f"{name}.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for source, trunk, words in (
        (
            tmp_path / "their.pth",
            None,
            r"matches 0 of the 318 tensors of a resnet50.* write the trunk with scripts/export.py",
        ),
        (tmp_path / "prefixed.pth", None, r"matches 0 of the 318 tensors"),
        (tmp_path / "short.pth", None, r"matches 317 of the 318 tensors .*differs at layer4.2.conv3.weight"),
        (tmp_path / "more.pth", None, r"differs at layer5.weight"),
        (tmp_path / "nan.pth", None, r"not finite, the first in conv1.weight"),
        (tmp_path / "checkpoint.pth", None, r"is a checkpoint of a run, with heads and queues; write the trunk with"),
        (tmp_path / "text.pth", None, r"can't be read as weights"),
        (tmp_path / "gone.pth", None, r"there is no file .*or set --weights random to start from noise"),
        (tmp_path, None, r"is a folder; write the trunk with scripts/export.py"),
        (exported / "r18.pkl", None, r"is written for detectron2.*export the same run with --format torchvision"),
        (exported / "r18.pth", "resnet50", r"holds a resnet18 and --trunk asks for a resnet50; leave --trunk out"),
    ):
        with pytest.raises(export.ExportError, match=words):
            weights.read_start(str(source), trunk)


def test_a_detector_is_no_trunk(scenes, tmp_path, exported):
    run = begin(scenes, tmp_path / "d", small_schedule(iterations=1), "fasterrcnn-c4")
    run.train()
    for given in (tmp_path / "d", tmp_path / "d/checkpoints/step-00000001.pt"):
        with pytest.raises(
            export.ExportError, match=r"is a detector \(fasterrcnn-c4, iteration 1\).* began with \(noise\)"
        ):
            weights.read_start(str(given))
        with pytest.raises(ValueError, match="is a detector of scripts/finetune_detection.py.*scripts/train.py"):
            load_trunk(given)
    theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=2).state_dict()
    for number, contents in enumerate((theirs, {"model": theirs}, {"state_dict": {"roi_head.a": torch.zeros(1)}})):
        torch.save(contents, tmp_path / f"{number}.pth")
        with pytest.raises(export.ExportError, match="whole detector .* not a trunk; .*torchvision resnet50"):
            weights.read_start(str(tmp_path / f"{number}.pth"))
    with pytest.raises(export.ExportError, match="is a checkpoint of a run, with heads"):
        weights.read_start(str(exported))
    with pytest.raises(loop.FineTuningError, match="is a pre-training's; set another --out"):
        begin(scenes, exported, small_schedule())


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
    schedule = loop.Schedule(batch_size=8)
    assert schedule.lr == pytest.approx(0.01)
    table = {0: 1e-5, 500: 0.005005, 1000: 0.01, 59_999: 0.01, 60_000: 1e-3, 79_999: 1e-3, 80_000: 1e-4, 89_999: 1e-4}
    assert {i: schedule.lr_at(i) for i in table} == pytest.approx(table)
    assert loop.Schedule(iterations=20).lr_at(2) == 0.02  # warm-up is at most a tenth


def test_only_convolutions_and_linear_layers_are_decayed(scenes, tmp_path):
    run = begin(scenes, tmp_path, small_schedule())
    decayed, others = run.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0) and decayed["momentum"] == 0.9
    assert all(p.dim() == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(run.model.parameters()))


@pytest.mark.parametrize("arch", ["maskrcnn-fpn", "maskrcnn-c4"])
def test_two_scenes_are_learnt(arch, scenes, tmp_path):
    figures = []
    run = begin(scenes, tmp_path, small_schedule(iterations=8, short_sides=(64,)), arch)
    run.train(checkpoint_every=100, log_every=1, say=lambda done, found: figures.append(found["loss"]))
    assert sum(figures[-2:]) < 0.8 * sum(figures[:2]), figures
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 9)) and lines[0]["loss"] == figures[0]
    assert {"loss_mask", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} < set(lines[0])


def test_a_stopped_run_goes_on_as_if_undisturbed(scenes, tmp_path):
    schedule, arch = small_schedule(iterations=3), "fasterrcnn-c4"
    whole = begin(scenes, tmp_path / "whole", schedule, arch)
    whole.train(log_every=1)
    stopped = begin(scenes, tmp_path / "parts", schedule, arch)
    stopped.train(checkpoint_every=1, log_every=1, stop=2)
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "loss": 0}\n{"iterat')  # of iterations after the checkpoint
    torch.rand(7)
    again = begin(scenes, tmp_path / "parts", schedule, arch)
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
        begin(scenes, tmp_path / "parts", small_schedule(iterations=3, seed=1, base_lr=0.02), arch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_iteration_end_and_the_run_go_on(number, scenes, tmp_path):
    schedule, arch = small_schedule(iterations=3), "fasterrcnn-c4"
    whole = begin(scenes, tmp_path / "whole", schedule, arch)
    assert whole.train() is None
    stopped = begin(scenes, tmp_path / "parts", schedule, arch)
    repeated = lambda done, figures: os.kill(os.getpid(), number)  # noqa: E731
    assert stopped.train(say=repeated) == number.name
    assert stopped.iteration == 2 and (tmp_path / "parts/checkpoints/step-00000002.pt").exists()
    again = begin(scenes, tmp_path / "parts", schedule, arch)
    assert again.iteration == 2 and again.train() is None
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_what_cannot_be_written_is_named_and_leaves_nothing(scenes, tmp_path):
    run = begin(scenes, tmp_path, small_schedule(iterations=1), "fasterrcnn-c4")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics.jsonl'"):
        run.train()
    data, limits = scene_set(scenes, "val", False), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/samples.png'"):
            samples(run.model, data, tmp_path / "out/samples.png", CPU, masks=False, count=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any((tmp_path / "out").iterdir())


def test_a_detector_is_rebuilt_from_its_folder(scenes, tmp_path):
    run = begin(scenes, tmp_path, small_schedule(iterations=1))
    run.train()
    model, plan, facts = loop.load_detector(tmp_path)
    assert (plan.arch, plan.trunk, plan.categories.ids, facts["step"]) == ("maskrcnn-c4", "resnet18", (1, 2, 3), 1)
    data = scene_set(scenes, "val")
    model.to(memory_format=torch.channels_last)  # as it was trained, or sums are taken in another order
    for detector in (model, run.model.eval()):
        detector.roi_heads.score_thresh = 0.0
    image = data.pixels(0)
    with torch.inference_mode():
        (one,), (other,) = model([image]), run.model([image])
    assert all(torch.equal(one[name], other[name]) for name in one)
    numbers = evaluate(model, data, ("bbox", "segm"), CPU)
    assert set(numbers) == {"bbox", "segm"} and all(0 <= numbers[k]["AP"] <= 100 for k in numbers)
    samples(model, data, tmp_path / "samples.png", CPU, masks=True, count=2, least_score=0.0)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width == 2 * 480 + 4 and np.asarray(picture).std() > 10
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        loop.load_detector(tmp_path / "elsewhere")


def test_a_pre_trainings_folder_holds_no_detector(exported):
    with pytest.raises(loop.FineTuningError, match="is a pre-training's, no detector; give the --out folder"):
        loop.load_detector(exported)


def test_workers_read_the_same_batches(scenes):
    train = batches.TrainBatches(scene_set(scenes), True, 0, 2, (64, 96))
    for (images, targets), (more, others) in zip(
        batches.load(map(train.work, range(1, 3)), 0), batches.load(map(train.work, range(1, 3)), 1)
    ):
        assert all(torch.equal(a, b) for a, b in zip(images, more))
        assert all(torch.equal(a["masks"], b["masks"]) for a, b in zip(targets, others))


def test_a_workers_error_is_the_users_sentence(tmp_path):
    contents = gapped(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no picture")
    train = batches.TrainBatches(
        coco.read_coco(write(tmp_path / "a.json", contents), tmp_path, True), True, 0, 2, (64,)
    )
    with pytest.raises(coco.CocoError) as caught:
        next(batches.load(map(train.work, range(3)), 1))
    assert str(caught.value).startswith(f"{tmp_path}/0.png: not a picture") and "DataLoader" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops(scenes, tmp_path):
    run = begin(scenes, tmp_path, small_schedule(), "fasterrcnn-c4")
    with torch.no_grad():
        run.model.roi_heads.box_predictor.cls_score.bias.fill_(torch.nan)
    with pytest.raises(
        loop.FineTuningError, match=r"not finite any more. Found: nan \(loss_classifier\) at iteration 0 .*set a"
    ):
        run.train()
    assert not (tmp_path / "checkpoints").exists()


def test_weights_that_are_not_finite_are_not_saved(scenes, tmp_path):
    run = begin(scenes, tmp_path, small_schedule(), "fasterrcnn-c4")
    with torch.no_grad():
        run.model.roi_heads.box_predictor.cls_score.bias.fill_(torch.inf)
    with pytest.raises(loop.FineTuningError, match=r"cls_score.bias is not finite.* smaller --base-lr .*another --out"):
        run._save()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"iterations": 0}, "iterations must be at least 1. Found: 0"),
        ({"batch_size": 0}, "batch_size must be at least 1. Found: 0"),
        ({"base_lr": 0.0}, "base_lr must be greater than 0. Found: 0.0"),
        ({"warmup": -1}, "warmup must be at least 0. Found: -1"),
        ({"short_sides": (8,)}, r"min_size must be sides of at least 32 px. Found: \(8,\)"),
    ],
)
def test_wrong_schedules_are_refused(changed, words):
    with pytest.raises(loop.FineTuningError, match=words):
        loop.Schedule(**changed)


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
        (voc, scenes / "train", r"is VOC's format, .*convert it to one COCO json first"),
        (voc / "Annotations/000005.xml", scenes / "train", r"is VOC's format"),
        (tmp_path / "gone.json", scenes / "train", r"there is no file .*instances_val2017.json"),
        (tmp_path / "broken.json", scenes / "train", r"is no json"),
        (
            tmp_path / "other.json",
            scenes / "train",
            r"no images and no annotations and no categories. Found: data, type; give",
        ),
        (tmp_path / "list.json", scenes / "train", r"not in COCO's format.* Found: list"),
        (tmp_path / "nothing.json", scenes / "train", r"has 0 images and 3 categories"),
        (tmp_path / "plain.json", scenes / "train", rf"{count} of the {count} annotations .*set --arch fasterrcnn-c4"),
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
        ((*FIRST, "segmentation"), [], "no segmentation, the first is annotation 0; .*fasterrcnn-c4"),
        ((*FIRST, "segmentation"), "abc", 'annotation 0: segmentation must be polygons or an RLE. Found: "abc"'),
        ((*FIRST, "segmentation"), [5, 5, 15, 5, 15, 15], "annotation 0: segmentation must be a list of polygons.* Found: 5"),
        ((*FIRST, "segmentation"), [[5, 5], [15, 5], [15, 15]], r"segmentation .*3 points.* Found: \[5, 5\]"),
        ((*FIRST, "segmentation"), [[[5, 5], [15, 5], [15, 15]]], "segmentation must be a list of polygons"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 15]], r"segmentation .* Found: \[5, 5, 15, 15\]"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, 15, 5]], "segmentation must be a list of polygons"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, None]], "segmentation must be a list of polygons"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, float("nan")]], "segmentation must be in px"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, 1e9]], "segmentation must be in px.* 1000000000"),
        ((*FIRST, "segmentation"), {"counts": [1200]}, "the RLE size null, where the image is .30, 40."),
        ((*FIRST, "segmentation"), {"size": [40, 30], "counts": [1200]}, r"RLE size \[40, 30\], where the image is \[30, 40\]"),
        ((*FIRST, "segmentation"), {"size": [30, 40], "counts": [100, 5]}, "RLE counts of 105 px, where the image has 1200"),
        ((*FIRST, "segmentation"), {"size": [30, 40], "counts": [1300, -100]}, "RLE counts that are no run lengths"),
        ((*FIRST, "segmentation"), {"size": [30, 40], "counts": "k36h000000m"}, "RLE counts of|that are no run lengths"),
        ((*FIRST, "segmentation"), {"size": [30, 40], "counts": "zz é"}, "RLE counts that are no run lengths"),
        ((*FIRST, "segmentation"), {"size": [30, 40], "counts": None}, "RLE counts that are no run lengths. Found: null"),
        (("images", 0, "width"), ..., "image 7: width .* Found: none"),
        (("images", 0, "height"), None, "image 7: height .* Found: null"),
        (("images", 0, "height"), 0, "image 7: height .* above 0. Found: 0"),
        (("images", 0, "width"), "40", 'image 7: width .* Found: "40"'),
        (("images", 0, "file_name"), ..., "image 7: file_name .* Found: none"),
        (("images", 0, "id"), ..., "image number 1: id .* Found: none"),
        (("images", 1, "id"), "8", 'image 8: id .* alike. Found: "8"'),
        (("images", 1, "id"), 7, "lists image 7 twice; give every image an id of its own"),
        (("images", 1, "file_name"), "0.png", "lists the picture 0.png twice, as image 7 and 8; list it once"),
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
    entry = {"image_id": 7, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}
    kinds = {
        "list of 1 results": [entry],
        "panoptic segments": good | {"annotations": [{"image_id": 7, "file_name": "0.png", "segments_info": []}]},
        "captions": {"images": good["images"], "annotations": [{"image_id": 7, "id": 1, "caption": "words"}]},
        "keypoints": good | {"annotations": [{"image_id": 7, "id": 1, "category_id": 1, "keypoints": []}]},
        "no annotations": {name: good[name] for name in ("images", "categories")},
        "not all of one": json.dumps(good).encode()[:-40],
        "not UTF-8 .byte 0xe9.*iconv": '{"images": "\u00e9"}'.encode("latin-1"),
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
        assert schema.is_flat({"size": [50, 70], "counts": counts}) == (not mask.any())
    assert schema.is_flat([[0, 0, 5, 5, 10, 10], [3, 3, 3, 3, 3, 3]]) and schema.is_flat([[0, 0, 4, 0, 0, 0, 0, 4]])
    assert not schema.is_flat([[0, 0, 5, 5, 10, 10], [3, 3, 3, 3, 4, 3, 4, 4]])


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
    other = coco.Categories((1, 2, 4), data.categories.names)
    with pytest.raises(coco.CocoError, match=r"must be the same. Found: 3 in a, 3 in b, and 3 \(.*\) is not in both"):
        coco.check_same_categories(data.categories, other, "a", "b")
    coco.check_same_categories(data.categories, scene_set(scenes, "val").categories, "a", "b")


def test_a_set_without_boxes_is_refused(scenes, tmp_path):
    contents = json.loads((scenes / "annotations.json").read_text()) | {"annotations": []}
    empty = coco.read_coco(write(tmp_path / "a.json", contents), scenes / "train", False)
    plan = design("fasterrcnn-c4", empty.categories)
    with pytest.raises(loop.FineTuningError, match="none of the 2 images of .* has a box to learn from"):
        loop.FineTuning(build(plan), plan, small_schedule(), {"what": "", "digest": ""}, empty, tmp_path, CPU, FP32)


def test_without_pycocotools_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(coco.CocoError, match="need the package pycocotools: pip install pycocotools"):
        coco.mask_tools()


# The command.


def command(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/finetune_detection.py"), *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip


def test_the_command_trains_goes_on_and_judges(scenes, exported, tmp_path):
    val = ("--val-json", scenes / "annotations_val.json", "--val-images", scenes / "val", "--out", tmp_path)
    train = (
        *val, "--train-json", scenes / "annotations.json", "--train-images", scenes / "train", "--arch", "maskrcnn-c4",
        "--weights", exported / "r18.pth", "--batch-size", 2, "--min-size", 64, "--test-size", 64, "--iterations", 2,
        "--log-every", 1, "--rois", 16, "--proposals", 24,
    )  # fmt: skip
    first = command(*train)
    assert first.returncode == 0, first.stderr
    assert "trunk: 120 of 120 tensors, r18.pth, the query encoder's trunk at step" in first.stdout
    assert "lr 0.0025 (0.02 is for 16 images)" in first.stdout and "from iteration 0" in first.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert tuple(results["bbox"]) == tuple(results["segm"]) == NAMES and results["iteration"] == 2
    assert (tmp_path / "samples.png").exists() and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    (tmp_path / "results.json").unlink()
    judged = command(*val, "--eval-only", "--samples", 0)
    assert judged.returncode == 0, judged.stderr
    assert json.loads((tmp_path / "results.json").read_text()) == results
    again = command(*train, "--seed", 1)
    assert again.returncode == 1
    assert again.stderr.startswith("finetune_detection.py: ") and "with another seed" in again.stderr


def test_the_command_says_in_one_sentence_what_is_wrong(scenes, tmp_path):
    val = ("--val-json", scenes / "annotations_val.json", "--val-images", scenes / "val", "--out", tmp_path)
    forgotten = command(*val, "--arch", "maskrcnn-fpn", "--train-json", "a", "--train-images", "b")
    assert forgotten.returncode == 1 and "Traceback" not in forgotten.stderr
    assert "--weights must be set to train; --weights takes a file of scripts/export.py, or the word random" in (
        forgotten.stderr
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"log_every": 0}, "--log-every must be at least 1. Found: 0"),
        ({"workers": -1}, "--workers must be at least 0. Found: -1"),
        ({"out": Path("/proc/none")}, "/proc/none cannot be written .*set another --out"),
    ],
)
def test_settings_and_outputs_are_tried_first(changed, words, tmp_path):
    """Before the files, none of which is there."""
    with pytest.raises(ValueError, match=words):
        finetune_detection.main(
            finetune_detection.DetectionConfig(
                **{
                    "val_json": tmp_path / "v", "val_images": tmp_path, "train_json": tmp_path / "t", "train_images": tmp_path,
                    "arch": "maskrcnn-fpn", "weights": "random", "out": tmp_path, **changed,
                }
            )
        )  # fmt: skip


def test_a_second_process_in_a_folder_is_refused(scenes, tmp_path):
    of_val = {"val_json": scenes / "annotations_val.json", "val_images": scenes / "val"}
    config = finetune_detection.DetectionConfig(
        **of_val, train_json=scenes / "annotations.json", train_images=scenes / "train", out=tmp_path,
        arch="maskrcnn-fpn", weights="random",
    )  # fmt: skip
    with (
        guard.only_process(tmp_path, "--out"),
        pytest.raises(ValueError, match=f"another process works in {tmp_path} .process {os.getpid()}.*another --out"),
    ):
        finetune_detection.main(config)


@pytest.mark.parametrize("arch", ARCHES)
def test_coco_mini_is_learnt_from_and_judged(arch, tmp_path):
    if not COCO_MINI.exists():
        pytest.skip(f"there is no {COCO_MINI}")
    masks = arch.startswith("mask")
    train, val = (
        coco.read_coco(COCO_MINI / f"annotations/instances_{name}.json", COCO_MINI / name, masks)
        for name in ("train2017", "val2017")
    )
    assert len(train.categories) == 80 and train.categories.ids[-1] == 90 and len(train.trainable()) == 47
    plan = design(arch, train.categories)
    about = {"what": "noise", "digest": "random"}
    schedule = small_schedule(iterations=2, short_sides=(96,))
    run = loop.FineTuning(build(plan), plan, schedule, about, train, tmp_path, CPU, FP32)
    run.train(log_every=1)
    few = val.part(range(4))
    run.model.roi_heads.score_thresh = 0.0
    numbers = evaluate(run.model, few, ("bbox", "segm") if masks else ("bbox",), CPU)
    assert all(tuple(found) == NAMES and 0 <= found["AP"] <= 100 for found in numbers.values())
    kind = "segm" if masks else "bbox"
    assert score(val, as_found(val, masks), kind)["AP"] == pytest.approx(100)
