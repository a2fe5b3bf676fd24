"""Causal softmax self-attention, forward and backward (Panigrahi et al., 2024, section 2.5 and its appendix).

    AttentionForward    A = softmax(scale q k^T) over the keys that a query may see;   o = A v
    AttentionBackward   value only:  dv_t = sum over j of A[j, t] do_j                  (the paper: scores count as constants)
                        full:        dA = do v^T;  dS = A * (dA - sum over keys of A * dA);
                                     dq = scale dS k;   dk = scale dS^T q               (exact)

The projections are linear layers of their own (linear.py). With "value only" nothing flows into q and k, so their matrices stay as
they are and rotary positions need no care. "full" is what the paper leaves out, products of three activations; it turns the
approximation off, also through rotary positions. "same_position" is the official code's cheaper option: dv = do, without A.

Backend "literal": the simulator's own heads read q, k and v from the tokens' memories (literal_attention.py).

Departures. Grouped keys and values (n_kv_head < n_head), rotary positions and masks for each document are our extensions. A query
that may see no key (left padding) gets zeros.

Glossary
    H, G, d          heads, key and value heads, numbers of one head
    q                [B, T, H d];   k, v  [B, T, G d];   head h is the columns h d .. (h + 1) d
    attention_mask   None, [B, T] bool (True: the key may be seen) or [B, T, T] bool (True: the query, axis 1, may see the key)
    probabilities    A, [B, H, T, T]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.tint.finite_difference import chosen
from papercore.tint.layout import Layout
from papercore.tint.linear import BACKENDS
from papercore.tint.literal_attention import AttentionHeads

__all__ = [
    "ATTENTION_GRADIENTS",
    "AttentionBackward",
    "AttentionForward",
    "AttentionMemory",
    "Rotary",
]

ATTENTION_GRADIENTS = ("value_only", "full", "same_position")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads d] -> [B, heads, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, T, d] -> [B, T, heads d]."""
    return x.transpose(1, 2).flatten(2)


def checked_backend(backend: str, layout: Layout | None) -> str:
    """`backend` if it is one, and has the layout it needs."""
    chosen("backend", backend, BACKENDS)
    if backend == "literal" and layout is None:
        raise ValueError(
            "backend = 'literal' needs a layout: pass layout=Layout(d_model, stack=3 or more, context=...)."
        )
    return backend


class Rotary:
    """Rotary positions: number i and number i + d/2 of a head turn together by the angle position * frequency_i.

    Args:
        frequencies: [d_rotary / 2], one a pair; transformers keeps it as `inv_freq`. The first d_rotary numbers turn, the rest stay.
        scaling: a factor on both turned vectors (`attention_scaling` in transformers).

    >>> rotary = Rotary.from_base(2)
    >>> turned = rotary(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[1]]))
    >>> turned  # cosine and sine of 1
    tensor([[[[0.5403, 0.8415]]]])
    >>> rotary(turned, torch.tensor([[1]]), transpose=True)
    tensor([[[[1., 0.]]]])
    """

    def __init__(self, frequencies: Tensor, scaling: float = 1.0) -> None:
        if frequencies.dim() != 1:
            raise ValueError(
                f"frequencies has shape {tuple(frequencies.shape)}: expected [d / 2], one a pair."
            )
        self.frequencies, self.scaling = frequencies, scaling

    @classmethod
    def from_base(cls, d_rotary: int, base: float = 10000.0) -> Rotary:
        """The usual frequencies, base^(-2 i / d_rotary)."""
        if d_rotary < 2 or d_rotary % 2:
            raise ValueError(f"d_rotary = {d_rotary}: expected an even number of at least 2.")
        return cls(1.0 / base ** (torch.arange(0, d_rotary, 2, dtype=torch.float32) / d_rotary))

    def __call__(self, x: Tensor, position_ids: Tensor, *, transpose: bool = False) -> Tensor:
        """Turn x [B, heads, T, d] by its positions [B, T]; `transpose`: the transposed map, for gradients."""
        half = self.frequencies.shape[0]
        # Angles in float32 at least: a position of thousands has no fraction left in half precision.
        dtype = torch.promote_types(x.dtype, torch.float32)
        angle = position_ids[:, None, :, None].to(dtype) * self.frequencies.to(x.device, dtype)
        cos, sin = angle.cos().to(x.dtype) * self.scaling, angle.sin().to(x.dtype) * self.scaling
        if transpose:
            sin = -sin
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


