"""Parts of a packed data set as one process writes them.

A shard's bytes depend on its own pictures alone, so shards can be written in any order, by any process, on any machine.
Of each there is a report of what is in it (`ShardReport`, in OUT/packing); it is written after the shard, so a shard with
a report is whole. data_prep/joining.py makes index and manifest from the reports.
"""

import io
import json
import struct
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.index import NO_LABEL, RECORD_DTYPE, STATE_NAME, ShardError, StoredFile
from data_prep.new_file import NewFile

DALI_INDEX_VERSION = "v1.2"
_TAR_HEADER = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
_TAR_HEADER[148:156] = b"      \0 "  # the checksum, over a field of blanks; written in six digits
_RECORD = struct.Struct("<QQQIIIIiI")  # RECORD_DTYPE: 48 bytes, where a tuple of Python's numbers has ten times as many


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """What one shard holds. Without sound pictures it has no file."""

    number: int
    files: tuple[StoredFile, ...]
    """The tar and its DALI index; or the one part of a beton."""
    records: NDArray[np.void]
    """RECORD_DTYPE; `name_offset` counts from the beginning of `names`, `shard` is 0."""
    names: bytes
    """One line each, as in names.txt."""
    rejected: tuple[Mapping[str, str], ...]
    changed: tuple[Mapping, ...]

    def save(self, state: Path) -> None:
        head = {
            "files": [asdict(file) for file in self.files],
            "rejected": self.rejected,
            "changed": self.changed,
        }
        whole = io.BytesIO()
        parts = {"head": _as_bytes(json.dumps(head).encode()), "names": _as_bytes(self.names), "records": self.records}
        np.savez(whole, **parts)
        with NewFile(report_path(state, self.number)) as file:
            file.write(whole.getvalue())
            file.commit(len(self.records))

    @classmethod
    def load(cls, state: Path, number: int) -> "ShardReport":
        """ShardError for a report that cannot be read."""
        path = report_path(state, number)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                head = json.loads(arrays["head"].tobytes())
                records, names = arrays["records"], arrays["names"].tobytes()
        except Exception as error:  # zipfile, zlib, NumPy and json have one each for damage
            raise ShardError(f"{path} cannot be read ({error}): remove it and run the same command again.") from None
        files = tuple(StoredFile(**file) for file in head["files"])
        lists = {name: tuple(head[name]) for name in ("rejected", "changed")}
        return cls(number=number, files=files, records=records, names=names, **lists)


class ReportBuilder:
    """Collects what a shard holds while it is written."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._rows = bytearray()
        self._names = bytearray()
        self._rejected: list[dict] = []
        self._changed: list[dict] = []

    def __len__(self) -> int:
        return len(self._rows) // RECORD_DTYPE.itemsize

    def add(
        self, content: bytes, *, offset: int, height: int, width: int, label: int, encoding: int, name: str
    ) -> None:
        checksum = xxhash.xxh3_64_intdigest(content)
        self._rows += _RECORD.pack(offset, len(self._names), checksum, len(content), 0, height, width, label, encoding)
        self._names += name.encode("utf-8", "surrogateescape") + b"\n"

    def change(self, name: str, changes: Sequence[str]) -> None:
        """Note that a picture is not stored byte for byte, and why."""
        self._changed.append({"name": name, "changes": list(changes)})

    def reject(self, name: str, kind: str, reason: str) -> None:
        self._rejected.append({"name": name, "kind": kind, "reason": reason})

    def report(self, files: tuple[StoredFile, ...]) -> ShardReport:
        return ShardReport(
            number=self.number,
            files=files,
            records=np.frombuffer(bytes(self._rows), dtype=RECORD_DTYPE),
            names=bytes(self._names),
            rejected=tuple(self._rejected),
            changed=tuple(self._changed),
        )


class TarShard:
    """One tar file of samples, and the index with which DALI's own WebDataset reader reads it."""

    def __init__(self, folder: Path, number: int) -> None:
        self._number, self._count = number, 0
        self._file = NewFile(folder / f"shard-{number:06d}.tar")
        self._index_path = folder / f"shard-{number:06d}.idx"
        self._index_lines = bytearray()

    def add(self, content: bytes, label: int) -> int:
        """Append a sample; the position of its first byte in the file."""
        position = self._file.byte_count
        parts, entries, offset = [], [], position + tarfile.BLOCKSIZE
        for name, member in sample_members(self._number, self._count, content, label):
            start = position + sum(map(len, parts)) + tarfile.BLOCKSIZE
            parts += [tar_header(name, len(member)), member, bytes(-len(member) % tarfile.BLOCKSIZE)]
            entries.append(dali_entry(name, start, len(member)))
        self._index_lines += " ".join(entries).encode() + b"\n"
        self._file.write(b"".join(parts))
        self._count += 1
        return offset

    def finish(self) -> tuple[StoredFile, ...]:
        self._file.write(tar_end(self._file.byte_count))
        with NewFile(self._index_path) as index:
            index.write(f"{DALI_INDEX_VERSION} {self._count}\n".encode() + self._index_lines)
            stored_index = index.commit(self._count)
        return self._file.commit(self._count), stored_index

    def discard(self) -> None:
        self._file.discard()


class BetonPart:
    """The samples of one part of a beton, one after the other; `BetonJoin` lays them into the beton and removes the part."""

    def __init__(self, folder: Path, number: int) -> None:
        self._count = 0
        self._file = NewFile(folder / STATE_NAME / f"part-{number:06d}")

    def add(self, content: bytes, label: int) -> int:
        """Append a sample; the position of its first byte in the part. The label goes into the beton's metadata."""
        offset = self._file.byte_count
        self._file.write(content)
        self._count += 1
        return offset

    def finish(self) -> tuple[StoredFile, ...]:
        return (self._file.commit(self._count, durable=False),)  # `BetonJoin` compares its checksum

    def discard(self) -> None:
        self._file.discard()


def sample_members(shard_number: int, position: int, content: bytes, label: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members of one sample. Named by shard and place, so that shards don't depend on each other."""
    key = f"{shard_number:06d}_{position:06d}"
    yield f"{key}.jpg", content
    if label != NO_LABEL:
        yield f"{key}.cls", str(label).encode()


def dali_entry(name: str, position: int, byte_count: int) -> str:
    """What DALI's index says of a member; a line has those of one sample."""
    return f"{name.partition('.')[2]} {position} {byte_count} {name}"


def tar_header(name: str, byte_count: int) -> bytes:
    """One block. Owner, time and mode stay at their defaults: the same bytes always."""
    header = bytearray(_TAR_HEADER)  # tarfile takes 45 us for one
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % byte_count
    header[148:154] = b"%06o" % (sum(header) + 32)  # the blank that is a zero byte by now
    return bytes(header)


def tar_end(byte_count: int) -> bytes:
    """What ends a tar file that is `byte_count` long so far: two empty blocks, filled up to a whole record."""
    return bytes(2 * tarfile.BLOCKSIZE + -(byte_count + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)


def report_path(state: Path, number: int) -> Path:
    return state / f"shard-{number:06d}.npz"


def _as_bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
