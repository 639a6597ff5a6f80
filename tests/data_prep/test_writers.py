"""Both writers: what is sound is in, what is not is named, and other people's programs read what they wrote."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_prep.index import NO_LABEL, DatasetIndex
from data_prep.make_dali import pack_folder
from data_prep.make_ffcv import pack_beton
from data_prep.shards import tar_header
from tests.data_prep.pictures_for_tests import (
    ARITHMETIC_JPEG,
    contents,
    encoded,
    exif_turned,
    jpeg_of,
    listed,
    noisy_jpeg,
    picture,
    two_classes,
    write_files,
)

ROOT = Path(__file__).resolve().parents[2]
PACKERS = {"tar": pack_folder, "beton": pack_beton}
SCRIPTS = {"tar": "make_dali.py", "beton": "make_ffcv.py"}


@pytest.fixture(params=PACKERS)
def container(request):
    return request.param


@pytest.fixture
def packer(container):
    return PACKERS[container]


# ------------------------------------------------------------------------------------------------ the hostile set

BYTE_FOR_BYTE = {
    "good/plain.jpg": jpeg_of(64, 64),
    "good/one pixel.jpg": jpeg_of(1, 1),
    "good/gray.JPEG": jpeg_of(9, 5, "L"),
    "good/progressive.Jpg": jpeg_of(33, 47, progressive=True),
    "good/wide.jpeg": jpeg_of(20, 20_000),
    "good/nine megabytes.jpg": noisy_jpeg(9_300_000),
    "good/größe 夢.jpg": jpeg_of(seed=1),
    "good/same name.jpg": jpeg_of(seed=2),
    "other/same name.jpg": jpeg_of(seed=3),
    "other/arithmetic.jpg": ARITHMETIC_JPEG,
}
LATIN_1 = b"other/caf\xe9.jpg".decode("utf-8", "surrogateescape")
CHANGED = {
    "good/cmyk.jpg": (jpeg_of(8, 8, "CMYK"), ["CMYK"], (8, 8)),
    "good/png.jpg": (encoded(picture(11, 12), "PNG"), ["PNG"], (11, 12)),
    "good/webp.JPEG": (encoded(picture(11, 12), "WEBP"), ["WEBP"], (11, 12)),
    "good/turned.jpg": (exif_turned(), ["EXIF orientation"], (40, 16)),
    "good/deep.png": (
        encoded(Image.fromarray(np.full((5, 6), 256 * 200, np.uint16)), "PNG"),
        ["PNG", "16 bit"],
        (5, 6),
    ),
}
BAD = {
    "good/truncated.jpg": (jpeg_of(64, 64)[:400], "damaged"),
    "good/header only.jpg": (jpeg_of()[:20], "damaged"),
    "good/empty.jpg": (b"", "empty"),
    "good/text.jpg": (b"this is text", "not a picture"),
    "good/line\nbreak.jpg": (jpeg_of(), "line break"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_files(folder, BYTE_FOR_BYTE | {LATIN_1: jpeg_of(seed=4)})
    write_files(folder, {name: content for name, (content, *_) in {**CHANGED, **BAD}.items()})
    (folder / "good/dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "good/loop.jpg").symlink_to(folder / "good/loop.jpg")
    os.mkfifo(folder / "good/fifo.jpg")  # opened, it would hang
    locked = folder / "good/locked.jpg"
    locked.write_bytes(jpeg_of(seed=5))
    locked.chmod(0)
    return folder


@pytest.fixture(scope="module")
def packed_hostile(hostile, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed_hostile")
    return {kind: packer(hostile, out / kind, bad_limit=0.5) for kind, packer in PACKERS.items()}


def test_what_is_sound_is_in_and_what_is_not_is_named(hostile, packed_hostile, container):
    index = packed_hostile[container]
    by_name = {index.name(i): i for i in range(len(index))}
    readable = {"good/locked.jpg"} if os.access(hostile / "good/locked.jpg", os.R_OK) else set()  # root reads all
    assert by_name.keys() == BYTE_FOR_BYTE.keys() | {LATIN_1} | CHANGED.keys() | readable
    for name, content in BYTE_FOR_BYTE.items():
        assert index.jpeg_bytes(by_name[name]).tobytes() == content, name
    changes = listed(index.path, "changed.jsonl")
    assert changes.keys() == CHANGED.keys() == set(index.manifest.changed_names)
    assert index.manifest.changed == {"16 bit": 1, "CMYK": 1, "EXIF orientation": 1, "PNG": 2, "WEBP": 1}
    for name, (_, kinds, size) in CHANGED.items():
        assert changes[name] == kinds
        assert tuple(index.sizes(by_name[name])) == size
        with Image.open(io.BytesIO(index.jpeg_bytes(by_name[name]))) as image:
            assert image.format == "JPEG" and (image.height, image.width) == size and not image.getexif()
    reasons = listed(index.path, "rejected.jsonl")
    for name, (_, reason) in BAD.items():
        assert reason in reasons.pop(name), name
    assert reasons.pop("good/dangling.jpg") == "unreadable: No such file or directory"
    assert "symbolic links" in reasons.pop("good/loop.jpg")
    assert "not a regular file" in reasons.pop("good/fifo.jpg")
    if not readable:
        assert reasons.pop("good/locked.jpg") == "unreadable: Permission denied"
    assert reasons == {}
    assert sum(index.manifest.rejected.values()) == len(BAD) + 3 + (not readable)
    assert index.class_names == ("good", "other")
    for name, i in by_name.items():
        assert index.class_names[index.labels(i)] == name.split("/")[0]


def test_both_writers_say_the_same(packed_hostile):
    tar, beton = packed_hostile["tar"], packed_hostile["beton"]
    assert tar.fingerprint == beton.fingerprint
    assert [tar.name(i) for i in range(len(tar))] == [beton.name(i) for i in range(len(beton))]
    for name in ("names.txt", "rejected.jsonl", "changed.jsonl"):
        assert (tar.path / name).read_bytes() == (beton.path / name).read_bytes()
    assert tar.manifest.changed == beton.manifest.changed and tar.manifest.rejected == beton.manifest.rejected


# ------------------------------------------------------------------------------------- other people's programs


def test_tarfile_and_webdataset_read_the_shards(packed_hostile):
    wds = pytest.importorskip("webdataset", reason="the webdataset package is not installed")
    index = packed_hostile["tar"]
    paths = [str(index.path / shard.name) for shard in index.manifest.shards]
    samples = list(wds.WebDataset(paths, shardshuffle=False))
    assert [sample["jpg"] for sample in samples] == [index.jpeg_bytes(i).tobytes() for i in range(len(index))]
    assert [int(sample["cls"]) for sample in samples] == index.labels(range(len(index))).tolist()
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    assert found == [sample["jpg"] for sample in samples]


@pytest.mark.parametrize("labels", [True, False])
def test_dalis_own_webdataset_reader_reads_the_shards_by_our_index(tmp_path, labels):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def

    data = two_classes(tmp_path / "data", 12)
    if not labels:
        data = write_files(tmp_path / "flat", {f"{i}.jpg": jpeg_of(seed=i) for i in range(12)})
    index = pack_folder(data, tmp_path / "out")
    paths = [str(index.path / shard.name) for shard in index.manifest.shards]
    index_paths = [str(index.path / file.name) for file in index.manifest.dali_indices]
    extensions = ["jpg", "cls"] if labels else ["jpg"]

    @pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def read():
        parts = fn.readers.webdataset(paths=paths, index_paths=index_paths, ext=extensions)
        return tuple(parts) if labels else parts

    pipe = read()
    pipe.build()
    outputs = pipe.run()
    assert [bytes(np.asarray(outputs[0].at(i))) for i in range(12)] == [
        index.jpeg_bytes(i).tobytes() for i in range(12)
    ]
    if labels:
        assert [int(bytes(np.asarray(outputs[1].at(i)))) for i in range(12)] == index.labels(range(12)).tolist()


def test_dalis_index_is_what_dalis_own_tool_writes(tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="DALI is not installed")
    index = pack_folder(two_classes(tmp_path / "data", 12), tmp_path / "out")
    with wds2idx.IndexCreator(
        str(tmp_path / "out/shard-000000.tar"), str(tmp_path / "theirs.idx"), verbose=False
    ) as creator:
        creator.create_index()
    ours = (tmp_path / "out/shard-000000.idx").read_text()
    assert ours == (tmp_path / "theirs.idx").read_text() and ours.startswith(f"v1.2 {len(index)}\n")


READ_WITH_FFCV = """
import sys, numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.reader import Reader
path, out, os_cache = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
reader = Reader(path)
loader = Loader(path, batch_size=2, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False, os_cache=os_cache,
                pipelines={"image": [CenterCropRGBImageDecoder((48, 48), ratio=1)], "label": [IntDecoder()]})
