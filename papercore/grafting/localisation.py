"""Where does a mask sit? Counts by layer and kind of module, beside the share of parameters there.

Glossary
    count        chosen entries of a group of tensors
    size         entries of the group
    share        count / k
    enrichment   share / (size / N): 1 for a mask that is spread evenly
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from papercore.grafting.mask import Mask

_BY = ("layer", "module", "tensor")


@dataclass(frozen=True)
class Region:
    """One group: its key (one part for each name in `by`), chosen entries, size, share of the mask, enrichment."""

    key: tuple[int | str | None, ...]
    count: int
    size: int
    share: float
    enrichment: float


def localize(
    mask: object, by: Sequence[str] | str | Callable[[str], object] = ("layer", "module")
) -> list[Region]:
    """Counts, shares and enrichment of a mask by layer and module, in the order of the tensors.

    mask: a `Mask` or dict of bool tensors; all its tensors count, those without a chosen entry too. by: some of
    "layer" (the first number in the name, None without one), "module" (what follows that number) and "tensor"
    (the whole name), or a function from a name to a key. Raises ValueError for an empty mask and unknown words.

    >>> import torch
    >>> mask = {"layers.0.norm.weight": torch.tensor([1, 1]) == 1, "layers.1.norm.weight": torch.tensor([0, 0]) == 1}
    >>> [(r.key, r.count, r.enrichment) for r in localize(mask, by="layer")]
    [((0,), 2, 2.0), ((1,), 0, 0.0)]
    """
    chosen = Mask.of(mask)
    if not chosen.count:
        raise ValueError("the mask is empty: it sits nowhere")
    key_of = _key_function(by)
    counts: dict[tuple[int | str | None, ...], list[int]] = {}
    for name, shape in chosen.shapes.items():
        entry = counts.setdefault(key_of(name), [0, 0])
        entry[0] += len(chosen.index[name])
        entry[1] += prod(shape)
    total, ones = chosen.total, chosen.count
    return [
        Region(key, count, size, count / ones, (count / ones) / (size / total))
        for key, (count, size) in counts.items()
    ]


def _key_function(by: object) -> Callable[[str], tuple[int | str | None, ...]]:
    if callable(by):
        return lambda name: (by(name),)
    words = (by,) if isinstance(by, str) else by
    if not isinstance(words, Sequence) or not words or any(word not in _BY for word in words):
        raise ValueError(f"by={by!r} must be some of {', '.join(map(repr, _BY))}, or a function of the name")
    return lambda name: tuple(_part(name, word) for word in words)


def _part(name: str, word: str) -> int | str | None:
    if word == "tensor":
        return name
    pieces = name.split(".")
    number = next((i for i, piece in enumerate(pieces) if piece.isdigit()), None)
    if word == "layer":
        return None if number is None else int(pieces[number])
    return name if number is None else ".".join(pieces[number + 1 :])
