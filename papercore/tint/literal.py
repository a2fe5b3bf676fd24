"""The attention heads that TinT's linear layers are made of (Panigrahi et al., 2024, section 2.2 and its appendix).

Attention here is linear: no softmax, no scale, a score is <query, key>, and a masked score is 0. A head's projections only copy: each
number of its query, key and value is one number of the token, of its one-hot position, or a constant. With the rows of W stacked S to
a prefix token and cut into C shards of e = D / C numbers (layout.py):

    forward   head (s, c)   query  x_t[shard c]            key  W[kS + s][shard c]     value  one-hot(k)         -> y_t[kS + s]
              head s        query  1                       key  [k = 0]                value  b[kS + s], all k   -> y_t[kS + s]
    backward  head (s, c)   query  (dy_t[kS + s]), all k   key  one-hot(k)             value  W[kS + s][shard c] -> dx_t[shard c]
    descent   head (s, c)   query  one-hot(k) (prefix)     key  (dy_t[kS + s]), all k  value  -eta x_t[shard c]  -> W[kS + s][shard c]
              head c        query  1 (prefix)              key  1                      value  -eta dy_t[shard c] -> b[shard c]

Forward and backward: the tokens ask, the prefix answers. Descent: the prefix asks, the tokens answer. Nothing forbids the other
products; their values are zero or a gate drops what they write, so `restrict=True`, which leaves them out, changes nothing but the cost.

Glossary
    Reading   where the numbers of a query, key or value come from: the projection W_Q, W_K or W_V
    Heads     the heads of one layer: three readings, where the outputs are added, who asks and who answers
    Trace     what one layer did: queries, keys, values [B, heads, N, d], scores [B, heads, N_q, N_k]
    state     [B, K + T, D_sim], prefix first
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.tint.layout import Layout, gate

__all__ = [
    "Attention",
    "Heads",
    "Reading",
    "Trace",
    "backward_heads",
    "descent_heads",
    "forward_heads",
    "linear_attention",
    "run_backward",
    "run_descent",
    "run_forward",
    "run_heads",
]

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
PREFIX, ORDINARY = "prefix", "ordinary"


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(output [..., N_q, d_v], scores [..., N_q, N_k]) with scores <query, key>, 0 where not allowed.

    >>> query, key, value = torch.tensor([[2.0]]), torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0], [1.0]])
    >>> linear_attention(query, key, value)
    (tensor([[26.]]), tensor([[2., 6.]]))
    """
    scores = query @ key.mT
    if allowed is not None:
        scores = scores * allowed
    return scores @ value, scores


