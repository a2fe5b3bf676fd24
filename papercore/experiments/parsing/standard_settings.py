"""Settings of the chapter's `standard` scale, apart from the code that uses them, so that reading them loads nothing."""

from __future__ import annotations

import dataclasses

from papercore.lab.config import option


@dataclasses.dataclass(frozen=True)
class StandardSettings:
    """Fields that only `standard` reads."""

    standard_train_on: str = option(
        "cuda",
        "where the larger models are trained: cuda leaves them out on a CPU; never leaves the treebank table alone",
        choices=("cuda", "any", "never"),
    )
    standard_treebank: str = option(
        "", "treebank: a zip, a folder of .mrg files, or empty for NLTK's corpus `treebank`"
    )
    standard_held_out: int = option(400, "last trees of the treebank, not counted in the grammar", minimum=1)
    standard_longest: int = option(30, "words of the longest held-out sentence that is parsed", minimum=4)
    standard_tests: int = option(200, "held-out sentences that are parsed, at most", minimum=1)
    standard_truncated: int = option(100, "of these, the shortest, for truncated grammars", minimum=1)
    standard_kept: tuple[str, ...] = option(
        ("60/146", "40/146", "20/146", "10/146", "40/45", "20/45", "10/45"),
        "in-terminals / pre-terminals kept; more than there are means all",
    )
    standard_ranks: tuple[int, ...] = option(
        (20, 15, 10), "heads that 20 in-terminals are merged into", minimum=1
    )
    standard_models: tuple[str, ...] = option(
        ("A4L6", "A4L1", "A4L3", "A1L6", "A8L6"),
        "heads and layers of each model; the first is the one that probes across grammars read",
    )
    standard_width: int = option(256, "numbers of a hidden state", minimum=4)
    standard_sentences: int = option(2_000_000, "training sentences", minimum=1)
    standard_min_length: int = option(4, "words of the shortest sentence", minimum=2)
    standard_max_length: int = option(30, "words of the longest sentence", minimum=4)
    standard_steps: int = option(20_000, "steps of masked language modelling", minimum=1)
    standard_batch: int = option(512, "sentences a step", minimum=1)
    standard_lr: float = option(1e-3, "peak learning rate of AdamW", minimum=0.0)
    standard_warmup: int = option(500, "steps of warm-up", minimum=0)
    standard_mask_rate: float = option(0.15, "share of words that are masked in training", minimum=0.0)
    standard_save_every: int = option(1000, "steps between two checkpoints", minimum=1)
    standard_masked: int = option(4000, "test sentences with one masked word", minimum=10)
    standard_probe_seeds: int = option(3, "seeds of the probes", minimum=2)
    standard_probe_train: int = option(2000, "sentences that a probe is fitted on", minimum=4)
    standard_probe_choose: int = option(500, "sentences that choose the layer", minimum=4)
    standard_probe_test: int = option(500, "sentences that a probe is tested on", minimum=4)
    standard_probe_spans: int = option(20_000, "spans of a marginal probe, at most", minimum=10)
    standard_probe_steps: int = option(1000, "steps of a two-layer probe", minimum=1)
