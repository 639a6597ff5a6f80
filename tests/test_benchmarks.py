"""What a benchmark must not do: wait for a process that is gone, or end because of one item that failed."""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu, step
from benchmarks.packing import make_pictures
from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, ViewConfig
from inscon.methods import inscon
from inscon.methods.method import resolve


@pytest.mark.slow
def test_a_contender_that_dies_ends_the_benchmark(capfd):
    """Of a device that is not there."""
    config = Config(
        method=inscon.Settings(),
        loader=LoaderConfig(pipeline="synthetic"),
        views=ViewConfig(view_size=64),
        model=ModelConfig(backbone="resnet18", norm="split"),
        optim=OptimConfig(batch_size=8),
    )
    arguments = argparse.Namespace(threads=1, device="cuda:99", warm_up=1, rounds=1, steps=1)
    with pytest.raises(ChildProcessError, match='the contender "naive" ended with exit code 1'):
        step.contend(["naive"], resolve(config, 1), arguments)
    assert "CUDA" in capfd.readouterr().err


LINE = '{"step": %d, "loss": %s, "images_per_s": %d}'


def trains(folder, *code):
    """An item that logs as a training does."""
    path = folder / "metrics.jsonl"
    begun = f"import time; from pathlib import Path; p = Path({str(path)!r}); p.parent.mkdir(); p.touch()"
    return gpu.Item("it", ["-c", "\n".join([begun, *code])], folder, figures=lambda said: gpu.rates(folder))


def test_a_training_that_fails_in_its_first_step_is_told_with_its_last_words(tmp_path):
    found = gpu.run(trains(tmp_path / "run", "print('one')", "raise SystemExit('out of memory')"), tmp_path, 60)
    assert found["status"] == 1 and found["said"] == ["one", "out of memory"] and "error" not in found


def test_figures_that_are_not_there_are_told(tmp_path):
    found = gpu.run(gpu.Item("it", ["-c", "print(1)"], figures=lambda said: json.loads("")), tmp_path, 60)
    assert found["status"] == 0 and found["error"].startswith("JSONDecodeError")


def test_rates_and_the_tenth_step(tmp_path):
    lines = [LINE % (step, "NaN" if step == 15 else 2, 100 * step) for step in (5, 10, 15, 20)]
    code = [
        f"p.write_text({line!r} if not p.exists() else p.read_text() + {line + chr(10)!r}); time.sleep(0.4)"
        for line in lines
    ]
    (tmp_path / "run").mkdir()  # of an earlier call: it would go on from there
    (tmp_path / "run" / "old").touch()
    found = gpu.run(trains(tmp_path / "run", *code), tmp_path, 60)
    assert found["status"] == 0 and not (tmp_path / "run" / "old").exists()
    assert 0.4 <= found["tenth_step_s"] < found["seconds"] - 0.6
    assert found["images_per_s"] == 1750 and found["finite"] is False  # of the last two


def test_an_item_at_its_limit_is_interrupted(tmp_path):
    code = "import time\ntry:\n time.sleep(60)\nfinally:\n print('so far')"
    found = gpu.run(gpu.Item("it", ["-c", code], limit_s=1), tmp_path, 60)
    assert found["status"] == "ended after 1 s" and found["seconds"] < 15
    assert found["said"][0] == "so far" and found["said"][-1] == "KeyboardInterrupt"


TESTS = """
    import time
    import pytest

    def test_good(): pass

    @pytest.mark.parametrize("what", ["a b", "c"])
    def test_bad(what): assert what == "c", 30 * "a long story "

    @pytest.mark.skip(reason="no device")
    def test_skipped(): pass

    @pytest.fixture
    def broken(): raise OSError("no disk")

    def test_of_broken(broken): pass

    def test_long(): time.sleep(60)
"""


