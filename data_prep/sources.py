"""Where the pictures of a data set come from: found out, listed on disk, read.

    DIR/class/.../picture.jpg      each folder in DIR is a class, also one without pictures; labels in sorted order
    DIR/picture.jpg                a flat folder: no labels
    DIR/*.tar                      a folder of tars, as one tar; each name begins with its tar's
    FILE.tar                       WebDataset's: pictures with a .cls of the same name; or class folders, or no labels
    ILSVRC2012_img_train.tar       a tar of tars: each tar in it is a class; read where it lies, never unpacked
    FILE.txt .tsv .csv .lst        a list: one picture per line, PATH or PATH LABEL
    DIR with a manifest of ours    a packed set: its samples as they are stored
    DIR/samples.beton              the same

Pictures are known by their extensions. What is no picture is counted by kind, and so are names that begin with a dot and
links to folders, but for class folders themselves. Pictures of folders and tars are listed by (class folder, name), those of
lists and of packed sets in the order they have there; in a SQLite file, so no number of them fills the memory.
"""

import contextlib
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_prep.index import BEGIN_ANEW, FORMAT, MANIFEST_NAME, NO_LABEL, STATE_NAME, DatasetIndex, format_files
from data_prep.pictures import BadPicture
from inscon.guard import naming

PICTURE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".avif", ".jp2", ".j2k", ".j2c", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".heic", ".heif", ".jxl"),  # which no decoder here reads: they count as bad ones
)
LIST_EXTENSIONS = (".txt", ".tsv", ".csv", ".lst")
LINE_BREAK, NOT_REGULAR, UNREADABLE = "line break in the name", "not a regular file", "unreadable"
MAX_PICTURE_BYTES = 2**30  # it is in memory whole; as long is the largest that Pillow consents to decode, uncompressed


def as_text(name: bytes) -> str:
    """A name as this program shows and stores it, the same under every locale (os.fsdecode's depends on it)."""
    return name.decode("utf-8", "surrogateescape")


def as_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


_PICTURE_SUFFIXES = tuple(map(as_bytes, PICTURE_EXTENSIONS))
# The path ends at the last extension that a separator or the line's end follows, so blanks and commas may be in it.
_SUFFIX = b"|".join(map(re.escape, _PICTURE_SUFFIXES))
_LINE = re.compile(rb"(.*(?:%b))(?:[\t, ]+(.*))?" % _SUFFIX, re.DOTALL | re.IGNORECASE)
_MAX_CLASSES = 1_000_000  # their names are in memory
_MAX_CLS_BYTES = 1000
_TAR_NAME = re.compile(rb".*\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)", re.DOTALL | re.IGNORECASE)
_END_WINDOW = 1 << 20  # tars are filled up with zeros to a whole record; no usual record is longer
_WORDNET_ID = re.compile(rb"n\d{8}")
_MAX_OPEN_TARS = 64
_OF_ONE_PICTURE = {errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG}
"""What the system says of one picture. Anything else, as that a network file system has gone, is no reason to leave it out."""
_GONE = {errno.ENOENT, errno.ENOTDIR}


class Entry(NamedTuple):
    """One picture of a source."""

    name: str  # path relative to the source's root, with forward slashes; undecodable bytes kept by surrogateescape
    label: int  # position in the listing's class names, or NO_LABEL
    container: int | None  # position in the listing's containers of the tar that holds it; None for a file of its own
    offset: int  # of its first byte in the container; 0 for a file; of a packed set the sample id
    byte_count: int  # when it was listed; 0 where that could not be found out
    fault: str  # why it cannot be read, where that was seen when it was listed; else empty


class Facts(NamedTuple):
    """What holds for all pictures of a source."""

    kind: str  # "folder", "list", "tar" or "packed", which is shuffled already and keeps its order
    root: str  # what names and containers are relative to; absolute
    class_names: Sequence[str]  # in label order; empty where the pictures have no labels
    count: int
    total_bytes: int
    ignored: Mapping[str, int] = {}  # how many files are no pictures, by kind, such as ".txt"
    containers: Sequence[str] = ()  # the tars that hold the pictures
    container_bytes: Sequence[int] = ()  # how long each of them was when it was listed


