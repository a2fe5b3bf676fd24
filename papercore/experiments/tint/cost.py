"""What a pass costs: multiply-adds counted operation by operation, and seconds in one run, against dynamic evaluation of the same document.

Glossary
    FLOP      2 for each multiply-add of a matrix product, counted by torch as it runs; what acts on each number alone (finite differences,
              norms, activations) is not counted
    ratio     over dynamic evaluation by autograd with detached scores of the same document(s): forward, backward, update, forward
    phases    first forward pass; loss and its gradient; backward; descent; forward passes after the steps
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from papercore.experiments.tint.gradients import RATE, simulated, stepped
from papercore.experiments.tint.perplexity import train_mask
from papercore.tint.counting import flops

if TYPE_CHECKING:
    from papercore.experiments.tint.config import QuickConfig

METHODS = {
    "fused": "TinT, fused",
    "dynamic": "dynamic evaluation",
    "literal": "TinT as constructed",
    "unsplit": "… without splitting projections",
}
PHASES = ("forward", "loss", "backward", "descent", "forward_again")
FLOP_COLUMNS = ["auxiliary", "method", *PHASES, "total", "over dynamic evaluation"]
TIME_COLUMNS = ["way", "documents", "ratio", "low", "high"]


def flop_rows(config: QuickConfig) -> list[list[Any]]:
    """Rows of FLOP_COLUMNS by formula: one document of this chapter, and one of 1,024 tokens with a model of GPT-2's size."""
    own: dict[str, Any] = {
        "n_layer": config.layers, "d_model": config.width, "n_head": config.heads, "length": config.length,
        "n_train": config.length // 2 - 1, "vocab_size": config.words + config.names,
    }  # fmt: skip
    large: dict[str, Any] = {
        "n_layer": 12,
        "d_model": 768,
        "n_head": 12,
        "length": 1024,
        "n_train": 511,
        "vocab_size": 50257,
    }
    rows: list[list[Any]] = []
    for label, sizes in (("this chapter's", own), ("GPT-2", large)):
        stack = config.stack if label != "GPT-2" else 4
        found = {method: flops(method, **sizes, stack=stack) for method in METHODS}
        for method, count in found.items():
            phases = [getattr(count, phase) for phase in PHASES]
            rows.append([label, method, *phases, count.total, count.times(found["dynamic"])])
    return rows


def counted(model: nn.Module, input_ids: Tensor, config: QuickConfig) -> dict[str, float]:
    """FLOP of one document as torch counts them while it runs: fused, literal heads, dynamic evaluation."""
    mask = train_mask(input_ids, 0.5)
    ways: dict[str, Callable[[], Any]] = {
        "fused": lambda: simulated(model, input_ids, mask, inner_lr=RATE, fd_eps=config.fd_eps),
        "literal": lambda: simulated(
            model, input_ids, mask, inner_lr=RATE, fd_eps=config.fd_eps, backend="literal", stack=config.stack
        ),
        "dynamic": lambda: stepped(model, input_ids, mask, lr=RATE),
    }
    out = {}
    for name, run in ways.items():
        counter = FlopCounterMode(display=False)
        with counter:
            run()
        out[name] = float(counter.get_total_flops())
    return out


def time_rows(config: QuickConfig, model: nn.Module, input_ids: Tensor) -> list[list[Any]]:
    """Rows of TIME_COLUMNS: interleaved rounds in this process, medians and quartiles of ratios."""
    rows: list[list[Any]] = []
    for documents in (1, len(input_ids)):
        some = input_ids[:documents]
        mask = train_mask(some, 0.5)
        tint = partial(simulated, model, some, mask, inner_lr=RATE, fd_eps=config.fd_eps)
        ways: dict[str, Callable[[], Any]] = {
            "dynamic evaluation, detached scores": partial(stepped, model, some, mask, lr=RATE),
            "dynamic evaluation": partial(stepped, model, some, mask, lr=RATE, detach_scores=False),
            "TinT, fused": tint,
            "TinT, literal heads": partial(tint, backend="literal"),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(config.timing_rounds + 1):
            for way, run in ways.items():
                begun = time.process_time()
                run()
                if number:  # the first round warms up
                    seconds[way].append(time.process_time() - begun)
        base = np.array(seconds["dynamic evaluation, detached scores"])
        for way in ways:
            low, middle, high = np.quantile(np.array(seconds[way]) / base, (0.25, 0.5, 0.75))
            rows.append([way, documents, float(middle), float(low), float(high)])
    return rows
