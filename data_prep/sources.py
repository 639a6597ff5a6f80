"""Where the pictures of a data set come from: found out, listed on disk, read.

    DIR/class/.../picture.jpg      each folder in DIR is a class, also one without pictures; labels in sorted order
    DIR/picture.jpg                a flat folder: no labels
    DIR/*.tar                      a folder of tars, as one tar; each name begins with its tar's
    FILE.tar                       WebDataset's: pictures beside a .cls, or a .json with "cls" or "label", of the same name;
                                   or class folders, or no labels
    ILSVRC2012_img_train.tar       a tar of tars: each tar in it is a class; read where it lies, never unpacked
    FILE.txt .tsv .csv .lst        a list: one picture per line, PATH or PATH LABEL
    DIR with a manifest of ours    a packed set: its samples as they are stored
    DIR/samples.beton              the same

A folder is asked for a manifest of ours, then for pictures, then for tars; a file is known by its extension, or, where
that says nothing (photo, photo.jpg.1, photo.jpg_large), by its first bytes. Pictures that are not decoded (.heic, .jxl,
raw files of cameras) are listed with that fault, so they count as bad ones. What is no picture is counted by kind, and
so are names that begin with a dot and links to folders, but for class folders themselves.

Pictures of folders and tars are listed by (class folder, name), whatever order the disk or the tar has them in; those
of lists and of packed sets in the order they have there. No number of pictures fills the memory (see listing.py).

    listing = list_source(Path("imagenet/train"), Path("OUT/packing/listing"))
    Reader(listing).read(listing.entry(17))        (data_prep/reading.py)
"""

import io
import json
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_prep.index import FORMAT, JPEG, MANIFEST_NAME, NO_LABEL, STATE_NAME, DatasetIndex, format_files
from data_prep.listing import Listing, ListingWriter, as_bytes, as_text, kinds_in_words
from data_prep.pictures import BEGINNING_BYTES, no_decoder, picture_format
from data_prep.reading import NOT_REGULAR, OUT_OF_REACH, UNREADABLE, open_regular

PICTURE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".avif", ".jp2", ".j2k", ".j2c", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"),
)
UNDECODED_EXTENSIONS = (
    *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".psd", ".tga", ".exr", ".dcm"),
    # Raw files of cameras. Many are TIFFs, of which a decoder would see the preview.
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"),
)
LIST_EXTENSIONS = (".txt", ".tsv", ".csv", ".lst")
NO_PICTURE_EXTENSIONS = (*LIST_EXTENSIONS, ".cls", ".json", ".xml", ".npy", ".mat")
"""Of files that often lie one beside each picture: they are not opened to see what they are."""

_UNDECODED_SUFFIXES = tuple(map(as_bytes, UNDECODED_EXTENSIONS))
_PICTURE_SUFFIXES = tuple(map(as_bytes, PICTURE_EXTENSIONS)) + _UNDECODED_SUFFIXES
_NO_PICTURE_SUFFIXES = tuple(map(as_bytes, NO_PICTURE_EXTENSIONS))
# The path ends at the last extension that a separator or the line's end follows, so blanks and commas may be in it.
_LINE = re.compile(
    rb"(.*(?:" + b"|".join(map(re.escape, _PICTURE_SUFFIXES)) + rb"))(?:[\t, ]+(.*))?", re.DOTALL | re.IGNORECASE
)
_MAX_LINE_BYTES = 1 << 16
_MAX_CLASSES = 1_000_000  # their names are in memory
_MAX_CLS_BYTES, _MAX_JSON_BYTES = 1000, 1 << 20
_MAX_SAMPLE_PICTURES = 1000  # "a.0001.jpg", "a.0002.jpg", ... are one WebDataset sample by name
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".tzst")
_TAR_NAME = re.compile(rb".*\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)", re.DOTALL | re.IGNORECASE)
_ARCHIVES = (".zip", ".rar", ".7z")
_END_WINDOW = 1 << 20  # tars are filled up with zeros to a whole record; no usual record is longer
_WORDNET_ID = re.compile(rb"n\d{8}")
_PACKED_AT_ONCE = 20_000  # records of a packed set that are looked at together


