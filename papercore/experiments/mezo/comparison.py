"""The few-shot half of the quick chapter: every method on the same samples, and the numbers that its claims rest on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from papercore.experiments.mezo.arms import (
    ARMS,
    few_shot,
    fine_tune,
    in_context,
    linear_probe,
    run_mezo,
    zero_shot,
)
from papercore.experiments.mezo.config import QuickConfig
from papercore.experiments.mezo.language import Examples
from papercore.lab.decoder import Decoder
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.statistics import paired, spearman, summarize

MAIN_ARMS = (
    "full",
    "rademacher",
    "norms_biases",
    "lora",
    "prefix",
    "no_prompt",
    "no_pretraining",
    "accuracy",
    "adam",
)
BUDGET_ARMS = ("n4", "n16", "one_point")
VARIATIONS = ("eps_1e-4", "eps_1e-2", "batch_8", "decayed", "longer")
SHOT_ARMS = ("full", "lora", "prefix", "accuracy")
REFERENCES = {"zero_shot": "zero-shot", "icl": "in-context", "lp": "linear probe", "ft": "fine-tuning (Adam)"}
LATE = (
    1 / 6
)  # share of the run from which arms with many directions a step can be compared: before, they have no update
HALF_A_NAT = 0.5  # the training loss at which the speed of two arms is compared

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What all runs share: models, test sentences, seeds, learning rates.

    `seeds` are the samples of every main comparison; `few` the first of them, for what is asked more coarsely.
    """

    config: QuickConfig
    stages: Stages
    model: Decoder
    untrained: Decoder
    test: Examples
    seeds: tuple[int, ...]
    few: tuple[int, ...]
    rates: dict[str, float]

    @property
    def k(self) -> int:
        """Examples per topic of the main comparison."""
        return max(self.config.shots)

    @property
    def eval_at(self) -> list[int]:
        """Steps at which the learning curves are tested: often at the start, where most is learned."""
        shares = (1 / 48, 1 / 24, 1 / 12, LATE, 1 / 3, 2 / 3, 1)
        return sorted({0, *(round(self.config.steps * share) for share in shares)})

    def sample(self, shots: int, seed: int) -> Examples:
        return few_shot(shots, seed).to(self.config.torch_device())

    def runs(self, name: str, shots: int, seeds: Sequence[int]) -> list[Run]:
        """One arm over seeds, with a learning curve where k is largest; one without a grid has the learning rate of `full`."""
        arm = ARMS[name]
        at = self.eval_at if shots == self.k else (0,)
        start = self.model if arm.pretrained else self.untrained
        lr = self.rates[name] if arm.grid else self.rates["full"]

        def one(seed: int) -> Run:
            data = self.sample(shots, seed)
            return run_mezo(start, arm, lr, data, self.test, steps=self.config.steps, seed=seed, eval_at=at)

        return [self.stages.get(f"{name}/k{shots}/seed{s}", functools.partial(one, s)) for s in seeds]

    def checkpoint(self, step: int, start: Decoder) -> Run:
        """MeZO, in-context learning and the bare prompt from one checkpoint of pretraining."""

        def part() -> Run:
            tuned = [
                run_mezo(
                    start, ARMS["full"], self.rates["full"], self.sample(self.k, s), self.test,
                    steps=self.config.steps, seed=s, eval_at=(),
                )["final"]
                for s in self.few
            ]  # fmt: skip
            shown = [in_context(start, self.sample(self.k, s), self.test, seed=s) for s in self.few]
            return {"mezo": tuned, "icl": shown, "zero": zero_shot(start, self.test)}

        return self.stages.get(f"checkpoint{step}", part)

    def over_seeds(self, name: str, shots: int, accuracy: Callable[[int], float]) -> list[float]:
        """A reference method over seeds."""

        def one(seed: int) -> Run:
            return {"final": accuracy(seed)}

        return [
            self.stages.get(f"{name}/k{shots}/seed{s}", functools.partial(one, s))["final"]
            for s in self.seeds
        ]


def all_runs(config: QuickConfig, seeds: Sequence[int], few: Sequence[int]) -> list[tuple[str, int, int]]:
    """(arm, examples per topic, seed) of every MeZO run of `compare`: they do not need one another."""
    most = max(config.shots)
    runs = [(name, most, seed) for name in (*MAIN_ARMS, *BUDGET_ARMS) for seed in seeds]
    runs += [(name, most, seed) for name in VARIATIONS for seed in few]
    return runs + [(name, k, seed) for k in config.shots if k != most for name in SHOT_ARMS for seed in seeds]


