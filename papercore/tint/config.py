"""What the simulator is asked to do: sizes of the construction, the inner step, and each approximation as a switch.

With ln_grad = act_grad = "exact" and attn_grad = "full" the simulated step is SGD on the auxiliary to rounding; the defaults
are the paper's: forward differences through norms and activations, gradients through the values of attention alone, and
of the norms only the biases updated.

Glossary (code name, symbol in arXiv 2307.01189):
    stack     S      rows of a weight matrix in one prefix token
    heads     H_sim  attention heads of the simulator; min(S^2, H) in the paper's count
    n_layers  n_sim  last layers that are trained
    inner_lr  eta    step on the SUM of the losses of the training targets
    fd_eps    1 / N  step of the finite differences
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from papercore.tint.attention import ATTENTION_GRADIENTS
from papercore.tint.finite_difference import GRADIENTS, checked_epsilon, chosen
from papercore.tint.linear import BACKENDS
from papercore.tint.output import LOSSES

UPDATE_LAYERNORM = ("none", "bias", "all")
REDUCTIONS = ("sum", "mean")


class SimulatorShape(NamedTuple):
    """stack S, prefix tokens K = D / S, width D_sim = S D, attention heads H_sim."""

    stack: int
    n_prefix: int
    d_sim: int
    heads: int


def _nearest_divisors(number: int, given: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < given][-1:]
    above = [d for d in divisors if d > given][:1]
    return " or ".join(str(d) for d in below + above)


def simulator_shape(d_model: int, n_head: int, stack: int, heads: int | None = None) -> SimulatorShape:
    """Sizes of the simulator of a model of width d_model with n_head heads (Theorem 1.1).

    Raises:
        ValueError: a size that does not divide the next; the nearest valid choices are named.

    >>> simulator_shape(768, 12, 4)
    SimulatorShape(stack=4, n_prefix=192, d_sim=3072, heads=12)
    """
    for name, value in (("d_model", d_model), ("n_head", n_head), ("stack", stack)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r}: expected a whole number of at least 1.")
    if d_model % n_head:
        raise ValueError(
            f"n_head = {n_head} does not divide d_model = {d_model}: "
            f"the nearest that do are {_nearest_divisors(d_model, n_head)}."
        )
    if d_model % stack:
        raise ValueError(
            f"stack = {stack} does not divide d_model = {d_model}: a prefix token holds `stack` whole rows; "
            f"the nearest that do are {_nearest_divisors(d_model, stack)}."
        )
    d_sim = stack * d_model
    heads = min(stack**2, n_head) if heads is None else heads
    if heads < 1 or d_sim % heads:
        raise ValueError(
            f"heads = {heads} does not divide the simulator's width stack * d_model = {d_sim}: "
            f"the nearest that do are {_nearest_divisors(d_sim, heads)}."
        )
    return SimulatorShape(stack, d_model // stack, d_sim, heads)


def checked_count(name: str, value: object) -> None:
    """ValueError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} = {value!r}: expected a whole number of at least 1.")


def checked_number(name: str, value: object) -> float:
    """The value; TypeError unless it is a number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}: expected a number.")
    return value


def checked_rate(name: str, value: object) -> None:
    """TypeError or ValueError unless `value` can be a learning rate."""
    if not 0 <= checked_number(name, value) < math.inf:
        raise ValueError(f"{name} = {value}: expected a finite number of at least 0.")


@dataclass(frozen=True)
class TinTConfig:
    """Settings of a TinTModel.

    Raises:
        ValueError: a value that is not allowed; the message lists those that are.
        TypeError: a step that is no number.

    >>> TinTConfig(ln_grad="exakt")
    Traceback (most recent call last):
    ValueError: ln_grad = 'exakt': expected one of 'finite_difference', 'central', 'exact'. Did you mean 'exact'?
    """

    stack: int = 4  # rows of a weight in one prefix token; divides the width
    n_layers: int | None = None  # how many of the last layers are trained; None: all
    n_steps: int = 1  # inner steps, each with a forward pass of its own
    inner_lr: float = 1e-3  # on the sum (or mean, see reduction) of the training losses in nats
    reduction: str = "sum"  # "mean" divides inner_lr by each document's number of training targets
    ln_grad: str = "finite_difference"  # or "central", "exact"
    act_grad: str = "finite_difference"  # or "central", "exact"
    attn_grad: str = "value_only"  # or "full" (queries and keys are trained too), "same_position"
    fd_eps: float = 1e-2  # the official code takes 1e-3, which float32 rounds worse
    fd_relative: bool = False  # fd_eps relative to the size of each token's gradient
    update_layernorm: str = "bias"  # or "none", "all"
    update_bias: bool = True  # biases of the linear layers
    mlp_chunks: int | None = (
        None  # pieces of the MLP's inner width; None: one, or pieces of width D where literal
    )
    loss: str = "prediction"  # or "quadratic", "linear"
    backend: str = "fused"  # or "literal": attention heads over prefix tokens
    heads: int | None = None  # of the simulator; None: min(stack^2, heads of the auxiliary)
    recompute_attention: bool = (
        False  # attention probabilities computed again on the way back instead of kept
    )

    def __post_init__(self) -> None:
        for name in ("stack", "n_steps"):
            checked_count(name, getattr(self, name))
        for name in ("n_layers", "mlp_chunks", "heads"):
            if getattr(self, name) is not None:
                checked_count(name, getattr(self, name))
        checked_rate("inner_lr", self.inner_lr)
        checked_number("fd_eps", self.fd_eps)
        checked_epsilon(self.fd_eps)
        chosen("reduction", self.reduction, REDUCTIONS)
        chosen("ln_grad", self.ln_grad, GRADIENTS)
        chosen("act_grad", self.act_grad, GRADIENTS)
        chosen("attn_grad", self.attn_grad, ATTENTION_GRADIENTS)
        chosen("update_layernorm", self.update_layernorm, UPDATE_LAYERNORM)
        chosen("loss", self.loss, LOSSES)
        chosen("backend", self.backend, BACKENDS)

    @property
    def has_differences(self) -> bool:
        """Whether a gradient is taken by finite differences, which half precision cannot do."""
        return self.ln_grad != "exact" or self.act_grad != "exact"


def checked_layers(n_layers: int | None, depth: int) -> int:
    """How many of `depth` layers are trained; ValueError where there are not as many."""
    if n_layers is None:
        return depth
    if not isinstance(n_layers, int) or not 1 <= n_layers <= depth:
        raise ValueError(f"n_layers = {n_layers!r}: the auxiliary has {depth} layers, expected 1 to {depth}.")
    return n_layers
