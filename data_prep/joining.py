"""Reported shards joined into a packed set: index, names, lists, the beton where one is wanted, and the manifest last."""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep import beton
from data_prep.index import (
    BEGIN_ANEW,
    BETON_NAME,
    CHANGED_NAME,
    FORMAT,
    INDEX_NAME,
    MANIFEST_NAME,
    MAX_NAMES_IN_MANIFEST,
    NAMES_NAME,
    PARTIAL_SUFFIX,
    RECORD_DTYPE,
    REJECTED_NAME,
    STATE_NAME,
    VERSION,
    DatasetIndex,
    Manifest,
    ShardError,
    StoredFile,
)
from data_prep.new_file import KeptFile, NewFile
from data_prep.shards import ShardReport, report_path

_COPY_BYTES = 1 << 22
_LOOK_EVERY_S = 0.1
_PARTS_PER_SYNC = 8  # to wait for the disk takes as long as some parts


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """What the manifest says beside what the reports know."""

    container: str
    class_names: Sequence[str]
    shuffle_seed: int
    settings: Mapping
    ignored: Mapping[str, int] = field(default_factory=dict)


def join(out: Path, num_shards: int, facts: SetFacts, beton_join: "BetonJoin | None" = None) -> DatasetIndex:
    """Write index, names, lists and manifest of the `num_shards` reported shards of `out`, and open the set.

    Of a beton, `beton_join` has laid all parts into it, or none was begun. May be stopped at any moment and called
    again. One report is in memory at a time.
    """
    reports = Reports(out / STATE_NAME, num_shards)
    with (
        NewFile(out / INDEX_NAME) as index,
        NewFile(out / NAMES_NAME) as names,
        NewFile(out / REJECTED_NAME) as rejected,
        NewFile(out / CHANGED_NAME) as changed,
        NewFile(out / MANIFEST_NAME) as manifest_file,
    ):
        place = _in_beton(out, num_shards, reports, beton_join) if facts.container == "beton" else _Tars()
        _write_npy_header(index, reports.num_samples)
        content = xxhash.xxh3_128()
        rejected_kinds, changed_kinds, changed_names, num_changed = Counter(), Counter(), [], 0
        for report in reports:
            records = place(report)
            records["name_offset"] += np.uint64(names.byte_count)
            index.write(records.tobytes())
            names.write(report.names)
            content.update(content_of(records))
            for entry in report.rejected:
                rejected_kinds[entry["kind"]] += 1
                rejected.write(json.dumps(entry).encode() + b"\n")
            for entry in report.changed:
                num_changed += 1
                changed_kinds.update(entry["changes"])
                changed_names += [entry["name"]] * (len(changed_names) < MAX_NAMES_IN_MANIFEST)
                changed.write(json.dumps(entry).encode() + b"\n")
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            container=facts.container,
            num_samples=reports.num_samples,
            class_names=tuple(facts.class_names),
            shuffle_seed=facts.shuffle_seed,
            settings=dict(facts.settings),
            rejected=dict(sorted(rejected_kinds.items())),
            changed=dict(sorted(changed_kinds.items())),
            ignored=dict(facts.ignored),
            changed_names=tuple(changed_names),
            content=content.hexdigest(),
            index=index.commit(reports.num_samples),
            names=names.commit(reports.num_samples),
            rejected_list=rejected.commit(rejected_kinds.total()),
            changed_list=changed.commit(num_changed),
            shards=tuple(place.shards),
            dali_indices=tuple(place.dali_indices),
        )
        manifest_file.write(json.dumps(asdict(manifest), indent=1).encode() + b"\n")
        manifest_file.commit(reports.num_samples)
    return DatasetIndex.open(out)


class Reports:
    """The reports of a set, in order, read anew in every pass."""

    def __init__(self, state: Path, num_shards: int) -> None:
        self._state, self._num_shards = state, num_shards
        counts = [(len(report.records), len(report.rejected)) for report in self]
        self.num_samples = sum(count for count, _ in counts)
        self.num_listed = self.num_samples + sum(rejected for _, rejected in counts)

    def __iter__(self) -> Iterator[ShardReport]:
        return (ShardReport.load(self._state, number) for number in range(self._num_shards))


class _Tars:
    """Tar shards lie where they are."""

    def __init__(self) -> None:
        self.shards: list[StoredFile] = []
        self.dali_indices: list[StoredFile] = []

    def __call__(self, report: ShardReport) -> NDArray[np.void]:
        records = np.array(report.records)
        records["shard"] = len(self.shards)
        if report.files:
            self.shards.append(report.files[0])
            self.dali_indices.append(report.files[1])
        return records


class _InBeton:
    """Samples of a beton lie where its layout says."""

    def __init__(self, num_listed: int, stored: StoredFile) -> None:
        self._layout, self.shards, self.dali_indices = beton.Layout(num_listed), [stored], []

    def __call__(self, report: ShardReport) -> NDArray[np.void]:
        return _placed(self._layout, report)


def _in_beton(out: Path, num_shards: int, reports: Reports, beton_join: "BetonJoin | None") -> _InBeton:
    if beton_join is None:
        with BetonJoin(out, num_shards, reports.num_listed) as beton_join:
            beton_join.append_reported(threading.Event())
            return _InBeton(reports.num_listed, beton_join.finish(reports))
    return _InBeton(reports.num_listed, beton_join.finish(reports))


