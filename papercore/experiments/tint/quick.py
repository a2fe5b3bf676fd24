"""The chapter at `quick` scale: every operation by itself, the whole step against autograd, and what it does to perplexity."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from papercore.experiments.tint import cost, differences, gradients, modules, perplexity, sizes, variants
from papercore.experiments.tint.auxiliaries import (
    auxiliary_from,
    documents_of,
    language_of,
    new_auxiliary,
    trained_part,
)
from papercore.experiments.tint.comparing import compare
from papercore.experiments.tint.comparing import perplexity as perplexity_of
from papercore.experiments.tint.config import QuickConfig
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.statistics import summarize

HALF = 0.5  # train fraction of comparisons at one fraction
EPSILONS = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)  # of the cosines against eps
FEW = 8  # documents that gradients are compared on
PLAYED_STEPS = (1, 2, 4)
VARIANT_EPS = 1e-3  # the paper's code's own; random weights have large gradients


def run_quick(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Fill the record; every part is a stage, so that an interrupted run goes on."""
    threads = torch.get_num_threads()
    # The tensors are small: more threads only wait for each other, and the sums stay in one order.
    torch.set_num_threads(1)
    try:
        _modules(config, record, stages)
        _sizes(record)
        trained = [
            stages.get(f"auxiliary {seed}", partial(trained_part, config, seed))
            for seed in range(config.seeds)
        ]
        _auxiliaries(config, record, trained)
        _gradients(config, record, stages, trained)
        _variants(config, record, stages)
        _perplexity(config, record, stages, trained)
        _without_names(config, record, stages)
        _cost(config, record, stages, trained)
    finally:
        torch.set_num_threads(threads)


def _modules(config: QuickConfig, record: Record, stages: Stages) -> None:
    seed = 1000 * config.seed

    def part() -> dict[str, Any]:
        curves = differences.curves(64, config.width, seed)
        share = differences.bound_share(seed)
        rows = modules.literal_linear(config.seed) + modules.other_modules(seed, config.fd_eps)
        softmax = {f"softmax_{k}": v for k, v in modules.softmax_errors(seed).items()}
        return {"rows": rows, "share": share, **{f"difference_{k}": v for k, v in curves.items()}, **softmax}

    part_ = stages.get("modules", part)
    record.table("modules", modules.COLUMNS, part_["rows"])
    for precision, moves in (("fp64", "abs:1e-14"), ("fp32", "abs:1e-6")):
        worst = max(row[3] for row in part_["rows"] if row[0].startswith("linear") and row[2] == precision)
        record.metric(f"linear_error_{precision}", worst, moves)
    record.array("difference_eps", np.array(differences.EPSILONS))
    record.array("softmax_eps", np.array(modules.SOFTMAX_EPSILONS))
    for name, values in part_.items():
        if isinstance(values, np.ndarray) and name != "share":
            record.array(name, values)
    for name in differences.FUNCTIONS:
        for kind in ("forward", "central"):
            errors = part_[f"difference_{name}_fp64_{kind}"]
            decades = 2.0 if kind == "forward" else 1.0
            slope = differences.slope(errors, differences.EPSILONS, decades=decades)
            record.metric(
                f"{name}_slope" if kind == "forward" else f"{name}_central_slope", slope, "abs:0.02"
            )
        best = part_[f"difference_{name}_fp32_forward"]
        record.metric(f"{name}_fp32_best_eps", differences.EPSILONS[int(best.argmin())], "rel:0.9")
        record.metric(f"{name}_fp32_best", float(best.min()), "rel:0.5")
        record.metric(f"{name}_fp32_at_1e_3", float(best[differences.EPSILONS.index(1e-3)]), "rel:0.5")
    record.metric("layernorm_bf16_best", float(part_["difference_layernorm_bf16_forward"].min()), "rel:0.5")
    share = part_["share"]
    record.metric("layernorm_bound_share", float(share.max()), "rel:0.05")
    record.metric("layernorm_bound_broken", int((share > 1).sum()), "exact")
    record.metric("layernorm_bound_cases", share.size, "exact")
    heaviest = part_[f"softmax_fp64_{max(modules.MASSES):.0e}"]
    record.metric("softmax_slope", differences.slope(heaviest, modules.SOFTMAX_EPSILONS), "abs:0.02")
    record.metric("softmax_fp32_best", float(part_["softmax_fp32_1e+04"].min()), "rel:0.5")


