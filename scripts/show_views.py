"""Draw what a method sees: sources with their crops, the views of each, what two views share, and mosaics.

    python scripts/show_views.py --data SHARDS --out views.png
    python scripts/show_views.py --data SHARDS --out views.png --method moco --step 0 --pipeline reference

The plan is a pure function, so this is exactly what step N of a run with the same seed and batch size trains on. Where two views
must overlap, a grid of cells lies over what they share: cells with the same number and color show the same part of the source.
A jigsaw's patches stand in a row. Any setting of the recipe is a flag.
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
from inscon.batch import Batch
from inscon.methods.method import resolve
from pipelines import open_pipeline
from pipelines.color import MEAN, STD
from pipelines.reference import picture_of
from scripts.train import feed_of, parse

GAP = 8
LEAST_SIDE = 192
"""Smaller views are enlarged by a whole number of times, so that the cells' numbers can be read."""


def options() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--out", type=Path, default=Path("views.png"))
    own.add_argument("--step", type=int, default=0)
    own.add_argument("--images", type=int, default=4)
    own.add_argument("--cells", type=int, default=3, help="per side of the grid over what two views share")
    return own


def main(arguments: list[str]) -> Path:
    chosen, rest = options().parse_known_args(arguments)
    config = resolve(parse(rest), 1)
    if config.loader.data is None:
        raise ValueError("there is nothing to draw without shards; set --data SHARDS")
    guard.check_output_file(chosen.out)
    feed = feed_of(config)
    with open_pipeline(feed, config.loader, start_step=chosen.step, total_steps=chosen.step + 1) as loader:
        batch = next(iter(loader))
    images = min(chosen.images, batch.size)
    sheet, encoded = draw(batch, feed.index, images, chosen.cells), io.BytesIO()
    sheet.save(encoded, Image.registered_extensions().get(chosen.out.suffix.lower(), "PNG"))
    with guard.whole_file(chosen.out) as file:
        file.write(encoded.getvalue())
    print(f"{chosen.out}: {images} images of step {chosen.step}: source, {', '.join(batch.views)}")
    return chosen.out


def draw(batch: Batch, index: DatasetIndex, images: int, cells: int) -> Image.Image:
    """The whole sheet: a row per image (source; two by two the views that overlap; the other views), a mosaic below."""
    frames = dict(zip(batch.views, colors(len(batch.views))))
    rows = []
    for number in range(images):
        paired = [
            draw_view(batch, name, number, frames[name], box[number] if overlap.weight[number] > 0 else None, cells)
            for pair, overlap in batch.overlaps.items()
            for name, box in zip(pair, (overlap.first_box, overlap.second_box))
        ]
        names = {name for pair in batch.overlaps for name in pair}
        others = [draw_view(batch, name, number, frames[name]) for name in frames if name not in names]
        height = max(view.height for view in paired + others)
        boxes = {frame: batch.views[name].crop_box[number] for name, frame in frames.items()}
        source = draw_source(index, int(batch.sample_ids[number]), boxes, (2 * height, height))
        rows.append(beside([source, *paired, *others], first_width=2 * height))
    return below(rows if batch.mosaic is None else [*rows, to_image(batch.mosaic[0], zoom_of(batch.mosaic))])


def colors(count: int) -> list[tuple[int, int, int]]:
    """As many, as different as can be."""
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(n / count, 0.9, 1.0)) for n in range(count)]


def draw_source(index: DatasetIndex, sample_id: int, boxes: dict, size: tuple[int, int]) -> Image.Image:
    """The source image, fitted into `size`, with crop boxes by color."""
    image = picture_of(index, sample_id)
    scale = min(size[0] / image.width, size[1] / image.height)
    fitted = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)))
    pen = ImageDraw.Draw(fitted)
    for color, box in boxes.items():
        x0, y0, x1, y1 = (float(edge) * scale for edge in box)
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=color, width=2)
    return fitted


def draw_view(batch: Batch, name: str, number: int, frame: tuple, shared=None, cells: int = 0) -> Image.Image:
    """One view of an image, or its patches in a row, framed; with cells over the box `shared` [4], px of the view, if given."""
    view = batch.views[name]
    if view.pixels.ndim == 5:
        drawn = beside([to_image(patch) for patch in view.pixels[number]])
    else:
        zoom = zoom_of(view.pixels)
        drawn = to_image(view.pixels[number], zoom)
        if shared is not None:
            draw_cells(drawn, [float(edge) * zoom for edge in shared], cells, bool(view.flipped[number]))
    ImageDraw.Draw(drawn).rectangle((0, 0, drawn.width - 1, drawn.height - 1), outline=frame, width=2)
    return drawn


def zoom_of(pixels) -> int:
    return -(-LEAST_SIDE // pixels.shape[-1])


def draw_cells(image: Image.Image, box: list[float], cells: int, flipped: bool) -> None:
    """A grid over `box`, numbered as a loss pairs them: a flipped view's columns run backwards."""
    pen, shades = ImageDraw.Draw(image), colors(cells**2)
    width, height = (box[2] - box[0]) / cells, (box[3] - box[1]) / cells
    for number, color in enumerate(shades):
        row, column = divmod(number, cells)
        left = box[0] + (cells - 1 - column if flipped else column) * width
        top = box[1] + row * height
        pen.rectangle((left, top, left + width - 1, top + height - 1), outline=color)
        middle = left + width / 2, top + height / 2
        pen.text(middle, str(number + 1), fill=color, anchor="mm", stroke_width=1, stroke_fill="black")


def to_image(pixels, zoom: int = 1) -> Image.Image:
    """Normalized [3 H W] back to an image, enlarged `zoom` times."""
    levels = pixels.float().cpu().permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)
    image = Image.fromarray((levels * 255).round().clip(0, 255).astype(np.uint8))
    return image.resize((image.width * zoom, image.height * zoom), Image.NEAREST)


def beside(images: list[Image.Image], first_width: int = 0) -> Image.Image:
    """In a row, GAP px apart; the first one takes `first_width` px at least."""
    widths = [max(first_width, images[0].width), *(image.width for image in images[1:])]
    row = Image.new("RGB", (sum(widths) + GAP * (len(images) - 1), max(image.height for image in images)), "white")
    for number, image in enumerate(images):
        row.paste(image, (sum(widths[:number]) + GAP * number, 0))
    return row


def below(images: list[Image.Image]) -> Image.Image:
    """One below the other, GAP px apart."""
    heights = [image.height for image in images]
    sheet = Image.new("RGB", (max(image.width for image in images), sum(heights) + GAP * (len(images) - 1)), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (0, sum(heights[:number]) + GAP * number))
    return sheet


if __name__ == "__main__":
    guard.run_script("show_views.py", lambda: main(sys.argv[1:]))
