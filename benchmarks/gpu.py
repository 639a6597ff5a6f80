"""All that one GPU can tell of this project, in one command that goes on after a failure and ends in time.

    python benchmarks/gpu.py --out RESULTS --minutes 9                                # ready batches only
    python benchmarks/gpu.py --out RESULTS --minutes 9 --pictures FOLDER --work WORK  # and end to end, from JPEGs
    python benchmarks/gpu.py --out RESULTS --minutes 9 --data SHARDS                  # the same of a packed set
    python benchmarks/gpu.py --out RESULTS --minutes 9 --only tests                   # the tests of a GPU, a call of their own

In order of worth: a step at batch 256 in bf16, through dali, the report, fp16, the naive port of benchmarks/step.py, 32 images,
through ffcv, loaders alone, other batches and MoCo v2 (captured, launched by the host, and the port's), other methods, what follows
training, tests. RESULTS/gpu.json is written anew after each, log.txt beside it has what each one printed. What has no time left is
listed as not run. Rates are source images/s, medians of a run's windows but the first two; `tenth_step_s` counts from the command
to the tenth step's log line; `taken_percent` is what the loader takes from a step on the device.

--work keeps pictures, packed sets and results: the same command (of the same code, on the same machine) goes on where the last call
ended. --only NAMES does these, done or not, and first what they need. --compare OLDER sets the rates of an older gpu.json beside
the new ones in the table at the end. --readme README.md only puts the figures of OUT/gpu.json into the README's table.

--quick takes tiny sizes and any device: to try the benchmark, not to report figures.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
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

from rich.console import Console
from rich.table import Table

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


MOCO = "--heads single"
"""With which InsCon is MoCo v2."""


def naive(work: Path, quick: bool, precision: str, size: int = 256, moco: bool = False) -> Item:
    """A step of MoCo's code with InsCon's losses added the obvious way, or as it is, and ours, in turn."""
    name = f"naive port beside ours {precision}" + (f" {size}" if size != 256 else "") + (" MoCo v2" if moco else "")
    out = work / f"{name.replace(' ', '_')}.json"
    sizes = (
        "--batch-size 8 --view-size 64 --backbone resnet18 --steps 1" if quick else f"--batch-size {size} --steps 10"
    )
    sizes += f" --precision {'fp32' if quick else precision} {MOCO if moco else ''}"
    command = f"benchmarks/step.py {sizes} --rounds 3 --out {out}"

    def figures(said: str) -> dict:
        found = json.loads(out.read_text())
        return {figure: found[figure] for figure in ("step_s", "ratios", "memory")}

    return Item(name, command.split(), figures=figures)


def fed(work: Path, quick: bool, name: str, packed: Path, needs: Sequence[str]) -> Iterator[Item]:
    """Trainings through a packed set with color on either side."""
    for color in ("auto", "host", "device"):
        flags = "--pipeline", name, "--data", packed, "--color", color, "--epochs", 10
        yield training(work, quick, "bf16", 256, f"{name} color {color}", *flags)._replace(needs=needs)


def report(work: Path, quick: bool, color: str, shards: Path, needs: Sequence[str]) -> Item:
    out, size = work / f"report_{color}", "--recipe demo --batch-size 32 --steps 10 --warm-up 2" if quick else ""
    command = f"scripts/throughput_report.py {size} --pipeline dali --data {shards} --color {color} --out {out}"

    def figures(said: str) -> dict:
        found = json.loads((out / "report.json").read_text())
        taken, step_ms = (found["device"] or {}).get("taken_ms"), found["end_to_end"]["wall_ms"]
        return {"ceilings": found["ceilings"], "taken_percent": None if taken is None else 100 * taken / step_ms}

    return Item(f"report color {color}", command.split(), out, needs, figures)


def loaders(work: Path, quick: bool, shards: Path, needs: Sequence[str]) -> Item:
    """Alone, by decode and color, source images/s."""
    out, flags = work / "loaders.json", "--recipe demo --batch-size 32 --epochs 90" if quick else "--precision bf16"
    command = f"benchmarks/decode_modes.py --data {shards} --seconds {1 if quick else 5} --out {out} -- {flags}"

    def figures(said: str) -> dict:
        return {
            f"{made['decode']} {made['color']}": made["images_per_s"] for made in json.loads(out.read_text())["loaders"]
        }

    return Item("loaders alone", command.split(), needs=needs, figures=figures)


def detector(work: Path, quick: bool, coco: Path) -> Iterator[Item]:
    """What "bf16 256" has trained, exported and fine-tuned on COCO's pictures."""
    weights, out = work / "backbone.pth", work / "detector"
    command = f"scripts/export.py --run {work}/runs/bf16_256 --format torchvision --out {weights}"
    if not quick:
        yield Item("export", command.split(), needs=["bf16 256"])
    small = "random --backbone resnet18 --min-size 128 --rois 32 --batch-size 2 --iterations 2"
    start = small if quick else f"{weights} --batch-size 4 --iterations 20"
    command = f"scripts/finetune_detection.py --arch maskrcnn-fpn --out {out} --weights {start}"
    for side in ("train", "val"):
        command += f" --{side}-json {coco}/annotations/instances_{side}2017.json --{side}-images {coco}/{side}2017"

    def figures(said: str) -> dict:
        found = json.loads((out / "results.json").read_text())
        return {f"{kind} AP": found[kind]["AP"] for kind in ("bbox", "segm")}

    yield Item("detector", command.split(), out, [] if quick else ["export"], figures)


