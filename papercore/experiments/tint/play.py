"""What the chapter's controls turn: the inner step, the finite difference, and one linear layer traced through its heads.

explore(play.perplexity(record), name=..., fraction=..., layers=..., steps=...)

The first two read the record's arrays; the trace is made by the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from papercore.experiments.tint.quick import EPSILONS, PLAYED_STEPS
from papercore.lab.page import require, rows
from papercore.lab.plot import Plot
from papercore.lab.record import Record
from papercore.tint.layout import Layout
from papercore.tint.literal import Trace, run_backward, run_forward


def settings(record: Record) -> dict[str, list[Any]]:
    """Values of the control of `perplexity`."""
    require(record, "played_tint", "fractions")
    layers = np.asarray(record.arrays["played_tint"]).shape[1]
    return {
        "fraction": [float(f) for f in record.arrays["fractions"]],
        "layers": list(range(1, layers + 1)),
        "steps": list(PLAYED_STEPS),
    }


def perplexity(record: Record) -> Callable[..., Plot]:
    """Perplexity of the rest against the inner rate, for a train fraction, a number of trained layers and of steps."""
    require(record, "played_tint", "played_vanilla", "rates", "fractions")
    values, vanilla = (np.asarray(record.arrays[f"played_{name}"]) for name in ("tint", "vanilla"))
    rates = np.asarray(record.arrays["rates"])
    given = settings(record)
    top = float(min(np.nanmax(values), 1.4 * vanilla.max()))

    def shown(fraction: float = 0.5, layers: int = given["layers"][-1], steps: int = 1) -> Plot:
        f, s = given["fraction"].index(fraction), given["steps"].index(steps)
        curve = values[f, layers - 1, s]
        best = int(np.nanargmin(curve))
        return Plot(
            rates, {"TinT": [float(f"{v:.4g}") if v <= top else float("nan") for v in curve], "no update": [float(f"{vanilla[f]:.4g}")] * len(rates)},
            "inner rate η", "perplexity of the rest", xscale="log", ylim=(0.98 * float(np.nanmin(values)), 1.02 * top),
            text=f"best rate {rates[best]:g}: perplexity {curve[best]:.2f}, without update {vanilla[f]:.2f}",
        )  # fmt: skip

    return shown


def cosines(record: Record) -> Callable[..., Plot]:
    """Cosine of every tensor's change to autograd with detached scores, for a step of the finite difference and random or trained weights."""
    names = [row["tensor"] for row in rows(record, "tensors")]
    require(
        record, "cosines_random_eps", "cosines_trained_eps", "cosines_trained_full", "cosines_random_full"
    )

    def shown(weights: str = "trained", epsilon: float = 1e-2) -> Plot:
        found = np.asarray(record.arrays[f"cosines_{weights}_eps"])[EPSILONS.index(epsilon)]
        full = np.asarray(record.arrays[f"cosines_{weights}_full"]).mean(0)
        lowest = int(found.argmin())
        return Plot(
            range(1, len(names) + 1),
            {"to autograd, scores held fixed": np.round(found, 4), "to full autograd, ε = 0.01": np.round(full, 4)},
            "tensor, from the first layer up", "cosine", ylim=(0.5, 1.02),
            text=f"lowest to fixed scores: {names[lowest]}, {found[lowest]:.4f}; lowest to full autograd: {names[int(full.argmin())]}, {full.min():.3f}",
        )  # fmt: skip

    return shown


STEPS = ("query", "key of prefix token 0", "key of prefix token 1", "scores", "value of prefix token 0", "written by the head", "all heads together")  # fmt: skip


def traced(role: str) -> tuple[Layout, Trace, torch.Tensor]:
    """(layout, trace, true result [T, D]) of a small linear layer on one document of three tokens; role: forward or backward."""
    layout = Layout(d_model=8, stack=4, shards=2, context=4)
    g = torch.Generator().manual_seed(5)
    signal, weight = torch.randn(1, 3, 8, generator=g), torch.randn(8, 8, generator=g) / 2
    if role == "forward":
        _, traces = run_forward(layout, signal, weight)
        return layout, traces[0], (signal @ weight.T)[0]
    _, traces = run_backward(layout, signal, weight)
    return layout, traces[0], (signal @ weight)[0]


def trace() -> Callable[..., Plot]:
    """One linear layer, head by head: what a token asks, what the prefix answers, what is written. Needs no record."""
    made = {role: traced(role) for role in ("forward", "backward")}

    def shown(role: str = "forward", head: int = 0, step: str = STEPS[0]) -> Plot:
        layout, found, true = made[role]
        width = layout.d_sim
        label = f"{role}, head {head}"
        if step.startswith("query"):
            y, text = found.query[0, head, 0], "token 0 asks"
        elif step.startswith("key"):
            which = int(step[-1])
            y, text = found.key[0, head, which], f"prefix token {which} offers"
        elif step.startswith("value"):
            y, text = found.value[0, head, 0], "what prefix token 0 gives when it is asked"
        elif step == "scores":
            y, text = found.scores[0, head, 0], "query times key, one score a prefix token, no softmax"
        elif step.startswith("written"):
            y, text = (
                (found.scores[0, head, 0].unsqueeze(-1) * found.value[0, head]).sum(0),
                "scores times values, summed",
            )
        else:
            y, text = (
                found.written[0, 0, : layout.d_model],
                "sum over heads: "
                + ("W x" if role == "forward" else "Wᵀ δ")
                + f", largest error {float((found.written[0, 0, : layout.d_model] - true[0]).abs().max()):.0e}",
            )
        values = [float(f"{v:.3g}") for v in y.tolist()]
        padded = values + [float("nan")] * (layout.d_model - len(values))
        return Plot(range(layout.d_model), {"numbers": padded}, "number in the vector", "value", ylim=(-4, 4), text=f"{label}: {text} (D = {layout.d_model}, K = {layout.n_prefix}, D_sim = {width})")  # fmt: skip

    return shown
