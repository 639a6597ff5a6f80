"""The loop and what it leaves behind: metrics, checkpoints, resuming, stopping. The loader is a list of batches."""

import dataclasses
import json
import math
import os
import signal
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inscon import checkpoint, guard, train
from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig
from inscon.meters import LossMeter, MetricsLog, Pace, Stopwatch, unsteady
from inscon.methods import inscon
from inscon.methods.method import resolve
from inscon.nn.norm import SplitBatchNorm2d
from inscon.transfer import knn
from inscon.transfer.export import any_backbone
from tests.inscon.methods.steps import make_batch

SIDE, BATCH, PER_EPOCH = 64, 8, 3
CPU = torch.device("cpu")


def make_config(run_dir, **run):
    return resolve(
        Config(
            method=inscon.Settings(queue_size=16, cell_queue_size=144),
            views=ViewConfig(view_size=SIDE),
            model=ModelConfig(backbone="test_resnet"),
            optim=OptimConfig(batch_size=BATCH, epochs=2),
            run=RunConfig(run_dir=run_dir, log_every=1, checkpoint_every=2, **run),
        ),
        1,
    )


def batch_of(step):
    return make_batch(inscon.Settings(), step, BATCH, torch.float32, ViewConfig(view_size=SIDE))


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
    assert written == training.config.to_dict() and written["method"]["cell_queue_size"] == 144


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


@pytest.mark.parametrize("number", guard.STOPS)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, number, capsys):
    handlers = [signal.getsignal(one) for one in guard.STOPS]
    training = run(make_config(tmp_path), spoil=lambda step: step == 2 and os.kill(os.getpid(), number))
    assert training.step == 3
    assert checkpoint.latest(tmp_path).name == "step-00000003.pt"
    assert f"Stopped by {number.name}; the checkpoint of step 3" in capsys.readouterr().out
    assert [signal.getsignal(one) for one in guard.STOPS] == handlers
    assert run(make_config(tmp_path)).step == 6
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_what_repeats_a_signal_does_not_lose_the_checkpoint(tmp_path, monkeypatch):
    """Slurm signals every process of a job and torchrun once more: during the step, and while the checkpoint is written."""
    save = checkpoint.save

    def save_under_fire(*arguments):
        for number in (*guard.STOPS, signal.SIGTERM):
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


def of_loader():
    """What a loader says that met two bad samples."""
    return {"loader_read_ms": 1.5, "loader_substituted": 2.0}


def test_what_the_loader_says_is_logged(tmp_path, capsys):
    config = make_config(tmp_path)
    training = train.set_up(config, CPU, "set A")
    train.train(training, [batch_of(step) for step in range(3)], PER_EPOCH, 3, telemetry=of_loader)
    assert all(line["loader_read_ms"] == 1.5 and line["loader_substituted"] == 2 for line in lines(tmp_path))
    assert "2 samples substituted" in capsys.readouterr().out


def test_losses_that_are_not_finite_stop_the_run_in_one_sentence(tmp_path):
    config = make_config(tmp_path)
    training = train.set_up(config, CPU, "set A")
    bad = batch_of(0)
    bad.views["query"].pixels[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"Found: nan at step 1; there is no checkpoint yet: .*--lr 0.015$"):
        train.train(training, [bad], PER_EPOCH, 1)
    assert checkpoint.latest(tmp_path) is None
    assert run(changed(config, "optim", lr=0.015), total=1).step == 1  # which the sentence advises


def gradient_at(training, steps, value):
    """In these steps, one gradient becomes `value` times what it is."""
    weight = training.method.query_encoder.backbone.network.conv1[0].weight
    weight.register_hook(lambda gradient: gradient * value if training.step in steps else gradient)


