"""Detection without detectron2: against torchvision's own model, pycocotools' masks, closed forms, and every wrong use."""

import json
import os
import runpy
import signal
import sys
import threading
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
from inscon.transfer.detection import coco, loop
from inscon.transfer.detection.loop import NAMES, detections, evaluate, score
from inscon.transfer.detection.models import ARCHES, Design, Protocol, build, read_start
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
    "iterations": 6, "batch_size": 2, "base_lr": 0.08, "warmup": 0, "min_size": (64, 96), "max_size": 192, "rois": 16,
    "proposals": 4,
}  # fmt: skip


def design(data, arch="maskrcnn-fpn", **changed):
    about = {"backbone": "resnet18", "weights": "noise", "train_data": data.fingerprint, "categories": data.categories}
    return Design(arch=arch, **about | SMALL | changed)


class Tiny(torch.nn.Module):
    """Stands in for a detector where it doesn't matter what is learned; draws numbers as one does."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, images, targets):
        made = [self.norm(self.layer(image[None])) for image in images]
        return {"loss_a": sum((m - torch.rand(())).square().mean() for m in made), "loss_b": self.layer.bias.sum() ** 2}


class Stopped(Tiny):
    """Gets a signal in its second iteration, and again and again."""

    number, calls = signal.SIGTERM, 0

    def forward(self, images, targets):
        self.calls += 1
        if self.calls >= 2:
            os.kill(os.getpid(), self.number)
        return super().forward(images, targets)


def begin(scenes, folder, make=lambda plan: Tiny(), **changed):
    data = scene_set(scenes)
    torch.manual_seed(1)
    plan = design(data, **changed)
    return loop.FineTuning(make(plan), plan, data.learnable(), folder, FP32)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def first_batch(data, arch="maskrcnn-fpn"):
    (batch, *_) = loop.batches(data.learnable(), design(data, arch, iterations=1), 0, 1)
    return zip(*batch)


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
    polygons = [[3.0, 3.0, 20.0, 4.0, 18.0, 30.5], [30.0, 10.0, 40.0, 10.0, 40.0, 22.0, 30.0, 22.0]]
    for segmentation in (plain, text, polygons):
        about = {"id": 0, "image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 40], "segmentation": segmentation}
        Image.new("RGB", (width, height)).save(tmp_path / "0.png")
        contents = gapped(tmp_path) | {"annotations": [about]}
        contents["images"] = [{"id": 7, "file_name": "0.png", "height": height, "width": width}]
        data = coco.read_coco(write(tmp_path / "a.json", contents), tmp_path, True)
        (mask,) = data.target(data.images[0], True)["masks"].numpy()
        if segmentation is not polygons:
            assert np.array_equal(mask, drawn)
    assert mask[15, 35] == 1 and mask[5, 15] == 1 and mask[50, 50] == 0


def test_a_json_that_is_not_there_is_named_with_what_to_give(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ValueError, match=f"^there is no file {path}; give an instances json"):
            coco.read_coco(path, tmp_path, masks=True)


def test_scenes_are_read_as_they_were_drawn(scenes):
    data = scene_set(scenes)
    for number, image in enumerate(data.images):
        drawn = draw_scene(seed=0, split="train", number=number, num_classes=3, size=96)
        target = data.target(image, masks=True)
        assert np.array_equal(target["masks"].numpy().astype(bool), drawn.masks)
        assert target["labels"].tolist() == (drawn.classes + 1).tolist()
        y, x = np.nonzero(drawn.masks[0])
        assert target["boxes"][0].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        pixels = data.pixels(image)
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
    target = data.target(data.images[0], masks=True)
    assert target["labels"].tolist() == [3, 1]  # no crowd, nothing without an area
    assert target["boxes"].tolist() == [[5, 5, 15, 15], [30, 20, 40, 30]]  # cut at the border
    assert data.learnable().images == [data.images[0]]
    found = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(2)}
    back = detections(found, 7, list(data.categories))
    assert [entry["category_id"] for entry in back] == [90, 1] and back[0]["bbox"] == [5, 5, 10, 10]


def test_what_has_no_area_is_left_out_of_training(tmp_path):
    contents = gapped(tmp_path)
    first = contents["annotations"][0]
    thin = {"bbox": [20, 5, 1e-7, 10]}, {"bbox": [60, 5, 10, 10]}, {"bbox": [-20, 5, 20, 10]}
    for number, changed in enumerate(thin):
        contents["annotations"].append(first | {"id": 10 + number} | changed)
    first["segmentation"] = [*first["segmentation"], [5, 5, 9, 9]]  # a line beside a polygon
    for annotation in contents["annotations"][3:]:
        annotation.pop("iscrowd", None)
    data = coco.read_coco(write(tmp_path / "a.json", contents), tmp_path, masks=True)
    assert [entry["id"] for entry, _ in data.objects(data.images[0])] == [1, 4]  # numbered from 1
    assert data.target(data.images[0], True)["masks"][0].sum() == 100
    model = build(design(data, "fasterrcnn-fpn")).train()
    losses = model(*first_batch(data, "fasterrcnn-fpn"))  # torchvision asserts areas
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
    assert np.array_equal((data.pixels(data.images[0]) * 255).byte().permute(1, 2, 0).numpy(), seen)
    if orientation > 4:
        data = coco.read_coco(write(tmp_path / "plain.json", contents), tmp_path, False)
        with pytest.raises(
            ValueError, match=r"has \(40, 30\) px, height and width, turned as EXIF says, and in .* \(30, 40\); use"
        ):
            data.pixels(data.images[0])
        Image.fromarray(pixels).save(tmp_path / "0.png")
        assert data.pixels(data.images[0]).shape == (3, 30, 40)


def test_16_bit_pictures_are_scaled(tmp_path):
    contents = gapped(tmp_path)
    levels = np.linspace(0, 65_535, 1200).reshape(30, 40).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "0.png")
    data = coco.read_coco(write(tmp_path / "a.json", contents), tmp_path, False)
    pixels = data.pixels(data.images[0])
    assert (pixels - torch.from_numpy(levels / 65_535)).abs().max() < 1 / 250


def test_a_flip_turns_boxes_with_their_masks(scenes):
    data = scene_set(scenes)
    image, target = data.pixels(data.images[0]), data.target(data.images[0], masks=True)
    turned, flipped = loop.flip(image, target)
    assert torch.equal(turned[:, :, 0], image[:, :, -1])
    for box, mask in zip(flipped["boxes"], flipped["masks"]):
        y, x = torch.nonzero(mask, as_tuple=True)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    again = loop.flip(turned, flipped)
    assert torch.equal(again[0], image) and torch.equal(again[1]["boxes"], target["boxes"])


def test_draws_depend_on_the_seed_alone_and_every_epoch_shows_all():
    drawn = [draw for _, draw in zip(range(40), loop.draws(3, 10))]
    assert drawn == [draw for _, draw in zip(range(40), loop.draws(3, 10))]
    assert drawn != [draw for _, draw in zip(range(40), loop.draws(4, 10))]
    orders = [[position for position, _ in drawn[at : at + 10]] for at in range(0, 40, 10)]
    assert all(sorted(order) == list(range(10)) for order in orders) and orders[0] != orders[1]
    assert {flipped for _, flipped in drawn} == {True, False}


def test_batches_go_on_anywhere_and_any_number_of_threads_makes_the_same(scenes):
    data = scene_set(scenes).learnable()
    whole = list(loop.batches(data, design(data, iterations=5), 0, 1))
    rest = list(loop.batches(data, design(data, iterations=5), 3, 3))
    assert (len(whole), len(rest)) == (5, 2)
    for ones, others in zip(whole[3:], rest):
        for (image, target), (again, same) in zip(ones, others, strict=True):
            assert torch.equal(image, again) and all(torch.equal(target[name], same[name]) for name in target)


def test_threads_work_ahead_in_order_and_their_errors_arrive(tmp_path):
    release = threading.Event()
    made = loop.ahead(lambda one: release.set() if one == 2 else release.wait(10) and one, [0, 1, 2], 3)
    assert list(made) == [0, 1, None]  # the first two wait for the third
    contents = gapped(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no picture")
    data = coco.read_coco(write(tmp_path / "a.json", contents), tmp_path, True)
    with pytest.raises(ValueError, match=f"{tmp_path}/0.png: not a picture.*; copy it again, or take image 7 out"):
        next(loop.batches(data.learnable(), design(data), 0, 2))


def test_sizes_are_drawn_from_the_generator_and_judged_at_the_last(scenes):
    data = scene_set(scenes)
    model = build(design(data)).train()
    image, target = data.pixels(data.images[0]), data.target(data.images[0], masks=True)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        _, (after,) = model.transform([image], [target])
        seen.add(min(after["masks"].shape[1:]))
    assert seen == {64, 96}
    for box, mask in zip(after["boxes"], after["masks"]):
        y, x = torch.nonzero(mask, as_tuple=True)
        assert (box - torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])).abs().max() <= 1.5
    assert min(model.eval().transform([image])[0].image_sizes[0]) == 96


# The detectors.


OF_COCO = coco.CocoSet(Path("a"), Path("b"), [], COCO(), dict(enumerate(map(str, range(80)), 1)), "")


def test_the_fpn_detector_is_torchvisions():
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=81)
        ours = build(design(OF_COCO, backbone="resnet50"), device="meta")
    shapes = [{n.replace("body.network.", "body."): v.shape for n, v in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1] and all(p.requires_grad for p in ours.parameters())
    assert repr(ours.backbone.fpn) == repr(theirs.backbone.fpn)
    by_number = repr(ours.roi_heads).replace("(4, 8, 16, 32)", "['0', '1', '2', '3']")
    assert repr(ours.rpn) == repr(theirs.rpn) and by_number == repr(theirs.roi_heads)
    assert repr(ours.transform).replace("(64, 96)", "(800,)").replace("192", "1333") == repr(theirs.transform)


@pytest.mark.parametrize(
    ("arch", "backbone"),
    [("maskrcnn-fpn", "resnet18"), ("fasterrcnn-fpn", "resnet18"), ("maskrcnn-fpn", "convnext_atto")],
)
def test_forward_and_backward_reach_every_weight(arch, backbone, scenes):
    data, masks = scene_set(scenes), arch.startswith("mask")
    model = build(design(data, arch, backbone=backbone)).train()
    torch.manual_seed(0)
    losses = model(*first_batch(data, arch))
    assert ("loss_mask" in losses) == masks and len(losses) == 4 + masks
    sum(losses.values()).backward()
    unreached = {"resnet18": [], "convnext_atto": ["backbone.body.network.head.norm"]}[backbone]
    assert {n.rpartition(".")[0] for n, p in model.named_parameters() if p.grad is None} == set(unreached)
    image = data.pixels(data.images[0])
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
        ("vit_tiny_patch16_224", r"maps of strides \(4, 8, 16, 32\). Found: \(16,\); give another --backbone"),
        ("maxvit_tiny_tf_224", "maxvit_tiny_tf_224 takes no .* of this size. Found: 96 px.*give another --backbone, or --w"),
        ("resnet19", "there is no backbone resnet19"),
    ],
)  # fmt: skip
def test_backbones_that_no_detector_takes_are_refused(backbone, words):
    with pytest.raises(ValueError, match=words):
        design(OF_COCO, backbone=backbone)


def test_boxes_stay_float32_in_mixed_precision(scenes):
    data = scene_set(scenes)
    model = build(design(data, "fasterrcnn-fpn", min_size=(32,))).eval()
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 2  # bfloat16 is slow on most CPUs
    seen = {}
    model.rpn.register_forward_hook(lambda module, given, made: seen.update(boxes=made[0][0]))
    model.rpn.anchor_generator.register_forward_hook(lambda module, given, made: seen.update(anchors=made[0]))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        (made,) = model([data.pixels(data.images[0])])
    assert {seen["boxes"].dtype, seen["anchors"].dtype, made["boxes"].dtype, made["scores"].dtype} == {torch.float32}


# Weights.


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run"))
    for name, form in (("r18.pth", "torchvision"), ("r18.pkl", "detectron2")):
        export.export(folder, form, folder / name)
    return folder


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_the_backbone_in_the_detector_is_the_files(name, exported, tmp_path):
    file = exported / "r18.pth"
    if name != "resnet18":
        file = tmp_path / "a.pth"
        export.export(make_run(tmp_path, name), "timm", file)
    backbone, held, what = read_start(str(file))
    network = build(design(OF_COCO, backbone=held), backbone).backbone.body.network
    tensors, _ = export.read(file)
    assert held == name and what.startswith(f"the backbone of step 7, {len(tensors)} tensors of {name}, checksum ")
    assert all(torch.equal(value, tensors[n]) for n, value in network.state_dict().items())


def test_a_run_and_files_for_other_libraries_are_taken_as_well(exported):
    assert len({read_start(str(source))[2] for source in (exported, exported / "r18.pth", exported / "r18.pkl")}) == 1


def test_torchvisions_weights_are_taken_without_their_classifier(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(theirs.state_dict(), tmp_path / "hub/checkpoints/resnet18-f37072fd.pth")
    backbone, name, what = read_start("torchvision", "resnet18")
    assert name == "resnet18" and what.startswith("torchvision's supervised weights, 120 tensors")
    assert torch.equal(backbone.network.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    with pytest.raises(ValueError, match="torchvision has no convnext_atto; set --backbone to one of .*resnet50"):
        read_start("torchvision", "convnext_atto")


def test_noise_is_for_those_who_ask():
    _, name, what = read_start("random", "resnet18")
    assert name == "resnet18" and what == "noise"
    torch.manual_seed(0)
    assert read_start("random")[1] == "resnet50"


def test_wrong_weights_are_refused(tmp_path, exported, scenes):
    begin(scenes, tmp_path / "d", iterations=1, arch="fasterrcnn-fpn").train()
    (tmp_path / "text.pth").write_text("no weights")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "other.pth")
    refused = {
        (tmp_path / "text.pth", None): "is no export of this program .*write one with scripts/export.py",
        (tmp_path / "other.pth", None): "is no export of this program .*write one with scripts/export.py",
        (tmp_path / "gone.pth", None): "there is no file .*gone.pth",
        (tmp_path, None): "there is no checkpoint at",
        (tmp_path / "d", None): "is a detector of scripts/finetune_detection.py.*run folder of a scripts/train.py",
        (exported / "r18.pth", "resnet50"): "holds a resnet18. Found: --backbone resnet50; leave it out",
    }
    for (source, backbone), words in refused.items():
        with pytest.raises(ValueError, match=words):
            read_start(str(source), backbone)
    with pytest.raises(ValueError, match="is a detector of scripts/finetune_detection.py"):
        export.any_backbone(tmp_path / "d")
    with pytest.raises(ValueError, match="is no detector that this version fine-tuned; set another --out"):
        begin(scenes, exported)
    with pytest.raises(ValueError, match="is no detector that this version fine-tuned; set another --out"):
        loop.load_detector(exported)


# AP.


def as_found(data, masks):
    """The truth as a detector's output."""
    found = []
    for image in (image for image in data.images if data.objects(image)):
        target = data.target(image, masks)
        made = target | {"scores": torch.ones(len(target["labels"]))}
        if masks:
            made["masks"] = made["masks"][:, None].float()
        found += detections(made, image["id"], list(data.categories))
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
    image, other = data.images[:2]
    (entry, _), *_ = data.objects(image)
    data.truth.dataset["annotations"] = [entry, entry | {"id": 99, "image_id": other["id"]}]
    data.truth.createIndex()
    found = {"image_id": image["id"], "category_id": entry["category_id"], "bbox": entry["bbox"], "score": 1.0}
    numbers = score(replace(data, images=[image, other]), [found], "bbox")
    assert numbers["AR100"] == pytest.approx(50)
    assert numbers["AP"] == pytest.approx(100 * 51 / 101)  # precision 1 at the 51 recalls 0, .01, ... .5


