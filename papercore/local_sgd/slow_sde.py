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
    sigma_hat         Sigma_hat: entry (i, j) of Sigma - P Sigma P in the eigenbasis, over lambda_i + lambda_j
    psi_hat           the same, times psi(eta_h (lambda_i + lambda_j))
    contract(M)       grad^3 L[M] = gradient of <Hessian, M> with M held fixed    [d]
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from papercore.local_sgd.manifold import LossFn, derivatives
from papercore.local_sgd.schedules import _number, _whole

__all__ = ["Drift", "label_noise_regularizer", "psi", "psi_integral", "slow_sde_drift"]

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


@dataclass(frozen=True)
class Drift:
    """Coefficients of the Slow SDE at a point of the manifold, per unit of slow time (eta^2 a step).

    d zeta = diffusion dW + (drift1 + drift2 + curvature) dt, in Ito's sense.

    diffusion: [d, d] symmetric root of P Sigma P / B. drift1: [d] SGD's drift, tangent. drift2: [d] what Local SGD adds, tangent.
    curvature: [d] 1/2 d^2 Phi[P Sigma P] / B, normal: Ito's second-order term, which keeps the diffusion on the curved manifold.
    rank: positive eigenvalues of the Hessian; the manifold has dimension d - rank. eigenvalues: [d] ascending.
    projector: [d, d] on the tangent space. sigma_hat, psi_hat: [d, d], see the head of this file.
    """

    diffusion: Tensor
    drift1: Tensor
    drift2: Tensor
    rank: int
    curvature: Tensor
    eigenvalues: Tensor
    projector: Tensor
    sigma_hat: Tensor
    psi_hat: Tensor

    @property
    def total(self) -> Tensor:
        """All terms in front of dt, [d]."""
        return self.drift1 + self.drift2 + self.curvature


def slow_sde_drift(
    loss_fn: LossFn,
    theta: Tensor,
    sigma: Tensor,
    *,
    k: int,
    batch: int,
    eta_h: float | None = None,
    rank_tol: float = 1e-8,
    grad_tol: float = 1e-6,
) -> Drift:
    """Diffusion, drift-I and drift-II of the Slow SDE at theta, exact by autograd; dense, so for small d (d^2 backward passes).

    At a point of the manifold all second derivatives of Phi are known: d^2 Phi[v_i, v_j] = -P grad^3 L[v_i v_j^T] /
    (lambda_i + lambda_j) where the sum is positive (the drifts), and -Hessian^+ grad^3 L[v_i v_j^T] for two tangent directions
    (the curvature term). Both are used; nothing is left out.

    Args:
        loss_fn: point [d] -> scalar tensor; called in float64.
        theta: [d], on the manifold.
        sigma: [d, d], covariance of the gradient of ONE sample at theta; symmetric, positive semi-definite.
        k: workers. batch: GLOBAL batch, a multiple of k.
        eta_h: learning rate times local steps, >= 0. None (or math.inf): the limit eta H -> infinity, psi = 1, which QSR
            approaches as the rate falls: drift2 = (k - 1) drift1. 0: SGD, no drift2.
        rank_tol: eigenvalues up to rank_tol times the largest count as zero. What is taken for positive by mistake enters as
            1/(lambda_i + lambda_j): look at `rank`.
        grad_tol: theta counts as on the manifold when the norm of the gradient is at most grad_tol * lambda_max * (1 + |theta|).

    Returns:
        Drift, in theta's dtype, on its device.

    Raises:
        ValueError: theta is not on the manifold or no minimiser there, sigma is no covariance, or a number is out of range.
        TypeError: theta or sigma is no floating-point tensor, a count is not whole.

    >>> point = torch.tensor([2.0, 0.5], dtype=torch.float64)                     # on u v = 1
    >>> normal = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    >>> drift = slow_sde_drift(lambda p: (p[0] * p[1] - 1) ** 2 / 2, point, normal @ normal.T, k=8, batch=8)
    >>> drift.rank, drift.drift2 / drift.drift1
    (1, tensor([7.0000, 7.0000], dtype=torch.float64))
    """
    k, batch = _whole("k", k, 1), _whole("batch", batch, 1)
    if batch % k:
        raise ValueError(
            f"batch = {batch} is not a multiple of k = {k}: batch is the global batch, k times a worker's."
        )
    if eta_h is not None and not _number("eta_h", eta_h) >= 0:
        raise ValueError(f"eta_h must be >= 0 (or None for the limit of large eta H), got {eta_h}")
    if not 0 <= _number("rank_tol", rank_tol) < 1:
        raise ValueError(f"rank_tol must lie in [0, 1), got {rank_tol}")
    if isinstance(theta, Tensor) and theta.ndim != 1:
        raise ValueError(f"theta must be a vector [d], got shape {tuple(theta.shape)}: flatten it")
    gradient, hessian, contract = derivatives(loss_fn, theta)
    sigma = _covariance(sigma, len(theta)).to(hessian)
    lam, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    lam_max = float(lam[-1].clamp_min(0))
    _check_on_manifold(gradient, theta, lam, lam_max, rank_tol, grad_tol)

    positive = lam > rank_tol * lam_max
    tangent = (~positive).to(lam)
    lam_kept = torch.where(positive, lam, torch.zeros_like(lam))
    sums = lam_kept[:, None] + lam_kept[None, :]
    inverse = torch.where(sums > 0, 1 / torch.where(sums > 0, sums, torch.ones_like(sums)), 0.0)
    share = torch.ones_like(sums) if eta_h is None or math.isinf(eta_h) else psi(float(eta_h) * sums)

    # In the eigenbasis; Sigma_dia is what is left of Sigma when its tangent-tangent block is taken out.
    rotated = vectors.T @ sigma @ vectors
    parallel = rotated * tangent[:, None] * tangent[None, :]
    hat = (rotated - parallel) * inverse

    def back(matrix: Tensor) -> Tensor:
        return vectors @ matrix @ vectors.T

    projector = back(torch.diag(tangent))
    pseudo_inverse = back(
        torch.diag(torch.where(positive, 1 / torch.where(positive, lam, torch.ones_like(lam)), 0.0))
    )
    sigma_hat, psi_hat, sigma_par = back(hat), back(hat * share), back(parallel)
    terms = {
        "diffusion": _root(sigma_par) / math.sqrt(batch),
        "drift1": -projector @ contract(sigma_hat) / (2 * batch),
        "drift2": -(k - 1) * projector @ contract(psi_hat) / (2 * batch),
        "curvature": -pseudo_inverse @ contract(sigma_par) / (2 * batch),
        "eigenvalues": lam,
        "projector": projector,
        "sigma_hat": sigma_hat,
        "psi_hat": psi_hat,
    }
    return Drift(rank=int(positive.sum()), **{name: term.to(theta.dtype) for name, term in terms.items()})


