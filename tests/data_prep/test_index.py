"""The shard folder: what is written is read back, other tools read it too, and damage is told in one sentence."""

import json
import multiprocessing
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_prep import index as shard_format
from data_prep.index import NO_LABEL, RAW, DatasetIndex, ShardError
from tests.packed import Sample, write_set

ROOT = Path(__file__).resolve().parents[2]


def write_samples(folder, count=7, *, per_shard=3, names=None, labels=None, container="tar"):
    """A set of made-up "JPEGs" of different lengths; the format never looks inside them."""
    jpegs = [bytes([i]) * (3000 + 517 * i) for i in range(count)]
    samples = [
        Sample(
            content=jpeg,
            height=10 + i,
            width=20 + i,
            label=labels[i] if labels else i % 2,
            name=names[i] if names else f"class_{i % 2}/picture {i}.JPEG",
        )
        for i, jpeg in enumerate(jpegs)
    ]
    return write_set(
        folder, samples, per_shard=per_shard, class_names=["class_0", "class_1"], container=container
    ), jpegs


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sample_comes_back_as_it_was_added(tmp_path):
    write_samples(tmp_path / "shards")
    index = DatasetIndex.open(tmp_path / "shards")
    assert len(index) == 7
    assert index.path == tmp_path / "shards"
    assert index.class_names == ("class_0", "class_1")
    assert index.manifest.shuffle_seed == 5
    sizes, labels = index.sizes([6, 0, 3]), index.labels(np.array([6, 0, 3]))
    assert sizes.tolist() == [[16, 26], [10, 20], [13, 23]] and sizes.dtype == np.int64
    assert labels.tolist() == [0, 0, 1] and labels.dtype == np.int64
    assert index.sizes([]).shape == (0, 2)
    assert index.name(3) == "class_1/picture 3.JPEG"
    assert index.describe(6) == "sample 6 (class_0/picture 6.JPEG) in shard-000002.tar"
    assert "array" not in repr(index)  # which a notebook shows


def test_the_checksums_and_counts_in_the_manifest_are_those_of_the_files(tmp_path):
    index, _ = write_samples(tmp_path / "shards")
    manifest = index.manifest
    lists = (manifest.rejected_list, manifest.changed_list)
    for stored in (manifest.index, manifest.names, *lists, *manifest.shards):
        content = (tmp_path / "shards" / stored.name).read_bytes()
        assert stored.byte_count == len(content)
        assert stored.checksum == xxhash.xxh3_128_hexdigest(content)
    assert sum(shard.sample_count for shard in manifest.shards) == manifest.num_samples == 7


def test_reading_gives_a_copy_that_was_checked(tmp_path):
    index, jpegs = write_samples(tmp_path / "shards")
    memory = np.zeros(7000, np.uint8)
    for i, jpeg in enumerate(jpegs):
        assert index.read(i).tobytes() == jpeg
        found = index.read(i, memory)
        assert found.tobytes() == jpeg and np.shares_memory(found, memory)
    with pytest.raises(ValueError, match="from 0 to 6. Found: 7"):
        index.read(7)
    with pytest.raises(ValueError, match="hold the 3517 bytes of sample 1. Found: 3516"):
        index.read(1, memory[:3516])


def test_reading_keeps_to_the_bound_on_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_format, "_max_open_files", lambda: 2)
    index, jpegs = write_samples(tmp_path / "shards", per_shard=1)
    for i in (0, 1, 2, 3, 6, 0):
        assert index.read(i).tobytes() == jpegs[i] and index.name(i)
        assert index._file.cache_info().currsize <= 2


@pytest.mark.parametrize(("how", "message"), [
    (lambda path: path.unlink(), "sample 0 .* cannot be read .shard-000000.tar is missing.: copy it again"),
    (lambda path: os.truncate(path, 700), "sample 0 .* is not whole, the shard was cut short after it was packed: copy"),
    (lambda path: path.write_bytes(b"x" * path.stat().st_size), "sample 0 .* is not as it was packed, its bytes have changed"),
])  # fmt: skip
def test_a_sample_that_changed_is_an_error_when_it_is_read(tmp_path, how, message):
    index, _ = write_samples(tmp_path / "shards")
    how(tmp_path / "shards/shard-000000.tar")
    index.expect([0, 1])  # says nothing yet
    with pytest.raises(ShardError, match=message):
        index.read(0)


def test_what_is_expected_is_where_it_will_be_read(tmp_path, monkeypatch):
    index, jpegs = write_samples(tmp_path / "shards")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, size, advice: asked.append(os.pread(fd, size, offset)))
    index.expect(np.array([6, 0, 3]))
    assert asked == [jpegs[6], jpegs[0], jpegs[3]]


