"""Label scores before and after an update on the context, and the choice of rate, format and loss on held-out examples.

Glossary
    scores       log p of each label's first token [queries, classes]
    plain        the largest score; calibrated: the largest score minus that of the content-free query in the same context
    shared       the update of a loss on label words: it depends on the demonstrations alone, so that one serves every query
    before       the auxiliary model itself (in a `multi` context: in-context learning); after: with the update
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from papercore.experiments.tint.adapting import Way
from papercore.experiments.tint.prompting import Batch, Prompter, contexts

CALIBRATIONS = ("plain", "calibrated")
Scores = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores [queries, classes] before and after, and those of the content-free query [classes]."""

    before: Scores
    after: Scores
    free_before: Scores
    free_after: Scores

    def of(self, when: str, calibration: str) -> Scores:
        """Scores "before" or "after", plain or calibrated."""
        scores, free = (self.before, self.free_before) if when == "before" else (self.after, self.free_after)
        return scores - free if calibration == "calibrated" else scores


def scored(
    model: nn.Module, prompter: Prompter, shown: Sequence[tuple[str, int]], queries: Sequence[str], layout: str, loss: str, way: Way,
    *, batch: int, device: torch.device,
) -> Scored:  # fmt: skip
    """Scores of every query behind the same demonstrations; the model is not changed."""
    every: list[str | None] = [None, *queries]
    if loss == "label" and way.method == "tint":
        before, after = _shared(model, prompter, shown, every, layout, way, batch=batch, device=device)
    else:
        found = []
        for start in range(0, len(every), batch):
            some = contexts(prompter, shown, every[start : start + batch], layout, loss).to(device)
            output = way.run(
                model, some.input_ids, some.train_mask, labels=some.labels, gradient_mask=some.gradient_mask,
                attention_mask=some.attention_mask, position_ids=some.position_ids,
            )  # fmt: skip
            found.append(
                [_picked(logits, some, prompter) for logits in (output.initial_logits, output.logits)]
            )
        before, after = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Scored(before[1:], after[1:], before[0], after[0])


def _picked(logits: Tensor, batch: Batch, prompter: Prompter) -> Scores:
    rows = torch.arange(len(logits), device=logits.device)
    log_p = logits[rows, batch.last].double().log_softmax(-1)
    return log_p[:, prompter.label_ids].cpu().numpy()


@torch.no_grad()
def _shared(
    model: nn.Module, prompter: Prompter, shown: Sequence[tuple[str, int]], queries: Sequence[str | None], layout: str, way: Way,
    *, batch: int, device: torch.device,
) -> tuple[Scores, Scores]:  # fmt: skip
    """One update on the demonstrations, then plain forward passes with the updated weights."""
    one = contexts(prompter, shown, [None], layout, "label").to(device)
    simulator = way.simulator(model)
    output = simulator(
        one.input_ids, one.train_mask, one.labels, gradient_mask=one.gradient_mask, attention_mask=one.attention_mask,
        position_ids=one.position_ids,
    )  # fmt: skip
    state = simulator.updated_state_dict(output)
    # Only what changed: a tied head would be given twice.
    state = {name: state[name] for name in output.updates}
    # Demonstrations that a query does not read need not be there.
    seen = shown if layout == "multi" else ()
    before, after = [], []
    for start in range(0, len(queries), batch):
        some = contexts(prompter, seen, queries[start : start + batch], layout, "context").to(device)
        # Padding stands on the right, where no earlier token reads it.
        before.append(_picked(model(some.input_ids).logits, some, prompter))
        changed = torch.func.functional_call(model, state, (some.input_ids,))
        after.append(_picked(changed.logits, some, prompter))
    return np.concatenate(before), np.concatenate(after)


def judged(scores: Scores, labels: NDArray[np.int64]) -> tuple[NDArray[np.bool_], float]:
    """Which answers are right, and the mean loss over the labels: what choices are made by, accuracy first."""
    normal = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return scores.argmax(1) == labels, float(-normal[np.arange(len(labels)), labels].mean())


def better(first: dict[str, Any], second: dict[str, Any] | None) -> bool:
    """Whether a trial is ahead of another on the held-out examples: accuracy, then loss."""
    if second is None:
        return True
    return (first["held"], -first["held_loss"]) > (second["held"], -second["held_loss"])


def balanced(
    labels: NDArray[np.int64], n: int, rng: np.random.Generator, leave_out: Sequence[int] = ()
) -> NDArray[np.int64]:
    """n row numbers with as equal a share of every class as n allows, in random order.

    Raises:
        ValueError: a class with too few rows.
    """
    classes = np.unique(labels)
    taken = []
    for number, label in enumerate(classes):
        wanted = n // len(classes) + (number < n % len(classes))
        rows = np.setdiff1d(np.flatnonzero(labels == label), np.asarray(leave_out, dtype=np.int64))
        if len(rows) < wanted:
            raise ValueError(
                f"class {label} has {len(rows)} examples left, {wanted} are needed: ask for fewer."
            )
        taken.append(rng.permutation(rows)[:wanted])
    return rng.permutation(np.concatenate(taken))
