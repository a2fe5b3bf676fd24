"""theta_pre + gamma * delta inside the live module, and theta_pre back to the last bit, whatever happens.

Sections 2.2 and 2.3 of the paper need losses and gradients at many mixtures of two models. No copy of a model is
made: the mixed values are written over the weights, the forward and backward passes run as they always do, and
what was overwritten is written back at the end, also after an error or an interrupt.

Glossary
    pre      overwritten values, the dtype of the weights                       [n]
    change   delta at these entries, float32 (float64 for float64 weights)      [n]
    grads    mean gradient at these entries over the micro-batches              [n]
    index    flat indices of the candidate entries; None: all entries of the tensor

Memory, bytes an entry of float32 weights, beside the model (4) and delta (4): with all entries pre and gradient, 8;
with candidates only 20 bytes a candidate, because a gradient is reduced to the candidates as soon as its tensor is
done and then freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from papercore.grafting.arguments import check_batches, check_loss, check_module
from papercore.grafting.entries import check_plain, parameters_named, read, write
from papercore.grafting.errors import GraftMismatchError, NonFiniteError
from papercore.grafting.fingerprint import check_base, known_checksum, remember
from papercore.grafting.stack import active
from papercore.grafting.task_vector import TaskVector

LossFn = Callable[[Any, Any], Tensor]
Metric = Callable[[Any, Any], Any]


class LiveWeights:
    """The weights of a module between theta_pre and theta_ft; made by `live`, which restores them."""

    def __init__(
        self,
        model: nn.Module,
        vector: TaskVector,
        parameters: dict[str, nn.Parameter],
        index: Mapping[str, Tensor] | None,
        written: bool,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.index = None if index is None else {n: index[n].to(p.device) for n, p in parameters.items()}
        self.pre: dict[str, Tensor] = {}
        self.change: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            change = vector[name].to(parameter.device)
            self.change[name] = change if self.index is None else read(change, self.index[name])
            if written:
                weight = parameter.detach()
                self.pre[name] = weight.clone() if self.index is None else read(weight, self.index[name])
        self._grads: dict[str, Tensor] = {}

    @torch.no_grad()
    def mix(self, gamma: Callable[[str], Tensor] | float) -> None:
        """Writes theta_pre + gamma * delta; gamma: a function from a name to [n], or one number for all entries.

        A function, so that only one tensor's gamma is alive at a time.
        """
        for name, parameter in self.parameters.items():
            pre, change = self.pre[name], self.change[name]
            factor = gamma if isinstance(gamma, float) else gamma(name)
            if self.index is None and parameter.dtype == change.dtype and isinstance(factor, Tensor):
                torch.addcmul(pre, factor, change, out=parameter.data)
                continue
            mixed = torch.mul(change, factor).add_(pre)
            if self.index is None:
                parameter.copy_(mixed)
            else:
                write(parameter, self.index[name], mixed)

    @torch.no_grad()
    def switch(self, on: Callable[[str], Tensor]) -> None:
        """Writes theta_pre + delta where on(name), bool [n], and theta_pre, bit for bit, elsewhere."""
        for name, parameter in self.parameters.items():
            pre, change = self.pre[name], self.change[name]
            mixed = torch.where(on(name), (change + pre).to(pre.dtype), pre)
            if self.index is None:
                parameter.copy_(mixed)
            else:
                write(parameter, self.index[name], mixed)

    @torch.no_grad()
    def restore(self) -> None:
        """Writes theta_pre back."""
        for name, pre in self.pre.items():
            if self.index is None:
                self.parameters[name].copy_(pre)
            else:
                write(self.parameters[name], self.index[name], pre)

    def gradient(
        self, loss_fn: LossFn, data: Iterable[Any], *, batches: int | None = None, where: str = "theta_pre"
    ) -> tuple[float, dict[str, Tensor]]:
        """Mean loss and mean gradient over at most `batches` micro-batches at the weights as they stand.

        Raises NonFiniteError that says at which batch the loss, or in which tensor the gradient, is not finite.
        """
        for name, parameter in self.parameters.items():
            parameter.grad = None
            if name in self._grads:
                self._grads[name].zero_()
        total, count = 0.0, 0
        with torch.enable_grad():
            for number, batch in enumerate(islice(data, batches)):
                place = f"{where}, batch {number}"
                loss = check_loss(loss_fn(self.model, batch), where=place)
                if not loss.requires_grad:
                    raise ValueError(
                        f"the loss at {place} does not depend on the parameters: loss_fn must compute it with the model it is given, without no_grad"
                    )
                value = float(loss.detach())
                if not torch.isfinite(loss.detach()):
                    raise NonFiniteError(f"the loss is {value} at {place}")
                loss.backward()
                total += value
                count += 1
        if not count:
            raise ValueError("data holds no batches")
        grads: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            grad = self._grads.get(name, parameter.grad)
            grads[name] = torch.zeros_like(self.change[name]) if grad is None else grad.div_(count)
        finite = torch.stack([g.abs().sum().cpu() for g in grads.values()]).isfinite()
        if not bool(finite.all()):
            raise NonFiniteError(
                f"the gradient of {list(grads)[finite.tolist().index(False)]} is not finite at {where}"
            )
        return total / count, grads

    @torch.no_grad()
    def score(self, metric: Metric, data: Iterable[Any], *, batches: int | None = None) -> float:
        """Mean of metric(model, batch) over the batches at the weights as they stand."""
        values = [float(metric(self.model, batch)) for batch in islice(data, batches)]
        if not values:
            raise ValueError("data holds no batches")
        return sum(values) / len(values)

    def gather(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks that take each gradient as soon as it is complete, when it is not kept in .grad."""
        handles = []
        for name, parameter in self.parameters.items():
            if self.index is None and parameter.dtype == self.change[name].dtype:
                continue  # .grad itself is what is needed
            self._grads[name] = torch.zeros_like(self.change[name])

            def take(p: Tensor, name: str = name) -> None:
                if p.grad is not None:
                    grad = p.grad if self.index is None else read(p.grad, self.index[name])
                    self._grads[name].add_(grad)
                    p.grad = None

            handles.append(parameter.register_post_accumulate_grad_hook(take))
        return handles


