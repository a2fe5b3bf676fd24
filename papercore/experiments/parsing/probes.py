"""What can be read off a model's hidden states: trees and span marginals, by a linear map or a small network.

Parse probe (paper, section 4; after Vilares et al., 2020): from the states of two neighbouring words, how many nodes of the tree
stand above both. A tree follows by splitting at the shallowest place, again and again. Marginal probe: from the states of two
words i < j, the probability under the grammar that i .. j is a constituent.

Two controls. Layer 0 holds words and positions alone: what it gives is not the model's doing (the gain over it is the paper's
"sensitivity"). And a control task of the same shape whose targets are random numbers, one for each pair of words: what a probe
makes of it is the probe's own capacity (the difference is "selectivity").

Glossary
    depth       common ancestors of words i and i + 1     [gaps]
    mu          unlabelled span marginal                  [pairs]
    features    two states side by side                   [rows, 2 * width]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from papercore.experiments.parsing.corpus import Sentences
from papercore.parsing import Tree, tree_f1

HIDDEN = 16  # of the two-layer probe, as recalled of the paper


def depths(tree: Tree) -> Tensor:
    """Common ancestors of each pair of neighbouring words, [n - 1].

    >>> depths(Tree.from_string("(S (A a) (B (C b) (D c)))")).tolist()
    [1.0, 2.0]
    """
    out = torch.zeros(len(tree) - 1)
    for start, end, _ in tree.nodes():
        if end - start > 1:
            out[start : end - 1] += 1
    return out


def tree_of_depths(found: Sequence[float], words: Sequence[str], label: str = "X") -> Tree:
    """Split at the shallowest gap, the first of several, and so on in both parts.

    >>> str(tree_of_depths([1.0, 2.0], ["a", "b", "c"]))
    '(X (X a) (X (X b) (X c)))'
    """
    if len(words) == 1:
        return Tree(label, (words[0],))
    at = min(range(len(found)), key=lambda i: (found[i], i)) + 1
    kids = (tree_of_depths(found[: at - 1], words[:at], label), tree_of_depths(found[at:], words[at:], label))
    return Tree(label, kids)


@dataclass(frozen=True)
class Pairs:
    """Pairs of words of some sentences with a target each, and a random target that depends on the two words alone; all [rows]."""

    sentence: Tensor
    first: Tensor
    second: Tensor
    target: Tensor
    control: Tensor


def gaps_of(sentences: Sentences, words: int, seed: int) -> Pairs:
    """All neighbouring words, with their depths, sentence after sentence."""
    found = [depths(tree) for tree in sentences.trees]
    row = torch.cat([torch.full((len(gaps),), i) for i, gaps in enumerate(found)])
    at = torch.cat([torch.arange(len(gaps)) for gaps in found])
    return _pairs(sentences, row, at, at + 1, torch.cat(found), words, seed)


def spans_of(sentences: Sentences, marginals: Tensor, words: int, seed: int, *, most: int) -> Pairs:
    """At most `most` spans of two or more words, drawn from all, with their marginals [N, n, n] by start and width - 1."""
    n = marginals.shape[1]
    start, width = torch.meshgrid(torch.arange(n), torch.arange(1, n), indexing="ij")
    ends = (start + width + 1).unsqueeze(0)
    lengths = sentences.lengths.view(-1, 1, 1)
    # The whole sentence is always a constituent: nothing to read there.
    fits = (ends <= lengths) & ~((start == 0).unsqueeze(0) & (ends == lengths))
    row, s, w = fits.nonzero().unbind(1)
    chosen = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))[:most]
    row, s, w = row[chosen], s[chosen], w[chosen] + 1
    return _pairs(sentences, row, s, s + w, marginals[row, s, w].float(), words, seed)


def _pairs(
    sentences: Sentences, row: Tensor, first: Tensor, second: Tensor, target: Tensor, words: int, seed: int
) -> Pairs:
    kind = sentences.ids[row, first] * words + sentences.ids[row, second]
    return Pairs(row, first, second, target, _scattered(kind, seed))


def _scattered(kind: Tensor, seed: int) -> Tensor:
    """A number from 0 to 1 for each kind, as good as random, the same for training and test sentences of one seed."""
    x = kind + 7919 * (seed + 1)
    for factor in (2654435761, 2246822519, 3266489917):
        x = ((x ^ (x >> 15)) * factor) & 0xFFFFFFFF
    return x.float() / 2**32


class Probe:
    """A regression from two states to a number: ridge ("linear"), or a network with one hidden layer ("mlp")."""

    def __init__(self, kind: str, seed: int, *, steps: int = 300, ridge: float = 1e-3) -> None:
        if kind not in ("linear", "mlp"):
            raise ValueError(f"probe kind {kind!r}: expected 'linear' or 'mlp'.")
        self.kind, self.seed, self.steps, self.ridge = kind, seed, steps, ridge

    def fit(self, features: Tensor, target: Tensor) -> Probe:
        self.mean, self.std = features.mean(0), features.std(0).clamp_min(1e-6)
        self.offset, self.scale = target.mean(), target.std().clamp_min(1e-6)
        x, y = self._scaled(features), (target - self.offset) / self.scale
        if self.kind == "linear":
            gram = x.t() @ x
            gram.diagonal().add_(self.ridge * len(x))
            self.weight = torch.linalg.solve(gram, x.t() @ y)
            return self
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        optimizer = torch.optim.Adam(self.net.parameters(), lr=5e-3, weight_decay=1e-5)
        for _ in range(self.steps):
            rows = torch.randint(len(x), (1024,), generator=generator)
            optimizer.zero_grad()
            nn.functional.mse_loss(self.net(x[rows]).squeeze(-1), y[rows]).backward()
            optimizer.step()
        return self

    def predict(self, features: Tensor) -> Tensor:
        x = self._scaled(features)
        with torch.no_grad():
            out = x @ self.weight if self.kind == "linear" else self.net(x).squeeze(-1)
        return out * self.scale + self.offset

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def features_of(states: Tensor, pairs: Pairs) -> Tensor:
    """Two states side by side, [rows, 2 * width], from one layer's states [N, n, width]."""
    return torch.cat([states[pairs.sentence, pairs.first], states[pairs.sentence, pairs.second]], 1)


def trees_of(probe: Probe, states: Tensor, pairs: Pairs, sentences: Sentences) -> list[Tree]:
    """The trees that a depth probe gives; `pairs` are the sentences' gaps, from `gaps_of`."""
    found = probe.predict(features_of(states, pairs))
    sizes = (sentences.lengths - 1).tolist()
    parts = zip(found.split(sizes), sentences.trees, strict=True)
    return [tree_of_depths(part.tolist(), gold.leaves()) for part, gold in parts]


def parse_f1(probe: Probe, states: Tensor, pairs: Pairs, sentences: Sentences) -> float:
    """Unlabelled corpus F1 of the trees that a depth probe gives."""
    return float(tree_f1(sentences.trees, trees_of(probe, states, pairs, sentences)))


def correlation(found: Tensor, target: Tensor) -> float:
    """Pearson correlation of predictions with a target; 0 where the predictions are all the same."""
    value = float(torch.corrcoef(torch.stack([found.double(), target.double()]))[0, 1])
    return value if value == value else 0.0
