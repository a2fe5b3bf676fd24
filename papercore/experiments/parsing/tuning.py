"""Settings of the quick chapter's masked language model, compared on other seeds and other sentences than those that are reported.

    python -m papercore.experiments.parsing.tuning

writes `tuning.json` beside this file: a record with every trial and the best one, whose settings are those of config.py. A trial
is as long as the reported run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from papercore.experiments.parsing.config import QuickConfig
from papercore.experiments.parsing.corpus import one_mask
from papercore.experiments.parsing.masked_lm import log_probabilities
from papercore.experiments.parsing.predictors import Scores, posterior
from papercore.experiments.parsing.quick_parts import new_model, sentences_of, short_sentences, train_until
from papercore.lab.progress import progress
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.parsing import english

TUNING = Path(__file__).with_name("tuning.json")
SEED = 900  # of weights, training and test sentences; seeds of reported runs are below
SENTENCES = 1000
# Share of the steps on short sentences, words of the longest of these, sentences a step there (about as many words), share of words
# masked there, and afterwards.
TRIALS = (
    (0.0, 9, 96, 0.4, 0.4),
    (0.5, 20, 64, 0.5, 0.2),
    (0.25, 9, 96, 0.5, 0.2),
    (0.4, 9, 96, 0.5, 0.2),
    (0.5, 9, 96, 0.4, 0.3),
)
NAMES = ("short_share", "short_length", "short_batch", "short_mask_rate", "mask_rate")


def trial(config: QuickConfig) -> dict[str, float]:
    """Gap and divergence at the end of a run with these settings."""
    torch.set_num_threads(1)
    training, tests = sentences_of(config, config.sentences, 1), sentences_of(config, SENTENCES, 2)
    words = len(english().vocabulary)
    ids, position, targets = one_mask(tests, words, 1000 * config.seed + 3)
    bayes = posterior(english(), ids, tests.lengths, position)
    model = new_model(config)
    train_until(config, model, (short_sentences(config), training), 0, config.steps, None)
    return Scores.of(log_probabilities(model, ids, tests.lengths, position), bayes, targets).summary()


def stages_of(config: QuickConfig) -> Stages:
    """One folder for all trials, whichever of them config.py took its settings from."""
    return Stages.of(config.replace(**dict(zip(NAMES, TRIALS[0], strict=True))))


def part(config: QuickConfig, number: int) -> dict[str, float]:
    """The result of a trial, from its stage."""
    changed = dict(zip(NAMES, TRIALS[number], strict=True))
    return stages_of(config).get(f"trial {changed}", lambda: trial(config.replace(**changed)))


def tune(config: QuickConfig) -> Record:
    """Make every trial; the best is the one with the smallest mean divergence from the posterior."""
    config = config.replace(seed=SEED)
    record = Record.start(config)
    rows: list[list[Any]] = []
    for number in progress(range(len(TRIALS)), "tuning"):
        found = part(config, number)
        rows.append([*TRIALS[number], found["gap"], found["kl"]])
    best = min(rows, key=lambda row: row[-1])
    for name, value in zip(NAMES, best, strict=False):
        record.metric(name, value, "exact")
    record.table("sweep", [*NAMES, "gap", "mean KL"], rows)
    record.note("seed", f"seed {SEED}: no reported run uses it")
    record.finish()
    record.provenance["seconds"] = round(
        stages_of(config).seconds(), 1
    )  # of the trials, whenever they were made
    return record


if __name__ == "__main__":
    result = tune(QuickConfig.quick(device="cpu"))
    result.save(TUNING)
    for line in result.tables["sweep"]["rows"]:
        print(*line)
    print(result.metrics, f"{result.provenance['seconds']:.0f} s")
