"""The text of the `standard` scale: NLTK's free corpora to train on, WikiText-2 to choose and to report on, as token ids.

The vocabulary is a byte-level BPE trained on the training corpora at run time (the `tokenizers` library, which transformers
brings along); nothing of WikiText is in it.

Glossary
    document   `context` consecutive tokens of WikiText's non-empty lines, as in the paper's evaluation; the remainder is dropped
    stream     all training documents behind one another, an end-of-text token after each
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papercore.lab import data

END = "<|endoftext|>"
WIKITEXT = "wikitext-2"
# The original release, in which rare words are <unk>; the hub has a raw one too.
HUB_CONFIG = "wikitext-2-v1"
# Names that a split has had: the hub's, the older ones of the authors' zip.
WIKITEXT_FILES = {
    "validation": ("validation.txt", "valid.txt", "wiki.valid.tokens", "wiki.valid.raw"),
    "test": ("test.txt", "wiki.test.tokens", "wiki.test.raw"),
}


def corpus_documents(name: str) -> list[str]:
    """The texts of one NLTK corpus, one a file, without its tags.

    Raises:
        papercore.lab.data.Missing: the corpus is not on this machine.
        ValueError: it is there and holds no text.
    """
    place = data.corpus(name)
    raw: dict[str, bytes]
    if place.is_dir():
        raw = {str(f.relative_to(place)): f.read_bytes() for f in sorted(place.rglob("*")) if f.is_file()}
    else:
        with zipfile.ZipFile(place) as archive:
            raw = {
                item.split("/", 1)[-1]: archive.read(item)
                for item in sorted(archive.namelist())
                if not item.endswith("/")
            }
    texts = [_plain(name, _decoded(content)) for file, content in raw.items() if _is_text(name, file)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"the corpus {name!r} in {place} holds no text; it has {sorted(raw)[:10]}")
    return texts


def _is_text(name: str, file: str) -> bool:
    if name == "brown":
        return re.fullmatch(r"c[a-r]\d\d", file) is not None
    return file.endswith(".xml" if name == "shakespeare" else ".txt")


def _decoded(content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n")


def _plain(name: str, text: str) -> str:
    """Brown's part-of-speech tags and Shakespeare's mark-up taken off."""
    if name == "brown":
        lines = (
            " ".join(token.rpartition("/")[0] or token for token in line.split())
            for line in text.split("\n")
            if line.strip()
        )
        return "\n".join(lines).replace("``", '"').replace("''", '"')
    if name == "shakespeare":
        body = re.sub(r"<!DOCTYPE.*?>|<\?.*?\?>", "", text)
        lines = (re.sub(r"<[^>]+>", "", line).strip() for line in body.split("\n"))
        return "\n".join(line for line in lines if line)
    return text


def wikitext_lines(split: str) -> list[str]:
    """The non-empty lines of WikiText-2's "validation" or "test" text, each with its line feed.

    From `$PAPERCORE_DATA/wikitext-2` (as text or as the hub's parquet), else from the hub.

    Raises:
        papercore.lab.data.Missing: the text is nowhere.
    """
    text: str | None = None
    try:
        place = data.folder(WIKITEXT)
    except data.Missing:
        place = None
    if place is not None:
        for file in WIKITEXT_FILES[split]:
            if (place / file).is_file():
                text = (place / file).read_text(encoding="utf-8")
                break
    if text is None:
        text = "".join(row["text"] for row in data.rows(WIKITEXT, split, config=HUB_CONFIG))
    return [line + "\n" for line in text.split("\n") if line.strip()]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE of `vocabulary` tokens; the first is the end of a text.

    Raises:
        ValueError: fewer tokens than bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary <= len(alphabet):
        raise ValueError(
            f"standard_vocabulary = {vocabulary}: a byte-level vocabulary has {len(alphabet)} bytes, one special token and merges; "
            f"expected at least {len(alphabet) + 2}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_from(tokens: dict[str, Any]) -> Any:
    """The tokenizer of a finished `tokens_part`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokens["tokenizer"])


def tokens_part(corpora: Sequence[str], vocabulary: int) -> dict[str, Any]:
    """The tokenizer as JSON, the training stream and both WikiText splits as uint16 ids, characters of each."""
    texts = {name: corpus_documents(name) for name in corpora}
    every = [text for some in texts.values() for text in some]
    tokenizer = train_tokenizer(every, vocabulary)
    out: dict[str, Any] = {
        "tokenizer": tokenizer.to_str(),
        "corpora": [[name, len(some), sum(map(len, some))] for name, some in texts.items()],
    }
    end = tokenizer.token_to_id(END)
    out["train"] = _stream([encoding.ids + [end] for encoding in tokenizer.encode_batch(every)])
    for split in ("validation", "test"):
        lines = wikitext_lines(split)
        out[split] = _stream([encoding.ids for encoding in tokenizer.encode_batch(lines)])
        out[f"{split}_characters"] = sum(map(len, lines))
    return out


def _stream(parts: list[list[int]]) -> NDArray[np.uint16]:
    return np.concatenate([np.array(part, dtype=np.uint16) for part in parts])


def documents(stream: NDArray[np.uint16], context: int, most: int) -> NDArray[np.int64]:
    """At most `most` documents [n, context], evenly spaced over the stream, so that as many articles as possible are met.

    Raises:
        ValueError: not one whole document.

    >>> documents(np.arange(10, dtype=np.uint16), 2, 3).tolist()
    [[0, 1], [2, 3], [6, 7]]
    """
    n = len(stream) // context
    if n < 1:
        raise ValueError(f"the text has {len(stream)} tokens: expected at least one document of {context}.")
    whole = stream[: n * context].reshape(n, context).astype(np.int64)
    return whole[np.arange(min(n, most)) * n // min(n, most)]
