"""What the public functions accept, and what they say to anything else."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

Examples = Tensor | Sequence[Tensor] | Iterable  # features, (features, labels), or batches of either


def check_choice(name: str, value: object, allowed: Sequence[str]) -> str:
    """`value` if it is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
    return value


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
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> float:
    """`value` as a finite float within the bounds."""
    if isinstance(value, (bool, str)) or value is None:
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got a {type(value).__name__}") from None
    bounds = [
        f"> {above:g}" if above is not None else "",
        f">= {least:g}" if least is not None else "",
        f"<= {most:g}" if most is not None else "",
    ]
    inside = (
        math.isfinite(number)
        and (above is None or number > above)
        and (least is None or number >= least)
        and (most is None or number <= most)
    )
    if not inside:
        raise ValueError(f"{name}={number:g} must be finite {' and '.join(filter(None, bounds))}".rstrip())
    return number


def check_generator(generator: object) -> torch.Generator:
    """A generator; None gives one seeded with 0, an integer is a seed."""
    if isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, int) and not isinstance(generator, bool):
        return torch.Generator().manual_seed(generator)
    if generator is None:
        return torch.Generator().manual_seed(0)
    raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def check_pairs(name: str, pairs: object, shape: tuple[int, int]) -> Tensor:
    """BoolTensor [C, K] that marks key-value pairs."""
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.bool:
        kind = pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__
        raise TypeError(f"{name} must be a BoolTensor that marks pairs, got {kind}")
    if tuple(pairs.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(pairs.shape)}, expected [C, K] = {list(shape)}")
    return pairs


def check_features(name: str, features: object, dim: int) -> Tensor:
    """Floating-point [B, dim] or [B, T, dim], all finite."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} must be a tensor of features, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"{name} must be floating-point features, got {features.dtype}")
    if features.dim() not in (2, 3):
        raise ValueError(
            f"{name} has the shape {tuple(features.shape)}, expected [B, {dim}] or, with T tokens, [B, T, {dim}]"
        )
    if features.shape[-1] != dim:
        raise ValueError(
            f"{name} has {features.shape[-1]} features, but the bottleneck was made for dim={dim}: give the same backbone's features"
        )
    if features.dim() == 3 and features.shape[1] == 0:
        raise ValueError(f"{name} has the shape {tuple(features.shape)}: no tokens")
    # A NaN would win every argmax and silently fetch pair 0.
    if not bool(torch.isfinite(features).all()):
        bad = (~torch.isfinite(features)).flatten(1).any(1).nonzero().flatten()
        raise ValueError(
            f"{name}: {len(bad)} of {len(features)} examples hold NaN or infinity (the first is {int(bad[0])})"
        )
    return features


def check_labels(name: str, labels: object, count: int, classes: int | None = None) -> Tensor:
    """LongTensor [count] of class numbers; below `classes` where that is known."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be a LongTensor of class numbers, got {kind}")
    if labels.shape != (count,):
        raise ValueError(
            f"{name} has the shape {tuple(labels.shape)}, expected [{count}], one label for each example"
        )
    if count and int(labels.min()) < 0:
        raise ValueError(f"{name} holds the class {int(labels.min())}: classes are numbered from 0")
    if classes is not None and count and int(labels.max()) >= classes:
        raise ValueError(
            f"{name} holds the class {int(labels.max())}, but there are {classes} outputs (dim_value, when the decoder has no "
            f"parameters): use dim_value >= {int(labels.max()) + 1} or a decoder"
        )
    return labels.long()


def batches(
    name: str, examples: Examples, batch_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(inputs, labels or None) from a tensor, a pair of tensors, or an iterable of either."""
    if isinstance(examples, Tensor):
        yield from _slices(name, examples, None, batch_size)
    elif _is_pair(examples):
        inputs, labels = examples
        yield from _slices(name, inputs, check_labels(f"{name}'s labels", labels, len(inputs)), batch_size)
    elif isinstance(examples, Iterable) and not isinstance(examples, (str, bytes, dict)):
        for batch in examples:
            if isinstance(batch, Tensor):
                if batch.dim() < 2:
                    raise ValueError(
                        f"{name} gave a tensor of shape {tuple(batch.shape)} and type {batch.dtype}: labels must be a LongTensor, features [B, dim]"
                    )
                yield batch, None
            elif _is_pair(batch):
                yield batch[0], check_labels(f"{name}'s labels", batch[1], len(batch[0]))
            else:
                raise TypeError(
                    f"{name} gave a batch of type {type(batch).__name__}; expected features, or a pair (features, labels)"
                )
    else:
        raise TypeError(
            f"{name} must be features, a pair (features, labels), or a DataLoader of such batches, got {type(examples).__name__}"
        )


def gather(name: str, examples: Examples, *, labelled: bool = False) -> tuple[Tensor, Tensor | None]:
    """All of `examples` as one tensor of inputs and one of labels; ValueError where there are none."""
    parts = list(batches(name, examples))
    if not parts or sum(len(inputs) for inputs, _ in parts) == 0:
        raise ValueError(f"{name} is empty: expected at least one example")
    known = [labels is not None for _, labels in parts]
    if any(known) != all(known):
        raise ValueError(f"{name}: some batches have labels and some have none")
    if labelled and not all(known):
        raise ValueError(
            f"{name} needs labels: give a pair (features, labels), or a DataLoader of such pairs"
        )
    inputs = parts[0][0] if len(parts) == 1 else torch.cat([inputs for inputs, _ in parts])
    if not all(known):
        return inputs, None
    return inputs, torch.cat([labels for _, labels in parts if labels is not None])


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(part, Tensor) for part in value)
    ) and not (value[0].is_floating_point() and value[1].is_floating_point())


def _slices(
    name: str, inputs: Tensor, labels: Tensor | None, batch_size: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    if inputs.dim() < 2:
        raise ValueError(f"{name} has the shape {tuple(inputs.shape)}, expected a batch of examples")
    size = len(inputs) if batch_size is None else batch_size
    for start in range(0, len(inputs), max(size, 1)):
        yield inputs[start : start + size], None if labels is None else labels[start : start + size]
