"""How large a simulator is and what it costs: parameters by the paper's formula, products by ours (Theorem 1.1, appendix).

Parameters, biases left out as in the paper:

    Q_split = D_sim^2 / H_sim + H_sim D_sim             a projection split over heads, and one over coordinates
    Q       = 4 Q_split + 3 T_sim D_sim / H_sim         an attention module: query, key, value, output, and three of positions
    a block's forward     7 Q + Q_split                 norm, query-key-value (2 Q), output; norm, two linear layers, activation
    a block's backward    7 Q + 6 D_sim H_sim           finite differences: 2 D_sim H_sim each for two norms and an activation
    a block's descent     7 Q

The MLP's chunks share their weights, and so do the steps and, where share_forward, the two forward passes. Prefix weights are inputs and
counted apart.

FLOP: two for each multiply-add of a matrix product, as torch.utils.flop_counter counts them; elementwise work is left out.

Glossary (code name, symbol in arXiv 2307.01189):
    n_layer, d_model, n_head, n_ctx   L, D, H, T of the auxiliary
    stack, heads                      S; H_sim = min(S^2, H)
    d_sim, n_prefix, t_sim            D_sim = S D; K = D / S; T_sim = T + K
"""

from __future__ import annotations

from dataclasses import dataclass, field

from papercore.tint.config import checked_layers, simulator_shape
from papercore.tint.finite_difference import chosen

__all__ = ["Flops", "TinTCount", "count_parameters", "flops"]

METHODS = ("fused", "dynamic", "literal", "unsplit")


@dataclass(frozen=True)
class TinTCount:
    """Parameters of a simulator; whole numbers.

    Attributes:
        Q, Q_split: of one attention module, of one split projection.
        forward, backward, descent: of all layers, one pass each.
        total: their sum, with the forward blocks counted for each pass where they are not shared.
        prefix: numbers in the prefix tokens, which are inputs and not in `total`.
        parts: {"forward": {module: parameters of one block}, "backward": ..., "descent": ...}.
        d_sim, heads, n_prefix, t_sim: the simulator's dimensions.
    """

    Q: int
    Q_split: int
    forward: int
    backward: int
    descent: int
    total: int
    prefix: int
    d_sim: int
    heads: int
    n_prefix: int
    t_sim: int
    parts: dict[str, dict[str, int]] = field(repr=False)


def _checked_sizes(**sizes: object) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} = {value!r}: expected a whole number of at least 1.")


def count_parameters(
    *,
    n_layer: int,
    d_model: int,
    n_head: int,
    n_ctx: int,
    stack: int = 4,
    heads: int | None = None,
    share_forward: bool = True,
    n_steps: int = 1,
) -> TinTCount:
    """Parameters of the simulator of an auxiliary model.

    Args:
        n_layer, d_model, n_head, n_ctx: L, D, H and T of the auxiliary.
        stack, heads: S and H_sim; heads=None: min(stack^2, n_head).
        share_forward: the forward pass before the steps and the one after each of them use the same blocks, as in the paper's count.
            The official code builds them anew unless told otherwise.
        n_steps: forward passes after a step, where they are not shared.

    Raises:
        ValueError: a size below one, or one that does not divide the next.

    >>> count = count_parameters(n_layer=12, d_model=768, n_head=12, n_ctx=2048)  # OPT-125M
    >>> count.Q, count.total
    (5013504, 1275936768)
    >>> count_parameters(n_layer=12, d_model=768, n_head=12, n_ctx=2048, share_forward=False).total
    1706950656
    """
    _checked_sizes(n_layer=n_layer, d_model=d_model, n_head=n_head, n_ctx=n_ctx, n_steps=n_steps)
    shape = simulator_shape(d_model, n_head, stack, heads)
    d_sim, h_sim = shape.d_sim, shape.heads
    t_sim = n_ctx + shape.n_prefix
    split = d_sim**2 // h_sim + h_sim * d_sim
    module = 4 * split + 3 * t_sim * d_sim // h_sim
    difference = 2 * d_sim * h_sim
    parts = {
        "forward": {
            "attention norm": module,
            "self-attention": 2 * module,
            "attention output": module,
            "MLP norm": module,
            "MLP linear layers": 2 * module,
            "activation": split,
        },
        "backward": {
            "attention norm": module + difference,
            "self-attention": 2 * module,
            "attention output": module,
            "MLP norm": module + difference,
            "MLP linear layers": 2 * module,
            "activation": difference,
        },
        "descent": {
            "attention norm": module,
            "self-attention": 2 * module,
            "attention output": module,
            "MLP norm": module,
            "MLP linear layers": 2 * module,
            "activation": 0,
        },
    }
    forward, backward, descent = (n_layer * sum(parts[role].values()) for role in parts)
    passes = 1 if share_forward else 1 + n_steps
    # Four matrices of attention and eight chunks of the MLP, each D rows of D numbers.
    prefix = n_layer * 12 * shape.n_prefix * d_sim
    return TinTCount(
        Q=module,
        Q_split=split,
        forward=forward,
        backward=backward,
        descent=descent,
        total=passes * forward + backward + descent,
        prefix=prefix,
        d_sim=d_sim,
        heads=h_sim,
        n_prefix=shape.n_prefix,
        t_sim=t_sim,
        parts=parts,
    )


@dataclass(frozen=True)
class Flops:
    """FLOP of one document by phase.

    forward: the first pass with its logits (dynamic evaluation: the passes that are differentiated, on the training tokens alone); loss:
    logits and gradient at the output; backward, descent: of all steps; forward_again: passes after the steps, with the last
    one's logits. report: what dynamic_eval spends on logits before the steps, which only its report needs; not in `total`.
    """

    forward: int
    loss: int
    backward: int
    descent: int
    forward_again: int
    report: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.loss + self.backward + self.descent + self.forward_again

    def times(self, other: Flops) -> float:
        """How many times the total of another."""
        return self.total / other.total


