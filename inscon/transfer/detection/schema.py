"""COCO's json, read and checked: every field that is used, before anything starts.

A wrong one is refused with the file, the annotation's (image's, category's) id, the field and what it holds. What real sets hold
is no error: crowds, boxes without an area or outside their image, `area` or `iscrowd` left out, fields of other tools.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import xxhash

KEYS = ("images", "annotations", "categories")
LIMIT = 1e6
"""Of coordinates, px; far beyond what pictures have."""
INSTANCES = "give an instances json, such as instances_val2017.json"
VOC = "convert VOC's XML to one COCO json first (mmdet's tools/dataset_converters/pascal_voc.py does)"
OWN_ID = "give every one an id of its own"
BOX = "[x, y, width, height] in px, numbers, the last two at least 0, as in an instances json"
MASK = (
    "polygons in px, [[x1, y1, x2, y2, x3, y3, ...], ...], or an RLE of the image's size, whose counts add up to its px"
)


class CocoError(ValueError):
    """A data set that can't be used; the message says what was found and what to do."""


class Rule(NamedTuple):
    """What a field must be."""

    field: str
    holds: Callable[[object], bool]
    must: str
    needed: bool = True


def read_json(path: Path) -> tuple[dict, str]:
    """`images`, `annotations`, `categories`, each a list of dictionaries and not checked further, and the file's checksum."""
    if path.suffix == ".xml" or (path.is_dir() and any((path / "Annotations").glob("*.xml"))):
        raise CocoError(f"{path} is VOC's format, a file of XML per picture, where COCO's json is read; {VOC}")
    if not path.is_file():
        raise CocoError(f"there is no file {path}; {INSTANCES}")
    written = path.read_bytes()
    try:
        contents = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise CocoError(
            f"{path} is no json in UTF-8, or not all of one ({error}); copy it again, or {INSTANCES}"
        ) from None
    held = contents if isinstance(contents, dict) else {f"a {type(contents).__name__}": contents}
    missing = [key for key in KEYS if key not in held]
    if missing:
        raise CocoError(
            f"{path} is not in COCO's format: it has no {' and no '.join(missing)}. Found: {', '.join(sorted(held)[:5])}; "
            f"{INSTANCES}, or {VOC}"
        )
    for key in KEYS:
        entries = held[key] if isinstance(held[key], list) else [held[key], None]
        if not all(isinstance(entry, dict) for entry in entries):
            wrong = next(entry for entry in entries if not isinstance(entry, dict) or entries is not held[key])
            raise CocoError(f"{path}: {key} must be a list of objects. Found: {_short(wrong)}; write the json again")
    return contents, xxhash.xxh3_128(written).hexdigest()


def check(path: Path, contents: dict, masks: bool) -> None:
    """CocoError for the first field that can't be used. `masks`: every annotation must have one."""
    images, annotations, categories = (contents[key] for key in KEYS)
    if not categories or not images:
        raise CocoError(
            f"{path} has {len(images)} images and {len(categories)} categories; give a json with some of both"
        )
    _check_fields(path, "image", images, _image_rules(type(images[0].get("id"))))
    _check_once(path, (f"image {image['id']!r}" for image in images), OWN_ID)
    _check_once(
        path, (f"the picture {image['file_name']}" for image in images), "list it once, with all its annotations"
    )
    _check_fields(path, "category", categories, CATEGORY)
    _check_once(path, (f"category {category['id']}" for category in categories), OWN_ID)
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    _check_fields(path, "annotation", annotations, _annotation_rules(sizes, {c["id"] for c in categories}))
    named = (f"annotation {a['id']} of image {a['image_id']}" for a in annotations if "id" in a)
    _check_once(path, named, "take one of them out")
    if masks:
        _check_masks(path, annotations, sizes)


def _is_id(value: object) -> bool:
    """pycocotools sorts ids in a NumPy array, so of numbers 64 bits."""
    return type(value) is str or (type(value) is int and -(2**63) <= value < 2**63)


def _is_text(value: object) -> bool:
    return type(value) is str and value != ""


def _is_number(value: object, limit: float = LIMIT) -> bool:
    return type(value) in (int, float) and -limit < value < limit


def _is_box(box: object) -> bool:
    return type(box) is list and len(box) == 4 and all(map(_is_number, box)) and box[2] >= 0 and box[3] >= 0


