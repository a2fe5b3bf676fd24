"""Training the values: cross-entropy and plain SGD on cached look-ups, with the gradient in closed form.

With logits f = (1/C) sum_c v_c and softmax p, the gradient of a batch's mean loss for a fetched value is

    dL / dv_cj = (1 / (B C)) sum over the examples b that fetch (c, j) of (p_b - y_b)

and zero elsewhere. So a step reads and writes B x C rows and never touches the table's other rows: no autograd, no dense
gradient, no search. Momentum, weight decay and Adam would move rows that nobody fetched; that would break the link between an
example and its pairs on which forgetting by masks rests. `warn_unless_local` says so.

The mean over C divides every gradient, hence the large learning rates. The papers' recipe is lr=0.3, clip=1.0, batch 256, label
smoothing 0.1 and hundreds to thousands of epochs; lr near C converges in tens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from papercore.unlearning.arguments import (
    Examples,
    check_choice,
    check_generator,
    check_integer,
    check_labels,
    check_number,
)
from papercore.unlearning.bottleneck import KeyValueBottleneck
from papercore.unlearning.lookups import LookupLog, look_up

__all__ = ["ValueTraining", "train_values", "warn_unless_local"]


@dataclass
class ValueTraining:
    """What `train_values` did: mean loss of every epoch in nats, and the look-ups from which forgetting is free."""

    log: LookupLog
    losses: list[float] = field(default_factory=list)


@torch.no_grad()
def train_values(
    model: KeyValueBottleneck,
    examples: Examples | LookupLog,
    *,
    epochs: int = 20,
    lr: float | None = None,
    batch_size: int = 256,
    label_smoothing: float = 0.1,
    clip: float | None = None,
    schedule: str = "constant",
    generator: torch.Generator | None = None,
) -> ValueTraining:
    """Trains `model.values` in place, without parameters in between: dim_value is the number of classes.

    Args:
        model: with its keys in place. Under a mask, the pairs that are fetched under it are trained.
        examples: (features, labels), a DataLoader of such pairs, or a LookupLog with labels.
        lr: learning rate; default: num_codebooks.
        clip: largest norm of a batch's gradient; None: no clipping.
        schedule: "constant", or "linear": down to 0.
        generator: of the order; default: seeded with 0.

    Returns:
        ValueTraining. Its log holds each example's unmasked look-ups; so `log.of_class(3)` can be forgotten without a forward pass.

    Raises:
        ValueError: no labels, a label >= dim_value, no examples, or a log of another bottleneck.
        RuntimeError: before `init_keys`.
    """
    check_integer("epochs", epochs, least=0)
    check_integer("batch_size", batch_size)
    check_choice("schedule", schedule, ("constant", "linear"))
    rate = float(model.num_codebooks) if lr is None else check_number("lr", lr, least=0.0)
    smoothing = check_number("label_smoothing", label_smoothing, least=0.0, most=1.0)
    limit = None if clip is None else check_number("clip", clip, above=0.0)
    draw = check_generator(generator)
    log = examples if isinstance(examples, LookupLog) else look_up(model, examples)
    if log.labels is None:
        raise ValueError(
            "examples needs labels: give a pair (features, labels), or a DataLoader of such pairs"
        )
    labels = check_labels("labels", log.labels, len(log), model.dim_value).to(model.values.device)
    indices = _under_mask(model, log, examples).to(model.values.device)
    result = ValueTraining(log)
    steps = epochs * -(-len(log) // batch_size)
    step = 0
    for _ in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(log), generator=draw).to(indices.device).split(batch_size):
            now = rate if schedule == "constant" else rate * (1 - step / steps)
            total += _step(model, indices[chosen], labels[chosen], now, smoothing, limit) * len(chosen)
            step += 1
        result.losses.append(total / len(log))
    return result


def _under_mask(model: KeyValueBottleneck, log: LookupLog, examples: Examples | LookupLog) -> Tensor:
    """[N, C] or [N, T, C] flat row numbers of the pairs that the model fetches now."""
    if log.num_pairs != model.num_pairs or log.indices.shape[-1] != model.num_codebooks:
        raise ValueError(
            f"the log has {log.indices.shape[-1]} codebooks of {log.num_pairs} pairs, the model {model.num_codebooks} of {model.num_pairs}: "
            "look the examples up again with this model"
        )
    indices = log.indices.long()
    books = torch.arange(model.num_codebooks)
    if bool(model.mask.any()):
        if isinstance(examples, LookupLog):
            if bool(model.mask.cpu()[books.expand_as(indices), indices.clamp(min=0)].any()):
                raise ValueError(
                    "the log holds look-ups of pairs that are masked now, and those examples go elsewhere: give the features instead"
                )
        else:
            from papercore.unlearning.arguments import batches

            found = [
                model.lookup(x.to(model.keys.device)).cpu() for x, _ in batches("examples", examples, 1024)
            ]
            indices = torch.cat(found)
    if bool((indices < 0).any()):
        raise ValueError(
            "a codebook abstains: compact() the model, or unmask some of its pairs, before training"
        )
    return indices + books * model.num_pairs


def _step(
    model: KeyValueBottleneck, rows: Tensor, labels: Tensor, lr: float, smoothing: float, clip: float | None
) -> float:
    """One step of SGD; the mean loss before it."""
    table = model.values.data.flatten(0, 1)
    flat = rows.flatten(1)
    logits = functional.embedding_bag(flat, table, mode="mean")
    log_p = logits.log_softmax(-1)
    classes = logits.shape[-1]
    target = torch.full_like(logits, smoothing / classes)
    target.scatter_add_(1, labels.unsqueeze(1), torch.full_like(target[:, :1], 1 - smoothing))
    loss = -float((target * log_p).sum(-1).mean())
    grad = (log_p.exp() - target) / (len(labels) * flat.shape[1])  # of every value that the example fetched
    if clip is not None:
        lr *= min(1.0, clip / (_norm(flat, grad) + 1e-6))
    spread = (grad * -lr).unsqueeze(1).expand(-1, flat.shape[1], -1).reshape(-1, classes)
    table.index_add_(0, flat.flatten(), spread)
    return loss


def _norm(flat: Tensor, grad: Tensor) -> float:
    """Norm of the gradient of the table, from the rows that were fetched alone."""
    unique, where = flat.flatten().unique(return_inverse=True)
    rows = grad.new_zeros(len(unique), grad.shape[1])
    rows.index_add_(0, where, grad.unsqueeze(1).expand(-1, flat.shape[1], -1).reshape(-1, grad.shape[1]))
    return float(rows.norm())


def warn_unless_local(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Warns, and returns False, if an optimiser would move values that no example of the batch fetched."""
    values = {id(part.values) for part in model.modules() if isinstance(part, KeyValueBottleneck)}
    for group in optimizer.param_groups:
        if not any(id(p) in values for p in group["params"]):
            continue
        reasons = [name for name in ("momentum", "weight_decay") if group.get(name)]
        if "betas" in group:
            reasons.append(type(optimizer).__name__)
        if reasons:
            warnings.warn(
                f"{' and '.join(reasons)} will move values that the batch did not fetch: masking an example's pairs then no longer "
                "covers what it changed. Use torch.optim.SGD without momentum and weight decay for a bottleneck's values.",
                stacklevel=2,
            )
            return False
    return True
