"""Draw what the method sees: sources with both crops, the two views with their matched cells, and a mosaic.

    python scripts/show_views.py --data SHARDS --out views.png
    python scripts/show_views.py --data SHARDS --out views.png --recipe imagenet_r50 --step 0 --pipeline reference

The plan is a pure function, so this is exactly what step N of a run with the same seed and batch size trains on. Cells
with the same number and color in the two views of a row are positives of each other. Any setting of the recipe is a flag.
"""

import argparse
import colorsys
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.index import DatasetIndex
from inscon import guard
from inscon.batch import Batch, View
from inscon.config import Config, resolve
from inscon.geometry import find_overlap
from pipelines import open_pipeline
from pipelines.color import MEAN, STD
from pipelines.reference import picture_of
from scripts.train import parse

QUERY, KEY, GAP = "#ff4040", "#40a0ff", 8
LEAST_SIDE = 192
"""Smaller views are enlarged by a whole number of times, so that the cells' numbers can be read."""


def options() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--out", type=Path, default=Path("views.png"))
    own.add_argument("--step", type=int, default=0)
    own.add_argument("--images", type=int, default=4)
    return own


def main(arguments: list[str]) -> Path:
    chosen, rest = options().parse_known_args(arguments)
    config = resolve(parse(rest), 1)
    if config.loader.data is None:
        raise ValueError("there is nothing to draw without shards; set --data SHARDS")
    guard.check_output_file(chosen.out)
    with open_pipeline(
        config.loader.pipeline, config=config, start_step=chosen.step, total_steps=chosen.step + 1
    ) as loader:
        batch = next(iter(loader))
    picture = draw(batch, DatasetIndex.open(config.loader.data), config, min(chosen.images, batch.size))
    encoded = io.BytesIO()
    picture.save(encoded, Image.registered_extensions().get(chosen.out.suffix.lower(), "PNG"))
    with guard.whole_file(chosen.out) as file:
        file.write(encoded.getvalue())
    print(f"{chosen.out}: {min(chosen.images, batch.size)} images of step {chosen.step} and their mosaic")
    return chosen.out


def draw(batch: Batch, index: DatasetIndex, config: Config, images: int) -> Image.Image:
    """The whole picture: one row per image (source, query view, key view), the mosaic of the first four at the right."""
    zoom = -(-LEAST_SIDE // config.views.view_size)
    side = zoom * config.views.view_size
    overlap = _overlap(batch, config)
    mosaic = None if batch.mosaic is None else to_image(batch.mosaic[0], zoom)
    width = 4 * side + 3 * GAP + (0 if mosaic is None else mosaic.width + GAP)
    height = max(images * (side + GAP), 0 if mosaic is None else mosaic.height)
    sheet = Image.new("RGB", (width, height), "white")
    for row in range(images):
        top = row * (side + GAP)
        boxes = {QUERY: batch.query.crop_box[row], KEY: batch.key.crop_box[row]}
        sheet.paste(source(index, int(batch.sample_ids[row]), boxes, (2 * side, side)), (0, top))
        for column, (view, box) in enumerate(((batch.query, overlap.query_box), (batch.key, overlap.key_box))):
            cells = with_cells(view, row, box[row], config.model.cell_grid, QUERY if column == 0 else KEY, zoom)
            sheet.paste(cells, (2 * side + GAP + column * (side + GAP), top))
    if mosaic is not None:
        sheet.paste(mosaic, (width - mosaic.width, 0))
    return sheet


def _overlap(batch: Batch, config: Config):
    v = config.views
    boxes = batch.query.crop_box, batch.query.flipped, batch.key.crop_box, batch.key.flipped
    return find_overlap(*boxes, v.view_size, v.overlap_min_side, v.overlap_min_iou)


def to_image(pixels, zoom: int = 1) -> Image.Image:
    """Normalized [3 H W] back to a picture, enlarged `zoom` times."""
    levels = pixels.float().cpu().permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)
    picture = Image.fromarray((levels * 255).round().clip(0, 255).astype(np.uint8))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST)


def source(index: DatasetIndex, sample_id: int, boxes: dict[str, object], size: tuple[int, int]) -> Image.Image:
    """The source picture, fitted into `size`, with its crop boxes."""
    picture = picture_of(index, sample_id)
    scale = min(size[0] / picture.width, size[1] / picture.height)
    fitted = picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)))
    pen = ImageDraw.Draw(fitted)
    for color, box in boxes.items():
        x0, y0, x1, y1 = (float(edge) * scale for edge in box)
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=color, width=2)
    return fitted


def with_cells(view: View, row: int, box, grid: int, frame: str, zoom: int) -> Image.Image:
    """One view with the cells of its overlap, numbered as the loss pairs them: a flipped view's columns run backwards."""
    picture = to_image(view.pixels[row], zoom)
    pen = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = (float(edge) * zoom for edge in box)
    width, height = (x1 - x0) / grid, (y1 - y0) / grid
    for p in range(grid):
        for q in range(grid):
            column = grid - 1 - q if bool(view.flipped[row]) else q
            left, top = x0 + column * width, y0 + p * height
            hue = colorsys.hsv_to_rgb((p * grid + q) / grid**2, 0.9, 1.0)
            color = tuple(round(255 * c) for c in hue)
            pen.rectangle((left, top, left + width - 1, top + height - 1), outline=color)
            pen.text(
                (left + width / 2, top + height / 2),
                str(p * grid + q + 1),
                fill=color,
                anchor="mm",
                stroke_width=1,
                stroke_fill="black",
            )
    pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=frame, width=2)
    return picture


if __name__ == "__main__":
    guard.run_script("show_views.py", lambda: main(sys.argv[1:]))
