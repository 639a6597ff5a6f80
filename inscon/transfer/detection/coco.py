"""A data set in COCO's format: read, checked before anything starts, and turned into pixels, boxes and masks.

COCO's own files, those of data_prep/make_scenes.py and any other json with `images`, `annotations` and `categories`.
Category ids may have gaps (COCO's 80 lie in 1..90): labels are 1..K in the order of the ids, and 0 is the background.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

KEYS = ("images", "annotations", "categories")
VOC_REMEDY = "convert it to one COCO json first (mmdet's tools/dataset_converters/pascal_voc.py does)"


class CocoError(ValueError):
    """A data set that can't be used; the message says what was found and what to do."""


@dataclass(frozen=True)
class Categories:
    """COCO's ids and names of K categories, in the order of the ids."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, category_id: int) -> int:
        """COCO's id -> label in 1..K."""
        return self.ids.index(category_id) + 1

    def category_id(self, label: int) -> int:
        """The inverse of `label`."""
        return self.ids[label - 1]


@dataclass(frozen=True)
class CocoSet:
    """Images of a folder and what a json says about them."""

    json: Path
    folder: Path
    images: tuple[dict, ...]
    """As in the file: `id`, `file_name`, `height` and `width` in px."""
    annotations: tuple[tuple[dict, ...], ...]
    """Of each image, crowds included."""
    categories: Categories
    fingerprint: str
    """Checksum of the json."""

    def __len__(self) -> int:
        return len(self.images)

    def trainable(self) -> tuple[int, ...]:
        """Positions of the images with something to learn: at least one box that is no crowd."""
        return tuple(n for n in range(len(self)) if self.objects(n))

    def objects(self, position: int) -> list[dict]:
        """The annotations to learn from: no crowds, and boxes that have an area inside the image."""
        image = self.images[position]
        return [
            a for a in self.annotations[position] if not a.get("iscrowd", 0) and _area(_clipped(a["bbox"], image)) > 0
        ]

    def pixels(self, position: int) -> Tensor:
        """[3 H W] float32 in 0..1, RGB. Raises CocoError for a file that is no picture, or of another size."""
        image = self.images[position]
        path = self.folder / image["file_name"]
        try:
            with Image.open(path) as file:
                pixels = np.array(file.convert("RGB"))
        except OSError as error:
            raise CocoError(f"{path} can't be read as a picture ({error}); copy it again") from None
        if pixels.shape[:2] != (image["height"], image["width"]):
            raise CocoError(
                f"{path} is {pixels.shape[1]} x {pixels.shape[0]} px where {self.json.name} says {image['width']} x "
                f"{image['height']}; use the pictures the json was made for"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255

    def target(self, position: int, masks: bool) -> dict[str, Tensor]:
        """`boxes` [n 4] x0 y0 x1 y1 in px, float32; `labels` [n] in 1..K; with `masks`, `masks` [n H W] uint8 0 or 1."""
        image, objects = self.images[position], self.objects(position)
        boxes = [_clipped(a["bbox"], image) for a in objects]
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([self.categories.label(a["category_id"]) for a in objects], dtype=torch.int64),
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

    Raises CocoError: no such file, VOC, other contents, pictures that are not there, objects without a mask, ids that
    belong to nothing.
    """
    path, folder = Path(path), Path(folder)
    contents, fingerprint = _read_json(path)
    categories = sorted(contents["categories"], key=lambda category: category["id"])
    if not categories or not contents["images"]:
        raise CocoError(
            f"{path} has {len(contents['images'])} images and {len(categories)} categories; give a json with some of both"
        )
    of_image: dict = {image["id"]: [] for image in contents["images"]}
    known = {category["id"] for category in categories}
    for annotation in contents["annotations"]:
        if annotation["image_id"] not in of_image or annotation["category_id"] not in known:
            raise CocoError(
                f"{path} has an annotation of image {annotation['image_id']} and category {annotation['category_id']}, which it "
                "doesn't list both; write the json again"
            )
        of_image[annotation["image_id"]].append(annotation)
    _check_pictures(path, folder, contents["images"])
    if masks:
        _check_masks(path, contents["annotations"])
    return CocoSet(
        path, folder, tuple(contents["images"]), tuple(map(tuple, of_image.values())),
        Categories(tuple(c["id"] for c in categories), tuple(c["name"] for c in categories)), fingerprint,
    )  # fmt: skip


def check_same_categories(ours: Categories, theirs: Categories, ours_from: str, theirs_from: str) -> None:
    """CocoError if two sets number or name their categories differently."""
    if ours == theirs:
        return
    one, other = (set(zip(c.ids, c.names)) for c in (ours, theirs))
    different = min(one ^ other)
    raise CocoError(
        f"the categories must be the same. Found: {len(ours)} in {ours_from}, {len(theirs)} in {theirs_from}, and "
        f"{different[0]} ({different[1]}) is not in both; write both with one list of categories"
    )


def _read_json(path: Path) -> tuple[dict, str]:
    if path.suffix == ".xml" or (path.is_dir() and any((path / "Annotations").glob("*.xml"))):
        raise CocoError(f"{path} is VOC's format, a file of XML per picture, where COCO's json is read; {VOC_REMEDY}")
    if not path.is_file():
        raise CocoError(f"there is no file {path}; give the json with the annotations, say instances_val2017.json")
    written = path.read_bytes()
    try:
        contents = json.loads(written)
    except ValueError as error:
        raise CocoError(f"{path} is no json ({error}); give the json with the annotations") from None
    missing = [key for key in KEYS if not isinstance(contents, dict) or key not in contents]
    if missing:
        found = ", ".join(sorted(contents)[:5]) if isinstance(contents, dict) else type(contents).__name__
        raise CocoError(
            f"{path} is not in COCO's format: it has no {' and no '.join(missing)}. Found: {found}; "
            f"give an instances json, or if this is VOC {VOC_REMEDY}"
        )
    return contents, xxhash.xxh3_128(written).hexdigest()


def _check_pictures(path: Path, folder: Path, images: list[dict]) -> None:
    missing = [image["file_name"] for image in images if not (folder / image["file_name"]).is_file()]
    if missing:
        raise CocoError(
            f"{len(missing)} of the {len(images)} pictures of {path} are not in {folder}, the first is {missing[0]}; give the "
            "folder that file_name starts from"
        )


def _check_masks(path: Path, annotations: list[dict]) -> None:
    without = sum(not annotation.get("segmentation") for annotation in annotations)
    if without:
        raise CocoError(
            f"{without} of the {len(annotations)} annotations of {path} have no segmentation, which a mask architecture learns "
            "from; set --arch fasterrcnn-c4, or give a json with masks"
        )


def _clipped(box: list, image: dict) -> tuple[float, float, float, float]:
    """x y width height -> x0 y0 x1 y1 inside the image."""
    x, y, width, height = map(float, box)
    x0, y0 = max(0.0, x), max(0.0, y)
    return x0, y0, min(float(image["width"]), x + width), min(float(image["height"]), y + height)


def _area(box: tuple[float, float, float, float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
