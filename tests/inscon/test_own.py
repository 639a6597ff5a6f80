"""`--recipe own`: what it sets for which number of pictures and ranks, and what it says and refuses."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from inscon import checkpoint, own
from inscon.methods.method import resolve
from inscon.recipes import RECIPES
from inscon.sampling import EpochOrder
from scripts import train


class Pictures:
    """As many as are asked for, all of one size."""

    def __init__(self, count, height=300, width=400):
        self.count, self.size = count, (height, width)

    def __len__(self):
        return self.count

    def sizes(self, ids):
        assert max(ids) < self.count
        return np.tile(self.size, (len(ids), 1))


def fitted(pictures, flags="", ranks=1):
    """(resolved configuration, lines), by the trainer's own way from its flags."""
    arguments, said = ["--recipe", "own", *flags.split()], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(train, "open_index", lambda loader: pictures)
        config = train.fitted(train.parse(arguments), arguments, ranks)
    return resolve(config, ranks), said.getvalue().splitlines()


def test_imagenets_numbers_give_the_papers_settings():
    config, _ = fitted(Pictures(1_281_167, 375, 500), ranks=8)
    paper = resolve(RECIPES["imagenet_r50"](), 8)
    assert config.method == paper.method and config.views == paper.views and config.model == paper.model
    optim = config.optim
    assert (
        (optim.batch_size, optim.epochs, optim.lr)
        == (256, 200, 0.03)
        == (paper.optim.batch_size, paper.optim.epochs, paper.optim.lr)
    )


