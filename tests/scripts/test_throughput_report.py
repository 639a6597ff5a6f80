"""The report names what was planted, its figures fit together, and what it cannot say it refuses in one sentence."""

import contextlib
import copy
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_prep.index import DatasetIndex
from inscon.clock import BACKWARD, OPTIMIZER, REST, WAIT, WIRE, StepClock, forward, listen, part
from inscon.meters import LossMeter, Stopwatch, window
from inscon.report import measure, page, verdict
from inscon.report.run import read_metrics, run_speed
from inscon.train import take_step
from pipelines import reference
from scripts.throughput_report import main, publish
from scripts.train import feed_of
from tests.packed import Sample, write_set
from tests.pipelines.conftest import as_jpeg, draw_picture
from tests.scripts import planted
from tests.scripts.planted import small_run

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DELAY_S = 0.2
"""Of each planted fault, in a step of a tenth of a second or two."""
REPORT = {
    "report_version": verdict.VERSION, "date": "2026-11-25", "machine": {"cpu": "a CPU", "cores": 2}, "versions": {"torch": "2.10"},
    "ranks": 2, "cores_of_rank": 1.0, "precision": "fp32",
    "settings": {
        "method": {"name": "inscon", "tile": "full"}, "model": {"backbone": "resnet50"}, "views": {"view_size": 224},
        "loader": {"pipeline": "dali"}, "optim": {"batch_size": 16, "epochs": 200},
    },
    "flops_per_image": 1e9, "trainings": 2.37, "steps_per_epoch": 100, "matrix_flops_per_s": 1e11, "described": "dali, DATA",
    "copy_bytes_per_s": 1e12, "device": None, "graphed": False,
    "memory": {"host memory at its peak, MB": 1000.0},
    "end_to_end": {
        "steps": 30, "warm_up": 6, "images_per_s": 49.0, "step_ms": 320.0, "step_ms_p99": 380.0, "wall_ms": 326.0,
        "parts_ms": {WAIT: 2.0, forward("query"): 100.0, BACKWARD: 210.0, WIRE: 4.0, OPTIMIZER: 8.0, REST: 2.0}, "cpu_cores": 1.5,
    },
    "loader": {
        "images_per_s": 100.0, "first_batch_s": 1.5, "loader_starved_percent": 3.0, "loader_graph_starved_percent": 80.0,
        "loader_read_ms": 0.2, "loader_decode_ms": 8.0,
    },
    "ceilings": {verdict.LOADER: 100.0, verdict.MODEL: 50.0, verdict.END_TO_END: 49.0},
    "shares": {WAIT: 0.6, forward("query"): 30.7, BACKWARD: 64.4, WIRE: 1.2, OPTIMIZER: 2.5, REST: 0.6},
    "predictions": [],
}  # fmt: skip
"""Of a two-rank run whose figures can all be true: every rate is below its ceiling."""


def changed(*changes):
    """REPORT with ("key/key", value) changed, and what follows from it."""
    report = copy.deepcopy(REPORT)
    for place, value in changes:
        *way, last = place.split("/")
        inner = report
        for key in way:
            inner = inner[key]
        inner[last] = value
    return report | verdict.conclusions(report)


# ----------------------------------------------------------------------------------------------------- figures by tables