class Listing:
    """The pictures of a source, as `list_source` wrote them; may be pickled. ValueError for a file that cannot be read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        # Immutable: no locks, which not every network file system has.
        self._database = _database(self.path, "immutable=1")
        self.facts = Facts(**json.loads(*self._row("SELECT facts FROM facts")))
        self._root, self._tar = as_bytes(self.facts.root), functools.lru_cache(_MAX_OPEN_TARS)(self._open_tar)

    def __reduce__(self):
        return Listing, (self.path,)

    def __len__(self) -> int:
        return self.facts.count

    def entry(self, position: int) -> Entry:
        """The picture at `position`, from 0."""
        name, *others = self._row("SELECT * FROM entries WHERE rowid = ?", position + 1)
        return Entry(as_text(name), *others)

    def _row(self, query: str, *values: int) -> tuple:
        try:
            return next(self._database.execute(query, values))
        except (sqlite3.Error, StopIteration) as error:
            raise ValueError(f"{self.path} cannot be read ({error}): {BEGIN_ANEW} to list the pictures anew.") from None

    def read(self, entry: Entry) -> bytes:
        """The picture's bytes; of a file of its own, what there is now, whatever was listed. For several threads. Raises
        BadPicture where the picture is to be left out, ValueError where packing is to stop: the source has gone."""
        if entry.fault:
            raise BadPicture(*entry.fault.split(": ", 1))
        within = entry.container is not None
        path = os.path.join(self._root, as_bytes(self.facts.containers[entry.container] if within else entry.name))
        try:
            if within:
                tar = self._tar(path, entry.container)  # held, lest another thread close it
                content = os.pread(tar.fileno(), entry.byte_count, entry.offset)
            else:
                with _open_regular(path) as file:
                    return file.read()
        except OSError as error:
            if error.errno in _OF_ONE_PICTURE:
                raise BadPicture(UNREADABLE, error.strerror) from None
            raise _vanished(path, error.strerror) from None
        if len(content) < entry.byte_count:
            raise _vanished(path, f"it ends at byte {entry.offset + len(content)}, within {entry.name}")
        return content

    def _open_tar(self, path: bytes, container: int) -> io.FileIO:
        """Closed when the cache and all threads that are just reading it have let it go."""
        file = _open_regular(path)
        found, listed = os.fstat(file.fileno()).st_size, self.facts.container_bytes[container]
        if found != listed:
            raise _vanished(path, f"it is {found} bytes long where it was {listed}")
        return file


class PackedListing:
    """The samples of a packed set, in its order; may be pickled. ShardError for a set that cannot be opened."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.index = DatasetIndex.open(path)
        total_bytes = sum(shard.byte_count for shard in self.index.manifest.shards)
        self.facts = Facts("packed", str(self.index.path), self.index.class_names, len(self.index), total_bytes)

    def __len__(self) -> int:
        return len(self.index)

    def entry(self, position: int) -> Entry:
        """The sample at `position`, from 0."""
        label, byte_count = self.index.records([position])[["label", "byte_count"]][0].item()
        return Entry(self.index.name(position), label, None, position, byte_count, fault="")

    def read(self, entry: Entry) -> bytes:
        """A JPEG that was decoded when it was packed. ShardError where its bytes have changed since, or are raw pixels."""
        return self.index.read(entry.offset).tobytes()


Source = Listing | PackedListing


def open_listing(data: Path, path: Path) -> Source:
    """The listing of `data`, which `list_source` wrote to `path`; a packed set is its own."""
    return PackedListing(data) if is_packed(data) else Listing(path)


def _database(path: Path, options: str) -> sqlite3.Connection:
    name = urllib.parse.quote(os.fsencode(path))
    return sqlite3.connect(f"file:{name}?{options}", uri=True, isolation_level=None, check_same_thread=False)


_TABLES = """
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -4000;
CREATE TABLE found (name BLOB, class BLOB, container INTEGER, offset INTEGER, byte_count INTEGER, fault TEXT, sample BLOB);
CREATE TABLE labels (sample BLOB PRIMARY KEY, text BLOB) WITHOUT ROWID;
CREATE TABLE facts (facts TEXT);
BEGIN;
"""
_SORTED = """
CREATE TABLE entries AS SELECT name, label_of(coalesce(text, class)), container, offset, byte_count, fault
FROM found LEFT JOIN labels USING (sample) ORDER BY
"""