images, labels = [], []
for image, label in loader:
    images.append(np.array(image)), labels.append(np.array(label)[:, 0])
np.savez(out, images=np.concatenate(images), labels=np.concatenate(labels), metadata=reader.metadata["f0"]["width"])
"""


def ffcv_reads(index: DatasetIndex, out: Path, os_cache: bool):
    """In a process of its own: FFCV 1.0.2 makes every uint8 array of a process read-only for numba."""
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    arguments = [str(index.path / "samples.beton"), str(out), str(int(os_cache))]
    done = subprocess.run(
        [sys.executable, "-c", READ_WITH_FFCV, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.load(out)


@pytest.mark.parametrize("os_cache", [True, False], ids=["os_cache", "process_cache"])
def test_ffcvs_own_loader_reads_the_beton(packed_hostile, tmp_path, os_cache):
    index = packed_hostile["beton"]
    read = ffcv_reads(index, tmp_path / "read.npz", os_cache)
    assert read["labels"].tolist() == index.labels(range(len(index))).tolist()
    assert read["metadata"].tolist() == index.sizes(range(len(index)))[:, 1].tolist()
    for i in range(len(index)):
        name = index.name(i)
        if name in ("good/one pixel.jpg", "good/gray.JPEG"):
            continue
        image = Image.open(io.BytesIO(index.jpeg_bytes(i))).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        expected = image.crop((left, top, left + side, top + side)).resize((48, 48), Image.Resampling.BOX)
        assert np.abs(read["images"][i].astype(int) - np.asarray(expected)).mean() < 8, name


@pytest.mark.parametrize("mode", ["raw", "smart"])
def test_ffcvs_own_loader_reads_raw_pixels(tmp_path, mode):
    data = write_files(
        tmp_path / "data", {f"{i}.jpg": jpeg_of(48, 48, seed=i, quality=20 + 79 * (i % 2)) for i in range(6)}
    )
    index = pack_beton(data, tmp_path / "out", write_mode=mode, smart_threshold=7.5)
    encodings = index.records(range(6))["encoding"]
    assert set(encodings) == ({1} if mode == "raw" else {0, 1})
    read = ffcv_reads(index, tmp_path / "read.npz", os_cache=True)
    for i in range(6):
        expected = np.asarray(Image.open(data / index.name(i)))
        if encodings[i]:
            assert np.array_equal(index.content(i).reshape(48, 48, 3), expected)
            assert np.array_equal(read["images"][i], expected)
        else:
            assert np.abs(read["images"][i].astype(int) - expected).mean() < 3


# ---------------------------------------------------------------------------------------------------- sources


def tar_of(files, format=tarfile.GNU_FORMAT):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return whole.getvalue()


def test_the_same_pictures_from_a_folder_a_list_and_a_tar_of_tars(tmp_path, packer):
    data = two_classes(tmp_path / "data", 30)
    pictures = {str(path.relative_to(data)): path.read_bytes() for path in sorted(data.rglob("*.jpg"))}
    lines = [f"{data / name}\t{name.split('/')[0]}\n" for name in pictures]
    inner = {
        f"{c}.tar": tar_of({n.split("/")[1]: p for n, p in pictures.items() if n.startswith(c)}) for c in ("cat", "ape")
    }
    write_files(tmp_path, {"list.tsv": "".join(lines).encode(), "ILSVRC2012_img_train.tar": tar_of(inner)})
    from_folder = packer(data, tmp_path / "from_folder")
    from_tar = packer(tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "from_tar")
    from_list = packer(tmp_path / "list.tsv", tmp_path / "from_list")
    assert contents(from_tar.path) == contents(from_folder.path)
    assert from_list.class_names == from_folder.class_names
    for i in range(30):
        name = from_list.name(i)
        content = from_list.jpeg_bytes(i).tobytes()
        assert any(name.endswith(n) and content == p for n, p in pictures.items())
        assert from_list.class_names[from_list.labels(i)] in name
    assert not (tmp_path / "cat.tar").exists()  # nothing was unpacked


def test_webdataset_tars_written_by_others(tmp_path, packer):
    wds = pytest.importorskip("webdataset", reason="the webdataset package is not installed")
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"tars/{shard:02d}.tar")) as tar:
            for i in range(5):
                tar.write(
                    {"__key__": f"key{i}", "jpg": jpeg_of(seed=10 * shard + i), "cls": shard + i, "json": {"i": i}}
                )
    index = packer(tmp_path / "tars", tmp_path / "out")
    assert len(index) == 10 and sorted(index.labels(range(10))) == sorted([0, 1, 2, 3, 4, 1, 2, 3, 4, 5])
    expected = {jpeg_of(seed=10 * shard + i): shard + i for shard in range(2) for i in range(5)}
    for i in range(10):
        assert expected[index.jpeg_bytes(i).tobytes()] == index.labels(i)


def test_a_flat_folder_has_no_labels(tmp_path, packer):
    data = write_files(tmp_path / "data", {"b.jpg": jpeg_of(), "a.jpg": jpeg_of(), "notes.txt": b"no picture"})
    index = packer(data, tmp_path / "out")
    assert index.class_names == ()
    assert index.labels([0, 1]).tolist() == [NO_LABEL, NO_LABEL]


def test_the_order_is_one_shuffle_of_all_classes(tmp_path):
    data = write_files(tmp_path / "data", {f"{i // 100}/{i % 100:02d}.jpg": jpeg_of(4, 4) for i in range(400)})
    index = pack_folder(data, tmp_path / "out")
    labels = index.labels(range(400))
    assert 200 < np.count_nonzero(np.diff(labels)) < 399  # of 399 neighbors, 3 in 4 differ in a random order
    assert {len(set(labels[start : start + 50])) for start in range(0, 400, 50)} == {4}
    other = pack_folder(data, tmp_path / "other", seed=1)
    assert [other.name(i) for i in range(400)] != [index.name(i) for i in range(400)]


# ------------------------------------------------------------------------------------------- shrinking, options


def test_shrunk_pictures(tmp_path, packer):
    sizes = {"wide.jpg": (60, 200), "tall.jpg": (300, 90), "small.jpg": (20, 30)}
    data = write_files(tmp_path / "data", {name: jpeg_of(*size) for name, size in sizes.items()})
    index = packer(data, tmp_path / "short", short_side=40)
    found = {index.name(i): tuple(index.sizes(i)) for i in range(3)}
    assert found == {"wide.jpg": (40, 133), "tall.jpg": (133, 40), "small.jpg": (20, 30)}
    assert index.manifest.changed == {"shrunk": 2} and index.manifest.settings["short_side"] == 40
    index = packer(data, tmp_path / "long", max_resolution=100)
    found = {index.name(i): tuple(index.sizes(i)) for i in range(3)}
    assert found == {"wide.jpg": (30, 100), "tall.jpg": (100, 30), "small.jpg": (20, 30)}


def test_a_beton_page_grows_with_its_largest_sample(packed_hostile):
    from data_prep.beton import read_header

    index = packed_hostile["beton"]
    assert index.records(range(len(index)))["byte_count"].max() > 1 << 23
    assert read_header(index.path / "samples.beton")["page_size"] == 1 << 24


# ------------------------------------------------------------------------------------------------- the commands


def run_command(container, *arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "data_prep" / SCRIPTS[container]), *map(str, arguments)]
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True)


def test_the_command_packs_from_any_directory_and_sums_up(tmp_path, container):
    write_files(two_classes(tmp_path / "data"), {"cat/text.jpg": b"text", "cat/png.jpg": encoded(picture(), "PNG")})
    write_files(
        tmp_path / "data", {"cat/a.heic": b"1", "cat/notes.txt": b"2", "cat/more.txt": b"3", "cat/README": b"4"}
    )
    arguments = ["--data", "data", "--out", "out", "--workers", "2", "--bad-limit", "0.2"]
    done = run_command(container, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    into = {"tar": "1 shard", "beton": "samples.beton"}[container]
    lines = done.stdout.splitlines()
    assert re.fullmatch(rf"Packed 11 pictures of 2 classes into {into}, \d+\.\d MB\.", lines[0])
    assert lines[1:] == [
        "Left out: 1 no decoder for .heic, 1 not a picture (see rejected.jsonl).",
        "Changed: 1 PNG (see changed.jsonl).",
        "Ignored, as no pictures: 2 .txt, 1 without extension.",
    ]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["ignored"] == {".txt": 2, "without extension": 1}
    assert manifest["rejected"] == {"no decoder for .heic": 1, "not a picture": 1}
    again = run_command(container, *arguments, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.strip().endswith("pass --overwrite to replace it, or give another --out.")
    assert run_command(container, *arguments, "--overwrite", cwd=tmp_path).returncode == 0


def test_the_plan_says_what_would_be_and_does_nothing(tmp_path, container):
    data = write_files(two_classes(tmp_path / "data"), {"cat/text.jpg": b"text"})
    done = run_command(container, "--data", data, "--out", tmp_path / "out", "--plan", "--workers", "3")
    assert done.returncode == 0, done.stderr
    assert "11 in 2 classes" in done.stdout
    assert "1 of the 11 that were tried, the first one cat/text.jpg: not a picture" in " ".join(done.stdout.split())
    assert all(len(line) <= 80 and "…" not in line for line in done.stdout.splitlines())
    assert "with 3 processes" in done.stdout and "free disk" in done.stdout
    assert not (tmp_path / "out").exists()
    expected = float(re.search(r"expected size +([\d.]+) GB", done.stdout)[1]) * 1e9
    index = PACKERS[container](data, tmp_path / "out", bad_limit=0.2)
    assert expected == pytest.approx(
        sum(p.stat().st_size for p in index.path.iterdir()), abs=1e6 if container == "tar" else 2e7
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist; give a folder, a list file or a tar to --data."),
        ({}, "holds no picture"),
        ({"text.jpg": b"text"}, "1 of 1 pictures (100.00%) cannot be packed, the first one text.jpg: not a picture"),
    ],
    ids=["missing", "empty", "text"],
)
def test_the_command_fails_in_one_sentence(tmp_path, container, files, message):
    if files is not None:
        (tmp_path / "data").mkdir()
        write_files(tmp_path / "data", files)
    done = run_command(container, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert message in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("container", "settings", "message"),
    [
        ("tar", {"shard_mb": 0}, "--shard-mb must be at least 1. Found: 0"),
        ("tar", {"short_side": 0}, "--short-side must be at least 1. Found: 0"),
        ("beton", {"quality": 101}, "--quality must be .*Found: 101"),
        ("beton", {"write_mode": "png"}, "--write-mode must be .*Found: png"),
        ("beton", {"smart_threshold": -1.0}, "--smart-threshold must .*Found: -1"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, container, settings, message):
    with pytest.raises(ValueError, match=message):
        PACKERS[container](tmp_path, tmp_path / "out", **settings)


@pytest.mark.parametrize("byte_count", [0, 1, 511, 512, 99_999_999, 8**11 - 1])
def test_tar_headers_are_tarfiles(byte_count):
    for name in ("000000_000000.jpg", "123456_1234567.cls"):
        member = tarfile.TarInfo(name)
        member.size = byte_count
        assert tar_header(name, byte_count) == member.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411", "Gray"])
def test_a_packed_set_of_any_chroma_sampling_is_a_source(tmp_path, packer, sampling):
    pixels = np.asarray(picture(40, 56).convert("L"))[:, :, None] if sampling == "Gray" else np.asarray(picture(40, 56))
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "GRAY" if sampling == "Gray" else "RGB", sampling)
    first = pack_folder(write_files(tmp_path / "data", {"a.jpg": jpeg}), tmp_path / "first")
    again = packer(first.path, tmp_path / "again")
    assert again.jpeg_bytes(0).tobytes() == jpeg and again.sizes(0).tolist() == [40, 56]
