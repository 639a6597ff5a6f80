"""The house as it is drawn: imports point down only, engines are imported in one place, the README's tour exists."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    0: {"inscon.geometry", "inscon.batch", "inscon.philox", "inscon.clock", "inscon.guard", "inscon.workers"},
    1: {"inscon.config", "inscon.plan", "inscon.sampling", "inscon.mosaic", "data_prep.index"},
    2: {
        "inscon.model", "inscon.encoder", "inscon.heads", "inscon.pooling", "inscon.norm", "inscon.key_queue", "inscon.loss",
        "inscon.optim", "inscon.distributed", "inscon.precision", "inscon.host_memory",
        "data_prep.sources", "data_prep.pictures", "data_prep.beton", "data_prep.pack", "data_prep.verify",
        "data_prep.make_dali", "data_prep.make_ffcv", "data_prep.make_scenes",
    },
    3: {"pipelines"},
    4: {"inscon.train", "inscon.meters", "inscon.profiling", "inscon.checkpoint", "inscon.health", "inscon.transfer"},
    5: {"scripts"},
}  # fmt: skip
ONE_PLACE = {
    "nvidia": {"pipelines/dali.py"},
    "ffcv": {"pipelines/ffcv.py"},
    "apex": {"inscon/optim.py"},
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
    """Paths named in the README's tree of rooms: a room at the start of a line, its files indented or beside it."""
    block = next(part for part in readme.split("```") if part.lstrip().startswith("inscon/"))
    found, room = set(), ""
    for line in block.strip().splitlines():
        if not line.startswith(" "):
            room = line.split()[0]
            found.add(room.rstrip("/"))
        elif line.split()[0].endswith("/"):
            found |= {room + line.split()[0] + name for name in re.findall(r"\b\w+\.py\b", line)}
            continue
        first = re.findall(r"\b[\w-]+\.(?:py|md)\b", line) if not line.startswith(" ") else [line.split()[0]]
        found |= {room + name for name in first}
    return found


def test_the_readmes_tour_is_the_house():
    readme = (ROOT / "README.md").read_text()
    named = tour(readme)
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing
    empty = {p for p in SOURCES if not p.read_text().strip()}
    left_out = {str(p.relative_to(ROOT)) for p in SOURCES if p not in empty} - named
    assert not left_out
    mentioned = set(re.findall(r"\b(?:inscon|pipelines|data_prep|scripts|tests|benchmarks|docs)/[\w./-]*\w", readme))
    assert len(mentioned) > 5 and all((ROOT / name).exists() for name in mentioned)
    assert {"make demo", "make test"} <= set(re.findall(r"make \w+", readme))


def test_every_setting_has_a_reason():
    tree = ast.parse((ROOT / "inscon/config.py").read_text())
    for group in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, following in zip(group.body, group.body[1:]):
            if isinstance(field, ast.AnnAssign) and group.name != "Config":
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert documented, f"{group.name}.{field.target.id} has no docstring"
