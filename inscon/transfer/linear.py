"""The linear probe (MoCo's protocol): one linear layer on the pooled features of a frozen backbone.

The backbone stays in eval mode and gets no gradient; its checksum is taken before and after. The layer starts as N(0, 0.01) with
bias 0 and is trained by SGD with momentum 0.9 and no weight decay; the learning rate, 30 for 256 images, falls to a tenth at
60 % and at 80 % of the epochs.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inscon import checkpoint, distributed, guard
from inscon.nn.backbones import Backbone
from inscon.transfer import knn
from inscon.transfer.export import digest

BASE_BATCH = 256
MILESTONES = (0.6, 0.8)
"""Of the epochs: MoCo's 60 and 80 of 100."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a probe's number depends on, beside backbone and data."""

    num_classes: int
    epochs: int = 100
    batch_size: int = 256
    """Over all ranks."""
    base_lr: float = 30.0
    """For 256 images; `lr` is what is used."""
    seed: int = 0

    def __post_init__(self):
        for name in ("num_classes", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Found: {getattr(self, name)}")
        if not (0 < self.base_lr < math.inf):
            raise ValueError(f"base_lr must be greater than 0. Found: {self.base_lr}")

    @property
    def lr(self) -> float:
        """Of this batch size: proportional to it, or the protocol would be another one."""
        return self.base_lr * self.batch_size / BASE_BATCH

    def lr_at(self, epoch: int) -> float:
        return self.lr * 0.1 ** sum(epoch >= round(share * self.epochs) for share in MILESTONES)


Batches = Iterable[tuple[Tensor, Tensor]]


class Probe:
    """A probe between two steps.

    Args:
        folder: receives `probe.pt`, what a stopped probe goes on from, and `metrics.jsonl`.
        identity: of the data; a probe of other data, another backbone or protocol in the folder is refused with a ValueError.
        amp_dtype: of the backbone's convolutions; None: float32.
    """

    def __init__(
        self, backbone: Backbone, protocol: Protocol, folder: Path, device: torch.device, identity: str,
        amp_dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.protocol, self.folder, self.device, self._amp = protocol, Path(folder), device, amp_dtype
        self.before = digest(backbone.state_dict())
        """Checksum of the frozen backbone."""
        self.backbone = backbone.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(protocol.seed)
        self.layer = nn.Linear(backbone.channels[backbone.last], protocol.num_classes)
        with torch.no_grad():
            self.layer.weight.normal_(0, 0.01, generator=generator)
            self.layer.bias.zero_()
        self.layer.to(device)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=protocol.lr, momentum=0.9, weight_decay=0.0)
        self.step, self._stop = 0, guard.StopRequest()
        self._sum_loss = torch.zeros((), device=device)  # of the epoch's steps so far
        self._identity = {"backbone": self.before, "data": identity, **asdict(protocol)}
        self._resume()

    def train(
        self,
        crops: Callable[[int, int], AbstractContextManager[Batches]],
        steps_per_epoch: int,
        evaluate: Callable[[], dict[str, float]],
        say: Callable[[int, dict[str, float]], None],
        evaluate_every: int = 10,
    ) -> dict[str, float] | None:
        """All epochs that are left; returns the last evaluation. `crops(start, stop)` opens the batches of these steps.

        After every epoch `probe.pt` is written and `say(epoch, figures)` is called, with an evaluation every so many epochs.
        On SIGTERM or Ctrl-C every rank finishes its step, leaves off an evaluation, rank 0 writes `probe.pt`, and None is returned.
        """
        protocol, figures = self.protocol, {}
        model = self.layer
        if distributed.world_size() > 1:
            model = nn.parallel.DistributedDataParallel(self.layer)
        total, sum_loss = protocol.epochs * steps_per_epoch, self._sum_loss
        if self.step >= total:
            return evaluate()
        with crops(self.step, total) as batches, guard.stop_requests() as self._stop:
            for step, (pixels, labels) in zip(range(self.step, total), batches):
                epoch, within = divmod(step, steps_per_epoch)
                for group in self.optimizer.param_groups:
                    group["lr"] = protocol.lr_at(epoch)
                loss = F.cross_entropy(model(self.pooled(pixels)), labels.to(self.device, non_blocking=True))
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step, sum_loss = step + 1, sum_loss + loss.detach()
                stopping = distributed.any_rank(self._stop.requested)
                if within == steps_per_epoch - 1:
                    figures = {"loss": float(sum_loss) / steps_per_epoch, "lr": protocol.lr_at(epoch)}
                    sum_loss = torch.zeros((), device=self.device)
                    self._check_finite(figures["loss"])
                    if not stopping and ((epoch + 1) % evaluate_every == 0 or epoch == protocol.epochs - 1):
                        found = evaluate()
                        stopping = distributed.any_rank(self._stop.requested)
                        figures |= {} if stopping else found
                    self._stop.final = stopping
                    self._save(sum_loss)
                    self._log(epoch + 1, figures)
                    say(epoch + 1, figures)
                elif stopping:
                    self._check_finite(float(sum_loss))
                    self._stop.final = True
                    self._save(sum_loss)
                if stopping:
                    return None
        self.check_backbone()
        return {name: value for name, value in figures.items() if name.startswith("top")}

    def _check_finite(self, loss: float) -> None:
        held = {"layer": self.layer.state_dict(), "optimizer": self.optimizer.state_dict()}
        broken = "loss" if not math.isfinite(loss) else checkpoint.not_finite(held)
        if broken:
            raise FloatingPointError(
                f"the probe's {broken} is not finite any more. Found: loss {loss:g}; set a smaller --base-lr than "
                f"{self.protocol.base_lr:g} and another --out"
            )

    @torch.inference_mode()
    def evaluate(self, batches: Batches) -> dict[str, float]:
        """{"top1", "top5"}: shares of this rank's and all other ranks' batches, 0..1; top5 where there are 5 classes."""
        hits = {"count": 0.0, "top1": 0.0, "top5": 0.0}
        for pixels, labels in itertools.takewhile(lambda _: not self._stop.requested, batches):
            best = self.layer(self.pooled(pixels)).topk(min(5, self.protocol.num_classes), 1).indices.cpu()
            right = best == labels[:, None]
            hits["count"] += len(labels)
            hits["top1"] += float(right[:, 0].sum())
            hits["top5"] += float(right.any(1).sum())
        hits = distributed.total(hits)
        names = ("top1", "top5") if self.protocol.num_classes >= 5 else ("top1",)
        return {name: hits[name] / max(hits["count"], 1) for name in names}

    def pooled(self, pixels: Tensor) -> Tensor:
        """[B F] float32."""
        return knn.pooled(self.backbone, pixels.to(self.device), self._amp)

    def check_backbone(self) -> None:
        """AssertionError if the backbone isn't, bit for bit, what the probe began with."""
        assert digest(self.backbone.state_dict()) == self.before, "the frozen backbone has changed"

    def _resume(self) -> None:
        path = self.folder / "probe.pt"
        if not path.exists():
            return
        held = checkpoint.load(path, self.device)
        if held["identity"] != self._identity:
            names = [name for name, value in self._identity.items() if held["identity"].get(name) != value]
            raise ValueError(
                f"{path} is a probe with another {' and '.join(names)}; set another --out, or delete it to begin again"
            )
        self.layer.load_state_dict(held["layer"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.step = held["step"]
        self._sum_loss = held.get("sum_loss", self._sum_loss)

    def _save(self, sum_loss: Tensor) -> None:
        if distributed.rank() != 0:
            return
        held = {
            "version": checkpoint.VERSION, "identity": self._identity, "step": self.step, "sum_loss": sum_loss,
            "layer": self.layer.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        guard.remove_unfinished(self.folder)
        with guard.whole_file(self.folder / "probe.pt") as file:
            torch.save(held, file)

    def _log(self, epoch: int, figures: dict[str, float]) -> None:
        path = self.folder / "metrics.jsonl"
        if distributed.rank() == 0:
            with guard.naming(path), open(path, "a") as file:
                file.write(json.dumps({"epoch": epoch, **figures}) + "\n")
