"""A data set in COCO's format: read and checked before anything starts, then turned into pixels, boxes and masks.

Other fields than `images`, `annotations` and `categories` are passed over. Category ids may have gaps (COCO's 80 lie in 1..90):
labels are 1..K in the order of the ids, 0 the background.
"""

import contextlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
import xxhash
from msgspec import Meta, Struct
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from torch import Tensor

from data_prep.pictures import BadPicture, read_picture

LEAST_SIDE = 0.1  # Of a box to learn from, px; what is less may have no area after resizing, in float32.

# What a json must hold. The limits are far beyond what pictures have.
Coordinate = Annotated[float, Meta(gt=-1e6, lt=1e6)]
Length = Annotated[float, Meta(ge=0, lt=1e6)]
Side = Annotated[int, Meta(gt=0, lt=1_000_000)]


class Image(Struct):
    id: int
    file_name: Annotated[str, Meta(min_length=1)]
    height: Side
    width: Side


class Category(Struct):
    id: int
    name: str


class Annotation(Struct):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[Coordinate, Coordinate, Length, Length]
    area: Annotated[float, Meta(ge=0, lt=1e12)] | None = None
    iscrowd: Literal[0, 1] | bool = 0


class Rle(Struct):
    size: list[int]
    counts: list[Annotated[int, Meta(ge=0)]] | str


class MaskedAnnotation(Annotation, kw_only=True):
    segmentation: Annotated[list[list[Coordinate]], Meta(min_length=1)] | Rle


class Contents(Struct):
    images: Annotated[list[Image], Meta(min_length=1)]
    categories: Annotated[list[Category], Meta(min_length=1)]
    annotations: list[Annotation]


class MaskedContents(Contents):
    annotations: list[MaskedAnnotation]


@dataclass(frozen=True)
class CocoSet:
    """Images of a folder and what a json says about them."""

    json: Path
    folder: Path
    images: list[dict]  # As in the json, some or all of them.
    truth: COCO  # The json, crowds included: what AP counts.
    categories: dict[int, str]  # Names by id, in the order of the ids; labels 1..K are their places.
    fingerprint: str  # checksum of the json

    def objects(self, image: dict) -> list[tuple[dict, tuple[float, ...]]]:
        """What can be learned, no crowds, each with its box inside the image: x0 y0 x1 y1 in px, with sides."""
        found = []
        for annotation in self.truth.imgToAnns[image["id"]]:
            x, y, width, height = map(float, annotation["bbox"])
            x0, y0 = max(0.0, x), max(0.0, y)
            x1, y1 = min(x + width, float(image["width"])), min(y + height, float(image["height"]))
            if not annotation["iscrowd"] and min(x1 - x0, y1 - y0) >= LEAST_SIDE:
                found.append((annotation, (x0, y0, x1, y1)))
        return found

    def learnable(self) -> "CocoSet":
        """The images with objects. ValueError if there are none."""
        found = [image for image in self.images if self.objects(image)]
        if not found:
            raise ValueError(f"{self.json} has no box to learn from in {len(self.images)} images; give another json")
        return replace(self, images=found)

    def pixels(self, image: dict) -> Tensor:
        """[3 H W] float32 in 0..1, RGB, turned as EXIF says. ValueError for no picture, or one of another size."""
        path = self.folder / image["file_name"]
        try:
            pixels = np.array(read_picture(path))
        except BadPicture as bad:
            raise ValueError(f"{bad}; copy it again, or take image {image['id']} out of {self.json.name}") from None
        if pixels.shape[:2] != (image["height"], image["width"]):
            raise ValueError(
                f"{path} has {pixels.shape[:2]} px, height and width, turned as EXIF says, and in {self.json.name} "
                f"{image['height'], image['width']}; use the pictures that the json was made for"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255

    def target(self, image: dict, masks: bool) -> dict[str, Tensor]:
        """`boxes` [n 4] x0 y0 x1 y1 in px, float32; `labels` [n] in 1..K; with `masks`, `masks` [n H W] uint8 0 or 1."""
        annotations, boxes = zip(*self.objects(image))
        labels = [list(self.categories).index(annotation["category_id"]) + 1 for annotation in annotations]
        target = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}
        if masks:
            target["masks"] = torch.from_numpy(np.stack([self.truth.annToMask(a) for a in annotations]))
        return target


