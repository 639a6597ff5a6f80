"""One picture's bytes: kept where they are sound, put right where that is possible, refused where pixels are lost.

Pillow and torchvision's loader say what the pixels should be; in raw mode they must be exactly those.
"""

import base64
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, features
from torchvision.datasets.folder import default_loader

from data_prep.pictures import (
    JPEG,
    RAW,
    BadPicture,
    Prepared,
    Treatment,
    prepare_picture,
    read_picture,
)

ROOT = Path(__file__).resolve().parents[2]
REAL = sorted((ROOT.parent / "shared/data/imagenet_sample/train").glob("*/*.JPEG"))

ARITHMETIC = base64.b64decode(  # libjpeg-turbo's cjpeg -arithmetic: 16 x 16 px, 4:2:0
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1R"
    "V19iZ2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2NjY2NjY2NjY2NjY2P/yQARCAAQABADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AG2d4kF95r7bOCAY"
    "2FHVo4Jki5/q0emIC6uQ/9k="
)
RAW_MODE = Treatment(write_mode="raw")

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest puts its own filters over the module's


def scene(height=70, width=93, mode="RGB", seed=0):
    """A picture that is smooth here and rough there, as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noise = rng.normal(0, 12, smooth.shape) * (smooth[:, :, :1] > 128)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).convert(mode)


RARE = {"JPEG2000": "jpg_2000", "AVIF": "avif"}


def encoded(picture, file_format="JPEG", **options):
    if file_format in RARE and not features.check(RARE[file_format]):
        pytest.skip(f"this Pillow has no {file_format}")
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    return exif


def gray_16(picture):
    """Its gray as 16 bits whose lower eight are noise."""
    high = np.asarray(picture.convert("L")).astype(np.uint16) << 8
    return Image.fromarray(high | np.random.default_rng(1).integers(0, 256, high.shape, dtype=np.uint16))


def pixels_of(prepared):
    """RGB, uint8 [height width 3], of what is stored."""
    shape = prepared.height, prepared.width, 3
    if prepared.encoding == RAW:
        return np.frombuffer(prepared.content, np.uint8).reshape(shape)
    pixels = simplejpeg.decode_jpeg(prepared.content, "RGB", strict=True)
    assert pixels.shape == shape
    return pixels


def rgb(source):
    return np.asarray(Image.open(io.BytesIO(source)).convert("RGB"))


def noise_db(picture, reference):
    """Peak signal to noise, dB."""
    error = np.mean((np.asarray(picture).astype(float) - np.asarray(reference)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


def patched(content, find, offset, new):
    at = content.index(find) + offset
    return content[:at] + new + content[at + len(new) :]


def inserted(content, before, extra):
    at = content.index(before)
    return content[:at] + extra + content[at:]


SOUND = {
    "4:2:0": encoded(scene(), subsampling=2),
    "4:2:2": encoded(scene(), subsampling=1),
    "4:4:4": encoded(scene(), subsampling=0),
    "gray": encoded(scene(mode="L")),
    "progressive": encoded(scene(), progressive=True),
    "progressive gray": encoded(scene(mode="L"), progressive=True),
    "restart markers": encoded(scene(), restart_marker_blocks=2),
    "RGB inside": encoded(scene(), keep_rgb=True),
    "arithmetic": ARITHMETIC,
    "one pixel": encoded(scene(1, 1)),
    "metadata": encoded(scene(), exif=exif_of(1), icc_profile=b"profile" * 20_000, comment=b"text"),
    "trailing bytes": encoded(scene()) + b"\xff\xda and more",
}


def mutants(content, count, seed):
    """Copies with a few flipped, changed, inserted or missing bytes."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        mutant = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at, length = int(rng.integers(2, len(mutant))), int(rng.integers(1, 20))
            match int(rng.integers(6)):
                case 0 | 1:
                    mutant[at] ^= 1 << int(rng.integers(8))
                case 2:
                    mutant[at % 400] = int(rng.integers(256))  # the header
                case 3:
                    mutant[at:at] = rng.bytes(length)
                case 4 if length < len(mutant) - 4:
                    del mutant[at : at + length]
                case 5 if at > 8:
                    del mutant[at:]
        yield bytes(mutant)


