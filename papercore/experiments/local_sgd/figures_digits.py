"""Figures of the digits and of `standard`: gains from a fresh network, post-local curves, sharpness, CIFAR-10."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from papercore.experiments.local_sgd.digits import CONTROL_PERIOD
from papercore.experiments.local_sgd.figures_theory import LEGEND
from papercore.lab.figures import COLOURS, GREY, series_style, style
from papercore.lab.page import Drawn, require
from papercore.lab.record import Record


def scratch(record: Record) -> Drawn:
    """Gains over data parallel training from a fresh network, with and without memorised labels, and training losses."""
    periods = record.config.get("periods", [])
    arms = [("scratch", h) for h in periods] + [(kind, CONTROL_PERIOD) for kind in ("clean", "fresh")]
    require(
        record,
        "seeds",
        *(f"{kind}_h{h}_{what}" for kind, h in arms for what in ("gain", "gain_se")),
        "scratch_h0_train_loss",
    )
    m = record.metrics
    labels = [
        {
            "scratch": f"20 % wrong for good,\nH = {h}",
            "clean": f"clean labels,\nH = {h}",
            "fresh": f"fresh noise,\nH = {h}",
        }[kind]
        for kind, h in arms
    ]
    with style(height=3.1):
        fig = Figure()
        ax, side = fig.subplots(1, 2, width_ratios=(1.35, 1))
        for place, (kind, h) in enumerate(arms):
            index = 1 if kind == "scratch" else 6
            ax.errorbar(
                m[f"{kind}_h{h}_gain"],
                place,
                xerr=2 * m[f"{kind}_h{h}_gain_se"],
                capsize=2.5,
                elinewidth=1.2,
                **{**series_style(index), "linestyle": "none"},
            )
        ax.axvline(0, color=GREY, linewidth=1.0, marker="none")
        ax.set_yticks(range(len(arms)), labels, fontsize=8.5)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set(xlabel="gain in test accuracy, points")
        steps = record.arrays["scratch_steps"]
        for index, h in enumerate((0, *periods)):
            loss = record.arrays[f"scratch_h{h}_train_loss"].mean(axis=0)
            side.plot(
                steps,
                loss,
                label="data parallel" if h == 0 else f"H = {h}",
                **series_style(index, points=len(steps)),
            )
        side.set(yscale="log", xlabel="step", ylabel="training loss")
        fig.legend(ncols=4, **LEGEND)
    told = "; ".join(
        f"{label.replace(chr(10), ' ')}: {m[f'{kind}_h{h}_gain']:+.2f} ± {m[f'{kind}_h{h}_gain_se']:.2f}"
        for label, (kind, h) in zip(labels, arms, strict=True)
    )
    losses = ", ".join(f"{m[f'scratch_h{h}_train_loss']:.3f} (H = {h})" for h in periods)
    alt = f"Gain in test accuracy over data parallel training with standard errors. {told}. Training loss at the end: {m['scratch_h0_train_loss']:.3f} for data parallel, {losses}."
    caption = (
        f"Left: test accuracy minus that of data parallel training, paired over {m['seeds']:.0f} seeds; whiskers two standard errors. With clean or freshly "
        "redrawn labels (grey), with nothing wrong to learn by heart, there is little or nothing to gain. Right: training loss with wrong labels. Local SGD learns them by heart more slowly, "
        "so a part of this gain is less memorising, not flatter minima."
    )
    return Drawn("fig-local_sgd-scratch", fig, alt, caption)


def post(record: Record) -> Drawn:
    """Post-local runs from one start: test accuracy and training loss against steps."""
    periods = record.config.get("post_periods", [])
    arms = [0, *periods]
    require(
        record,
        "post_steps",
        "post_phase1_steps",
        *(f"post_h{h}_{what}" for h in arms for what in ("test_accuracy", "train_loss", "test_loss")),
    )
    switch = record.config["switch"]
    first, second = record.arrays["post_phase1_steps"], switch + record.arrays["post_steps"]
    with style(height=3.2):
        fig = Figure()
        axes = fig.subplots(1, 3)
        for ax, what, label in zip(
            axes,
            ("test_accuracy", "train_loss", "test_loss"),
            ("test accuracy", "training loss", "test loss"),
            strict=True,
        ):
            start = record.arrays[f"post_phase1_{what}"].mean(axis=0)
            ax.plot(first, start, color=GREY, linewidth=1.4, marker="none")
            for index, h in enumerate(arms):
                runs = record.arrays[f"post_h{h}_{what}"]
                mean, se = runs.mean(axis=0), runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
                ax.plot(
                    second,
                    mean,
                    label=("data parallel" if h == 0 else f"H = {h}") if what == "test_accuracy" else None,
                    **{**series_style(index, points=len(second)), "markersize": 4},
                )
                ax.fill_between(second, mean - se, mean + se, color=COLOURS[index], alpha=0.2, linewidth=0.5)
            ax.axvline(switch, color=GREY, linewidth=0.9, linestyle=":", marker="none")
            ax.set(xlabel="step", ylabel=label, **({"yscale": "log"} if what == "train_loss" else {}))
            ax.locator_params(axis="x", nbins=3)
        fig.legend(ncols=4, **LEGEND)
    m = record.metrics
    told = "; ".join(
        f"{'data parallel' if h == 0 else f'H = {h}'}: {m[f'post_h{h}_accuracy_160']:.1f} % after 160 steps, {m[f'post_h{h}_accuracy']:.1f} % at the end, training loss {m[f'post_h{h}_train_loss']:.4f}, test loss {m[f'post_h{h}_test_loss']:.3f}"
        for h in arms
    )
    alt = f"Test accuracy, training loss and test loss from a common start at step {switch}. {told}."
    caption = (
        f"All arms start from the same weights at the dotted line, at the same constant learning rate and with the same samples. Mean of {m['seeds']:.0f} seeds, bands one "
        "standard error. Right after the switch the average forgets a part of the wrong labels, and accuracy jumps; then they are learned again. In the end "
        "the training losses are all but equal, and the test loss is not."
    )
    return Drawn("fig-local_sgd-post", fig, alt, caption)


def flatness(record: Record) -> Drawn:
    """Sharpness at the end of the post-local runs, seed by seed, over that of data parallel training."""
    periods = record.config.get("post_periods", [])
    require(record, *(f"post_h{h}_{what}" for h in (0, *periods) for what in ("top", "trace")))
    with style(height=2.7):
        fig = Figure()
        axes = fig.subplots(1, 2)
        told = []
        for ax, what, label in zip(
            axes, ("trace", "top"), ("trace of the Hessian", "largest eigenvalue"), strict=True
        ):
            base = record.arrays[f"post_h0_{what}"]
            for index, h in enumerate(periods, 1):
                mine = record.arrays[f"post_h{h}_{what}"]
                ax.plot(
                    base,
                    mine,
                    label=f"H = {h}" if what == "trace" else None,
                    **{**series_style(index), "linestyle": "none"},
                )
                told.append(f"{label}, H = {h}: {record.metrics[f'post_h{h}_{what}_ratio']:.2f} times")
            high = 1.1 * max(record.arrays[f"post_h{h}_{what}"].max() for h in (0, *periods))
            ax.plot([0, high], [0, high], color=GREY, linewidth=1.0, linestyle=":", marker="none")
            ax.set(xlabel=f"{label},\ndata parallel", ylabel="Local SGD", xlim=(0, high), ylim=(0, high))
        fig.legend(ncols=3, **LEGEND)
    alt = f"Sharpness of Local SGD against that of data parallel training from the same start, one point a seed. Geometric means of the ratio: {'; '.join(told)}."
    caption = (
        "Hessian of the training loss, wrong labels included, at the averaged weights in the end; one point a seed, below the dotted line where Local SGD is flatter. "
        f"Traces by {record.config['probes']} random probes."
    )
    return Drawn("fig-local_sgd-flatness", fig, alt, caption)


def standard(record: Record) -> Drawn:
    """CIFAR-10: curves of the post-local runs, gains against H, accuracy against eta H with label noise."""
    require(
        record, "standard_post_h1_test_accuracy", "standard_noise_h1_accuracy", "standard_large_h1_accuracy"
    )
    post_h, noise_h = (_periods(record, part) for part in ("post", "noise"))
    m = record.metrics
    with style(height=3.1):
        fig = Figure()
        ax, gains, noise = fig.subplots(1, 3)
        for index, h in enumerate(post_h):
            step = record.arrays[f"standard_post_h{h}_step"][0]
            mean = 100 * record.arrays[f"standard_post_h{h}_test_accuracy"].mean(axis=0)
            ax.plot(
                step,
                mean,
                label="SGD" if h == 1 else f"H = {h}",
                **{**series_style(index, points=len(step)), "markersize": 4},
            )
        ax.set(xlabel="step of phase 2", ylabel="test accuracy, %")
        _gains(gains, m, "post", post_h[1:], 1, "small η")
        _gains(gains, m, "large", _periods(record, "large")[1:], 6, "large η")
        gains.axhline(0, color=GREY, linewidth=1.0, marker="none")
        gains.set(xscale="log", xlabel="local steps H", ylabel="gain over SGD, points")
        gains.legend(fontsize=8)
        values = record.arrays["standard_noise_seed_accuracy"]
        for seed in range(values.shape[1]):
            noise.plot(
                noise_h, values[:, seed], color=GREY, linewidth=0.8, linestyle="-", marker=".", label=None
            )
        noise.plot(noise_h, values.mean(axis=1), **series_style(3))
        noise.set(xscale="log", xlabel="local steps H", ylabel="test accuracy, %, label noise")
        fig.legend(*ax.get_legend_handles_labels(), ncols=5, **LEGEND)
    told = [
        f"H = {h}: {m[f'standard_post_h{h}_gain']:+.2f} ± {m[f'standard_post_h{h}_gain_se']:.2f}"
        for h in post_h[1:]
    ]
    noisy = [f"{m[f'standard_noise_h{h}_accuracy']:.2f} at H = {h}" for h in noise_h]
    alt = f"CIFAR-10. Post-local gain over SGD in points: {'; '.join(told)}. With label noise test accuracy is {', '.join(noisy)}."
    caption = (
        f"{record.notes.get('standard_form', '')} Left: test accuracy of the average after the switch. Middle: gain at the end, whiskers two standard errors. "
        "Right: accuracy with labels redrawn at every step; grey: seeds."
    )
    return Drawn("fig-local_sgd-standard", fig, alt, caption)


def _gains(ax: Any, m: dict[str, float], part: str, periods: list[int], index: int, label: str) -> None:
    ax.errorbar(
        periods, [m[f"standard_{part}_h{h}_gain"] for h in periods], yerr=[2 * m[f"standard_{part}_h{h}_gain_se"] for h in periods],
        label=label, capsize=2.5, elinewidth=1.1, **series_style(index),
    )  # fmt: skip


def _periods(record: Record, part: str) -> list[int]:
    """The H of a part, 1 (SGD) first."""
    lead, tail = f"standard_{part}_h", "_accuracy"
    names = [name for name in record.metrics if name.startswith(lead) and name.endswith(tail)]
    return sorted(int(name.removeprefix(lead).removesuffix(tail)) for name in names)