# The loop.


def test_the_learning_rate():
    protocol = Protocol(batch_size=8)
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
    run = begin(scenes, tmp_path, build, iterations=8, min_size=(64,))
    run.train(checkpoint_every=100, log_every=1)
    lines = lines_of(tmp_path)
    assert sum(line["loss"] for line in lines[-2:]) < 0.9 * sum(line["loss"] for line in lines[:2]), lines
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"loss_mask", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} < set(lines[0])
    model, plan, step = loop.load_detector(tmp_path)
    assert plan == run.design and step == 8
    data = scene_set(scenes, "val")
    for detector in (model, run.model.eval()):
        detector.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        (one,), (other,) = model([data.pixels(data.images[0])]), run.model([data.pixels(data.images[0])])
    assert all(torch.equal(one[name], other[name]) for name in one)
    numbers = evaluate(model, data, ("bbox", "segm"))
    assert set(numbers) == {"bbox", "segm"} and all(0 <= numbers[k]["AP"] <= 100 for k in numbers)
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        loop.load_detector(tmp_path / "elsewhere")


def test_a_stopped_run_goes_on_as_if_undisturbed(scenes, tmp_path):
    changed = {"iterations": 3, "arch": "fasterrcnn-fpn", "min_size": (64,)}
    whole = begin(scenes, tmp_path / "whole", **changed)
    whole.train(log_every=1)
    assert begin(scenes, tmp_path / "parts", lambda plan: Stopped(), **changed).train(log_every=1) == "SIGTERM"
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 0}\n{"ste')  # of iterations after the checkpoint
    torch.rand(7)
    again = begin(scenes, tmp_path / "parts", **changed)
    assert again.iteration == 2
    again.train(log_every=1)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    times = {"images_per_s": 0, "step_s": 0, "data_wait_percent": 0}
    ones, others = ([line | times for line in lines_of(tmp_path / part)] for part in ("whole", "parts"))
    assert ones == others and len(ones) == 3
    assert len(list((tmp_path / "parts/checkpoints").iterdir())) == 2
    with pytest.raises(ValueError, match="has another base_lr and seed; set another --out"):
        begin(scenes, tmp_path / "parts", **changed, seed=1, base_lr=0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_iteration_end(number, scenes, tmp_path):
    stopped = begin(scenes, tmp_path, lambda plan: Stopped(), iterations=3, arch="fasterrcnn-fpn", min_size=(64,))
    stopped.model.number = number
    assert stopped.train() == number.name
    assert stopped.iteration == 2 and (tmp_path / "checkpoints/step-00000002.pt").exists()


def test_what_cannot_be_written_is_named(scenes, tmp_path, small_files):
    run = begin(scenes, tmp_path, iterations=1, arch="fasterrcnn-fpn")
    with small_files(0), pytest.raises(OSError, match=r"File too large: '.*/metrics.jsonl'"):
        run.train()


def test_what_is_not_finite_is_not_saved(scenes, tmp_path):
    run = begin(scenes, tmp_path, arch="fasterrcnn-fpn", iterations=1)
    with torch.no_grad():
        run.model.layer.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite any more. Found: loss_a nan, loss_b nan at iteration 0"):
        run.train()
    run = begin(scenes, tmp_path, arch="fasterrcnn-fpn", iterations=1)
    run.model.norm.running_mean.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="model.norm.running_mean is not finite"):
        run.train()
    assert not (tmp_path / "checkpoints").exists() or not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"iterations": 0}, "--iterations must be at least 1. Found: 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1. Found: 0"),
        ({"base_lr": 0.0}, "--base-lr must be at least .* Found: 0.0"),
        ({"min_size": ()}, r"--min-size must be at least 32. Found: \(\)"),
        ({"min_size": (8,)}, r"--min-size must be at least 32. Found: \(8,\)"),
        ({"rois": 3}, "--rois must be at least 4. Found: 3"),
        ({"proposals": 0}, "--proposals must be at least 1. Found: 0"),
    ],
)
def test_wrong_protocols_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        Protocol(**changed)


