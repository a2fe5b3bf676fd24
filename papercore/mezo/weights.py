"""The trained weights as one long vector: which element has which index, and how noise is added to them.

Everything that reads or writes weights goes through here, so that training and replay touch the same numbers
in the same order.

Glossary
    theta     the trained weights, end to end in the order of the parameter groups, tied ones once      [d]
    start     index in theta of a tensor's first element (row-major, whatever the strides are)
    bucket    tensors that take the same step: one device, one group, decayed or not
    terms     the directions to add and their coefficients: list of (seed, coefficient), summed in this order

Nothing here allocates more than one chunk of elements at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from papercore.mezo.noise import add_noise_

CHUNK = 1 << 18  # elements handled at once: 1 MiB in float32, which stays in a core's cache
Terms = list[tuple[int, float]]

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Bucket:
    """Tensors that are moved with the same coefficients."""

    group: int
    decays: bool
    tensors: tuple[Tensor, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One row of the table of parameters: what replay needs in order to find the tensor again."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int
    decays: bool
    trained: bool


def check_weight(tensor: object, name: str) -> None:
    """Raises TypeError for a tensor that cannot be stepped: meta, sparse, not floating, overlapping itself."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if nn.parameter.is_lazy(tensor):
        raise TypeError(
            f"{name} is not initialised yet: run the lazy module once before making the optimizer"
        )
    if tensor.is_inference():
        raise TypeError(
            f"{name} was made in inference mode and cannot be written to: make the model outside it"
        )
    if tensor.is_meta:
        raise TypeError(f"{name} is on the meta device and holds no numbers: load the model first")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}: only dense tensors can be perturbed")
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}: the noise is added to float64, float32, bfloat16 or float16 weights; "
            "train adapters in one of these beside quantised weights"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(
            f"{name} is a {type(tensor).__name__} that wraps other tensors: train plain tensors or adapters"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise TypeError(
            f"{name} is an expanded view whose elements share memory: give the tensor it was expanded from"
        )


def _check_apart(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises TypeError if two tensors share memory: the shared weights would be perturbed twice."""
    spans = []
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            first = tensor.data_ptr()
            spans.append((str(tensor.device), first, first + reach * tensor.element_size(), i))
    open_spans: list[tuple[str, int, int, int]] = []
    for span in sorted(spans):
        open_spans = [other for other in open_spans if other[0] == span[0] and other[2] > span[1]]
        for *_, other in open_spans:
            if _share(tensors[other], tensors[span[3]]):
                raise TypeError(
                    f"{names[other]} and {names[span[3]]} overlap in memory, so their shared weights would be "
                    "perturbed twice: tie weights by assigning the same Parameter, which is then stepped once"
                )
        open_spans.append(span)


def _share(a: Tensor, b: Tensor) -> bool:
    """Do tensors whose stretches of memory meet have an element in common? Interleaved views have none."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return bool(torch.isin(_addresses(a), _addresses(b)).any())


def _addresses(tensor: Tensor) -> Tensor:
    places = torch.tensor(tensor.data_ptr()).expand(tensor.shape)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = torch.arange(size) * (stride * tensor.element_size())
        places = places + steps.view([-1 if i == dim else 1 for i in range(tensor.dim())])
    return places.reshape(-1)


def _chunk(tensor: Tensor) -> int:
    # On a GPU a kernel launch costs about as much as a million elements.
    return 16 * CHUNK if tensor.is_cuda else CHUNK


def pieces(tensor: Tensor, start: int) -> Iterable[tuple[Tensor, int]]:
    """`tensor` cut into parts of at most a chunk, in row-major order, with the index of each part's first element."""
    chunk = _chunk(tensor)
    if tensor.numel() <= chunk:
        yield tensor, start
    elif tensor.is_contiguous():
        flat = tensor.view(-1)
        for at in range(0, flat.numel(), chunk):
            yield flat[at : at + chunk], start + at
    else:
        row = tensor.numel() // tensor.shape[0]
        rows = max(1, chunk // row)
        for at in range(0, tensor.shape[0], rows):
            if row > chunk:
                yield from pieces(tensor[at], start + at * row)
            else:
                yield tensor[at : at + rows], start + at * row


class Weights:
    """The tensors that are trained, in order, with their places in theta.

    entries: (name, tensor, group, decays) of every parameter that was handed over; those that do not require
    a gradient are kept in the table but never touched. trained: overrides requires_grad (replay: the log
    knows better). Raises ValueError if nothing is left to train and TypeError for tensors that cannot be
    stepped.
    """

    def __init__(
        self, entries: Sequence[tuple[str, Tensor, int, bool]], *, trained: Sequence[bool] | None = None
    ) -> None:
        flags = [t.requires_grad for _, t, _, _ in entries] if trained is None else list(trained)
        self.all_tensors = [t for _, t, _, _ in entries]
        self.flags = flags
        chosen = [entry for entry, flag in zip(entries, flags, strict=True) if flag]
        if not chosen:
            raise ValueError(
                f"no parameter to train: {len(entries)} given, none of which requires a gradient "
                "(MeZO trains the parameters with requires_grad=True, as other optimizers do)"
            )
        labels = [name or f"parameter {i}" for i, (name, _, _, _) in enumerate(entries)]
        chosen_labels = [label for label, flag in zip(labels, flags, strict=True) if flag]
        for (_, tensor, _, _), label in zip(chosen, chosen_labels, strict=True):
            check_weight(tensor, label)
        _check_apart([t for _, t, _, _ in chosen], chosen_labels)
        self.labels = chosen_labels
        self.table = [
            Weight(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), group, decays, flag)
            for (name, t, group, decays), flag in zip(entries, flags, strict=True)
        ]
        self.tensors = [t.detach() for _, t, _, _ in chosen]
        self.starts: list[int] = []
        self.numel = 0
        groups: dict[tuple[torch.device, int, bool], list[int]] = {}
        for i, (_, tensor, group, decays) in enumerate(chosen):
            self.starts.append(self.numel)
            self.numel += tensor.numel()
            if tensor.numel():
                groups.setdefault((tensor.device, group, decays), []).append(i)
        self.buckets = [
            Bucket(group, decays, tuple(self.tensors[i] for i in rows), tuple(self.starts[i] for i in rows))
            for (_, group, decays), rows in groups.items()
        ]
        self.members = list(groups.values())  # rows of self.tensors, bucket by bucket

    @property
    def nbytes(self) -> int:
        """Bytes of the trained weights."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def like(self) -> list[Tensor]:
        """Uninitialised tensors of the same shapes, strides, dtypes and devices."""
        # Outside inference mode: an inference tensor must not take part in later steps.
        with torch.inference_mode(False):
            return [torch.empty_like(t) for t in self.tensors]

    def add(
        self,
        terms_of: Callable[[Bucket], tuple[float, Terms]],
        *,
        dist: str,
        backend: str,
        source: list[Tensor] | None = None,
    ) -> None:
        """theta <- scale * source + sum of coefficient * z(seed), bucket by bucket; source None: theta
        itself.

        terms_of(bucket) -> (scale, terms). float32 arithmetic (float64 for float64 weights), rounded once.
        """
        for bucket, rows in zip(self.buckets, self.members, strict=True):
            scale, terms = terms_of(bucket)
            if source is None and scale == 1.0 and not any(c for _, c in terms):
                continue  # adding zero could still turn -0.0 into 0.0
            add_noise_(
                bucket.tensors if source is None else [source[i] for i in rows],
                bucket.starts,
                terms,
                scale=scale,
                dist=dist,
                backend=backend,
                out=None if source is None else bucket.tensors,
            )

    def copy_from(self, source: list[Tensor]) -> None:
        """theta <- source."""
        for tensor, value in zip(self.tensors, source, strict=True):
            tensor.copy_(value)

    def chunks(
        self, bucket: Bucket, source: Sequence[Tensor] | None = None
    ) -> Iterable[tuple[list[Tensor], list[Tensor], int]]:
        """(parts to read, parts to write, index of the first element) over a bucket, a chunk at a time.

        The parts of a chunk lie side by side in theta, so that many small tensors share one stretch of noise.
        """
        reads: list[Tensor] = []
        targets: list[Tensor] = []
        first = end = 0
        for into, read, start in zip(bucket.tensors, source or bucket.tensors, bucket.starts, strict=True):
            for (piece, at), (target, _) in zip(pieces(read, start), pieces(into, start), strict=True):
                if reads and (at != end or end - first + piece.numel() > _chunk(into)):
                    yield reads, targets, first
                    reads, targets = [], []
                if not reads:
                    first = at
                reads.append(piece)
                targets.append(target)
                end = at + piece.numel()
        if reads:
            yield reads, targets, first

    def checksum(self, *, trained: bool = True, limit: int | None = None) -> int:
        """A 64-bit sum over the bits of all weights and their places: equal on every device, however split.

        trained=False: over the parameters that were handed over but are not trained. limit: only that many
        leading elements of each tensor. Integer arithmetic modulo 2^64, so the order of the sum does not
        matter.
        """
        tensors = [
            t.detach() for t, flag in zip(self.all_tensors, self.flags, strict=True) if flag == trained
        ]
        totals: dict[torch.device, Tensor] = {}
        start = 0
        for tensor in tensors:
            readable = tensor.layout is torch.strided and not hasattr(tensor, "__tensor_flatten__")
            if readable and not tensor.is_meta:
                for piece, at in pieces(tensor, start):
                    flat = piece.reshape(-1)
                    if limit is not None and at - start + flat.numel() > limit:
                        flat = flat[: max(0, limit - (at - start))]
                    if flat.numel():
                        # Added up where they are: the device is waited for once.
                        totals[tensor.device] = totals.get(tensor.device, 0) + _checksum(flat, at)
            start += tensor.numel()
        return sum(int(total) for total in totals.values()) % 2**64


def _checksum(flat: Tensor, start: int) -> Tensor:
    """sum_i (bits_i + A) (2 i + 1) B modulo 2^64, folded so that a high bit's change reaches the low ones."""
    size = flat.element_size()
    bits = flat.view(_INTEGERS.get(size, torch.uint8)).to(torch.int64, copy=True)  # the sum works in place
    place = torch.arange(start, start + bits.numel(), device=flat.device).mul_(2).add_(1)
    product = bits.add_(0x632BE59BD9B4E019).mul_(place)
    product ^= product >> 29
    return product.mul_(0x1B03738712FAD5C9).sum()
