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
    """An untrained model. Its weights come from `seed`; the global generator is left as it was."""
    import transformers

    kind = "RobertaPreLayerNorm" if pre_norm else "Roberta"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=words + FIRST_WORD, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=max_length + 2, type_vocab_size=1, pad_token_id=PADDING,
        bos_token_id=None, eos_token_id=None, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, f"{kind}ForMaskedLM")(config)


def forward(
    model: Any, ids: Tensor, lengths: Tensor, masked: Tensor | None, *, hidden: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits over words [b, m, V], and with `hidden` the states of every layer, embeddings first, each [b, m, width]."""
    inside = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    tokens = torch.where(inside, ids + FIRST_WORD, PADDING)
    if masked is not None:
        tokens = torch.where(masked, MASK, tokens)
    out = model(input_ids=tokens, attention_mask=inside.long(), output_hidden_states=hidden)
    return out.logits[..., FIRST_WORD:], out.hidden_states if hidden else ()


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
    """Steps `done` .. `until` of a run of `steps`; the losses, and the optimizer for the next part."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed + done)
    batches = training_batches(sentences, batch, mask_rate, generator)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    rate = warmup_linear(lr, steps, warmup=warmup)
    model.train()

    def loss_of(index: int) -> Tensor:
        ids, lengths, masked = (t.to(device) for t in next(batches))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, _ = forward(model, ids, lengths, masked)
        return nn.functional.cross_entropy(logits[masked].float(), ids[masked])

    step = backward_step(loss_of, optimizer, lr=lambda index: rate(index + done), clip=1.0)
    losses = train(step, (until or steps) - done, text=text, checkpoint=checkpoint)
    return losses, optimizer


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
        part = ids[rows].to(device)
        masked = torch.arange(ids.shape[1], device=device) == at.unsqueeze(1)
        logits, _ = forward(model, part, lengths[rows].to(device), masked)
        out.append(logits[torch.arange(len(at), device=device), at].float().log_softmax(-1).cpu())
    return torch.cat(out)


@torch.no_grad()
def hidden_states(model: nn.Module, sentences: Sentences, *, batch: int = 250) -> Tensor:
    """States of all layers of sentences without a mask, [layers + 1, N, n, width] on the CPU, embeddings first."""
    device = next(model.parameters()).device
    model.eval()
    out = []
    for start in range(0, len(sentences), batch):
        part = sentences.part(start, start + batch)
        _, states = forward(model, part.ids.to(device), part.lengths.to(device), None, hidden=True)
        out.append(torch.stack(states).float().cpu())
    return torch.cat(out, 1)
