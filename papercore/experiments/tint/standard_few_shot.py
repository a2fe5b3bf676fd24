"""Few-shot classification of the `standard` scale: NLTK's sets, label words of one token, and every choice made on held-out examples.

For one set and one seed: class-balanced demonstrations from the training part, other training examples that choose, and
test queries that are the same for all seeds. The paper chose each rate on the very examples that it reports.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from papercore.experiments.tint.adapting import Way
from papercore.experiments.tint.config import StandardConfig
from papercore.experiments.tint.few_shot import balanced
from papercore.experiments.tint.few_shot_cells import classified
from papercore.experiments.tint.prompting import Prompter, Template
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
    """Answers and held-out accuracies of one set and seed, as `classified` returns them, and the number of classes."""
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
    ways = {
        loss: [Way("tint", rate, fd_eps=config.standard_fd_eps) for rate in rates]
        for loss, rates in (("context", form.context_rates), ("label", form.label_rates))
    }
    found = classified(
        model, prompter, shown, held, test, ways, batch=form.eval_batch, device=config.torch_device()
    )
    return {**found, "classes": len(corpus.classes)}
