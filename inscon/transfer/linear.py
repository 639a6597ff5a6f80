"""The linear probe (MoCo's protocol): one linear layer on the pooled features of a frozen backbone in eval mode.

It starts as N(0, 0.01) with bias 0; SGD with momentum 0.9 and no weight decay; the learning rate, 30 for 256 images, falls to a
tenth at 60 % and at 80 % of the epochs.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inscon import checkpoint, distributed, guard
from inscon.nn.backbones import Backbone
from inscon.transfer import knn
from inscon.transfer.export import digest
from pipelines.evaluation import LabelledViews


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a probe's number depends on, beside backbone and data."""

    epochs: int = 100  # The learning rate falls to a tenth at 60 % and 80 % of them.
    batch_size: int = 256  # Over all ranks.
    base_lr: float = 30.0  # For 256 images; what is used is this times batch_size / 256.
    seed: int = 0  # Of the layer's start, the order and the crops.

    def __post_init__(self):
        guard.check_ranges(self, epochs=1, batch_size=1, base_lr=1e-9, seed=0)

    def lr_at(self, epoch: int) -> float:
        lr = self.base_lr * self.batch_size / Protocol.batch_size
        return lr * 0.1 ** sum(epoch >= round(share * self.epochs) for share in (0.6, 0.8))

    def settings(self) -> dict:
        """By name; of a subclass only what is the protocol's."""
        return {field.name: getattr(self, field.name) for field in fields(Protocol)}


class Probe:
    """A probe between two epochs. `sets`: to learn from and to be tested on; `amp_dtype`: as of `knn.pooled`. `folder` receives
    `metrics.jsonl` and `probe.pt`, from which it goes on; ValueError where that is of other data, another backbone or protocol."""

    def __init__(
        self, backbone: Backbone, protocol: Protocol, sets: tuple[LabelledViews, LabelledViews], folder: Path,
        device: torch.device, amp_dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.protocol, self.path, self.device, self._amp = protocol, Path(folder) / "probe.pt", device, amp_dtype
        self.train_set, self.val_set = sets
        self.before, self.epoch = digest(backbone.state_dict()), 0  # Of the frozen backbone; epochs that are over.
        self.backbone = backbone.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.layer = nn.Linear(backbone.channels[backbone.last], int(self.train_set.labels.max()) + 1)
        with torch.no_grad():
            self.layer.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(protocol.seed))
            self.layer.bias.zero_()
        self.layer.to(device)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=protocol.lr_at(0), momentum=0.9)
        about = {"data": self.train_set.index.fingerprint, "view_size": self.train_set.view_size}
        self._identity = {"format": 2, "backbone": self.before, **about, **protocol.settings()}
        if self.path.exists():
            self._resume()

    def train(self) -> Iterator[dict]:
        """Goes through the epochs that are left; yields the figures of each when it is over, evaluated and saved."""
        epochs, steps = range(self.epoch, self.protocol.epochs), len(self.train_set.index) // self.protocol.batch_size
        if not epochs:
            return
        model = self.layer if distributed.world_size() == 1 else nn.parallel.DistributedDataParallel(self.layer)
        with self.train_set.random_crops(epochs.start * steps, epochs.stop * steps) as batches:
            for epoch in epochs:
                lr, sum_loss = self.protocol.lr_at(epoch), torch.zeros((), device=self.device)
                for pixels, labels in itertools.islice(batches, steps):
                    sum_loss += self._train_step(model, pixels, labels, lr)
                self._check_finite(sum_loss)
                self.epoch = epoch + 1
                figures = {"epoch": self.epoch, "loss": float(sum_loss) / steps, "lr": lr, **self.evaluate()}
                self._save(figures)
                yield figures
        assert digest(self.backbone.state_dict()) == self.before, "the frozen backbone has changed"

    def _train_step(self, model: nn.Module, pixels: Tensor, labels: Tensor, lr: float) -> Tensor:
        self.optimizer.param_groups[0]["lr"] = lr
        pooled = knn.pooled(self.backbone, pixels.to(self.device), self._amp)
        loss = F.cross_entropy(model(pooled), labels.to(self.device, non_blocking=True))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """{"top1", "top5"}: shares of all ranks' validation pictures, 0..1; top5 where there are 5 classes."""
        rows, labels = self._val_rows
        names = ("top1", "top5") if self.layer.out_features >= 5 else ("top1",)
        best = self.layer(rows.to(self.device)).topk(5 if "top5" in names else 1, 1).indices.cpu() == labels[:, None]
        hits = {"count": len(labels), "top1": best[:, 0].sum(), "top5": best.any(1).sum()}
        hits = distributed.total({name: float(value) for name, value in hits.items()})
        return {name: hits[name] / hits["count"] for name in names}

    @functools.cached_property
    def _val_rows(self) -> knn.Rows:
        """The same after every epoch."""
        return knn.features(self.backbone, self.val_set.center_crops(), self.device, self._amp)

    def _check_finite(self, loss: Tensor) -> None:
        if broken := checkpoint.not_finite({"loss": loss, **self._state()}):
            remedy = f"set a smaller --base-lr than {self.protocol.base_lr:g} and another --out"
            raise FloatingPointError(f"the probe's {broken} is not finite any more. Found: loss {loss:g}; {remedy}")

    def _state(self) -> dict[str, dict]:
        return {"layer": self.layer.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _resume(self) -> None:
        held = checkpoint.load(self.path, self.device)
        identity = {"view_size": self._identity["view_size"], **held["identity"]}  # older ones tell no size
        if names := [name for name, value in self._identity.items() if identity.get(name) != value]:
            other = " and ".join(names)
            raise ValueError(f"{self.path} is a probe with another {other}; set another --out, or delete it")
        self.layer.load_state_dict(held["layer"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.epoch = held["epoch"]

    def _save(self, figures: dict) -> None:
        """`probe.pt`, and then a line of `metrics.jsonl`."""
        if distributed.rank() != 0:
            return
        guard.remove_unfinished(self.path.parent)
        about = {"version": checkpoint.VERSION, "identity": self._identity, "epoch": self.epoch}
        with guard.whole_file(self.path) as file:
            torch.save(about | self._state(), file)
        metrics = self.path.with_name("metrics.jsonl")
        with guard.naming(metrics), open(metrics, "a") as file:
            file.write(json.dumps(figures) + "\n")
