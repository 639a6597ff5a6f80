"""What goes wrong while a run reads its data: one sentence naming shard and sample, or survived and counted; no hang, no leak."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from data_prep.index import DatasetIndex
from pipelines import open_pipeline
from pipelines.feed import open_feed
from tests.pipelines.conftest import beton_beside, data_for
from tests.pipelines.test_engines import assert_same, batches, engine, opened, packer, stored_in

ROOT = Path(__file__).resolve().parents[2]
NO_JPEG = b"\xff\xd8\xff\xe0" + bytes(3000)
"""With the right checksum: packed like that, say by another program. No decoder takes it."""
every = pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])


def substituting(config):
    return dataclasses.replace(config, loader=dataclasses.replace(config.loader, on_bad_sample="substitute"))


def damage(folder: Path, sample_id: int, how: str = "flip") -> None:
    """Change one sample of a packed set behind its back: one bit of its bytes, or everything from it on is gone."""
    index = DatasetIndex.open(folder)
    record = index.records([sample_id])[0]
    shard = folder / index.manifest.shards[record["shard"]].name
    if how == "cut":
        os.truncate(shard, int(record["offset"]) + 10)
        return
    at = int(record["offset"]) + int(record["byte_count"]) // 2
    with open(shard, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def step_of(config, sample_id: int, after: int = 0) -> int:
    """The first step from `after` on that shows a sample."""
    feed = open_feed(config, 0, 1)
    return next(step for step in range(after, after + 50) if sample_id in feed.order.global_batch(step))


def ids_of(made) -> list[list[int]]:
    return [batch.sample_ids.tolist() for batch in made]


@every
def test_a_flipped_bit_is_named(name, make_config, make_shards):
    folder = make_shards()
    damage(data_for(name, folder), 11)
    with pytest.raises(ValueError) as caught:
        batches(name, make_config(folder), 4)
    message = str(caught.value)
    where = stored_in(name, "shard-000001.tar")
    assert f"sample 11 (a/picture_11.jpg) in {where} is not as it was packed, its bytes have changed" in message
    assert f"rerun {packer(name)}" in message and "\n" not in message


@every
def test_a_shard_cut_short_while_it_is_read_is_named(name, make_config, make_shards):
    """Not before: then it would not be opened. Mapped memory would end the process with SIGBUS here."""
    folder = make_shards()
    config = make_config(folder)
    with opened(name, config=config, total_steps=60) as pipeline:
        made = iter(pipeline)
        for _ in range(4):  # until every shard is open
            next(made)
        damage(data_for(name, folder), 8, "cut")
        where = stored_in(name, "shard-000001.tar")
        with pytest.raises(ValueError, match=rf"sample \d+ \(a/picture_\d+.jpg\) in {where} is not whole, .*cut short"):
            list(made)


@pytest.mark.parametrize("name", ["dali", "ffcv"])
def test_a_shard_removed_while_it_is_read_is_read_on(name, make_config, make_shards):
    """The system keeps a file that is open; the run goes on, as every step after it shows the same pictures."""
    folder = make_shards()
    config = make_config(folder)
    wanted = batches(name, config, 12)
    with opened(name, config=config, total_steps=12) as pipeline:
        made = iter(pipeline)
        got = [next(made) for _ in range(4)]
        for shard in [*folder.glob("*.tar"), *beton_beside(folder).glob("*.beton")]:
            shard.unlink()
        got += list(made)
    for one, other in zip(got, wanted, strict=True):
        assert_same(one, other)


@every
@pytest.mark.parametrize("fault", ["flip", "cut", "no jpeg", "wrong size"])
def test_bad_samples_are_substituted_named_and_counted(name, fault, make_config, make_shards, caplog):
    """Two bad ones in a set of 20, of which an epoch of two steps leaves 4 over."""
    # 17 is the last sample of its shard, of the beton 19.
    bad = {5, 13} if fault != "cut" else {17, 18, 19} if name == "ffcv" else {17}
    changes = {
        "no jpeg": {"jpegs": dict.fromkeys(bad, NO_JPEG)},
        "wrong size": {"sizes": dict.fromkeys(bad, (900, 900))},
    }
    folder = make_shards(**changes.get(fault, {}))
    config = substituting(make_config(folder))
    order = open_feed(config, 0, 1).order
    for sample in bad if fault == "flip" else ():
        damage(data_for(name, folder), sample)
    with opened(name, config=config, total_steps=12) as pipeline:
        made = [next(iter(pipeline)) for _ in range(4)]  # until every shard is open
        if fault == "cut":
            damage(data_for(name, folder), 17, "cut")
        made += list(pipeline)
        figures, found = pipeline.read(), pipeline.bad_samples()
    met = set(found) & bad
    assert met and set(found) <= bad
    stood_in = 0
    for step, ids in enumerate(ids_of(made)):
        shown = order.global_batch(step).tolist()
        assert len(set(ids)) == 8
        replaced = [(old, new) for old, new in zip(shown, ids, strict=True) if old != new]
        stood_in += len(replaced)
        if fault != "cut":  # where the sample was whole for a while
            assert {old for old, _ in replaced} == bad & set(shown)
            assert not bad & set(ids)
        for _, new in replaced:
            assert new in order.left_over(step // 2)
    assert stood_in and figures["loader_substituted"] == stood_in
    for sample in met:
        said = [
            record.getMessage()
            for record in caplog.records
            if f"sample {sample} (a/picture_{sample}.jpg)" in record.getMessage()
        ]
        assert len(said) == 1 and "stands in for it" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("name", ["dali", "ffcv"])
def test_engines_substitute_alike(name, make_config, make_shards):
    folder = make_shards(jpegs={5: NO_JPEG, 12: NO_JPEG})
    damage(folder, 13)
    damage(beton_beside(folder), 13)
    config = substituting(make_config(folder))
    for one, other in zip(batches(name, config, 10), batches("reference", config, 10), strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert torch.equal(one.query.crop_box, other.query.crop_box)
        assert (one.query.pixels - other.query.pixels).abs().mean() < 0.01


@every
@pytest.mark.parametrize("start_step", range(1, 7))
def test_resuming_with_bad_samples_repeats_the_batches(name, start_step, make_config, make_shards):
    """What the stopped run had met by then is all that is needed."""
    folder = make_shards(jpegs={5: NO_JPEG, 7: NO_JPEG})
    damage(data_for(name, folder), 13)
    config = substituting(make_config(folder, threads=0 if name == "reference" else 1))
    with opened(name, config=config, total_steps=7) as pipeline:
        whole = list(pipeline)
    with opened(name, config=config, total_steps=start_step) as pipeline:
        list(pipeline)
        known = pipeline.bad_samples()
    rest = batches(name, config, 7, start_step=start_step, bad_samples=known)
    for one, other in zip(whole[start_step:], rest, strict=True):
        assert_same(one, other)


@every
def test_repaired_samples_are_trusted_again_with_fail(name, make_config):
    config = make_config()
    for one, other in zip(batches(name, config, 4, bad_samples=[3, 11]), batches(name, config, 4), strict=True):
        assert_same(one, other)
    with opened(name, config=substituting(config), total_steps=4, bad_samples=[3, 11]) as pipeline:
        ids = [sample for batch in pipeline for sample in batch.sample_ids.tolist()]
    assert not {3, 11} & set(ids)


@every
def test_more_bad_samples_than_spares_is_an_error(name, make_config, make_shards):
    folder = make_shards(jpegs=dict.fromkeys(range(12), NO_JPEG))
    with pytest.raises(ValueError, match=r"no sample is left to stand in at step \d.*Pack the set again"):
        batches(name, substituting(make_config(folder)), 8)


def test_out_of_memory_is_a_sentence(make_config, monkeypatch):
    """Simulated: what DALI says when a GPU is full, and what PyTorch says."""
    from pipelines import dali

    def full(self):
        raise RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory")

    config = make_config()
    with open_pipeline("dali", config=config, total_steps=3) as pipeline, monkeypatch.context() as patch:
        patch.setattr(dali.Graph, "run", full)
        with pytest.raises(
            MemoryError, match="dali ran out of memory on the host: set a smaller --prefetch or"
        ) as caught:
            next(iter(pipeline))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dali", "ffcv"])
def test_out_of_device_memory_is_a_sentence(name, make_config, monkeypatch):
    from pipelines.finish import Finish

    def torch_full(self, work, made):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    with opened(name, config=make_config(), total_steps=3) as pipeline:
        monkeypatch.setattr(Finish, "__call__", torch_full)
        with pytest.raises(MemoryError, match=f"{name} ran out of memory on the host: set a smaller --prefetch or"):
            next(iter(pipeline))


def test_an_error_of_dali_that_no_picture_is_to_blame_for_stays_what_it_is(make_config, monkeypatch):
    from pipelines import dali

    with open_pipeline("dali", config=make_config(), total_steps=3) as pipeline:
        monkeypatch.setattr(dali.Graph, "run", lambda self: (_ for _ in ()).throw(RuntimeError("something else")))
        with pytest.raises(RuntimeError, match="something else"):
            next(iter(pipeline))


@pytest.mark.parametrize("name", ["dali", "ffcv"])
def test_a_disk_that_hangs_is_told(name, make_config, monkeypatch):
    config = make_config()
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, stall_timeout=1.4))
    # Of the last step, so that no sample of it is asked for by a step before it.
    order = open_feed(config, 0, 1).order
    hangs = set(order.global_batch(3).tolist()) - set(order.global_batch(2).tolist())
    read, asked, over = DatasetIndex.read, [], threading.Event()

    def slow(self, sample_id, *arguments, **settings):
        asked.append(sample_id)
        if sample_id in hangs and len(asked) > 24:
            over.wait(60)
        return read(self, sample_id, *arguments, **settings)

    monkeypatch.setattr(DatasetIndex, "read", slow)
    with opened(name, config=config, total_steps=4) as pipeline:
        with pytest.raises(
            TimeoutError,
            match="no batch came for 1 s; the pipeline hangs at: reading (or decoding )?the samples of step 3",
        ):
            list(pipeline)
        over.set()


SCRIPT = """
    import os, signal, sys, threading
    sys.path.insert(0, {root!r})
    from inscon.config import Config, LoaderConfig, OptimConfig, ViewConfig
    from pipelines import open_pipeline
    config = Config(
        loader=LoaderConfig(data={data!r}, threads=2), views=ViewConfig(view_size=64), optim=OptimConfig(batch_size=8)
    )
    def resident():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
