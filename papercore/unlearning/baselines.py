"""What masking is measured against: SCRUB, NegGrad+, fine-tuning, and retraining without the forget set.

    KL_T(t || s) = T^2 KL( softmax(t / T) || softmax(s / T) ), mean over the batch; t: the model before, frozen
    SCRUB     epoch e:  if e <= msteps, one pass over the forget set that maximises KL_T(t || s);
                        then one pass over the retain set that minimises gamma CE(s, y) + alpha KL_T(t || s)
    NegGrad+  alpha CE(retain) - (1 - alpha) CE(forget), the forget batches cycled
    fine-tune CE on the retain set
    retrain   CE on the retain set, from new weights: what forgetting should look like

(Kurmanji et al., 2023; as baselines: Shah et al., 2023, section 5.) An untuned SCRUB is no fair opponent: it forgets nothing or ruins the
rest, by class and learning rate. `tune` (tuning.py) tries a small grid, chooses by training data alone, and counts its whole cost.

All of them train the student in place, with every parameter that requires a gradient. A DataLoader is read once and
its batch size kept. A model that holds a bottleneck should be
trained with optimizer="sgd": see `warn_unless_local`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from papercore.unlearning.arguments import (
    Examples,
    check_choice,
    check_generator,
    check_integer,
    check_number,
    gather,
)
from papercore.unlearning.bottleneck import KeyValueBottleneck
from papercore.unlearning.flops import Flops, bottleneck_flops, measured_flops
from papercore.unlearning.training import warn_unless_local

__all__ = ["BaselineReport", "distillation", "fine_tune", "neggrad_plus", "retrain", "scrub"]


@dataclass
class BaselineReport:
    """A trained student (`model`), its cost, and one row an epoch.

    flops     forward and backward of what was trained, and of the teacher; the backbone where backbone_flops was given
    history   {"epoch", "forget_loss", "retain_loss"}, means over the epoch's examples in nats, nan where there was no such pass
    """

    model: nn.Module
    method: str
    seconds: float
    flops: Flops
    history: list[dict[str, float]] = field(default_factory=list)


def distillation(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL_T(teacher || student) of logits [B, classes], a scalar in nats times T^2.

    >>> logits = torch.tensor([[1.0, 2.0, 0.0]])
    >>> float(distillation(logits, logits, 4.0)), float(distillation(logits, -logits, 4.0)) > 0
    (0.0, True)
    """
    p = (teacher / temperature).log_softmax(1)
    q = (student / temperature).log_softmax(1)
    return temperature**2 * functional.kl_div(q, p, reduction="batchmean", log_target=True)


def scrub(
    student: nn.Module,
    forget_loader: Examples,
    retain_loader: Examples,
    *,
    epochs: int = 8,
    msteps: int = 2,
    alpha: float = 0.001,
    gamma: float = 1.0,
    temperature: float = 2.0,
    lr: float = 2e-3,
    optimizer: str = "adam",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 128,
    forget_batch_size: int = 500,
    decay_epochs: tuple[int, ...] = (),
    decay: float = 0.1,
    one_class: bool = True,
    backbone_flops: int = 0,
    generator: torch.Generator | None = None,
) -> BaselineReport:
    """SCRUB (Kurmanji et al., 2023, algorithm 1). The student's weights at the call are the teacher.

    Args:
        student: trained in place.
        forget_loader, retain_loader: (features, labels), or DataLoaders of such pairs.
        epochs, msteps: passes, and how many of the first ones begin with a pass that pushes away from the teacher.
        alpha, gamma: weights of the KL term and of the cross-entropy on the retain set.
        temperature: T.
        lr, optimizer ("adam" or "sgd"), momentum, weight_decay: of both passes. lr is multiplied by `decay` after each of decay_epochs.
        batch_size, forget_batch_size: where tensors are given; a DataLoader has its own. Few, large forget steps work best.
        one_class: labels shared by both sets are an error; False for forgetting single examples.
        backbone_flops: operations of a frozen backbone for one input, if it runs in every pass.
        generator: of the order; default: seeded with 0.

    Raises:
        ValueError: an empty set, no labels, a retain set that holds a forget class, or a setting out of range (nothing is trained then).

    alpha = gamma = 0 with msteps = 0 changes nothing.
    """
    check_integer("msteps", msteps, least=0)
    weights = {"alpha": alpha, "gamma": gamma, "weight_decay": weight_decay, "momentum": momentum}
    for name, value in weights.items():
        check_number(name, value, least=0.0)
    check_number("temperature", temperature, above=0.0)
    data = _Data(forget_loader, retain_loader, forget_batch_size, batch_size, one_class, generator)
    run = _Run(student, "scrub", epochs, lr, optimizer, momentum, weight_decay, decay_epochs, decay)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)

    def push(inputs: Tensor, labels: Tensor) -> Tensor:
        return -distillation(_logits(teacher, inputs), student(inputs), temperature)

    def pull(inputs: Tensor, labels: Tensor) -> Tensor:
        logits = student(inputs)
        kept = distillation(_logits(teacher, inputs), logits, temperature) if alpha else logits.new_zeros(())
        return gamma * functional.cross_entropy(logits, labels) + alpha * kept

    for epoch in range(1, epochs + 1):
        forgotten = run.one_pass(data.forget(), push, teacher) if epoch <= msteps else float("nan")
        run.end(epoch, forgotten, run.one_pass(data.retain(), pull, teacher if alpha else None))
    return run.report(data, backbone_flops)


