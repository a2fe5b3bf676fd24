"""Which token trains, which is evaluated, and every check of a call's tensors.

Token t is predicted at position t - 1. It is a training target where train_mask[t] is True, an evaluation target where
train_mask[t] is False; token 0 is never a target, nor is a token with label -100, nor one on either side of padding.
gradient_mask narrows the training targets (to label words, say): a token that train_mask has and gradient_mask has not is
neither trained on nor evaluated.

Glossary:
    targets   [B, T]   targets[t] is what position t predicts: labels[t + 1]
    train     [B, T]   bool, True at the positions whose target is trained on
    test      [B, T]   bool, True at the positions whose target is evaluated
    context   [B, T]   bool, True up to each document's last training position: later tokens have no gradient
    length             longest context of the batch: a backward pass needs no more tokens
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from papercore.tint.auxiliary import Auxiliary


@dataclass(frozen=True)
class Targets:
    """The checked tensors of one call; see the module's glossary."""

    input_ids: Tensor
    position_ids: Tensor  # [B, T]
    attention_mask: Tensor | None  # bool, [B, T] or [B, T, T]
    targets: Tensor
    train: Tensor
    test: Tensor
    context: Tensor
    length: int

    @property
    def n_train(self) -> Tensor:
        """Training targets of each document, [B]."""
        return self.train.sum(dim=1)

    def token_losses(self, logits: Tensor, where: Tensor) -> Tensor:
        """-log p of the targets at `where`, [B, T] in nats, zero elsewhere."""
        losses = logits.new_zeros(where.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
        losses[where] = F.cross_entropy(logits[where].to(losses.dtype), self.targets[where], reduction="none")
        return losses

    def shortened_mask(self) -> Tensor | None:
        """attention_mask of the first `length` tokens."""
        mask, n = self.attention_mask, self.length
        if mask is None:
            return None
        return mask[:, :n] if mask.ndim == 2 else mask[:, :n, :n]


def _checked_mask(name: str, mask: Tensor, shape: tuple[int, ...], *, integers: bool = False) -> Tensor:
    kinds = "torch.bool, or integers 0 and 1," if integers else "torch.bool"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is {type(mask).__name__}: expected a tensor, {kinds} of shape {shape}.")
    if mask.dtype != torch.bool and not (integers and not mask.is_floating_point()):
        raise ValueError(f"{name} is {mask.dtype} {tuple(mask.shape)}: expected {kinds} of shape {shape}.")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: expected {shape}, one value a token.")
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"{name} has values from {int(mask.min())} to {int(mask.max())}: expected 0 and 1.")
    return mask.bool()


def _checked_ids(name: str, ids: Tensor, limit: int, why: str) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= limit:
        raise ValueError(f"{name} from {lowest} to {highest}: expected 0 to {limit - 1}, {why}.")