def test_names_keep_bytes_that_are_not_utf8_and_odd_characters(tmp_path):
    names = ["plain.jpg", b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), "dröm 夢.jpg", "return\r\x85\u2028.jpg"]
    index, _ = write_samples(tmp_path / "shards", 4, names=names)
    assert [index.name(i) for i in range(4)] == names
    assert (tmp_path / "shards/names.txt").read_bytes().split(b"\n")[1] == b"caf\xe9.jpg"


def test_a_sample_without_label_has_no_cls_member_and_an_unusable_label(tmp_path):
    index, _ = write_samples(tmp_path / "shards", 2, labels=[NO_LABEL, 1])
    assert index.labels([0, 1]).tolist() == [NO_LABEL, 1]
    with tarfile.open(tmp_path / "shards/shard-000000.tar") as tar:
        assert tar.getnames() == ["000000_000000.jpg", "000000_000001.jpg", "000000_000001.cls"]
    with pytest.raises(IndexError):
        index.class_names[index.labels(0)]


@pytest.mark.parametrize("ids", [[-1], [7], [0, 7], [-1, 7]])
def test_ids_out_of_range_are_refused(tmp_path, ids):
    index, _ = write_samples(tmp_path / "shards")
    for read in (index.sizes, index.labels):
        with pytest.raises(ValueError, match=r"must be from 0 to 6. Found: (-1|7)\."):
            read(ids)
    for read_one in (index.name, index.read, index.describe):
        with pytest.raises(ValueError, match=r"must be from 0 to 6. Found: (-1|7)\."):
            read_one(ids[-1])
    with pytest.raises(ValueError, match=r"must be integers. Found: float64"):
        index.sizes([0.0])