def neggrad_plus(
    student: nn.Module,
    forget_loader: Examples,
    retain_loader: Examples,
    *,
    epochs: int = 5,
    alpha: float = 0.95,
    lr: float = 1e-3,
    optimizer: str = "adam",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 128,
    forget_batch_size: int = 128,
    one_class: bool = True,
    backbone_flops: int = 0,
    generator: torch.Generator | None = None,
) -> BaselineReport:
    """NegGrad+: minimises alpha CE(retain) - (1 - alpha) CE(forget). Arguments and errors as for `scrub`."""
    check_number("alpha", alpha, least=0.0, most=1.0)
    data = _Data(forget_loader, retain_loader, forget_batch_size, batch_size, one_class, generator)
    run = _Run(student, "neggrad_plus", epochs, lr, optimizer, momentum, weight_decay, (), 1.0)
    pushed = _cycled(data)

    def both(inputs: Tensor, labels: Tensor) -> Tensor:
        against, wrong = next(pushed)
        run.seen(against, backward=True)
        loss = alpha * functional.cross_entropy(student(inputs), labels)
        return loss - (1 - alpha) * functional.cross_entropy(student(against), wrong)

    for epoch in range(1, epochs + 1):
        run.end(epoch, float("nan"), run.one_pass(data.retain(), both, None))
    return run.report(data, backbone_flops)


