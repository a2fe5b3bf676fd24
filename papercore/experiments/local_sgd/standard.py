"""The chapter at `standard` scale: CIFAR-10, a small residual network with group norm, and K virtual workers.

    post     post-local: one start a seed, made by SGD at a large rate; from it, at a constant smaller rate, SGD and Local SGD
             with several H. The gain of Local SGD against H (L8), after all of the steps and after a tenth of them (condition 2, L7)
    large    the same from the same start at a rate that is not small (condition 1, L6)
    noise    labels redrawn at each step with some probability, no augmentation, constant rate: accuracy against eta H (L10)

Every run is a stage, and inside a stage there are checkpoints: a killed run goes on where it was. SGD is trained as one worker with
the joined batch; it sees the same samples, crops and label noise as the workers of Local SGD.

Glossary
    gain     test accuracy of Local SGD minus that of SGD from the same start, in points, seed by seed
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from papercore.experiments.local_sgd.config import StandardConfig
from papercore.experiments.local_sgd.standard_forms import Form
from papercore.experiments.local_sgd.standard_report import report
from papercore.lab.image_set import ImageSet
from papercore.lab.record import Record
from papercore.lab.resnet import SmallResNet
from papercore.lab.stages import Stages
from papercore.lab.worker_images import Plan, train_images, with_weights
from papercore.local_sgd import ConstantH

Run = dict[str, Any]
TUNING_SEED = 100


def run_standard(config: StandardConfig, record: Record, stages: Stages) -> None:
    """Run every stage that is not on disk yet and fill `record`.

    Raises:
        papercore.lab.data.Missing: the images are not on this machine.
        FloatingPointError: a loss is not finite, with its step.
    """
    form = config.form()
    seeds = [config.seed + seed for seed in form.seeds]
    periods = {"post": form.periods, "large": (form.large_period,), "noise": form.noise_periods}
    if config.standard_tuning:
        seeds = [TUNING_SEED + seed for seed in seeds]
        periods = {part: some[:1] for part, some in periods.items()}
    trainer = Trainer(config, form, stages)
    runs: dict[str, dict[int, list[Run]]] = {}
    threads = torch.get_num_threads()
    if config.torch_device().type == "cpu":
        torch.set_num_threads(1)
    try:
        # Seed by seed, so that a run that is stopped early has whole seeds.
        for seed in seeds:
            starts = {"post": trainer.start("post", seed), "noise": trainer.start("noise", seed)}
            starts["large"] = starts["post"]
            for part, some in periods.items():
                for h in (1, *some):
                    runs.setdefault(part, {}).setdefault(h, []).append(
                        trainer.second(part, h, seed, starts[part])
                    )
    finally:
        torch.set_num_threads(threads)
    report(config, form, record, runs, starts)


class Trainer:
    """Makes the plan of each run and carries it out as a stage."""

    def __init__(self, config: StandardConfig, form: Form, stages: Stages) -> None:
        self.config, self.form, self.stages = config, form, stages

    @functools.cached_property
    def images(self) -> ImageSet:
        """The images, read when the first run needs them: a finished run is shown without them."""
        form = self.form
        return ImageSet.load(
            self.config.standard_data,
            device=self.config.torch_device(),
            train_images=form.train_images,
            test_images=form.test_images,
            pool=form.pool,
        )

    def network(self, seed: int) -> SmallResNet:
        draw = torch.Generator().manual_seed(seed)
        return SmallResNet(
            self.form.depth, width=self.form.width, classes=self.images.classes, generator=draw
        )

    def start(self, part: str, seed: int) -> Run:
        """Phase 1 of one seed: SGD from fresh weights."""
        form = self.form
        steps, lr = (
            (form.noise_start_steps, form.noise_start_lr)
            if part == "noise"
            else (form.start_steps, form.start_lr)
        )
        return self._stage(
            f"{part}/start/seed{seed}", seed, lambda: self.network(seed), self.plan(part, 1, steps, lr, 0)
        )

    def second(self, part: str, h: int, seed: int, start: Run) -> Run:
        """Phase 2 of one seed from the weights of phase 1; h = 1 is SGD."""
        form = self.form
        steps, lr, first = {
            "post": (form.post_steps, form.lr, form.start_steps),
            "large": (form.large_steps, form.lr * form.large_times, form.start_steps),
            "noise": (form.noise_steps, form.noise_lr, form.noise_start_steps),
        }[part]
        return self._stage(
            f"{part}/h{h}/seed{seed}",
            seed,
            lambda: with_weights(self.network(seed), start),
            self.plan(part, h, steps, lr, first),
        )

    def plan(self, part: str, h: int, steps: int, lr: float, first: int) -> Plan:
        form, noise = self.form, part == "noise"
        k, b = (1, form.workers * form.local_batch) if h == 1 else (form.workers, form.local_batch)
        return Plan(
            k, b, steps, ConstantH(h), lr,
            first_step=first, weight_decay=form.decay, augment=not noise, replacement=noise, flips=form.flips if noise else 0.0,
            measure_every=form.measure, sharpness_every=form.sharpness if first else 0,
            sharpness_images=form.sharpness_images, sharpness_probes=form.probes, sharpness_products=form.products,
        )  # fmt: skip

    def _stage(self, name: str, seed: int, model: Callable[[], nn.Module], plan: Plan) -> Run:
        def part() -> Run:
            return train_images(
                model(), self.images, plan, seed=seed, text=name, folder=self.stages.folder(name),
                checkpoint_every=self.config.standard_checkpoint,
            )  # fmt: skip

        return self.stages.get(name, part)
