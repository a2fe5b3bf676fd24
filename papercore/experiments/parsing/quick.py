"""The chapter at `quick` scale: a masked language model of our own grammar beside its Bayes-optimal predictor, what probes find in
it, and the transformer that is built and not trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from papercore.experiments.parsing import constructing
from papercore.experiments.parsing.config import QuickConfig
from papercore.experiments.parsing.examples import examples
from papercore.experiments.parsing.predictors import Scores
from papercore.experiments.parsing.probing import KINDS, TASKS, summary
from papercore.experiments.parsing.quick_parts import (
    CHECKS,
    KEPT,
    PROCESSES,
    made,
    make_parts,
    sentences_of,
    trained_model,
)
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.statistics import summarize
from papercore.parsing import english

NAMED = {0.25: "mlm_25", 0.5: "mlm_50", 0.75: "mlm_75", 1.0: "mlm"}


def run_quick(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Fill the record; every part is a stage, so that an interrupted run goes on."""
    threads = torch.get_num_threads()
    # The tensors are small: more threads only wait for each other, and the sums stay in one order.
    torch.set_num_threads(1)
    try:
        # A GPU is not shared.
        make_parts(config, stages, min(threads, PROCESSES) if config.torch_device().type == "cpu" else 1)
        _construction(config, record, stages)
        _truncation(config, record, stages)
        model = _masked_words(config, record, stages)
        _probes(config, record, stages, model)
    finally:
        torch.set_num_threads(threads)


