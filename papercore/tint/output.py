"""The inner loss and its gradient in the last hidden state (Panigrahi et al., 2024, section 2.6 and its appendix).

With logits z = E h + c and the target's embedding E[y], which the simulator is given for each token:

    prediction   loss = -log softmax(z)[y]           dh = E^T softmax(z) - E[y]        exact; the paper's default
    quadratic    loss = |z - onehot(y)|^2 / 2        dh = E^T z - E[y]                 after Saunshi et al. (2021)
    linear       loss = mean(z) - z[y]               dh = mean of E over the vocabulary - E[y]

Each token needs only products with E and one softmax. The loss of a document is the SUM over its counted tokens. E is a constant:
no step changes it.

Glossary
    h            last hidden state after the final norm, [B, T, D]
    head_weight  E, [V, D] (tied or not);   bias  c, [V] or None
    targets      y, [B, T] ids: targets[:, t] is what h[:, t] is to predict, the token after t (the caller shifts); read only where
                 the mask is True
    mask         [B, T] bool, True: the target counts
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from papercore.tint.finite_difference import chosen

__all__ = ["LOSSES", "loss_gradient", "output_loss"]

LOSSES = ("prediction", "quadratic", "linear")

# Logits of so many numbers are made at once: 256 MiB in float32.
_LOGITS_AT_ONCE = 2**26


def _checked(h: Tensor, head_weight: Tensor, targets: Tensor, mask: Tensor, kind: str) -> None:
    chosen("kind", kind, LOSSES)
    if h.dim() != 3 or head_weight.dim() != 2 or head_weight.shape[1] != h.shape[-1]:
        raise ValueError(
            f"h has shape {tuple(h.shape)}, head_weight {tuple(head_weight.shape)}: expected [B, T, D] and [V, D]."
        )
    if targets.shape != h.shape[:2] or mask.shape != h.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, mask is {mask.dtype} {tuple(mask.shape)}: expected ids and "
            f"torch.bool of shape {tuple(h.shape[:2])}."
        )


def _counted(h: Tensor, targets: Tensor, mask: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(h [n, D], y [n]) of the counted tokens, in pieces: the others need no logits."""
    rows = max(1, _LOGITS_AT_ONCE // vocabulary)
    y = targets[mask]
    if y.numel() and (int(y.min()) < 0 or int(y.max()) >= vocabulary):
        raise ValueError(
            f"targets from {int(y.min())} to {int(y.max())}: expected ids of 0 to {vocabulary - 1} where mask is True."
        )
    return zip(h[mask].split(rows), y.split(rows), strict=True)


@torch.no_grad()
def loss_gradient(
    h: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    kind: str = "prediction",
    bias: Tensor | None = None,
) -> Tensor:
    """dh of the summed loss, [B, T, D]; zero where the mask is False.

    Raises:
        ValueError: another kind; shapes that do not fit; a counted target out of the vocabulary.

    >>> h, E = torch.zeros(1, 1, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> loss_gradient(h, E, torch.tensor([[0]]), torch.tensor([[True]]))
    tensor([[[-0.5000,  0.5000]]])
    """
    _checked(h, head_weight, targets, mask, kind)
    mean = head_weight.mean(0)
    pieces = []
    for state, y in _counted(h, targets, mask, head_weight.shape[0]):
        if kind == "linear":
            pieces.append(mean - head_weight[y])
            continue
        logits = F.linear(state, head_weight, bias)
        error = logits.softmax(-1) if kind == "prediction" else logits
        error[torch.arange(len(y), device=y.device), y] -= 1
        pieces.append(error @ head_weight)
    grad = torch.zeros_like(h)
    grad[mask] = torch.cat(pieces)
    return grad


@torch.no_grad()
def output_loss(
    h: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    kind: str = "prediction",
    bias: Tensor | None = None,
) -> Tensor:
    """The loss of each document, [B], summed over its counted tokens; arguments as `loss_gradient`.

    >>> h, E = torch.zeros(1, 2, 2), torch.eye(2)
    >>> output_loss(h, E, torch.tensor([[0, 1]]), torch.tensor([[True, True]]))  # 2 log 2
    tensor([1.3863])
    """
    _checked(h, head_weight, targets, mask, kind)
    pieces = []
    for state, y in _counted(h, targets, mask, head_weight.shape[0]):
        logits = F.linear(state, head_weight, bias)
        if kind == "prediction":
            pieces.append(F.cross_entropy(logits, y, reduction="none"))
            continue
        picked = logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        if kind == "quadratic":
            pieces.append(0.5 * logits.square().sum(-1) - picked + 0.5)
        else:
            pieces.append(logits.mean(-1) - picked)
    loss = h.new_zeros(h.shape[:2])
    loss[mask] = torch.cat(pieces)
    return loss.sum(1)
