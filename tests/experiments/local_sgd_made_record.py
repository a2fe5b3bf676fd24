"""Records of the Local SGD chapter made from made-up stages: the code that fills a record is real, the measurements are not."""

from __future__ import annotations

import numpy as np

from papercore import experiments
from papercore.experiments.local_sgd import toys
from papercore.experiments.local_sgd.quick import run_quick
from papercore.experiments.local_sgd.rates import continuous_rate, discrete_rate, gap, sharpness_after
from papercore.experiments.local_sgd.standard_report import report
from papercore.experiments.local_sgd.valley import stationary_square
from papercore.lab.record import Record

SEEDS = 10


class MadeStages:
    """Stands for Stages: gives made results by the name of the part and never runs it."""

    def __init__(self, config):
        self.config = config

    def get(self, name, part):
        if name.startswith("digits-"):
            return made_digits(name)
        return {"rates": self.rates, "slow-time": self.slow_time, "gaps": self.gaps, "valley": self.valley}[
            name
        ]()

    def rates(self):
        k, s2 = self.config.workers, self.config.label_noise

        def row(eta, h):
            exact, limit = (
                float(rate(3.5, eta, h, k, s2) * k / (eta**2 * s2))
                for rate in (discrete_rate, continuous_rate)
            )
            return [eta, h, 1.001 * exact, 0.002 * exact, exact, limit]

        rows = [row(eta, h) for eta, periods in toys.RATE_GRID for h in periods]
        return {"rows": np.array(rows), "halvings": np.array([row(eta, h) for eta, h in toys.HALVINGS])}

    def slow_time(self):
        eta, steps, periods = toys.CURVES
        at = np.linspace(0, steps, 41)
        out = {}
        for h in periods:
            lam = sharpness_after(
                at, eta, h, self.config.workers, self.config.label_noise, start=toys.SHARPNESS
            )
            u = np.sqrt((lam + np.sqrt(lam**2 - 4)) / 2)
            out |= {
                f"time_{h}": eta**2 * at,
                f"mean_{h}": 1.0005 * lam,
                f"se_{h}": 0.001 * lam,
                f"theory_{h}": lam,
                f"u_{h}": u,
                f"v_{h}": 1 / u,
            }
        return out

    def gaps(self):
        k, s2 = self.config.workers, self.config.label_noise
        rows = []
        for eta, eta_h, steps in toys.GAPS:
            closed = float(gap(steps, eta, max(1, round(eta_h / eta)), k, s2, start=toys.SHARPNESS))
            rows.append([eta, max(1, round(eta_h / eta)), steps, closed + 0.0005, 0.001, closed])
        return {"rows": np.array(rows)}

    def valley(self):
        rows, paths, steps = [], {}, np.arange(0, 1001, 50)
        for k in self.config.valley_workers:
            law = stationary_square(k, toys.VALLEY["s2_a"], toys.VALLEY["s2_b"])
            rows.append([k, 0.85, 0.02, 0.6 / k, 1.02 * law, 0.02 * law, law])
            paths |= {f"mean_{k}": 1.5 * np.exp(-steps / 500), f"sd_{k}": np.full(len(steps), 0.5 / k**0.5)}
        return {"rows": np.array(rows), "steps": steps, **paths}


def made_digits(name):
    """Curves of one arm: better test values for larger H, equal training losses at the end."""
    rng = np.random.default_rng(sum(map(ord, name)))
    h = int(name.rpartition("-h")[2]) if "-h" in name else 0
    steps = np.array([0, 16, 96, 160, 300, 800, 2200] if "post-h" in name else [100, 200, 300, 800])
    wave = 1 + 0.002 * rng.standard_normal((SEEDS, len(steps)))
    better = 0.0 if "clean" in name or "fresh" in name else 0.004 * np.log2(h + 1)
    out = {
        "steps": steps,
        "test_accuracy": (0.78 + better) * wave,
        "test_loss": (1.1 - 5 * better) * wave,
        "train_loss": np.exp(-steps / 400) * wave + 0.002,
        "spread": 0.1 * wave,
        "communication": 1 / max(h, 1),
    }
    if "post-h" in name:
        one = 1 + 0.05 * rng.standard_normal(SEEDS)
        out |= {"top": 20 / (1 + 10 * better) * one, "trace": 300 / (1 + 10 * better) * one}
    return out


def made_record():
    """A `quick` record that every figure and paragraph of the chapter can be drawn from."""
    config = experiments.configure("local_sgd", "quick", "cpu")
    record = Record.start(config)
    run_quick(config, record, MadeStages(config))
    return record.finish()


def made_run(h, seed, part, steps=2000, every=200):
    """One run of `standard`, as train_images returns it."""
    rng = np.random.default_rng([h, seed, len(part)])
    at = np.arange(0, steps + 1, max(every, h))
    gained = {"post": 1.0, "large": 0.1, "noise": 0.8}[part] * np.log10(h) / 2.6
    curve = 0.5 + 0.01 * gained * at / steps + 0.0005 * rng.standard_normal(len(at)) + 0.01 * seed
    return {
        "step": at, "test_accuracy": curve, "test_loss": 2 - curve, "train_loss": 1 - curve, "sharpness_step": at[::5],
        "top": 30 - 5 * gained + 0 * at[::5], "trace": 900 - 90 * gained + 0 * at[::5],
        "spread_step": at[1:] - 1 if h > 1 else np.array([]), "spread": 0.01 * np.ones(len(at) - 1) if h > 1 else np.array([]),
        "losses": np.ones(steps),
    }  # fmt: skip


def made_standard_record():
    """A `standard` record of the reduced form, made by the real report."""
    config = experiments.configure("local_sgd", "standard", "cpu")
    record, form = Record.start(config), config.form()
    periods = {"post": form.periods, "large": (form.large_period,), "noise": form.noise_periods}
    runs = {
        part: {h: [made_run(h, seed, part) for seed in form.seeds] for h in (1, *some)}
        for part, some in periods.items()
    }
    report(config, form, record, runs, {})
    return record.finish()