def items(work: Path, quick: bool, pictures: Path | None, data: Path | None, coco: Path | None) -> Iterator[Item]:
    """All, in order of worth."""
    step = functools.partial(training, work, quick)
    shards, needs, source = data or work / "dali", [] if data else ["pack dali"], data or work / "pictures"
    yield step("bf16", 256)
    if pictures and not data:  # as many as 60 steps of 256 see four times
        paths, count = [str(path) for path in (pictures, source)], 64 if quick else 4000
        code = f"from benchmarks.packing import *; make_pictures(*map(Path, {paths}), {count})"
        yield Item("pictures", ["-c", code], source)
        yield Item("pack dali", f"data_prep/make_dali.py --data {source} --out {shards}".split(), shards, ["pictures"])
    if pictures or data:
        yield from fed(work, quick, "dali", shards, needs)
        yield from (report(work, quick, color, shards, needs) for color in ("auto", "device"))
    yield step("fp16", 256)
    yield step("fp16", 64, "200 steps of fp16", steps=200)
    yield naive(work, quick, "bf16")
    yield step("bf16", 32)
    yield step("bf16", 32, "bf16 32 in one group", "--norm", "none")  # what a rank of several computes
    if pictures or data:
        command, beton = f"data_prep/make_ffcv.py --data {source} --out {work}/ffcv", work / "ffcv"
        yield Item("pack ffcv", command.split(), beton, [] if data else ["pictures"])
        yield from fed(work, quick, "ffcv", beton, ["pack ffcv"])
        yield loaders(work, quick, shards, needs)
    yield naive(work, quick, "fp16")
    for size, precision in itertools.product((256, 64, 32), ("bf16", "fp16")):
        yield step(precision, size, f"{precision} {size} eager", "--graph", "off")
        if size < 256:
            yield naive(work, quick, precision, size)
        yield naive(work, quick, precision, size, moco=True)
        yield step(precision, size, f"MoCo v2 {precision} {size} eager", *MOCO.split(), "--graph", "off")
    yield from (step("bf16", size) for size in (64, 128, 512))
    yield from (step("fp16", size) for size in (32, 64, 128, 512))
    yield from (step("bf16", 256, f"method {name}", "--method", name) for name in methods.names())
    if coco:
        yield from detector(work, quick, coco)
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


