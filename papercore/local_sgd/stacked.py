"""Many copies of one network as one set of stacked tensors: parameters, batches, losses and gradients.

The models of K workers (of S seeds) differ in their weights alone, so that every weight is kept as one leaf tensor with a
leading axis of W = S * K models, and one batched call computes all losses and gradients. An elementwise optimizer then steps
all models at once, because it never looks across the entries of a tensor.

Glossary
    seeds      S    independent runs, each with its own start
    k          K    workers of one run
    W               S * K models, seed by seed: model number seed * K + worker
    stacked         a tensor [W, *shape] where one model has [*shape]
    constants       what no optimizer moves: buffers and frozen parameters; stacked only where the seeds differ

One model's forward pass runs on the user's own module, whose parameters are exchanged for the slices of the moment
(as torch.func.functional_call does, without its cost at every call).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from papercore.local_sgd.stacked_checks import check_architectures, check_module

_SHARED_WRITE = (
    "writes into a tensor that all workers share (keep such a state out of the model, or train with LocalOptimizer in real "
    "processes)"
)

LossFn = Callable[[nn.Module, Any], Tensor]


class StackedModels:
    """S * k models of one architecture, with weights and gradients stacked on a leading axis.

    Args:
        models: one module per seed; not changed, and not referred to afterwards.
        k: workers per seed; all start from their seed's weights.

    Attributes:
        parameters: {name: nn.Parameter [W, *shape]}, the trainable ones, in the module's order.
        template: a module of the architecture; its own weights are those of seed 0's start.

    Raises:
        ValueError: no trainable parameter, seeds of different architecture, batch norm with running statistics or
            another layer that cannot be stacked. TypeError: something else than a module.
    """

    def __init__(self, models: Sequence[nn.Module], k: int) -> None:
        for model in models:
            check_module(model)
        check_architectures(models)
        self.seeds, self.k = len(models), k
        self.template = copy.deepcopy(models[0])
        per_seed = [dict(model.named_parameters()) for model in models]
        trainable = [name for name, p in per_seed[0].items() if p.requires_grad]
        if not trainable:
            raise ValueError("the model has no trainable parameter: nothing to synchronise.")
        self.parameters = {
            name: nn.Parameter(_repeat([tensors[name].detach() for tensors in per_seed], k))
            for name in trainable
        }
        frozen = [
            {name: p for name, p in tensors.items() if not p.requires_grad} | dict(model.named_buffers())
            for model, tensors in zip(models, per_seed, strict=True)
        ]
        # {name: [W, *shape]} where the seeds differ; all other constants stay in the template.
        self._constants = {
            name: _repeat([tensors[name].detach() for tensors in frozen], k)
            for name, first in frozen[0].items()
            if any(not _same(tensors[name], first) for tensors in frozen[1:])
        }
        self._names = [*self.parameters, *self._constants]
        self._slots = _slots(self.template, self._names)
        # Every buffer of the template and every stacked constant, to notice a forward pass that writes into one.
        self._shared = [
            (owner, name, tensor)
            for part in self.template.modules()
            for owner in (part._buffers,)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._versions = self._count_writes()
        self._cached: tuple[Any, Callable[..., tuple[tuple[Tensor, ...], Tensor]]] | None = None

    def by_worker(self, stacked: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Views: for every worker a tuple of [S, *shape], one for each of the tensors [W, *shape]."""
        parts = [t.detach().view(self.seeds, self.k, *t.shape[1:]).unbind(1) for t in stacked]
        return list(zip(*parts, strict=True))

    @contextmanager
    def bound(self, tensors: Sequence[Tensor]) -> Iterator[nn.Module]:
        """The template with one model's parameters (then differing constants) in place of its own."""
        before = [owner[key] for owner, key, _ in self._slots]
        try:
            for owner, key, index in self._slots:
                owner[key] = tensors[index]
            yield self.template
        finally:
            for (owner, key, _), tensor in zip(self._slots, before, strict=True):
                owner[key] = tensor

    def gradients_vmap(self, loss_fn: LossFn, batches: Any, chunk_size: int | None) -> Tensor:
        """Losses [W]; fills `.grad` of the stacked parameters. One batched call, of `chunk_size` models at a time."""
        leaves, spec = tree_flatten(batches)
        # What is no tensor is the same for all models and stays outside the batched call.
        fixed = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = (loss_fn, spec, fixed, chunk_size)
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self._batched(loss_fn, spec, fixed, chunk_size))
        stacked = [p.detach() for p in self.parameters.values()]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        try:
            gradients, losses = self._cached[1](*stacked, *self._constants.values(), *tensors)
        except RuntimeError as error:
            if "mutate a captured Tensor" not in str(error):
                raise
            raise ValueError(f"the model or loss_fn {_SHARED_WRITE}") from error
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        return losses

    def _batched(self, loss_fn: LossFn, spec: Any, fixed: tuple[Any, ...], chunk_size: int | None) -> Any:
        own = len(self._names)

        # One flat list of arguments: the transforms flatten and rebuild them several times in every call.
        def loss_of_one(*tensors: Tensor) -> Tensor:
            given = iter(tensors[own:])
            batch = tree_unflatten([next(given) if leaf is None else leaf for leaf in fixed], spec)
            with self.bound(tensors) as model:
                return _scalar(loss_fn(model, batch))

        wanted = tuple(range(len(self.parameters)))
        return vmap(
            grad_and_value(loss_of_one, argnums=wanted), randomness="different", chunk_size=chunk_size
        )

    def gradients_loop(self, loss_fn: LossFn, batches: Any) -> Tensor:
        """Losses [W]; fills `.grad` of the stacked parameters. One model after the other."""
        leaves, spec = tree_flatten(batches)
        parameters = list(self.parameters.values())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        losses = []
        for w in range(self.seeds * self.k):
            own = [p.detach()[w].requires_grad_() for p in parameters]
            batch = tree_unflatten([x[w] if isinstance(x, Tensor) else x for x in leaves], spec)
            with self.bound([*own, *(c[w] for c in self._constants.values())]) as model:
                loss = _scalar(loss_fn(model, batch))
            gradients = torch.autograd.grad(loss, own, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    assert parameter.grad is not None
                    parameter.grad[w].copy_(gradient)
            losses.append(loss.detach())
        return torch.stack(losses)

    def check_buffers(self) -> None:
        """Raises ValueError when a forward pass has written into a buffer, which all models share."""
        if self._shared or self._constants:
            if any(owner[name] is not tensor for owner, name, tensor in self._shared):
                name = next(name for owner, name, tensor in self._shared if owner[name] is not tensor)
                for owner, key, tensor in self._shared:
                    owner[key] = tensor
            elif (versions := self._count_writes()) != self._versions:
                names = [*(name for _, name, _ in self._shared), *self._constants]
                name = next(
                    n for n, new, old in zip(names, versions, self._versions, strict=True) if new != old
                )
                self._versions = versions
            else:
                return
            raise ValueError(f"the model or loss_fn {_SHARED_WRITE}: buffer '{name}'.")

    def _count_writes(self) -> list[int]:
        return [*(t._version for _, _, t in self._shared), *(t._version for t in self._constants.values())]

    def module(self, weights: Mapping[str, Tensor], seed: int) -> nn.Module:
        """A fresh module with these weights (one model's, without the leading axis) and the seed's constants."""
        constants = {name: tensor[seed * self.k] for name, tensor in self._constants.items()}
        model = copy.deepcopy(self.template)
        targets = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, tensor in {**weights, **constants}.items():
                targets[name].copy_(tensor)
        return model


def stack_batches(batches: Any, k: int, seeds: int | None) -> Any:
    """Batches of all models with one leading axis of W models.

    Args:
        batches: a list of k batches (with seeds: of `seeds` such lists), or a tensor, tuple, dict or nest of these whose tensors
            are stacked on a leading axis k (with seeds: on two, [seeds, k]). What is no tensor is passed on to every worker.
        seeds: None where a single module was given.
    """
    if isinstance(batches, list):
        batches = _stack_lists(batches, k, seeds)
    leaves, spec = tree_flatten(_plain(batches))
    lead = (k,) if seeds is None else (seeds, k)
    out = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.shape[: len(lead)] != lead:
                what = "k = {}".format(*lead) if seeds is None else "[seeds, k] = [{}, {}]".format(*lead)
                raise ValueError(
                    f"a tensor of the batches has shape {list(leaf.shape)}; expected the leading axes {what}: "
                    "stack one batch per worker, or give a list of batches."
                )
            leaf = leaf if seeds is None else leaf.flatten(0, 1)
        out.append(leaf)
    if not any(isinstance(leaf, Tensor) for leaf in out):
        raise TypeError(f"the batches hold no tensor, got {type(batches).__name__}.")
    return tree_unflatten(out, spec)


def _stack_lists(batches: list[Any], k: int, seeds: int | None) -> Any:
    if seeds is not None:
        if len(batches) != seeds or not all(isinstance(one, list) for one in batches):
            raise ValueError(
                f"a list of batches for {seeds} seeds must hold {seeds} lists of {k} batches each, got a list of {len(batches)}."
            )
        parts = [_stack_lists(one, k, None) for one in batches]
    else:
        if len(batches) != k:
            raise ValueError(
                f"got a list of {len(batches)} batches for k = {k} workers: expected one for each."
            )
        parts = [_plain(batch) for batch in batches]
    flat = [tree_flatten(part) for part in parts]
    if any(spec != flat[0][1] for _, spec in flat):
        raise ValueError(
            "the workers' batches differ in structure: expected the same nest of tensors for each."
        )
    columns = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        if isinstance(column[0], Tensor):
            shapes = [list(t.shape) for t in column]
            if any(shape != shapes[0] for shape in shapes):
                raise ValueError(
                    f"the workers' batches differ in shape: {shapes}; every worker needs as many samples as the others."
                )
            columns.append(torch.stack(column))
        else:
            columns.append(column[0])
    return tree_unflatten(columns, flat[0][1])


def _plain(batch: Any) -> Any:
    # The encodings of tokenizers are mappings that torch's tree functions would take for a leaf.
    return dict(batch) if isinstance(batch, Mapping) and type(batch) is not dict else batch


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}.")
    if loss.dim() != 0:
        raise ValueError(
            f"loss_fn must return a scalar, got shape {list(loss.shape)}: reduce it, for example with .mean()."
        )
    return loss


def _repeat(per_seed: Sequence[Tensor], k: int) -> Tensor:
    """[S * k, *shape]: every seed's tensor k times in a row."""
    return torch.stack(list(per_seed)).repeat_interleave(k, dim=0)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)


def _slots(module: nn.Module, names: Sequence[str]) -> list[tuple[dict[str, Any], str, int]]:
    """Where each named tensor sits in the module, every place of a tied one included."""
    index = {name: number for number, name in enumerate(names)}
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    number_of = {id(tensors[name]): number for name, number in index.items()}
    places = []
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            for key, tensor in owner.items():
                if tensor is not None and id(tensor) in number_of:
                    places.append((owner, key, number_of[id(tensor)]))
    return places
