"""One simulated block: forward, and backward with descent, made of the modules that simulate each operation.

    forward    h1 = norm_1(x);  x = x + W_o attention(W_q h1, W_k h1, W_v h1);  h2 = norm_2(x);  x = x + MLP(h2)
    backward   the same in reverse; where a layer's gradient passes, its descent reads the input that was remembered

Every module reads the old weights, backward and descent alike. The MLP may run in chunks of its inner width, as the
construction must (a prefix token holds rows of width D): chunk j has rows of fc_in and the same columns of fc_out. The chunks share
one output bias, which is added once and trained once, and the norm below gets the sum of the chunks' gradients. (The official code
gives each chunk a quarter of the bias and the whole of its step.)

A module tree mirrors the auxiliary's: h.0.attn.v_proj.descent simulates the descent of h.0.attn.v_proj.

Glossary
    x, grad   [B, T, D], state and gradient of the loss in it
    weights   DocumentWeights, the auxiliary's tensors plus each document's change
    context   [B, T] bool, tokens whose gradient counts
    lr        eta, a number or [B]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from papercore.tint.activation import (
    ActivationBackward,
    ActivationForward,
    ActivationMemory,
    GatedBackward,
    GatedForward,
    GatedMemory,
)
from papercore.tint.attention import AttentionBackward, AttentionForward, AttentionMemory
from papercore.tint.auxiliary import Auxiliary, BlockWeights, LinearWeights, NormWeights
from papercore.tint.config import TinTConfig
from papercore.tint.layout import Layout
from papercore.tint.linear import LinearBackward, LinearDescent, LinearForward
from papercore.tint.normalisation import LayerNormBackward, LayerNormDescent, LayerNormForward, NormMemory
from papercore.tint.tree import Operation
from papercore.tint.weights import DocumentWeights


def operation_layout(auxiliary: Auxiliary, config: TinTConfig) -> Layout | None:
    """Where weights and signals stand in the simulator's tokens; None where nothing is laid out."""
    if config.backend == "fused":
        return None
    return Layout(auxiliary.width, stack=config.stack, context=auxiliary.n_positions)


def _shortened(memory: Any, length: int) -> Any:
    """A memory of the first `length` tokens."""
    if isinstance(memory, Tensor):
        return memory[:, :length]
    if isinstance(memory, AttentionMemory):
        cut = {name: getattr(memory, name)[:, :, :length] for name in ("q", "k", "v")}
        if memory.probabilities is not None:
            cut["probabilities"] = memory.probabilities[:, :, :length, :length]
        if memory.position_ids is not None:
            cut["position_ids"] = memory.position_ids[:, :length]
        return replace(memory, allowed=memory.allowed[:, :, :length, :length], **cut)
    tensors = {
        name: value[:, :length] for name, value in memory._asdict().items() if isinstance(value, Tensor)
    }
    return memory._replace(**tensors)


@dataclass
class BlockMemory:
    """What a block remembers for its backward pass."""

    norm_1: NormMemory
    h1: Tensor
    attention: AttentionMemory
    mixed: Tensor
    norm_2: NormMemory
    h2: Tensor
    activation: list[ActivationMemory | GatedMemory] = field(default_factory=list)  # one a chunk
    inner: list[Tensor] = field(default_factory=list)

    def shortened(self, length: int) -> BlockMemory:
        """The first `length` tokens: later ones have no gradient, for attention is causal."""
        short = {
            name: _shortened(getattr(self, name), length)
            for name in ("norm_1", "h1", "attention", "mixed", "norm_2", "h2")
        }
        return BlockMemory(
            **short,
            activation=[_shortened(memory, length) for memory in self.activation],
            inner=[inner[:, :length] for inner in self.inner],
        )


class SimulatedNorm(Operation):
    """A norm in its three roles."""

    def __init__(self, norm: NormWeights, config: TinTConfig, layout: Layout | None) -> None:
        how: dict[str, Any] = {"backend": config.backend, "layout": layout}
        super().__init__(
            forward=LayerNormForward(norm.kind, norm.eps, **how),
            backward=LayerNormBackward(config.ln_grad, config.fd_eps, config.fd_relative, **how),
            descent=LayerNormDescent(**how),
        )
        self.norm = norm

    def run(self, x: Tensor, weights: DocumentWeights) -> tuple[Tensor, NormMemory]:
        return self.forward(x, weights.scale(self.norm), weights.shift(self.norm))

    def descend(self, grad: Tensor, memory: NormMemory, changes: Changes) -> None:
        if changes.wants(self.norm):
            weight, bias = self.get_submodule("descent")(grad, memory, changes.context, changes.lr)
            changes.note(self.norm, "weight", weight)
            changes.note(self.norm, "bias", bias)

    def go_back(self, grad: Tensor, memory: NormMemory, weights: DocumentWeights, changes: Changes) -> Tensor:
        self.descend(grad, memory, changes)
        return self.get_submodule("backward")(grad, memory, weights.scale(self.norm))


