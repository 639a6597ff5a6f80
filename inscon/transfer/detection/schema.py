"""COCO's json, read and checked: every field that is used, before anything starts.

A wrong one is refused with the file, the annotation's (image's, category's) id, the field and what it holds. What real sets hold
is no error: crowds, boxes without an area or outside their image, `area` or `iscrowd` left out, fields of other tools.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import xxhash

KEYS = ("images", "annotations", "categories")
VOC_REMEDY = "convert it to one COCO json first (mmdet's tools/dataset_converters/pascal_voc.py does)"
LIMIT = 1e6
"""Of coordinates, px; far beyond what pictures have."""
_OTHER_KINDS = {
    "segments_info": "panoptic segments, whose masks are in PNG files",
    "caption": "captions, without boxes",
    "keypoints": "keypoints, without boxes",
}
"""Field of an annotation without a box -> what such a json holds."""


class CocoError(ValueError):
    """A data set that can't be used; the message says what was found and what to do."""


def read_json(path: Path) -> tuple[dict, str]:
    """`images`, `annotations`, `categories`, each a list of dictionaries and not checked further, and the file's checksum."""
    if path.suffix == ".xml" or (path.is_dir() and any((path / "Annotations").glob("*.xml"))):
        raise CocoError(f"{path} is VOC's format, a file of XML per picture, where COCO's json is read; {VOC_REMEDY}")
    if not path.is_file():
        raise CocoError(f"there is no file {path}; give the json with the annotations, say instances_val2017.json")
    written = path.read_bytes()
    try:
        contents = json.loads(written)
    except UnicodeDecodeError as error:
        raise CocoError(
            f"{path} is not UTF-8 (byte {written[error.start]:#x} at {error.start}); convert it, say with iconv -f LATIN1 -t UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CocoError(
            f"{path} is no json, or not all of one ({error}); copy it again, or give the json with the annotations"
        ) from None
    _check_kind(path, contents)
    return contents, xxhash.xxh3_128(written).hexdigest()


def _check_kind(path: Path, contents: object) -> None:
    instances = "give an instances json, such as instances_val2017.json"
    listed = contents if isinstance(contents, list) else []
    if listed and isinstance(listed[0], dict) and "image_id" in listed[0]:
        raise CocoError(f"{path} is a list of {len(listed)} results, without the images and categories; {instances}")
    contents = contents if isinstance(contents, dict) else {type(contents).__name__: None}
    of_some = contents.get("annotations")
    first = of_some[0] if isinstance(of_some, list) and of_some else None
    if isinstance(first, dict) and "bbox" not in first:
        for field, holds in _OTHER_KINDS.items():
            if field in first:
                raise CocoError(f"{path} holds {holds} (its annotations have {field} and no bbox); {instances}")
    missing = [key for key in KEYS if key not in contents]
    if missing:
        raise CocoError(
            f"{path} is not in COCO's format: it has no {' and no '.join(missing)}. Found: {', '.join(sorted(contents)[:5])}; "
            f"{instances}, or if this is VOC {VOC_REMEDY}"
        )
    for key in KEYS:
        entries = contents[key]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            wrong = (
                next((e for e in entries if not isinstance(e, dict)), entries) if isinstance(entries, list) else entries
            )
            raise CocoError(f"{path}: {key} must be a list of objects. Found: {_short(wrong)}; write the json again")


def check(path: Path, contents: dict, masks: bool) -> None:
    """CocoError for the first field that can't be used. `masks`: every annotation must have one."""
    if not contents["categories"] or not contents["images"]:
        raise CocoError(
            f"{path} has {len(contents['images'])} images and {len(contents['categories'])} categories; "
            "give a json with some of both"
        )
    sizes = _check_images(path, contents["images"])
    known = _check_categories(path, contents["categories"])
    _check_annotations(path, contents["annotations"], sizes, known)
    if masks:
        _check_masks(path, contents["annotations"], sizes)


def _check_images(path: Path, images: list[dict]) -> dict[int | str, tuple[int, int]]:
    """Id -> height and width, px."""
    sizes, named = {}, {}
    for place, image in enumerate(images):
        entry, name = image.get("id"), image.get("file_name")
        what = f"image {entry}" if _is_id(entry) else f"image number {place + 1}"
        if not _is_id(entry) or type(entry) is not type(images[0]["id"]):
            _refuse(path, what, image, "id", "a whole number (or a text), for all images alike")
        if entry in sizes:
            raise CocoError(
                f"{path} lists image {entry!r} twice; give every image an id of its own, in its annotations too"
            )
        if type(name) is not str or not name:
            _refuse(path, what, image, "file_name", "the path of a picture")
        if name in named:
            raise CocoError(
                f"{path} lists the picture {name} twice, as image {named[name]} and {entry}; list it once, with all its annotations"
            )
        for side in ("width", "height"):
            if type(image.get(side)) is not int or not 0 < image[side] < LIMIT:
                _refuse(path, what, image, side, "a whole number of px above 0")
        sizes[entry], named[name] = (image["height"], image["width"]), entry
    return sizes


def _check_categories(path: Path, categories: list[dict]) -> set[int]:
    known = set()
    for place, category in enumerate(categories):
        entry = category.get("id")
        what = f"category {entry}" if _is_id(entry) else f"category number {place + 1}"
        if not _is_id(entry) or type(entry) is not int:
            _refuse(path, what, category, "id", "a whole number")
        if entry in known:
            raise CocoError(f"{path} lists category {entry} twice; give every category an id of its own")
        if type(category.get("name")) is not str or not category["name"]:
            _refuse(path, what, category, "name", "a text")
        known.add(entry)
    return known


