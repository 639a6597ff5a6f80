"""Where the pictures of a data set come from: found out, listed on disk, read.

    DIR/class/.../picture.jpg      each folder in DIR is a class, also one without pictures; labels in sorted order
    DIR/picture.jpg                a flat folder: no labels
    DIR/*.tar                      a folder of tars, as one tar; each name begins with its tar's
    FILE.tar                       WebDataset's: pictures with a .cls, or a .json with "cls" or "label", of the same name;
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
of lists and of packed sets in the order they have there. The list is a SQLite file, so no number of pictures fills the
memory; what is kept there are the names of the classes and of the tars.

    listing = list_source(Path("imagenet/train"), Path("OUT/packing/listing.sqlite"))
    Reader(listing.facts).read(listing.entry(17))
"""

import errno
import functools
import io
import json
import os
import re
import sqlite3
import stat
import tarfile
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_prep.index import BEGIN_ANEW, FORMAT, JPEG, MANIFEST_NAME, NO_LABEL, STATE_NAME, DatasetIndex, format_files
from data_prep.pictures import BEGINNING_BYTES, no_decoder, picture_format

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
LINE_BREAK, NOT_REGULAR, UNREADABLE = "line break in the name", "not a regular file", "unreadable"
MAX_PICTURE_BYTES = 2**30
"""A picture is in memory whole. The largest one that Pillow consents to decode is as long as this when uncompressed."""


def as_text(name: bytes) -> str:
    """A name as this program shows and stores it, the same under every locale (os.fsdecode's depends on it)."""
    return name.decode("utf-8", "surrogateescape")


