"""All that one GPU can tell of this project, in one command that goes on after a failure and ends in time.

    python benchmarks/gpu.py --out RESULTS --minutes 9                                # ready batches only
    python benchmarks/gpu.py --out RESULTS --minutes 9 --pictures FOLDER --work WORK  # and end to end, from JPEGs
    python benchmarks/gpu.py --out RESULTS --minutes 9 --only tests                   # the tests of a GPU, a call of their own

In order of worth: a step at batch 256 in bf16, through dali, the report, fp16, the naive port of benchmarks/step.py, 32 images,
through ffcv, other batches, other methods, what follows training, tests. RESULTS/gpu.json is written anew after each, log.txt
beside it has what each one printed. What has no time left is listed as not run. Rates are source images/s, medians of a run's
windows but the first two; `tenth_step_s` counts from the command to the tenth step's log line; `taken_percent` is what the loader
takes from a step on the device. --work keeps pictures, packed sets and results: the same command (of the same code, on the same
machine) goes on where the last call ended. --only NAMES does these, done or not, and first what they need.

--quick takes tiny sizes and any device: to try the benchmark, not to report figures.
"""

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from inscon import methods
from inscon.report.measure import machine, versions

LIMIT_S, LEAST_S = 150, 45
"""Of one item; what has to be left for one to begin, unless its limit is lower."""
TESTED = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.M)
SUMMED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - (.*))?$", re.M)
COLLECTING = re.compile(r"^_+ ERROR collecting (tests/\S+) _+$.*?^E +(.*?)$", re.M | re.S)


class Item(NamedTuple):
    """`makes`: a folder that is removed before; `needs`: items that stand before this one; `figures`: of what it printed."""

    name: str
    command: Sequence[object]
    makes: Path | None = None
    needs: Sequence[str] = ()
    figures: Callable[[str], dict] = lambda said: {}
    limit_s: float = LIMIT_S


def training(
    work: Path, quick: bool, precision: str, size: int, name: str = "", *flags: object, steps: int = 60
) -> Item:
    """On synthetic batches, unless flags say something else."""
    name = name or f"{precision} {size}"
    run_dir = work / "runs" / name.replace(" ", "_")
    command = ["scripts/train.py", "--run-dir", run_dir, "--max-steps", 12 if quick else steps]
    command += ["--log-every", 2 if quick else 5, "--checkpoint-every", 10**6, "--pipeline", "synthetic"]
    command += ["--precision", "fp32" if quick else precision, "--batch-size", 16 if quick else size, *flags]
    command += ["--view-size", 64, "--backbone", "test_resnet"] if quick else []
    return Item(name, command, run_dir, figures=lambda said: rates(run_dir))


def rates(run_dir: Path) -> dict:
    """Medians over the windows of a run but the first two, and whether its losses are finite."""
    windows = logged(run_dir)
    if not windows:
        return {}
    late = windows[2:] or windows
    found = {
        name: statistics.median(window[name] for window in late)
        for name in ("images_per_s", "step_s", "data_wait_percent", "mfu_percent")
        if all(name in window for window in late)
    }
    return found | {"finite": all(math.isfinite(window["loss"]) for window in windows), "loss": windows[-1]["loss"]}


def naive(work: Path, quick: bool, precision: str) -> Item:
    sizes = "--batch-size 8 --view-size 64 --backbone resnet18 --steps 1" if quick else "--batch-size 256 --steps 10"
    out = work / f"naive_{precision}.json"
    command = f"benchmarks/step.py {sizes} --rounds 3 --precision {'fp32' if quick else precision} --out {out}"

    def figures(said: str) -> dict:
        found = json.loads(out.read_text())
        return {figure: found[figure] for figure in ("step_s", "ratios", "memory")}

    return Item(f"naive port beside ours {precision}", command.split(), figures=figures)


def fed(work: Path, quick: bool, name: str) -> Iterator[Item]:
    """A set packed, and trainings through it with color on either side."""
    command = f"data_prep/make_{name}.py --data {work}/pictures --out {work}/{name}"
    yield Item(f"pack {name}", command.split(), work / name, ["pictures"])
    for color in ("auto", "host", "device"):
        flags = "--pipeline", name, "--data", work / name, "--color", color, "--epochs", 10
        yield training(work, quick, "bf16", 256, f"{name} color {color}", *flags)._replace(needs=[f"pack {name}"])


def report(work: Path, quick: bool, color: str) -> Item:
    out, size = work / f"report_{color}", "--recipe demo --batch-size 32 --steps 10 --warm-up 2" if quick else ""
    command = f"scripts/throughput_report.py {size} --pipeline dali --data {work}/dali --color {color} --out {out}"

    def figures(said: str) -> dict:
        found = json.loads((out / "report.json").read_text())
        taken, step_ms = (found["device"] or {}).get("taken_ms"), found["end_to_end"]["wall_ms"]
        return {"ceilings": found["ceilings"], "taken_percent": None if taken is None else 100 * taken / step_ms}

    return Item(f"report color {color}", command.split(), out, ["pack dali"], figures)


