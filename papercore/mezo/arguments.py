"""What the public functions accept, and what they say to anything else."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor


def check_choice(name: str, value: object, allowed: Sequence[str], why: str = "") -> None:
    """Raises ValueError unless `value` is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{why}")


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """`value` as a finite float, at least `least`, greater than `above`, less than `below`."""
    if isinstance(value, (bool, str)) or value is None:
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}") from None
    bounds = [
        f">= {least:g}" if least is not None else "",
        f"> {above:g}" if above is not None else "",
        f"< {below:g}" if below is not None else "",
    ]
    inside = (
        math.isfinite(number)
        and (least is None or number >= least)
        and (above is None or number > above)
        and (below is None or number < below)
    )
    if not inside:
        raise ValueError(
            f"{name}={number:g} must be finite and {' and '.join(filter(None, bounds)) or 'a number'}"
        )
    return number


def check_positive_integer(name: str, value: object, *, zero: bool = False) -> int:
    """`value` as an int >= 1, or >= 0 with zero=True."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if number < (0 if zero else 1):
        raise ValueError(f"{name}={number} must be an integer >= {0 if zero else 1}")
    return number


def check_betas(betas: object) -> tuple[float, float] | None:
    """(beta1, beta2), each in [0, 1), or None."""
    if betas is None:
        return None
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers (beta1, beta2), got {betas!r}")
    first, second = (check_number(f"betas[{i}]", b, least=0.0, below=1.0) for i, b in enumerate(betas))
    return first, second


def unique_parameters(params: Iterable[Any]) -> list[Any]:
    """Parameters, (name, parameter) pairs or groups, each parameter once within a group."""
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be a list of parameters, (name, parameter) pairs or groups, got a single tensor"
        )
    items = list(params)
    if not items:
        raise ValueError("params is empty: there is no parameter to train")
    if isinstance(items[0], dict):
        groups = []
        for group in items:
            members = group.get("params", [])
            groups.append({**group, "params": _once([members] if isinstance(members, Tensor) else members)})
        return groups
    return _once(items)


def _once(members: Iterable[Any]) -> list[Any]:
    seen: dict[int, Any] = {}
    for member in members:
        parameter = member[1] if isinstance(member, (tuple, list)) else member
        seen.setdefault(id(parameter), member)
    return list(seen.values())


def entries_of(
    groups: Sequence[dict[str, Any]], decays: Callable[[str, Tensor], bool]
) -> list[tuple[str, Tensor, int, bool]]:
    """(name, parameter, group, does it decay) of every parameter of an optimizer's groups, in order."""
    entries = []
    for index, group in enumerate(groups):
        names = group.get("param_names") or [""] * len(group["params"])
        for name, parameter in zip(names, group["params"], strict=True):
            entries.append((name, parameter, index, decays(name, parameter)))
    return entries


def decays_by_name(decay_filter: Callable[[str, Tensor], bool] | str | None) -> Callable[[str, Tensor], bool]:
    """The function (name, parameter) -> does it decay that a `decay_filter` argument stands for."""
    if decay_filter is None:
        return lambda name, parameter: True
    if decay_filter == "no_bias_norm":
        return _no_bias_norm
    if callable(decay_filter):
        return decay_filter
    raise ValueError(
        f"decay_filter={decay_filter!r} is not None, 'no_bias_norm' or a function of (name, parameter)"
    )


def _no_bias_norm(name: str, parameter: Tensor) -> bool:
    """The exemption of the paper's code: biases and LayerNorms, by name; without names, by dimensions."""
    if not name:
        return parameter.dim() > 1
    lower = name.lower()
    return not ("bias" in lower or "layer_norm" in lower or "layernorm" in lower)


def scalar_of(value: object) -> Tensor | float:
    """What a closure returned, as a float or a one-element tensor on its device.

    Raises TypeError or ValueError if it is no real scalar.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"closure must return a scalar loss, got a tensor of shape {tuple(value.shape)}: take its mean or sum"
            )
        if value.is_complex():
            raise TypeError(f"closure must return a real loss, got a tensor of dtype {value.dtype}")
        # On an accelerator the value is read later, together with the others; the closure may reuse its
        # memory until then.
        return float(value.detach()) if value.device.type == "cpu" else value.detach().clone()
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"closure must return the loss as a number or a tensor of one element, got {value!r} of type {type(value).__name__}"
        ) from None
