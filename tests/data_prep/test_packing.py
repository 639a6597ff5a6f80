"""The engine: whatever stops it, the same command goes on, and nothing but pictures and settings decides a byte."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_prep import job as job_module
from data_prep import locks, packing
from data_prep.index import DatasetIndex, ShardError
from data_prep.job import PackingStopped, Progressed, Target
from data_prep.joining import BetonJoin
from data_prep.locks import only_writer
from data_prep.new_file import NewFile
from data_prep.packing import PackConfig, Ranks, pack
from data_prep.pictures import Treatment
from tests.data_prep.pictures_for_tests import contents, jpeg_of, listed, two_classes, write_files

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = "tar", "beton"
SHARD_BYTES = 6000


def target(container="tar", shard_bytes=SHARD_BYTES, **treatment):
    return Target(container=container, writer="test", treatment=Treatment(**treatment), shard_bytes=shard_bytes)


def run_pack(data, out, container="tar", *, ranks=None, shard_bytes=SHARD_BYTES, **settings):
    settings = {"workers": 1, **settings}
    return pack(PackConfig(data=data, out=out, **settings), target(container, shard_bytes), ranks=ranks)


SCRIPT = """
import sys
from pathlib import Path
from data_prep.job import Target
from data_prep.packing import PackConfig, pack
from data_prep.pictures import Treatment

PRELUDE

def main():
    data, out, container, workers = sys.argv[1:5]
    target = Target(container=container, writer="test", treatment=Treatment(), shard_bytes=6000)
    try:
        pack(PackConfig(data=Path(data), out=Path(out), workers=int(workers)), target)
    except ValueError as error:
        raise SystemExit(str(error))

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path):
    """Starts a process that packs; `prelude` is what it does before."""

    def start(data, out, container="tar", workers=1, prelude="", **options):
        path = tmp_path / "packs.py"
        path.write_text(SCRIPT.replace("PRELUDE", textwrap.dedent(prelude)))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(path), str(data), str(out), container, str(workers)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)

    return start


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """120 sound pictures and two bad ones (the limit is raised by whoever uses them)."""
    return two_classes(tmp_path_factory.mktemp("pictures"), 120)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """What an undisturbed run writes, by container."""
    out = tmp_path_factory.mktemp("undisturbed")
    return {kind: contents(run_pack(data, out / kind, kind).path) for kind in CONTAINERS}


# ------------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("container", CONTAINERS)
def test_workers_do_not_change_a_byte(tmp_path, data, undisturbed, container):
    for workers in (2, 4):
        out = run_pack(data, tmp_path / str(workers), container, workers=workers).path
        assert contents(out) == undisturbed[container]
    assert len(undisturbed["tar"]) > 2 * 5  # several shards, or the above says nothing


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0, 1, 0)], ids=str)
def test_ranks_do_not_change_a_byte_and_may_come_in_any_order(
    tmp_path, data, undisturbed, container, order, monkeypatch
):
    monkeypatch.setattr(packing, "_RANK_WAIT_S", 0.1)
    index = None
    for rank in (*order, 1, 0):
        try:
            index = run_pack(data, tmp_path / "out", container, ranks=Ranks(rank, 2))
        except PackingStopped as stopped:  # the other one has not been there yet
            assert "start it" in str(stopped)
        if index is not None:
            break
    assert contents(tmp_path / "out") == undisturbed[container]
    assert run_pack(data, tmp_path / "out", container, ranks=Ranks(1, 2)) is None  # a rank that is run once more


