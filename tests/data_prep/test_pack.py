"""Packing: whatever stops it, the same command goes on; pictures and settings alone decide a byte; others read the sets."""

import contextlib
import gc
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
import xxhash
from PIL import Image

from data_prep import beton as beton_module
from data_prep import pack as pack_module
from data_prep.beton import HEADER_DTYPE
from data_prep.index import NO_LABEL, DatasetIndex, ShardError
from data_prep.make_dali import pack_folder
from data_prep.make_ffcv import pack_beton
from data_prep.pack import PackConfig, Ranks, pack, tar_header
from inscon.guard import only_process
from tests.data_prep.pictures_for_tests import (
    ARITHMETIC_JPEG,
    contents,
    encoded,
    exif_turned,
    jpeg_of,
    listed,
    noisy_jpeg,
    picture,
    two_classes,
    write_files,
)

ROOT = Path(__file__).resolve().parents[2]
PACKERS = {"tar": pack_folder, "beton": pack_beton}
SCRIPTS = {"tar": "make_dali.py", "beton": "make_ffcv.py"}


@pytest.fixture(params=PACKERS)
def container(request):
    return request.param


@pytest.fixture
def packer(container):
    return PACKERS[container]


@dataclass(frozen=True, kw_only=True)
class SmallShards(PackConfig):
    container, writer, shard_mb = "tar", "test", 1
    shard_bytes: int = 6000


@dataclass(frozen=True, kw_only=True)
class SmallParts(SmallShards):
    container = "beton"


def run_pack(data, out, container="tar", *, ranks=None, **settings):
    config = {"tar": SmallShards, "beton": SmallParts}[container]
    return pack(config(data=data, out=out, **{"workers": 1, **settings}), ranks=ranks)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_classes(tmp_path_factory.mktemp("pictures"), 60)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """What an undisturbed run writes, by container."""
    out = tmp_path_factory.mktemp("undisturbed")
    return {kind: contents(run_pack(data, out / kind, kind).path) for kind in PACKERS}


# ------------------------------------------------------------------------------------------------- the same bytes


def test_workers_do_not_change_a_byte(tmp_path, data, undisturbed, container):
    assert contents(run_pack(data, tmp_path / "out", container, workers=3).path) == undisturbed[container]
    assert len(undisturbed["tar"]) > 2 * 5  # several shards, or the above says nothing


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_do_not_change_a_byte_whichever_begins(tmp_path, data, undisturbed, container, first):
    def rank(number):
        return run_pack(data, tmp_path / "out", container, ranks=Ranks(number, 2))

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(rank, first)
        time.sleep(0.3)
        index = rank(1 - first) or running.result()
        assert running.result() is None or index == running.result()
    assert contents(tmp_path / "out") == undisturbed[container]
    assert rank(1) is None and contents(tmp_path / "out") == undisturbed[container]  # a rank that is run once more


