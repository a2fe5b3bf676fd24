"""Perplexity of the rest of a document after an update on its first part: vanilla, TinT, dynamic evaluation.

The inner rate of a seed is chosen on the other seeds' choosing documents, which come from other languages and topics and were scored
by other auxiliaries: nothing that is reported took part in the choice.

Glossary
    method        vanilla (no update); tint (one forward pass of the simulator); dynamic (autograd through everything, all weights of the
                  blocks updated: queries, keys and the scales of norms too); stop (autograd with detached scores and TinT's
                  weights: what TinT would be without finite differences)
    whole         the simulator with what the paper leaves out: gradients through scores, queries, keys and norms' scales updated
    fraction      share of a document's tokens that are trained on; n_train = floor(fraction * length) tokens
    losses        mean negative log-probability of the tokens behind the first n_train [documents]
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papercore.experiments.tint.auxiliaries import auxiliary_from, documents_of, token_losses
from papercore.tint import TinTConfig, TinTModel, TinyGPT, dynamic_eval

if TYPE_CHECKING:
    from papercore.experiments.tint.config import QuickConfig

METHODS = ("vanilla", "tint", "dynamic")


def train_mask(input_ids: Tensor, fraction: float) -> Tensor:
    """[n, T] bool, True for the first floor(fraction * T) tokens.

    Raises:
        ValueError: fewer than two tokens to train on, or none to test on.
    """
    length = input_ids.shape[1]
    n_train = int(fraction * length)
    if not 2 <= n_train < length:
        raise ValueError(
            f"train fraction {fraction} is {n_train} of {length} tokens: expected at least 2 and fewer than all."
        )
    return (torch.arange(length, device=input_ids.device) < n_train).expand_as(input_ids)


def rest_losses(logits: Tensor, input_ids: Tensor, fraction: float) -> NDArray[np.float64]:
    """Mean loss [n] of the tokens behind the training part."""
    n_train = int(fraction * input_ids.shape[1])
    return token_losses(logits, input_ids)[:, n_train - 1 :].double().mean(1).cpu().numpy()


def updated_losses(
    model: TinyGPT, input_ids: Tensor, fraction: float, method: str, *, rate: float, steps: int = 1, fd_eps: float = 1e-2
) -> NDArray[np.float64]:  # fmt: skip
    """Losses [n] after an update on the training part; every document has its own."""
    mask = train_mask(input_ids, fraction)
    if method == "vanilla":
        with torch.no_grad():
            return rest_losses(model(input_ids).logits, input_ids, fraction)
    with warnings.catch_warnings():
        # A rate that is too big is part of the sweep.
        warnings.simplefilter("ignore", UserWarning)
        if method in ("tint", "whole"):
            more: dict[str, Any] = (
                {"attn_grad": "full", "update_layernorm": "all"} if method == "whole" else {}
            )
            settings = TinTConfig(n_steps=steps, inner_lr=rate, fd_eps=fd_eps, **more)
            logits = TinTModel.from_auxiliary(model, settings)(input_ids, mask).logits
        elif method == "stop":
            logits = dynamic_eval(model, input_ids, mask, lr=rate, steps=steps).logits
        else:
            logits = dynamic_eval(
                model, input_ids, mask, lr=rate, steps=steps, detach_scores=False, update_layernorm="all"
            ).logits
    return rest_losses(logits, input_ids, fraction)


def sweep_part(config: QuickConfig, seed: int, trained: dict[str, Any]) -> dict[str, Any]:
    """Losses on the choosing documents for every rate: tint and dynamic [fractions, rates, documents], vanilla [fractions, documents]."""
    model = auxiliary_from(config, seed, trained)
    ids = documents_of(config, seed, "choose").input_ids.to(config.torch_device())
    out = {
        "vanilla": np.stack([updated_losses(model, ids, f, "vanilla", rate=0.0) for f in config.fractions])
    }
    for method in ("tint", "dynamic"):
        out[method] = np.stack([
            [updated_losses(model, ids, f, method, rate=rate, fd_eps=config.fd_eps) for rate in config.rates]
            for f in config.fractions
        ])  # fmt: skip
    return out


def chosen_rates(
    config: QuickConfig, sweeps: Sequence[dict[str, Any]], seed: int, method: str
) -> list[float]:
    """The rate of each fraction for one seed: the least mean loss over the other seeds' choosing documents."""
    others = [sweep[method] for number, sweep in enumerate(sweeps) if number != seed]
    mean = np.mean([one.mean(-1) for one in others], axis=0)  # [fractions, rates]
    return [config.rates[int(i)] for i in mean.argmin(1)]


def report_part(
    config: QuickConfig, seed: int, trained: dict[str, Any], rates: dict[str, list[float]]
) -> dict[str, Any]:
    """Losses [fractions, documents] of every method on the test documents, at the chosen rates; of "stop" at one fraction."""
    model = auxiliary_from(config, seed, trained)
    ids = documents_of(config, seed, "test").input_ids.to(config.torch_device())
    out: dict[str, Any] = {}
    for method in METHODS:
        own = rates.get(method, [0.0] * len(config.fractions))
        out[method] = np.stack([
            updated_losses(model, ids, f, method, rate=rate, fd_eps=config.fd_eps)
            for f, rate in zip(config.fractions, own, strict=True)
        ])  # fmt: skip
    # The stop-gradient reference is TinT's own target, so it takes TinT's rate; one fraction is enough to see that they agree.
    out["whole"] = np.stack([
        updated_losses(model, ids, f, "whole", rate=rate, fd_eps=config.fd_eps)
        for f, rate in zip(config.fractions, rates["dynamic"], strict=True)
    ])  # fmt: skip
    at = config.fractions.index(0.5) if 0.5 in config.fractions else 0
    out["stop"] = updated_losses(model, ids, config.fractions[at], "stop", rate=rates["tint"][at])
    return out