def poison(monkeypatch):
    """Memory that nobody filled holds NaN."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))


def test_overflows_at_the_start_and_in_the_middle_leave_a_run_finite(tmp_path, monkeypatch):
    """As in float16, whose first steps always overflow; here on a CPU, with the gradients made infinite."""
    poison(monkeypatch)
    config = make_config(tmp_path)
    training = train.set_up(config, CPU, "set A")
    training.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    gradient_at(training, {0, 2}, torch.inf)
    train.train(training, [batch_of(step) for step in range(4)], PER_EPOCH, 4)
    assert training.scaler.get_scale() == 16 and checkpoint.not_finite(training.state_dict()) is None
    resumed = train.set_up(config, CPU, "set A")  # whose scaler is off, as with --precision fp32
    assert resumed.step == 4 and checkpoint.not_finite(resumed.state_dict()) is None
    monkeypatch.undo()
    without = checkpoint.load(checkpoint.latest(tmp_path))["optimizer"]["state"]
    assert all(torch.equal(held["momentum_buffer"], value["momentum_buffer"]) for held, value in zip(
        resumed.optimizer.state.values(), without.values(), strict=True))  # fmt: skip


@pytest.mark.slow
def test_a_run_goes_on_fused_and_plain_again(tmp_path, monkeypatch):
    """Checkpoints, exports and the monitor of kNN do not know whether BatchNorm was fused. Interpreted here, with large tiles."""
    fused_norm = pytest.importorskip("inscon.nn.fused_norm", reason="Triton is not installed")
    monkeypatch.setattr(fused_norm, "CHECKED", (2, 3, 5, 5))
    if reason := fused_norm.refusal(CPU, torch.float32):
        pytest.skip(f"Triton's interpreter is off: {reason}")
    monkeypatch.setattr(fused_norm, "TILE", 2**16), monkeypatch.setattr(fused_norm, "REDUCED", 2**16)
    config = changed(make_config(tmp_path), "method", heads=("single",))
    run(changed(config, "run", run_dir=tmp_path / "plain"), total=2)
    run(config, total=1)
    fused = train.set_up(config, CPU, "set A")
    train.fuse_kernels(fused.method, CPU, torch.float32, synced=False)
    assert fused.step == 1
    kinds = {type(module) for module in fused.method.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert kinds == {fused_norm.FusedBatchNorm2d}  # of queries and of keys
    train.train(fused, [batch_of(1)], PER_EPOCH, 2)
    losses = [[line["loss"] for line in lines(folder)] for folder in (tmp_path, tmp_path / "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    crops = [(torch.randn(8, 3, SIDE, SIDE), torch.arange(8) % 2)]
    again, exported = train.set_up(config, CPU, "set A"), any_backbone(tmp_path)[0]
    assert again.step == 2 and again.method.state_dict().keys() == fused.method.state_dict().keys()
    for name, value in again.method.state_dict().items():
        assert not torch.is_tensor(value) or torch.equal(value, fused.method.state_dict()[name]), name
    assert knn.monitor(fused.method.backbone, crops) == knn.monitor(again.method.backbone, crops)
    assert fused.method.backbone.training
    fused.method.eval(), again.method.eval()
    with torch.no_grad():
        for stride, expected in again.method.backbone(crops[0][0]).items():
            torch.testing.assert_close(fused.method.backbone(crops[0][0])[stride], expected)
            torch.testing.assert_close(exported(crops[0][0])[stride], expected)


def test_a_device_without_the_kernels_keeps_pytorchs(tmp_path, monkeypatch, capsys):
    method = train.set_up(make_config(tmp_path), CPU, "set A").method
    monkeypatch.setitem(sys.modules, "inscon.nn.fused_norm", None)  # as where Triton is missing
    monkeypatch.delattr(sys.modules["inscon.nn"], "fused_norm", raising=False)
    train.fuse_kernels(method, CPU, torch.float32, synced=False)
    said = capsys.readouterr().err
    assert all(said.count(f"the {name} kernels do not serve on cpu (") == 1 for name in ("BatchNorm", "pooling"))
    assert type(method.backbone.network.bn1) is SplitBatchNorm2d


def test_ranks_agree_on_their_kernels(tmp_path, monkeypatch, capsys):
    """Those of another card do not serve: what ranks exchange in synchronized BatchNorm must be the same."""
    fused_norm = pytest.importorskip("inscon.nn.fused_norm", reason="Triton is not installed")
    method = train.set_up(make_config(tmp_path), CPU, "set A").method
    monkeypatch.setattr(fused_norm, "refusal", lambda device, dtype: None)
    monkeypatch.setattr("inscon.distributed.any_rank", lambda refused: True)
    train.fuse_kernels(method, CPU, torch.float32, synced=True)
    assert "(on another rank)" in capsys.readouterr().err and type(method.backbone.network.bn1) is SplitBatchNorm2d


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_half_precision_on_a_gpu_stays_finite(tmp_path):
    config = changed(make_config(tmp_path), "optim", precision="fp16", epochs=67)
    config = changed(config, "run", log_every=50)
    training = train.set_up(config, torch.device("cuda"), "set A")
    assert training.graph is not None
    training.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    train.train(training, (on_gpu(batch_of(step)) for step in range(200)), PER_EPOCH, 200)
    assert training.scaler.get_scale() < 2**40  # the first steps overflowed
    assert checkpoint.not_finite(training.state_dict()) is None and len(lines(tmp_path)) == 4


def on_gpu(batch):
    return batch.each(torch.Tensor.cuda)


@pytest.mark.parametrize("ending", ["finished", "signal", "evaluation"])
def test_weights_that_are_not_finite_are_neither_saved_nor_evaluated(tmp_path, ending, capsys):
    """The step's loss is sound, its update isn't. The last checkpoint stays, and the run goes on as the sentence advises."""
    config, evaluated = make_config(tmp_path, eval_every=3), []
    training, total = train.set_up(config, CPU, "set A"), 3 if ending == "finished" else 6
    gradient_at(training, {2}, torch.nan)

    def loader():
        for step in range(total):
            if step == 2 and ending == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch_of(step)

    with pytest.raises(FloatingPointError) as found:
        monitor = (lambda: evaluated.append(training.step) or {}) if ending == "evaluation" else None
        train.train(training, loader(), PER_EPOCH, total, monitor=monitor)
    sentence = str(found.value)
    assert (
        "model.query_encoder.backbone.network.conv1.0.weight is not finite any more at step 3" in sentence
        and not evaluated
    )
    assert f"the last checkpoint, {tmp_path}/checkpoints/step-00000002.pt, is finite" in sentence
    assert sentence.endswith("go on from it with --lr 0.015 --change-on-resume lr")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.pt"]
    slower = changed(changed(config, "optim", lr=0.015), "run", change_on_resume=("lr",))
    assert run(slower, total=3).step == 3
    assert "from step 2. Changed: lr 0.03 -> 0.015" in capsys.readouterr().out
    assert lines(tmp_path)[-1]["lr"] == 0.015 and [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert checkpoint.load(checkpoint.latest(tmp_path))["config"]["optim"]["lr"] == 0.015
    again = train.set_up(changed(slower, "run", change_on_resume=()), CPU, "set A")  # it isn't asked for twice
    assert again.step == 3 and again.changes == []


def test_the_sentence_about_a_diverged_run_fits_its_settings(tmp_path):
    config = changed(make_config(tmp_path), "optim", precision="bf16")
    training = train.set_up(config, CPU, "set A")
    gradient_at(training, {1}, torch.nan)
    with pytest.raises(FloatingPointError, match="there is no checkpoint yet: .*--lr 0.015, or with --precision fp32$"):
        train.train(training, [batch_of(step) for step in range(2)], PER_EPOCH, 2)
    run(config, total=2)
    training.step = 2
    with pytest.raises(FloatingPointError, match="--change-on-resume lr, or with --precision fp32$"):
        train._check_weights(training)
    whole = changed(config, "optim", precision="fp32")
    assert train.set_up(whole, CPU, "set A").step == 2


def test_every_rank_stops_where_one_has_diverged(tmp_path, monkeypatch):
    training = train.set_up(make_config(tmp_path), CPU, "set A")
    monkeypatch.setattr("inscon.distributed.any_rank", lambda flag: True)
    with pytest.raises(FloatingPointError, match="a weight of another rank is not finite"):
        train._check_weights(training)


def test_other_settings_of_the_optimizer_take_effect(tmp_path):
    """Those that an optimizer keeps in its own state, too; and another implementation."""
    config = make_config(tmp_path)
    run(config, total=2)
    other = changed(config, "optim", lr=0.02, momentum=0.5, weight_decay=0.0, epochs=4, schedule="cosine-step",
                    optimizer="foreach")  # fmt: skip
    with pytest.raises(ValueError, match="go on with the new ones by --change-on-resume epochs lr momentum"):
        train.set_up(other, CPU, "set A")
    asked = changed(other, "run", change_on_resume=("lr", "momentum", "weight_decay", "epochs", "schedule"))
    training = train.set_up(asked, CPU, "set A")
    [group] = training.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["fused"], group["foreach"]) == (0.5, 0.0, False, True)
    assert {"momentum 0.9 -> 0.5", "epochs 2 -> 4", "schedule cosine-epoch -> cosine-step"} <= set(training.changes)
    assert len(training.optimizer.state) == len(group["params"])
    train.train(training, [batch_of(2)], PER_EPOCH, 3)
    assert lines(tmp_path)[-1]["lr"] == pytest.approx(0.02 * 0.5 * (1 + math.cos(math.pi * 2 / 12)))


def test_what_the_sentences_about_resuming_advise_works(tmp_path):
    config = make_config(tmp_path / "a")
    run(config, total=4)
    warm = changed(config, "method", temperature=0.1)
    with pytest.raises(ValueError) as found:
        train.set_up(warm, CPU, "set A")
    assert "Start with the old settings and data, or set another --run-dir" in str(found.value)
    assert "--change-on-resume" not in str(found.value)  # which would not help
    assert train.set_up(config, CPU, "set A").step == 4
    assert train.set_up(changed(warm, "run", run_dir=tmp_path / "b"), CPU, "set B").step == 0
    newest = checkpoint.latest(tmp_path / "a")
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.raises(ValueError, match="can't be read .*go on from the one before, step-00000002.pt"):
        train.set_up(config, CPU, "set A")
    newest.unlink()
    assert train.set_up(config, CPU, "set A").step == 2


def test_a_checkpoint_that_is_not_finite_is_of_no_use(tmp_path):
    """As earlier versions wrote them: nothing goes on from it, and nothing evaluates it."""
    config = make_config(tmp_path)
    run(config, total=2)
    good = checkpoint.latest(tmp_path)
    contents = torch.load(good, weights_only=True)
    contents["model"]["query_encoder.backbone.network.conv1.0.weight"][0] = torch.nan
    torch.save(contents | {"step": 4}, good.with_name("step-00000004.pt"))
    for use in (lambda: train.set_up(config, CPU, "set A"), lambda: any_backbone(tmp_path),
                lambda: any_backbone(tmp_path, untrained=True)):  # fmt: skip
        with pytest.raises(ValueError, match="step-00000004.pt .*conv1.0.weight is not finite; delete it .*"
                           "the one before, step-00000002.pt"):  # fmt: skip
            use()
    checkpoint.latest(tmp_path).unlink()
    assert train.set_up(config, CPU, "set A").step == 2 and any_backbone(tmp_path)[1]["step"] == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_that_is_not_finite_is_saved_or_pruned_for(tmp_path, value):
    checkpoint.save(tmp_path, {"step": 1, "model": {"weight": torch.ones(3)}}, keep=1)
    broken = torch.tensor([1.0, value])
    for contents in ({"model": {"weight": broken}}, {"optimizer": {"state": {7: {"momentum_buffer": broken}}}}):
        with pytest.raises(FloatingPointError, match="step 2 is not saved: .*(weight|7.momentum_buffer) is not finite"):
            checkpoint.save(tmp_path, {"step": 2, **contents}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


def changed(config, group, **settings):
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **settings)})


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    config = make_config(tmp_path)
    run(config, total=2)
    refused = [
        (changed(config, "optim", lr=0.1), r"optim.lr was 0.03 and is 0.1"),
        (changed(config, "views", view_size=96), r"views.view_size was 64 and is 96"),
        (changed(config, "method", temperature=0.1), r"method.temperature was 0.2 and is 0.1"),
        (changed(config, "run", seed=1), r"run.seed was 0 and is 1"),
    ]
    for other, message in refused:
        with pytest.raises(ValueError, match=f"another configuration: .*{message}.*set another --run-dir"):
            train.set_up(other, CPU, "set A") if "view" not in message else checkpoint.check_continues(
                checkpoint.load(checkpoint.latest(tmp_path)), "x", other.to_dict(), "set A"
            )
    with pytest.raises(ValueError, match="optim.optimizer was 'auto' and is 'lars'"):
        train.set_up(changed(config, "optim", optimizer="lars"), CPU, "set A")
    with pytest.raises(ValueError, match="the data set was set A and is set B"):
        train.set_up(config, CPU, "set B")
    checkpoint.save(tmp_path / "detector", {"step": 1, "design": {}}, keep=1)  # of a fine-tuning
    with pytest.raises(ValueError, match="the data set was None and is set A.*set another --run-dir"):
        train.set_up(changed(config, "run", run_dir=tmp_path / "detector"), CPU, "set A")
    elastic = changed(changed(config, "run", log_every=7), "loader", threads=3, pipeline="reference")
    assert train.set_up(elastic, CPU, "set A").step == 2
    assert elastic.loader == LoaderConfig(threads=3, pipeline="reference")


def test_checkpoints_that_are_none_say_so(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        checkpoint.load(tmp_path / "step-00000001.pt")
    path = checkpoint.save(tmp_path, {"step": 1}, keep=2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="can't be read as a checkpoint .*; delete it"):
        checkpoint.load(path)
    torch.save({"version": 99, "step": 1}, path)
    with pytest.raises(ValueError, match="is of checkpoint version 99, this program reads 2"):
        checkpoint.load(path)


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


def test_loading_a_checkpoint_runs_no_code_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.save(tmp_path, {"step": 1, "model": Harmful()}, keep=2)
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
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
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


def test_a_file_that_cannot_grow_is_named_and_leaves_no_rest(tmp_path, small_files):
    """torch.save hides the system's reason in an error of its own."""
    checkpoint.save(tmp_path, {"step": 1}, keep=2)
    with small_files(100_000), pytest.raises(OSError, match="File too large") as found:
        checkpoint.save(tmp_path, {"step": 2, "model": {"weight": torch.ones(100_000)}}, keep=1)
    assert found.value.filename == str(tmp_path / "checkpoints/step-00000002.pt")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


