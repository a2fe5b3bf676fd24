"""Settings of the TinT chapter: one class a scale, each with its own fields."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from papercore.experiments.tint.paper_settings import PaperSettings
from papercore.experiments.tint.standard_settings import StandardSettings
from papercore.lab import config as lab
from papercore.lab.config import option


@dataclasses.dataclass(frozen=True)
class Config(lab.Config):
    """The chapter's settings; `standard()` and `paper()` return the classes of those scales, with other fields."""

    slug: ClassVar[str] = "tint"


@dataclasses.dataclass(frozen=True)
class QuickConfig(Config, scale="quick"):
    """Auxiliary models of two layers on languages of topics and private names, trained on the spot."""

    seeds: int = option(3, "auxiliary models, each with a language and documents of its own", minimum=2)
    words: int = option(16, "words of a language", minimum=4)
    names: int = option(
        4, "names, each of which stands for a word in one of the first places of its document", minimum=1
    )
    name_rate: float = option(0.25, "share of places behind a word at which a name comes", minimum=0.0)
    topics: int = option(8, "topics of the training documents", minimum=1)
    new_topics: int = option(8, "topics of the test documents, never trained on; as many again to choose rates", minimum=1)  # fmt: skip
    length: int = option(64, "tokens of a document", minimum=8)
    train_documents: int = option(1500, "training documents of each auxiliary model", minimum=16)
    choose_documents: int = option(32, "documents that choose the inner rate, of each seed", minimum=2)
    documents: int = option(96, "documents that perplexity is reported on, of each seed", minimum=2)
    width: int = option(48, "numbers of the auxiliary model's hidden state", minimum=4)
    layers: int = option(2, "layers of the auxiliary model", minimum=1)
    heads: int = option(6, "attention heads of a layer", minimum=1)
    init_std: float = option(0.14, "standard deviation of first weights, about 1 / sqrt(width)", minimum=0.0)
    steps: int = option(200, "AdamW steps that train an auxiliary model", minimum=1)
    batch: int = option(32, "documents a step", minimum=1)
    lr: float = option(8e-3, "peak learning rate of AdamW", minimum=0.0)
    warmup: int = option(30, "steps of warm-up", minimum=0)
    fractions: tuple[float, ...] = option((0.3, 0.5, 0.7, 0.9), "train fractions of a document", minimum=0.0)
    rates: tuple[float, ...] = option(
        (1e-3, 2e-3, 3e-3, 5e-3, 8e-3, 1.2e-2), "inner rates to choose from, per token of the sum loss", minimum=0.0
    )  # fmt: skip
    fd_eps: float = option(1e-2, "step of the finite differences", minimum=1e-12)
    most_steps: int = option(4, "largest number of inner steps", minimum=1)
    resamples: int = option(2000, "bootstrap resamples of documents", minimum=100)
    stack: int = option(4, "weight rows in one prefix token", minimum=1)
    timing_rounds: int = option(3, "rounds of the timing, interleaved", minimum=1)


@dataclasses.dataclass(frozen=True)
class StandardConfig(StandardSettings, Config, scale="standard"):
    """Small GPTs trained on free text, WikiText-2, and few-shot classification."""


@dataclasses.dataclass(frozen=True)
class PaperConfig(PaperSettings, Config, scale="paper"):
    """GPT-2 and OPT-125M on WikiText-103 and seven classification sets."""
