"""One sentence instead of a traceback, files that are whole or absent, one process per folder, workers without a parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from inscon import guard

ROOT = Path(__file__).resolve().parents[2]


def refused(error: BaseException, capsys) -> tuple[int, str]:
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        guard.run_script("some.py", main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (ValueError("lr must be positive.\nFound: -1"), 1, "some.py: lr must be positive. Found: -1\n"),
        (OSError(27, "File too large", "/gone/file"), 1, "some.py: /gone/file: File too large\n"),
        (PermissionError(13, "Permission denied", "x.pth"), 1, "some.py: x.pth: Permission denied\n"),
        (MemoryError(), 1, "some.py: memory ran out\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            1,
            "some.py: memory ran out, no room to allocate 2.00 GiB; set a smaller --batch-size\n",
        ),
        (TimeoutError("no batch came"), 1, "some.py: no batch came\n"),
        (KeyboardInterrupt(), 130, "some.py: stopped by Ctrl-C\n"),
        (KeyboardInterrupt("stopped; run again"), 130, "some.py: stopped; run again\n"),
    ],
)
def test_what_a_user_can_cause_is_one_line(error, status, sentence, capsys):
    assert refused(error, capsys) == (status, sentence)


def test_memory_that_the_host_lacks_is_one_line_too(capsys):
    with pytest.raises(SystemExit):
        guard.run_script("some.py", lambda: torch.empty(2**62, dtype=torch.uint8))
    said = f"memory ran out, no room to allocate {2**62} bytes; set a smaller --batch-size"
    assert capsys.readouterr().err == f"some.py: {said}\n"


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(AssertionError):
        guard.run_script("some.py", lambda: (_ for _ in ()).throw(AssertionError("ours")))


def test_ranks_of_one_machine_say_the_same_once(tmp_path, monkeypatch, capsys):
    said = []
    for rank, sentence in (("0", "lr is wrong"), ("1", "lr is wrong"), ("1", "rank 1 has no disk")):
        (tmp_path / rank).mkdir(exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        said.append(refused(ValueError(sentence), capsys))
    assert said == [(1, "some.py: lr is wrong\n"), (0, ""), (1, "some.py: rank 1 has no disk\n")]


def test_what_takes_long_is_said_once_and_by_one_rank(monkeypatch, capsys):
    for rank, after_s in (("0", 0.01), ("0", 30), ("1", 0.01)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with guard.say_if_long("the kettle to boil", after_s):
            time.sleep(0.2)
    assert capsys.readouterr().err == "Waiting for the kettle to boil ...\n"


RANK = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from inscon import distributed, guard
def main():
    distributed.start()
    try:
        if "all" in sys.argv or distributed.rank() == 1:
            raise ValueError("no lr of -1; set --lr 0.03")
        dist.all_reduce(torch.zeros(1))
    finally:
        distributed.stop()
guard.run_script("some.py", main)
"""


@pytest.mark.parametrize("who", ["all", "one"])
def test_torchrun_shows_a_refusal_and_no_traceback_of_ranks(tmp_path, who):
    """In the table at the end too, where people look; the ranks that lose a peer are quiet."""
    script = tmp_path / "some.py"
    script.write_text(RANK.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), who]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = done.stderr.splitlines()
    assert done.returncode == 1 and said.count("some.py: no lr of -1; set --lr 0.03") == 1
    assert sum(line.endswith(": some.py: no lr of -1; set --lr 0.03") for line in said) == 1  # the table
    assert done.stderr.count("Traceback") == 1  # torchrun's own


