"""MeZO inside transformers.Trainer: two methods are overridden, the training loop stays the library's own.

The loop calls training_step once for every micro-batch and then optimizer.step(). Here training_step collects
micro-batches and, at the last one of an accumulation, makes the whole MeZO step on their mean loss; the
optimizer.step() that follows finds nothing to do. Schedules, logging, evaluation, checkpoints and resuming
work as ever.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from papercore.mezo.integrations import default_eps
from papercore.mezo.optimizer import Closure, MeZO

try:
    from transformers import Trainer
except ImportError:
    raise ImportError("MeZOTrainer needs transformers and accelerate: pip install 'papercore[hf]'") from None


class _SteppedByTrainer(MeZO):
    """MeZO whose step without a closure does nothing: the loop's own call comes after the step was made."""

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        return float("nan") if closure is None else super().step(closure)


class MeZOTrainer(Trainer):
    """transformers.Trainer with MeZO's step: `MeZOTrainer(model=..., args=..., train_dataset=...,
    mezo={"eps": 1e-3})`.

    mezo: arguments of `MeZO` beside params; those left out come from the training arguments (lr,
    weight_decay, seed) and from `default_eps` for the adapter in use. Biases and normalisations do not decay.
    The model is in evaluation mode during a step, so that dropout is off, as the paper requires. With several
    processes under torchrun the ranks exchange one scalar a step. The paper keeps lr constant:
    TrainingArguments(lr_scheduler_type="constant"). Gradient clipping has no gradients to clip.
    `trainer.mezo_optimizer.log` is the log from which `replay` makes the weights again.

    Raises ValueError for sharded training (DeepSpeed, FSDP), where no process holds the weights that it would
    perturb.
    """

    def __init__(self, *args: Any, mezo: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._mezo_arguments = dict(mezo or {})
        self._micro_batches: list[Any] = []
        self.mezo_optimizer: MeZO | None = None
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "MeZOTrainer does not work with DeepSpeed or FSDP: every process must hold all trained weights"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """MeZO over the named parameters in the model's order, which is the order of the log."""
        model = self.model if model is None else model
        assert model is not None
        if self.optimizer is None:
            arguments: dict[str, Any] = {
                "lr": self.args.learning_rate,
                "weight_decay": self.args.weight_decay,
                "decay_filter": "no_bias_norm",
                "seed": self.args.seed,
            }
            if "eps" not in self._mezo_arguments:
                arguments["eps"] = default_eps(model)
            if self.args.world_size > 1 and torch.distributed.is_initialized():
                arguments["process_group"] = torch.distributed.group.WORLD
            self.mezo_optimizer = _SteppedByTrainer(
                model.named_parameters(), **{**arguments, **self._mezo_arguments}
            )
            self.mezo_optimizer.attach(model)  # a pipelined run is flushed before evaluation and saving
            self.optimizer = self.mezo_optimizer
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Collects the micro-batch; at the last one of an accumulation makes the step. Returns its loss."""
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
        # A loss that was divided by the number of items of the whole accumulation is to be summed, others
        # averaged.
        divided = (
            self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        ) and num_items_in_batch is not None
        training = model.training

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                losses = [
                    self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
                    for batch in batches
                ]
            total = torch.stack([torch.as_tensor(loss).float().mean() for loss in losses]).sum()
            return total / (1 if divided else len(losses))

        assert self.mezo_optimizer is not None
        model.eval()
        try:
            loss = self.mezo_optimizer.step(closure)
        finally:
            model.train(training)
        return torch.tensor(loss, device=self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer.train, after which the parameters are at the centre."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.mezo_optimizer is not None:
                self.mezo_optimizer.flush()
