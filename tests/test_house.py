"""The house as it is drawn: imports point down only, engines are imported in one place, the README's tour exists."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    0: {"inscon.geometry", "inscon.batch", "inscon.clock", "inscon.guard"},
    1: {"inscon.config", "inscon.plan", "inscon.sampling", "data_prep.index"},
    2: {
        "inscon.nn", "inscon.gradients", "inscon.graph", "inscon.optim", "inscon.distributed", "inscon.precision",
        "inscon.host_memory", "data_prep",
    },
    3: {"pipelines", "inscon.methods"},
    4: {
        "inscon.own", "inscon.recipes", "inscon.train", "inscon.meters", "inscon.report", "inscon.checkpoint", "inscon.health",
        "inscon.transfer", "inscon.trackers",
    },
    5: {"scripts", "inscon.scripts", "inscon.__main__"},
}  # fmt: skip
ONE_PLACE = {
    "nvidia": {"pipelines/dali.py"},
    "ffcv": {"pipelines/ffcv.py"},
    "apex": {"inscon/optim.py"},
    "fsspec": {"data_prep/store.py"},
    "tyro": {"scripts", "data_prep"},
}
SOURCES = [p for room in ("inscon", "pipelines", "data_prep", "scripts") for p in sorted((ROOT / room).rglob("*.py"))]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def floor_of(name: str) -> int | None:
    for floor, modules in FLOORS.items():
        if any(name == module or name.startswith(module + ".") for module in modules):
            return floor
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = floor_of(module_name(path))
    if path.name == "__init__.py" and here is None:
        here = 0  # the packages' own empty files
    assert here is not None, f"{path} stands on no floor: add it to FLOORS"
    for name in imports(path):
        there = floor_of(name)
        if there is not None:
            assert there <= here, f"{path} (floor {here}) imports {name} (floor {there})"
        if name.partition(".")[0] == "inscon" and module_name(path).startswith("pipelines"):
            assert there is None or there <= 1, f"{path}: pipelines know the plan and the batch, not {name}"
        if name.partition(".")[0] == "pipelines":
            assert not module_name(path).startswith("inscon.methods"), f"{path}: methods take batches from anywhere"


METHODS = {path.stem for path in (ROOT / "inscon/methods").glob("*.py")} - {"__init__", "method"}
METHODS_HOME = ("inscon/methods/", "inscon/recipes.py")
HEADS = {"single", "multi", "cell"}
NAMED = re.compile(rf"((loss|top1|queue)_)?({'|'.join(sorted(METHODS - {'inscon'} | HEADS))})")
"""A string that is the name of a method or of a head, or of what it logs. "inscon" is also the name of the package."""
IDENTIFIED = re.compile(
    rf"(^|_)({'|'.join(sorted(METHODS - {'inscon'}))}|multi|(single|cell)_(head|queue|loss|view|dim|stage)s?)(_|$)"
)


def knows_a_method(tree: ast.AST) -> list[str]:
    """Where code knows one method from another: by its module, by its name, or by asking a method or a model what it is."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [
                a.name for a in node.names if a.name.startswith(tuple(f"inscon.methods.{name}" for name in METHODS))
            ]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [name for name in names if name in {f"inscon.methods.{name}" for name in METHODS}]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name):
            asked = node.args[0]
            called = getattr(asked, "id", getattr(asked, "attr", None))
            if node.func.id in ("isinstance", "issubclass", "hasattr", "getattr") and called in ("method", "model"):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.fullmatch(node.value):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Compare):
            constants = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
            if any(isinstance(part, ast.Constant) and part.value in METHODS for part in constants):
                found.append(ast.unparse(node))
        identifiers = (getattr(node, name, None) for name in ("id", "attr", "arg", "name"))
        found += [name for name in identifiers if isinstance(name, str) and IDENTIFIED.search(name)]
    return found


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if not str(p.relative_to(ROOT)).startswith(METHODS_HOME)],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_methods_are_known_by_their_protocol_alone(path):
    assert not knows_a_method(ast.parse(path.read_text()))


