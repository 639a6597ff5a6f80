"""Packing: sound pictures byte for byte, bad ones left out and named, the same bytes for any number of workers."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.index import NO_LABEL, DatasetIndex
from data_prep.make_dali import list_pictures, pack_folder, shuffled

ROOT = Path(__file__).resolve().parents[2]


def jpeg_of(height=24, width=32, mode="RGB", seed=0, **save_options):
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    height, width = pixels.shape[:2]
    Image.frombytes(mode, (width, height), pixels.tobytes()).save(file, "JPEG", **save_options)
    return file.getvalue()


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def two_classes(folder, count=10):
    return write_files(
        folder, {f"{'cat' if i % 3 else 'ape'}/{i}.jpg": jpeg_of(20 + i, 30 + i, seed=i) for i in range(count)}
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rejected(folder):
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}


def test_pictures_sizes_and_labels_come_back(tmp_path):
    data = two_classes(tmp_path / "data")
    index = pack_folder(data, tmp_path / "out")
    assert index.class_names == ("ape", "cat")
    assert sorted(index.name(i) for i in range(10)) == sorted(f"{'cat' if i % 3 else 'ape'}/{i}.jpg" for i in range(10))
    for i in range(10):
        name = index.name(i)
        number = int(Path(name).stem)
        assert index.jpeg_bytes(i).tobytes() == (data / name).read_bytes()
        assert index.sizes(i).tolist() == [20 + number, 30 + number]
        assert index.class_names[index.labels(i)] == name.split("/")[0]
    assert index.manifest.rejected == {}
    assert rejected(tmp_path / "out") == {}


def test_the_bytes_do_not_depend_on_the_workers_but_on_the_seed(tmp_path):
    data = write_files(two_classes(tmp_path / "data", 40), {"cat/text.jpg": b"text", "ape/empty.jpg": b""})
    for workers in (1, 2, 7):
        pack_folder(data, tmp_path / f"out_{workers}", workers=workers)
    assert contents(tmp_path / "out_1") == contents(tmp_path / "out_2") == contents(tmp_path / "out_7")
    other = pack_folder(data, tmp_path / "out_other", seed=1)
    first = DatasetIndex.open(tmp_path / "out_1")
    assert [other.name(i) for i in range(40)] != [first.name(i) for i in range(40)]
    assert other.manifest.shuffle_seed == 1


def test_the_shuffle_is_a_permutation_that_never_changes():
    assert shuffled(8, seed=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert sorted(shuffled(1000, seed=3)) == list(range(1000))


def test_odd_but_sound_pictures_are_kept_byte_for_byte(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees when shown"
    sound = {
        "one_pixel.jpg": jpeg_of(1, 1),
        "grey.JPEG": jpeg_of(9, 5, "L"),
        "progressive.Jpg": jpeg_of(33, 47, progressive=True),
        "turned.jpeg": jpeg_of(16, 40, exif=exif),
        "thin.jpg": jpeg_of(1, 300),
    }
    index = pack_folder(write_files(tmp_path / "data", sound), tmp_path / "out")
    sizes = {index.name(i): index.sizes(i).tolist() for i in range(len(index))}
    assert sizes == {
        "one_pixel.jpg": [1, 1],
        "grey.JPEG": [9, 5],
        "progressive.Jpg": [33, 47],
        "turned.jpeg": [16, 40],
        "thin.jpg": [1, 300],
    }
    assert {index.name(i): index.jpeg_bytes(i).tobytes() for i in range(len(index))} == sound


def test_bad_pictures_are_left_out_counted_and_named(tmp_path):
    whole = jpeg_of(64, 64)
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    bad = {
        "a/text.jpg": b"this is text",
        "a/empty.jpg": b"",
        "a/truncated.jpg": whole[: len(whole) // 2],
        "a/header_only.jpg": whole[:20],
        "a/png.jpg": png.getvalue(),
        "a/cmyk.jpg": jpeg_of(8, 8, "CMYK"),
        "a/line\nbreak.jpg": whole,
    }
    index = pack_folder(write_files(tmp_path / "data", bad | {"a/good.jpg": whole}), tmp_path / "out")
    assert [index.name(i) for i in range(len(index))] == ["a/good.jpg"]
    reasons = rejected(tmp_path / "out")
    assert reasons.keys() == bad.keys()
    assert reasons["a/text.jpg"] == "not a JPEG: it begins with b'this is '"
    assert reasons["a/empty.jpg"] == "empty file"
    assert reasons["a/truncated.jpg"].startswith("damaged: image file is truncated")
    assert reasons["a/cmyk.jpg"] == "neither RGB nor grey: its mode is CMYK"
    assert index.manifest.rejected == {
        "damaged": 2,
        "empty file": 1,
        "line break in the name": 1,
        "neither RGB nor grey": 1,
        "not a JPEG": 2,
    }


def test_a_link_that_leads_nowhere_is_left_out(tmp_path):
    data = two_classes(tmp_path / "data")
    (data / "ape/link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    index = pack_folder(data, tmp_path / "out")
    assert len(index) == 10
    assert rejected(tmp_path / "out") == {"ape/link.jpg": "unreadable: No such file or directory"}


def test_on_bad_fail_stops_and_leaves_nothing(tmp_path):
    data = write_files(two_classes(tmp_path / "data"), {"cat/text.jpg": b"text"})
    with pytest.raises(ValueError, match=r"cat/text.jpg cannot be packed \(not a JPEG: .*\): repair or remove it"):
        pack_folder(data, tmp_path / "out", on_bad="fail")
    assert not (tmp_path / "out").exists()


def test_a_flat_folder_has_no_labels(tmp_path):
    data = write_files(tmp_path / "data", {"b.jpg": jpeg_of(), "a.jpg": jpeg_of(), "notes.txt": b"no picture"})
    index = pack_folder(data, tmp_path / "out")
    assert index.class_names == ()
    assert index.labels([0, 1]).tolist() == [NO_LABEL, NO_LABEL]


def test_listing_is_sorted_deep_and_passes_over_hidden_names(tmp_path):
    files = ["b/2.jpg", "b/deep/1.jpg", "a/3.JPEG", "a/.hidden.jpg", ".cache/4.jpg", "a/.cache/5.jpg", "a/readme.txt"]
    data = write_files(tmp_path / "data", dict.fromkeys(files, b""))
    (data / "empty_class").mkdir()
    sources, class_names = list_pictures(data)
    assert sources == [("a/3.JPEG", 0), ("b/2.jpg", 1), ("b/deep/1.jpg", 1)]
    assert class_names == ["a", "b", "empty_class"]


def test_folders_with_nothing_to_pack_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist; give a folder to --data"):
        pack_folder(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no picture named"):
        pack_folder(tmp_path / "empty", tmp_path / "out")
    write_files(tmp_path / "bad", {"text.jpg": b"text", "empty.jpg": b""})
    with pytest.raises(ValueError, match="bad holds no sound RGB or grey JPEG"):
        pack_folder(tmp_path / "bad", tmp_path / "out")
    write_files(tmp_path / "mixed", {"loose.jpg": jpeg_of(), "a/b.jpg": jpeg_of()})
    with pytest.raises(ValueError, match=r"both class folders \(a/b.jpg\) and loose pictures \(loose.jpg\)"):
        pack_folder(tmp_path / "mixed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_out_of_range_are_refused(tmp_path):
    data = two_classes(tmp_path / "data")
    for name, value in {"shard_mb": 0, "seed": -1, "workers": 0, "on_bad": "maybe"}.items():
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must .*Found: {value}"):
            pack_folder(data, tmp_path / "out", **{name: value})
    with pytest.raises(ValueError, match="is inside --data"):
        pack_folder(data, data / "shards")


def test_a_packed_folder_is_overwritten_only_on_request(tmp_path):
    data = two_classes(tmp_path / "data")
    pack_folder(data, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"already holds a packed data set .*: pass --overwrite"):
        pack_folder(data, tmp_path / "out", seed=1)
    write_files(tmp_path / "bad", {"text.jpg": b"text"})
    with pytest.raises(ValueError, match="no sound"):
        pack_folder(tmp_path / "bad", tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
    assert pack_folder(data, tmp_path / "out", seed=1, overwrite=True).manifest.shuffle_seed == 1


# ------------------------------------------------------------------------------------------------- the command line


def run_command(*arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "data_prep/make_dali.py"), *map(str, arguments)]
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True)


def test_the_command_packs_from_any_directory_and_sums_up(tmp_path):
    write_files(two_classes(tmp_path / "data"), {"cat/text.jpg": b"text"})
    done = run_command("--data", "data", "--out", "out", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Packed 10 pictures of 2 classes into 1 shard, 0.0 MB; left out: 1 not a JPEG")
    assert len(DatasetIndex.open(tmp_path / "out")) == 10


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist; give a folder to --data."),
        ({}, "holds no picture named"),
        ({"text.jpg": b"text"}, "holds no sound RGB or grey JPEG (text.jpg: not a JPEG: it begins with b'text');"),
    ],
    ids=["missing", "empty", "text"],
)
def test_the_command_fails_in_one_sentence(tmp_path, files, message):
    if files is not None:
        (tmp_path / "data").mkdir()
        write_files(tmp_path / "data", files)
    done = run_command("--data", tmp_path / "data", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(str(tmp_path / "data")) and message in last_line
    assert not (tmp_path / "out").exists()
