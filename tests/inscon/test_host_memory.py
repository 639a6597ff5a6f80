"""Freed memory stays with the process: judged by the system's own count of page faults."""

import ctypes
import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from inscon import host_memory, train
from inscon.methods import moco
from tests.inscon.methods.steps import make_config

ROOT = Path(__file__).parents[2]

FAULTS = """
    import resource, sys
    sys.path.insert(0, {root!r})
    import torch
    from inscon.host_memory import keep_freed_memory
    if {keep}:
        assert keep_freed_memory()
    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    def use():
        "100 MB in blocks of 50, written and freed, as activations are."
        blocks = [torch.ones(50 << 18) for _ in range(2)]
    for _ in range(20):  # until small blocks have found places beside the large ones
        use()
    before = faults()
    for _ in range(5):
        use()
    print(faults() - before)
"""


def faults(keep: bool) -> int:
    code = textwrap.dedent(FAULTS).format(root=str(ROOT), keep=keep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt: it isn't glibc")
def test_memory_used_again_costs_no_page_fault():
    kept, returned = faults(keep=True), faults(keep=False)
    # 500 MB are 250 faults of huge pages, 125,000 of small ones.
    assert returned > 200 and kept < returned / 5, f"{kept} page faults with memory kept, {returned} without"


def test_a_library_without_the_settings_changes_nothing(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert host_memory.keep_freed_memory() is False


def test_a_run_on_a_cpu_keeps_its_memory(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: calls.append(1))
    config = make_config(moco.Settings(queue_size=64))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=tmp_path))
    train.set_up(config, torch.device("cpu"), "none")
    assert calls == [1]
