"""Draw scenes of several textured objects, with boxes and masks: a data set for the demo and the tests, no download.

    python data_prep/make_scenes.py --out scenes
    python data_prep/make_dali.py --data scenes/train --out shards/train

A class is a shape with a texture; colors, sizes, angles and places are drawn anew for every object, so color tells
nothing. An image's class is that of the object of which most is seen.

    scenes/train/<class>/scene_000123.jpg    scenes/annotations.json        COCO: boxes, areas, masks as plain RLE
    scenes/val/<class>/scene_000123.jpg      scenes/annotations_val.json

Image k of a split depends on the seed, the split and k alone, not on how many are made. About 3 ms per image.
"""

import json
import shutil
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

if __package__ in (None, ""):  # run as a script: Python then looks beside this file, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon import guard

SPLITS = {"train": "annotations.json", "val": "annotations_val.json"}
DOMINANT_AREA = (0.12, 0.25)  # share of the image's area that the main object covers, before anything lies on it
FURTHER_AREA = (0.02, 0.06)  # the same for each of the 1 to 4 further objects

# Shapes and textures are functions of u and v, float arrays of one shape: an object's own axes, turned and scaled with
# it, in which it lies inside the unit circle.


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    fifth = 2 * np.pi / 5
    from_valley = np.abs((np.arctan2(v, u) + np.pi) % fifth - fifth / 2)  # half a fifth at a tip
    return np.hypot(u, v) < 0.4 + 0.6 * (from_valley / (fifth / 2)) ** 1.5


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: u**2 + v**2 < 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.7,
    "triangle": lambda u, v: (v < 0.5) & (v > np.sqrt(3) * np.abs(u) - 1),
    "star": _star,
    "ring": lambda u, v: (u**2 + v**2 < 1) & (u**2 + v**2 > 0.5**2),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.28) & (np.maximum(np.abs(u), np.abs(v)) < 0.95),
    "crescent": lambda u, v: (u**2 + v**2 < 1) & ((u - 0.5) ** 2 + v**2 > 0.75**2),
    "bar": lambda u, v: (np.abs(u) < 0.95) & (np.abs(v) < 0.3),
}

TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "stripes": lambda u, v, rng: u * 3.5 % 1 < 0.5,
    "checker": lambda u, v, rng: (np.floor(u * 3.5) + np.floor(v * 3.5)) % 2 == 0,
    "dots": lambda u, v, rng: np.hypot(u * 3 % 1 - 0.5, v * 3 % 1 - 0.5) < 0.3,
    "noise": lambda u, v, rng: rng.random((24, 24))[(u * 11.9 + 12).astype(int), (v * 11.9 + 12).astype(int)] < 0.5,
}

MAX_CLASSES = len(SHAPES) * len(TEXTURES)


class Scene(NamedTuple):
    """A drawn image and what is seen in it."""

    pixels: NDArray[np.uint8]  # [H W 3], RGB
    masks: NDArray[np.bool_]  # [n H W]: what is seen of each object. No pixel is in two masks, no mask is empty
    classes: NDArray[np.int64]  # [n]: the class of each object, a position in `class_names`

    @property
    def main_class(self) -> int:
        """The class of the object of which most is seen."""
        return int(self.classes[self.masks.sum(axis=(1, 2)).argmax()])


def make_scenes(
    out: Path, *, num_images: int = 512, num_val: int = 128, num_classes: int = 8, size: int = 160, seed: int = 0
) -> Path:
    """Draw scenes into the folder `out`, and return it.

    Args:
        out: Folder for the scenes; must be new or empty.
        num_images: Images to train on.
        num_val: Further images, to judge on; 0 for none.
        num_classes: Classes, from 2 to 32; as many images of each, but for the rare one whose main object is mostly hidden.
        size: Typical height and width, px, at least 32; both vary from 0.8 to 1.25 times this.
        seed: Decides every pixel.

    Raises ValueError for settings out of range, and for a folder that is not empty or cannot be written. Stopped early, it
    leaves nothing.
    """
    out = Path(out)
    settings = SimpleNamespace(num_images=num_images, num_val=num_val, num_classes=num_classes, size=size, seed=seed)
    guard.check_ranges(settings, num_images=1, num_val=0, num_classes=(2, MAX_CLASSES), size=32, seed=0)
    new = not out.exists()
    if not new and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty folder; remove it or give another --out.")
    guard.check_output_folder(out)
    try:
        with guard.naming(out):
            for split, count in zip(SPLITS, (num_images, num_val), strict=True):
                if count:
                    _make_split(out, split, count, num_classes=num_classes, size=size, seed=seed)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        if not new:
            out.mkdir(exist_ok=True)
        raise
    return out