def test_what_killed_processes_left_goes_with_the_next_checkpoint(tmp_path):
    folder = checkpoint.save(tmp_path, {"step": 1}, keep=2).parent
    for name in ("step-00000002.unfinished", "step-00000002.pt.host-1-2.unfinished"):
        (folder / name).write_bytes(b"half")
    checkpoint.save(tmp_path, {"step": 2}, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001.pt", "step-00000002.pt"]


def test_meters_read_means_and_start_anew(monkeypatch):
    meter, loss = LossMeter(), torch.zeros(())
    for value in (1.0, 3.0):
        loss.fill_(value)  # as a captured step overwrites its own
        meter.add({"loss": loss, "loss_single": loss, "top1_single": loss / 10})
    assert meter.read() == pytest.approx({"loss": 2.0, "loss_single": 2.0, "top1_single": 0.2})
    clock = iter([0.0, 1.0, 2.0, 5.0, 5.0, 10.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch(CPU)  # at 0
    waits = watch.waits([1, 2])
    next(waits), next(waits)  # 1..2 and 5..5
    assert watch.read() == {"step_s": 5.0, "data_wait_percent": 10.0}  # at 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_that_works_does_not_wait_for_data():
    """Its host waits 0.05 s for each batch, it works for 0.1 s and more at each."""

    def batches():
        for number in range(4):
            time.sleep(0.05)
            yield number

    torch.cuda.synchronize()
    watch = Stopwatch(torch.device("cuda"))
    for _ in watch.waits(batches()):
        torch.cuda._sleep(2 * 10**8)  # cycles, of less than 2 GHz
    torch.cuda.synchronize()
    assert watch.read()["data_wait_percent"] < 20


ALONE = [0.4 + 0.01 * (i % 7) for i in range(60)]


@pytest.mark.parametrize(("took_s", "times"), [
    (ALONE, None),
    ([*ALONE, 9.0, 8.0, 7.0], None),  # a few slow ones
    ([*ALONE[:40], *[1.0] * 20], None),  # a laptop that became warm
    ([*ALONE[:40], *[2.0] * 20], "4.9 times the 0.41 s"),
    ([0.4, 0.4, 1.4] * 20, "3.5 times"),
    ([3.0] * 54 + [0.5] * 10, "6.0 times"),  # alone for a moment
])  # fmt: skip
def test_steps_that_vary_severalfold_are_of_a_shared_machine(took_s, times):
    sentence = unsteady(took_s)
    if times is None:
        assert sentence is None
    else:
        assert times in sentence and f"of {len(took_s)} steps" in sentence and "end what else runs on it" in sentence


def watched(monkeypatch, took_s, waits=(0.0,), every=20):
    """What a Pace says of steps that take so long, looked at every so many steps with these data waits, in percent."""
    clock = iter([at for start, s in enumerate(took_s) for at in (100.0 * start, 100.0 * start + s)])
    monkeypatch.setattr("inscon.meters.now", lambda device: next(clock))
    pace, said = Pace(CPU), []
    for number in range(1, len(took_s) + 1):
        with pace.step():
            pass
        if number <= Pace.FIRST:
            next(clock)
        if number % every == 0:
            said += [(number, sentence) for sentence in pace.look(waits[min(number // every - 1, len(waits) - 1)])]
    return said


def test_a_shared_machine_is_named_once_and_no_other(monkeypatch):
    uneven = [0.4, 2.0] * 60
    assert [number for number, _ in watched(monkeypatch, uneven)] == [60]  # 40 steps after the first ten
    assert watched(monkeypatch, uneven, waits=(30.0,)) == []  # the loader's doing
    assert [number for number, _ in watched(monkeypatch, uneven, waits=(30.0, 30.0, 0.0))] == [80]
    assert watched(monkeypatch, [5.0] * 10 + [0.4] * 110) == []  # the first steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_the_devices_time_that_varies():
    """The host hands out all steps equally fast."""
    pace = Pace(torch.device("cuda"))
    for number in range(60):
        with pace.step():
            torch.cuda._sleep(30_000_000 if number % 3 == 0 else 1_000_000)
    torch.cuda.synchronize()
    assert ["of 50 steps" in sentence for sentence in pace.look(0.0)] == [True]


def test_the_trainer_names_a_shared_machine(tmp_path, monkeypatch, capsys):
    def step(training, batch):
        time.sleep(0.06 if training.step % 3 == 0 else 0.002)
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(train, "run_step", step)
    config = changed(make_config(tmp_path), "run", log_every=55, checkpoint_every=1000)
    training, batch = train.set_up(config, CPU, "set A"), batch_of(0)
    train.train(training, (batch for _ in range(55)), PER_EPOCH, 55)
    assert "warning at step 55: this machine seems to be shared: of 45 steps" in capsys.readouterr().out
    assert "seems to be shared" in (tmp_path / "warnings.jsonl").read_text()


def test_the_screen_gets_a_line(tmp_path, capsys):
    figures = {"loss": 7.0, "loss_cell": 2.0, "top1_cell": 0.5, "images_per_s": 80.0, "data_wait_percent": 1.0}
    MetricsLog(tmp_path, 10, 0).write(3, figures | {"step_s": 600.0})
    line = "step 3/10  loss 7.000  cell 2.000 (top-1 50 %)  80.0 images/s  data wait 1.0 %  ETA 1:10:00\n"
    assert capsys.readouterr().out.endswith(line)


class Convolutions(TorchDispatchMode):
    """In which types convolutions are computed, forward and backward; those without contents are only counted."""

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        if "convolution" in str(function) and not args[0].is_meta:
            self.dtypes = self.dtypes | {args[0].dtype, args[1].dtype}
        return function(*args, **(kwargs or {}))

    dtypes = frozenset()


def test_no_convolution_is_computed_in_another_type_than_the_trainings(tmp_path):
    """On a GPU, cuDNN looks for the fastest algorithm for each type and shape: nothing before or beside the steps needs another."""
    with Convolutions() as seen:
        run(changed(make_config(tmp_path), "optim", precision="bf16"), total=2)
    assert seen.dtypes == {torch.bfloat16}
