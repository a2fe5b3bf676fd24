"""Few-shot classification of the `standard` scale: NLTK's sets, label words of one token, and every choice made on held-out examples.

For one set and one seed: class-balanced demonstrations from the training part, other training examples that choose, and
test queries that are the same for all seeds. The paper chose each rate on the very examples that it reports.

Glossary
    cell     format x loss: (single, multi) x (context, label); each is shown plain and calibrated
    trial    a cell at one rate under one calibration, with its held-out accuracy and loss
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from papercore.experiments.tint.adapting import Way
from papercore.experiments.tint.config import StandardConfig
from papercore.experiments.tint.few_shot import CALIBRATIONS, balanced, better, judged, scored
from papercore.experiments.tint.prompting import FORMATS, LOSSES, Prompter, Template
from papercore.experiments.tint.standard_forms import Form
from papercore.lab import corpora

# The paper's templates, with words that are one token of a small vocabulary trained on other text.
TEMPLATES = {
    "mr": Template("Review: ", "\nSentiment:", (" bad", " good")),
    "cr": Template("Review: ", "\nSentiment:", (" bad", " good")),
    "subj": Template("", "\nThis is a", (" story", " view")),
    "trec": Template("Question: ", "\nAnswer:", (" short", " reason", " thing", " person", " place", " number")),
}  # fmt: skip
QUERY_SEED = 10


def few_shot_part(
    config: StandardConfig, form: Form, model: nn.Module, tokenizer: Any, task: str, seed: int
) -> dict[str, Any]:
    """Right answers and held-out accuracies of one set and seed.

    tint [formats, losses, calibrations, queries], vanilla [formats, calibrations, queries], zero_tint and zero_vanilla
    [calibrations, queries]; `_held` of each without the last axis; `_rate` of those that have one.
    """
    corpus = corpora.read(task).without_leaks()
    labels = corpus.train_labels
    rng = np.random.default_rng([seed, form.shots])
    shown_rows = balanced(labels, form.shots, rng)
    held_rows = balanced(labels, form.held_out, rng, leave_out=shown_rows.tolist())
    # Of no seed: every seed is tested on the same queries.
    query_rows = balanced(corpus.test_labels, form.queries, np.random.default_rng(QUERY_SEED))
    shown = [(corpus.train_texts[i], int(labels[i])) for i in shown_rows]
    held = [corpus.train_texts[i] for i in held_rows], labels[held_rows]
    test = [corpus.test_texts[i] for i in query_rows], corpus.test_labels[query_rows]
    prompter = Prompter(
        TEMPLATES[task], lambda text: tokenizer.encode(text).ids, form.text_tokens, form.context
    )
    more: dict[str, Any] = {"batch": form.eval_batch, "device": config.torch_device()}

    def cell(demonstrations: list[tuple[str, int]], layout: str, loss: str) -> dict[str, Any]:
        """A cell at its best rate for each calibration, with vanilla's answers beside it."""
        best: dict[str, dict[str, Any] | None] = dict.fromkeys(CALIBRATIONS)
        vanilla: dict[str, tuple[Any, float]] = {}
        rates = form.context_rates if loss == "context" else form.label_rates
        for rate in rates:
            way = Way("tint", rate, fd_eps=config.standard_fd_eps)
            found = scored(model, prompter, demonstrations, held[0], layout, loss, way, **more)
            for calibration in CALIBRATIONS:
                right, loss_ = judged(found.of("after", calibration), held[1])
                trial = {"rate": rate, "held": float(right.mean()), "held_loss": loss_}
                if better(trial, best[calibration]):
                    best[calibration] = trial
                vanilla[calibration] = judged(found.of("before", calibration), held[1])
        out: dict[str, Any] = {}
        tested: dict[float, Any] = {}
        for calibration in CALIBRATIONS:
            kept = best[calibration]
            assert kept is not None
            rate = kept["rate"]
            if rate not in tested:
                way = Way("tint", rate, fd_eps=config.standard_fd_eps)
                tested[rate] = scored(model, prompter, demonstrations, test[0], layout, loss, way, **more)
            found = tested[rate]
            out[calibration] = {
                **kept,
                "right": judged(found.of("after", calibration), test[1])[0],
                "vanilla_right": judged(found.of("before", calibration), test[1])[0],
                "vanilla_held": float(vanilla[calibration][0].mean()),
            }
        return out

    few = {layout: {loss: cell(shown, layout, loss) for loss in LOSSES} for layout in FORMATS}
    zero = cell([], "single", "context")
    result: dict[str, Any] = {"classes": len(corpus.classes)}
    for name, key in (("tint", "right"), ("tint_held", "held"), ("tint_rate", "rate")):
        result[name] = np.array(
            [[[few[f][loss][c][key] for c in CALIBRATIONS] for loss in LOSSES] for f in FORMATS]
        )
    for name, key in (("vanilla", "vanilla_right"), ("vanilla_held", "vanilla_held")):
        result[name] = np.array([[few[f]["context"][c][key] for c in CALIBRATIONS] for f in FORMATS])
    for name, key in (
        ("zero_tint", "right"), ("zero_tint_held", "held"), ("zero_tint_rate", "rate"),
        ("zero_vanilla", "vanilla_right"), ("zero_vanilla_held", "vanilla_held"),
    ):  # fmt: skip
        result[name] = np.array([zero[c][key] for c in CALIBRATIONS])
    return result
