"""Trackers are read back from what their own packages have written, and fail as they do fail."""

import os
import shutil
import struct
import sys

import pytest

from inscon import checkpoint, trackers
from inscon.config import RunConfig, from_dict
from inscon.meters import MetricsLog
from tests.inscon.test_train import changed, lines, make_config, run

os.environ["WANDB_SILENT"] = "true"  # before wandb is imported


@pytest.fixture(autouse=True)
def no_servers(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_")) and name != "WANDB_SILENT"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # so that the setting goes with the test


def figures(step, loss):
    return {"loss": loss, "loss_cell": loss / 2, "images_per_s": 80.0, "data_wait_percent": 0.5, "step_s": step / 8}


def interrupted(run_dir, *names):
    """Ten steps: stopped behind step 6, gone on from the checkpoint of step 4 with another learning rate and, at step 6, another
    loss."""
    for first, last, lr in ((0, 6, 0.1), (4, 10, 0.2)):
        log = MetricsLog(run_dir, 10, first, names, {"optim": {"lr": lr}, "run": {"seed": 7}})
        for step in range(first + 2, last + 1, 2):
            log.write(step, figures(step, step + first / 4))
        log.close()
    return [line["step"] for line in lines(run_dir)], set(lines(run_dir)[0]) - {"step"}


def test_tensorboard_has_the_names_of_metrics_jsonl_and_no_step_twice(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    steps, names = interrupted(tmp_path, "tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == names
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(n, n + (n > 4)) for n in steps]
    (settings,) = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val
    assert b"    optim.lr: 0.2" in settings.splitlines()


def wandb_records(path):
    """Of a .wandb file: behind 7 bytes LevelDB's log format, blocks of 32 KiB of (checksum, length, part of a record)."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if -at % 32768 < 7:
            at += -at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb_is_offline_and_goes_on_in_its_run(tmp_path):
    pytest.importorskip("wandb")
    steps, names = interrupted(tmp_path, "wandb")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2
    records = [record for path in files for record in wandb_records(path)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {made.run_id for made in runs} == {(tmp_path / "wandb-run-id").read_text()}
    settings = {item.key: item.value_json for item in runs[0].config.update}
    assert settings["optim"] == '{"lr":0.1}' and settings["run"] == '{"seed":7}'
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    rows = [{item.nested_key[0]: float(item.value_json) for item in row.item} for row in rows]
    assert {name for row in rows for name in row if not name.startswith("_")} == names
    assert [(row["_step"], row["loss"]) for row in rows] == [(n, n + (n > 6)) for n in steps]
    ends = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert ends == [1, 0]


def test_mlflow_writes_files_and_goes_on_in_its_run(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    steps, names = interrupted(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("inscon").experiment_id])
    assert set(found.data.metrics) == names and found.info.status == "FINISHED"
    assert found.data.params == {"optim.lr": "0.1", "run.seed": "7"}
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(n, n + (n > 6)) for n in steps]


def test_a_tracker_that_is_added_later_gets_every_step_from_there(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    interrupted(tmp_path)
    MetricsLog(tmp_path, 12, 8, ["tensorboard", "tensorboard"]).write(10, figures(10, 1.0))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [10]


def test_a_run_goes_on_when_its_trackers_cannot_start(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow"), pytest.importorskip("wandb"), pytest.importorskip("tensorboard")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://here")
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    (tmp_path / "tensorboard").write_text("a file where a folder is to be")
    training = run(changed(make_config(tmp_path), "run", tracker=tuple(trackers.TRACKERS)), total=1)
    assert training.step == 1 and [line["step"] for line in lines(tmp_path)] == [1]
    said = [line for line in capsys.readouterr().out.splitlines() if "gets nothing from here on" in line]
    assert [line.split()[0] for line in said] == ["tensorboard", "wandb", "mlflow"]
    assert "nonsense" in said[1] and "nonsense" in said[2] and "the training goes on without it" in said[2]


@pytest.mark.parametrize("fails_at", ["step", "end"])
def test_a_tracker_that_fails_later_is_named_once(tmp_path, capsys, fails_at):
    pytest.importorskip("mlflow"), pytest.importorskip("tensorboard")
    run_dir = tmp_path / fails_at  # not the folder of another test: mlflow remembers those it has seen
    run_dir.mkdir()
    log = MetricsLog(run_dir, 4, 0, ("mlflow", "tensorboard"))
    for step in (1, 2, 3, 4):
        log.write(step, figures(step, 1.0))
        if (step, fails_at) in ((2, "step"), (4, "end")):
            shutil.rmtree(run_dir / "mlruns")
    log.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "gets nothing" in line]
    assert len(said) == 1 and said[0].startswith("mlflow gets nothing from here on")
    assert [line["step"] for line in lines(run_dir)] == [1, 2, 3, 4]


def test_a_missing_package_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"--tracker wandb needs .* pip install 'inscon\[wandb\]'"):
        run(changed(make_config(tmp_path / "run"), "run", tracker=("wandb",)))
    assert not (tmp_path / "run").exists()
    (tmp_path / "a_mere_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="a_mere_folder"):
        trackers.check_installed(["a_mere_folder"])


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("inscon.distributed.rank", lambda: 1)
    log = MetricsLog(tmp_path, 2, 0, ("tensorboard",))
    log.write(1, figures(1, 1.0))
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_with_the_setting_of_before_goes_on(tmp_path):
    """There was a `tensorboard: true` among the settings of the run."""
    settings = make_config(tmp_path).to_dict()
    before = settings | {"run": {"tensorboard": True, "run_dir": "elsewhere", "seed": 0}}
    assert checkpoint.check_continues({"config": before, "data": "A"}, tmp_path, settings, "A") == []
    assert from_dict(RunConfig, {"tensorboard": True, "seed": 3}) == RunConfig(seed=3)
