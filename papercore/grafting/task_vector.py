"""delta = theta_ft - theta_pre: what fine-tuning changed, and which base it was measured from.

Section 2 of the paper; "task vector" is today's word for delta.

Glossary
    theta_pre, theta_ft   weights before and after fine-tuning
    delta                 theta_ft - theta_pre, float32 (float64 for float64 weights), the shapes of the tensors
    N                     entries of the tensors that fine-tuning moved: what a share of entries refers to.
                          Frozen embeddings and heads do not count (RoBERTa-base: 85,054,464 of 124,697,433)

In half precision theta_pre + delta is computed in float32 and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from papercore.grafting.entries import check_plain, named_tensors
from papercore.grafting.errors import NonFiniteError
from papercore.grafting.fingerprint import Base, digest, fingerprint

Select = str | Sequence[str] | Callable[[str], bool]


class TaskVector(Mapping[str, Tensor]):
    """delta by tensor name: a mapping like a state dict, with the fingerprint of its base.

    Attributes: base (shape, dtype and checksum of each of the base's tensors; None if unknown), copied
    (tensors of the fine-tuned weights that the base lacks, see `task_vector`).
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        base: Base | None = None,
        copied: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.base = base
        self.copied = dict(copied or {})
        for name, tensor in self._tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"delta[{name!r}] must be a tensor, got {type(tensor).__name__}")
            check_plain(tensor, f"delta[{name!r}]")
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"delta[{name!r}] has NaN or infinite entries")
        if not any(bool(t.any()) for t in self._tensors.values()):
            raise ValueError("fine-tuned weights equal the pre-trained ones: nothing to graft")

    @classmethod
    def of(cls, delta: object) -> TaskVector:
        """`delta` itself, or a plain dict of tensors as a task vector without a known base."""
        if isinstance(delta, TaskVector):
            return delta
        if isinstance(delta, Mapping):
            return cls(delta)
        raise TypeError(
            f"delta must come from task_vector(pretrained, finetuned) or map names to tensors, got {type(delta).__name__}"
        )

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{name!r} is not among the {len(self)} tensors of this task vector") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def total(self) -> int:
        """N, the number of entries that can be grafted."""
        return sum(t.numel() for t in self._tensors.values())

    @property
    def moved(self) -> int:
        """The number of entries that fine-tuning changed."""
        return sum(int(torch.count_nonzero(t)) for t in self._tensors.values())

    @property
    def fingerprint(self) -> str | None:
        """16 hexadecimal digits that stand for the base; None if it is unknown."""
        return None if self.base is None else digest(self.base)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(t.shape) for name, t in self._tensors.items()}

    def __repr__(self) -> str:
        return f"TaskVector({len(self)} tensors, N={self.total:,}, base {self.fingerprint})"


