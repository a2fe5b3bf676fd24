"""All forms of few-shot classification for one set, one seed and one model: what each form chose, and its answers.

Glossary
    cell         format x loss: (single, multi) x (context, label); each is judged plain and calibrated
    way          a method with its rate, layers and steps; a cell takes the one that is best on held-out examples
    best         highest accuracy over all ways on the test queries themselves: the paper's choice, optimistic
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from papercore.experiments.tint.adapting import Way
from papercore.experiments.tint.few_shot import CALIBRATIONS, better, judged, scored
from papercore.experiments.tint.prompting import FORMATS, LOSSES, Prompter

Shown = Sequence[tuple[str, int]]
Labelled = tuple[Sequence[str], NDArray[np.int64]]


def cell(
    model: nn.Module, prompter: Prompter, shown: Shown, held: Labelled, test: Labelled, layout: str, loss: str, ways: Sequence[Way],
    *, optimistic: bool, batch: int, device: torch.device,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """For each calibration the way with the best held-out accuracy (then loss), its answers, and the model's own beside them."""
    kept: dict[str, dict[str, Any]] = {}
    own: dict[str, float] = {}
    for number, way in enumerate(ways):
        found = scored(
            model, prompter, shown, held[0], layout, loss, way, batch=batch, device=device
        )  # fmt: skip
        for calibration in CALIBRATIONS:
            right, value = judged(found.of("after", calibration), held[1])
            trial: dict[str, Any] = {"way": number, "held": float(right.mean()), "held_loss": value}
            if better(trial, kept.get(calibration)):
                kept[calibration] = trial
            own[calibration] = float(judged(found.of("before", calibration), held[1])[0].mean())
    wanted = range(len(ways)) if optimistic else sorted({trial["way"] for trial in kept.values()})
    tested = {
        number: scored(model, prompter, shown, test[0], layout, loss, ways[number], batch=batch, device=device)
        for number in wanted
    }  # fmt: skip
    for calibration, chosen in kept.items():
        answers = {
            number: judged(found.of("after", calibration), test[1])[0] for number, found in tested.items()
        }
        chosen["right"] = answers[chosen["way"]]
        chosen["best"] = max(float(right.mean()) for right in answers.values())
        chosen["vanilla_right"] = judged(tested[chosen["way"]].of("before", calibration), test[1])[0]
        chosen["vanilla_held"] = own[calibration]
    return kept


def classified(
    model: nn.Module, prompter: Prompter, shown: Shown, held: Labelled, test: Labelled, ways: Mapping[str, Sequence[Way]],
    *, name: str = "tint", optimistic: bool = False, batch: int, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Every cell with demonstrations, and zero-shot (loss on the context, which is then the query's text).

    Args:
        ways: for each loss, the ways to choose from; all of one method, called `name` in the result.

    Returns:
        right answers: name [formats, losses, calibrations, queries], vanilla [formats, calibrations, queries], zero_<name> and
        zero_vanilla [calibrations, queries]; `_held` (accuracy), of `name` also `_way` and `_best`, of each without the last axis.
    """
    options: dict[str, Any] = {"optimistic": optimistic, "batch": batch, "device": device}
    few = {
        layout: {
            loss: cell(model, prompter, shown, held, test, layout, loss, ways[loss], **options)
            for loss in LOSSES
        }
        for layout in FORMATS
    }
    zero = cell(model, prompter, (), held, test, "single", "context", ways["context"], **options)
    out: dict[str, Any] = {}
    for suffix, key in (("", "right"), ("_held", "held"), ("_way", "way"), ("_best", "best")):
        out[name + suffix] = np.array(
            [[[few[f][loss][c][key] for c in CALIBRATIONS] for loss in LOSSES] for f in FORMATS]
        )
        out[f"zero_{name}{suffix}"] = np.array([zero[c][key] for c in CALIBRATIONS])
    for suffix, key in (("", "vanilla_right"), ("_held", "vanilla_held")):
        out[f"vanilla{suffix}"] = np.array(
            [[few[f]["context"][c][key] for c in CALIBRATIONS] for f in FORMATS]
        )
        out[f"zero_vanilla{suffix}"] = np.array([zero[c][key] for c in CALIBRATIONS])
    return out