@pytest.mark.parametrize("check", [guard.check_output_file, guard.check_output_folder])
def test_an_output_is_tried_before_the_work(check, tmp_path):
    check(tmp_path / "new/out.json")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"file/sub/out cannot be written \(.*(Not a directory|File exists)\); set another --to"
    ):
        check(tmp_path / "file/sub/out", "--to")
    if Path("/proc/self").is_dir():
        with pytest.raises(ValueError, match="/proc/out/file cannot be written"):
            check(Path("/proc/out/file"))


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(ValueError, match="is a folder where a file is to be written; set --out to a file name"):
        guard.check_output_file(tmp_path)


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "deep/file"
    with guard.whole_file(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), guard.whole_file(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_full_disk_is_called_so_though_the_library_hides_it(tmp_path):
    program = f"""
import resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from inscon import guard
def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    with guard.whole_file({str(tmp_path / "big.pt")!r}) as file:
        torch.save(torch.zeros(1 << 20), file)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
guard.run_script("save.py", main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"save.py: {tmp_path}/big.pt: File too large\n"
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from inscon import guard
with guard.only_process({folder!r}, "--out"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_works_in_a_folder_and_a_killed_one_frees_it(tmp_path):
    program = HOLDER.format(root=str(ROOT), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"process {holder.pid} on .*set another --out"):
            guard.only_process(tmp_path, "--out").__enter__()
        holder.kill()
    with guard.only_process(tmp_path, "--out", wait_s=10):
        pass


ORPHAN = """
import multiprocessing, os, sys, time
sys.path.insert(0, {root!r})
from inscon import guard
def work(pids):
    guard.end_with_parent()
    pids.put(os.getpid())
    time.sleep(120)
if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    pids = context.Queue()
    context.Process(target=work, args=(pids,)).start()
    print(pids.get(), flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_ends_with_its_parent(tmp_path, method):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN.format(root=str(ROOT), method=method))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and Path(f"/proc/{worker}").exists():
        if Path(f"/proc/{worker}/stat").read_text().split(") ")[1].startswith("Z"):
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{worker}").exists()


# ---------------------------------------------------------------------------------------------------------- stopping


@pytest.fixture
def stop():
    with guard.stop_requests() as stop:
        yield stop


def test_in_another_thread_a_stop_is_what_it_was():
    """As where a server trains; only the main thread may say what signals do."""
    before, found = signal.getsignal(signal.SIGTERM), []

    def train():
        with guard.stop_requests() as stop:
            found.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_sigusr1_is_the_name_of_a_stop(stop):
    for _ in range(3):
        signal.raise_signal(signal.SIGUSR1)
    assert (stop.requested, stop.name) == (True, "SIGUSR1")


def test_sigterm_asks_and_never_aborts(stop, capfd):
    for _ in range(3):
        signal.raise_signal(signal.SIGTERM)
    assert (stop.requested, stop.name) == (True, "SIGTERM")
    signal.raise_signal(signal.SIGINT)  # the first Ctrl-C, and nothing was said yet
    signal.raise_signal(signal.SIGINT)  # torchrun's copy of it
    assert "Ctrl-C again stops at once and loses the steps since the last checkpoint" in capfd.readouterr().err
    assert stop.name == "SIGTERM"


def test_a_second_ctrl_c_aborts_when_the_first_was_answered(stop, capfd):
    signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("Ctrl-C again") == 1
    stop._said_at -= 60  # a minute later
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    stop.final = True  # the checkpoint is being written
    signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_one_rank_of_a_machine_answers_a_ctrl_c(stop, monkeypatch, capfd):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)
    assert stop.requested and capfd.readouterr().err == ""


def test_a_full_disk_is_named_where_a_write_has_no_name(tmp_path):
    path = tmp_path / "gone/log"
    with pytest.raises(OSError) as full, guard.naming(path), open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    assert guard.sentence_of(full.value) == f"{path}: No space left on device; free some and run again"


def test_a_folder_made_for_a_lock_goes_with_it(tmp_path):
    with pytest.raises(KeyError), guard.only_process(tmp_path / "new", "--out"):
        raise KeyError
    with guard.only_process(tmp_path / "kept", "--out"):
        (tmp_path / "kept/file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]


def test_a_user_without_a_name_can_start():
    """As `docker run -u 1234`."""
    program = f"""
import os, pwd, sys
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
sys.path.insert(0, {str(ROOT)!r})
from inscon import guard
import torchvision
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("load", "policy"), [("0.9 0.5 0.1 1/200 77", None), ("0.0 0.0 0.0 3/200 77", "passive"), (None, None)]
)
def test_threads_sleep_where_others_compute(tmp_path, monkeypatch, load, policy):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if load:
        (tmp_path / "loadavg").write_text(load)
    guard.share_cores(tmp_path / "loadavg")
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_a_process_that_computes_is_seen(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(0.3)
        guard.share_cores()
        busy.kill()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
