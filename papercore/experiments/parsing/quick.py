"""The chapter at `quick` scale: a masked language model of our own grammar beside its Bayes-optimal predictor, what probes find in
it, and the transformer that is built and not trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papercore.experiments.parsing import constructing
from papercore.experiments.parsing.config import QuickConfig
from papercore.experiments.parsing.corpus import Sentences, draw, one_mask
from papercore.experiments.parsing.examples import examples
from papercore.experiments.parsing.masked_lm import log_probabilities, make_model, train_model
from papercore.experiments.parsing.predictors import Counts, Scores, posterior
from papercore.experiments.parsing.probing import KINDS, TASKS, bound, probe_seed, summary
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.statistics import summarize
from papercore.parsing import english

# Shares of the training run after which the model is tested.
CHECKS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
NAMED = {0.25: "mlm_25", 0.5: "mlm_50", 0.75: "mlm_75", 1.0: "mlm"}
KEPT = (20, 45)  # in-terminals and pre-terminals that the paper keeps


def run_quick(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Fill the record; every part is a stage, so that an interrupted run goes on."""
    threads = torch.get_num_threads()
    # The tensors are small: more threads only wait for each other, and the sums stay in one order.
    torch.set_num_threads(1)
    try:
        _construction(config, record, stages)
        _truncation(config, record, stages)
        model = _masked_words(config, record, stages)
        _probes(config, record, stages, model)
    finally:
        torch.set_num_threads(threads)


def new_model(config: QuickConfig) -> nn.Module:
    """The model of this scale, untrained."""
    model = make_model(
        len(english().vocabulary), width=config.width, layers=config.layers, heads=config.heads,
        max_length=config.max_length, seed=1000 * config.seed,
    )  # fmt: skip
    return model.to(config.torch_device())


def sentences_of(config: QuickConfig, n: int, number: int, *, trees: bool = False) -> Sentences:
    """n sentences; every use has a number of its own, and so sentences of its own."""
    return draw(english(), n, config.min_length, config.max_length, 1000 * config.seed + number, trees=trees)


def _masked_words(config: QuickConfig, record: Record, stages: Stages) -> nn.Module:
    """Train, test at checkpoints beside unigram, window and Bayes; the trained model."""
    words = len(english().vocabulary)
    part = stages.get("masked words", lambda: _train_and_test(config))
    model = new_model(config)
    model.load_state_dict(
        {k.removeprefix("w:"): torch.from_numpy(v) for k, v in part.items() if k.startswith("w:")}
    )
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


def _train_and_test(config: QuickConfig) -> dict[str, Any]:
    grammar = english()
    words = len(grammar.vocabulary)
    training, tests = sentences_of(config, config.sentences, 1), sentences_of(config, config.tests, 2)
    ids, position, targets = one_mask(tests, words, 1000 * config.seed + 3)
    bayes = posterior(grammar, ids, tests.lengths, position)
    counts = Counts.of(training, words)
    out: dict[str, Any] = {}
    for name, log_q in (
        ("unigram", counts.word.expand(len(ids), -1)),
        ("window", counts.window(ids, tests.lengths, position)),
    ):
        out |= {f"{name}_{k}": v for k, v in _arrays(Scores.of(log_q, bayes, targets)).items()}
    model, optimizer, done = new_model(config), None, 0
    losses: list[float] = []
    found: list[dict[str, np.ndarray]] = []
    for share in CHECKS:
        until = round(share * config.steps)
        if until > done:
            more, optimizer = train_model(
                model, training, steps=config.steps, done=done, until=until, batch=config.batch, lr=config.lr,
                warmup=config.warmup, mask_rate=config.mask_rate, seed=1000 * config.seed + 4, optimizer=optimizer,
            )  # fmt: skip
            losses, done = losses + more, until
        log_q = log_probabilities(model, ids, tests.lengths, position)
        found.append(_arrays(Scores.of(log_q, bayes, targets)))
    rows = torch.arange(len(ids))
    out |= {f"model_{k}": np.stack([one[k] for one in found]) for k in found[0]}
    out |= {
        "bayes_nll": -bayes[rows, targets].log().numpy(),
        "bayes_accuracy": _accuracy(bayes, targets),
        "model_accuracy": _accuracy(log_q, targets),
        "losses": np.array(losses),
    }
    return out | {f"w:{k}": v.cpu().numpy() for k, v in model.state_dict().items()}


def _arrays(scores: Scores) -> dict[str, np.ndarray]:
    return {"nll": scores.nll.numpy(), "gap": scores.gap.numpy(), "kl": scores.kl.numpy()}


def _accuracy(scores: Tensor, targets: Tensor) -> float:
    return float((scores.argmax(1) == targets).double().mean())


def _probes(config: QuickConfig, record: Record, stages: Stages, model: nn.Module) -> None:
    sizes = (config.probe_train, config.probe_choose, config.probe_test)

    def part(seed: int) -> dict[str, Any]:
        pool = sentences_of(config, sum(sizes), 100 + seed, trees=True)
        return probe_seed(
            model, english(), pool, sizes, 1000 * config.seed + seed, spans=config.probe_spans, steps=config.probe_steps
        )  # fmt: skip

    parts = [stages.get(f"probes, seed {seed}", bound(part, seed)) for seed in range(config.probe_seeds)]
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
    rows = stages.get("equality", lambda: {"rows": constructing.equality(config.longest_equal, seed + 5)})[
        "rows"
    ]
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
    kept = sorted(
        {
            (min(i, inner), min(p, outer))
            for i in (*config.kept_in, KEPT[0], inner)
            for p in (*config.kept_pre, outer)
        },
        reverse=True,
    )
    tests = sentences_of(config, config.truncation_tests, 50, trees=True)

    def part() -> dict[str, Any]:
        counts = Counts.of(sentences_of(config, 20_000, 51), len(grammar.vocabulary))
        rows = constructing.truncated_scores(grammar, tests, counts.word.exp(), kept, 1000 * config.seed + 52)
        return {"rows": rows}

    rows = stages.get("truncation", part)["rows"]
    record.table("truncation", constructing.TRUNCATION_COLUMNS, rows)
    found = {(row[0], row[1]): row for row in rows}
    whole, moderate = found[inner, outer], found[min(KEPT[0], inner), min(KEPT[1], outer)]
    for name, row in (("whole", whole), ("kept", moderate)):
        record.metric(f"{name}_possible", row[4], "abs:0.01")
        record.metric(f"{name}_f1", row[5], "abs:0.01")
        record.metric(f"{name}_perplexity", row[6], "rel:0.02")
    record.metric("truncation_drop", whole[5] - moderate[5], "abs:0.01")
    merged = stages.get("merged heads", lambda: {"rows": _merged(config)})["rows"]
    record.table("merged", ["rank", "numbers of a state", "layers", "heads", "F1"], merged)
    for row in merged:
        record.metric(f"merged_{row[0]}_f1", row[4], "abs:0.03")


def _merged(config: QuickConfig) -> list[list[float]]:
    """Merged heads on sentences of at most 12 words, which are enough and need few layers."""
    grammar, longest = english(), min(12, config.max_length)
    sample, tests = (
        draw(
            grammar,
            config.truncation_tests,
            config.min_length,
            longest,
            1000 * config.seed + number,
            trees=True,
        )
        for number in (60, 61)
    )
    kept = (min(KEPT[0], len(grammar.nonterminals)), min(KEPT[1], len(grammar.preterminals)))
    ranks = [rank for rank in config.ranks if rank <= kept[0]]
    return constructing.merged_scores(grammar, sample, tests, kept, ranks)
