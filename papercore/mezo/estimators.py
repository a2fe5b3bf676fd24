"""Zeroth-order estimates of a gradient, written out as tensors: for tests, figures and small models.

MeZO never forms these; here they are explicit, at the cost of a copy of the weights and one more for the
estimate.

Glossary
    z, eps, n         direction, perturbation, draws, as in optimizer.py
    slope             [L(theta + eps z) - L(theta - eps z)] / (2 eps), the projected gradient
    g_hat             mean over the draws of slope * z (SPSA, definition 1)
    d                 number of weights; the vector d of definitions 6 and 7 is `scales` here, a number a tensor
    H, tr, op         Hessian, its trace, its largest absolute eigenvalue
    r                 effective rank tr(H) / ||H||_op (assumption 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.mezo.arguments import check_choice, check_number, check_positive_integer, scalar_of
from papercore.mezo.noise import add_noise_, check_seed, noise
from papercore.mezo.seeds import draw_seed
from papercore.mezo.weights import Weights

Loss = Callable[[], Tensor | float]
_DISTS = ("gaussian", "rademacher", "sphere")


class _Probe:
    """The weights, a copy at the centre, and the loss at centre + coefficient * z, tensor by tensor."""

    def __init__(self, f: Loss, params: Iterable[Tensor], dist: str) -> None:
        params = [params] if isinstance(params, Tensor) else list(params)
        if not params:
            raise ValueError("params is empty: there is no parameter to estimate a gradient for")
        check_choice("dist", dist, _DISTS)
        # One group a tensor, so that each may have a coefficient of its own.
        self.weights = Weights([("", p, i, True) for i, p in enumerate(params)], trained=[True] * len(params))
        self.f, self.sphere = f, dist == "sphere"
        self.dist = "gaussian" if self.sphere else dist
        self.centre = [t.clone() for t in self.weights.tensors]
        self.params = params

    def length_factor(self, seed: int) -> float:
        """1, or what brings a Gaussian direction to the length sqrt(d) of the sphere."""
        if not self.sphere:
            return 1.0
        square = 0.0
        for tensor, start in zip(self.weights.tensors, self.weights.starts, strict=True):
            z = noise(seed, start, tensor.numel(), device=tensor.device)
            square += float(z.double().square().sum())
        return math.sqrt(self.weights.numel / square)

    def loss(self, seed: int, coefficients: Sequence[float]) -> float:
        """L at centre + coefficient * z, then back to the centre. FloatingPointError if it is not finite."""
        try:
            self.weights.add(
                lambda b: (1.0, [(seed, coefficients[b.group])]),
                dist=self.dist,
                backend="auto",
                source=self.centre,
            )
            value = float(scalar_of(self.f()))
        finally:
            self.weights.copy_from(self.centre)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"f returned {value} at theta + eps z; the parameters were restored. Lower eps."
            )
        return value

    def zeros(self) -> list[Tensor]:
        return [
            torch.zeros_like(p, dtype=_wide(p), memory_format=torch.contiguous_format) for p in self.params
        ]

    def add(self, estimate: list[Tensor], seed: int, coefficients: Sequence[float]) -> None:
        for tensor, start, coefficient in zip(estimate, self.weights.starts, coefficients, strict=True):
            add_noise_([tensor], [start], [(seed, coefficient)], dist=self.dist)

    def finished(self, estimate: list[Tensor]) -> list[Tensor]:
        return [g.to(p.dtype) for g, p in zip(estimate, self.params, strict=True)]


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


@torch.no_grad()
def spsa_grad(
    f: Loss,
    params: Iterable[Tensor],
    eps: float,
    *,
    n: int = 1,
    dist: str = "gaussian",
    seed: int = 0,
    step: int = 0,
    scales: Sequence[float] | None = None,
    modified: str = "variance",
) -> list[Tensor]:
    """n-SPSA (definition 1; algorithm 2): the mean over n draws of slope * z, a tensor for every parameter.

    f: () -> scalar, reads `params` where they stand, evaluated 2n times without gradients. params: tensors,
    changed during the call and put back to the same bits. seed, step: the draws are those of step `step` of
    MeZO(seed=seed). dist: "gaussian", "rademacher", or "sphere" (uniform on the sphere of radius sqrt(d), as
    in the theory). scales: a number c > 0 for each parameter tensor; the loss is then taken at theta +- eps z
    / c and the slope multiplies c z (modified="variance", definition 6: same expectation, other variance) or
    z (modified="expectation", definition 7: the expectation becomes gradient / c).

    Returns tensors of the parameters' shapes and dtypes. Memory: two copies of the weights. Raises ValueError
    or TypeError for arguments, FloatingPointError if a loss is NaN or infinite.

    >>> weight = torch.tensor([3.0, -1.0])
    >>> (estimate,) = spsa_grad(lambda: (weight**2).sum() / 2, [weight], 1e-3, n=4000, dist="rademacher")
    >>> bool((estimate - weight).abs().max() < 0.2)
    True
    """
    eps, n = check_number("eps", eps, above=0.0), check_positive_integer("n", n)
    check_choice("modified", modified, ("variance", "expectation"))
    probe = _Probe(f, params, dist)
    inner = [1.0] * len(probe.params)
    if scales is not None:
        if len(scales) != len(inner):
            raise ValueError(
                f"scales has {len(scales)} numbers for {len(inner)} parameters: give one for each"
            )
        inner = [1.0 / check_number("scales", c, above=0.0) for c in scales]
    outer = [1.0] * len(inner) if modified == "expectation" else [1.0 / c for c in inner]
    estimate = probe.zeros()
    for draw in range(n):
        z = draw_seed(check_seed(seed), step, draw)
        length = probe.length_factor(z)
        plus = probe.loss(z, [eps * length * c for c in inner])
        minus = probe.loss(z, [-eps * length * c for c in inner])
        slope = (plus - minus) / (2 * eps)
        probe.add(estimate, z, [slope * length * c / n for c in outer])
    return probe.finished(estimate)


@torch.no_grad()
def one_point_grad(
    f: Loss,
    params: Iterable[Tensor],
    eps: float,
    previous: float | None,
    *,
    dist: str = "gaussian",
    seed: int = 0,
    step: int = 0,
) -> tuple[list[Tensor], float]:
    """One-point residual feedback (definition 8): [L(theta_t + eps z_t) - L(theta_(t-1) + eps z_(t-1))] / eps
    * z_t.

    One evaluation a step. previous: the loss that the call of the step before returned, None at the first
    step, whose estimate is zero. Returns (estimate, loss to hand to the next call). The printed formula omits
    the factor z_t.

    >>> weight = torch.ones(3)
    >>> value = None
    >>> for step in range(300):
    ...     (g,), value = one_point_grad(lambda: (weight**2).sum(), [weight], 0.1, value, step=step)
    ...     weight -= 0.005 * g
    >>> bool((weight**2).sum() < 1)
    True
    """
    eps = check_number("eps", eps, above=0.0)
    probe = _Probe(f, params, dist)
    z = draw_seed(check_seed(seed), step, 0)
    length = probe.length_factor(z)
    value = probe.loss(z, [eps * length] * len(probe.params))
    estimate = probe.zeros()
    if previous is not None:
        probe.add(estimate, z, [(value - previous) / eps * length] * len(estimate))
    return probe.finished(estimate), value


@torch.no_grad()
def gradient_norms(
    f: Loss, params: Iterable[Tensor], eps: float, *, n: int = 1, dist: str = "gaussian", seed: int = 0
) -> list[float]:
    """Norm of each parameter tensor's gradient from losses alone (proposition 1): 2n evaluations a tensor.

    Root of the mean of slope^2 with z in one tensor at a time, since E <v, z>^2 = |v|^2. At n = 1 this is
    |slope|, whose mean is sqrt(2/pi) = 0.80 of the norm for Gaussian z.

    >>> weight = torch.tensor([3.0, -4.0])
    >>> 4.5 < gradient_norms(lambda: (weight**2).sum() / 2, [weight], 1e-2, n=2000)[0] < 5.5
    True
    """
    eps, n = check_number("eps", eps, above=0.0), check_positive_integer("n", n)
    probe = _Probe(f, params, dist)
    if probe.sphere:
        raise ValueError("dist='sphere' is not offered for single tensors: take 'gaussian' or 'rademacher'")
    norms = []
    for which in range(len(probe.params)):
        total = 0.0
        for draw in range(n):
            z = draw_seed(check_seed(seed), which, draw)
            at = [eps if i == which else 0.0 for i in range(len(probe.params))]
            total += ((probe.loss(z, at) - probe.loss(z, [-c for c in at])) / (2 * eps)) ** 2
        norms.append(math.sqrt(total / n))
    return norms


@dataclass(frozen=True)
class EffectiveRank:
    """tr(H) / ||H||_op with its parts; trace_se is the standard error of the trace over the probes."""

    rank: float
    trace: float
    trace_se: float
    top: float


def effective_rank(
    f: Callable[[], Tensor],
    params: Iterable[Tensor],
    *,
    probes: int = 32,
    iterations: int = 30,
    seed: int = 0,
) -> EffectiveRank:
    """Effective rank of the Hessian of f at the parameters (assumption 1): the number that MeZO's rate
    depends on.

    tr(H) by Hutchinson's estimate over Rademacher probes, ||H||_op = largest |eigenvalue| by Lanczos with
    full re-orthogonalisation. f: () -> scalar tensor with a graph, twice differentiable. Cost: probes +
    iterations products with the Hessian; memory: `iterations` vectors of the size of the weights. For a
    Hessian with negative eigenvalues the ratio understates the number of directions that matter.

    Raises ValueError if no parameter requires a gradient or the Hessian is zero.

    >>> weight = torch.nn.Parameter(torch.ones(50, dtype=torch.float64))
    >>> result = effective_rank(lambda: (weight[:8] ** 2).sum(), [weight])
    >>> round(result.rank, 6), round(result.top, 6)
    (8.0, 2.0)
    """
    probes = check_positive_integer("probes", probes)
    iterations = check_positive_integer("iterations", iterations)
    chosen = [p for p in params if p.requires_grad]
    if not chosen:
        raise ValueError("no parameter requires a gradient: effective_rank differentiates f twice")
    with torch.enable_grad():
        gradients = torch.autograd.grad(f(), chosen, create_graph=True, allow_unused=True)
        # A parameter that f uses linearly or not at all has no second derivative.
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for g, p in zip(gradients, chosen, strict=True)
            ]
        )
    if not flat.requires_grad:
        raise ValueError("the Hessian of f is zero: f is linear in the parameters")

    def times_hessian(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(flat, chosen, vector, retain_graph=True, allow_unused=True)
        zeros = [torch.zeros_like(p) if h is None else h for h, p in zip(parts, chosen, strict=True)]
        return torch.cat([h.reshape(-1) for h in zeros])

    def probe(number: int, dist: str) -> Tensor:
        return noise(
            draw_seed(check_seed(seed), number),
            0,
            flat.numel(),
            dist=dist,
            device=flat.device,
            dtype=flat.dtype,
        )

    samples = torch.tensor(
        [float(z @ times_hessian(z)) for z in (probe(i, "rademacher") for i in range(probes))],
        dtype=torch.float64,
    )
    top = _largest_eigenvalue(times_hessian, probe(probes, "gaussian"), min(iterations, flat.numel()))
    if top == 0:
        raise ValueError("the Hessian of f is zero at the parameters: its effective rank is not defined")
    trace = float(samples.mean())
    error = float(samples.std() / math.sqrt(probes)) if probes > 1 else math.nan
    return EffectiveRank(rank=trace / top, trace=trace, trace_se=error, top=top)


def _largest_eigenvalue(times: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> float:
    """max |eigenvalue| of a symmetric operator: Lanczos, the basis kept orthogonal by projecting twice."""
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(iterations):
        vector = times(basis[-1])
        diagonal.append(float(vector @ basis[-1]))
        for _ in range(2):
            for other in basis:
                vector = vector - (vector @ other) * other
        length = float(vector.norm())
        if length <= 1e-10 * max(1e-30, max(abs(a) for a in diagonal)) or len(diagonal) == iterations:
            break
        beside.append(length)
        basis.append(vector / length)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    side = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    if side.numel():
        matrix = matrix + torch.diag(side, 1) + torch.diag(side, -1)
    return float(torch.linalg.eigvalsh(matrix).abs().max())
