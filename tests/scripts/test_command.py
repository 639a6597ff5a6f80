"""`inscon`: the scripts from any folder, installed from a wheel, where no clone is."""

import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inscon import __main__ as command
from inscon import guard
from tests.scripts.test_runs import SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def called(monkeypatch, capsys):
    """called(*arguments): status, stdout and stderr of `inscon ARGUMENTS`, in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    handlers = {number: signal.getsignal(number) for number in guard.STOPS}

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["inscon", *arguments])
        monkeypatch.setitem(sys.modules, "__main__", command)
        status = 0
        try:
            command.main()
        except SystemExit as end:
            status = end.code or 0
        finally:
            for number, handler in handlers.items():  # packing has its own
                signal.signal(number, handler)
        return status, *capsys.readouterr()

    return called


def test_help_fits_a_screen_and_imports_no_torch():
    program = "import sys; from inscon.__main__ import main; main(); sys.exit('torch' in sys.modules or 'tyro' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 24 and max(map(len, lines)) <= 80
    words = [line.split()[0] for line in lines if line.startswith("  ")]
    assert words == list(command.COMMANDS)
    assert {"pack", "train", "report", "views", "export", "knn", "linear", "detect", "attention"} <= set(words)


@pytest.mark.parametrize("word", command.COMMANDS)
def test_every_command_explains_itself_by_its_own_name(word, called):
    if word == "detect":
        pytest.importorskip("pycocotools")
    status, out, _ = called(word, "--help")
    assert status == 0 and f"usage: inscon {word}" in out
    own = command.COMMANDS[word][1] == "options"  # those beside the flags of training
    assert not own or ("--out" in out and "Every flag of scripts/train.py is taken too" in out)
    assert (ROOT / f"{command.COMMANDS[word][0].removeprefix('inscon.').replace('.', '/')}.py").is_file()


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["trian"], "inscon: there is no command trian; choose one of: pack, pack-ffcv, .*, completion"),
    (["pack", "--data", "nowhere", "--out", "x"], "inscon pack: nowhere does not exist; give .* to --data."),
])  # fmt: skip
def test_wrong_use_is_one_sentence(arguments, sentence, called):
    status, out, err = called(*arguments)
    assert (status, out) == (1, "") and re.fullmatch(sentence + "\n", err)


COMPLETED = {
    "inscon tr": {"train"},
    "inscon train --batch": {"--batch-size"},
    "inscon train --target-m": {"--target-momentum"},  # of some methods
    "inscon train --recipe moco": {"moco_v1", "moco_v2"},
    "inscon views --ste": {"--step"},
    "inscon views --ou": {"--out"},
    "inscon report --decode m": {"mixed"},
    "inscon report --predict h": {"h100x8"},
    "inscon knn --vi": {"--view-size"},
    "inscon pack-ffcv --write-mode r": {"raw"},
}


def test_bash_completes_commands_flags_and_choices(called, tmp_path):
    status, script, _ = called("completion", "bash")
    assert status == 0
    lines = "\n".join(
        f"COMP_WORDS=({typed}); COMP_CWORD={typed.count(' ')}; _tyro_inscon; echo ${{COMPREPLY[*]}}"
        for typed in COMPLETED
    )
    (tmp_path / "script").write_text(f"{script}\n{lines}\n")
    done = subprocess.run(["bash", str(tmp_path / "script")], capture_output=True, text=True)
    found = [set(line.split()) for line in done.stdout.splitlines()]
    assert found == list(COMPLETED.values()), done.stderr


# ---------------------------------------------------------------------------------------------------------- installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """run(*arguments): a program of an installation from a wheel, in a folder that is not the clone."""
    setuptools = pytest.importorskip("setuptools")
    known = tuple(map(int, setuptools.__version__.split(".")[:2]))
    if known < (70, 1) and find_spec("wheel") is None:
        pytest.skip(f"setuptools {setuptools.__version__} makes no wheel without the package wheel")
    folder = tmp_path_factory.mktemp("installed")
    source, target, elsewhere = folder / "source", folder / "target", folder / "elsewhere"
    for name in ("inscon", "pipelines", "data_prep", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    if known < (77, 0):  # which did not know this form of a license
        text = (source / "pyproject.toml").read_text()
        text = text.replace('license = "Apache-2.0"', 'license = {text = "Apache-2.0"}')
        (source / "pyproject.toml").write_text(text.replace('license-files = ["LICENSE"]\n', ""))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source], check=True)
    [wheel] = folder.glob("inscon-*.whl")
    subprocess.run([*pip, "install", *offline, "--target", target, wheel], check=True)
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(target), "PATH": f"{target}/bin:{os.environ['PATH']}"}

    def run(*arguments):
        done = subprocess.run(
            list(map(str, arguments)), cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    run.folder, run.target = elsewhere, target
    return run


@pytest.mark.slow
def test_an_installation_packs_trains_and_judges_without_the_clone(installed):
    rng = np.random.default_rng(0)
    for i in range(16):
        path = installed.folder / f"pictures/class_{i % 2}/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), np.uint8)).save(path)
    where = "import inscon, data_prep, pipelines; from inscon.scripts import train; print(train.__file__)"
    assert installed(sys.executable, "-c", where).startswith(str(installed.target))
    assert not (installed.target / "scripts").exists()
    assert "  train " in installed("inscon", "--help")
    assert "Packed 16 pictures of 2 classes" in installed("inscon", "pack", "--data", "pictures", "--out", "shards")
    training = ["train", *SMALL, "--pipeline", "reference", "--threads", "0", "--data", "shards", "--run-dir", "run",
                "--max-steps"]  # fmt: skip
    assert "from step 0" in installed("inscon", *training, "2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "inscon"]
    out = installed(*torchrun, *training, "3")
    assert "on 2 x cpu" in out and "from step 2" in out
    out = installed("inscon", "knn", "--run", "run", "--train", "shards", "--val", "shards", "--k", "1",
                    "--pipeline", "reference", "--threads", "0")  # fmt: skip
    assert ") trained: 100.0 % of 16 pictures" in out  # every picture is its own nearest neighbor
