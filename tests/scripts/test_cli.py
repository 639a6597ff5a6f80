"""Every switch of docs/method.md is a flag, and flags land where they should."""

import argparse
import ast
import functools
import re
import shlex
from pathlib import Path

import pytest
import tyro

from data_prep import make_dali, make_ffcv, make_scenes, verify
from inscon.__main__ import COMMANDS
from inscon.config import Config
from inscon.methods import settings_of
from inscon.methods.method import resolve
from inscon.recipes import RECIPES
from scripts import attention_maps, completion, export, finetune_detection, knn, linear, show_views, throughput_report
from scripts.train import parse

ROOT = Path(__file__).resolve().parents[2]

SWITCHES = {
    "--tile half": ("method", "tile", "half"),
    "--tiles-from third": ("method", "tiles_from", "third"),
    "--aggregate literal": ("method", "aggregate", "literal"),
    "--roi-offset 0.5": ("method", "roi_offset", 0.5),
    "--roi-border normalize": ("method", "roi_border", "normalize"),
    "--overlap-min-side 64": ("views", "overlap_min_side", 64.0),
    "--overlap-min-iou 0.2": ("views", "overlap_min_iou", 0.2),
    "--overlap-candidates 4": ("views", "overlap_candidates", 4),
    "--queue-size 4096": ("method", "queue_size", 4096),
    "--cell-queue-size 4608": ("method", "cell_queue_size", 4608),
    "--multi-head-init independent": ("method", "multi_head_init", "independent"),
    "--norm sync": ("model", "norm", "sync"),
    "--split-size 16": ("model", "split_size", 16),
    "--mosaic-updates-norm": ("method", "mosaic_updates_norm", True),
    "--cell-stage res4": ("method", "cell_stage", "res4"),
    "--heads single cell": ("method", "heads", ("single", "cell")),
    "--cell-temperature 0.4": ("method", "cell_temperature", 0.4),
    "--data SHARDS": ("loader", "data", Path("SHARDS")),
    "--cache-dir CACHE": ("loader", "cache_dir", Path("CACHE")),
    "--cache-gb 500": ("loader", "cache_gb", 500.0),
    "--pipeline reference": ("loader", "pipeline", "reference"),
    "--decode cpu": ("loader", "decode", "cpu"),
    "--color host": ("loader", "color", "host"),
    "--on-bad-sample substitute": ("loader", "on_bad_sample", "substitute"),
    "--stall-timeout 30": ("loader", "stall_timeout", 30.0),
    "--optimizer foreach": ("optim", "optimizer", "foreach"),
    "--optimizer lars": ("optim", "optimizer", "lars"),
    "--no-decay-norm-and-bias": ("optim", "decay_norm_and_bias", False),
    "--warmup-epochs 10": ("optim", "warmup_epochs", 10),
    "--schedule cosine-step": ("optim", "schedule", "cosine-step"),
    "--precision bf16": ("optim", "precision", "bf16"),
    "--gradient-compression fp16": ("optim", "gradient_compression", "fp16"),
    "--backbone resnet18": ("model", "backbone", "resnet18"),
    "--tracker wandb tensorboard": ("run", "tracker", ("wandb", "tensorboard")),
    "--scale 0.08 1.0": ("views", "scale", (0.08, 1.0)),
    "--change-on-resume lr momentum --lr 0.01": ("run", "change_on_resume", ("lr", "momentum")),
    "--lr 0.015 --change-on-resume lr": ("optim", "lr", 0.015),
}


@pytest.mark.parametrize("flags", SWITCHES)
def test_a_switch_lands_in_its_field(flags):
    group, field, value = SWITCHES[flags]
    assert getattr(getattr(parse(flags.split()), group), field) == value
    assert getattr(getattr(parse([]), group), field) != value


def test_every_flag_of_the_method_page_exists():
    page = (Path(__file__).resolve().parents[2] / "docs/method.md").read_text()
    flags = set(re.findall(r"`(--[a-z-]+)", page))
    assert len(flags) >= 14 and flags <= {flag.split()[0] for flag in SWITCHES} | {"--recipe", "--method"}


def test_recipes_can_be_chosen_and_overridden():
    config = parse(["--recipe", "moco_v1", "--lr", "0.5", "--batch-size", "64"])
    assert not config.method.mlp and config.views.gray_first
    assert (config.optim.lr, config.optim.batch_size) == (0.5, 64)
    assert resolve(config, 1).method.queue_size == 65536
    with pytest.raises(SystemExit):
        parse(["--recipe", "imagenet"])
    with pytest.raises(SystemExit):
        parse(["--tempratur", "1"])


def test_a_method_starts_from_its_first_recipe():
    for method, recipe in {
        "moco": "moco_v2",
        "simclr": "simclr_r50",
        "byol": "byol_r50",
        "pixpro": "pixpro_r50",
    }.items():
        assert parse(["--method", method]) == RECIPES[recipe]()
    config = parse(["--method", "pixpro", "--instance", "--second-blur-probability", "0.3", "--lr", "1"])
    assert config.method.instance and config.method.second_blur_probability == 0.3
    assert (config.optim.lr, config.optim.optimizer, config.views.blur_probability) == (1.0, "lars", 1.0)
    toy = "tests.inscon.methods.toy"
    assert parse(["--method", toy]) == Config(method=settings_of(toy)())


