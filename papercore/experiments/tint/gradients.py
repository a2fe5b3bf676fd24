"""How far the simulator's step is from the true one: tensor by tensor, approximation by approximation, step by step.

Glossary
    stop      autograd with detached attention scores: the gradient that the paper's construction aims at
    full      autograd through everything
    cosine    between the changes of one tensor by one document, of the simulator and of autograd; the mean over documents is shown,
              the lowest over tensors and documents is what the claims rest on
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papercore.experiments.tint.perplexity import train_mask
from papercore.tint import TinTConfig, TinTModel, TinTOutput, dynamic_eval

RATE = 1e-3  # of one-step comparisons; a single step's direction does not depend on it
# Label, dtype, settings of TinTConfig: each approximation alone, then together, then ways to go backwards that err less.
EXACT: dict[str, Any] = {"ln_grad": "exact", "act_grad": "exact", "attn_grad": "full"}
ATTRIBUTION: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("none: closed forms, all of attention", torch.float64, EXACT),
    ("layer norm by difference", torch.float64, EXACT | {"ln_grad": "finite_difference"}),
    ("activation by difference", torch.float64, EXACT | {"act_grad": "finite_difference"}),
    ("attention through values alone", torch.float64, EXACT | {"attn_grad": "value_only"}),
    ("all three, double precision", torch.float64, {}),
    ("all three, single precision", torch.float32, {}),
    ("… with the paper's code's ε = 0.001", torch.float32, {"fd_eps": 1e-3}),
    ("… with central differences, ε = 0.1", torch.float32, {"ln_grad": "central", "act_grad": "central", "fd_eps": 0.1}),
    ("… with ε = 0.0003 relative to the gradient", torch.float32, {"fd_eps": 3e-4, "fd_relative": True}),
)  # fmt: skip
ATTRIBUTION_COLUMNS = ["approximation", "precision", "error to full autograd", "error to detached scores", "lowest cosine", "loss minus that of dynamic evaluation"]  # fmt: skip


def simulated(model: nn.Module, input_ids: Tensor, mask: Tensor, **settings: Any) -> TinTOutput:
    """One pass of the simulator with these settings; a rate that is too big is shown by its numbers, not by a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return TinTModel.from_auxiliary(model, TinTConfig(**settings))(input_ids, mask)


def stepped(model: nn.Module, input_ids: Tensor, mask: Tensor, **settings: Any) -> TinTOutput:
    """The same by autograd."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return dynamic_eval(model, input_ids, mask, **settings)


def cosines(found: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Cosine [documents] of every tensor of `found`; a tensor that neither changes has cosine 1."""
    out = {}
    for name, change in found.items():
        a, b = change.double().flatten(1), true[name].double().flatten(1)
        product, size = (a * b).sum(1), a.norm(dim=1) * b.norm(dim=1)
        out[name] = torch.where(size > 0, product / size, ((a - b).norm(dim=1) == 0).double()).cpu().numpy()
    return out


