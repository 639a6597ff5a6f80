"""The demo, with few scenes and steps: what it writes and says. What it learns is measured by hand (docs/measured.md)."""

import json

import pytest
from PIL import Image

from scripts import demo
from scripts.demo import DemoConfig, half_interval, main


def test_the_interval_is_that_of_a_share():
    assert half_interval(50, 1024) == pytest.approx(3.0625)


def test_without_matplotlib_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="matplotlib, which is not installed: pip install matplotlib"):
        main(DemoConfig(out=tmp_path / "demo"))
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_a_small_demo_writes_its_picture_and_its_summary(tmp_path, capsys):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    found = main(DemoConfig(out=tmp_path / "demo", seed=3, pictures=128, held_out=40, max_steps=2))
    assert json.loads((tmp_path / "demo/summary.json").read_text()) == found
    assert found.keys() == {"knn_untrained", "knn_trained", "pictures", "seconds", "seed"}
    assert found["pictures"] == 40 and found["seed"] == 3 and 0 <= found["knn_trained"] <= 100
    assert Image.open(tmp_path / "demo/demo.png").size == (1400, 1000)
    said = capsys.readouterr().out
    assert said.startswith("Draws 128 scenes") and "untrained: " in said and "of 40 scenes" in said