# Wrong data.


def refused(path, contents, masks=True, folder=None):
    """What is said of a json of these contents."""
    path.write_bytes(contents if isinstance(contents, bytes) else json.dumps(contents).encode())
    with pytest.raises(ValueError) as caught:
        coco.read_coco(path, folder or path.parent, masks)
    return str(caught.value)


FIRST, LAST = ("annotations", 0), ("annotations", 4)
MASK = "annotation 0 is neither polygons x1 y1 x2 y2 x3 y3 ... nor an RLE of its image"
RLE = {"size": [30, 40]}


@pytest.mark.parametrize(
    ("place", "changed", "words"),
    [
        ((*FIRST, "bbox"), None, "Expected `array`, got `null` - at `$.annotations[0].bbox`; correct"),
        ((*FIRST, "bbox"), ..., "Object missing required field `bbox` - at `$.annotations[0]`"),
        ((*FIRST, "bbox"), [5, 5, 10], "Expected `array` of length 4"),
        ((*FIRST, "bbox"), [5, 5, "10", 10], "Expected `float`, got `str` - at `$.annotations[0].bbox[2]`"),
        ((*FIRST, "bbox"), [15, 5, -10, 10], "Expected `float` >= 0.0 - at `$.annotations[0].bbox[2]`"),
        ((*FIRST, "bbox"), [5, 5, float("nan"), 10], "JSON is malformed: invalid character (byte "),
        ((*FIRST, "bbox"), [5, 5, 10**400, 10], "Number out of range - at `$.annotations[0].bbox[2]`"),
        ((*LAST, "bbox"), [5, 5, 1e9, 10], "`$.annotations[4].bbox[2]`"),
        ((*FIRST, "area"), -1, "Expected `float` >= 0.0 - at `$.annotations[0].area`"),
        ((*FIRST, "iscrowd"), "0", "Expected `bool | int`, got `str` - at `$.annotations[0].iscrowd`"),
        ((*FIRST, "iscrowd"), 2, "Invalid enum value 2 - at `$.annotations[0].iscrowd`"),
        ((*FIRST, "image_id"), "7", "Expected `int`, got `str` - at `$.annotations[0].image_id`"),
        ((*FIRST, "image_id"), 6, "annotation 0 has image_id 6 and category_id 90, and one of them is not there; correct"),
        ((*FIRST, "category_id"), 2, "annotation 0 has image_id 7 and category_id 2, and one of them is not there"),
        ((*FIRST, "category_id"), True, "Expected `int`, got `bool` - at `$.annotations[0].category_id`"),
        ((*FIRST, "id"), 3, "annotation 3 of image 7 is there twice"),
        ((*FIRST, "segmentation"), ..., "`segmentation` - at `$.annotations[0]`; .* --arch fasterrcnn-fpn learns without segm"),
        ((*FIRST, "segmentation"), [], "Expected `array` of length >= 1 - at `$.annotations[0].segmentation`"),
        ((*FIRST, "segmentation"), "abc", "Expected `object | array`, got `str` - at `$.annotations[0].segmentation`"),
        ((*FIRST, "segmentation"), [5, 5, 15, 5, 15, 15], "Expected `array`, got `int`"),
        ((*FIRST, "segmentation"), [[5, 5], [15, 5], [15, 15]], f"[[5.0, 5.0], [15.0, 5.0], [15.0, 15.0]] of {MASK}"),
        ((*FIRST, "segmentation"), [[[5, 5], [15, 5], [15, 15]]], "Expected `float`, got `array`"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 15]], MASK),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, 15, 5]], MASK),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, None]], "Expected `float`, got `null`"),
        ((*FIRST, "segmentation"), [[5, 5, 15, 5, 15, 1e9]], "Expected `float` < 1000000.0"),
        ((*FIRST, "segmentation"), {"counts": [1200]}, "Object missing required field `size`"),
        ((*FIRST, "segmentation"), {"size": [40, 30], "counts": [1200]}, f"Rle(size=[40, 30], counts=[1200]) of {MASK}"),
        ((*FIRST, "segmentation"), RLE | {"counts": [100, 5]}, MASK),
        ((*FIRST, "segmentation"), RLE | {"counts": [1200, 1]}, MASK),
        ((*FIRST, "segmentation"), RLE | {"counts": []}, MASK),
        ((*FIRST, "segmentation"), RLE | {"counts": [1300, -100]}, "Expected `int` >= 0"),
        ((*FIRST, "segmentation"), RLE | {"counts": "k36h000000m"}, MASK),
        ((*FIRST, "segmentation"), RLE | {"counts": "52203"}, MASK),
        ((*FIRST, "segmentation"), RLE | {"counts": "zz é"}, MASK),
        ((*FIRST, "segmentation"), RLE | {"counts": ""}, MASK),
        ((*FIRST, "segmentation"), RLE | {"counts": None}, "Expected `str | array`, got `null`"),
        (("images", 0, "width"), ..., "Object missing required field `width` - at `$.images[0]`"),
        (("images", 0, "height"), 0, "Expected `int` >= 1 - at `$.images[0].height`"),
        (("images", 0, "width"), "40", "Expected `int`, got `str` - at `$.images[0].width`"),
        (("images", 1, "id"), "8", "Expected `int`, got `str` - at `$.images[1].id`"),
        (("images", 1, "id"), 7, "image 7 is there twice"),
        (("images", 1, "file_name"), "0.png", "picture 0.png is there twice"),
        (("images", 1, "file_name"), "gone.png", "1 of the 3 pictures are not there, the first is"),
        (("images", 1), 5, "Expected `object`, got `int` - at `$.images[1]`"),
        (("images",), [], "Expected `array` of length >= 1 - at `$.images`"),
        (("annotations",), {"0": 1}, "Expected `array`, got `object` - at `$.annotations`"),
        (("categories", 0, "name"), ..., "Object missing required field `name` - at `$.categories[0]`"),
        (("categories", 1, "id"), 3, "category 3 is there twice"),
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
    said = refused(tmp_path / "a.json", contents)
    assert (
        said.startswith(f"{tmp_path}/a.json") and all(part in said for part in words.split(" .*")) and "correct" in said
    )


