"""scripts/slurm/train.sbatch with stand-ins for srun and scontrol: two ranks, stopped as Slurm does it, and gone on with."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inscon import checkpoint
from tests.scripts.test_cli import printed, script_of
from tests.scripts.test_runs import SMALL

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "scripts/slurm/train.sbatch"
SRUN = """#!{python}
# As srun: tasks with their numbers; SIGUSR1 goes on to them, and of SIGTERM they are killed.
import os, signal, subprocess, sys
command = sys.argv[sys.argv.index("bash") :]
tasks = []
def on_signal(number, frame):
    for task in tasks:
        task.send_signal(signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGKILL)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, on_signal)
for rank in map(str, range(int(os.environ["SLURM_NTASKS"]))):
    tasks.append(subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": rank, "SLURM_LOCALID": rank}}))
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; echo other-node; else echo "scontrol $*"; fi
"""


@pytest.fixture
def start(tmp_path):
    """start(flags): the job's shell, as Slurm starts it."""
    (tmp_path / "bin").mkdir()
    programs = {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}
    programs["python"] = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    given = {
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "1", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = []

    def start(*flags):
        with open(tmp_path / "log", "a") as log:
            started.append(
                subprocess.Popen(
                    ["bash", str(JOB), *map(str, flags)], cwd=ROOT, env=os.environ | given, stdout=log, stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip
        return started[-1]

    yield start
    for job in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_in_a_checkpoint_and_the_same_job_goes_on(start, tmp_path, number):
    flags = [*SMALL, "--pipeline", "synthetic", "--run-dir", tmp_path / "run", "--checkpoint-every", "1000"]
    job, metrics, log = start(*flags), tmp_path / "run/metrics.jsonl", tmp_path / "log"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(300) == 0, log.read_text()
    step, out = checkpoint.load(checkpoint.latest(tmp_path / "run"))["step"], log.read_text()
    assert f"Stopped by SIGUSR1; the checkpoint of step {step}" in out and "on 2 x cpu" in out
    assert (f"scontrol requeue {os.getpid()}" in out) == (number == signal.SIGUSR1)
    log.unlink()
    assert start(*flags, "--max-steps", step + 2).wait(300) == 0
    out = log.read_text()
    assert f"from step {step}" in out and "scontrol requeue" not in out
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, step + 3))


def test_the_job_is_bash_and_its_command_is_understood():
    subprocess.run(["bash", "-n", str(JOB)], check=True)
    text = JOB.read_text()
    [command] = printed(text.replace("\n#     ", "\n"))
    assert command[0] == "sbatch" and (ROOT / "scripts/slurm/train.sbatch").samefile(ROOT / command[2])
    script, flags = script_of(command)
    assert script == "scripts/train.py" and flags[::2] == ["--data", "--run-dir"]