class BetonJoin:
    """Lays the parts of a beton into it, in order, as they are reported, while others are still written.

    A part is removed when the disk has its samples in the beton, so the disk hardly ever has them twice. Where an earlier
    run stopped shows in which parts are there no more.
    """

    def __init__(self, out: Path, num_shards: int, num_listed: int) -> None:
        """ShardError where the beton of an earlier run is gone, and with it the parts that it had taken up."""
        self._state, self._num_shards, self._num_listed = out / STATE_NAME, num_shards, num_listed
        path = out / BETON_NAME
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        if path.is_file():  # whole already, but for the manifest
            os.replace(path, partial)
        self._layout, self._next = beton.Layout(num_listed), 0
        while (report := self._report()) is not None and not self._is_part_there(report):
            self._layout.place(report.records["byte_count"])
            self._next += 1
        end, found = self._layout.end, partial.stat().st_size if partial.is_file() else 0
        if end > self._layout.data_start and found < end:
            raise ShardError(
                f"{partial} was removed or cut short, and with it {self._next} finished parts: to begin anew, {BEGIN_ANEW}."
            )
        self._copied: list[Path] = []
        self._file = KeptFile(path, keep=end)

    def __enter__(self) -> "BetonJoin":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.discard()

    def append_reported(self, stopped: threading.Event) -> None:
        """Take up all parts, waiting for each to be reported; ends early when `stopped` is set."""
        while self._next < self._num_shards:
            report = self._report()
            if report is None:
                if stopped.wait(_LOOK_EVERY_S):
                    return
                continue
            placed = _placed(self._layout, report)
            if len(placed):
                part = self._state / report.files[0].name
                _copy(part, self._file, report, placed)
                self._copied.append(part)
            self._next += 1
            if len(self._copied) == _PARTS_PER_SYNC or self._next == self._num_shards:
                self._remove_copied()

    def finish(self, reports: Reports) -> StoredFile:
        """Write what the beton says of all its samples, and give it its name."""
        assert self._next == self._num_shards and not self._copied
        head, layout, first_id = self._layout.head(reports.num_samples), beton.Layout(self._num_listed), 0
        self._file.write_at(0, head)
        for report in reports:
            placed = _placed(layout, report)
            rows = beton.metadata_of(placed)
            self._file.write_at(len(head) + first_id * rows.itemsize, rows.tobytes())
            self._file.write(beton.allocations_of(first_id, placed).tobytes())
            first_id += len(placed)
        return self._file.commit(reports.num_samples)

    def _report(self) -> ShardReport | None:
        """Of the next part, if it is written."""
        written = self._next < self._num_shards and report_path(self._state, self._next).is_file()
        return ShardReport.load(self._state, self._next) if written else None

    def _is_part_there(self, report: ShardReport) -> bool:
        return bool(report.files) and (self._state / report.files[0].name).exists()

    def _remove_copied(self) -> None:
        """The first ones first: whichever is there, those before it are not needed."""
        if self._copied:
            self._file.sync()
        for part in self._copied:
            part.unlink()
        self._copied.clear()


def _placed(layout: beton.Layout, report: ShardReport) -> NDArray[np.void]:
    records = np.array(report.records)
    records["offset"] = layout.place(records["byte_count"])
    return records


def _copy(part: Path, file: KeptFile, report: ShardReport, placed: NDArray[np.void]) -> None:
    """Append a part's samples at their places; what lies between is zero.

    ShardError where the part is not what it was when it was written; a later run then takes it up again.
    """
    records, checksum = report.records, xxhash.xxh3_128()
    gaps = np.diff(placed["offset"].astype(np.int64) - records["offset"].astype(np.int64), prepend=-1) != 0
    starts = np.flatnonzero(gaps)
    ends = [*starts[1:], len(records)]
    if not part.exists():
        raise _damaged(part, report)
    with part.open("rb", buffering=0) as source:
        for first, stop in zip(starts, ends, strict=True):  # runs that lie in the beton as they lie in the part
            file.write(bytes(int(placed["offset"][first]) - file.byte_count))
            left = (
                int(records["offset"][stop - 1]) + int(records["byte_count"][stop - 1]) - int(records["offset"][first])
            )
            while left:
                piece = source.read(min(left, _COPY_BYTES))
                if not piece:
                    raise _damaged(part, report)
                file.write(piece)
                checksum.update(piece)
                left -= len(piece)
    if checksum.hexdigest() != report.files[0].checksum:
        raise _damaged(part, report)


def _damaged(part: Path, report: ShardReport) -> ShardError:
    written_again = report_path(part.parent, report.number)
    return ShardError(
        f"{part} is not as it was written, it is gone or its checksum is another: remove it and {written_again}, and run the "
        "same command again."
    )


def content_of(records: NDArray[np.void]) -> bytes:
    """The bytes that `Manifest.content` is the checksum of."""
    fields = ["checksum", "byte_count", "height", "width", "label", "encoding"]
    packed = np.empty(len(records), [(name, RECORD_DTYPE[name]) for name in fields])
    for name in fields:
        packed[name] = records[name]
    return packed.tobytes()


def _write_npy_header(file: NewFile, count: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(RECORD_DTYPE), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