def _check_on_manifold(
    gradient: Tensor, theta: Tensor, lam: Tensor, lam_max: float, rank_tol: float, grad_tol: float
) -> None:
    norm, bound = float(gradient.norm()), grad_tol * lam_max * (1 + float(theta.detach().norm()))
    if norm > bound:
        raise ValueError(
            f"theta is not on the manifold of minimisers: the norm of the gradient is {norm:.3g}, at most {bound:.3g} is allowed. "
            "Move it there first: theta = project_to_manifold(loss_fn, theta)."
        )
    lowest = float(lam[0])
    if lowest < -rank_tol * lam_max or lam_max == 0 and lowest < 0:
        raise ValueError(
            f"theta is not a local minimiser: the Hessian has the eigenvalue {lowest:.3g} beside {lam_max:.3g}. If that is rounding, "
            "give theta in float64 from project_to_manifold, or raise rank_tol."
        )


def _covariance(sigma: Tensor, d: int) -> Tensor:
    if not isinstance(sigma, Tensor) or not sigma.is_floating_point():
        kind = sigma.dtype if isinstance(sigma, Tensor) else type(sigma).__name__
        raise TypeError(f"sigma must be a floating-point tensor [d, d], got {kind}")
    if sigma.shape != (d, d):
        raise ValueError(
            f"sigma must have shape ({d}, {d}), as theta has {d} entries; got {tuple(sigma.shape)}"
        )
    sigma = sigma.detach()
    scale = float(sigma.abs().max())
    # Loose: c * Hessian, at a point that is on the manifold up to rounding, is a fair covariance.
    slack = 1e-6 * scale
    if not math.isfinite(scale) or float((sigma - sigma.T).abs().max()) > slack:
        raise ValueError("sigma must be a finite symmetric matrix: it is the covariance of a gradient")
    wide = ((sigma + sigma.T) / 2).double()
    lowest = float(torch.linalg.eigvalsh(wide)[0])
    if lowest < -slack:
        raise ValueError(f"sigma must be positive semi-definite: it has the eigenvalue {lowest:.3g}")
    return wide


def _root(matrix: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix; negative rounding counts as 0."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
