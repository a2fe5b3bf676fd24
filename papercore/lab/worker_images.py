"""Local SGD on images: K virtual workers on one device, from a common start, measured at the averages.

One call trains one network (one seed) by one synchronisation schedule and returns curves and the final weights. The second
phase of post-local SGD is a call that begins from the weights of the first, at its last step. All measurements are made on
the average of the workers, never on one of them, and at steps where they were just averaged.

With k = 1 and all samples given to the one worker this is plain SGD: for SGD without momentum the same algorithm as k workers
that average after every step, and cheaper.

Glossary
    k, B_loc     workers; samples of one worker and step. B = k B_loc
    H            local steps between two averages
    spread       mean squared distance of the workers to their mean, one step before they are averaged
    top, trace   largest eigenvalue and trace of the Hessian of the training loss (true labels, no augmentation) at the average
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.lab.config import checked_choice
from papercore.lab.image_set import ImageSet, seeded
from papercore.lab.training import Checkpoint, train
from papercore.local_sgd import SyncSchedule, VirtualWorkers, sharpness

PRECISIONS = ("auto", "float32", "bfloat16")
_PROBES = 10  # purpose of the generator of the trace's probes; those of image_set.py are smaller


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one network is trained.

    Attributes:
        k: workers; local_batch: samples of each a step.
        steps: steps of this call; first_step: its number in the whole run, so that a second phase goes on with the samples.
        schedule: when to average. Its step 0 is the first step of this call.
        lr: learning rate, or a function of the step of this call.
        momentum, weight_decay: of SGD; the decay leaves norms and biases out.
        augment, flips, replacement: as in ImageSet.batch.
        measure_every: steps between two measurements of accuracy and losses; each is made at the first average from there on.
        sharpness_every: likewise of the Hessian; 0 leaves it out.
        sharpness_images, sharpness_probes, sharpness_products: training images for it, random probes of the trace, and the most
            products with the Hessian that the largest eigenvalue may take.
        train_images: training images on which the training loss is measured.
        precision: "bfloat16" runs the network under autocast; "auto" does so on CUDA.
    """

    k: int
    local_batch: int
    steps: int
    schedule: SyncSchedule
    lr: float | Callable[[int], float]
    first_step: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0
    augment: bool = True
    flips: float = 0.0
    replacement: bool = False
    measure_every: int = 100
    sharpness_every: int = 0
    sharpness_images: int = 500
    sharpness_probes: int = 8
    sharpness_products: int = 60
    train_images: int = 2000
    precision: str = "auto"

    def __post_init__(self) -> None:
        checked_choice("precision", self.precision, PRECISIONS)
        for name, least in (
            ("k", 1),
            ("local_batch", 1),
            ("steps", 1),
            ("measure_every", 1),
            ("sharpness_every", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least {least}")

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step` of this call."""
        return float(self.lr(step) if callable(self.lr) else self.lr)


CURVES = ("step", "test_accuracy", "test_loss", "train_loss")
SHARPNESS = ("sharpness_step", "top", "trace")
SPREAD = ("spread_step", "spread")


def train_images(
    model: nn.Module,
    images: ImageSet,
    plan: Plan,
    *,
    seed: int,
    text: str = "training",
    folder: Path | None = None,
    checkpoint_every: int = 0,
) -> dict[str, Any]:
    """Train a copy of `model` and return curves, and the weights of the average under the names "weights:...".

    Args:
        model: the start; left as it is. Without batch norm (see VirtualWorkers).
        seed: of the samples, crops and label noise, and of the probes of the Hessian.
        folder: where an interrupted run keeps its state; None keeps none.
        checkpoint_every: steps between two saves; 0 saves none.

    Returns:
        arrays: "step", "test_accuracy", "test_loss", "train_loss"; "sharpness_step", "top", "trace"; "spread_step", "spread";
        "losses" [steps], mean over workers; "weights:<parameter>".

    Raises:
        FloatingPointError: a loss is not finite; the message has the step.
    """
    workers = VirtualWorkers(
        copy.deepcopy(model).to(images.device),
        plan.k,
        lambda parameters: _sgd(list(parameters), plan),
        plan.schedule,
        total_steps=plan.steps,
        # A batched call of one model costs a CPU half as much again as the model itself.
        engine="loop" if plan.k == 1 else "vmap",
    )
    loss_fn, watch = _loss_fn(plan, images.device), Watch(images, plan, seed)

    def step(index: int) -> float:
        if index == 0:
            watch.measure(workers.mean_model(), 0)
        for group in workers.optimizer.param_groups:
            group["lr"] = plan.lr_at(index)
        x, y = images.batch(
            plan.first_step + index,
            plan.k * plan.local_batch,
            seed=seed,
            augment=plan.augment,
            flips=plan.flips,
            replacement=plan.replacement,
        )
        if index + 1 in watch.at and plan.k > 1:
            watch.add(SPREAD, (index, float(workers.spread().mean())))
        shape = (plan.k, plan.local_batch)
        if workers.step(loss_fn, (x.unflatten(0, shape), y.view(shape))) and index + 1 in watch.at:
            watch.measure(workers.mean_model(), index + 1)
        return float(workers.losses.mean())

    checkpoint = None
    if folder and checkpoint_every:
        checkpoint = Checkpoint(folder / "state.pt", checkpoint_every, {"workers": workers, "watch": watch})
    losses = train(step, plan.steps, text=text, checkpoint=checkpoint)
    workers.finish()
    final = workers.mean_model()
    weights = {f"weights:{name}": p.detach().cpu().numpy() for name, p in final.named_parameters()}
    return {**watch.arrays(), "losses": np.array(losses), **weights}


def with_weights(model: nn.Module, result: Mapping[str, Any]) -> nn.Module:
    """`model` with the weights that a call of `train_images` returned.

    Raises:
        KeyError: a weight is missing in `result`.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(np.asarray(result[f"weights:{name}"])))
    return model


class Watch:
    """What is measured at averages, and when; a part of the checkpoint, so that a resumed run keeps its curves.

    `at`: steps after which a measurement is made: the first average at or after each multiple of `measure_every`, and the last.
    """

    def __init__(self, images: ImageSet, plan: Plan, seed: int) -> None:
        self.images, self.plan, self.seed = images, plan, seed
        averages = [r.start + r.length for r in plan.schedule.rounds(plan.lr_at, plan.steps)]
        self.at = _first_at_or_after(averages, plan.measure_every)
        self.sharp_at = (
            _first_at_or_after(averages, plan.sharpness_every) | {0} if plan.sharpness_every else set()
        )
        self.values: dict[str, list[float]] = {name: [] for name in (*CURVES, *SHARPNESS, *SPREAD)}

    def measure(self, model: nn.Module, step: int) -> None:
        """Accuracy and losses of the average and, where it is due, its sharpness."""
        accuracy, loss = evaluate(model, self.images)
        seen = min(self.plan.train_images or len(self.images.train_y), len(self.images.train_y))
        self.add(CURVES, (step, accuracy, loss, evaluate(model, self.images, train=seen)[1]))
        if step in self.sharp_at:
            self.add(SHARPNESS, (step, *hessian(model, self.images, self.plan, self.seed)))

    def add(self, names: tuple[str, ...], values: tuple[float, ...]) -> None:
        for name, value in zip(names, values, strict=True):
            self.values[name].append(value)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.array(values) for name, values in self.values.items()}

    def state_dict(self) -> dict[str, list[float]]:
        return copy.deepcopy(self.values)

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self.values = copy.deepcopy(dict(state))


@torch.no_grad()
def evaluate(model: nn.Module, images: ImageSet, *, train: int = 0, batch: int = 500) -> tuple[float, float]:
    """Accuracy and mean cross-entropy (nat) on the test images or, with `train`, on the first so many training images.

    Training images are taken without augmentation and with the labels of the set. float32 throughout.
    """
    model.eval()
    correct, total, count = 0, 0.0, train or len(images.test_y)
    for start in range(0, count, batch):
        stop = min(start + batch, count)
        if train:
            x, y = (
                images.pictures(torch.arange(start, stop, device=images.device)),
                images.train_y[start:stop],
            )
        else:
            x, y = images.test_pictures(start, stop), images.test_y[start:stop]
        logits = model(x)
        correct += int((logits.argmax(1) == y).sum())
        total += float(F.cross_entropy(logits, y, reduction="sum"))
    return correct / count, total / count


def hessian(model: nn.Module, images: ImageSet, plan: Plan, seed: int) -> tuple[float, float]:
    """Largest eigenvalue and trace of the Hessian of the mean loss over the first training images of the set."""
    count = min(plan.sharpness_images, len(images.train_y))
    places = torch.arange(count, device=images.device)
    data = (images.pictures(places), images.train_y[places])

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    draw = [seeded(seed, _PROBES, which) for which in range(2)]
    top = sharpness(
        model, loss, data, kind="top", generator=draw[0], tol=1e-2, max_products=plan.sharpness_products
    )
    trace = sharpness(model, loss, data, kind="trace", n_probe=plan.sharpness_probes, generator=draw[1])
    return float(top), float(trace)


def _first_at_or_after(averages: list[int], every: int) -> set[int]:
    found, wanted = set(), every
    for step in averages:
        if step >= wanted or step == averages[-1]:
            found.add(step)
            wanted = (step // every + 1) * every
    return found


def _loss_fn(plan: Plan, device: torch.device) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
    low = plan.precision == "bfloat16" or (plan.precision == "auto" and device.type == "cuda")

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        context = torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()
        with context:
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1])

    return loss


def _sgd(parameters: list[Tensor], plan: Plan) -> torch.optim.Optimizer:
    """SGD over stacked parameters; with the axis of the workers, a matrix or a kernel has three axes or more."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 2], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=plan.lr_at(0), momentum=plan.momentum)