def area(run: Run, least: float = 1) -> float:
    """Mean test accuracy along the learning curve from step `least` on: how fast and how far in one number."""
    return float(
        np.mean([accuracy for at, accuracy in zip(run["at"], run["curve"], strict=True) if at >= least])
    )


def compare(shared: Comparison, record: Record) -> None:
    """Run everything and fill the record."""
    results = {name: shared.runs(name, shared.k, shared.seeds) for name in MAIN_ARMS}
    results |= {name: shared.runs(name, shared.k, shared.seeds) for name in BUDGET_ARMS}
    results |= {name: shared.runs(name, shared.k, shared.few) for name in VARIATIONS}
    _references(shared, record, results)
    _curves(shared, record, results)
    _arms(shared, record, results)
    _speed(record, results)
    _budget(shared, record, results)
    _variations(shared, record, results)


def _references(shared: Comparison, record: Record, results: dict[str, list[Run]]) -> None:
    """Zero-shot, in-context, probe and backpropagation at every k beside the MeZO arms: the bar chart and two claims."""
    config, model, test = shared.config, shared.model, shared.test
    plain = shared.stages.get("zero_shot", lambda: {"final": zero_shot(model, test)})["final"]
    record.metric("zero_shot", plain, "abs:0.15")
    table: list[list[Any]] = []
    for shots in config.shots:

        def shown(seed: int, shots: int = shots) -> float:
            return in_context(model, shared.sample(shots, seed), test, seed=seed)

        def probed(seed: int, shots: int = shots) -> float:
            return linear_probe(model, shared.sample(shots, seed), test)

        def tuned(seed: int, shots: int = shots) -> float:
            data = shared.sample(shots, seed)
            return fine_tune(model, shared.rates["ft"], data, test, steps=config.backprop_steps, seed=seed)[
                "final"
            ]

        values = {
            "zero-shot": [plain] * len(shared.seeds),
            "in-context": shared.over_seeds("icl", shots, shown),
            "linear probe": shared.over_seeds("probe", shots, probed),
            "fine-tuning (Adam)": shared.over_seeds("adam_ft", shots, tuned),
        }
        for name in SHOT_ARMS:
            done = results[name] if shots == shared.k else shared.runs(name, shots, shared.seeds)
            values[f"MeZO {name}"] = [run["final"] for run in done]
        for name, numbers in values.items():
            s = summarize(numbers)
            table.append([name, shots, s.mean, s.std, s.n, *numbers])
        if shots == shared.k:
            for metric, name in REFERENCES.items():
                if metric != "zero_shot":
                    s = summarize(values[name])
                    record.metric(f"{metric}_mean", s.mean, "abs:0.05")
                    record.metric(f"{metric}_std", s.std, "abs:0.05")
                gap = paired(values["MeZO full"], values[name])
                record.metric(f"mezo_minus_{metric}", gap.difference, "abs:0.15")
                record.metric(f"mezo_minus_{metric}_se", gap.se, "abs:0.05")
                record.metric(f"mezo_minus_{metric}_p", gap.p, "abs:0.3")
    columns = ["method", "k", "mean", "std", "seeds", *(f"seed {i}" for i in range(len(shared.seeds)))]
    record.table("few_shot", columns, table)


def _curves(shared: Comparison, record: Record, results: dict[str, list[Run]]) -> None:
    record.array("eval_at", shared.eval_at)
    for name in MAIN_ARMS:
        record.array(f"curve_{name}", [run["curve"] for run in results[name]])
        record.array(f"losses_{name}", [run["losses"] for run in results[name]])


