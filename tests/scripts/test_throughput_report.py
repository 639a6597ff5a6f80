"""The report names what was planted, its figures fit together, and what it cannot say it refuses in one sentence."""

import copy
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from data_prep.index import DatasetIndex
from inscon.clock import PARTS
from inscon.meters import LossMeter, Stopwatch, window
from inscon.model import InsCon, Losses
from inscon.profiling import comparison, page, sections, verdict
from inscon.profiling.page import Section
from inscon.profiling.rates import read_metrics, run_speed
from inscon.profiling.report import Measurement
from pipelines import reference
from scripts.throughput_report import main, publish
from tests.packed import Sample, write_set
from tests.pipelines.conftest import as_jpeg, draw_picture
from tests.scripts.planted import delay_s, small_run

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """300 pictures of 48 x 64 px: four batches of 64 an epoch."""
    samples = [Sample(as_jpeg(draw_picture(i, 48, 64)), 48, 64, i % 2, f"a/{i}.jpg") for i in range(300)]
    folder = tmp_path_factory.mktemp("report") / "shards"
    write_set(folder, samples, per_shard=150, left_out=[("b/broken.jpg", "broken", "no picture")])
    return folder


@pytest.fixture(scope="module")
def delay():
    """Seconds, of each planted fault."""
    return delay_s()


def report_of(config, out, steps=10, engines=None):
    """Measured again, as a report asks for, where something else had the machine."""
    for _ in range(3):
        measurement = Measurement(config, CPU, out, steps=steps, warm_up=3)
        report = measurement.report(engines or [config.loader.pipeline], trace=0)
        if report["verdict"]["kind"] != verdict.DISTURBED:
            break
    return report


@pytest.fixture(scope="module")
def healthy(data, tmp_path_factory):
    """Nothing planted, and views large enough that the images are the work; two engines measured, the verdict on dali."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    out = tmp_path_factory.mktemp("healthy")
    report = report_of(small_run(data, pipeline="dali", view_size=64), out, engines=["dali", "reference"])
    return report | {"predictions": []}


def test_parts_add_up_and_ceilings_hold(healthy):
    assert set(healthy["shares"]) == set(PARTS)
    assert healthy["sum_of_shares"] == pytest.approx(100, abs=2)
    assert sum(healthy["shares"].values()) == pytest.approx(healthy["sum_of_shares"])
    steps = healthy["steps"][sections.END_TO_END]
    assert steps["timing_percent"] < 1
    rates = healthy["ceilings"]
    smaller = min(rates[sections.LOADER], rates[sections.SYNTHETIC])
    assert rates[sections.END_TO_END] <= 1.3 * smaller  # noise of a shared machine
    assert healthy["efficiency"] == pytest.approx(rates[sections.END_TO_END] / smaller)
    assert steps["images_per_s"] == pytest.approx(64 / steps["wall_ms"] * 1e3)
    passes = "query pass", "key pass", "backward", "heads and losses", "optimizer", "EMA", "wait for data"
    assert all(healthy["shares"][name] > 0 for name in passes)
    assert healthy["shares"]["mosaic pass"] == healthy["shares"]["exposed all-reduce and gathers"] == 0


def test_a_healthy_run_is_bound_by_its_processor(healthy):
    assert healthy["verdict"]["kind"] == "CPU-bound", healthy["verdict"]


def test_data_health_is_looked_at(healthy):
    found = healthy["engines"]["dali"]["health"]
    assert (found["images"], found["repeated"], found["substituted"]) == (13 * 64, 0, 0)
    assert found["epochs"] >= 3 and found["overlap_percent"] > 90
    assert healthy["left_out"] == 1
    assert healthy["engines"]["dali"]["loader"]["seams"] >= 2


def test_a_slow_disk_is_named(data, tmp_path, monkeypatch, delay):
    read = DatasetIndex.read

    def slowly(self, *arguments, **options):
        time.sleep(3 * delay / 64)
        return read(self, *arguments, **options)

    monkeypatch.setattr(DatasetIndex, "read", slowly)
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    report = report_of(small_run(data, pipeline="dali"), tmp_path)
    assert report["verdict"]["kind"] == "loader-bound" and report["verdict"]["stage"].endswith("stage read")
    assert "SSD" in report["verdict"]["advice"] and report["verdict"]["gain"] > 1.2
    assert report["stages_alone_ms"]["read"] > 2 * report["stages_alone_ms"]["decode"]
    text = "\n".join(note for part in sections.sections(report | {"predictions": []}) for note in part.notes)
    assert "First starved: decoded batches; the stage in front of it that takes longest: read." in text


def test_a_slow_loader_is_named(data, tmp_path, monkeypatch, delay):
    decode = reference.decode

    def slowly(*arguments):
        time.sleep(3 * delay / 64)
        return decode(*arguments)

    monkeypatch.setattr(reference, "decode", slowly)
    report = report_of(small_run(data, pipeline="reference", threads=0), tmp_path)
    assert report["verdict"]["kind"] == "loader-bound" and report["verdict"]["stage"].endswith("stage decode")
    assert "--threads" in report["verdict"]["advice"] and report["verdict"]["gain"] > 1.2
    rates = report["ceilings"]
    assert rates[sections.LOADER] < rates[sections.SYNTHETIC]


def test_batch_sizes_are_compared_by_turns(tmp_path, monkeypatch):
    """A machine that slows down for a while, in the middle of the comparison, doesn't change what is found."""
    measurement = Measurement(small_run(None, batch_size=8), CPU, tmp_path, steps=10, warm_up=2)
    times, sizes = iter([100.0, 300.0, 250.0, 120.0, 90.0, 130.0]), []

    def short_run(training, config):
        sizes.append((training.config.optim.batch_size, config.optim.batch_size))
        return next(times)

    monkeypatch.setattr(measurement, "short_run", short_run)
    monkeypatch.setattr("inscon.profiling.report.computing", lambda ms: ms)
    found = measurement.scaling()
    assert sizes == 3 * [(8, 8), (16, 16)]
    assert (found.compute_ms, found.other_compute_ms) == (90.0, 120.0)
    assert found.fixed_percent == pytest.approx(100 * 60 / 90)  # 60 ms at no images, 30 for each 8