CATEGORY = (
    Rule("id", lambda value: type(value) is int and _is_id(value), "a whole number"),
    Rule("name", _is_text, "a text"),
)


def _image_rules(of_ids: type) -> list[Rule]:
    sides = [
        Rule(side, lambda v: type(v) is int and 0 < v < LIMIT, "a whole number of px above 0")
        for side in ("width", "height")
    ]
    return [
        Rule("id", lambda v: _is_id(v) and type(v) is of_ids, "a whole number (or a text), for all images alike"),
        Rule("file_name", _is_text, "the path of a picture"),
        *sides,
    ]


def _annotation_rules(images: dict, categories: set[int]) -> list[Rule]:
    one_of = "the id of one of the {} {} in the file"
    return [
        Rule("image_id", lambda v: _is_id(v) and v in images, one_of.format(len(images), "images")),
        Rule("category_id", lambda v: type(v) is int and v in categories, one_of.format(len(categories), "categories")),
        Rule("bbox", _is_box, BOX),
        Rule("area", lambda v: _is_number(v, LIMIT**2) and v >= 0, "a number of px² of at least 0, or left out", False),
        Rule("iscrowd", lambda v: v in (0, 1), "0 or 1, or left out", False),
        Rule("id", _is_id, "a whole number", False),
    ]


def _check_fields(path: Path, kind: str, entries: list[dict], rules: Iterable[Rule]) -> None:
    for place, entry in enumerate(entries):
        for rule in rules:
            there = rule.field in entry
            if (there or rule.needed) and not (there and rule.holds(entry[rule.field])):
                raise _wrong(path, _name(kind, entry, place), entry, rule.field, rule.must)


def _check_once(path: Path, names: Iterable[str], remedy: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise CocoError(f"{path} lists {name} twice; {remedy}")
        seen.add(name)


def _check_masks(path: Path, annotations: list[dict], sizes: dict) -> None:
    names = [_name("annotation", annotation, place) for place, annotation in enumerate(annotations)]
    without = [name for name, annotation in zip(names, annotations) if not annotation.get("segmentation")]
    if without:
        raise CocoError(
            f"{len(without)} of the {len(annotations)} annotations of {path} have no segmentation, the first is {without[0]}; set "
            "--arch fasterrcnn-fpn, which learns boxes alone, or give a json with masks"
        )
    for name, annotation in zip(names, annotations):
        if not _is_mask(annotation["segmentation"], sizes[annotation["image_id"]]):
            raise _wrong(path, name, annotation, "segmentation", MASK)


def _is_mask(held: object, size: tuple[int, int]) -> bool:
    """`size`: height and width of the image, px."""
    if type(held) is not dict:
        # Of the first polygon pycocotools takes the kind, 4 numbers for a box; a point or line after it draws nothing.
        return type(held) is list and all(_is_polygon(polygon, 2 if n else 6) for n, polygon in enumerate(held))
    try:
        runs = runs_of(held.get("counts"))
    except ValueError:
        return False
    whole = {*map(type, runs)} == {int} and min(runs) >= 0
    return held.get("size") == list(size) and whole and sum(runs) == math.prod(size)


def _is_polygon(held: object, least: int) -> bool:
    if type(held) is not list or not {*map(type, held)} <= {int, float} or len(held) < least or len(held) % 2:
        return False
    # NaN is found by the sum alone: it compares with nothing.
    return min(held) > -LIMIT and max(held) < LIMIT and math.isfinite(sum(held))


def runs_of(counts: object) -> list:
    """The run lengths of an RLE: a list, or, compressed, 5 bits a character, from the fourth on less the one before the last.

    None of them for what is neither; ValueError for other characters.
    """
    if type(counts) is not str:
        return counts if type(counts) is list else []
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


def _name(kind: str, entry: dict, place: int) -> str:
    return f"{kind} {entry['id']}" if _is_id(entry.get("id")) else f"{kind} number {place + 1}"


def _wrong(path: Path, name: str, entry: dict, field: str, must: str) -> CocoError:
    found = _short(entry[field]) if field in entry else "none"
    return CocoError(f"{path}: {name}: {field} must be {must}. Found: {found}; correct it, or take it out of the json")


def _short(value: object) -> str:
    """A value as json has it, cut to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
