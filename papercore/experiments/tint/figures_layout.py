"""The figure of the layout: a simulator's sequence drawn from the tensors that the kernel makes of a real layer.

Glossary
    K, S, D    prefix tokens, rows of the weight in one of them, width of the auxiliary
    state      [K + T, D_sim], prefix first
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from papercore.lab.figures import GREY, style
from papercore.lab.page import Drawn
from papercore.lab.record import Record
from papercore.tint import TinyGPT
from papercore.tint.layout import Layout

# Room for a line of text above a figure; the style's own spacing would cut some entries off at the edge.
LEGEND: dict[str, Any] = {
    "loc": "outside upper left",
    "columnspacing": 1.2,
    "handlelength": 2.3,
    "handletextpad": 0.5,
    "fontsize": 9,
    "borderaxespad": 0.1,
}
WIDTH, STACK, TOKENS, CONTEXT = 16, 4, 6, 8


def sequence() -> tuple[Layout, np.ndarray, np.ndarray]:
    """(layout, state [K + T, D_sim], positions [K + T, T_max + K]) of the first value projection of a small random GPT, just before
    descent: the tokens hold the gradient as signal and their input as memory."""
    model = TinyGPT(n_embd=WIDTH, n_head=2, n_layer=1, vocab_size=12, n_positions=CONTEXT, init_std=0.3)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    layer: Any = model.get_submodule("h.0.attn.v_proj")
    seen: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _m, given, _out: seen.update(x=given[0].detach())),
        layer.register_full_backward_hook(lambda _m, _given, out: seen.update(grad=out[0].detach())),
    ]
    model(ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    layout = Layout(WIDTH, STACK, 1, CONTEXT)
    bias = torch.linspace(-1, 1, WIDTH)  # the model's own is zero at the start, and could not be seen
    prefix = layout.stack_weight(layer.weight.detach(), bias)
    grad = seen["grad"] / seen["grad"].abs().max()
    tokens = layout.tokens(grad, seen["x"])[0]
    return layout, torch.cat([prefix, tokens]).numpy(), layout.positions(TOKENS, like=tokens).numpy()


def layout(record: Record | None = None) -> Drawn:
    """State and positions of a simulator's sequence. Drawn from the kernel; needs no record."""
    shape, state, positions = sequence()
    k, d = shape.n_prefix, shape.d_model
    with style(height=3.4):
        fig = Figure()
        left, right = fig.subplots(1, 2, width_ratios=(4.4, 1), sharey=True)
        left.imshow(
            np.ma.masked_equal(state, 0), cmap="PuOr", vmin=-1, vmax=1, aspect="auto", interpolation="none"
        )
        right.imshow(
            np.ma.masked_equal(positions, 0),
            cmap="Greys",
            vmin=0,
            vmax=1.3,
            aspect="auto",
            interpolation="none",
        )
        for ax in (left, right):
            ax.axhline(k - 0.5, color="#222222", linewidth=1.2)
            ax.grid(visible=False)
        for column in range(d, shape.d_sim, d):
            left.axvline(column - 0.5, color="#999999", linewidth=0.7)
        right.axvline(CONTEXT - 0.5, color="#999999", linewidth=0.7)
        left.set_yticks(
            range(k + TOKENS),
            [f"prefix {i}" for i in range(k)] + [f"token {t}" for t in range(TOKENS)],
            fontsize=8.5,
        )
        middles = [(i + 0.5) * d - 0.5 for i in range(STACK + 1)]
        left.set_xticks(
            middles, [f"row {STACK}k" + (f"+{s}" if s else "") for s in range(STACK)] + ["bias"], fontsize=8.5
        )
        left.set_xlabel(f"prefix: {STACK} stacked rows of W and b; D_sim = {shape.d_sim} numbers", fontsize=9)
        top = left.secondary_xaxis("top")
        top.set_xticks(
            [middles[0], middles[STACK // 2], middles[-1]], ["signal", "(free)", "memory"], fontsize=8.5
        )
        top.tick_params(length=0)
        top.set_xlabel("token: signal in front, memory at the end", fontsize=9)
        right.set_xticks([CONTEXT / 2 - 0.5, CONTEXT + k / 2 - 0.5], ["token", "prefix"], fontsize=8.5)
        right.set_xlabel("one-hot position", fontsize=9)
        left.tick_params(color=GREY)
    large, paper = Layout(768, 4, context=2048), 4 * 768
    alt = (
        f"A heat map of {k} prefix tokens above {TOKENS} ordinary tokens, {shape.d_sim} numbers each. Every prefix token is full: {STACK} rows of the "
        f"weight and the bias. An ordinary token holds its signal in the first {d} numbers and its memory in the last {d}; the rest is empty. At the "
        "right the one-hot positions: tokens in the first columns, prefix tokens in the last."
    )
    caption = (
        f"The layout, from real tensors: the value projection of a model of width D = {d} just before its update (S = {STACK} rows a token, so K = {k} "
        f"prefix tokens). White is zero. Signal: the gradient that arrives, scaled to be seen; memory: the input that the layer kept. The last token predicts nothing, so that no gradient reaches it. For OPT-125M: "
        f"K = {large.n_prefix} prefix tokens, {large.n_position:,} positions, {large.d_sim:,} numbers a token with the bias in a slot of its own "
        f"(the paper's count leaves biases out: {paper:,})."
    )
    return Drawn("fig-tint-layout", fig, alt, caption, colours=48, dpi=100)
