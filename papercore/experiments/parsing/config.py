"""Settings of the parsing chapter: one class a scale, each with its own fields."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from papercore.experiments.parsing.paper_settings import PaperSettings
from papercore.experiments.parsing.standard_settings import StandardSettings
from papercore.lab import config as lab
from papercore.lab.config import option


@dataclasses.dataclass(frozen=True)
class Config(lab.Config):
    """The chapter's settings; `standard()` and `paper()` return the classes of those scales, with other fields."""

    slug: ClassVar[str] = "parsing"


@dataclasses.dataclass(frozen=True)
class QuickConfig(Config, scale="quick"):
    """An English-like grammar and a masked language model of 375,552 weights, trained on the spot."""

    sentences: int = option(100_000, "training sentences, sampled from the grammar", minimum=1)
    min_length: int = option(4, "words of the shortest sentence", minimum=2)
    max_length: int = option(20, "words of the longest sentence", minimum=4)
    width: int = option(96, "numbers of a hidden state", minimum=4)
    layers: int = option(3, "transformer layers", minimum=1)
    heads: int = option(4, "attention heads of a layer", minimum=1)
    steps: int = option(1700, "steps of masked language modelling", minimum=8)
    batch: int = option(64, "sentences a step", minimum=1)
    short_share: float = option(
        0.25, "share of the steps, at the beginning, on short sentences alone", minimum=0.0
    )
    short_length: int = option(9, "words of the longest of these", minimum=4)
    short_batch: int = option(96, "of these, sentences a step", minimum=1)
    short_mask_rate: float = option(0.5, "share of their words that are masked", minimum=0.0)
    lr: float = option(3e-3, "peak learning rate of AdamW", minimum=0.0)
    warmup: int = option(100, "steps of warm-up", minimum=0)
    mask_rate: float = option(0.2, "share of words that are masked in training after that", minimum=0.0)
    tests: int = option(2000, "test sentences with one masked word", minimum=10)
    probe_seeds: int = option(3, "seeds of the probes, each with sentences of its own", minimum=2)
    probe_train: int = option(1000, "sentences that a probe is fitted on", minimum=4)
    probe_choose: int = option(300, "sentences that choose the layer", minimum=4)
    probe_test: int = option(400, "sentences that a probe is tested on", minimum=4)
    probe_spans: int = option(
        10_000, "spans that a marginal probe is fitted or tested on, at most", minimum=10
    )
    probe_steps: int = option(300, "steps of a two-layer probe", minimum=1)
    truncation_tests: int = option(200, "sentences that truncated grammars are tested on", minimum=4)
    kept_in: tuple[int, ...] = option((26, 23, 20, 17, 14, 10), "in-terminals kept", minimum=1)
    kept_pre: tuple[int, ...] = option((42, 36, 30, 24), "pre-terminals kept", minimum=1)
    ranks: tuple[int, ...] = option((20, 15, 10), "heads that 20 in-terminals are merged into", minimum=1)
    longest_equal: int = option(12, "longest sentence of the check of the construction", minimum=2)


@dataclasses.dataclass(frozen=True)
class StandardConfig(StandardSettings, Config, scale="standard"):
    """Larger models on two grammars, and truncated inside-outside on the user's treebank."""


@dataclasses.dataclass(frozen=True)
class PaperConfig(PaperSettings, Config, scale="paper"):
    """The paper's model sizes, sentences of a treebank's grammar, and probes on the treebank."""