def as_bytes(name: str) -> bytes:
    """A name as the file system has it."""
    return name.encode("utf-8", "surrogateescape")


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
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".tzst")
_TAR_NAME = re.compile(rb".*\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)", re.DOTALL | re.IGNORECASE)
_END_WINDOW = 1 << 20  # tars are filled up with zeros to a whole record; no usual record is longer
_WORDNET_ID = re.compile(rb"n\d{8}")
_AT_ONCE = 20_000  # records of a packed set that are looked at together
_MAX_OPEN_TARS = 64
_GONE = {errno.ENOENT, errno.ENOTDIR}
_OUT_OF_REACH = {
    *(errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}
"""What a network file system or a disk says that is not there any more."""
_OUR_OWN_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


# ---------------------------------------------------------------------------------------------------- the listing


class Entry(NamedTuple):
    """One picture of a source."""

    name: str  # path relative to the source's root, with forward slashes; undecodable bytes kept by surrogateescape
    label: int  # position in the listing's class names, or NO_LABEL
    container: int | None  # position in the listing's containers of the tar that holds it; None for a file of its own
    offset: int  # of its first byte in the container; 0 for a file
    byte_count: int  # when it was listed; 0 where that could not be found out
    checksum: int  # XXH3-64 of its bytes where the source knows it, else 0
    fault: str  # why it cannot be read, where that was seen when it was listed; else empty


class Facts(NamedTuple):
    """What holds for all pictures of a source."""

    kind: str  # "folder", "list", "tar" or "packed", which is shuffled already and keeps its order
    root: str  # what names and containers are relative to; absolute
    class_names: Sequence[str]  # in label order; empty where the pictures have no labels
    containers: Sequence[str] = ()  # the tars, or shards, that hold the pictures
    container_bytes: Sequence[int] = ()  # how long each of them was when it was listed
    source_seed: int | None = None  # what a packed set was shuffled with
    count: int = 0
    total_bytes: int = 0
    ignored: Mapping[str, int] = {}  # how many files are no pictures, by kind, such as ".txt"


_TABLES = """
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -4000;
CREATE TABLE entries (
    name BLOB, class BLOB, container INTEGER, offset INTEGER, byte_count INTEGER, checksum INTEGER, fault TEXT, sample BLOB
);
CREATE TABLE labels (sample BLOB PRIMARY KEY, text BLOB) WITHOUT ROWID;
CREATE TABLE classes (text BLOB PRIMARY KEY, label INTEGER) WITHOUT ROWID;
CREATE TABLE places (entry INTEGER);
CREATE TABLE facts (facts TEXT);
BEGIN;
"""
_ENTRY = f"""
SELECT name, coalesce(label, {NO_LABEL}), container, offset, byte_count, checksum, fault
FROM places JOIN entries ON entries.rowid = entry LEFT JOIN labels USING (sample)
LEFT JOIN classes ON classes.text = coalesce(labels.text, class) WHERE places.rowid = ?
"""
_CLASSES = """
INSERT OR IGNORE INTO classes (text) SELECT DISTINCT coalesce(text, class) FROM entries LEFT JOIN labels USING (sample)
"""


def _database(path: Path, options: str) -> sqlite3.Connection:
    name = urllib.parse.quote(os.fsencode(path))
    return sqlite3.connect(f"file:{name}?{options}", uri=True, isolation_level=None, check_same_thread=False)


class Listing:
    """The pictures of a source, as `list_source` wrote them; may be pickled."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """ValueError, with the remedy, for a file that cannot be read."""
        self.path = Path(path).absolute()
        # Immutable: no locks, which not every network file system has.
        self._database = _database(self.path, "immutable=1")
        self.facts = Facts(**json.loads(self._row("SELECT facts FROM facts")[0]))

    def __reduce__(self):
        return Listing, (self.path,)

    def __len__(self) -> int:
        return self.facts.count

    def entry(self, position: int) -> Entry:
        """The picture at `position`, from 0."""
        name, *others, checksum, fault = self._row(_ENTRY, position + 1)
        return Entry(as_text(name), *others, checksum % 2**64, fault)

    def _row(self, *query: Any) -> tuple:
        try:
            return self._database.execute(query[0], query[1:]).fetchone() or ()
        except sqlite3.Error as error:
            raise ValueError(f"{self.path} cannot be read ({error}): {BEGIN_ANEW} to list the pictures anew.") from None

    def close(self) -> None:
        self._database.close()


class ListingWriter:
    """Writes a listing, one picture after the other."""

    _BATCH, _MAX_KINDS = 1000, 1000

    def __init__(self, path: Path, on_progress: Callable[[int], None]) -> None:
        """`on_progress` is told how many pictures there are so far."""
        path.unlink(missing_ok=True)
        self.path, self.count, self._total_bytes, self._on_progress = path, 0, 0, on_progress
        self._rows, self._ignored, self._database = [], Counter(), _database(path, "nolock=1")
        self._database.executescript(_TABLES)

    def add(
        self,
        name: bytes,
        class_text: bytes = b"",
        *,
        container: int | None = None,
        offset: int = 0,
        byte_count: int,
        checksum: int = 0,
        fault: str = "",
        sample: bytes | None = None,
    ) -> None:
        """Add a picture of a class, or none; `sample` is whose label goes before."""
        if b"\n" in name:
            fault = LINE_BREAK
        elif byte_count > MAX_PICTURE_BYTES:
            fault = f"too large: more than {MAX_PICTURE_BYTES} bytes"
        signed = (checksum + 2**63) % 2**64 - 2**63  # SQLite's integers are
        self._rows.append((name, class_text, container, offset, byte_count, signed, fault, sample))
        self.count += 1
        self._total_bytes += byte_count
        if len(self._rows) == self._BATCH:
            self._flush()

    def add_class(self, text: bytes) -> None:
        """One that may have no pictures."""
        self._database.execute("INSERT OR IGNORE INTO classes (text) VALUES (?)", [text])

    def add_label(self, sample: bytes, text: bytes, goes_first: bool) -> None:
        """Of the pictures of a sample. What a .json says gives way to what a .cls says."""
        self._database.execute(
            f"INSERT OR {'REPLACE' if goes_first else 'IGNORE'} INTO labels VALUES (?, ?)", [sample, text]
        )

    def example(self, condition: str) -> str | None:
        """The first name of a picture of which that is true."""
        self._flush()
        query = f"SELECT min(name) FROM entries LEFT JOIN labels USING (sample) WHERE {condition}"
        (name,) = self._database.execute(query).fetchone()
        return None if name is None else as_text(name)

    def ignore(self, name: bytes, kind: str = "") -> None:
        """Count a file that is no picture, as `kind` or by its extension."""
        extension = os.path.splitext(name)[1].lower()
        known = re.fullmatch(rb"\.[a-z][a-z0-9_~-]{0,9}", extension)
        kind = kind or (as_text(extension) if known else "without extension")
        self._ignored[kind if kind in self._ignored or len(self._ignored) < self._MAX_KINDS else "of other kinds"] += 1

    @property
    def ignored(self) -> dict[str, int]:
        """By kind, the most frequent first."""
        return dict(sorted(self._ignored.items(), key=lambda item: (-item[1], item[0])))

    def finish(self, kind: str, root: bytes, *, integers: bool = False, **facts: Any) -> None:
        """Bring it to the disk. With `integers`, class texts that all are some are the labels; `facts`: others of `Facts`."""
        self._flush()
        self._database.execute(_CLASSES)
        self._database.execute("DELETE FROM classes WHERE text = x''")
        texts = [text for (text,) in self._database.execute("SELECT text FROM classes ORDER BY text")]
        labels, names = range(len(texts)), list(map(as_text, texts))
        if kind == "packed" or (integers and texts and all(re.fullmatch(rb"-?\d{1,18}", text) for text in texts)):
            labels = list(map(int, texts))
            wrong = next((label for label in labels if not 0 <= label < _MAX_CLASSES), None)
            if wrong is not None:
                raise ValueError(
                    f"{as_text(root)} has the label {wrong}; integer labels must be from 0 to {_MAX_CLASSES - 1}: count them "
                    "from 0, or put a letter before each to make them names."
                )
            names = list(map(str, range(max(labels, default=-1) + 1)))
        if len(names) > _MAX_CLASSES:
            raise ValueError(
                f"{as_text(root)} has more than {_MAX_CLASSES} classes; if they are none, as captions or folders of single "
                "pictures are none, give a list file of the paths alone."
            )
        self._database.executemany("UPDATE classes SET label = ? WHERE text = ?", zip(labels, texts))
        order = "rowid" if kind in ("list", "packed") else "class, name, container, offset"
        self._database.execute(f"INSERT INTO places SELECT rowid FROM entries ORDER BY {order}")
        known = {"class_names": names, "count": self.count, "total_bytes": self._total_bytes, "ignored": self.ignored}
        whole = Facts(kind, as_text(root), **known | facts)
        self._database.execute("INSERT INTO facts VALUES (?)", [json.dumps(whole._asdict())])
        self._database.execute("COMMIT")
        self.close()
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        self._database.close()

    def _flush(self) -> None:
        self._database.executemany(f"INSERT INTO entries VALUES ({', '.join('?' * 8)})", self._rows)
        self._rows.clear()
        self._on_progress(self.count)


def kinds_in_words(ignored: Mapping[str, int], most: int = 8) -> str:
    """ "12 .txt, 3 hidden", the most frequent kinds."""
    shown = [f"{count} {kind}" for kind, count in list(ignored.items())[:most]]
    rest = sum(list(ignored.values())[most:])
    return ", ".join(shown) + (f" and {rest} others" if rest else "")


def list_source(
    data: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Listing:
    """List every picture of `data` in the file `path`, and open the listing. `on_progress` is told how many there are so far.

    Raises ValueError, with the remedy, where `data` is nothing that has pictures or something in it cannot be looked at.
    """
    data, path = Path(data), Path(path)
    try:
        mode = os.stat(data).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{data} does not exist; give a folder to --data.") from None
    except OSError as error:
        raise _cannot_list(data, error) from None
    write, writer = _how_to_list(data, mode), ListingWriter(path, on_progress)
    try:
        write(data, writer)
    except sqlite3.Error as error:
        raise OSError(None, f"{path} cannot be written: {error}") from None
    finally:
        writer.close()
    return Listing(path)


def _how_to_list(data: Path, mode: int) -> Callable[[Path, ListingWriter], None]:
    name = data.name.lower()
    if stat.S_ISDIR(mode):
        return _list_packed if _is_packed(data) else _list_folder
    if stat.S_ISREG(mode):
        if name.endswith(".beton"):
            return _list_packed
        if name.endswith(LIST_EXTENSIONS):
            return _list_lines
        if name.endswith((".tar", *_COMPRESSED_SUFFIXES)):
            return lambda tar, writer: _list_tars([os.fsencode(tar.name)], _absolute(tar.parent), tar, writer)
    raise ValueError(
        f"{data} is neither a folder nor a tar nor a list of pictures (*{', *'.join(LIST_EXTENSIONS)}); give one of these "
        "to --data."
    )


# ---------------------------------------------------------------------------------------------------- folders


def _list_folder(data: Path, writer: ListingWriter) -> None:
    root = _absolute(data)
    class_folders, tars = [], []
    for entry in _entries(root, writer):
        if _is_folder(entry):
            class_folders.append(entry.name)
        elif _TAR_NAME.fullmatch(entry.name):
            tars.append(entry.name)
        elif _is_picture(entry.name, lambda path=entry.path: _beginning(path)):
            writer.add(entry.name, **_look_at(entry.path))
        else:
            writer.ignore(entry.name)
    for folder in sorted(class_folders):
        path = os.path.join(root, folder)
        for picture in _pictures_below(path, writer):
            writer.add(picture[len(path) - len(folder) :], folder, **_look_at(picture))
    inner, loose = writer.example("class != x''"), writer.example("class = x''")
    if inner and loose:
        raise _mixed(data, inner, loose)
    if tars and (inner or loose):
        raise ValueError(
            f"{data} holds both pictures ({inner or loose}) and tars ({as_text(min(tars))}): move one of the two away."
        )
    if inner or loose:
        for folder in class_folders if inner else ():
            writer.add_class(folder)
        writer.finish("folder", root)
        return
    if (data / STATE_NAME).is_dir() and format_files(data):
        DatasetIndex.open(data)  # raises, for this is a set of ours whose packing did not end
    if tars:
        _list_tars(sorted(tars), root, data, writer)
        return
    raise ValueError(
        f"{data} holds no picture, neither itself nor in class folders, and no *.tar{_other_files(writer)}; give another --data "
        f"(pictures are {', '.join('*' + extension for extension in PICTURE_EXTENSIONS)}, and whatever begins as they do)."
    )


def _pictures_below(folder: bytes, writer: ListingWriter) -> Iterator[bytes]:
    """Paths of the pictures anywhere below a folder, in the disk's order; what else there is is counted."""
    for entry in _entries(folder, writer):  # neither a folder's files nor its folders are collected
        if not _is_folder(entry):
            if _is_picture(entry.name, lambda path=entry.path: _beginning(path)):
                yield entry.path
            else:
                writer.ignore(entry.name)
        elif entry.is_symlink():  # it may lead back up
            writer.ignore(entry.name, "linked folder")
        else:
            yield from _pictures_below(entry.path, writer)


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
        with _open_regular(path) as file:
            return file.read(BEGINNING_BYTES)
    except OSError as error:
        if error.errno in _OUT_OF_REACH:
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
        if error.errno in _OUT_OF_REACH:
            raise _cannot_list(as_text(path), error) from None
        return {"byte_count": 0, "fault": f"{UNREADABLE}: {error.strerror}"}
    if not stat.S_ISREG(status.st_mode):
        return {"byte_count": 0, "fault": NOT_REGULAR}
    return {"byte_count": status.st_size, "fault": _undecoded(path)}


# ---------------------------------------------------------------------------------------------------- lists


def _list_lines(data: Path, writer: ListingWriter) -> None:
    root = _absolute(data.parent)
    for number, line in _lines(data):
        match = _LINE.fullmatch(line)
        if match is None or b"\0" in line:
            raise ValueError(
                f"{data}, line {number}, names no picture ({as_text(line[:80])!r}): give one picture per line, PATH or PATH LABEL, "
                f"without quotes or a header; PATH ends in {', '.join(PICTURE_EXTENSIONS)}."
            )
        writer.add(match[1], match[2] or b"", **_look_at(os.path.join(root, match[1])))
    if not writer.count:
        raise ValueError(f"{data} names no picture; give one per line, PATH or PATH LABEL.")
    _check_labels(data, writer.example("class != x''"), writer.example("class = x''"))
    writer.finish("list", root, integers=True)


def _check_labels(data: Path, labelled: str | None, unlabelled: str | None) -> None:
    if labelled and unlabelled:
        raise ValueError(
            f"{data} has a label for {labelled} and none for {unlabelled}: give every picture a label, or none."
        )


def _lines(data: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and contents of the lines that are not blank."""
    try:
        with io.BufferedReader(_open_regular(_absolute(data))) as file:
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


# ---------------------------------------------------------------------------------------------------- tars


class _Tar(NamedTuple):
    """A tar that is read, or one in it."""

    file: BinaryIO
    path: str  # for messages
    container: int
    offset: int  # of its first byte in the container
    prefix: bytes  # what its members' names get before them
    folder: bytes  # the class of its pictures; empty where their own folders are theirs


def _list_tars(tars: list[bytes], root: bytes, data: Path, writer: ListingWriter) -> None:
    byte_counts, folders = [], set()
    for container, name in enumerate(tars):
        stem, path = name[: -len(".tar")], os.path.join(root, name)
        if not name.lower().endswith(b".tar"):
            raise _compressed(as_text(path))
        # The tars in ILSVRC2012_img_train.tar have this name; unpacked from it, they still are classes.
        folder = stem if _WORDNET_ID.fullmatch(stem) else b""
        folders |= {folder} - {b""}
        with _open_tar(path) as file:
            byte_counts.append(os.fstat(file.fileno()).st_size)
            prefix = stem + b"/" if len(tars) > 1 else b""
            _list_members(_Tar(file, as_text(path), container, 0, prefix, folder), folders, writer)
    if not writer.count:
        raise ValueError(
            f"{data} holds no picture, neither itself nor in tars in it{_other_files(writer)}; give another --data."
        )
    labelled, unlabelled = writer.example("text NOT NULL"), writer.example("text IS NULL")
    inner, loose = writer.example("class != x''"), writer.example("class = x''")
    _check_labels(data, labelled, unlabelled)
    if inner and loose and not labelled:
        raise _mixed(data, inner, loose)
    for folder in folders if inner and not labelled else ():
        writer.add_class(folder)
    facts = {"containers": list(map(as_text, tars)), "container_bytes": byte_counts}
    writer.finish("tar", root, integers=bool(labelled), **facts)


def _list_members(tar: _Tar, folders: set[bytes], writer: ListingWriter) -> None:
    """List a tar's pictures and labels; its folders, and the tars in it, are added to `folders`."""
    for opened, member in _members(tar.file, tar.path):
        name = _member_name(member)
        path, _, file_name = name.rpartition(b"/")
        # As WebDataset has it: members of one sample are called alike up to the first dot.
        sample = b"%d/%b%b/%b" % (tar.container, tar.prefix, path, file_name.partition(b".")[0])
        if member.isdir():
            folders |= {name} if name and not path and not name.startswith(b".") and not tar.folder else set()
        elif any(part.startswith(b".") for part in name.split(b"/")):
            writer.ignore(name, "hidden")
        elif _TAR_NAME.fullmatch(file_name) and member.isreg():
            inner = file_name[: -len(".tar")]
            if not file_name.lower().endswith(b".tar"):
                raise _compressed(f"{tar.path}, in it {as_text(name)},")
            folders.add(inner)
            where, offset = f"{tar.path}, in it {as_text(name)},", tar.offset + member.offset_data
            _list_members(
                _Tar(opened.extractfile(member), where, tar.container, offset, inner + b"/", inner), folders, writer
            )
        elif label := _label(tar.file, member, file_name.lower()):
            writer.add_label(sample, label, file_name.lower().endswith(b".cls"))
        elif _is_picture(file_name, lambda member=member: _content(tar.file, member, BEGINNING_BYTES)):
            writer.add(
                tar.prefix + name,
                tar.folder or path.partition(b"/")[0],
                container=tar.container,
                offset=tar.offset + member.offset_data,
                byte_count=member.size,
                fault=_undecoded(file_name) if member.isreg() else NOT_REGULAR,
                sample=sample,
            )
        else:
            writer.ignore(name)


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
    if head.startswith(_COMPRESSED):
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
        return io.BufferedReader(_open_regular(path))
    except OSError as error:
        raise _cannot_list(as_text(path), error) from None


# ---------------------------------------------------------------------------------------------------- packed sets


def _is_packed(data: Path) -> bool:
    try:
        with (data / MANIFEST_NAME).open("rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(100)  # so that a damaged one is known, too
    except OSError:
        return False


def _list_packed(data: Path, writer: ListingWriter) -> None:
    index = DatasetIndex.open(data)
    for start in range(0, len(index), _AT_ONCE):
        sample_ids = range(start, min(start + _AT_ONCE, len(index)))
        records = index.records(np.array(sample_ids))
        if (records["encoding"] != JPEG).any():
            raise ValueError(
                f"{data} holds pictures as raw pixels, which are no picture files: pack from where it was packed from, or "
                "from a set that was packed with --write-mode jpg."
            )
        fields = records[["shard", "offset", "byte_count", "label", "checksum"]].tolist()
        for sample_id, (shard, offset, byte_count, label, checksum) in zip(sample_ids, fields, strict=True):
            where = {"container": shard, "offset": offset, "byte_count": byte_count, "checksum": checksum}
            writer.add(as_bytes(index.name(sample_id)), b"" if label == NO_LABEL else b"%d" % label, **where)
    shards = index.manifest.shards
    writer.finish(
        "packed",
        os.fsencode(index.path),
        class_names=index.class_names,
        containers=[shard.name for shard in shards],
        container_bytes=[shard.byte_count for shard in shards],
        source_seed=index.manifest.shuffle_seed,
    )


# ---------------------------------------------------------------------------------------------------- reading


class Unreadable(Exception):
    """A picture that cannot be read and is left out. The message is the whole reason, "unreadable: Permission denied"."""

    @property
    def kind(self) -> str:
        """What to count it as: the reason without its details."""
        return str(self).partition(":")[0]


class SourceVanished(ValueError):
    """The source is not there any more, or is another one: no reason to leave out its pictures, but to stop."""


class Reader:
    """Reads the pictures of a listing; for several threads. Checksums are the caller's to check."""

    def __init__(self, facts: Facts) -> None:
        self._facts, self._root = facts, as_bytes(facts.root)
        self._tar = functools.lru_cache(_MAX_OPEN_TARS)(self._open_tar)

    def read(self, entry: Entry) -> bytes:
        """The picture's bytes; of a file of its own, what there is now, whatever was listed.

        Raises Unreadable where the picture is to be left out, SourceVanished where packing is to stop.
        """
        if entry.fault:
            raise Unreadable(entry.fault)
        if entry.container is not None:
            return self._read_member(entry)
        path = os.path.join(self._root, as_bytes(entry.name))
        try:
            with _open_regular(path) as file:
                return file.read()
        except _NotRegular:
            raise Unreadable(NOT_REGULAR) from None
        except OSError as error:
            raise _fault_of_reading(path, error, stops=_GONE | _OUT_OF_REACH) from None

    def _read_member(self, entry: Entry) -> bytes:
        tar, path = self._tar(entry.container), self._path_of(entry.container)
        try:
            content = os.pread(tar.fileno(), entry.byte_count, entry.offset)
        except OSError as error:
            raise _fault_of_reading(path, error, stops=_OUT_OF_REACH) from None
        if len(content) < entry.byte_count:
            raise _vanished(path, f"it ends at byte {entry.offset + len(content)}, within {entry.name}")
        return content

    def _open_tar(self, container: int) -> "_Tarball":
        path = self._path_of(container)
        try:
            file = _Tarball(_descriptor(path))
        except OSError as error:
            raise error if error.errno in _OUR_OWN_TROUBLE else _vanished(path, error.strerror) from None
        found, listed = os.fstat(file.fileno()).st_size, self._facts.container_bytes[container]
        if found != listed:
            raise _vanished(path, f"it is {found} bytes long where it was {listed}")
        return file

    def _path_of(self, container: int) -> bytes:
        return os.path.join(self._root, as_bytes(self._facts.containers[container]))


class _Tarball(io.FileIO):
    """Open as long as somebody holds it: the cache, or a thread that is just reading it."""

    def __del__(self) -> None:
        self.close()


class _NotRegular(OSError):
    """Something other than a file: opened, but not read."""


def _open_regular(path: bytes) -> io.FileIO:
    """A file, open for reading, unbuffered."""
    return io.FileIO(_descriptor(path))


def _descriptor(path: bytes) -> int:
    """Of a file. A pipe or device by that name would make us wait for ever, so O_NONBLOCK."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _NotRegular(errno.EINVAL, NOT_REGULAR)
    return descriptor


def _fault_of_reading(path: bytes, error: OSError, *, stops: set[int]) -> Exception:
    if error.errno in _OUR_OWN_TROUBLE:
        return error  # says nothing about the picture
    return _vanished(path, error.strerror) if error.errno in stops else Unreadable(f"{UNREADABLE}: {error.strerror}")


# ---------------------------------------------------------------------------------------------------- faults


def _vanished(path: bytes, reason: str) -> SourceVanished:
    return SourceVanished(
        f"{as_text(path)} was there when the pictures were listed and cannot be read now ({reason}): mount or restore the "
        f"source and run the same command again, or {BEGIN_ANEW} to list anew."
    )


def _cannot_list(path: Path | str, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be listed ({error.strerror}): make it readable, mount it or move it away.")


def _other_files(writer: ListingWriter) -> str:
    return f" (but {kinds_in_words(writer.ignored)})" if writer.ignored else ""


def _mixed(data: Path, inner: str, loose: str) -> ValueError:
    return ValueError(
        f"{data} holds both class folders ({inner}) and loose pictures ({loose}): "
        "move the loose ones into a class folder or away."
    )


def _compressed(path: Path | str) -> ValueError:
    return ValueError(f"{path} is compressed, so pictures in it cannot be read one by one: decompress it first.")


def _damaged(path: str, error: Exception | str) -> ValueError:
    return ValueError(f"{path} is damaged or was cut short ({error}): copy it again, or pack it anew with tar.")


def _absolute(path: Path) -> bytes:
    return os.fsencode(path.absolute())
