"""Whole runs through the user's own commands: killed and resumed, on two ranks, refused, drawn, evaluated."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.index import DatasetIndex
from data_prep.make_dali import pack_folder
from data_prep.make_ffcv import pack_beton
from inscon import checkpoint, guard

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--recipe", "smoke", "--view-size", "64", "--batch-size", "8", "--queue-size", "16", "--cell-queue-size", "144",
    "--split-size", "4", "--epochs", "50", "--log-every", "1", "--threads", "1", "--backbone", "test_resnet",
]  # fmt: skip
EXPORTED = [*SMALL, "--backbone", "resnet18"]
"""What every library knows."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """20 pictures of odd sizes, one gray, one of 1x1: two steps an epoch at batch 8."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(20):
        (folder / f"class_{i % 2}").mkdir(exist_ok=True)
        height, width = (1, 1) if i == 7 else rng.integers(70, 130, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(
            (int(width), int(height)), Image.BICUBIC
        )
        (coarse.convert("L") if i == 3 else coarse).save(folder / f"class_{i % 2}/{i}.jpg", quality=90)
    pack_folder(folder, folder / "../shards")
    return folder.parent / "shards"


@pytest.fixture(scope="module")
def data_of(shards):
    """What each engine reads of the set; skips where the engine is not installed."""

    def data_of(pipeline):
        if pipeline == "dali":
            pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        if pipeline != "ffcv":
            return shards
        pytest.importorskip("ffcv", reason="FFCV is not installed", exc_type=ImportError)
        beton = shards.parent / "beton"
        if not beton.exists():
            pack_beton(shards, beton)
        return beton

    return data_of


def command(*arguments, script="train.py", ranks=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return [sys.executable, *launcher, str(ROOT / "scripts" / script), *map(str, arguments)]


def run(*arguments, script="train.py", ok=True):
    """The script as its command runs it, in this process, which has imported and compiled already what it needs."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in guard.STOPS}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # as the interpreter does
                print(code, file=err)
        finally:  # a script that was stopped ignores what stops it to its end, which is not this process's
            for number, handler in handlers.items():
                signal.signal(number, handler)
    done = subprocess.CompletedProcess(
        script, 1 if isinstance(code, str) else code or 0, out.getvalue(), err.getvalue()
    )
    return checked(done, ok)


def run_ranks(*arguments, script="train.py", ranks=2):
    """By torchrun."""
    done = subprocess.run(command(*arguments, script=script, ranks=ranks), capture_output=True, text=True, timeout=400)
    return checked(done, True)


def checked(done, ok):
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def losses_of(run_dir):
    keys = "step", "loss", "loss_single", "loss_multi", "loss_cell"
    return [
        tuple(json.loads(line)[key] for key in keys) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


@contextlib.contextmanager
def started(arguments, run_dir, at_step, ranks=0):
    """A run that has logged `at_step`, in a session of its own; all of it is killed in the end."""
    process = subprocess.Popen(
        command(*arguments, ranks=ranks), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text().count("\n") >= at_step):
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()[-4000:]
            time.sleep(0.005)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def kill_once(arguments, run_dir, at_step):
    """Start a run and send SIGKILL, to it alone, when it has logged `at_step`, which is no step with a checkpoint."""
    with started(arguments, run_dir, at_step) as process:
        process.kill()
        process.stdout.read()  # until the last one of its processes that could write is gone


@pytest.mark.parametrize("pipeline", ["dali", "ffcv", "reference"])
def test_a_killed_run_resumes_bit_for_bit(data_of, tmp_path, pipeline):
    """Checkpoints every 3 steps of 2-step epochs: the resume begins in the middle of an epoch."""
    base = [*SMALL, "--pipeline", pipeline, "--data", data_of(pipeline), "--checkpoint-every", "3", "--max-steps", "9"]
    run(*base, "--run-dir", tmp_path / "whole")
    kill_once([*base, "--run-dir", tmp_path / "killed"], tmp_path / "killed", at_step=5)
    assert checkpoint.latest(tmp_path / "killed").name == "step-00000003.pt"
    out = run(*base, "--run-dir", tmp_path / "killed").stdout
    assert "from step 3" in out
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    assert [step for step, *_ in losses_of(tmp_path / "whole")] == list(range(1, 10))
    a, b = (checkpoint.load(checkpoint.latest(tmp_path / name)) for name in ("killed", "whole"))
    assert a["step"] == b["step"] == 9
    for name, value in b["model"].items():
        assert torch.equal(a["model"][name], value) if torch.is_tensor(value) else a["model"][name] == value, name
    for i, state in b["optimizer"]["state"].items():
        assert torch.equal(a["optimizer"]["state"][i]["momentum_buffer"], state["momentum_buffer"])
    assert "is finished: step 9 of 9" in run(*base, "--run-dir", tmp_path / "killed").stdout


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["dali", "ffcv"])
def test_a_killed_run_with_bad_samples_resumes_bit_for_bit(data_of, tmp_path, pipeline, caplog):
    """One sample is damaged behind the run's back. Who stands in for it needs no memory, so it is the same one after a resume."""
    data = damage(data_of(pipeline), tmp_path, flip_a_bit)
    base = [*SMALL, "--pipeline", pipeline, "--data", data, "--checkpoint-every", "3", "--max-steps", "8"]
    done = run(*base, "--run-dir", tmp_path / "failed", ok=False)
    assert re.search(
        r"train.py: sample 12 \(.*\) in (shard-000000.tar|samples.beton) is not as it was packed",
        done.stderr.splitlines()[-1],
    )
    base += ["--on-bad-sample", "substitute"]
    done = run(*base, "--run-dir", tmp_path / "whole")
    assert caplog.text.count("sample 12 (") == 1 and "Another sample stands in for it" in caplog.text
    assert "samples substituted" in done.stdout
    kill_once([*base, "--run-dir", tmp_path / "killed"], tmp_path / "killed", at_step=5)
    assert "from step 3" in run(*base, "--run-dir", tmp_path / "killed").stdout
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")


def flip_a_bit(folder):
    index = DatasetIndex.open(folder)
    record = index.records([12])[0]
    with open(folder / index.manifest.shards[0].name, "r+b") as file:
        file.seek(int(record["offset"]) + 300)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "ranks"), [("dali", 2), ("ffcv", 2), ("reference", 0)])