def test_torchrun_with_two_ranks(tmp_path):
    data = two_classes(tmp_path / "data", 30)
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [str(ROOT / "data_prep/make_dali.py"), "--data", str(data), "--out", str(tmp_path / f"out_{ranks}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "This rank has nothing left to write; rank 0 joins." in done.stdout
    assert contents(tmp_path / "out_1") == contents(tmp_path / "out_2")


def test_the_order_is_one_shuffle_of_all_classes(tmp_path):
    data = write_files(tmp_path / "data", {f"{i // 100}/{i % 100:02d}.jpg": jpeg_of(4, 4) for i in range(400)})
    index = pack_folder(data, tmp_path / "out")
    labels = index.labels(range(400))
    assert 200 < np.count_nonzero(np.diff(labels)) < 399  # of 399 neighbors, 3 in 4 differ in a random order
    assert {len(set(labels[start : start + 50])) for start in range(0, 400, 50)} == {4}
    other = pack_folder(data, tmp_path / "other", seed=1)
    assert [other.name(i) for i in range(400)] != [index.name(i) for i in range(400)]


def test_the_manifest_says_nothing_of_the_run(data, undisturbed):
    manifest = json.loads(undisturbed["tar"]["manifest.json"])
    assert manifest["settings"].keys() == {
        "writer", "shard_mb", "short_side", "max_resolution", "quality", "chroma", "write_mode",
    }  # fmt: skip
    assert str(data) not in undisturbed["tar"]["manifest.json"].decode()


# ------------------------------------------------------------------------------------------------- stopped and gone on


TOUCHING = "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "sqlite3.connect", "shutil.rmtree"


class Killed(BaseException):
    """Stands for the end of the process: from then on nothing below the folder is touched any more."""


class Kill:
    """Counts what the process does with files below a folder, and kills it at one of these moments."""

    folder, at, count = None, 0, 0

    def __call__(self, event, arguments):
        if self.folder is None or event not in TOUCHING:
            return
        paths = (os.fsdecode(argument) for argument in arguments if isinstance(argument, (str, bytes, Path)))
        if any(self.folder in path for path in paths):
            self.count += 1
            if self.at and self.count >= self.at:
                raise Killed


@pytest.fixture(scope="module")
def kill():
    hook = Kill()
    sys.addaudithook(hook)  # for good, so it is idle between the tests
    return hook


def test_killed_at_any_moment_and_started_again(tmp_path, undisturbed, container, kill):
    """At every sixth moment that something on the disk is opened, renamed or removed."""
    data = two_classes(tmp_path / "data", 12)
    expected = contents(run_pack(data, tmp_path / "whole", container).path)
    kill.folder, kill.at, kill.count = str(tmp_path / "whole2"), 0, 0
    run_pack(data, tmp_path / "whole2", container)
    moments, kill.folder = kill.count, None
    assert moments > 40
    stopped = 0
    for at in range(1 + (container == "beton"), moments + 1, 6):
        out = tmp_path / f"out_{at}"
        kill.folder, kill.at, kill.count = str(out), at, 0
        try:
            run_pack(data, out, container)
        except (Killed, ValueError, OSError, RuntimeError):
            stopped += 1
        kill.folder = None
        gc.collect()  # closes what the end of a process would close
        try:
            run_pack(data, out, container)
        except ShardError as error:  # killed after the last file was there
            assert "already holds a packed data set" in str(error)
        assert contents(out) == expected, f"killed at moment {at} of {moments}"
        shutil.rmtree(out)
    assert stopped > moments // 12


SLOW = """
import sys, time
from data_prep import pack
from tests.data_prep.test_pack import run_pack
inner = pack.prepare_picture
pack.prepare_picture = lambda *arguments: (time.sleep(0.03), inner(*arguments))[1]
if __name__ == "__main__":
    kind, data, out = sys.argv[1:]
    run_pack(pack.Path(data), pack.Path(out), kind, workers=2)
"""


def start_slowly(tmp_path, data, container, **options):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), container, str(data), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def wait_for_reports(running, out, count):
    while len(list(out.glob("packing/*.report"))) < count:
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)


