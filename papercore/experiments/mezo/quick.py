"""The chapter at `quick` scale: a model trained on the spot, few-shot runs of every method, and the theory on known ground.

Learning rates come from `tuning.json`, a record made by `tuning.py` on other seeds than those used here.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from papercore.experiments.mezo import closed_forms, theory
from papercore.experiments.mezo.arms import few_shot, pretrain, test_sentences
from papercore.experiments.mezo.comparison import Comparison, all_runs, compare, compare_checkpoints
from papercore.experiments.mezo.config import QuickConfig
from papercore.experiments.mezo.language import SEGMENT, TOPICS, VOCABULARY, bayes_accuracy
from papercore.experiments.mezo.replaying import log_and_replay
from papercore.experiments.mezo.step_memory import step_memory
from papercore.lab.decoder import Decoder, DecoderConfig
from papercore.lab.progress import say
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.sweep import sweep

TUNING = Path(__file__).with_name("tuning.json")
PROCESSES = 4  # at most: what a laptop's memory bears
CHECKPOINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOMENTS = (
    (50, 1, "gaussian"),
    (50, 1, "sphere"),
    (50, 1, "rademacher"),
    (50, 4, "gaussian"),
    (50, 4, "sphere"),
    (50, 4, "rademacher"),
    (200, 1, "gaussian"),
)
ONE_STEP = ((100, 4, 1), (100, 16, 1), (100, 16, 4), (1000, 16, 1))


def new_model(config: QuickConfig, seed: int) -> Decoder:
    """The decoder of this scale, untrained."""
    sizes = DecoderConfig(
        VOCABULARY, width=64, layers=2, heads=4, context=SEGMENT * max(config.segments, TOPICS + 1) + 4
    )
    return Decoder(sizes, generator=torch.Generator().manual_seed(seed)).to(config.torch_device())


def pretrained(config: QuickConfig, seed: int, stages: Stages) -> dict[int, dict[str, np.ndarray]]:
    """Weights after each share of pretraining in CHECKPOINTS, by step."""
    keep = [round(share * config.pretrain_steps) for share in CHECKPOINTS]

    def part() -> dict[str, Any]:
        model = new_model(config, seed)
        losses, kept = pretrain(
            model,
            config.pretrain_steps,
            config.pretrain_batch,
            config.pretrain_lr,
            config.segments,
            np.random.default_rng([seed, 0]),
            keep,
        )
        return {
            "losses": losses,
            **{
                f"{step}:{name}": w.cpu().numpy()
                for step, weights in kept.items()
                for name, w in weights.items()
            },
        }

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
        raise ValueError(
            f"{TUNING.name} is missing: make it with `python -m papercore.experiments.mezo.tuning`."
        )
    return {
        name.removeprefix("lr_"): value
        for name, value in json.loads(TUNING.read_text())["metrics"].items()
        if name.startswith("lr_")
    }


def run_quick(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Fill the record; every part is a stage, so that an interrupted run goes on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the tensors are small: more threads only wait for each other, and the sums stay in one order
    try:
        # Results are the same for any number of processes. A GPU is not shared; each process takes about half a GiB.
        processes = min(threads, PROCESSES) if config.torch_device().type == "cpu" else 1
        if processes > 1:
            parts = all_parts(*shared_by_runs(config, stages))
            parts_in_processes(config, stages, parts, processes)
        _few_shot_part(config, record, stages)
        _theory_part(config, record, stages)
    finally:
        torch.set_num_threads(threads)


def shared_by_runs(config: QuickConfig, stages: Stages) -> tuple[Comparison, dict[int, Decoder]]:
    """What every run needs, and the model after each share of its pretraining, by step."""
    device, base = config.torch_device(), 1000 * config.seed
    models = {
        step: with_weights(config, base, state) for step, state in pretrained(config, base, stages).items()
    }
    test = test_sentences(config.tests, base).to(device)
    seeds = tuple(base + i for i in range(config.seeds))
    last = models[max(models)]
    return Comparison(config, stages, last, models[0], test, seeds, seeds[:3], chosen_rates()), models


def _few_shot_part(config: QuickConfig, record: Record, stages: Stages) -> None:
    shared, models = shared_by_runs(config, stages)
    base = shared.seeds[0]
    record.metric("bayes", bayes_accuracy(test_sentences(config.tests, base)), "exact")
    record.metric("weights", sum(p.numel() for p in models[0].parameters()), "exact")
    compare(shared, record)
    compare_checkpoints(shared, record, models)

    def part() -> dict[str, Any]:
        data = few_shot(shared.k, base).to(shared.test.words.device)
        return log_and_replay(
            shared.model, shared.rates["full"], data, shared.test, steps=config.steps, seed=base
        )

    replayed = stages.get("replay", part)
    record.metric("replay_largest_difference", replayed["difference"], "exact")
    record.metric("log_bytes_20000_steps", replayed["bytes_20000"], "rel:0.02")
    record.array("replay_at", replayed["at"])
    record.array("replay_accuracy", replayed["accuracy"])


Part = tuple[
    str, int, int
]  # an arm with its k and its seed; or "checkpoint" or "theory" with the number of steps, or 0


def all_parts(shared: Comparison, models: dict[int, Decoder]) -> list[Part]:
    """What takes long; no part needs another, but for the pretrained models."""
    parts: list[Part] = [("theory", 0, 0)]
    parts += [("checkpoint", step, 0) for step in models if step != max(models)]
    return parts + all_runs(shared.config, shared.seeds, shared.few)


def parts_in_processes(config: QuickConfig, stages: Stages, parts: Sequence[Part], processes: int) -> None:
    """Compute parts several at a time; each leaves its result where the run will look for it.

    Raises:
        what a part raises.
    """
    items = [(config, str(stages.root), part) for part in parts]
    for (_, _, part), outcome in sweep(_one_part, items, jobs=processes, text="few-shot runs and theory"):
        if isinstance(outcome, BaseException):
            say("  {} (k or steps {}, seed {}) failed".format(*part))
            raise outcome


def _one_part(item: tuple[QuickConfig, str, Part]) -> str:
    """In a process of its own: one part. Models and sentences are made once in each process."""
    config, root, (name, number, seed) = item
    os.environ["PAPERCORE_PROGRESS"] = "off"  # the main process shows how many parts are done
    torch.set_num_threads(1)
    if name == "theory":
        _theory_part(
            config, Record.start(config), Stages(root)
        )  # the record is made again from what is on disk
        return name
    shared, models = _shared_in_process(config, root)
    if name == "checkpoint":
        shared.checkpoint(number, models[number])
    else:
        shared.runs(name, number, (seed,))
    return name


@functools.cache
def _shared_in_process(config: QuickConfig, root: str) -> tuple[Comparison, dict[int, Decoder]]:
    return shared_by_runs(config, Stages(root))


def _theory_part(config: QuickConfig, record: Record, stages: Stages) -> None:
    seed = 1000 * config.seed
    _monte_carlo(config, record, stages, seed)
    _rates(record, stages, seed)
    drift = stages.get(
        "drift", lambda: {"rows": theory.rounding_drift(config.drift_weights, config.drift_steps, seed + 99)}
    )
    rows = drift["rows"]
    record.table("drift", list(theory.DRIFT_COLUMNS), rows)
    record.metric("drift_fp16_official", rows[1][1], "rel:0.1")
    record.metric("drift_fp16_exact", rows[1][4], "rel:0.1")
    record.metric("replay_gap_all_dtypes", max(row[5] for row in rows), "exact")

    def histories() -> dict[str, Any]:
        return {
            "adam": theory.history_gap(64, 50, seed, (0.9, 0.99), 0.0),
            "momentum": theory.history_gap(64, 50, seed, None, 0.9),
        }

    history = stages.get("history", histories)
    record.metric("history_adam_gap", history["adam"], "abs:1e-7")
    record.metric("history_momentum_gap", history["momentum"], "abs:1e-7")
    memory = stages.get("memory", lambda: step_memory(config.torch_device()))
    for name, value in memory.items():
        record.metric(f"memory_{name}", value, "rel:0.3" if name != "mezo_extra" else "volatile")
    closed_forms.record_all(record)


def _monte_carlo(config: QuickConfig, record: Record, stages: Stages, seed: int) -> None:
    """Measured moments beside the lemmas, as distances in standard errors."""

    def moments() -> dict[str, Any]:
        return {
            "rows": [
                [dist, d, n, *theory.second_moment(d, n, dist, config.draws, seed + i)]
                for i, (d, n, dist) in enumerate(MOMENTS)
            ]
        }

    def bounds() -> dict[str, Any]:
        draws = min(config.draws, 5000)
        return {
            "rows": [
                [d, r, n, *theory.one_step_bound(d, r, n, draws, seed + 50 + i)]
                for i, (d, r, n) in enumerate(ONE_STEP)
            ]
        }

    for name, part, columns in (
        ("second_moment", moments, ["directions", "d", "n", "measured", "se", "closed form"]),
        ("one_step", bounds, ["d", "r", "n", "measured", "se", "1 - 1/gamma"]),
    ):
        rows = stages.get(name, part)["rows"]
        record.table(name, columns, rows)
        record.metric(f"{name}_worst_z", max(abs(row[3] - row[5]) / row[4] for row in rows), "abs:0.5")


def _rates(record: Record, stages: Stages, seed: int) -> None:
    """Steps to a target on quadratics: flat in d, linear in r."""
    rows = stages.get("rates", lambda: {"rows": theory.rates(seed)})["rows"]
    record.table("rates", ["family", "r", "d", "seed 0", "seed 1", "seed 2"], rows)
    mean = {(row[0], row[2]): float(np.mean(row[3:])) for row in rows}
    ranks, sizes = (2, 8, 32), (8, 32, 128, 256)
    spread = [
        max(mean[f"rank {r}", 100], mean[f"rank {r}", 10_000])
        / min(mean[f"rank {r}", 100], mean[f"rank {r}", 10_000])
        for r in ranks
    ]
    record.metric("rank_spread_over_dimension", max(spread), "rel:0.2")
    record.metric(
        "rank_exponent",
        theory.slope_of_logs(list(ranks), [mean[f"rank {r}", 10_000] for r in ranks]),
        "abs:0.15",
    )
    record.metric(
        "isotropic_exponent",
        theory.slope_of_logs(list(sizes), [mean["isotropic", d] for d in sizes]),
        "abs:0.1",
    )
