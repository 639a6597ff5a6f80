"""What happens to one picture's bytes when a data set is packed: checked, perhaps shrunk, stored as JPEG or as pixels.

    prepared = prepare_picture(path.read_bytes(), Treatment(short_side=256))
    picture = read_picture(path)        the same pixels, for who wants no packed set: detection, attention maps

A sound JPEG that needs nothing is stored byte for byte. What some reader of the shards could not decode, or would decode
differently, is encoded once as a plain JPEG; what is damaged, or no picture, is a `BadPicture`. Each picture is decoded whole,
once, by libjpeg-turbo in strict mode: Pillow hides libjpeg's warnings and so takes corrupt data for sound.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, features

from data_prep.index import JPEG, RAW

MAX_SIDE = 65_500  # px: the longest side that libjpeg encodes or decodes
MAX_SCANS = 256  # of a progressive JPEG; DALI decodes no more. Real ones have about ten

# No more of Pillow's: some of its plugins start programs.
_OTHER_FORMATS = ("PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM") + ("JPEG2000",) * features.check("jpg_2000")
_OTHER_FORMATS += ("AVIF",) * ("avif" in features.modules and features.check("avif"))  # since Pillow 11.3
_GRAY_MODES = ("1", "L", "LA")
_COLOR_MODES = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr")

_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # starts of frame; those three are other segments
_COMMON_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # sequential and progressive, also arithmetic-coded
_BITS_PER_SAMPLE = 258  # a TIFF's tag
_APP1, _SOS = 0xE1, 0xDA
# Any marker may have filling before it; those left out stand alone, or are none.
_SEGMENT = re.compile(rb"\xff+([\x02-\xcf\xda-\xfe])(..)", re.DOTALL)

# Pillow's transpositions for EXIF's orientations 2 to 8.
_TURNS = "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"

# Pillow warns of large pictures and of odd metadata, once per place and in the middle of a progress bar. What matters
# is in `changes` or rejected.jsonl. For the whole process, as warnings.catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """The settings that decide the stored bytes."""

    short_side: int | None = None  # Shrink pictures whose shorter side is longer, px. None: store them as they are.
    max_resolution: int | None = None  # The same for the longer side.
    quality: int = 95  # JPEG quality, 1 to 100, of pictures that have to be encoded again.
    chroma: Literal["444", "420"] = "444"
    """Their color resolution: 420 halves it in either direction, which decodes faster and is less exact."""
    write_mode: Literal["jpg", "raw"] = "jpg"  # Store JPEG files, or RGB pixels.

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after shrinking, px; each at least 1."""
        limits = (self.short_side, min(height, width)), (self.max_resolution, max(height, width))
        scale = min([1.0, *(most / side for most, side in limits if most is not None)])
        return max(1, round(height * scale)), max(1, round(width * scale))


class Prepared(NamedTuple):
    """A picture as it is stored."""

    content: bytes
    encoding: int  # JPEG or RAW
    height: int  # of what is stored, px
    width: int
    changes: tuple[str, ...]  # why it is not the source's picture, such as "CMYK" or "shrunk"; empty where it is


class BadPicture(ValueError):
    """A picture that is left out: `kind` is counted in the manifest, the message is for rejected.jsonl."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)  # both, or it could not be pickled
        self.kind = kind

    def __str__(self) -> str:
        return ": ".join(filter(None, self.args))


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, as a packed set would have it: RGB, turned as EXIF says. BadPicture, naming the file, for what
    cannot be packed or read."""
    try:
        prepared = prepare_picture(Path(path).read_bytes(), Treatment(write_mode="raw"))
    except (OSError, BadPicture) as error:
        raise BadPicture(str(path), str(getattr(error, "strerror", error))) from None
    return Image.frombytes("RGB", (prepared.width, prepared.height), prepared.content)