def test_a_tiny_batch_is_named(tmp_path):
    report = report_of(small_run(None, batch_size=8), tmp_path)
    assert report["verdict"]["kind"] == "launch-bound", report["verdict"]
    assert "--batch-size 16" in report["verdict"]["advice"] and report["verdict"]["gain"] > 1.2


def test_a_sleep_in_the_step_is_named(tmp_path, monkeypatch, delay):
    find = InsCon._find_overlap

    def slowly(self, batch):
        time.sleep(delay)
        return find(self, batch)

    monkeypatch.setattr(InsCon, "_find_overlap", slowly)
    report = report_of(small_run(None), tmp_path)
    assert report["verdict"]["kind"] == "host-bound", report["verdict"]
    assert "outside of all its parts" in report["verdict"]["stage"] and "--trace" in report["verdict"]["advice"]


@pytest.mark.parametrize("fault", ["delay", "none"])
def test_a_slow_all_reduce_is_named(tmp_path, fault, delay):
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/scripts/planted.py"), str(out), fault],
        env=os.environ | {"PLANTED_DELAY_S": str(delay)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["ranks"] == 2 and report["sum_of_shares"] == pytest.approx(100, abs=2)
    delayed = report["steps"][sections.END_TO_END]["parts_ms"]["exposed all-reduce and gathers"]
    assert (delayed >= 1e3 * delay) == (fault == "delay")
    if fault == "delay":
        assert report["verdict"]["kind"] == "communication-bound", report["verdict"]
        assert "--gradient-wire" in report["verdict"]["advice"]


def test_the_page_is_written(healthy, tmp_path, capsys):
    publish(healthy, tmp_path)
    text = (tmp_path / "report.md").read_text()
    for title in (
        "Speed",
        "Four ceilings",
        "The step by part",
        "The loader by stage",
        "The machine",
        "Data",
        "Engines side",
    ):
        assert f"## {title}" in text
    assert healthy["verdict"]["sentence"] in text and "ESTIMATED at 256 per rank" in text
    assert "each image once per epoch | yes" in text and "no device" in text
    assert json.loads((tmp_path / "report.json").read_text())["report_version"] == 1
    assert "source images/s, total" in capsys.readouterr().out
    if (tmp_path / "report.png").exists():
        assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_picture_is_left_out(healthy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert page.draw(healthy, io.BytesIO()) is False


TRUE = {
    "report_version": 1, "ranks": 2, "verdict": {"kind": "CPU-bound"}, "flops": {"step": 1e9}, "matrix_flops_per_s": 1e11,
    "ceilings": {"loader alone": 100.0, "model on synthetic batches": 50.0, "model on cached batches": None, "end to end": 49.0},
    "shares": {"query pass": 40.0, "backward": 60.0}, "sum_of_shares": 100.0,
    "scaling": {"batch_size": 8, "other_batch_size": 16, "compute_ms": 100.0, "other_compute_ms": 101.0},
    "engines": {"dali": {"loader": {"images_per_s": 100.0}, "end_to_end": {"images_per_s": 49.0}},
                "synthetic": {"loader": None, "end_to_end": {"images_per_s": 50.0}}},
}  # fmt: skip
"""What is read for contradictions, with figures that have none: every rate of a two-rank run is below its ceiling."""


def with_figure(place, value):
    report = copy.deepcopy(TRUE)
    *way, last = place.split("/")
    inner = report
    for key in way:
        inner = inner[key]
    inner[last] = value
    return report


@pytest.mark.parametrize(("place", "value", "found"), [
    ("ceilings/loader alone", 12.56, "49.0 images/s end to end, above the 12.6 of the loader alone"),  # 390 %
    ("ceilings/model on synthetic batches", 40.0, "above the 40.0 of the model on synthetic batches"),
    ("ceilings/model on cached batches", 40.0, "above the 40.0 of the model on cached batches"),
    ("engines/dali/end_to_end", {"images_per_s": 300.0}, "300.0 images/s through dali, above the 100.0 of that loader alone"),
    ("matrix_flops_per_s", 1.69e10, "0.025 TFLOP/s in the step, above the 0.017 of matrix products"),  # MFU 145 %
    ("shares/backward", 130.0, "backward above 100 % of the step"),
    ("sum_of_shares", 130.0, "all parts above 100 % of the step"),
    ("scaling/other_compute_ms", 60.0, "60.0 ms for a batch of 16, less than the 100.0 ms for one of 8"),
    ("scaling/other_batch_size", 4, "100.0 ms for a batch of 8, less than the 101.0 ms for one of 4"),
])  # fmt: skip
def test_impossible_figures_get_no_verdict_and_no_comparison(tmp_path, place, value, found):
    report = with_figure(place, value)
    if place == "scaling/other_batch_size":
        report["scaling"]["compute_ms"] = 50.0
        found = found.replace("100.0", "50.0")
    (said,) = verdict.contradictions(report)
    assert found in said
    sentence = verdict.disturbed([said]).sentence()
    assert "machine was disturbed, measure again" in sentence and "times the images/s" not in sentence
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="report.json cannot be compared.*machine was disturbed, measure again"):
        comparison.load_report(file)


@pytest.mark.parametrize(("place", "value"), [
    ("report_version", 1),
    ("ceilings/end to end", 54.0),  # of 50: noise
    ("matrix_flops_per_s", 2.3e10),  # of 2.45e10: noise
    ("scaling", None),
    ("scaling/other_compute_ms", 95.0),
    ("shares/backward", 60.5),
])  # fmt: skip
def test_figures_that_can_be_get_their_verdict(place, value):
    assert verdict.contradictions(with_figure(place, value)) == [] and verdict.disturbed([]) is None


def test_a_waiting_run_is_promised_no_more_than_its_model_gives():
    waiting = verdict.Evidence(
        on_gpu=False, end_to_end=50.0, loader=50.0, model=49.0, copies=None, shares={"wait for data": 50.0},
        stages_ms={"decode": 1.0}, starved={}, scaling=None,
    )  # fmt: skip
    assert verdict.judge(waiting).gain == 1.0


def test_a_report_of_a_disturbed_machine_says_so(tmp_path, monkeypatch):
    """Matrix products measured while others had the machine, both times."""
    monkeypatch.setattr("inscon.profiling.report.measure_matrix_rate", lambda *_: 1e6)
    report = Measurement(small_run(None, batch_size=8), CPU, tmp_path, steps=10, warm_up=2).report(
        ["synthetic"], trace=0
    )
    assert report["verdict"]["kind"] == verdict.DISTURBED and report["mfu_percent"] is None
    publish(report | {"predictions": [], "efficiency": 3.9}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "machine was disturbed, measure again" in text and "utilisation, % | not known" in text
    assert "over the smaller of the first two: not known." in text and "does not depend on the batch" not in text
    with pytest.raises(ValueError, match="cannot be compared"):
        main(["--compare", str(tmp_path / "report.json"), str(tmp_path / "report.json")])


def windows_with(mfu):
    window = {"step_s": 1.0, "images_per_s": 64.0, "data_wait_percent": 0.0}
    return [
        {"step": n, **window, **({} if value is None else {"mfu_percent": value})} for n, value in enumerate(mfu, 1)
    ]


@pytest.mark.parametrize(("mfu", "shown"), [
    ([145.0, 60.0, 61.0, 62.0, 63.0, 64.0], 62.0),  # the first is warm-up
    ([60.0, 60.0, 61.0, 145.0, 63.0, 64.0], None),
    ([60.0, 60.0, 61.0, None, 63.0, 64.0], None),
    ([None] * 6, None),
])  # fmt: skip
def test_a_runs_mfu_is_never_above_100_percent(mfu, shown):
    speed = run_speed(windows_with(mfu), fill_steps=0)
    assert speed.mfu_percent == shown
    (row,) = [row for row in sections.run_section(speed).rows if row[0].startswith("model-FLOP")]
    assert row[1] == ("not known" if shown is None else "62.0")


@pytest.mark.parametrize(("full_rate", "logged"), [(1e-9, False), (1e12, True)])
def test_the_trainers_log_leaves_out_an_mfu_above_100_percent(full_rate, logged):
    losses, watch, loss = LossMeter(), Stopwatch(), torch.tensor(1.0)
    losses.add(Losses(single=loss, multi=None, cell=None, total=loss, top1={"single": loss}))
    assert ("mfu_percent" in window(losses, watch, 64, 0.1, full_rate=full_rate)) == logged


def test_pages_fit_80_columns():
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    title = "Throughput: resnet50 at 224 px through dali, batch 2048 on 8 x NVIDIA A100-SXM4-80GB, bf16, 2026-11-25"
    words = "what it is measured over, in words that go on for longer than a line has room"
    table = Section(
        "A table", ("", "in the run, ms per image", "over"), [(words, "1,234.5", words), ("W" * 90, "1", "W" * 90)]
    )
    page.show(console, title, "A verdict. " + words, [table, Section("Notes", (), (), [words * 3])])
    shown = stream.getvalue()
    assert all(len(line) <= 80 for line in shown.splitlines()) and "…" not in shown
    assert " ".join(title.split()) in " ".join(shown.split()) and shown.count("W") == 180


@pytest.mark.parametrize("flags", [
    ["--run", "RUN"], ["--run", "NOTHING"], ["--compare", "NOTHING", "NOTHING"], ["--predict", "tpu"], ["--steps", "3"],
    ["--trace", "-1"],
])  # fmt: skip
def test_cheap_refusals_come_before_the_imports(tmp_path, flags):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in windows_with([60.0, 60.0])))
    model = {"arch": "resnet18", "cell_grid": 3, "queue_size": 64, "cell_queue_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model": model, "optim": {"batch_size": 64}}))
    flags = [{"RUN": str(tmp_path), "NOTHING": str(tmp_path / "nothing")}.get(flag, flag) for flag in flags]
    code = (
        "import sys; from scripts import throughput_report as t\n"
        "try: t.main(sys.argv[1:])\n"
        "except ValueError as error: print(error)\n"
        "assert not {'torch', 'numba', 'tyro', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_outputs_are_tried_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/report cannot be written .*; set another --out"):
        main(["--pipeline", "synthetic", "--out", str(tmp_path / "file/report")])
    with pytest.raises(ValueError, match="is a folder where a file is to be written; set --out"):
        main(["--run", str(tmp_path / "nothing"), "--out", str(tmp_path)])


