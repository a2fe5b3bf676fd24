"""The chapter at `standard` scale: MeZO on a pretrained sentence encoder and real questions (TREC).

Four arms of MeZO (all weights, LayerNorm + biases, LoRA, no prompt), and for reference the encoder untouched, linear probes and
Adam by backpropagation. In-context learning does not apply to a sentence encoder.

Glossary
    regime     "k": k examples a class, several seeds; "large": n examples, the first seed alone, labelled so
    seed       draws the sample, the held-out examples, the order of batches and the noise
    held out   training examples that choose checkpoints and probe penalties (same rule everywhere: accuracy, then loss)
    tuning     shorter runs on other seeds, whose held-out loss chooses each arm's learning rate

The test questions choose nothing. Every run is a stage: a killed run resumes after its last finished stage, and inside a
stage after the last evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papercore.experiments.mezo.config import StandardConfig
from papercore.experiments.mezo.encoder import ARM_LABELS, Classifier, calibration_error
from papercore.experiments.mezo.footprint import measure_footprint
from papercore.experiments.mezo.probe import probe
from papercore.experiments.mezo.standard_fit import Run, fit
from papercore.experiments.mezo.standard_report import best_check, report
from papercore.experiments.mezo.standard_task import Task
from papercore.lab.record import Record
from papercore.lab.stages import Stages


def run_standard(config: StandardConfig, record: Record, stages: Stages) -> None:
    """Run every stage that is not on disk yet and fill `record`.

    Raises:
        papercore.lab.data.Missing: the corpus or the encoder is not on this machine.
        FloatingPointError: a loss is not finite, with its step.
    """
    _check(config)
    task = Task.of(config)
    seeds = [config.seed + seed for seed in config.standard_seeds]
    untouched = stages.get("untouched", lambda: _untouched(task))
    tuning: dict[str, dict[float, list[Run]]] = {}
    for arm in (*config.standard_arms, "adam"):
        tuning[arm] = _search(task, arm, stages)
    chosen = {arm: choose_lr(results) for arm, results in tuning.items()}
    runs: dict[tuple[str, str], list[Run]] = {}
    for regime, arms, some in (
        ("k", config.standard_arms, seeds),
        ("large", config.standard_large_arms, seeds[:1] if config.standard_large_n else []),
    ):
        if not some:
            continue
        for arm in (*arms, "adam"):
            runs[regime, arm] = [
                stages.get(
                    f"{regime}/{arm}/seed{seed}",
                    _part(_tuned_run, task, regime, arm, chosen[arm], seed, stages),
                )
                for seed in some
            ]
        runs[regime, "probe"] = [
            stages.get(f"{regime}/probe/seed{seed}", _part(_probes, task, regime, seed)) for seed in some
        ]
    footprint: list[Run] = []
    if config.torch_device().type == "cuda":
        footprint = stages.get(
            "footprint", lambda: {"rows": measure_footprint(config.standard_decoder, config.torch_device())}
        )["rows"]
    report(config, record, task.corpus, untouched, tuning, chosen, runs, footprint)


def choose_lr(results: dict[float, list[Run]]) -> float:
    """The learning rate with the lowest held-out loss at the checkpoints that a run would keep, mean over the tuning seeds."""
    return min(
        results, key=lambda lr: float(np.mean([run["held_loss"][best_check(run)] for run in results[lr]]))
    )


def _search(task: Task, arm: str, stages: Stages) -> dict[float, list[Run]]:
    """Tuning runs by learning rate: from the middle of the arm's grid outward, until the best has a worse one on both sides.

    So no choice is one of the outermost rates that were tried, unless the grid itself ends there.
    """
    grid = sorted(getattr(task.config, f"standard_lr_{arm}"))
    tried: dict[float, list[Run]] = {}
    todo = [grid[len(grid) // 2]]
    while todo:
        for lr in todo:
            tried[lr] = [
                stages.get(f"tuning/{arm}/lr{lr:g}/seed{seed}", _part(_tune, task, arm, lr, seed))
                for seed in task.config.standard_tuning_seeds
            ]
        best = grid.index(choose_lr(tried))
        todo = [lr for lr in grid[max(0, best - 1) : best + 2] if lr not in tried]
    return dict(sorted(tried.items()))


def _tune(task: Task, arm: str, lr: float, seed: int) -> Run:
    """One run of the k regime on a tuning seed; no test question is read."""
    config = task.config
    steps, every = config.standard_tuning_steps, config.standard_check_every
    if arm == "adam":
        steps = min(config.standard_adam_steps, steps)
        every = max(1, steps // 3)
    try:
        return fit(
            task,
            arm,
            *task.sample("k", seed),
            lr=lr,
            seed=seed,
            steps=steps,
            check_every=every,
            text=f"tuning {arm}, lr {lr:g}, seed {seed}",
            test=False,
        )
    except FloatingPointError:
        # a diverged run is an answer here: this rate is too large
        return {"lr": lr, "checks": [steps], "held_accuracy": [0.0], "held_loss": [math.inf]}


def _tuned_run(task: Task, regime: str, arm: str, lr: float, seed: int, stages: Stages) -> Run:
    """One reported run."""
    config = task.config
    steps, every = config.standard_steps, config.standard_check_every
    if arm == "adam":
        steps = config.standard_adam_large_steps if regime == "large" else config.standard_adam_steps
        every = max(1, steps // 3)
    folder = stages.folder(f"{regime}/{arm}/seed{seed}")
    text = f"{ARM_LABELS.get(arm, 'Adam')}, {regime}, seed {seed}"
    return fit(
        task,
        arm,
        *task.sample(regime, seed),
        lr=lr,
        seed=seed,
        steps=steps,
        check_every=every,
        text=text,
        folder=folder,
    )


@torch.no_grad()
def _untouched(task: Task) -> Run:
    """The encoder as it comes, with the prompt head: zero-shot."""
    classifier, _ = task.classifier("full", 0)
    return task.score(classifier, task.test_ids, task.test_labels)


@torch.no_grad()
def _features(task: Task, classifier: Classifier, ids: Sequence[list[int]]) -> dict[str, Tensor]:
    """Unit-length mean-pooled embedding, and the first word's state in the middle of the encoder."""
    encoder, layer = classifier.encoder, task.config.standard_probe_layer
    parts = [ids[a : a + 128] for a in range(0, len(ids), 128)]
    mean = torch.cat([encoder(part) for part in parts])
    word = torch.cat([encoder.first_word(part, layer) for part in parts])
    return {
        "mean": nn.functional.normalize(mean, dim=-1).cpu(),
        "word": nn.functional.normalize(word, dim=-1).cpu(),
    }


