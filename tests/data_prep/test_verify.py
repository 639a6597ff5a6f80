"""Verification: whatever byte of a packed set is changed, a sentence says which file and, in a shard, which sample."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.index import JPEG, NO_LABEL, RAW, ShardError
from data_prep.verify import verify
from tests.data_prep.pictures_for_tests import jpeg_of
from tests.packed import Sample, write_set

ROOT = Path(__file__).resolve().parents[2]
LATIN_1 = b"a/caf\xe9.jpg".decode("utf-8", "surrogateescape")


def make_samples(container="tar"):
    """Eight; sample 5 has no label, 6 an odd name and, in a beton, no JPEG."""
    samples = [
        Sample(jpeg_of(10 + i, 20 + i, seed=i), 10 + i, 20 + i, i % 2, f"{'ab'[i % 2]}/picture {i}.jpg", JPEG)
        for i in range(8)
    ]
    samples[5] = samples[5]._replace(label=NO_LABEL)
    samples[6] = samples[6]._replace(name=LATIN_1)
    if container == "beton":
        samples[6] = samples[6]._replace(content=bytes(range(60)), height=4, width=5, encoding=RAW)
    return samples


@pytest.fixture(params=["tar", "beton"])
def container(request):
    return request.param


@pytest.fixture
def packed(tmp_path, container):
    write_set(
        tmp_path / "set", make_samples(container), container=container, left_out=[("a/1.jpg", "damaged", "its end")]
    )
    return tmp_path / "set"


def flip(path, offset, bits=0x10):
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([before ^ bits]))


def run(*arguments):
    command = [sys.executable, ROOT / "data_prep/verify.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )


def test_an_untouched_set_is_sound_wherever_it_lies(packed, tmp_path):
    assert verify(packed) == []
    packed.rename(tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere") == []


def test_the_command_says_what_it_found_and_exits_accordingly(packed, container):
    path = packed / "samples.beton" if container == "beton" else packed
    sound = run(path)
    assert (sound.returncode, sound.stdout) == (0, "The set is sound.\n"), sound.stderr
    shard = {"tar": "shard-000002.tar", "beton": "samples.beton"}[container]
    flip(
        packed / shard, int(np.load(packed / "index.npy")["offset"][6])
    )  # whose name is not UTF-8; the terminal is ASCII
    damaged = run(path)
    file, sample = damaged.stdout.splitlines()[:2]
    assert damaged.returncode == 1 and file.startswith(f"{shard} has the checksum ")
    assert sample.startswith(f"sample 6 (a/caf\\udce9.jpg) in {shard} is not as it was packed")
    assert damaged.stdout.endswith(" places differ.\n") and "Traceback" not in damaged.stderr
    (packed / "manifest.json").write_text("{")
    unreadable = run(path)
    assert (unreadable.returncode, unreadable.stdout) == (1, "")
    assert (
        "manifest.json is no manifest that this program reads" in unreadable.stderr
        and unreadable.stderr.count("\n") == 1
    )


def test_every_byte_of_every_file_counts(packed):
    """But for what the manifest alone says."""
    rng = np.random.default_rng(1)
    for path in {path for path in packed.iterdir() if path.stat().st_size} - {packed / "manifest.json"}:
        size = path.stat().st_size
        for offset in {0, size - 1, *rng.integers(size, size=12).tolist()}:
            flip(path, offset, 1)
            try:
                found = verify(packed)
                assert any(sentence.startswith(path.name) for sentence in found), (path, offset)
            except ShardError as error:
                assert path.name == "index.npy" and str(path) in str(error)
            flip(path, offset, 1)
    assert verify(packed) == []


def test_the_sample_is_named_or_that_all_are_whole(packed, container):
    records = np.load(packed / "index.npy")
    shard = packed / {"tar": "shard-000001.tar", "beton": "samples.beton"}[container]
    for sample_id in (3, 4):
        start, length = int(records["offset"][sample_id]), int(records["byte_count"][sample_id])
        for offset in (start, start + length - 1):
            flip(shard, offset)
            file, sample, *others = verify(packed)
            assert (
                file.startswith(f"{shard.name} has the checksum ") and "copy it again or rerun data_prep/make_" in file
            )
            assert sample.startswith(f"sample {sample_id} (") and not others
            flip(shard, offset)
    flip(shard, 0)  # a header
    (finding,) = verify(packed)
    assert "but its samples are whole" in finding


def test_files_that_are_missing_strange_or_too_many_are_told(packed, container):
    (packed / "shard-000077.tar").touch()
    (packed / "changed.jsonl").unlink()
    os.mkfifo(packed / "changed.jsonl")  # to open it would take for ever
    (packed / "rejected.jsonl").unlink()
    found = verify(packed)
    assert found[0] == "shard-000077.tar is not of this set, by manifest.json: remove it."
    assert [sentence.split()[:4] for sentence in found[1:]] == [
        ["rejected.jsonl", "is", "missing,", "or"], ["changed.jsonl", "is", "missing,", "or"],
    ]  # fmt: skip


def test_an_index_of_another_run_is_told(packed, container):
    records = np.load(packed / "index.npy")
    records["label"][2] ^= 1
    np.save(packed / "index.npy", records)
    found = verify(packed)
    assert [sentence.split()[:3] for sentence in found] == [["index.npy", "has", "the"]]
    records["shard"][2] = 7  # nor is a sample looked for where the index says
    np.save(packed / "index.npy", records)
    flip(packed / {"tar": "shard-000001.tar", "beton": "samples.beton"}[container], 0)
    assert [sentence.split()[1:3] for sentence in verify(packed)] == [["has", "the"]] * 2