def test_a_part_within_a_part_stops_the_outer_clock(monkeypatch):
    moments = iter([0.0, 1.0, 2.0, 5.0, 9.0, 10.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    clock = StepClock(CPU)
    with listen(clock.at):
        with part("outer"), part("inner"):
            pass
        clock.lap()
        clock.lap()
        assert clock.read() == [{REST: 1.0 + 1.0, "outer": 1.0 + 4.0, "inner": 3.0}, {REST: 10.0}]


def test_parts_come_from_what_the_clock_saw_and_rates_from_the_wall():
    times = [{REST: 0.1, WAIT: 0.0005, "anything": 0.5, WIRE: 0.1}, {REST: 0.1, WAIT: 0.3, "anything": 0.5, WIRE: 0.1}]
    found = measure.step_figures(times, wall=2.0, cpu=1.0, batch_size=16)
    assert list(found["parts_ms"]) == [WAIT, "anything", WIRE, REST]
    assert found["parts_ms"]["anything"] == pytest.approx(500) and found["parts_ms"][WAIT] == pytest.approx(150.25)
    assert (found["images_per_s"], found["wall_ms"], found["cpu_cores"]) == (16.0, 1000.0, 0.5)
    assert found["step_ms"] == pytest.approx(850.25) and found["step_ms_p99"] == pytest.approx(1000)


def test_the_time_of_a_graph_is_divided_as_eager_steps_are():
    """Of 100 ms 20 are waiting; the other 80 are twice the 40 of an eager step that waits for nothing."""
    found = measure.divided({WAIT: 20.0, WIRE: 0.0, REST: 80.0}, {WAIT: 1.0, BACKWARD: 30.0, WIRE: 4.0, REST: 6.0})
    assert found == {WAIT: 20.0, BACKWARD: 60.0, WIRE: 8.0, REST: 12.0}


@pytest.mark.slow
def test_a_step_without_parts_is_a_graph(tmp_path, monkeypatch):
    """Stood in for by steps that no clock hears, as a replay's."""

    def replay(*arguments):
        with monkeypatch.context() as deaf:
            deaf.setattr("inscon.clock._hear", contextlib.nullcontext)
            return take_step(*arguments)

    monkeypatch.setattr(measure, "take_step", replay)
    report = planted.measure(small_run(None, batch_size=4), tmp_path)
    assert (
        report["graphed"]
        and report["shares"][BACKWARD] > 5
        and sum(report["shares"].values()) == pytest.approx(100, abs=5)
    )
    assert report["device"] is None


def test_what_a_loader_takes_is_found_by_batches_that_are_there(data, tmp_path, monkeypatch):
    """The GPU's trace stood in for, and a run end to end that took a second for each step, half of it waiting."""
    measurement = measure.Measurement(
        small_run(data, pipeline="reference"), feed_of, CPU, tmp_path, steps=10, warm_up=2
    )
    traced, run_steps, cached = [], measure.run_steps, {}
    monkeypatch.setattr(measurement, "traced", lambda batches: traced.append(len(list(batches))) or STEP)
    monkeypatch.setattr(measure, "run_steps", lambda *arguments: cached.update(run_steps(*arguments)) or cached)
    found = measurement.on_device({"wall_ms": 1000.0, "parts_ms": {WAIT: 500.0}}, fed=True)
    assert traced == [5, 9] and found["step"] == STEP and found["fed_kernel_ms"] == STEP["kernel_ms"]
    assert cached["steps"] == 10 and found["taken_ms"] == pytest.approx(
        500 - cached["wall_ms"] + cached["parts_ms"][WAIT]
    )
    assert found["bytes"] > 16 * 4 * 3 * (64**2 + 32**2)  # at least the views are read
    assert "taken_ms" not in measurement.on_device({}, fed=False)


# --------------------------------------------------------------------------------------------------------- the verdict

ON_GPU = ("machine/gpu", "NVIDIA A100")
STEP = {"launches": 11000.0, "host_ms": 300.0, "busy_ms": 240.0, "kernel_ms": {"convolution": 200.0, "BatchNorm": 50.0}}
"""Of a step that takes 320 ms on synthetic batches, for 80 of which the GPU waits: 16 images at 50 a second."""


def by_step(**changes):
    """On a GPU that 1.63e11 bytes and that step keep at work, changed."""
    return "device", {"bytes": 163e9, "step": STEP | changes}


@pytest.mark.parametrize(("changes", "kind", "words", "gain"), [
    ([], "CPU-bound", "the passes through the networks.*a GPU", 1.0),
    ([ON_GPU], "GPU-bound", "the passes through the networks.*MFU", 1.0),
    ([(f"shares/{WAIT}", 50.0), (f"ceilings/{verdict.END_TO_END}", 25.0)], "loader-bound", "stage decode.*--threads", 2.0),
    ([(f"shares/{WAIT}", 50.0)], "loader-bound", "stage decode", 50 / 49),  # no more than the model gives
    ([(f"shares/{WAIT}", 50.0), ("loader/loader_read_ms", 9.0)], "loader-bound", "stage read.*SSD", 50 / 49),
    ([(f"shares/{WIRE}", 20.0)], "communication-bound", "--gradient-compression", 1.25),
    ([(f"shares/{REST}", 20.0)], "host-bound", "outside of all its parts.*--trace", 1.25),
    ([ON_GPU, by_step()], "host-bound", "11,000 launches a step.* needs 300.0 of its 320.0 ms.*--graph auto.*--batch-size", 4 / 3),
    ([ON_GPU, by_step(host_ms=280.0)], "GPU-bound", "the passes through the networks", 1.0),
    ([ON_GPU, by_step(busy_ms=310.0)], "GPU-bound", "the passes through the networks", 1.0),  # and launches wait for the GPU
    ([ON_GPU, by_step(), ("graphed", True)], "GPU-bound", "the passes through the networks", 1.0),
    ([ON_GPU, by_step(host_ms=9.0), ("device/taken_ms", 65.2)], "loader-bound", "on the GPU .*, 20 % .*--color host", 1.25),
    ([ON_GPU, by_step(), ("device/fed_kernel_ms", {"color": 2.0}), (f"shares/{WAIT}", 50.0), ("ceilings/loader alone", 90.0)],
     "loader-bound", "on the GPU, which waits for the step's. Next: --color host", 50 / 49),
    ([(f"shares/{OPTIMIZER}", 20.0)], "CPU-bound", "own overhead .21 %., most of all optimizer.*--batch-size", 1.25),
])  # fmt: skip
def test_verdicts(changes, kind, words, gain):
    found = changed(*[(f"shares/{BACKWARD}", 10.0), *changes])["verdict"]
    assert found["kind"] == kind and found["gain"] == pytest.approx(gain, rel=0.01)
    assert re.search(words, found["sentence"]), found["sentence"]


@pytest.mark.parametrize(("starved", "stages", "stage"), [
    ((80.0, 90.0), {"read": 1.0, "decode": 2.0, "finish": 3.0}, "finish"),
    ((80.0, 90.0), {"read": 4.0, "decode": 2.0, "finish": 3.0}, "read"),
    ((10.0, 90.0), {"read": 4.0, "decode": 2.0, "finish": 3.0}, "finish"),  # its queue clears read and decode
    ((10.0, 90.0), {"read": 4.0, "decode": 2.0}, "read"),
    ((10.0, 90.0), {}, "unknown"),
])  # fmt: skip
def test_the_first_starved_queue_names_the_stage(starved, stages, stage):
    said = dict(zip(("loader_graph_starved_percent", "loader_starved_percent"), starved))
    said |= {f"loader_{name}_ms": ms for name, ms in stages.items()}
    assert verdict.starving_stage(said) == stage


@pytest.mark.parametrize(("place", "value", "found"), [
    ("ceilings/loader alone", 12.56, "49.0 images/s end to end, above the 12.6 of the loader alone"),  # 390 %
    (f"ceilings/{verdict.MODEL}", 40.0, "above the 40.0 of the model alone"),
    ("matrix_flops_per_s", 1.69e10, "24.5 GFLOP/s in the step, above the 16.9 of matrix products"),  # MFU 145 %
    (f"shares/{BACKWARD}", 130.0, "165.6 % of the step in all its parts"),
])  # fmt: skip
def test_impossible_figures_get_no_verdict_and_no_comparison(tmp_path, place, value, found):
    report = changed((place, value))
    assert found in report["verdict"]["stage"] and "; " not in report["verdict"]["stage"]
    sentence = report["verdict"]["sentence"]
    assert "machine was disturbed, measure again" in sentence and "times the images/s" not in sentence
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="report.json cannot be compared.*machine was disturbed, measure again"):
        main(["--compare", str(tmp_path / "report.json"), str(tmp_path / "report.json")])


@pytest.mark.parametrize(("place", "value"), [
    ("report_version", verdict.VERSION),
    ("ceilings/end to end", 54.0),  # of 50: noise
    ("matrix_flops_per_s", 2.3e10),  # of 2.45e10: noise
    (f"shares/{BACKWARD}", 65.0),
])  # fmt: skip
def test_figures_that_can_be_get_their_verdict(place, value):
    report = changed((place, value))
    assert report["verdict"]["kind"] == "CPU-bound"
    assert report["mfu_percent"] is None or report["mfu_percent"] <= 100


@pytest.mark.parametrize(("bytes_of_step", "percent"), [(163e9, 50.0), (326e9, 100.0), (327e9, None)])
def test_bytes_against_the_copy_rate(bytes_of_step, percent):
    """In 326 ms at 1e12 bytes/s."""
    report = changed(ON_GPU, by_step(), ("device/bytes", bytes_of_step))
    assert report["memory_percent"] == (percent and pytest.approx(percent))
    assert ("copying as many, % of the step | not known" in page.page(report)) == (percent is None)
    assert changed()["memory_percent"] is None


def test_a_comparison_is_a_gate(tmp_path, capsys):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(changed()))
    after.write_text(json.dumps(changed((f"ceilings/{verdict.END_TO_END}", 44.1))))
    assert main(["--compare", str(before), str(after)]) == 1
    assert "Worse by more than 5 %: end to end." in capsys.readouterr().out
    assert main(["--compare", str(before), str(after), "--tolerance", "15"]) == 0
    assert main(["--compare", str(after), str(before)]) == 0
    after.write_text(json.dumps(changed(("settings/optim/batch_size", 32), ("settings/method/tile", "half"))))
    with pytest.raises(
        ValueError, match="method tile full and half, run batch size 16 and 32; measure both in the same"
    ):
        main(["--compare", str(before), str(after)])
    after.write_text("{}")
    with pytest.raises(ValueError, match=f"after.json must be a report.json of version {verdict.VERSION}. Found: None"):
        main(["--compare", str(before), str(after)])