def table(told: dict, older: dict) -> Table:
    """One row per item; with the figures of an older run, ours over them."""
    names = "item", "images/s", "step, ms", "naive / ours", "tenth step, s", "of the older", "ended"
    made = Table(*names, title=f"{told['machine'].get('gpu', 'no GPU')}, {told['date']}")
    for name, found in told["results"].items():
        step_s, rate = found.get("step_s"), found.get("images_per_s")
        step_s = step_s["ours"] if isinstance(step_s, dict) else step_s
        before = older.get("results", {}).get(name, {}).get("images_per_s")
        ratio = found["ratios"]["naive / ours"]["wall"] if "ratios" in found else None
        figures = (rate, "{:,.0f}"), (step_s and 1e3 * step_s, "{:.1f}"), (ratio, "{:.2f}"), (found.get("tenth_step_s"), "{}"), \
            (rate / before if rate and before else None, "{:.2f}")  # fmt: skip
        made.add_row(name, *(form.format(value) if value else "" for value, form in figures), str(found["status"]))
    return made


def in_readme(text: str, told: dict) -> str:
    """A README whose table of a GPU, and the date below it, are these figures; ValueError where some are missing."""
    results, gpu = told["results"], re.search(r"\w*\d\S*", told["machine"]["gpu"])[0]  # of "NVIDIA H100 80GB HBM3" H100
    try:
        bf16, fp16 = (results[f"naive port beside ours {precision}"] for precision in ("bf16", "fp16"))
        fed = results["ffcv color auto"]["images_per_s"]
        memory = [bf16["memory"][who]["device_mb"] / 1024 for who in ("ours", "naive")]
        rows = [
            (
                what,
                *(f"{1e3 * found['step_s'][who]:.0f}" for who in ("ours", "naive")),
                f"{found['ratios']['naive / ours']['wall']:.2f}",
            )
            for what, found in (("A step against a port of MoCo's code, bf16, ms", bf16), ("The same, fp16, ms", fp16))
        ]
    except KeyError as missing:
        raise ValueError(f"the README's table needs batch 256 in bf16 and fp16, and ffcv. Missing: {missing}") from None
    rows.append(("Memory of both, GiB", *(f"{each:.1f}" for each in memory), f"{memory[0] / memory[1]:.2f}"))
    rows.append(("Training from JPEGs, `ffcv`, bf16, images/s", f"{fed:,.0f}", "", ""))
    lines = [f"| One {gpu}, ResNet-50, batch 256 | ours | theirs | ratio |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    made = "\n".join(lines).replace("|  |  |", "| | |")
    text = re.sub(r"^\| One .*, batch 256 \|.*?(?=\n\n)", lambda _: made, text, flags=re.M | re.S)
    return re.sub(r"^\S+: \d{4}-\d\d-\d\d(?=\. Cores:)", f"{gpu}: {told['date']}", text, flags=re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs; more are made of them")
    parser.add_argument("--data", type=Path, help="a set that make_dali.py packed, instead of --pictures")
    parser.add_argument("--coco", type=Path, help="folder with annotations, train2017 and val2017")
    parser.add_argument("--work", type=Path, help="folder that stays, for the next call; else a temporary one")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", nargs="+", default=[], help="items whose names begin so")
    parser.add_argument("--compare", type=Path, help="an older gpu.json")
    parser.add_argument("--readme", type=Path, help="write the figures of OUT/gpu.json into this")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, any device: to try it")
    given = parser.parse_args()
    if given.readme:
        told = json.loads((given.out / "gpu.json").read_text())
        given.readme.write_text(in_readme(given.readme.read_text(), told))
        return
    older = json.loads(given.compare.read_text()) if given.compare else {}
    end = time.monotonic() + 60 * given.minutes
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored, which children inherit
    given.out.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext(given.work) if given.work else tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve() / ("quick" if given.quick else "whole")
        work.mkdir(parents=True, exist_ok=True)
        places = (path and path.resolve() for path in (given.pictures, given.data, given.coco))
        kept = work / "results.json"
        results, not_run = json.loads(kept.read_text()) if kept.exists() else {}, {}
        about = {
            "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "quick": given.quick,
        }  # fmt: skip
        for item in chosen(list(items(work, given.quick, *places)), given.only, results):
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
        Console(width=140).print(table(about | {"results": not_run | results}, older))


if __name__ == "__main__":
    main()
