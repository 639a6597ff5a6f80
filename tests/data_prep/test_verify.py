"""Verification: whatever byte of a packed set is changed, a sentence says which file and, in a shard, which sample."""

import json
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
    command = [sys.executable, ROOT / "data_prep/verify.py", *arguments, "--workers", "1"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )


def test_an_untouched_set_is_sound_wherever_it_lies(packed, tmp_path):
    assert verify(packed, workers=1) == []
    packed.rename(tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere", workers=1) == []


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
    assert "manifest.json is not readable as JSON" in unreadable.stderr and unreadable.stderr.count("\n") == 1


def test_every_byte_of_every_file_counts(packed):
    """But for what the manifest alone says."""
    rng = np.random.default_rng(1)
    for path in {path for path in packed.iterdir() if path.stat().st_size} - {packed / "manifest.json"}:
        size = path.stat().st_size
        for offset in {0, size - 1, *rng.integers(size, size=12).tolist()}:
            flip(path, offset, 1)
            try:
                found = verify(packed, pixels=0, workers=1)
                assert any(sentence.startswith(path.name) for sentence in found), (path, offset)
            except ShardError as error:
                assert path.name == "index.npy" and str(path) in str(error)
            flip(path, offset, 1)
    assert verify(packed, workers=1) == []


def test_the_sample_is_named_or_that_all_are_whole(packed, container):
    records = np.load(packed / "index.npy")
    shard = packed / {"tar": "shard-000001.tar", "beton": "samples.beton"}[container]
    for sample_id in (3, 4):
        start, length = int(records["offset"][sample_id]), int(records["byte_count"][sample_id])
        for offset in (start, start + length - 1):
            flip(shard, offset)
            file, sample, *others = verify(packed, pixels=0, workers=1)
            assert (
                file.startswith(f"{shard.name} has the checksum ") and "copy it again or rerun data_prep/make_" in file
            )
            assert sample.startswith(f"sample {sample_id} (") and not others
            flip(shard, offset)
    flip(shard, 0)  # a header
    (finding,) = verify(packed, pixels=0, workers=1)
    assert "but its samples are whole" in finding


def test_processes_say_what_one_says(tmp_path):
    samples = [Sample(jpeg_of(8, 8 + i), 8, 9 + i, 0, f"a/{i}.jpg") for i in range(150)]  # whose widths are all wrong
    write_set(tmp_path / "set", samples, per_shard=50)
    several = verify(tmp_path / "set", workers=2)
    assert several == verify(tmp_path / "set", workers=1)
    assert several[0] == "index.npy says that sample 0 (a/0.jpg) in shard-000000.tar is 8 x 9 px, not 8 x 8."
    assert len(several) == 21 and several[-1] == "... and 130 more in the pixels"
    assert [sentence.split()[4] for sentence in verify(tmp_path / "set", pixels=4, workers=1)] == [
        "0",
        "49",
        "99",
        "149",
    ]
    assert len(verify(tmp_path / "set", pixels=0, all_pixels=True, workers=1)) == 21


def test_what_does_not_decode_is_told(tmp_path):
    sound = jpeg_of(30, 40)
    contents = [sound, sound[:300], b"no picture", sound[:-2]]  # the last one lacks its end marker only
    write_set(tmp_path / "set", [Sample(content, 30, 40, 0, f"a/{i}.jpg") for i, content in enumerate(contents)])
    found = verify(tmp_path / "set", workers=1)
    assert [sentence.split()[1] for sentence in found] == ["1", "2", "3"]
    assert all("cannot be decoded (" in sentence for sentence in found)


def test_files_that_are_missing_strange_or_too_many_are_told(packed, container):
    (packed / "shard-000077.tar").touch()
    (packed / "changed.jsonl").unlink()
    os.mkfifo(packed / "changed.jsonl")  # to open it would take for ever
    (packed / "rejected.jsonl").unlink()
    found = verify(packed, workers=1)
    assert found[0] == "shard-000077.tar is not of this set, by manifest.json: remove it."
    assert [sentence.split()[:4] for sentence in found[1:]] == [
        ["rejected.jsonl", "is", "missing,", "or"], ["changed.jsonl", "is", "missing,", "or"],
    ]  # fmt: skip


def test_an_index_of_another_run_is_told(packed):
    records = np.load(packed / "index.npy")
    records["label"][2] ^= 1
    np.save(packed / "index.npy", records)
    found = verify(packed, workers=1)
    assert "index.npy is not the one that manifest.json is of" in found[0] and found[1].startswith("index.npy has the")
    records["shard"][2] = 7
    np.save(packed / "index.npy", records)
    assert verify(packed, workers=1)[0].startswith("index.npy says what cannot be of sample 2: copy it again")
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["names"]["sample_count"] = 9
    (packed / "manifest.json").write_text(json.dumps(manifest))
    assert "contradicts itself in the number of samples (8 in all, 8 in the shards, 9 names)" in verify(packed)[0]


def test_settings_and_sets_that_cannot_be_are_refused(packed, tmp_path):
    with pytest.raises(ValueError, match=r"--pixels must not be negative. Found: -1\."):
        verify(packed, pixels=-1)
    with pytest.raises(ValueError, match=r"--workers must be at least 1. Found: 0\."):
        verify(packed, workers=0)
    with pytest.raises(ShardError, match=r"nowhere does not exist"):
        verify(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"nowhere does not exist"):
        verify(packed, against=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"label": 1}, "another label"),
        ({"height": 13, "width": 2}, "another height, width"),
        ({"name": "c.jpg"}, "another name"),
        ({"content": jpeg_of(12, 22, seed=9)}, "another byte_count, checksum"),
    ],
)
def test_samples_that_differ_from_another_sets_are_told(tmp_path, changes, said):
    samples = make_samples()
    write_set(tmp_path / "shards", samples)
    samples[2] = samples[2]._replace(**changes)
    write_set(tmp_path / "beton", samples, container="beton")
    found = verify(tmp_path / "shards", against=tmp_path / "beton/samples.beton", pixels=0, workers=1)
    assert len(found) == (said is not None)
    for sentence in found:
        assert f"{tmp_path / 'beton'} has sample 2 (" in sentence and said in sentence


def test_other_numbers_and_classes_are_told(tmp_path):
    write_set(tmp_path / "shards", make_samples())
    write_set(tmp_path / "other", make_samples()[:6], class_names=("a", "c"))
    found = verify(tmp_path / "shards", against=tmp_path / "other", workers=1)
    assert found[0] == f"{tmp_path / 'other'} has 6 samples where {tmp_path / 'shards'} has 8."
    assert found[1] == f"{tmp_path / 'other'} has other class names than {tmp_path / 'shards'}." and len(found) == 2