def test_signals_in_numbers_stop_all_ranks_with_a_checkpoint(data_of, tmp_path, pipeline, ranks):
    """To every process and again, as Slurm and systemd send them; torchrun, which one more signal kills, sends its own too."""
    data = data_of(pipeline)
    arguments = [*SMALL, "--pipeline", pipeline, "--data", data, "--run-dir", tmp_path, "--checkpoint-every", "100"]
    with started(arguments, tmp_path, 3, ranks) as process:
        for _ in range(30):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.05)
        out = process.stdout.read()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None, out[-4000:]
    step = checkpoint.load(newest)["step"]
    assert f"Stopped by SIGTERM; the checkpoint of step {step}" in out and 3 <= step < 100
    assert not ranks or ("batch 8 on 2 x cpu" in out and "norm shuffle" in out)


@pytest.mark.slow
def test_a_run_folder_is_one_process_s(shards, tmp_path):
    """The second one is told who has it, and disturbs nothing; the probe's folder likewise."""
    arguments = [*SMALL, "--pipeline", "synthetic", "--run-dir", tmp_path]
    with started(arguments, tmp_path, 2) as process:
        done = run(*arguments, ok=False)
        assert f"another process works in {tmp_path} (process {process.pid} on" in done.stderr
        assert done.stderr.endswith("wait until it ends, or set another --run-dir\n") and done.stderr.count("\n") == 1
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    steps = [step for step, *_ in losses_of(tmp_path)]
    assert steps == list(range(1, checkpoint.load(checkpoint.latest(tmp_path))["step"] + 1))
    with guard.only_process(tmp_path / "probe", "--out"):
        probe = ["--run", tmp_path, "--train", shards, "--val", shards, "--out", tmp_path / "probe"]
        done = run(*probe, script="linear.py", ok=False)
    assert f"(process {os.getpid()} on" in done.stderr and "set another --out" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["dali", "ffcv"])