def _sizes(record: Record) -> None:
    rows = sizes.size_rows()
    record.table("sizes", sizes.COLUMNS, rows)
    for row in rows:
        name, found = sizes.metric_name(row[0]), dict(zip(sizes.COLUMNS, row, strict=True))
        record.metric(f"params_{name}", found["total"], "exact")
        record.metric(f"prefix_{name}", found["weights"], "exact")
        if row[0] == "OPT-125M":
            for what in ("forward", "backward", "descent", "unsplit"):
                record.metric(f"params_{name}_{what}", found[what], "exact")
            record.metric(f"params_{name}_not_shared", found["not shared"], "exact")
            record.metric("split_saving", found["unsplit"] / found["total"], "exact")
    off = record.metrics["params_opt_350m"] / sizes.REPORTED_350M - 1
    record.metric("params_opt_350m_off", off, "exact")


def _auxiliaries(config: QuickConfig, record: Record, trained: list[dict[str, Any]]) -> None:
    """How well the auxiliaries learned, and that attention is needed for it."""
    record.metric("seeds", config.seeds, "exact")
    record.metric("weights", sum(p.numel() for p in new_auxiliary(config, 0).parameters()), "exact")
    record.metric("vocabulary", language_of(config, 0).vocabulary, "exact")
    for kind in ("known", "test"):
        for name in ("model", "pair", "oracle"):
            record.metric(
                f"{kind}_{name}", float(np.mean([p[f"{kind}_{name}"].mean() for p in trained])), "abs:0.05"
            )
        for name in ("model", "pair"):
            record.metric(
                f"{kind}_{name}_recall", float(np.mean([p[f"{kind}_{name}_recall"] for p in trained])), "abs:0.1"
            )  # fmt: skip
    ahead = summarize([float((p["test_pair"] - p["test_model"]).mean()) for p in trained])
    record.metric("attention_gain", ahead.mean, "abs:0.05")
    record.metric("attention_gain_se", ahead.se, "abs:0.05")
    record.array("training_losses", np.stack([p["losses"] for p in trained]).astype(np.float32))


def _gradients(config: QuickConfig, record: Record, stages: Stages, trained: list[dict[str, Any]]) -> None:
    def of_seed(seed: int) -> dict[str, Any]:
        ids = documents_of(config, seed, "choose").input_ids[:FEW].to(config.torch_device())
        out: dict[str, Any] = {}
        for label, model in (
            ("random", new_auxiliary(config, seed)), ("trained", auxiliary_from(config, seed, trained[seed])),
        ):  # fmt: skip
            found = gradients.tensor_cosines(model, ids, HALF, fd_eps=config.fd_eps)
            out |= {
                f"{label}_stop": found.stop,
                f"{label}_full": found.full,
                f"{label}_dropped": found.dropped,
            }
            out["names"] = found.names
            out[f"{label}_eps"] = gradients.epsilon_cosines(model, ids, HALF, EPSILONS)
        return out

    parts = [stages.get(f"gradients, seed {s}", partial(of_seed, s)) for s in range(config.seeds)]
    names = parts[0]["names"]
    record.table("tensors", ["tensor"], [[name] for name in names])
    record.array("cosine_eps", np.array(EPSILONS))
    for label in ("random", "trained"):
        for target in ("stop", "full"):
            # [seeds, tensors, documents]
            values = np.stack([part[f"{label}_{target}"] for part in parts])
            record.array(f"cosines_{label}_{target}", values.mean(2))
            record.array(f"cosines_{label}_{target}_least", values.min((0, 2)))
        record.array(f"cosines_{label}_eps", np.mean([part[f"{label}_eps"] for part in parts], axis=0))
        record.metric(
            f"dropped_{label}", float(np.mean([part[f"{label}_dropped"] for part in parts])), "abs:0.1"
        )
    stop = np.stack([part["trained_stop"] for part in parts])
    full = record.arrays["cosines_trained_full"].mean(0)
    record.metric(
        "cos_stop_least", float(min(stop.min(), *(part["random_stop"].min() for part in parts))), "abs:1e-3"
    )
    record.metric("cos_full_least", float(full.min()), "abs:0.1")
    record.metric("cos_full_share", float((full > 0.9).mean()), "abs:0.2")
    record.metric(
        "cos_full_random_least", float(record.arrays["cosines_random_full"].mean(0).min()), "abs:0.1"
    )

    def end_to_end() -> dict[str, Any]:
        ids = documents_of(config, 0, "choose").input_ids[:FEW].to(config.torch_device())
        model = auxiliary_from(config, 0, trained[0])
        return {"rows": gradients.attribution(model, ids, HALF, 4e-3, config.fd_eps)}

    rows = stages.get("attribution", end_to_end)["rows"]
    record.table("attribution", gradients.ATTRIBUTION_COLUMNS, rows)
    for number, row in enumerate(rows):
        record.metric(f"end_to_end_{number}", row[2], "rel:0.5" if row[2] > 1e-8 else "abs:1e-8")


