"""Pictures and sources for the tests of the writers: sound ones, odd ones, broken ones."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(height=24, width=32, mode="RGB", seed=0):
    """Smooth colors."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
    small = Image.frombytes(mode, (4, 4), coarse.tobytes())
    return small.resize((width, height), Image.Resampling.BILINEAR)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg_of(height=24, width=32, mode="RGB", seed=0, **options):
    return encoded(picture(height, width, mode, seed), **options)


def exif_turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees when shown"
    return jpeg_of(16, 40, exif=exif)


def noisy_jpeg(byte_count, seed=0):
    """A JPEG of about so many bytes."""
    side = int((byte_count / 2.2) ** 0.5)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), quality=95, subsampling=0)


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def two_classes(folder, count=10):
    return write_files(
        folder,
        {f"{'cat' if i % 3 else 'ape'}/{i}.jpg": jpeg_of(20 + i % 50, 30 + i % 70, seed=i) for i in range(count)},
    )


def contents(folder):
    """Every file's bytes, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def listed(folder: Path, name: str) -> dict:
    """rejected.jsonl or changed.jsonl: what is said of each name."""
    entries = map(json.loads, (folder / name).read_text().splitlines())
    return {entry["name"]: entry.get("reason") or entry["changes"] for entry in entries}


ARITHMETIC_JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWM"
    "T47pHU`kO^PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2J"
    "01*fP5C9MZ0U`hb5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zfIIi8TdE~hBFYb4I_OK?<iTHqAPtdvx;r0;vTvo8$*+Ln65"
    "j3oRoKmA}Tp#Rw"
)
"""16 x 16 px, arithmetic-coded: `jpegtran -arithmetic` of libjpeg-turbo."""
