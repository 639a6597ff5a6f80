"""How large the product is: lines, the path from shard to loss, how long its functions are, its longest line.

    python benchmarks/size.py

The product is everything that git knows but tests, benchmarks, documents and pictures; YAML, shell and the Makefile count.
"""

import ast
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("tests/", "benchmarks/", "docs/")
KINDS = (".py", ".yaml", ".yml", ".sh", ".toml", ".sbatch")
PATH = (
    "inscon/batch.py", "inscon/plan.py", "inscon/sampling.py", "inscon/geometry.py", "inscon/methods/method.py",
    "inscon/methods/moco.py", "inscon/methods/inscon.py", "inscon/nn", "inscon/train.py", "inscon/gradients.py",
    "pipelines/feed.py", "pipelines/finish.py", "pipelines/slots.py", "pipelines/dali.py",
)  # fmt: skip
"""From shard to loss, with one engine."""


def main() -> None:
    files = [ROOT / name for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()]
    product = [path for path in files if is_product(path)]
    lines = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in product}
    print(f"product: {sum(lines.values()):,} lines in {len(lines)} files")
    for room in sorted({name.partition("/")[0] for name in lines}):
        print(f"  {room:14} {sum(count for name, count in lines.items() if name.partition('/')[0] == room):6,}")
    path = sum(count for name, count in lines.items() if name.startswith(PATH))
    print(f"path from shard to loss: {path:,} lines")
    lengths = sorted(length for path in product if path.suffix == ".py" for length in function_lengths(path))
    ninety = lengths[int(0.9 * len(lengths))]
    print(
        f"functions: {len(lengths)}, median {statistics.median(lengths):.0f} lines, 90 % up to {ninety}, longest {lengths[-1]}"
    )
    print(f"longest line: {max(len(line) for path in product for line in path.read_text().splitlines())} columns")


def is_product(path: Path) -> bool:
    name = path.relative_to(ROOT).as_posix()
    return not name.startswith(LEFT_OUT) and (path.suffix in KINDS or path.name in ("Makefile", "run", "Dockerfile"))


def function_lengths(path: Path) -> list[int]:
    """Of every function, its signature and docstring included."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, functions)
    ]


if __name__ == "__main__":
    main()