def test_a_run_from_a_store_is_the_run_from_a_folder(data_of, shards, tmp_path, pipeline):
    files = fsspec.filesystem("memory")
    files.put(str(data_of(pipeline)), f"/{pipeline}", recursive=True)
    files.put(str(shards), "/labelled", recursive=True)
    base = [*SMALL, "--pipeline", pipeline, "--max-steps", "3", "--cache-dir", tmp_path / "cache"]
    run(*base, "--data", data_of(pipeline), "--run-dir", tmp_path / "folder")
    run(*base, "--data", f"memory://{pipeline}", "--eval-data", "memory://labelled", "--run-dir", tmp_path / "store")
    assert losses_of(tmp_path / "store") == losses_of(tmp_path / "folder")
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 2


def test_the_synthetic_pipeline_needs_no_data(tmp_path):
    run(*SMALL, "--pipeline", "synthetic", "--run-dir", tmp_path, "--max-steps", "2")
    assert len(losses_of(tmp_path)) == 2


@pytest.mark.parametrize(("flags", "message"), [
    (["--batch-size", "10"], "batch_size must be a multiple of 4 images .* Found: 10; set --batch-size 8"),
    (["--queue-size", "20"], "queue_size must be a multiple of the 8 keys of one step. Found: 20; set --queue-size 16"),
    (["--batch-size", "24", "--queue-size", "24", "--cell-queue-size", "216"], "at least one batch of 24 images. Found: 20"),
    (["--data", "nowhere"], "nowhere.*make_dali.py"),
    (["--data", "memory://nowhere"], "memory://nowhere is no packed set.*make_dali.py"),
    (["--precision", "fp16"], "precision fp16 needs a GPU. Found: cpu; set --precision fp32"),
    (["--optimizer", "apex"], "needs NVIDIA's apex.*set --optimizer auto"),
    (["--decode", "mixed", "--pipeline", "dali"], "needs a GPU.*--decode cpu"),
    (["--pipeline", "ffcv"], "tar shards, and the pipeline ffcv reads a .beton: python data_prep/make_ffcv.py"),
    (["--method", "mocov3"], "there is no method mocov3; set --method to one of byol, densecl, "),
    (["--backbone", "resnet51"], "there is no backbone resnet51; set --backbone"),
])  # fmt: skip
def test_wrong_use_gets_one_sentence_before_any_work(shards, tmp_path, flags, message):
    if "ffcv" in flags:
        pytest.importorskip("ffcv", reason="FFCV is not installed", exc_type=ImportError)
    done = run(*SMALL, "--pipeline", "reference", "--data", shards, "--run-dir", tmp_path / "run", *flags, ok=False)
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(message, last), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def damage(shards, tmp_path, how):
    copy = tmp_path / "damaged"
    shutil.copytree(shards, copy)
    how(copy)
    return copy


@pytest.mark.parametrize(("how", "message"), [
    (lambda d: (d / "shard-000000.tar").unlink(), "shard-000000.tar"),
    (lambda d: os.truncate(d / "shard-000000.tar", 3000), "shard-000000.tar is 3000 bytes"),
    (lambda d: edit(d / "manifest.json", '"version": 2', '"version": 7'), "it is in inscon-shards 7, not in inscon-shards 2"),
    (lambda d: [p.unlink() for p in d.iterdir()], "make_dali.py"),
])  # fmt: skip
def test_damaged_shards_get_one_sentence(shards, tmp_path, how, message):
    done = run(
        *SMALL,
        "--data",
        damage(shards, tmp_path, how),
        "--pipeline",
        "reference",
        "--run-dir",
        tmp_path / "run",
        ok=False,
    )
    assert message in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr, done.stderr


