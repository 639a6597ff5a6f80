"""Side by side, for any number of checkpoints: what the backbone looks at on given pictures, as one PNG (the paper's Fig. 3).

    python scripts/attention_maps.py --runs runs/moco runs/inscon --pictures a.jpg b.jpg --out attention.png

A column per run (a run folder, a checkpoint or an exported file; "random" is the first one's network before training), a row
per picture. What is shown is where a map is strong: the sum of squares over its channels (`inscon.transfer.attention`).
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageDraw

from data_prep.pictures import BadPicture, read_picture
from inscon import guard
from inscon.nn.backbones import Backbone
from inscon.transfer.attention import STAGES, attention, heat
from inscon.transfer.export import any_backbone
from pipelines.color import MEAN, STD

GAP, TITLE = 8, 18


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One picture of what backbones look at."""

    runs: tuple[str, ...]
    """Run folders, checkpoints or exported files, one column each; "random" for the first one's network before training."""
    pictures: tuple[Path, ...]
    """Image files, one row each."""
    out: Path = Path("attention.png")
    """The PNG."""
    side: int = 448
    """Shorter side that the network sees, px; both sides are rounded to multiples of 32."""
    stage: Literal["res4", "res5"] | None = None
    """Whose strength is shown: the map of stride 16 or 32 px. None: the last map of each backbone."""


def main(config: AttentionConfig) -> Path:
    if config.side < 64:
        raise ValueError(
            f"side must be at least 64 px, two cells of a ResNet's last map. Found: {config.side}; set --side 448"
        )
    guard.check_output_file(config.out)
    columns = [(name, backbone_of(name, config)) for name in config.runs]
    rows = [picture_of(path, config.side) for path in config.pictures]
    cells = [
        [np.asarray(picture)] + [overlaid(picture, backbone, config.stage) for _, backbone in columns]
        for picture in rows
    ]
    sheet = draw(cells, ["picture", *(name for name, _ in columns)])
    encoded = io.BytesIO()
    sheet.save(encoded, Image.registered_extensions().get(config.out.suffix.lower(), "PNG"))
    with guard.whole_file(config.out) as file:
        file.write(encoded.getvalue())
    shown = config.stage or "the last map"
    print(
        f"{config.out}: {len(rows)} pictures, {len(columns)} backbones; bright is where {shown} is strong (sum of squares)"
    )
    return config.out


def backbone_of(name: str, config: AttentionConfig) -> Backbone:
    """The backbone of a column. ValueError where it has no such stage."""
    real = next((run for run in config.runs if run != "random"), None)
    if real is None:
        raise ValueError('runs must name a run whose network "random" is before training. Found: random alone')
    backbone, _ = any_backbone(Path(real if name == "random" else name), untrained=name == "random")
    if config.stage is not None:
        backbone.check_stride(STAGES[config.stage], "--stage", f"{name}'s backbone")
    return backbone


def picture_of(path: Path, side: int) -> Image.Image:
    """A picture in RGB, resized so that the network can see it."""
    if not path.exists():
        raise ValueError(f"there is no picture {path}; give image files to --pictures")
    try:
        picture = read_picture(path)
    except BadPicture as bad:
        raise ValueError(f"{bad}; give image files to --pictures") from None
    scale = side / min(picture.size)
    size = [max(round(length * scale / 32), 2) * 32 for length in picture.size]
    return picture.resize(size, Image.BILINEAR)


def overlaid(picture: Image.Image, backbone: Backbone, stage: str | None) -> np.ndarray:
    """[H W 3] uint8: the picture in gray, and over it where the backbone is strong."""
    levels = torch.from_numpy(np.array(picture)).float() / 255
    pixels = ((levels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
    strength = attention(backbone, pixels, STAGES.get(stage))[0]
    shown = 0.45 * levels.mean(-1, keepdim=True) + 0.55 * heat(strength)
    return (255 * shown.clamp(0, 1)).byte().numpy()


def draw(cells: list[list[np.ndarray]], titles: list[str]) -> Image.Image:
    """One sheet of rows of pictures, those of a row of equal size, under their titles."""
    widths = [max(row[column].shape[1] for row in cells) for column in range(len(titles))]
    heights = [row[0].shape[0] for row in cells]
    sheet = Image.new(
        "RGB", (sum(widths) + GAP * (len(widths) - 1), TITLE + sum(heights) + GAP * len(heights)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = sum(widths[:column]) + GAP * column
        pen.text((x + 2, 3), title, fill="black")
        for number, row in enumerate(cells):
            sheet.paste(Image.fromarray(row[column]), (x, TITLE + sum(heights[:number]) + GAP * number))
    return sheet


if __name__ == "__main__":
    guard.run_script("attention_maps.py", lambda: main(tyro.cli(AttentionConfig, description=__doc__)))
