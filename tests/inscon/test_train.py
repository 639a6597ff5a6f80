"""The loop and what it leaves behind: metrics, checkpoints, resuming, stopping. The loader is a list of batches."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from inscon import checkpoint, train
from inscon.batch import Batch, View
from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig, resolve
from inscon.meters import LossMeter, MetricsLog, Stopwatch
from inscon.model import Losses
from inscon.mosaic import assemble

SIDE, BATCH, PER_EPOCH = 64, 8, 3
CPU = torch.device("cpu")


def make_config(run_dir, **run):
    return resolve(
        Config(
            views=ViewConfig(view_size=SIDE),
            model=ModelConfig(arch="resnet18", queue_size=16, cell_queue_size=144),
            optim=OptimConfig(batch_size=BATCH, epochs=2),
            run=RunConfig(run_dir=run_dir, log_every=1, checkpoint_every=2, tensorboard=False, **run),
        ),
        1,
    )


def batch_of(step):
    generator = torch.Generator().manual_seed(step)

    def view():
        pixels = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator).to(memory_format=torch.channels_last)
        return View(
            pixels=pixels, crop_box=torch.tensor([[0.0, 0, 100, 100]]).repeat(BATCH, 1), flipped=torch.zeros(BATCH) > 0
        )

    query = view()
    return Batch(query=query, key=view(), mosaic=assemble(query.pixels), sample_ids=torch.arange(BATCH))


def run(config, total=6, data="set A", spoil=None):
    training = train.set_up(config, CPU, data)

    def loader():
        for step in range(training.step, total):
            if spoil:
                spoil(step)
            yield batch_of(step)

    train.train(training, loader(), PER_EPOCH, total)
    return training


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(run_dir):
    return [
        (line["step"], line["loss"], line["loss_single"], line["loss_multi"], line["loss_cell"])
        for line in lines(run_dir)
    ]


def test_a_run_logs_every_window_and_keeps_the_newest_checkpoints(tmp_path):
    training = run(make_config(tmp_path))
    assert training.step == 6
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    for line in logged:
        assert line["loss"] == pytest.approx(line["loss_single"] + line["loss_multi"] + line["loss_cell"], rel=1e-5)
        assert {"top1_single", "top1_multi", "top1_cell", "images_per_s", "data_wait_percent", "step_s", "lr"} <= set(
            line
        )
        assert 0 <= line["top1_cell"] <= 1 and 0 <= line["data_wait_percent"] <= 100
        assert line["images_per_s"] == pytest.approx(BATCH / line["step_s"])
    assert [line["lr"] for line in logged] == pytest.approx([0.03] * 3 + [0.015] * 3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004.pt", "step-00000006.pt"]
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == training.config.to_dict() and written["model"]["cell_queue_size"] == 144


def test_a_crash_and_a_resume_equal_the_undisturbed_run_bit_for_bit(tmp_path):
    undisturbed = run(make_config(tmp_path / "a"))

    def crash(step):
        if step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(make_config(tmp_path / "b"), spoil=crash)
    assert lines(tmp_path / "b")[-1]["step"] == 5
    with open(tmp_path / "b/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a line cut short by the kill
    resumed = run(make_config(tmp_path / "b"))
    assert losses_of(tmp_path / "b") == losses_of(tmp_path / "a")
    ours, theirs = resumed.state_dict(), undisturbed.state_dict()
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in theirs["model"].items():
        assert (
            torch.equal(ours["model"][name], value) if isinstance(value, torch.Tensor) else ours["model"][name] == value
        ), name
    for index, state in theirs["optimizer"]["state"].items():
        assert torch.equal(ours["optimizer"]["state"][index]["momentum_buffer"], state["momentum_buffer"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, number, capsys):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    training = run(make_config(tmp_path), spoil=lambda step: step == 2 and os.kill(os.getpid(), number))
    assert training.step == 3
    assert checkpoint.latest(tmp_path).name == "step-00000003.pt"
    assert f"Stopped by {number.name}; the checkpoint of step 3" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert run(make_config(tmp_path)).step == 6
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_what_repeats_a_signal_does_not_lose_the_checkpoint(tmp_path, monkeypatch):
    """Slurm signals every process of a job and torchrun once more: during the step, and while the checkpoint is written."""
    save = checkpoint.save

    def save_under_fire(*arguments):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", save_under_fire)
    training = run(
        make_config(tmp_path), spoil=lambda step: step == 2 and [signal.raise_signal(signal.SIGTERM) for _ in range(3)]
    )
    assert training.step == 3 and checkpoint.latest(tmp_path).name == "step-00000003.pt"


def test_an_evaluation_is_left_off_for_a_stop(tmp_path):
    training = train.set_up(make_config(tmp_path, eval_every=2), CPU, "set A")

    def monitor(leave_off):
        assert not leave_off()
        signal.raise_signal(signal.SIGTERM)
        assert leave_off()
        return {"knn": 0.1}

    assert train.train(training, (batch_of(step) for step in range(6)), PER_EPOCH, 6, monitor=monitor)
    assert checkpoint.latest(tmp_path).name == "step-00000002.pt"
    assert ["knn" in line for line in lines(tmp_path)] == [False, False]


class LoaderOfThree:
    """A loader that met two bad samples and says so."""

    def read(self):
        return {"loader_read_ms": 1.5, "loader_substituted": 2.0}

    def bad_samples(self):
        return [9, 4]


def test_what_the_loader_says_is_logged_and_its_bad_samples_are_kept(tmp_path, capsys):
    config = make_config(tmp_path)
    training = train.set_up(config, CPU, "set A")
    assert training.bad_samples == []
    train.train(training, [batch_of(step) for step in range(3)], PER_EPOCH, 3, telemetry=LoaderOfThree())
    assert all(line["loader_read_ms"] == 1.5 and line["loader_substituted"] == 2 for line in lines(tmp_path))
    assert "2 samples substituted" in capsys.readouterr().out
    assert train.set_up(config, CPU, "set A").bad_samples == [4, 9]


def test_losses_that_are_not_finite_stop_the_run_in_one_sentence(tmp_path):
    config = make_config(tmp_path)
    training = train.set_up(config, CPU, "set A")
    bad = batch_of(0)
    bad.query.pixels[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is not finite any more. Found: nan; lower --lr"):
        train.train(training, [bad], PER_EPOCH, 1)
    assert checkpoint.latest(tmp_path) is None


def changed(config, group, **settings):
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **settings)})


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    config = make_config(tmp_path)
    run(config, total=2)
    refused = [
        (changed(config, "optim", lr=0.1), r"optim.lr was 0.03 and is 0.1"),
        (changed(config, "views", view_size=96), r"views.view_size was 64 and is 96"),
        (changed(config, "model", temperature=0.1), r"model.temperature was 0.2 and is 0.1"),
        (changed(config, "run", seed=1), r"run.seed was 0 and is 1"),
    ]
    for other, message in refused:
        with pytest.raises(
            checkpoint.CheckpointError, match=f"another configuration: .*{message}.*set another --run-dir"
        ):
            train.set_up(other, CPU, "set A") if "view" not in message else checkpoint.check_continues(
                checkpoint.load(checkpoint.latest(tmp_path)), "x", other.to_dict(), "set A"
            )
    with pytest.raises(checkpoint.CheckpointError, match="the data set was set A and is set B"):
        train.set_up(config, CPU, "set B")
    with pytest.raises(ValueError, match="must hold no checkpoint with --resume never. Found: .*step-00000002.pt"):
        train.set_up(changed(config, "run", resume="never"), CPU, "set A")
    elastic = changed(changed(config, "run", log_every=7), "loader", threads=3, pipeline="reference")
    assert train.set_up(elastic, CPU, "set A").step == 2
    assert elastic.loader == LoaderConfig(threads=3, pipeline="reference")


def test_checkpoints_that_are_none_say_so(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint at"):
        checkpoint.load(tmp_path / "step-00000001.pt")
    path = checkpoint.save(tmp_path, {"step": 1}, keep=2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(checkpoint.CheckpointError, match="can't be read as a checkpoint .*; delete it"):
        checkpoint.load(path)
    torch.save({"version": 99, "step": 1}, path)
    with pytest.raises(checkpoint.CheckpointError, match="is of checkpoint version 99, this program reads 1"):
        checkpoint.load(path)


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


def test_loading_a_checkpoint_runs_no_code_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.save(tmp_path, {"step": 1, "model": Harmful()}, keep=2)
    with pytest.raises(checkpoint.CheckpointError, match="can't be read as a checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "harmed").exists()


def test_a_checkpoint_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"step": 1}, keep=2)

    def full_disk(contents, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, {"step": 2}, keep=1)
    assert checkpoint.latest(tmp_path).name == "step-00000001.pt"


def test_meters_read_means_and_start_anew(monkeypatch):
    meter = LossMeter()
    for value in (1.0, 3.0):
        total = torch.tensor(value)
        meter.add(Losses(single=total, multi=None, cell=None, total=total, top1={"single": total / 10}))
    assert meter.read() == pytest.approx({"loss": 2.0, "loss_single": 2.0, "top1_single": 0.2})
    clock = iter([0.0, 1.0, 2.0, 5.0, 5.0, 10.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch()  # at 0
    waits = watch.waits([1, 2])
    next(waits), next(waits)  # 1..2 and 5..5
    assert watch.read() == {"step_s": 5.0, "data_wait_percent": 10.0}  # at 10


def test_tensorboard_gets_every_value(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path, 10, 0, tensorboard=True) as log:
        log.write(
            3,
            {
                "loss": 7.0,
                "loss_cell": 2.0,
                "top1_cell": 0.5,
                "step_s": 0.1,
                "images_per_s": 80.0,
                "data_wait_percent": 1.0,
            },
        )
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"run/loss", "loss/cell", "top1/cell", "run/images_per_s"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("loss/cell")] == [(3, 2.0)]