def prepare_picture(source: bytes, treatment: Treatment, is_sound: bool = False) -> Prepared:
    """What to store for the picture file `source`. Raises BadPicture, and nothing else, for what cannot be stored. `is_sound`: it
    was decoded before, by this function; a JPEG that needs nothing is not decoded again."""
    if not source:
        raise BadPicture("empty file")
    try:
        if source.startswith(b"\xff\xd8\xff"):
            return _prepare_jpeg(source, treatment, is_sound)
        return _prepare_by_pillow(source, treatment, _OTHER_FORMATS)
    except BadPicture:
        raise
    except Image.UnidentifiedImageError:
        raise BadPicture("not a picture", f"it begins with {source[:8]!r}") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise BadPicture("too large", str(error) or "the memory does not suffice") from None
    except Exception as error:
        # All of them: broken files bring out struct.error, SyntaxError, IndexError, zlib.error and more, from whichever
        # line of a parser they reach first, and one file in a million must not end a run of hours.
        raise BadPicture("damaged", str(error) or type(error).__name__) from None


def _prepare_jpeg(source: bytes, treatment: Treatment, is_sound: bool) -> Prepared:
    height, width, components, orientation = read_header(source)
    limit = Image.MAX_IMAGE_PIXELS  # Pillow warns above it, refuses above twice it, and lets the user lift it
    if limit is not None and height * width > 2 * limit:
        raise BadPicture("too large", f"{width} x {height} px; {2 * limit} px are the most that is decoded")
    _check_sides(height, width)
    target = treatment.size(height, width)
    if components == 4:
        _decode_strictly(source, "CMYK")
        return _prepare_by_pillow(source, treatment, ("JPEG",), "CMYK")  # which knows what is stored inverted
    changes = [] if orientation == 1 else ["EXIF orientation"]  # some readers turn it, some do not
    if not changes and target == (height, width):
        if treatment.write_mode == "raw":
            return Prepared(_decode_strictly(source, "RGB").tobytes(), RAW, height, width, ())
        if not is_sound:
            # To gray, every coefficient is decoded all the same, and there damage is found. It saves the colors.
            _decode_strictly(source, "GRAY")
        return Prepared(source, JPEG, height, width, ())

    reduction, gray = _largest_reduction((height, width), target), components == 1
    least = math.ceil(height / reduction), math.ceil(width / reduction)
    pixels = _decode_strictly(source, "GRAY" if gray else "RGB", *least)
    picture = Image.fromarray(pixels[:, :, 0] if gray else pixels)
    # The last row and column of a scaled picture may stand for less than the others. Taken for whole, they would shift the
    # grid by up to a pixel: 28 dB instead of 45.
    part = (0, 0, width / reduction, height / reduction)
    return _store_pixels(picture, part, target, orientation, changes, treatment)


def _largest_reduction(size: tuple[int, int], target: tuple[int, int]) -> int:
    """By how much JPEG's own scaling divides the sides: as far as both stay at least twice the target's. On 125 photographs two
    to three times as fast as decoding the whole, and within 45 dB of it; quality 95 costs 39 dB."""
    fitting = [by for by in (2, 4, 8) if all(2 * by * new <= old for old, new in zip(size, target, strict=True))]
    return max(fitting, default=1)


def _decode_strictly(jpeg: bytes, color_space: str, least_height: int = 0, least_width: int = 0) -> np.ndarray:
    """Pixels, uint8 [height width channel], scaled down as far as the least sizes allow. BadPicture for whatever libjpeg warns
    of: also bytes that are left over, the usual end of a flipped bit."""
    options = {"colorspace": color_space, "min_height": least_height, "min_width": least_width, "min_factor": 2}
    try:
        return simplejpeg.decode_jpeg(jpeg, **options, strict=True)
    except ValueError as error:
        raise BadPicture("damaged", str(error)) from None  # 4:1:0 and stranger chroma, too


