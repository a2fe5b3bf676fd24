"""Sharpness of a module's loss: the largest eigenvalue of the Hessian (Lanczos) or its trace (Hutchinson).

What Local SGD is said to lower (arXiv 2303.01215): with label noise the drift descends the trace of the Hessian on the
manifold of minimisers. The Hessian is never formed; a product with it costs about two gradients.

Glossary (code name, symbol)
    hvp           product of the Hessian with a vector, by differentiating <gradient, vector>
    basis         Lanczos vectors, orthonormal
    residual      |H y - value y| for the unit Ritz vector y; an eigenvalue lies within it of value
    probe         z, entries +1 or -1 with equal chance; E[z^T H z] = tr H
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from papercore.local_sgd.schedules import _number, _whole

__all__ = ["Sharpness", "sharpness"]

ModuleLoss = Callable[[nn.Module, Any], Tensor]

# Lanczos vectors kept before a restart from the best Ritz vector: memory for this many copies of the parameters.
_BASIS = 24


@dataclass(frozen=True)
class Sharpness:
    """float(result) is `value`.

    value: eigenvalue or trace. se: standard error of the trace over the probes (NaN for one probe; 0 for kind="top").
    residual: for kind="top", the norm of H y - value y (0 for the trace). products: Hessian-vector products, each over all batches.
    vector: for kind="top", the unit eigenvector, flat, in the order of the trainable parameters; else None.
    """

    value: float
    se: float
    residual: float
    products: int
    vector: Tensor | None = None

    def __float__(self) -> float:
        return self.value


def sharpness(
    model: nn.Module,
    loss_fn: ModuleLoss,
    data: Any,
    *,
    kind: str = "top",
    n_probe: int = 32,
    generator: torch.Generator | None = None,
    tol: float = 1e-3,
    max_products: int = 200,
) -> Sharpness:
    """Largest eigenvalue (algebraically) or trace of the Hessian of the loss in the model's trainable parameters.

    The model is evaluated in eval mode (no dropout, batch norm on its running statistics) and left in the mode, and with the
    gradients, that it had. Works on any device; attention kernels without second derivatives must be replaced (for
    torch's, `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`).

    Args:
        loss_fn: loss_fn(model, batch) -> scalar tensor, the mean loss of the batch.
        data: one batch (a tensor, a tuple or a dict), or a list or another iterable of batches, of which the mean loss is
            taken: batches of equal size weigh as one big batch. Read once and kept.
        kind: "top" or "trace".
        n_probe: probes of the trace, >= 1; its standard error falls as n_probe^-1/2. Not used for "top".
        generator: of the probes and of the start vector, on the CPU; None: a generator of its own with seed 0.
        tol: "top" stops when residual <= tol * |value|. Not used for the trace.
        max_products: for "top", the most Hessian-vector products; `residual` says how far it came.

    Raises:
        ValueError: nothing to train, no batch, an unknown kind or a number out of range, a loss that is not finite.
        TypeError: a wrong kind of argument, or a loss that is no scalar tensor or does not depend on the parameters.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> loss = lambda model, batch: model(batch).square().sum() / 2               # Hessian diag(1, 4)
    >>> round(float(sharpness(model, loss, x)), 4), sharpness(model, loss, x, kind="trace", n_probe=4).value
    (4.0, 5.0)
    """
    if kind not in ("top", "trace"):
        raise ValueError(f"kind must be 'top' or 'trace', got {kind!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    n_probe, max_products = _whole("n_probe", n_probe, 1), _whole("max_products", max_products, 1)
    if not 0 < _number("tol", tol) < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    elif not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise TypeError("generator must be a torch.Generator on the CPU: its draws are moved to the model")
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no parameter with requires_grad: there is no Hessian")
    with _evaluated(model):
        hessian = _Hessian(model, loss_fn, _batches(data), parameters)
        if kind == "trace":
            return _trace(hessian, n_probe, generator)
        return _top(hessian, tol, max_products, generator)


class _Hessian:
    """Products of the Hessian of the mean loss with flat vectors."""

    def __init__(
        self, model: nn.Module, loss_fn: ModuleLoss, batches: list[Any], parameters: list[Tensor]
    ) -> None:
        self.model, self.loss_fn, self.batches, self.parameters = model, loss_fn, batches, parameters
        self.numel = sum(p.numel() for p in parameters)
        # One batch: its graph is kept for all products. Several: each is rebuilt, for the memory of one.
        self.kept = self._gradient(batches[0]) if len(batches) == 1 else None

    def _gradient(self, batch: Any) -> Tensor:
        loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shown = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return a scalar tensor, got {shown}")
        if not loss.requires_grad:
            raise TypeError(
                "loss_fn returned a loss that does not depend on the model's trainable parameters"
            )
        if not bool(torch.isfinite(loss.detach()).all()):
            raise ValueError(f"the loss is {float(loss.detach())}: there is no Hessian")
        grads = torch.autograd.grad(loss.sum(), self.parameters, create_graph=True, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for p, g in zip(self.parameters, grads, strict=True)
            ]
        )

    def products(self, vectors: Tensor) -> Tensor:
        """H V^T, [n, numel] for vectors [n, numel]; each batch's graph serves all of them."""
        out = torch.zeros_like(vectors)
        for batch in self.batches:
            gradient = self._gradient(batch) if self.kept is None else self.kept
            if not gradient.requires_grad:  # a loss linear in the parameters
                continue
            for row, vector in zip(out, vectors, strict=True):
                parts = torch.autograd.grad(
                    gradient, self.parameters, vector, retain_graph=True, allow_unused=True
                )
                offset = 0
                for p, part in zip(self.parameters, parts, strict=True):
                    if part is not None:
                        row[offset : offset + p.numel()] += part.reshape(-1)
                    offset += p.numel()
            del gradient
        return out / len(self.batches)

    def move(self, drawn: Tensor) -> Tensor:
        return drawn.to(self.parameters[0])


def _trace(hessian: _Hessian, n_probe: int, generator: torch.Generator) -> Sharpness:
    samples: list[float] = []
    while len(samples) < n_probe:
        n = min(8, n_probe - len(samples))  # eight vectors in memory at most
        signs = torch.randint(0, 2, (n, hessian.numel), generator=generator) * 2 - 1
        probes = hessian.move(signs.float())
        samples += (probes.double() * hessian.products(probes).double()).sum(1).tolist()
    values = torch.tensor(samples, dtype=torch.float64)
    se = float(values.std()) / math.sqrt(n_probe) if n_probe > 1 else math.nan
    return Sharpness(float(values.mean()), se, 0.0, n_probe)


def _top(hessian: _Hessian, tol: float, max_products: int, generator: torch.Generator) -> Sharpness:
    """Lanczos with full reorthogonalisation, restarted from the best Ritz vector when the basis is full."""
    start = hessian.move(torch.randn(hessian.numel, generator=generator))
    start /= start.norm()
    used = 0
    while True:
        basis = [start]
        alphas: list[float] = []
        betas: list[float] = []
        while True:
            q = basis[-1]
            w = hessian.products(q[None])[0]
            used += 1
            alphas.append(float(w @ q))
            stacked = torch.stack(basis)
            for _ in range(2):  # twice is enough (Kahan, Parlett)
                w -= stacked.T @ (stacked @ w)
            beta = float(w.norm())
            diagonal = torch.tensor(alphas, dtype=torch.float64)
            off = torch.tensor(betas, dtype=torch.float64)
            matrix = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
            values, vectors = torch.linalg.eigh(matrix)
            value, weights = float(values[-1]), vectors[:, -1]
            residual = abs(beta * float(weights[-1]))
            scale = float(values.abs().max())
            done = residual <= tol * abs(value) or beta <= 1e-7 * scale or len(basis) == hessian.numel
            if done or used == max_products or len(basis) == _BASIS:
                break
            betas.append(beta)
            basis.append(w / beta)
        start = weights.to(stacked) @ stacked
        start /= start.norm()
        if done or used == max_products:
            return Sharpness(value, 0.0, residual, used, start)


def _batches(data: Any) -> list[Any]:
    if isinstance(data, (Tensor, tuple, Mapping)):
        return [data]
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be a batch (tensor, tuple, dict) or an iterable of batches, got {type(data).__name__}"
        )
    batches = list(data)
    if not batches:
        raise ValueError("data holds no batch")
    return batches


@contextmanager
def _evaluated(model: nn.Module):  # type: ignore[no-untyped-def]
    """Eval mode with gradients enabled; every submodule gets back the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