def class_names(num_classes: int) -> list[str]:
    """The first `num_classes` pairs of a shape and a texture, such as "ring_dots", sorted: label order."""
    shapes, textures = list(SHAPES), list(TEXTURES)
    # Every shape comes once before any comes again, each time with the next texture.
    pairs = [(k % len(shapes), (k + k // len(shapes)) % len(textures)) for k in range(num_classes)]
    return sorted(f"{shapes[shape]}_{textures[texture]}" for shape, texture in pairs)


def draw_scene(*, seed: int, split: str, number: int, num_classes: int, size: int) -> Scene:
    """Scene `number` of a split: a main object of class number % num_classes, and 1 to 4 further objects."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), number])
    height, width = (int(side) for side in np.rint(size * rng.uniform(0.8, 1.25, 2)))
    coarse = rng.integers(40, 216, size=(*rng.integers(2, 6, 2), 3), dtype=np.uint8)  # smooth colors behind all
    pixels = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    classes = np.array([number % num_classes] * (2 + rng.integers(4)))
    other = rng.random(len(classes)) < 0.75
    other[0] = False
    classes[other] = rng.integers(num_classes, size=other.sum())
    owner = np.full((height, width), -1)  # which object each pixel shows
    names = class_names(num_classes)
    for i in rng.permutation(len(classes)):  # the later ones lie on top
        _draw_object(rng, pixels, owner, i, names[classes[i]])
    masks = owner == np.arange(len(classes))[:, None, None]
    seen = masks.any(axis=(1, 2))
    return Scene(pixels, masks[seen], classes[seen])


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed RLE of a mask [H W]: lengths of runs, column by column, the first of zeros (maybe none)."""
    pixels = mask.ravel(order="F")
    starts = np.flatnonzero(np.diff(pixels, prepend=False))  # where a pixel differs from the one before
    return np.diff(starts, prepend=0, append=pixels.size).tolist()


def _draw_object(rng: np.random.Generator, pixels: np.ndarray, owner: np.ndarray, number: int, name: str) -> None:
    """Draw an object of class `name` on `pixels` and set `owner` to its number there; both are changed in place."""
    shape, texture = name.split("_")
    height, width = owner.shape
    area = rng.uniform(*(DOMINANT_AREA if number == 0 else FURTHER_AREA)) * height * width
    radius = np.sqrt(area / _unit_area(shape))
    inset = min(0.8 * radius, 0.45 * min(height, width))  # most of the object lies inside the image
    y, x = rng.uniform(inset, height - inset), rng.uniform(inset, width - inset)
    y0, y1 = max(0, int(y - radius)), min(height, int(y + radius) + 2)
    x0, x1 = max(0, int(x - radius)), min(width, int(x + radius) + 2)
    up, right = (np.arange(y0, y1)[:, None] + 0.5 - y) / radius, (np.arange(x0, x1) + 0.5 - x) / radius
    angle = rng.uniform(0, 2 * np.pi)
    u, v = np.cos(angle) * right + np.sin(angle) * up, np.cos(angle) * up - np.sin(angle) * right
    inside = SHAPES[shape](u, v) & (u**2 + v**2 < 1)
    u, v = u[inside], v[inside]
    colors = np.stack([rng.integers(0, 110, 3), rng.integers(146, 256, 3)]).astype(np.uint8)  # always told apart
    lit = TEXTURES[texture](u, v, rng)
    pixels[y0:y1, x0:x1][inside] = colors[lit.astype(int)]
    owner[y0:y1, x0:x1][inside] = number


@lru_cache
def _unit_area(shape: str) -> float:
    """The area of a shape of radius 1, so that a ring can cover as much as a disc."""
    v, u = np.mgrid[-1:1:256j, -1:1:256j]
    return float((SHAPES[shape](u, v) & (u**2 + v**2 < 1)).mean() * 4)


def _make_split(out: Path, split: str, count: int, *, num_classes: int, size: int, seed: int) -> None:
    names = class_names(num_classes)
    for name in names:  # also of a class that gets no image, so that both splits have the same labels
        (out / split / name).mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        scene = draw_scene(seed=seed, split=split, number=number, num_classes=num_classes, size=size)
        file_name = f"{names[scene.main_class]}/scene_{number:06d}.jpg"
        Image.fromarray(scene.pixels).save(out / split / file_name, "JPEG", quality=90)
        height, width = scene.pixels.shape[:2]
        images.append({"id": number, "file_name": file_name, "height": height, "width": width})
        for mask, label in zip(scene.masks, scene.classes, strict=True):
            x0, y0, x1, y1 = map(float, Image.fromarray(mask).getbbox())  # continuous pixel edges
            rle = {"size": list(mask.shape), "counts": run_lengths(mask)}
            about = {"id": len(annotations) + 1, "image_id": number, "category_id": int(label) + 1}
            about |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(mask.sum()), "iscrowd": 0, "segmentation": rle}
            annotations.append(about)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(names)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (out / SPLITS[split]).write_text(json.dumps(coco, separators=(",", ":")))


if __name__ == "__main__":
    guard.run_script("make_scenes.py", lambda: print(f"Drew scenes into {tyro.cli(make_scenes)}."))