def _read_in_child(index, connection):
    connection.send((index.read(6).tobytes(), index.name(6)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_index_works_in_another_process(tmp_path, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    index, jpegs = write_samples(tmp_path / "shards")
    index.read(0)
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_read_in_child, args=(index, sender))
    child.start()
    sender.close()  # so that a child that dies ends `recv`
    assert receiver.recv() == (jpegs[6], index.name(6))
    child.join()


# ------------------------------------------------------------------------------------------ damage, and its message


def assert_refused(folder, *parts):
    """`open` fails with one sentence that has all the parts."""
    with pytest.raises(ShardError) as caught:
        DatasetIndex.open(folder)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_a_shortened_shard(tmp_path):
    write_samples(tmp_path / "shards")
    path = tmp_path / "shards/shard-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:10_000])
    assert assert_refused(tmp_path / "shards") == (
        f"{path} is 10000 bytes long where the manifest says {len(whole)}; it was cut short: copy it again or rerun "
        "data_prep/make_dali.py."
    )
    path.write_bytes(whole + b"more")
    assert_refused(tmp_path / "shards", f"is {len(whole) + 4} bytes long", "was changed after it was packed")


def test_a_missing_file(tmp_path):
    write_samples(tmp_path / "shards")
    for name in ("shard-000002.tar", "names.txt", "index.npy"):
        path = tmp_path / "shards" / name
        content = path.read_bytes()
        path.unlink()
        assert_refused(tmp_path / "shards", f"{path} is missing: copy it again or rerun data_prep/make_dali.py.")
        path.write_bytes(content)
    DatasetIndex.open(tmp_path / "shards")


def test_another_version(tmp_path):
    write_samples(tmp_path / "shards")
    edit_manifest(tmp_path / "shards", version=1)
    assert assert_refused(tmp_path / "shards") == (
        f"{tmp_path / 'shards/manifest.json'} is no manifest that this program reads (it is in inscon-shards 1, not in "
        "inscon-shards 2): copy it again, pack the pictures again, or install the version of inscon that wrote it."
    )


def test_an_index_of_another_length(tmp_path):
    write_samples(tmp_path / "shards")
    path = tmp_path / "shards/index.npy"
    np.save(path, np.load(path)[:4])
    assert_refused(tmp_path / "shards", f"{path} is ", "it was cut short")
    path.write_bytes((tmp_path / "shards/index.npy").read_bytes() + bytes(3 * 48))
    assert_refused(tmp_path / "shards", f"{path} is not the index of this set")


def test_an_index_that_is_no_index(tmp_path):
    write_samples(tmp_path / "shards")
    path = tmp_path / "shards/index.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert_refused(tmp_path / "shards", f"is {len(whole) - 1} bytes long", "it was cut short")
    path.write_bytes(b"")
    assert_refused(tmp_path / "shards", "is 0 bytes long", "it was cut short")
    path.write_bytes(b"x" * len(whole))
    assert_refused(tmp_path / "shards", f"{path} is not the index of this set")


def test_a_manifest_that_is_none(tmp_path):
    write_samples(tmp_path / "shards")
    manifest = tmp_path / "shards/manifest.json"
    entries = json.loads(manifest.read_text())
    manifest.write_text("{")
    assert_refused(tmp_path / "shards", f"{manifest} is no manifest that this program reads", "copy it again")
    manifest.write_text("[]")
    assert_refused(tmp_path / "shards", "is no manifest that this program reads")
    for field in entries.keys() - {"format", "version", "ignored"}:  # which is not in every set
        manifest.write_text(json.dumps({name: value for name, value in entries.items() if name != field}))
        assert_refused(tmp_path / "shards", "is no manifest that this program reads", field)


def test_a_folder_that_is_no_shard_folder(tmp_path):
    command = "python data_prep/make_dali.py --data DIR --out"
    assert_refused(tmp_path / "nowhere", f"{tmp_path / 'nowhere'} is no packed set", command)
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", f"{tmp_path / 'empty'} is no packed set", command)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    assert_refused(tmp_path / "photos", "is no packed set, it holds no manifest.json", command)
    assert_refused(tmp_path / "photos/a.jpg", "a.jpg is no packed set")


def test_an_unfinished_folder(tmp_path):
    write_samples(tmp_path / "shards")
    (tmp_path / "shards/manifest.json").unlink()
    assert_refused(tmp_path / "shards", "it holds no manifest.json")
    (tmp_path / "shards/packing").mkdir()
    assert_refused(tmp_path / "shards", "whose packing did not end: run the command that packs it once more")


def test_an_index_of_another_set(tmp_path):
    write_samples(tmp_path / "shards")
    path = tmp_path / "shards/index.npy"
    records = np.load(path)
    records["shard"][-1] = 9
    np.save(path, records)
    assert_refused(tmp_path / "shards", "points outside the shards or the names")


def test_a_beton_is_opened_like_shards_and_by_its_own_name(tmp_path):
    tar, jpegs = write_samples(tmp_path / "tar")
    write_samples(tmp_path / "beton", container="beton")
    for path in (tmp_path / "beton", tmp_path / "beton/samples.beton"):
        index = DatasetIndex.open(path)
        assert [index.read(i).tobytes() for i in range(7)] == jpegs
        assert [index.name(i) for i in range(7)] == [tar.name(i) for i in range(7)]
        assert index.fingerprint == tar.fingerprint
        assert index.describe(6) == "sample 6 (class_0/picture 6.JPEG) in samples.beton"


def test_a_foreign_beton(tmp_path):
    (tmp_path / "theirs.beton").write_bytes(b"whatever")
    command = "python data_prep/make_ffcv.py --data DIR --out SHARDS"
    assert_refused(tmp_path / "theirs.beton", "theirs.beton is no packed set", command)
    assert_refused(tmp_path / "none.beton", "none.beton is no packed set", command)


def test_raw_pixels_are_no_jpeg(tmp_path):
    samples = [Sample(bytes(600), encoding=RAW), Sample(b"jpeg")]
    index = write_set(tmp_path / "beton", samples, container="beton")
    assert len(index.read(0, pixels=True)) == 600 and index.read(1).tobytes() == b"jpeg"
    with pytest.raises(ShardError, match=r"sample 0 .* is stored as raw pixels: read this set with --pipeline ffcv"):
        index.read(0)


def test_records_are_what_lies_there(tmp_path):
    index, jpegs = write_samples(tmp_path / "shards")
    records = index.records([6, 0])
    assert records["checksum"].tolist() == [xxhash.xxh3_64_intdigest(jpegs[6]), xxhash.xxh3_64_intdigest(jpegs[0])]
    assert records["byte_count"].tolist() == [len(jpegs[6]), len(jpegs[0])]
    with pytest.raises(ValueError, match="must be from 0 to 6"):
        index.records([7])


def test_a_fingerprint_tells_data_sets_apart(tmp_path):
    first, _ = write_samples(tmp_path / "a")
    again, _ = write_samples(tmp_path / "b")
    assert first.fingerprint == again.fingerprint == DatasetIndex.open(tmp_path / "a").fingerprint
    others = [write_samples(tmp_path / "c", labels=[1] * 7)[0], write_samples(tmp_path / "d", 6)[0]]
    assert len({index.fingerprint for index in [first, *others]}) == 3


def test_pixels_are_read_where_they_will_do(tmp_path):
    index = write_set(tmp_path / "set", [Sample(bytes(range(60)), 4, 5, encoding=RAW)] * 3, container="beton")
    assert index.read(1, pixels=True).tolist() == list(range(60))
    with pytest.raises(ShardError, match="is stored as raw pixels"):
        index.read(1)


def test_messages_name_the_command_that_packs_such_a_set(tmp_path):
    for container, command in (("tar", "make_dali.py"), ("beton", "make_ffcv.py")):
        folder = tmp_path / container
        index = write_set(folder, [Sample(b"abc")] * 3, container=container)
        assert index.manifest.packer == f"data_prep/{command}"
        os.truncate(folder / index.manifest.shards[0].name, 1)
        with pytest.raises(ShardError, match=rf"cut short: copy it again or rerun data_prep/{command}"):
            DatasetIndex.open(folder)