def _arms(shared: Comparison, record: Record, results: dict[str, list[Run]]) -> None:
    """Final accuracy of every arm, its mean along the learning curve, and the accuracy two thirds through."""
    record.metric("seeds", len(shared.seeds), "exact")
    late = LATE * shared.config.steps
    for name in (*MAIN_ARMS, *BUDGET_ARMS):
        s = summarize([run["final"] for run in results[name]])
        record.metric(f"{name}_mean", s.mean, "abs:0.08")
        record.metric(f"{name}_std", s.std, "abs:0.08")
        _area(record, name, results[name], late if ARMS[name].n > 1 else 1)
    _area(record, "full_late", results["full"], late)
    halfway = shared.eval_at.index(sorted(shared.eval_at)[-2])
    for name in ("full", "no_prompt", "no_pretraining"):
        record.metric(
            f"{name}_halfway", float(np.mean([run["curve"][halfway] for run in results[name]])), "abs:0.1"
        )


def _area(record: Record, name: str, runs: list[Run], least: float) -> None:
    s = summarize([area(run, least) for run in runs])
    record.metric(f"{name}_area", s.mean, "abs:0.08")
    record.metric(f"{name}_area_std", s.std, "abs:0.08")


def _speed(record: Record, results: dict[str, list[Run]]) -> None:
    """Steps to a training loss of half a nat, beside the number of weights that are trained."""
    for name in ("full", "lora", "prefix", "norms_biases"):
        record.metric(f"{name}_trained", results[name][0]["trained"], "exact")
        reached = [first_below(run["losses"], HALF_A_NAT) for run in results[name]]
        record.metric(f"{name}_steps_to_half_nat", float(np.mean(reached)), "rel:0.4")


def first_below(losses: Sequence[float], level: float) -> float:
    """The first step at which the mean of the last five losses is below `level`; one past the end when it never is."""
    smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
    below = np.flatnonzero(smooth < level)
    return float(below[0] + 5) if below.size else float(len(losses) + 1)


def _budget(shared: Comparison, record: Record, results: dict[str, list[Run]]) -> None:
    """More directions a step, or one-sided estimates, at the same number of forward passes.

    Compared along the curve: at its end everything is close to the best possible reader.
    """
    for name in BUDGET_ARMS:
        least = LATE * shared.config.steps if ARMS[name].n > 1 else 1
        gap = paired(
            [area(run, least) for run in results["full"]], [area(run, least) for run in results[name]]
        )
        record.metric(f"full_minus_{name}", gap.difference, "abs:0.08")
        record.metric(f"full_minus_{name}_se", gap.se, "abs:0.05")


def _variations(shared: Comparison, record: Record, results: dict[str, list[Run]]) -> None:
    """One thing changed at a time, on fewer seeds."""
    n = len(shared.few)
    rows = []
    for name in ("full", *VARIATIONS):
        runs = results[name][:n]
        s, along = summarize([run["final"] for run in runs]), summarize([area(run) for run in runs])
        rows.append([name, along.mean, along.std, s.mean, s.std, s.n])
    record.table(
        "variations", ["what changes", "curve mean", "curve std", "final mean", "final std", "seeds"], rows
    )
    for name in VARIATIONS:
        # A longer run is asked whether it ends worse, the others whether they learn at another pace.
        pick = (lambda run: run["final"]) if name == "longer" else area
        gap = paired([pick(run) for run in results[name]], [pick(run) for run in results["full"][:n]])
        record.metric(f"{name}_minus_full", gap.difference, "abs:0.08")


def compare_checkpoints(shared: Comparison, record: Record, checkpoints: dict[int, Decoder]) -> None:
    """MeZO, in-context learning and the bare prompt from every pretraining checkpoint; the last one was run already."""
    rows: list[list[Any]] = []
    final = max(checkpoints)
    for step, start in sorted(checkpoints.items()):
        if step == final:
            again = shared.runs("full", shared.k, shared.few)
            shown = shared.over_seeds("icl", shared.k, _never)[: len(shared.few)]
            zero = shared.stages.get("zero_shot", _never)["final"]
            got = {"mezo": [run["final"] for run in again], "icl": shown, "zero": zero}
        else:
            got = shared.checkpoint(step, start)
        s = summarize(got["mezo"])
        rows.append([step, s.mean, s.std, float(np.mean(got["icl"])), got["zero"]])
    record.table("checkpoints", ["pretraining steps", "MeZO", "MeZO std", "in-context", "zero-shot"], rows)
    record.metric("pretraining_spearman", spearman([r[0] for r in rows], [r[1] for r in rows]), "abs:0.35")


def _never(*_: Any) -> Any:
    raise RuntimeError("a part that `compare` leaves on disk is not there: call it first")
