"""Tensors by name, and their entries by flat index: what every other file reads and writes weights with.

Glossary
    name      a parameter's name in `named_parameters()`; tied parameters appear once, under their first name
    index     row-major position of an entry in its tensor, int64 [k], ascending, whatever the strides are
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def named_tensors(source: object, name: str) -> dict[str, Tensor]:
    """Parameters of a module, or the tensors of a state dict, each memory once.

    name: what the source is called in a message. Raises TypeError for anything else.
    """
    if isinstance(source, nn.Module):
        return {key: p.detach() for key, p in source.named_parameters()}
    if not isinstance(source, Mapping):
        raise TypeError(f"{name} must be an nn.Module or a state dict, got {type(source).__name__}")
    found: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for key, value in source.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"{name} must map names to tensors, got {key!r}: {type(value).__name__}")
        if value.numel() and value.layout is torch.strided and not value.is_meta:
            # A state dict names a tied tensor twice; fine-tuning moves it once.
            place = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            if place in seen:
                continue
            seen.add(place)
        found[key] = value.detach()
    return found


def check_plain(tensor: Tensor, name: str) -> None:
    """NotImplementedError for quantised, sharded, sparse or unmaterialised weights, with what to do instead."""
    if hasattr(tensor, "__tensor_flatten__") or type(tensor).__name__ == "DTensor":
        raise NotImplementedError(
            f"{name} is a {type(tensor).__name__}: sharded and wrapped weights are not grafted; gather the full state dict "
            "first (for example with torch.distributed.checkpoint.state_dict.get_model_state_dict)"
        )
    if tensor.is_meta:
        raise NotImplementedError(f"{name} is on the meta device and holds no numbers: load the model first")
    if tensor.layout is not torch.strided:
        raise NotImplementedError(f"{name} has layout {tensor.layout}: only dense tensors are grafted")
    if tensor.is_quantized or tensor.dtype not in FLOATS:
        raise NotImplementedError(
            f"{name} has dtype {tensor.dtype}: quantised weights are not grafted; load the model in "
            "float32, bfloat16 or float16, or leave these tensors out with select="
        )


def read(tensor: Tensor, index: Tensor) -> Tensor:
    """Entries at flat indices, a copy [k]."""
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, index)
    return tensor[torch.unravel_index(index, tensor.shape)]


@torch.no_grad()
def write(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Sets entries at flat indices in place, cast to the tensor's dtype."""
    put(tensor, index, values)


def put(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """`write` for callers that have switched gradients off themselves."""
    values = values.to(tensor.dtype)
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, index, values)
    else:
        tensor.index_put_(torch.unravel_index(index, tensor.shape), values)


def find_parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of this name, by walking down to it: a graft of few entries must not list all parameters."""
    *path, last = name.split(".")
    module: nn.Module | None = model
    for part in path:
        module = None if module is None else module._modules.get(part)
    return None if module is None else module._parameters.get(last)


def parameters_named(model: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """The model's parameters of these names; KeyError lists those that it lacks."""
    found: dict[str, nn.Parameter] = {}
    missing = []
    for name in names:
        parameter = find_parameter(model, name)
        if parameter is None:
            missing.append(name)
        else:
            found[name] = parameter
    if missing:
        raise KeyError(", ".join(missing[:5]))
    return found