def _check_annotations(path: Path, annotations: list[dict], sizes: Mapping, known: set[int]) -> None:
    seen = set()
    for place, annotation in enumerate(annotations):
        image, category = annotation.get("image_id"), annotation.get("category_id")
        what = _name(annotation, place)
        for field, value, listed in (("image_id", image, sizes), ("category_id", category, known)):
            if not _is_id(value) or value not in listed:
                _refuse(
                    path, what, annotation, field, f"the id of one of the {len(listed)} {_PLURALS[field]} in the file"
                )
        box = annotation.get("bbox")
        if type(box) is not list or len(box) != 4 or not all(map(_is_number, box)) or box[2] < 0 or box[3] < 0:
            _refuse(path, what, annotation, "bbox", "[x, y, width, height] in px, numbers, the last two at least 0")
        if "area" in annotation and not (_is_number(annotation["area"], LIMIT**2) and annotation["area"] >= 0):
            _refuse(path, what, annotation, "area", "a number of px² of at least 0, or left out")
        if annotation.get("iscrowd", 0) not in (0, 1):
            _refuse(path, what, annotation, "iscrowd", "0 or 1, or left out")
        if "id" in annotation:
            entry = annotation["id"]
            if not _is_id(entry):
                _refuse(path, what, annotation, "id", "a whole number")
            if (image, entry) in seen:
                raise CocoError(f"{path} lists annotation {entry} of image {image} twice; take one of them out")
            seen.add((image, entry))


_PLURALS = {"image_id": "images", "category_id": "categories"}


def _check_masks(path: Path, annotations: list[dict], sizes: Mapping) -> None:
    without = [place for place, annotation in enumerate(annotations) if not annotation.get("segmentation")]
    if without:
        raise CocoError(
            f"{len(without)} of the {len(annotations)} annotations of {path} have no segmentation, the first is "
            f"{_name(annotations[without[0]], without[0])}; set --arch fasterrcnn-c4, which learns boxes alone, or give a json "
            "with masks"
        )
    for place, annotation in enumerate(annotations):
        held = annotation["segmentation"]
        wrong = _wrong_rle(held, sizes[annotation["image_id"]]) if type(held) is dict else _wrong_polygons(held)
        if wrong:
            raise CocoError(f"{path}: {_name(annotation, place)}: segmentation {wrong}; {_REMEDY}")


def _wrong_polygons(polygons: object) -> str | None:
    if type(polygons) is not list:
        return f"must be polygons or an RLE. Found: {_short(polygons)}"
    for polygon in polygons:
        numbers = type(polygon) is list and {*map(type, polygon)} <= _NUMBERS
        # Of the first one pycocotools takes the kind, 4 numbers for a box; a point or line after it draws nothing.
        if not numbers or len(polygon) < (6 if polygon is polygons[0] else 2) or len(polygon) % 2:
            must = "a list of polygons, each [x1, y1, x2, y2, ...] of 3 points or more"
            return f"must be {must}. Found: {_short(polygon)}"
        # NaN is found by the sum alone: it compares with nothing.
        if not (min(polygon) > -LIMIT and max(polygon) < LIMIT and math.isfinite(sum(polygon))):
            return f"must be in px. Found: {_short(max(polygon, key=abs))} or a number that is not finite"
    return None


def _wrong_rle(rle: dict, size: tuple[int, int]) -> str | None:
    """`size`: height and width of the image, px."""
    if rle.get("size") != list(size):
        return f"has the RLE size {_short(rle.get('size'))}, where the image is {list(size)} (height, width)"
    counts = rle.get("counts")
    try:
        runs = counts if type(counts) is list else runs_of(counts) if type(counts) is str else []
        whole = {*map(type, runs)} == {int} and min(runs) >= 0
    except ValueError:
        whole = False
    if not whole:
        return f"has RLE counts that are no run lengths. Found: {_short(counts)}"
    if sum(runs) != math.prod(size):
        return f"has RLE counts of {sum(runs)} px, where the image has {math.prod(size)}"
    return None


def runs_of(counts: str) -> list[int]:
    """The run lengths of a compressed RLE: 5 bits a character, from the fourth on less the one before the last. ValueError."""
    runs, value, shift = [], 0, 0
    for character in counts.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character:c} is no character of an RLE")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits >> 4) << shift  # negative
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("cut short")
    return runs


def is_flat(segmentation: list | dict) -> bool:
    """Whether checked polygons, or an RLE, have no area."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return not any((counts if isinstance(counts, list) else runs_of(counts))[1::2])
    return not any(map(_has_area, segmentation))


def _has_area(polygon: list) -> bool:
    """Whether any two neighbors among its points and the first one make a triangle."""
    x, y = polygon[:2]
    return any(
        (polygon[n] - x) * (polygon[n + 3] - y) != (polygon[n + 2] - x) * (polygon[n + 1] - y)
        for n in range(2, len(polygon) - 2, 2)
    )


_NUMBERS = {int, float}
_REMEDY = "correct it, or take it out of the json"


def _is_id(value: object) -> bool:
    """pycocotools sorts ids in a NumPy array, so of numbers 64 bits."""
    return type(value) is str or (type(value) is int and -(2**63) <= value < 2**63)


def _is_number(value: object, limit: float = LIMIT) -> bool:
    return type(value) in _NUMBERS and -limit < value < limit


def _name(annotation: dict, place: int) -> str:
    entry = annotation.get("id")
    return f"annotation {entry}" if _is_id(entry) else f"annotation number {place + 1}"


def _refuse(path: Path, what: str, entry: dict, field: str, must: str) -> NoReturn:
    found = _short(entry[field]) if field in entry else "none"
    raise CocoError(f"{path}: {what}: {field} must be {must}. Found: {found}; {_REMEDY}")


def _short(value: object) -> str:
    """A value as json has it, cut to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
