"""Sources: what os.walk and tarfile find in them is listed, in one order, and read back; nothing grows with the number."""

import errno
import gc
import gzip
import io
import os
import pickle
import random
import socket
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep.index import JPEG, NO_LABEL, RAW, ShardError
from data_prep.pictures import BadPicture
from data_prep.sources import (
    LINE_BREAK,
    MAX_PICTURE_BYTES,
    NOT_REGULAR,
    Entry,
    Listing,
    as_bytes,
    as_text,
    list_source,
    open_listing,
)
from tests.packed import Sample, write_set

ROOT = Path(__file__).resolve().parents[2]
GONE = (
    "{} was there when the pictures were listed and cannot be read now ({}): mount or restore the source and run the "
    "same command again, or remove the folder packing in --out and pass --overwrite to list anew."
)


MIXED = (
    "{} has a class for {} and none for {}: give every picture a class (a folder, a .cls beside it, or a label in the list), "
    "or none."
)


def content_of(name):
    """Bytes that belong to one name alone."""
    return random.Random(os.fsencode(name)).randbytes(50 + len(name))


def write_files(folder, names):
    """A file of its own content per name; names may be bytes that are no UTF-8."""
    for name in map(os.fsencode, names):
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content_of(name))
    return folder


def tar_bytes(members, format=tarfile.GNU_FORMAT):
    """A tar of {name: content}, where a content of None makes a folder."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def tar_of(names, **options):
    return tar_bytes({name: content_of(name) for name in names}, **options)


@pytest.fixture
def listed(tmp_path):
    """list_source into a folder of its own, opened anew as another process would."""
    count = 0

    def list_it(data):
        nonlocal count
        count += 1
        path = tmp_path / f"listing_{count}.sqlite"
        list_source(data, path)
        return open_listing(Path(data), path)

    return list_it


def entries(listing):
    return [listing.entry(position) for position in range(len(listing))]


def names(listing):
    return [entry.name for entry in entries(listing)]


def labels(listing):
    """{name: class name}"""
    return {e.name: None if e.label == NO_LABEL else listing.facts.class_names[e.label] for e in entries(listing)}


def contents(listing):
    """{name: bytes} as the reader has them."""
    return {entry.name: listing.read(entry) for entry in entries(listing)}


def refused(data, tmp_path):
    """The sentence."""
    with pytest.raises(ValueError) as caught:
        list_source(data, tmp_path / "refused")
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


# ------------------------------------------------------------------------------------------------- folders


def test_class_folders_are_listed_as_os_walk_finds_them(tmp_path, listed):
    files = [
        "b/2.jpg",
        "b/deep/1.PNG",
        "b.c/1.webp",
        "a/3.JPEG",
        "a/z/y/x.tif",
        "a/10.gif",
        "a/9.bmp",
        "b/été/ü.jfif",
        "a/1.tiff",
    ]
    others = [
        "a/.hidden.jpg",
        ".cache/4.jpg",
        "a/.cache/5.jpg",
        "a/readme.txt",
        "list.txt",
        "lost+found/6.jpg",
        "a/jpg",
    ]
    data = write_files(tmp_path / "data", files + others)
    (data / "empty class").mkdir()
    (data / "linked").symlink_to(data / "b")  # a class folder may be a link
    (data / "a/back").symlink_to(data)  # deeper ones are not followed
    (data / "a/folder.jpg").mkdir()
    listing = listed(data)
    expected = []
    for top in ("a", "b", "b.c", "linked"):
        for folder, inner, file_names in os.walk(data / top):
            inner[:] = [name for name in inner if not name.startswith(".")]
            relative = Path(folder).relative_to(data)
            found = [n for n in file_names if not n.startswith(".") and n not in ("readme.txt", "jpg")]
            expected += [(top, (relative / name).as_posix()) for name in found]
    assert [(listing.facts.class_names[e.label], e.name) for e in entries(listing)] == sorted(expected)
    assert tuple(listing.facts.class_names) == ("a", "b", "b.c", "empty class", "linked")
    assert all(entry.byte_count == (data / entry.name).stat().st_size for entry in entries(listing))
    assert contents(listing) == {name: (data / name).read_bytes() for _, name in expected}
    assert listing.facts.total_bytes == sum(entry.byte_count for entry in entries(listing))
    assert (listing.facts.kind, listing.facts.root, listing.facts.containers) == ("folder", str(data), [])
    assert listing.entry(0) == Entry("a/1.tiff", 0, None, 0, 58, "")


def test_a_flat_folder_has_no_labels(tmp_path, listed):
    data = write_files(tmp_path / "data", ["b.jpg", "a.jpg", "notes.md", ".x.jpg"])
    (data / "empty").mkdir()
    listing = listed(data)
    assert labels(listing) == {"a.jpg": None, "b.jpg": None}
    assert names(listing) == ["a.jpg", "b.jpg"]
    assert tuple(listing.facts.class_names) == ()


def test_names_are_bytes(tmp_path, listed):
    odd = [
        b"c\xc3\xa9/caf\xe9.jpg",
        b"c\xc3\xa9/caf\xc3\xa9.jpg",
        b"c\xff/a.jpg",
        b"ca/ \t,.jpg",
        b"ca/\xf0\x9f\x90\x88.jpg",
    ]
    listing = listed(write_files(tmp_path / "data", odd))
    found = [as_bytes(name) for name in names(listing)]
    assert found == sorted(odd, key=lambda name: (name.split(b"/")[0], name))
    assert [as_bytes(name) for name in listing.facts.class_names] == [b"ca", b"c\xc3\xa9", b"c\xff"]
    assert contents(listing) == {as_text(name): content_of(name) for name in odd}


@pytest.mark.parametrize("kind", ["folder", "tar", "list"])
def test_the_listing_is_the_same_under_every_locale(tmp_path, kind):
    odd = [b"c\xc3\xa9/caf\xe9.jpg", b"c\xff/\xc3\xbc.jpg", b"ca/a.jpg"]
    data = write_files(tmp_path / "data", odd)
    if kind == "tar":
        data = tmp_path / "data.tar"
        data.write_bytes(tar_bytes({os.fsdecode(name): b"1" for name in odd}))
    elif kind == "list":
        data = data / "list.txt"
        data.write_bytes(b"".join(name + b" " + name[:2] + b"\n" for name in odd))
    code = (
        "import sys; from data_prep.sources import list_source;"
        "listing = list_source(*sys.argv[1:]);"
        "print(*map(ascii, [listing.entry(i) for i in range(3)] + [listing.facts]));"
        "[listing.read(listing.entry(i)) for i in range(3)]"
    )
    said = []
    for settings in ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, {"PYTHONUTF8": "1"}):
        command = [sys.executable, "-c", code, str(data), str(tmp_path / "listing")]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]


def test_what_is_no_file_is_listed_with_its_fault_and_never_opened(tmp_path, listed):
    data = write_files(tmp_path / "data", ["a/good.jpg", "a/line\nbreak.jpg", "elsewhere/x"])
    (data / "a/link.jpg").symlink_to(data / "elsewhere/x")
    (data / "a/nowhere.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (data / "a/loop.jpg").symlink_to(data / "a/loop.jpg")
    (data / "a/file.jpg").symlink_to(data / "a/good.jpg/inner.jpg")
    os.mkfifo(data / "a/pipe.jpg")
    (data / "a/null.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(data / "a/socket.jpg"))
    listing = listed(data)
    faults = {entry.name: entry.fault for entry in entries(listing) if entry.fault}
    assert faults == {
        "a/line\nbreak.jpg": LINE_BREAK,
        "a/nowhere.jpg": "unreadable: No such file or directory",
        "a/loop.jpg": "unreadable: Too many levels of symbolic links",
        "a/file.jpg": "unreadable: Not a directory",
        "a/pipe.jpg": f"unreadable: {NOT_REGULAR}",
        "a/null.jpg": f"unreadable: {NOT_REGULAR}",
        "a/socket.jpg": f"unreadable: {NOT_REGULAR}",
    }
    reader = listing
    for entry in entries(listing):
        if entry.fault:
            with pytest.raises(BadPicture) as caught:
                reader.read(entry)
            assert str(caught.value) == entry.fault
            assert caught.value.kind == entry.fault.partition(":")[0]
        else:
            assert reader.read(entry) == (data / entry.name).read_bytes()


def test_a_picture_too_large_for_memory_is_left_out(tmp_path, listed):
    data = write_files(tmp_path / "data", ["a.jpg"])
    with (data / "b.jpg").open("wb") as file:
        file.truncate(MAX_PICTURE_BYTES + 1)  # a hole, not a byte on disk
    assert [entry.fault for entry in entries(listed(data))] == ["", "too large: more than 1073741824 bytes"]


def test_folders_that_cannot_be_listed_are_refused(tmp_path, monkeypatch):
    data = tmp_path / "data"
    assert f"{data} is no folder, tar or list of pictures" in refused(data, tmp_path)
    data.mkdir()
    sentence = refused(data, tmp_path)
    assert sentence.startswith(
        f"{data} holds no picture, neither itself nor in class folders or tars; give another --data"
    )
    assert "*.jpg, *.jpeg, " in sentence
    write_files(data, ["clip.mp4", ".hidden", "b/notes.txt", "b/more.TXT"])
    assert "or tars (but 2 .txt, 1 .mp4, 1 hidden); give another --data" in refused(data, tmp_path)
    write_files(data, ["loose_b.jpg", "loose_a.jpg", "b/1.jpg", "b/0.jpg", "c/1.jpg"])
    assert refused(data, tmp_path) == MIXED.format(data, "b/0.jpg", "loose_a.jpg")
    for path in data.glob("loose*"):
        path.unlink()
    (data / "x.tar").write_bytes(tar_of(["a.jpg"]))
    assert refused(data, tmp_path) == f"{data} holds both pictures and tars (x.tar): move one of the two away."
    (data / "x.tar").unlink()
    scandir = os.scandir

    def forbidden(path):
        if path == os.fsencode(data / "c"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)  # the superuser, whom tests may run as, is never forbidden
    assert refused(data, tmp_path) == (
        f"{data}/c cannot be listed (Permission denied): make it readable, mount it or move it away."
    )


def test_other_files_are_refused(tmp_path):
    for name in ("a.jpg", "a.zip", "a"):
        data = tmp_path / name
        data.write_bytes(b"content")
        assert refused(data, tmp_path) == (
            f"{data} is no folder, tar or list of pictures (*.txt, *.tsv, *.csv, *.lst) that can be read; give one to --data."
        )
    os.mkfifo(tmp_path / "pipe.txt")
    assert "is no folder, tar or list" in refused(tmp_path / "pipe.txt", tmp_path)
    assert "is no folder, tar or list" in refused(tmp_path / "a.jpg/b", tmp_path)


# ------------------------------------------------------------------------------------------------- lists


def test_a_list_keeps_its_order_and_its_paths(tmp_path, listed):
    data = write_files(tmp_path / "data", ["b/2.jpg", "a b, c.jpg", "x.jpg y.png", "x.jpg", b"caf\xe9.jpg"])
    absolute = str(data / "x.jpg")
    lines = [
        b"b/2.jpg",
        b"",
        b"a b, c.jpg\r",
        b"x.jpg y.png",
        b"   ",
        os.fsencode(absolute),
        b"x.jpg",
        b"x.jpg",
        b"caf\xe9.jpg",
    ]
    (data / "list.lst").write_bytes(b"\n".join(lines))
    listing = listed(data / "list.lst")
    expected = ["b/2.jpg", "a b, c.jpg", "x.jpg y.png", absolute, "x.jpg", "x.jpg", "caf\udce9.jpg"]
    assert names(listing) == expected
    assert (listing.facts.kind, listing.facts.root, listing.facts.class_names) == ("list", str(data), [])
    assert {entry.label for entry in entries(listing)} == {NO_LABEL}
    assert contents(listing) == {name: (data / os.fsdecode(as_bytes(name))).read_bytes() for name in expected}


@pytest.mark.parametrize("separator", ["\t", ",", " ", ", ", " \t "])
def test_labels_of_a_list(tmp_path, listed, separator):
    path = tmp_path / "list.csv"
    texts = {"b/2.jpg": "zebra", "my cat.PNG": "house cat, gray", "a.jpg": "Ape", "c.jpg": "zebra", "d.jpg": "10"}
    path.write_bytes(b"\xef\xbb\xbf" + "".join(f"{name}{separator}{text}\r\n" for name, text in texts.items()).encode())
    listing = listed(path)
    assert tuple(listing.facts.class_names) == ("10", "Ape", "house cat, gray", "zebra")
    assert labels(listing) == texts
    assert {entry.fault for entry in entries(listing)} == {"unreadable: No such file or directory"}


def test_integer_labels_are_the_labels(tmp_path, listed):
    (tmp_path / "list.txt").write_text("a.jpg 10\nb.jpg 2\nc.jpg 010\nd.jpg 0\n")
    listing = listed(tmp_path / "list.txt")
    assert tuple(listing.facts.class_names) == tuple(map(str, range(11)))
    assert [entry.label for entry in entries(listing)] == [10, 2, 10, 0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "{} names no picture; give one per line, PATH or PATH LABEL."),
        (b"a.jpg\n\nname,label\n", "{}, line 3, names no picture ('name,label'): give one picture per line, PATH or PATH LABEL, "),
        (b'"a.jpg",3\n', "{}, line 1, names no picture ('\"a.jpg\",3'): give one picture per line, PATH or PATH LABEL, without"),
        ("a.jpg\n".encode("utf-16"), "{}, line 1, names no picture ("),
        (b"a.jpg 1\n\nb.jpg\n", MIXED.format("{}", "a.jpg", "b.jpg")),
        (b"a.jpg\nb.jpg 1", MIXED.format("{}", "b.jpg", "a.jpg")),
        (b"a.jpg 1\nb.jpg -1", " has labels from -1 to "),
        (b"a.jpg 1440764", " has labels from 1440764 to 1440764; they must be from 0 to 999999: count them from 0, "),
        (b"a\0b.jpg", "{}, line 1, names no picture ('a\\x00b.jpg'): "),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_read_are_refused(tmp_path, text, sentence):
    path = tmp_path / "list.txt"
    path.write_bytes(text)
    assert sentence.format(path) in refused(path, tmp_path)


# ------------------------------------------------------------------------------------------------- tars


def imagenet_tar(path, classes=("n02", "n01", "n03"), count=5):
    """As ILSVRC2012_img_train.tar: a tar per class, in any order, as are the pictures in each."""
    inner = {}
    for name in classes:
        pictures = [f"{name}_{number}.JPEG" for number in (10, 9, *range(count - 2))]
        inner[f"{name}.tar"] = tar_of(pictures)
    path.write_bytes(tar_bytes(inner))
    return path


def test_a_tar_of_tars_is_read_in_place(tmp_path, listed):
    path = imagenet_tar(tmp_path / "ILSVRC2012_img_train.tar", ("n02", "empty", "n01"))
    expected = {}
    with tarfile.open(path) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                folder = member.name.removesuffix(".tar")
                expected |= {f"{folder}/{m.name}": inner.extractfile(m).read() for m in inner}
    listing = listed(path)
    assert names(listing) == sorted(expected)
    assert tuple(listing.facts.class_names) == ("empty", "n01", "n02")
    assert labels(listing) == {name: name.split("/")[0] for name in expected}
    assert contents(listing) == expected
    assert (listing.facts.kind, listing.facts.root, listing.facts.containers) == ("tar", str(tmp_path), [path.name])
    whole = path.read_bytes()
    assert all(whole[e.offset : e.offset + e.byte_count] == expected[e.name] for e in entries(listing))


def test_a_tar_of_a_folder_is_listed_as_the_folder(tmp_path, listed):
    files = [
        "b/2.jpg",
        "b/deep/1.png",
        "a/9.JPEG",
        "a/10.JPEG",
        "a-1/.hid.jpg",
        "a/._9.JPEG",
        "a-1/x.jpg",
        "a/.d/x.jpg",
        "a/t.txt",
    ]
    data = write_files(tmp_path / "data", files)
    (data / "empty").mkdir()
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(data, ".")
    from_folder, from_tar = listed(data), listed(tmp_path / "data.tar")
    assert labels(from_tar) == labels(from_folder)
    assert names(from_tar) == names(from_folder)
    assert contents(from_tar) == contents(from_folder)
    assert tuple(from_tar.facts.class_names) == tuple(from_folder.facts.class_names) == ("a", "a-1", "b", "empty")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_in_tars(tmp_path, listed, format):
    odd = [
        "d/" + "very_" * 50 + ".jpg",
        "d/été.jpg",
        "d/caf\udce9.jpg",
        "d/" + "ü" * 120 + ".jpg",
        "/e//" + "x" * 99 + ".jpg",
    ]
    path = tmp_path / "odd.tar"
    path.write_bytes(tar_bytes({name: name.encode("utf-8", "surrogateescape") for name in odd}, format=format))
    listing = listed(path)
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        expected = {m.name.strip("/").replace("//", "/"): tar.extractfile(m).read() for m in tar}
    assert contents(listing) == expected
    assert set(labels(listing).values()) == {"d", "e"}


def test_a_flat_tar_has_no_labels_and_keeps_both_of_two_equal_names(tmp_path, listed):
    parts = [tar_bytes({"b.jpg": b"1", "a.jpg": b"22", "b.txt": b"x"})[:3072], tar_bytes({"b.jpg": b"333"})]
    (tmp_path / "flat.tar").write_bytes(b"".join(parts))
    listing = listed(tmp_path / "flat.tar")
    reader = listing
    assert [(entry.name, reader.read(entry)) for entry in entries(listing)] == [
        ("a.jpg", b"22"),
        ("b.jpg", b"1"),
        ("b.jpg", b"333"),
    ]
    assert tuple(listing.facts.class_names) == () and set(labels(listing).values()) == {None}


def test_members_that_are_no_files_are_left_out(tmp_path, listed):
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        kinds = {"b": tarfile.REGTYPE, "c": tarfile.LNKTYPE, "d": tarfile.FIFOTYPE, "e": tarfile.DIRTYPE}
        for name, kind in kinds.items():
            member = tarfile.TarInfo(f"a/{name}.jpg")
            member.type, member.linkname = kind, "a/b.jpg"
            tar.addfile(member)
    assert {e.name: e.fault for e in entries(listed(tmp_path / "links.tar"))} == {
        "a/b.jpg": "",
        "a/c.jpg": f"unreadable: {NOT_REGULAR}",
        "a/d.jpg": f"unreadable: {NOT_REGULAR}",
    }


@pytest.mark.parametrize(
    "texts", [["3", "0", "3", "1", "2"], ["dog", "ape", "dog", "7", "cat"], None], ids=["integers", "texts", "none"]
)
def test_webdatasets_own_tars(tmp_path, listed, texts):
    data, expected, expected_labels = tmp_path / "data", {}, {}
    data.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(data / f"train-{shard:04d}.tar")) as writer:
            for i in reversed(range(5)):
                sample = {
                    "__key__": f"some/{i}",
                    "json": {"n": i},
                    "jpg": content_of(f"{shard}{i}"),
                    "Left.PNG": content_of(f"{i}"),
                }
                writer.write(sample | ({"cls": texts[i]} if texts else {}))
                for extension in ("jpg", "Left.PNG"):
                    name = f"train-{shard:04d}/some/{i}.{extension.lower() if extension == 'jpg' else extension}"
                    expected[name] = sample[extension]
                    expected_labels[name] = texts[i] if texts else "some"
    listing = listed(data)
    assert contents(listing) == expected
    assert labels(listing) == expected_labels
    assert names(listing) == sorted(expected)
    assert listing.facts.containers == ["train-0000.tar", "train-0001.tar"] and listing.facts.root == str(data)
    if texts:
        assert tuple(listing.facts.class_names) == (
            ("0", "1", "2", "3") if texts[0] == "3" else ("7", "ape", "cat", "dog")
        )
    single = listed(data / "train-0001.tar")
    assert names(single) == [n.removeprefix("train-0001/") for n in sorted(expected) if n.startswith("train-0001/")]


def test_a_label_may_come_behind_its_picture(tmp_path, listed):
    (tmp_path / "x.tar").write_bytes(
        tar_bytes({"a.jpg": b"1", "a.cls": b"7\n", "b.cls": b"2", "b.jpg": b"2", "orphan.cls": b"9"})
    )
    assert labels(listed(tmp_path / "x.tar")) == {"a.jpg": "7", "b.jpg": "2"}


def test_imagenets_tars_unpacked_from_their_tar_are_classes(tmp_path, listed):
    path = imagenet_tar(tmp_path / "all.tar", ("n01440764", "n01443537"))
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "data", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked, whole = listed(tmp_path / "data"), listed(path)
    assert labels(unpacked) == labels(whole)
    assert names(unpacked) == names(whole)
    assert contents(unpacked) == contents(whole)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"a.txt": b"1"}, "{} holds no picture, neither itself nor in class folders or tars (but 1 .txt); give another --data"),
        (
            {"a.jpg": b"1", "a.cls": b"1", "b.jpg": b"2"},
            MIXED.format("{}", "a.jpg", "b.jpg"),
        ),
        ({"x/a.jpg": b"1", "b.jpg": b"2"}, MIXED.format("{}", "x/a.jpg", "b.jpg")),
        ({"a.jpg": b"1", "a.cls": b"-1"}, " has labels from -1 to -1; they must be from 0 to 999999: "),
    ],
)  # fmt: skip
def test_tars_that_do_not_say_what_they_hold_are_refused(tmp_path, members, sentence):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members))
    assert sentence.format(path) in refused(path, tmp_path)


PICTURES = dict.fromkeys(("a/f.avif", "a/g.JP2", "a/h.ppm", "a/i.HEIC"), b"known by their names")
NO_PICTURES = {
    "a/m.txt": b"\xff\xd8\xff",
    "a/n.json": b"{}",
    "a/README": b"text",
    "a/Thumbs.db": b"3",
    "a/b.jpg_large": b"5",
    "a/b.jpg.1": b"6",
    "a/.DS_Store": b"4",
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_nothing_is_passed_over_without_a_word(tmp_path, listed, kind):
    files = PICTURES | NO_PICTURES
    data = tmp_path / "data"
    if kind == "folder":
        for name, content in files.items():
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).write_bytes(content)
    else:
        data.write_bytes(tar_bytes(files))
        data = data.rename(tmp_path / "data.tar")
    listing = listed(data)
    assert names(listing) == sorted(PICTURES) and tuple(listing.facts.class_names) == ("a",)
    kinds = {"of other kinds": 2, ".db": 1, ".jpg_large": 1, ".json": 1, ".txt": 1, "hidden": 1}
    assert listing.facts.ignored == kinds


@pytest.mark.parametrize(
    "order", [["a.jpg", "b.jpg", "a.cls", "b.cls"], ["x/a.cls", "x/b.jpg", "x/b.cls", "x/a.jpg"]], ids=str
)
def test_labels_away_from_their_pictures_are_found(tmp_path, listed, order):
    (tmp_path / "x.tar").write_bytes(tar_bytes({name: Path(name).stem.encode() for name in order}))
    listing = listed(tmp_path / "x.tar")
    assert len(listing) == 2 and all(Path(n).stem == label for n, label in labels(listing).items())


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({"a.jpg": b"1", "a.CLS": b"7", "b.jpg": b"2", "b.Cls": b"5"}, {"a.jpg": "7", "b.jpg": "5"}),
        ({"x/a.cls": b" \n", "x/a.jpg": b"1"}, {"x/a.jpg": "x"}),
    ],
)  # fmt: skip
def test_labels_by_other_names(tmp_path, listed, members, found):
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    listing = listed(tmp_path / "x.tar")
    assert labels(listing) == found


def test_a_folder_of_tars_is_read_whole_or_not_at_all(tmp_path, listed):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.tar").write_bytes(tar_of(["1.jpg"]))
    (data / "b.tgz").write_bytes(gzip.compress(tar_of(["2.jpg"])))
    assert (
        refused(data, tmp_path).startswith(f"{data}/b.tgz is no tar, damaged, cut short or compressed (")
        and len(list(data.iterdir())) == 2
    )
    (data / "b.tar").write_bytes(gzip.decompress((data / "b.tgz").read_bytes()))
    (data / "b.tgz").unlink()
    assert names(listed(data)) == ["a/1.jpg", "b/2.jpg"]
    (tmp_path / "outer.tar").write_bytes(tar_bytes({"a.tar": tar_of(["1.jpg"]), "b.tgz": b"gzip"}))
    assert f"{tmp_path}/outer.tar, in it b.tgz, is no tar" in refused(tmp_path / "outer.tar", tmp_path)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path, mode):
    (tmp_path / "data").mkdir()
    for name in (f"data/x.tar.{mode}", "misnamed.tar"):
        with tarfile.open(tmp_path / name, f"w:{mode}") as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
    sentence = "{} is no tar, damaged, cut short or compressed ("
    for given, named in {
        f"data/x.tar.{mode}": f"data/x.tar.{mode}",
        "data": f"data/x.tar.{mode}",
        "misnamed.tar": "misnamed.tar",
    }.items():
        assert refused(tmp_path / given, tmp_path).startswith(sentence.format(tmp_path / named))


def test_a_tar_is_refused_wherever_it_was_cut(tmp_path, listed):
    whole = tar_bytes({"a/1.jpg": bytes(700), "a/" + "long" * 40 + ".jpg": b"2", "a/3.jpg": bytes(512)})
    with_end = whole.rstrip(b"\0")
    end = len(with_end) + -len(with_end) % 512 + 512  # the last picture is a block of zeros
    path = tmp_path / "cut.tar"
    for length in [*range(0, end + 512, 256), *range(1, end + 512, 500)]:
        path.write_bytes(whole[:length])
        assert f"{path} is no tar, damaged, cut short or compressed (" in refused(path, tmp_path)
    path.write_bytes(whole[: end + 512])
    assert len(listed(path)) == 3
    assert len(whole) > end + 1024


def test_damaged_tars_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    whole = tar_bytes({"a.jpg": b"1", "b.jpg": b"2"})
    fault = "is no tar, damaged, cut short or compressed (no header and no end can be read at byte"
    path.write_bytes(whole[:1024] + b"garbage!" * 64 + whole[1536:])
    assert f"{path} {fault} 1024): " in refused(path, tmp_path)
    path.write_bytes(b"not a tar, " * 200)
    assert refused(path, tmp_path).startswith(f"{path} is no tar, damaged, cut short")
    path.write_bytes(whole + whole)  # as cat joins them
    assert f"{path} {fault} 2048): " in refused(path, tmp_path)
    path.write_bytes(tar_bytes({"n01.tar": tar_of(["a.jpg"]), "n02.tar": tar_of(["b.jpg"])[:700]}))
    assert refused(path, tmp_path).startswith(f"{path}, in it n02.tar, is no tar, damaged, cut short")
    os.unlink(path)
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data/pipe.tar")
    assert refused(tmp_path / "data", tmp_path).startswith(
        f"{tmp_path}/data/pipe.tar cannot be listed (not a regular file): "
    )


# ------------------------------------------------------------------------------------------------- packed sets


def packed_set(folder, *, encoding=JPEG, container="tar"):
    """Seven samples in three shards, or in one beton."""
    samples = [
        Sample(content_of(str(i)), label=i % 2, name=f"c{i % 2}/caf\udce9 {i}.jpg", encoding=encoding)
        for i in (3, 1, 6, 2, 0, 5, 4)
    ]
    return write_set(folder, samples, class_names=["c0", "c1", "c2"], seed=5, container=container)


@pytest.mark.parametrize("container", ["tar", "beton"])
def test_a_packed_set_keeps_its_order(tmp_path, listed, container):
    index = packed_set(tmp_path / "set", container=container)
    listing = listed(tmp_path / ("set" if container == "tar" else "set/samples.beton"))
    assert entries(listing) == entries(listed(tmp_path / "set"))
    assert names(listing) == [index.name(i) for i in range(7)]
    assert [entry.label for entry in entries(listing)] == index.labels(np.arange(7)).tolist()
    assert contents(listing) == {index.name(i): index.read(i).tobytes() for i in range(7)}
    assert tuple(listing.facts.class_names) == ("c0", "c1", "c2")
    assert (listing.facts.kind, listing.index.manifest.shuffle_seed) == ("packed", 5)


def test_packed_sets_that_are_no_source_are_refused(tmp_path):
    packed_set(tmp_path / "raw", encoding=RAW, container="beton")
    raw = list_source(tmp_path / "raw", tmp_path / "unused")
    with pytest.raises(ShardError, match="is stored as raw pixels: .* pack it with --write-mode jpg"):
        raw.read(raw.entry(0))
    packed_set(tmp_path / "set")
    (tmp_path / "set/shard-000001.tar").unlink()
    assert "shard-000001.tar is missing" in refused(tmp_path / "set", tmp_path)
    (tmp_path / "set/manifest.json").unlink()
    (tmp_path / "set/packing").mkdir()
    assert "packing did not end" in refused(tmp_path / "set", tmp_path)
    (tmp_path / "alone.beton").write_bytes(b"x")
    assert "is no packed set" in refused(tmp_path / "alone.beton", tmp_path)


# ------------------------------------------------------------------------------------------------- reading


def test_a_source_that_vanished_stops_the_packing(tmp_path, listed, monkeypatch):
    data = write_files(tmp_path / "data", ["a/1.jpg", "a/2.jpg"])
    listing = listed(data)
    reader = listing
    (data / "a/1.jpg").unlink()
    with pytest.raises(ValueError) as caught:
        reader.read(listing.entry(0))
    assert str(caught.value) == GONE.format(data / "a/1.jpg", "No such file or directory")
    assert isinstance(caught.value, ValueError)
    open_it = os.open
    for number in (
        errno.ESTALE,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
        errno.ETIMEDOUT,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOTDIR,
    ):

        def fail(path, *arguments, number=number, **options):
            if path == os.fsencode(data / "a/2.jpg"):
                raise OSError(number, os.strerror(number))
            return open_it(path, *arguments, **options)

        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(ValueError, match="a/2.jpg was there when the pictures were listed"):
            reader.read(listing.entry(1))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ELOOP, errno.EPERM])
def test_a_picture_that_cannot_be_read_is_left_out(tmp_path, listed, monkeypatch, number):
    listing = listed(write_files(tmp_path / "data", ["a/1.jpg"]))

    def fail(path, *arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(BadPicture) as caught:
        open_listing(tmp_path, listing.path).read(listing.entry(0))
    assert str(caught.value) == f"unreadable: {os.strerror(number)}"
    assert caught.value.kind == "unreadable"


def test_what_a_file_has_become_is_read(tmp_path, listed):
    data = write_files(tmp_path / "data", ["1.jpg", "2.jpg", "3.jpg", "4.jpg"])
    listing = listed(data)
    (data / "1.jpg").write_bytes(b"longer" * 1000)
    (data / "2.jpg").write_bytes(b"")
    (data / "3.jpg").unlink()
    os.mkfifo(data / "3.jpg")
    (data / "4.jpg").unlink()
    (data / "4.jpg").mkdir()
    reader = listing
    assert reader.read(listing.entry(0)) == b"longer" * 1000
    assert reader.read(listing.entry(1)) == b""
    for position in (2, 3):
        with pytest.raises(BadPicture, match="^unreadable: not a regular file$"):
            reader.read(listing.entry(position))


def test_a_tar_that_changed_stops_the_packing(tmp_path, listed, monkeypatch):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(["1.jpg", "2.jpg"]))
    size = path.stat().st_size
    listing = listed(path)
    first, last = entries(listing)
    held = listing
    held.read(first)
    with path.open("r+b") as file:
        file.truncate(last.offset + 3)
    with pytest.raises(ValueError) as caught:
        held.read(last)
    assert str(caught.value) == GONE.format(path, f"it ends at byte {last.offset + 3}, within 2.jpg")
    with pytest.raises(ValueError) as caught:
        open_listing(tmp_path, listing.path).read(first)
    assert str(caught.value) == GONE.format(path, f"it is {last.offset + 3} bytes long where it was {size}")
    path.unlink()
    with pytest.raises(ValueError) as caught:
        open_listing(tmp_path, listing.path).read(first)
    assert str(caught.value) == GONE.format(path, "No such file or directory")

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(BadPicture, match="^unreadable: Input/output error$"):
        held.read(first)


def test_few_tars_are_open_at_a_time_for_any_number_of_threads(tmp_path, listed, monkeypatch):
    monkeypatch.setattr("data_prep.sources._MAX_OPEN_TARS", 4)
    data = tmp_path / "data"
    data.mkdir()
    for shard in range(20):
        (data / f"{shard:02d}.tar").write_bytes(tar_of([f"{shard}_{i}.jpg" for i in range(5)]))
    listing = listed(data)
    reader = listing

    def num_open():
        descriptors = [os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        return sum(os.readlink(path).startswith(str(data)) for path in descriptors if os.path.lexists(path))

    shuffled = random.Random(0).choices(entries(listing), k=1000)
    with ThreadPoolExecutor(8) as pool:
        for entry, content in zip(shuffled, pool.map(reader.read, shuffled)):
            assert content == content_of(entry.name.partition("/")[2])
    assert num_open() == 4
    del reader, listing
    gc.collect()
    assert num_open() == 0


def test_listings_and_readers_travel_to_other_processes(tmp_path, listed):
    listing = listed(imagenet_tar(tmp_path / "x.tar"))
    other = pickle.loads(pickle.dumps(listing))
    assert entries(other) == entries(listing) and other.facts == listing.facts
    assert pickle.loads(pickle.dumps(listing.entry(3))) == listing.entry(3)
    for fault in (BadPicture("unreadable: x"), ValueError("sentence")):
        assert str(pickle.loads(pickle.dumps(fault))) == str(fault)


# ------------------------------------------------------------------------------------------------- the listing


def test_a_listing_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg\n" * 2500)
    listing = list_source(tmp_path / "list.txt", tmp_path / "listing")
    assert [listing.entry(i).name for i in (0, 2499)] == ["a.jpg"] * 2
    os.truncate(tmp_path / "listing", 5000)
    for path in (tmp_path / "listing", tmp_path / "list.txt", tmp_path / "nowhere"):
        with pytest.raises(
            ValueError, match="cannot be read .*remove the folder packing in --out and pass --overwrite to list"
        ):
            Listing(path)
            listing = Listing(path)
            [listing.entry(i) for i in range(2500)]


MEASURED = """
import sys, tarfile
from pathlib import Path
from data_prep.sources import ListingWriter, Listing, list_source
kind, data, folder, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if kind == "list":
    with open(data, "w") as file:
        file.writelines(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG {i % 1000}\\n" for i in range(count))
elif kind == "tar":
    with open(data, "wb") as file:
        for i in range(count):
            file.write(tarfile.TarInfo(f"class/video.{i}.jpg").tobuf())
        file.write(bytes(1024))
if kind == "sorted":
    writer = ListingWriter(Path(folder))
    for i in range(count):
        writer.add(b"n%08d/%d" % (i % 1000, i), class_text=b"n%08d" % (i % 1000), byte_count=i)
    writer.finish("folder", b"/")
    listing = Listing(folder)
else:
    listing = list_source(data, folder)
assert sum(listing.entry(i).name != "" for i in range(len(listing))) == count
# Not ru_maxrss, which begins with what the process that started this one had.
with open("/proc/self/status") as file:
    print(next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024)
"""


@pytest.mark.parametrize(("kind", "many"), [("list", 100_000), ("sorted", 100_000), ("tar", 30_000)])
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path, kind, many):
    peak_mb = {}
    for count in (10_000, many):
        arguments = [
            kind,
            str(tmp_path / f"data.{'tar' if kind == 'tar' else 'txt'}"),
            str(tmp_path / str(count)),
            str(count),
        ]
        command = [sys.executable, "-c", MEASURED, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peak_mb[count] = float(done.stdout)
    assert peak_mb[many] < peak_mb[10_000] + 15