@torch.no_grad()
def task_vector(
    pretrained: object,
    finetuned: object,
    *,
    select: Select | None = None,
    copy_missing_from: str | None = None,
) -> TaskVector:
    """theta_ft - theta_pre for the tensors that fine-tuning moved.

    pretrained, finetuned: nn.Modules or state dicts with the same names and shapes. select: a regular
    expression (searched in the name), a list of names, or a function of the name; None for every
    floating-point parameter in which at least one entry differs, which is the paper's N: frozen embeddings and
    heads do not count. Buffers of a module and integer tensors are left out, tied parameters counted once.
    copy_missing_from="ft": tensors that the base lacks, such as a new classification head, are kept in
    .copied instead of being refused; load them into the base before grafting.

    Returns a `TaskVector`, a mapping from names to float32 tensors (float64 for float64 weights) on the device of
    `pretrained`. Memory: 4 bytes an entry; neither model is kept or changed.

    Raises ValueError for different names or shapes (the first five are listed), for equal weights and for NaN;
    NotImplementedError for quantised or sharded weights; TypeError for a wrong kind.

    >>> import copy, torch
    >>> base = torch.nn.Linear(3, 2); tuned = copy.deepcopy(base)
    >>> with torch.no_grad():
    ...     _ = tuned.weight[0, 1].add_(1.0)
    >>> delta = task_vector(base, tuned)
    >>> list(delta), delta.total, delta.moved
    (['weight'], 6, 1)
    """
    if pretrained is finetuned:
        raise ValueError(
            "fine-tuned weights equal the pre-trained ones: nothing to graft (both are the same object)"
        )
    if copy_missing_from not in (None, "ft"):
        raise ValueError(f"copy_missing_from={copy_missing_from!r} is not one of None, 'ft'")
    before = named_tensors(pretrained, "pretrained")
    after = named_tensors(finetuned, "finetuned")
    # A state dict beside a module: the module says which names are parameters.
    if isinstance(finetuned, Mapping) and not isinstance(pretrained, Mapping):
        everything = {k: v.detach() for k, v in finetuned.items() if isinstance(v, Tensor)}
        after = {k: everything[k] for k in before if k in everything}
    elif isinstance(pretrained, Mapping) and not isinstance(finetuned, Mapping):
        everything = {k: v.detach() for k, v in pretrained.items() if isinstance(v, Tensor)}
        before = {k: everything[k] for k in after if k in everything}
    names, copied = _matched(before, after, select, copy_missing_from)
    tensors: dict[str, Tensor] = {}
    for name in names:
        old, new = before[name], after[name]
        if select is None and not old.is_floating_point() and torch.equal(old, new.to(old.device)):
            continue
        check_plain(old, f"pretrained {name}")
        check_plain(new, f"finetuned {name}")
        wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
        difference = new.to(device=old.device, dtype=wide) - old.to(wide)
        if not bool(torch.isfinite(difference).all()):
            bad = "fine-tuned" if bool(torch.isfinite(old).all()) else "pre-trained"
            raise NonFiniteError(f"the {bad} {name} has NaN or infinite entries")
        if select is not None or bool(difference.any()):
            tensors[name] = difference
    if not tensors or not any(bool(t.any()) for t in tensors.values()):
        raise ValueError("fine-tuned weights equal the pre-trained ones: nothing to graft")
    return TaskVector(tensors, base=fingerprint({n: before[n] for n in tensors}), copied=copied)


def _matched(
    before: dict[str, Tensor], after: dict[str, Tensor], select: Select | None, copy_missing: str | None
) -> tuple[list[str], dict[str, Tensor]]:
    """Names to subtract, in the base's order, and the tensors that the base lacks."""
    chosen = _chooser(select)
    want_before = [n for n in before if chosen(n)]
    want_after = [n for n in after if chosen(n)]
    if not want_before and not want_after:
        shown = ", ".join(list(before)[:5])
        raise ValueError(f"select={select!r} matches none of the {len(before)} tensors ({shown}, ...)")
    new = [n for n in want_after if n not in before]
    lost = [n for n in want_before if n not in after]
    copied: dict[str, Tensor] = {}
    if new and copy_missing == "ft":
        copied, new = {n: after[n].clone() for n in new}, []
    differing = [f"{n} (only in the fine-tuned model)" for n in new]
    differing += [f"{n} (only in the pre-trained model)" for n in lost]
    differing += [
        f"{n}: {tuple(before[n].shape)} before and {tuple(after[n].shape)} after"
        for n in want_before
        if n in after and before[n].shape != after[n].shape
    ]
    if differing:
        hint = ""
        if new:
            hint = "; for a head that only the fine-tuned model has, pass copy_missing_from='ft', or leave it out with select="
        raise ValueError(f"the models differ in {len(differing)} tensors: " + "; ".join(differing[:5]) + hint)
    return want_before, copied


def _chooser(select: Select | None) -> Callable[[str], bool]:
    if select is None:
        return lambda name: True
    if isinstance(select, str):
        try:
            pattern = re.compile(select)
        except re.error as error:
            raise ValueError(f"select={select!r} is not a regular expression: {error}") from None
        return lambda name: pattern.search(name) is not None
    if callable(select):
        return select
    if isinstance(select, Sequence) and all(isinstance(n, str) for n in select):
        wanted = set(select)
        return lambda name: name in wanted
    raise TypeError(
        f"select must be a regular expression, a list of names or a function of the name, got {type(select).__name__}"
    )
