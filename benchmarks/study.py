"""A study that anyone can repeat: methods x seeds on one data set, as many at a time as the machine carries; a table and curves.

    python benchmarks/study.py --smallest --out study       # two methods, three seeds, on a CPU
    python benchmarks/study.py --set cifar10_mini --zip cifar10_mini.zip --search --out study    # for a GPU
    python benchmarks/study.py --smallest --plant no-shuffle --out study-planted     # with a fault

Every run is scripts/train.py's, then judged by kNN, linear probe and detectors fine-tuned on generated scenes (study_run.py).
"untrained" is a run of one step at rate 0, so the network of step 0 goes the same way. Stopped by --minutes, Ctrl-C or SIGTERM the
study exits with status 3, and the same command goes on: runs from their checkpoints, and no figure is computed twice. --search
tries settings for MoCo v2 alone, on another seed and other pictures; all methods get the best. OUT receives study.json, study.md
and study.png. Flags that are not below are scripts/train.py's.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.methods import RATE, SMALL
from benchmarks.study_page import STUDENT, UNTRAINED, draw, gathered, page
from benchmarks.study_run import DETECTION, LEFT, PLANTS, results_of, work
from data_prep.index import DatasetIndex
from data_prep.make_dali import pack_folder
from data_prep.make_scenes import make_scenes
from inscon import guard, methods
from inscon.report.measure import machine, versions
from scripts import train

HEADS = {"single": ("single",), "single+cell": ("single", "cell"), "single+multi": ("single", "multi"),
         "all": ("single", "multi", "cell")}  # fmt: skip
"""Variants of InsCon by name (single is MoCo v2); other names are those of --method."""
GRID = {"lr": (0.03, 0.06, 0.12), "temperature": (0.1, 0.2), "key_momentum": (0.99, 0.996)}
CHOSEN = {"lr": 0.03, "temperature": 0.1, "key_momentum": 0.99}
"""Without --search: those of the demo, which was searched on other scenes (docs/measured.md)."""
SEARCH_SEED = 1000
SMALLEST = {
    "methods": ["moco", "inscon"], "backbone": "test_resnet", "batch_size": 64, "steps": 256, "pictures": 4096, "held_out": 1024,
    "queue_batches": 2, "probe_epochs": 5, "iterations": 0, "search_lr": (0.03, 0.06), "search_key_momentum": (0.99,),
}  # fmt: skip


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and flags for every training."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the study; the same command goes on there")
    add("--smallest", action="store_true", help="other defaults, for a CPU")
    add("--set", default="scenes", help="scenes, cifar10_mini, or a folder with train/ and val/")
    add("--zip", type=Path, help="cifar10_mini.zip, or the folder that was in it")
    add("--methods", nargs="+", default=[*HEADS, *sorted(set(methods.names()) - {"inscon", "moco"})])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at most 10")
    add("--backbone", default="resnet18")
    add("--view-size", type=int, default=64)
    add("--batch-size", type=int, default=256)
    add("--queue-batches", type=int, default=16, help="that queues hold; short runs learn little from long ones")
    add("--steps", type=int, default=3100, help="of each run")
    add("--pictures", type=int, default=8192, help="scenes to train on")
    add("--held-out", type=int, default=2048, help="scenes to judge on")
    add("--boxed", type=int, default=2048, help="scenes that detectors learn from; a quarter as many judge them")
    add("--probe-epochs", type=int, default=40, help="of the linear probe; 0 leaves it out")
    add("--iterations", type=int, default=2000, help="of each fine-tuning; 0 leaves them out")
    add("--search", action="store_true", help="find the settings first")
    for name, values in GRID.items():
        add(f"--search-{name.replace('_', '-')}", type=float, nargs="+", default=values, help="to try")
    add("--plant", choices=PLANTS, help="a fault in every run")
    add("--jobs", type=int, help="runs at a time; None: one per core, or per four cores with a GPU")
    add("--minutes", type=float, default=float("inf"), help="stop after so many")
    if "--smallest" in arguments:
        parser.set_defaults(**SMALLEST)
    options, further = parser.parse_known_args(arguments)
    options.seeds = tuple(options.seeds)
    guard.check_ranges(options, seeds=0, steps=1, jobs=1, batch_size=1)
    if len(options.seeds) > len(STUDENT) + 1:
        raise ValueError(f"--seeds takes at most {len(STUDENT) + 1}. Found: {len(options.seeds)}")
    return options, further


def ready(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, made as a whole if it is not there."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(folder)
    return folder


def scenes(folder: Path, count: int, held_out: int, seed: int) -> Path:
    return ready(folder, lambda part: make_scenes(part, num_images=count, num_val=held_out, size=96, seed=seed))


def pictures(options: argparse.Namespace) -> Path:
    """The folder with train/ and val/ (or test/) that the study is about."""
    if options.set == "scenes":
        return scenes(options.out / "scenes", options.pictures, options.held_out, 0)
    source = options.zip if options.set == "cifar10_mini" else Path(options.set)
    if source is None or not source.exists():
        raise ValueError(
            f"there are no pictures in {source or 'cifar10_mini'}; set --zip to its zip, or --set to a folder"
        )
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as held:
            source = ready(options.out / "unzipped", held.extractall)
    found = next((path.parent for path in sorted(source.rglob("train")) if path.is_dir()), None)
    if found is None or not any((found / name).is_dir() for name in ("val", "test")):
        raise ValueError(f"{source} must have folders train and val; set --set to one that has, or to scenes")
    return found


def packed(options: argparse.Namespace) -> dict[str, str]:
    """Folders by what they are for: packed sets, and scenes with boxes."""

    def pack(name: str, source: Path) -> str:
        return str(ready(options.out / "packed" / name, lambda part: pack_folder(source, part)))

    source = pictures(options)
    held_out = next(source / name for name in ("val", "test") if (source / name).is_dir())
    sets = {"train": pack("train", source / "train"), "val": pack("val", held_out)}
    if options.search and options.set == "scenes":
        others = scenes(options.out / "scenes-search", options.pictures, options.held_out, SEARCH_SEED)
        sets |= {f"search_{name}": pack(f"search_{name}", others / name) for name in ("train", "val")}
    elif options.search:  # judged within the training pictures, so that those of the result are not looked at
        sets |= {"search_train": sets["train"], "search_val": sets["train"]}
    if options.iterations:
        boxes = options.out / "scenes-boxes"
        sets["boxes"] = str(scenes(boxes, options.boxed, max(options.boxed // 4, 1), SEARCH_SEED + 1))
    return sets


def flags_of(name: str, options: argparse.Namespace, chosen: dict[str, float]) -> list[str]:
    """Of scripts/train.py, for a method or variant: what was chosen goes to all with such a setting; LARS has a rate of its own."""
    method = "moco" if name == UNTRAINED else "inscon" if name in HEADS else name
    known = {field.name for field in dataclasses.fields(methods.settings_of(method))}
    settings = {
        **chosen, "cell_temperature": chosen["temperature"], "queue_size": options.queue_batches * options.batch_size,
        "cell_queue_size": 9 * options.queue_batches * options.batch_size, "dense_from_step": options.steps // 4,
    }  # fmt: skip
    flags = ["--method", method, "--backbone", options.backbone, "--view-size", options.view_size]
    flags += ["--batch-size", options.batch_size, "--schedule", "cosine-step"]
    flags += RATE if SMALL.get(method) is RATE else ["--lr", 0 if name == UNTRAINED else chosen["lr"]]
    flags += [
        word for field in settings if field in known for word in (f"--{field.replace('_', '-')}", settings[field])
    ]
    return list(map(str, flags + (["--heads", *HEADS[name]] if name in HEADS else [])))


def job(
    name: str, seed: int, folder: Path, sets: dict[str, str], options: argparse.Namespace, flags: list[str], stages: list[str]
) -> dict:  # fmt: skip
    """All that a run depends on, as job.json in its folder; ValueError where that is of other settings."""
    epoch = max(len(DatasetIndex.open(sets["train"])) // options.batch_size, 1)
    every, steps = max(options.steps // 4, 1), 1 if name == UNTRAINED else options.steps
    flags = [*flags, "--data", sets["train"], "--eval-data", sets["val"], "--run-dir", folder / "run", "--seed", seed]
    flags += ["--epochs", max(-(-options.steps // epoch), 2), "--max-steps", steps, "--checkpoint-every", every]
    flags += ["--log-every", max(options.steps // 32, 1), "--eval-every", every, "--eval-pictures", 1024]
    made = {
        "method": name, "seed": seed, "folder": str(folder), "flags": list(map(str, flags)), "steps": steps, "sets": sets,
        "backbone": options.backbone, "batch_size": options.batch_size, "stages": stages,
        "plant": options.plant, "probe_epochs": options.probe_epochs, "iterations": options.iterations,
    }  # fmt: skip
    path = folder / "job.json"
    held = json.loads(path.read_text()) if path.exists() else made
    if changed := [key for key in made if held.get(key) != made[key]]:
        raise ValueError(f"{path} has other {' and '.join(changed)}; set another --out, or the old settings")
    train.parse(made["flags"])  # refuses now what it would refuse later
    with guard.whole_file(path) as file:
        file.write(json.dumps(made, indent=1).encode())
    return made


def finished(job: dict) -> bool:
    return set(job["stages"]) <= set(results_of(job))


def shares(at_once: int | None) -> tuple[int, int]:
    """Runs at a time, and threads of each."""
    cores = len(os.sched_getaffinity(0))
    at_once = at_once or max(cores // 4 if torch.cuda.is_available() else cores, 1)
    return at_once, max(cores // at_once, 1)


def run_all(jobs: list[dict], at_once: int | None, deadline: float) -> tuple[list[str], bool]:
    """Folders of those that failed, and whether all others came to their end before the deadline or a signal."""
    at_once, threads = shares(at_once)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}  # of processes that start from here
    context, running, failed, over = multiprocessing.get_context("forkserver"), {}, [], False
    context.set_forkserver_preload(["benchmarks.study_run"])  # so that libraries are imported once
    waiting = [job for job in jobs if not finished(job)]
    with guard.stop_requests() as asked:
        while running or (waiting and not over):
            if not over and (asked.requested or time.monotonic() > deadline):
                over = True
                for process in running:
                    process.terminate()  # it finishes its step and writes a checkpoint
            while waiting and len(running) < at_once and not over:
                process = context.Process(target=work, args=(waiting[0], threads))
                process.start()
                running[process] = waiting.pop(0)
            connection.wait([process.sentinel for process in running], timeout=1)
            for process in [process for process in running if process.exitcode is not None]:
                job = running.pop(process)
                said = results_of(job) if finished(job) else f"ended with status {process.exitcode}; see log.txt"
                print(f"{job['folder']}: {said}", flush=True)
                failed += [job["folder"]] if not finished(job) and not over else []
    return failed, not over


def search(
    options: argparse.Namespace, further: list[str], sets: dict[str, str], deadline: float
) -> tuple[list[dict], bool]:
    """What was tried for moco, the best first, and whether all was."""
    sets = {"train": sets["search_train"], "val": sets["search_val"]}
    values = itertools.product(*(getattr(options, f"search_{name}") for name in GRID))
    tried = {"-".join(map(str, one)): dict(zip(GRID, one)) for one in values}
    jobs = []
    for name, one in tried.items():
        flags = [*flags_of("moco", options, one), *further]
        jobs.append(job("moco", SEARCH_SEED, options.out / "search" / name, sets, options, flags, ["monitor"]))
    _, whole = run_all(jobs, options.jobs, deadline)
    found = [one | {"knn": results_of(made).get("monitor", 0.0)} for one, made in zip(tried.values(), jobs)]
    return sorted(found, key=lambda one: -one["knn"]), whole


def report(options: argparse.Namespace, jobs: list[dict], flags: dict[str, list[str]], tried: list[dict]) -> None:
    hidden = ("out", "zip", "jobs", "minutes", "smallest")
    settings = {name: value for name, value in vars(options).items() if name not in hidden} | {
        "set": Path(options.set).name
    }
    result = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "settings": settings,
        "tried": tried, "flags": flags, "detection": DETECTION, "runs": gathered(jobs),
    }  # fmt: skip
    with guard.whole_file(options.out / "study.json") as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    (options.out / "study.md").write_text(page(result))
    draw(result, options.out / "study.png")
    print(page(result))


def study(options: argparse.Namespace, further: list[str], deadline: float) -> int:
    """Exit status: LEFT where there is more to do."""
    sets, chosen, tried = packed(options), CHOSEN, []
    if options.search:
        tried, whole = search(options, further, sets, deadline)
        if not whole:
            return LEFT
        chosen = {name: tried[0][name] for name in GRID}
    needs = {"knn": 1, "linear": options.probe_epochs, "frozen": options.iterations, "full": options.iterations}
    stages = [name for name, needed in needs.items() if needed]
    flags = {name: [*flags_of(name, options, chosen), *further] for name in (UNTRAINED, *options.methods)}
    jobs = [
        job(name, seed, options.out / "runs" / f"{name}-{seed}", sets, options, flags[name], stages)
        for seed in options.seeds for name in flags
    ]  # fmt: skip
    failed, whole = run_all(jobs, options.jobs, deadline)
    report(options, jobs, flags, tried)
    if failed:
        raise ChildProcessError(f"{len(failed)} runs failed; log.txt says why. Found: {', '.join(failed)}")
    return 0 if whole else LEFT


def main(arguments: list[str]) -> int:
    begin = time.monotonic()
    options, further = parse(arguments)
    with guard.only_process(options.out, "--out"):
        status = study(options, further, begin + 60 * options.minutes)
    if status == LEFT:
        print(f"Stopped; the same command goes on in {options.out}.")
    return status


if __name__ == "__main__":
    guard.run_script("study.py", lambda: main(sys.argv[1:]))
