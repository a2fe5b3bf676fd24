"""Stand-ins in the hub's formats: a random OPT and RoBERTa with trained tokenizers, and few-row parquet data sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = [
    "It",
    "was",
    "terrible",
    "great",
    "bad",
    "okay",
    "good",
    "Yes",
    "No",
    "Maybe",
    "Description",
    "Entity",
    "Expression",
    "Human",
    "Location",
    "Number",
    "so",
    "because",
    "true",
    "Answer",
    "Question",
    "Context",
    "Title",
    "Passage",
    "the",
    "film",
    "a",
    "plot",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "in",
    "Paris",
    "and",
    "then",
    "what",
    "who",
    "is",
    "it",
    "not",
    "very",
    "dull",
    "fun",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train_tokenizer(folder: Path) -> dict[str, str]:
    """The files of a byte-level BPE trained on sentences that hold every label word, as keywords of a tokenizer class."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    text = [" ".join(WORDS) + "\n" + "\n".join(WORDS)] * 8
    trained.train_from_iterator(
        text, vocab_size=1000, min_frequency=2, special_tokens=SPECIAL, show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(folder))
    return {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}


def save_opt(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """A random-weight OPT with its tokenizer, as save_pretrained leaves it."""
    from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM

    tokenizer = GPT2Tokenizer(
        **train_tokenizer(folder), bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    )
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, ffn_dim=64, num_attention_heads=4, max_position_embeddings=512,
        word_embed_proj_dim=32, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return _saved(OPTForCausalLM, config, tokenizer, folder, seed)


def save_roberta(folder: Path, *, seed: int = 0) -> Path:
    """A random-weight RoBERTa with its tokenizer, as save_pretrained leaves it."""
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

    tokenizer = RobertaTokenizer(**train_tokenizer(folder))
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        max_position_embeddings=300, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return _saved(RobertaForMaskedLM, config, tokenizer, folder, seed)


def _saved(kind: Any, config: Any, tokenizer: Any, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        # Larger than the library's initial weights, so that candidates differ by more than rounding.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_parquet(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """One parquet file a split, as `datasets` writes it."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def rows_of(task: str, count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """`count` rows in the hub's columns, labels going round."""
    return [ROWS[task](i) for i in range(start, start + count)]


def _label(i: int, classes: int) -> int:
    return i % classes


ROWS: dict[str, Any] = {
    "sst2": lambda i: {"idx": i, "sentence": f"the film {i} was {('dull', 'fun')[i % 2]} ", "label": _label(i, 2)},
    "sst5": lambda i: {"text": f"a plot {i}", "label": _label(i, 5), "label_text": "x"},
    "trec": lambda i: {"text": f"what is {i} ?", "coarse_label": _label(i, 6), "fine_label": i},
    "snli": lambda i: {"premise": f"A cat sat {i}.", "hypothesis": "The dog sat.", "label": (-1, 0, 1, 2)[i % 4]},
    "mnli": lambda i: {"premise": f"A cat sat {i}.", "hypothesis": "The dog sat.", "label": _label(i, 3), "idx": i},
    "rte": lambda i: {"premise": f"A cat sat {i}.", "hypothesis": "The dog sat.", "label": _label(i, 2), "idx": i},
    "cb": lambda i: {"premise": f"A cat sat {i}.", "hypothesis": "the dog sat", "label": _label(i, 3), "idx": i},
    "boolq": lambda i: {"passage": f"the cat {i} sat.", "question": "is it a cat", "label": _label(i, 2), "idx": i},
    "wsc": lambda i: {"text": f"the cat {i} sat, it is fun", "span1_text": "the cat", "span2_text": "It", "label": _label(i, 2)},
    "wic": lambda i: {"word": "cat", "sentence1": f"a cat {i}", "sentence2": "the cat", "label": _label(i, 2)},
    "multirc": lambda i: {"paragraph": f"the cat {i}", "question": "what is it?", "answer": "a cat", "label": _label(i, 2)},
    "copa": lambda i: {"premise": f"The cat {i} sat.", "question": ("cause", "effect")[i % 2], "choice1": "It was fun.", "choice2": "I sat.", "label": _label(i, 2)},
    "record": lambda i: {
        "passage": f"the cat {i} and the dog\n@highlight\nthe mat", "query": "@placeholder sat", "entities": ["cat", "dog", "mat"], "answers": ["dog"],
    },
    "squad": lambda i: {"title": "cat", "context": f"the cat {i} sat on the mat", "question": " what is it?", "answers": {"text": ["the cat", "cat"], "answer_start": [0, 4]}},
    "drop": lambda i: {"passage": f"the cat {i} sat", "question": "what is it?", "answers_spans": {"spans": ["cat"], "types": ["span"]}},
}  # fmt: skip


# Settings of a `paper` run that takes seconds.
TINY = {
    "device": "cpu",
    "paper_steps": 4,
    "paper_eval_every": 2,
    "paper_batch": 4,
    "paper_tune_steps": 2,
    "paper_shots": 2,
    "paper_seeds": (0,),
    "paper_train": 8,
    "paper_validation": 4,
    "paper_test": 6,
    "paper_demonstrations": 2,
    "paper_max_tokens": 200,
    "paper_dtype": "float32",
    "paper_lr_mezo": (1e-4,),
    "paper_lr_lora": (1e-3,),
    "paper_lr_prefix": (1e-2,),
    "paper_lr_ft": (1e-3,),
}


def make_hub(root: Path) -> Path:
    """Models and data of every task; the tiny OPT has the name of a model that the paper reports."""
    save_opt(root / "models" / "opt-13b")
    save_roberta(root / "models" / "roberta-large")
    for task in ROWS:
        test = "test" if task in ("sst5", "trec") else "validation"
        write_parquet(root / "data" / task, train=rows_of(task, 36), **{test: rows_of(task, 8, start=100)})
    return root


def use_hub(monkeypatch: pytest.MonkeyPatch, root: Path, runs: Path) -> None:
    """Point the environment at `root`; what is not there is missing at once, without asking a network."""
    monkeypatch.setenv("PAPERCORE_MODELS", str(root / "models"))
    monkeypatch.setenv("PAPERCORE_DATA", str(root / "data"))
    monkeypatch.setenv("PAPERCORE_RUNS", str(runs))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "datasets", None)