def test_json_of_another_kind_is_refused(tmp_path):
    good = gapped(tmp_path)
    segments = [{"image_id": 7, "category_id": 1, "file_name": "0.png", "segments_info": []}]
    kinds = {
        "Expected `object`, got `array`": [{"image_id": 7, "category_id": 1, "bbox": [1, 1, 2, 2]}],
        "missing required field `id` - at `$.annotations[0]`": good | {"annotations": segments},
        "missing required field `annotations`": {name: good[name] for name in ("images", "categories")},
        "truncated": json.dumps(good).encode()[:-40],
        "malformed": b"<annotation/>",
        "is no json": '{"images": "\u00e9"}'.encode("latin-1"),
        "": b"[" * 100_000,
    }
    for words, contents in kinds.items():
        said = refused(tmp_path / "a.json", contents, masks=False)
        assert words in said and "give an instances json such as instances_val2017.json (VOC" in said


def test_boxes_need_no_masks_and_what_real_sets_hold_is_no_error(tmp_path):
    contents = gapped(tmp_path)
    for number, annotation in enumerate(contents["annotations"]):
        annotation |= {"segmentation": ["", None, [], [5], {}][number], "iscrowd": bool(number % 2), "keypoints": []}
        annotation["area"] = None
    data = coco.read_coco(write(tmp_path / "a.json", contents | {"info": None}), tmp_path, masks=False)
    assert len(data.truth.anns) == 5


