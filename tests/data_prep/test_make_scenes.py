"""Scenes: what the annotations say is what the drawing shows, and image k stays image k."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.make_dali import pack_folder
from data_prep.make_scenes import MAX_CLASSES, class_names, draw_scene, make_scenes, run_lengths

ROOT = Path(__file__).resolve().parents[2]


def decode(segmentation):
    """A mask [H W] from COCO's uncompressed RLE, one pixel after the other."""
    height, width = segmentation["size"]
    mask = np.zeros((height, width), dtype=bool)
    position, value = 0, False
    for count in segmentation["counts"]:
        for _ in range(count):
            mask[position % height, position // height] = value
            position += 1
        value = not value
    assert position == height * width
    return mask


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", num_images=24, num_val=8, size=64)


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        ([[0, 1], [0, 1]], [2, 2]),
        ([[1, 0], [0, 0]], [0, 1, 3]),
        ([[1, 1], [1, 1]], [0, 4]),
        ([[0, 0, 1], [1, 0, 0]], [1, 1, 2, 1, 1]),
    ],
)
def test_run_lengths_by_hand(mask, counts):
    assert run_lengths(np.array(mask, dtype=bool)) == counts


@pytest.mark.parametrize(("split", "count"), [("train", 24), ("val", 8)])
def test_annotations_agree_with_masks_and_files(scenes, split, count):
    coco = json.loads((scenes / {"train": "annotations.json", "val": "annotations_val.json"}[split]).read_text())
    names = class_names(8)
    assert coco["categories"] == [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    assert sorted(path.name for path in (scenes / split).iterdir()) == names
    assert [image["id"] for image in coco["images"]] == list(range(count))
    assert len({annotation["id"] for annotation in coco["annotations"]}) == len(coco["annotations"])
    for image in coco["images"]:
        with Image.open(scenes / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            assert picture.mode == "RGB"
        own = [annotation for annotation in coco["annotations"] if annotation["image_id"] == image["id"]]
        assert 1 <= len(own) <= 5
        covered = np.zeros((image["height"], image["width"]), dtype=int)
        for annotation in own:
            mask = decode(annotation["segmentation"])
            covered += mask
            rows, columns = np.nonzero(mask)
            assert annotation["area"] == mask.sum() > 0
            x, y, width, height = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
            assert annotation["iscrowd"] == 0
        assert covered.max() == 1  # what is hidden is in no mask
        largest = max(own, key=lambda annotation: annotation["area"])
        assert image["file_name"] == f"{names[largest['category_id'] - 1]}/scene_{image['id']:06d}.jpg"


def test_masks_are_where_the_pixels_show_objects():
    """Objects have two colors each; take those away and only the smooth background is left."""
    scene = draw_scene(seed=0, split="train", number=3, num_classes=8, size=160)
    for mask in scene.masks:
        assert len(np.unique(scene.pixels[mask], axis=0)) <= 2
    background = ~scene.masks.any(axis=0)
    both = background[:, 1:] & background[:, :-1]
    steps = np.abs(np.diff(scene.pixels.astype(int), axis=1)).max(axis=-1)
    assert steps[both].max() < 30
    assert steps[~both].max() > 60


def test_the_main_object_is_the_one_asked_for_and_objects_hide_each_other():
    as_asked, touching = [], []
    for number in range(64):
        scene = draw_scene(seed=1, split="train", number=number, num_classes=8, size=96)
        as_asked.append(scene.main_class == number % 8)
        owner = np.tensordot(np.arange(1, len(scene.masks) + 1), scene.masks, axes=1)  # 0 is background
        left, right = owner[:, :-1], owner[:, 1:]
        touching.append(((left != right) & (left > 0) & (right > 0)).any())
    assert np.mean(as_asked) > 0.9
    assert 0.2 < np.mean(touching) < 1


def test_image_k_does_not_depend_on_how_many_are_made(scenes, tmp_path):
    fewer = make_scenes(tmp_path / "fewer", num_images=9, num_val=0, size=64)
    assert not (fewer / "val").exists()
    few, many = files_below(fewer / "train"), files_below(scenes / "train")
    assert len(few) == 9
    assert few.items() <= many.items()


def test_the_seed_decides_every_byte(scenes, tmp_path):
    again = make_scenes(tmp_path / "again", num_images=24, num_val=8, size=64)
    assert files_below(again) == files_below(scenes)
    other = make_scenes(tmp_path / "other", num_images=24, num_val=8, size=64, seed=1)
    assert files_below(other)["annotations.json"] != files_below(scenes)["annotations.json"]


def test_splits_show_different_images():
    train, val = (draw_scene(seed=0, split=split, number=0, num_classes=8, size=64) for split in ("train", "val"))
    assert train.pixels.shape != val.pixels.shape or (train.pixels != val.pixels).any()


def test_sizes_vary_around_the_one_asked_for():
    shapes = [draw_scene(seed=0, split="val", number=k, num_classes=2, size=100).pixels.shape for k in range(32)]
    sides = np.array(shapes)[:, :2]
    assert 80 <= sides.min() < 90
    assert 110 < sides.max() <= 125
    assert (sides[:, 0] != sides[:, 1]).mean() > 0.8


def test_every_class_is_another_pair_of_shape_and_texture():
    names = class_names(MAX_CLASSES)
    assert len(set(names)) == MAX_CLASSES == 32
    assert names == sorted(names)
    assert len({name.split("_")[0] for name in class_names(8)}) == 8
    for number, name in enumerate(names):
        scene = draw_scene(seed=0, split="train", number=number, num_classes=MAX_CLASSES, size=64)
        assert len(scene.masks) >= 1, name


def test_scenes_can_be_packed(scenes, tmp_path):
    index = pack_folder(scenes / "train", tmp_path / "shards")
    assert len(index) == 24
    assert list(index.class_names) == class_names(8)
    assert index.manifest.rejected == {}


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"is not an empty folder; remove it or give another --out\."):
        make_scenes(tmp_path, num_images=1)
    with pytest.raises(ValueError, match="is not an empty folder"):
        make_scenes(tmp_path / "mine.txt", num_images=1)
    (tmp_path / "empty").mkdir()
    make_scenes(tmp_path / "empty", num_images=1, num_val=0, size=32)


def test_settings_out_of_range_are_refused(tmp_path):
    for name, value in {"num_images": 0, "num_val": -1, "num_classes": 33, "size": 31, "seed": -1}.items():
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must .*Found: {value}"):
            make_scenes(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_the_command_draws_and_refuses_in_one_sentence(tmp_path):
    command = [sys.executable, str(ROOT / "data_prep/make_scenes.py"), "--out", str(tmp_path / "out")]
    command += ["--num-images", "2", "--num-val", "1", "--size", "32"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 3
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0 and "give another --out" in done.stderr


@pytest.mark.parametrize("existed", [False, True])
def test_scenes_that_find_no_room_leave_nothing(tmp_path, existed):
    """So that the same command can be run again."""
    out = tmp_path / "scenes"
    if existed:
        out.mkdir()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match="scenes"):
            make_scenes(out, num_images=40, num_val=0, size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert out.exists() == existed and not list(out.glob("*"))