@pytest.mark.parametrize("container", CONTAINERS)
def test_torchrun_with_two_ranks(tmp_path, container):
    data = two_classes(tmp_path / "data", 30)
    writer = {"tar": "make_dali.py", "beton": "make_ffcv.py"}[container]
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [str(ROOT / "data_prep" / writer), "--data", str(data), "--out", str(tmp_path / f"out_{ranks}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "Rank 1 of 2 has nothing left to write" in done.stdout
    assert contents(tmp_path / "out_1") == contents(tmp_path / "out_2")


# ---------------------------------------------------------------------------------------------------- kills

KILL_AT_CALL = """
    import os, signal
    from data_prep import joining, new_file, shards
    calls = 0
    def count(function):
        def counted(*arguments, **options):
            global calls
            calls += 1
            if calls == {at}:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return counted
    for name in ("write", "sync", "commit"):
        setattr(new_file.NewFile, name, count(getattr(new_file.NewFile, name)))
    Path.unlink = count(Path.unlink)
    Path.open = count(Path.open)
    import atexit
    atexit.register(lambda: print("calls", calls, file=sys.stderr))
"""


@pytest.mark.parametrize("container", CONTAINERS)
def test_killed_at_ten_random_steps_and_started_again(tmp_path, data, undisturbed, container, script):
    """One process, killed in the middle of a write, before a rename, before a removal: any step that touches the disk."""
    whole = script(data, tmp_path / "whole", container, prelude=KILL_AT_CALL.format(at=0))
    steps = int(whole.communicate()[1].split("calls")[1])
    assert contents(tmp_path / "whole") == undisturbed[container]
    moments = np.random.default_rng(0).integers(1, steps, 10)
    for number, at in enumerate(moments):
        out = tmp_path / f"out_{number}"
        killed = script(data, out, container, prelude=KILL_AT_CALL.format(at=at))
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        again = script(data, out, container)
        message = again.communicate()[1]
        if again.returncode != 0:  # killed after the last file was there
            assert "already holds a packed data set" in message
        assert contents(out) == undisturbed[container], f"killed at step {at} of {steps}"


COUNTED = """
    import os, time
    from data_prep import job
    inner, parent = job.prepare_picture, os.getppid()
    def prepare_picture(*arguments):
        with open({tally!r}, "ab") as tally:  # a byte for each picture, of whichever worker
            tally.write(b".")
        time.sleep(0.05)
        while os.path.getsize({tally!r}) >= {most} and os.getppid() == parent:
            time.sleep(0.005)
        return inner(*arguments)
    job.prepare_picture = prepare_picture
"""


@pytest.mark.parametrize("container", CONTAINERS)
def test_killed_ten_times_in_one_run(tmp_path, data, undisturbed, container, script):
    """Two workers; the first process is killed after so many pictures, its workers end by themselves."""
    out, rng = tmp_path / "out", np.random.default_rng(1)
    for number, pictures in enumerate((4, 19, 8, 14, 19, 6, 11, 19, 5, 9)):  # a shard holds about eight
        tally = tmp_path / f"tally_{number}"
        tally.touch()
        running = script(data, out, container, workers=2, prelude=COUNTED.format(tally=str(tally), most=pictures + 3))
        while tally.stat().st_size < pictures:
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        running.kill()
        running.communicate()
        assert not (out / "manifest.json").exists()
    assert list(out.glob("packing/shard-*.npz"))
    again = script(data, out, container, workers=2)
    assert again.wait() == 0, again.communicate()[1]
    assert contents(out) == undisturbed[container]


def test_finished_shards_are_not_written_again(tmp_path, data, undisturbed):
    class Stop(Exception):
        pass

    out = tmp_path / "out"
    calls = 0
    original = job_module.prepare_picture

    def stop_at_90(*arguments):
        nonlocal calls
        calls += 1
        if calls > 90:
            raise Stop
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "prepare_picture", stop_at_90)
        with pytest.raises(Stop):
            run_pack(data, out)
    before = {path.name: path.stat() for path in out.glob("shard-*.tar")}
    assert before and not list(out.glob("*.partial"))
    done = 0

    def count(*arguments):
        nonlocal done
        done += 1
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "prepare_picture", count)
        run_pack(data, out)
    assert done < 120 - 60
    for name, stat in before.items():
        assert (out / name).stat().st_ino == stat.st_ino and (out / name).stat().st_mtime_ns == stat.st_mtime_ns
    assert contents(out) == undisturbed["tar"]


def test_a_worker_that_dies_is_one_sentence(tmp_path, data, undisturbed, script):
    die = """
        import os, signal
        from data_prep import job
        inner, seen = job.prepare_picture, 0
        def prepare_picture(*arguments):
            global seen
            seen += 1
            if seen == 20 and __name__ == "__mp_main__":
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*arguments)
        job.prepare_picture = prepare_picture
    """
    running = script(data, tmp_path / "out", workers=2, prelude=die)
    message = running.communicate()[1]
    assert running.returncode == 1
    assert message.strip() == (
        "A worker process was killed by signal 9 while it was packing: run the same command again, it goes on with the "
        "shards that are missing (with fewer --workers, if memory ran out)."
    )
    assert script(data, tmp_path / "out", workers=2).wait() == 0
    assert contents(tmp_path / "out") == undisturbed["tar"]


