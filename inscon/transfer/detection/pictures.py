"""What a detector sees, beside what is there: boxes, names, scores and masks, drawn on pictures of a data set."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from inscon import guard
from inscon.transfer.detection.coco import Categories, CocoSet

WIDTH = 480
"""Of one picture, px."""
GAP = 4
OPACITY = 0.45
"""Of a mask."""


@torch.inference_mode()
def samples(
    model: nn.Module, data: CocoSet, path: Path, device: torch.device, masks: bool, count: int = 4,
    least_score: float = 0.5,
) -> None:  # fmt: skip
    """Write a picture of `count` rows spread over the set: on the left what the json says, on the right what is found."""
    model.eval()
    positions = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)).tolist()
    rows = []
    for position in positions:
        image = data.pixels(position)
        (made,) = model([image.to(device)])
        sure = made["scores"] >= least_score
        found = {name: value[sure].cpu() for name, value in made.items()}
        if masks:
            found["masks"] = found["masks"][:, 0] > 0.5
        pair = [draw(image, there, data.categories) for there in (data.target(position, masks), found)]
        rows.append(_beside(pair))
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height + GAP for r in rows) - GAP), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    with guard.whole_file(path) as file:
        sheet.save(file, "PNG")


def draw(image: Tensor, objects: dict[str, Tensor], categories: Categories) -> Image.Image:
    """`image` [3 H W] in 0..1 with `boxes` [n 4] in px, `labels` [n], and maybe `masks` [n H W] and `scores` [n] on it."""
    pixels, labels = (image.permute(1, 2, 0) * 255).round().numpy(), objects["labels"].tolist()
    for mask, label in zip(objects.get("masks", ()), labels, strict="masks" in objects):
        inside = mask.bool().numpy()
        pixels[inside] = (1 - OPACITY) * pixels[inside] + OPACITY * np.array(color(label))
    picture = Image.fromarray(pixels.astype(np.uint8))
    scale = WIDTH / picture.width
    picture = picture.resize((WIDTH, max(1, round(picture.height * scale))))
    pen = ImageDraw.Draw(picture)
    scores = objects["scores"].tolist() if "scores" in objects else [None] * len(labels)
    for box, label, score in zip(objects["boxes"].tolist(), labels, scores, strict=True):
        corners = [scale * edge for edge in box]
        pen.rectangle(corners, outline=color(label), width=2)
        words = categories.names[label - 1] + ("" if score is None else f" {score:.2f}")
        place = pen.textbbox((max(corners[0], 0), max(corners[1] - 12, 0)), words)
        pen.rectangle(place, fill=color(label))
        pen.text(place[:2], words, fill="black", anchor="la")
    return picture


def color(label: int) -> tuple[int, int, int]:
    """A light color of its own for each category."""
    turned = Image.new("HSV", (1, 1), (label * 97 % 256, 140, 255)).convert("RGB")
    return turned.getpixel((0, 0))


def _beside(pictures: list[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(p.width + GAP for p in pictures) - GAP, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + GAP
    return row
