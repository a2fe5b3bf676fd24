"""Backward passes by finite differences, measured in three precisions against autograd in double precision.

The simulator cannot differentiate; it can run its own forward pass at a slightly moved input. For a function with a symmetric
Jacobian J, as normalisation has it, J h is both the directional derivative and the vector that backpropagation wants, so

    forward   (f(x + eps h) - f(x)) / eps,     error O(eps)
    central   (f(x + eps h) - f(x - eps h)) / (2 eps),     error O(eps^2)

Glossary (code name, symbol, shape)
    x          input of the module [n, D]
    h          gradient that arrives, for layer norm already multiplied by gamma [n, D]
    eps        step; the paper writes 1/N
    bound      eps D^(3/2) |gamma|^2 |dy|^2 / sigma^2: how large the error of layer norm's forward difference may be (recalled)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from papercore.tint import LayerNormBackward, LayerNormForward

PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
EPSILONS = tuple(10.0 ** (-k / 2) for k in range(15))  # 1 to 1e-7
SCALE_X, SCALE_GRADIENT = 2.0, 0.05  # sizes as they are in a trained model


def normalise(x: Tensor) -> Tensor:
    """(x - mean) / standard deviation, over the last axis, with layer norm's eps of 1e-5."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def gelu(x: Tensor) -> Tensor:
    """x Phi(x)."""
    return torch.nn.functional.gelu(x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"layernorm": normalise, "gelu": gelu}


def difference(f: Callable[[Tensor], Tensor], x: Tensor, h: Tensor, eps: float, *, central: bool) -> Tensor:
    """The directional derivative of f at x along h by a finite difference, all in the precision of x."""
    if central:
        return (f(x + eps * h) - f(x - eps * h)) / (2 * eps)
    return (f(x + eps * h) - f(x)) / eps


def case(n: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and h [n, width] in double precision."""
    g = torch.Generator().manual_seed(seed)
    x = SCALE_X * torch.randn(n, width, generator=g, dtype=torch.float64)
    return x, SCALE_GRADIENT * torch.randn(n, width, generator=g, dtype=torch.float64)


def true_gradient(f: Callable[[Tensor], Tensor], x: Tensor, h: Tensor) -> Tensor:
    """J^T h by autograd."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, h)[0]


def relative(found: Tensor, true: Tensor) -> float:
    """|found - true| / |true| over all entries."""
    return float((found.double() - true).norm() / true.norm())


def curves(n: int, width: int, seed: int) -> dict[str, np.ndarray]:
    """Relative error [eps] of every function, precision and kind of difference, named "layernorm_fp32_central"."""
    out = {}
    x, h = case(n, width, seed)
    for name, f in FUNCTIONS.items():
        true = true_gradient(f, x, h)
        for precision, dtype in PRECISIONS.items():
            for kind in ("forward", "central"):
                errors = [
                    relative(difference(f, x.to(dtype), h.to(dtype), eps, central=kind == "central"), true)
                    for eps in EPSILONS
                ]
                out[f"{name}_{precision}_{kind}"] = np.array(errors)
    return out


def slope(errors: Any, epsilons: Any, *, floor: float = 0.0, decades: float = 2.0) -> float:
    """Least-squares slope of log error against log eps over the first `decades` from the largest eps that is at most 0.1.

    Raises:
        ValueError: the error is not above `floor` all along these decades: there is no slope to speak of.
    """
    eps, error = np.asarray(epsilons, dtype=float), np.asarray(errors, dtype=float)
    top = eps[eps <= 0.1 * (1 + 1e-9)].max()
    used = (eps <= top * (1 + 1e-9)) & (eps >= top * 10.0**-decades * (1 - 1e-9))
    if used.sum() < 3 or not (error[used] > floor).all():
        raise ValueError(
            f"no slope: {int(used.sum())} points over {decades:g} decades, least error {error[used].min():.1e}."
        )
    return float(np.polyfit(np.log(eps[used]), np.log(error[used]), 1)[0])


def bound_share(seed: int, *, cases: int = 40) -> np.ndarray:
    """Error over its recalled bound [cases, eps] for layer norm by the kernel's own forward difference, in double precision.

    Widths, scales of input and gradient and gamma differ from case to case; a share above 1 breaks the bound.
    """
    g = torch.Generator().manual_seed(seed)
    out = np.zeros((cases, len(EPSILONS)))
    for number in range(cases):
        width = int(torch.randint(4, 97, (1,), generator=g))
        size = torch.rand(3, generator=g, dtype=torch.float64) * 4 - 2  # logarithms
        x = 10 ** size[0] * torch.randn(1, 1, width, generator=g, dtype=torch.float64)
        grad = 10 ** (size[1] / 2) * torch.randn(1, 1, width, generator=g, dtype=torch.float64)
        gamma = 10 ** (size[2] / 2) * (1 + 0.3 * torch.randn(width, generator=g, dtype=torch.float64))
        forward = LayerNormForward(eps=0.0)
        _, memory = forward(x, gamma, torch.zeros_like(gamma))
        true = true_gradient(
            lambda t: torch.nn.functional.layer_norm(t, t.shape[-1:], eps=0.0), x, gamma * grad
        )
        sigma = x.std(unbiased=False)
        for column, eps in enumerate(EPSILONS):
            found = LayerNormBackward(fd_eps=eps)(grad, memory, gamma)
            bound = eps * width**1.5 * gamma.norm() ** 2 * grad.norm() ** 2 / sigma**2
            # Below the rounding of the difference itself no bound on the method says anything.
            rounding = 1e-15 * width / eps
            out[number, column] = float(((found - true).norm() - rounding).clamp(min=0) / bound)
    return out