"""


def command(body: str, data: Path) -> list[str]:
    code = textwrap.dedent(SCRIPT).format(root=str(ROOT), data=str(data)) + textwrap.dedent(body)
    return [sys.executable, "-c", code]


def run_script(body: str, data: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(body, data), capture_output=True, text=True, timeout=180)


@every
def test_a_consumer_that_leaves_without_closing_ends(name, shards):
    """No context manager, an exception in the middle: the process ends by itself, at once, with the exception."""
    engine(name)
    done = run_script(
        f"""
        if __name__ == "__main__":
            for i, batch in enumerate(open_pipeline({name!r}, config=config, total_steps=1000)):
                if i == 3:
                    raise KeyError("the consumer's own")
        """,
        data_for(name, shards),
    )
    assert done.returncode == 1 and "the consumer's own" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["dali", "ffcv"])
def test_ctrl_c_in_the_middle_ends_clean(name, shards):
    engine(name)
    body = f"""
        try:
            with open_pipeline({name!r}, config=config, total_steps=10**6) as pipeline:
                for i, batch in enumerate(pipeline):
                    if i == 5:
                        print("running", flush=True)
        except KeyboardInterrupt:
            print("stopped", sum(thread.name.startswith("inscon-") for thread in threading.enumerate()), flush=True)
        """
    process = subprocess.Popen(
        command(body, data_for(name, shards)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "stopped 0\n" and process.returncode == 0, err


@every
def test_a_hundred_epochs_take_no_more_memory_than_a_few(name, shards):
    """Two steps each. The reference's workers hand over shared memory, whose size comes and goes."""
    engine(name)
    done = run_script(
        f"""
        if __name__ == "__main__":
            with open_pipeline({name!r}, config=config, total_steps=700) as pipeline:
                for step, batch in enumerate(pipeline):
                    if step in (240, 699):
                        print(resident())
        """,
        data_for(name, shards),
    )
    assert done.returncode == 0, done.stderr
    early, late = map(float, done.stdout.split())
    assert late < early + (30 if name == "reference" else 6), (
        f"{early:.0f} MB after 120 epochs, {late:.0f} MB after 350"
    )