def test_missing_pictures_are_counted_in_every_folder(tmp_path):
    contents = gapped(tmp_path)
    (tmp_path / "sub").mkdir()
    names = ("sub/0.png", "elsewhere/1.png", "sub//./2.png")
    for image, name in zip(contents["images"], names, strict=True):
        image["file_name"] = name
    (tmp_path / "0.png").rename(tmp_path / "sub/0.png")
    (tmp_path / "sub/2.png").symlink_to(tmp_path / "gone.png")
    assert f"2 of the 3 pictures are not there, the first is {tmp_path}/elsewhere/1.png" in refused(
        tmp_path / "a.json", contents
    )
    (tmp_path / "gone.png").write_bytes(b"")
    assert "1 of the 3 pictures" in refused(tmp_path / "a.json", contents)


def test_other_categories_are_refused(scenes):
    train, val = (scenes / "annotations.json", scenes / "train"), (scenes / "annotations_val.json", scenes / "val")
    held = coco.read_coco(*train, False).categories
    assert coco.read_coco(*val, False, held).categories == held
    other = dict(zip((1, 2, 4), held.values()))
    with pytest.raises(ValueError, match=r"categories of the training. Found: 3 \(.*\), which is not in both"):
        coco.read_coco(*val, False, other)


def test_a_set_without_boxes_is_refused(scenes, tmp_path):
    contents = json.loads((scenes / "annotations.json").read_text()) | {"annotations": []}
    empty = coco.read_coco(write(tmp_path / "a.json", contents), scenes / "train", False)
    with pytest.raises(ValueError, match="a.json has no box to learn from in 2 images; give another json"):
        empty.learnable()


