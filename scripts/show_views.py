"""Draw what a method sees: sources with their crops, the views of each, what two views share, and mosaics.

    python scripts/show_views.py --data SHARDS --out views.png
    python scripts/show_views.py --data SHARDS --out views.png --method moco --step 0 --pipeline reference

The plan is a pure function, so this is exactly what step N of a run with the same seed and batch size trains on. Where two views
must overlap, a grid of cells lies over what they share: cells with the same number and color show the same part of the source.
A jigsaw's patches stand in a row. Every flag of scripts/train.py is taken too (--recipe, --batch-size, ...).
"""

import argparse
import colorsys
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

if not __package__:  # run as a script, beside which Python looks
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.index import DatasetIndex
from inscon import guard
from inscon.batch import Batch
from inscon.config import Config
from inscon.methods.method import resolve
from inscon.scripts.attention_maps import joined
from inscon.scripts.train import feed_of, fitted, parse
from pipelines import open_pipeline
from pipelines.color import MEAN, STD
from pipelines.reference import picture_of

CELLS = 3  # Per side of the grid over what two views share.
LEAST_SIDE = 192  # Smaller views are enlarged by a whole number of times, so that the cells' numbers can be read.


def options() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    own = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    own.add_argument("--out", type=Path, default=Path("views.png"), help="the PNG (default: views.png)")
    own.add_argument("--step", type=int, default=0, help="of the run (default: 0, the first)")
    own.add_argument("--images", type=int, default=4, help="rows, at most the batch (default: 4)")
    return own


def main(arguments: list[str]) -> Path:
    chosen, rest = options().parse_known_args(arguments)
    guard.check_ranges(chosen, step=0, images=1)
    config = fitted(parse(rest), rest, 1)
    guard.check_output_file(chosen.out)
    drawn = sheet(config, chosen.step, chosen.images)
    with guard.whole_file(chosen.out) as file:
        drawn.save(file, "PNG")
    views = ", ".join(view.name for view in config.method.view_specs(config.views))
    print(f"{chosen.out}: {min(chosen.images, config.optim.batch_size)} images of step {chosen.step}: source, {views}")
    return chosen.out


def sheet(config: Config, step: int = 0, images: int = 4) -> Image.Image:
    """What step `step` of a run as `config` says trains on: its first images, at most the batch. ValueError without shards."""
    config = resolve(config, 1)
    if config.loader.data is None or config.loader.pipeline == "synthetic":
        raise ValueError("there is nothing to draw without shards; set --data SHARDS and no --pipeline synthetic")
    feed = feed_of(config)
    with open_pipeline(feed, config.loader, start_step=step, total_steps=step + 1) as loader:
        batch = next(iter(loader))
    return draw(batch, feed.index, min(images, batch.size))


def draw(batch: Batch, index: DatasetIndex, images: int) -> Image.Image:
    """The whole sheet: a row per image (source; two by two the views that overlap; the other views), a mosaic below."""
    frames = dict(zip(batch.views, colors(len(batch.views))))
    single = [name for name in frames if not any(name in pair for pair in batch.overlaps)]
    rows = []
    for number in range(images):
        views = [
            draw_view(batch, name, number, frames[name], box[number] if overlap.weight[number] > 0 else None)
            for pair, overlap in batch.overlaps.items()
            for name, box in zip(pair, (overlap.first_box, overlap.second_box))
        ]
        views += [draw_view(batch, name, number, frames[name]) for name in single]
        boxes = {frame: batch.views[name].crop_box[number] for name, frame in frames.items()}
        source = picture_of(index, int(batch.sample_ids[number]))
        rows.append(joined([draw_source(source, boxes, max(view.height for view in views)), *views]))
    return joined(rows if batch.mosaic is None else [*rows, to_image(batch.mosaic[0])], down=True)


def colors(count: int) -> list[tuple[int, int, int]]:
    """As many, as different as can be."""
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(n / count, 0.9, 1.0)) for n in range(count)]


def draw_source(source: Image.Image, boxes: dict, height: int) -> Image.Image:
    """The source image, fitted into `height` and twice as much width, with crop boxes by color."""
    scale = min(2 * height / source.width, height / source.height)
    fitted = ImageOps.pad(source, (2 * height, height), color="white", centering=(0, 0))
    for color, box in boxes.items():
        x0, y0, x1, y1 = (float(edge) * scale for edge in box)
        ImageDraw.Draw(fitted).rectangle((x0, y0, x1 - 1, y1 - 1), outline=color, width=2)
    return fitted


def draw_view(batch: Batch, name: str, number: int, frame: tuple, shared=None) -> Image.Image:
    """One view of an image, or its patches in a row, framed; with cells over the box `shared` [4], px of the view, if given."""
    view, pixels = batch.views[name], batch.views[name].pixels[number]
    drawn = joined([to_image(patch, least_side=1) for patch in pixels]) if pixels.ndim == 4 else to_image(pixels)
    if shared is not None and pixels.ndim == 3:
        zoom = drawn.width / pixels.shape[-1]
        draw_cells(drawn, [float(edge) * zoom for edge in shared], bool(view.flipped[number]))
    ImageDraw.Draw(drawn).rectangle((0, 0, drawn.width - 1, drawn.height - 1), outline=frame, width=2)
    return drawn


def draw_cells(image: Image.Image, box: list[float], flipped: bool) -> None:
    """A grid over `box`, numbered as a loss pairs them: a flipped view's columns run backwards."""
    pen = ImageDraw.Draw(image)
    width, height = (box[2] - box[0]) / CELLS, (box[3] - box[1]) / CELLS
    for number, color in enumerate(colors(CELLS**2)):
        row, column = divmod(number, CELLS)
        left = box[0] + (CELLS - 1 - column if flipped else column) * width
        top = box[1] + row * height
        pen.rectangle((left, top, left + width - 1, top + height - 1), outline=color)
        middle = left + width / 2, top + height / 2
        pen.text(middle, str(number + 1), fill=color, anchor="mm", stroke_width=1, stroke_fill="black")


def to_image(pixels, least_side: int = LEAST_SIDE) -> Image.Image:
    """Normalized [3 H W] back to an image, enlarged a whole number of times to `least_side` px or more."""
    levels = pixels.float().cpu().permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)
    image = Image.fromarray((levels * 255).round().clip(0, 255).astype(np.uint8))
    return ImageOps.scale(image, -(-least_side // image.width), Image.NEAREST)


if __name__ == "__main__":
    guard.run_script("show_views.py", lambda: main(sys.argv[1:]))
