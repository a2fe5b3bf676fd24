"""The chapter at `paper` scale: the official settings, one worker a process, started by torchrun.

Phase 1 trains by SGD (an average every step); from its weights one arm goes on so, and the other averages every H steps. Both make
the same number of steps on the same samples. Batch norm's statistics are estimated anew at every average that is evaluated.

A killed run goes on where it was, inside a round too; all processes must find the folder of the runs (PAPERCORE_RUNS), shared or
each its own.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.experiments.local_sgd.config import PaperConfig
from papercore.experiments.local_sgd.paper_data import DeviceSource, FolderSource, Source
from papercore.experiments.local_sgd.paper_runs import RUNS, PaperRun, make_network
from papercore.lab.process_training import RankCheckpoint, train_processes
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.torchrun import Processes
from papercore.local_sgd import (
    ConstantH,
    LocalOptimizer,
    communication_volume,
    constant_lr,
    reestimate_batch_norm,
)

Arm = dict[str, Any]


def run_paper(config: PaperConfig, record: Record, stages: Stages) -> None:
    """Run phase 1 and both arms of phase 2, and fill the record.

    Raises:
        ValueError: another number of processes than workers, or a checkpoint that does not fit.
        papercore.lab.data.Missing: the images are not on this machine.
        RuntimeError: the arm was stopped by `paper_seconds`; start the same line again to go on.
    """
    run = chosen_run(config)
    processes = Processes.join(config.torch_device())
    if processes.world != run.workers:
        raise ValueError(
            f"{config.paper_run} has {run.workers} workers, one a process, and {processes.world} processes run: start torchrun with "
            f"{run.workers} (--nnodes times --nproc-per-node), or set the number of workers: --set paper_workers={processes.world}."
        )
    lab = PaperLab(config, run, processes, stages)
    if config.paper_checkpoint:
        start = {f"weights:{k}": v.numpy() for k, v in _state_dict(config.paper_checkpoint).items()}
    else:
        start = lab.arm("start", 1, run.start_epochs, config.paper_start_lr or 10 * run.lr, 0, None)
    first = run.start_epochs * lab.steps_per_epoch
    arms = {h: lab.arm(f"h{h}", h, run.epochs, run.lr, first, start) for h in (1, run.period)}
    _report(config, run, record, arms, lab)


def chosen_run(config: PaperConfig) -> PaperRun:
    """The paper's run with what was overridden."""
    given: dict[str, Any] = {
        "workers": config.paper_workers, "local_batch": config.paper_local_batch, "lr": config.paper_lr, "period": config.paper_period,
        "start_epochs": config.paper_start_epochs, "epochs": config.paper_epochs,
    }  # fmt: skip
    return dataclasses.replace(RUNS[config.paper_run], **{k: v for k, v in given.items() if v})


