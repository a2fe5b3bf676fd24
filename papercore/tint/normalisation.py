"""Layer norm and RMS norm in their three roles (Panigrahi et al., 2024, section 2.3 and its appendix).

    LayerNormForward    y = gamma * f(x) + beta,     f(x) = (x - mean) / sigma,  or x / rms for RMS norm
    LayerNormBackward   h = gamma * dy;  dx = (f(x + epsilon h) - f(x)) / epsilon
    LayerNormDescent    gamma <- gamma - eta sum over t of dy_t * f(x_t),   beta <- beta - eta sum over t of dy_t

Why a difference along h is the gradient: the Jacobian of f, (I - 1 1^T / D - f f^T / D) / sigma, is symmetric; that of RMS norm is
the same without 1 1^T. With gamma inside f it would not be. Switches: a forward difference (the paper), a central one, or the closed
form.

Departures. gamma is a vector here, and so it stays. The paper's construction stores diag(gamma) and treats it as a linear layer
(backend "literal" does too); the official descent then also writes the off-diagonal entries, several times larger than the diagonal
ones. Ours lets a gate pass the diagonal alone: prefix k has row k S + s, so the entry is at a place that its position tells. sigma holds the model's own epsilon
("eps"), which the official code fixes at 1e-5. RMS norm is our extension.

Glossary
    normalised   f(x), [B, T, D]
    sigma        sqrt(variance + eps), or sqrt(mean square + eps), [B, T, 1]
    weight       gamma, [D] or [B, D]
    bias         beta, [D] or [B, D], or None
    fd_eps       epsilon = 1 / N; with `relative`, epsilon = fd_eps sigma / rms(h) for each token, free of both scales
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from papercore.tint.finite_difference import GRADIENTS, checked_epsilon, chosen, directional_derivative
from papercore.tint.layout import Layout
from papercore.tint.linear import (
    LinearBackward,
    LinearDescent,
    LinearForward,
    checked_vector,
    counted,
    per_token,
)

__all__ = ["KINDS", "LayerNormBackward", "LayerNormDescent", "LayerNormForward", "NormMemory", "normalise"]

KINDS = ("layernorm", "rmsnorm")


class NormMemory(NamedTuple):
    """What a token remembers of its norm: f(x), x, sigma, and which norm it was."""

    normalised: Tensor
    x: Tensor
    sigma: Tensor
    kind: str
    eps: float


def normalise(x: Tensor, kind: str = "layernorm", eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """f(x) [..., D] and sigma [..., 1].

    >>> normalise(torch.tensor([3.0, 5.0]), eps=0.0)
    (tensor([-1.,  1.]), tensor([1.]))
    """
    centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    sigma = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / sigma, sigma


class LayerNormForward(nn.Module):
    """y = gamma * f(x) + beta.

    Args:
        kind: "layernorm" or "rmsnorm".
        eps: added to the variance, the auxiliary's own.
        backend, layout: as LinearOperation.

    `forward(x, weight, bias=None)` returns (y [B, T, D], NormMemory).

    >>> y, memory = LayerNormForward(eps=0.0)(torch.tensor([[[3.0, 5.0]]]), torch.tensor([2.0, 2.0]))
    >>> y, memory.sigma
    (tensor([[[-2.,  2.]]]), tensor([[[1.]]]))
    """

    def __init__(
        self, kind: str = "layernorm", eps: float = 1e-5, backend: str = "fused", layout: Layout | None = None
    ) -> None:
        super().__init__()
        self.kind, self.eps = chosen("kind", kind, KINDS), eps
        self.linear = LinearForward(backend, layout)

    @torch.no_grad()
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, NormMemory]:
        checked_vector("weight", weight, x.shape[-1])
        checked_vector("bias", bias, x.shape[-1])
        normalised, sigma = normalise(x, self.kind, self.eps)
        memory = NormMemory(normalised, x, sigma, self.kind, self.eps)
        if self.linear.backend == "literal":
            return self.linear(normalised, weight.diag_embed(), bias), memory
        y = normalised * per_token(weight)
        if bias is not None:
            y = y + per_token(bias)
        return y, memory


class LayerNormBackward(nn.Module):
    """dx from dy, by differences of the norm itself or in closed form.

    Args:
        grad: "finite_difference" (the paper), "central" or "exact".
        fd_eps: epsilon.
        relative: epsilon relative to the size of each token's gradient and input.
        backend, layout: as LinearOperation.

    `forward(grad, memory, weight)` returns [B, T, D].

    >>> x = torch.tensor([[[1.0, 2.0, 4.0]]], dtype=torch.float64)
    >>> gamma, dy = torch.ones(3, dtype=torch.float64), torch.tensor([[[0.0, 0.0, 1.0]]], dtype=torch.float64)
    >>> y, memory = LayerNormForward()(x, gamma)
    >>> exact = LayerNormBackward("exact")(dy, memory, gamma)
    >>> [round(float((LayerNormBackward(fd_eps=e)(dy, memory, gamma) - exact).norm()), 6) for e in (1e-3, 1e-4)]
    [7.8e-05, 8e-06]
    """

    def __init__(
        self,
        grad: str = "finite_difference",
        fd_eps: float = 1e-2,
        relative: bool = False,
        backend: str = "fused",
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.grad, self.relative = chosen("grad", grad, GRADIENTS), relative
        self.fd_eps = checked_epsilon(fd_eps)
        self.linear = LinearBackward(backend, layout)

    @torch.no_grad()
    def forward(self, grad: Tensor, memory: NormMemory, weight: Tensor) -> Tensor:
        if grad.shape != memory.x.shape:
            raise ValueError(
                f"grad has shape {tuple(grad.shape)}: expected that of the norm's input, {tuple(memory.x.shape)}."
            )
        checked_vector("weight", weight, grad.shape[-1])
        if self.linear.backend == "literal":
            h = self.linear(grad, weight.diag_embed())
        else:
            h = grad * per_token(weight)
        if self.grad == "exact":
            normalised = memory.normalised
            inner = h - normalised * (h * normalised).mean(-1, keepdim=True)
            if memory.kind == "layernorm":
                inner = inner - h.mean(-1, keepdim=True)
            return inner / memory.sigma
        return directional_derivative(
            lambda x: normalise(x, memory.kind, memory.eps)[0],
            memory.x,
            h,
            value=memory.normalised,
            grad=self.grad,
            fd_eps=self.fd_eps,
            scale=memory.sigma if self.relative else None,
        )


class LayerNormDescent(nn.Module):
    """The change of gamma and beta by one step; `bias` changes only if the caller wants it.

    Arguments as LinearOperation. `forward(grad, memory, mask, lr)` returns (change_weight [B, D], change_bias [B, D]).

    >>> memory = LayerNormForward(eps=0.0)(torch.tensor([[[3.0, 5.0]]]), torch.ones(2))[1]
    >>> LayerNormDescent()(torch.tensor([[[1.0, 2.0]]]), memory, None, 0.5)
    (tensor([[ 0.5000, -1.0000]]), tensor([[-0.5000, -1.0000]]))
    """

    def __init__(self, backend: str = "fused", layout: Layout | None = None) -> None:
        super().__init__()
        self.linear = LinearDescent(backend, layout)

    @torch.no_grad()
    def forward(
        self, grad: Tensor, memory: NormMemory, mask: Tensor | None, lr: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.linear.backend == "literal":
            change, change_bias = self.linear(memory.normalised, grad, mask, lr)
            return change.diagonal(dim1=-2, dim2=-1), change_bias
        step = counted(grad, mask, lr)
        return (step * memory.normalised).sum(1), step.sum(1)
