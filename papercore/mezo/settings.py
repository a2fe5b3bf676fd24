"""What a run and each of its steps were told: checked here, kept in the log, read by training and replay."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

from papercore.mezo.arguments import check_betas, check_choice, check_number, check_positive_integer

DISTS = ("gaussian", "rademacher")
MODES = ("inplace", "exact")
_NO_SPHERE = (
    "; the norm on the sphere would take another pass over the noise: 'rademacher' has the same length "
    "|z| = sqrt(d) and the same variance factor"
)


class GroupSettings(NamedTuple):
    """What a parameter group said at a step."""

    lr: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Settings:
    """What a step was made with: the number of its directions and the settings of every group."""

    draws: int
    groups: tuple[GroupSettings, ...]


@dataclass(frozen=True)
class Rule:
    """What stays the same through a run. backend: the one that made the noise of the last tensor."""

    seed: int
    dist: str = "gaussian"
    mode: str = "inplace"
    pipelined: bool = False
    momentum: float = 0.0
    betas: tuple[float, float] | None = None
    adam_eps: float = 1e-8
    window: int | None = None
    backend: str = "torch"


def check_rule(
    *,
    seed: int,
    dist: str,
    mode: str,
    pipelined: bool,
    momentum: float,
    betas: tuple[float, float] | None,
    adam_eps: float,
    window: int | None,
    backend: str,
) -> Rule:
    """The Rule of these arguments. ValueError or TypeError if one is wrong or two exclude each other."""
    check_choice("dist", dist, DISTS, why=_NO_SPHERE if dist == "sphere" else "")
    check_choice("mode", mode, MODES)
    momentum, betas = check_number("momentum", momentum, least=0.0, below=1.0), check_betas(betas)
    if momentum and betas is not None:
        raise ValueError(
            f"momentum={momentum} and betas={betas}: give one of them, Adam has its own momentum beta1"
        )
    if pipelined and mode == "exact":
        raise ValueError(
            "pipelined=True needs mode='inplace': exact mode returns to the centre after every step"
        )
    if pipelined and betas is not None:
        raise ValueError("pipelined=True cannot be combined with betas: Adam's update is a pass of its own")
    return Rule(
        seed=seed,
        dist=dist,
        mode=mode,
        pipelined=bool(pipelined),
        momentum=momentum,
        betas=betas,
        adam_eps=check_number("adam_eps", adam_eps, least=0.0),
        window=None if window is None else check_positive_integer("window", window),
        backend=backend,
    )


def check_group(group: dict[str, Any]) -> GroupSettings:
    """The settings that a parameter group holds now; schedulers and users may have changed them."""
    return GroupSettings(
        lr=check_number("lr", group["lr"], least=0.0),
        eps=check_number("eps", group["eps"], above=0.0),
        weight_decay=check_number("weight_decay", group["weight_decay"], least=0.0),
    )


def single(value: float) -> float:
    """The nearest float32: what goes into the log is what the update uses."""
    return array("f", (value,))[0]
