"""A `quick` record made by formula: the names and shapes of a real one, with numbers that are easy to recognise."""

import numpy as np

from papercore import experiments
from papercore.experiments.parsing.constructing import TRUNCATION_COLUMNS, closed_forms, size_curves
from papercore.experiments.parsing.examples import BLANK_COLUMNS, EXAMPLES, TREE_COLUMNS
from papercore.experiments.parsing.probing import KINDS, TASKS, summary
from papercore.lab.record import Record

SEEDS, LAYERS = 3, 3


def made_record() -> Record:
    """A record that every figure and paragraph of the chapter can be drawn from."""
    record = Record.start(experiments.configure("parsing", "quick", "cpu"))
    rng = np.random.default_rng(0)
    gaps = {"unigram": 2.5, "window": 1.1, "mlm_25": 1.0, "mlm_50": 0.7, "mlm_75": 0.5, "mlm": 0.45}
    for name, gap in gaps.items():
        for what, value in (("ce", 2.6 + gap), ("gap", gap), ("gap_se", 0.02), ("kl", gap + 0.01), ("gap_minus_kl_se", 0.02)):  # fmt: skip
            record.metric(f"{name}_{what}", value)
    numbers = {
        "bayes_ce": 2.6, "bayes_accuracy": 0.3, "model_accuracy": 0.25, "weights": 375_552, "words": 286, "steps": 1500,
        "gap_closed": 0.82, "window_minus_mlm": 0.65, "window_minus_mlm_se": 0.03, "least_gap_z": 20.0, "predictors": 6,
        "largest_gap_minus_kl_z": 1.2, "in_terminals": 26, "pre_terminals": 42, "whole_f1": 0.93, "kept_f1": 0.86, "truncation_drop": 0.07,
        "whole_possible": 1.0, "kept_possible": 0.85, "whole_perplexity": 14.0, "kept_perplexity": 22.0, "right_f1": 0.5, "left_f1": 0.2,
        "io_f1": 0.93, "io_f1_se": 0.005, "right_f1_se": 0.005, "probe_seeds": SEEDS, "construction_difference": 4e-15, "construction_layers_wrong": 0,
        "construction_cases": 33, "shifted_wrong": 1.0,
    }  # fmt: skip
    for name, value in numbers.items():
        record.metric(name, value)
    for name, value in closed_forms().items():
        record.metric(name, value)
    for name, values in size_curves().items():
        record.array(name, np.array(values))
    at = np.linspace(0, 1500, 7)
    record.array("check_steps", at)
    for name, values in (("ce", 5.6 - at / 600), ("gap", 3.0 - at / 600), ("gap_se", 0.02 + 0 * at), ("kl", 3.01 - at / 600)):  # fmt: skip
        record.array(f"check_{name}", values)
    p = rng.uniform(0.01, 1, 50)
    record.array("token_bayes", p)
    record.array("token_model", p * rng.uniform(0.5, 1, 50))
    scores = np.full((SEEDS, len(TASKS), len(KINDS), LAYERS + 1), 0.7) + 0.01 * rng.standard_normal((SEEDS, 3, 2, LAYERS + 1))  # fmt: skip
    scores[:, :, :, 2] += 0.05
    scores[:, 2] -= 0.6
    for t, task in enumerate(TASKS):
        for k, kind in enumerate(KINDS):
            record.array(f"probe_{task}_{kind}", scores[:, t, k])
    for name, value in summary(scores, scores).items():
        record.metric(name, value)
    rows = [
        [i, p_, i / 26, p_ / 42, min(1.0, i / 26 * p_ / 42), 0.93 * i / 26 * p_ / 42, 14.0 * 26 / i * 42 / p_]
        for p_ in (42, 36)
        for i in (26, 20, 10)
    ]
    record.table("truncation", TRUNCATION_COLUMNS, rows)
    record.table("merged", ["rank", "numbers of a state", "layers", "heads", "F1"], [[20, 1049, 22, 84, 0.9], [15, 829, 22, 84, 0.8], [10, 609, 22, 84, 0.7]])  # fmt: skip
    lengths = [len(text.split()) for text, _ in EXAMPLES]
    record.array("chart_lengths", np.array(lengths))
    n = max(lengths)
    chart = np.zeros((len(EXAMPLES), n, n))
    chart[:, 0, 1] = 0.9
    for name, factor in (("io", 1.0), ("built", 1.0), ("probe", 0.6)):
        record.array(f"chart_{name}", factor * chart)
    blanks = []
    for text, places in EXAMPLES:
        for place in places:
            words = text.split()
            words[place] = "___"
            blanks += [[" ".join(words), rank, f"word{rank}", 0.5 / rank, 0.4 / rank] for rank in (1, 2, 3)]
    record.table("blanks", BLANK_COLUMNS, blanks)
    record.table("trees", TREE_COLUMNS, [[text, "(S a b)", "(S a b)" if i else "(S b a)", 0.5] for i, (text, _) in enumerate(EXAMPLES)])  # fmt: skip
    return record.finish()


def benchmark_rows() -> list[dict[str, object]]:
    """Rows as the benchmark of the kernel writes them."""
    return [
        {
            "name": name,
            "task": task,
            "ratio": ratio,
            "low": 0.9 * ratio,
            "high": 1.1 * ratio,
            "package": package,
        }
        for name, task, ratio, package in (
            ("all marginals", "dense", 1.0, "papercore"),
            ("torch-struct SentCFG, all marginals", "dense", 120.0, "torch-struct"),
            ("matrix-product limit", "dense", 0.4, "torch"),
            ("all marginals", "english", 1.0, "papercore"),
            ("NLTK ViterbiParser, best tree", "english", 30.0, "nltk"),
        )
    ]
