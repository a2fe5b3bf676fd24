"""What goes wrong silently in zeroth-order training, made audible: warnings, and the checks of debug=True."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

from papercore.mezo.arguments import scalar_of
from papercore.mezo.noise import add_noise_
from papercore.mezo.seeds import draw_seed
from papercore.mezo.settings import Rule, Settings
from papercore.mezo.weights import Weights, pieces

SAMPLE = 4096  # leading elements of each tensor that the resolution check looks at
UNCHANGED_SHARE = 0.1
EARLY_STEPS = 50
RISE = 2.0
# Frames from warnings.warn up to the line that called step(), through torch's wrapper of it.
_AFTER, _BEFORE = 5, 6


class Watch:
    """Warns, once each: eps below the weights' resolution, losses that never differ, a loss that soon rises."""

    def __init__(self, zero_patience: int) -> None:
        self.zero_patience = zero_patience
        self._zeros = 0
        self._first_loss: float | None = None
        self._said: set[str] = set()

    def resolution(self, weights: Weights, rule: Rule, settings: Settings, backend: str) -> None:
        """Measures which share of the weights theta + eps z leaves alone, on each tensor's first elements."""
        unchanged, total = 0.0, 0
        for bucket in weights.buckets:
            eps = settings.groups[bucket.group].eps
            for tensor, start in zip(bucket.tensors, bucket.starts, strict=True):
                first, _ = next(iter(pieces(tensor, start)))
                old = first.reshape(-1)[:SAMPLE].clone()
                new = old.clone()
                add_noise_([new], [start], [(draw_seed(rule.seed, 0), eps)], dist=rule.dist, backend=backend)
                unchanged += float((new == old).float().mean()) * tensor.numel()
                total += tensor.numel()
        share = unchanged / max(total, 1)
        if share > UNCHANGED_SHARE:
            eps = settings.groups[0].eps
            dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in weights.tensors}))
            self._warn(
                "resolution",
                f"eps={eps:g} is below the resolution of {100 * share:.0f} % of the {dtypes} weights: theta + eps z rounds back "
                "to theta there, and the noise that is left is quantised. Use a larger eps or float32 weights.",
                _BEFORE,
            )

    def after(self, step: int, loss: float, slopes: list[float]) -> None:
        """Looks at a step that was taken."""
        self._zeros = 0 if any(slopes) else self._zeros + 1
        if self._zeros >= self.zero_patience:
            self._warn(
                "zeros",
                f"the losses at theta + eps z and theta - eps z were identical in {self._zeros} successive steps, so nothing is "
                "learned: a discrete objective needs a larger eps or a larger batch.",
            )
        if self._first_loss is None:
            self._first_loss = loss
        elif step < EARLY_STEPS and 0 < RISE * self._first_loss < loss:
            self._warn(
                "rise",
                f"the loss rose from {self._first_loss:.4g} to {loss:.4g} within the first {step + 1} steps: lr is probably too "
                "large. MeZO needs a far smaller lr than Adam (1e-6 or 1e-7 for full models of billions of weights).",
            )

    def _warn(self, kind: str, message: str, stacklevel: int = _AFTER) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, UserWarning, stacklevel=stacklevel)


def checked_call(closure: Callable[[], Tensor | float], weights: Weights) -> Tensor | float:
    """The closure's loss, evaluated twice with the parameters watched.

    Raises RuntimeError if it is random or does more than evaluate.
    """
    before = _state(weights)
    first = scalar_of(closure())
    _compare(before, _state(weights), weights)
    second = scalar_of(closure())
    if float(first) != float(second) and not (
        float(first) != float(first) and float(second) != float(second)
    ):
        raise RuntimeError(
            f"the closure returned {float(first):.9g} and then {float(second):.9g} at the same weights: both evaluations of a step "
            "must see the same batch with dropout off (model.eval())"
        )
    return first


def _state(weights: Weights) -> list[tuple[int, int, int]]:
    # A counter of in-place changes, the place of the values, and the gradient, for every parameter.
    state = []
    for tensor in weights.all_tensors:
        grad = tensor.grad if tensor.is_leaf else None
        state.append((tensor._version, tensor.data_ptr(), -1 if grad is None else grad._version))
    return state


def _compare(before: list[tuple[int, int, int]], after: list[tuple[int, int, int]], weights: Weights) -> None:
    for row, old, new in zip(weights.table, before, after, strict=True):
        name = row.name or "a parameter"
        if old[:2] != new[:2]:
            raise RuntimeError(
                f"the closure modified {name} (shape {row.shape}): it must only evaluate the loss"
            )
        if old[2] != new[2]:
            raise RuntimeError(
                f"the closure computed a gradient of {name}: leave backward() out, MeZO needs the loss alone"
            )


def versions(weights: Weights) -> list[int]:
    """The counters of in-place changes of the trained weights."""
    return [tensor._version for tensor in weights.tensors]


def moved(weights: Weights) -> bool:
    """True if a parameter's values lie elsewhere than they did: after model.to() or .data = ..."""
    trained = [t for t, flag in zip(weights.all_tensors, weights.flags, strict=True) if flag]
    return any(
        a.data_ptr() != b.data_ptr() or a.dtype != b.dtype
        for a, b in zip(trained, weights.tensors, strict=True)
    )