def _masked_words(config: QuickConfig, record: Record, stages: Stages) -> nn.Module:
    """Train, test at checkpoints beside unigram, window and Bayes; the trained model."""
    words = len(english().vocabulary)
    part, model = made(("masked words", 0), config, stages), trained_model(config, stages)
    record.metric("weights", sum(p.numel() for p in model.parameters()), "exact")
    record.metric("words", words, "exact")
    record.metric("steps", config.steps, "exact")
    record.metric("bayes_ce", float(np.mean(part["bayes_nll"])), "rel:0.01")
    record.metric(
        "bayes_ce_se", float(np.std(part["bayes_nll"], ddof=1)) / len(part["bayes_nll"]) ** 0.5, "rel:0.1"
    )
    record.metric("bayes_accuracy", part["bayes_accuracy"], "abs:0.02")
    record.metric("model_accuracy", part["model_accuracy"], "abs:0.03")
    worst: dict[str, list[float]] = {"gap": [], "kl": []}
    names = {
        "unigram": -1,
        "window": -1,
        **{NAMED[share]: i for i, share in enumerate(CHECKS) if share in NAMED},
    }
    for name, check in names.items():
        kind = name if check < 0 else "model"
        nll, gap, kl = (torch.from_numpy(part[f"{kind}_{what}"]) for what in ("nll", "gap", "kl"))
        scores = Scores(nll, gap, kl) if check < 0 else Scores(nll[check], gap[check], kl[check])
        found = scores.summary()
        for what, value in found.items():
            record.metric(f"{name}_{what}", value, "rel:0.15" if what.endswith("_se") else "abs:0.06")
        worst["gap"].append(found["gap"] / found["gap_se"])
        worst["kl"].append(abs(found["gap"] - found["kl"]) / found["gap_minus_kl_se"])
    record.metric("predictors", len(names), "exact")
    record.metric("least_gap_z", min(worst["gap"]), "rel:0.3")
    record.metric("largest_gap_minus_kl_z", max(worst["kl"]), "abs:2")
    ahead = part["window_nll"] - part["model_nll"][-1]
    record.metric("window_minus_mlm", float(ahead.mean()), "abs:0.06")
    record.metric("window_minus_mlm_se", float(ahead.std(ddof=1)) / len(ahead) ** 0.5, "rel:0.2")
    record.metric("gap_closed", 1 - record.metrics["mlm_gap"] / record.metrics["unigram_gap"], "abs:0.05")
    record.array("check_steps", np.round(np.array(CHECKS) * config.steps))
    record.array("check_ce", part["model_nll"].mean(1).astype(np.float32))
    record.array("check_gap", part["model_gap"].mean(1).astype(np.float32))
    record.array(
        "check_gap_se",
        (part["model_gap"].std(1, ddof=1) / part["model_gap"].shape[1] ** 0.5).astype(np.float32),
    )
    record.array("check_kl", part["model_kl"].mean(1).astype(np.float32))
    record.array("token_bayes", np.exp(-part["bayes_nll"]).astype(np.float32))
    record.array("token_model", np.exp(-part["model_nll"][-1]).astype(np.float32))
    record.array("losses", part["losses"].reshape(-1, part["losses"].size // _curve_points(part)).mean(1))
    return model


def _curve_points(part: dict[str, Any]) -> int:
    """How many points the loss curve is kept at: the largest number up to 100 that divides the steps."""
    return max(k for k in range(1, 101) if part["losses"].size % k == 0)


def _probes(config: QuickConfig, record: Record, stages: Stages, model: nn.Module) -> None:
    parts = [made(("probes", seed), config, stages) for seed in range(config.probe_seeds)]
    scores = np.stack([one["scores"] for one in parts])  # [seeds, choose and test, tasks, kinds, layers + 1]
    for t, task in enumerate(TASKS):
        for k, kind in enumerate(KINDS):
            record.array(f"probe_{task}_{kind}", scores[:, 1, t, k])
    for name, value in summary(scores[:, 0], scores[:, 1]).items():
        record.metric(name, value, "abs:3" if name.endswith("_layer") else "abs:0.04")
    for name in ("right", "left", "io"):
        found = summarize([one[name] for one in parts])
        record.metric(f"{name}_f1", found.mean, "abs:0.02")
        record.metric(f"{name}_f1_se", found.se, "abs:0.02")
    record.metric("probe_seeds", config.probe_seeds, "exact")
    layer = int(record.metrics["marginal_mlp_layer"])
    told = stages.get(
        "examples",
        lambda: examples(config, model, sentences_of(config, config.probe_train, 90, trees=True), layer),
    )
    record.table("blanks", told["blank_columns"], told["blanks"])
    record.table("trees", told["tree_columns"], told["trees"])
    for name, value in told.items():
        if isinstance(value, np.ndarray):
            record.array(name, value)


def _construction(config: QuickConfig, record: Record, stages: Stages) -> None:
    seed = 1000 * config.seed
    rows = made(("equality", 0), config, stages)["rows"]
    columns = ["length", "grammar", "largest difference", "layers"]
    record.table("equality", columns, rows)
    record.metric("construction_difference", max(row[2] for row in rows), "abs:1e-10")
    record.metric("construction_layers_wrong", sum(row[3] != 2 * row[0] - 2 for row in rows), "exact")
    record.metric("construction_cases", len(rows), "exact")
    shifted = stages.get(
        "shifted", lambda: {"rows": constructing.equality(min(6, config.longest_equal), seed + 5, shift=1)}
    )
    finite = [row[2] for row in shifted["rows"]]
    record.metric("shifted_wrong", sum(not value < 0.01 for value in finite) / len(finite), "abs:0.5")
    for name, value in constructing.closed_forms().items():
        record.metric(name, value, "exact")
    for name, value in constructing.size_curves().items():
        record.array(name, np.array(value))


def _truncation(config: QuickConfig, record: Record, stages: Stages) -> None:
    grammar = english()
    inner, outer = len(grammar.nonterminals), len(grammar.preterminals)
    record.metric("in_terminals", inner, "exact")
    record.metric("pre_terminals", outer, "exact")
    rows = made(("truncation", 0), config, stages)["rows"]
    record.table("truncation", constructing.TRUNCATION_COLUMNS, rows)
    found = {(row[0], row[1]): row for row in rows}
    whole, moderate = found[inner, outer], found[min(KEPT[0], inner), min(KEPT[1], outer)]
    for name, row in (("whole", whole), ("kept", moderate)):
        record.metric(f"{name}_possible", row[4], "abs:0.01")
        record.metric(f"{name}_f1", row[5], "abs:0.01")
        record.metric(f"{name}_perplexity", row[6], "rel:0.02")
    record.metric("truncation_drop", whole[5] - moderate[5], "abs:0.01")
    merged = made(("merged heads", 0), config, stages)["rows"]
    record.table("merged", constructing.MERGED_COLUMNS, merged)
    for row in merged:
        record.metric(f"merged_{row[0]}_f1", row[4], "abs:0.03")