def flops(
    method: str = "fused",
    *,
    n_layer: int,
    d_model: int,
    n_head: int,
    length: int,
    n_train: int,
    vocab_size: int,
    n_inner: int | None = None,
    n_kv_head: int | None = None,
    is_gated: bool = False,
    n_layers: int | None = None,
    n_steps: int = 1,
    full_attention: bool = False,
    trains_norms: bool = True,
    stack: int = 4,
    heads: int | None = None,
) -> Flops:
    """FLOP of the matrix products for one document.

    Args:
        method: "fused": TinTModel with its default backend. "dynamic": dynamic_eval, whose lower layers run anew in every pass.
            "literal": the construction, whose every linear product becomes an attention module with split projections (order of
            magnitude); "unsplit": the same with whole projections D_sim x D_sim.
        length: tokens of the document.
        n_train: training targets, the tokens 1 .. n_train: the gradient reaches n_train positions.
        n_inner, n_kv_head, is_gated: shape of the MLP and of attention; None: 4 d_model, n_head.
        n_layers, n_steps: as in TinTConfig.
        full_attention: gradients through the scores, queries and keys trained.
        trains_norms: whether the norms have something to train; if not, the gradient ends at the lowest trained layer's values.
        stack, heads: of the construction; they change "literal" and "unsplit" alone.

    Raises:
        ValueError: a size that does not fit, an unknown method.

    >>> sizes = dict(n_layer=12, d_model=768, n_head=12, length=1024, n_train=511, vocab_size=50257)
    >>> fused, dynamic, literal = (flops(method, **sizes) for method in ("fused", "dynamic", "literal"))
    >>> round(fused.times(dynamic), 2)  # TinT's first pass is over the whole document, autograd's over the training half
    1.32
    >>> round(fused.total / (dynamic.total + dynamic.report), 2)  # both with the logits before the steps
    0.89
    >>> round(literal.times(fused), 1)
    6.8
    """
    chosen("method", method, METHODS)
    _checked_sizes(
        n_layer=n_layer,
        d_model=d_model,
        n_head=n_head,
        length=length,
        n_train=n_train,
        vocab_size=vocab_size,
        n_steps=n_steps,
    )
    if n_train >= length:
        raise ValueError(
            f"n_train = {n_train}: a document of {length} tokens has {length - 1} targets, some to evaluate."
        )
    trained = checked_layers(n_layers, n_layer)
    inner = 4 * d_model if n_inner is None else n_inner
    kv_width = d_model // n_head * (n_head if n_kv_head is None else n_kv_head)
    # Numbers in a block's matrices: read forward, and trained.
    queries_keys = d_model * d_model + d_model * kv_width
    rest = d_model * kv_width + d_model * d_model + (3 if is_gated else 2) * d_model * inner
    reached = rest + queries_keys if full_attention else rest

    def block_forward(tokens: int) -> int:
        return 2 * tokens * (queries_keys + rest) + 4 * tokens**2 * d_model

    head = 2 * d_model * vocab_size
    loss = n_steps * 2 * n_train * head
    backward = 2 * n_train * reached + 2 * n_train**2 * d_model * (4 if full_attention else 1)
    backward, descent = (n_steps * trained * each for each in (backward, 2 * n_train * reached))
    if not trains_norms:
        end = d_model * kv_width + (queries_keys if full_attention else 0)
        backward -= n_steps * 2 * n_train * end
    forward = n_layer * block_forward(length) + length * head
    again = (n_steps - 1) * trained * block_forward(n_train) + trained * block_forward(length) + length * head
    if method == "fused":
        return Flops(forward, loss, backward, descent, again)
    if method == "dynamic":
        # Every step runs all layers on the training tokens; the last pass runs all layers on all.
        training = n_steps * n_layer * block_forward(n_train)
        return Flops(
            training, loss, backward, descent, n_layer * block_forward(length) + length * head, forward
        )
    return _construction(
        Flops(forward, loss, backward, descent, again),
        method,
        sizes=(n_layer, d_model, n_head, length, n_train, trained, n_steps),
        stack=stack,
        heads=heads,
        mlp_chunks=-(-inner // d_model) * (3 if is_gated else 2),
    )


def _construction(
    fused: Flops,
    method: str,
    *,
    sizes: tuple[int, int, int, int, int, int, int],
    stack: int,
    heads: int | None,
    mlp_chunks: int,
) -> Flops:
    """Add what attention modules cost beyond the products that they carry out."""
    n_layer, d_model, n_head, length, n_train, trained, n_steps = sizes
    shape = simulator_shape(d_model, n_head, stack, heads)
    d_sim, h_sim = shape.d_sim, shape.heads

    def module(tokens: int) -> int:
        t_sim = tokens + shape.n_prefix
        split = d_sim**2 // h_sim + h_sim * d_sim if method == "literal" else d_sim**2
        # Four projections; three of positions; and the one-hot products beside the useful ones.
        return 8 * t_sim * split + 6 * t_sim * t_sim * d_sim // h_sim + 2 * tokens * d_model**2

    linears = 4 + mlp_chunks  # modules of D x D in a block
    back = n_steps * trained * (2 + mlp_chunks)  # queries and keys have no gradient
    return Flops(
        forward=fused.forward + n_layer * linears * module(length),
        loss=fused.loss,
        backward=fused.backward + back * module(n_train),
        descent=fused.descent + back * module(n_train),
        forward_again=fused.forward_again
        + trained * linears * ((n_steps - 1) * module(n_train) + module(length)),
    )
