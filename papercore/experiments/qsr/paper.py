"""The chapter at `paper` scale: ImageNet, one process a worker, started by torchrun.

    parallel   data parallel training: gradients are averaged at every step
    constant   local steps, weights averaged every h_base steps
    qsr        local steps, rounds by the Quadratic Synchronization Rule

Optimizer state stays with its process, as in the official code. Batch-norm statistics are estimated anew at the averaged weights
before every evaluation. A killed run goes on where it was, inside a round too: every process keeps its own files in the folder of
the runs (PAPERCORE_RUNS), which may be shared.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from papercore.experiments.qsr import paper_images
from papercore.experiments.qsr.config import PaperConfig
from papercore.experiments.qsr.paper_models import image_side, make_model
from papercore.experiments.qsr.recipes import Recipe, decayed
from papercore.lab.image_folder import ImageFolder
from papercore.lab.process_training import RankCheckpoint, StepSampler, train_processes
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.statistics import paired
from papercore.lab.torchrun import Processes
from papercore.local_sgd import (
    QSR,
    SWAP,
    ConstantH,
    LocalOptimizer,
    SyncSchedule,
    reestimate_batch_norm,
)

Run = dict[str, Any]


def run_paper(config: PaperConfig, record: Record, stages: Stages) -> None:
    """Train every method from every seed and fill the record.

    Raises:
        papercore.lab.data.Missing: the images are not to be had.
        ValueError: a batch that does not divide over the processes, or more epochs of warm-up than of training.
        RuntimeError: time is up (`paper_minutes`); start the same line again to go on.
    """
    processes = Processes.join(config.torch_device())
    lab = PaperLab(config, processes, stages)
    runs: dict[str, list[Run]] = {method: [] for method in config.paper_methods}
    for seed in config.paper_seeds:
        for method in config.paper_methods:
            runs[method].append(lab.run(method, config.seed + seed))
    report(config, lab, record, runs)


class PaperLab:
    """Data, recipe and training of one process."""

    def __init__(self, config: PaperConfig, processes: Processes, stages: Stages) -> None:
        self.config, self.processes, self.stages = config, processes, stages
        self.rules = config.recipe()
        self.side = image_side(config.paper_size)
        self.test = paper_images.load(config.paper_data, "val", side=self.side)
        size = len(self.train_images(0))
        self.epoch_steps = size // self.rules.batch
        if not self.epoch_steps:
            raise ValueError(
                f"a step takes {self.rules.batch} images and there are {size}: give a smaller paper_batch."
            )
        steps = self.rules.epochs * self.epoch_steps
        warmup = self.rules.warmup_steps or self.rules.warmup_epochs * self.epoch_steps
        self.recipe: Recipe = decayed(config.paper_decay, self.rules.peak, steps, warmup)
        self.until = time.monotonic() + 60 * config.paper_minutes if config.paper_minutes else math.inf

    def train_images(self, seed: int) -> ImageFolder:
        return paper_images.load(self.config.paper_data, "train", side=self.side, seed=seed)

    def schedule(self, method: str) -> SyncSchedule:
        if method == "parallel":
            return SWAP(0)  # gradients are averaged instead; weights meet at the end, where they are equal
        return (
            ConstantH(self.rules.h_base) if method == "constant" else QSR(self.rules.alpha, self.rules.h_base)
        )

    def run(self, method: str, seed: int) -> Run:
        """One run, or what an earlier call left of it."""
        name = f"{self.config.paper_model}/{method}/seed{seed}"
        # Processes with folders of their own may disagree on what is finished; then all take part once more, from their last state.
        if all(self.processes.gather(self.stages.done(name))):
            return self.stages.get(name, dict)
        result = self._train(name, method, seed)
        kept = self.stages.get(name, lambda: result)
        self.processes.wait()
        return kept

    def _train(self, name: str, method: str, seed: int) -> Run:
        config, rules, processes = self.config, self.rules, self.processes
        parallel = method == "parallel"
        model = make_model(config.paper_model, config.paper_size, len(self.test.classes), seed).to(
            processes.device
        )
        decay = rules.decay_parallel if parallel else rules.decay_local
        inner: torch.optim.Optimizer
        if rules.optimizer == "adamw":
            inner = torch.optim.AdamW(model.parameters(), lr=rules.peak, weight_decay=decay)
        else:
            inner = torch.optim.SGD(model.parameters(), lr=rules.peak, momentum=0.9, weight_decay=decay)
        optimizer = LocalOptimizer(
            inner, self.schedule(method), total_steps=self.recipe.steps, warmup_steps=self.recipe.warmup
        )
        checkpoint = RankCheckpoint(
            self.stages.folder(name), processes, {"model": model, "optimizer": optimizer}
        )
        model.train()
        found = train_processes(
            model, optimizer, self.recipe.lr, lambda step: self._batches(seed, step), self._loss, processes,
            steps=self.recipe.steps, evaluate=lambda net, step: self._evaluate(net, seed), evaluate_every=config.paper_evaluate_epochs * self.epoch_steps,
            clip=(rules.clip or math.inf) if parallel else math.inf, micro_batch=rules.micro_batch, parallel=parallel,
            checkpoint=checkpoint, checkpoint_every=config.paper_checkpoint_steps, seconds=self.until - time.monotonic(),
        )  # fmt: skip
        if not found["finished"]:
            raise RuntimeError(
                f"{name}: stopped after {found['step']:,} of {self.recipe.steps:,} steps, as paper_minutes asks; start the same line again to go on."
            )
        curve = {k: np.array([row[k] for row in found["evaluations"]]) for k in ("step", "accuracy", "loss")}
        rest = {k: found[k] for k in ("losses", "rounds", "bytes_sent", "seconds")}
        return {**curve, **rest, "share": 100 * found["rounds"] / self.recipe.steps}

    def _batches(self, seed: int, step: int) -> Iterator[tuple[Tensor, ...]]:
        """This process's batches from a step on, mixed up where the recipe says so."""
        config, processes = self.config, self.processes
        images = self.train_images(seed)
        sampler = StepSampler(
            len(images), self.rules.batch, self.recipe.steps, seed=seed, rank=processes.rank, world=processes.world, start=step, with_epoch=True,
        )  # fmt: skip
        loader = DataLoader(images, batch_sampler=sampler, num_workers=config.paper_loaders)
        for x, y in loader:
            draw = np.random.default_rng([seed, step, processes.rank, 1])
            batch = paper_images.mixed(x, y, self.rules.mixup, draw)
            yield tuple(part.to(processes.device, non_blocking=True) for part in batch)
            step += 1

    def _loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, first, second, share = batch
        with self._precision():
            outputs = model(x)
        losses = [
            F.cross_entropy(outputs.float(), y, label_smoothing=self.rules.smoothing, reduction="none")
            for y in (first, second)
        ]
        return (share * losses[0] + (1 - share) * losses[1]).mean()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.processes.device.type == "cuda" and self.config.paper_precision == "bfloat16":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Validation accuracy and loss of the averaged model; every process takes its share of the images."""
        processes, config = self.processes, self.config
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            count = max(1, config.paper_batch_norm_batches // processes.world)
            reestimate_batch_norm(model, self._plain_batches(seed, count))
        model.eval()
        own = range(processes.rank, len(self.test), processes.world)
        loader = DataLoader(torch.utils.data.Subset(self.test, own), batch_size=256, num_workers=config.paper_loaders)  # fmt: skip
        sums = np.zeros(3)
        for x, y in loader:
            x, y = x.to(processes.device), y.to(processes.device)
            with self._precision():
                outputs = model(x)
            outputs = outputs.float()
            loss = float(F.cross_entropy(outputs, y, reduction="sum"))
            sums += (float((outputs.argmax(1) == y).sum()), loss, len(y))
        right, loss, count = np.sum(processes.gather(sums), axis=0)
        return {"accuracy": right / count, "loss": loss / count}

    def _plain_batches(self, seed: int, count: int) -> Iterator[Tensor]:
        """Training micro-batches of this process for batch norm, as training sees them."""
        wanted = count
        for x, *_ in self._batches(seed, 0):
            for part in x.split(self.rules.micro_batch):
                if not wanted:
                    return
                wanted -= 1
                yield part


def report(config: PaperConfig, lab: PaperLab, record: Record, runs: dict[str, list[Run]]) -> None:
    """Table, curves, and the differences that the claims rest on."""
    rows: list[list[Any]] = []
    final = {m: [100 * float(run["accuracy"][-1]) for run in some] for m, some in runs.items()}
    for method, some in runs.items():
        hours = float(np.mean([run["seconds"] for run in some])) / 3600
        rows.append([method, some[0]["share"], float(np.mean(final[method])), len(some), hours, some[0]["bytes_sent"]])  # fmt: skip
        for what in ("step", "accuracy", "loss"):
            record.array(f"paper_{method}_{what}", np.array([run[what] for run in some]))
        record.metric(f"paper_{method}_accuracy", float(np.mean(final[method])), "abs:1")
        record.metric(f"paper_{method}_share", some[0]["share"], "exact")
        record.metric(f"paper_{method}_hours", hours, "volatile")
    record.table("paper", ["method", "share", "accuracy", "seeds", "hours", "bytes sent"], rows)
    record.metric("paper_seeds", len(config.paper_seeds), "exact")
    record.metric("paper_processes", lab.processes.world, "exact")
    record.note(
        "paper_run",
        f"{config.paper_model} ({config.paper_size}), B = {lab.rules.batch:,} over {lab.processes.world} processes, {lab.recipe.steps:,} steps. "
        "Departures: no RandAugment, PyTorch's loader for FFCV, transformers' models.",
    )
    for other, short in (("constant", "constant"), ("parallel", "dp")):
        if len(config.paper_seeds) > 1 and {"qsr", other} <= final.keys():
            gap = paired(final["qsr"], final[other])
            record.metric(f"paper_qsr_minus_{short}", gap.difference, f"se:4:paper_qsr_minus_{short}_se")
            record.metric(f"paper_qsr_minus_{short}_se", gap.se, "rel:0.9")