def test_a_report_that_is_not_there_is_named_with_what_to_give(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ValueError, match=f"^there is no file {path}; give the report.json"):
            verdict.load_report(path)


# ------------------------------------------------------------------------------------------------------------ the page


def test_a_page_shows_what_was_measured():
    memory = {"host memory at its peak, MB": 1000.0, "PyTorch's device memory at its peak, MB": 1234.0}
    kernels = {"convolution": 203.0, "color": 24.0}
    on_device = [by_step(), ("device/fed_kernel_ms", kernels), ("device/taken_ms", 6.5), ("graphed", True)]
    report = changed(ON_GPU, ("memory", memory), ("loader/loader_device_mb", 56.0), *on_device)
    text = page.page(report | {"predictions": ["PREDICTION, not measured"]})
    assert text.startswith(
        "# inscon, resnet50 at 224 px through dali, batch 16 on 2 x NVIDIA A100, fp32, 2026-11-25\n\n**GPU-bound."
    )
    for row in (
        "loader alone | 100.0 | 49.0 %", "model alone, on synthetic batches | 50.0 | 98.0 %", "sum | 326.00 | 100.00",
        "model-FLOP utilization (MFU), % of that | 24.5", "PyTorch's device memory at its peak, MB | 1,234",
        "read, ms per image | 0.200", "first batch, s | 1.5",
        "launches | 11,000 | ", "host's time for them, ms | 300.0 | ", "GPU busy, % of the step as the run takes it | 75.0 | ",
        "convolution, ms | 200.00 | 203.00", "BatchNorm, ms | 50.00 | ", "color, ms | 0.00 | 24.00",
        "taken by the loader from a step of the run, ms |  | 6.50", "memory copied here and now, GB/s read and written | 1,000.0",
        "bytes that a step moves at least, GB | 163.0", "copying as many, % of the step | 50.0",
        "device memory beside PyTorch's, MB | 56.0", "torch | 2.10", "no decoded picture when asked, % | 80.0",
    ):  # fmt: skip
        assert f"| {row} |" in text, row
    assert "overhead (optimizer, after the update, rest) is 3.1 %" in text and "PREDICTION, not measured" in text
    assert "a CUDA graph: its time is divided" in text
    without = page.page(changed())
    assert (
        "no GPU" in without
        and "launches" not in without
        and "bytes that" not in without
        and "CUDA graph" not in without
    )


