"""Settings of the chapter's `paper` scale. What the paper's text could not confirm (steps, rates) is this book's choice."""

from __future__ import annotations

import dataclasses

from papercore.lab.config import option


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """Fields that only `paper` reads."""

    paper_treebank: str = option(
        "", "Penn Treebank: a folder of .mrg files or a zip; empty for NLTK's sample of it"
    )
    paper_held_out: int = option(
        2416, "last trees, not counted in the grammar (section 23 has 2,416)", minimum=1
    )
    paper_longest: int = option(40, "words of the longest sentence", minimum=4)
    paper_models: tuple[str, ...] = option(
        ("A12L12", "A12L6", "A12L3", "A12L1", "A3L12", "A24L12"), "heads and layers of each model"
    )
    paper_width: int = option(768, "numbers of a hidden state", minimum=4)
    paper_sentences: int = option(10_000_000, "sentences sampled from the grammar", minimum=1)
    paper_steps: int = option(100_000, "steps of masked language modelling", minimum=1)
    paper_batch: int = option(512, "sentences a step", minimum=1)
    paper_lr: float = option(1e-4, "peak learning rate of AdamW", minimum=0.0)
    paper_warmup: int = option(5000, "steps of warm-up", minimum=0)
    paper_mask_rate: float = option(0.15, "share of words that are masked", minimum=0.0)
    paper_save_every: int = option(1000, "steps between two checkpoints", minimum=1)
    paper_masked: int = option(4000, "test sentences with one masked word", minimum=10)
    paper_probe_seeds: int = option(3, "seeds of the probes", minimum=2)
    paper_probe_train: int = option(2000, "sentences that a probe is fitted on", minimum=4)
    paper_probe_choose: int = option(500, "sentences that choose the layer", minimum=4)
    paper_probe_test: int = option(500, "sentences that a probe is tested on", minimum=4)
    paper_probe_spans: int = option(20_000, "spans of a marginal probe, at most", minimum=10)
    paper_probe_steps: int = option(1000, "steps of a two-layer probe", minimum=1)
    paper_kept: tuple[str, ...] = option(
        ("60/146", "40/146", "20/146", "10/146", "40/45", "20/45", "10/45"),
        "in-terminals / pre-terminals kept; more than there are means all",
    )
    paper_ranks: tuple[int, ...] = option(
        (20, 15, 10), "heads that 20 in-terminals are merged into", minimum=1
    )
    paper_truncated: int = option(500, "held-out sentences for truncated grammars", minimum=1)
