"""Learning which entries carry the skill: the paper's relaxation, rule by rule.

Section 2 of the paper. The mask is relaxed around a base mask and moved by plain gradient descent on the loss:

    gamma(S) = gamma_base + (1 - 2 gamma_base) sigmoid(S - b),      S_0 ~ Uniform[0, 1)
    S       <- S - lr (1 - 2 gamma_base) (G delta) sigmoid'(S - b)
    mask     = round(gamma(S)), that is: gamma_base flipped where S > b; of all steps the one with the best score

Glossary
    S        logits, float32, one per candidate entry
    b        "sigmoid bias", 10: at the start gamma differs from gamma_base by less than 1.24e-4
    G        d loss / d theta at theta_pre + gamma(S) delta, mean over at most 128 micro-batches: one update
    c        -G delta, the first-order fall of the loss; an entry comes on when c > e^(b - S_0) / (lr T) (`law.py`)
    cap      floor(sparsity N): learning stops when the rounded mask would hold more, and keeps those that came first

Different on purpose: the weights are mixed in the live module (the official loop copies both models to the device
twice a step), the rounded mask is scored only when it has changed, and lr="auto" replaces the paper's 1e7, which
fits no other model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from papercore.grafting.arguments import (
    check_batches,
    check_choice,
    check_generator,
    check_integer,
    check_module,
    check_number,
    share_of,
)
from papercore.grafting.errors import GraftMismatchError
from papercore.grafting.exact_k import learn_exact_k
from papercore.grafting.live import LiveWeights, LossFn, Metric, live
from papercore.grafting.mask import Mask
from papercore.grafting.paper_rule import RelaxedMask, auto_rate, learn_by_descent
from papercore.grafting.scoring import Scorer, Step
from papercore.grafting.selection import paper_base, screen
from papercore.grafting.task_vector import TaskVector

RULES = ("paper", "topk")


@dataclass
class LearnedMask:
    """What `learn_mask` found.

    mask: the chosen step's rounded mask. history: one `Step` (step, loss, count, flips, score, train, held_out) per
    update. train, held_out: score of the mask on `data` and on `val` (None without val), by `metric` or minus
    the loss. best_step: which update it comes from. lr: the rate used. scores: S (or the exact-k scores) by tensor name,
    -inf outside the candidates; their order means nothing among entries that are on (S saturates). seconds: wall clock.
    """

    mask: Mask
    history: list[Step]
    rule: str
    lr: float | None
    best_step: int
    train: float | None
    held_out: float | None
    seconds: float
    scores: dict[str, Tensor] = field(repr=False)


def learn_mask(
    model: nn.Module,
    delta: object,
    loss_fn: LossFn,
    data: Iterable[Any],
    *,
    rule: str = "paper",
    sparsity: float | None = None,
    steps: int = 100,
    lr: float | str | None = None,
    generator: torch.Generator | int | None = None,
    base: object = None,
    bias: float = 10.0,
    val: Iterable[Any] | None = None,
    metric: Metric | None = None,
    candidates: float | int | None = None,
    batches: int | None = 128,
    dropout: bool = False,
    callback: Callable[[Step], object] | None = None,
) -> LearnedMask:
    """Learns which entries of delta to graft; `model` holds theta_pre before and after, bit for bit.

    model: any nn.Module at theta_pre. delta: from `task_vector`. loss_fn(model, batch) -> scalar tensor. data: a list
    of batches or a DataLoader; an update reads at most `batches` of them. val: further batches for the choice of the step.
    metric(model, batch) -> number, larger is better (the paper: accuracy); None: minus the loss.

    rule: "paper", equation (2) and plain gradient descent; "topk", exactly k entries by annealed accumulated
    scores, without a learning rate. sparsity: at most this share of the entries in the mask, under every rule
    ("topk" needs it). steps: updates T. lr: a rate for S (the paper: 1e7), or "auto", which sets it so that law (3) predicts
    the share asked for after T / 2 steps; None: "auto" if a sparsity is given, else 1e7. base: a mask to start
    from, or the share of largest |delta| as the official code takes it; None: empty. bias: b. candidates: learn on this share
    (a float below 1) or number of entries only, screened by first order and movement; None: all. generator: for S_0 (None: seed 0).
    dropout: True leaves training mode on. callback(step) after each update; returning False stops.

    Returns a `LearnedMask`. Memory beyond model and delta: 12 bytes an entry (S, gradient, theta_pre), 28 bytes
    a candidate with candidates=. Cost of an update: forward and backward over the batches, and forward passes over data and
    val when the rounded mask has changed.

    Raises ValueError for bad arguments, GraftMismatchError if the model is not the base of delta, NonFiniteError
    for a loss or gradient that is not finite (with its step), TypeError for a wrong kind. Warns if nothing came on.

    >>> import torch
    >>> base = torch.nn.Linear(4, 1, bias=False); tuned = torch.nn.Linear(4, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = base.weight.zero_(), tuned.weight.copy_(torch.tensor([[2.0, 0.1, 0.1, 0.0]]))
    >>> x = torch.eye(4); y = tuned(x).detach()
    >>> from papercore.grafting import task_vector
    >>> found = learn_mask(base, task_vector(base, tuned), lambda m, batch: (m(x) - y).square().mean(), [None], sparsity=0.25)
    >>> found.mask["weight"].tolist()
    [[True, False, False, False]]
    """
    check_module("model", model)
    check_choice("rule", rule, RULES)
    check_integer("steps", steps)
    if batches is not None:
        check_integer("batches", batches)
    check_number("bias", bias)
    check_batches(data, again=True)
    if val is not None:
        check_batches(val, again=True)
    vector = TaskVector.of(delta)
    cap = None if sparsity is None else share_of(sparsity, vector.total)
    rate = _rate(rule, lr, cap)
    base_mask = _base_mask(base, vector, rule, cap)
    generator = check_generator(generator)
    started = time.perf_counter()
    index = None
    if candidates is not None:
        index = screen(
            model,
            vector,
            loss_fn,
            data,
            candidates,
            least=cap,
            keep=base_mask,
            batches=batches,
            dropout=dropout,
        )
    with live(model, vector, index=index, dropout=dropout) as weights:
        scorer = Scorer(weights, loss_fn, metric, data, val, batches)
        if rule == "paper":
            relaxed = RelaxedMask(weights, base_mask, float(bias), generator)
            if rate is None:
                assert cap is not None
                rate = auto_rate(relaxed, scorer, cap, steps)
            best, history = learn_by_descent(relaxed, scorer, cap, steps, rate, callback)
            state = relaxed.logits
        else:
            assert cap is not None
            best, history, state = learn_exact_k(weights, scorer, cap, steps, callback)
        chosen = {n: _flat(on, weights, n).to(vector[n].device) for n, on in best.on.items()}
        scores = {n: _spread(s, weights, n, vector[n]) for n, s in state.items()}
    mask = Mask(chosen, vector.shapes, base=vector.base)
    return LearnedMask(
        mask, history, rule, rate, best.step, best.train, best.held_out, time.perf_counter() - started, scores
    )


def _rate(rule: str, lr: float | str | None, cap: int | None) -> float | None:
    """The learning rate as a number, None for "auto"."""
    if rule == "topk":
        if cap is None:
            raise ValueError("rule='topk' learns exactly k entries: give sparsity=")
        if lr not in (None, "auto"):
            raise ValueError(f"rule='topk' has no learning rate, got lr={lr!r}: leave it out")
        return None
    if lr is None:
        return 1e7 if cap is None else None
    if isinstance(lr, str):
        check_choice("lr", lr, ("auto",))
        if cap is None:
            raise ValueError("lr='auto' needs a sparsity to aim at")
        return None
    return check_number("lr", lr, above=0.0)


def _base_mask(base: object, vector: TaskVector, rule: str, cap: int | None) -> Mask | None:
    """The mask to start from with the task vector's tensors, None for an empty one."""
    if base is None:
        return None
    if rule != "paper":
        raise ValueError(f"base is the start of rule='paper'; rule={rule!r} has none")
    if isinstance(base, (int, float)) and not isinstance(base, bool):
        mask = paper_base(vector, float(base))
    else:
        mask = Mask.of(base)
    if mask.shapes != vector.shapes:
        odd = sorted(set(mask.shapes.items()) ^ set(vector.shapes.items()))[:3]
        raise GraftMismatchError(f"the base mask has other tensors than the task vector: {odd}")
    if cap is not None and mask.count > cap:
        raise ValueError(
            f"the base mask has {mask.count:,} entries, more than the {cap:,} that sparsity allows"
        )
    return mask


def _flat(on: Tensor, weights: LiveWeights, name: str) -> Tensor:
    """Flat indices in the tensor of the candidates at positions `on`."""
    return on if weights.index is None else weights.index[name][on]


def _spread(state: Tensor, weights: LiveWeights, name: str, like: Tensor) -> Tensor:
    """Scores of the candidates as a tensor of the full shape, -inf elsewhere."""
    if weights.index is None:
        return state.to(like.device)
    full = torch.full((like.numel(),), -torch.inf, dtype=state.dtype, device=state.device)
    full[weights.index[name]] = state
    return full.view(like.shape).to(like.device)
