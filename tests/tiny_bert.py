"""A BERT of a few thousand random weights with a word tokenizer, saved as `save_pretrained` lays it out, and a few questions.

Questions of the six TREC classes begin with a word of their class, said three times, so that even this encoder can tell them apart.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

FIRST_WORDS = {
    "ABBR": "abbreviated",
    "DESC": "why",
    "ENTY": "which",
    "HUM": "who",
    "LOC": "where",
    "NUM": "when",
}
FILLERS = [
    "is",
    "the",
    "a",
    "of",
    "king",
    "city",
    "war",
    "book",
    "dog",
    "train",
    "sea",
    "name",
    "first",
    "old",
    "new",
    "long",
]
WORDS = [
    *FIRST_WORDS.values(),
    *FILLERS,
    *[
        "question",
        "about",
        "an",
        "abbreviation",
        "asking",
        "for",
        "description",
        "or",
        "definition",
        "thing",
        "entity",
        "person",
        "location",
        "number",
        "date",
        "quantity",
        "?",
    ],
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_tiny_bert(
    folder: Path, *, dtype: torch.dtype = torch.float32, layers: int = 2, width: int = 16
) -> Path:
    """Write model and tokenizer into `folder`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *WORDS]))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config).eval()
        with torch.no_grad():
            model.embeddings.position_embeddings.weight.mul_(0.1)  # words, not places, should make the states
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_questions(root: Path, *, each: int = 12, tests: int = 3) -> Path:
    """Write `root/corpora/qc.zip` with `each` training and `tests` test questions a class; returns `root`."""

    def lines(start: int, count: int) -> str:
        made = []
        for number in range(start, start + count):
            for label, word in FIRST_WORDS.items():
                filler = [FILLERS[(number * step) % len(FILLERS)] for step in (1, 3, 5, 7)]
                made.append(
                    f"{label}:fine {word} {word} {word} {' '.join(filler[: 2 + number % 3])} {number} ?"
                )
        return "\n".join(made) + "\n"

    (root / "corpora").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / "corpora" / "qc.zip", "w") as archive:
        archive.writestr("qc/train.txt", lines(0, each))
        archive.writestr("qc/test.txt", lines(each, tests))
        archive.writestr("qc/README", "made by a test")
    return root
