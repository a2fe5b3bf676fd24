"""The numbers of the chapter's `standard` scale, in two forms: the full one for a GPU, a reduced one that a CPU finishes.

Inner rates are grids to search, not choices: each model's own rate is chosen on WikiText-2's validation text, or, for
classification, on training examples that are no demonstrations.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Form:
    """Every number of a run; the fields are described at the settings of the same name (`standard_<field>`)."""

    vocabulary: int
    context: int
    layers: int
    width: int
    heads: int
    train_steps: int
    batch: int
    lr: float
    warmup: int
    seeds: tuple[int, ...]
    fractions: tuple[float, ...]
    rates: tuple[float, ...]
    choose_documents: int
    documents: int
    eval_batch: int
    layer_steps: tuple[str, ...]
    tasks: tuple[str, ...]
    shots: int
    text_tokens: int
    held_out: int
    queries: int
    context_rates: tuple[float, ...]
    label_rates: tuple[float, ...]


FULL = Form(
    vocabulary=8192,
    context=512,
    layers=6,
    width=384,
    heads=6,
    train_steps=1000,
    batch=64,
    lr=1e-3,
    warmup=100,
    seeds=(0, 1, 2),
    fractions=(0.3, 0.5, 0.7, 0.9),
    rates=(1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3),
    choose_documents=64,
    documents=500,
    eval_batch=32,
    layer_steps=("6x1", "3x2", "2x3"),
    tasks=("mr", "subj", "cr", "trec"),
    shots=12,
    text_tokens=25,
    held_out=96,
    queries=200,
    context_rates=(1e-4, 3e-4, 1e-3, 3e-3),
    label_rates=(1e-3, 3e-3, 1e-2, 3e-2),
)

REDUCED = Form(
    vocabulary=2048,
    context=256,
    layers=4,
    width=128,
    heads=4,
    train_steps=800,
    batch=4,
    lr=3e-3,
    warmup=40,
    seeds=(0, 1, 2),
    fractions=(0.3, 0.5, 0.7, 0.9),
    rates=(5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3),
    choose_documents=16,
    documents=80,
    eval_batch=8,
    layer_steps=(),
    tasks=("mr", "subj", "cr", "trec"),
    shots=6,
    text_tokens=20,
    held_out=18,
    queries=48,
    context_rates=(1e-3, 4e-3),
    label_rates=(4e-3, 1.6e-2),
)