def test_another_configuration_and_other_shards_are_refused(shards, tmp_path):
    base = [*SMALL, "--pipeline", "reference", "--data", shards, "--run-dir", tmp_path / "run", "--max-steps", "1"]
    run(*base)
    done = run(*base, "--temperature", "0.3", ok=False)
    assert "another configuration: method.temperature was 0.1 and is 0.3" in done.stderr
    (tmp_path / "other").mkdir()
    for i in range(9):
        Image.new("RGB", (90, 80), (i * 20, 5, 9)).save(tmp_path / f"other/{i}.jpg")
    pack_folder(tmp_path / "other", tmp_path / "other_shards")
    done = run(*base, "--data", tmp_path / "other_shards", ok=False)
    assert "the data set was" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_knn_views_and_report_of_a_run(shards, tmp_path):
    run(*SMALL, "--pipeline", "reference", "--data", shards, "--run-dir", tmp_path / "run", "--max-steps", "8")
    out = run("--run", tmp_path / "run", "--train", shards, "--val", shards, "--k", "1", script="knn.py").stdout
    assert "untrained: 100.0 %" in out and ") trained: 100.0 %" in out  # every picture is its own nearest neighbor
    picture = tmp_path / "views.png"
    run("--recipe", "smoke", "--data", shards, "--batch-size", "8", "--queue-size", "16", "--cell-queue-size", "144",
        "--split-size", "4", "--pipeline", "reference", "--out", picture, script="show_views.py")  # fmt: skip
    pixels = np.asarray(Image.open(io.BytesIO(picture.read_bytes())))
    assert pixels.shape == (4 * 200 + 256, 4 * 192 + 2 * 8, 3)  # views of 64 px, enlarged three times; a mosaic, twice
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    out = run("--run", tmp_path / "run", script="throughput_report.py").stdout
    assert "source images/s" in out and "loss_cell" in out
    done = run("--run", tmp_path, script="throughput_report.py", ok=False)
    assert "there are no metrics at" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A short run with a kNN monitor."""
    folder = tmp_path_factory.mktemp("trained")
    out = run(*EXPORTED, "--pipeline", "reference", "--data", shards, "--run-dir", folder, "--max-steps", "5",
              "--eval-data", shards, "--eval-every", "2").stdout  # fmt: skip
    assert out.count("kNN ") == 3
    return folder


def test_the_monitor_writes_into_the_metrics(trained, shards, tmp_path):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn" in line] == [2, 4, 5]
    assert all(0 <= line["knn"] <= 1 for line in lines if "knn" in line)
    arguments = [*EXPORTED, "--pipeline", "reference", "--data", shards, "--max-steps", "5"]
    run(*arguments, "--run-dir", tmp_path / "alone")
    assert losses_of(tmp_path / "alone") == losses_of(trained)  # looking changes nothing
    run_ranks(
        *arguments, "--run-dir", tmp_path / "two", "--eval-data", shards, "--eval-every", "2", "--max-steps", "2",
    )  # fmt: skip
    [line] = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines() if "knn" in line]
    assert line["step"] == 2


@pytest.mark.parametrize(("form", "name"), [("timm", "a.pth"), ("detectron2", "a.pkl")])
def test_a_run_is_exported_and_said(trained, tmp_path, form, name):
    out = run("--run", trained, "--format", form, "--out", tmp_path / name, script="export.py").stdout
    assert f"the resnet18 of step 5 of {trained} for {form}, read back and equal." in out


def test_an_export_with_statistics_of_its_own(trained, shards, tmp_path):
    file = tmp_path / "a.pth"
    run(
        "--run",
        trained,
        "--out",
        file,
        "--norm-batches",
        "2",
        "--data",
        shards,
        "--batch-size",
        "8",
        script="export.py",
    )
    held = torch.load(file, weights_only=True)
    assert json.loads(held.inscon)["norm_batches"] == 2 and int(held["bn1.num_batches_tracked"]) == 2
    done = run("--run", trained, "--out", file, "--norm-batches", "2", script="export.py", ok=False)
    assert "norm_batches needs pictures: set --data SHARDS" in done.stderr and "Traceback" not in done.stderr


def test_a_probe_and_attention_maps_of_a_run(trained, shards, tmp_path):
    probe = [
        "--checkpoint",
        trained,
        "--train",
        shards,
        "--val",
        shards,
        "--epochs",
        "3",
        "--batch-size",
        "10",
        "--out",
        tmp_path / "probe",
    ]
    out = run(*probe, script="linear.py").stdout
    assert "lr 1.17188 (the protocol's 30 is for 256 images)" in out and "backbone unchanged" in out
    result = json.loads((tmp_path / "probe/result.json").read_text())
    assert 0 <= result["top1"] <= 1 and result["protocol"]["num_classes"] == 2 and "top5" not in result
    assert "from epoch 3" in run(*probe, script="linear.py").stdout  # nothing is left to do
    two = [*probe[:-1], tmp_path / "two"]
    run_ranks(*two, script="linear.py")
    assert json.loads((tmp_path / "two/result.json").read_text())["pictures"] == {"train": 20, "val": 20}
    done = run(*probe, "--batch-size", "50", script="linear.py", ok=False)
    assert "is a probe with another batch_size; set another --out" in done.stderr and "Traceback" not in done.stderr
    Image.new("RGB", (90, 64), (200, 30, 9)).save(tmp_path / "a.jpg")
    maps = ["--pictures", tmp_path / "a.jpg", "--side", "64", "--out", tmp_path / "maps.png"]
    run("--runs", trained, "random", *maps, script="attention_maps.py")
    assert Image.open(tmp_path / "maps.png").size == (3 * 96 + 2 * 8, 18 + 64 + 8)
    done = run("--runs", trained, *maps[:1], tmp_path / "none.jpg", script="attention_maps.py", ok=False)
    assert "there is no picture" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("script", "arguments", "sentence"), [
    ("knn.py", ["--run", "RUN", "--train", "SHARDS", "--val", "SHARDS"], "--k must be from 1 to 20. Found: 200"),
    ("knn.py", ["--run", "RUN", "--train", "SHARDS", "--val", "SHARDS", "--batch-size", "0"], "--batch-size must be .* Found: 0"),
    ("knn.py", ["--run", "RUN", "--train", "SHARDS", "--val", "SHARDS", "--view-size", "0"], "--view-size must be .* Found: 0"),
    ("export.py", ["--run", "RUN", "--out", "a.pth", "--norm-batches", "1", "--batch-size", "0"], "--batch-size must .* Found: 0"),
    ("export.py", ["--run", "RUN", "--out", "a.pth", "--norm-batches", "-1"], "--norm-batches must be at least 0. Found: -1"),
    ("attention_maps.py", ["--runs", "RUN", "--pictures"], "--pictures must name image files. Found: none"),
    ("attention_maps.py", ["--runs", "RUN", "--pictures", "a.jpg", "--side", "0"], "--side must be at least 64. Found: 0"),
    ("show_views.py", [*SMALL, "--data", "SHARDS", "--images", "-1"], "--images must be at least 1. Found: -1"),
    ("show_views.py", [*SMALL, "--data", "SHARDS", "--step", "-1"], "--step must be at least 0. Found: -1"),
    ("show_views.py", [*SMALL, "--data", "SHARDS", "--pipeline", "synthetic"], "there is nothing to draw without shards; .*"),
    ("demo.py", ["--held-out", "0"], "--held-out must be at least 1. Found: 0"),
    ("demo.py", ["--pictures", "0"], "--pictures must be at least 20. Found: 0"),
])  # fmt: skip
def test_numbers_that_cannot_be_are_refused_before_the_work(trained, shards, script, arguments, sentence):
    names = {"RUN": trained, "SHARDS": shards}
    done = run(*[names.get(argument, argument) for argument in arguments], script=script, ok=False)
    assert re.fullmatch(f"{script}: {sentence}\n", done.stderr) and not done.stdout


@pytest.mark.parametrize(("script", "flag", "name", "arguments"), [
    ("train.py", "--run-dir", "run", [*SMALL, "--pipeline", "synthetic"]),
    ("linear.py", "--out", "probe", ["--run", "RUN", "--train", "SHARDS", "--val", "SHARDS"]),
    ("export.py", "--out", "r50.pth", ["--run", "RUN", "--norm-batches", "1000", "--data", "SHARDS"]),
    ("show_views.py", "--out", "views.png", [*SMALL, "--pipeline", "reference", "--data", "SHARDS"]),
    ("attention_maps.py", "--out", "maps.png", ["--runs", "RUN", "--pictures", "a.jpg"]),
    ("../data_prep/make_scenes.py", "--out", "scenes", ["--num-images", "100000"]),
], ids=lambda value: value if str(value).endswith(".py") else "")  # fmt: skip
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    trained, shards, tmp_path, script, flag, name, arguments
):
    """Of hours, were it done; and by a full disk, of which a folder that takes no file is the stand-in."""
    names = {"RUN": trained, "SHARDS": shards}
    arguments = [names.get(argument, argument) for argument in arguments]
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file" / name, *([Path("/proc/sys") / name] if Path("/proc/sys").is_dir() else [])]
    for place in places:
        done = run(*arguments, flag, place, script=script, ok=False)
        assert re.search(
            rf": {re.escape(str(place))} cannot be written \(.*\); set another {flag}$", done.stderr.strip()
        )
        assert done.stderr.count("\n") == 1 and not done.stdout
