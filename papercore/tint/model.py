"""TinT: one forward pass that runs an auxiliary model, takes SGD steps on it, and runs it again (Panigrahi et al., 2024, section 2).

    x <- embed(input_ids)
    for every layer:                   x <- Forward(x)                     memory of the last n_layers
    repeat n_steps times:
        g <- loss gradient at the training targets (SUM over targets)
        g <- final norm Backward;      final norm Descent
        for the last n_layers, top first:   g <- Backward(g);  Descent     both read the old weights
        for the last n_layers:         x <- Forward(x) with the new weights, from the state that enters them
    logits <- head(final norm(x))

Nothing is learned by the simulator and it owns no parameters: its weights are the auxiliary's tensors, referenced, and what a
document changes is kept apart, one change a document. With backend "fused" each operation is one matrix product; "literal"
computes the same numbers with attention heads over prefix tokens.

What attention being causal saves: a backward pass reads no token behind a batch's last training position, so memories are cut there, and
of several steps only the last one's forward pass runs the whole documents.

Glossary: see papercore.tint.config for the settings and papercore.tint.targets for which token is a target.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.tint.auxiliary import Auxiliary, read_auxiliary, refuse_dropout
from papercore.tint.blocks import BlockMemory, Changes, SimulatedBlock, SimulatedNorm, operation_layout
from papercore.tint.config import SimulatorShape, TinTConfig, checked_layers, simulator_shape
from papercore.tint.output import loss_gradient
from papercore.tint.targets import Targets, checked_targets
from papercore.tint.tree import Branch
from papercore.tint.weights import DocumentWeights, trained_pieces

__all__ = ["TinTModel", "TinTOutput"]


@dataclass
class TinTOutput:
    """What a pass returns; losses are means in nats over targets.

    logits [B, T, V] after the steps, initial_logits [B, T, V] before (the auxiliary's own).
    loss, initial_loss []: over the targets that are not trained on; train_loss, initial_train_loss [] over those that are (nan
    where there are none). document_losses, initial_document_losses [B]: loss and initial_loss of each document.
    updates {parameter: [B, *its shape]}: the change that each document made to each trained parameter of the auxiliary.
    n_train [B]: training targets.
    """

    logits: Tensor
    initial_logits: Tensor
    loss: Tensor
    initial_loss: Tensor
    train_loss: Tensor
    initial_train_loss: Tensor
    document_losses: Tensor
    initial_document_losses: Tensor
    updates: dict[str, Tensor]
    n_train: Tensor


def summarise(
    targets: Targets, logits: Tensor, initial_logits: Tensor, updates: dict[str, Tensor]
) -> TinTOutput:
    """Losses of the logits before and after."""
    means = []
    for where in (targets.test, targets.train):
        for these in (logits, initial_logits):
            losses = targets.token_losses(these, where)
            means.append((losses.sum() / where.sum(), losses.sum(dim=1) / where.sum(dim=1)))
    (loss, document), (initial, initial_document), (train, _), (initial_train, _) = means
    return TinTOutput(
        logits,
        initial_logits,
        loss,
        initial,
        train,
        initial_train,
        document,
        initial_document,
        updates,
        targets.n_train,
    )


def warn_of_divergence(output: TinTOutput, lr: float, reduction: str, setting: str = "inner_lr") -> None:
    """Say so where a step made a loss infinite or more than doubled it. setting: what the caller calls its rate."""
    n = int(output.n_train.max())
    pairs = (
        ("loss", output.initial_loss, output.loss),
        ("training loss", output.initial_train_loss, output.train_loss),
    )
    for name, before, after in pairs:
        if math.isnan(float(before)):
            continue
        if not math.isfinite(float(after)) or float(after) > 2 * float(before):
            hint = (
                f"the loss is summed over {n} targets: try {lr / max(n, 1):.2g}"
                if reduction == "sum"
                else "lower it"
            )
            warnings.warn(
                f"the {name} went from {float(before):.3g} to {float(after):.3g} nats: {setting} = {lr} is too big ({hint}).",
                UserWarning,
                stacklevel=3,
            )
            return


class TinTModel(Branch):
    """A simulator of one auxiliary model. Build it with `TinTModel.from_auxiliary`.

    Its tree of modules mirrors the auxiliary's: where the auxiliary has h.0.attn.v_proj, the simulator has
    h.0.attn.v_proj.forward, .backward and .descent.

    Attributes:
        config: the TinTConfig.
        auxiliary: the description of the auxiliary model, with references to its tensors.
        shape: stack, prefix tokens, width and heads of the simulator.

    >>> from papercore.tint import TinyGPT
    >>> model = TinyGPT(n_embd=12, n_head=3, vocab_size=11)
    >>> tint = TinTModel.from_auxiliary(model, TinTConfig(inner_lr=0.1))
    >>> input_ids = torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2]])
    >>> output = tint(input_ids, torch.arange(8)[None] < 4)
    >>> bool(output.loss < output.initial_loss)
    True
    >>> output.updates["h.1.mlp.fc_out.weight"].shape
    torch.Size([1, 12, 48])
    """

    def __init__(self, model: nn.Module, config: TinTConfig) -> None:
        super().__init__()
        self.config = config
        self.auxiliary: Auxiliary = read_auxiliary(model)
        self._source = (model,)  # in a tuple, so that the auxiliary is no child of its simulator
        auxiliary = self.auxiliary
        self.n_layers = checked_layers(config.n_layers, len(auxiliary.blocks))
        self.shape: SimulatorShape = simulator_shape(
            auxiliary.width, auxiliary.n_head, config.stack, config.heads
        )
        self._check_precision()
        layout = operation_layout(auxiliary, config)
        self._blocks = tuple(SimulatedBlock(block, auxiliary, config, layout) for block in auxiliary.blocks)
        self._final_norm = (SimulatedNorm(auxiliary.final_norm, config, layout),)
        for block in self._blocks:
            self.place(block.block.name, block)
        self.place(auxiliary.final_norm.name, self._final_norm[0])
        present = {name for name, _ in self.named_modules()}
        for name in auxiliary.module_names:
            if name not in present:  # embeddings, dropout, the head: places without a simulated operation
                self.place(name, Branch())

    @classmethod
    def from_auxiliary(cls, model: nn.Module, config: TinTConfig | None = None) -> TinTModel:
        """A simulator of `model`: GPT-2, OPT (pre-LN) or Llama of transformers, or a TinyGPT.

        Its tensors are referenced, not copied, and never changed; a change of the model is seen by the simulator.

        Raises:
            TypeError: not an nn.Module.
            NotImplementedError: a model, or a part of one, that is not simulated; the module is named.
            ValueError: sizes that do not divide each other, more layers than there are, dropout in training mode, finite
                differences in half precision.
        """
        if config is not None and not isinstance(config, TinTConfig):
            raise TypeError(
                f"config is {type(config).__name__}: expected a TinTConfig, such as TinTConfig(inner_lr=1e-3)."
            )
        return cls(model, TinTConfig() if config is None else config)

    def _check_precision(self) -> None:
        dtype, config = self.auxiliary.dtype, self.config
        if not config.has_differences:
            return
        if torch.finfo(dtype).bits < 32:
            raise ValueError(
                f"the auxiliary is {dtype}, in which a finite difference is all rounding error: call model.float() (float32), "
                "or set ln_grad='exact' and act_grad='exact'."
            )
        if dtype == torch.float32 and config.fd_eps < 1e-5 and not config.fd_relative:
            warnings.warn(
                f"fd_eps = {config.fd_eps} in float32: the rounding error of a difference is at least "
                f"{torch.finfo(dtype).eps / config.fd_eps:.1g} relative; 1e-2 is near the best.",
                UserWarning,
                stacklevel=4,
            )

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        train_mask: Tensor,
        labels: Tensor | None = None,
        *,
        gradient_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> TinTOutput:
        """Logits of the auxiliary, steps on the training segment, and logits after them, each document for itself.

        Args:
            input_ids: [B, T] integers.
            train_mask: [B, T] bool. Token t is a training target where train_mask[t] is True (predicted at t - 1), and an
                evaluation target where it is False.
            labels: [B, T], the targets, -100 for none; None: input_ids.
            gradient_mask: [B, T] bool, narrows the training targets (label words, say).
            attention_mask: [B, T], True or 1 where a token is no padding, or [B, T, T] bool, who may read whom. Padding on the
                left needs it, and padded tokens are no targets.
            position_ids: [B, T]; None: as the auxiliary itself counts them.

        Returns:
            TinTOutput. A document without a training target is unchanged, bit for bit.

        Raises:
            TypeError, ValueError: see papercore.tint.targets.checked_targets.

        Warns:
            UserWarning: a document has training tokens but no target, or a loss more than doubled.
        """
        refuse_dropout(self._source[0])
        self._check_precision()
        targets = checked_targets(
            self.auxiliary,
            input_ids,
            train_mask,
            labels,
            gradient_mask=gradient_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        config, depth = self.config, len(self._blocks)
        weights = self._weights()
        x = self.auxiliary.embed(targets.input_ids, targets.position_ids)
        x, _ = self._run(x, 0, depth - self.n_layers, weights, targets, keep=False)
        entering = x
        x, memories = self._run(x, depth - self.n_layers, depth, weights, targets, keep=True)
        initial_logits = self._head(self._final_norm[0].run(x, weights)[0])
        logits = initial_logits
        if targets.length and config.inner_lr:
            for step in range(config.n_steps):
                self._step(x[:, : targets.length], memories, weights, targets)
                is_last = step == config.n_steps - 1
                x, memories = self._run(
                    entering if is_last else entering[:, : targets.length],
                    depth - self.n_layers,
                    depth,
                    weights,
                    targets,
                    keep=not is_last,
                )
            logits = self._head(self._final_norm[0].run(x, weights)[0])
            # A product with weights of its own may round otherwise: a document without a step keeps its bits.
            logits = torch.where((targets.n_train > 0)[:, None, None], logits, initial_logits)
        output = summarise(targets, logits, initial_logits, weights.updates(len(input_ids)))
        warn_of_divergence(output, config.inner_lr, config.reduction)
        return output

    def _weights(self) -> DocumentWeights:
        config = self.config
        pieces = trained_pieces(
            self.auxiliary,
            self.n_layers,
            update_layernorm=config.update_layernorm,
            update_bias=config.update_bias,
            queries_and_keys=config.attn_grad == "full",
        )
        return DocumentWeights(pieces)

    def _run(
        self, x: Tensor, start: int, stop: int, weights: DocumentWeights, targets: Targets, *, keep: bool
    ) -> tuple[Tensor, list[BlockMemory]]:
        """Layers start .. stop - 1; the memories they leave, cut where no gradient reaches."""
        n = x.shape[1]
        mask = targets.attention_mask if n == targets.input_ids.shape[1] else targets.shortened_mask()
        memories = []
        for block in self._blocks[start:stop]:
            x, memory = block.run(x, weights, mask, targets.position_ids[:, :n])
            if keep and targets.length:
                memories.append(memory.shortened(targets.length))
        return x, memories

    def _head(self, h: Tensor) -> Tensor:
        head = self.auxiliary.head
        return F.linear(h, head.matrix(), head.vector())

    def _step(
        self, x: Tensor, memories: list[BlockMemory], weights: DocumentWeights, targets: Targets
    ) -> None:
        """One SGD step of each document: the changes are added to `weights`."""
        config, head, n = self.config, self.auxiliary.head, targets.length
        lr: float | Tensor = config.inner_lr
        if config.reduction == "mean":
            lr = config.inner_lr / targets.n_train.clamp(min=1).to(x.dtype)
        changes = Changes(weights, targets.context[:, :n], lr)
        h, memory = self._final_norm[0].run(x, weights)
        grad = loss_gradient(
            h, head.matrix(), targets.targets[:, :n], targets.train[:, :n], config.loss, head.vector()
        )
        grad = self._final_norm[0].go_back(grad, memory, weights, changes)
        blocks = self._blocks[len(self._blocks) - self.n_layers :]
        for block, remembered in zip(reversed(blocks), reversed(memories), strict=True):
            grad = block.go_back(grad, remembered, weights, changes, is_lowest=block is blocks[0])
        changes.apply()

    def updated_state_dict(self, output: TinTOutput, index: int = 0) -> dict[str, Tensor]:
        """The auxiliary's state dict after the steps of document `index`; unchanged tensors are the auxiliary's own.

        Raises:
            IndexError: the output has no document `index`.

        >>> from papercore.tint import TinyGPT
        >>> model = TinyGPT(n_embd=12, n_head=3, vocab_size=11)
        >>> tint = TinTModel.from_auxiliary(model)
        >>> input_ids = torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2]])
        >>> output = tint(input_ids, torch.arange(8)[None] < 4)
        >>> other = TinyGPT(n_embd=12, n_head=3, vocab_size=11)
        >>> other.load_state_dict(tint.updated_state_dict(output))
        <All keys matched successfully>
        >>> torch.allclose(other(input_ids).logits, output.logits, atol=1e-6)
        True
        """
        documents = len(output.logits)
        if not -documents <= index < documents:
            raise IndexError(f"index = {index}: the output has {documents} documents.")
        state = {name: tensor.detach() for name, tensor in self._source[0].state_dict().items()}
        for name, change in output.updates.items():
            state[name] = state[name] + change[index]
        return state