def test_ctrl_c_leaves_a_state_that_goes_on(tmp_path, data):
    arguments = ["--data", data, "--out", tmp_path / "out", "--workers", "2"]
    command = [sys.executable, str(ROOT / "data_prep/make_dali.py"), *map(str, arguments)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/packing").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    message = running.communicate()[1]
    if running.returncode != 0:
        assert running.returncode == 130, message
        assert message.strip().splitlines()[-1] == (
            f"Stopped. What is finished lies in {tmp_path / 'out'}; the same command goes on."
        )
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert len(DatasetIndex.open(tmp_path / "out")) == 120


# ---------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_disk_that_is_full(tmp_path, data, undisturbed, container, script):
    """A limit on the size of files stands in for a full disk: the same call fails, for another reason."""
    limit = 4000
    full = script(
        data,
        tmp_path / "out",
        container,
        workers=2,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        prelude="import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
    )
    message = full.communicate()[1].strip()
    assert full.returncode == 1
    assert "cannot be written (File too large, " in message and "MB free)" in message
    assert message.endswith("see to that and run the same command again, it goes on where it stopped.")
    assert "\n" not in message
    assert not list((tmp_path / "out").rglob("*.tar.partial"))  # what was half written is given back
    assert script(data, tmp_path / "out", container, workers=2).wait() == 0
    assert contents(tmp_path / "out") == undisturbed[container]


def test_a_source_that_vanishes(tmp_path, undisturbed, data, monkeypatch):
    here, away = tmp_path / "pictures", tmp_path / "away"
    write_files(here, {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*.jpg")})
    original, calls = job_module.prepare_picture, 0

    def unmount_at_60(*arguments):
        nonlocal calls
        calls += 1
        if calls == 60:
            here.rename(away)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "prepare_picture", unmount_at_60)
        with pytest.raises(ValueError, match=r"was there when the pictures were listed and cannot be read now"):
            run_pack(here, tmp_path / "out")
    with pytest.raises(ValueError, match="pictures does not exist"):
        run_pack(here, tmp_path / "out")
    away.rename(here)
    run_pack(here, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed["tar"]


def test_two_writers_on_one_target(tmp_path, data, monkeypatch):
    monkeypatch.setattr(locks, "_WAIT_S", 0.1)
    out = tmp_path / "out"
    (out / "packing").mkdir(parents=True)
    for holder, second in ((Ranks(0, 1), Ranks(0, 1)), (Ranks(0, 2), Ranks(0, 2)), (Ranks(1, 2), Ranks(0, 1))):
        with only_writer(out / "packing", *holder):
            with pytest.raises(
                ShardError, match=rf"Another process is packing into {out} \(process {os.getpid()} on .*\): wait"
            ):
                run_pack(data, out, ranks=second)
            assert (out / "packing").is_dir()
    with only_writer(out / "packing", 1, 2), only_writer(out / "packing", 0, 2):
        pass  # two ranks of one run do not disturb each other
    assert len(run_pack(data, out)) == 120


def test_a_rank_that_never_came_is_named(tmp_path, data, monkeypatch):
    monkeypatch.setattr(packing, "_RANK_WAIT_S", 0.1)
    with pytest.raises(
        PackingStopped, match="shards are missing and rank 1, which is to write them, is not running: start it again"
    ):
        run_pack(data, tmp_path / "out", ranks=Ranks(0, 2))
    with pytest.raises(PackingStopped, match="Rank 0 has not listed the pictures, and is not running: start it"):
        run_pack(data, tmp_path / "other", ranks=Ranks(1, 2))


def test_other_settings_are_not_mixed_in(tmp_path, data, undisturbed):
    out = tmp_path / "out"
    write_files(tmp_path / "bad", {"a/1.jpg": b"text", "a/2.jpg": jpeg_of()})
    with pytest.raises(PackingStopped):
        run_pack(tmp_path / "bad", out)
    for settings, message in (
        ({"seed": 3}, r"other settings \(asked_seed None, now 3\)"),
        ({"shard_bytes": 7000}, r"other settings \(shard_bytes 6000, now 7000\)"),
    ):
        with pytest.raises(
            ShardError, match=f"holds an unfinished packing with {message}: run it as it was begun, pass"
        ):
            run_pack(tmp_path / "bad", out, **settings)
    run_pack(data, out, overwrite=True)
    assert contents(out) == undisturbed["tar"]


def test_too_many_bad_pictures_stop_the_run_and_a_higher_limit_goes_on(tmp_path):
    good = {f"a/{i}.jpg": jpeg_of(seed=i) for i in range(18)}
    data = write_files(tmp_path / "data", good | {"a/text.jpg": b"text", "a/empty.jpg": b""})
    with pytest.raises(
        PackingStopped, match=r"2 of 20 pictures \(10.00%\) cannot be packed, the first one a/.*--bad-limit 0.001"
    ):
        run_pack(data, tmp_path / "out")
    with pytest.raises(PackingStopped, match=r"2 of 20 pictures \(10.00%\) cannot be packed"):
        run_pack(data, tmp_path / "out", bad_limit=0.05)
    index = run_pack(data, tmp_path / "out", bad_limit=0.1)
    assert len(index) == 18 and listed(tmp_path / "out", "rejected.jsonl").keys() == {"a/text.jpg", "a/empty.jpg"}


def test_a_list_whose_pictures_are_elsewhere_says_where_they_were_looked_for(tmp_path):
    """All 20 are counted; and both remedies that are named help."""
    data = two_classes(tmp_path / "data", 20)
    names = sorted(str(path.relative_to(data)) for path in data.rglob("*.jpg"))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/list.txt").write_text("\n".join(names))
    for shard_bytes in (SHARD_BYTES, 10**9):
        with pytest.raises(
            PackingStopped, match=r"20 of 20 pictures \(100.00%\) cannot be packed, the first one"
        ) as caught:
            run_pack(tmp_path / "lists/list.txt", tmp_path / "out", overwrite=True, shard_bytes=shard_bytes)
    sentence = str(caught.value)
    assert f"tried {tmp_path}/lists/" in sentence and "as a list's paths start at its folder" in sentence
    with pytest.raises(PackingStopped, match=f"tried {tmp_path}/lists/"):
        run_pack(tmp_path / "lists/list.txt", tmp_path / "failing", on_bad="fail")
    (tmp_path / "lists/list.txt").write_text("\n".join(str(data / name) for name in names))
    with pytest.raises(
        PackingStopped, match=r"20 of 20 .*: raise the limit, .* remove the folder packing in --out and pass"
    ):
        run_pack(tmp_path / "lists/list.txt", tmp_path / "out", shard_bytes=10**9)
    shutil.rmtree(tmp_path / "out/packing")
    assert len(run_pack(tmp_path / "lists/list.txt", tmp_path / "out", shard_bytes=10**9, overwrite=True)) == 20


def test_a_large_source_is_not_looked_through_to_the_end(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(f"{i}.jpg" for i in range(3000)))
    with pytest.raises(
        PackingStopped, match=r"(1\d\d\d) of the \1 pictures looked at so far \(100.00%; there are 3000\)"
    ):
        run_pack(tmp_path / "list.txt", tmp_path / "out")


def test_the_progress_line_fits_80_columns():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, _environ={})
    with packing._progress_bar("rank 127", 300_000_000, 0, console) as advance:
        advance(Progressed(4, 440_000, (("a.jpg", "damaged"),) * 300_000))
    line = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue()).splitlines()[-1].split("\r")[-1]
    assert len(line) <= 80 and "…" not in line
    assert "4/300000000" in line and "300000 bad" in line and re.search(r"left [-\d:]+$", line)


def test_the_limit_holds_for_all_ranks_together(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_RANK_WAIT_S", 0.1)
    data = write_files(two_classes(tmp_path / "data", 98), {"cat/text.jpg": b"text", "ape/text.jpg": b"text"})
    with pytest.raises(PackingStopped):
        run_pack(data, tmp_path / "out", ranks=Ranks(0, 2), bad_limit=0.02)
    run_pack(data, tmp_path / "out", ranks=Ranks(1, 2), bad_limit=0.02)
    with pytest.raises(PackingStopped, match="2 of 100 pictures"):
        run_pack(data, tmp_path / "out", ranks=Ranks(0, 2), bad_limit=0.019)
    assert len(run_pack(data, tmp_path / "out", ranks=Ranks(0, 2), bad_limit=0.02)) == 98


def test_on_bad_fail_names_the_picture(tmp_path):
    data = write_files(two_classes(tmp_path / "data"), {"cat/text.jpg": b"text"})
    with pytest.raises(
        PackingStopped,
        match=r"holds a picture that cannot be packed \(cat/text.jpg: .*\): pass --on-bad skip, .*repair or remove",
    ):
        run_pack(data, tmp_path / "out", on_bad="fail")


def test_nothing_that_can_be_packed(tmp_path):
    data = write_files(tmp_path / "data", {"text.jpg": b"text", "empty.jpg": b""})
    with pytest.raises(
        ValueError, match=r"holds no picture that can be packed \((text|empty).jpg: .*\); give another --data"
    ):
        run_pack(data, tmp_path / "out", bad_limit=1.0)
    assert not (tmp_path / "out").exists()


def test_a_shard_lost_after_its_report_is_written_again(tmp_path, data, undisturbed, monkeypatch):
    monkeypatch.setattr(packing, "_RANK_WAIT_S", 0.1)
    out = tmp_path / "out"
    run_pack(data, out, ranks=Ranks(1, 2)) if (out / "packing/job.json").exists() else None
    with pytest.raises(PackingStopped):
        run_pack(data, out, ranks=Ranks(0, 2))
    first, second = sorted(out.glob("shard-*.tar"))[:2]
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    run_pack(data, out)
    assert contents(out) == undisturbed["tar"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, r"--seed must be from 0 to 2\*\*64-1. Found: -1"),
        ({"workers": 0}, "--workers must be at least 1. Found: 0"),
        ({"on_bad": "maybe"}, "--on-bad must be skip or fail. Found: maybe"),
        ({"bad_limit": 1.5}, "--bad-limit must be from 0 to 1. Found: 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, data, settings, message):
    with pytest.raises(ValueError, match=message):
        run_pack(data, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="is inside --data"):
        run_pack(data, data / "shards")
    with pytest.raises(ValueError, match="nowhere does not exist; give a folder, a list file or a tar to --data"):
        run_pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        run_pack(data, tmp_path / "file")
    assert not (data / "shards").exists() and not (tmp_path / "out").exists()


def test_a_packed_set_keeps_its_order_and_bytes_as_a_source(tmp_path, data, undisturbed):
    first = run_pack(data, tmp_path / "first", seed=3)
    again = run_pack(first.path, tmp_path / "again")
    assert contents(again.path).keys() == contents(first.path).keys()
    assert again.fingerprint == first.fingerprint and again.manifest.shuffle_seed == 3
    beton = run_pack(first.path, tmp_path / "beton", "beton")
    straight = run_pack(data, tmp_path / "straight", "beton", seed=3)
    assert (beton.path / "samples.beton").read_bytes() == (straight.path / "samples.beton").read_bytes()
    assert (beton.path / "index.npy").read_bytes() == (straight.path / "index.npy").read_bytes()
    back = run_pack(beton.path, tmp_path / "back")
    assert back.fingerprint == first.fingerprint and [back.name(i) for i in range(120)] == [
        first.name(i) for i in range(120)
    ]
    other = run_pack(first.path, tmp_path / "other", seed=4)
    assert other.fingerprint != first.fingerprint and other.manifest.shuffle_seed == 4


def test_a_damaged_packed_set_is_no_source(tmp_path, data):
    first = run_pack(data, tmp_path / "first")
    shard = first.path / first.manifest.shards[1].name
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        PackingStopped, match=r"is damaged at .*\.jpg, in shard-000001.tar: see what python data_prep/verify.py"
    ):
        run_pack(first.path, tmp_path / "again")


def test_one_manifest_says_nothing_of_the_run(tmp_path, data, undisturbed):
    manifest = json.loads(undisturbed["tar"]["manifest.json"])
    assert manifest["settings"].keys() == {
        "writer", "shard_mb", "short_side", "max_resolution", "quality", "chroma", "write_mode", "smart_threshold",
    }  # fmt: skip
    assert str(data) not in undisturbed["tar"]["manifest.json"].decode()


def test_a_part_damaged_before_the_join_is_not_joined(tmp_path, data, undisturbed):
    """And what was joined before it stays; removed as the sentence says, it is written again."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_RANK_WAIT_S", 0.1)
        patch.setattr(BetonJoin, "append_reported", lambda *_: None)
        with pytest.raises(PackingStopped):
            run_pack(data, out, "beton", ranks=Ranks(0, 2))
        run_pack(data, out, "beton", ranks=Ranks(1, 2))
    part, report = out / "packing/part-000003", out / "packing/shard-000003.npz"
    content = bytearray(part.read_bytes())
    content[100] ^= 4
    part.write_bytes(content)
    with pytest.raises(
        ShardError, match=rf"{part} is not as it was written, .*: remove it and {report}, and run the same"
    ):
        run_pack(data, out, "beton")
    part.unlink(), report.unlink()
    run_pack(data, out, "beton")
    assert contents(out) == undisturbed["beton"]


def test_a_beton_whose_manifest_was_not_written_is_kept_through_another_failure(tmp_path, data, undisturbed):
    out = tmp_path / "out"
    commit = NewFile.commit

    def fail_at_manifest(file, count, **options):
        if file.path.name == "manifest.json":
            raise OSError("power cut")
        return commit(file, count, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NewFile, "commit", fail_at_manifest)
        with pytest.raises(OSError, match="power cut"):
            run_pack(data, out, "beton")
    assert (out / "samples.beton").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NewFile, "sync", lambda file: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_pack(data, out, "beton")
    run_pack(data, out, "beton")
    assert contents(out) == undisturbed["beton"]
