"""Where everything stands in the simulator's tokens (Panigrahi et al., 2024, section 2.1).

A simulator's sequence is K prefix tokens, then T ordinary ones; every token is a vector of D_sim numbers. For one linear layer
W [D, D] with bias b, prefix token k holds S rows of W one after the other, and b behind them:

    prefix k      [ W[kS] | W[kS + 1] | ... | W[kS + S - 1] | b ]                      D_sim = (S + 1) D numbers
    ordinary t    [ signal | 0 ...                  | memory .. ]                      signal: activation, or gradient on the way back

So stacking S rows a token makes the prefix S times shorter. The memory at the end is what the way back needs: a linear layer keeps its
input (one slot of D numbers), a norm its normalised input and its input (two), attention q, k and a third (three slots: S >= 3).

Positions are tensors of their own, one-hot: the first T_max coordinates count ordinary tokens, the last K prefix tokens. Gates read them:
out = tanh(g_old . position) old + tanh(g_new . position) new keeps the prefix and takes the tokens, or the other way about.

Departures. The official gate scale is 10, and tanh(10) = 1 - 4e-9; ours is 20, which is 1 to the last bit in float64. A copy of b
stands in every prefix token and descent updates all of them (in the official code only the first copy is good after an update).
A weight smaller than D x D is filled up with zeros; a larger one is cut into pieces of D x D (literal.py), each with a prefix of its own.

Glossary
    d_model   D, width of the auxiliary model
    stack     S, rows of W in one prefix token
    shards    C, into how many heads one row is cut; each head has D / C numbers
    context   T_max, the most ordinary tokens
    n_prefix  K = D / S
    d_sim     D_sim = (S + 1) D
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Layout", "Slot", "gate"]


class Slot(NamedTuple):
    """A named stretch of a token's numbers; `token` is "prefix", "ordinary" or "position"."""

    token: str
    name: str
    start: int
    stop: int
    meaning: str