def windows_with(mfu):
    made = []
    for n, value in enumerate(mfu, 1):
        made.append(
            {"step": n, "step_s": n / 10, "images_per_s": 64.0 / n, "data_wait_percent": 0.0, "loss_any": 9.0 - n}
        )
        made[-1] |= {} if value is None else {"mfu_percent": value}
    return made


def test_a_run_is_summed_up_by_medians_without_warm_up():
    speed = run_speed(windows_with([145.0, 60.0, 61.0, 62.0, 63.0, 64.0]))
    assert speed == {
        "step_s": 0.4,
        "images_per_s": 16.0,
        "data_wait_percent": 0.0,
        "loss_any": 5.0,
        "mfu_percent": 62.0,
    }
    assert "mfu_percent" not in run_speed(windows_with([60.0, 60.0, 61.0, None, 63.0, 64.0]))


@pytest.mark.parametrize(("full_rate", "logged"), [(1e-9, False), (1e12, True)])
def test_the_trainers_log_leaves_out_an_mfu_above_100_percent(full_rate, logged):
    losses, watch = LossMeter(), Stopwatch(CPU)
    losses.add({"loss": torch.tensor(1.0)})
    assert ("mfu_percent" in window(losses, watch, 64, 0.1, full_rate=full_rate)) == logged


