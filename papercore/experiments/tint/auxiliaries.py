"""The auxiliary models: small pre-LN GPTs, each trained on the spot on a language of its own, and how far they got.

Glossary
    auxiliary    the model whose weights the simulator carries in its prefix tokens
    seed         number of the auxiliary: language, documents and first weights all follow from it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from papercore.experiments.tint.language import Documents, Language, pair_counts, pair_losses
from papercore.lab.training import backward_step, train, warmup_linear
from papercore.tint import TinyGPT, TinyGPTConfig

if TYPE_CHECKING:
    from papercore.experiments.tint.config import QuickConfig


def language_of(config: QuickConfig, seed: int) -> Language:
    """The language of an auxiliary; no two share a matrix."""
    kinds = {"train": config.topics, "choose": config.new_topics, "test": config.new_topics}
    return Language(config.words, config.names, kinds, _seed(config, seed, 0), config.name_rate)


def documents_of(config: QuickConfig, seed: int, kind: str) -> Documents:
    """Training documents; fresh documents of the trained topics ("known"); of new topics that choose the rates ("choose") or are
    reported on ("test")."""
    n = {
        "train": config.train_documents,
        "known": config.documents,
        "choose": config.choose_documents,
        "test": config.documents,
    }[kind]
    number = 1 + ["train", "known", "choose", "test"].index(kind)
    topics = "train" if kind == "known" else kind
    return language_of(config, seed).draw(n, config.length, topics, _seed(config, seed, number))


def new_auxiliary(config: QuickConfig, seed: int, **changes: Any) -> TinyGPT:
    """An untrained auxiliary model; `changes` are fields of TinyGPTConfig (activation, norm, gated, rotary ...)."""
    settings: dict[str, Any] = {
        "vocab_size": config.words + config.names, "n_positions": config.length, "n_layer": config.layers, "n_embd": config.width,
        "n_head": config.heads, "init_std": config.init_std, **changes,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(_seed(config, seed, 10))
    return TinyGPT(TinyGPTConfig(**settings), generator=generator).to(config.torch_device()).eval()


def _seed(config: QuickConfig, seed: int, number: int) -> int:
    return 10_000 * config.seed + 100 * seed + number


def token_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Negative log-probability [n, T - 1] of every token but the first."""
    log_p = logits[:, :-1].float().log_softmax(-1)
    return -log_p.gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def trained_part(config: QuickConfig, seed: int) -> dict[str, Any]:
    """Train one auxiliary and measure it: weights under "w:", and losses of the model, of counted pairs and of the oracle."""
    language = language_of(config, seed)
    documents = documents_of(config, seed, "train")
    model = new_auxiliary(config, seed).train()
    ids = documents.input_ids.to(config.torch_device())
    g = torch.Generator().manual_seed(_seed(config, seed, 11))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    order = torch.cat(
        [torch.randperm(len(ids), generator=g) for _ in range(config.steps * config.batch // len(ids) + 1)]
    )

    def loss(index: int) -> Tensor:
        some = ids[order[index * config.batch : (index + 1) * config.batch].to(ids.device)]
        return token_losses(model(some).logits, some).mean()

    lr = warmup_linear(config.lr, config.steps, warmup=config.warmup)
    losses = train(backward_step(loss, optimizer, lr=lr, clip=1.0), config.steps, text=f"auxiliary {seed}")
    model.eval()
    pairs = pair_counts(documents, language.vocabulary)
    out: dict[str, Any] = {"losses": np.array(losses)}
    for kind in ("known", "test"):
        some = documents_of(config, seed, kind)
        there = some.recall[:, 1:]
        with torch.no_grad():
            own = token_losses(
                model(some.input_ids.to(ids.device)).logits, some.input_ids.to(ids.device)
            ).cpu()
        for name, values in (
            ("model", own), ("pair", pair_losses(some, pairs)), ("oracle", -some.oracle[:, 1:]),
        ):  # fmt: skip
            out[f"{kind}_{name}"] = values.mean(1).numpy().astype(np.float64)
            out[f"{kind}_{name}_recall"] = float(values[there].mean()) if there.any() else 0.0
    return out | {f"w:{k}": v.cpu().numpy() for k, v in model.state_dict().items()}


def auxiliary_from(config: QuickConfig, seed: int, part: dict[str, Any]) -> TinyGPT:
    """The trained auxiliary of a finished part."""
    model = new_auxiliary(config, seed)
    model.load_state_dict(
        {k.removeprefix("w:"): torch.from_numpy(v) for k, v in part.items() if k.startswith("w:")}
    )
    return model.eval()
