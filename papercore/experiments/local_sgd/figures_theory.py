"""Figures of the idea and of the theory: what an average undoes, rates, slow time, the plane, the conditions, diffusion.

Glossary
    lambda     sharpness u^2 + v^2 of a minimiser of (u v - 1)^2 / 2; 2 at the flattest, (1, 1)
    D          u^2 - v^2, what gradient flow conserves
    slow time  eta^2 * steps
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from papercore.experiments.local_sgd import toys
from papercore.experiments.local_sgd.rates import continuous_rate, discrete_rate
from papercore.lab.figures import COLOURS, GREY, series_style, style
from papercore.lab.page import Drawn, require, rows
from papercore.lab.record import Record

LEGEND: dict[str, Any] = {
    "loc": "outside upper left",
    "columnspacing": 1.2,
    "handlelength": 2.3,
    "handletextpad": 0.5,
    "fontsize": 9,
    "borderaxespad": 0.1,
}
# The drawn rounds of the idea: few workers, large steps, so that a round can be seen.
IDEA = {"eta": 0.05, "s2": 0.5, "k": 8, "h": 12, "steps": 72}


def sawtooth(h: int, steps: int, *, eta: float, s2: float, k: int, start: float) -> NDArray[np.float64]:
    """log D of a worker, step by step, with an average every h steps (h = 0: never), relative to its start; sharpness frozen.

    >>> path = sawtooth(0, 2, eta=0.1, s2=0.5, k=8, start=4.0)
    >>> [round(float(value), 4) for value in path[:2]]
    [0.0, -0.005]
    """
    q = (1 - eta * start) ** 2
    log_d, m, w = 0.0, 0.0, 0.0
    out = [log_d]
    for step in range(steps):
        log_d -= eta**2 * (s2 + m)
        m = q * m + eta**2 * start**2 * s2
        w = q * w + eta**2 * s2
        if h and (step + 1) % h == 0:
            back = (1 - 1 / k) * w
            log_d, m, w = log_d + back, m - start**2 * back, 0.0
        out.append(log_d)
    return np.array(out)


def idea(record: Record | None = None) -> Drawn:
    """The curve of minimisers with workers around it, and how an average undoes a part of their progress. Needs no record."""
    lam = toys.SHARPNESS
    shared = {"eta": IDEA["eta"], "s2": IDEA["s2"], "k": int(IDEA["k"]), "start": lam}
    steps, h = int(IDEA["steps"]), int(IDEA["h"])
    paths = {
        "one worker, never averaged": sawtooth(0, steps, **shared),  # type: ignore[arg-type]
        f"Local SGD, H = {h}": sawtooth(h, steps, **shared),  # type: ignore[arg-type]
        "SGD: an average every step": sawtooth(1, steps, **shared),  # type: ignore[arg-type]
    }
    with style(height=2.9):
        fig = Figure()
        plane, ax = fig.subplots(1, 2, width_ratios=(1, 1.35))
        grid_u, grid_v = np.meshgrid(np.linspace(0.55, 2.6, 160), np.linspace(0.1, 1.7, 160))
        plane.contour(
            grid_u,
            grid_v,
            0.5 * (grid_u * grid_v - 1) ** 2,
            levels=[0.01, 0.05, 0.15, 0.4, 0.9],
            colors="#c4c4c4",
            linewidths=0.8,
        )
        u = np.linspace(0.6, 2.6, 100)
        plane.plot(u, 1 / u, color=COLOURS[0], linewidth=2.0, marker="none")
        rng = np.random.default_rng(3)
        # Workers scatter across the valley, along (v, u): the one direction in which the gradient pushes.
        spread = 0.11 * rng.standard_normal(8)
        spread -= spread.mean()
        plane.plot(
            1.93 + 0.518 * spread * 1.0,
            0.518 + 1.93 * spread,
            linestyle="none",
            marker="o",
            color=COLOURS[1],
            markersize=4.5,
        )
        plane.plot(1.93, 0.518, marker="D", color="#222222", markersize=6)
        plane.plot(1, 1, marker="*", color=COLOURS[2], markersize=13)
        plane.annotate(
            "",
            (1.25, 0.80),
            (1.7, 0.588),
            arrowprops={"arrowstyle": "-|>", "color": COLOURS[0], "linewidth": 1.6},
        )
        for text, point, shift in (
            ("flattest, λ = 2", (1, 1), (6, 7)),
            ("workers", (2.02, 0.78), (5, 2)),
            ("their mean", (1.93, 0.518), (-44, -22)),
            ("slow drift", (1.42, 0.72), (-52, -10)),
        ):
            plane.annotate(text, point, xytext=shift, textcoords="offset points", fontsize=8.5)
        plane.set(
            xlabel="u", ylabel="v", xlim=(0.6, 2.6), ylim=(0.1, 1.6), xticks=[1, 2], yticks=[0.5, 1, 1.5]
        )
        for index, (label, path) in zip((6, 0, 1), paths.items(), strict=True):
            ax.plot(range(steps + 1), path, label=label, **{**series_style(index), "marker": "none"})
        ax.set(xlabel="step", ylabel="log D, from the start")
        fig.legend(ncols=2, **LEGEND)
    end = {label: float(path[-1]) for label, path in paths.items()}
    told = "; ".join(f"{label}: {value:.3f}" for label, value in end.items())
    alt = (
        "Left: the curve of minimisers u v = 1 with lines of equal loss; workers scatter across it around their mean, which drifts along it "
        f"towards the flattest point. Right: log D over {steps} steps with K = {IDEA['k']}; at the end {told}."
    )
    caption = (
        "Left: all points of the curve have loss zero, and the valley is wider towards the star. Noise scatters workers across the valley; "
        "on average they creep along it. Right: the creep, from the exact recursion. A worker alone is fast, since its batch is small and its noise "
        "large. Each average gives a part of the progress back. SGD averages at every step and gives nearly everything back; Local SGD does so rarely."
    )
    return Drawn("fig-local_sgd-idea", fig, alt, caption)


def rates(record: Record) -> Drawn:
    """Rate of decay over SGD's, against eta H: simulations, the exact theory at finite eta, the Slow SDE."""
    found = rows(record, "rates")
    k, s2 = record.config["workers"], record.config["label_noise"]
    etas = sorted({row["eta"] for row in found}, reverse=True)
    with style(height=3.3):
        fig = Figure()
        ax = fig.subplots()
        for index, eta in enumerate(etas):
            mine = [row for row in found if row["eta"] == eta]
            x = [row["eta"] * row["H"] for row in mine]
            look = series_style(index)
            ax.errorbar(
                x, [row["simulated"] for row in mine], yerr=[2 * row["se"] for row in mine],
                label=f"simulated, η = {eta:g}", capsize=2, elinewidth=1.0, **{**look, "linestyle": "none"},
            )  # fmt: skip
            ax.plot(
                x,
                [row["discrete theory"] for row in mine],
                label=f"exact theory, η = {eta:g}",
                **{**look, "marker": "none"},
            )
        fine = sorted((row["eta"] * row["H"], row["Slow SDE"]) for row in found)
        ax.plot(*zip(*fine, strict=True), label="Slow SDE (η → 0)", **{**series_style(2), "marker": "none"})
        for value, text, at, side in ((1, "SGD", 0.99, "right"), (k, f"K = {k}", 0.01, "left")):
            ax.axhline(value, color=GREY, linewidth=1.0, linestyle=":", marker="none")
            ax.annotate(
                text, (at, value), xycoords=("axes fraction", "data"), ha=side, va="bottom", fontsize=8.5, color=GREY
            )  # fmt: skip
        ax.set(
            xscale="log", xlabel="η H", ylabel="fall of the sharpness,\ntimes that of SGD", ylim=(0, k + 0.9)
        )
        fig.legend(ncols=3, **LEGEND)
    require(record, "rate_discrete_worst", "rate_h1", "rate_h1_slow_sde", "rate_largest")
    m = record.metrics
    told = ", ".join(
        f"{row['simulated']:.2f} at {row['eta'] * row['H']:g}" for row in found if row["eta"] == etas[-1]
    )
    alt = (
        f"Rate against eta H on a logarithmic axis, for eta = {etas[-1]:g}: {told}. The exact theory is within {m['rate_discrete_worst']:.2%} of every point; "
        f"the Slow SDE gives {m['rate_h1_slow_sde']:.2f} at H = 1, where {m['rate_h1']:.2f} is simulated."
    )
    caption = (
        f"How many times faster than in SGD's theory $\\log D$ falls in slow time; {record.config['replicas']} runs a point, whiskers two standard errors, "
        f"K = {k}, noise variance {s2:g} a worker. See the S-curve from 1 to K. Left end: the limit formula (dotted) is too high, since at H = 1 "
        "Local SGD *is* SGD; halving η halves this error. Right end: the points pass K, by a share of order ηλ that SGD itself gains too."
    )
    return Drawn("fig-local_sgd-rates", fig, alt, caption)


