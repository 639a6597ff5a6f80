"""Verification: whatever byte of a packed set is changed, the sentence says which file, which sample and what of it."""

import contextlib
import errno
import io
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

from data_prep import checks, plain_reading, rebuilding
from data_prep.index import JPEG, NO_LABEL, RAW, STATE_NAME, DatasetIndex, ShardError
from data_prep.joining import SetFacts, join
from data_prep.shards import BetonPart, ReportBuilder, TarShard
from data_prep.verify import Finding, verify
from tests.packed import Sample, write_set

ROOT = Path(__file__).resolve().parents[2]
SHARD = {"tar": "shard-000001.tar", "beton": "samples.beton"}
PER_SHARD = 3
JPEG_BYTES = 1500
LATIN_1 = b"a/caf\xe9.jpg".decode("utf-8", "surrogateescape")

# A beton as FFCV 1.0.2 writes it, in bytes: header, two descriptions of 1 + 16 + 1024, and rows.
BETON_HEADER, BETON_FIELDS, BETON_ROW = 24, 2 * 1041, 24


def jpeg(height, width, byte_count=None, seed=0):
    """A picture of noise, with a comment that makes it `byte_count` long."""
    pixels = np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=60)
    content = file.getvalue()
    missing = 0 if byte_count is None else byte_count - len(content)
    if not missing:
        return content
    return content[:2] + b"\xff\xfe" + struct.pack(">H", missing - 2) + b" " * (missing - 4) + content[2:]


def make_samples(container):
    """Eight; samples 3 and 4 are equally long, 5 has no label, 6 an odd name and, in a beton, no JPEG."""
    samples = [
        Sample(jpeg(10 + i, 20 + i), 10 + i, 20 + i, i % 2, f"{'ab'[i % 2]}/picture {i}.jpg", JPEG) for i in range(8)
    ]
    for i in (3, 4):
        samples[i] = samples[i]._replace(content=jpeg(10 + i, 20 + i, JPEG_BYTES))
    samples[5] = samples[5]._replace(label=NO_LABEL)
    samples[6] = samples[6]._replace(name=LATIN_1)
    if container == "beton":
        samples[6] = samples[6]._replace(content=bytes(range(3 * 4 * 5)), height=4, width=5, encoding=RAW)
    return samples


def write_full_set(folder, container):
    """As `write_set`, with something in each of the lists."""
    (folder / STATE_NAME).mkdir(parents=True)
    samples = make_samples(container)
    for number in range(3):
        shard = (TarShard if container == "tar" else BetonPart)(folder, number)
        builder = ReportBuilder(number)
        for sample in samples[number * PER_SHARD : (number + 1) * PER_SHARD]:
            builder.add(**sample._asdict(), offset=shard.add(sample.content, sample.label))
        builder.change(samples[number].name, ["CMYK", "shrunk"][: 1 + number % 2])
        if number:
            builder.reject(f"a/{number}.jpg", "damaged", "its end is missing")
        builder.report(shard.finish()).save(folder / STATE_NAME)
    facts = SetFacts(container=container, class_names=["a", "b"], shuffle_seed=5, settings={"shard_mb": 1})
    join(folder, 3, facts)
    shutil.rmtree(folder / STATE_NAME)
    return folder


@pytest.fixture(scope="module", params=["tar", "beton"])
def container(request):
    return request.param


@pytest.fixture(scope="module")
def whole(container, tmp_path_factory):
    """A sound set, not to be changed but for moments."""
    return write_full_set(tmp_path_factory.mktemp("whole") / container, container)


@pytest.fixture
def packed(whole, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "set"))


def findings(folder, **options):
    return list(verify(folder, workers=1, **options).findings)


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def seal(folder):
    """Make the manifest fit the files as they are by now, as if they had been packed so."""
    seal_files(folder)
    content = b"".join(
        struct.pack(
            "<QIIIiI", *(r[name] for name in ("checksum", "byte_count", "height", "width", "label", "encoding"))
        )
        for r in np.load(folder / "index.npy")
    )
    edit_manifest(folder, content=xxhash.xxh3_128_hexdigest(content))


