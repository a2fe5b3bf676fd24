"""A skill as a file: the fine-tuned values at the mask's entries, written into the base and taken out again.

Equation (1) of the paper as a copy, not as an addition: theta_pre + (theta_ft - theta_pre) is not theta_ft in floating
point, a copied value is. Applying gathers the old values and writes the new ones, removing writes the old ones back:
O(k) work, and theta_pre to the last bit.

Glossary
    index    flat indices of the entries, int64 [k_name] in memory, int32 in the file (int64 beyond 2^31 entries)
    values   theta_ft at these entries, the dtype of the weights
    base     fingerprint of the tensors of theta_pre (shape, dtype, checksum)

Memory: the values, the indices, and the overwritten values while applied. 8,505 entries of float32 are 66 KiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn

from papercore.grafting import stack
from papercore.grafting.arguments import check_module
from papercore.grafting.entries import check_plain, find_parameter, named_tensors, parameters_named, put, read
from papercore.grafting.errors import GraftMismatchError, GraftStackError
from papercore.grafting.fingerprint import (
    Base,
    check_base,
    digest,
    fingerprint,
    forget,
    known_checksum,
    remember,
)
from papercore.grafting.mask import Mask


class Graft:
    """Entries of named tensors and their fine-tuned values: a patch that is applied to the base and removed.

    len(graft) is the number of entries, .nbytes their size in a file without its header. Make one with
    `Graft.from_mask` or `Graft.load`. `|` joins and `&` intersects grafts whose values agree; see `stitch` for those that do not.

    >>> import copy, torch
    >>> from papercore.grafting import magnitude_mask, task_vector
    >>> base = torch.nn.Linear(3, 2); tuned = copy.deepcopy(base)
    >>> with torch.no_grad():
    ...     _ = tuned.weight.add_(torch.arange(6.0).view(2, 3))
    >>> graft = Graft.from_mask(tuned, magnitude_mask(task_vector(base, tuned), k=2))
    >>> before = base.weight.detach().clone()
    >>> with graft.applied(base):
    ...     (base.weight != before).sum().item()
    2
    >>> torch.equal(base.weight, before), len(graft), graft.nbytes
    (True, 2, 16)
    """

    def __init__(
        self,
        index: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        base: Base | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.index = {n: i for n, i in index.items() if len(i)}
        self.values = {n: values[n] for n in self.index}
        self.shapes = {n: tuple(shapes[n]) for n in self.index}
        self.base = base
        self.metadata = dict(metadata or {})
        self._overwrote: dict[str, Tensor] | None = (
            None  # values of the base at the entries, once it was checked
        )

    @classmethod
    @torch.no_grad()
    def from_mask(
        cls,
        finetuned: object,
        mask: object,
        *,
        pretrained: object | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Graft:
        """The fine-tuned values at the mask's entries.

        finetuned: an nn.Module or a state dict. mask: a `Mask`, or a dict of bool tensors. pretrained: the base; needed
        only where the mask does not carry its fingerprint (a dict of bool tensors), and compared with it where it does.
        metadata: strings for the file.

        Raises ValueError for an empty mask and tensors that the fine-tuned model lacks, GraftMismatchError if
        pretrained is not the base of the mask.
        """
        chosen = Mask.of(mask)
        if not chosen.count:
            raise ValueError("the mask is empty: nothing to graft")
        tensors = _tensors_of(finetuned, "finetuned", chosen)
        index = {n: i for n, i in chosen.index.items() if len(i)}
        values = {n: read(tensors[n], i.to(tensors[n].device)) for n, i in index.items()}
        base = chosen.base
        if pretrained is not None:
            found = fingerprint(_tensors_of(pretrained, "pretrained", chosen))
            if base is not None:
                differing = [n for n, p in found.items() if n in base and base[n] != p]
                if differing:
                    raise GraftMismatchError(
                        f"pretrained is not the base that the mask was made for: {differing[0]} differs"
                    )
            else:
                base = found
        return cls(
            {n: i.to(values[n].device) for n, i in index.items()},
            values,
            chosen.shapes,
            base=base,
            metadata=metadata,
        )

    def __len__(self) -> int:
        return sum(len(i) for i in self.index.values())

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values in a file, without its header."""
        return sum(
            len(i) * ((4 if prod(self.shapes[n]) <= 2**31 else 8) + self.values[n].element_size())
            for n, i in self.index.items()
        )

    @property
    def fingerprint(self) -> str | None:
        """16 hexadecimal digits that stand for the base; None if it is unknown."""
        return None if self.base is None else digest(self.base)

    def mask(self) -> Mask:
        """Which entries the graft holds, in the tensors it touches."""
        return Mask(self.index, self.shapes, base=self.base)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graft):
            return NotImplemented
        return self.shapes == other.shapes and all(
            torch.equal(i, other.index[n].to(i.device))
            and torch.equal(self.values[n], other.values[n].to(i.device))
            for n, i in self.index.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Graft({len(self):,} entries in {len(self.index)} tensors, {self.nbytes:,} bytes, base {self.fingerprint})"

    # ---- applying

    def apply_(self, model: nn.Module, *, force: bool = False) -> Handle:
        """Writes the values into the model, in place; handle.remove() takes them out again.

        Grafts on one model form a stack: another one may be applied on top, and the latest is removed first. O(k),
        and one pass over the base's tensors the first time, to check that it is the base (force=True: unchecked, and
        values are cast to the model's dtype). If writing fails or is interrupted, the model is left as it was.

        Raises GraftMismatchError for another base, GraftStackError if this graft is applied already.
        """
        check_module("model", model)
        for handle in stack.active(model):
            if handle.graft is self:
                raise GraftStackError(f"{self!r} is already applied to this model: remove it first")
        try:
            parameters = parameters_named(model, list(self.index))
        except KeyError as error:
            raise GraftMismatchError(
                f"the model lacks parameters that the graft changes: {error.args[0]}"
            ) from None
        for name, parameter in parameters.items():
            check_plain(parameter.detach(), name)
            if tuple(parameter.shape) != self.shapes[name]:
                raise GraftMismatchError(
                    f"{name} has shape {tuple(parameter.shape)}, the graft was made for {self.shapes[name]}"
                )
            if not force and parameter.dtype != self.values[name].dtype:
                raise GraftMismatchError(
                    f"{name} has dtype {parameter.dtype}, the graft {self.values[name].dtype}: load the model in that dtype, "
                    "or pass force=True to cast the values"
                )
        old = {n: read(p.detach(), self.index[n].to(p.device)) for n, p in parameters.items()}
        if not force and self.base is not None:
            _check_beneath(model, self.base, repr(self))
            if not stack.active(model):
                # Writes through .data move no version counter; most of them show at our own entries.
                seen = self._overwrote
                if seen is not None and any(not torch.equal(seen[n].to(v.device), v) for n, v in old.items()):
                    check_base(model, self.base, repr(self), cached=False)
                self._overwrote = old
        return Handle(self, model, parameters, old)

    @contextmanager
    def applied(self, model: nn.Module, *, force: bool = False) -> Iterator[nn.Module]:
        """The model with the graft inside the block, without it afterwards, also after an error."""
        handle = self.apply_(model, force=force)
        try:
            yield model
        finally:
            if handle.active:
                handle.remove(force=True)

    def merge_and_unload(self, model: nn.Module, *, force: bool = False) -> nn.Module:
        """Writes the values into the model for good and returns it (the name that peft's users know)."""
        self.apply_(model, force=force).keep()
        return model

    # ---- set operations

    def __or__(self, other: object) -> Graft:
        if not isinstance(other, Graft):
            return NotImplemented
        from papercore.grafting.stitching import stitch

        return stitch([self, other], collisions="error")

    def __and__(self, other: object) -> Graft:
        if not isinstance(other, Graft):
            return NotImplemented
        from papercore.grafting.stitching import shared

        return shared(self, other)

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file: NAME.idx (int32) and NAME.val per tensor, the base's fingerprint as metadata."""
        from papercore.grafting.files import save_graft

        save_graft(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Graft:
        """Reads a file that `save` wrote. FileNotFoundError, or ValueError for a file that is none or is damaged."""
        from papercore.grafting.files import load_graft

        return load_graft(path, device=device)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `graft.safetensors` into a folder, which is made if it does not exist."""
        from papercore.grafting.files import FILE_NAME

        os.makedirs(folder, exist_ok=True)
        self.save(os.path.join(folder, FILE_NAME))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Graft:
        """Reads `graft.safetensors` from a folder."""
        from papercore.grafting.files import FILE_NAME

        return cls.load(os.path.join(folder, FILE_NAME), device=device)


class Handle:
    """A graft that is applied to a model; `Graft.apply_` makes it."""

    def __init__(
        self, graft: Graft, model: nn.Module, parameters: dict[str, nn.Parameter], old: dict[str, Tensor]
    ) -> None:
        self.graft, self.model, self._old = graft, model, old
        self.active = True
        stack.push(model, self)
        try:
            self._write(graft.values, parameters)
        except BaseException:
            self._write(self._old, parameters)
            stack.drop(model, self)
            self.active = False
            raise

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            known = known_checksum(self.model, name, parameter)
            index = self.graft.index[name].to(parameter.device)
            put(parameter.detach(), index, values[name].to(parameter.device))
            if known is not None:  # of the base beneath, which has not changed
                remember(self.model, name, parameter, known)

    def _parameters(self) -> dict[str, nn.Parameter]:
        try:
            return parameters_named(self.model, list(self.graft.index))
        except KeyError as error:
            raise GraftMismatchError(
                f"the model has lost parameters since the graft was applied: {error.args[0]}"
            ) from None

    def _latest(self, what: str) -> None:
        if not self.active:
            raise GraftStackError(f"{self.graft!r} is not applied any more: it was removed or kept before")
        latest = stack.active(self.model)[-1]
        if latest is not self:
            raise GraftStackError(
                f"cannot {what} {self.graft!r}: {latest.graft!r} was applied later; remove that first"
            )

    def remove(self, *, force: bool = False) -> None:
        """Writes the overwritten values back: the weights are those before `apply_`, bit for bit.

        Raises GraftStackError if a later graft is still applied, if it was removed already, and if the grafted
        entries were changed since (by training, say) and force is False.
        """
        self._latest("remove")
        parameters = self._parameters()
        for name, parameter in parameters.items():
            if parameter.dtype != self._old[name].dtype:
                raise GraftStackError(
                    f"{name} was cast from {self._old[name].dtype} to {parameter.dtype} while the graft was applied"
                )
            if not force:
                index = self.graft.index[name].to(parameter.device)
                values = self.graft.values[name].to(parameter.device, parameter.dtype)
                if not torch.equal(read(parameter.detach(), index), values):
                    raise GraftStackError(
                        f"{name} was changed while the graft was applied: remove(force=True) writes the old values back, keep() leaves them"
                    )
        self._write(self._old, parameters)
        stack.drop(self.model, self)
        self.active = False

    def keep(self) -> None:
        """Leaves the values in the model for good and forgets the old ones."""
        self._latest("keep")
        stack.drop(self.model, self)
        self.active = False
        for name, parameter in self._parameters().items():
            if known_checksum(self.model, name, parameter) is not None:
                forget(self.model, name)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.remove(force=True)


def _check_beneath(model: nn.Module, base: Base, what: str) -> None:
    """Compares the weights beneath the applied grafts with `base`.

    Our own writes carry the known checksums along; where somebody else wrote too, the grafts are lifted for the pass.
    """
    handles = stack.active(model)
    stale = False
    if handles:
        found = {n: find_parameter(model, n) for n in base}
        stale = any(p is not None and known_checksum(model, n, p) is None for n, p in found.items())
    if not stale:
        check_base(model, base, what)
        return
    lifted = []
    try:
        for handle in reversed(handles):
            parameters = handle._parameters()
            now = {n: read(p.detach(), handle.graft.index[n].to(p.device)) for n, p in parameters.items()}
            lifted.append((handle, now, parameters))
            handle._write(handle._old, parameters)
        check_base(model, base, what)
    finally:
        for handle, now, parameters in reversed(lifted):
            handle._write(now, parameters)


def _tensors_of(source: object, what: str, mask: Mask) -> dict[str, Tensor]:
    """The source's tensors under the mask, checked for presence and shape."""
    tensors = named_tensors(source, what)
    if isinstance(source, Mapping):  # a tied tensor may be asked for by its second name
        tensors = {n: t.detach() for n, t in source.items() if isinstance(t, Tensor)}
    else:
        tensors.update({n: p.detach() for n, p in source.named_parameters(remove_duplicate=False)})  # type: ignore[attr-defined]
    touched = [n for n in mask if len(mask.index[n])]
    missing = [n for n in touched if n not in tensors]
    if missing:
        raise ValueError(f"{what} lacks {len(missing)} tensors of the mask: {', '.join(missing[:5])}")
    wrong = [
        f"{n}: {tuple(tensors[n].shape)} instead of {mask.shapes[n]}"
        for n in touched
        if tuple(tensors[n].shape) != mask.shapes[n]
    ]
    if wrong:
        raise ValueError(f"{what} has other shapes than the mask: {'; '.join(wrong[:5])}")
    for name in touched:
        check_plain(tensors[name], f"{what} {name}")
    return {n: tensors[n] for n in mask if n in tensors}
