"""Dynamic evaluation: the same steps by autograd, the baseline that TinT is measured against.

The auxiliary is written out once more as a function of its tensors, in torch's own operations and none of the simulator's, and
differentiated; one document at a time, as one would fine-tune. Parameters, loss (a SUM over the training targets), steps and masks
are the simulator's, so that the two can be compared tensor by tensor:

    detach_scores=True    attention probabilities are constants: what TinT approximates (its defaults), and queries and keys rest
    detach_scores=False   the gradient of the model itself; queries and keys are trained too

(The official code's baseline gives SGD every parameter, embeddings included, and the mean loss.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.tint.activation import ACTIVATIONS
from papercore.tint.attention import repeat_heads, split_heads
from papercore.tint.auxiliary import (
    Auxiliary,
    BlockWeights,
    LinearWeights,
    NormWeights,
    PieceKey,
    read_auxiliary,
)
from papercore.tint.config import TinTConfig, checked_count, checked_layers, checked_rate
from papercore.tint.model import TinTOutput, summarise, warn_of_divergence
from papercore.tint.targets import Targets, checked_targets
from papercore.tint.tiny_gpt import readable_pairs
from papercore.tint.weights import Piece, trained_pieces

__all__ = ["dynamic_eval", "functional_logits"]

Trained = Mapping[PieceKey, Tensor]


def _linear(x: Tensor, weights: LinearWeights, trained: Trained) -> Tensor:
    matrix = trained.get(weights.key("weight"))
    vector = trained.get(weights.key("bias"))
    return F.linear(
        x,
        weights.matrix() if matrix is None else matrix,
        weights.vector() if vector is None else vector,
    )


def _norm(x: Tensor, weights: NormWeights, trained: Trained) -> Tensor:
    scale = trained.get(weights.key("weight"), weights.weight.detach())
    shift = trained.get(weights.key("bias"))
    if shift is None and weights.bias is not None:
        shift = weights.bias.detach()
    if weights.kind == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], scale, weights.eps)
    return F.layer_norm(x, x.shape[-1:], scale, shift, weights.eps)


def _attention(
    h: Tensor,
    block: BlockWeights,
    auxiliary: Auxiliary,
    trained: Trained,
    readable: Tensor | None,
    position_ids: Tensor,
    detach_scores: bool,
) -> Tensor:
    q, k, v = (
        split_heads(_linear(h, weights, trained), heads)
        for weights, heads in (
            (block.query, auxiliary.n_head),
            (block.key, auxiliary.n_kv_head),
            (block.value, auxiliary.n_kv_head),
        )
    )
    if auxiliary.rotary is not None:
        q, k = auxiliary.rotary(q, position_ids), auxiliary.rotary(k, position_ids)
    k, v = repeat_heads(k, auxiliary.n_head), repeat_heads(v, auxiliary.n_head)
    if not detach_scores:
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=readable, is_causal=readable is None, scale=block.scale
        )
    else:
        scores = block.scale * (q.detach() @ k.detach().mT)
        seen = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril() if readable is None else readable
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return _linear(mixed.transpose(1, 2).flatten(2), block.output, trained)


def functional_logits(
    auxiliary: Auxiliary,
    trained: Trained,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    detach_scores: bool = False,
) -> Tensor:
    """Logits [B, T, V] of the auxiliary with the tensors `trained` in place of its own; differentiable in them.

    Args:
        trained: {(module, "weight" or "bias", rows): tensor}, weights in nn.Linear's orientation.
        attention_mask: [B, T] or [B, T, T] bool; padding reads itself, so that no row is empty.
    """
    batch, tokens = input_ids.shape
    readable = readable_pairs(attention_mask, batch, tokens, input_ids.device)
    if readable is not None:
        readable = readable | torch.eye(tokens, dtype=torch.bool, device=input_ids.device)
    x = auxiliary.embed(input_ids, position_ids)
    activation = ACTIVATIONS[auxiliary.activation].function
    for block in auxiliary.blocks:
        h = _norm(x, block.norm_1, trained)
        x = x + _attention(h, block, auxiliary, trained, readable, position_ids, detach_scores)
        h = _norm(x, block.norm_2, trained)
        inner = _linear(h, block.fc_in, trained)
        inner = (
            activation(inner)
            if block.fc_gate is None
            else activation(_linear(h, block.fc_gate, trained)) * inner
        )
        x = x + _linear(inner, block.fc_out, trained)
    x = _norm(x, auxiliary.final_norm, trained)
    return F.linear(x, auxiliary.head.matrix(), auxiliary.head.vector())


def _row(targets: Targets, row: int, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
    mask = targets.attention_mask
    if mask is not None:
        mask = mask[row : row + 1, :length]
        mask = mask if mask.ndim == 2 else mask[..., :length]
    return targets.input_ids[row : row + 1, :length], targets.position_ids[row : row + 1, :length], mask


def _stepped(
    auxiliary: Auxiliary,
    pieces: list[Piece],
    targets: Targets,
    row: int,
    *,
    lr: float,
    steps: int,
    detach_scores: bool,
) -> dict[PieceKey, Tensor]:
    """The change of each trained tensor of one document."""
    length = int(targets.context[row].sum())
    where = targets.train[row : row + 1, :length]
    wanted = targets.targets[row : row + 1, :length][where]
    base = _base(pieces)
    changes = {key: torch.zeros_like(tensor) for key, tensor in base.items()}
    for _ in range(steps):
        leaves = {key: (tensor + changes[key]).requires_grad_() for key, tensor in base.items()}
        with torch.enable_grad():
            # Tokens behind the last training target have no gradient, so that they are not run.
            logits = functional_logits(
                auxiliary, leaves, *_row(targets, row, length), detach_scores=detach_scores
            )
            loss = F.cross_entropy(logits[where], wanted, reduction="sum")
            gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        # Changes are kept apart from the weights, in which float32 would round them away.
        for change, gradient in zip(changes.values(), gradients, strict=True):
            change -= lr * gradient
    return changes


def _base(pieces: list[Piece]) -> dict[PieceKey, Tensor]:
    return {piece.key: piece.view(piece.stored) for piece in pieces}


def _copied(tensor: Any) -> Any:
    """A copy where it is a tensor; what is none is refused later, by its own message."""
    return tensor.clone() if isinstance(tensor, Tensor) else tensor


@torch.no_grad()
def dynamic_eval(
    model: nn.Module,
    input_ids: Tensor,
    train_mask: Tensor,
    labels: Tensor | None = None,
    *,
    lr: float,
    steps: int = 1,
    detach_scores: bool = True,
    n_layers: int | None = None,
    update_layernorm: str = "bias",
    update_bias: bool = True,
    reduction: str = "sum",
    gradient_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> TinTOutput:
    """SGD on each document's training segment by autograd, then its logits; the model is not changed.

    Args:
        model: GPT-2, OPT (pre-LN) or Llama of transformers, or a TinyGPT.
        input_ids, train_mask, labels, gradient_mask, attention_mask, position_ids: as in a call of TinTModel.
        lr: on the sum (or, with reduction="mean", the mean) of the training losses.
        steps: SGD steps, without momentum.
        detach_scores: attention probabilities are constants, as in the simulator; False: the model's own gradient.
        n_layers, update_layernorm, update_bias: which parameters are trained, as in TinTConfig.

    Returns:
        TinTOutput, with .updates of the trained parameters.

    Raises:
        as TinTModel.from_auxiliary and its call.

    >>> from papercore.tint import TinyGPT
    >>> model = TinyGPT(n_embd=12, n_head=3, vocab_size=11)
    >>> input_ids = torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2]])
    >>> output = dynamic_eval(model, input_ids, torch.arange(8)[None] < 4, lr=0.1)
    >>> bool(output.loss < output.initial_loss)
    True
    """
    if torch.is_inference_mode_enabled():
        # Autograd keeps no tensor made in inference mode, so the call starts again outside of it, on copies.
        masks = (labels, gradient_mask, attention_mask, position_ids)
        with torch.inference_mode(False):
            own, gradient, attention, positions = (_copied(tensor) for tensor in masks)
            return dynamic_eval(
                model, _copied(input_ids), _copied(train_mask), own, lr=lr, steps=steps, detach_scores=detach_scores,
                n_layers=n_layers, update_layernorm=update_layernorm, update_bias=update_bias, reduction=reduction,
                gradient_mask=gradient, attention_mask=attention, position_ids=positions,
            )  # fmt: skip
    checked_rate("lr", lr)
    checked_count("steps", steps)
    # The settings that the two share are checked where the simulator's are.
    settings = TinTConfig(
        n_layers=n_layers,
        n_steps=steps,
        inner_lr=lr,
        reduction=reduction,
        update_layernorm=update_layernorm,
        update_bias=update_bias,
    )
    auxiliary = read_auxiliary(model)
    pieces = trained_pieces(
        auxiliary,
        checked_layers(settings.n_layers, len(auxiliary.blocks)),
        update_layernorm=update_layernorm,
        update_bias=update_bias,
        queries_and_keys=not detach_scores,
    )
    targets = checked_targets(
        auxiliary,
        input_ids,
        train_mask,
        labels,
        gradient_mask=gradient_mask,
        attention_mask=attention_mask,
        position_ids=position_ids,
    )
    batch, tokens = targets.input_ids.shape
    updates = {
        piece.parameter: torch.zeros(
            batch, *piece.stored.shape, dtype=piece.stored.dtype, device=piece.stored.device
        )
        for piece in pieces
    }
    before, after = [], []
    for row in range(batch):
        document = _row(targets, row, tokens)
        before.append(functional_logits(auxiliary, {}, *document))
        n = int(targets.n_train[row])
        if n == 0:
            after.append(before[-1])
            continue
        step = lr / n if reduction == "mean" else lr
        changes = _stepped(auxiliary, pieces, targets, row, lr=step, steps=steps, detach_scores=detach_scores)
        now = {key: tensor + changes[key] for key, tensor in _base(pieces).items()}
        after.append(functional_logits(auxiliary, now, *document))
        for piece in pieces:
            piece.view(updates[piece.parameter])[row].copy_(changes[piece.key])
    output = summarise(targets, torch.cat(after), torch.cat(before), updates)
    warn_of_divergence(output, lr, reduction, "lr")
    return output