def test_a_metrics_line_cut_short_by_a_kill_is_left_out(tmp_path):
    lines = [json.dumps(line) for line in windows_with([60.0] * 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:9]]))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:9] + lines[2]]))
    with pytest.raises(ValueError, match=r"a line of .*metrics.jsonl is broken \(.*\); remove it"):
        read_metrics(tmp_path)


# -------------------------------------------------------------------------------------------------------- the command


def test_cheap_refusals_come_before_the_imports(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in windows_with([60.0, 60.0])))
    run, nothing = str(tmp_path), str(tmp_path / "nothing")
    own = ["--steps", "3"], ["--trace", "-1"]
    refused = [["--run", run], ["--run", nothing], ["--compare", nothing, nothing], *own]
    code = (
        "import sys, json; from scripts import throughput_report as t\n"
        "for flags in json.loads(sys.argv[1]):\n"
        "    try: t.main(flags)\n"
        "    except (ValueError, OSError) as error: print(error)\n"
        "assert not {'torch', 'numba', 'tyro', 'torchvision'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, json.dumps(refused)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(refused) and "at least 6 log windows" in done.stdout


@pytest.mark.parametrize(("flags", "message"), [
    (["--steps", "9"], "--steps must be at least 10. Found: 9"),
    (["--warm-up", "1"], "--warm-up must be at least 2. Found: 1"),
    (["--recipe", "smoke", "--predict", "h100x8"], "of resnet50 at 224 px. Found: resnet18 at 64 px; leave --predict out"),
])  # fmt: skip
def test_wrong_use_gets_one_sentence(tmp_path, flags, message):
    with pytest.raises(ValueError) as caught:
        main(["--pipeline", "synthetic", "--out", str(tmp_path / "out"), *flags])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_outputs_are_tried_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/report cannot be written .*; set another --out"):
        main(["--pipeline", "synthetic", "--out", str(tmp_path / "file/report")])


def test_predictions_say_what_they_are(capsys):
    assert main(["--predict", "v100x8", "--predict", "h100x8"]) == 0
    v100, h100 = capsys.readouterr().out.splitlines()
    # By hand: 57.814 GFLOP of a source image / (3 * 8.1743 of a view) = 2.3576; 8322 / 2.3576 = 3529.9; times 0.99 = 3494.6;
    # 1281167 * 200 / 3494.6 / 3600 = 20.4
    assert v100.startswith(
        "PREDICTION, not measured, v100x8: 3,495 images/s, 20 h for 200 epochs of ImageNet (ceiling 3,530"
    )
    assert "images/s = ResNet-50 training images/s / cost of an image * (1 - overhead)" in v100 and "cost 2.36" in v100
    assert "DeepLearningExamples" in v100 and "measured on one H200, not on such a machine" in v100
    assert (
        h100.startswith("PREDICTION, not measured, h100x8: 9,771 to 11,446 images/s, 6 to 7 h")
        and "an estimate" in h100
    )


@pytest.mark.slow
def test_ctrl_c_is_one_sentence(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "scripts/throughput_report.py", "--recipe", "smoke", "--pipeline", "synthetic"]
    process = subprocess.Popen([*command, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not out.exists():  # it is tried right before the work
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "throughput_report.py: stopped by Ctrl-C\n")
    assert list(out.iterdir()) == []


# ------------------------------------------------------------------------------------------------- measured, and planted


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """100 pictures of 48 x 64 px: six batches of 16 an epoch."""
    samples = [Sample(as_jpeg(draw_picture(i, 48, 64)), 48, 64, i % 2, f"a/{i}.jpg") for i in range(100)]
    folder = tmp_path_factory.mktemp("report") / "shards"
    write_set(folder, samples, per_shard=50)
    return folder


def test_a_trace_names_the_parts(tmp_path):
    measure.Measurement(small_run(None, batch_size=8), feed_of, CPU, tmp_path, steps=10, warm_up=2).trace(2)
    names = [e.get("name") for e in json.loads((tmp_path / "trace-rank0.json").read_text())["traceEvents"]]
    assert names.count(BACKWARD) == names.count(OPTIMIZER) == names.count(forward("views")) == 2


@pytest.mark.slow
def test_a_slow_loader_is_named(data, tmp_path, monkeypatch, capsys):
    decode = reference.decode

    def slowly(*arguments):
        time.sleep(DELAY_S / 16)
        return decode(*arguments)

    monkeypatch.setattr(reference, "decode", slowly)
    report = planted.measure(small_run(data, pipeline="reference"), tmp_path, kind="loader-bound")
    assert report["verdict"]["kind"] == "loader-bound" and report["verdict"]["stage"].endswith("stage decode")
    assert "--threads" in report["verdict"]["advice"] and report["verdict"]["gain"] > 1.2
    assert report["ceilings"][verdict.LOADER] < report["ceilings"][verdict.MODEL]
    assert sum(report["shares"].values()) == pytest.approx(100, abs=2)
    assert {WAIT, forward("views"), BACKWARD, OPTIMIZER, REST} <= set(report["shares"])
    publish(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    titles = "Ceilings", "Figures", "The step by part", "The loader by stage", "Measured on"
    assert all(f"## {title}" in text for title in titles) and report["verdict"]["sentence"] in text
    assert "First to mend if the step waits: decode." in text
    assert json.loads((tmp_path / "report.json").read_text())["report_version"] == verdict.VERSION
    assert "source images/s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_slow_disk_is_named(data, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    read = DatasetIndex.read

    def slowly(self, *arguments, **options):
        time.sleep(3 * DELAY_S / 16)
        return read(self, *arguments, **options)

    monkeypatch.setattr(DatasetIndex, "read", slowly)
    report = planted.measure(small_run(data, pipeline="dali"), tmp_path, kind="loader-bound")
    assert report["verdict"]["kind"] == "loader-bound" and report["verdict"]["stage"].endswith("stage read")
    assert "SSD" in report["verdict"]["advice"] and report["verdict"]["gain"] > 1.2


@pytest.mark.slow
def test_a_healthy_run_is_bound_by_its_processor(data, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    report = planted.measure(
        small_run(data, pipeline="dali", batch_size=64, backbone="resnet18"), tmp_path, kind="CPU-bound"
    )
    assert report["verdict"]["kind"] == "CPU-bound", report["verdict"]
    assert sum(report["shares"].values()) == pytest.approx(100, abs=2)
    rates = report["ceilings"]
    assert rates[verdict.END_TO_END] <= 1.3 * min(rates[verdict.LOADER], rates[verdict.MODEL])  # noise


@pytest.mark.slow
def test_a_tiny_batch_is_named(tmp_path):
    report = planted.measure(small_run(None, batch_size=2, backbone="resnet18"), tmp_path, kind="CPU-bound")
    assert report["verdict"]["kind"] == "CPU-bound", report["verdict"]
    assert "most of all optimizer" in report["verdict"]["stage"] and report["verdict"]["gain"] > 1.1, report["verdict"]
    assert "a larger --batch-size" in report["verdict"]["advice"]


@pytest.mark.slow
def test_a_sleep_in_the_step_is_named(tmp_path):
    config = dataclasses.replace(small_run(None), method=planted.Sleepy(sleep_s=DELAY_S))
    report = planted.measure(config, tmp_path, kind="host-bound")
    assert report["verdict"]["kind"] == "host-bound", report["verdict"]
    assert "outside of all its parts" in report["verdict"]["stage"] and "--trace" in report["verdict"]["advice"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["delay", "none"])
def test_a_slow_all_reduce_is_named(tmp_path, fault):
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/scripts/planted.py"), str(out), fault, str(2 * DELAY_S)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["ranks"] == 2 and sum(report["shares"].values()) == pytest.approx(100, abs=2)
    waited = report["end_to_end"]["parts_ms"][WIRE]
    assert (waited >= 2e3 * DELAY_S) == (fault == "delay")
    if fault == "delay":
        assert report["verdict"]["kind"] == "communication-bound", report["verdict"]
        assert "--gradient-compression" in report["verdict"]["advice"]