def test_a_metrics_line_cut_short_by_a_kill_is_left_out(tmp_path):
    lines = [json.dumps(line) for line in windows_with([60.0] * 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:9]]))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:9], lines[2]]))
    with pytest.raises(ValueError, match="line 2 of .*metrics.jsonl is broken; remove it"):
        read_metrics(tmp_path)


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


def test_a_comparison_is_a_gate(healthy, tmp_path, capsys):
    slower = copy.deepcopy(healthy)
    slower["ceilings"][sections.END_TO_END] *= 0.9
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(healthy))
    after.write_text(json.dumps(slower))
    assert main(["--compare", str(before), str(after)]) == 1
    assert "Worse by more than 5 %: end to end." in capsys.readouterr().out
    assert main(["--compare", str(before), str(after), "--tolerance", "15"]) == 0
    assert main(["--compare", str(after), str(before)]) == 0
    slower["settings"]["optim"]["batch_size"] = 32
    after.write_text(json.dumps(slower))
    with pytest.raises(ValueError, match="differ in: batch size. Found: 64 and 32; measure both in the same way"):
        main(["--compare", str(before), str(after)])
    after.write_text("{}")
    with pytest.raises(ValueError, match="after.json must be a report.json of version 1. Found: None"):
        main(["--compare", str(before), str(after)])


