"""The chapter at `standard` scale: CIFAR-10, a small residual network with group norm, K virtual workers, a grid of schedules.

    clean    the grid on the labels as they are
    noisy    data parallel, H = h_base and QSR with labels redrawn at each step with some probability, the case that the theory is about
    shorter  the same three on clean labels in an eighth and three eighths of the steps: the negative control, and the trend in T

Every run is a stage, and inside a stage there are checkpoints: a killed run goes on where it was. Data parallel training is
trained as one worker with the joined batch; with momentum SGD that is the average trajectory of K workers that average every step.

Glossary
    share    averages over steps, percent of data parallel
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from papercore.experiments.qsr import wall_clock
from papercore.experiments.qsr.config import StandardConfig
from papercore.experiments.qsr.standard_forms import Form
from papercore.lab.image_set import ImageSet
from papercore.lab.record import Record
from papercore.lab.resnet import SmallResNet
from papercore.lab.stages import Stages
from papercore.lab.statistics import paired
from papercore.lab.worker_images import Plan, train_images
from papercore.local_sgd import (
    QSR,
    SWAP,
    ConstantH,
    PostLocal,
    SyncSchedule,
    communication_volume,
    cosine_lr,
)

Run = dict[str, Any]
Array = NDArray[np.float64]
KEEP = ("step", "test_accuracy", "train_loss", "sharpness_step", "top", "trace", "spread_step", "spread")


@dataclass(frozen=True)
class Warmed(SyncSchedule):
    """A schedule that knows how long the warm-up is, for a loop that does not tell it."""

    schedule: SyncSchedule
    warmup: int

    def next_h(self, step: int, lr: float, *, total_steps: int | None = None, warmup_steps: int = 0) -> int:
        return self.schedule.next_h(step, lr, total_steps=total_steps, warmup_steps=self.warmup)

    def _length(self, step: int, lr: float, left: int | None, warmup_steps: int) -> int:
        return self.schedule._length(step, lr, left, self.warmup)


def grid(form: Form, steps: int) -> dict[str, tuple[str, SyncSchedule]]:
    """Name -> (family, schedule), data parallel first. Growth coefficients are in units of the peak rate."""
    switch = round(form.switch * steps)
    out: dict[str, tuple[str, SyncSchedule]] = {"data parallel": ("dp", ConstantH(1))}
    out |= {f"H = {h}": ("constant", ConstantH(h)) for h in form.periods}
    out |= {f"QSR, {a:g}": ("qsr", QSR(a * form.lr, form.h_base)) for a in form.alphas}
    out["1/η rule"] = "inverse", QSR(form.beta * form.lr, form.h_base, power=1)
    out["cubic rule"] = "cubic", QSR(form.rho * form.lr, form.h_base, power=3)
    if switch:
        out["post-local"] = "post", PostLocal(switch, form.post_h)
        out["SWAP"] = "swap", SWAP(switch)
    return out


def run_standard(config: StandardConfig, record: Record, stages: Stages) -> None:
    """Run every stage that is not on disk yet and fill `record`.

    Raises:
        papercore.lab.data.Missing: the images are not on this machine.
        FloatingPointError: a loss is not finite, with its step.
    """
    form = config.form()
    trainer = Trainer(config, form, stages)
    seeds = [config.seed + seed for seed in form.seeds]
    threads = torch.get_num_threads()
    if config.torch_device().type == "cpu":
        torch.set_num_threads(1)
    try:
        runs: dict[tuple[str, str], list[Run]] = {}
        # Seed by seed, so that a run that is stopped early has whole seeds.
        for seed in seeds:
            for labels, names in (("clean", grid(form, form.steps)), ("noisy", compared(form))):
                if labels in config.standard_parts and (labels == "clean" or form.flips):
                    for name in names:
                        runs.setdefault((labels, name), []).append(
                            trainer.run(labels, name, form.steps, seed)
                        )
            if "shorter" in config.standard_parts:
                for length in ("short", "middle"):
                    steps = max(2, round(getattr(form, length) * form.steps))
                    for name in compared(form):
                        runs.setdefault((length, name), []).append(trainer.run("clean", name, steps, seed))
        if "clock" in config.standard_parts:
            wall_clock.predict(
                record, stages, processes=2, steps=config.standard_clock_steps, repeats=config.standard_clock_repeats, seed=config.seed
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    report(form, record, runs)


def compared(form: Form) -> tuple[str, str, str]:
    """Data parallel, the constant H that QSR starts from, and QSR with the middle coefficient."""
    return (
        "data parallel",
        f"H = {form.h_base if form.h_base in form.periods else form.periods[0]}",
        f"QSR, {form.alphas[len(form.alphas) // 2]:g}",
    )


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

    def run(self, labels: str, name: str, steps: int, seed: int) -> Run:
        form, stage = self.form, f"{labels}/{name}/{steps}/seed{seed}"
        warmup = min(form.warmup, steps // 10)
        family, schedule = grid(form, steps)[name]
        lr = cosine_lr(form.lr, steps, warmup_steps=warmup)
        joined = family == "dp"
        plan = Plan(
            1 if joined else form.workers, form.workers * form.local_batch if joined else form.local_batch, steps,
            Warmed(schedule, warmup), lr, momentum=form.momentum, weight_decay=form.decay,
            flips=form.flips if labels == "noisy" else 0.0, measure_every=form.measure, sharpness_every=form.sharpness,
            sharpness_probes=form.probes,
        )  # fmt: skip

        def part() -> Run:
            model = SmallResNet(
                form.depth,
                width=form.width,
                classes=self.images.classes,
                generator=torch.Generator().manual_seed(seed),
            )
            result = train_images(
                model,
                self.images,
                plan,
                seed=seed,
                text=stage,
                folder=self.stages.folder(stage),
                checkpoint_every=self.config.standard_checkpoint,
            )
            share = communication_volume(schedule, lr, steps, warmup_steps=warmup).fraction
            return {**{key: result[key] for key in KEEP}, "share": 100 * share, "family": family}

        return self.stages.get(stage, part)


def report(form: Form, record: Record, runs: dict[tuple[str, str], list[Run]]) -> None:
    """Table of all runs, curves, and the paired differences that the claims rest on."""
    rows: list[list[Any]] = []
    for index, ((labels, name), some) in enumerate(runs.items()):
        accuracy = _final(some)
        se = float(accuracy.std(ddof=1)) / len(accuracy) ** 0.5 if len(accuracy) > 1 else None
        spread = _mean_last(some, "spread") if some[0]["spread"].size else None
        row = [labels, name, some[0]["family"], some[0]["share"], accuracy.mean(), se, len(some)]
        rows.append([*row, _mean_last(some, "train_loss"), _mean_last(some, "top"), _mean_last(some, "trace"), spread])  # fmt: skip
        for what in KEEP:
            record.array(f"standard_{index}_{what}", np.array([run[what] for run in some]))
    columns = ["labels", "schedule", "family", "share", "accuracy", "se", "seeds", "train loss", "top", "trace", "spread"]  # fmt: skip
    record.table("standard_grid", columns, rows)
    record.metric("standard_seeds", len(form.seeds), "exact")
    record.note(
        "standard_form",
        f"{form.train_images:,} training and {form.test_images:,} test images of {32 // form.pool} x {32 // form.pool} pixels, "
        f"ResNet-{form.depth} of width {form.width} with group norm, K = {form.workers}, B_loc = {form.local_batch}, "
        f"{form.steps:,} steps, {len(form.seeds)} seeds.",
    )
    if len(form.seeds) < 2:
        return
    parallel, constant, rule = compared(form)
    pairs = {"dp": parallel, "constant": constant, "inverse": "1/η rule", "cubic": "cubic rule"}
    for part, prefix in (
        ("clean", "standard"),
        ("noisy", "standard_noisy"),
        ("short", "standard_short"),
        ("middle", "standard_middle"),
    ):
        for short, other in pairs.items():
            if (part, rule) in runs and (part, other) in runs:
                gap = paired(_final(runs[part, rule]).tolist(), _final(runs[part, other]).tolist())
                name = f"{prefix}_qsr_minus_{short}"
                record.metric(name, gap.difference, f"se:4:{name}_se")
                record.metric(f"{name}_se", gap.se, "rel:0.9")
    if {("clean", rule), ("short", rule)} <= runs.keys():
        gains = [_final(runs[part, rule]) - _final(runs[part, parallel]) for part in ("clean", "short")]
        gap = paired(gains[0].tolist(), gains[1].tolist())
        record.metric(
            "standard_gain_long_minus_short", gap.difference, "se:4:standard_gain_long_minus_short_se"
        )
        record.metric("standard_gain_long_minus_short_se", gap.se, "rel:0.9")


def _final(some: list[Run]) -> Array:
    """Test accuracy at the end in percent, one number a seed."""
    return np.array([100 * float(run["test_accuracy"][-1]) for run in some])


def _mean_last(some: list[Run], name: str) -> float | None:
    return float(np.mean([run[name][-1] for run in some])) if some[0][name].size else None