def _nearest_divisors(number: int, near: int) -> str:
    """The divisors of `number` next to `near`, as text."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d <= near][-1:], [d for d in divisors if d > near][:1]
    return " or ".join(map(str, below + above))


def gate(
    old: Tensor, new: Tensor, position: Tensor, keep: Tensor, take: Tensor, scale: float = 20.0
) -> Tensor:
    """tanh(scale keep . position) old + tanh(scale take . position) new.

    Args:
        old, new: [..., N, D_sim].
        position: [N, P], one-hot.
        keep, take: [P], 1 at the positions that keep the old, and that take the new state; else 0.
        scale: 20 is 1 - 0 in float64; 10, the official value, 1 - 4e-9.

    >>> old, new, position = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]]), torch.eye(2)
    >>> gate(old, new, position, keep=torch.tensor([1.0, 1.0]), take=torch.tensor([0.0, 1.0]))
    tensor([[ 1.],
            [22.]])
    """
    kept, taken = (torch.tanh(scale * (position @ g)).unsqueeze(-1) for g in (keep, take))
    return kept * old + taken * new


@dataclass(frozen=True)
class Layout:
    """The simulator's dimensions.

    Args:
        d_model: D; a multiple of stack and of shards.
        stack: S; at least 2 for a norm's memory, at least 3 for attention's.
        shards: C.
        context: T_max.

    Raises:
        ValueError: a size below 1; d_model not a multiple, with the nearest that would do.

    >>> layout = Layout(d_model=768, stack=3, context=1024)
    >>> layout.n_prefix, layout.d_sim, layout.n_position
    (256, 3072, 1280)
    >>> small = Layout(d_model=4, stack=2)
    >>> small.stack_weight(torch.arange(16.0).view(4, 4), torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    tensor([[ 0.,  1.,  2.,  3.,  4.,  5.,  6.,  7., -1., -2., -3., -4.],
            [ 8.,  9., 10., 11., 12., 13., 14., 15., -1., -2., -3., -4.]])
    """

    d_model: int
    stack: int = 4
    shards: int = 1
    context: int = 1024

    def __post_init__(self) -> None:
        for name in ("d_model", "stack", "shards", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1.")
        for name in ("stack", "shards"):
            value = getattr(self, name)
            if self.d_model % value:
                raise ValueError(
                    f"{name} = {value} does not divide d_model = {self.d_model}: "
                    f"the nearest that do are {_nearest_divisors(self.d_model, value)}."
                )

    @property
    def n_prefix(self) -> int:
        """K, prefix tokens of one linear layer."""
        return self.d_model // self.stack

    @property
    def d_sim(self) -> int:
        """D_sim, numbers of a token."""
        return (self.stack + 1) * self.d_model

    @property
    def d_shard(self) -> int:
        """Numbers of one head."""
        return self.d_model // self.shards

    @property
    def n_position(self) -> int:
        """Width of the position tensor."""
        return self.context + self.n_prefix

    @property
    def signal(self) -> slice:
        """An ordinary token's activation or gradient."""
        return slice(0, self.d_model)

    @property
    def bias(self) -> slice:
        """A prefix token's copy of b."""
        return slice(self.stack * self.d_model, self.d_sim)

    def row(self, s: int) -> slice:
        """The s-th stacked row of a prefix token."""
        return slice(s * self.d_model, (s + 1) * self.d_model)

    def memory(self, slot: int, slots: int) -> slice:
        """The `slot`-th of `slots` memories of an ordinary token, at the end of its vector."""
        if slots > self.stack:
            raise ValueError(
                f"stack = {self.stack} leaves room for {self.stack} memories of {self.d_model} numbers beside the signal, "
                f"{slots} are needed: use stack >= {slots}."
            )
        start = self.d_sim - (slots - slot) * self.d_model
        return slice(start, start + self.d_model)

    def stack_weight(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """W [..., D_out, D_in] and b [..., D_out], each at most D wide, as prefix tokens [..., K, D_sim]: a copy, bit by bit."""
        d = self.d_model
        if weight.dim() < 2 or max(weight.shape[-2:]) > d:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}: expected at most {d} rows and columns."
            )
        if bias is not None and bias.shape[-1] != weight.shape[-2]:
            raise ValueError(f"bias has {bias.shape[-1]} numbers: expected {weight.shape[-2]}.")
        d_out, d_in = weight.shape[-2:]
        rows = F.pad(weight, (0, d - d_in, 0, d - d_out))
        rows = rows.unflatten(-2, (self.n_prefix, self.stack)).flatten(-2)
        b = rows.new_zeros(d) if bias is None else F.pad(bias.to(rows.dtype), (0, d - d_out))
        batch = torch.broadcast_shapes(rows.shape[:-2], b.shape[:-1])
        rows, b = rows.expand(*batch, -1, -1), b.unsqueeze(-2).expand(*batch, self.n_prefix, d)
        return torch.cat([rows, b], -1)

    def unstack_weight(
        self, prefix: Tensor, d_out: int | None = None, d_in: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(W [..., D_out, D_in], b [..., D_out]) of prefix tokens [..., K, D_sim]; b is read from the first."""
        if prefix.shape[-2:] != (self.n_prefix, self.d_sim):
            raise ValueError(
                f"prefix has shape {tuple(prefix.shape)}: expected [..., {self.n_prefix}, {self.d_sim}]."
            )
        rows = prefix[..., : self.stack * self.d_model].unflatten(-1, (self.stack, self.d_model))
        return rows.flatten(-3, -2)[..., :d_out, :d_in], prefix[..., 0, self.bias][..., :d_out]

    def tokens(self, signal: Tensor, *memories: Tensor) -> Tensor:
        """Ordinary tokens [B, T, D_sim] from a signal and memories [B, T, at most D], in the order of `memory`."""
        if signal.shape[1] > self.context:
            raise ValueError(f"{signal.shape[1]} tokens: this layout has context = {self.context}.")
        state = signal.new_zeros(*signal.shape[:2], self.d_sim)
        slices = [self.signal, *(self.memory(i, len(memories)) for i in range(len(memories)))]
        for where, what in zip(slices, (signal, *memories), strict=True):
            if what.shape[-1] > self.d_model:
                raise ValueError(f"{what.shape[-1]} numbers a token: a slot has d_model = {self.d_model}.")
            state[..., where.start : where.start + what.shape[-1]] = what
        return state

    def positions(self, tokens: int, *, like: Tensor) -> Tensor:
        """One-hot positions [K + T, T_max + K] of the prefix and then T ordinary tokens, dtype and device of `like`."""
        index = torch.cat([torch.arange(self.context, self.n_position), torch.arange(tokens)])
        return F.one_hot(index, self.n_position).to(like.device, like.dtype)

    def is_prefix(self, *, like: Tensor) -> Tensor:
        """[P]: 1 at the positions of prefix tokens, for gates; 1 minus it is for the ordinary ones."""
        return (torch.arange(self.n_position, device=like.device) >= self.context).to(like.dtype)

    def describe(self) -> list[Slot]:
        """Every named stretch, for a drawing.

        >>> for slot in Layout(d_model=8, stack=2, context=16).describe():
        ...     print(f"{slot.token:9}{slot.start:3}:{slot.stop:<3} {slot.name}")
        prefix     0:8   row 0
        prefix     8:16  row 1
        prefix    16:24  bias
        ordinary   0:8   signal
        ordinary   8:16  memory 0 of 2
        ordinary  16:24  memory 1 of 2
        position   0:16  ordinary token
        position  16:20  prefix token
        """
        out = [
            Slot("prefix", f"row {s}", self.row(s).start, self.row(s).stop, f"W[{self.stack} k + {s}] of prefix token k")
            for s in range(self.stack)
        ]  # fmt: skip
        out.append(
            Slot("prefix", "bias", self.bias.start, self.bias.stop, "b, the same in every prefix token")
        )
        out.append(Slot("ordinary", "signal", 0, self.d_model, "activation, or gradient on the way back"))
        slots = min(self.stack, 3)
        meanings = ("q", "k; normalised input of a norm", "v; input of a linear layer or norm")[3 - slots :]
        for i, meaning in enumerate(meanings):
            where = self.memory(i, slots)
            out.append(Slot("ordinary", f"memory {i} of {slots}", where.start, where.stop, meaning))
        out.append(Slot("position", "ordinary token", 0, self.context, "one-hot index of the token"))
        out.append(
            Slot("position", "prefix token", self.context, self.n_position, "one-hot index of the prefix token")
        )  # fmt: skip
        return out
