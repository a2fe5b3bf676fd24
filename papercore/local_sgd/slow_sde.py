"""The Slow SDE of SGD and Local SGD near a manifold of minimisers, exact and dense, for small problems.

Local SGD (Gu, Lyu, Huang, Arora, ICLR 2023, arXiv 2303.01215), in slow time (eta^2 a step):

    d zeta = P( B^-1/2 Sigma_par^1/2 dW                              diffusion
                - 1/(2B)       grad^3 L[Sigma_hat] dt                drift-I
                - (K-1)/(2B)   grad^3 L[Psi_hat(eta H)] dt )         drift-II

SGD is the same without drift-II; for eta H -> infinity Psi_hat -> Sigma_hat and the drift is K times SGD's.

Glossary (code name, paper symbol, shape)
    theta             zeta, a point of the manifold Gamma                         [d]
    sigma             Sigma(zeta), covariance of the gradient of ONE sample       [d, d]
    k, batch          K workers; B, the GLOBAL batch K * B_loc
    eta_h             eta * H, learning rate times local steps
    eigenvalues       lambda_i of the Hessian at zeta, ascending; `rank` of them count as positive
    projector         P, on the tangent space (kernel of the Hessian) = dPhi(zeta) [d, d]
    sigma_hat         Sigma_hat: entry (i, j) of Sigma - P Sigma P in the eigenbasis over lambda_i + lambda_j
    psi_hat           the same, times psi(eta_h (lambda_i + lambda_j))
    third[M]          grad^3 L[M] = gradient of <Hessian, M> with M held fixed    [d]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from papercore.local_sgd.schedules import _number, _whole

Loss = Callable[[Tensor], Tensor]

# psi(x) = x/2 - x^2/6 + x^3/24 - ...: below 0.5 fourteen terms leave less than 1e-16 of the value, while
# 1 + expm1(-x)/x cancels there.
_SERIES = [(-1.0) ** (n + 1) / math.factorial(n + 1) for n in range(1, 15)]
_SMALL = 0.5
# E1(40) < 2e-19: beyond, F(x) = x - ln x - gamma to the last bit. Below, 32 Gauss nodes are exact to rounding.
_LARGE = 40.0
_EULER_GAMMA = 0.57721566490153286


@overload
def psi(x: float) -> float: ...
@overload
def psi(x: Tensor) -> Tensor: ...
def psi(x: float | Tensor) -> float | Tensor:
    """psi(x) = (e^-x - 1 + x) / x, with psi(0) = 0: x/2 near 0, 1 for large x.

    The share of drift-II that `x = eta H (lambda_i + lambda_j)` lets through. Accurate to rounding for every
    x >= 0 (for x < 0 it continues analytically); differentiable any number of times, also at 0.

    Args:
        x: a float, or a tensor of any shape; integers count as float, half precision is computed in float32.

    Returns:
        A float, or a tensor of x's shape and (floating) dtype.

    >>> round(psi(1.0), 4), psi(0.0)
    (0.3679, 0.0)
    >>> psi(torch.tensor([0.0, 2.0], dtype=torch.float64))
    tensor([0.0000, 0.5677], dtype=torch.float64)
    """
    if not isinstance(x, Tensor):
        value = _number("x", x)
        if abs(value) < _SMALL:
            return _horner(value)
        return 1.0 + math.expm1(-value) / value
    wide = _wide(x)
    small = wide.abs() < _SMALL
    # Each branch sees only arguments it can differentiate: a NaN in the other would spoil the gradient.
    near = _horner(torch.where(small, wide, torch.zeros_like(wide)))
    far = torch.where(small, torch.ones_like(wide), wide)
    return torch.where(small, near, 1.0 + torch.expm1(-far) / far).to(_float_dtype(x))


@overload
def psi_integral(x: float) -> float: ...
@overload
def psi_integral(x: Tensor) -> Tensor: ...
def psi_integral(x: float | Tensor) -> float | Tensor:
    """F(x), the integral of psi from 0 to x: x - Ein(x) with Ein(x) = ln x + gamma + E1(x).

    x^2/4 near 0, x - ln x - gamma for large x. Its derivative is psi, by autograd as well. For -40 <= x < 0 it
    continues analytically; below that it is not accurate.

    Args and returns as `psi`.

    >>> round(psi_integral(1.0), 6), round(psi_integral(1e-6) * 4e12, 5)
    (0.2034, 1.0)
    """
    if not isinstance(x, Tensor):
        value = _number("x", x)
        if value > _LARGE:
            return value if math.isinf(value) else value - math.log(value) - _EULER_GAMMA
        nodes, weights = _gauss()
        return value * sum(w * psi(value * t) for t, w in zip(nodes, weights, strict=True))
    wide = _wide(x)
    large = wide > _LARGE
    below = torch.where(large, torch.ones_like(wide), wide)
    above = torch.where(large, wide, torch.full_like(wide, _LARGE))
    node, weight = (torch.tensor(a, dtype=wide.dtype, device=wide.device) for a in _gauss())
    near = below * (psi(below.unsqueeze(-1) * node) * weight).sum(-1)
    return torch.where(large, above - above.log() - _EULER_GAMMA, near).to(_float_dtype(x))


def label_noise_regularizer(eigs: Tensor, eta: float, h: float, k: int) -> Tensor:
    """What Local SGD with label noise descends on the manifold: tr(Hessian) + (K-1)/(2 eta H) tr F(2 eta H Hessian).

    With gradient noise Sigma = c * Hessian the Slow SDE is d zeta/dt = -(c/4B) times the gradient of this along
    the manifold. It runs from tr (eta H -> 0, SGD) to K tr (eta H -> infinity).

    Args:
        eigs: Tensor[..., m], eigenvalues of the Hessian (zeros add nothing); differentiable.
        eta, h, k: learning rate > 0, local steps H >= 1, workers K >= 1. h may be math.inf.

    Returns:
        Tensor[...], the sum over the last axis.

    >>> float(label_noise_regularizer(torch.tensor([4.0, 0.0]), eta=0.1, h=1, k=1))
    4.0
    """
    if not isinstance(eigs, Tensor):
        raise TypeError(f"eigs must be a tensor of eigenvalues, got {type(eigs).__name__}")
    if eigs.ndim == 0:
        raise ValueError("eigs must have a last axis of eigenvalues, got a scalar: use eigs.reshape(1)")
    k = _whole("k", k, 1)
    if not 0 < _number("eta", eta) < math.inf:
        raise ValueError(f"eta must be a positive learning rate, got {eta}")
    if not _number("h", h) >= 1:
        raise ValueError(f"h must be at least 1 local step, got {h}")
    eigs = eigs.to(_float_dtype(eigs))
    trace = eigs.sum(-1)
    if math.isinf(h):
        return k * trace
    scale = 2.0 * eta * h
    return trace + (k - 1) / scale * psi_integral(scale * eigs).sum(-1)


def _horner(x: Any) -> Any:
    total = x * _SERIES[-1]
    for coefficient in reversed(_SERIES[:-1]):
        total = x * (coefficient + total)
    return total


@functools.cache
def _gauss() -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1] (Golub and Welsch: eigenpairs of Jacobi's matrix)."""
    n = torch.arange(1, 32, dtype=torch.float64)
    off = n / torch.sqrt(4 * n * n - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return ((nodes + 1) / 2).tolist(), vectors[0].square().tolist()


def _float_dtype(x: Tensor) -> torch.dtype:
    if x.is_complex():
        raise TypeError(f"expected real numbers, got {x.dtype}")
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def _wide(x: Tensor) -> Tensor:
    dtype = _float_dtype(x)
    return x.to(torch.float32 if dtype.itemsize < 4 else dtype)
