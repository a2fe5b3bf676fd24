"""A linear layer in its three roles: forward, backward, descent (Panigrahi et al., 2024, section 2.2).

    LinearForward     y_t  = W x_t + b
    LinearBackward    dx_t = W^T dy_t
    LinearDescent     W <- W - eta sum over t of dy_t x_t^T,    b <- b - eta sum over t of dy_t

All three are exact. Backend "literal" computes them with attention heads over prefix tokens that hold W (literal.py); backend
"fused" is the same arithmetic as one matrix product each, batched over documents where each document has a W of its own. The loss is
a SUM over tokens, so descent sums and does not average.

Glossary
    x        x, [B, T, D_in]
    grad     dy, the gradient of the loss in the layer's output, [B, T, D_out]
    weight   W, [D_out, D_in] shared by all documents, or [B, D_out, D_in], one a document; as in nn.Linear
    bias     b, [D_out] or [B, D_out]
    mask     [B, T] bool, True: the token's gradient counts; None: all count
    lr       eta, a number or [B], one a document
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.tint.finite_difference import chosen
from papercore.tint.layout import Layout
from papercore.tint.literal import Attention, Trace, linear_attention, run_backward, run_descent, run_forward

__all__ = ["BACKENDS", "LinearBackward", "LinearDescent", "LinearForward", "LinearOperation"]

BACKENDS = ("fused", "literal")


def per_token(vector: Tensor) -> Tensor:
    """A vector for each document, [B, D], made to broadcast over tokens; one for all, [D], as it is."""
    return vector.unsqueeze(1) if vector.dim() == 2 else vector


def checked_vector(name: str, vector: Tensor | None, width: int) -> None:
    """ValueError unless `vector` is None, [width] or [B, width]."""
    if vector is not None and (vector.dim() not in (1, 2) or vector.shape[-1] != width):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}: expected [D] or [B, D], D = {width}.")


def counted(grad: Tensor, mask: Tensor | None, lr: float | Tensor) -> Tensor:
    """-eta dy, zero where the token does not count: the one factor that every descent needs."""
    if isinstance(lr, Tensor) and lr.dim() == 1:
        lr = lr.view(-1, 1, 1)
    if mask is None:
        return grad * -lr
    if mask.dtype != torch.bool or mask.shape != grad.shape[:2]:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}: expected torch.bool {tuple(grad.shape[:2])}, one a token of grad."
        )
    return grad * -lr * mask.unsqueeze(-1)


def _checked(name: str, signal: Tensor, weight: Tensor, axis: int) -> None:
    if signal.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(signal.shape)}: expected [B, T, D].")
    if weight.dim() not in (2, 3) or weight.shape[axis] != signal.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, {name} {tuple(signal.shape)}: expected weight [D_out, D_in] or "
            f"[B, D_out, D_in] with {'D_in' if axis == -1 else 'D_out'} = {signal.shape[-1]}."
        )
    if weight.dim() == 3 and weight.shape[0] != signal.shape[0]:
        raise ValueError(f"{weight.shape[0]} weights for {signal.shape[0]} documents: expected one each.")


class LinearOperation(nn.Module):
    """What the three roles share: how they are computed.

    Args:
        backend: "fused", matrix products, or "literal", attention heads over prefix tokens.
        layout: of the simulator, for "literal" only. Weights larger than D x D are cut into pieces.
        restrict: for "literal": leave out the products that change nothing (tokens that ask tokens).
        attention: for "literal": linear, or a softmax that emulates it (softmax.py).
    """

    def __init__(
        self,
        backend: str = "fused",
        layout: Layout | None = None,
        *,
        restrict: bool = True,
        attention: Attention = linear_attention,
    ) -> None:
        super().__init__()
        self.backend = chosen("backend", backend, BACKENDS)
        if backend == "literal" and layout is None:
            raise ValueError(
                "backend = 'literal' has prefix tokens, so it needs a layout: pass layout=Layout(d_model, stack=..., context=...)."
            )
        self.layout, self.options = layout, {"restrict": restrict, "attention": attention}

    @property
    def drawn(self) -> Layout:
        """The layout, which a trace needs."""
        if self.layout is None:
            raise ValueError(
                f"{type(self).__name__} has no layout, so there are no heads to show: pass layout=Layout(...)."
            )
        return self.layout


class LinearForward(LinearOperation):
    """y = W x + b.

    Arguments as LinearOperation. `forward(x, weight, bias=None)` returns [B, T, D_out]; `trace` returns the heads' doings with it.

    Raises:
        ValueError: shapes that do not fit.

    >>> x = torch.tensor([[[1.0, 2.0]]])
    >>> LinearForward()(x, torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
    tensor([[[11.5000]]])
    """

    @torch.no_grad()
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        _checked("x", x, weight, -1)
        checked_vector("bias", bias, weight.shape[-2])
        if self.backend == "literal":
            return self.trace(x, weight, bias)[0]
        if weight.dim() == 2:
            if bias is None or bias.dim() == 1:
                return F.linear(x, weight, bias)
            return F.linear(x, weight) + per_token(bias)
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(per_token(bias), x, weight.mT)

    @torch.no_grad()
    def trace(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, list[Trace]]:
        """y by heads, and what the heads of each piece of W did."""
        return run_forward(self.drawn, x, weight, bias, **self.options)


class LinearBackward(LinearOperation):
    """dx = W^T dy.

    Arguments as LinearOperation. `forward(grad, weight)` returns [B, T, D_in]; `trace` returns the heads' doings with it.

    >>> LinearBackward()(torch.tensor([[[2.0]]]), torch.tensor([[3.0, 4.0]]))
    tensor([[[6., 8.]]])
    """

    @torch.no_grad()
    def forward(self, grad: Tensor, weight: Tensor) -> Tensor:
        _checked("grad", grad, weight, -2)
        return self.trace(grad, weight)[0] if self.backend == "literal" else grad @ weight

    @torch.no_grad()
    def trace(self, grad: Tensor, weight: Tensor) -> tuple[Tensor, list[Trace]]:
        """dx by heads, and what the heads of each piece of W did."""
        return run_backward(self.drawn, grad, weight, **self.options)


class LinearDescent(LinearOperation):
    """The change of W and b by one step: -eta sum over t of dy_t x_t^T, and of dy_t.

    Arguments as LinearOperation. `forward(x, grad, mask, lr)` returns (change_weight [B, D_out, D_in], change_bias [B, D_out]), one a
    document; `trace` returns the heads' doings with them.

    >>> x, grad = torch.tensor([[[1.0, 2.0], [5.0, 5.0]]]), torch.tensor([[[3.0], [7.0]]])
    >>> LinearDescent()(x, grad, torch.tensor([[True, False]]), 0.1)
    (tensor([[[-0.3000, -0.6000]]]), tensor([[-0.3000]]))
    """

    @torch.no_grad()
    def forward(
        self, x: Tensor, grad: Tensor, mask: Tensor | None, lr: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        if x.dim() != 3 or grad.dim() != 3 or x.shape[:2] != grad.shape[:2]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, grad {tuple(grad.shape)}: expected [B, T, D_in] and [B, T, D_out]."
            )
        if self.backend == "literal":
            return self.trace(x, grad, mask, lr)[:2]
        step = counted(grad, mask, lr)
        return torch.bmm(step.mT, x), step.sum(1)

    @torch.no_grad()
    def trace(
        self, x: Tensor, grad: Tensor, mask: Tensor | None, lr: float | Tensor
    ) -> tuple[Tensor, Tensor, list[Trace]]:
        """The changes by heads, and what the heads of each piece of W did."""
        if isinstance(lr, Tensor):
            # -eta is the scale of W_V, one for all documents: what differs between them goes with the gradient.
            grad, lr = counted(grad, None, -lr), 1.0
        return run_descent(self.drawn, x, grad, mask, lr, **self.options)
