"""From finished runs to the record of the `standard` scale: metrics, tables, curves and the notes that belong to them.

Names of metrics
    standard_<arm>_mean, _std, _se        test accuracy at the held-out-chosen checkpoint, over seeds, k examples a class
    standard_large_<arm>                  the same in the larger regime, one seed
    standard_<a>_minus_<b>, _se, _p       paired difference. se joins the spread over seeds with the spread over test
                                          questions; p is of the paired t test over seeds alone
    standard_steps_ratio                  steps that the slowest arm needs to a common training loss, over the fastest's
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papercore.experiments.mezo.encoder import ARM_LABELS
from papercore.experiments.mezo.standard_settings import StandardSettings
from papercore.lab.corpora import Corpus
from papercore.lab.record import Record
from papercore.lab.statistics import paired, summarize

Run = dict[str, Any]
Runs = dict[tuple[str, str], list[Run]]

# Arms whose speed claim C6 compares: all start at the same prompt.
PROMPTED = ("full", "norms_biases", "lora")
SMOOTHING = 20  # steps; a batch of 32 is too noisy to say when a loss was reached
MOVES = "abs:0.06"  # about two standard errors of 500 questions, three seeds


def best_check(run: Run) -> int:
    """Index of the evaluation that the held-out questions choose: highest accuracy, then lowest loss.

    >>> best_check({"checks": [100, 200], "held_accuracy": [0.5, 0.5], "held_loss": [1.2, 1.1]})
    1
    """
    return max(range(len(run["checks"])), key=lambda i: (run["held_accuracy"][i], -run["held_loss"][i]))


def smooth(losses: NDArray[np.float64], window: int = SMOOTHING) -> NDArray[np.float64]:
    """Mean over the last `window` steps at each step, over fewer at the start; [..., steps] -> [..., steps]."""
    total = np.cumsum(losses, axis=-1, dtype=np.float64)
    before = np.concatenate([np.zeros_like(total[..., :1]), total], axis=-1)
    ends = np.arange(1, losses.shape[-1] + 1)
    starts = np.maximum(ends - window, 0)
    return (before[..., ends] - before[..., starts]) / (ends - starts)


def steps_to_common_level(losses: dict[str, NDArray[np.float64]]) -> tuple[float, dict[str, int]]:
    """The lowest smoothed training loss that every arm reaches, and each arm's first step at or below it.

    losses: arm -> [seeds, steps]; the mean curve over seeds is smoothed.
    """
    curves = {arm: smooth(np.asarray(values).mean(0)) for arm, values in losses.items()}
    level = max(float(curve.min()) for curve in curves.values())
    return level, {arm: int(np.argmax(curve <= level)) + 1 for arm, curve in curves.items()}


def compare(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[float, float, float | None]:
    """Difference of two accuracies, its standard error, and p of the paired t test over seeds (None with one seed).

    Args: right answers [seeds, questions] of each method, same seeds and questions (one row is repeated for all seeds).
    """
    first, second = np.broadcast_arrays(first, second)
    gap = first.astype(float) - second.astype(float)
    over_questions = float(gap.mean(0).std(ddof=1)) / math.sqrt(gap.shape[1])
    if len(gap) < 2:
        return float(gap.mean()), over_questions, None
    over_seeds = paired(first.mean(1).tolist(), second.mean(1).tolist())
    return over_seeds.difference, math.hypot(over_questions, over_seeds.se), over_seeds.p


def report(
    config: StandardSettings,
    record: Record,
    corpus: Corpus,
    untouched: Run,
    tuning: dict[str, dict[float, list[Run]]],
    chosen: dict[str, float],
    runs: Runs,
    footprint: list[Run],
) -> None:
    """Fill the record."""
    classes, questions = len(corpus.classes), len(corpus.test_texts)
    majority = float(np.bincount(corpus.test_labels).max() / questions)
    for name, value in (
        ("test_questions", questions),
        ("seeds", len(config.standard_seeds)),
        ("classes", classes),
    ):
        record.metric(f"standard_{name}", value, "exact")
    record.metric("standard_chance", 1 / classes, "exact")
    record.metric("standard_majority", majority, "exact")
    record.metric("standard_zero_shot", untouched["accuracy"], "abs:0.01")
    record.metric("standard_zero_shot_ece", untouched["ece"], "abs:0.01")
    _tuning(record, tuning, chosen)
    _accuracies(config, record, untouched, runs)
    _curves(record, runs)
    _comparisons(record, untouched, runs, chance=1 / classes)
    if footprint:
        _footprint(record, footprint)
    _notes(config, record, corpus, bool(footprint))


def _tuning(record: Record, tuning: dict[str, dict[float, list[Run]]], chosen: dict[str, float]) -> None:
    rows = []
    for arm, results in tuning.items():
        for lr, found in results.items():
            loss, accuracy = (
                float(np.mean([run[key][best_check(run)] for run in found]))
                for key in ("held_loss", "held_accuracy")
            )
            rows.append(
                [_label(arm), lr, found[0]["checks"][-1], len(found), loss, accuracy, lr == chosen[arm]]
            )
        record.metric(f"standard_lr_{arm}", chosen[arm], "exact")
    columns = ["arm", "learning rate", "steps", "seeds", "held-out loss", "held-out accuracy", "chosen"]
    record.table("standard_tuning", columns, rows)


def _accuracies(config: StandardSettings, record: Record, untouched: Run, runs: Runs) -> None:
    rows = [["zero-shot", "-", "-", None, None, None, untouched["accuracy"], None, untouched["ece"]]]
    for (regime, arm), found in runs.items():
        size = f"k = {config.standard_k}" if regime == "k" else f"n = {config.standard_large_n:,} (one seed)"
        if arm == "probe":
            for feature, name in (("mean", "lp"), ("word", "lp_word")):
                values = [run[f"{feature}_accuracy"] for run in found]
                _summary(record, regime, name, values)
                for seed, run in zip(config.standard_seeds, found, strict=False):
                    accuracy, c, ece = (run[f"{feature}_{key}"] for key in ("accuracy", "c", "ece"))
                    rows.append([_label(name), size, seed, c, None, None, accuracy, None, ece])
            continue
        _summary(record, regime, arm, [run["accuracy"][best_check(run)] for run in found])
        best = [best_check(run) for run in found]
        record.metric(_name(regime, arm, "last"), np.mean([run["accuracy"][-1] for run in found]), MOVES)
        record.metric(
            _name(regime, arm, "ece"),
            np.mean([run["ece"][i] for run, i in zip(found, best, strict=True)]),
            MOVES,
        )
        seconds = float(np.median([run["seconds_per_step"] for run in found]))
        record.metric(_name(regime, arm, "seconds_per_step"), seconds, "volatile")
        for seed, run, i in zip(config.standard_seeds, found, best, strict=False):
            rows.append(
                [
                    _label(arm),
                    size,
                    seed,
                    run["lr"],
                    run["checks"][i],
                    run["held_accuracy"][i],
                    run["accuracy"][i],
                ]
                + [run["accuracy"][-1], run["ece"][i]]
            )
    columns = [
        "method",
        "training set",
        "seed",
        "learning rate or C",
        "chosen step",
        "held-out",
        "test",
        "test, last step",
        "ECE",
    ]
    record.table("standard_accuracy", columns, rows)


def _curves(record: Record, runs: Runs) -> None:
    """Training loss [seeds, steps] and test accuracy [seeds, evaluations] of every arm; C6 / C10 from the losses."""
    for (regime, arm), found in runs.items():
        if arm == "probe":
            continue
        record.array(
            f"standard_{regime}_{arm}_loss", np.stack([run["losses"] for run in found]).astype(np.float32)
        )
        record.array(f"standard_{regime}_{arm}_accuracy", np.array([run["accuracy"] for run in found]))
        record.array(f"standard_{regime}_{arm}_held_out", np.array([run["held_accuracy"] for run in found]))
        record.array(f"standard_{regime}_{arm}_steps", np.array(found[0]["checks"]))
        if regime == "k" and arm != "adam":
            record.metric(f"standard_{arm}_parameters", found[0]["parameters"], "exact")
            record.metric(f"standard_{arm}_replay_gap", max(run["replay_gap"] for run in found), "exact")
            record.metric(f"standard_{arm}_log_bytes", max(run["log_bytes"] for run in found), "rel:0.05")
    losses = {
        arm: np.stack([run["losses"] for run in runs["k", arm]]) for arm in PROMPTED if ("k", arm) in runs
    }
    if len(losses) > 1:
        level, steps = steps_to_common_level(losses)
        sizes = {arm: runs["k", arm][0]["parameters"] for arm in losses}
        record.table("standard_steps_to_level", ["arm", "parameters", f"steps to a training loss of {level:.3f}"], [
            [_label(arm), sizes[arm], steps[arm]] for arm in losses
        ])  # fmt: skip
        record.metric("standard_steps_ratio", max(steps.values()) / min(steps.values()), "rel:0.5")
        record.metric("standard_parameters_ratio", max(sizes.values()) / min(sizes.values()), "exact")
        if {"full", "norms_biases"} <= set(steps):
            pair = (steps["full"], steps["norms_biases"])
            record.metric("standard_steps_ratio_norms_biases", max(pair) / min(pair), "rel:0.5")


def _comparisons(record: Record, untouched: Run, runs: Runs, *, chance: float) -> None:
    correct: dict[str, NDArray[np.bool_]] = {"zero_shot": untouched["correct"][None]}
    for (regime, arm), found in runs.items():
        if regime != "k":
            continue
        if arm == "probe":
            correct |= {
                name: np.stack([r[f"{f}_correct"] for r in found])
                for f, name in (("mean", "lp"), ("word", "lp_word"))
            }
        else:
            correct[arm] = np.stack([run["correct"][best_check(run)] for run in found])
    pairs = [("full", other) for other in ("zero_shot", "lp", "lp_word", "norms_biases", "lora", "no_prompt")]
    rows = []
    for first, second in [*pairs, ("adam", "full")]:
        if first not in correct or second not in correct:
            continue
        gap, se, p = compare(correct[first], correct[second])
        name = f"standard_{first}_minus_{second}"
        record.metric(name, gap, f"se:2:{name}_se")
        record.metric(f"{name}_se", se, "rel:0.5")
        if p is not None:
            record.metric(f"{name}_p", p, "abs:0.3")
        rows.append([_label(first), _label(second), gap, se, p])
    record.table(
        "standard_paired",
        ["method", "against", "difference", "standard error", "p, paired t over seeds"],
        rows,
    )
    if {"full", "no_prompt"} <= set(correct):
        gains = [float(correct[arm].mean()) - chance for arm in ("no_prompt", "full")]
        # without a gain to compare with there is no ratio, and no rule on it holds
        ratio = gains[0] / gains[1] if gains[1] > 0 else math.nan
        record.metric("standard_no_prompt_gain_ratio", ratio, "abs:0.15")


def _footprint(record: Record, rows: list[Run]) -> None:
    """Memory and step time of a random-weight decoder on CUDA, beside the closed form."""
    columns = [
        "method",
        "batch",
        "tokens",
        "parameters",
        "measured bytes",
        "closed form bytes",
        "seconds a step",
    ]
    keys = ("method", "batch", "tokens", "parameters", "bytes", "modelled", "seconds")
    record.table("standard_footprint", columns, [[row[key] for key in keys] for row in rows])
    shapes = sorted({(row["batch"], row["tokens"]) for row in rows})
    for batch, tokens in shapes:
        found = {row["method"]: row for row in rows if (row["batch"], row["tokens"]) == (batch, tokens)}
        where = f"{batch}x{tokens}"
        for method, row in found.items():
            record.metric(f"standard_memory_{method}_{where}", row["bytes"], "rel:0.1")
            record.metric(
                f"standard_memory_{method}_{where}_over_model", row["bytes"] / row["modelled"], "rel:0.1"
            )
            record.metric(f"standard_seconds_{method}_{where}", row["seconds"], "volatile")
        inference, mezo, adam = (found[name] for name in ("inference", "mezo", "adam"))
        record.metric(
            f"standard_mezo_over_inference_memory_{where}", mezo["bytes"] / inference["bytes"], "rel:0.1"
        )
        record.metric(f"standard_adam_over_mezo_memory_{where}", adam["bytes"] / mezo["bytes"], "rel:0.1")
        record.metric(
            f"standard_step_over_forwards_{where}", mezo["seconds"] / inference["seconds"], "volatile"
        )
        record.metric(f"standard_adam_over_mezo_step_{where}", adam["seconds"] / mezo["seconds"], "volatile")


def _notes(config: StandardSettings, record: Record, corpus: Corpus, on_cuda: bool) -> None:
    record.note(
        "standard_data",
        f"{corpus.name}: {len(corpus.train_texts):,} training questions after those that occur twice or in the test set were "
        f"dropped, {len(corpus.test_texts)} test questions; checkpoints and probe penalties are chosen on held-out training "
        "questions, learning rates on other seeds; test questions choose nothing.",
    )
    record.note(
        "standard_tuning",
        f"Each learning rate was chosen on {len(config.standard_tuning_seeds)} other seeds by the held-out loss at the checkpoints "
        f"that those runs of {config.standard_tuning_steps} steps keep, with k examples a class; the search goes on from the middle "
        "of the grid until the best rate has a worse one on both sides. The larger regime takes the same rates.",
    )
    record.note(
        "standard_probe",
        "lp: logistic regression on the mean-pooled last hidden state (unit length). lp_word: on the first word's state at layer "
        f"{config.standard_probe_layer}, a feature that was picked with labels in hand: it shows how much the probe depends on it.",
    )
    record.note(
        "standard_large",
        f"The regime of {config.standard_large_n:,} examples was run with one seed and has no error bar.",
    )
    record.note(
        "standard_icl", "In-context learning does not apply: a sentence encoder takes no demonstrations."
    )
    if not on_cuda:
        record.note(
            "standard_footprint", "Memory and step time of the large decoder are measured on CUDA only."
        )


def _summary(record: Record, regime: str, arm: str, values: list[float]) -> None:
    if regime == "large":
        record.metric(f"standard_large_{arm}", values[0], MOVES)
        return
    record.metric(f"standard_{arm}_mean", float(np.mean(values)), MOVES)
    if len(values) > 1:
        found = summarize(values)
        record.metric(f"standard_{arm}_std", found.std, MOVES)
        record.metric(f"standard_{arm}_se", found.se, MOVES)


def _name(regime: str, arm: str, what: str) -> str:
    return f"standard_{'large_' if regime == 'large' else ''}{arm}_{what}"


def _label(arm: str) -> str:
    others = {
        "adam": "Adam",
        "lp": "linear probe",
        "lp_word": "linear probe, first word",
        "zero_shot": "zero-shot",
    }
    return ARM_LABELS.get(arm) or others[arm]
