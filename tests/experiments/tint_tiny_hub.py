"""Stand-ins in the hub's formats: a random GPT-2 and OPTs with trained tokenizers, WikiText-103 and seven sets of a few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from papercore.experiments.tint.paper_tasks import TASKS
from tests.experiments.mezo_tiny_hub import write_parquet

VOCABULARY = (
    "the film was dull and fun Negative Positive objective subjective World Sports Business Technology Review Sentiment Article "
    "What is article about Answer This plot of a team in market"
)
WORDS = VOCABULARY.split()


def _tokenizer_files(folder: Path) -> dict[str, str]:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    text = [" ".join(WORDS) + "\n" + "\n".join(WORDS)] * 8
    trained.train_from_iterator(
        text, vocab_size=800, min_frequency=2, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(folder))
    return {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}


def save_model(folder: Path, family: str, *, seed: int = 0, width: int = 16) -> Path:
    """A random-weight GPT-2 or OPT of two layers, as save_pretrained leaves it."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, OPTConfig, OPTForCausalLM

    tokenizer = GPT2Tokenizer(
        **_tokenizer_files(folder), bos_token="</s>", eos_token="</s>", unk_token="</s>"
    )
    config: Any
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=width, n_layer=2, n_head=2, n_positions=256, bos_token_id=2, eos_token_id=2
        )  # fmt: skip
        kind: Any = GPT2LMHeadModel
    else:
        config = OPTConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, ffn_dim=2 * width, num_attention_heads=2,
            max_position_embeddings=256, word_embed_proj_dim=width, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        )  # fmt: skip
        kind = OPTForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_hub(root: Path) -> Path:
    """Models and data of the whole `paper` scale, named as on the hub."""
    save_model(root / "models" / "gpt2", "gpt2")
    save_model(root / "models" / "opt-125m", "opt", seed=1)
    save_model(root / "models" / "opt-1.3b", "opt", seed=2, width=24)
    lines = [{"text": ""}, {"text": " = Title = \n"}] + [
        {"text": f" {WORDS[i % len(WORDS)]} the film was {WORDS[i * 7 % len(WORDS)]} and {i} . \n"} for i in range(60)
    ]  # fmt: skip
    write_parquet(root / "data" / "wikitext-103", validation=lines, test=lines[::-1])
    for task in TASKS.values():
        classes = len(task.template.words)
        rows = [{task.text: f"the film {i} was {WORDS[i % 9]} ", task.label: i % classes} for i in range(40)]
        write_parquet(root / "data" / task.name, train=rows, **{task.test: rows[::-1]})
    return root
