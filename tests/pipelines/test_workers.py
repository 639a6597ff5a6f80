"""Worker processes: deaf to what stops their parent, missed when they die or hang, gone when it is gone."""

import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import multiprocessing
import threading
from inscon import guard
from pipelines.workers import made_by_workers

def slow(i):
    time.sleep(0.3)
    return i

def hangs(i):
    time.sleep(600 if i == 3 else 0)
    return i

def dies(i, after=0):
    if i == 3:
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(0 if after else 600)
    return bytes(200_000)  # longer than a pipe holds: what is under way is cut short

def dies_later(i):
    return dies(i, 0.5)

class Ours(ValueError):
    "Of two arguments, as a sentence has one."

def refuses(i):
    raise Ours("a sentence", i)

def ours(i):
    raise RuntimeError("a mistake")

def items(make, timeout_s=60):
    return made_by_workers(make, range(6), 2, timeout_s)

def tree():
    "Process ids of all that descend from this one."
    parents = {{}}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(pid)] = int(open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[1])
        except OSError:
            pass
    found, new = set(), {{os.getpid()}}
    while new:
        new = {{pid for pid, parent in parents.items() if parent in new}}
        found |= new
    return found

def main():
{body}

if __name__ == "__main__":
    guard.run_script("test", main)
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")


def script(tmp_path, body):
    path = tmp_path / "run.py"
    path.write_text(SCRIPT.format(root=str(ROOT), body=textwrap.indent(textwrap.dedent(body), "    ")))
    return [sys.executable, str(path)]


def run(tmp_path, body):
    return subprocess.run(script(tmp_path, body), capture_output=True, text=True, timeout=120, start_new_session=True)


def test_signals_to_all_processes_stop_no_worker(tmp_path):
    """As Slurm sends them, or a terminal; while the parent waits for items that take longer than it."""
    done = run(
        tmp_path,
        """
        seen, trees = [], set()
        for number in guard.STOPS:
            signal.signal(number, lambda number, frame: seen.append(number))
        for item in items(slow):
            print(item, flush=True)
            if item < 2:  # later they may have made their last
                trees.add(frozenset(tree()))
            for number in (*guard.STOPS, *guard.STOPS):
                os.killpg(0, number)
        assert set(guard.STOPS) == set(seen) and len(trees) == 1
        """,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["0", "1", "2", "3", "4", "5"]), done.stderr


FAILURES = {
    "hangs": ("list(items(hangs, 3))", "no batch came for 3 s from the pipeline reference.*--stall-timeout"),
    "killed": ("list(items(dies))", "a worker process of the pipeline reference died.* fewer --threads"),
    "killed while it hands over": (
        """
        for item in items(dies_later):
            time.sleep(2)
        """,
        "a worker process of the pipeline reference died.* fewer --threads",
    ),
    "stopped while it hands over": (
        """
        for item in items(slow, 4):
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGSTOP)
        """,
        "no batch came for 4 s from the pipeline reference",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "sentence"), FAILURES.values(), ids=FAILURES)
def test_a_worker_that_fails_is_one_sentence_and_the_process_ends(tmp_path, body, sentence):
    done = run(tmp_path, body)
    assert done.returncode == 1 and re.fullmatch(f"test: .*{sentence}.*\n", done.stderr), done.stderr


def test_a_mistake_in_a_worker_keeps_its_traceback(tmp_path):
    done = run(tmp_path, "list(items(ours))")
    assert done.returncode == 1 and "Traceback" in done.stderr and "RuntimeError: a mistake" in done.stderr
    assert "in ours" in done.stderr


def test_a_workers_refusal_keeps_its_type_and_arguments(tmp_path):
    done = run(
        tmp_path,
        """
        try:
            list(items(refuses))
        except Ours as error:
            print(*error.args, len(multiprocessing.active_children()))
        """,
    )
    assert (done.returncode, done.stdout) == (0, "a sentence 0 0\n"), done.stderr


@needs_proc
@pytest.mark.parametrize("end", ["kill -9", "an error in the middle"])
def test_nothing_is_left_of_a_process_that_ends(tmp_path, end):
    """Workers, their fork server and the tracker of resources."""
    command = script(
        tmp_path,
        f"""
        for i, item in enumerate(items(slow)):
            if i == 1:
                print(*tree(), flush=True)
                {"time.sleep(600)" if end == "kill -9" else "raise ValueError"}
        """,
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        left = {int(pid) for pid in process.stdout.readline().split()}
        if end == "kill -9":
            process.kill()
    assert len(left) == 4
    deadline = time.monotonic() + 60
    while left := {pid for pid in left if is_running(pid)}:
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