def seal_files(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in ("index", "names", "rejected_list", "changed_list", "shards", "dali_indices"):
        for stored in manifest[entry] if isinstance(manifest[entry], list) else [manifest[entry]]:
            found = (folder / stored["name"]).read_bytes()
            stored |= {"byte_count": len(found), "checksum": xxhash.xxh3_128_hexdigest(found)}
    edit_manifest(folder, **manifest)


def edit_index(folder, sample_id, **changes):
    records = np.load(folder / "index.npy")
    for name, value in changes.items():
        records[name][sample_id] = value
    np.save(folder / "index.npy", records)


def flip(path, offset, bits=0x10):
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([before ^ bits]))


@contextlib.contextmanager
def flipped(path, offset, bits=0x10):
    """For a moment."""
    flip(path, offset, bits)
    try:
        yield
    finally:
        flip(path, offset, bits)


# ------------------------------------------------------------------------------------------------------- sound sets


def test_an_untouched_set_is_sound(whole, container):
    result = verify(whole, workers=1)
    assert result.findings == ()
    shards = "3 shards" if container == "tar" else "samples.beton"
    megabytes = {"tar": "0.0", "beton": "8.4"}[container]
    decoded = {"tar": 8, "beton": 7}[container]  # the raw one is not
    assert str(result) == f"{whole} is sound: 8 samples in {shards}, {megabytes} MB, {decoded} decoded."


def test_two_processes_say_the_same(packed, container):
    flip(packed / SHARD[container], 600, 1)
    flip(packed / "names.txt", 3, 1)
    several = verify(packed, workers=2)
    assert several.findings == verify(packed, workers=1).findings
    assert len(several.findings) == 2 and several.num_decoded == verify(packed, workers=1).num_decoded > 0


def test_a_set_is_verified_after_it_was_moved(packed, tmp_path):
    packed.rename(tmp_path / "elsewhere")
    assert findings(tmp_path / "elsewhere") == []


def run(*arguments):
    command = [sys.executable, ROOT / "data_prep/verify.py", *arguments, "--workers", "1"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )


def test_the_command_says_what_it_found_and_ends_accordingly(packed, container):
    path = packed / "samples.beton" if container == "beton" else packed
    sound = run(path, "--pixels", "3")
    assert sound.returncode == 0
    assert sound.stdout.startswith(f"{path} is sound: 8 samples") and sound.stdout.endswith(", 3 decoded.\n")
    content = int(np.load(packed / "index.npy")["offset"][6])  # whose name is not UTF-8, and the terminal is ASCII
    shard = {"tar": "shard-000002.tar", "beton": "samples.beton"}[container]
    flip(packed / shard, content, 1)
    damaged = run(path)
    assert damaged.returncode == 1
    line, closing = damaged.stdout.splitlines()
    assert line.startswith(f"{shard} differs in the content of sample 6 (a/caf\\udce9.jpg), within bytes {content} to ")
    assert closing == f"{path} differs in 1 place."
    (packed / "manifest.json").write_text("{")
    unreadable = run(path)
    assert unreadable.returncode == 2 and unreadable.stdout == ""
    assert "manifest.json is not readable as JSON" in unreadable.stderr and "Traceback" not in unreadable.stderr


def test_settings_out_of_range_are_refused(whole):
    with pytest.raises(ValueError, match=r"--pixels must not be negative. Found: -1\."):
        verify(whole, pixels=-1)
    with pytest.raises(ValueError, match=r"--workers must be at least 1. Found: 0\."):
        verify(whole, workers=0)


def test_what_is_no_packed_set_is_said_so(tmp_path):
    with pytest.raises(ShardError, match=r"nowhere does not exist"):
        verify(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"nowhere.beton does not exist"):
        verify(tmp_path / "nowhere.beton")
    with pytest.raises(ShardError, match=r"is empty; pack a data set"):
        verify(tmp_path)


# ------------------------------------------------------------------------------------- where a byte of a shard belongs