@pytest.mark.parametrize("package", ["pycocotools", "msgspec"])
def test_a_missing_package_is_named(package, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("inscon.transfer.detection", package))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"finetune_detection.py needs the package {package}: pip install"):
        runpy.run_path(str(ROOT / "scripts/finetune_detection.py"))


# The command.


def config_of(scenes, out, **changed):
    """Of the command, for the small scenes."""
    return finetune_detection.DetectionConfig(
        **SMALL | {
            "val_json": scenes / "annotations_val.json", "val_images": scenes / "val", "train_json": scenes / "annotations.json",
            "train_images": scenes / "train", "out": out, "arch": "maskrcnn-fpn", "weights": "random", "iterations": 2,
            "min_size": (64,), "base_lr": 0.02, "log_every": 1,
        } | changed
    )  # fmt: skip


def test_the_command_trains_goes_on_and_judges(scenes, exported, tmp_path, capsys):
    config = config_of(scenes, tmp_path, weights=str(exported / "r18.pth"))
    finetune_detection.main(config)
    said = capsys.readouterr().out
    assert "maskrcnn-fpn from the backbone of step 7, 120 tensors of resnet18" in said and "from iteration 0" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert tuple(results["bbox"]) == tuple(results["segm"]) == NAMES and results["iteration"] == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    (tmp_path / "results.json").unlink()
    finetune_detection.main(replace(config, eval_only=True, arch=None, train_json=None, weights=None))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    with pytest.raises(ValueError, match="has another seed; set another --out"):
        finetune_detection.main(replace(config, seed=1))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"log_every": 0}, "--log-every must be at least 1. Found: 0"),
        ({"workers": 0}, "--workers must be at least 1. Found: 0"),
        ({"out": Path("/proc/none")}, "/proc/none cannot be written .*set another --out"),
        ({"weights": None}, "training needs --arch, .* and --weights .random starts from noise"),
    ],
)
def test_settings_and_outputs_are_tried_first(changed, words, tmp_path):
    """Before the files, none of which is there."""
    with pytest.raises(ValueError, match=words):
        finetune_detection.main(config_of(tmp_path, **{"out": tmp_path / "out", **changed}))
    assert not any(tmp_path.iterdir())