def _variants(config: QuickConfig, record: Record, stages: Stages) -> None:
    def part() -> dict[str, Any]:
        ids = documents_of(config, 0, "choose").input_ids[:FEW].to(config.torch_device())
        kinds = variants.tiny_variants(config) | variants.library_variants(config)
        epsilons = (VARIANT_EPS, config.fd_eps)
        return {
            "rows": [[label, *gradients.variant_row(model, ids, epsilons)] for label, model in kinds.items()]
        }

    rows = stages.get("variants", part)["rows"]
    columns = [
        "variant",
        "error of the first forward pass",
        "lowest cosine",
        "lowest cosine, larger ε",
        "names there",
        "names missing",
    ]
    record.table("variants", columns, rows)
    record.metric("variants", len(rows), "exact")
    record.metric("variant_eps", VARIANT_EPS, "exact")
    record.metric("variant_forward_most", max(row[1] for row in rows), "abs:1e-6")
    record.metric("variant_cos_least", min(row[2] for row in rows), "abs:1e-3")
    record.metric("variant_cos_least_larger_eps", min(row[3] for row in rows), "abs:0.01")
    record.metric("names_there", sum(row[4] for row in rows), "exact")
    record.metric("names_missing", sum(row[5] for row in rows), "exact")


def _perplexity(config: QuickConfig, record: Record, stages: Stages, trained: list[dict[str, Any]]) -> None:
    sweeps = [
        stages.get(f"rates, seed {s}", partial(perplexity.sweep_part, config, s, trained[s]))
        for s in range(config.seeds)
    ]
    record.array("fractions", np.array(config.fractions))
    record.array("rates", np.array(config.rates))
    for method in perplexity.METHODS:
        record.array(f"sweep_{method}", np.exp(np.stack([one[method].mean(-1) for one in sweeps])))
    chosen = [
        {m: perplexity.chosen_rates(config, sweeps, s, m) for m in ("tint", "dynamic")}
        for s in range(config.seeds)
    ]
    for method in ("tint", "dynamic"):
        record.array(f"chosen_{method}", np.array([one[method] for one in chosen]))
    parts = [
        stages.get(f"perplexity, seed {s}", partial(perplexity.report_part, config, s, trained[s], chosen[s]))
        for s in range(config.seeds)
    ]
    losses = {
        m: np.stack([part[m] for part in parts]) for m in perplexity.METHODS
    }  # [seeds, fractions, documents]
    for method, values in losses.items():
        record.array(f"ppl_{method}", np.exp(values.mean(2)))
    record.metric("documents", losses["tint"].shape[0] * losses["tint"].shape[2], "exact")
    columns = ["fraction", "vanilla", "tint", "dynamic", "gain", "gain low", "gain high", "p", "share better", "dynamic gain", "dynamic gain low", "dynamic gain high", "gap", "gap low", "gap high"]  # fmt: skip
    rows = []
    for number, fraction in enumerate(config.fractions):
        vanilla, tint, dynamic = (losses[m][:, number] for m in perplexity.METHODS)
        settings: dict[str, int] = {"resamples": config.resamples, "seed": 1000 * config.seed + number}
        own, other, gap = (
            compare(a, b, **settings) for a, b in ((vanilla, tint), (vanilla, dynamic), (tint, dynamic))
        )
        rows.append([
            fraction, perplexity_of(vanilla), perplexity_of(tint), perplexity_of(dynamic), own.gain, own.low, own.high, own.p, own.share,
            other.gain, other.low, other.high, gap.gain, gap.low, gap.high,
        ])  # fmt: skip
    record.table("perplexity", columns, rows)
    record.metric("gain_least", min(row[4] for row in rows), "abs:0.15")
    record.metric("gain_most", max(row[4] for row in rows), "abs:0.15")
    record.metric("dynamic_gain_least", min(row[9] for row in rows), "abs:0.15")
    record.metric("dynamic_gain_most", max(row[9] for row in rows), "abs:0.15")
    record.metric("sign_p_most", max(row[7] for row in rows), "abs:0.02")
    record.metric("gap_ratio_worst", max(abs(row[12]) / row[9] for row in rows), "abs:0.03")
    half = [part["stop"] for part in parts]
    at = config.fractions.index(HALF) if HALF in config.fractions else 0
    difference = [
        abs(perplexity_of(s) - perplexity_of(t[at])) for s, t in zip(half, losses["tint"], strict=True)
    ]
    record.metric("stop_minus_tint", max(difference), "abs:0.01")
    whole = np.stack([part["whole"] for part in parts])
    kept = [
        (perplexity_of(losses["vanilla"][:, n]) - perplexity_of(whole[:, n])) / row[9]
        for n, row in enumerate(rows)
    ]
    record.array("whole_kept", np.array(kept))
    record.metric("whole_kept_off_most", max(abs(k - 1) for k in kept), "abs:0.02")
    _steps(
        config,
        record,
        stages,
        trained,
        [one["tint"][at] for one in chosen],
        [one["dynamic"][at] for one in chosen],
    )
    _played(config, record, stages, trained[0])


