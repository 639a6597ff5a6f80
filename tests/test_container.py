"""The Dockerfile, which cannot be built here, against what it repeats: README, Makefile, pyproject.toml, .gitignore."""

import re
import shlex
from pathlib import Path

import pytest

from tests.scripts.test_cli import PARSERS

ROOT = Path(__file__).resolve().parents[1]
PYTHON = {"22.04": (3, 10), "24.04": (3, 12)}
"""What Ubuntu's python3 is."""


def instructions(text):
    """[(instruction, its arguments)], as Docker reads them: comments are left out, lines that end in a backslash joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.strip().split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def dockerfile():
    return instructions((ROOT / "Dockerfile").read_text())


def apt_packages(command):
    (listed,) = re.findall(r"apt-get install (.*?)(?:&&|$|`)", command, re.MULTILINE)
    return {word for word in listed.split() if not word.startswith("-")}


def test_it_is_read_as_docker_reads_it():
    assert instructions("# a\nFROM b\n\nRUN c \\\n  # d\n    e\n") == [("FROM", "b"), ("RUN", "c e")]


def test_the_steps_are_those_of_readme_and_makefile(dockerfile):
    names = [name for name, _ in dockerfile]
    assert names == ["FROM", "RUN", "WORKDIR", "COPY", "RUN", "ENV"]
    apt, make = (value for name, value in dockerfile if name == "RUN")
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    of_make = re.search(r"^APT := (.*)$", makefile, re.MULTILINE)[1]
    assert apt_packages(apt) == apt_packages(re.search(r"`(apt-get install .*?)`", readme)[1]) | apt_packages(of_make)
    assert apt.startswith("apt-get update && ") and " --yes " in apt
    of_page = re.search(r"^apt-get install .*?(?=  #)", (ROOT / "docs/loaders.md").read_text(), re.MULTILINE)[0]
    assert apt_packages(of_make) == apt_packages(of_page)
    program, target = shlex.split(make)
    assert program == "make" and re.search(rf"^{target}:", makefile, re.MULTILINE)
    folder = dict(dockerfile)["WORKDIR"]
    venv = re.search(r"^VENV := (.*)$", makefile, re.MULTILINE)[1]
    assert dict(dockerfile)["ENV"] == f"PATH={folder}/{venv}/bin:$PATH"


def test_its_python_is_one_that_make_takes(dockerfile):
    cuda, ubuntu = re.fullmatch(r"nvidia/cuda:([\d.]+)-base-ubuntu([\d.]+)", dict(dockerfile)["FROM"]).groups()
    makefile = (ROOT / "Makefile").read_text()
    found = re.search(r"\((\d), (\d+)\) <= sys.version_info\[:2\] <= \((\d), (\d+)\)", makefile).groups()
    least, most = tuple(map(int, found[:2])), tuple(map(int, found[2:]))
    assert least <= PYTHON[ubuntu] <= most
    wheels = re.search(r"nvidia-dali-cuda(\d\d)0", (ROOT / "pyproject.toml").read_text())[1]
    assert cuda.partition(".")[0] == wheels


def test_what_git_ignores_does_not_travel():
    ignored, left_out = (set((ROOT / name).read_text().split()) for name in (".gitignore", ".dockerignore"))
    assert {name.replace("__pycache__", "**/__pycache__") for name in ignored} | {".git"} == left_out


def test_the_commands_of_the_page_are_understood():
    page = (ROOT / "docs/container.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^docker run .* inscon (.*)$", page, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        place = next(number for number, word in enumerate(arguments) if word.endswith(".py"))
        assert program in ("python", "torchrun")
        PARSERS[arguments[place]](arguments[place + 1 :])