@dataclass(frozen=True)
class Reading:
    """A projection that copies: number (head, i) is `scale` times number index[head, i] of [state | position | 0 | 1]."""

    index: Tensor
    scale: float = 1.0

    def __call__(self, extended: Tensor) -> Tensor:
        """[B, N, D_sim + P + 2] -> [B, heads, N, d]."""
        # Columns of a matrix: picking from the last axis of a batch directly is several times slower.
        read = extended.flatten(0, 1).index_select(1, self.index.to(extended.device).flatten())
        read = read.view(*extended.shape[:2], *self.index.shape).transpose(1, 2)
        return read if self.scale == 1.0 else read * self.scale

    def matrix(self, layout: Layout, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The same as a dense projection: weight [heads, D_sim + P, d] and bias [heads, d]; nearly all zeros."""
        size = layout.d_sim + layout.n_position
        columns = torch.nn.functional.one_hot(self.index, size + 2).to(dtype or torch.get_default_dtype())
        columns = columns * self.scale
        return columns[..., :size].transpose(1, 2), columns[..., size + 1]


@dataclass(frozen=True)
class Heads:
    """The heads of one simulated layer; `write` [heads, d_v]: the number of the state that an output is added to."""

    name: str
    query: Reading
    key: Reading
    value: Reading
    write: Tensor
    asks: str
    answers: str

    def __len__(self) -> int:
        return self.write.shape[0]


@dataclass(frozen=True)
class Trace:
    """What the heads of one layer did.

    `query`, `key`, `value` are [B, heads, N, d], `scores` [B, heads, N_q, N_k], `written` [B, N_q, D_sim]
    is what the heads add to the tokens that ask. `asks` and `answers` say which tokens N_q and N_k are: "prefix" and "ordinary", or "all".
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    written: Tensor
    asks: str
    answers: str


class _Coordinates:
    """Numbers of [state | position | 0 | 1] by name."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.zero = layout.d_sim + layout.n_position
        self.one = self.zero + 1
        k = torch.arange(layout.n_prefix)
        self.prefix_position = layout.d_sim + layout.context + k
        # (s, k) -> row k S + s of the auxiliary's output, or of its gradient
        self.rows = torch.stack([k * layout.stack + s for s in range(layout.stack)])

    def shard(self, where: slice, c: int) -> Tensor:
        e = self.layout.d_shard
        return torch.arange(where.start + c * e, where.start + (c + 1) * e)

    def only(self, first: int, width: int) -> Tensor:
        """`first`, then zeros: a query or key of one number among wider ones."""
        out = torch.full((width,), self.zero)
        out[0] = first
        return out


def forward_heads(layout: Layout) -> Heads:
    """S C heads for W x, S more for b."""
    at, e, stack = _Coordinates(layout), layout.d_shard, layout.stack
    pairs = [(s, c) for s in range(stack) for c in range(layout.shards)]
    query = [at.shard(layout.signal, c) for _, c in pairs] + [at.only(at.one, e)] * stack
    key = [at.shard(layout.row(s), c) for s, c in pairs]
    key += [at.only(int(at.prefix_position[0]), e)] * stack
    value = [at.prefix_position] * len(pairs) + [layout.bias.start + at.rows[s] for s in range(stack)]
    write = [at.rows[s] for s, _ in pairs] + [at.rows[s] for s in range(stack)]
    return _heads("forward", query, key, value, write, ORDINARY, PREFIX)


def backward_heads(layout: Layout) -> Heads:
    """S C heads for W^T dy."""
    at = _Coordinates(layout)
    pairs = [(s, c) for s in range(layout.stack) for c in range(layout.shards)]
    return _heads(
        "backward",
        query=[at.rows[s] for s, _ in pairs],
        key=[at.prefix_position for _ in pairs],
        value=[at.shard(layout.row(s), c) for s, c in pairs],
        write=[at.shard(layout.signal, c) for _, c in pairs],
        asks=ORDINARY,
        answers=PREFIX,
    )


def descent_heads(layout: Layout, lr: float) -> Heads:
    """S C heads for the change of W, C more for that of b; the tokens hold dy as signal and x as memory."""
    at, memory = _Coordinates(layout), layout.memory(0, 1)
    pairs = [(s, c) for s in range(layout.stack) for c in range(layout.shards)]
    shards = range(layout.shards)
    one = at.only(at.one, layout.n_prefix)
    return _heads(
        "descent",
        query=[at.prefix_position for _ in pairs] + [one for _ in shards],
        key=[at.rows[s] for s, _ in pairs] + [one for _ in shards],
        value=[at.shard(memory, c) for _, c in pairs] + [at.shard(layout.signal, c) for c in shards],
        write=[at.shard(layout.row(s), c) for s, c in pairs] + [at.shard(layout.bias, c) for c in shards],
        asks=PREFIX,
        answers=ORDINARY,
        value_scale=-lr,
    )


def _heads(
    name: str,
    query: list[Tensor],
    key: list[Tensor],
    value: list[Tensor],
    write: list[Tensor],
    asks: str,
    answers: str,
    value_scale: float = 1.0,
) -> Heads:
    return Heads(
        name=name,
        query=Reading(torch.stack(query)),
        key=Reading(torch.stack(key)),
        value=Reading(torch.stack(value), value_scale),
        write=torch.stack(write),
        asks=asks,
        answers=answers,
    )


def run_heads(
    layout: Layout,
    heads: Heads,
    state: Tensor,
    *,
    allowed: Tensor | None = None,
    restrict: bool = True,
    attention: Attention = linear_attention,
) -> tuple[Tensor, Trace]:
    """Let the heads act on a sequence.

    Args:
        state: [B, K + T, D_sim], the prefix first.
        allowed: [B, K + T] bool, which tokens may answer; None: all.
        restrict: only the tokens that must ask and answer do; False: every token asks every token.
        attention: linear, or one that emulates it (softmax.py).

    Returns:
        (what the heads add to the state [B, K + T, D_sim], Trace).
    """
    count, k = state.shape[1], layout.n_prefix
    position = layout.positions(count - k, like=state)
    constants = state.new_tensor([0.0, 1.0]).expand(count, 2)
    beside = torch.cat([position, constants], -1).expand(len(state), -1, -1)
    whole = {PREFIX: slice(0, k), ORDINARY: slice(k, count)}
    asks, answers = (whole[side] if restrict else slice(0, count) for side in (heads.asks, heads.answers))
    asking, answering = (torch.cat([state[:, side], beside[:, side]], -1) for side in (asks, answers))
    query, key, value = heads.query(asking), heads.key(answering), heads.value(answering)
    keys = None if allowed is None else allowed[:, None, None, answers]
    out, scores = attention(query, key, value, keys)
    added = torch.zeros_like(state)
    write = heads.write.to(state.device).flatten()
    added[:, asks].index_add_(-1, write, out.transpose(1, 2).flatten(2))
    who = (heads.asks, heads.answers) if restrict else ("all", "all")
    return added, Trace(heads.name, query, key, value, scores, added[:, asks], *who)


def _run(
    layout: Layout, heads: Heads, prefix: Tensor, tokens: Tensor, update_prefix: bool, **options: object
) -> tuple[Tensor, Tensor, Trace]:
    """(prefix, tokens, Trace) after the heads and the gates: a way forward or back replaces the tokens and keeps the prefix; descent
    adds to the prefix and drops what the tokens would get."""
    prefix = prefix.expand(len(tokens), -1, -1)
    state = torch.cat([prefix, tokens], 1)
    added, trace = run_heads(layout, heads, state, **options)  # type: ignore[arg-type]
    is_prefix = layout.is_prefix(like=state)
    position = layout.positions(tokens.shape[1], like=state)
    take = is_prefix if update_prefix else 1 - is_prefix
    state = gate(state, added, position, keep=is_prefix, take=take)
    return state[:, : layout.n_prefix], state[:, layout.n_prefix :], trace


def run_forward(
    layout: Layout, x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: object
) -> tuple[Tensor, list[Trace]]:
    """y = W x + b by heads; W of any size, in pieces of at most D x D. Options as `run_heads`.

    Returns:
        (y [B, T, D_out], the traces of the pieces).
    """
    d_out, d_in = weight.shape[-2:]
    y, traces = x.new_zeros(*x.shape[:2], d_out), []
    for rows, columns in _pieces(layout, d_out, d_in):
        # The first piece of a row carries the bias: once, however many pieces there are.
        b = bias[..., rows] if bias is not None and columns.start == 0 else None
        prefix = layout.stack_weight(weight[..., rows, columns], b)
        tokens = layout.tokens(x[..., columns])
        _, tokens, trace = _run(layout, forward_heads(layout), prefix, tokens, False, **options)
        y[..., rows] += tokens[..., : rows.stop - rows.start]
        traces.append(trace)
    return y, traces


def run_backward(
    layout: Layout, grad: Tensor, weight: Tensor, **options: object
) -> tuple[Tensor, list[Trace]]:
    """dx = W^T dy by heads; returns (dx [B, T, D_in], traces)."""
    d_out, d_in = weight.shape[-2:]
    dx, traces = grad.new_zeros(*grad.shape[:2], d_in), []
    for rows, columns in _pieces(layout, d_out, d_in):
        prefix, tokens = layout.stack_weight(weight[..., rows, columns]), layout.tokens(grad[..., rows])
        _, tokens, trace = _run(layout, backward_heads(layout), prefix, tokens, False, **options)
        dx[..., columns] += tokens[..., : columns.stop - columns.start]
        traces.append(trace)
    return dx, traces


def run_descent(
    layout: Layout, x: Tensor, grad: Tensor, mask: Tensor | None, lr: float, **options: object
) -> tuple[Tensor, Tensor, list[Trace]]:
    """The changes of W and b by heads, added to a prefix of zeros; returns (dW [B, D_out, D_in], db [B, D_out], traces)."""
    batch, count, d_in = x.shape
    d_out = grad.shape[-1]
    if mask is None:
        mask = torch.ones(batch, count, dtype=torch.bool, device=x.device)
    allowed = torch.cat([mask.new_zeros(batch, layout.n_prefix), mask], 1)
    change, change_bias = x.new_zeros(batch, d_out, d_in), x.new_zeros(batch, d_out)
    traces = []
    for rows, columns in _pieces(layout, d_out, d_in):
        prefix = x.new_zeros(batch, layout.n_prefix, layout.d_sim)
        tokens = layout.tokens(grad[..., rows], x[..., columns])
        prefix, _, trace = _run(
            layout, descent_heads(layout, lr), prefix, tokens, True, allowed=allowed, **options
        )
        size = rows.stop - rows.start, columns.stop - columns.start
        change[:, rows, columns], b = layout.unstack_weight(prefix, *size)
        if columns.start == 0:
            change_bias[:, rows] = b
        traces.append(trace)
    return change, change_bias, traces


def _pieces(layout: Layout, d_out: int, d_in: int) -> list[tuple[slice, slice]]:
    """W cut into blocks of at most D x D: a prefix of its own for each."""
    d = layout.d_model
    return [
        (slice(i, min(i + d, d_out)), slice(j, min(j + d, d_in)))
        for i in range(0, d_out, d)
        for j in range(0, d_in, d)
    ]
