"""docs/python.md, as somebody types it: its blocks, one after the other, on a small set."""

import contextlib
import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.make_dali import pack_folder

PAGE = (Path(__file__).resolve().parents[2] / "docs/python.md").read_text()
SMALLER = {
    "max_steps=100": "max_steps=2, pipeline='reference', threads=0, backbone='test_resnet', batch_size=8, split_size=4, "
    "queue_size=16, cell_queue_size=144, log_every=1",
    "LabelledViews(data, 64).": "LabelledViews(data, 64, pipeline='reference', threads=0).",
    "k=20": "k=5",
}


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """The names that the page leaves, in a folder with the sets that it has."""
    tmp_path = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", ["a notebook's", "--own", "flags"])
        yield type_page(tmp_path)


def type_page(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for i in range(count):
            path = tmp_path / f"pictures/{split}/class_{i % 2}/{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (70, 80, 3), np.uint8)).save(path)
        pack_folder(tmp_path / "pictures" / split, tmp_path / "shards" / split)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    for full, small in SMALLER.items():
        assert code.count(full) == 1
        code = code.replace(full, small)
    names = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    return names


def test_the_pages_calls_give_what_it_says(typed):
    handler = signal.getsignal(signal.SIGINT)
    assert len(typed["packed"]) == 16 and typed["packed"].class_names == ("class_0", "class_1")
    assert isinstance(typed["sheet"], Image.Image) and Path("views.png").is_file()
    assert typed["stopped"] is False
    logged = [json.loads(line)["step"] for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert logged == [1, 2] and typed["facts"]["step"] == 2
    backbone = typed["backbone"]
    assert typed["rows"].shape == (8, backbone.channels[backbone.last]) and typed["labels"].tolist().count(0) == 4
    assert 0 <= typed["accuracy"] <= 1
    more = typed["config"].replaced(max_steps=3)
    assert typed["train"].pretrain(more) is False and typed["any_backbone"]("runs/mine")[1]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_refusal_is_an_exception_and_a_stop_leaves_the_signals_as_they_were(typed):
    config, train = typed["config"], typed["train"]
    with pytest.raises(ValueError, match="batch_size must be a multiple of 4 .* Found: 6; set --batch-size 4"):
        train.pretrain(config.replaced(batch_size=6))
    with pytest.raises(ValueError, match="--max-steps must be at least 1. Found: ten"):
        config.replaced(max_steps="ten")
    with pytest.raises(ValueError, match="there is no setting epoch; the nearest are epochs, "):
        config.replaced(epoch=3)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    class StopsAtOnce:
        @staticmethod
        def write(text):
            if "from step" in text:
                signal.raise_signal(signal.SIGINT)

        @staticmethod
        def flush():
            pass

    with contextlib.redirect_stdout(StopsAtOnce):
        assert train.pretrain(config.replaced(max_steps=50, epochs=50, run_dir="runs/other")) is True
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