class Changes:
    """The changes of one step, gathered while the old weights are still read."""

    def __init__(self, weights: DocumentWeights, context: Tensor, lr: float | Tensor) -> None:
        self.weights, self.context, self.lr = weights, context, lr
        self._noted: list[tuple[LinearWeights | NormWeights, str, Tensor]] = []

    def wants(self, owner: LinearWeights | NormWeights) -> bool:
        return owner.key("weight") in self.weights.pieces or owner.key("bias") in self.weights.pieces

    def note(self, owner: LinearWeights | NormWeights, part: str, change: Tensor) -> None:
        if owner.key(part) in self.weights.pieces:
            self._noted.append((owner, part, change))

    def apply(self) -> None:
        for owner, part, change in self._noted:
            self.weights.add(owner, part, change)
        self._noted.clear()


class SimulatedBlock(Operation):
    """A pre-LN block of the auxiliary, simulated; its place in the tree is the block's."""

    def __init__(
        self, block: BlockWeights, auxiliary: Auxiliary, config: TinTConfig, layout: Layout | None
    ) -> None:
        super().__init__()
        how: dict[str, Any] = {"backend": config.backend, "layout": layout}
        self.block, self.config = block, config
        self.chunks = self._chunk_count(block.fc_in.matrix().shape[0], auxiliary.width)
        options: dict[str, Any] = {
            "grad": config.act_grad,
            "fd_eps": config.fd_eps,
            "relative": config.fd_relative,
        }
        if block.fc_gate is None:
            activation = Operation(
                forward=ActivationForward(auxiliary.activation),
                backward=ActivationBackward(auxiliary.activation, **options),
            )
        else:
            activation = Operation(
                forward=GatedForward(auxiliary.activation),
                backward=GatedBackward(auxiliary.activation, **options),
            )
        attention = Operation(
            forward=AttentionForward(
                auxiliary.n_head,
                auxiliary.n_kv_head,
                block.scale,
                auxiliary.rotary,
                keep_probabilities=not config.recompute_attention,
                **how,
            ),
            backward=AttentionBackward(config.attn_grad, **how),
        )
        # Attention first: its projections are children of it.
        self._place(block.attention_name, attention)
        self._place(block.norm_1.name, SimulatedNorm(block.norm_1, config, layout))
        self._place(block.norm_2.name, SimulatedNorm(block.norm_2, config, layout))
        self._place(block.activation_name, activation)
        for linear in block.linears():
            roles = Operation(
                forward=LinearForward(**how), backward=LinearBackward(**how), descent=LinearDescent(**how)
            )
            self._place(linear.name, roles)

    def _chunk_count(self, inner: int, width: int) -> int:
        chunks = self.config.mlp_chunks
        if chunks is None:
            chunks = inner // width if self.config.backend == "literal" and inner % width == 0 else 1
        if inner % chunks:
            raise ValueError(f"mlp_chunks = {chunks} does not divide the MLP's inner width {inner}.")
        return chunks

    def _place(self, name: str, module: nn.Module) -> None:
        self.place(name.removeprefix(f"{self.block.name}."), module)

    def _at(self, name: str, role: str = "") -> Any:
        path = name.removeprefix(f"{self.block.name}.")
        return self.get_submodule(f"{path}.{role}" if role else path)

    def _slices(self) -> Iterator[slice]:
        inner = self.block.fc_in.matrix().shape[0]
        size = inner // self.chunks
        for start in range(0, inner, size):
            yield slice(start, start + size)

    def _linear(self, x: Tensor, linear: LinearWeights, weights: DocumentWeights) -> Tensor:
        return self._at(linear.name, "forward")(x, weights.matrix(linear), weights.vector(linear))

    def run(
        self, x: Tensor, weights: DocumentWeights, attention_mask: Tensor | None, position_ids: Tensor
    ) -> tuple[Tensor, BlockMemory]:
        """x [B, T, D] -> (x after the block, what it remembers)."""
        block = self.block
        h1, norm_1 = self._at(block.norm_1.name).run(x, weights)
        q, k, v = (self._linear(h1, linear, weights) for linear in (block.query, block.key, block.value))
        mixed, attention = self._at(block.attention_name, "forward")(q, k, v, attention_mask, position_ids)
        x = x + self._linear(mixed, block.output, weights)
        h2, norm_2 = self._at(block.norm_2.name).run(x, weights)
        memory = BlockMemory(norm_1, h1, attention, mixed, norm_2, h2)
        return x + self._run_mlp(h2, weights, memory), memory

    def _run_mlp(self, h2: Tensor, weights: DocumentWeights, memory: BlockMemory) -> Tensor:
        block = self.block
        activation = self._at(block.activation_name, "forward")
        entrances = [
            (self._at(linear.name, "forward"), weights.matrix(linear), weights.vector(linear))
            for linear in (block.fc_gate, block.fc_in)
            if linear is not None
        ]
        exit_matrix = weights.matrix(block.fc_out)
        out: Tensor | None = None
        for i, rows in enumerate(self._slices()):
            inputs = [
                role(h2, w[..., rows, :], None if b is None else b[..., rows]) for role, w, b in entrances
            ]
            inner, remembered = activation(*inputs)
            # The output bias is one for all chunks: the first adds it.
            bias = weights.vector(block.fc_out) if i == 0 else None
            piece = self._at(block.fc_out.name, "forward")(inner, exit_matrix[..., rows], bias)
            out = piece if out is None else out + piece
            memory.activation.append(remembered)
            memory.inner.append(inner)
        assert out is not None
        return out

    def go_back(
        self,
        grad: Tensor,
        memory: BlockMemory,
        weights: DocumentWeights,
        changes: Changes,
        *,
        is_lowest: bool = False,
    ) -> Tensor:
        """The gradient in the block's output -> in its input, [B, T, D]; descents go to `changes`.

        Nothing is trained below the lowest block, and the gradient in its input is not computed: what is returned is no gradient.
        """
        block = self.block
        grad = grad + self._at(block.norm_2.name).go_back(
            self._mlp_back(grad, memory, weights, changes), memory.norm_2, weights, changes
        )
        self._descend(block.output, memory.mixed, grad, changes)
        mixed = self._at(block.output.name, "backward")(grad, weights.matrix(block.output))
        parts = self._at(block.attention_name, "backward")(mixed, memory.attention)
        trio = zip((block.query, block.key, block.value), parts, strict=True)
        reached = [(linear, part) for linear, part in trio if part is not None]
        for linear, part in reached:
            self._descend(linear, memory.h1, part, changes)
        if is_lowest and not changes.wants(block.norm_1):
            return grad
        total = torch.zeros_like(grad)
        for linear, part in reached:
            total += self._at(linear.name, "backward")(part, weights.matrix(linear))
        norm = self._at(block.norm_1.name)
        if is_lowest:
            norm.descend(total, memory.norm_1, changes)
            return grad
        return grad + norm.go_back(total, memory.norm_1, weights, changes)

    def _mlp_back(
        self, grad: Tensor, memory: BlockMemory, weights: DocumentWeights, changes: Changes
    ) -> Tensor:
        block = self.block
        inputs = [linear for linear in (block.fc_gate, block.fc_in) if linear is not None]
        pieces: dict[LinearWeights, list[tuple[Tensor, Tensor]]] = {linear: [] for linear in inputs}
        matrices = {linear: weights.matrix(linear) for linear in [*inputs, block.fc_out]}
        out_weight: list[Tensor] = []
        total: Tensor | None = None
        for i, rows in enumerate(self._slices()):
            weight, bias = self._at(block.fc_out.name, "descent")(
                memory.inner[i], grad, changes.context, changes.lr
            )
            out_weight.append(weight)
            if i == 0:  # every chunk would find the same step of the one output bias
                changes.note(block.fc_out, "bias", bias)
            inner = self._at(block.fc_out.name, "backward")(grad, matrices[block.fc_out][..., rows])
            parts = self._at(block.activation_name, "backward")(inner, memory.activation[i])
            for linear, part in zip(inputs, parts if block.fc_gate is not None else (parts,), strict=True):
                pieces[linear].append(
                    self._at(linear.name, "descent")(memory.h2, part, changes.context, changes.lr)
                )
                below = self._at(linear.name, "backward")(part, matrices[linear][..., rows, :])
                total = below if total is None else total + below
        changes.note(block.fc_out, "weight", _joined(out_weight, -1))
        for linear in inputs:
            changes.note(linear, "weight", _joined([weight for weight, _ in pieces[linear]], -2))
            changes.note(linear, "bias", _joined([bias for _, bias in pieces[linear]], -1))
        assert total is not None
        return total

    def _descend(self, linear: LinearWeights, x: Tensor, grad: Tensor, changes: Changes) -> None:
        if changes.wants(linear):
            weight, bias = self._at(linear.name, "descent")(x, grad, changes.context, changes.lr)
            changes.note(linear, "weight", weight)
            changes.note(linear, "bias", bias)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