def fine_tune(
    student: nn.Module,
    retain_loader: Examples,
    *,
    epochs: int = 5,
    lr: float = 1e-3,
    optimizer: str = "adam",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 128,
    backbone_flops: int = 0,
    generator: torch.Generator | None = None,
    method: str = "fine_tune",
) -> BaselineReport:
    """Cross-entropy on the retain set, in the hope that the rest fades. Arguments and errors as for `scrub`."""
    data = _Data(None, retain_loader, batch_size, batch_size, False, generator)
    run = _Run(student, method, epochs, lr, optimizer, momentum, weight_decay, (), 1.0)

    def pull(inputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(student(inputs), labels)

    for epoch in range(1, epochs + 1):
        run.end(epoch, float("nan"), run.one_pass(data.retain(), pull, None))
    return run.report(data, backbone_flops)


def retrain(
    make_model: Callable[[], nn.Module], retain_loader: Examples, **settings: object
) -> BaselineReport:
    """A new model (from `make_model`, which seeds itself) trained on the retain set alone; settings as for `fine_tune`.

    A head that keeps the forgotten class's logit may still give it some answers: drop that logit, or set it to -infinity.
    """
    return fine_tune(make_model(), retain_loader, method="retrain", **settings)  # type: ignore[arg-type]


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


class _Data:
    """The two sets, checked, in batches."""

    def __init__(
        self,
        forget: Examples | None,
        retain: Examples,
        forget_size: int,
        retain_size: int,
        one_class: bool,
        generator: torch.Generator | None,
    ) -> None:
        self.draw = check_generator(generator)
        check_integer("batch_size", retain_size)
        check_integer("forget_batch_size", forget_size)
        self.kept = gather("retain", retain, labelled=True)
        self.retain_size, self.forget_size = _loader_size(retain, retain_size), forget_size
        self.gone: tuple[Tensor, Tensor | None] | None = None
        if forget is not None:
            self.gone = gather("forget", forget, labelled=True)
            self.forget_size = _loader_size(forget, forget_size)
            shared = sorted(set(_classes(self.gone)) & set(_classes(self.kept)))
            if one_class and shared:
                raise ValueError(
                    f"retain holds the classes {shared[:5]} of the forget set: take them out, or give one_class=False to forget single examples"
                )

    def retain(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._shuffled(self.kept, self.retain_size)

    def forget(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.gone is not None
        return self._shuffled(self.gone, self.forget_size)

    def _shuffled(self, data: tuple[Tensor, Tensor | None], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, labels = data
        assert labels is not None
        for chosen in torch.randperm(len(inputs), generator=self.draw).to(inputs.device).split(size):
            yield inputs[chosen], labels[chosen.to(labels.device)]


def _loader_size(examples: Examples, default: int) -> int:
    return getattr(examples, "batch_size", None) or default


def _classes(data: tuple[Tensor, Tensor | None]) -> list[int]:
    return [] if data[1] is None else data[1].unique().tolist()


def _cycled(data: _Data) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from data.forget()


class _Run:
    """One student in training: the optimiser, the accounts and the history."""

    def __init__(
        self,
        student: nn.Module,
        method: str,
        epochs: int,
        lr: float,
        optimizer: str,
        momentum: float,
        weight_decay: float,
        decay_epochs: tuple[int, ...],
        decay: float,
    ) -> None:
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
        check_integer("epochs", epochs, least=0)
        check_number("lr", lr, least=0.0)
        check_choice("optimizer", optimizer, ("adam", "sgd"))
        params = [p for p in student.parameters() if p.requires_grad]
        if not params:
            raise ValueError("student has no parameter that requires a gradient: nothing could be trained")
        self.optimizer: torch.optim.Optimizer
        if optimizer == "adam":
            self.optimizer = torch.optim.Adam(params, lr=lr, weight_decay=weight_decay)
        else:
            self.optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        warn_unless_local(self.optimizer, student)
        self.student, self.method = student, method
        self.decay_epochs, self.decay = decay_epochs, decay
        self.forward_passes = self.backward_passes = self.inputs_seen = 0
        self.history: list[dict[str, float]] = []
        self.was_training = student.training
        self.start = time.perf_counter()
        student.train()

    def seen(self, inputs: Tensor, *, backward: bool, teacher: bool = False) -> None:
        self.forward_passes += len(inputs) * (2 if teacher else 1)
        self.backward_passes += len(inputs) * backward
        self.inputs_seen += len(inputs)

    def one_pass(
        self,
        batches: Iterator[tuple[Tensor, Tensor]],
        loss_of: Callable[[Tensor, Tensor], Tensor],
        teacher: nn.Module | None,
    ) -> float:
        total, count = 0.0, 0
        for inputs, labels in batches:
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_of(inputs, labels)
            loss.backward()
            self.optimizer.step()
            self.seen(inputs, backward=True, teacher=teacher is not None)
            total, count = total + float(loss.detach()) * len(inputs), count + len(inputs)
        return total / max(count, 1)

    def end(self, epoch: int, forget_loss: float, retain_loss: float) -> None:
        self.history.append({"epoch": epoch, "forget_loss": forget_loss, "retain_loss": retain_loss})
        if epoch in self.decay_epochs:
            for group in self.optimizer.param_groups:
                group["lr"] *= self.decay

    def report(self, data: _Data, backbone_flops: int) -> BaselineReport:
        seconds = time.perf_counter() - self.start
        self.student.train(self.was_training)
        self.optimizer.zero_grad(set_to_none=True)
        forward, backward = _costs(self.student, data.kept[0][:1])
        flops = Flops(
            forward=self.forward_passes * forward,
            backward=self.backward_passes * backward,
            backbone=self.inputs_seen * check_integer("backbone_flops", backbone_flops, least=0),
        )
        return BaselineReport(self.student, self.method, seconds, flops, self.history)


def _costs(model: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Operations of a forward and of a backward pass for one input."""
    if isinstance(model, KeyValueBottleneck):
        return bottleneck_flops(
            model
        ), model.num_codebooks * model.dim_value  # only fetched values have gradients
    was_training = model.training
    model.eval()
    try:
        forward = measured_flops(model, inputs)
    finally:
        model.train(was_training)
    # Twice the forward is the rule for hidden layers; a head on frozen features needs no gradient of its inputs.
    return forward, forward * (1 if isinstance(model, nn.Linear) else 2)