def read_header(jpeg: bytes) -> tuple[int, int, int, int]:
    """Height and width as decoded, px, number of components (1 gray, 3 color, 4 CMYK), EXIF's orientation, 1 to 8, not applied.
    BadPicture for one that is damaged, or of a kind that some decoder does not read."""
    frame, exif = None, b""
    for marker, start, end in _segments(jpeg):
        if marker in _FRAMES:
            frame = marker, start, end
        elif marker == _APP1 and not exif and jpeg.startswith(b"Exif\0\0", start):
            exif = jpeg[start:end]
    if frame is None:
        raise BadPicture("damaged", "its header names no size")
    marker, start, end = frame
    bits, height, width = struct.unpack_from(">BHH", jpeg, start)
    if bits != 8:
        raise BadPicture("not 8 bit", f"its samples have {bits} bits; convert it to 8")
    if marker not in _COMMON_FRAMES:  # FFCV decodes none, DALI no gray one
        raise BadPicture("lossless JPEG", "convert it to PNG")
    if not height or not width:
        raise BadPicture("damaged", f"its header names a size of {width} x {height} px")
    if marker in (0xC2, 0xCA):  # progressive
        scans = jpeg.count(b"\xff\xda", end, jpeg.find(b"\xff\xd9", end))
        if scans > MAX_SCANS:
            raise BadPicture("too many scans", f"{scans} of them; DALI decodes at most {MAX_SCANS}")
    return height, width, len(jpeg[start + 7 : end : 3]), _exif_orientation(exif)


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """The header's segments, as libjpeg finds them, to the first scan: marker (its second byte), where its content begins
    and ends."""
    end = 2
    while found := _SEGMENT.search(jpeg, end):
        marker, end = found[1][0], found.end(1) + int.from_bytes(found[2], "big")
        yield marker, found.end(), end
        if marker == _SOS:
            return
    raise BadPicture("damaged", "its header is cut short")


def _prepare_by_pillow(source: bytes, treatment: Treatment, formats: tuple[str, ...], kind: str = "") -> Prepared:
    """`kind`: what it is, in `changes`; else its format."""
    with Image.open(io.BytesIO(source), formats=formats) as opened:
        opened.load()  # the first frame. TIFF's orientation is applied here, by Pillow
        changes = [kind or opened.format]
        # "I" in Pillow before 11, and in a PGM.
        if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM")):
            bits = opened.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] if opened.format == "TIFF" else 16  # or 12
            picture = Image.fromarray((np.asarray(opened) >> (bits - 8)).astype(np.uint8))  # Pillow's conversion clips
            changes.append("16 bit")
        elif opened.mode in _GRAY_MODES + _COLOR_MODES:  # alpha is dropped, as torchvision's loader does
            picture = opened.convert("L" if opened.mode in _GRAY_MODES else "RGB")
        else:
            raise BadPicture("unusual pixels", f"its mode is {opened.mode}; convert it to 8 bit RGB or gray")
        orientation = _exif_orientation(opened.info.get("exif", b""))
    if orientation != 1:
        changes.append("EXIF orientation")
    target = treatment.size(picture.height, picture.width)
    _check_sides(*target)
    return _store_pixels(picture, (0, 0, *picture.size), target, orientation, changes, treatment)


def _exif_orientation(content: bytes) -> int:
    """1 to 8; 1, as it is, also where the EXIF data are broken."""
    if not content:
        return 1
    exif = Image.Exif()
    try:
        exif.load(content)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in range(2, 9) else 1
    except Exception:  # of many kinds, and a picture with broken EXIF data is no broken picture
        return 1


def _store_pixels(
    picture: Image.Image, part: tuple[float, float, float, float], target: tuple[int, int], orientation: int,
    changes: list[str], treatment: Treatment,
) -> Prepared:  # fmt: skip
    """`picture`, RGB or gray: its `part` (left, top, right, bottom) resized to `target`, turned and encoded. `target` is height
    and width before turning."""
    if part != (0, 0, target[1], target[0]):
        # Antialiased. Bicubic is sharper than bilinear, rings less than Lanczos and is a third cheaper.
        picture = picture.resize(target[::-1], Image.Resampling.BICUBIC, box=part)
        changes.append("shrunk")
    if orientation != 1:
        picture = picture.transpose(Image.Transpose[_TURNS[orientation - 2]])
    width, height = picture.size
    if treatment.write_mode == "raw":
        return Prepared(picture.convert("RGB").tobytes(), RAW, height, width, tuple(changes))
    # From bare pixels, so that no EXIF, ICC or comment is carried along.
    gray = picture.mode == "L"
    pixels = np.asarray(picture)[:, :, None] if gray else np.asarray(picture)
    jpeg = simplejpeg.encode_jpeg(pixels, treatment.quality, "GRAY" if gray else "RGB", treatment.chroma)
    return Prepared(jpeg, JPEG, height, width, tuple(changes))


def _check_sides(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        raise BadPicture("too large", f"{width} x {height} px; JPEG libraries go to {MAX_SIDE} px a side")
