"""The chapter at `standard` scale: truncated inside-outside on the user's treebank, and larger models on two grammars of our own.

The second grammar has the symbols and words of the first, other probabilities and deeper trees: it is what probes and models are
tested on out of distribution. The models want a GPU; on a CPU they are left out unless `standard_train_on` is "any".
"""

from __future__ import annotations

from papercore.experiments.parsing.config import StandardConfig
from papercore.experiments.parsing.corpus import Sentences, draw
from papercore.experiments.parsing.study import Plan, run_study
from papercore.experiments.parsing.treebank import Treebank, treebank_table
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.parsing import english, english_shifted


def run_standard(config: StandardConfig, record: Record, stages: Stages) -> None:
    """Run every stage that is not on disk yet and fill `record`.

    Raises:
        papercore.lab.data.Missing: the treebank is not on this machine.
        ValueError: the name of a model or of kept symbols cannot be read.
    """
    bank = Treebank.read(config.standard_treebank, config.standard_held_out)
    treebank_table(
        bank, record, stages, longest=config.standard_longest, tests=config.standard_tests, truncated=config.standard_truncated,
        kept=config.standard_kept, ranks=config.standard_ranks, seed=config.seed,
    )  # fmt: skip
    wanted = config.standard_train_on
    if wanted == "never" or (wanted == "cuda" and config.torch_device().type != "cuda"):
        record.note(
            "models",
            "The larger models were not trained in this run: they want a GPU (standard_train_on=any trains them on a CPU, for days).",
        )
        return
    plan = Plan.of(config, "standard", pre_norm=True)
    shifted = english_shifted()

    def elsewhere(seed: int) -> Sentences:
        n = sum(plan.probe_sizes)
        return draw(shifted, n, plan.min_length, plan.max_length, plan.seed + 200 + seed, trees=True)

    run_study(plan, english(), record, stages, elsewhere=elsewhere, shifted=shifted)