def slow_time(record: Record) -> Drawn:
    """Sharpness against slow time for three H, simulated on top of the closed form."""
    eta, _, periods = toys.CURVES
    require(record, *(f"curve_{name}_{h}" for name in ("time", "mean", "se", "theory") for h in periods))
    ends = {}
    with style(height=3.0):
        fig = Figure()
        ax = fig.subplots()
        for index, h in enumerate(periods):
            time, mean, theory = (record.arrays[f"curve_{name}_{h}"] for name in ("time", "mean", "theory"))
            look = series_style(index)
            ax.plot(time, theory, **{**look, "marker": "none"})
            ax.plot(
                time[::2], mean[::2], label=f"H = {h} (ηH = {eta * h:g})", **{**look, "linestyle": "none"}
            )
            ends[h] = float(mean[-1])
        ax.axhline(2, color=GREY, linewidth=1.0, linestyle=":", marker="none")
        ax.annotate(
            "flattest point",
            (0.01, 2),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="bottom",
            fontsize=8.5,
            color=GREY,
        )
        ax.set(xlabel="slow time η² · steps", ylabel="sharpness λ")
        fig.legend(ncols=3, **LEGEND)
    worst = record.metrics["sharpness_curve_worst"]
    alt = f"Sharpness falls from {toys.SHARPNESS:g} to {', '.join(f'{value:.2f} with H = {h}' for h, value in ends.items())}; points lie on the curves of the closed form."
    caption = (
        f"Markers: mean of {record.config['replicas']} runs (errors are smaller than the markers); lines: the exact theory, no fit; largest gap {worst:.2%}. "
        f"The learning rate is {eta:g} in all three, and so are data and steps. Only the time between averages differs."
    )
    return Drawn("fig-local_sgd-slow-time", fig, alt, caption)