def test_every_command_of_the_reproduction_page_exists():
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs/reproduce.md").read_text()
    named = set(re.findall(r"(?:scripts|inscon/transfer/\w+)/\w+\.py", page))
    assert len(named) >= 6 and all((root / path).exists() for path in named)
    configs = set(re.findall(r"`(\w+\.yaml)", page))
    assert len(configs) == 4
    assert all((root / "inscon/transfer/detectron2/configs" / name).exists() for name in configs)


def own_and_the_trainers(options, arguments):
    _, rest = options().parse_known_args(arguments)
    return parse(rest)


def as_detectron2(arguments):
    """By a parser with the flags of detectron2's default_argument_parser, which takes all behind the first key as options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file", default="")
    for flag in ("--resume", "--eval-only"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--num-gpus", "--num-machines", "--machine-rank"):
        parser.add_argument(flag, type=int, default=1)
    parser.add_argument("--dist-url", default="")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    found = parser.parse_args(arguments)
    assert found.config_file == "CONFIG" or (ROOT / found.config_file).is_file(), arguments
    keys, values = found.opts[::2], found.opts[1::2]
    assert len(keys) == len(values) and all(re.fullmatch(r"[A-Z0-9_.]+", key) for key in keys), arguments
    assert found.resume or "MODEL.WEIGHTS" in keys


def by_tyro(config):
    return lambda arguments: tyro.cli(config, args=arguments)


def as_function(function):
    """A command that is a function: its arguments are parsed, it isn't called."""
    return lambda arguments: tyro.cli(functools.wraps(function)(lambda *_, **__: None), args=arguments)


TRAIN_NET = "inscon/transfer/detectron2/train_net.py"
PARSERS = {
    "scripts/train.py": parse,
    "scripts/throughput_report.py": functools.partial(own_and_the_trainers, throughput_report.options),
    "scripts/show_views.py": functools.partial(own_and_the_trainers, show_views.options),
    "scripts/attention_maps.py": by_tyro(attention_maps.AttentionConfig),
    "scripts/export.py": by_tyro(export.ExportConfig),
    "scripts/finetune_detection.py": by_tyro(finetune_detection.DetectionConfig),
    "scripts/knn.py": by_tyro(knn.KnnConfig),
    "scripts/linear.py": by_tyro(linear.LinearConfig),
    "data_prep/make_dali.py": by_tyro(make_dali.DaliConfig),
    "data_prep/make_ffcv.py": by_tyro(make_ffcv.BetonConfig),
    "data_prep/make_scenes.py": as_function(make_scenes.make_scenes),
    "data_prep/verify.py": as_function(verify.verify),
    "scripts/completion.py": as_function(completion.completion),
    TRAIN_NET: as_detectron2,
}
STARTS = ("python ", "torchrun ", "inscon ", "sbatch ")


def script_of(command):
    """(file, its arguments) of a command, however it is started."""
    if command[0] == "inscon" or (command[1:] and "inscon" in command and command[command.index("inscon") - 1] == "-m"):
        word, *arguments = command[command.index("inscon") + 1 :]
        return f"{COMMANDS[word][0].removeprefix('inscon.').replace('.', '/')}.py", arguments
    place = next(number for number, word in enumerate(command) if word.endswith((".py", ".sbatch")))
    return command[place].replace("slurm/train.sbatch", "train.py"), command[place + 1 :]


def printed(text):
    """Commands of a page or docstring, in lines of their own or in backticks: each as the shell would split it."""
    joined = text.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()] + re.findall(r"`((?:python|torchrun) [^`]*)`", joined)
    commands = [one for line in lines if line.startswith(STARTS) for one in line.split(" && ")]
    split = [shlex.split(command, comments=True) for command in commands if not command.endswith("/...")]
    return [command[: command.index(">")] if ">" in command else command for command in split]


def rows_of_tables(text):
    """docs/reproduce.md's rows: "CONFIG KEY VALUE ..." behind the command that its table's head gives."""
    (head,) = re.findall(r"`python (\S*train_net.py [^`]*/)\.\.\.`", text)
    return [["python", *f"{head}{row}".split()] for row in re.findall(r"`(\w+\.yaml[^`]*)`", text)]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCSTRINGS = sorted(
    path for folder in ("scripts", "data_prep", "inscon/transfer") for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", PAGES + DOCSTRINGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_printed_command_is_understood(path):
    text = (
        path.read_text() if path.suffix == ".md" else ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
    )
    found = printed(text) + (rows_of_tables(text) if path.name == "reproduce.md" else [])
    for command in found:
        script, arguments = script_of(command)
        if script in PARSERS:
            PARSERS[script](arguments)
        else:
            assert script.startswith("benchmarks/") or script == "tools/train.py", f"{path}: who understands {script}?"
    if path.name in ("detection.md", "reproduce.md", "train_net.py"):
        assert any(TRAIN_NET in command for command in found)


def test_a_flag_behind_a_setting_is_found_out():
    with pytest.raises(AssertionError):
        as_detectron2(["--num-gpus", "8", "MODEL.WEIGHTS", "r50.pkl", "--config-file", "x.yaml"])


def test_every_fine_tuning_of_the_reproduction_page_has_a_folder_of_its_own():
    rows = rows_of_tables((ROOT / "docs/reproduce.md").read_text())
    folders = [row[row.index("OUTPUT_DIR") + 1] for row in rows]
    assert len(folders) == len(set(folders)) == 7