class ListingWriter:
    """Writes a listing, one picture after the other."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.count, self._total_bytes, self.ignored = 0, 0, Counter()
        self._database = _database(path, "nolock=1")
        self._database.executescript(_TABLES)

    def add(
        self, name: bytes, class_text: bytes | None = None, *, container: int | None = None, offset: int = 0,
        byte_count: int, fault: str = "", sample: bytes | None = None,
    ) -> None:  # fmt: skip
        """Add a picture of a class, or none; `sample` is whose label goes before."""
        if b"\n" in name:
            fault = LINE_BREAK
        elif byte_count > MAX_PICTURE_BYTES:
            fault = f"too large: more than {MAX_PICTURE_BYTES} bytes"
        row = name, class_text, container, offset, byte_count, fault, sample
        self._database.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self.count += 1
        self._total_bytes += byte_count

    def add_label(self, sample: bytes, text: bytes) -> None:
        """Of the pictures of a sample, wherever they are."""
        self._database.execute("INSERT OR REPLACE INTO labels VALUES (?, nullif(?, x''))", [sample, text])

    def all_have(self, column: str, data: Path) -> bool:
        """Whether the pictures have a "class", or a "text" as label. ValueError where some have and others have not."""
        query = "SELECT min(name) FROM found LEFT JOIN labels USING (sample) WHERE {} {} NULL"
        has, lacks = (self._database.execute(query.format(column, word)).fetchone()[0] for word in ("NOT", "IS"))
        if has is not None and lacks is not None:
            raise ValueError(
                f"{data} has a class for {as_text(has)} and none for {as_text(lacks)}: give every picture a class (a folder, "
                "a .cls beside it, or a label in the list), or none."
            )
        return has is not None

    def ignore(self, name: bytes, kind: str = "") -> None:
        """Count a file that is no picture, as `kind` or by its extension."""
        extension = os.path.splitext(name)[1].lower()
        known = re.fullmatch(rb"\.[a-z_]{1,10}\d?", extension)
        self.ignored[kind or (as_text(extension) if known else "of other kinds")] += 1

    def finish(
        self, kind: str, root: bytes, classes: Iterable[bytes] = (), integers: bool = False, **facts: Any
    ) -> None:
        """Sort it. `classes`: those that may have no pictures; `facts`: others of `Facts`. With `integers`, class texts that all
        are some are the labels."""
        query = "SELECT DISTINCT coalesce(text, class) FROM found LEFT JOIN labels USING (sample)"
        texts = sorted({text for (text,) in self._database.execute(query)}.union(classes) - {None})
        labels, names = range(len(texts)), map(as_text, texts)
        if integers and texts and all(re.fullmatch(rb"-?\d{1,18}", text) for text in texts):
            labels = list(map(int, texts))
            names = map(str, range(max(labels) + 1))
        if not 0 <= min(labels, default=0) <= max(labels, default=0) < _MAX_CLASSES:
            raise ValueError(
                f"{as_text(root)} has labels from {min(labels)} to {max(labels)}; they must be from 0 to {_MAX_CLASSES - 1}: "
                "count them from 0, put a letter before each to make them names, or give a list file of the paths alone."
            )
        numbers = dict(zip(texts, labels, strict=True))
        self._database.create_function("label_of", 1, lambda text: numbers.get(text, NO_LABEL), deterministic=True)
        self._database.execute(_SORTED + ("found.rowid" if kind == "list" else "class, name, container, offset"))
        self._database.execute("DROP TABLE found")
        ignored = dict(sorted(self.ignored.items()))
        whole = Facts(kind, as_text(root), list(names), self.count, self._total_bytes, ignored, **facts)
        self._database.execute("INSERT INTO facts VALUES (?)", [json.dumps(whole._asdict())])
        self._database.execute("COMMIT")

    def close(self) -> None:
        self._database.close()


def kinds_in_words(counts: Mapping[str, int], most: int = 8) -> str:
    """ "12 .txt, 3 hidden", the most frequent kinds."""
    shown = [f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(shown[:most] + ["others"] * (len(shown) > most))


def list_source(data: str | os.PathLike[str], path: str | os.PathLike[str]) -> Source:
    """List every picture of `data` in the file `path`, and open the listing. Raises ValueError, with the remedy, where `data` is
    nothing that has pictures or something in it cannot be looked at."""
    data, path = Path(data), Path(path)
    if is_packed(data):
        return PackedListing(data)
    name = os.fsencode(data.name)
    try:
        with contextlib.closing(ListingWriter(path)) as writer, naming(data):
            if data.is_dir():
                _list_folder(data, writer)
            elif data.is_file() and data.name.lower().endswith(LIST_EXTENSIONS):
                _list_lines(data, writer)
            elif data.is_file() and _TAR_NAME.fullmatch(name):
                _list_tars([name], os.fsencode(data.parent.absolute()), data, writer)
            else:
                known = ", *".join(LIST_EXTENSIONS)
                raise ValueError(
                    f"{data} is no folder, tar or list of pictures (*{known}) that can be read; give one to --data."
                )
    except sqlite3.Error as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    except OSError as error:
        raise ValueError(
            f"{os.fsdecode(error.filename)} cannot be listed ({error.strerror}): make it readable, mount it or move it away."
        ) from None
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return Listing(path)


def is_packed(data: Path) -> bool:
    """Whether this is a packed set, or means to be one."""
    try:
        with (data / MANIFEST_NAME).open("rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(100)  # so that a damaged one is known, too
    except OSError:
        return data.suffix == ".beton"


def _list_folder(data: Path, writer: ListingWriter) -> None:
    root, class_folders, tars, waiting = os.fsencode(data.absolute()), [], [], [(b"", None)]
    while waiting:
        folder, class_text = waiting.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name, is_link = os.path.join(folder, entry.name), entry.is_symlink()
                is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()  # a link to itself is none
                if entry.name.startswith(b"."):
                    writer.ignore(entry.name, "hidden")
                elif is_folder and is_link and folder:  # it may lead back up
                    writer.ignore(entry.name, "linked folder")
                elif is_folder and entry.name != b"lost+found":  # a disk's own: for the superuser, and without pictures
                    waiting.append((name, class_text or entry.name))
                    class_folders += [] if folder else [name]
                elif entry.name.lower().endswith(_PICTURE_SUFFIXES):
                    writer.add(name, class_text, **_look_at(entry.path))
                elif not folder and _TAR_NAME.fullmatch(name):
                    tars.append(name)
                elif not is_folder:
                    writer.ignore(name)
    has_classes = writer.all_have("class", data)
    if tars and writer.count:
        raise ValueError(f"{data} holds both pictures and tars ({as_text(min(tars))}): move one of the two away.")
    if writer.count:
        writer.finish("folder", root, classes=class_folders if has_classes else ())
        return
    if (data / STATE_NAME).is_dir() and format_files(data):
        DatasetIndex.open(data)  # raises, for this is a set of ours whose packing did not end
    _list_tars(sorted(tars), root, data, writer)


def _look_at(path: bytes) -> dict[str, Any]:
    """`byte_count` and `fault` of a picture's file, which is not opened."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno not in _OF_ONE_PICTURE | _GONE:
            raise
        return {"byte_count": 0, "fault": f"{UNREADABLE}: {error.strerror}"}
    if not stat.S_ISREG(status.st_mode):
        return {"byte_count": 0, "fault": f"{UNREADABLE}: {NOT_REGULAR}"}
    return {"byte_count": status.st_size}