# ------------------------------------------------------------------------------------------------- sound JPEGs


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_jpeg_is_kept_byte_for_byte(name):
    height, width = rgb(SOUND[name]).shape[:2]
    assert prepare_picture(SOUND[name], Treatment()) == Prepared(SOUND[name], JPEG, height, width, ())
    large_enough = Treatment(short_side=min(height, width), max_resolution=max(height, width))
    assert prepare_picture(SOUND[name], large_enough).content == SOUND[name]


@pytest.mark.parametrize("name", SOUND)
def test_pixels_are_those_that_pillow_decodes(name):
    prepared = prepare_picture(SOUND[name], RAW_MODE)
    assert (prepared.encoding, prepared.changes) == (RAW, ())
    np.testing.assert_array_equal(pixels_of(prepared), rgb(SOUND[name]))


@pytest.mark.skipif(not REAL, reason="the real ImageNet sample is not beside the project")
def test_real_pictures_are_kept_and_decode_as_pillow_does():
    for path in REAL:
        source = path.read_bytes()
        prepared = prepare_picture(source, Treatment())
        assert (prepared.content, prepared.changes) == (source, ()), path
        assert (prepared.height, prepared.width) == rgb(source).shape[:2]
        np.testing.assert_array_equal(pixels_of(prepare_picture(source, RAW_MODE)), rgb(source), str(path))


# ---------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", SOUND)
def test_decoding_to_gray_refuses_exactly_what_decoding_to_rgb_refuses(name):
    """That is why a picture that is kept needs no colors decoded."""

    def complaint(content, color_space):
        try:
            simplejpeg.decode_jpeg(content, color_space, strict=True)
        except ValueError as error:
            return str(error)

    complaints = [(complaint(m, "GRAY"), complaint(m, "RGB")) for m in mutants(SOUND[name], 300, seed=2)]
    assert all(gray == color for gray, color in complaints)
    assert len({gray for gray, _ in complaints}) > 5


