"""A `quick` record made by formula: the names and shapes of a real one, with numbers that are easy to recognise."""

import numpy as np

from papercore import experiments
from papercore.experiments.mezo import closed_forms
from papercore.experiments.mezo.theory import DRIFT_COLUMNS
from papercore.lab.record import Record

ARMS = (
    "full",
    "adam",
    "rademacher",
    "norms_biases",
    "lora",
    "prefix",
    "no_prompt",
    "no_pretraining",
    "accuracy",
)
FINALS = dict(zip(ARMS, (0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.5, 0.3, 0.7), strict=True))
METHODS = ("zero-shot", "in-context", "linear probe", "fine-tuning (Adam)")
SEEDS = 5


def made_record() -> Record:
    """A record that every figure and paragraph of the chapter can be drawn from."""
    record = Record.start(experiments.configure("mezo", "quick", "cpu"))
    rng = np.random.default_rng(0)
    at = np.array([0, 16, 32, 64, 96])
    record.array("eval_at", at)
    for name, final in FINALS.items():
        curve = 0.25 + (final - 0.25) * (1 - np.exp(-at / 20.0))
        record.array(f"curve_{name}", curve + 0.01 * rng.standard_normal((SEEDS, 5)))
        record.array(
            f"losses_{name}", np.exp(-np.arange(96) / 20.0) + 0.01 * rng.standard_normal((SEEDS, 96))
        )
        for what, value in (("mean", final), ("std", 0.01), ("area", final - 0.1), ("area_std", 0.02)):
            record.metric(f"{name}_{what}", value)
    for name in ("n4", "n16", "one_point"):
        for what, value in (("mean", 0.9), ("std", 0.01), ("area", 0.77), ("area_std", 0.02)):
            record.metric(f"{name}_{what}", value)
    record.metric("full_late_area", 0.88)
    record.metric("full_late_area_std", 0.02)
    metrics = {
        "bayes": 0.98,
        "zero_shot": 0.4,
        "seeds": SEEDS,
        "weights": 120_192,
        "history_adam_gap": 1e-15,
        "history_momentum_gap": 2e-15,
    }
    metrics |= {
        "full_minus_one_point": 0.1,
        "full_minus_one_point_se": 0.02,
        "isotropic_exponent": 1.02,
        "rank_exponent": 0.9,
    }
    metrics |= {
        "rank_spread_over_dimension": 1.1,
        "drift_fp16_official": 1.3,
        "drift_fp16_exact": 0.4,
        "replay_gap_all_dtypes": 0.0,
    }
    metrics |= {"log_bytes_20000_steps": 80_400, "lp_mean": 0.98}
    for name in ("zero_shot", "icl", "lp", "ft"):
        metrics |= {f"mezo_minus_{name}": 0.123, f"mezo_minus_{name}_p": 0.01}
    for name, size, steps in (
        ("full", 120_192, 20),
        ("lora", 4096, 15),
        ("prefix", 1280, 25),
        ("norms_biases", 1792, 12),
    ):
        metrics |= {f"{name}_trained": size, f"{name}_steps_to_half_nat": steps}
    for name in ("full", "no_prompt", "no_pretraining"):
        metrics[f"{name}_halfway"] = FINALS[name] - 0.05
    for name, value in metrics.items():
        record.metric(name, value)
    rows = []
    for k in (1, 4, 16):
        for i, name in enumerate((*METHODS, "MeZO full", "MeZO lora", "MeZO prefix", "MeZO accuracy")):
            rows.append([name, k, 0.5 + 0.05 * i, 0.02, SEEDS])
    record.table("few_shot", ["method", "k", "mean", "std", "seeds"], rows)
    changes = [
        [name, 0.8 + 0.01 * i, 0.02, 0.95, 0.01, 3]
        for i, name in enumerate(("full", "eps_1e-4", "eps_1e-2", "batch_8", "decayed", "longer"))
    ]
    record.table(
        "variations", ["what changes", "curve mean", "curve std", "final mean", "final std", "seeds"], changes
    )
    checkpoints = [
        [step, 0.3 + step / 1000, 0.01, 0.25 + step / 1200, 0.3] for step in (0, 125, 250, 375, 500)
    ]
    record.table(
        "checkpoints", ["pretraining steps", "MeZO", "MeZO std", "in-context", "zero-shot"], checkpoints
    )
    moments = [
        [dist, d, n, 1.01 * closed, 0.01 * closed, closed]
        for dist, d, n, closed in (
            ("gaussian", 50, 1, 52.0),
            ("sphere", 50, 1, 50.0),
            ("rademacher", 50, 4, 13.25),
        )
    ]
    record.table("second_moment", ["directions", "d", "n", "measured", "se", "closed form"], moments)
    record.table(
        "one_step",
        ["d", "r", "n", "measured", "se", "1 - 1/gamma"],
        [[100, 4, 1, 0.83, 0.01, 0.8333], [1000, 16, 1, 0.95, 0.004, 0.9444]],
    )
    rates = [[f"rank {r}", r, d, 10 * r, 11 * r, 12 * r] for r in (2, 8, 32) for d in (r, 100, 10_000)]
    rates += [["isotropic", d, d, 10 * d, 11 * d, 12 * d] for d in (2, 8, 32)]
    record.table("rates", ["family", "r", "d", "seed 0", "seed 1", "seed 2"], rates)
    record.table(
        "drift",
        list(DRIFT_COLUMNS),
        [["float32", 0.0, 0.0, 0.0, 0.0, 0.0], ["float16", 1.3, 0.4, 1.1, 0.39, 0.0]],
    )
    record.array("replay_at", np.arange(0, 97, 12))
    record.array("replay_accuracy", np.linspace(0.3, 0.97, 9))
    closed_forms.record_all(record)
    return record.finish()


def benchmark_rows() -> list[dict[str, object]]:
    """Rows as the benchmark of the step writes them."""
    rows = []
    for name, dist, ratios in (
        ("MeZO, numba", "rademacher", (1.2, 1.1)),
        ("step of the paper's code, re-implemented", "gaussian", (6.0, 1.8)),
    ):
        for tokens, ratio in zip((64, 512), ratios, strict=True):
            rows.append(
                {
                    "name": name,
                    "dist": dist,
                    "tokens": tokens,
                    "ratio": ratio,
                    "low": ratio - 0.05,
                    "high": ratio + 0.1,
                }
            )
    return rows
