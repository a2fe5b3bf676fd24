"""Figures of single operations: error of every module, finite differences against their step, softmax in place of linear attention.

Glossary
    error    |simulated - true| / |true|; true: torch's own operation and autograd in double precision
    ε        step of a finite difference, or scale of a softmax head's scores
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from papercore.experiments.tint.figures_layout import LEGEND
from papercore.lab.figures import COLOURS, GREY, series_style, style
from papercore.lab.page import Drawn, require, rows
from papercore.lab.record import Record

SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
FLOOR = 1e-17  # an error of exactly zero is drawn here


def modules(record: Record) -> Drawn:
    """Relative error of every operation in every role, in double and single precision."""
    found = rows(record, "modules")
    names = list(dict.fromkeys((row["module"], row["role"]) for row in found))
    errors = {(row["module"], row["role"], row["precision"]): row["error"] for row in found}
    with style(height=4.0):
        fig = Figure()
        ax = fig.subplots()
        for index, (precision, label) in enumerate(
            (("fp64", "double precision"), ("fp32", "single precision"))
        ):
            values = [max(errors[*name, precision], FLOOR) for name in names]
            ax.barh(
                np.arange(len(names)) + 0.4 * (index - 0.5), np.array(values) - FLOOR * 0.5, left=FLOOR * 0.5, height=0.38, color=COLOURS[index],
                hatch=("", "//")[index], edgecolor="#333333", linewidth=0.5, label=label,
            )  # fmt: skip
        ax.set_yticks(range(len(names)), [f"{module}, {role}" for module, role in names], fontsize=8.5)
        ax.invert_yaxis()
        ax.set(xscale="log", xlim=(FLOOR * 0.5, 1e-1), xlabel="relative error")
        ax.grid(visible=False, axis="y")
        fig.legend(ncols=2, **LEGEND)
    told = ", ".join(f"{m} {r} {errors[m, r, 'fp64']:.0e} and {errors[m, r, 'fp32']:.0e}" for m, r in names)
    eps = record.config["fd_eps"]
    caption = (
        "Error of each simulated operation against torch's own. Linear layers are run by literal attention heads over prefix tokens, in six shapes, the "
        f"worst shown: exact to rounding. So is everything but the two backward passes by finite differences (ε = {eps:g}), which are approximations by "
        "design. (Attention's backward pass is compared with autograd that holds the scores fixed; what that leaves out is measured further down.)"
    )
    return Drawn(
        "fig-tint-modules", fig, f"Relative errors in double and single precision: {told}.", caption, dpi=100
    )


def differences(record: Record) -> Drawn:
    """Error of layer norm's and GELU's backward pass against ε: three precisions, forward and central, with slopes 1 and 2."""
    names = [
        f"difference_{f}_{p}_{k}" for f in ("layernorm", "gelu") for p in ("fp64", "fp32", "bf16") for k in ("forward", "central")
    ]  # fmt: skip
    require(record, "difference_eps", "layernorm_slope", *names)
    eps, m = np.asarray(record.arrays["difference_eps"]), record.metrics
    with style(height=3.4):
        fig = Figure()
        axes = fig.subplots(1, 2, sharey=True)
        for ax, function, label in zip(axes, ("layernorm", "gelu"), ("layer norm", "GELU"), strict=True):
            for index, (precision, word) in enumerate(
                (("fp64", "double"), ("fp32", "single"), ("bf16", "bfloat16"))
            ):
                for kind in ("forward", "central"):
                    values = np.maximum(record.arrays[f"difference_{function}_{precision}_{kind}"], 1e-12)
                    drawn = series_style(index) | {
                        "linestyle": "-" if kind == "forward" else (0, (2, 1.5)),
                        "markersize": 3.5,
                    }
                    if kind == "central":
                        drawn |= {"markerfacecolor": "white"}
                    ax.plot(eps, values, label=f"{word}, {kind}" if ax is axes[0] else None, **drawn)
            top = record.arrays[f"difference_{function}_fp64_forward"][0]
            dotted = {"color": GREY, "linewidth": 0.9, "linestyle": ":", "marker": "none"}
            ax.plot([1e-2, 1e-5], [2e-3 * top, 2e-6 * top], **dotted)
            ax.annotate("slope 1", (1e-5, 1.5e-6 * top), fontsize=8, color=GREY, ha="center", va="top")
            low = record.arrays[f"difference_{function}_fp64_central"][0]
            ax.plot([1, 1e-3], [0.2 * low, 0.2e-6 * low], **dotted)
            ax.annotate("slope 2 ", (1e-2, 0.2e-4 * low), fontsize=8, color=GREY, ha="right", va="top")
            ax.set(xscale="log", yscale="log", ylim=(1e-12, 5), xlabel=f"ε, {label}")
            ax.invert_xaxis()
        axes[0].set(ylabel="relative error")
        fig.legend(ncols=3, **LEGEND)
    alt = (
        f"Relative error of the backward pass against ε from 1 down to 1e-7, for layer norm and GELU. Double precision, forward difference: slope "
        f"{m['layernorm_slope']:.2f} and {m['gelu_slope']:.2f}; central: {m['layernorm_central_slope']:.2f}, down to rounding. Single precision is best at "
        f"ε = {m['layernorm_fp32_best_eps']:g} with {m['layernorm_fp32_best']:.1e} and is {m['layernorm_fp32_at_1e_3']:.1e} at 0.001. bfloat16 never gets below "
        f"{m['layernorm_bf16_best']:.2f}."
    )
    caption = (
        "Two errors that pull in opposite directions: a smaller ε makes the difference truer (slope 1; slope 2 for the central one) and lets rounding in, "
        f"which grows as 1/ε. In single precision the best ε of a forward difference is near {m['layernorm_fp32_best_eps']:g}; the paper's code takes 0.001, "
        f"where layer norm errs by {m['layernorm_fp32_at_1e_3']:.1e}. In bfloat16 there is no good ε at all. Entries of the gradient are about 0.05 "
        "here, and the error grows with ε times their size."
    )
    return Drawn("fig-tint-differences", fig, alt, caption, dpi=100)


def softmax(record: Record) -> Drawn:
    """Error of softmax heads that stand in for linear attention, against ε for several masses of the dummy key."""
    names = sorted(name for name in record.arrays if name.startswith("softmax_fp"))
    require(record, "softmax_eps", "softmax_slope", *(names or ["softmax_fp64_1e+04"]))
    eps, m = np.asarray(record.arrays["softmax_eps"]), record.metrics
    names = sorted(names, key=lambda name: (name.startswith("softmax_fp32"), name))
    with style(height=3.1):
        fig = Figure()
        ax = fig.subplots()
        for index, name in enumerate(names):
            _, precision, mass = name.split("_")
            power = int(np.log10(float(mass)))
            label = f"M = 10{str(power).translate(SUPERSCRIPT)}" + (", single" if precision == "fp32" else "")
            drawn = series_style(index) | {"markersize": 4.5 - 0.3 * index}
            ax.plot(eps, record.arrays[name], label=label, **drawn)
        top = float(record.arrays[names[-2]][0])
        ax.plot([1, 1e-4], [0.3 * top, 0.3e-4 * top], color=GREY, linewidth=0.9, linestyle=":", marker="none")
        ax.annotate("slope 1 ", (1e-2, 0.3e-2 * top), fontsize=8, color=GREY, ha="right", va="top")
        ax.set(xscale="log", yscale="log", xlabel="ε, scale of the scores", ylabel="relative error of W x")
        ax.invert_xaxis()
        fig.legend(ncols=5, **LEGEND)
    last = ", ".join(f"{name.removeprefix('softmax_')} {record.arrays[name][-1]:.1e}" for name in names)
    alt = (
        f"Relative error of a linear layer computed by softmax heads against ε from 1 to {eps[-1]:g}. With the heaviest dummy key the slope is "
        f"{m['softmax_slope']:.2f}. Errors at the smallest ε: {last}."
    )
    caption = (
        "Linear attention out of softmax. Scores are scaled down by ε until the exponential is nearly straight, and a dummy key of weight M takes nearly all "
        "attention, so that the denominator hardly moves. The error falls in step with ε until a floor of about 1/M times the sum of the scores. In single "
        f"precision rounding comes first: nothing below {m['softmax_fp32_best']:.0e}."
    )
    return Drawn("fig-tint-softmax", fig, alt, caption)