def read_coco(path: Path, folder: Path, masks: bool, categories: dict[int, str] | None = None) -> CocoSet:
    """Read and check a json and its folder of pictures. `masks`: every annotation must have one; `categories`: what it must have.
    ValueError for other contents, a field that can't be used, ids twice, a json or pictures that are not there."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give an instances json such as instances_val2017.json")
    written = path.read_bytes()
    try:
        raw = msgspec.json.decode(written)
        contents = msgspec.convert(raw, MaskedContents if masks else Contents)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no json of COCO's format: {error}; correct it, or give an instances json such as instances_val2017.json "
            "(VOC's XML has to be converted, and only --arch fasterrcnn-fpn learns without segmentation)"
        ) from None
    for wrong in _wrong(contents, folder):
        raise ValueError(f"{path}: {wrong}; correct the json, or give the one and the folder that belong together")
    held = dict(sorted((category.id, category.name) for category in contents.categories))
    if categories not in (None, held):
        number, name = min(categories.items() ^ held.items())
        found = f"{number} ({name}), which is not in both"
        raise ValueError(f"{path} must have the categories of the training. Found: {found}; write both again")
    for number, (annotation, known) in enumerate(zip(raw["annotations"], contents.annotations), 1):
        area = known.bbox[2] * known.bbox[3] if known.area is None else known.area
        annotation |= {"id": number, "area": area, "iscrowd": known.iscrowd}  # pycocotools takes 0 for "not found"
    truth = COCO()
    truth.dataset = {"info": {}} | raw
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return CocoSet(path, folder, raw["images"], truth, held, xxhash.xxh3_128(written).hexdigest())


def _wrong(contents: Contents, folder: Path) -> Iterator[str]:
    """What types can't say."""
    names = {
        "image": [image.id for image in contents.images],
        "picture": [image.file_name for image in contents.images],
        "category": [category.id for category in contents.categories],
        "annotation": [f"{a.id} of image {a.image_id}" for a in contents.annotations],
    }
    for kind, listed in names.items():
        yield from (f"{kind} {name} is there twice" for name, count in Counter(listed).items() if count > 1)
    images, categories = {image.id: image for image in contents.images}, set(names["category"])
    for a in contents.annotations:
        if a.image_id not in images or a.category_id not in categories:
            yield f"annotation {a.id} has image_id {a.image_id} and category_id {a.category_id}, and one of them is not there"
        elif isinstance(a, MaskedAnnotation) and not _is_mask(a.segmentation, images[a.image_id]):
            found = str(a.segmentation)[:60]
            yield f"the segmentation {found} of annotation {a.id} is neither polygons x1 y1 x2 y2 x3 y3 ... nor an RLE of its image"
    # By one listing of each folder: a question for each of 118,000 files takes minutes on a network file system.
    places = [os.path.normpath(os.path.join(folder, name)) for name in names["picture"]]
    folders = [held for held in {os.path.dirname(place) for place in places} if os.path.isdir(held)]
    there = {entry.path for held in folders for entry in os.scandir(held) if entry.is_file()}
    if missing := [place for place in places if place not in there]:
        yield f"{len(missing)} of the {len(places)} pictures are not there, the first is {missing[0]}"


def _is_mask(mask: list[list[float]] | Rle, image: Image) -> bool:
    if isinstance(mask, list):
        # By the first one pycocotools takes 4 numbers for a box; a point or line after it draws nothing.
        return len(mask[0]) >= 6 and all(len(held) >= 2 and len(held) % 2 == 0 for held in mask)
    pixels = image.height * image.width
    if mask.size != [image.height, image.width]:
        return False
    if isinstance(mask.counts, list):
        return sum(mask.counts) == pixels
    # pycocotools refuses a string of too many px when it is drawn; of too few its intersections would never end.
    return _fits(mask.counts, pixels) and not _fits(mask.counts, pixels - 1)


def _fits(counts: str, pixels: int) -> bool:
    try:
        mask_tools.decode({"size": [1, pixels], "counts": counts})
    except ValueError:
        return False
    return True