def plane(record: Record) -> Drawn:
    """The curve of minimisers with the place of the average at equal times, and the drift along it."""
    eta, _, periods = toys.CURVES
    require(record, *(f"curve_{name}_{h}" for name in ("u", "v", "time") for h in periods))
    k, s2 = record.config["workers"], record.config["label_noise"]
    at_time = (0.5, 1.0, 2.0, 4.0)
    with style(height=3.1):
        fig = Figure()
        ax, side = fig.subplots(1, 2, width_ratios=(1.25, 1))
        u = np.linspace(0.95, 2.1, 100)
        ax.plot(u, 1 / u, color=GREY, linewidth=1.2, marker="none")
        told = []
        for index, h in enumerate(periods):
            time, us, vs = (record.arrays[f"curve_{name}_{h}"] for name in ("time", "u", "v"))
            picked = [int(np.argmin(np.abs(time - t))) for t in at_time]
            # Shifted off the curve, or the three would cover each other.
            shift = 0.055 * (index - 1)
            ax.plot(
                us[picked] + shift,
                vs[picked] + shift,
                label=f"H = {h}",
                **{**series_style(index), "linestyle": "none"},
            )
            # SGD hardly moves: only its last place is named.
            for t, place in list(zip(at_time, picked, strict=True))[-1 if h == 1 else 0 :]:
                ax.annotate(
                    f"{t:g}",
                    (us[place] + shift, vs[place] + shift),
                    xytext=(4, 3),
                    textcoords="offset points",
                    fontsize=7.5,
                    color=COLOURS[index],
                )
            told.append(f"H = {h}: u = {us[picked[-1]]:.2f}")
        ax.plot(2, 0.5, marker="D", color="#222222", markersize=6)
        ax.annotate("start", (2, 0.5), xytext=(-4, -14), textcoords="offset points", fontsize=8.5)
        ax.plot(1, 1, marker="*", color=COLOURS[2], markersize=12, zorder=1)
        ax.set(xlabel="u", ylabel="v", xlim=(0.85, 2.2), ylim=(0.38, 1.2))
        lam = np.linspace(2.001, 4.25, 60)
        for index, h in enumerate(periods):
            speed = (lam - 4 / lam) * discrete_rate(lam, eta, h, k, s2) / eta**2
            side.plot(lam, speed, label=None, **{**series_style(index), "marker": "none"})
        side.plot(
            lam,
            (lam - 4 / lam) * k * continuous_rate(lam, eta, 1e-9, k, s2) / eta**2,
            color=GREY,
            linewidth=1.0,
            linestyle=":",
            marker="none",
        )
        side.annotate(
            "K times SGD",
            (3.2, (3.2 - 1.25) * s2),
            xytext=(-6, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=GREY,
        )
        side.set(xlabel="sharpness λ", ylabel="fall of λ in slow time")
        fig.legend(ncols=3, **LEGEND)
    alt = f"Places of the average on the curve of minimisers at slow times {', '.join(f'{t:g}' for t in at_time)}. At the last: {'; '.join(told)}. The flattest point is u = 1."
    caption = (
        "Left: where the (projected) average stands at slow times 0.5, 1, 2 and 4 (small numbers); the three series are drawn side by side. Right: the speed "
        "of the fall against the sharpness, in closed form. The drift is a gradient flow: it is faster where the valley is sharper, and stops at λ = 2."
    )
    return Drawn("fig-local_sgd-plane", fig, alt, caption)


def conditions(record: Record) -> Drawn:
    """The gap in sharpness between SGD and Local SGD: a map over learning rate and steps, and cuts over H."""
    require(
        record,
        "gap_map",
        "gap_etas",
        "gap_steps",
        "gap_by_h",
        "gap_best_eta",
        "gap_best",
        "gap_largest_eta",
        "gap_smallest_eta",
    )
    surface, etas, steps = (record.arrays[name] for name in ("gap_map", "gap_etas", "gap_steps"))
    points = rows(record, "gaps")
    with style(height=3.3):
        fig = Figure()
        ax, side = fig.subplots(1, 2, width_ratios=(1.45, 1))
        mesh = ax.pcolormesh(steps, etas, surface, cmap="Blues", shading="nearest", rasterized=True)
        fig.colorbar(mesh, ax=ax, label="sharpness of SGD − Local SGD", pad=0.02)
        ax.plot(
            [row["steps"] for row in points],
            [row["eta"] for row in points],
            linestyle="none",
            marker="o",
            markersize=4.5,
            color=COLOURS[1],
            markeredgecolor="white",
        )
        line = np.array([3e2, 9e5])
        ax.plot(line, np.sqrt(1 / line), color="#222222", linewidth=1.0, linestyle="--", marker="none")
        ax.annotate("steps = 1/η²", (4e4, 0.0062), rotation=-31, fontsize=8.5, ha="left")
        ax.annotate("SGD is there too", (6e4, 0.1), fontsize=8.5, ha="center", color="#444444")
        ax.annotate("too short", (60, 0.0025), fontsize=8.5, color="#444444")
        ax.set(xscale="log", yscale="log", xlabel="steps", ylabel="learning rate η")
        ax.grid(visible=False)
        h = np.geomspace(1, 1000, 31)
        for index, (eta, gaps) in enumerate(zip((0.05, 0.02, 0.005), record.arrays["gap_by_h"], strict=True)):
            side.plot(h, gaps, label=f"η = {eta:g}", **{**series_style(index), "marker": "none"})
            side.axvline(
                1 / (2 * eta * toys.SHARPNESS),
                color=COLOURS[index],
                linewidth=0.8,
                linestyle=":",
                marker="none",
            )
        side.set(xscale="log", xlabel="local steps H", ylabel="gap at η²s²·steps = 0.8")
        fig.legend(ncols=3, **LEGEND)
    m = record.metrics
    alt = (
        f"Map of the gap in sharpness over steps and learning rate. After 2,000 steps it is {m['gap_smallest_eta']:.3f} at eta = {etas[0]:.3f}, at most {m['gap_best']:.2f} at eta = "
        f"{m['gap_best_eta']:.3f}, and {m['gap_largest_eta']:.4f} at eta = {etas[-1]:.1f}. Right: at a fixed slow time the gap rises with H and saturates, later for smaller eta."
    )
    caption = (
        "Left: how much flatter Local SGD ends than SGD, in closed form at ηH = 1; orange points were simulated, and agree. Read a row for condition 2: "
        "nothing shows before about 1/η² steps. Read a column for condition 1: at a large η SGD gets there as well and the gap closes. "
        "Right: cuts over H; dotted, 2ηHλ = 1."
    )
    return Drawn("fig-local_sgd-conditions", fig, alt, caption)


def diffusion(record: Record) -> Drawn:
    """Position along the valley for several K at one local batch, and where it settles."""
    found = rows(record, "valley")
    names = [f"valley_mean_{row['K']}" for row in found]
    require(record, "valley_steps", *names, *(name.replace("mean", "sd") for name in names))
    steps = record.arrays["valley_steps"]
    with style(height=3.0):
        fig = Figure()
        ax, side = fig.subplots(1, 2, width_ratios=(1.3, 1))
        for index, row in enumerate((found[0], found[len(found) // 2], found[-1])):
            mean, sd = record.arrays[f"valley_mean_{row['K']}"], record.arrays[f"valley_sd_{row['K']}"]
            look = {**series_style(index), "marker": "none"}
            ax.plot(steps, mean, label=f"K = {row['K']}", **look)
            ax.fill_between(steps, mean - sd, mean + sd, color=COLOURS[index], alpha=0.16, linewidth=0.6)
        ax.set(xlabel="step", ylabel="place a along the valley")
        workers = [row["K"] for row in found]
        excess = np.array([row["E a^2 late"] for row in found])
        error = np.array([row["se late"] for row in found])
        side.errorbar(
            workers,
            excess,
            yerr=2 * error,
            label="simulated",
            capsize=2,
            elinewidth=1.0,
            **{**series_style(3), "linestyle": "none"},
        )
        side.plot(
            workers,
            [row["E a^2, stationary law"] for row in found],
            label="Slow SDE",
            **{**series_style(6), "marker": "none"},
        )
        side.set(xscale="log", yscale="log", xlabel="workers K", ylabel="sharpness − 1, in the end")
        side.set_xticks(workers, [str(k) for k in workers])
        side.minorticks_off()
        fig.legend(ncols=5, **LEGEND)
    exponent = record.metrics["valley_variance_exponent"]
    told = ", ".join(f"{row['E a^2 late']:.3f} with K = {row['K']}" for row in found)
    alt = f"Left: the mean place along the valley falls alike for all K, with a narrower band for more workers. Right: excess sharpness in the end: {told}."
    caption = (
        f"A valley whose sharpness is $1 + a^2$ and whose noise also acts along the floor; one local batch, so more workers mean a larger global batch. Left: mean and standard "
        f"deviation over {record.config['valley_replicas']} runs. The drift is the same for every K; the variance early on goes as K to the power {exponent:.2f}. "
        "Right: what is left of the sharpness in the end. Less diffusion at the same drift lets the iterate settle closer to the flattest place."
    )
    return Drawn("fig-local_sgd-diffusion", fig, alt, caption)
