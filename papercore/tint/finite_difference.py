"""Vector-Jacobian products by differences of values: how TinT goes backwards through what is not linear (section 2.4).

A simulator has no derivative of a layer norm or of an activation, but it has the functions themselves. Where the Jacobian J of f is
symmetric, J^T g = J g, and J g is the slope of f along g:

    forward   (f(x + epsilon g) - f(x)) / epsilon                       error O(epsilon)
    central   (f(x + epsilon g) - f(x - epsilon g)) / (2 epsilon)       error O(epsilon^2), one more evaluation

The rounding error grows as 1 / epsilon, so float32 is best near epsilon = 1e-2 (forward), and half precision has no good epsilon.
The error is proportional to epsilon |g| too: a `relative` epsilon is divided by the root mean square of each token's g, so that
neither a small nor a large gradient needs settings of its own; 1e-3 is then about best in float32. The official code uses one fixed epsilon, 1e-3.

Glossary
    grad       "finite_difference", "central" or "exact"
    fd_eps     epsilon = 1 / N of the paper, or the constant that epsilon is made of where `relative`
    direction  g, [..., D]
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["GRADIENTS", "directional_derivative"]

GRADIENTS = ("finite_difference", "central", "exact")


def chosen(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if it is allowed, else a ValueError that names the choices and the nearest one."""
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} = {value!r}: expected one of {', '.join(map(repr, allowed))}.{hint}")


def checked_epsilon(fd_eps: float) -> float:
    """`fd_eps` if it is a positive number, else a ValueError."""
    if not (math.isfinite(fd_eps) and fd_eps > 0):
        raise ValueError(
            f"fd_eps = {fd_eps}: expected a positive finite number, such as 1e-2 (1e-5 in float64)."
        )
    return float(fd_eps)


def directional_derivative(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    direction: Tensor,
    *,
    value: Tensor | None = None,
    grad: str = "finite_difference",
    fd_eps: float = 1e-2,
    scale: Tensor | float | None = None,
) -> Tensor:
    """The slope of `function` at x along `direction`, by a forward or a central difference.

    Args:
        function: maps [..., D] to [..., D].
        x, direction: [..., D], float32 or float64.
        value: function(x) if it is known; a forward difference then costs one evaluation.
        grad: "finite_difference" or "central".
        fd_eps: epsilon.
        scale: None: epsilon = fd_eps. Else a length that x varies on, a number or [..., 1]: epsilon is then
            fd_eps scale / rms(direction), token by token, and the relative error no longer depends on the size of `direction`.

    Returns:
        [..., D].

    Raises:
        ValueError: half precision, in which the difference is all rounding error; another `grad`; fd_eps not positive.

    >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    >>> directional_derivative(torch.square, x, torch.ones_like(x), fd_eps=0.5)
    tensor([[2.5000, 4.5000]], dtype=torch.float64)
    >>> directional_derivative(torch.square, x, torch.ones_like(x), fd_eps=0.5, grad="central")
    tensor([[2., 4.]], dtype=torch.float64)
    """
    chosen("grad", grad, GRADIENTS[:2])
    checked_epsilon(fd_eps)
    if torch.finfo(x.dtype).bits < 32:
        raise ValueError(
            f"a finite difference in {x.dtype} is all rounding error: use float32 or float64, or grad='exact'."
        )
    epsilon: Tensor | float = fd_eps
    if scale is not None:
        size = direction.square().mean(-1, keepdim=True).sqrt()
        # A token without a gradient may take any step: its difference is zero.
        epsilon = fd_eps * scale / torch.where(size > 0, size, 1.0)
    step = direction * epsilon
    if grad == "central":
        return (function(x + step) - function(x - step)) / (2 * epsilon)
    return (function(x + step) - (function(x) if value is None else value)) / epsilon
