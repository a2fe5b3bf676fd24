"""Which base a task vector, a mask and a graft belong to: a 64-bit checksum of each tensor.

A graft on another base does damage without an error message, so every object carries the shape, the dtype and
the checksum of the base's tensors. The checksum is one pass over the bits, the same on every device; a model
that was checked once is checked again only where PyTorch's version counter says that a tensor was written to
(writes through `.data` are not counted).

Glossary
    bits_i    the i-th entry's bits as an integer
    w_j       odd 64-bit weight of position j in a chunk, from splitmix64
    checksum  of a chunk: sum_j fold((bits_j + 1) w_j); of chunks: h <- h P + chunk; all modulo 2^64
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor, nn

from papercore.grafting.entries import find_parameter
from papercore.grafting.errors import GraftMismatchError

_CHUNK = 1 << 18
_WORD = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_weights: dict[torch.device, Tensor] = {}


@dataclass(frozen=True)
class Print:
    """What one tensor of the base looked like."""

    shape: tuple[int, ...]
    dtype: str
    checksum: int


Base = dict[str, Print]


def _signed(value: int) -> int:
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value


def _position_weights(device: torch.device) -> Tensor:
    if device not in _weights:
        # splitmix64 over 1 .. chunk, in Python's own integers once per process
        state, made = 0, []
        for _ in range(1024):
            state = (state + _MULTIPLIER) & _WORD
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
            made.append(_signed((z ^ (z >> 31)) | 1))
        first = torch.tensor(made, dtype=torch.int64)
        # w_(1024 a + b) = u_a v_b with u, v odd: products of odd numbers are odd, so that no single change is lost
        second = torch.tensor(made[: _CHUNK // 1024], dtype=torch.int64) * 2 + 1
        _weights[device] = (second[:, None] * first[None, :]).reshape(-1).to(device)
    return _weights[device]


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """64-bit checksum of a tensor's bits in row-major order, the same on every device."""
    weights = _position_weights(tensor.device)
    flat = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    parts = []
    for chunk in flat.split(_CHUNK):
        product = chunk.to(torch.int64, copy=True).add_(1).mul_(weights[: len(chunk)])
        product ^= product >> 29  # so that two changed signs of float64 do not cancel
        parts.append(product.sum())
    total = flat.numel()
    for part in torch.stack(parts).tolist() if parts else ():
        total = (total * _MULTIPLIER + part) & _WORD
    return total


def fingerprint(tensors: Mapping[str, Tensor]) -> Base:
    """Shape, dtype and checksum of each tensor."""
    return {
        name: Print(tuple(t.shape), str(t.dtype).removeprefix("torch."), checksum(t))
        for name, t in tensors.items()
    }


def digest(base: Base) -> str:
    """16 hexadecimal digits that stand for a whole base."""
    rows = [f"{name} {p.shape} {p.dtype} {p.checksum:016x}" for name, p in sorted(base.items())]
    return sha256("\n".join(rows).encode()).hexdigest()[:16]


def combine(bases: Iterable[Base | None], what: str) -> Base | None:
    """The bases as one, None if one is unknown; GraftMismatchError where they disagree about a tensor."""
    joined: Base = {}
    unknown = False
    for base in bases:
        if base is None:
            unknown = True
            continue
        for name, entry in base.items():
            if joined.setdefault(name, entry) != entry:
                raise GraftMismatchError(f"the {what} belong to different bases: their {name} differs")
    return None if unknown else joined


# ---- checking a model, once for as long as nobody writes to it


_Seen = dict[str, tuple[int, int, int, int]]  # name -> (identity, address, version, checksum)
_checked: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()


def _state(parameter: Tensor) -> tuple[int, int, int] | None:
    if parameter.is_inference():
        return None  # such tensors count no versions
    return id(parameter), parameter.data_ptr(), parameter._version


def known_checksum(model: nn.Module, name: str, parameter: Tensor) -> int | None:
    """The checksum of the base under `model`'s parameter if nobody wrote to it since it was taken."""
    seen = _checked.get(model, {}).get(name)
    return seen[3] if seen is not None and seen[:3] == _state(parameter) else None


def remember(model: nn.Module, name: str, parameter: Tensor, value: int) -> None:
    """Notes the checksum of the base under the parameter as it stands now."""
    state = _state(parameter)
    if state is not None:
        _checked.setdefault(model, {})[name] = (*state, value)


def forget(model: nn.Module, name: str) -> None:
    """The parameter's content is no longer the base's."""
    _checked.get(model, {}).pop(name, None)


def check_base(model: nn.Module, base: Base, what: str, *, cached: bool = True) -> None:
    """GraftMismatchError unless the model's parameters are those of `base`: the first five that differ.

    cached: trust checksums of tensors that nobody wrote to since; False reads all weights as they stand.
    """
    wrong = []
    for name, entry in base.items():
        parameter = find_parameter(model, name)
        if parameter is None:
            wrong.append(f"{name}: the model has no such parameter")
            continue
        shape, dtype = tuple(parameter.shape), str(parameter.dtype).removeprefix("torch.")
        if shape != entry.shape:
            wrong.append(f"{name}: shape {shape} instead of {entry.shape}")
        elif dtype != entry.dtype:
            wrong.append(f"{name}: dtype {dtype} instead of {entry.dtype}")
        else:
            value = known_checksum(model, name, parameter) if cached else None
            if value is None:
                value = checksum(parameter)
                if cached:
                    remember(model, name, parameter, value)
            if value != entry.checksum:
                wrong.append(f"{name}: other values (checksum {value:016x} instead of {entry.checksum:016x})")
    if wrong:
        raise GraftMismatchError(
            f"{what} was made for another base, {len(wrong)} of {len(base)} tensors differ: "
            + "; ".join(wrong[:5])
        )
