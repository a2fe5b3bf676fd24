"""Fine-tuning of the layers on a few documents, and what a model says of others.

Glossary
    logits      [n, classes], the model's scores of the task's label words alone
    delta       fine-tuned minus pre-trained weights, of the layers
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.experiments.grafting.encoder import graftable
from papercore.experiments.grafting.world import Batch


def label_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[n, classes] scores of the label words; -inf where a row has fewer label words than the widest."""
    logits = model(batch.ids)
    if batch.labels.ndim == 1:
        return logits[:, batch.labels]
    return logits.gather(1, batch.labels.clamp(min=0)).masked_fill(batch.labels < 0, -math.inf)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the label words."""
    return F.cross_entropy(label_logits(model, batch), batch.targets)


@torch.no_grad()
def probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """[n, classes] probabilities of the label words."""
    return label_logits(model, batch).softmax(1)


def accuracy(p: Tensor, targets: Tensor) -> float:
    return float((p.argmax(1) == targets).double().mean())


def fine_tune(
    start: nn.Module,
    batch: Batch,
    *,
    optimizer: str,
    lr: float,
    steps: int,
    size: int,
    seed: int,
    frozen: dict[str, Tensor] | None = None,
    check: Callable[[nn.Module, int], bool] | None = None,
) -> nn.Module:
    """A fine-tuned copy of `start`: the layers alone, minibatches of `size` without replacement, a linearly falling rate.

    Args:
        optimizer: "sgd" or "adamw".
        frozen: by parameter name, True where an entry must keep its value (masks as bool tensors).
        check: called with the model after every 20th step; True ends the training.

    Raises:
        ValueError: an unknown optimiser.
        FloatingPointError: the loss is not finite, with the step at which it came.
    """
    if optimizer not in ("sgd", "adamw"):
        raise ValueError(f"optimizer is {optimizer!r}: expected sgd or adamw.")
    model = copy.deepcopy(start)
    moved = {name: p for name, p in model.named_parameters() if graftable(name)}
    for name, p in model.named_parameters():
        p.requires_grad_(name in moved)
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    rule = make(moved.values(), lr=lr, weight_decay=0.0)
    g = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    held = {name: (mask, moved[name].detach()[mask].clone()) for name, mask in (frozen or {}).items()}
    for step in range(steps):
        if len(order) < size:
            order = torch.randperm(len(batch), generator=g)
        index, order = order[:size], order[size:]
        value = loss(model, batch.take(index))
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss is {float(value.detach())} at step {step} of fine-tuning.")
        rule.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(moved.values()), 1.0)
        for group in rule.param_groups:
            group["lr"] = lr * (1 - step / steps)
        rule.step()
        with torch.no_grad():
            for name, (mask, kept) in held.items():
                moved[name][mask] = kept
        if check is not None and step % 20 == 19 and check(model, step + 1):
            break
    for p in model.parameters():
        p.requires_grad_(True)
        p.grad = None
    return model.eval()