@pytest.mark.parametrize("code", [
    "from inscon.methods import moco", "from inscon.methods.inscon import InsCon", "import inscon.methods.moco as m",
    "isinstance(training.method, InsCon)", "hasattr(method, 'queues')", "getattr(self.model, 'key_encoder', None)",
    "name == 'moco'", "config.method.name in ('inscon', 'moco')", "losses['cell']", "logged['loss_multi']", "batch.multi_boxes",
    "settings.cell_stage", "def moco_step(): ...", "f(single_head=1)",
])  # fmt: skip
def test_the_check_above_notices(code):
    assert len(knows_a_method(ast.parse(code))) >= 1
    assert not knows_a_method(
        ast.parse("from inscon.methods.method import Method\nmethod.prepare(batch)\nname == 'dali'")
    )


@pytest.mark.parametrize("engine", ONE_PLACE)
def test_engines_are_imported_in_one_place(engine):
    users = [p for p in SOURCES if any(name.partition(".")[0] == engine for name in imports(p))]
    for path in users:
        relative = str(path.relative_to(ROOT))
        assert relative in ONE_PLACE[engine] or relative.partition("/")[0] in ONE_PLACE[engine], (
            f"{relative} imports {engine}"
        )


def test_no_script_shadows_a_standard_module():
    for path in SOURCES:
        if path.parent.name in ("scripts", "data_prep"):
            assert path.stem not in sys.stdlib_module_names, (
                f"{path} shadows a standard module when a script beside it runs"
            )


def tour(readme: str) -> set[str]:
    """Rooms and files named in the README's tour: a room at the start of a line, what it holds beside it or indented below."""
    block = next(part for part in readme.split("```") if part.lstrip().startswith("inscon/"))
    found, room = set(), ""
    for line in block.strip().splitlines():
        first = line.split()[0]
        room = room if line.startswith(" ") else first
        folder = (room + first if line.startswith(" ") else room) if first.endswith("/") else room
        found |= {folder.rstrip("/")} | {folder + name for name in re.findall(r"\b\w+\.py\b", line)}
    return found


def test_the_readme_is_short_and_its_tour_is_the_house():
    readme = (ROOT / "README.md").read_text()
    assert 400 <= len(readme.split()) <= 600
    named = tour(readme)
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
    rooms = {path.parent.relative_to(ROOT) for path in SOURCES} | {
        Path(name) for name in ("benchmarks", "docs", "tests")
    }
    assert {str(room) for room in rooms if len(room.parts) <= 2} <= named
    assert {"make demo", "make test"} <= set(re.findall(r"make \w+", readme))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    path: path.read_text() for path in [*SOURCES, *sorted((ROOT / "benchmarks").glob("*.py")), ROOT / "inscon/plan.py"]
}
OF_OTHERS = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "shm_size", "gpus", "no_build_isolation", "num_gpus",
             "config_file", "backend_store_uri", "help", "nodes", "gpus_per_node", "ntasks_per_node"}  # fmt: skip
"""Flags of torchrun, docker, pip, detectron2, mlflow, sbatch and of every program."""


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_exists(page):
    """Its links, the project's files, and, but for the page of changes, the flags: each is a field or a flag of a program."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
    if page.name == "changes.md":
        return
    files = re.findall(r"\b(?:inscon|pipelines|data_prep|scripts|tests|benchmarks|docs)/[\w./-]*\w", text)
    assert not [name for name in files if not (ROOT / name).exists()]
    names = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)} - OF_OTHERS
    everything = "\n".join([*PROGRAMS.values(), *text.split("```python")[1:]])
    assert not [
        name
        for name in sorted(names)
        if not re.search(rf"\b{name.removeprefix('no_')}: |[\"']--{name.replace('_', '-')}[\"']", everything)
    ]


def test_every_setting_has_a_reason():
    """Those of the groups, of every method, and of the colors, which are flags too."""
    groups = [(path, "Settings") for path in sorted((ROOT / "inscon/methods").glob("*.py"))]
    groups += [(ROOT / "inscon/plan.py", "ColorSpec"), (ROOT / "inscon/config.py", "Config")]
    seen = 0
    for path, ending in groups:
        for group in (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)):
            if not group.name.endswith(ending) or group.name == "Config":
                continue
            for field, following in zip(group.body, group.body[1:]):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert documented, f"{path.name}: {group.name}.{field.target.id} has no docstring"
                    seen += 1
    assert seen > 60


def test_every_package_is_installed():
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    rooms = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert set(re.findall(r'"([\w.]+)"', listed)) == rooms | {"inscon._scripts"}


def test_scripts_know_each_other_by_the_name_that_an_installation_has():
    for path in SOURCES:
        assert not [name for name in imports(path) if name.partition(".")[0] == "scripts"], f"{path}: inscon.scripts"