def tar_regions(path, first_id):
    """(beginning, end, phrase, sample id) of everything in a shard, as tarfile finds it."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    for member in members:
        sample_id = first_id + int(member.name[7:13])
        label = "the label of " if member.name.endswith(".cls") else ""
        end = member.offset_data + member.size
        content = label or "the content of "
        yield member.offset, member.offset_data, f"the tar header of {label}sample {sample_id}", sample_id
        yield member.offset_data, end, f"{content}sample {sample_id}", sample_id
        yield end, -(-end // 512) * 512, f"the padding after {label}sample {sample_id}", sample_id
    yield -(-end // 512) * 512, path.stat().st_size, "the end of the archive", None


def beton_regions(folder):
    """The same of a beton, from the index."""
    index = DatasetIndex.open(folder)
    records, count = index.records(range(len(index))), len(index)
    rows = BETON_HEADER + BETON_FIELDS
    size = (folder / "samples.beton").stat().st_size
    yield 0, BETON_HEADER, "the header", None
    yield BETON_HEADER, rows, "the description of the fields", None
    for i in range(count):
        start = rows + i * BETON_ROW
        yield start, start + BETON_ROW, f"the metadata of sample {i}", i
    yield rows + count * BETON_ROW, int(records["offset"][0]), "the padding before the first page", None
    for i in range(count):
        start = int(records["offset"][i])
        end = start + int(records["byte_count"][i])
        yield start, end, f"the content of sample {i}", i
        following = int(records["offset"][i + 1]) if i + 1 < count else size - count * BETON_ROW
        yield end, following, f"the padding of the page after sample {i}", i
    for i in range(count):
        start = size - (count - i) * BETON_ROW
        yield start, start + BETON_ROW, f"the allocation of sample {i}", i


def regions(folder, container):
    """(file, beginning, end, phrase, sample id), none empty."""
    if container == "tar":
        for number in range(3):
            path = folder / f"shard-{number:06d}.tar"
            for region in tar_regions(path, number * PER_SHARD):
                yield path, *region
    else:
        for region in beton_regions(folder):
            yield folder / "samples.beton", *region


def assert_told(folder, path, offset, start, phrase, sample_id):
    """That exactly this place is told."""
    (finding,) = findings(folder, pixels=0)
    assert (finding.file, finding.sample_id) == (path.name, sample_id), finding
    assert finding.sentence.startswith(f"differs in {phrase}"), finding
    assert finding.offset == (start if "content of" in phrase else offset), finding
    if sample_id is not None:
        name = DatasetIndex.open(folder).name(sample_id)
        assert f"sample {sample_id} ({name}), " in str(finding)


def test_the_regions_cover_the_shards(whole, container):
    """Else the tests below would leave something out."""
    for path, of_path in itertools.groupby(regions(whole, container), key=lambda region: region[0]):
        at = 0
        for _, start, end, *_ in of_path:
            assert start == at
            at = end
        assert at == path.stat().st_size


def test_the_first_and_the_last_byte_of_every_region_are_told(whole, container):
    told = set()
    for path, start, end, phrase, sample_id in regions(whole, container):
        for offset in {start, end - 1} if end > start else ():
            with flipped(path, offset, 0x01):
                assert_told(whole, path, offset, start, phrase, sample_id)
            told.add(phrase.split(" sample ")[0])
    assert len(told) == {"tar": 7, "beton": 6}[container]  # between pages: the test after the next
    assert findings(whole) == []


def test_random_bytes_of_shards_are_told(whole, container):
    rng = np.random.default_rng(1)
    places = [region for region in regions(whole, container) if region[2] > region[1]]
    for _ in range(60):
        path, start, end, phrase, sample_id = places[rng.integers(len(places))]
        offset = int(rng.integers(start, end))
        with flipped(path, offset, int(rng.integers(1, 256))):
            assert_told(whole, path, offset, start, phrase, sample_id)


def test_gaps_between_pages_are_compared_too(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.beton.MIN_PAGE_SIZE", 4096)
    for module in (plain_reading, rebuilding):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)  # so that samples and gaps are longer than a piece
    monkeypatch.setattr(plain_reading, "RECORDS_AT_A_TIME", 2)
    sizes = [(40, 60), (50, 60), (60, 60), (30, 30), (60, 61)]
    samples = [Sample(jpeg(*size, 3500 + i), *size, 0, f"a/{i}.jpg") for i, size in enumerate(sizes)]
    write_set(tmp_path / "set", samples, container="beton")
    assert findings(tmp_path / "set") == []
    path = tmp_path / "set/samples.beton"
    gaps = [region for region in beton_regions(tmp_path / "set") if "page after" in region[2] and region[1] > region[0]]
    assert len(gaps) == 4 and all(end - start > 500 for start, end, *_ in gaps)
    for start, end, phrase, sample_id in [*gaps, *list(beton_regions(tmp_path / "set"))]:
        for offset in {start, (start + end) // 2, end - 1} if end > start else ():
            with flipped(path, offset):
                assert_told(tmp_path / "set", path, offset, start, phrase, sample_id)


# -------------------------------------------------------------------------------------------------- the other files


@pytest.mark.parametrize("name", ["index.npy", "names.txt", "rejected.jsonl", "changed.jsonl"])
def test_random_bytes_of_other_files_are_told(whole, name):
    rng = np.random.default_rng(2)
    path = whole / name
    for _ in range(60):
        with flipped(path, int(rng.integers(path.stat().st_size)), int(rng.integers(1, 256))):
            found = findings(whole, pixels=0)
            assert found and found[0].file == name, found
            assert found[0].sentence.startswith("has the checksum ")
            # Of an index that is wrong much may follow, but only ever the index is to blame.
            assert {finding.file for finding in found} <= {name, "manifest.json"}


def test_random_bytes_of_dalis_indices_are_told(tmp_path):
    folder = write_full_set(tmp_path / "set", "tar")
    path, rng = folder / "shard-000001.idx", np.random.default_rng(3)
    lines = path.read_bytes().splitlines(keepends=True)
    for _ in range(60):
        offset = int(rng.integers(path.stat().st_size))
        line = next(n for n in range(4) if offset < sum(map(len, lines[: n + 1])))
        with flipped(path, offset, int(rng.integers(1, 256))):
            (finding,) = findings(folder, pixels=0)
            assert (finding.file, finding.offset) == (path.name, offset)
            assert finding.sample_id == (None if line == 0 else 3 + line - 1)


def test_whatever_of_the_manifest_is_said_elsewhere_too_is_checked(whole):
    """Class names, seed and settings are not."""
    path, rng = whole / "manifest.json", np.random.default_rng(4)
    text = path.read_text()
    believed = range(text.index('"class_names"'), text.index('"rejected"'))
    refused = told = 0
    for offset in rng.choice([i for i in range(len(text)) if i not in believed], 150, replace=False).tolist():
        with flipped(path, offset, 0x01):
            try:
                found = findings(whole, pixels=0)
            except ShardError:
                refused += 1
                continue
            told += 1
            assert found, f"{text[offset - 30 : offset]}[{text[offset]}]{text[offset + 1 : offset + 10]}"
    assert refused > 20 and told > 20


@pytest.mark.parametrize("value", ["1e3", "-1", '"5"', "null", "true"])
def test_a_manifest_with_values_of_other_types_is_refused(packed, value):
    path = packed / "manifest.json"
    path.write_text(
        path.read_text().replace('"byte_count": ', f'"byte_count": {value}, "was": ', 1).replace('"was"', '"name"')
    )
    manifest = json.loads(path.read_text())
    manifest["index"] |= {"name": "index.npy", "byte_count": json.loads(value)}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"manifest.json says byte_count .* of a file"):
        verify(packed)


def test_a_manifest_of_another_container_is_refused(packed, container):
    edit_manifest(packed, container={"tar": "beton", "beton": "tar"}[container])
    with pytest.raises(
        ShardError, match=r"manifest.json says container '(tar|beton)' of (shard-000000.tar|samples.beton)"
    ):
        verify(packed)


def test_a_file_of_another_set_in_the_folder_is_told(packed):
    (packed / "shard-000077.tar").touch()
    (finding,) = findings(packed)
    assert str(finding) == "shard-000077.tar is not of this set, by manifest.json: remove it."


def test_a_missing_line_of_the_names_is_told(packed):
    lines = (packed / "names.txt").read_bytes().splitlines(keepends=True)
    (packed / "names.txt").write_bytes(b"".join(lines[:2] + lines[3:]))
    said = [finding.sentence for finding in findings(packed)]
    assert "was cut short" in said[0]
    assert said[1].startswith("has 7 lines where manifest.json says 8")


def test_lines_that_moved_within_the_names_are_told(packed):
    text = (packed / "names.txt").read_bytes()
    (packed / "names.txt").write_bytes(text.replace(b"a/picture 2.jpg\n", b"a/picture 2.jp\ng"))
    said = {finding.sample_id: finding.sentence for finding in findings(packed)}
    place = text.index(b"b/picture 3")
    assert said[3] == f"has the name of sample 3 at byte {place - 1}, not {place} as index.npy says."


@pytest.mark.parametrize("sample_id", [0, 1, 7])
def test_a_wrong_place_of_a_name_is_told(packed, sample_id):
    offset = int(np.load(packed / "index.npy")["name_offset"][sample_id])
    edit_index(packed, sample_id, name_offset=offset + 1)
    seal(packed)
    (finding,) = findings(packed)
    assert (finding.file, finding.sample_id) == ("index.npy", sample_id)
    assert (
        finding.sentence
        == f"says that the name of sample {sample_id} is at byte {offset + 1} of names.txt, not {offset}."
    )


@pytest.mark.parametrize("changes", [{"rejected": {"damaged": 1}}, {"changed": {}}, {"changed_names": ["x"]}])
def test_lists_that_the_manifest_counts_otherwise_are_told(packed, changes):
    edit_manifest(packed, **changes)
    (finding,) = findings(packed)
    assert finding.file == "manifest.json" and "other pictures than" in finding.sentence


# ------------------------------------------------------------------------------------------- files that are not whole


@pytest.fixture
def shard(packed, container):
    return packed / SHARD[container]


def first_of(container):
    return {"tar": 3, "beton": 0}[container]


def test_a_shard_that_was_cut_short_is_told_with_the_sample(packed, shard, container):
    path_regions = [region for region in regions(packed, container) if region[0] == shard]
    start, end, phrase, sample_id = next(region[1:] for region in path_regions if "content of sample 4" in region[3])
    os.truncate(shard, (start + end) // 2)
    length, finding = findings(packed)
    assert "was cut short" in length.sentence and length.file == shard.name
    assert (finding.file, finding.sample_id, finding.offset) == (shard.name, sample_id, (start + end) // 2)
    assert finding.sentence.startswith(f"ends in {phrase}")


def test_a_beton_that_ends_in_a_table_names_the_row(tmp_path):
    folder = write_full_set(tmp_path / "set", "beton")
    size = (folder / "samples.beton").stat().st_size
    os.truncate(folder / "samples.beton", size - 2 * BETON_ROW - 1)
    assert findings(folder)[1].sentence.startswith("ends in the allocation of sample 5 ")
    os.truncate(folder / "samples.beton", BETON_HEADER + BETON_FIELDS + 2 * BETON_ROW)
    assert findings(folder)[1].sentence.startswith("ends in the metadata of sample 2 ")


def test_a_shard_that_was_extended_is_told(packed, shard):
    with shard.open("ab") as file:
        file.write(b"\0")
    (finding,) = findings(packed)
    assert finding.file == shard.name and "was changed after it was packed" in finding.sentence


def test_bytes_after_the_last_sample_are_told_even_where_the_manifest_counts_them(packed, shard):
    byte_count = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(bytes(512))
    seal(packed)
    (finding,) = findings(packed)
    said = f"says that {shard.name} is {byte_count + 512} bytes long, where its samples in index.npy make {byte_count}."
    assert (finding.file, finding.sentence) == ("manifest.json", said)


def test_a_missing_shard_is_told_and_the_others_are_checked(packed, shard, container):
    shard.unlink()
    flip(packed / "changed.jsonl", 3, 1)
    if container == "tar":
        flip(packed / "shard-000002.tar", 600, 1)
    found = {finding.file: finding for finding in findings(packed)}
    assert found[shard.name].sentence.startswith("is missing: ")
    assert found.keys() == {shard.name, "changed.jsonl"} | ({"shard-000002.tar"} if container == "tar" else set())


@pytest.mark.parametrize("name", ["index.npy", "names.txt", "rejected.jsonl", "changed.jsonl"])
def test_another_missing_file_is_told(packed, name):
    (packed / name).unlink()
    (finding,) = findings(packed)
    assert finding.file == name and finding.sentence.startswith("is missing: ")


def test_without_a_whole_index_checksums_still_tell_damaged_shards(packed, shard):
    os.truncate(packed / "index.npy", (packed / "index.npy").stat().st_size - 1)
    flip(shard, 600, 1)
    index, damaged = findings(packed)
    assert index.file == "index.npy" and "was cut short" in index.sentence
    assert damaged.file == shard.name and damaged.sentence.startswith("has the checksum ")


@pytest.mark.parametrize("offset", [0, 8, 40, 100])
def test_an_index_whose_header_is_damaged_is_told(packed, offset):
    """NumPy raises errors of several kinds for these."""
    flip(packed / "index.npy", offset, 0x10)
    found = findings(packed)
    assert found[0].file == "index.npy" and found[0].sentence.startswith("has the checksum ")
    assert {finding.file for finding in found} <= {"index.npy", "manifest.json"}


@pytest.mark.parametrize("name", ["index.npy", "names.txt", "changed.jsonl", None])
def test_a_folder_or_a_pipe_for_a_file_is_told(packed, shard, name):
    path = packed / (name or shard.name)
    for make in (os.mkdir, os.mkfifo):  # to open a pipe would take for ever
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        done = run(packed)
        assert (done.returncode, done.stderr.count("Traceback")) == (1, 0)
        assert done.stdout.splitlines()[0].startswith(f"{path.name} is no regular file: ")


def test_a_file_that_cannot_be_opened_is_told(packed, shard):
    shard.unlink()
    shard.symlink_to(shard)
    (finding,) = findings(packed)
    assert (finding.file, finding.sentence) == (
        shard.name, f"cannot be read ({shard}): {os.strerror(errno.ELOOP)}.",
    )  # fmt: skip


def test_a_shard_that_is_cut_short_while_it_is_read_is_told(packed, shard, monkeypatch):
    def check(folder, stored, check_byte_count=checks.check_byte_count):
        check_byte_count(folder, stored)
        if stored.name == shard.name:
            os.truncate(shard, 700)

    monkeypatch.setattr(checks, "check_byte_count", check)
    (finding,) = findings(packed, pixels=0)
    assert finding.file == shard.name and finding.sentence.endswith("at byte 700.") and finding.offset == 700


def test_what_cannot_be_read_is_told_and_the_rest_is_checked(packed, shard, container, monkeypatch):
    offsets = np.load(packed / "index.npy")["offset"]
    bad, later = int(offsets[3]), int(offsets[5])
    flip(shard, later, 1)
    read = plain_reading.PlainFile.read

    def failing(file, byte_count):
        if file._file.name == str(shard) and file.position <= bad < file.position + byte_count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, byte_count)

    monkeypatch.setattr(plain_reading.PlainFile, "read", failing)
    unread, damaged = findings(packed)
    assert (unread.sample_id, unread.offset) == (3, bad)
    assert unread.sentence.startswith("cannot be read in the content of sample 3 ")
    assert unread.sentence.endswith(f"from byte {bad} on (Input/output error).")
    assert (damaged.sample_id, damaged.offset) == (5, later)


def test_at_most_twenty_of_a_file_are_listed(tmp_path):
    samples = [Sample(jpeg(8, 8 + i), 8, 8 + i, 0, f"a/{i}.jpg") for i in range(30)]
    write_set(tmp_path / "set", samples, per_shard=27)
    for record in np.load(tmp_path / "set/index.npy"):
        flip(tmp_path / f"set/shard-{record['shard']:06d}.tar", int(record["offset"]), 1)
    result = verify(tmp_path / "set", workers=1)
    assert [finding.sample_id for finding in result.findings] == [*range(20), None, *range(27, 30)]
    assert str(result.findings[20]) == "... and 7 more in shard-000000.tar"
    assert str(result) == f"{tmp_path / 'set'} differs in 30 places."


# --------------------------------------------------------------------------- a shard against the index, both with
# ----------------------------------------------------------------------------------------------- their right checksums


def swap_contents(folder, shard):
    """Of samples 3 and 4, which are equally long."""
    places = [slice(int(start), int(start) + JPEG_BYTES) for start in np.load(folder / "index.npy")["offset"][3:5]]
    content = bytearray(shard.read_bytes())
    content[places[0]], content[places[1]] = content[places[1]], content[places[0]]
    shard.write_bytes(content)


def test_swapped_contents_are_told(packed, shard):
    swap_contents(packed, shard)
    assert [(f.file, f.sample_id) for f in findings(packed)] == [(shard.name, 3), (shard.name, 4)]
    seal(packed)
    found = findings(packed)
    assert [(f.file, f.sample_id) for f in found] == [("index.npy", 3), ("index.npy", 4)]
    start = f"contradicts {shard.name}, whose checksum is right but which differs in the content of sample 3 ("
    assert found[0].sentence.startswith(start)


def test_a_changed_label_of_a_beton_is_told(tmp_path):
    folder = write_full_set(tmp_path / "set", "beton")
    label = BETON_HEADER + BETON_FIELDS + 4 * BETON_ROW + 16
    flip(folder / "samples.beton", label, 1)
    (finding,) = findings(folder)
    assert (finding.file, finding.sample_id, finding.offset) == ("samples.beton", 4, label)
    assert "in the metadata of sample 4 (a/picture 4.jpg), " in str(finding)
    assert str(finding).endswith(f"at byte {label} (found 0x01, expected 0x00).")
    flip(folder / "samples.beton", label + 2 * BETON_ROW, 1)
    assert [(f.sample_id, f.offset) for f in findings(folder)] == [(4, label), (6, label + 2 * BETON_ROW)]
    seal(folder)
    assert [(f.file, f.sample_id) for f in findings(folder)] == [("index.npy", 4), ("index.npy", 6)]


def test_a_wrong_place_of_a_sample_is_told(packed, shard):
    offset = int(np.load(packed / "index.npy")["offset"][4])
    edit_index(packed, 4, offset=offset + 1)
    seal(packed)
    (finding,) = findings(packed)
    assert str(finding) == (
        f"index.npy says that sample 4 (a/picture 4.jpg) is at byte {offset + 1} of {shard.name}, not {offset}."
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"shard": 7}, "in which shard it lies"),
        ({"encoding": 2}, "how it is encoded"),
        ({"label": 2}, "which class it is of"),
        ({"label": -1}, "which class it is of"),
        ({"encoding": RAW}, "how many bytes its raw pixels have"),
    ],
)
def test_what_cannot_be_in_an_index_is_told(packed, changes, what):
    edit_index(packed, 2, **changes)
    seal(packed)
    first = findings(packed)[0]
    assert str(first) == f"index.npy is wrong about sample 2 (a/picture 2.jpg): {what}."


def test_a_content_that_the_manifest_says_otherwise_is_told(packed):
    edit_manifest(packed, content="0" * 32)
    (finding,) = findings(packed)
    assert finding.file == "manifest.json" and finding.sentence.startswith(f"says the content is {'0' * 32} where ")


def test_numbers_of_samples_that_contradict_each_other_are_told(packed):
    edit_manifest(packed, num_samples=9)
    (finding,) = findings(packed)
    said = "contradicts itself in the number of samples (9 in all, 8 of the index, 8 of the names, 8 of the shards)"
    assert finding.file == "manifest.json" and finding.sentence.startswith(said)


def test_a_set_is_not_sound_where_its_readers_refuse_it(packed):
    records = np.load(packed / "index.npy")
    np.save(packed / "index.npy", records.view(np.uint8))  # as many bytes, of another type
    seal_files(packed)
    (finding,) = findings(packed)
    assert finding.file == "index.npy" and "holds records of uint8" in finding.sentence


# ------------------------------------------------------------------------------------------------------------ pixels


def test_a_wrong_size_is_told_by_the_pixels_alone(tmp_path):
    folder = write_full_set(tmp_path / "set", "tar")
    edit_index(folder, 7, height=18)
    seal(folder)
    assert findings(folder, pixels=0) == []
    assert findings(folder, pixels=1) == []  # the first
    for options in ({}, {"pixels": 2}, {"pixels": 0, "all_pixels": True}):
        (finding,) = findings(folder, **options)
        assert str(finding) == "index.npy says that sample 7 (b/picture 7.jpg) is 18 x 27 px, not 17 x 27."


def test_samples_are_drawn_evenly_from_first_to_last(tmp_path):
    samples = [Sample(jpeg(8, 8 + i), 8, 9 + i, 0, f"a/{i}.jpg") for i in range(10)]  # whose widths are all wrong
    write_set(tmp_path / "set", samples)

    def drawn(**options):
        return [finding.sample_id for finding in findings(tmp_path / "set", **options)]

    assert drawn(pixels=4) == [0, 3, 6, 9]
    assert drawn(pixels=2) == [0, 9]
    assert drawn(pixels=10) == drawn(pixels=1000) == drawn(pixels=0, all_pixels=True) == list(range(10))
    assert verify(tmp_path / "set", pixels=4, workers=1).num_decoded == 4


def test_what_does_not_decode_is_told(tmp_path):
    sound = jpeg(30, 40)
    contents = [sound, sound[:300], b"no picture", sound[:-2]]  # the last one lacks its end marker only
    write_set(tmp_path / "set", [Sample(content, 30, 40, 0, f"a/{i}.jpg") for i, content in enumerate(contents)])
    found = findings(tmp_path / "set")
    assert [(f.file, f.sample_id) for f in found] == [
        ("shard-000000.tar", 1),
        ("shard-000000.tar", 2),
        ("shard-000001.tar", 3),
    ]
    assert all("cannot be decoded (" in finding.sentence for finding in found)


# ----------------------------------------------------------------------------------------------------------- against


def pair(tmp_path, **changes):
    """A set of tar shards and a beton; `changes` of sample 2 in the beton."""
    samples = make_samples("tar")
    write_set(tmp_path / "shards", samples)
    samples[2] = samples[2]._replace(**changes)
    write_set(tmp_path / "beton", samples, container="beton")
    return tmp_path / "shards", tmp_path / "beton"


def test_the_same_samples_in_another_container_are_equal(tmp_path):
    shards, beton = pair(tmp_path)
    assert findings(shards, against=beton) == findings(beton, against=shards) == []
    assert findings(shards, against=beton / "samples.beton") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": 1}, "sample 2 (a/picture 2.jpg) with label 1 where {} has label 0."),
        (
            {"height": 13, "width": 2},
            "sample 2 (a/picture 2.jpg) with height 13, width 2 where {} has height 12, width 22.",
        ),
        ({"name": "c.jpg"}, "sample 2 with the name c.jpg where {} has a/picture 2.jpg."),
    ],
)
def test_samples_that_differ_from_another_sets_are_told(tmp_path, changes, said):
    shards, beton = pair(tmp_path, **changes)
    (finding,) = findings(shards, against=beton, pixels=0)
    assert str(finding) == f"{beton} has {said.format(shards)}"
    assert finding.sample_id == 2


def test_other_contents_numbers_and_classes_are_told(tmp_path):
    shards, _ = pair(tmp_path)
    samples = make_samples("tar")[:6]
    samples[1] = samples[1]._replace(content=jpeg(11, 21, seed=1))
    write_set(tmp_path / "other", samples, class_names=("a", "c"))
    found = [finding.sentence for finding in findings(shards, against=tmp_path / "other")]
    assert found[0] == f"has a number of samples of 6 where {shards} has 8."
    assert found[1] == f"has other class names than {shards}."
    assert any(sentence.startswith("has sample 1 (b/picture 1.jpg) with byte_count ") for sentence in found)
    assert not any("sample 2 " in sentence for sentence in found)


def test_another_set_that_cannot_be_opened_is_refused(tmp_path, whole):
    with pytest.raises(ShardError, match="nowhere does not exist"):
        verify(whole, against=tmp_path / "nowhere")


def test_a_finding_counts_those_that_are_not_listed():
    assert str(Finding("shard-000003.tar", "", places=1234)) == "... and 1,234 more in shard-000003.tar"
