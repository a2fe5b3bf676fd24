"""Every simulated operation against torch's own, in the roles forward, backward and descent; and linear attention made of softmax.

Glossary
    error      |simulated - true| / |true| over all entries; true: torch's operation and its autograd, in double precision
    literal    linear layers computed by attention heads over prefix tokens, as the construction has it
    mass       M, weight of the dummy key of a softmax head
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from papercore.experiments.tint.differences import PRECISIONS, SCALE_GRADIENT, relative, true_gradient
from papercore.tint import (
    ActivationBackward,
    ActivationForward,
    AttentionBackward,
    AttentionForward,
    LayerNormBackward,
    LayerNormDescent,
    LayerNormForward,
    loss_gradient,
)
from papercore.tint.layout import Layout
from papercore.tint.literal import run_backward, run_descent, run_forward
from papercore.tint.softmax import SoftmaxAttention

COLUMNS = ["module", "role", "precision", "error"]
MASSES = (1e2, 1e4, 1e6, 1e8)
SOFTMAX_EPSILONS = tuple(10.0 ** (-k / 2) for k in range(9))  # 1 to 1e-4
# Width, stacked rows, shards, rows of W, columns of W.
SHAPES = ((48, 4, 1, 48, 48), (48, 4, 3, 192, 48), (48, 3, 4, 48, 192), (12, 2, 2, 12, 5), (20, 5, 4, 7, 20), (8, 8, 8, 24, 16))  # fmt: skip


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in double precision."""
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=g, dtype=torch.float64)


def literal_linear(seed: int) -> list[list[Any]]:
    """Rows of COLUMNS: the largest error of literal heads over SHAPES, in each role, in double and single precision."""
    rows = []
    for precision in ("fp64", "fp32"):
        dtype = PRECISIONS[precision]
        worst = dict.fromkeys(("forward", "backward", "descent"), 0.0)
        for number, (width, stack, shards, d_out, d_in) in enumerate(SHAPES):
            layout = Layout(width, stack, shards, context=16)
            own = 10 * number + 1000 * seed
            x, grad = normal(2, 16, d_in, seed=own), normal(2, 16, d_out, seed=own + 1)
            weight, bias = normal(d_out, d_in, seed=own + 2), normal(d_out, seed=own + 3)
            mask = torch.arange(16).expand(2, 16) < 11
            given = [t.to(dtype) for t in (x, grad, weight, bias)]
            y, _ = run_forward(layout, given[0], given[2], given[3])
            back, _ = run_backward(layout, given[1], given[2])
            change, change_bias, _ = run_descent(layout, given[0], given[1], mask, 0.1)
            counted = grad * mask.unsqueeze(-1)
            errors = {
                "forward": relative(y, F.linear(x, weight, bias)),
                "backward": relative(back, grad @ weight),
                "descent": max(
                    relative(change, -0.1 * counted.mT @ x), relative(change_bias, -0.1 * counted.sum(1))
                ),
            }
            worst = {role: max(worst[role], errors[role]) for role in worst}
        rows += [["linear (literal heads)", role, precision, error] for role, error in worst.items()]
    return rows


def softmax_errors(seed: int) -> dict[str, np.ndarray]:
    """Error [eps] of a linear layer's forward pass by softmax heads: "fp64_1e+04" and so on for every mass, and "fp32_1e+04"."""
    layout = Layout(48, 4, 4, context=16)
    x, weight = normal(2, 16, 48, seed=seed), normal(48, 48, seed=seed + 1, scale=48**-0.5)
    true = F.linear(x, weight)
    out = {}
    for precision, mass in (*(("fp64", mass) for mass in MASSES), ("fp32", 1e4)):
        dtype = PRECISIONS[precision]
        errors = []
        for eps in SOFTMAX_EPSILONS:
            attention = SoftmaxAttention(eps, mass)
            y, _ = run_forward(layout, x.to(dtype), weight.to(dtype), attention=attention)
            errors.append(relative(y, true))
        out[f"{precision}_{mass:.0e}"] = np.array(errors)
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *, detached: bool) -> Tensor:
    """Causal attention written out, with scores as constants if `detached`."""
    qh, kh, vh = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = qh @ kh.mT / qh.shape[-1] ** 0.5
    scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    p = scores.softmax(-1)
    return ((p.detach() if detached else p) @ vh).transpose(1, 2).flatten(2)


def other_modules(seed: int, fd_eps: float) -> list[list[Any]]:
    """Rows of COLUMNS for layer norm, activation, attention and the loss, fused, in double and single precision."""
    batch, tokens, width, heads, words = 2, 16, 48, 6, 20
    x = 2 * normal(batch, tokens, width, seed=seed)
    grad = SCALE_GRADIENT * normal(batch, tokens, width, seed=seed + 1)
    gamma, beta = 1 + 0.3 * normal(width, seed=seed + 2), normal(width, seed=seed + 3)
    q, k, v = (normal(batch, tokens, width, seed=seed + 4 + i) for i in range(3))
    head = normal(words, width, seed=seed + 7)
    targets = torch.randint(words, (batch, tokens), generator=torch.Generator().manual_seed(seed + 8))
    mask = torch.ones(batch, tokens, dtype=torch.bool)

    def norm(t: Tensor) -> Tensor:
        return F.layer_norm(t, (width,), gamma, beta)

    def summed_loss(h: Tensor) -> Tensor:
        return F.cross_entropy((h @ head.T).flatten(0, 1), targets.flatten(), reduction="sum")

    weights = gamma.clone().requires_grad_()
    true_gamma = torch.autograd.grad(F.layer_norm(x, (width,), weights, beta), weights, grad)[0]
    h = x.clone().requires_grad_()
    true = {
        ("layer norm", "forward"): norm(x),
        ("layer norm", "backward"): true_gradient(norm, x, grad),
        ("layer norm", "descent"): -0.1 * true_gamma,
        ("activation", "forward"): F.gelu(x),
        ("activation", "backward"): true_gradient(F.gelu, x, grad),
        ("attention", "forward"): _attention(q, k, v, heads, detached=False),
        ("attention", "backward (values)"): true_gradient(lambda t: _attention(q, k, t, heads, detached=True), v, grad),
        ("loss", "backward"): torch.autograd.grad(summed_loss(h), h)[0],
    }  # fmt: skip
    rows = []
    for precision in ("fp64", "fp32"):

        def cast(t: Tensor, dtype: torch.dtype = PRECISIONS[precision]) -> Tensor:
            return t.to(dtype)

        y, memory = LayerNormForward()(cast(x), cast(gamma), cast(beta))
        change, _ = LayerNormDescent()(cast(grad), memory, mask, 0.1)
        active, kept = ActivationForward("gelu")(cast(x))
        mixed, remembered = AttentionForward(heads)(cast(q), cast(k), cast(v))
        found: dict[tuple[str, str], Tensor] = {
            ("layer norm", "forward"): y,
            ("layer norm", "backward"): LayerNormBackward(fd_eps=fd_eps)(cast(grad), memory, cast(gamma)),
            ("layer norm", "descent"): change[0] + change[1],
            ("activation", "forward"): active,
            ("activation", "backward"): ActivationBackward("gelu", fd_eps=fd_eps)(cast(grad), kept),
            ("attention", "forward"): mixed,
            ("attention", "backward (values)"): AttentionBackward()(cast(grad), remembered)[2],
            ("loss", "backward"): loss_gradient(cast(x), cast(head), targets, mask),
        }
        rows += [
            [module, role, precision, relative(found[module, role], true[module, role])]
            for module, role in true
        ]
    return rows