def test_a_diverged_training_says_what_to_set(scenes, tmp_path):
    with pytest.raises(ValueError, match="not finite.*; set a smaller --base-lr than 1e.30 and another --out"):
        finetune_detection.main(config_of(scenes, tmp_path, arch="fasterrcnn-fpn", backbone="resnet18", base_lr=1e30))


def test_a_second_process_in_a_folder_is_refused(scenes, tmp_path):
    with (
        guard.only_process(tmp_path, "--out"),
        pytest.raises(ValueError, match=f"another process works in {tmp_path} .process {os.getpid()}.*another --out"),
    ):
        finetune_detection.main(config_of(scenes, tmp_path))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_backbone_stays_as_it_is_and_the_rest_learns(scenes, tmp_path, frozen):
    plan = {"arch": "fasterrcnn-fpn", "backbone": "test_resnet", "min_size": (64,), "frozen": frozen}
    run = begin(scenes, tmp_path, build, iterations=1, **plan)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train(workers=1)
    moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    of_backbone = {name for name in before if name.startswith("backbone.body.")}
    assert any(name.startswith("backbone.fpn.") for name in moved)
    assert not moved & of_backbone if frozen else len(moved & of_backbone) > len(of_backbone) / 2


def test_a_detector_of_before_there_were_frozen_ones_is_read(scenes, tmp_path):
    run = begin(scenes, tmp_path, iterations=1)
    run.train()
    path = tmp_path / "checkpoints/step-00000001.pt"
    held = torch.load(path)
    assert held["design"].pop("frozen") is False
    torch.save(held, path)
    assert begin(scenes, tmp_path, iterations=1).iteration == 1


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
    assert len(train.categories) == 80 and max(train.categories) == 90 and len(train.learnable().images) == 47
    plan = design(train, arch, iterations=2, min_size=(96,))
    run = loop.FineTuning(build(plan), plan, train.learnable(), tmp_path, FP32)
    run.train(log_every=1)
    few = replace(val, images=val.images[:4])
    run.model.roi_heads.score_thresh = 0.0
    numbers = evaluate(run.model, few, ("bbox", "segm") if masks else ("bbox",))
    assert all(tuple(found) == NAMES and 0 <= found["AP"] <= 100 for found in numbers.values())
    kind = "segm" if masks else "bbox"
    assert score(val, as_found(val, masks), kind)["AP"] == pytest.approx(100)
