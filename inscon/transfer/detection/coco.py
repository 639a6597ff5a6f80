"""A data set in COCO's format: read, checked before anything starts, and turned into pixels, boxes and masks.

COCO's own files, those of data_prep/make_scenes.py and any other json with `images`, `annotations` and `categories`.
Category ids may have gaps (COCO's 80 lie in 1..90): labels are 1..K in the order of the ids, and 0 is the background.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from data_prep.pictures import BadPicture, read_picture
from inscon.transfer.detection.schema import CocoError, check, read_json

LEAST_SIDE = 0.1
"""Of a box to learn from, px. What is less may have no area after resizing, in float32."""


Categories = dict[int, str]
"""COCO's ids and names of K categories, in the order of the ids; labels 1..K are their places."""


@dataclass(frozen=True)
class CocoSet:
    """Images of a folder and what a json says about them."""

    json: Path
    folder: Path
    images: tuple[dict, ...]
    """As in the file: `id`, `file_name`, `height` and `width` in px."""
    annotations: tuple[tuple[dict, ...], ...]
    """Of each image, crowds included: what AP counts."""
    objects: tuple[tuple[dict, ...], ...]
    """Of each image, those to learn from: no crowds, boxes with sides inside the image."""
    categories: Categories
    fingerprint: str
    """Checksum of the json."""
    left_out: str = ""
    """How many annotations that are no crowds are none of the objects, in a sentence; empty: none."""

    def __len__(self) -> int:
        return len(self.images)

    def part(self, positions: Sequence[int]) -> "CocoSet":
        """Some of the images, in this order, and all about them."""
        images, annotations, objects = (
            tuple(held[position] for position in positions) for held in (self.images, self.annotations, self.objects)
        )
        return replace(self, images=images, annotations=annotations, objects=objects)

    def trainable(self) -> tuple[int, ...]:
        """Positions of the images with something to learn."""
        return tuple(position for position, objects in enumerate(self.objects) if objects)

    def pixels(self, position: int) -> Tensor:
        """[3 H W] float32 in 0..1, RGB, turned as EXIF says. Raises CocoError for no picture, or one of another size."""
        image = self.images[position]
        path = self.folder / image["file_name"]
        try:
            pixels = np.array(read_picture(path))
        except BadPicture as bad:
            raise CocoError(f"{bad}; copy it again, or take image {image['id']} out of {self.json.name}") from None
        height, width = pixels.shape[:2]
        if (height, width) != (image["height"], image["width"]):
            remedy = "use the pictures the json was made for"
            if (width, height) == (image["height"], image["width"]) and _is_turned(path):
                remedy = (
                    "its EXIF data turn it: write sizes and boxes for the turned picture, or save it without EXIF data"
                )
            raise CocoError(
                f"{path} is {width} x {height} px where {self.json.name} says {image['width']} x {image['height']}; {remedy}"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255

    def target(self, position: int, masks: bool) -> dict[str, Tensor]:
        """`boxes` [n 4] x0 y0 x1 y1 in px, float32; `labels` [n] in 1..K; with `masks`, `masks` [n H W] uint8 0 or 1."""
        image, objects = self.images[position], self.objects[position]
        labels = [list(self.categories).index(a["category_id"]) + 1 for a in objects]
        target = {
            "boxes": torch.tensor([_clipped(a["bbox"], image) for a in objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        if masks:
            size = (image["height"], image["width"])
            drawn = [decode_mask(a["segmentation"], *size) for a in objects]
            target["masks"] = torch.from_numpy(np.stack(drawn) if drawn else np.zeros((0, *size), np.uint8))
        return target


def mask_tools():
    """pycocotools.mask, or a CocoError that says how to get it."""
    try:
        from pycocotools import mask
    except ImportError:
        raise CocoError("masks and AP need the package pycocotools: pip install pycocotools") from None
    return mask


def decode_mask(segmentation: list | dict, height: int, width: int) -> NDArray[np.uint8]:
    """[H W] 0 or 1, of polygons, an uncompressed RLE (counts are a list) or a compressed one (a string)."""
    tools = mask_tools()
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return tools.decode(segmentation)
    coded = tools.frPyObjects(segmentation, height, width)
    return tools.decode(tools.merge(coded) if isinstance(coded, list) else coded)


def read_coco(path: Path, folder: Path, masks: bool) -> CocoSet:
    """Read and check a json and its folder of pictures. `masks`: every object must have one.

    Raises CocoError: no such file, VOC, other contents, a field that can't be used, pictures that are not there.
    """
    path, folder = Path(path), Path(folder)
    contents, fingerprint = read_json(path)
    check(path, contents, masks)
    images = {image["id"]: image for image in contents["images"]}
    _check_pictures(path, folder, contents["images"])
    of_image, objects, flat = {key: [] for key in images}, {key: [] for key in images}, []
    for annotation in contents["annotations"]:
        key = annotation["image_id"]
        of_image[key].append(annotation)
        x0, y0, x1, y1 = _clipped(annotation["bbox"], images[key])
        if not annotation.get("iscrowd", 0):
            (objects[key] if min(x1 - x0, y1 - y0) >= LEAST_SIDE else flat).append(annotation)
    left_out = (
        f"{path.name}: {len(flat)} of {len(contents['annotations'])} annotations are left out of training, with a side below "
        f"{LEAST_SIDE} px inside the image; the first is annotation {flat[0].get('id', 'without id')}"
        if flat
        else ""
    )
    categories = dict(sorted((category["id"], category["name"]) for category in contents["categories"]))
    return CocoSet(
        path, folder, tuple(images.values()), tuple(map(tuple, of_image.values())), tuple(map(tuple, objects.values())),
        categories, fingerprint, left_out,
    )  # fmt: skip


def check_same_categories(ours: Categories, theirs: Categories, ours_from: str, theirs_from: str) -> None:
    """CocoError if two sets number or name their categories differently."""
    if ours == theirs:
        return
    different = min(ours.items() ^ theirs.items())
    raise CocoError(
        f"the categories must be the same. Found: {len(ours)} in {ours_from}, {len(theirs)} in {theirs_from}, and "
        f"{different[0]} ({different[1]}) is not in both; write both with one list of categories"
    )


def _check_pictures(path: Path, folder: Path, images: list[dict]) -> None:
    """By one listing of each folder: a question for each of 118,000 files takes minutes on a network file system."""
    held: dict[str, set[str]] = {}
    missing = []
    for image in images:
        place, name = os.path.split(os.path.join(folder, image["file_name"]))
        if place not in held:
            held[place] = _files_in(place)
        if name not in held[place]:
            missing.append(image["file_name"])
    if missing:
        raise CocoError(
            f"{len(missing)} of the {len(images)} pictures of {path} are not in {folder}, the first is {missing[0]}; give the "
            "folder that file_name starts from"
        )


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a zero byte
        return set()


def _is_turned(path: Path) -> bool:
    with Image.open(path) as file:
        return file.getexif().get(ExifTags.Base.Orientation, 1) > 4


def _clipped(box: list, image: dict) -> tuple[float, float, float, float]:
    """x y width height -> x0 y0 x1 y1 inside the image."""
    x, y, width, height = map(float, box)
    x0, y0 = max(0.0, x), max(0.0, y)
    return x0, y0, min(float(image["width"]), x + width), min(float(image["height"]), y + height)
