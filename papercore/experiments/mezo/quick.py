"""The chapter at `quick` scale: a model trained on the spot, few-shot runs of every method, and the theory on known ground.

Learning rates come from `tuning.json`, a record made by `tuning.py` on other seeds than those used here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from papercore.experiments.mezo import closed_forms, theory
from papercore.experiments.mezo.arms import (
    ARMS,
    few_shot,
    fine_tune,
    in_context,
    linear_probe,
    pretrain,
    run_mezo,
    test_sentences,
    zero_shot,
)
from papercore.experiments.mezo.config import QuickConfig
from papercore.experiments.mezo.step_memory import step_memory
from papercore.experiments.mezo.language import SEGMENT, TOPICS, VOCABULARY, Examples, bayes_accuracy
from papercore.experiments.mezo.replaying import log_and_replay
from papercore.lab.decoder import Decoder, DecoderConfig
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.statistics import paired, spearman, summarize

TUNING = Path(__file__).with_name("tuning.json")
CHANCE = 1.0 / TOPICS
MAIN_ARMS = ("full", "rademacher", "norms_biases", "lora", "prefix", "no_prompt", "no_pretraining", "accuracy", "adam")
BUDGET_ARMS = ("n4", "n16", "one_point")
VARIATIONS = ("eps_1e-4", "eps_1e-2", "batch_8", "decayed", "longer")
SHOT_ARMS = ("full", "lora", "prefix", "accuracy")
CHECKPOINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def new_model(config: QuickConfig, seed: int) -> Decoder:
    """The decoder of this scale, untrained."""
    sizes = DecoderConfig(VOCABULARY, width=64, layers=2, heads=4, context=SEGMENT * max(config.segments, TOPICS + 1) + 4)
    return Decoder(sizes, generator=torch.Generator().manual_seed(seed)).to(config.torch_device())


def pretrained(config: QuickConfig, seed: int, stages: Stages) -> dict[int, dict[str, np.ndarray]]:
    """Weights after each share of pretraining in CHECKPOINTS, by step."""
    keep = [round(share * config.pretrain_steps) for share in CHECKPOINTS]

    def part() -> dict[str, Any]:
        model = new_model(config, seed)
        losses, kept = pretrain(model, config.pretrain_steps, config.pretrain_batch, config.pretrain_lr, config.segments, np.random.default_rng([seed, 0]), keep)
        return {"losses": losses, **{f"{step}:{name}": w.cpu().numpy() for step, weights in kept.items() for name, w in weights.items()}}

    stored = stages.get("pretraining", part)
    out: dict[int, dict[str, Any]] = {step: {} for step in keep}
    for key, value in stored.items():
        step, colon, name = key.partition(":")
        if colon:
            out[int(step)][name] = value
    return out


def with_weights(config: QuickConfig, seed: int, weights: dict[str, np.ndarray]) -> Decoder:
    model = new_model(config, seed)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    return model


def chosen_rates() -> dict[str, float]:
    """Learning rate of each arm, as chosen by the tuning run."""
    if not TUNING.is_file():
        raise ValueError(f"{TUNING.name} is missing: make it with `python -m papercore.experiments.mezo.tuning`.")
    return {name.removeprefix("lr_"): value for name, value in json.loads(TUNING.read_text())["metrics"].items() if name.startswith("lr_")}


def run_quick(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Fill the record; every part is a stage, so that an interrupted run goes on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other, and the sums stay in one order
    try:
        _few_shot_part(config, record, stages)
        _theory_part(config, record, stages)
    finally:
        torch.set_num_threads(threads)


def _few_shot_part(config: QuickConfig, record: Record, stages: Stages) -> None:
    device, base = config.torch_device(), 1000 * config.seed
    weights = pretrained(config, base, stages)
    final_step = max(weights)
    model, untrained = with_weights(config, base, weights[final_step]), with_weights(config, base, weights[0])
    test = test_sentences(config.tests, base)
    record.metric("bayes", bayes_accuracy(test), "exact")
    record.metric("weights", sum(p.numel() for p in model.parameters()), "exact")
    test = test.to(device)
    seeds = [base + i for i in range(config.seeds)]
    rates = chosen_rates()
    eval_at = sorted({0, *(round(config.steps * share) for share in (0.1, 0.25, 0.5, 1.0))})
    k = max(config.shots)

    def sample(shots: int, seed: int) -> Examples:
        return few_shot(shots, seed).to(device)

    def runs(name: str, shots: int, at: Sequence[int], which: Sequence[int]) -> list[dict[str, Any]]:
        arm = ARMS[name]
        start = model if arm.pretrained else untrained
        lr = rates[name] if arm.grid else rates["full"]
        return [
            stages.get(
                f"{name}/k{shots}/seed{seed}",
                lambda seed=seed: run_mezo(start, arm, lr, sample(shots, seed), test, steps=config.steps, seed=seed, eval_at=at),
            )
            for seed in which
        ]

    results: dict[str, list[dict[str, Any]]] = {}
    for name in MAIN_ARMS:
        results[name] = runs(name, k, eval_at, seeds)
    few = seeds[: max(3, (len(seeds) + 1) // 2)]
    for name in (*BUDGET_ARMS, *VARIATIONS):
        results[name] = runs(name, k, (0,), seeds if name in BUDGET_ARMS else few)
    _references(config, record, stages, model, test, seeds, sample, rates, runs, results)
    _curves(record, results, eval_at)
    _main_claims(record, results, len(seeds))
    _variation_claims(record, results, len(few))
    _checkpoints(config, record, stages, weights, seeds[:3], sample, test, rates)
    replayed = stages.get("replay", lambda: log_and_replay(model, rates["full"], sample(k, seeds[0]), test, steps=config.steps, seed=seeds[0]))
    record.metric("replay_largest_difference", replayed["difference"], "exact")
    record.metric("log_bytes_20000_steps", replayed["bytes_20000"], "rel:0.02")
    record.array("replay_at", replayed["at"])
    record.array("replay_accuracy", replayed["accuracy"])


def _references(
    config: QuickConfig, record: Record, stages: Stages, model: Decoder, test: Examples, seeds: list[int], sample: Callable[[int, int], Examples],
    rates: dict[str, float], runs: Callable[..., list[dict[str, Any]]], results: dict[str, list[dict[str, Any]]],
) -> None:  # fmt: skip
    """Zero-shot, in-context, probe and backpropagation at every k, and the MeZO arms at the smaller k: the bar chart."""
    table: list[list[Any]] = []
    plain = stages.get("zero_shot", lambda: {"final": zero_shot(model, test)})["final"]
    record.metric("zero_shot", plain, "abs:0.1")
    for shots in config.shots:
        def over(name: str, fn: Callable[[int], float], shots: int = shots) -> list[float]:
            return [stages.get(f"{name}/k{shots}/seed{seed}", lambda seed=seed: {"final": fn(seed)})["final"] for seed in seeds]

        values = {
            "zero-shot": [plain] * len(seeds),
            "in-context": over("icl", lambda seed, shots=shots: in_context(model, sample(shots, seed), test, seed=seed)),
            "linear probe": over("probe", lambda seed, shots=shots: linear_probe(model, sample(shots, seed), test)),
            "fine-tuning (Adam)": over("adam_ft", lambda seed, shots=shots: fine_tune(model, rates["ft"], sample(shots, seed), test, steps=config.backprop_steps, seed=seed)["final"]),
        }
        for name in SHOT_ARMS:
            done = results[name] if shots == max(config.shots) else runs(name, shots, (0,), seeds)
            values[f"MeZO {name}"] = [r["final"] for r in done]
        for name, numbers in values.items():
            s = summarize(numbers)
            table.append([name, shots, s.mean, s.std, s.n, *numbers])
        if shots == max(config.shots):
            for metric, name in (("icl", "in-context"), ("lp", "linear probe"), ("ft", "fine-tuning (Adam)")):
                s = summarize(values[name])
                record.metric(f"{metric}_mean", s.mean, "abs:0.05")
                record.metric(f"{metric}_std", s.std, "abs:0.05")
            mezo = values["MeZO full"]
            for metric, name in (("zero_shot", "zero-shot"), ("icl", "in-context"), ("lp", "linear probe"), ("ft", "fine-tuning (Adam)")):
                test_of = paired(mezo, values[name])
                record.metric(f"mezo_minus_{metric}", test_of.difference, "abs:0.05")
                record.metric(f"mezo_minus_{metric}_se", test_of.se, "abs:0.05")
                record.metric(f"mezo_minus_{metric}_p", test_of.p, "abs:0.2")
    record.table("few_shot", ["method", "k", "mean", "std", "seeds", *(f"seed {i}" for i in range(len(seeds)))], table)


def _curves(record: Record, results: dict[str, list[dict[str, Any]]], eval_at: Sequence[int]) -> None:
    record.array("eval_at", eval_at)
    for name in MAIN_ARMS:
        record.array(f"curve_{name}", [r["curve"] for r in results[name]])
        record.array(f"losses_{name}", [r["losses"] for r in results[name]])


def _main_claims(record: Record, results: dict[str, list[dict[str, Any]]], n: int) -> None:
    record.metric("seeds", n, "exact")
    for name in (*MAIN_ARMS, *BUDGET_ARMS):
        s = summarize([r["final"] for r in results[name]])
        record.metric(f"{name}_mean", s.mean, "abs:0.05")
        record.metric(f"{name}_std", s.std, "abs:0.06")
    middle = [r["at"].index(sorted(r["at"])[-2]) for r in results["full"]][0]
    for name in ("full", "no_prompt", "no_pretraining"):
        record.metric(f"{name}_halfway", float(np.mean([r["curve"][middle] for r in results[name]])), "abs:0.08")
    for name in ("full", "lora", "prefix", "norms_biases"):
        record.metric(f"{name}_trained", results[name][0]["trained"], "exact")
        reached = [first_below(r["losses"], 0.5) for r in results[name]]
        record.metric(f"{name}_steps_to_half_nat", float(np.mean(reached)), "rel:0.4")
    record.metric("accuracy_minus_zero_shot_in_std", (record.metrics["accuracy_mean"] - record.metrics["zero_shot"]) / max(record.metrics["accuracy_std"], 1e-3), "rel:0.8")
    for name in ("n4", "n16", "one_point"):
        gap = paired([r["final"] for r in results["full"]], [r["final"] for r in results[name]])
        record.metric(f"full_minus_{name}", gap.difference, "abs:0.08")
        record.metric(f"full_minus_{name}_se", gap.se, "abs:0.05")


def first_below(losses: Sequence[float], level: float) -> float:
    """The first step at which a running mean of five losses is below `level`; the number of steps + 1 when it never is."""
    smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
    below = np.flatnonzero(smooth < level)
    return float(below[0] + 5) if below.size else float(len(losses) + 1)


def _variation_claims(record: Record, results: dict[str, list[dict[str, Any]]], n: int) -> None:
    rows = [[name, *(summarize([r["final"] for r in results[name][:n]]).mean, summarize([r["final"] for r in results[name][:n]]).std), n] for name in ("full", *VARIATIONS)]
    record.table("variations", ["what changes", "mean", "std", "seeds"], rows)
    for name in VARIATIONS:
        gap = paired([r["final"] for r in results[name]], [r["final"] for r in results["full"][:n]])
        record.metric(f"{name}_minus_full", gap.difference, "abs:0.08")


def _checkpoints(
    config: QuickConfig, record: Record, stages: Stages, weights: dict[int, dict[str, np.ndarray]], seeds: list[int],
    sample: Callable[[int, int], Examples], test: Examples, rates: dict[str, float],
) -> None:  # fmt: skip
    """MeZO from every pretraining checkpoint, and in-context learning on the same ones."""
    k, rows = max(config.shots), []
    for step, state in sorted(weights.items()):
        start = with_weights(config, 1000 * config.seed, state)

        def part(start: Decoder = start) -> dict[str, Any]:
            tuned = [run_mezo(start, ARMS["full"], rates["full"], sample(k, s), test, steps=config.steps, seed=s, eval_at=())["final"] for s in seeds]
            shown = [in_context(start, sample(k, s), test, seed=s) for s in seeds]
            return {"mezo": tuned, "icl": shown, "zero": zero_shot(start, test)}

        got = stages.get(f"checkpoint{step}", part)
        mezo = summarize(got["mezo"])
        rows.append([step, mezo.mean, mezo.std, float(np.mean(got["icl"])), got["zero"]])
    record.table("checkpoints", ["pretraining steps", "MeZO", "MeZO std", "in-context", "zero-shot"], rows)
    record.metric("pretraining_spearman", spearman([r[0] for r in rows], [r[1] for r in rows]), "abs:0.35")


def _theory_part(config: QuickConfig, record: Record, stages: Stages) -> None:
    seed = 1000 * config.seed
    rows, worst = [], 0.0
    for i, (d, n, dist) in enumerate([(50, 1, "gaussian"), (50, 1, "sphere"), (50, 1, "rademacher"), (50, 4, "gaussian"), (50, 4, "sphere"), (50, 4, "rademacher"), (200, 1, "gaussian")]):
        got = stages.get(f"moment{i}", lambda d=d, n=n, dist=dist, i=i: dict(zip(("mean", "se", "closed"), theory.second_moment(d, n, dist, config.draws, seed + i), strict=True)))
        rows.append([dist, d, n, got["mean"], got["se"], got["closed"]])
        worst = max(worst, abs(got["mean"] - got["closed"]) / got["se"])
    record.table("second_moment", ["directions", "d", "n", "measured", "se", "closed form"], rows)
    record.metric("second_moment_worst_z", worst, "abs:0.5")
    bounds, worst = [], 0.0
    for i, (d, r, n) in enumerate([(100, 4, 1), (100, 16, 1), (100, 16, 4), (1000, 16, 1)]):
        got = stages.get(f"bound{i}", lambda d=d, r=r, n=n, i=i: dict(zip(("mean", "se", "closed"), theory.one_step_bound(d, r, n, min(config.draws, 5000), seed + 50 + i), strict=True)))
        bounds.append([d, r, n, got["mean"], got["se"], got["closed"]])
        worst = max(worst, abs(got["mean"] - got["closed"]) / got["se"])
    record.table("one_step", ["d", "r", "n", "measured", "se", "1 - 1/gamma"], bounds)
    record.metric("one_step_worst_z", worst, "abs:0.5")
    rates = stages.get("rates", lambda: {"rows": theory.rates(seed)})["rows"]
    record.table("rates", ["family", "r", "d", "seed 0", "seed 1", "seed 2"], rates)
    mean = {(row[0], row[2]): float(np.mean(row[3:])) for row in rates}
    record.metric("rank_spread_over_dimension", max(max(mean[f"rank {r}", d] for d in (100, 10_000)) / min(mean[f"rank {r}", d] for d in (100, 10_000)) for r in (2, 8, 32)), "rel:0.2")
    record.metric("rank_exponent", theory.slope_of_logs([2, 8, 32], [mean[f"rank {r}", 10_000] for r in (2, 8, 32)]), "abs:0.15")
    record.metric("isotropic_exponent", theory.slope_of_logs([8, 32, 128, 512], [mean["isotropic", d] for d in (8, 32, 128, 512)]), "abs:0.1")
    drift = stages.get("drift", lambda: {"rows": theory.rounding_drift(config.drift_weights, config.drift_steps, seed + 99)})["rows"]
    record.table("drift", list(theory.DRIFT_COLUMNS), drift)
    record.metric("drift_fp16_official", drift[1][1], "rel:0.1")
    record.metric("drift_fp16_exact", drift[1][4], "rel:0.1")
    record.metric("replay_gap_all_dtypes", max(row[5] for row in drift), "exact")
    history = stages.get("history", lambda: {"adam": theory.history_gap(64, 50, seed, (0.9, 0.99), 0.0), "momentum": theory.history_gap(64, 50, seed, None, 0.9)})
    record.metric("history_adam_gap", history["adam"], "abs:1e-7")
    record.metric("history_momentum_gap", history["momentum"], "abs:1e-7")
    memory = stages.get("memory", lambda: step_memory(config.torch_device()))
    for name in ("mezo_extra", "chunk", "largest_weight", "naive_extra", "adam_peak", "weights_bytes", "forward_peak"):
        record.metric(f"memory_{name}", memory[name], "rel:0.2")
    closed_forms.record_all(record)
