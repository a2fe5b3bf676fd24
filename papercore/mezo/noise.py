"""Noise that is never stored: number i of a seed is a function of (seed, i, distribution) alone, and a pass over the
parameters makes it on the way.

MeZO (arXiv 2305.17333, algorithm 1) draws the same z again for every use by resetting a generator, so z depends on the
order, size, type and device of the tensors. Here z comes from counters (see philox.py): it does not depend on how the
parameters are split, on their dtype, on the device or on the number of threads, and the global generators stay untouched.

Glossary
    seed      names one z, the perturbation of the whole model      int in [0, 2^64)
    start     index of a tensor's first element in the model        int in [0, 2^63)
    terms     (seed, coefficient) pairs to be added                 coefficients are plain floats
    scale     factor of the old value
    backend   torch: the reference, anywhere; numba: compiled loops on the CPU; triton: noise made inside a CUDA kernel

One pass computes t <- scale * t + c_1 z_1 + c_2 z_2 + ... in this order: scale * t is rounded (scale 1: t as it is; scale 0:
zero, and t is not read), then for each term the product and the sum, all in float32 (float64 tensors: in float64). The
result is rounded once to the tensor's dtype. Each element sees the same operations however the work is cut up, and z the
same bits on every device: the Gaussian numbers use correctly rounded operations only.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from papercore.mezo import _torch, philox
from papercore.mezo._torch import Item, Runner, Term

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PLAIN_KINDS = (torch.nn.Parameter, Tensor)
BACKENDS = ("auto", "torch", "numba", "triton")
END_OF_INDICES = 1 << 63


class MissingBackend(ValueError):
    """A backend was asked for by name and cannot run here."""


def noise(
    seed: int,
    start: int,
    numel: int,
    *,
    dist: str = "gaussian",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Numbers start .. start + numel - 1 of the noise named by `seed`.

    Any slice equals the same slice of the whole, on every device and in every call; the global generators are neither
    read nor moved. The numbers are made in float32 and rounded once to `dtype`.

    seed: int in [0, 2^64). start, numel: ints >= 0, start + numel <= 2^63. dist: "gaussian" (mean 0, variance 1, largest
    magnitude 6.66) or "rademacher" (+1 or -1, one bit each). device: None means the CPU. dtype: a floating dtype of 16, 32
    or 64 bits. Returns Tensor [numel]. Raises ValueError for values out of range, TypeError for a wrong kind.

    >>> whole = noise(7, 0, 100)
    >>> bool((noise(7, 40, 10) == whole[40:50]).all())
    True
    >>> noise(7, 0, 4, dist="rademacher").abs().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype={dtype!r}: noise comes in {_dtype_names()}")
    numel = _index("numel", numel)
    if numel < 0:
        raise ValueError(f"numel={numel}: expected a number of elements >= 0")
    out = torch.empty(numel, dtype=dtype, device=device if device is not None else "cpu")
    add_noise_([out], [start], [(seed, 1.0)], scale=0.0, dist=dist)
    return out


@torch.no_grad()
def add_noise_(
    tensors: Sequence[Tensor],
    starts: Sequence[int],
    terms: Sequence[Term],
    *,
    scale: float = 1.0,
    dist: str = "gaussian",
    backend: str = "auto",
    out: Sequence[Tensor] | None = None,
) -> None:
    """t <- scale * t + sum_j coef_j * z(seed_j)[start : start + t.numel()] for every tensor t, in one pass over memory.

    tensors: dense floating tensors of any shape and stride (elements count in row-major order); starts: the global index
    of each one's first element; terms: any number of (seed, coefficient) pairs, applied in order. out: where the results
    go instead of into the tensors themselves, same shapes, dtypes and devices. Tensors must not overlap each other.
    Scratch memory is one chunk, whatever the sizes. Raises ValueError for values out of range or a missing backend,
    TypeError for tensors that cannot be written so: integer, complex, quantised, sparse, meta, or overlapping themselves.

    >>> weight = torch.ones(2, 3)
    >>> add_noise_([weight], [10], [(7, 0.5), (8, -2.0)], scale=0.9)
    >>> expected = 0.9 * torch.ones(6) + 0.5 * noise(7, 10, 6) - 2.0 * noise(8, 10, 6)
    >>> torch.allclose(weight.view(-1), expected)
    True
    """
    if dist not in philox.STREAMS:
        raise ValueError(f"dist={dist!r}: expected one of {', '.join(map(repr, philox.STREAMS))}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(map(repr, BACKENDS))}")
    if len(starts) != len(tensors):
        raise ValueError(
            f"{len(tensors)} tensors but {len(starts)} starts: expected one start for each tensor"
        )
    if out is not None and len(out) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors but {len(out)} in out: expected one for each tensor")
    checked_terms = [(check_seed(seed), float(coefficient)) for seed, coefficient in terms]
    scale = float(scale)
    targets = tensors if out is None else out
    if not checked_terms and scale == 1.0 and out is None:
        checked_terms, tensors, targets, starts = [], [], [], []
    work: dict[torch.device, tuple[list[Item], list[Item]]] = {}
    for position, (source, target, start) in enumerate(zip(tensors, targets, starts, strict=True)):
        in_a_row = _check_tensor(source, "tensors", position)
        if target is not source:
            in_a_row &= _check_tensor(target, "out", position)
            _check_pair(source, target, position)
        numel = source.numel()
        start = _check_range(start, numel)
        if numel:
            contiguous, strided = work.setdefault(source.device, ([], []))
            (contiguous if in_a_row else strided).append((source, target, start))
    for device, (contiguous, strided) in work.items():
        run = _runner(resolve_backend(backend, device))
        if contiguous:
            run(contiguous, checked_terms, scale, dist)
        for item in strided:
            _run_strided(run, item, checked_terms, scale, dist)


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """The backend that will work on a device: "torch", "numba" or "triton".

    "auto" takes triton on CUDA and numba on the CPU where they are installed, torch otherwise. A backend asked for by name
    is that one or a ValueError that says what is missing.

    >>> resolve_backend("torch", "cpu")
    'torch'
    """
    kind = torch.device(device).type
    if backend == "auto":
        if kind == "cpu":
            return "torch" if _load("numba") is None else "numba"
        module = _load("triton") if kind == "cuda" else None
        return "torch" if module is None or not module.works() else "triton"
    if backend == "torch":
        return backend
    if backend == "numba":
        if kind != "cpu":
            raise MissingBackend(
                f"backend='numba' works on the CPU, the tensors are on {kind!r}: use 'auto' or 'triton'"
            )
        if _load("numba") is None:
            raise MissingBackend(
                "backend='numba' needs numba: pip install 'papercore[fast]' (or use backend='torch')"
            )
        return backend
    if backend == "triton":
        module = _load("triton")
        if module is None:
            raise MissingBackend("backend='triton' needs triton: pip install triton (or use backend='torch')")
        if kind != "cuda" and not module.interpreted():
            raise MissingBackend(
                f"backend='triton' works on CUDA, the tensors are on {kind!r}: use 'auto' or 'torch'"
            )
        return backend
    raise ValueError(f"backend={backend!r}: expected one of {', '.join(map(repr, BACKENDS))}")


@functools.cache
def _load(backend: str) -> ModuleType | None:
    """The module of a fast backend, None where its library is not installed."""
    try:
        return importlib.import_module(f"papercore.mezo._{backend}")
    except ImportError:
        return None


def _runner(backend: str) -> Runner:
    return _torch.run if backend == "torch" else _load(backend).run  # type: ignore[union-attr]


# ---- tensors whose elements do not lie in a row ----------------------------------------------------------------------


def _run_strided(run: Runner, item: Item, terms: list[Term], scale: float, dist: str) -> None:
    """Copies pieces of at most one chunk into contiguous scratch, works there, copies back."""
    for piece, into, start in _pieces(*item, _torch.SCRATCH):
        scratch = piece.clone(memory_format=torch.contiguous_format)
        run([(scratch, scratch, start)], terms, scale, dist)
        into.copy_(scratch)


def _pieces(source: Tensor, target: Tensor, start: int, chunk: int) -> Iterator[Item]:
    """Views of at most one chunk that cover a tensor in row-major order, each with its first index."""
    if source.numel() <= chunk:
        yield source, target, start
        return
    row = source.numel() // source.shape[0]
    rows = max(1, chunk // row)
    for i in range(0, source.shape[0], rows):
        if row > chunk:
            yield from _pieces(source[i], target[i], start + i * row, chunk)
        else:
            yield source[i : i + rows], target[i : i + rows], start + i * row


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_seed(seed: int) -> int:
    """The seed as a plain int, ValueError if it is not one of the 2^64, TypeError if it is no integer."""
    value = _index("seed", seed)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"seed={value}: expected an integer in [0, 2**64)")
    return value


def _check_range(start: int, numel: int) -> int:
    if type(start) is not int:
        start = _index("start", start)
    if start < 0 or start + numel > END_OF_INDICES:
        raise ValueError(f"start={start}, numel={numel}: expected 0 <= start and start + numel <= 2**63")
    return start


def _index(name: str, value: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r}: expected an integer, not {type(value).__name__}") from None


def _dtype_names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)


def _check_tensor(tensor: Tensor, where: str, position: int) -> bool:
    """Whether its elements lie in a row, TypeError for a tensor that noise cannot be added to."""
    if (
        type(tensor) in PLAIN_KINDS
        and tensor.layout is torch.strided
        and tensor.dtype in FLOAT_DTYPES
        and tensor.is_contiguous()
        and not tensor.is_meta
    ):
        return True  # nearly all are: a pass over a hundred small tensors is mostly these lines
    name = f"{where}[{position}]"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: expected a tensor")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}: noise can be added to {_dtype_names()}")
    if tensor.is_meta:
        raise TypeError(
            f"{name} is on the meta device and has no values: materialise it first (to_empty, then load)"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}: expected a dense tensor")
    if hasattr(tensor, "__tensor_flatten__"):
        kind = type(tensor).__name__
        raise TypeError(
            f"{name} is a {kind}, which wraps other tensors: pass the local one (for a DTensor, to_local())"
        )
    if tensor.is_contiguous():
        return True
    if _overlaps_itself(tensor):
        raise TypeError(
            f"{name}: several of its elements share memory (shape {tuple(tensor.shape)}, strides {tensor.stride()}), "
            "as after expand(): pass the tensor it was made from, or a clone()"
        )
    return False


def _overlaps_itself(tensor: Tensor) -> bool:
    """True unless each stride steps over everything that the smaller strides reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _check_pair(source: Tensor, target: Tensor, position: int) -> None:
    for what in ("shape", "dtype", "device"):
        given, expected = getattr(target, what), getattr(source, what)
        if given != expected:
            kind = ValueError if what == "shape" else TypeError
            raise kind(f"out[{position}] has {what} {given}: expected {expected}, as tensors[{position}]")
