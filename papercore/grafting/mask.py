"""A mask as the sorted flat indices of its entries: kilobytes where a dense mask takes N bytes.

Glossary
    gamma    the mask in {0, 1}^N; here index[name], int64 [k_name], ascending
    k        number of ones, .count
    N        number of entries of all tensors, .total
    s        density k / N, .sparsity
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from math import prod

import torch
from torch import Tensor

from papercore.grafting.fingerprint import Base, combine


class Mask(Mapping[str, Tensor]):
    """Chosen entries of named tensors. mask[name] is a bool tensor of the tensor's shape, made on demand.

    A mapping like a state dict of bool tensors, stored as sorted indices: 8 bytes a chosen entry. `|`, `&`, `-`
    and `^` combine masks, `==` compares their entries. Masks made from a task vector carry the base's
    fingerprint in .base. Use `Mask.of` for a dict of bool tensors made elsewhere.

    >>> import torch
    >>> mask = Mask.of({"weight": torch.tensor([[True, False], [False, True]])})
    >>> mask.count, mask.total, mask.index["weight"].tolist()
    (2, 4, [0, 3])
    >>> (mask & mask) == mask, (mask - mask).count
    (True, 0)
    """

    def __init__(
        self,
        index: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        base: Base | None = None,
    ) -> None:
        self.index = dict(index)
        self.shapes = dict(shapes)
        self.base = base
        if list(self.index) != list(self.shapes):
            raise ValueError("index and shapes must have the same names in the same order")

    @classmethod
    def of(cls, mask: object) -> Mask:
        """`mask` itself, or a dict of bool tensors (0/1 numbers will do) as a Mask without a known base."""
        if isinstance(mask, Mask):
            return mask
        if not isinstance(mask, Mapping):
            raise TypeError(f"a mask must be a Mask or a dict of bool tensors, got {type(mask).__name__}")
        index, shapes = {}, {}
        for name, tensor in mask.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"mask[{name!r}] must be a bool tensor, got {type(tensor).__name__}")
            if tensor.dtype != torch.bool and not bool(((tensor == 0) | (tensor == 1)).all()):
                raise ValueError(
                    f"mask[{name!r}] has values other than 0 and 1: round a soft mask first (mask > 0.5)"
                )
            index[name] = tensor.reshape(-1).nonzero().squeeze(1)
            shapes[name] = tuple(tensor.shape)
        return cls(index, shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.index:
            raise KeyError(f"{name!r} is not among the {len(self)} tensors of this mask")
        index = self.index[name]
        dense = torch.zeros(prod(self.shapes[name]), dtype=torch.bool, device=index.device)
        dense[index] = True
        return dense.view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def count(self) -> int:
        """k, the number of chosen entries."""
        return sum(len(i) for i in self.index.values())

    @property
    def total(self) -> int:
        """N, the number of entries that could be chosen."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def sparsity(self) -> float:
        """s = k / N, a share between 0 and 1 (the paper's word; a small number is a sparse mask)."""
        return self.count / self.total

    def counts(self) -> dict[str, int]:
        """Chosen entries of each tensor."""
        return {name: len(i) for name, i in self.index.items()}

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its indices on another device."""
        return Mask({n: i.to(device) for n, i in self.index.items()}, self.shapes, base=self.base)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        other = Mask.of(other)
        if self.shapes != other.shapes:
            return False
        return all(torch.equal(i, other.index[n].to(i.device)) for n, i in self.index.items())

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: object) -> Mask:
        return _combined(self, other, lambda a, b: torch.cat([a, b]).unique())

    def __and__(self, other: object) -> Mask:
        return _combined(self, other, lambda a, b: a[torch.isin(a, b, assume_unique=True)])

    def __sub__(self, other: object) -> Mask:
        return _combined(self, other, lambda a, b: a[torch.isin(a, b, assume_unique=True, invert=True)])

    def __xor__(self, other: object) -> Mask:
        return (self | other) - (self & other)

    def __repr__(self) -> str:
        return f"Mask({self.count:,} of N={self.total:,} entries, {100 * self.sparsity:.3g} %, in {len(self)} tensors)"


def _combined(first: Mask, second: object, rule: Callable[[Tensor, Tensor], Tensor]) -> Mask:
    if not isinstance(second, Mapping):
        return NotImplemented
    other = Mask.of(second)
    index: dict[str, Tensor] = {}
    shapes = {**first.shapes, **other.shapes}
    for name, shape in shapes.items():
        if name in first.shapes and first.shapes[name] != shape:
            raise ValueError(f"the masks differ in shape at {name}: {first.shapes[name]} and {shape}")
        a, b = first.index.get(name), other.index.get(name)
        have = a if a is not None else b
        assert have is not None
        none = have.new_empty(0)
        index[name] = rule(none if a is None else a, none if b is None else b.to(have.device))
    return Mask(index, shapes, base=combine([first.base, other.base], "masks"))


def union(masks: Iterable[Mask] | Mapping[str, Mask]) -> Mask:
    """Entries that are in any of the masks: for one task vector, the graft that is good at all these tasks.

    masks: a list, or a dict by task. Raises ValueError for an empty list and for masks of different bases.
    """
    return reduce(lambda a, b: a | b, listed(masks))


def intersection(masks: Iterable[Mask] | Mapping[str, Mask]) -> Mask:
    """Entries that are in all of the masks."""
    return reduce(lambda a, b: a & b, listed(masks))


def listed(masks: object) -> list[Mask]:
    """Masks from a list or a dict by task, at least one."""
    if isinstance(masks, Mask):
        raise TypeError("masks must be a list of masks or a dict of masks by task, got a single mask")
    if isinstance(masks, Mapping):
        masks = list(masks.values())
    if not isinstance(masks, Iterable):
        raise TypeError(
            f"masks must be a list of masks or a dict of masks by task, got {type(masks).__name__}"
        )
    found = [Mask.of(m) for m in masks]
    if not found:
        raise ValueError("masks is empty: give at least one mask")
    return found