@contextmanager
def live(
    model: nn.Module,
    delta: object,
    *,
    index: Mapping[str, Tensor] | None = None,
    dropout: bool = False,
    written: bool = True,
) -> Iterator[LiveWeights]:
    """The model as LiveWeights inside the block; afterwards weights, gradients, modes, flags and random state are as before.

    index: flat indices of the candidates of each tensor, None for all entries. dropout: leave training mode as it
    is (buffers are restored too); False puts the model in eval mode, as the paper does. written: False promises that
    the block leaves the weights alone, and saves the copy of what would be overwritten.
    """
    check_module("model", model)
    vector = TaskVector.of(delta)
    parameters = matching_parameters(model, vector)
    if vector.base is not None:
        check_base(model, vector.base, "the task vector", cached=not active(model))
    known = {n: known_checksum(model, n, p) for n, p in parameters.items()}
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if dropout else []
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    weights = LiveWeights(model, vector, parameters, index, written)
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    with torch.random.fork_rng(devices=devices):
        try:
            wanted = {id(p) for p in parameters.values()}
            for parameter, _, _ in flags:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in wanted)
            if not dropout:
                model.eval()
            hooks = weights.gather()
            yield weights
        finally:
            try:
                weights.restore()
            except BaseException:  # an interrupt during the restoration itself
                weights.restore()
                raise
            finally:
                for hook in hooks:
                    hook.remove()
                for module, mode in modes:
                    module.training = mode
                for parameter, flag, grad in flags:
                    parameter.requires_grad_(flag)
                    parameter.grad = grad
                with torch.no_grad():
                    for buffer, content in buffers:
                        buffer.copy_(content)
                for name, parameter in parameters.items():
                    if (value := known[name]) is not None:
                        remember(model, name, parameter, value)


def matching_parameters(model: nn.Module, vector: TaskVector) -> dict[str, nn.Parameter]:
    """The model's parameters that the task vector names; GraftMismatchError for missing names and other shapes."""
    try:
        parameters = parameters_named(model, list(vector))
    except KeyError as error:
        raise GraftMismatchError(
            f"the model lacks parameters that the task vector has: {error.args[0]}"
        ) from None
    for name, parameter in parameters.items():
        check_plain(parameter.detach(), name)
        if parameter.shape != vector[name].shape:
            raise GraftMismatchError(
                f"{name} has shape {tuple(parameter.shape)} in the model and {tuple(vector[name].shape)} in the task vector"
            )
    return parameters


def first_order_scores(
    model: nn.Module,
    delta: object,
    loss_fn: LossFn,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    dropout: bool = False,
) -> dict[str, Tensor]:
    """c = -grad * delta at theta_pre: how much the loss falls, to first order, when each entry moves to theta_ft.

    model: holds theta_pre and holds it again afterwards. loss_fn(model, batch) -> scalar tensor. data: batches,
    one backward pass each; batches: at most that many. Returns one tensor per tensor of delta, of its shape.
    """
    check_batches(data, again=False)
    vector = TaskVector.of(delta)
    with live(model, vector, dropout=dropout, written=False) as weights:
        _, grads = weights.gradient(loss_fn, data, batches=batches)
        return {n: grads[n].mul_(weights.change[n]).neg_().to(vector[n].device) for n in grads}
