"""Side by side, for any number of checkpoints: what the trunk looks at on given pictures, as one PNG (the paper's Fig. 3).

    python scripts/attention_maps.py --runs runs/moco runs/inscon --pictures a.jpg b.jpg --out attention.png

A column per run (a run folder, a checkpoint or an exported file; "random" is the first one's network before training), a row
per picture. What is shown is where res5 is strong: the sum of squares over its channels (`inscon.transfer.attention`).
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
from inscon.encoder import Trunk
from inscon.transfer.attention import attention, heat
from inscon.transfer.export import any_trunk
from pipelines.color import MEAN, STD

GAP, TITLE = 8, 18


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One picture of what trunks look at."""

    runs: tuple[str, ...]
    """Run folders, checkpoints or exported files, one column each; "random" for the first one's network before training."""
    pictures: tuple[Path, ...]
    """Image files, one row each."""
    out: Path = Path("attention.png")
    """The PNG."""
    side: int = 448
    """Shorter side that the network sees, px; both sides are rounded to multiples of 32."""
    stage: Literal["res4", "res5"] = "res5"
    """Whose strength is shown."""


def main(config: AttentionConfig) -> Path:
    if config.side < 64:
        raise ValueError(f"side must be at least 64 px, two features of res5. Found: {config.side}; set --side 448")
    guard.check_output_file(config.out)
    columns = [(name, trunk_of(name, config.runs)) for name in config.runs]
    rows = [picture_of(path, config.side) for path in config.pictures]
    cells = [
        [np.asarray(picture)] + [overlaid(picture, trunk, config.stage) for _, trunk in columns] for picture in rows
    ]
    sheet = draw(cells, ["picture", *(name for name, _ in columns)])
    encoded = io.BytesIO()
    sheet.save(encoded, Image.registered_extensions().get(config.out.suffix.lower(), "PNG"))
    with guard.whole_file(config.out) as file:
        file.write(encoded.getvalue())
    print(
        f"{config.out}: {len(rows)} pictures, {len(columns)} trunks; bright is where {config.stage} is strong (sum of squares)"
    )
    return config.out


def trunk_of(name: str, runs: tuple[str, ...]) -> Trunk:
    """The trunk of a column."""
    if name != "random":
        return any_trunk(Path(name))[0]
    real = [run for run in runs if run != "random"]
    if not real:
        raise ValueError('runs must name a run whose network "random" is before training. Found: random alone')
    return any_trunk(Path(real[0]), untrained=True)[0]


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


def overlaid(picture: Image.Image, trunk: Trunk, stage: str) -> np.ndarray:
    """[H W 3] uint8: the picture in gray, and over it where the trunk is strong."""
    levels = torch.from_numpy(np.array(picture)).float() / 255
    pixels = ((levels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
    strength = attention(trunk, pixels, stage)[0]
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
