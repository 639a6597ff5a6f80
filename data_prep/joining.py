"""Reported shards joined into a packed set: index, names, lists, the beton where one is wanted, and the manifest last."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep import beton
from data_prep.index import (
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
from data_prep.new_file import NewFile
from data_prep.shards import ShardReport, report_path

_COPY_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """What the manifest says beside what the reports know."""

    container: str
    class_names: Sequence[str]
    shuffle_seed: int
    settings: Mapping


def join(out: Path, num_shards: int, facts: SetFacts) -> DatasetIndex:
    """Write index, names, lists and manifest of the `num_shards` reported shards of `out`, and open the set.

    May be stopped at any moment and called again. One report is in memory at a time.
    """
    reports = Reports(out / STATE_NAME, num_shards)
    with (
        NewFile(out / INDEX_NAME) as index,
        NewFile(out / NAMES_NAME) as names,
        NewFile(out / REJECTED_NAME) as rejected,
        NewFile(out / CHANGED_NAME) as changed,
        NewFile(out / MANIFEST_NAME) as manifest_file,
    ):
        place = _write_beton(out, reports) if facts.container == "beton" else _Tars()
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
        counts = [(len(r.records), int(r.records["byte_count"].max(initial=0))) for r in self]
        self.num_samples = sum(count for count, _ in counts)
        self.largest = max(largest for _, largest in counts)
        """Byte count of the largest sample."""

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

    def __init__(self, layout: beton.Layout, stored: StoredFile) -> None:
        self._layout, self.shards, self.dali_indices = layout, [stored], []

    def __call__(self, report: ShardReport) -> NDArray[np.void]:
        return _placed(self._layout, report)


def _write_beton(out: Path, reports: Reports) -> _InBeton:
    """Make the beton of its parts, unless an earlier run did. Each part is removed when the disk has its samples."""
    path, count = out / BETON_NAME, reports.num_samples
    layout = _layout(reports)
    for report in reports:
        layout.place(report.records["byte_count"])
    allocations_start, end = layout.end, layout.end + count * beton.ALLOCATION_DTYPE.itemsize
    if path.is_file() and path.stat().st_size == end:  # an earlier run came this far
        os.replace(path, path.with_name(path.name + PARTIAL_SUFFIX))
        file = NewFile(path, keep=end)
        try:
            return _InBeton(_layout(reports), file.commit(count))
        except BaseException:
            file.leave()  # its parts are gone, so it must stay
            raise
    done, keep = _joined_before(out, reports)
    file = NewFile(path, keep=keep)
    try:
        layout = _layout(reports)
        if not keep:
            file.write(layout.head(allocations_start))
            metadata_layout = _layout(reports)
            for report in reports:
                file.write(beton.metadata_of(_placed(metadata_layout, report)).tobytes())
        for number, report in enumerate(reports):
            placed = _placed(layout, report)
            if number >= done and len(placed):
                part = out / STATE_NAME / report.files[0].name
                _copy(part, file, report, placed)
                file.sync()
                part.unlink()
        allocations_layout, first_id = _layout(reports), 0
        for report in reports:
            file.write(beton.allocations_of(first_id, _placed(allocations_layout, report)).tobytes())
            first_id += len(report.records)
        return _InBeton(_layout(reports), file.commit(count))
    except BaseException:
        file.leave()  # its parts are gone, so it must stay
        raise


def _layout(reports: Reports) -> beton.Layout:
    return beton.Layout(reports.num_samples, reports.largest)


def _placed(layout: beton.Layout, report: ShardReport) -> NDArray[np.void]:
    records = np.array(report.records)
    records["offset"] = layout.place(records["byte_count"])
    return records


def _joined_before(out: Path, reports: Reports) -> tuple[int, int]:
    """How many reports' parts an earlier run has laid into the beton, and how long it was then, bytes."""
    layout, done, end = _layout(reports), 0, 0
    for report in reports:
        layout.place(report.records["byte_count"])
        if report.files and (out / STATE_NAME / report.files[0].name).exists():
            break
        done += 1
        end = layout.end if report.files else end
    partial = out / (BETON_NAME + PARTIAL_SUFFIX)
    if end and (not partial.is_file() or partial.stat().st_size < end):
        raise ShardError(
            f"{partial} was removed or cut short, and with it {done} finished parts: pass --overwrite to begin anew."
        )
    return done, end


def _copy(part: Path, file: NewFile, report: ShardReport, placed: NDArray[np.void]) -> None:
    """Append a part's samples at their places; what lies between is zero.

    ShardError where the part is not what it was when it was written; a later run then takes it up again.
    """
    records, checksum = report.records, xxhash.xxh3_128()
    gaps = np.diff(placed["offset"].astype(np.int64) - records["offset"].astype(np.int64), prepend=-1) != 0
    starts = np.flatnonzero(gaps)
    ends = [*starts[1:], len(records)]
    with part.open("rb", buffering=0) as source:
        for first, stop in zip(starts, ends):  # runs that lie in the beton as they lie in the part
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
        f"{part} is not as it was written, for its checksum is another: remove it and {written_again}, and run the same "
        "command again."
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