def _without_names(config: QuickConfig, record: Record, stages: Stages) -> None:
    """The same comparison at one fraction in a language without names, where little hangs on attention: what the gap is made of."""
    plain = config.replace(name_rate=0.0, fractions=(HALF,))

    def part() -> dict[str, Any]:
        trained = trained_part(plain, 0)
        sweep = perplexity.sweep_part(plain, 0, trained)
        rates = {m: [plain.rates[int(sweep[m][0].mean(-1).argmin())]] for m in ("tint", "dynamic")}
        return {
            m: values for m, values in perplexity.report_part(plain, 0, trained, rates).items() if m != "stop"
        }

    found = {m: perplexity_of(values) for m, values in stages.get("without names", part).items()}
    record.metric("plain_gain", found["vanilla"] - found["tint"], "abs:0.15")
    record.metric("plain_dynamic_gain", found["vanilla"] - found["dynamic"], "abs:0.15")
    ratio = abs(found["tint"] - found["dynamic"]) / (found["vanilla"] - found["dynamic"])
    record.metric("plain_gap_ratio", ratio, "abs:0.04")


def _steps(
    config: QuickConfig, record: Record, stages: Stages, trained: list[dict[str, Any]], tint_rates: list[float], dynamic_rates: list[float]
) -> None:  # fmt: skip
    """1, 2, ... inner steps of the same total length: the chosen rate over the number of steps."""

    def of_seed(seed: int) -> dict[str, Any]:
        model = auxiliary_from(config, seed, trained[seed])
        ids = documents_of(config, seed, "test").input_ids.to(config.torch_device())
        out = {"cosines": gradients.step_cosines(
            model, ids[:FEW], HALF, tint_rates[seed] / config.most_steps, config.most_steps, config.fd_eps
        )}  # fmt: skip
        some = ids[: max(2, len(ids) // 2)]
        out["vanilla"] = perplexity.updated_losses(model, some, HALF, "vanilla", rate=0.0)
        for method, rate in (("tint", tint_rates[seed]), ("dynamic", dynamic_rates[seed])):
            out[method] = np.stack([
                perplexity.updated_losses(model, some, HALF, method, rate=rate / k, steps=k, fd_eps=config.fd_eps)
                for k in range(1, config.most_steps + 1)
            ])  # fmt: skip
        return out

    parts = [stages.get(f"steps, seed {s}", partial(of_seed, s)) for s in range(config.seeds)]
    vanilla = perplexity_of(np.stack([p["vanilla"] for p in parts]))
    found = {
        m: np.array([perplexity_of(np.stack([p[m][k] for p in parts])) for k in range(config.most_steps)])
        for m in ("tint", "dynamic")
    }
    record.metric("most_steps", config.most_steps, "exact")
    record.metric("steps_vanilla", vanilla, "rel:0.05")
    record.array("steps_tint", found["tint"])
    record.array("steps_dynamic", found["dynamic"])
    lowest = np.stack([p["cosines"] for p in parts]).min(0)  # [steps, 2]
    record.array("steps_cosines", lowest)
    record.metric("steps_cos_least", float(lowest[:, 1].min()), "abs:1e-3")
    ratio = np.abs(found["tint"] - found["dynamic"]) / (vanilla - found["dynamic"])
    record.metric("steps_gap_ratio_worst", float(ratio.max()), "abs:0.05")


def _played(config: QuickConfig, record: Record, stages: Stages, trained: dict[str, Any]) -> None:
    """Perplexity against the rate for every fraction, number of layers and steps, of few documents of those that choose rates."""

    def part() -> dict[str, Any]:
        model = auxiliary_from(config, 0, trained)
        ids = documents_of(config, 0, "choose").input_ids[:FEW].to(config.torch_device())
        out = np.zeros((len(config.fractions), config.layers, len(PLAYED_STEPS), len(config.rates)))
        for f, fraction in enumerate(config.fractions):
            mask = perplexity.train_mask(ids, fraction)
            for layer in range(config.layers):
                for s, steps in enumerate(PLAYED_STEPS):
                    for r, rate in enumerate(config.rates):
                        found = gradients.simulated(
                            model, ids, mask, inner_lr=rate, n_layers=layer + 1, n_steps=steps, fd_eps=config.fd_eps
                        )  # fmt: skip
                        out[f, layer, s, r] = np.exp(float(found.loss))
        vanilla = [
            perplexity.updated_losses(model, ids, f, "vanilla", rate=0.0).mean() for f in config.fractions
        ]
        return {"tint": out, "vanilla": np.exp(np.array(vanilla))}

    found = stages.get("played", part)
    record.array("played_tint", found["tint"])
    record.array("played_vanilla", found["vanilla"])


def _cost(config: QuickConfig, record: Record, stages: Stages, trained: list[dict[str, Any]]) -> None:
    rows = cost.flop_rows(config)
    record.table("flops", cost.FLOP_COLUMNS, rows)
    for row in rows:
        place = "gpt2" if row[0] == "GPT-2" else "own"
        record.metric(f"flop_ratio_{place}_{row[1]}", row[-1], "exact")

    def part() -> dict[str, Any]:
        model = auxiliary_from(config, 0, trained[0])
        ids = documents_of(config, 0, "test").input_ids[:FEW].to(config.torch_device())
        return {"counted": cost.counted(model, ids[:1], config), "times": cost.time_rows(config, model, ids)}

    found = stages.get("cost", part)
    record.metric("counted_ratio_fused", found["counted"]["fused"] / found["counted"]["dynamic"], "rel:0.02")
    record.metric(
        "counted_ratio_literal", found["counted"]["literal"] / found["counted"]["dynamic"], "rel:0.02"
    )
    record.table("times", cost.TIME_COLUMNS, found["times"])
    for way, documents, ratio, _, _ in found["times"]:
        place = "one" if documents == 1 else "many"
        key = {"TinT, fused": "fused", "TinT, literal heads": "literal", "dynamic evaluation": "full"}.get(
            way
        )
        if key:
            record.metric(f"time_ratio_{key}_{place}", ratio, "volatile")
