"""What cannot be stacked: modules, seeds, optimizers and saved states that VirtualWorkers refuses, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from papercore.local_sgd.schedules import _whole

# Their update of an entry depends on that entry's own gradient and state alone.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
)

# What VirtualWorkers.state_dict holds.
_STATE = (
    *("global_step", "position", "h", "rounds_done", "finished", "k", "seeds"),
    *("losses", "parameters", "optimizer"),
)


def seed_modules(model: nn.Module | Sequence[nn.Module]) -> tuple[list[nn.Module], bool]:
    """The seeds' modules, and whether batches have an axis for them. A ModuleList is a module, but stands for its items."""
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList):
        return [model], False
    try:
        models = list(model)
    except TypeError:
        raise TypeError(
            f"model must be a torch.nn.Module or a sequence of them, one per seed; got {type(model).__name__}."
        ) from None
    if not models:
        raise ValueError("model is an empty sequence: give one module per seed.")
    return models, True


def check_module(model: nn.Module) -> None:
    """Raises TypeError for what is no module, ValueError for a module that cannot be stacked."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module or a sequence of them, one per seed; got {type(model).__name__}."
        )
    for name, part in model.named_modules():
        where = f"'{name}' is {type(part).__name__}" if name else f"the model is {type(part).__name__}"
        if isinstance(part, _NormBase) and part.running_mean is not None and part.training:
            raise ValueError(
                f"{where} with running statistics, which the stacked workers would share: use GroupNorm or LayerNorm, "
                "track_running_stats=False, or put the layer in eval mode to keep its statistics fixed."
            )
        if isinstance(part, nn.RNNBase):
            raise ValueError(
                f"{where}, which keeps its weights in a fused buffer of its own: recurrent layers cannot be stacked. "
                "Write the recurrence with nn.Linear, or train with LocalOptimizer in real processes."
            )
        if isinstance(part, nn.parallel.DistributedDataParallel):
            raise ValueError(f"{where}: give the module inside it (model.module).")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"'{name}' has no shape yet: run one forward pass of the lazy module first.")
        if type(tensor).__name__ in ("DTensor", "ShardedTensor"):
            raise ValueError(
                f"'{name}' is sharded ({type(tensor).__name__}): virtual workers need whole tensors."
            )
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and not tensor.is_floating_point():
            raise ValueError(
                f"'{name}' has dtype {tensor.dtype}: only floating-point parameters can be averaged."
            )


def check_architectures(models: Sequence[nn.Module]) -> None:
    """Raises ValueError where two seeds' modules differ in anything but the values of their tensors."""
    first = _layout(models[0])
    for seed, model in enumerate(models[1:], start=1):
        for one, other in zip(first, other_layout := _layout(model), strict=False):
            if one != other:
                raise ValueError(
                    f"the modules of seed 0 and seed {seed} differ: {one} and {other}; "
                    "all seeds must have one architecture, device and dtype."
                )
        if len(first) != len(other_layout):
            raise ValueError(
                f"the modules of seed 0 and seed {seed} differ: one has parts or tensors that the other has not; "
                "all seeds must have one architecture."
            )


def _layout(model: nn.Module) -> list[str]:
    parts = [
        f"{name or 'the model'}: {type(part).__name__}({part.extra_repr()}), {'train' if part.training else 'eval'} mode"
        for name, part in model.named_modules()
    ]
    tensors = [
        f"{name} {list(t.shape)} {t.dtype} {t.device} {'trainable' if t.requires_grad else 'fixed'}"
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]
    return parts + tensors


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Raises TypeError for what is no optimizer, ValueError for one that mixes the entries of a tensor or holds others."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer(parameters) must return a torch.optim.Optimizer, got {type(optimizer).__name__}: "
            "for example lambda parameters: torch.optim.SGD(parameters, lr=0.1)."
        )
    if not (isinstance(optimizer, ELEMENTWISE) or getattr(optimizer, "elementwise", False)):
        raise ValueError(
            f"{type(optimizer).__name__} is not known to be elementwise: on stacked parameters a norm, a factored state or a line "
            "search would mix the workers. Use SGD, Adam, AdamW, RMSprop or another elementwise optimizer of torch.optim, or "
            "LocalOptimizer in real processes. If every entry's update depends on that entry alone, set the attribute "
            "`elementwise = True` on the optimizer's class."
        )
    own = {id(p) for p in parameters}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if any(id(p) not in own for p in held):
        raise ValueError(
            "the optimizer holds parameters that are not the stacked ones: build it over the list that the callable is given, "
            "not over model.parameters()."
        )


def check_state(
    state: Mapping[str, Any], k: int, seeds: int, total_steps: int, parameters: Mapping[str, Tensor]
) -> None:
    """Raises ValueError for a saved state of another number of workers, seeds or steps, or of another network."""
    missing = set(_STATE) - set(state)
    if missing:
        raise ValueError(f"this is no state of VirtualWorkers: {', '.join(sorted(missing))} missing.")
    if (state["k"], state["seeds"]) != (k, seeds):
        raise ValueError(
            f"the state has k = {state['k']} and {state['seeds']} seed(s), these workers have k = {k} and {seeds}."
        )
    if state["global_step"] > total_steps:
        raise ValueError(f"the state is of step {state['global_step']}, beyond total_steps = {total_steps}.")
    theirs = {name: list(tensor.shape) for name, tensor in state["parameters"].items()}
    ours = {name: list(p.shape) for name, p in parameters.items()}
    if theirs != ours:
        raise ValueError(f"the state is of another network: {_differences(theirs, ours)}.")


def _differences(theirs: Mapping[str, list[int]], ours: Mapping[str, list[int]]) -> str:
    names = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
    return ", ".join(
        f"'{n}' {theirs.get(n, 'missing')} in the state, {ours.get(n, 'missing')} here" for n in names[:3]
    )


def check_index(name: str, value: int, size: int) -> int:
    """`value` as an int from 0 to size - 1; otherwise ValueError."""
    index = _whole(name, value, 0)
    if index >= size:
        raise ValueError(f"{name} = {value}: expected 0 to {size - 1}.")
    return index