@pytest.mark.slow
def test_tests_are_counted_and_the_failed_ones_named_as_far_as_they_came(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_these.py").write_text(textwrap.dedent(TESTS))
    (tmp_path / "tests/test_other.py").write_text("import nowhere_to_be_found")
    command = "import os, pytest; os.chdir(%r); pytest.main('-v -ra --continue-on-collection-errors'.split())"
    item = gpu.Item("tests", ["-c", command % str(tmp_path)], figures=gpu.outcomes, limit_s=12)
    found = gpu.run(item, tmp_path, 60)
    assert found["status"] == "ended after 12 s"
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1, "error": 2}
    assert found["failed"] == {
        "tests/test_these.py::test_bad[a b]": "AssertionError: " + 30 * "a long story ",
        "tests/test_these.py::test_of_broken": "OSError: no disk",
        "tests/test_other.py": "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    }


def test_tests_of_a_killed_process_are_counted_too():
    said = "tests/a.py::test_one PASSED [ 10%]\ntests/a.py::test_two[x - y] FAILED [ 20%]\ntests/a.py::test_three "
    assert gpu.outcomes(said) == {"counts": {"passed": 1, "failed": 1}, "failed": {"tests/a.py::test_two[x - y]": ""}}


def test_what_is_chosen_comes_with_what_it_needs(tmp_path):
    every = list(gpu.items(tmp_path, False, tmp_path, None, tmp_path))
    names = lambda only, done: [item.name for item in gpu.chosen(every, only, done)]  # noqa: E731
    assert names([], {})[:3] == ["bf16 256", "pictures", "pack dali"] and names([], {})[-1] == "tests"
    assert names(["tests"], {}) == ["tests"]
    dali = [f"dali color {where}" for where in ("auto", "host", "device")]
    assert names(["dali"], {}) == ["pictures", "pack dali", *dali]
    packed = {"pack dali": {"status": 0}, "dali color auto": {"status": 1}}
    assert names(["dali"], packed) == dali
    assert names(["dali"], {"pack dali": {"status": 1}, "pictures": {"status": 0}}) == ["pack dali", *dali]
    assert not {"pack dali", "dali color auto"} & set(names([], packed))
    assert len({item.name for item in every}) == len(every)
    assert not [item for item in gpu.items(tmp_path, False, None, None, None) if item.needs]
    packed = list(gpu.items(tmp_path, False, tmp_path, tmp_path / "set", None))
    assert not {"pictures", "pack dali"} & {item.name for item in packed} and all(
        "pictures" not in i.needs for i in packed
    )
    assert next(i.command for i in packed if i.name == "pack ffcv")[2] == str(tmp_path / "set")
    assert all(
        item.needs == [] or set(item.needs) <= {i.name for i in every[:place]} for place, item in enumerate(every)
    )


def test_without_time_nothing_is_begun(tmp_path, monkeypatch, capsys):
    every = [gpu.Item("long", ["-c", ""]), gpu.Item("short", ["-c", ""], limit_s=5)]
    monkeypatch.setattr(gpu, "items", lambda *given: every)
    for again in range(2):
        given = ["gpu.py", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--minutes", "0.4"]
        monkeypatch.setattr(sys, "argv", given)
        gpu.main()
        results = json.loads((tmp_path / "out/gpu.json").read_text())["results"]
        assert results["long"] == {"status": "not run: no time left"} and results["short"]["status"] == 0
        assert capsys.readouterr().out.count("short {") == 1 - again  # done before


def test_the_readmes_figures_are_those_that_were_measured(tmp_path, monkeypatch, capsys):
    """Those of the table of a GPU; written into another text they appear there."""
    text, held = Path("README.md").read_text(), json.loads(Path("benchmarks/results/gpu_h200.json").read_text())
    (tmp_path / "README.md").write_text(text.replace("| 224 |", "| 999 |").replace("H200: 2026", "V100: 2025"))
    (tmp_path / "gpu.json").write_text(json.dumps(held))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--readme", str(tmp_path / "README.md")])
    gpu.main()
    assert (tmp_path / "README.md").read_text() == text
    held["machine"]["gpu"] = "NVIDIA H100 80GB HBM3"
    made = gpu.in_readme(text, held)
    assert "| One H100, ResNet-50, batch 256 |" in made and f"H100: {held['date']}. Cores:" in made
    del held["results"]["ffcv color auto"]
    with pytest.raises(ValueError, match="Missing: 'ffcv color auto'"):
        gpu.in_readme(text, held)


def test_a_table_sets_rates_beside_older_ones():
    now, before = {"status": 0, "images_per_s": 300.0, "step_s": 0.1}, {"images_per_s": 200.0}
    told = {
        "machine": {"gpu": "a GPU"},
        "date": "2026",
        "results": {"bf16 256": now, "fp16 256": {"status": "not run"}},
    }
    made = gpu.table(told, {"results": {"bf16 256": before}})
    cells = [list(column.cells) for column in made.columns]
    assert [column[0] for column in cells] == ["bf16 256", "300", "100.0", "", "", "1.50", "0"]
    assert [column[1] for column in cells] == ["fp16 256", "", "", "", "", "", "not run"]


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".JPEG"])
def test_pictures_are_made_of_any_jpegs(tmp_path, suffix):
    (tmp_path / "some").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"some/one{suffix}", format="jpeg")
    make_pictures(tmp_path / "some", tmp_path / "made", 120)
    made = [path.read_bytes() for path in sorted(tmp_path.rglob("made/*/*.JPEG"))]
    assert len(set(made)) > 100 and len(made) == 120
    with Image.open(tmp_path / "made/class_07/000107.JPEG") as image:
        assert 64 <= image.width <= 80 and 48 <= image.height <= 60


def test_no_pictures_are_made_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="has no .jpg and no .jpeg; give a folder of JPEGs"):
        make_pictures(tmp_path, tmp_path / "made", 4)
