"""What goes wrong while a run reads its data: one sentence naming shard and sample; no hang, no leak. Who stands in for a bad
sample is in test_stand_ins.py."""

import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from data_prep.index import DatasetIndex
from inscon.sampling import EpochOrder
from tests.pipelines.conftest import (
    NO_JPEG,
    SIZES,
    as_jpeg,
    assert_same,
    batches,
    beton_beside,
    compiled,
    damage,
    data_for,
    digest,
    draw_picture,
    every,
    installed,
    opened,
    stored_in,
)

ROOT = Path(__file__).resolve().parents[2]
CUT = as_jpeg(draw_picture(11, *SIZES[11]))[:2000]
BAD = {
    "a flipped bit": ({}, r"is not as it was packed, its bytes have changed"),
    "no JPEG": ({"jpegs": {11: NO_JPEG}}, "cannot be decoded by "),
    "half a JPEG": ({"jpegs": {11: CUT}}, "cannot be decoded by "),
    "another size": ({"sizes": {11: (900, 900)}}, "decodes to 125x135 px .* index says 900x900"),
}
"""What may be wrong with sample 11: what is packed so, what is said of it."""


@every
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_sample_is_named_with_the_remedy(name, fault, make_shards):
    changes, said = BAD[fault]
    folder = make_shards(**changes)
    if not changes:
        damage(data_for(name, folder), 11)
    where, packer = stored_in(name, "shard-000001.tar"), "make_ffcv" if name == "ffcv" else "make_dali"
    with pytest.raises(
        ValueError, match=rf"sample 11 \(a/picture_11.jpg\) in {where} {said}.*rerun data_prep/{packer}.py"
    ) as caught:
        batches(name, folder, 4)
    assert "\n" not in str(caught.value)


@every
def test_a_shard_that_is_gone_before_it_is_read_is_named(name, make_shards):
    folder = make_shards()
    with opened(name, folder, 40) as pipeline:
        remove(folder)
        with pytest.raises(ValueError, match=rf"{stored_in(name)} is missing"):
            list(pipeline)


@every
def test_a_shard_removed_while_it_is_read_is_read_on(name, make_shards, whole):
    """The system keeps a file that is open; the run goes on, as every step after it shows the same pictures."""
    folder = make_shards()
    with opened(name, folder, 7) as pipeline:
        made = iter(pipeline)
        got = [next(made) for _ in range(4)]  # until every shard is open
        remove(folder)
        got += list(made)
    for one, other in zip(got, whole(name), strict=True):
        assert_same(one, other)


def remove(folder: Path) -> None:
    for shard in [*folder.glob("*.tar"), *beton_beside(folder).glob("*.beton")]:
        shard.unlink()


@every
def test_a_shard_cut_short_while_it_is_read_is_named(name, make_shards):
    """Not before: then it would not be opened. Mapped memory would end the process with SIGBUS here."""
    folder = make_shards()
    with opened(name, folder, 60) as pipeline:
        made = iter(pipeline)
        for _ in range(4):  # until every shard is open
            next(made)
        damage(data_for(name, folder), 8, "cut")
        where = stored_in(name, "shard-000001.tar")
        with pytest.raises(ValueError, match=rf"sample \d+ \(a/picture_\d+.jpg\) in {where} is not whole, .*cut short"):
            list(made)


# ------------------------------------------------------------------------------------------------ memory, and what hangs


@compiled
def test_out_of_memory_is_a_sentence(name, shards, monkeypatch):
    """What PyTorch says when a GPU is full."""
    from pipelines.finish import Finish

    def full(self, work, *made):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(Finish, "__call__", full)
    with opened(name, shards, 3) as pipeline:
        with pytest.raises(
            MemoryError, match="the pipeline ran out of memory on the host: set a smaller --prefetch or"
        ) as caught:
            list(pipeline)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("told", "error", "said"),
    [
        ("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory", MemoryError, "ran out of memory on the host"),
        ("something else", RuntimeError, "^something else$"),
    ],
)  # fmt: skip
def test_an_error_of_dali_is_explained_or_stays_what_it_is(told, error, said, shards, monkeypatch):
    """That no picture is to blame for. Simulated."""
    installed("dali")
    from pipelines import dali

    def fail(self):
        raise RuntimeError(told)

    with opened("dali", shards, 3) as pipeline:
        monkeypatch.setattr(dali.Graph, "run", fail)
        with pytest.raises(error, match=said) as caught:
            list(pipeline)
        assert "\n" not in str(caught.value)
        monkeypatch.undo()


@compiled
def test_a_disk_that_hangs_is_told(name, shards, monkeypatch):
    # Of the last step, so that no sample of it is asked for by a step before it.
    order = EpochOrder(20, 8, 0)
    hangs = set(order.rank_batch(3, 0, 1).tolist()) - set(order.rank_batch(2, 0, 1).tolist())
    read, asked, over = DatasetIndex.read, [], threading.Event()

    def slow(self, sample_id, *arguments, **settings):
        asked.append(sample_id)
        if sample_id in hangs and len(asked) > 24:
            over.wait(60)
        return read(self, sample_id, *arguments, **settings)

    monkeypatch.setattr(DatasetIndex, "read", slow)
    with opened(name, shards, 4, loader={"stall_timeout": 1.4}) as pipeline:
        with pytest.raises(
            TimeoutError,
            match="no batch came for 1 s; the pipeline hangs at: reading (or decoding )?the samples of step 3",
        ):
            list(pipeline)
        over.set()


# ------------------------------------------------------------------------------------------------------ whole processes


def python(body: str, name: str, data: Path, **settings) -> list[str]:
    """A program that has `pipeline`, opened at step 3 and not closed."""
    head = f"""
        import sys, threading
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tests.pipelines.conftest import digest, opened

        def resident():
            return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

        pipeline = opened({name!r}, Path({str(data)!r}), 10**6, start_step=3, loader={{"threads": 2}}, **{settings!r})
        """
    return [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(body)]


@every
def test_a_process_of_its_own(name, make_shards):
    """Begun in the middle, with bad samples it knows nothing of: the same batches. 60 epochs take no more memory than 20. And a
    consumer that leaves without closing, by an exception, ends at once, with that exception."""
    folder = make_shards(jpegs={5: NO_JPEG, 7: NO_JPEG})
    body = """
        for step, batch in enumerate(pipeline, 3):
            if step < 7:
                print(digest(batch))
            if step in (100, 299):
                print(resident())
            if step == 300:
                raise KeyError("the consumer's own")
        """
    settings = {"substitute": True, "batch_size": 4}
    wanted = batches(name, folder, 7, **settings)[3:]
    done = subprocess.run(python(body, name, folder, **settings), capture_output=True, text=True, timeout=180)
    assert done.returncode == 1 and "the consumer's own" in done.stderr, done.stderr
    *digests, early, late = done.stdout.split()
    assert digests == [digest(batch) for batch in wanted]
    # The reference's batches come through pipes, into memory that comes and goes.
    assert float(late) < float(early) + (30 if name == "reference" else 6)


@compiled
def test_ctrl_c_in_the_middle_ends_clean(name, shards):
    body = """
        try:
            with pipeline:
                for i, batch in enumerate(pipeline):
                    if i == 5:
                        print("running", flush=True)
        except KeyboardInterrupt:
            print("stopped", sum(thread.name.startswith("inscon-") for thread in threading.enumerate()), flush=True)
        """
    process = subprocess.Popen(
        python(body, installed(name), shards), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:  # Python drops a Ctrl-C that comes while something is finalized
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert out == "stopped 0\n" and process.returncode == 0, err
