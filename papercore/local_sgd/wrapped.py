"""An optimizer around another one: groups, state and hooks are the inner one's, and GradScaler leaves the skipping to it.

Learning-rate schedulers, gradient clipping and hooks then work on either of the two objects, since there is one list of
parameter groups. Under torch.amp.GradScaler a step whose gradients overflowed still reaches `step()`: the wrapper counts it as
attempted and the inner optimizer does not make it. (By itself GradScaler would not call `step()`, and ranks that skip different
steps would count differently.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["WrappedOptimizer"]

_COMMUNICATING = {"ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "WrappedOptimizer"}


class WrappedOptimizer(Optimizer):
    """Passes everything but `step` on to `inner`.

    Raises:
        TypeError: `optimizer` is no torch.optim.Optimizer. ValueError: it is one that communicates by itself.
    """

    # GradScaler then calls step() also where gradients overflowed, and leaves the skipping to it.
    _step_supports_amp_scaling = True

    def __init__(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ would make groups and a state of its own; those of the wrapped optimizer are used instead.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        if {cls.__name__ for cls in type(optimizer).__mro__} & _COMMUNICATING:
            raise ValueError(
                f"{type(optimizer).__name__} communicates by itself: wrap the plain optimizer that it stands for instead."
            )
        self.inner = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Groups of the wrapped optimizer, which may be changed."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """State of the wrapped optimizer."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Defaults of the wrapped optimizer."""
        return self.inner.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Called before every local step, by the wrapped optimizer."""
        return self.inner.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Called after every local step and before an average, by the wrapped optimizer."""
        return self.inner.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """As the wrapped optimizer's."""
        return self.inner.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """As the wrapped optimizer's."""
        return self.inner.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """As the wrapped optimizer's."""
        return self.inner.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """As the wrapped optimizer's."""
        return self.inner.register_load_state_dict_post_hook(hook, prepend)

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.inner.param_groups for p in group["params"]]

    def _local_step(self, closure: Callable[[], Any] | None) -> Any:
        found_inf = getattr(self, "found_inf", None)  # set by GradScaler for the time of the call
        if found_inf is None:
            return self.inner.step() if closure is None else self.inner.step(closure)
        scale = getattr(self, "grad_scale", None)  # None: the gradients were unscaled before
        if getattr(self.inner, "_step_supports_amp_scaling", False):
            self.inner.grad_scale, self.inner.found_inf = scale, found_inf  # type: ignore[attr-defined]
            try:
                return self.inner.step()
            finally:
                del self.inner.grad_scale, self.inner.found_inf  # type: ignore[attr-defined]
        if float(found_inf):
            return None
        if scale is not None:
            grads = [p.grad for p in self._all_params() if p.grad is not None]
            inverse = 1.0 / float(scale)
            with torch.no_grad():
                for grad in grads:
                    grad.mul_(inverse)
        return self.inner.step()
