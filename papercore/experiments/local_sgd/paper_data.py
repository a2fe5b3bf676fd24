"""What the paper's runs draw and are measured on: CIFAR-10 on the device, ImageNet from a folder.

A source has `size`, `classes`, `batches(step)` (this process's slice of every global batch from a step on) and `evaluate(model)`
(accuracy and loss over the test images, the same on every process).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from papercore.experiments.local_sgd.paper_runs import PaperRun
from papercore.lab.image_folder import ImageFolder
from papercore.lab.image_set import ImageSet
from papercore.lab.process_training import StepSampler
from papercore.lab.torchrun import Processes
from papercore.lab.worker_images import evaluate

Batch = tuple[Tensor, Tensor]


class Source(Protocol):
    size: int
    classes: int

    def batches(self, step: int) -> Iterator[Batch]: ...
    def evaluate(self, model: nn.Module) -> dict[str, float]: ...


class DeviceSource:
    """CIFAR-10, all of it on this process's device."""

    def __init__(self, run: PaperRun, processes: Processes, *, path: str, seed: int) -> None:
        self.images = ImageSet.load(run.data, path=path or None, device=processes.device)
        self.run, self.processes, self.seed = run, processes, seed
        self.size, self.classes = len(self.images.train_y), self.images.classes

    def batches(self, step: int) -> Iterator[Batch]:
        run = self.run
        while True:
            yield self.images.batch(
                step, run.workers * run.local_batch, seed=self.seed, augment=run.augment, flips=run.flips,
                replacement=run.replacement, rank=self.processes.rank, world=self.processes.world,
            )  # fmt: skip
            step += 1

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        accuracy, loss = evaluate(model, self.images)
        return {"accuracy": accuracy, "loss": loss}


class FolderSource:
    """Images in folders, read by `readers` loader processes; the test images are shared out among the processes."""

    def __init__(
        self,
        run: PaperRun,
        processes: Processes,
        *,
        path: str,
        seed: int,
        side: int,
        readers: int,
        steps: int,
    ) -> None:
        shared: dict[str, Any] = {"path": path, "side": side, "resize": round(side * 256 / 224), "seed": seed}
        self.train = ImageFolder.named(run.data, "train", augment=run.augment, **shared)
        self.test = ImageFolder.named(run.data, "val", **shared)
        self.run, self.processes, self.seed, self.readers, self.steps = run, processes, seed, readers, steps
        self.size, self.classes = len(self.train), len(self.train.classes)

    def batches(self, step: int) -> Iterator[Batch]:
        sampler = StepSampler(
            self.size, self.run.workers * self.run.local_batch, self.steps, seed=self.seed, rank=self.processes.rank,
            world=self.processes.world, start=step, with_epoch=True,
        )  # fmt: skip
        yield from self._loaded(DataLoader(self.train, batch_sampler=sampler, num_workers=self.readers))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        own = Subset(self.test, range(self.processes.rank, len(self.test), self.processes.world))
        correct, loss = 0, 0.0
        for x, y in self._loaded(DataLoader(own, batch_size=100, num_workers=self.readers)):
            logits = model(x)
            correct += int((logits.argmax(1) == y).sum())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
        shares = self.processes.gather((correct, loss))
        return {
            "accuracy": sum(c for c, _ in shares) / len(self.test),
            "loss": sum(part for _, part in shares) / len(self.test),
        }

    def _loaded(self, loader: Any) -> Iterator[Batch]:
        for x, y in loader:
            yield (
                x.to(self.processes.device, non_blocking=True),
                y.to(self.processes.device, non_blocking=True),
            )
