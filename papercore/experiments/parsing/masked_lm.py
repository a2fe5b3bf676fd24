"""A masked language model of transformers, trained on a grammar's sentences.

`quick` and `standard` use RoBERTa with layer norms before the sublayers, which trains faster at small size; `paper` RoBERTa
itself. Tokens of the model are word ids + 2: 0 is padding and 1 the mask.

Glossary
    heads, layers   "AiLj" in the paper: i heads, j layers
    width           numbers of a hidden state
    logits          over words alone; special tokens are never predicted
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from papercore.experiments.parsing.corpus import Sentences, training_batches
from papercore.lab.training import Checkpoint, backward_step, train, warmup_linear

PADDING, MASK, FIRST_WORD = 0, 1, 2


def make_model(
    words: int,
    *,
    width: int,
    layers: int,
    heads: int,
    max_length: int,
    seed: int,
    pre_norm: bool = True,
) -> nn.Module:
    """An untrained model without dropout. Its weights come from `seed`; the global generator is left as it was.

    Raises:
        ValueError: the width is not a multiple of the heads.
    """
    import transformers

    if width % heads:
        raise ValueError(
            f"width = {width} is no multiple of heads = {heads}: every head takes the same share."
        )
    kind = "RobertaPreLayerNorm" if pre_norm else "Roberta"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=words + FIRST_WORD, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=max_length + 2, type_vocab_size=1, pad_token_id=PADDING,
        bos_token_id=None, eos_token_id=None, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, f"{kind}ForMaskedLM")(config)


def encode(
    model: Any, ids: Tensor, lengths: Tensor, masked: Tensor | None, *, hidden: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Last states [b, m, width], and with `hidden` the states of every layer, embeddings first, each [b, m, width]."""
    inside = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    tokens = torch.where(inside, ids + FIRST_WORD, PADDING)
    if masked is not None:
        tokens = torch.where(masked, MASK, tokens)
    out = model.base_model(input_ids=tokens, attention_mask=inside.long(), output_hidden_states=hidden)
    return out.last_hidden_state, out.hidden_states if hidden else ()


def word_logits(model: Any, states: Tensor) -> Tensor:
    """Logits over words [..., V] from last states [..., width]."""
    return model.lm_head(states)[..., FIRST_WORD:]


def train_model(
    model: nn.Module,
    sentences: Sentences,
    *,
    steps: int,
    done: int = 0,
    until: int | None = None,
    batch: int,
    lr: float,
    warmup: int,
    mask_rate: float,
    seed: int,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoint: Checkpoint | None = None,
    text: str = "masked language model",
) -> tuple[list[float], torch.optim.Optimizer]:
    """Steps `done` .. `until` of a run of `steps`; the losses, and the optimizer for the next part.

    With a checkpoint, whose parts must be this model and this optimizer, a killed run goes on after the last saved step; the order
    of its batches from there on is another one.
    """
    device = next(model.parameters()).device
    optimizer = optimizer or new_optimizer(model, lr)
    rate = warmup_linear(lr, steps, warmup=warmup)
    resumed = checkpoint.load()[0] if checkpoint else 0
    generator = torch.Generator().manual_seed(seed + done + resumed)
    batches = training_batches(sentences, batch, mask_rate, generator)
    model.train()

    def loss_of(index: int) -> Tensor:
        ids, lengths, masked = (t.to(device, non_blocking=True) for t in next(batches))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            states, _ = encode(model, ids, lengths, masked)
            # The words that were masked alone: the rest of the logits would be thrown away.
            logits = word_logits(model, states[masked])
        return nn.functional.cross_entropy(logits.float(), ids[masked])

    step = backward_step(loss_of, optimizer, lr=lambda index: rate(index + done), clip=1.0)
    losses = train(step, (steps if until is None else until) - done, text=text, checkpoint=checkpoint)
    return losses, optimizer


def new_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW with a little weight decay, and a memory for squares of gradients short enough for runs of a thousand steps."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def log_probabilities(
    model: nn.Module, ids: Tensor, lengths: Tensor, position: Tensor, *, batch: int = 250
) -> Tensor:
    """log q(w | the other words) at the masked position of every sentence, [N, V] on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    out = []
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        at = position[rows].to(device)
        # What stands at the masked position may be the grammar's mask id, which is no token of the model.
        masked = torch.arange(ids.shape[1], device=device) == at.unsqueeze(1)
        part = torch.where(masked, 0, ids[rows].to(device))
        states, _ = encode(model, part, lengths[rows].to(device), masked)
        logits = word_logits(model, states[torch.arange(len(at), device=device), at])
        out.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(out)


@torch.no_grad()
def hidden_states(model: nn.Module, sentences: Sentences, *, batch: int = 250) -> Tensor:
    """States of all layers of sentences without a mask, [layers + 1, N, n, width] on the CPU, embeddings first."""
    device = next(model.parameters()).device
    model.eval()
    out = []
    for start in range(0, len(sentences), batch):
        part = sentences.part(start, start + batch)
        _, states = encode(model, part.ids.to(device), part.lengths.to(device), None, hidden=True)
        out.append(torch.stack(states).float().cpu())
    return torch.cat(out, 1)