@dataclass
class AttentionMemory:
    """What the tokens remember of their attention: q and k (turned, if rotary), v, and what is needed to go back.

    q [B, H, T, d]; k, v [B, G, T, d]; `allowed` broadcasts to [B, 1, T, T]; `masked`: a query may have no key at all;
    `probabilities` is None if they are to be computed again.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    allowed: Tensor
    scale: float
    probabilities: Tensor | None = None
    rotary: Rotary | None = None
    position_ids: Tensor | None = None
    masked: bool = True

    def attend(self) -> Tensor:
        """A, [B, H, T, T]: from memory, or from q and k."""
        if self.probabilities is not None:
            return self.probabilities
        return attention_probabilities(self.q, self.k, self.allowed, self.scale, self.masked)

    def turn_back(self, grad: Tensor) -> Tensor:
        """The gradient before rotary positions from the one after them, [B, heads, T, d]."""
        if self.rotary is None or self.position_ids is None:
            return grad
        return self.rotary(grad, self.position_ids, transpose=True)

    def heads(
        self, layout: Layout | None, *, signal: Tensor | None = None, restrict: bool = True
    ) -> AttentionHeads:
        """The simulator's heads over tokens with these memories, to compute with or to look at; `signal` is do."""
        if layout is None:
            raise ValueError(
                "heads stand in a layout: pass layout=Layout(d_model, stack=3 or more, context=...)."
            )
        q, k, v = (merge_heads(x) for x in (self.q, self.k, self.v))
        counts = self.q.shape[1], self.k.shape[1]
        return AttentionHeads(
            layout, q, k, v, self.allowed, self.scale, *counts, signal=signal, restrict=restrict
        )


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, G, T, d] -> [B, H, T, d]: each key or value head serves H / G query heads that follow each other."""
    groups = x.shape[1]
    return x if groups == heads else x.repeat_interleave(heads // groups, 1)


def sum_groups(x: Tensor, groups: int) -> Tensor:
    """The transpose of `repeat_heads`: [B, H, T, d] -> [B, G, T, d]."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def attention_probabilities(
    q: Tensor, k: Tensor, allowed: Tensor, scale: float, masked: bool = True
) -> Tensor:
    """softmax(scale q k^T) over the allowed keys, [B, H, T, T].

    A row without an allowed key is zero; `masked` False says that there is none such, as with a causal mask alone.
    """
    scores = (q * scale) @ repeat_heads(k, q.shape[1]).mT
    # An addition, not a filling: several times faster. Half the lowest number cannot overflow, and its exponential is 0.
    lowest = torch.finfo(scores.dtype).min / 2
    scores += torch.zeros_like(allowed, dtype=scores.dtype).masked_fill_(~allowed, lowest)
    probabilities = scores.softmax(-1)
    return probabilities * allowed.any(-1, keepdim=True) if masked else probabilities


def allowed_keys(q: Tensor, attention_mask: Tensor | None, causal: bool = True) -> Tensor:
    """Which key each query may see: bool, broadcasts to [B, 1, T, T]."""
    batch, tokens = q.shape[:2]
    allowed = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed.tril()
    if attention_mask is None:
        return allowed
    if attention_mask.dtype != torch.bool or attention_mask.shape not in (
        (batch, tokens),
        (batch, tokens, tokens),
    ):
        raise ValueError(
            f"attention_mask is {attention_mask.dtype} {tuple(attention_mask.shape)}: expected torch.bool "
            f"{(batch, tokens)} or {(batch, tokens, tokens)}."
        )
    keys = attention_mask[:, None, None] if attention_mask.dim() == 2 else attention_mask[:, None]
    return allowed & keys