def _probes(task: Task, regime: str, seed: int) -> Run:
    """Both linear probes on the sample of one run."""
    classifier, _ = task.classifier("full", 0)
    train_set, held_out = task.sample(regime, seed)
    fit_on, choose_on, test = (
        _features(task, classifier, ids)
        for ids in (
            [task.train_ids[i] for i in train_set],
            [task.train_ids[i] for i in held_out],
            task.test_ids,
        )
    )
    result: Run = {}
    for name in fit_on:
        logits, c = probe(
            (fit_on[name], task.train_labels[train_set]),
            (choose_on[name], task.train_labels[held_out]),
            test[name],
            classes=len(task.corpus.classes),
            grid=task.config.standard_probe_c,
        )
        correct = logits.argmax(1) == task.test_labels
        ece = calibration_error(logits.softmax(1), task.test_labels)
        result |= {f"{name}_accuracy": float(correct.double().mean()), f"{name}_c": c, f"{name}_ece": ece}
        result[f"{name}_correct"] = correct.numpy()
    return result


def _part(function: Callable[..., Run], *arguments: Any) -> Callable[[], Run]:
    """A stage's function with its arguments bound now, not when a loop has moved on."""
    return lambda: function(*arguments)


def _check(config: StandardConfig) -> None:
    """Refuse settings that would waste a run or break its rules."""
    reported = {config.seed + seed for seed in config.standard_seeds}
    if both := reported & set(config.standard_tuning_seeds):
        raise ValueError(
            f"seeds {sorted(both)} are both reported and used for tuning: learning rates are chosen on other seeds"
        )
    if not config.standard_seeds or not config.standard_tuning_seeds:
        raise ValueError("standard_seeds and standard_tuning_seeds need at least one seed each")
    if extra := set(config.standard_large_arms) - set(config.standard_arms):
        raise ValueError(
            f"standard_large_arms {sorted(extra)} are not in standard_arms, whose runs choose their learning rates"
        )