def items(work: Path, quick: bool, pictures: Path | None) -> Iterator[Item]:
    """All, in order of worth."""
    step = functools.partial(training, work, quick)
    yield step("bf16", 256)
    if pictures:  # as many as 60 steps of 256 see four times
        paths, count = [str(path) for path in (pictures.resolve(), work / "pictures")], 64 if quick else 4000
        code = f"from benchmarks.packing import *; make_pictures(*map(Path, {paths}), {count})"
        yield Item("pictures", ["-c", code], work / "pictures")
        yield from fed(work, quick, "dali")
        yield from (report(work, quick, color) for color in ("auto", "device"))
    yield step("fp16", 256)
    yield step("fp16", 64, "200 steps of fp16", steps=200)
    yield naive(work, quick, "bf16")
    yield step("bf16", 32)
    yield step("bf16", 32, "bf16 32 in one group", "--norm", "none")  # what a rank of several computes
    if pictures:
        yield from fed(work, quick, "ffcv")
    yield from (step(precision, 256, f"{precision} 256 eager", "--graph", "off") for precision in ("bf16", "fp16"))
    yield from (step("bf16", size) for size in (64, 128, 512))
    yield from (step("fp16", size) for size in (32, 64, 128, 512))
    yield naive(work, quick, "fp16")
    yield from (step("bf16", 256, f"method {name}", "--method", name) for name in methods.names())
    transfer = ["benchmarks/transfer.py", "--out", work / "transfer"]
    yield Item("transfer", transfer, work / "transfer", limit_s=60 if quick else 300)
    tests = ["-m", "pytest", "-v", "-m", "gpu", "--continue-on-collection-errors", "--durations=15"]
    yield Item("tests", tests, figures=outcomes, limit_s=420)


def outcomes(said: str) -> dict:
    """Of tests, as far as they came: how many passed and so on, and of each that failed the last line of its error."""
    ended, errors = dict(TESTED.findall(said)), dict(SUMMED.findall(said)) | dict(COLLECTING.findall(said))
    failed = {name: errors.get(name, "") for name in ended if ended[name] in ("FAILED", "ERROR")} | errors
    ended |= dict.fromkeys(failed.keys() - ended.keys(), "ERROR")  # where not even collecting worked
    return {"counts": {name.lower(): count for name, count in Counter(ended.values()).items()}, "failed": failed}


def chosen(every: Sequence[Item], only: Sequence[str], done: dict[str, dict]) -> list[Item]:
    """What `only` names, or all that is not done, and before them what they need and is not there."""
    wanted = {i.name for i in every if (i.name.startswith(tuple(only)) if only else i.name not in done)}
    for item in reversed(every):
        if item.name in wanted:
            wanted |= {name for name in item.needs if done.get(name, {}).get("status") != 0}
    return [item for item in every if item.name in wanted]


def run(item: Item, out: Path, left_s: float) -> dict:
    """What came of it."""
    found, said, start = {"status": "not begun"}, "", time.monotonic()
    try:
        with (out / "log.txt").open("a+b") as file:
            file.write(f"\n== {item.name}: {' '.join(map(str, item.command))}\n".encode())
            file.flush()
            begin = file.tell()
            if item.makes:
                shutil.rmtree(item.makes, ignore_errors=True)
            found |= watched(item, file, min(item.limit_s, left_s))
            file.seek(begin)
            said = file.read().decode(errors="replace")
        found |= {"seconds": round(time.monotonic() - start, 1)} | item.figures(said)
    except Exception as error:
        found["error"] = repr(error)
    return found | ({} if found["status"] == 0 else {"said": said.splitlines()[-12:]})


def watched(item: Item, file, limit_s: float) -> dict:
    """Its status, and when a training's tenth step was logged. At its limit it is interrupted, and may say how far it came."""
    command, found, start = [sys.executable, *map(str, item.command)], {}, time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "CI": "true"}  # with which pytest cuts no error short
    with subprocess.Popen(command, cwd=HERE, env=environment, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            while (status := process.poll()) is None and time.monotonic() < start + limit_s:
                if item.makes and not found and any(line.get("step", 0) >= 10 for line in logged(item.makes)):
                    found = {"tenth_step_s": round(time.monotonic() - start, 1)}
                time.sleep(0.1)
            if status is None:
                status = f"ended after {limit_s:.0f} s"
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(15)
        finally:
            process.kill()
    return found | {"status": status}


def logged(run_dir: Path) -> list[dict]:
    """The lines of its metrics so far."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs; more are made of them")
    parser.add_argument("--work", type=Path, help="folder that stays, for the next call; else a temporary one")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", nargs="+", default=[], help="items whose names begin so")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, any device: to try it")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored, which children inherit
    given.out.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext(given.work) if given.work else tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve() / ("quick" if given.quick else "whole")
        work.mkdir(parents=True, exist_ok=True)
        kept = work / "results.json"
        results, not_run = json.loads(kept.read_text()) if kept.exists() else {}, {}
        about = {
            "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "quick": given.quick,
        }  # fmt: skip
        for item in chosen(list(items(work, given.quick, given.pictures)), given.only, results):
            left = end - time.monotonic()
            if left < min(LEAST_S, item.limit_s):
                not_run[item.name] = {"status": "not run: no time left"}
            else:
                found = run(item, given.out, left)
                cut_short = left < item.limit_s and isinstance(found["status"], str)  # the next call begins it anew
                results.pop(item.name, None)
                (not_run if cut_short else results)[item.name] = found
                print(item.name, found, flush=True)
                kept.write_text(json.dumps(results))
            for page in work.glob("report_*/report.*"):
                shutil.copy(page, given.out / f"{page.parent.name}{page.suffix}")
            told = json.dumps(about | {"results": not_run | results}, indent=1)
            (given.out / "gpu.json").write_text(told + "\n")


if __name__ == "__main__":
    main()