def relative_error(found: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> float:
    """|found - true| / |true| over all tensors of `true` and all documents; a tensor missing from `found` counts as unchanged."""
    off = sum(float((found.get(k, 0.0) - v.double()).square().sum()) for k, v in true.items())
    return float((off / sum(float(v.double().square().sum()) for v in true.values())) ** 0.5)


@dataclasses.dataclass(frozen=True)
class TensorCosines:
    """Of one auxiliary: names of tensors, cosines [tensors, documents] to stop and full, and the share of the squared norm of the full
    gradient that lies in queries and keys, which the simulator does not update."""

    names: list[str]
    stop: np.ndarray
    full: np.ndarray
    dropped: float


def tensor_cosines(model: nn.Module, input_ids: Tensor, fraction: float, **settings: Any) -> TensorCosines:
    """Cosines of all tensors, those of layer norm's scale among them."""
    mask = train_mask(input_ids, fraction)
    tint = simulated(model, input_ids, mask, inner_lr=RATE, update_layernorm="all", **settings).updates
    shared: dict[str, Any] = {"lr": RATE, "update_layernorm": "all"}
    stop = stepped(model, input_ids, mask, **shared, detach_scores=True).updates
    full = stepped(model, input_ids, mask, **shared, detach_scores=False).updates
    to_stop, to_full = cosines(tint, stop), cosines(tint, full)
    squares = {name: float(change.double().square().sum()) for name, change in full.items()}
    missing = sum(value for name, value in squares.items() if name not in tint)
    names = list(tint)
    return TensorCosines(
        names, np.stack([to_stop[n] for n in names]), np.stack([to_full[n] for n in names]), missing / sum(squares.values())
    )  # fmt: skip


def attribution(model: nn.Module, input_ids: Tensor, fraction: float, rate: float, fd_eps: float) -> list[list[Any]]:  # fmt: skip
    """One row a setting of ATTRIBUTION, with the columns ATTRIBUTION_COLUMNS: what each approximation costs, from end to end."""
    mask = train_mask(input_ids, fraction)
    rows = []
    for label, dtype, settings in ATTRIBUTION:
        exact = copy.deepcopy(model).double()
        own = copy.deepcopy(model).to(dtype)
        shared: dict[str, Any] = {"lr": rate, "update_layernorm": "all"}
        full = stepped(exact, input_ids, mask, **shared, detach_scores=False)
        stop = stepped(exact, input_ids, mask, **shared, detach_scores=True)
        out = simulated(
            own,
            input_ids,
            mask,
            **({"inner_lr": rate, "update_layernorm": "all", "fd_eps": fd_eps} | settings),
        )
        target = full if settings.get("attn_grad") == "full" else stop
        lowest = min(float(values.min()) for values in cosines(out.updates, target.updates).values())
        rows.append([
            label, "double" if dtype == torch.float64 else "single", relative_error(out.updates, full.updates),
            relative_error({k: v for k, v in out.updates.items() if k in stop.updates}, stop.updates), lowest,
            float(out.loss) - float(full.loss),
        ])  # fmt: skip
    return rows


def step_cosines(model: nn.Module, input_ids: Tensor, fraction: float, rate: float, most_steps: int, fd_eps: float) -> np.ndarray:  # fmt: skip
    """Lowest cosine over tensors, mean over documents and lowest of all [steps, 2], for 1, 2, ... inner steps against as many by autograd
    with detached scores."""
    mask = train_mask(input_ids, fraction)
    out = []
    for steps in range(1, most_steps + 1):
        tint = simulated(model, input_ids, mask, inner_lr=rate, n_steps=steps, fd_eps=fd_eps).updates
        stop = stepped(model, input_ids, mask, lr=rate, steps=steps, detach_scores=True).updates
        found = list(cosines(tint, stop).values())
        out.append([min(v.mean() for v in found), min(v.min() for v in found)])
    return np.array(out)


def epsilon_cosines(model: nn.Module, input_ids: Tensor, fraction: float, epsilons: tuple[float, ...]) -> np.ndarray:  # fmt: skip
    """Mean cosine over documents [eps, tensors] to autograd with detached scores, for several steps of the finite difference."""
    mask = train_mask(input_ids, fraction)
    stop = stepped(model, input_ids, mask, lr=RATE, update_layernorm="all", detach_scores=True).updates
    out = []
    for eps in epsilons:
        tint = simulated(model, input_ids, mask, inner_lr=RATE, update_layernorm="all", fd_eps=eps).updates
        out.append([values.mean() for values in cosines(tint, stop).values()])
    return np.array(out)


def variant_row(model: nn.Module, input_ids: Tensor, epsilons: tuple[float, float]) -> list[float]:
    """(error of the first forward pass, lowest cosine to autograd with detached scores at either step of the differences, names there,
    names missing) of one kind."""
    mask = train_mask(input_ids, 0.5)
    stop = stepped(model, input_ids, mask, lr=RATE, update_layernorm="all", detach_scores=True)
    lowest = []
    for eps in epsilons:
        out = simulated(model, input_ids, mask, inner_lr=RATE, fd_eps=eps, update_layernorm="all")
        lowest.append(min(float(values.min()) for values in cosines(out.updates, stop.updates).values()))
    with torch.no_grad():
        logits = model(input_ids).logits
    tint = TinTModel.from_auxiliary(model)
    wanted, there = ({name for name, _ in m.named_modules() if name} for m in (model, tint))
    error = float((out.initial_logits - logits).abs().max() / logits.abs().max())
    return [error, *lowest, len(wanted & there), len(wanted - there)]
