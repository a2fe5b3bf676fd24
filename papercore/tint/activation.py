"""Activations, plain and gated, forward and backward (Panigrahi et al., 2024, section 2.4 and its appendix).

    ActivationForward    y = f(x)                              exact: the simulator has the same nonlinearity
    ActivationBackward   dx = (f(x + epsilon dy) - f(x)) / epsilon = f'(x) * dy + O(epsilon)
    GatedForward         y = f(gate) * up
    GatedBackward        dup = f(gate) * dy  (exact),   dgate = (f(gate + epsilon up dy) - f(gate)) / epsilon

f acts on each number alone, so its Jacobian is diagonal, hence symmetric, and the difference along dy is the gradient. For ReLU it is
exact unless a number changes its sign between x and x + epsilon dy. The gated form is our extension: its derivative in `up` is a
product that a linear-attention score can make, the one in `gate` is again a difference.

Glossary
    x, gate, up   [B, T, D_ff]
    grad          dy, [B, T, D_ff]
    fd_eps        epsilon = 1 / N; with `relative`, epsilon = fd_eps / rms(dy) for each token: activations bend on the scale of 1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.tint.finite_difference import GRADIENTS, checked_epsilon, chosen, directional_derivative

__all__ = [
    "ACTIVATIONS",
    "ActivationBackward",
    "ActivationForward",
    "ActivationMemory",
    "GatedBackward",
    "GatedForward",
    "GatedMemory",
]


class Activation(NamedTuple):
    """A function of each number, and its derivative."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _gelu_slope(x: Tensor) -> Tensor:
    # x Phi(x): Phi(x) + x phi(x)
    cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return cdf + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    # 0.5 x (1 + tanh u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(scale * (x + cubic * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * scale * (1 + 3 * cubic * x.square())


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _quick_gelu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return gate * (1 + 1.702 * x * (1 - gate))


_GELU = Activation(F.gelu, _gelu_slope)
_GELU_TANH = Activation(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_slope)
_SILU = Activation(F.silu, _silu_slope)

ACTIVATIONS: dict[str, Activation] = {
    "gelu": _GELU,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(1.702 * x), _quick_gelu_slope),
    "relu": Activation(torch.relu, lambda x: (x > 0).to(x.dtype)),
    "silu": _SILU,
    "swish": _SILU,
    "tanh": Activation(torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "sigmoid": Activation(torch.sigmoid, lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x))),
    "linear": Activation(lambda x: x, torch.ones_like),
}


class ActivationMemory(NamedTuple):
    """What a token remembers of its activation: input and output."""

    x: Tensor
    y: Tensor


class GatedMemory(NamedTuple):
    """What a token remembers of its gate: both inputs and f(gate)."""

    gate: Tensor
    up: Tensor
    activated: Tensor


class ActivationForward(nn.Module):
    """y = f(x).

    Args:
        fn: a name in ACTIVATIONS, as transformers spells it.

    `forward(x)` returns (y, ActivationMemory).

    >>> ActivationForward("relu")(torch.tensor([-1.0, 2.0]))[0]
    tensor([0., 2.])
    """

    def __init__(self, fn: str = "gelu") -> None:
        super().__init__()
        self.fn = chosen("fn", fn, tuple(ACTIVATIONS))

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, ActivationMemory]:
        y = ACTIVATIONS[self.fn].function(x)
        return y, ActivationMemory(x, y)


class ActivationBackward(nn.Module):
    """dx = f'(x) * dy, by differences of f or by its derivative.

    Args:
        fn: as for ActivationForward.
        grad: "finite_difference" (the paper), "central" or "exact".
        fd_eps: epsilon.
        relative: epsilon relative to the size of each token's gradient.

    `forward(grad, memory)` returns dx, as dy.

    >>> y, memory = ActivationForward("relu")(torch.tensor([[-1.0, 2.0]]))
    >>> ActivationBackward("relu", fd_eps=0.5)(torch.tensor([[1.0, 1.0]]), memory)
    tensor([[0., 1.]])
    """

    def __init__(
        self,
        fn: str = "gelu",
        grad: str = "finite_difference",
        fd_eps: float = 1e-2,
        relative: bool = False,
    ) -> None:
        super().__init__()
        self.fn, self.grad = chosen("fn", fn, tuple(ACTIVATIONS)), chosen("grad", grad, GRADIENTS)
        self.fd_eps, self.relative = checked_epsilon(fd_eps), relative

    @torch.no_grad()
    def forward(self, grad: Tensor, memory: ActivationMemory) -> Tensor:
        return self.slope(grad, memory.x, memory.y)

    def slope(self, direction: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """f'(x) * direction, given y = f(x)."""
        function, derivative = ACTIVATIONS[self.fn]
        if self.grad == "exact":
            return derivative(x) * direction
        return directional_derivative(
            function,
            x,
            direction,
            value=y,
            grad=self.grad,
            fd_eps=self.fd_eps,
            scale=1.0 if self.relative else None,
        )


class GatedForward(nn.Module):
    """y = f(gate) * up, as in SwiGLU (fn "silu") and GeGLU (fn "gelu").

    `forward(gate, up)` returns (y, GatedMemory).

    >>> GatedForward("relu")(torch.tensor([2.0]), torch.tensor([3.0]))[0]
    tensor([6.])
    """

    def __init__(self, fn: str = "silu") -> None:
        super().__init__()
        self.fn = chosen("fn", fn, tuple(ACTIVATIONS))

    @torch.no_grad()
    def forward(self, gate: Tensor, up: Tensor) -> tuple[Tensor, GatedMemory]:
        activated = ACTIVATIONS[self.fn].function(gate)
        return activated * up, GatedMemory(gate, up, activated)


class GatedBackward(ActivationBackward):
    """(dgate, dup) from dy; arguments as ActivationBackward.

    `forward(grad, memory)` returns (dgate, dup).

    >>> y, memory = GatedForward("relu")(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    >>> GatedBackward("relu", grad="exact")(torch.tensor([[1.0]]), memory)
    (tensor([[3.]]), tensor([[2.]]))
    """

    def __init__(
        self,
        fn: str = "silu",
        grad: str = "finite_difference",
        fd_eps: float = 1e-2,
        relative: bool = False,
    ) -> None:
        super().__init__(fn, grad, fd_eps, relative)

    @torch.no_grad()
    def forward(self, grad: Tensor, memory: GatedMemory) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.slope(grad * memory.up, memory.gate, memory.activated), grad * memory.activated
