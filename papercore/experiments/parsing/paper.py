"""The chapter at `paper` scale: RoBERTa from scratch on sentences of the treebank's grammar, probed there and on the treebank itself.

What differs from the paper: its grammar has latent symbols found by spectral learning (1,600 of them); this one counts the treebank's
own labels. The steps and rates of its training could not be read, so they are choices of this book.
"""

from __future__ import annotations

import torch

from papercore.experiments.parsing.config import PaperConfig
from papercore.experiments.parsing.corpus import Sentences
from papercore.experiments.parsing.study import Plan, run_study
from papercore.experiments.parsing.treebank import Treebank, treebank_table
from papercore.lab.record import Record
from papercore.lab.stages import Stages


def run_paper(config: PaperConfig, record: Record, stages: Stages) -> None:
    """Run every stage that is not on disk yet and fill `record`.

    Raises:
        papercore.lab.data.Missing: no treebank is named and NLTK's sample is not on this machine.
        ValueError: the name of a model or of kept symbols cannot be read.
    """
    bank = Treebank.read(config.paper_treebank, config.paper_held_out)
    treebank_table(
        bank, record, stages, longest=config.paper_longest, tests=10**9, truncated=config.paper_truncated, kept=config.paper_kept, ranks=config.paper_ranks,
        seed=config.seed,
    )  # fmt: skip
    plan = Plan.of(config, "paper", pre_norm=False, min_length=4, max_length=config.paper_longest)
    trees = [tree for tree in bank.held_out if 4 <= len(tree) <= config.paper_longest]

    def elsewhere(seed: int) -> Sentences:
        order = torch.randperm(len(trees), generator=torch.Generator().manual_seed(plan.seed + 200 + seed))
        return bank.sentences([trees[i] for i in order[: sum(plan.probe_sizes)].tolist()])

    run_study(plan, bank.grammar, record, stages, elsewhere=elsewhere)