def _list_lines(data: Path, writer: ListingWriter) -> None:
    root = os.fsencode(data.parent.absolute())
    with data.open("rb") as file:
        for number, line in enumerate(file, 1):
            # Windows editors begin files with these three bytes.
            line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b" \t\r\n")
            match = _LINE.fullmatch(line)
            if match is not None and b"\0" not in line:
                writer.add(match[1], match[2], **_look_at(os.path.join(root, match[1])))
            elif line:
                raise ValueError(
                    f"{data}, line {number}, names no picture ({as_text(line[:80])!r}): give one picture per line, PATH or PATH "
                    f"LABEL, without quotes or a header; PATH ends in {', '.join(PICTURE_EXTENSIONS)}."
                )
    if not writer.count:
        raise ValueError(f"{data} names no picture; give one per line, PATH or PATH LABEL.")
    writer.all_have("class", data)
    writer.finish("list", root, integers=True)


class _Tar(NamedTuple):
    """A tar that is read, or one in it."""

    file: BinaryIO
    path: str  # for messages
    container: int
    offset: int  # of its first byte in the container
    prefix: bytes  # what its members' names get before them
    folder: bytes | None  # the class of its pictures; None where their own folders are theirs


def _list_tars(tars: list[bytes], root: bytes, data: Path, writer: ListingWriter) -> None:
    byte_counts, folders = [], set()
    for container, name in enumerate(tars):
        stem, path = name[: -len(".tar")], os.path.join(root, name)
        # The tars in ILSVRC2012_img_train.tar have this name; unpacked from it, they still are classes.
        folder = stem if _WORDNET_ID.fullmatch(stem) else None
        folders |= {folder} - {None}
        with naming(Path(os.fsdecode(path))), io.BufferedReader(_open_regular(path)) as file:
            byte_counts.append(os.fstat(file.fileno()).st_size)
            prefix = stem + b"/" if len(tars) > 1 else b""
            _list_members(_Tar(file, as_text(path), container, 0, prefix, folder), folders, writer)
    if not writer.count:
        others = f" (but {kinds_in_words(writer.ignored)})" if writer.ignored else ""
        raise ValueError(
            f"{data} holds no picture, neither itself nor in class folders or tars{others}; give another --data (pictures are "
            f"*{', *'.join(PICTURE_EXTENSIONS)})."
        )
    has_labels = writer.all_have("text", data)
    classes = folders if not has_labels and writer.all_have("class", data) else ()
    facts = {"containers": list(map(as_text, tars)), "container_bytes": byte_counts}
    writer.finish("tar", root, classes=classes, integers=has_labels, **facts)


