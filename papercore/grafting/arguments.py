"""What the public functions accept, and what they say to anything else."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def check_integer(name: str, value: object, *, least: int = 1) -> int:
    """`value` as an int of at least `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{name}={number} must be an integer >= {least}")
    return number


def check_number(
    name: str, value: object, *, above: float | None = None, least: float | None = None
) -> float:
    """`value` as a finite float, greater than `above` or at least `least`."""
    if isinstance(value, (bool, str)) or value is None:
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got a {type(value).__name__}") from None
    if not math.isfinite(number) or (above is not None and not number > above):
        raise ValueError(
            f"{name}={number:g} must be finite" + (f" and > {above:g}" if above is not None else "")
        )
    if least is not None and number < least:
        raise ValueError(f"{name}={number:g} must be >= {least:g}")
    return number


def check_module(name: str, model: object) -> nn.Module:
    """`model` if it is an nn.Module, else TypeError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(model).__name__}")
    return model


def entries_asked_for(k: object, sparsity: object, total: int, moved: int | None = None) -> int:
    """The number of entries from `k` or from `sparsity` (a share of `total`, not a percentage).

    ValueError if both or none are given, or if they select nothing; more entries than moved: a warning, and
    as many as moved.
    """
    if (k is None) == (sparsity is None):
        raise ValueError(
            "give either k (a number of entries) or sparsity (a share of the entries), not both or none"
        )
    if k is not None:
        count = check_integer("k", k)
        if count > total:
            raise ValueError(f"k={count:,} is more than the N={total:,} entries that can be grafted")
    else:
        count = share_of(sparsity, total)
    if moved is not None and count > moved:
        warnings.warn(
            f"{count:,} entries were asked for, but fine-tuning moved {moved:,} of N={total:,}: the mask has {moved:,}",
            stacklevel=3,
        )
        count = moved
    return count


def share_of(sparsity: object, total: int) -> int:
    """floor(sparsity * total), at least 1: ValueError for a share outside (0, 1] or one that selects nothing."""
    share = check_number("sparsity", sparsity)
    if not 0 < share <= 1:
        raise ValueError(
            f"sparsity={share:g} must be a share in (0, 1], not a percentage: 0.01 % is sparsity=1e-4"
        )
    count = int(round(share * total, 6))  # 0.29 * 100 is 28.999999999999996
    if count < 1:
        raise ValueError(f"sparsity {share:g} of N={total:,} selects 0 parameters; use k=")
    return count


def check_generator(generator: object, *, needed: bool = False) -> torch.Generator:
    """A generator; None gives one seeded with 0, unless it is needed. An integer is a seed."""
    if isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, int) and not isinstance(generator, bool):
        return torch.Generator().manual_seed(generator)
    if generator is None and not needed:
        return torch.Generator().manual_seed(0)
    raise TypeError(
        f"generator must be a torch.Generator (or an integer seed), got {type(generator).__name__}"
    )


def check_batches(data: object, *, again: bool) -> Iterable[Any]:
    """`data` if it yields batches; TypeError for one batch, and for an iterator if it is read more than once."""
    one_batch = isinstance(data, (Tensor, Mapping, str)) or (
        isinstance(data, tuple) and bool(data) and all(isinstance(part, Tensor) for part in data)
    )
    if one_batch:
        raise TypeError(
            f"data is one {type(data).__name__}, which may be a single batch: give a list of batches, [batch], or a DataLoader"
        )
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a list of batches or a DataLoader, got {type(data).__name__}")
    if again and iter(data) is data:
        raise TypeError(
            "data is an iterator, which is empty after one step: give a list of batches or a DataLoader"
        )
    return data


def check_loss(loss: object, *, where: str) -> Tensor:
    """The loss as a scalar tensor with a graph: TypeError or ValueError that says where it came from."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a scalar tensor, got {type(loss).__name__} at {where}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)} at {where}")
    return loss.reshape(())
