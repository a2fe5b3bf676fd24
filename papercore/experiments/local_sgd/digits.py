"""Handwritten digits with wrong labels: data parallel training beside Local SGD at the same learning rate, data and steps.

Three kinds of runs, each with S seeds at once:

    scratch    from a fresh network, with a falling learning rate; 20 % of the labels are wrong for good
    clean, fresh    the same with clean labels, or with labels that are redrawn at every step: controls without memorised labels
    post       post-local: data parallel until `switch`, then either that or Local SGD from the same weights, at a constant rate

The last one is the cleanest: all arms start from one point, and their training losses end equal.

Glossary
    h0       data parallel (one average a step)
    h16      Local SGD with H = 16
    top, trace   largest eigenvalue and trace of the Hessian of the training loss at the averaged weights
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papercore.experiments.local_sgd.config import QuickConfig
from papercore.lab.noisy_digits import NoisyDigits, network
from papercore.lab.worker_training import Run, cross_entropy, data_parallel, train_workers
from papercore.local_sgd import ConstantH, constant_lr, cosine_lr, sharpness

CONTROLS = {"clean": (0.0, 0.0, 0.5), "fresh": (0.0, 0.2, 0.3)}  # wrong labels, fresh noise, learning rate
CONTROL_PERIOD = 16
# Steps after the switch at which the post-local arms are looked at closely.
AFTER_SWITCH = (16, 32, 64, 96, 160, 256, 384, 512, 800, 1200)


def seeds_of(config: QuickConfig) -> list[int]:
    """The reported seeds; never those below `first_seed`, on which settings were chosen."""
    first = config.first_seed + 1000 * config.seed
    return list(range(first, first + config.seeds))


def scratch(config: QuickConfig, h: int, kind: str = "scratch") -> dict[str, Any]:
    """Curves of one arm from a fresh network; h = 0 is data parallel."""
    wrong, fresh, lr = CONTROLS.get(kind, (config.wrong, 0.0, config.lr))
    steps = config.scratch_steps if kind == "scratch" else config.control_steps
    task = NoisyDigits.make(seeds_of(config), wrong=wrong, fresh=fresh, device=config.torch_device())
    rate = cosine_lr(lr, steps, warmup_steps=100)
    at = sorted({round(steps * share) for share in np.linspace(0, 1, 13)[1:]} | {300})
    return _arrays(_train(config, task, h, rate, steps, evaluate_at=at))


def phase_1(config: QuickConfig) -> dict[str, Any]:
    """Data parallel until the switch, at a constant rate; curves and weights."""
    task = _post_task(config)
    rate = constant_lr(config.lr, config.switch)
    at = sorted({round(config.switch * share) for share in np.linspace(0, 1, 9)[1:]})
    run = _train(config, task, 0, rate, config.switch, evaluate_at=at)
    return _arrays(run) | _weights(run)


def phase_2(config: QuickConfig, h: int, start: dict[str, Any]) -> dict[str, Any]:
    """From the weights of phase 1 to the end: curves, weights, and the sharpness of each seed's average."""
    task = _post_task(config)
    steps = config.post_steps - config.switch
    at = sorted(
        {
            0,
            *(step for step in AFTER_SWITCH if step < steps),
            *(round(steps * share) for share in (0.5, 0.75)),
        }
    )
    weights = {
        name.removeprefix("weights:"): torch.from_numpy(value).to(task.train_x.device)
        for name, value in start.items()
        if name.startswith("weights:")
    }
    run = _train(
        config,
        task,
        h,
        constant_lr(config.lr, steps),
        steps,
        evaluate_at=at,
        start=weights,
        first_step=config.switch,
    )
    return _arrays(run) | measured_sharpness(task, run.state, config.probes)


def measured_sharpness(task: NoisyDigits, state: dict[str, Tensor], probes: int) -> dict[str, Any]:
    """Largest eigenvalue and trace of the Hessian of the training loss, [S] each."""
    tops, traces = [], []
    for row in range(len(task.seeds)):
        model: nn.Module = network().to(task.train_x.device)
        model.load_state_dict({name: value[row] for name, value in state.items()})
        data = (task.train_x[row], task.train_y[row])
        draw = torch.Generator().manual_seed(row)
        tops.append(float(sharpness(model, cross_entropy, data, kind="top", generator=draw)))
        traces.append(
            float(sharpness(model, cross_entropy, data, kind="trace", n_probe=probes, generator=draw))
        )
    return {"top": np.array(tops), "trace": np.array(traces)}


def _post_task(config: QuickConfig) -> NoisyDigits:
    return NoisyDigits.make(seeds_of(config), wrong=config.wrong, device=config.torch_device())


def _train(config: QuickConfig, task: NoisyDigits, h: int, rate: Any, steps: int, **options: Any) -> Run:
    shape = {"k": config.workers, "local_batch": config.local_batch}
    if h == 0:
        return data_parallel(task, rate, steps, **shape, **options)  # type: ignore[arg-type]
    return train_workers(task, ConstantH(h), rate, steps, **shape, **options)  # type: ignore[arg-type]


def _arrays(run: Run) -> dict[str, Any]:
    names = ("steps", "test_accuracy", "test_loss", "train_loss", "spread")
    return {name: getattr(run, name) for name in names} | {"communication": run.report.fraction}


def _weights(run: Run) -> dict[str, Any]:
    return {f"weights:{name}": value.cpu().numpy() for name, value in run.state.items()}