class PaperLab:
    """Data, network and training of one process."""

    def __init__(self, config: PaperConfig, run: PaperRun, processes: Processes, stages: Stages) -> None:
        self.config, self.run, self.processes, self.stages = config, run, processes, stages
        self.source: Source
        if run.data == "imagenet":
            # More steps than any arm makes: where it ends is the trainer's business.
            self.source = FolderSource(
                run, processes, path=config.paper_data, seed=config.seed, side=config.paper_side, readers=config.paper_readers, steps=10**9
            )  # fmt: skip
        else:
            self.source = DeviceSource(run, processes, path=config.paper_data, seed=config.seed)
        batch = run.workers * run.local_batch
        self.steps_per_epoch = self.source.size // batch
        if not self.steps_per_epoch:
            raise ValueError(
                f"a step takes {batch} images and there are {self.source.size}: fewer workers or a smaller local batch."
            )

    def arm(self, name: str, h: int, epochs: int, lr: float, first_step: int, start: Arm | None) -> Arm:
        """Curves and final weights of one arm; a stage on every process."""

        def part() -> Arm:
            return self._train(name, h, epochs, lr, first_step, start)

        # Processes with folders of their own may disagree on what is finished; then all take part once more, from their last state.
        if not all(self.processes.gather(self.stages.done(name))):
            result = part()
            kept = self.stages.get(name, lambda: result)
            self.processes.wait()
            return kept
        return self.stages.get(name, part)

    def _train(self, name: str, h: int, epochs: int, lr: float, first_step: int, start: Arm | None) -> Arm:
        config, run, processes = self.config, self.run, self.processes
        seed = config.seed
        model = make_network(run.network, self.source.classes, seed=seed, depth=config.paper_depth).to(
            processes.device
        )
        if start is not None:
            load_weights(model, start)
        steps = epochs * self.steps_per_epoch
        decayed = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": run.weight_decay},
            {"params": plain},
        ]
        sgd = torch.optim.SGD(groups, lr=lr)
        optimizer = LocalOptimizer(sgd, ConstantH(h), total_steps=steps)
        checkpoint = RankCheckpoint(
            self.stages.folder(name), processes, {"model": model, "optimizer": optimizer}
        )
        model.train()
        found = train_processes(
            model, optimizer, constant_lr(lr, steps), lambda step: self.source.batches(first_step + step), self._loss, processes,
            steps=steps, evaluate=lambda net, step: self._evaluate(net), evaluate_every=config.paper_evaluate_epochs * self.steps_per_epoch,
            checkpoint=checkpoint, checkpoint_every=config.paper_checkpoint_steps, seconds=config.paper_seconds or math.inf,
        )  # fmt: skip
        if not found["finished"]:
            raise RuntimeError(
                f"{name}: stopped after {found['step']} of {steps} steps, as paper_seconds asks; start the same line again to go on."
            )
        curves = {
            key: np.array([row[key] for row in found["evaluations"]]) for key in ("step", "accuracy", "loss")
        }
        weights = {f"weights:{k}": v.cpu().numpy() for k, v in model.state_dict().items()}
        return {
            **curves,
            "losses": found["losses"],
            "rounds": found["rounds"],
            "bytes_sent": found["bytes_sent"],
            **weights,
        }

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        """Test accuracy and loss of the average, batch norm estimated from training batches of this process."""
        own = self.source.batches(0)
        reestimate_batch_norm(model, [next(own)[0] for _ in range(self.config.paper_batch_norm_batches)])
        return self.source.evaluate(model)

    def _loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        low = self.run.autocast and batch[0].device.type == "cuda"
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=low):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1])


def load_weights(model: nn.Module, start: Arm) -> None:
    """Weights and buffers named "weights:..." into the model. ValueError names what does not fit."""
    stored = {
        k.removeprefix("weights:"): torch.from_numpy(np.array(v))
        for k, v in start.items()
        if k.startswith("weights:")
    }
    try:
        model.load_state_dict(stored)
    except RuntimeError as error:
        raise ValueError(f"the weights to start from do not fit the network: {error}") from error


def _state_dict(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ValueError(
            f"paper_checkpoint = {path!r}: no such file; give a state dict saved by torch.save, or leave it empty."
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def _report(config: PaperConfig, run: PaperRun, record: Record, arms: dict[int, Arm], lab: PaperLab) -> None:
    rows = []
    for h, arm in arms.items():
        volume = communication_volume(ConstantH(h), lambda step: run.lr, run.epochs * lab.steps_per_epoch)
        rows.append(
            [
                h,
                run.lr * h,
                100 * float(arm["accuracy"][-1]),
                float(arm["loss"][-1]),
                int(arm["rounds"]),
                100 * volume.fraction,
            ]
        )
        record.metric(f"paper_h{h}_accuracy", 100 * arm["accuracy"][-1], "abs:1")
        record.metric(f"paper_h{h}_rounds", arm["rounds"], "exact")
        record.array(f"paper_h{h}_step", arm["step"])
        record.array(f"paper_h{h}_test_accuracy", arm["accuracy"])
    record.table("paper", ["H", "eta H", "test accuracy", "test loss", "rounds", "communication %"], rows)
    record.metric("paper_gain", 100 * (arms[run.period]["accuracy"][-1] - arms[1]["accuracy"][-1]), "abs:1")
    record.metric("paper_period", run.period, "exact")
    record.metric("paper_workers", run.workers, "exact")
    record.note(
        "paper_run",
        f"{config.paper_run}: {run.network} on {run.data}, K = {run.workers}, B_loc = {run.local_batch}.",
    )