def list_source(
    data: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Listing:
    """List every picture of `data` in `folder`, and open the listing. `on_progress` is told how many there are so far.

    Raises ValueError, with the remedy, where `data` is nothing that has pictures or something in it cannot be looked at.
    """
    data = Path(data)
    try:
        mode = os.stat(data).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{data} does not exist; give a folder to --data.") from None
    except OSError as error:
        raise _cannot_list(data, error) from None
    with ListingWriter(folder, on_progress) as writer:
        facts = _how_to_list(data, mode)(data, writer)
        return writer.finish(**facts)


def _how_to_list(data: Path, mode: int) -> Callable[[Path, ListingWriter], dict[str, Any]]:
    name = data.name.lower()
    if stat.S_ISDIR(mode):
        return _list_packed if _is_packed(data) else _list_folder
    if stat.S_ISREG(mode):
        if name.endswith(".beton"):
            return _list_packed
        if name.endswith(LIST_EXTENSIONS):
            return _list_lines
        if name.endswith((".tar", *_COMPRESSED_SUFFIXES)):
            return _list_tar
    raise ValueError(
        f"{data} is neither a folder nor a tar nor a list of pictures (*{', *'.join(LIST_EXTENSIONS)}); give one of these "
        "to --data."
    )


# ---------------------------------------------------------------------------------------------------- folders


def _list_folder(data: Path, writer: ListingWriter) -> dict[str, Any]:
    root = _absolute(data)
    class_folders, tars, loose = [], [], None
    for entry in _entries(root, writer):
        if _is_folder(entry):
            class_folders.append(entry.name)
            _refuse_many_classes(len(class_folders), data)
        elif _TAR_NAME.fullmatch(entry.name):
            tars.append(entry.name)
        elif _is_picture(entry.name, lambda path=entry.path: _beginning(path)):
            loose = min(loose or entry.name, entry.name)
            writer.add(entry.name, sort_under=b"", **_look_at(entry.path))
        else:
            writer.ignore(entry.name)
    class_folders.sort()
    inner = _list_class_folders(os.path.join(root, b""), class_folders, writer)
    if inner and loose:
        raise _mixed(data, inner, loose)
    if tars and (inner or loose):
        raise ValueError(
            f"{data} holds both pictures ({as_text(inner or loose)}) and tars ({as_text(min(tars))}): move one of the two "
            "away."
        )
    if inner:
        class_names = [as_text(name) for name in class_folders]
        return {"kind": "folder", "root": root, "class_names": class_names, "labels": range(len(class_names))}
    if loose:
        return {"kind": "folder", "root": root}
    if (data / STATE_NAME).is_dir() and format_files(data):
        DatasetIndex.open(data)  # raises, for this is a set of ours whose packing did not end
    if tars:
        compressed = min((name for name in tars if not name.lower().endswith(b".tar")), default=None)
        if compressed:
            raise _compressed(data / as_text(compressed))
        archives = [kind for kind in _ARCHIVES if kind in writer.ignored]
        if archives:
            raise ValueError(
                f"{data} holds both tars ({as_text(min(tars))}) and archives that are not read (*{archives[0]}): unpack those, "
                "or move them away."
            )
        return _list_tars(sorted(tars), root, data, writer)
    raise ValueError(
        f"{data} holds no picture, neither itself nor in class folders, and no *.tar{_other_files(writer)}; give another --data "
        f"(pictures are {', '.join('*' + extension for extension in PICTURE_EXTENSIONS)}, and whatever begins as they do)."
    )


def _list_class_folders(prefix: bytes, class_folders: list[bytes], writer: ListingWriter) -> bytes | None:
    """List what is in them, and return the first picture's name."""
    first = None
    for number, class_folder in enumerate(class_folders):
        for path in _pictures_below(prefix + class_folder, writer):
            name = path[len(prefix) :]
            first = min(first or name, name)
            writer.add(name, sort_under=class_folder, class_number=number, **_look_at(path))
    return first


def _pictures_below(folder: bytes, writer: ListingWriter) -> Iterator[bytes]:
    """Paths of the pictures anywhere below a folder, in the disk's order; what else there is is counted."""
    open_folders = [_entries(folder, writer)]  # one per level: neither a folder's files nor its folders are collected
    while open_folders:
        entry = next(open_folders[-1], None)
        if entry is None:
            open_folders.pop()
        elif _is_folder(entry):
            if entry.is_symlink():  # it may lead back up
                writer.ignore(entry.name, "linked folder")
            else:
                open_folders.append(_entries(entry.path, writer))
        elif _is_picture(entry.name, lambda path=entry.path: _beginning(path)):
            yield entry.path
        else:
            writer.ignore(entry.name)


def _entries(folder: bytes, writer: ListingWriter) -> Iterator[os.DirEntry]:
    """What lies in a folder and is not hidden."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    writer.ignore(entry.name, "hidden")
                elif entry.name != b"lost+found":  # of a disk's own root: for the superuser alone, and without pictures
                    yield entry
    except OSError as error:
        raise _cannot_list(as_text(folder), error) from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_picture(name: bytes, beginning: Callable[[], bytes]) -> bool:
    """By its extension; where that says nothing, by the first bytes of the file."""
    name = name.lower()
    if name.endswith(_PICTURE_SUFFIXES):
        return True
    return not name.endswith(_NO_PICTURE_SUFFIXES) and bool(picture_format(beginning()))


def _beginning(path: bytes) -> bytes:
    """Of a file; empty where there is none to be read."""
    try:
        with open_regular(path) as file:
            return file.read(BEGINNING_BYTES)
    except OSError as error:
        if error.errno in OUT_OF_REACH:
            raise _cannot_list(as_text(path), error) from None
        return b""


def _undecoded(name: bytes) -> str:
    """The fault of a picture that no decoder here reads; empty for others."""
    extension = os.path.splitext(name)[1].lower()
    return str(no_decoder(as_text(extension))) if extension in _UNDECODED_SUFFIXES else ""


def _look_at(path: bytes) -> dict[str, Any]:
    """`byte_count` and `fault` of a picture's file, which is not opened."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in OUT_OF_REACH:
            raise _cannot_list(as_text(path), error) from None
        return {"byte_count": 0, "fault": f"{UNREADABLE}: {error.strerror}"}
    if not stat.S_ISREG(status.st_mode):
        return {"byte_count": 0, "fault": NOT_REGULAR}
    return {"byte_count": status.st_size, "fault": _undecoded(path)}


# ---------------------------------------------------------------------------------------------------- lists


def _list_lines(data: Path, writer: ListingWriter) -> dict[str, Any]:
    root = _absolute(data.parent)
    labels, first_place, with_label = _Labels(data), "", False
    for number, line in _lines(data):
        place = f"{data}, line {number},"
        match = _LINE.fullmatch(line)
        if match is None or b"\0" in line:
            raise ValueError(
                f"{place} names no picture ({as_text(line[:80])!r}): give one picture per line, PATH or PATH LABEL, without "
                f"quotes or a header; PATH ends in {', '.join(PICTURE_EXTENSIONS)}."
            )
        path, label = match[1], match[2] or None
        if not len(writer):
            first_place, with_label = place, label is not None
        elif with_label != (label is not None):
            has = ("has a label", "has none") if label else ("has no label", "has one")
            raise ValueError(f"{place} {has[0]} where {first_place} {has[1]}: give every picture a label, or none.")
        class_number = labels.number_of(label, place) if label else NO_LABEL
        writer.add(path, class_number=class_number, **_look_at(os.path.join(root, path)))
    if not len(writer):
        raise ValueError(f"{data} names no picture; give one per line, PATH or PATH LABEL.")
    return {"kind": "list", "root": root} | labels.facts()


def _lines(data: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and contents of the lines that are not blank."""
    try:
        with io.BufferedReader(open_regular(_absolute(data))) as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), 1):
                if len(line) == _MAX_LINE_BYTES:
                    raise ValueError(
                        f"{data}, line {number}, is longer than {_MAX_LINE_BYTES} bytes, so this is no list of pictures; "
                        "give one per line, PATH or PATH LABEL."
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # with which Windows editors begin files
                line = line.rstrip(b" \t\r\n")
                if line:
                    yield number, line
    except OSError as error:
        raise _cannot_list(data, error) from None


class _Labels:
    """Label texts, numbered as they are met. What they mean is known at the end: integers, or names."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._numbers: dict[bytes, int] = {}
        self._places: list[str] = []  # where each was met first

    def number_of(self, text: bytes, place: str) -> int:
        number = self._numbers.setdefault(text, len(self._numbers))
        if number == len(self._places):
            self._places.append(place)
            _refuse_many_classes(number + 1, self._data)
        return number

    def facts(self, *, integers: bool = True) -> dict[str, Any]:
        """`class_names`, and `labels` by class number. Where all texts are integers, they are the labels."""
        if integers and self._numbers and all(re.fullmatch(rb"-?\d{1,18}", text) for text in self._numbers):
            labels = [int(text) for text in self._numbers]
            for label, place in zip(labels, self._places, strict=True):
                if not 0 <= label < _MAX_CLASSES:
                    raise ValueError(
                        f"{place} has the label {label}; integer labels must be from 0 to {_MAX_CLASSES - 1}: count them "
                        "from 0, or put a letter before each to make them names."
                    )
            return {"class_names": [str(label) for label in range(max(labels) + 1)], "labels": labels}
        order = sorted(self._numbers)
        label_of = {text: label for label, text in enumerate(order)}
        return {"class_names": [as_text(text) for text in order], "labels": [label_of[text] for text in self._numbers]}


def _refuse_many_classes(count: int, data: Path) -> None:
    if count > _MAX_CLASSES:
        raise ValueError(
            f"{data} has more than {_MAX_CLASSES} classes; if they are none, as captions or folders of single pictures "
            "are none, give a list file of the paths alone."
        )


# ---------------------------------------------------------------------------------------------------- tars


class _Member(NamedTuple):
    """A picture in a tar."""

    name: bytes
    folder: bytes
    """Its first folder, or the tar in the tar; empty where it lies in neither."""
    label: bytes | None
    """What the .cls or .json beside it says."""
    offset: int
    byte_count: int
    fault: str
    is_lone_label: bool = False
    """True for a label that lies beside no picture."""


def _list_tar(data: Path, writer: ListingWriter) -> dict[str, Any]:
    root = _absolute(data.parent)
    return _list_tars([os.fsencode(data.name)], root, data, writer)


def _list_tars(tars: list[bytes], root: bytes, data: Path, writer: ListingWriter) -> dict[str, Any]:
    labels, folders, byte_counts = _Labels(data), set(), []
    examples: dict[str, bytes] = {}  # one picture of each manner of saying its class
    lone_label = None
    for container, tar_name in enumerate(tars):
        stem, path = tar_name[: -len(".tar")], os.path.join(root, tar_name)
        # The tars in ILSVRC2012_img_train.tar have this name; unpacked from it, they still are classes.
        tar_folder = stem if _WORDNET_ID.fullmatch(stem) else b""
        folders |= {tar_folder} - {b""}
        with _open_tar(path) as file:
            byte_counts.append(os.fstat(file.fileno()).st_size)
            for member in _pictures_in_tar(file, as_text(path), folders, writer):
                name = member.name if len(tars) == 1 else stem + b"/" + member.name
                if member.is_lone_label:
                    lone_label = lone_label or name
                    writer.ignore(name)
                    continue
                folder = b"" if member.label else member.folder or tar_folder
                manner = "label" if member.label else "folder" if folder else "none"
                examples.setdefault(manner, name)
                place = f"{as_text(path)}, member {as_text(member.name)},"
                text = member.label or folder
                where = {"container": container, "offset": member.offset, "byte_count": member.byte_count}
                class_number = labels.number_of(text, place) if text else NO_LABEL
                writer.add(name, sort_under=folder, class_number=class_number, fault=member.fault, **where)
    if not examples:
        raise ValueError(
            f"{data} holds no picture, neither itself nor in tars in it{_other_files(writer)}; give another --data."
        )
    if lone_label and examples.keys() != {"label"}:
        raise ValueError(
            f"{data} holds a label without a picture beside it ({as_text(lone_label)}) and a picture without a label beside it "
            f"({as_text(examples.get('none') or examples['folder'])}); a sample's members must lie side by side: unpack it and "
            "pack it anew with tar --sort=name, or without the labels."
        )
    if "label" in examples and len(examples) > 1:
        other = examples.get("folder", examples.get("none"))
        raise ValueError(
            f"{data} holds a picture with a label beside it ({as_text(examples['label'])}) and one without "
            f"({as_text(other)}): give every picture a label, or none."
        )
    if len(examples) > 1:
        raise _mixed(data, examples["folder"], examples["none"])
    if "folder" in examples:
        for folder in sorted(folders):
            labels.number_of(folder, "")  # also those without pictures
    facts = labels.facts(integers="label" in examples)
    return {"kind": "tar", "root": root, "containers": tars, "container_bytes": byte_counts} | facts


def _pictures_in_tar(file: BinaryIO, path: str, folders: set[bytes], writer: ListingWriter) -> Iterator[_Member]:
    """The pictures of a tar, in its order, and labels that lie alone; its folders and the tars in it are added to `folders`."""
    sample, pictures, label, label_name = None, [], None, b""

    def of_this_sample() -> Iterator[_Member]:
        yield from (picture._replace(label=label) for picture in pictures)
        if label and not pictures:
            yield _Member(label_name, b"", label, 0, 0, "", is_lone_label=True)

    for tar, member in _members(file, path):
        name = _member_name(member)
        if member.isdir():
            folders |= {name} if name and b"/" not in name and not name.startswith(b".") else set()
            continue
        if any(part.startswith(b".") for part in name.split(b"/")):
            writer.ignore(name, "hidden")
            continue
        file_name = name.rpartition(b"/")[2]
        of_sample = name[: len(name) - len(file_name)] + file_name.partition(b".")[0]  # as WebDataset has it
        if of_sample != sample or len(pictures) == _MAX_SAMPLE_PICTURES:
            yield from of_this_sample()
            sample, pictures, label = of_sample, [], None
        if _TAR_NAME.fullmatch(file_name) and member.isreg():
            if not file_name.lower().endswith(b".tar"):
                raise _compressed(f"{path}, in it {as_text(name)},")
            folder = file_name[: -len(".tar")]
            folders.add(folder)
            for inner in _pictures_in_tar(tar.extractfile(member), f"{path}, in it {as_text(name)},", set(), writer):
                offset = member.offset_data + inner.offset
                yield inner._replace(name=folder + b"/" + inner.name, folder=folder, offset=offset)
        elif _is_picture(file_name, lambda member=member: _content(file, member, BEGINNING_BYTES)):
            fault = _undecoded(file_name) if member.isreg() else NOT_REGULAR
            folder = name.partition(b"/")[0] if b"/" in name else b""
            pictures.append(_Member(name, folder, None, member.offset_data, member.size, fault))
        elif (found := _label(file, member, file_name.lower())) is None:
            writer.ignore(name)
        elif label is None or file_name.lower().endswith(b".cls"):
            label, label_name = found, name
    yield from of_this_sample()


def _content(file: BinaryIO, member: tarfile.TarInfo, byte_count: int) -> bytes:
    """At most so many bytes of a member; none of one that is no file."""
    file.seek(member.offset_data)
    return file.read(min(member.size, byte_count)) if member.isreg() else b""


def _label(file: BinaryIO, member: tarfile.TarInfo, name: bytes) -> bytes | None:
    """What a member says as the label of the pictures beside it: a .cls, or "cls" or "label" in a .json."""
    if name.endswith(b".cls"):
        return _content(file, member, _MAX_CLS_BYTES).strip() or None
    if not name.endswith(b".json"):
        return None
    try:
        facts = json.loads(_content(file, member, _MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        return None
    label = facts.get("cls", facts.get("label")) if isinstance(facts, dict) else None
    is_label = isinstance(label, (int, str)) and not isinstance(label, bool)
    return str(label).strip().encode("utf-8", "surrogatepass") or None if is_label else None


def _members(file: BinaryIO, path: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of a tar, one by one. ValueError where it is compressed, damaged or cut short."""
    head = file.read(8)
    file.seek(0)
    if any(head.startswith(magic) for magic in _COMPRESSED):
        raise _compressed(path)
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        while (member := tar.next()) is not None:
            tar.members.clear()  # which would grow with the tar
            if member.issparse():
                raise tarfile.TarError(f"{member.name} is a sparse file, which is not stored in one piece")
            yield tar, member
    except (tarfile.TarError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    file.seek(tar.offset)
    end = file.read(_END_WINDOW)
    if len(end) < tarfile.BLOCKSIZE:
        raise _damaged(path, "it ends without the empty block that marks a tar's end")
    # tarfile ends without a word at a header that it cannot read.
    if any(end[: tarfile.BLOCKSIZE]):
        raise _damaged(path, f"no header can be read at byte {tar.offset}")
    if any(end):
        raise _damaged(path, "it goes on behind its end, as tars do that were joined by cat")


def _member_name(member: tarfile.TarInfo) -> bytes:
    """Without a leading "./" or "/"."""
    name = as_bytes(member.name.partition("\0")[0])
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b".", b".."))


def _open_tar(path: bytes) -> BinaryIO:
    try:
        return io.BufferedReader(open_regular(path))
    except OSError as error:
        raise _cannot_list(as_text(path), error) from None


# ---------------------------------------------------------------------------------------------------- packed sets


def _is_packed(data: Path) -> bool:
    try:
        with (data / MANIFEST_NAME).open("rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(100)  # so that a damaged one is known, too
    except OSError:
        return False


def _list_packed(data: Path, writer: ListingWriter) -> dict[str, Any]:
    index = DatasetIndex.open(data)
    for start in range(0, len(index), _PACKED_AT_ONCE):
        sample_ids = range(start, min(start + _PACKED_AT_ONCE, len(index)))
        records = index.records(np.array(sample_ids))
        if (records["encoding"] != JPEG).any():
            raise ValueError(
                f"{data} holds pictures as raw pixels, which are no picture files: pack from where it was packed from, or "
                "from a set that was packed with --write-mode jpg."
            )
        fields = records[["shard", "offset", "byte_count", "label", "checksum"]].tolist()
        for sample_id, (shard, offset, byte_count, label, checksum) in zip(sample_ids, fields, strict=True):
            where = {"container": shard, "offset": offset, "byte_count": byte_count, "checksum": checksum}
            writer.add(as_bytes(index.name(sample_id)), class_number=label, **where)
    shards = index.manifest.shards
    return {
        "kind": "packed",
        "root": os.fsencode(index.path),
        "class_names": index.class_names,
        "labels": range(len(index.class_names)),
        "containers": [as_bytes(shard.name) for shard in shards],
        "container_bytes": [shard.byte_count for shard in shards],
        "keep_order": True,
        "source_seed": index.manifest.shuffle_seed,
    }


# ---------------------------------------------------------------------------------------------------- faults


def _cannot_list(path: Path | str, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be listed ({error.strerror}): make it readable, mount it or move it away.")


def _other_files(writer: ListingWriter) -> str:
    return f" (but {kinds_in_words(writer.ignored)})" if writer.ignored else ""


def _mixed(data: Path, inner: bytes, loose: bytes) -> ValueError:
    return ValueError(
        f"{data} holds both class folders ({as_text(inner)}) and loose pictures ({as_text(loose)}): "
        "move the loose ones into a class folder or away."
    )


def _compressed(path: Path | str) -> ValueError:
    return ValueError(f"{path} is compressed, so pictures in it cannot be read one by one: decompress it first.")


def _damaged(path: str, error: Exception | str) -> ValueError:
    return ValueError(f"{path} is damaged or was cut short ({error}): copy it again, or pack it anew with tar.")


def _absolute(path: Path) -> bytes:
    return os.fsencode(path.absolute())
