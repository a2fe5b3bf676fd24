"""The dual of a linear layer's descent: linear attention over the training tokens (what a linear layer learns, unrolled).

    W' x = W x - eta sum over t of dy_t <x_t, x>  =  W x + G^T (X x),        X [n, D_in], G = -eta dY [n, D_out]

W' is never formed. The new layer attends from a token to the n training tokens, with keys x_t and values -eta dy_t: the gradient
step of a linear layer IS a linear attention head. Exact for any number of steps, whose factors simply follow each other.

What it costs, for T tokens that read and n that were trained on, beside the product with the common W:

    formed    2 n D_in D_out to form the change, then nothing more; but each document multiplies by a W of its own   B D_in D_out numbers
    dual      2 n T (D_in + D_out) each time the layer is read                                                       B n (D_in + D_out) numbers

So the dual does less arithmetic where T (D_in + D_out) < D_in D_out, and holds less where n (D_in + D_out) < D_in D_out: short
documents and wide layers. `DualWeight.is_cheaper` tells. It also keeps ONE matrix for all documents, a single large product.

Glossary
    weight, bias   W [D_out, D_in], b [D_out] or None: shared by all documents
    keys           X, [B, n, D_in], the inputs of the tokens that counted
    values         G, [B, n, D_out], -eta times their gradients
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from papercore.tint.linear import counted

__all__ = ["DualWeight"]


@dataclass(frozen=True)
class DualWeight:
    """A linear layer after any number of steps of descent, as its first weight and the tokens it was trained on.

    `forward`, `backward` and `descent` are LinearForward, LinearBackward and LinearDescent on it. Nothing is changed in place.

    >>> layer = DualWeight(torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]))
    >>> x, dy = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[2.0]]])
    >>> stepped = layer.descent(x, dy, None, 0.1)
    >>> layer.forward(x), stepped.forward(x)  # 1.5 - 0.1 * 2 * (5 + 1)
    (tensor([[[1.5000]]]), tensor([[[0.3000]]]))
    >>> stepped.change()
    (tensor([[[-0.2000, -0.4000]]]), tensor([[-0.2000]]))
    """

    weight: Tensor
    bias: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    bias_change: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise ValueError(
                f"weight has shape {tuple(self.weight.shape)}: expected [D_out, D_in], shared by all documents; "
                "a weight for each document is what the dual does without."
            )

    def _checked(self, name: str, signal: Tensor, axis: int) -> None:
        width = self.weight.shape[axis]
        if signal.dim() != 3 or signal.shape[-1] != width:
            raise ValueError(f"{name} has shape {tuple(signal.shape)}: expected [B, T, {width}].")

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + G^T (X x) + the bias's change, [B, T, D_out]."""
        self._checked("x", x, 1)
        y = F.linear(x, self.weight, self.bias)
        if self.bias_change is not None:
            y = y + self.bias_change.unsqueeze(1)
        if self.keys is None or self.values is None:
            return y
        return torch.baddbmm(y, torch.bmm(x, self.keys.mT), self.values)

    @torch.no_grad()
    def backward(self, grad: Tensor) -> Tensor:
        """dx = W^T dy + X^T (G dy), [B, T, D_in]."""
        self._checked("grad", grad, 0)
        dx = grad @ self.weight
        if self.keys is None or self.values is None:
            return dx
        return torch.baddbmm(dx, torch.bmm(grad, self.values.mT), self.keys)

    @torch.no_grad()
    def descent(
        self, x: Tensor, grad: Tensor, mask: Tensor | None, lr: float | Tensor, *, update_bias: bool = True
    ) -> DualWeight:
        """The layer after one more step; arguments as LinearDescent. Tokens that do not count are not kept."""
        self._checked("x", x, 1)
        expected = [*x.shape[:2], self.weight.shape[0]]
        if list(grad.shape) != expected:
            raise ValueError(f"grad has shape {tuple(grad.shape)}: expected {expected}.")
        keys, values = x, counted(grad, mask, lr)
        if mask is not None:
            # Counted tokens first, in their order; as many columns as the document with the most of them needs.
            most = int(mask.sum(1).max())
            order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most].unsqueeze(-1)
            keys, values = keys.take_along_dim(order, 1), values.take_along_dim(order, 1)
        change = values.sum(1) if update_bias and self.bias is not None else None
        if change is not None and self.bias_change is not None:
            change = change + self.bias_change
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1)
        return DualWeight(
            self.weight, self.bias, keys, values, self.bias_change if change is None else change
        )

    @torch.no_grad()
    def change(self) -> tuple[Tensor, Tensor | None]:
        """(W' - W [B, D_out, D_in], b' - b [B, D_out] or None): what LinearDescent's changes add up to."""
        if self.keys is None or self.values is None:
            return torch.zeros_like(self.weight).unsqueeze(0), self.bias_change
        return torch.bmm(self.values.mT, self.keys), self.bias_change

    @property
    def numbers(self) -> int:
        """Numbers kept for each document."""
        if self.keys is None or self.values is None:
            return 0
        return self.keys[0].numel() + self.values[0].numel()

    @staticmethod
    def is_cheaper(d_in: int, d_out: int, trained: int, read: int) -> tuple[bool, bool]:
        """(less arithmetic, fewer numbers) than forming the changed weight, for `trained` tokens and `read` tokens a document.

        Counted for a weight that is formed once and read once.

        >>> DualWeight.is_cheaper(768, 768, trained=300, read=1024)
        (False, True)
        >>> DualWeight.is_cheaper(768, 768, trained=300, read=128)
        (True, True)
        """
        if min(d_in, d_out, trained, read) < 1:
            raise ValueError(
                f"d_in = {d_in}, d_out = {d_out}, trained = {trained}, read = {read}: expected at least 1 each."
            )
        return read * (d_in + d_out) < d_in * d_out, trained * (d_in + d_out) < d_in * d_out
