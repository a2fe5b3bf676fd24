"""The questions of the `standard` scale as token ids, what a run samples from them, and how a classifier is scored."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from papercore.experiments.mezo.config import StandardConfig
from papercore.experiments.mezo.encoder import Classifier, build, calibration_error
from papercore.lab import corpora, models

Indices = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Task:
    """The encoder, the questions as token ids, and how a run samples from them."""

    config: StandardConfig
    corpus: corpora.Corpus
    bert: Any
    tokenizer: Any
    train_ids: list[list[int]]
    test_ids: list[list[int]]
    train_labels: Tensor
    test_labels: Tensor

    @classmethod
    def of(cls, config: StandardConfig) -> Task:
        """Read corpus and model. Raises `papercore.lab.data.Missing` when either is not on this machine."""
        corpus = corpora.read(config.standard_corpus).without_leaks()
        tokenizer = models.tokenizer(config.standard_model)
        bert = models.load(config.standard_model, kind="BertModel", device=config.torch_device())
        cut = {"truncation": True, "max_length": config.standard_max_tokens}
        return cls(
            config,
            corpus,
            bert,
            tokenizer,
            tokenizer(list(corpus.train_texts), **cut)["input_ids"],
            tokenizer(list(corpus.test_texts), **cut)["input_ids"],
            torch.from_numpy(corpus.train_labels),
            torch.from_numpy(corpus.test_labels),
        )

    def classifier(self, arm: str, seed: int) -> tuple[Classifier, list[nn.Parameter]]:
        """A fresh classifier of one arm, from the pretrained weights, and the parameters that it tunes."""
        settings = self.config
        return build(
            copy.deepcopy(self.bert),
            self.tokenizer,
            arm,
            self.corpus.descriptions,
            seed=seed,
            rank=settings.standard_rank,
            alpha=settings.standard_alpha,
            max_tokens=settings.standard_max_tokens,
            scale=settings.standard_logit_scale,
        )

    def sample(self, regime: str, seed: int) -> tuple[Indices, Indices]:
        """Training and held-out indices of a run."""
        settings, labels = self.config, self.corpus.train_labels
        if regime == "large":
            held_out = settings.standard_large_held_out
            return corpora.sample(len(labels), settings.standard_large_n, seed=seed, held_out=held_out)
        return corpora.few_shot(labels, settings.standard_k, seed=seed)

    def score(self, classifier: Classifier, ids: Sequence[list[int]], labels: Tensor) -> dict[str, Any]:
        """Accuracy, loss, calibration error and the right answers of one set of questions."""
        logits = classifier.predict(ids).double()
        correct = logits.argmax(1) == labels
        return {
            "accuracy": float(correct.double().mean()),
            "loss": float(nn.functional.cross_entropy(logits, labels)),
            "ece": calibration_error(logits.softmax(1), labels),
            "correct": correct.numpy(),
        }