def checked_targets(
    auxiliary: Auxiliary,
    input_ids: Tensor,
    train_mask: Tensor,
    labels: Tensor | None = None,
    *,
    gradient_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Targets:
    """Check a call and place its targets.

    Raises:
        TypeError: not a tensor.
        ValueError: a wrong shape or dtype, ids out of the vocabulary, an input longer than the auxiliary's positions,
            a document with nothing to evaluate.

    Warns:
        UserWarning: a document with training tokens but no training target stays unchanged.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids is {type(input_ids).__name__}: expected an integer tensor [batch, length]."
        )
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}: expected integers [batch, length]."
        )
    batch, tokens = input_ids.shape
    if batch < 1 or tokens < 2:
        raise ValueError(
            f"input_ids has shape {(batch, tokens)}: expected at least one document of two tokens."
        )
    if tokens > auxiliary.n_positions:
        raise ValueError(
            f"input_ids has {tokens} tokens a document, the auxiliary {auxiliary.n_positions} positions: cut the documents."
        )
    _checked_ids("input_ids", input_ids, auxiliary.vocab_size, "the auxiliary's vocabulary")
    input_ids = input_ids.long()
    train_mask = _checked_mask("train_mask", train_mask, (batch, tokens))
    training = train_mask
    if gradient_mask is not None:
        training = train_mask & _checked_mask("gradient_mask", gradient_mask, (batch, tokens))
    real = torch.ones_like(train_mask)
    if attention_mask is not None:
        square = isinstance(attention_mask, Tensor) and attention_mask.ndim == 3
        shape = (batch, tokens, tokens) if square else (batch, tokens)
        attention_mask = _checked_mask("attention_mask", attention_mask, shape, integers=True)
        # A token that may not even read itself is padding.
        real = attention_mask.diagonal(dim1=1, dim2=2) if square else attention_mask
        if bool((~real).all(dim=1).any()):
            row = int((~real).all(dim=1).nonzero()[0, 0])
            raise ValueError(f"attention_mask hides every token of document {row}: leave the document out.")
    if position_ids is None:
        position_ids = auxiliary.position_ids(input_ids, attention_mask).expand(batch, tokens)
    else:
        if (
            tuple(position_ids.shape) not in ((batch, tokens), (1, tokens))
            or position_ids.is_floating_point()
        ):
            raise ValueError(
                f"position_ids is {position_ids.dtype} {tuple(position_ids.shape)}: expected integers {(batch, tokens)}."
            )
        _checked_ids("position_ids", position_ids, auxiliary.n_positions, "the auxiliary's positions")
        position_ids = position_ids.expand(batch, tokens)
    if labels is None:
        labels = input_ids
    else:
        if tuple(labels.shape) != (batch, tokens) or labels.is_floating_point():
            raise ValueError(
                f"labels is {labels.dtype} {tuple(labels.shape)}: expected integers {(batch, tokens)}."
            )
        if bool((labels != -100).any()):
            _checked_ids(
                "labels (other than -100)", labels[labels != -100], auxiliary.vocab_size, "the vocabulary"
            )
        real = real & (labels != -100)
        labels = labels.long()
    return _placed(input_ids, position_ids, attention_mask, labels, train_mask, training, real)


def _placed(
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    train_mask: Tensor,
    training: Tensor,
    real: Tensor,
) -> Targets:
    readable = torch.ones_like(real)
    if attention_mask is not None:
        readable = attention_mask.diagonal(dim1=1, dim2=2) if attention_mask.ndim == 3 else attention_mask
    last = torch.zeros_like(real[:, :1])
    # One to the left: position t holds what is known of its target, token t + 1.
    is_target = torch.cat([real[:, 1:] & readable[:, :-1], last], dim=1)
    train = is_target & torch.cat([training[:, 1:], last], dim=1)
    test = is_target & torch.cat([~train_mask[:, 1:], last], dim=1)
    empty = ~test.any(dim=1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0, 0])
        if bool((train_mask[row] | ~readable[row]).all()):
            raise ValueError(
                f"train_mask is True everywhere in document {row}: nothing is left to evaluate; leave the last tokens False."
            )
        raise ValueError(
            f"document {row} has no test targets: every token outside train_mask is token 0, padding or labelled -100."
        )
    idle = training.any(dim=1) & ~train.any(dim=1)
    if bool(idle.any()):
        rows = idle.nonzero()[:, 0].tolist()
        warnings.warn(
            f"documents {rows} have training tokens but no training target (the first token has no prediction): "
            "they stay unchanged; train on at least 2 tokens.",
            UserWarning,
            stacklevel=4,
        )
    steps = torch.arange(1, train.shape[1] + 1, device=train.device)
    reach = (train * steps).amax(dim=1, keepdim=True)  # [B, 1]: one past the last training position
    return Targets(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        targets=torch.cat([labels[:, 1:], labels[:, :1]], dim=1),
        train=train,
        test=test,
        context=steps <= reach,
        length=int(reach.max()),
    )
