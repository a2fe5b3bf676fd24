"""From the parts of a run to the record: metrics with their spread, arrays for the figures, tables.

Glossary
    k*         smallest k of the list whose accuracy is at least 95 % of the fine-tuned one; N where none is (all entries do)
    rel, gain  graft / fine-tuned accuracy; (graft - pre-trained) / (fine-tuned - pre-trained) accuracy
    found      name of a part -> what it returned
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from papercore.experiments.grafting.config import QuickConfig
from papercore.experiments.grafting.continual import PROTOCOLS, forgetting
from papercore.experiments.grafting.curves import smallest
from papercore.experiments.grafting.encoder import graftable
from papercore.experiments.grafting.laws import STEPS
from papercore.experiments.grafting.masks import RULES
from papercore.experiments.grafting.pretraining import pretrained
from papercore.experiments.grafting.trust import MEASURES, METHODS
from papercore.experiments.grafting.world import TASKS
from papercore.lab.record import Record
from papercore.lab.statistics import paired, summarize

Found = dict[str, dict[str, Any]]


def _several(found: Found, kind: str, task: str, key: str, seeds: int) -> np.ndarray:
    """One result of all seeds, stacked."""
    return np.stack([np.asarray(found[f"{kind} {task} {s}".replace("  ", " ")][key]) for s in range(seeds)])


def curves(config: QuickConfig, record: Record, found: Found, tasks: Sequence[str]) -> None:
    """Claims G1, G2, G3: how many entries, bit for bit, and against other rules."""
    ks, total = config.ks, sum(p.numel() for n, p in pretrained().named_parameters() if graftable(n))
    record.metric("weights", sum(p.numel() for p in pretrained().parameters()), "exact")
    record.metric("graftable", total, "exact")
    record.metric("literal_entries", math.floor(total * 1e-4), "exact")
    record.metric("seeds", config.seeds, "exact")
    record.array("ks", np.array(ks))
    pairs: dict[str, list[float]] = {rule: [] for rule in RULES}
    effect: list[float] = []
    kept: list[float] = []
    anew: list[float] = []
    wrong = 0
    for task in tasks:
        acc = _several(found, "curve", task, "accuracy", config.seeds)  # [seeds, rules, ks]
        before, after = (_several(found, "curve", task, key, config.seeds) for key in ("before", "after"))
        record.array(f"{task}_accuracy", acc)
        record.array(f"{task}_agreement", _several(found, "curve", task, "agreement", config.seeds))
        record.array(f"{task}_ends", np.stack([before, after], 1))
        record.array(f"{task}_paper", _several(found, "curve", task, "paper", config.seeds))
        record.array(f"{task}_biases", _several(found, "curve", task, "biases", config.seeds))
        record.metric(f"{task}_before", float(before.mean()), "abs:0.02")
        record.metric(f"{task}_after", float(after.mean()), "abs:0.03")
        stars = {}
        for r, rule in enumerate(RULES):
            own = [smallest(ks, acc[s, r], after[s]) or total for s in range(config.seeds)]
            stars[rule] = float(np.median(own))
            record.metric(f"{task}_k_{rule}", stars[rule], "rel:0.75")
        at = ks.index(int(stars["learned"])) if stars["learned"] in ks else len(ks) - 1
        record.metric(f"{task}_share", stars["learned"] / total, "rel:0.75")
        record.metric(f"{task}_ratio", stars["movement"] / stars["learned"], "rel:0.99")
        record.metric(f"{task}_gain", float(((acc[:, 0, at] - before) / (after - before)).mean()), "abs:0.08")
        effect.append(abs(float((acc[:, RULES.index("random"), at] - before).mean())))
        for r, rule in enumerate(RULES):
            pairs[rule] += acc[:, r, at].tolist()
        again = _several(found, "curve", task, "retrained", config.seeds)
        kept, anew = [*kept, *again[:, 1]], [*anew, *again[:, 2]]
        wrong += int(_several(found, "curve", task, "wrong_entries", config.seeds).sum())
        record.metric(f"{task}_literal", float(acc[:, 0, 0].mean() - before.mean()), "abs:0.03")
        record.metric(
            f"{task}_bytes", float(_several(found, "curve", task, "bytes", config.seeds).mean()), "rel:0.75"
        )
    record.metric("largest_share", max(record.metrics[f"{t}_share"] for t in tasks), "rel:0.75")
    record.metric("least_ratio", min(record.metrics[f"{t}_ratio"] for t in tasks), "rel:0.99")
    record.metric("random_effect", max(effect), "abs:0.02")
    for rule in RULES[1:]:
        gap = paired(pairs["learned"], pairs[rule])
        name = rule.replace("-", "_")
        record.metric(f"learned_minus_{name}", gap.difference, "abs:0.08")
        record.metric(f"learned_minus_{name}_se", gap.se, "abs:0.05")
        record.metric(f"learned_minus_{name}_p", gap.p, "abs:1")
    record.metric("wrong_entries", wrong, "exact")
    record.metric("retrained_accuracy", float(np.mean(anew)), "abs:0.03")
    record.metric("not_retrained_accuracy", float(np.mean(kept)), "abs:0.03")


def deranged(config: QuickConfig, record: Record, found: Found) -> None:
    """The task whose answers all have to move: the instructive failure."""
    acc = _several(found, "deranged", "topic", "accuracy", config.seeds)  # [seeds, 3 rules, ks]
    before, after = (_several(found, "deranged", "topic", key, config.seeds) for key in ("before", "after"))
    record.array("deranged_accuracy", acc)
    record.array("deranged_ks", np.array(config.deranged_ks))
    record.array("deranged_ends", np.stack([before, after], 1))
    record.metric("deranged_before", float(before.mean()), "abs:0.03")
    record.metric("deranged_after", float(after.mean()), "abs:0.03")
    for i, k in enumerate(config.deranged_ks):
        record.metric(f"deranged_rel_{k}", float((acc[:, 0, i] / after).mean()), "abs:0.2")


def multitask(config: QuickConfig, record: Record, found: Found) -> None:
    """Claims G6, G8, G10: overlap, unions, where the entries are."""
    names, seeds = list(TASKS), config.seeds
    acc = _several(found, "tasks", "", "accuracy", seeds)  # [seeds, subsets, tasks]
    subsets = found["tasks 0"]["subsets"]
    before, after = acc[:, subsets.index("none")], acc[:, subsets.index("all weights")]
    gain = (acc - before[:, None]) / (after - before)[:, None]
    record.array("union_accuracy", acc)
    record.array("union_gain", gain)
    record.array(
        "union_counts",
        np.array([[found[f"tasks {s}"]["union_counts"].get(n, 0) for n in subsets] for s in range(seeds)]),
    )
    rows = [[name, *acc[:, i].mean(0).tolist()] for i, name in enumerate(subsets)]
    record.table("unions", ["grafted", *names], rows)
    inside, outside = [], []
    for s in range(seeds):
        ins: list[float] = []
        outs: list[float] = []
        for i, name in enumerate(subsets):
            members = name.split(" + ")
            if len(members) != 2:
                continue
            for t, task in enumerate(names):
                (ins if task in members else outs).append(gain[s, i, t])
        inside.append(float(np.mean(ins)))
        outside.append(float(np.mean(outs)))
    for name, values in (("union_inside", inside), ("union_outside", outside)):
        told = summarize(values)
        record.metric(name, told.mean, "abs:0.1")
        record.metric(f"{name}_se", told.se, "abs:0.1")
    own = [gain[:, subsets.index(task), t].mean() for t, task in enumerate(names)]
    record.metric("own_gain", float(np.mean(own)), "abs:0.1")
    contained = _several(found, "tasks", "", "containment", seeds)  # [seeds, T, T]
    counts = _several(found, "tasks", "", "counts", seeds)
    total = found["tasks 0"]["total"]
    density = counts / total
    off = ~np.eye(len(names), dtype=bool)
    record.array("containment", contained)
    record.array("density", density)
    mean = [float(contained[s][off].mean()) for s in range(seeds)]
    chance = [float(np.repeat(density[s][:, None], len(names), 1)[off].mean()) for s in range(seeds)]
    above = paired(mean, chance)
    record.metric("overlap", float(np.mean(mean)), "abs:0.1")
    record.metric("overlap_chance", float(np.mean(chance)), "abs:0.05")
    record.metric("overlap_lift", float(np.mean(np.array(mean) / np.array(chance))), "rel:0.4")
    record.metric("overlap_above_chance_p", above.p, "abs:1")
    for t, task in enumerate(names):
        record.metric(f"{task}_density", float(density[:, t].mean()), "rel:0.4")
        record.metric(f"{task}_multi", float(after[:, t].mean()), "abs:0.03")
    _enrichment(record, _several(found, "tasks", "", "by_tensor", seeds), total)
    for task in names:
        for what in ("index", "values"):
            record.array(f"graft_{task}_{what}", found["tasks 0"][f"graft_{task}_{what}"])


def _enrichment(record: Record, counts: np.ndarray, total: int) -> None:
    """Share of the masks over share of the parameters, by tensor; counts [seeds, tasks, tensors]."""
    layers = [(n, p.numel()) for n, p in pretrained().named_parameters() if graftable(n)]
    kinds = [n.removeprefix("layers.").split(".", 1) for n, _ in layers]  # layer, module and kind
    sizes = np.array([size for _, size in layers])
    share = counts.sum(1) / counts.sum((1, 2))[:, None]  # [seeds, tensors], all tasks together
    record.array("enrichment", share / (sizes / total))
    record.array("enrichment_names", np.array([f"{layer} {kind}" for layer, kind in kinds]))
    norms = np.array(["norm" in kind for _, kind in kinds])
    told = summarize((share[:, norms].sum(1) / (sizes[norms].sum() / total)).tolist())
    record.metric("norm_enrichment", told.mean, "rel:0.5")
    record.metric("norm_enrichment_se", told.se, "abs:2")
    record.metric("norm_share", float(share[:, norms].sum(1).mean()), "abs:0.1")


def trust(config: QuickConfig, record: Record, found: Found, tasks: Sequence[str]) -> None:
    """Claims G4, G5, G13: calibration, the other domain, and the gap, each beside the controls."""
    rows = np.concatenate(
        [_several(found, "trust", task, "rows", config.seeds) for task in tasks]
    )  # [runs, methods, measures]
    record.array("trust", rows)
    record.array(
        "trust_before", np.concatenate([_several(found, "trust", t, "before", config.seeds) for t in tasks])
    )
    mean, se = rows.mean(0), rows.std(0, ddof=1) / len(rows) ** 0.5
    record.table(
        "trust", ["method", *MEASURES, *(f"{m} s.e." for m in MEASURES)],
        [[name, *mean[i], *se[i]] for i, name in enumerate(METHODS)],
    )  # fmt: skip
    at = {name: i for i, name in enumerate(METHODS)}
    of = {name: i for i, name in enumerate(MEASURES)}
    record.metric("trust_runs", len(rows), "exact")

    def column(method: str, measure: str) -> Any:
        return rows[:, at[method], of[measure]]

    tuned, graft = column("fine-tuned", "ece"), column("graft, learned", "ece")
    fewer = int((graft < tuned).sum())
    record.metric("ece_tuned", float(tuned.mean()), "abs:0.05")
    record.metric("ece_graft", float(graft.mean()), "abs:0.05")
    record.metric("ece_fewer", fewer, "abs:1")
    record.metric("ece_sign_p", sign_test(fewer, len(rows)), "abs:1")
    record.metric("ece_reduction", float(np.median(1 - graft / tuned)), "abs:0.25")
    for name, method in (("temperature", "temperature"), ("early", "stopped early"), ("wise", "WiSE-FT"), ("random", "graft, random"), ("movement", "graft, movement"), ("anew", "trained anew in the region")):  # fmt: skip
        record.metric(f"ece_{name}", float(column(method, "ece").mean()), "abs:0.05")
        record.metric(f"home_{name}", float(column(method, "home").mean()), "abs:0.04")
        for what, measure in (("ece", "ece"), ("away", "away")):
            told = paired(column("graft, learned", measure), column(method, measure))
            record.metric(f"{what}_graft_minus_{name}", told.difference, "abs:0.05")
            record.metric(f"{what}_graft_minus_{name}_se", told.se, "abs:0.05")
    for what in ("home", "away"):
        told = paired(column("graft, learned", what), column("fine-tuned", what))
        record.metric(f"{what}_tuned", float(column("fine-tuned", what).mean()), "abs:0.04")
        record.metric(f"{what}_graft", float(column("graft, learned", what).mean()), "abs:0.04")
        record.metric(f"{what}_graft_minus_tuned", told.difference, "abs:0.05")
        record.metric(f"{what}_graft_minus_tuned_se", told.se, "abs:0.05")
        record.metric(f"{what}_graft_minus_tuned_p", told.p, "abs:1")
    gap = {name: column(method, "train") - column(method, "home") for name, method in (("tuned", "fine-tuned"), ("graft", "graft, learned"))}  # fmt: skip
    for name, values in gap.items():
        record.metric(f"gap_{name}", float(values.mean()), "abs:0.05")
    record.metric("gap_p", paired(gap["graft"], gap["tuned"]).p, "abs:1")
    for name in ("fine-tuned", "graft, learned", "temperature"):
        every = np.concatenate(
            [_several(found, "trust", task, f"bins_{name}", config.seeds) for task in tasks]
        )
        count = every[:, 0].sum(0)
        weight = np.maximum(count, 1)
        bins = np.stack(
            [count, (every[:, 0] * every[:, 1]).sum(0) / weight, (every[:, 0] * every[:, 2]).sum(0) / weight]
        )
        record.array(f"bins_{name.replace(', ', '_').replace('-', '_')}", bins)


def sign_test(successes: int, n: int) -> float:
    """Two-sided p of at least so lopsided a count under a fair coin.

    >>> sign_test(6, 6), sign_test(3, 6)
    (0.03125, 1.0)
    """
    extreme = max(successes, n - successes)
    tail = sum(math.comb(n, i) for i in range(extreme, n + 1)) / 2**n
    return min(1.0, 2 * tail)


def continual(config: QuickConfig, record: Record, found: Found) -> None:
    """Claim G9: forgetting under both protocols, and what the newest task pays."""
    scores = _several(found, "stages", "", "scores", config.seeds)  # [seeds, protocols, stages + 1, tasks]
    record.array("stages", scores)
    record.array("stages_kept", _several(found, "stages", "", "kept", config.seeds))
    lost = {name: [forgetting(scores[s, p]) for s in range(config.seeds)] for p, name in enumerate(PROTOCOLS)}
    for name, values in lost.items():
        told = summarize(values)
        record.metric(f"forgetting_{name}", told.mean, "abs:0.1")
        record.metric(f"forgetting_{name}_se", told.se, "abs:0.1")
    record.metric("forgetting_p", paired(lost["grafts"], lost["plain"]).p, "abs:1")
    newest = scores[:, :, -1, -1]
    record.metric("newest_plain", float(newest[:, 0].mean()), "abs:0.05")
    record.metric("newest_grafts", float(newest[:, 1].mean()), "abs:0.05")
    record.metric("newest_cost", float((newest[:, 0] - newest[:, 1]).mean()), "abs:0.05")


def law(record: Record, found: Found) -> None:
    """Law (3): entries on against those predicted."""
    part = found["law sentiment 0"]
    rates, predicted, seen = (np.asarray(part[k], dtype=float) for k in ("rates", "predicted", "found"))
    record.array("law_rate_times_steps", rates * STEPS)
    record.array("law_predicted", predicted)
    record.array("law_found", seen)
    some = (predicted > 0) & (seen > 0)
    off = np.abs(np.log(seen[some] / predicted[some])) if some.any() else np.array([math.inf])
    record.metric("law_worst_factor", float(np.exp(off.max())), "rel:0.6")
