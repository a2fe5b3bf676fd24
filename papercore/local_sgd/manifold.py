"""The manifold of minimisers: the projection that gradient flow makes on it, and derivatives of the loss at its points.

Local SGD paper, arXiv 2303.01215: Phi(theta) is the limit of d theta / ds = -grad L from theta. SGD stays close to the
manifold Gamma, and what it does over a long time is what Phi(theta) does.

Glossary (code name, symbol, shape)
    theta         a point in R^d, any shape for `project_to_manifold`, [d] elsewhere
    Phi           project_to_manifold
    hessian       second derivative of L                                   [d, d]
    contract(M)   grad^3 L[M], gradient of <Hessian, M> with M held fixed   [d]
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from papercore.local_sgd.schedules import _number, _whole

__all__ = ["LossFn", "derivatives", "project_to_manifold"]

LossFn = Callable[[Tensor], Tensor]

# Dormand and Prince, order 5 with an error estimate of order 4. The last stage is the first of the next step.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (
    71 / 57600,
    0.0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)

_ROUNDING = 1e-14
_LOWEST_TOL = 1e-12


def project_to_manifold(
    loss_fn: LossFn, theta: Tensor, tol: float = 1e-9, *, max_steps: int = 20_000
) -> Tensor:
    """Phi(theta): where gradient flow from theta ends, by an adaptive Runge-Kutta method of order 5 in float64.

    Args:
        loss_fn: point -> scalar tensor, differentiable; called with float64 points of theta's shape.
        theta: the start.
        tol: the flow has arrived when the norm of the gradient is at most tol; the error of a step is kept below
            tol * (1 + |theta|).
        max_steps: attempted steps before giving up.

    Returns:
        The end point, a new tensor of theta's shape and dtype, without a graph.

    Raises:
        ValueError: the gradient is not finite, or the flow does not arrive in max_steps (no minimum at a finite distance, or
            curvatures of very different size).
        TypeError: theta is no floating-point tensor, or loss_fn does not return a scalar tensor that depends on it.

    >>> end = project_to_manifold(lambda p: (p[0] * p[1] - 1) ** 2 / 2, torch.tensor([2.0, 1.0]))
    >>> round(float(end[0] * end[1]), 5), round(float(end[0] ** 2 - end[1] ** 2), 5)    # u^2 - v^2 is conserved
    (1.0, 3.0)
    """
    y = _point(theta)
    if not _LOWEST_TOL <= _number("tol", tol) < 1:
        raise ValueError(f"tol must lie between {_LOWEST_TOL:g} (rounding) and 1, got {tol}")
    max_steps = _whole("max_steps", max_steps, 1)
    shape, y = y.shape, y.reshape(-1)

    def slope(point: Tensor) -> Tensor:
        return -_gradient(loss_fn, point.reshape(shape), finite=False).reshape(-1)

    stages = [torch.tensor(row, dtype=y.dtype, device=y.device) for row in _STAGES]
    weights = torch.tensor(_ERROR, dtype=y.dtype, device=y.device)
    slopes = torch.empty(7, len(y), dtype=y.dtype, device=y.device)
    slopes[0] = -_gradient(loss_fn, y.reshape(shape)).reshape(-1)
    norm = float(slopes[0].norm())
    h = 1e-3 / max(1e-12, norm)
    for _ in range(max_steps):
        if norm <= tol:
            return y.reshape(shape).to(theta.dtype)
        for i, row in enumerate(stages, start=1):
            move = h * (row @ slopes[:i])
            slopes[i] = slope(y + move)
        error = h * float((weights @ slopes).norm())
        # Near the manifold the steps shrink with the distance that is left. A bound that did not shrink with them would let
        # the step size run into the unstable range, and the flow would hover at the size of the bound. The last term is the
        # rounding of the gradient, which no step size takes away.
        scale = 1 + float(y.norm())
        ratio = error / (min(tol * scale, 0.01 * float(move.norm())) + _ROUNDING * scale)
        if not math.isfinite(ratio):  # a trial step went too far; y itself has a finite gradient
            h *= 0.2
            continue
        if ratio <= 1:
            y = y + move
            slopes[0] = slopes[6]
            norm = float(slopes[0].norm())
        h *= min(4.0, max(0.2, 0.9 * ratio**-0.2)) if ratio > 0 else 4.0
    raise ValueError(
        f"gradient flow did not bring the gradient down to tol = {tol:g} in {max_steps} steps (its norm is {norm:.3g}): "
        "raise max_steps or tol, or check that the loss has a minimum at a finite distance."
    )


def derivatives(loss_fn: LossFn, theta: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Gradient [d], Hessian [d, d] and the third derivative as a map M [d, d] -> grad^3 L[M] [d], in float64, by autograd."""
    point = _point(theta).requires_grad_()
    with torch.enable_grad():
        gradient = _gradient(loss_fn, point, create_graph=True)
        rows = [_grad_or_zero(entry, point, create_graph=True) for entry in gradient]
        hessian = torch.stack(rows)

    def contract(matrix: Tensor) -> Tensor:
        with torch.enable_grad():
            return _grad_or_zero((hessian * matrix).sum(), point, retain_graph=True)

    return gradient.detach(), hessian.detach(), contract


def _point(theta: Tensor) -> Tensor:
    if not isinstance(theta, Tensor) or not theta.is_floating_point():
        kind = theta.dtype if isinstance(theta, Tensor) else type(theta).__name__
        raise TypeError(f"theta must be a floating-point tensor, got {kind}")
    return theta.detach().to(torch.float64, copy=True)


def _gradient(loss_fn: LossFn, point: Tensor, *, create_graph: bool = False, finite: bool = True) -> Tensor:
    with torch.enable_grad():
        point = point if create_graph else point.detach().requires_grad_()
        loss = loss_fn(point)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shown = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return a scalar tensor, got {shown}")
        if not loss.requires_grad:
            raise TypeError(
                "loss_fn returned a value that does not depend on its argument: compute it from the tensor passed in, "
                "without .item() or torch.no_grad()."
            )
        (gradient,) = torch.autograd.grad(loss.sum(), point, create_graph=create_graph)
    if finite and not bool(torch.isfinite(gradient).all()):
        raise ValueError(
            "the gradient of loss_fn is not finite: start closer to the manifold, or check the loss."
        )
    return gradient


def _grad_or_zero(
    value: Tensor, point: Tensor, *, create_graph: bool = False, retain_graph: bool | None = None
) -> Tensor:
    """Gradient of value, zero where it does not depend on the point (a quadratic loss has no third derivative)."""
    if not value.requires_grad:
        return torch.zeros_like(point)
    (out,) = torch.autograd.grad(
        value, point, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
    )
    return torch.zeros_like(point) if out is None else out