@pytest.mark.parametrize(("flags", "message"), [
    (["--steps", "9"], "a rate needs at least 10 steps after the warm-up. Found: 9; set --steps 10 or more"),
    (["--warm-up", "1"], "the first 2 steps at least are warm-up. Found: 1"),
    (["--predict", "tpu"], 'nothing is known of the machine "tpu"; set --predict to one of: v100x8, a100x8, h100x8, h200'),
    (["--pipelines", "dalli"], 'there is no pipeline "dalli"'),
])  # fmt: skip
def test_wrong_use_gets_one_sentence(tmp_path, flags, message):
    with pytest.raises(ValueError) as caught:
        main(["--pipeline", "synthetic", "--pipelines", "synthetic", "--out", str(tmp_path / "out"), *flags])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_predictions_say_what_they_are(capsys):
    assert main(["--predict", "v100x8", "--predict", "h200"]) == 0
    v100, h200 = capsys.readouterr().out.splitlines()
    # By hand: 8322 / 2.36 = 3526.3; times 0.9 = 3173.6; 1281167 * 200 / 3173.6 / 3600 = 22.4
    assert v100.startswith(
        "PREDICTION, not measured, v100x8: 3,174 images/s, 22 h for 200 epochs of ImageNet (ceiling 3,526"
    )
    assert "images/s = ResNet-50 training images/s / cost of an image * (1 - overhead)" in v100
    assert "DeepLearningExamples" in v100 and "not measured on such a machine" in v100
    assert h200.startswith("PREDICTION, not measured, h200: 1,258 to 1,716 images/s, 41 to 57 h")


def test_a_trace_names_the_parts(tmp_path):
    Measurement(small_run(None), CPU, tmp_path, steps=10, warm_up=2).trace(2)
    events = json.loads((tmp_path / "trace-rank0.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("backward") == names.count("optimizer") == 2 and names.count("key pass") == 2


def test_repeated_images_are_seen():
    from inscon.config import ViewConfig
    from inscon.profiling.measure import data_health

    box, flipped = torch.tensor([[0.0, 0.0, 100.0, 100.0]] * 4), torch.zeros(4, dtype=torch.bool)
    far = torch.tensor([[200.0, 200.0, 300.0, 300.0]] * 4)
    ids = [torch.from_numpy(np.array(of_batch)) for of_batch in ([0, 1, 2, 3], [4, 5, 6, 3], [0, 1, 2, 3])]
    facts = [
        (ids[0], box, flipped, box, flipped),
        (ids[1], box, flipped, far, flipped),
        (ids[2], box, flipped, box, flipped),
    ]
    found = data_health(facts, [0, 0, 1], ViewConfig(), 2)
    assert (found.images, found.epochs, found.repeated, found.substituted) == (12, 2, 1, 2)
    assert found.overlap_percent == pytest.approx(100 * 8 / 12)