WHOLE = encoded(scene())
BROKEN_ICC = patched(SOUND["metadata"], b"ICC_PROFILE\0", 12, b"\x07")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty file"),
        (b"this is text", "not a picture: it begins with b'this is '"),
        (b"\xff\xd8\xff", "damaged: its header is cut short"),
        (WHOLE[:300], "damaged: its header is cut short"),
        (WHOLE[: len(WHOLE) // 2], "damaged: Premature end of JPEG file"),
        (WHOLE[:-2], "damaged: Premature end of JPEG file"),
        (
            WHOLE[:-2] + b"left over data" + WHOLE[-2:],
            r"damaged: Corrupt JPEG data: \d+ extraneous bytes before marker",
        ),
        (WHOLE[:-2] + b"\0" * 12 + WHOLE[-2:], r"damaged: Corrupt JPEG data: \d+ extraneous bytes before marker"),
        (BROKEN_ICC, "damaged: .*ICC marker"),
        (patched(WHOLE, b"JFIF\0", 5, b"\x02"), "damaged: .*JFIF revision"),
        (b"\xff\xd8" + WHOLE, "damaged: .*subsampling level"),
        (patched(WHOLE, b"\xff\xc0", 5, b"\0\0"), "damaged: its header names a size of 93 x 0 px"),
        (patched(WHOLE, b"\xff\xc0", 1, b"\xfe"), "damaged: its header names no size"),
        (patched(WHOLE, b"\xff\xc0", 4, b"\x0c"), "not 8 bit: its samples have 12 bits; convert it to 8"),
        (patched(WHOLE, b"\xff\xc0", 1, b"\xc3"), "lossless JPEG: convert it to PNG"),
        (patched(WHOLE, b"\xff\xc0", 11, b"\x42"), "damaged: .*subsampling level"),
        (patched(WHOLE, b"\xff\xc0", 5, b"\xff\xdd"), "too large: 93 x 65501 px; JPEG libraries go to 65500 px a side"),
        (encoded(scene(), "PNG")[:-50], "damaged: image file is truncated"),
        (patched(encoded(scene(), "PNG"), b"IDAT", 900, b"\0\0\0"), "damaged: unrecognized data stream"),
        (encoded(scene(), "WEBP")[:-50], "damaged: "),
        (encoded(scene(), "BMP")[:-50], "damaged: image file is truncated"),
        (encoded(Image.new("F", (3, 2)), "TIFF"), "unusual pixels: its mode is F; convert it to 8 bit RGB or gray"),
        (encoded(Image.new("I", (3, 2)), "TIFF"), "unusual pixels: its mode is I; convert it to 8 bit RGB or gray"),
        (encoded(scene(), "TGA"), "not a picture: it begins with b'"),
        (encoded(scene(), "PPM")[:-50], "damaged: image file is truncated"),
        (b"\0\0\0\x18ftypheic" + bytes(99), "not a picture: it begins with .*ftyp"),
        (b"\xff\x0a" + bytes(99), "not a picture: it begins with b"),
        (encoded(Image.new("1", (65_501, 1)), "PNG"), "too large: 65501 x 1 px; JPEG libraries go to 65500 px a side"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_reason(source, message):
    with pytest.raises(BadPicture, match="^" + message) as caught:
        prepare_picture(source, Treatment())
    assert str(caught.value).startswith(caught.value.kind)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_progressive_jpeg_of_countless_scans_is_refused():
    source = SOUND["progressive"]
    last = source.rindex(b"\xff\xda")
    with pytest.raises(BadPicture, match="too many scans: 310 of them; DALI decodes at most 256"):
        prepare_picture(source[:last] + source[last:-2] * 301 + source[-2:], Treatment())


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF"])
def test_more_pixels_than_pillow_allows_are_refused_and_less_are_no_warning(file_format):
    program = f"""
import io
from PIL import Image
from data_prep.pictures import BadPicture, Treatment, prepare_picture
file = io.BytesIO()
Image.new("L", (40, 30)).save(file, "{file_format}")
for Image.MAX_IMAGE_PIXELS in (None, 1000, 500):
    try:
        print(prepare_picture(file.getvalue(), Treatment(short_side=9)).height)
    except BadPicture as bad:
        print(bad.kind)
"""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("9\n9\ntoo large\n", "")


@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "CMYK", "PPM", "JPEG2000", "AVIF"]
)
def test_a_hostile_file_is_refused_or_stored_sound(file_format):
    picture = scene().convert("CMYK") if file_format == "CMYK" else scene()
    options = {"exif": exif_of(6)} if file_format in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    source = encoded(picture, file_format.replace("CMYK", "JPEG"), **options)
    treatments = Treatment(), RAW_MODE, Treatment(short_side=20), Treatment(max_resolution=40)
    refused = 0
    for number, mutant in enumerate(mutants(source, 400, seed=4)):
        try:
            pixels_of(prepare_picture(mutant, treatments[number % 4]))
        except BadPicture:
            refused += 1
    assert 50 < refused <= 400


# ------------------------------------------------------------------------------------------- other kinds of picture


PALETTE = scene().quantize(64)
ALPHA = scene()
ALPHA.putalpha(scene(mode="L", seed=1))
OTHERS = {
    "PNG": (encoded(scene(), "PNG"), ("PNG",)),
    "PNG gray": (encoded(scene(mode="L"), "PNG"), ("PNG",)),
    "PNG alpha": (encoded(ALPHA, "PNG"), ("PNG",)),
    "PNG gray alpha": (encoded(ALPHA.convert("LA"), "PNG"), ("PNG",)),
    "PNG palette": (encoded(PALETTE, "PNG"), ("PNG",)),
    "PNG transparent palette": (encoded(PALETTE, "PNG", transparency=bytes(range(64))), ("PNG",)),
    "PNG 1 bit": (encoded(scene(mode="1"), "PNG"), ("PNG",)),
    "WebP": (encoded(scene(), "WEBP"), ("WEBP",)),
    "WebP alpha": (encoded(ALPHA, "WEBP", lossless=True), ("WEBP",)),
    "WebP moving": (encoded(scene(), "WEBP", save_all=True, append_images=[scene(seed=1)]), ("WEBP",)),
    "BMP": (encoded(scene(), "BMP"), ("BMP",)),
    "TIFF": (encoded(scene(), "TIFF"), ("TIFF",)),
    "TIFF CMYK": (encoded(scene(mode="CMYK"), "TIFF"), ("TIFF",)),
    "TIFF LZW": (encoded(scene(mode="L"), "TIFF", compression="tiff_lzw"), ("TIFF",)),
    "GIF": (encoded(PALETTE, "GIF"), ("GIF",)),
    "GIF moving": (encoded(PALETTE, "GIF", save_all=True, append_images=[scene(seed=1).quantize()]), ("GIF",)),
    "JPEG CMYK": (encoded(scene(mode="CMYK")), ("CMYK",)),
    "JPEG CMYK of Adobe": (
        inserted(encoded(scene(mode="CMYK")), b"\xff\xdb", b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"),
        ("CMYK",),
    ),
    "JPEG YCCK": (
        inserted(encoded(scene(mode="CMYK")), b"\xff\xdb", b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x02"),
        ("CMYK",),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_have_the_pixels_of_torchvisions_loader_and_become_jpegs(name, tmp_path):
    source, changes = OTHERS[name]
    (tmp_path / "picture.jpg").write_bytes(source)
    expected = default_loader(str(tmp_path / "picture.jpg"))
    raw = prepare_picture(source, RAW_MODE)
    assert raw.changes == changes
    np.testing.assert_array_equal(pixels_of(raw), np.asarray(expected))

    stored = prepare_picture(source, Treatment(quality=100))
    assert (stored.encoding, stored.changes) == (JPEG, changes)
    assert noise_db(pixels_of(stored), expected) > 40
    assert len(prepare_picture(source, Treatment(quality=50)).content) < len(stored.content)
    assert prepare_picture(stored.content, Treatment()).changes == (), "one time is enough"
    gray = Image.open(io.BytesIO(source)).mode in ("1", "L", "LA")
    assert simplejpeg.decode_jpeg_header(stored.content) == (70, 93, *(("Gray", "Gray") if gray else ("YCbCr", "444")))
    halved = prepare_picture(source, Treatment(quality=100, chroma="420")).content
    assert simplejpeg.decode_jpeg_header(halved)[2:] == (("Gray", "Gray") if gray else ("YCbCr", "420"))
    assert halved == stored.content if gray else len(halved) < len(stored.content)


@pytest.mark.parametrize("file_format", ["PPM", "JPEG2000", "AVIF"])
def test_rarer_formats_are_packed(file_format):
    source = encoded(scene(), file_format)
    prepared = prepare_picture(source, RAW_MODE)
    assert prepared.changes == (file_format,)
    np.testing.assert_array_equal(pixels_of(prepared), rgb(source))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_of_16_bits_the_upper_8_are_kept(file_format):
    picture = gray_16(scene())
    prepared = prepare_picture(encoded(picture, file_format), RAW_MODE)
    assert prepared.changes == (file_format, "16 bit")
    expected = np.asarray(scene(mode="L"))[:, :, None].repeat(3, axis=2)
    np.testing.assert_array_equal(pixels_of(prepared), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied_and_forgotten(file_format, orientation):
    options = {"lossless": True} if file_format == "WEBP" else {}
    source = encoded(scene(), file_format, exif=exif_of(orientation), **options)
    like_source = source if file_format == "JPEG" else encoded(scene(), "PNG", exif=exif_of(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(like_source))))  # 10.0 turns a TIFF twice
    np.testing.assert_array_equal(pixels_of(prepare_picture(source, RAW_MODE)), expected)

    stored = prepare_picture(source, Treatment())
    turned = () if orientation == 1 or file_format == "TIFF" else ("EXIF orientation",)  # a TIFF is turned by Pillow
    assert stored.changes == (() if file_format == "JPEG" else (file_format,)) + turned
    assert noise_db(pixels_of(stored), expected) > 35
    if stored.changes:
        found = Image.open(io.BytesIO(stored.content))
        assert not found.getexif() and found.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}

    shrunk = prepare_picture(source, Treatment(short_side=35))
    assert (shrunk.height, shrunk.width) == ((46, 35) if orientation > 4 else (35, 46))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0" + exif_of(9).tobytes()[6:],
        b"Exif\0\0junk!!",
    ],
)
def test_broken_exif_is_no_broken_picture(exif):
    source = encoded(scene(), exif=exif)
    assert prepare_picture(source, Treatment()) == Prepared(source, JPEG, 70, 93, ())


@pytest.mark.parametrize("reader", ["Pillow", "FFCV", "DALI"])
def test_every_reader_decodes_what_is_stored(reader):
    sources = [ARITHMETIC, *(source for source, _ in OTHERS.values())]
    stored = [prepare_picture(source, Treatment()) for source in sources]
    for prepared in stored:
        jpeg = np.frombuffer(prepared.content, np.uint8)
        if reader == "Pillow":
            pixels = rgb(prepared.content)
        elif reader == "FFCV":
            pixels = decoded_by_ffcv(jpeg, prepared.height, prepared.width)
        else:
            pixels = decoded_by_dali(jpeg)
        assert noise_db(pixels, pixels_of(prepared)) > 40  # FFCV takes libjpeg's fast transform


def decoded_by_ffcv(jpeg, height, width):
    libffcv = pytest.importorskip("ffcv.libffcv", reason="FFCV is not installed")
    pixels = np.zeros((height, width, 3), np.uint8)
    libffcv.imdecode(jpeg, pixels, height, width, height, width)
    return pixels


def decoded_by_dali(jpeg):
    experimental = pytest.importorskip("nvidia.dali.experimental.dynamic", reason="DALI is not installed")
    return np.asarray(experimental.decoders.image(jpeg, device="cpu"))


# ----------------------------------------------------------------------------------------------------- shrinking


@pytest.mark.parametrize(
    ("height", "width", "treatment", "expected"),
    [
        (300, 400, Treatment(short_side=150), (150, 200)),
        (400, 301, Treatment(short_side=150), (199, 150)),
        (300, 400, Treatment(short_side=300), (300, 400)),
        (300, 400, Treatment(short_side=500), (300, 400)),
        (300, 400, Treatment(max_resolution=200), (150, 200)),
        (300, 400, Treatment(max_resolution=399), (299, 399)),
        (300, 400, Treatment(short_side=150, max_resolution=100), (75, 100)),
        (300, 400, Treatment(short_side=30, max_resolution=100), (30, 40)),
        (1, 400, Treatment(max_resolution=100), (1, 100)),
        (2, 65_500, Treatment(max_resolution=3), (1, 3)),
        (9, 9, Treatment(short_side=1), (1, 1)),
    ],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_sizes_after_shrinking(file_format, height, width, treatment, expected):
    source = encoded(scene(height, width), file_format)
    prepared = prepare_picture(source, treatment)
    assert (prepared.height, prepared.width) == pixels_of(prepared).shape[:2] == expected
    assert ("shrunk" in prepared.changes) == (expected != (height, width))


def test_a_picture_that_is_too_long_for_a_jpeg_can_be_shrunk():
    prepared = prepare_picture(encoded(Image.new("L", (70_000, 1)), "PNG"), Treatment(max_resolution=1000))
    assert (prepared.height, prepared.width) == (1, 1000)


@pytest.mark.parametrize("short_side", [19, 40, 70, 150, 299])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_own_scaling_changes_next_to_nothing(mode, short_side):
    """Odd sides, so that the scaled pictures end in a cut row and column."""
    source = encoded(scene(601, 803, mode), subsampling=0)
    prepared = prepare_picture(source, Treatment(short_side=short_side, write_mode="raw"))
    size = prepared.width, prepared.height
    expected = Image.open(io.BytesIO(source)).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    assert noise_db(pixels_of(prepared), expected) > 44


# ------------------------------------------------------------------------------------------------------- settings


# ------------------------------------------------------------------------------------------------- without packing


@pytest.mark.parametrize("orientation", range(1, 9))
def test_whoever_reads_a_picture_sees_what_packing_sees(orientation, tmp_path):
    source = encoded(scene(), exif=exif_of(orientation))
    (tmp_path / "turned.jpg").write_bytes(source)
    seen = read_picture(tmp_path / "turned.jpg")
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(source))))
    np.testing.assert_array_equal(np.asarray(seen), expected)
    for content in (encoded(gray_16(scene()), "PNG"), encoded(scene(mode="CMYK")), *OTHERS.values()):
        content = content if isinstance(content, bytes) else content[0]
        (tmp_path / "other").write_bytes(content)
        seen = read_picture(tmp_path / "other")
        assert seen.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(seen), pixels_of(prepare_picture(content, RAW_MODE)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"words", "not a picture: it begins with b'words'"),
        (SOUND["4:2:0"][:-300], "damaged: Premature end of JPEG file"),
        (encoded(scene(), "PNG")[:-50], "damaged: image file is truncated"),
        (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "too large: .*decompression bomb"),
        (None, "No such file or directory"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(content, reason, tmp_path):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadPicture, match=f"^{re.escape(str(path))}: {reason}") as caught:
        read_picture(path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
