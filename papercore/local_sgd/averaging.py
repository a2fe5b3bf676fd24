"""One average of the parameters over ranks: reduce, compare notes, and only then write.

    1  copy the parameters and this rank's notes into the flat vector, all-reduce it         (flat.py)
    2  read all ranks' notes; if they stand at different places, raise, with nothing changed  (agreement.py)
    3  divide by K and copy the means into the parameters; reduce optimizer state and buffers likewise, if wanted

The vector has the size that the ranks agreed on last. A rank whose parameters have changed since (one was unfrozen, or converted to
another dtype) sends zeros in this size and says so in its notes. If all ranks have changed alike they reduce once more in the new
size; if not, all of them raise. So no rank waits for a reduction that the others never make.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from papercore.local_sgd.agreement import WORDS, Ranks, Whereabouts, _named, check_same_place, digest_of
from papercore.local_sgd.flat import FlatVectors, layout_of

__all__ = ["Averages", "state_tensors"]


class Averages:
    """The vectors in which a run is averaged, kept between averages.

    Args:
        ranks: who averages.
        reduction: "all_reduce" or "ordered".
        params: what is averaged, as the ranks have agreed at the start.

    Attributes:
        bytes_sent: payload that this rank has handed to reductions whose result was written.
    """

    def __init__(self, ranks: Ranks, reduction: str, params: Sequence[Tensor]) -> None:
        self.ranks, self.reduction = ranks, reduction
        self.bytes_sent = 0
        self._agreed = layout_of(params)
        self._flat: FlatVectors | None = None
        self._others: dict[str, FlatVectors] = {}

    def agree_on(self, params: Sequence[Tensor]) -> None:
        """The ranks have agreed on another list of parameters."""
        if layout_of(params) != self._agreed:
            self._agreed, self._flat = layout_of(params), None

    def compare(
        self, params: Sequence[Tensor], place: tuple[int, int, int, int, float], state: dict[Any, Tensor]
    ) -> None:
        """Reduce the parameters into the vector and compare notes. RuntimeError, on all ranks, if they differ.

        Args:
            params: as they are now.
            place: (reason, step, position, h, lr), see `Whereabouts`.
            state: optimizer state that will be averaged after them, by key.
        """
        now = layout_of(params)
        same = now == self._agreed
        where = Whereabouts.of(
            *place,
            layout=digest_of([(shape, str(dtype)) for shape, dtype, _ in now]),
            state=digest_of([(key, tuple(t.shape), str(t.dtype)) for key, t in state.items()]),
        )
        if self._flat is None:
            self._flat = FlatVectors(self._agreed, notes=WORDS, size=self.ranks.size)
        sent = (
            params
            if same
            else [torch.zeros(shape, dtype=kind, device=where) for shape, kind, where in self._agreed]
        )
        everyone = [Whereabouts(*words) for words in self._exchange(self._flat, sent, where.words)]
        check_same_place(everyone)
        _check_layouts(everyone)
        if not same:
            self.agree_on(params)
            self.compare(params, place, state)

    def write(self, params: Sequence[Tensor]) -> None:
        """After `compare`: write the means into the parameters."""
        if self._flat is None:
            raise RuntimeError("write() follows compare().")
        self._flat.write_means(params)
        self.bytes_sent += self._flat.nbytes

    def mean_of(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Replace other tensors, of the same layout on all ranks, by their means over ranks."""
        if not tensors:
            return
        flat = self._others.get(name)
        if flat is None or flat.layout != layout_of(tensors):
            flat = self._others[name] = FlatVectors(layout_of(tensors), size=self.ranks.size)
        self._exchange(flat, tensors)
        flat.write_means(tensors)
        self.bytes_sent += flat.nbytes

    def _exchange(
        self, flat: FlatVectors, tensors: Sequence[Tensor], words: Sequence[int] = ()
    ) -> list[list[int]]:
        return flat.exchange(
            tensors, rank=self.ranks.rank, group=self.ranks.group, order=self.reduction, words=words
        )


def state_tensors(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> dict[tuple[int, str], Tensor]:
    """Floating state tensors of one or more dimensions, by (index of the parameter, name); counters have no dimension.

    Raises ValueError for an optimizer that keeps lists (LBFGS), which have no mean.
    """
    found = {}
    for number, p in enumerate(params):
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, (list, tuple, dict)):
                raise ValueError(
                    f"state='mean' cannot average {type(optimizer).__name__}'s {key!r}, which is a {type(value).__name__}: "
                    "use state='local'."
                )
            if isinstance(value, Tensor) and value.dim() and value.dtype.is_floating_point and value.numel():
                found[number, str(key)] = value
    return found


def _check_layouts(everyone: Sequence[Whereabouts]) -> None:
    for what, values, advice in (
        (
            "parameters to average",
            [place.layout for place in everyone],
            "Freeze, unfreeze and convert parameters on all ranks at the same step.",
        ),
        (
            "optimizer states to average",
            [place.state for place in everyone],
            "A parameter that got no gradient on some rank has no state there: use state='local', or give every parameter a "
            "gradient on all ranks.",
        ),
    ):
        different = [rank for rank, value in enumerate(values) if value != values[0]]
        if different:
            raise RuntimeError(
                f"the {what} differ between rank 0 and {_named(different)} at step {everyone[0].step}, so nothing was averaged. "
                f"{advice}"
            )