def _list_members(tar: _Tar, folders: set[bytes], writer: ListingWriter) -> None:
    """List a tar's pictures and labels; its folders, and the tars in it, are added to `folders`."""
    for opened, member in _members(tar.file, tar.path):
        # Without a leading "./" or "/".
        steps = as_bytes(member.name.partition("\0")[0]).split(b"/")
        parts = [step for step in steps if step not in (b"", b".", b"..")]
        name, (path, _, file_name) = b"/".join(parts), b"/".join(parts).rpartition(b"/")
        # As WebDataset has it: members of one sample are called alike up to the first dot.
        sample = b"%d/%b%b/%b" % (tar.container, tar.prefix, path, file_name.partition(b".")[0])
        if member.isdir():
            folders |= {name} if name and not path and not name.startswith(b".") and not tar.folder else set()
        elif any(part.startswith(b".") for part in parts):
            writer.ignore(name, "hidden")
        elif _TAR_NAME.fullmatch(file_name) and member.isreg():
            inner = file_name[: -len(".tar")]
            folders.add(inner)
            where, offset = f"{tar.path}, in it {as_text(name)},", tar.offset + member.offset_data
            inner_tar = _Tar(opened.extractfile(member), where, tar.container, offset, inner + b"/", inner)
            _list_members(inner_tar, folders, writer)
        elif file_name.lower().endswith(b".cls") and member.isreg():
            writer.add_label(sample, opened.extractfile(member).read(_MAX_CLS_BYTES).strip())
        elif file_name.lower().endswith(_PICTURE_SUFFIXES):
            fault = "" if member.isreg() else f"{UNREADABLE}: {NOT_REGULAR}"
            writer.add(
                tar.prefix + name, tar.folder or path.partition(b"/")[0] or None, container=tar.container,
                offset=tar.offset + member.offset_data, byte_count=member.size, fault=fault, sample=sample,
            )  # fmt: skip
        else:
            writer.ignore(name)


def _members(file: BinaryIO, path: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of a tar, one by one. ValueError where it is compressed, damaged or cut short."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        while (member := tar.next()) is not None:
            tar.members.clear()  # which would grow with the tar
            yield tar, member
        # tarfile ends without a word at a header that it cannot read, and where another tar was joined by cat.
        file.seek(tar.offset)
        end = file.read(_END_WINDOW)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise tarfile.TarError(f"no header and no end can be read at byte {tar.offset}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no tar, damaged, cut short or compressed ({error}): copy or decompress it."
        ) from None


def _open_regular(path: bytes) -> io.FileIO:
    """A file, open for reading, unbuffered. A pipe or device by that name would make us wait for ever, so O_NONBLOCK."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, NOT_REGULAR)
    return io.FileIO(descriptor)


def _vanished(path: bytes, reason: str) -> ValueError:
    return ValueError(
        f"{as_text(path)} was there when the pictures were listed and cannot be read now ({reason}): mount or restore the "
        f"source and run the same command again, or {BEGIN_ANEW} to list anew."
    )