class AttentionForward(nn.Module):
    """o = softmax(scale q k^T) v, head by head.

    Args:
        n_head, n_kv_head: H and G; G divides H; default G = H.
        scale: on the scores; default 1 / sqrt(d).
        rotary: a Rotary, applied to q and k; None: positions are elsewhere.
        causal: a query sees no later key.
        keep_probabilities: False: A is not kept but computed again on the way back, as the paper does: B H T^2 numbers less.
        backend, layout, restrict: as LinearOperation.

    `forward(q, k, v, attention_mask=None, position_ids=None)` returns (o [B, T, H d], AttentionMemory). position_ids [B, T] are for
    rotary alone, default 0, 1, 2, ...

    Raises:
        ValueError: heads that do not divide the widths; another mask.

    >>> v = torch.tensor([[[1.0], [3.0]]])
    >>> AttentionForward(1)(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), v)[0]
    tensor([[[1.],
             [2.]]])
    """

    def __init__(
        self,
        n_head: int,
        n_kv_head: int | None = None,
        scale: float | None = None,
        rotary: Rotary | None = None,
        *,
        causal: bool = True,
        keep_probabilities: bool = True,
        backend: str = "fused",
        layout: Layout | None = None,
        restrict: bool = True,
    ) -> None:
        super().__init__()
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        if n_head < 1 or n_kv_head < 1 or n_head % n_kv_head:
            raise ValueError(
                f"n_head = {n_head}, n_kv_head = {n_kv_head}: expected n_kv_head to divide n_head."
            )
        self.n_head, self.n_kv_head, self.scale, self.rotary = n_head, n_kv_head, scale, rotary
        self.causal, self.keep_probabilities = causal, keep_probabilities
        self.backend, self.layout, self.restrict = checked_backend(backend, layout), layout, restrict

    @torch.no_grad()
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, AttentionMemory]:
        memory = self.remember(q, k, v, attention_mask, position_ids)
        if self.backend == "literal":
            return memory.heads(self.layout, restrict=self.restrict).forward()[0], memory
        if self.keep_probabilities:
            memory.probabilities = memory.attend()
            out = memory.probabilities @ repeat_heads(memory.v, self.n_head)
        else:
            out = F.scaled_dot_product_attention(
                memory.q,
                repeat_heads(memory.k, self.n_head),
                repeat_heads(memory.v, self.n_head),
                attn_mask=memory.allowed,
                scale=memory.scale,
            )
            if attention_mask is not None:
                out = torch.where(memory.allowed.any(-1, keepdim=True), out, 0.0)
        return merge_heads(out), memory

    def remember(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> AttentionMemory:
        """Heads apart, positions turned, who sees whom."""
        if q.dim() != 3 or q.shape[-1] % self.n_head:
            raise ValueError(
                f"q has shape {tuple(q.shape)}: expected [B, T, D], D a multiple of {self.n_head} heads."
            )
        width = q.shape[-1] // self.n_head * self.n_kv_head
        if k.shape != (*q.shape[:2], width) or v.shape != k.shape:
            raise ValueError(
                f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}: expected {(*q.shape[:2], width)}, "
                f"{self.n_kv_head} heads of {q.shape[-1] // self.n_head}."
            )
        allowed = allowed_keys(q, attention_mask, self.causal)
        heads = (split_heads(x, n) for x, n in ((q, self.n_head), (k, self.n_kv_head), (v, self.n_kv_head)))
        query, key, value = heads
        if self.rotary is not None:
            if position_ids is None:
                position_ids = torch.arange(q.shape[1], device=q.device).unsqueeze(0)
            query, key = self.rotary(query, position_ids), self.rotary(key, position_ids)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return AttentionMemory(
            query,
            key,
            value,
            allowed,
            scale,
            rotary=self.rotary,
            position_ids=position_ids,
            masked=attention_mask is not None,
        )


class AttentionBackward(nn.Module):
    """dq, dk, dv from do.

    Args:
        grad: "value_only" (the paper: dq and dk are None), "full", or "same_position" (dv = do, dq and dk None).
        backend, layout, restrict: as LinearOperation.

    `forward(grad, memory)` returns (dq [B, T, H d] or None, dk [B, T, G d] or None, dv [B, T, G d]).

    >>> o, memory = AttentionForward(1)(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]]))
    >>> AttentionBackward()(torch.tensor([[[0.0], [1.0]]]), memory)  # the second token looks at both alike
    (None, None, tensor([[[0.5000],
             [0.5000]]]))
    """

    def __init__(
        self,
        grad: str = "value_only",
        backend: str = "fused",
        layout: Layout | None = None,
        *,
        restrict: bool = True,
    ) -> None:
        super().__init__()
        self.grad = chosen("grad", grad, ATTENTION_GRADIENTS)
        self.backend, self.layout, self.restrict = checked_backend(backend, layout), layout, restrict

    @torch.no_grad()
    def forward(self, grad: Tensor, memory: AttentionMemory) -> tuple[Tensor | None, Tensor | None, Tensor]:
        heads, groups = memory.q.shape[1], memory.k.shape[1]
        do = split_heads(grad, heads)
        if self.grad == "same_position":
            return None, None, merge_heads(sum_groups(do, groups))
        if self.backend == "literal":
            return self._literal(grad, memory)
        attend = memory.attend()
        dv = sum_groups(attend.mT @ do, groups)
        if self.grad == "value_only":
            return None, None, merge_heads(dv)
        slope = do @ repeat_heads(memory.v, heads).mT
        slope = attend * (slope - (attend * slope).sum(-1, keepdim=True)) * memory.scale
        dq = slope @ repeat_heads(memory.k, heads)
        dk = sum_groups(slope.mT @ memory.q, groups)
        return merge_heads(memory.turn_back(dq)), merge_heads(memory.turn_back(dk)), merge_heads(dv)

    def _literal(self, grad: Tensor, memory: AttentionMemory) -> tuple[Tensor | None, Tensor | None, Tensor]:
        heads = memory.heads(self.layout, signal=grad, restrict=self.restrict)
        dv = heads.backward_value()[0]
        if self.grad == "value_only":
            return None, None, dv
        dq = memory.turn_back(split_heads(heads.backward_query()[0], memory.q.shape[1]))
        dk = memory.turn_back(split_heads(heads.backward_key()[0], memory.k.shape[1]))
        return merge_heads(dq), merge_heads(dk), dv
