"""Buffers between workers: means of floating buffers, and batch-norm statistics re-estimated at the averaged weights.

Averaging the weights of workers leaves batch norm with running statistics that belong to no model at all: they were collected
along K different paths, before the average. The official code of QSR therefore passes training batches through the averaged
model before every evaluation (arXiv 2310.14423, experiments):

    every rank   for its batches i = 0, 1, ...: running <- running + (batch statistic - running) / (1 + i)
    all ranks    mean <- mean over ranks of the means;  var <- mean over ranks of the variances

The result is the mean of per-batch statistics over all batches of all ranks if these have equally many. The mean of variances is
not the variance of the pooled batches: what the batch means differ by is missing from it, as in the official code.

Glossary
    running mean, var    mu, sigma^2    buffers of a batch-norm layer                      [channels]
    i                                   batches that the layer has seen in this estimate
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from papercore.local_sgd.agreement import Ranks, digest_of, fingerprint
from papercore.local_sgd.flat import FlatVectors, layout_of

__all__ = ["averaged_buffers", "batch_norms", "check_model", "check_same_start", "reestimate_batch_norm"]


def check_model(model: nn.Module) -> None:
    """Refuse modules that communicate by themselves.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is wrapped in DistributedDataParallel or FSDP, or holds such a module or SyncBatchNorm.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{where} is wrapped in DistributedDataParallel, which averages gradients at every step, so that no step "
                "would be local. Give the plain module (model.module) to the optimizer and train that."
            )
        if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(
                f"{where} is sharded by FSDP: no rank holds a whole copy to train alone. Use the plain module."
            )
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{where} is a SyncBatchNorm, which communicates in every forward pass. Use BatchNorm and "
                "buffers='reestimate', or GroupNorm."
            )


def averaged_buffers(model: nn.Module) -> list[Tensor]:
    """Floating buffers that a state dict would hold, in the order of the modules; counters and tables made anew are left out."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype.is_floating_point
        and name not in module._non_persistent_buffers_set
        and buffer.numel()
    ]


def check_same_start(
    ranks: Ranks, params: list[Tensor], settings: dict[str, object], model: nn.Module | None = None
) -> None:
    """Compare between ranks what they start with; a ValueError on all of them if it differs.

    Args:
        ranks: who is compared.
        params: parameters of the optimizer, in its order.
        settings: what decides when and what is averaged, by name; compared by their repr.
        model: its other parameters are compared too, and the shapes of its buffers.
    """
    known = {id(p) for p in params}
    values = params + [p for p in (() if model is None else model.parameters()) if id(p) not in known]
    layout = [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in values]
    if model is not None:
        layout += [(tuple(b.shape), str(b.dtype), False) for b in averaged_buffers(model)]
    ranks.check_equal(
        {
            "the shapes, dtypes or order of the parameters": (
                digest_of(layout),
                "build the same model and the same parameter groups on all ranks.",
            ),
            **{
                f"the values of {name}": (
                    digest_of(value),
                    f"it is {value!r} on this rank; make it the same on all ranks.",
                )
                for name, value in settings.items()
            },
        }
    )
    # After the layouts, since it only compares what lies in the same order.
    ranks.check_equal(
        {
            "the starting values of the parameters": (
                fingerprint(p for p in values if p.numel()),
                "seed all ranks alike or broadcast the model from rank 0 before making the optimizer. (To resume inside a round, "
                "make it first and load each rank's checkpoint then.)",
            )
        }
    )


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch-norm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    process_group: Any = None,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> int:
    """Running statistics of batch norm, estimated anew at the present weights and averaged over ranks.

    Every rank calls it with batches of its own, equally many. Only batch-norm layers are put into training mode for it, so that
    dropout neither draws random numbers nor changes the statistics that an evaluation will meet (the official code trains
    everything; without dropout the two are the same). Layers that do not keep statistics are left alone.

    Args:
        model: plain module; its weights should be the average (after a synchronisation).
        batches: this rank's batches, at least one. A batch is what `model` takes: a tensor; a tuple or list whose first entry it
            is (as a DataLoader of pairs gives); or a dict of keyword arguments.
        process_group: None: all processes, or this process alone if torch.distributed is not initialised.
        forward: (model, batch) -> anything, for batches of another kind.

    Returns:
        the number of batches that this rank used; 0 if the model has no batch norm with running statistics.

    Raises:
        ValueError: no batch, or not the same number of batches on all ranks (the statistics then stay as they were).

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> reestimate_batch_norm(model, [torch.ones(4, 2), torch.zeros(4, 2)])
    2
    """
    check_model(model)
    layers = batch_norms(model)
    if not layers:
        return 0
    before = [_statistics(layer) for layer in layers]
    training = {module: module.training for module in model.modules()}
    momentum = [layer.momentum for layer in layers]
    call = _call if forward is None else forward
    count, done = 0, False
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            # None is torch's cumulative mean: 1 / (1 + i) at the i-th call. A layer used twice in a pass counts both.
            layer.momentum = None
            layer.train()
        for batch in batches:
            call(model, batch)
            count += 1
        _average(model, layers, count, process_group)
        done = True
    finally:
        for module, mode in training.items():
            module.training = mode
        for layer, value, saved in zip(layers, momentum, before, strict=True):
            layer.momentum = value
            if not done:
                for buffer, old in zip(_buffers(layer), saved, strict=True):
                    buffer.copy_(old)
    return count


def _average(model: nn.Module, layers: list[_BatchNorm], count: int, group: Any) -> None:
    ranks = None
    if group is not None or (dist.is_available() and dist.is_initialized()):
        ranks = Ranks(group, _buffers(layers[0])[0].device)
    counts = [count] if ranks is None else [row[0] for row in ranks.gather([count])]
    if min(counts) < 1 or min(counts) != max(counts):
        raise ValueError(
            f"batches of the ranks: {counts}. Batch-norm statistics need at least one batch on every rank, and equally many, "
            "so that the mean over ranks weighs all batches alike."
        )
    if ranks is None:
        return
    statistics = [buffer for layer in layers for buffer in _buffers(layer) if buffer.dtype.is_floating_point]
    flat = FlatVectors(layout_of(statistics), size=ranks.size)
    # In the order of the ranks: statistics are small, and all ranks then hold the same bits whatever the library does.
    flat.exchange(statistics, rank=ranks.rank, group=ranks.group, order="ordered")
    flat.write_means(statistics)


def _buffers(layer: _BatchNorm) -> list[Tensor]:
    found = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    return [buffer for buffer in found if buffer is not None]


def _statistics(layer: _BatchNorm) -> list[Tensor]:
    return [buffer.clone() for buffer in _buffers(layer)]


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