def test_a_sigkill_between_two_shards(tmp_path, data, undisturbed, container):
    running = start_slowly(tmp_path, data, container)
    wait_for_reports(running, tmp_path / "out", 3)
    running.kill()
    running.communicate()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/packing/*.report")}
    assert done and not (tmp_path / "out/manifest.json").exists()
    (tmp_path / "out/index.npy.host-1-2.unfinished").touch()  # as if it had been killed later
    looked_at = []
    with pytest.MonkeyPatch.context() as patch:
        inner = pack_module.prepare_picture
        patch.setattr(pack_module, "prepare_picture", lambda *given: looked_at.append(1) or inner(*given))
        run_pack(data, tmp_path / "out", container)
    assert len(looked_at) < 60  # finished shards are not written again
    assert contents(tmp_path / "out") == undisturbed[container]


def test_a_worker_that_dies_is_one_sentence(tmp_path, data, undisturbed):
    running = start_slowly(tmp_path, data, "tar")
    wait_for_reports(running, tmp_path / "out", 1)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    message = running.communicate()[1].strip().splitlines()[-1]
    assert (
        running.returncode == 1 and "A worker process died while it was packing: run the same command again" in message
    )
    assert not list((tmp_path / "out").rglob("*.unfinished"))
    run_pack(data, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed["tar"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_state_that_goes_on(tmp_path, number):
    data = two_classes(tmp_path / "data", 600)
    arguments = ["--data", data, "--out", tmp_path / "out", "--workers", "2"]
    command = [sys.executable, str(ROOT / "data_prep/make_dali.py"), *map(str, arguments)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "out/packing/job.json").exists():
        time.sleep(0.005)
    os.killpg(running.pid, number)
    message = running.communicate()[1]
    assert running.returncode == (130 if number == signal.SIGINT else 143) and "Traceback" not in message, message
    if number == signal.SIGINT:
        assert f"what is finished lies in {tmp_path / 'out'}, the same command goes on" in message.splitlines()[-1]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert len(DatasetIndex.open(tmp_path / "out")) == 600


def test_a_disk_that_is_full(tmp_path, container):
    """A limit on the size of files stands in for a full disk: the same call fails, for another reason."""
    data = write_files(tmp_path / "data", {f"{i}.jpg": jpeg_of(90, 90, seed=i, quality=95) for i in range(40)})
    command = [
        sys.executable,
        str(ROOT / "data_prep" / SCRIPTS[container]),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
    ]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    full = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    message = full.stderr.strip().splitlines()[-1]
    assert full.returncode == 1 and "File too large" in message, full.stderr
    assert message.endswith("see to that and run the same command again, it goes on where it stopped.")
    assert not list((tmp_path / "out").rglob("*.unfinished"))  # what was half written is given back
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert contents(tmp_path / "out") == contents(PACKERS[container](data, tmp_path / "straight").path)


def test_a_disk_that_is_full_before_anything_is_listed(tmp_path, data, small_files):
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with small_files(5000), pytest.raises(OSError, match=r"^\S*listing.sqlite cannot be written: disk I/O error$"):
            run_pack(data, tmp_path / "out")
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "out").exists()


def test_a_source_that_vanishes(tmp_path, undisturbed, data, monkeypatch):
    here, away = tmp_path / "pictures", tmp_path / "away"
    shutil.copytree(data, here)
    inner, calls = pack_module.prepare_picture, []

    def unmount_at_30(*arguments):
        calls.append(1)
        if len(calls) == 30:
            here.rename(away)
        return inner(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "prepare_picture", unmount_at_30)
        with pytest.raises(ValueError, match=r"was there when the pictures were listed and cannot be read now"):
            run_pack(here, tmp_path / "out")
    with pytest.raises(ValueError, match="pictures does not exist"):
        run_pack(here, tmp_path / "out")
    away.rename(here)
    run_pack(here, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed["tar"]


def stopped_in_rank_0(data, out, container):
    """All shards of both ranks are written, none is joined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_pack(data, out, container)


def test_what_is_lost_after_its_report_is_written_again(tmp_path, data, undisturbed, container):
    out = tmp_path / "out"
    stopped_in_rank_0(data, out, container)
    if container == "tar":
        first, second, *_ = sorted(out.glob("shard-*.tar"))
        os.truncate(first, 10)
        second.unlink()
        (out / "packing/shard-000002.report").unlink()
    else:
        os.truncate(out / "packing/samples.beton", 1 << 20)
        (out / "packing/shard-000000.report").unlink()
    run_pack(data, out, container)
    assert contents(out) == undisturbed[container]


def test_a_shard_of_a_beton_that_was_damaged_is_written_again(tmp_path, data, undisturbed):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module.BetonFile, "lay", lambda *_: None)
        patch.setattr(pack_module, "join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_pack(data, out, "beton")
    shard = out / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 4
    shard.write_bytes(content)
    with pytest.raises(ShardError, match="is not as it was written: run the same command again"):
        run_pack(data, out, "beton")
    run_pack(data, out, "beton")
    assert contents(out) == undisturbed["beton"]


def test_a_shard_whose_laying_failed_is_laid_at_the_same_place(tmp_path, data, undisturbed, monkeypatch):
    """As by the next of many workers, which hears of it later."""
    fails, digest, lay = iter([False] * 5 + [True]), xxhash.xxh3_64_intdigest, pack_module.BetonFile.lay

    def moody(content):
        if next(fails, False):
            raise OSError(28, "No space left on device")
        return digest(content)

    def twice(beton):
        with contextlib.suppress(OSError):
            lay(beton)
        lay(beton)

    monkeypatch.setattr(beton_module, "xxhash", SimpleNamespace(xxh3_64_intdigest=moody))
    monkeypatch.setattr(pack_module.BetonFile, "lay", twice)
    run_pack(data, tmp_path / "out", "beton")
    assert contents(tmp_path / "out") == undisturbed["beton"] and not list(fails)


# ---------------------------------------------------------------------------------------------------- refusals


def test_two_writers_on_one_target(tmp_path, data):
    with (
        only_process(tmp_path / "out/packing/rank-0", "--out"),
        pytest.raises(ValueError, match=rf"another process works in .*out.* \(process {os.getpid()} on .*\); wait"),
    ):
        run_pack(data, tmp_path / "out")
    assert len(run_pack(data, tmp_path / "out")) == 60


def test_other_settings_are_not_mixed_in(tmp_path, data, undisturbed):
    out = tmp_path / "out"
    write_files(tmp_path / "bad", {"a/1.jpg": b"text", "a/2.jpg": jpeg_of()})
    with pytest.raises(ValueError):
        run_pack(tmp_path / "bad", out)
    for settings, message in (
        ({"seed": 3}, r"other settings \(seed None, now 3\)"),
        ({"shard_bytes": 7000}, r"other settings \(shard_mb 0.006, now 0.007\)"),
    ):
        for ranks in (None, Ranks(1, 2)):
            with pytest.raises(ShardError, match=f"{message}: run it as it was begun, pass --overwrite"):
                run_pack(tmp_path / "bad", out, ranks=ranks, **settings)
    job = out / "packing/job.json"
    job.write_text(json.dumps(json.loads(job.read_text()) | {"of_a_later_version": 1}))
    with pytest.raises(ShardError, match=r"other settings \(of_a_later_version 1, now None\)"):
        run_pack(tmp_path / "bad", out)
    run_pack(data, out, overwrite=True)
    assert contents(out) == undisturbed["tar"]
    with pytest.raises(ShardError, match="already holds a packed data set .*: pass --overwrite to replace it, or give"):
        run_pack(data, out)


def test_too_many_bad_pictures_stop_the_run_and_a_higher_limit_goes_on(tmp_path):
    good = {f"a/{i}.jpg": jpeg_of(seed=i) for i in range(18)}
    data = write_files(tmp_path / "data", good | {"a/text.jpg": b"text", "a/empty.jpg": b""})
    for settings in ({}, {"bad_limit": 0.05}):
        with pytest.raises(ValueError, match=r"2 of 20 pictures cannot be packed, such as a/.*--bad-limit"):
            run_pack(data, tmp_path / "out", **settings)
    index = run_pack(data, tmp_path / "out", bad_limit=0.1)
    assert len(index) == 18 and listed(tmp_path / "out", "rejected.jsonl").keys() == {"a/text.jpg", "a/empty.jpg"}
    with pytest.raises(ValueError, match=r"1 of \d+ pictures looked at so far .* such as a/(text|empty).jpg: "):
        run_pack(data, tmp_path / "failing", bad_limit=0.0)
    write_files(tmp_path / "none", {"text.jpg": b"text", "empty.jpg": b""})
    with pytest.raises(ValueError, match="holds no picture that can be packed; give another --data"):
        run_pack(tmp_path / "none", tmp_path / "nothing", bad_limit=1.0)
    assert not (tmp_path / "nothing").exists()


def test_a_list_whose_pictures_are_elsewhere_says_where_they_were_looked_for(tmp_path):
    """And both remedies that are named help."""
    data = two_classes(tmp_path / "data", 20)
    names = sorted(str(path.relative_to(data)) for path in data.rglob("*.jpg"))
    path, out = tmp_path / "lists/list.txt", tmp_path / "out"
    write_files(tmp_path, {"lists/list.txt": "\n".join(names).encode()})
    with pytest.raises(ValueError, match=rf"20 of 20 .*\(a list's paths start at {tmp_path}/lists\)"):
        run_pack(path, out)
    path.write_text("\n".join(str(data / name) for name in names))
    with pytest.raises(
        ValueError, match=r"20 of 20 .*: raise the limit, .* remove the folder packing in --out and pass"
    ):
        run_pack(path, out)
    shutil.rmtree(out / "packing")
    assert len(run_pack(path, out, overwrite=True)) == 20


def test_a_large_source_is_not_looked_through_to_the_end(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(f"{i}.jpg" for i in range(3000)))
    with pytest.raises(ValueError, match=r"1000 of 1000 pictures looked at so far \(there are 3000\)"):
        run_pack(tmp_path / "list.txt", tmp_path / "out")


@pytest.mark.parametrize(
    ("container", "settings", "message"),
    [
        ("tar", {"seed": -1}, r"--seed must be from 0 to 18446744073709551615. Found: -1"),
        ("tar", {"workers": 0}, "--workers must be at least 1. Found: 0"),
        ("tar", {"bad_limit": 1.5}, "--bad-limit must be from 0 to 1. Found: 1.5"),
        ("tar", {"shard_mb": 0}, "--shard-mb must be at least 1. Found: 0"),
        ("tar", {"short_side": 0}, "--short-side must be at least 1. Found: 0"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, container, settings, message):
    with pytest.raises(ValueError, match=message):
        PACKERS[container](tmp_path, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="is inside --data"):
        run_pack(data, data / "shards")
    with pytest.raises(ValueError, match="nowhere does not exist; give a folder, a list file or a tar to --data"):
        run_pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="file.* cannot be written .*; set another --out"):
        run_pack(data, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        run_pack(tmp_path / "empty", tmp_path / "out")
    assert not (data / "shards").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["samples.beton", "shard-000000.tar"])
def test_a_set_is_not_replaced_by_what_is_packed_from_it(tmp_path, data, name):
    out = run_pack(data, tmp_path / "out", "beton" if "beton" in name else "tar").path
    before = contents(out)
    with pytest.raises(ValueError, match=rf"{name} is part of --out .*out, to be replaced; give another"):
        run_pack(out / name, out, overwrite=True)
    assert contents(out) == before


# ------------------------------------------------------------------------------------------------ the hostile set

BYTE_FOR_BYTE = {
    "good/plain.jpg": jpeg_of(64, 64),
    "good/one pixel.jpg": jpeg_of(1, 1),
    "good/gray.JPEG": jpeg_of(9, 5, "L"),
    "good/progressive.Jpg": jpeg_of(33, 47, progressive=True),
    "good/wide.jpeg": jpeg_of(20, 20_000),
    "good/nine megabytes.jpg": noisy_jpeg(9_300_000),
    "good/größe 夢.jpg": jpeg_of(seed=1),
    "good/same name.jpg": jpeg_of(seed=2),
    "other/same name.jpg": jpeg_of(seed=3),
    "other/arithmetic.jpg": ARITHMETIC_JPEG,
}
LATIN_1 = b"other/caf\xe9.jpg".decode("utf-8", "surrogateescape")
DEEP = encoded(Image.fromarray(np.full((5, 6), 256 * 200, np.uint16)), "PNG")
CHANGED = {
    "good/cmyk.jpg": (jpeg_of(8, 8, "CMYK"), ["CMYK"], (8, 8)),
    "good/png.jpg": (encoded(picture(11, 12), "PNG"), ["PNG"], (11, 12)),
    "good/webp.JPEG": (encoded(picture(11, 12), "WEBP"), ["WEBP"], (11, 12)),
    "good/turned.jpg": (exif_turned(), ["EXIF orientation"], (40, 16)),
    "good/deep.png": (DEEP, ["PNG", "16 bit"], (5, 6)),
}
BAD = {
    "good/truncated.jpg": (jpeg_of(64, 64)[:400], "damaged"),
    "good/header only.jpg": (jpeg_of()[:20], "damaged"),
    "good/empty.jpg": (b"", "empty"),
    "good/text.jpg": (b"this is text", "not a picture"),
    "good/line\nbreak.jpg": (jpeg_of(), "line break"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_files(folder, BYTE_FOR_BYTE | {LATIN_1: jpeg_of(seed=4)})
    write_files(folder, {name: content for name, (content, *_) in {**CHANGED, **BAD}.items()})
    (folder / "good/dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "good/loop.jpg").symlink_to(folder / "good/loop.jpg")
    os.mkfifo(folder / "good/fifo.jpg")  # opened, it would hang
    return folder


@pytest.fixture(scope="module")
def packed_hostile(hostile, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed_hostile")
    return {kind: packer(hostile, out / kind, bad_limit=0.5) for kind, packer in PACKERS.items()}


def test_what_is_sound_is_in_and_what_is_not_is_named(packed_hostile, container):
    index = packed_hostile[container]
    by_name = {index.name(i): i for i in range(len(index))}
    assert by_name.keys() == BYTE_FOR_BYTE.keys() | {LATIN_1} | CHANGED.keys()
    for name, content in BYTE_FOR_BYTE.items():
        assert index.read(by_name[name]).tobytes() == content, name
    changes = listed(index.path, "changed.jsonl")
    assert changes.keys() == CHANGED.keys()
    assert index.manifest.changed == {"16 bit": 1, "CMYK": 1, "EXIF orientation": 1, "PNG": 2, "WEBP": 1}
    for name, (_, kinds, size) in CHANGED.items():
        assert changes[name] == kinds
        assert tuple(index.sizes(by_name[name])) == size
        with Image.open(io.BytesIO(index.read(by_name[name]))) as image:
            assert image.format == "JPEG" and (image.height, image.width) == size and not image.getexif()
    reasons = listed(index.path, "rejected.jsonl")
    for name, (_, reason) in BAD.items():
        assert reason in reasons.pop(name), name
    assert reasons.pop("good/dangling.jpg") == "unreadable: No such file or directory"
    assert "symbolic links" in reasons.pop("good/loop.jpg")
    assert "not a regular file" in reasons.pop("good/fifo.jpg")
    assert reasons == {} and sum(index.manifest.rejected.values()) == len(BAD) + 3
    assert index.class_names == ("good", "other")
    assert all(index.class_names[index.labels(i)] == name.split("/")[0] for name, i in by_name.items())


def test_both_writers_say_the_same(packed_hostile):
    tar, beton = packed_hostile["tar"], packed_hostile["beton"]
    assert tar.fingerprint == beton.fingerprint
    for name in ("names.txt", "rejected.jsonl", "changed.jsonl"):
        assert (tar.path / name).read_bytes() == (beton.path / name).read_bytes()
    assert tar.manifest.changed == beton.manifest.changed and tar.manifest.rejected == beton.manifest.rejected
    assert beton.records(range(len(beton)))["byte_count"].max() > 1 << 23  # so the page has grown
    assert np.fromfile(beton.path / "samples.beton", HEADER_DTYPE, 1)["page_size"] == 1 << 24


# ------------------------------------------------------------------------------------- other people's programs


def test_tarfile_and_webdataset_read_the_shards(packed_hostile):
    wds = pytest.importorskip("webdataset", reason="the webdataset package is not installed")
    index = packed_hostile["tar"]
    paths = [str(index.path / shard.name) for shard in index.manifest.shards]
    samples = list(wds.WebDataset(paths, shardshuffle=False))
    assert [sample["jpg"] for sample in samples] == [index.read(i).tobytes() for i in range(len(index))]
    assert [int(sample["cls"]) for sample in samples] == index.labels(range(len(index))).tolist()
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    assert found == [sample["jpg"] for sample in samples]


READ_WITH_FFCV = """
import sys, numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.reader import Reader
for path, out, os_cache in ((*sys.argv[1:3], False), (*sys.argv[3:5], True)):
    reader, images, labels = Reader(path), [], []
    pipelines = {"image": [CenterCropRGBImageDecoder((48, 48), ratio=1)], "label": [IntDecoder()]}
    for image, label in Loader(path, batch_size=2, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                               os_cache=os_cache, pipelines=pipelines):
        images.append(np.array(image)), labels.append(np.array(label)[:, 0])
    np.savez(out, images=np.concatenate(images), labels=np.concatenate(labels), widths=reader.metadata["f0"]["width"])
"""


def test_ffcvs_own_loader_reads_jpegs_and_raw_pixels(packed_hostile, tmp_path):
    """Page by page, as its process cache does, and mapped. FFCV 1.0.2 makes every uint8 array of a process read-only."""
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    data = write_files(
        tmp_path / "data", {f"{i}.jpg": jpeg_of(48, 48, seed=i, quality=20 + 79 * (i % 2)) for i in range(6)}
    )
    raw = pack_beton(data, tmp_path / "raw", write_mode="raw")
    index = packed_hostile["beton"]
    arguments = [
        index.path / "samples.beton",
        tmp_path / "jpg.npz",
        raw.path / "samples.beton",
        tmp_path / "raw.npz",
    ]
    done = subprocess.run(
        [sys.executable, "-c", READ_WITH_FFCV, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    read = np.load(tmp_path / "jpg.npz")
    assert read["labels"].tolist() == index.labels(range(len(index))).tolist()
    assert read["widths"].tolist() == index.sizes(range(len(index)))[:, 1].tolist()
    for i in range(len(index)):
        if index.name(i) not in ("good/one pixel.jpg", "good/gray.JPEG"):
            image = Image.open(io.BytesIO(index.read(i))).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            expected = image.crop((left, top, left + side, top + side)).resize((48, 48), Image.Resampling.BOX)
            assert np.abs(read["images"][i].astype(int) - np.asarray(expected)).mean() < 8, index.name(i)
    read = np.load(tmp_path / "raw.npz")
    assert set(raw.records(range(6))["encoding"]) == {1}
    for i in range(6):
        expected = np.asarray(Image.open(data / raw.name(i)))
        assert np.array_equal(raw.read(i, pixels=True).reshape(48, 48, 3), expected)
        assert np.array_equal(read["images"][i], expected)


@pytest.mark.parametrize("byte_count", [0, 511, 512, 99_999_999, 8**11 - 1])
def test_tar_headers_are_tarfiles(byte_count):
    for name in ("000000_000000.jpg", "123456_1234567.cls"):
        member = tarfile.TarInfo(name)
        member.size = byte_count
        assert tar_header(name, byte_count) == member.tobuf(tarfile.USTAR_FORMAT)


# ---------------------------------------------------------------------------------------------------- sources, options


def tar_of(files):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return whole.getvalue()


def test_the_same_pictures_from_a_folder_a_list_and_a_tar_of_tars(tmp_path, packer):
    data = two_classes(tmp_path / "data", 30)
    pictures = {str(path.relative_to(data)): path.read_bytes() for path in sorted(data.rglob("*.jpg"))}
    lines = [f"{data / name}\t{name.split('/')[0]}\n" for name in pictures]
    inner = {
        f"{c}.tar": tar_of({n.split("/")[1]: p for n, p in pictures.items() if n.startswith(c)}) for c in ("cat", "ape")
    }
    write_files(tmp_path, {"list.tsv": "".join(lines).encode(), "ILSVRC2012_img_train.tar": tar_of(inner)})
    from_folder = packer(data, tmp_path / "from_folder")
    from_tar = packer(tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "from_tar")
    from_list = packer(tmp_path / "list.tsv", tmp_path / "from_list")
    assert contents(from_tar.path) == contents(from_folder.path)
    assert from_list.class_names == from_folder.class_names
    for i in range(30):
        name, content = from_list.name(i), from_list.read(i).tobytes()
        assert any(name.endswith(n) and content == p for n, p in pictures.items())
        assert from_list.class_names[from_list.labels(i)] in name


def test_a_flat_folder_has_no_labels(tmp_path, packer):
    data = write_files(tmp_path / "data", {"b.jpg": jpeg_of(), "a.jpg": jpeg_of(), "notes.txt": b"no picture"})
    index = packer(data, tmp_path / "out")
    assert index.class_names == () and index.labels([0, 1]).tolist() == [NO_LABEL, NO_LABEL]


def test_a_packed_set_keeps_its_order_and_bytes_as_a_source(tmp_path, data):
    first = run_pack(data, tmp_path / "first", seed=3)
    again = run_pack(first.path, tmp_path / "again")
    assert again.fingerprint == first.fingerprint and again.manifest.shuffle_seed == 3
    beton = run_pack(first.path, tmp_path / "beton", "beton")
    straight = run_pack(data, tmp_path / "straight", "beton", seed=3)
    for name in ("samples.beton", "index.npy", "names.txt"):
        assert (beton.path / name).read_bytes() == (straight.path / name).read_bytes()
    back = run_pack(beton.path, tmp_path / "back")
    assert back.fingerprint == first.fingerprint and [back.name(i) for i in range(60)] == [
        first.name(i) for i in range(60)
    ]
    other = run_pack(first.path, tmp_path / "other", seed=4)
    assert other.fingerprint != first.fingerprint and other.manifest.shuffle_seed == 4
    shard = first.path / first.manifest.shards[1].name
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"\.jpg\) in shard-000001.tar is not as it was packed"):
        run_pack(first.path, tmp_path / "damaged")


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411", "Gray"])
def test_a_packed_set_of_any_chroma_sampling_is_a_source(tmp_path, sampling):
    pixels = np.asarray(picture(40, 56).convert("L"))[:, :, None] if sampling == "Gray" else np.asarray(picture(40, 56))
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "GRAY" if sampling == "Gray" else "RGB", sampling)
    first = pack_folder(write_files(tmp_path / "data", {"a.jpg": jpeg}), tmp_path / "first")
    again = pack_beton(first.path, tmp_path / "again")
    assert again.read(0).tobytes() == jpeg and again.sizes(0).tolist() == [40, 56]


def test_shrunk_pictures(tmp_path, packer):
    sizes = {"wide.jpg": (60, 200), "tall.jpg": (300, 90), "small.jpg": (20, 30)}
    data = write_files(tmp_path / "data", {name: jpeg_of(*size) for name, size in sizes.items()})
    index = packer(data, tmp_path / "short", short_side=40)
    found = {index.name(i): tuple(index.sizes(i)) for i in range(3)}
    assert found == {"wide.jpg": (40, 133), "tall.jpg": (133, 40), "small.jpg": (20, 30)}
    assert index.manifest.changed == {"shrunk": 2} and index.manifest.settings["short_side"] == 40
    index = packer(data, tmp_path / "long", max_resolution=100)
    found = {index.name(i): tuple(index.sizes(i)) for i in range(3)}
    assert found == {"wide.jpg": (30, 100), "tall.jpg": (100, 30), "small.jpg": (20, 30)}


# ------------------------------------------------------------------------------------------------- the commands


def run_command(container, *arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "data_prep" / SCRIPTS[container]), *map(str, arguments)]
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True)


def test_the_command_packs_from_any_directory_and_sums_up(tmp_path, container):
    write_files(two_classes(tmp_path / "data"), {"cat/text.jpg": b"text", "cat/png.jpg": encoded(picture(), "PNG")})
    write_files(
        tmp_path / "data", {"cat/a.heic": b"1", "cat/notes.txt": b"2", "cat/more.txt": b"3", "cat/README": b"4"}
    )
    arguments = ["--data", "data", "--out", "out", "--workers", "2", "--bad-limit", "0.2"]
    done = run_command(container, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    into = f"1 {container}"
    lines = done.stdout.splitlines()
    assert re.fullmatch(rf"Packed 11 pictures of 2 classes into {into}, \d+\.\d MB\.", lines[0])
    assert lines[1:] == [
        "Left out: 2 not a picture (see rejected.jsonl).",
        "Changed: 1 PNG (see changed.jsonl).",
        "Ignored, as no pictures: 2 .txt, 1 of other kinds.",
    ]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["ignored"] == {".txt": 2, "of other kinds": 1}
    again = run_command(container, *arguments, cwd=tmp_path)
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert again.stderr.strip().endswith("pass --overwrite to replace it, or give another --out.")
    assert run_command(container, *arguments, "--overwrite", cwd=tmp_path).returncode == 0


MEASURED = """
import sys
from pathlib import Path
from tests.data_prep.test_pack import SmallShards, pack
folder, count = Path(sys.argv[1]), int(sys.argv[2])
(folder / f"{count}.tsv").write_text("".join(f"{folder}/{i % 10}.jpg\\t{i % 1000}\\n" for i in range(count)))
pack(SmallShards(data=folder / f"{count}.tsv", out=folder / str(count), workers=1, shard_bytes=1_000_000))
# Not ru_maxrss, which begins with what the process that started this one had.
with open("/proc/self/status") as file:
    print(next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024)
"""


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    write_files(tmp_path, {f"{i}.jpg": jpeg_of(8, 8 + i) for i in range(10)})
    peak_mb = []
    for count in (3000, 30_000):
        command = [sys.executable, "-c", MEASURED, str(tmp_path), str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peak_mb.append(float(done.stdout))
    assert peak_mb[1] < peak_mb[0] + 15
