"""Side by side, for any number of checkpoints: what the backbone looks at on given pictures, as one PNG (the paper's Fig. 3).

    python scripts/attention_maps.py --runs runs/moco runs/inscon --pictures a.jpg b.jpg --out attention.png

A column per run (a run folder, a checkpoint or an exported file; "random" is the first one's network before training), a row
per picture. Bright is where the last map is strong: the sum of squares over its channels (Zagoruyko and Komodakis, "Paying more
attention to attention", ICLR 2017, F_sum^2), which needs no label, head or gradient. The paper doesn't say how it made its figure.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

if not __package__:  # run as a script, beside which Python looks
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torchvision.transforms.functional import normalize, to_pil_image, to_tensor

from data_prep.pictures import BadPicture, read_picture
from inscon import guard
from inscon.nn.backbones import Backbone
from inscon.transfer.export import any_backbone
from pipelines.color import MEAN, STD

GAP, TITLE = 8, 18


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One picture of what backbones look at."""

    runs: tuple[str, ...]
    """Run folders, checkpoints or exported files, one column each; "random" for the first one's network before training."""
    pictures: tuple[Path, ...]  # Image files, one row each.
    out: Path = Path("attention.png")  # The PNG.
    side: int = 448  # Shorter side that the network sees, px, at least 64; both sides are rounded to multiples of 32.


def main(config: AttentionConfig) -> Path:
    guard.check_output_file(config.out)
    guard.check_ranges(config, side=64)
    first = next((run for run in config.runs if run != "random"), None)
    if first is None:
        raise ValueError('--runs must name a run; "random" is its network before training. Found: no run')
    if not config.pictures:
        raise ValueError("--pictures must name image files. Found: none")
    pictures = [picture_of(path, config.side) for path in config.pictures]
    columns = [titled("picture", pictures)]
    for name in config.runs:
        backbone, _ = any_backbone(Path(first if name == "random" else name), untrained=name == "random")
        columns.append(titled(name, [overlaid(picture, backbone) for picture in pictures]))
    with guard.whole_file(config.out) as file:
        joined(columns).save(file, "PNG")
    print(f"{config.out}: {len(pictures)} pictures, {len(config.runs)} backbones; bright: the last map is strong")
    return config.out


def picture_of(path: Path, side: int) -> Image.Image:
    """A picture in RGB, resized so that the network can see it."""
    try:
        picture = read_picture(path)
    except BadPicture as bad:
        raise ValueError(f"there is no picture to be read: {bad}; give image files to --pictures") from None
    scale = side / min(picture.size)
    return picture.resize([max(round(length * scale / 32), 2) * 32 for length in picture.size], Image.BILINEAR)


def overlaid(picture: Image.Image, backbone: Backbone) -> Image.Image:
    """The picture in gray, and over it, in red and white, where the backbone is strong."""
    strength = to_pil_image(attention(backbone, picture))
    heat = ImageOps.colorize(strength, "black", "white", "red").resize(picture.size, Image.BILINEAR)
    return Image.blend(ImageOps.grayscale(picture).convert("RGB"), heat, 0.55)


@torch.inference_mode()
def attention(backbone: Backbone, picture: Image.Image) -> Float[Tensor, "h w"]:
    """Strength of the last map, 0..1; all 0 where it is flat. ValueError for a size that the backbone does not take."""
    pixels = normalize(to_tensor(picture), MEAN, STD)[None]
    try:
        energy = backbone(pixels)[backbone.last][0].float().square().sum(0)
    except (AssertionError, RuntimeError) as error:  # of timm's networks that take one size
        found = f"the backbone takes no picture of {picture.size} px ({error})"
        raise ValueError(f"{found}; set another --side, or crop it to a square") from None
    low, high = energy.min(), energy.max()
    return (energy - low) / torch.maximum(high - low, 1e-6 * high).clamp(min=1e-30)


def titled(title: str, pictures: list[Image.Image]) -> Image.Image:
    """A column."""
    strip = Image.new("RGB", (max(picture.width for picture in pictures), TITLE), "white")
    ImageDraw.Draw(strip).text((2, 3), title, fill="black")
    return joined([strip, *pictures], down=True)


def joined(images: list[Image.Image], down: bool = False) -> Image.Image:
    """In a row, or one below the other, GAP px apart, on white."""
    axis = int(down)
    ends = [sum(image.size[axis] + GAP for image in images[:count]) for count in range(len(images) + 1)]
    breadth = max(image.size[1 - axis] for image in images)
    sheet = Image.new("RGB", (breadth, ends[-1] - GAP) if down else (ends[-1] - GAP, breadth), "white")
    for start, image in zip(ends, images):
        sheet.paste(image, (0, start) if down else (start, 0))
    return sheet


if __name__ == "__main__":
    guard.run_script("attention_maps.py", lambda: main(tyro.cli(AttentionConfig, description=__doc__)))