@pytest.mark.parametrize("method", ["inscon", "moco", "densecl", "simclr", "byol"])
@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("count", [32, 125, 300, 1000, 4096, 8000, 20_000, 300_000])
def test_what_it_sets_goes_together(count, ranks, method):
    """For any number: whole queues, of a quarter of the set and a 256th of the run at most; four batches; a short warm-up."""
    start = train.chosen_start(["--recipe", "own", "--method", method])[1]
    if count < 32 * ranks:
        with pytest.raises(ValueError, match=f"four batches, here {32 * ranks} pictures. Found: {count}; add pictures"):
            own.fit(start, start, set(), Pictures(count), ranks)
        return
    config, lines = own.fit(start, start, set(), Pictures(count), ranks)
    config = resolve(config, ranks)  # which refuses queues that are not whole, and batches that ranks cannot share
    optim, batch = config.optim, config.optim.batch_size
    assert count >= 4 * batch and batch % (8 * ranks) == 0 and (count // batch >= 64 or batch == 8 * ranks)
    assert config.method.memory(batch) <= max(1, min(count / 4 / batch, optim.epochs * (count // batch) / 256))
    assert optim.warmup_epochs <= optim.epochs / 20 and optim.schedule == "cosine-step"
    assert optim.epochs * (count // batch) >= 45_000 or optim.epochs >= 800
    assert not [line for line in lines if line.startswith("warning")]


@pytest.mark.parametrize(("short", "size"), [(32, 64), (96, 64), (128, 96), (256, 192), (375, 224), (3000, 224)])
def test_views_are_as_large_as_the_usual_crop(short, size):
    """Against drawn crops: of a square, 20 to 100 % of its area. 64 px at least, 224 at most, a multiple of 32."""
    assert fitted(Pictures(1000, 2 * short, short))[0].views.view_size == size
    crops = short * np.sqrt(np.random.default_rng(0).uniform(0.2, 1, 100_000))
    assert size in (64, 224) or abs(crops.mean() - size) <= 16


def test_flags_win_and_the_rest_follows_them():
    config, lines = fitted(Pictures(4096), "--batch-size 32 --epochs=4 --view_size 96 --temperature 0.3")
    assert (config.optim.batch_size, config.optim.epochs, config.views.view_size, config.method.temperature) == (
        32,
        4,
        96,
        0.3,
    )
    assert config.method.queue_size == 64 and config.method.cell_queue_size == 576  # of 2 of 512 steps
    assert config.method.key_momentum == 0.996 and config.optim.warmup_epochs == 0
    assert "--epochs 4: as given" in lines and sum(line.startswith("--") for line in lines) == 11


def test_every_setting_is_said_with_its_reason():
    config, lines = fitted(Pictures(8000))
    said = dict(re.fullmatch(r"--([\w-]+) (\S+): .{20,}", line).groups() for line in lines if line.startswith("--"))
    values = {
        name: value for group in (config.optim, config.views, config.method) for name, value in vars(group).items()
    }
    assert len(said) == 11 and all(str(values[flag.replace("-", "_")]) == value for flag, value in said.items())
    assert lines[-1] == "The loss rises at first, while the queue fills (31 steps): look at it after that"


@pytest.mark.parametrize(("flags", "sentence"), [
    ("--queue-size 8000 --batch-size 80", "the queue holds 8000 keys and the set 8000 pictures, .* set --queue-size 2000"),
    ("--method moco --queue-size 65536", "the queue holds 65536 keys .* set --queue-size 1984"),
    ("--batch-size 256 --lr 0.3", "--lr 0.3 is far from the 0.03 that suits batch 256"),
])  # fmt: skip
def test_what_others_met_is_warned_of(flags, sentence):
    warnings = [line for line in fitted(Pictures(8000), flags)[1] if line.startswith("warning: ")]
    assert len(warnings) == 1 and re.search(sentence, warnings[0])


@pytest.mark.parametrize(("share", "met"), [(1 / 4, 1 / 32), (1 / 2, 1 / 8), (1, 1 / 2)])
def test_how_many_pictures_meet_their_own_older_key(share, met):
    """What the page says, against the trainer's own order: keys of the last `share` of a set, when an image comes again."""
    images = 4096
    order = EpochOrder(images, 8, seed=1)
    places = np.argsort(
        [np.concatenate([order.rank_batch(e * 512 + i, 0, 1) for i in range(512)]) for e in range(2)], axis=1
    )
    apart = images + places[1] - places[0]
    assert (apart <= share * images).mean() == pytest.approx(met, abs=0.02)


@pytest.mark.parametrize(("count", "flags", "ranks", "sentence"), [
    (31, "", 1, "here 32 pictures. Found: 31; add pictures$"),
    (125, "", 8, "here 256 pictures. Found: 125; add pictures or take fewer ranks"),
    (125, "--batch-size 64", 1, "here 256 pictures. Found: 125; set --batch-size 24"),
])  # fmt: skip
def test_too_few_pictures_are_refused(count, flags, ranks, sentence):
    with pytest.raises(ValueError, match=f"four batches, {sentence}"):
        fitted(Pictures(count), flags, ranks)
    remedy = re.search("set (--batch-size .*)", sentence)
    assert not remedy or fitted(Pictures(count), remedy[1], ranks)


def test_a_run_that_has_begun_keeps_its_settings_on_other_gpus(tmp_path):
    """Also where a flag is left out that the start had; a flag that is there still counts, for checkpoints to judge."""
    flags = f"--run-dir {tmp_path} --pipeline synthetic"
    begun, _ = fitted(Pictures(100_000), f"{flags} --epochs 30 --lr 0.02", ranks=1)
    checkpoint.save(tmp_path, {"step": 1, "config": begun.to_dict()}, keep=1)
    for ranks in (1, 4, 16):
        config, lines = fitted(Pictures(100_000), flags, ranks=ranks)
        assert (config.optim, config.views, config.method) == (begun.optim, begun.views, begun.method)
        assert f"--epochs 30: as {tmp_path} began" in lines
    assert fitted(Pictures(100_000), f"{flags} --lr 0.5")[0].optim.lr == 0.5
    with pytest.raises(ValueError, match="multiple of 4 images .* times 80 rank"):
        fitted(Pictures(100_000), flags, ranks=80)


def test_a_detectors_folder_has_no_settings_to_keep(tmp_path):
    """The trainer then refuses it."""
    checkpoint.save(tmp_path, {"step": 1, "design": {}}, keep=1)
    assert fitted(Pictures(8000), f"--run-dir {tmp_path}")[0].method == fitted(Pictures(8000))[0].method


@pytest.mark.slow
def test_the_runs_of_the_page_can_be_repeated(tmp_path):
    """Its commands as they are printed, on fewer pictures, from another folder."""
    root = Path(__file__).resolve().parents[2]
    printed = (root / "docs/own-pictures.md").read_text().partition("## Does it help?")[2].split("```")[1]
    for many, few in (
        ("--num-images 4096", "--num-images 128"),
        ("--num-val 1024", "--num-val 64"),
        ("--epochs 8", "--epochs 1"),
    ):
        assert many in printed
        printed = printed.replace(many, few)
    for line in re.findall(r"^python (.*)$", printed, re.MULTILINE):
        script, *flags = line.split()
        done = subprocess.run([sys.executable, root / script, *flags], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr[-2000:])
    assert re.search(
        r" untrained: [0-9.]+ % of 64 pictures.* trained: [0-9.]+ % of 64 pictures", done.stdout, re.DOTALL
    )
