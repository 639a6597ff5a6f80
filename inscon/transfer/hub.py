"""A folder of weights to share: safetensors, timm's config.json, a model card with the lines that load them (which
tests/inscon/test_hub.py runs), and of a ResNet a file for detectron2 too."""

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

from inscon import guard
from inscon.nn.backbones import TORCHVISION, facts_of
from inscon.report.run import read_metrics
from inscon.transfer.export import digest, for_detectron2, gather
from pipelines.color import MEAN, STD

LINES = {
    "timm": """import timm  # 1.0.26 or later
model = timm.create_model("local-dir:.", pretrained=True)  # "hf-hub:YOU/NAME" once it is uploaded""",
    "torchvision": """import torch, torchvision
from safetensors.torch import load_file
model = torchvision.models.get_model("{name}", weights=None)
model.fc = torch.nn.Identity()
model.load_state_dict(load_file("model.safetensors"))""",
    "detectron2": """from detectron2 import checkpoint, model_zoo, modeling
cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
cfg.merge_from_list(["MODEL.DEVICE", "cpu", "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", {means}, "MODEL.PIXEL_STD", {stds},
    "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RESNETS.DEPTH", {depth}, "MODEL.RESNETS.RES2_OUT_CHANNELS", {width}])
model = modeling.build_model(cfg)
checkpoint.DetectionCheckpointer(model).load("detectron2.pkl")""",
}
"""By library, to be run in the folder."""
CARD = """---
license: {license}
library_name: timm
pipeline_tag: image-feature-extraction
tags: [self-supervised, inscon]
---

# {name}, pre-trained without labels

A backbone without a classifier, after {step} steps, made by inscon {inscon} and torch {torch} of the pictures with the fingerprint
{data}. It takes RGB of 0 to 1, minus {mean}, over {std}.

{loading}

Figures of the training itself, at its last log line; none compares with a published table:

{figures}

Settings:

```json
{config}
```
"""


def check(out: Path, license: str | None) -> None:
    """ValueError unless weights may be written to the folder `out`, under a license that somebody chose."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license or ""):
        raise ValueError(f"the license of the weights is yours to choose. Found: {license}; set --license cc-by-4.0")
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise ValueError("--format hub needs the package safetensors: pip install 'inscon[hub]'") from None
    guard.check_output_folder(out.parent)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--format hub writes a new or empty folder. Found: {out}; set another --out")


def export(run: Path, out: Path, license: str, statistics: dict | None = None, norm_batches: int = 0) -> dict:
    """Write the folder `out`, which appears when everything in it is whole; return what `export.export` does."""
    from safetensors.torch import load, save

    tensors, facts = gather(run, "hub", statistics, norm_batches)
    config = {group: held for group, held in facts["config"].items() if group not in ("loader", "run")}  # no paths
    shared, name = facts | {"config": config}, config["model"]["backbone"]
    weights = save(tensors, {"format": "pt", "inscon": json.dumps(shared)})
    assert digest(load(weights)) == facts["digest"]
    folder = run if run.is_dir() else run.parent.parent
    windows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    window = next((found for found in reversed(windows) if found["step"] <= facts["step"]), {})
    files = {"model.safetensors": weights, "config.json": timm_config(name, config["views"]["view_size"])}
    loaders = ["timm", *["torchvision"] * (name in TORCHVISION)]
    if name in TORCHVISION and name.startswith("resnet"):  # timm has other depths, which detectron2 lacks
        loaders.append("detectron2")
        files["detectron2.pkl"] = for_detectron2(tensors, shared | {"format": "detectron2"})
    files["README.md"] = card(shared, license, window, loaders).encode()
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for file_name, content in files.items():
            with guard.whole_file(unfinished / file_name) as file:
                file.write(content)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return facts


def timm_config(name: str, side: int) -> bytes:
    """What timm builds the network by, config.json; `side` of the pictures, px."""
    known = getattr(facts_of(name).network, "pretrained_cfg", {"first_conv": "conv1", "classifier": "fc"})
    layers = {key: known[key] for key in ("first_conv", "classifier") if key in known}
    pictures = {"input_size": [3, side, side], "mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 0.875}
    held = {"architecture": name, "num_classes": 0, "pretrained_cfg": {"num_classes": 0, **layers, **pictures}}
    return json.dumps(held, indent=2).encode()


def card(facts: dict, license: str, window: dict, loaders: list[str]) -> str:
    """README.md, as the Hugging Face hub reads it; `window`: of the run's metrics."""
    name = facts["config"]["model"]["backbone"]
    network = {
        "name": name, "depth": name.removeprefix("resnet"), "width": 64 if name in ("resnet18", "resnet34") else 256,
        "means": [255 * m for m in MEAN], "stds": [255 * s for s in STD],
    }  # fmt: skip
    lines = [f"With {library}:\n\n```python\n{LINES[library].format(**network)}\n```" for library in loaders]
    figures = [f"{key} {value:.6g}" for key, value in window.items() if key.startswith(("loss", "top1", "knn"))]
    return CARD.format(
        license=license, name=name, **{key: facts[key] for key in ("step", "inscon", "data")}, torch=version("torch"),
        mean=MEAN, std=STD, config=json.dumps(facts["config"], indent=1), figures=", ".join(figures) or "none there",
        loading="\n\n".join(lines),
    )  # fmt: skip
