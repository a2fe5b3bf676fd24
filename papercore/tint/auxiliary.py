"""The auxiliary model read into one description: which tensor does what, under which name.

GPT-2, OPT (pre-LN) and Llama of transformers and papercore's TinyGPT are recognised by class name and model_type, so that
nothing is imported to recognise them. A description holds the model's own parameters: nothing is copied, a change of the
model is seen by the simulator, and the model is never changed. Views (a transposed Conv1D, the value rows of GPT-2's
joint c_attn) are made when they are asked for.

Glossary (code name, symbol in arXiv 2307.01189, shape):
    width         D     residual stream
    n_head        H     query heads of head_size = D / H; n_kv_head key and value heads
    blocks        L     in the order of the forward pass
    matrix()            a weight as nn.Linear holds it, [D_out, D_in]
    name                the module's name in the auxiliary; its tensors are name + ".weight" and name + ".bias"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from papercore.tint.attention import Rotary

KNOWN = "GPT2LMHeadModel, OPTForCausalLM (pre-LN) and LlamaForCausalLM of transformers, and TinyGPT of papercore.tint"


PieceKey = tuple[str, str, tuple[int, int] | None]


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """A linear layer of the auxiliary, or rows of one (GPT-2 keeps queries, keys and values in one matrix)."""

    name: str
    weight: Tensor
    bias: Tensor | None
    is_transposed: bool = False  # stored [D_in, D_out] as Conv1D does
    rows: tuple[int, int] | None = None  # of the [D_out, D_in] matrix; None: all

    def key(self, part: str) -> PieceKey:
        """What names the weight or the bias of these rows: (module, "weight" or "bias", rows)."""
        return self.name, part, self.rows

    def matrix(self) -> Tensor:
        """[D_out, D_in], a view of the auxiliary's tensor."""
        return self.part_of_weight(self.weight.detach())

    def vector(self) -> Tensor | None:
        """[D_out], a view of the auxiliary's tensor, or None."""
        return None if self.bias is None else self.part_of_bias(self.bias.detach())

    def part_of_weight(self, stored: Tensor) -> Tensor:
        """This layer's [.., D_out, D_in] view of a tensor [.., *] laid out as the stored weight is."""
        full = stored.transpose(-1, -2) if self.is_transposed else stored
        return full if self.rows is None else full[..., self.rows[0] : self.rows[1], :]

    def part_of_bias(self, stored: Tensor) -> Tensor:
        """This layer's [.., D_out] view of a tensor [.., *] laid out as the stored bias is."""
        return stored if self.rows is None else stored[..., self.rows[0] : self.rows[1]]


@dataclass(frozen=True, eq=False)
class NormWeights:
    """A layer norm (scale and bias) or an RMS norm (scale alone); weight [D], bias [D] or None."""

    name: str
    weight: Tensor
    bias: Tensor | None
    kind: str  # "layernorm" or "rmsnorm"
    eps: float

    def key(self, part: str) -> PieceKey:
        """What names the scale or the bias: (module, "weight" or "bias", None)."""
        return self.name, part, None


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """x + attention(norm_1(x)), then x + MLP(norm_2(x))."""

    name: str
    norm_1: NormWeights
    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    output: LinearWeights
    norm_2: NormWeights
    fc_in: LinearWeights
    fc_gate: LinearWeights | None
    fc_out: LinearWeights
    scale: float  # of the attention scores
    attention_name: str
    activation_name: str

    def linears(self) -> Iterator[LinearWeights]:
        yield from (self.query, self.key, self.value, self.output, self.fc_in, self.fc_out)
        if self.fc_gate is not None:
            yield self.fc_gate


@dataclass(frozen=True)
class Auxiliary:
    """A pre-LN decoder as the simulator reads it."""

    family: str  # "gpt2", "opt", "llama" or "tiny_gpt"
    width: int
    n_head: int
    n_kv_head: int
    head_size: int
    vocab_size: int
    n_positions: int
    activation: str
    embedding: Tensor  # [V, D]
    positions: Tensor | None  # [n_positions + position_offset, D]
    position_offset: int  # OPT: 2
    positions_follow_mask: bool  # OPT counts the tokens that are not padding
    rotary: Rotary | None
    blocks: tuple[BlockWeights, ...]
    final_norm: NormWeights
    head: LinearWeights
    module_names: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B or 1, T]: what the model itself takes where it is given none."""
        if self.positions_follow_mask and attention_mask is not None and attention_mask.ndim == 2:
            kept = attention_mask.long()
            return kept.cumsum(dim=1) * kept - 1
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T, D]: token embeddings, plus those of the positions where the model has a table."""
        x = self.embedding.detach()[input_ids]
        if self.positions is not None:
            x = x + self.positions.detach()[position_ids + self.position_offset]
        return x

    def norms(self) -> Iterator[NormWeights]:
        for block in self.blocks:
            yield block.norm_1
            yield block.norm_2
        yield self.final_norm


def read_auxiliary(model: nn.Module) -> Auxiliary:
    """Describe `model`; its tensors are referenced.

    Raises:
        TypeError: not an nn.Module.
        NotImplementedError: a model, or a part of one, that TinT does not simulate; the module is named.
        ValueError: the model is in training mode and drops units out.

    >>> from papercore.tint import TinyGPT
    >>> model = TinyGPT(n_embd=12, n_head=3)
    >>> description = read_auxiliary(model)
    >>> description.blocks[0].value.name, description.blocks[0].value.weight is model.h[0].attn.v_proj.weight
    ('h.0.attn.v_proj', True)
    """
    if not isinstance(model, nn.Module):
        given = repr(model) if isinstance(model, str) else type(model).__name__
        raise TypeError(f"the auxiliary must be an nn.Module, given {given}; pass one of {KNOWN}")
    from papercore.tint import families

    readers: dict[str, Callable[[Any], Auxiliary]] = {
        "TinyGPT": families.read_tiny_gpt,
        "GPT2LMHeadModel": families.read_gpt2,
        "OPTForCausalLM": families.read_opt,
        "LlamaForCausalLM": families.read_llama,
    }
    # A subclass of a known model is read as its parent is.
    reader = next((readers[c.__name__] for c in type(model).__mro__ if c.__name__ in readers), None)
    if reader is None:
        attention = [name for name, _ in model.named_modules() if "att" in name.rsplit(".", 1)[-1].lower()]
        where = f" (its first attention module is {attention[0]})" if attention else ""
        raise NotImplementedError(
            f"TinT does not simulate {type(model).__name__}{where}; it simulates {KNOWN}. Post-LN blocks, "
            "cross-attention, ALiBi and relative positions are not simulated"
        )
    refuse_dropout(model)
    return reader(model)


def refuse_dropout(model: nn.Module) -> None:
    """ValueError where the model is in training mode and drops units out."""
    if not model.training:
        return
    drops = [
        name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0
    ]
    config = getattr(model, "config", None)
    drops += [
        f"config.{field}={getattr(config, field)}"
        for field in ("dropout", "attention_dropout", "layerdrop")
        if isinstance(getattr(config, field, None), float) and getattr(config, field) > 0
    ]
    if drops:
        raise ValueError(
            f"the auxiliary is in training mode and drops units out ({drops[0]}); the simulation is deterministic: "
            "call model.eval() first"
        )
