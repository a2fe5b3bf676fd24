"""Weights of each document: the auxiliary's tensors, shared, plus the change that each document has made to them.

The auxiliary's tensor W [D_out, D_in] is never written to. Once a document has taken a step, its weight is W + change, with
changes [B, D_out, D_in], one a document; a piece that no step has touched is W itself, without a batch dimension. Changes are
kept, and not the sums, because a change is thousands of times smaller than the weight and float32 would round it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.tint.auxiliary import Auxiliary, LinearWeights, NormWeights, PieceKey


@dataclass(frozen=True)
class Piece:
    """One trained tensor, or trained rows of one."""

    owner: LinearWeights | NormWeights
    part: str  # "weight" or "bias"

    @property
    def key(self) -> PieceKey:
        return self.owner.key(self.part)

    @property
    def parameter(self) -> str:
        """Its name in the auxiliary's state dict."""
        return f"{self.owner.name}.{self.part}"

    @property
    def stored(self) -> Tensor:
        """The whole tensor as the auxiliary stores it."""
        tensor = self.owner.weight if self.part == "weight" else self.owner.bias
        assert tensor is not None  # trained_pieces names only tensors that exist
        return tensor.detach()

    def view(self, stored: Tensor) -> Tensor:
        """These rows, in nn.Linear's orientation, of a tensor [.., *] laid out as the stored one."""
        if isinstance(self.owner, NormWeights):
            return stored
        return self.owner.part_of_weight(stored) if self.part == "weight" else self.owner.part_of_bias(stored)


def trained_pieces(
    auxiliary: Auxiliary,
    n_layers: int,
    *,
    update_layernorm: str = "bias",
    update_bias: bool = True,
    queries_and_keys: bool = False,
) -> list[Piece]:
    """What a step changes, in the order of the forward pass: linear layers and norms of the last n_layers, and the final norm.

    Embeddings and head are never trained; queries and keys only where gradients flow through the attention scores.
    """

    def linear(weights: LinearWeights | None) -> Iterator[Piece]:
        if weights is not None:
            yield Piece(weights, "weight")
            if update_bias and weights.bias is not None:
                yield Piece(weights, "bias")

    def norm(weights: NormWeights) -> Iterator[Piece]:
        if update_layernorm == "all":
            yield Piece(weights, "weight")
        if update_layernorm != "none" and weights.bias is not None:
            yield Piece(weights, "bias")

    pieces: list[Piece] = []
    for block in auxiliary.blocks[len(auxiliary.blocks) - n_layers :]:
        pieces += norm(block.norm_1)
        if queries_and_keys:
            pieces += [*linear(block.query), *linear(block.key)]
        pieces += [*linear(block.value), *linear(block.output), *norm(block.norm_2)]
        pieces += [*linear(block.fc_in), *linear(block.fc_gate), *linear(block.fc_out)]
    return [*pieces, *norm(auxiliary.final_norm)]


class DocumentWeights:
    """The weights of a batch of documents: base tensors of the auxiliary plus changes [B, ...].

    >>> from papercore.tint import TinyGPT
    >>> from papercore.tint.auxiliary import read_auxiliary
    >>> value = read_auxiliary(TinyGPT(n_embd=12, n_head=3)).blocks[0].value
    >>> weights = DocumentWeights([Piece(value, "weight")])
    >>> weights.matrix(value).shape  # shared as long as nothing has changed
    torch.Size([12, 12])
    >>> weights.add(value, "weight", torch.ones(2, 12, 12))
    >>> weights.matrix(value).shape  # one a document
    torch.Size([2, 12, 12])
    """

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = {piece.key: piece for piece in pieces}
        self.changes: dict[PieceKey, Tensor] = {}

    def _now(self, base: Tensor, key: PieceKey) -> Tensor:
        change = self.changes.get(key)
        return base if change is None else base + change

    def matrix(self, linear: LinearWeights) -> Tensor:
        """[D_out, D_in] or [B, D_out, D_in]."""
        return self._now(linear.matrix(), linear.key("weight"))

    def vector(self, linear: LinearWeights) -> Tensor | None:
        """[D_out], [B, D_out] or None."""
        base = linear.vector()
        return None if base is None else self._now(base, linear.key("bias"))

    def scale(self, norm: NormWeights) -> Tensor:
        """[D] or [B, D]."""
        return self._now(norm.weight.detach(), norm.key("weight"))

    def shift(self, norm: NormWeights) -> Tensor | None:
        """[D], [B, D] or None."""
        return None if norm.bias is None else self._now(norm.bias.detach(), norm.key("bias"))

    def add(self, owner: LinearWeights | NormWeights, part: str, change: Tensor) -> None:
        """Add a change [B, ...] of a piece; one that is not trained is passed over."""
        key = owner.key(part)
        if key in self.pieces:
            self.changes[key] = self.changes[key] + change if key in self.changes else change

    def updates(self, batch: int) -> dict[str, Tensor]:
        """{parameter of the auxiliary: change [B, *its shape]}, with zeros in rows that are not trained."""
        updates: dict[str, Tensor] = {}
        for piece in self.pieces.values():
            name, stored = piece.parameter, piece.stored
            change = self.changes.get(piece.key)
            rows = piece.owner.rows if isinstance(piece.owner, LinearWeights) else None
            if rows is None and change is not None:
                transposed = isinstance(piece.owner, LinearWeights) and piece.owner.is_transposed
                updates[name] = change.mT if transposed and piece.part == "weight" else change
                continue
            if name not in updates:
                updates[name] = torch.zeros(batch, *stored.shape, dtype=stored.dtype, device=stored.device)
            if change is not None:
                piece.view(updates[name]).copy_(change)
        return updates
