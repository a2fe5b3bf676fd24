"""Handwritten digits with wrong labels: the small image task on which local methods are compared at `quick` scale.

scikit-learn's 1,797 digits of 8 x 8 pixels lie in its package, so nothing is fetched. Each seed has its own split into 400
training and 700 test images, its own wrong labels, its own start and its own order of samples; all of that comes from
generators made here, and the global one is never touched. Seeds are stacked on a leading axis, so that one batched call
trains all of them.

Wrong labels come in two kinds. *Fixed*: a share of the training images has a wrong label for good, and a network that
trains long enough learns it by heart. *Fresh*: at each draw a label is replaced with probability `fresh`, so there is nothing
to learn by heart.

Glossary
    S, N, M    seeds; training images; test images
    B          samples of one global step, over all workers (32 = 8 workers x 4)
    wrong, fresh   shares of fixed and of fresh wrong labels
    state      weights of the network, name -> Tensor[S, ...], one row a seed
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
PIXELS = 64
SIZES = (PIXELS, 48, 48, CLASSES)

# What a generator is for: part of its seed, so that no two streams of one run share numbers.
_SPLIT, _LABELS, _WEIGHTS, _ORDER, _FRESH = range(5)


def generator(seed: int, purpose: int, part: int = 0) -> torch.Generator:
    """A CPU generator for one purpose of one seed; `part` counts epochs or blocks within it.

    >>> a, b = generator(0, 1), generator(0, 2)
    >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
    False
    """
    return torch.Generator().manual_seed((seed * 8 + purpose) * 1_000_003 + part)


@functools.cache
def _all_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float() / 16.0, torch.from_numpy(labels).long()


@dataclasses.dataclass(frozen=True)
class NoisyDigits:
    """The task for S seeds at once.

    Attributes:
        seeds: the seeds, in the order of the leading axis.
        train_x: [S, N, 64] pixels from 0 to 1, less the mean training image of the seed; train_y: [S, N] labels that training sees; clean_y: [S, N] true labels.
        test_x: [S, M, 64]; test_y: [S, M], always true.
        fresh: probability that a draw of a training label is replaced by another one.
    """

    seeds: tuple[int, ...]
    train_x: Tensor
    train_y: Tensor
    clean_y: Tensor
    test_x: Tensor
    test_y: Tensor
    fresh: float = 0.0

    @classmethod
    def make(
        cls,
        seeds: Sequence[int],
        *,
        wrong: float = 0.2,
        fresh: float = 0.0,
        train: int = 400,
        test: int = 700,
        device: torch.device | str = "cpu",
    ) -> NoisyDigits:
        """Draw the task of every seed.

        Args:
            seeds: S different whole numbers; equal seeds give equal tasks, whatever the other seeds are.
            wrong: share of training images with a permanently wrong label, uniform among the nine others.
            fresh: probability that a label is replaced at a draw, uniform among the nine others.
            train, test: images of the two parts; together at most 1,797.

        Raises:
            ValueError: no seeds, a share outside [0, 0.9), or more images than there are.

        >>> task = NoisyDigits.make([0, 1], wrong=0.2)
        >>> tuple(task.train_x.shape), (task.train_y != task.clean_y).sum(1).tolist()
        ((2, 400, 64), [80, 80])
        """
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds is {list(seeds)}: give at least one, and none twice.")
        for name, share in (("wrong", wrong), ("fresh", fresh)):
            if not 0.0 <= share < 0.9:
                raise ValueError(
                    f"{name} is {share}: give a share in [0, 0.9); at 0.9 labels of ten classes say nothing."
                )
        pixels, labels = _all_digits()
        if train < 1 or test < 1 or train + test > len(labels):
            raise ValueError(
                f"{train} training and {test} test images: give at least one of each, {len(labels)} in all at most."
            )
        parts: list[tuple[Tensor, ...]] = []
        for seed in seeds:
            order = torch.randperm(len(labels), generator=generator(seed, _SPLIT))
            first, second = order[:train], order[train : train + test]
            centre = pixels[first].mean(0)
            seen = labels[first].clone()
            draw = generator(seed, _LABELS)
            chosen = torch.randperm(train, generator=draw)[: round(wrong * train)]
            seen[chosen] = other_label(seen[chosen], draw)
            parts.append(
                (pixels[first] - centre, seen, labels[first], pixels[second] - centre, labels[second])
            )
        x, y, clean, test_x, test_y = (torch.stack(column).to(device) for column in zip(*parts, strict=True))
        return cls(tuple(seeds), x, y, clean, test_x, test_y, fresh)

    def order(self, start: int, stop: int, batch: int) -> tuple[Tensor, Tensor]:
        """What steps `start` to `stop` draw: places [S, stop - start, B] in the training set, and labels of the same shape.

        Every epoch is a new permutation, cut into full batches; what is left over is dropped. Step t draws the same samples
        whatever `start` is, and a worker takes its slice of the B: data parallel and local methods see the same data.

        Raises:
            ValueError: a batch larger than the training set, or stop < start.
        """
        size = self.train_x.shape[1]
        if not 1 <= batch <= size or not 0 <= start <= stop:
            raise ValueError(
                f"steps {start} to {stop} of {batch} samples: expected 0 <= start <= stop and a batch of 1 to {size}."
            )
        per_epoch = size // batch
        epochs = range(start // per_epoch, -(-stop // per_epoch))
        offset = start - epochs.start * per_epoch
        places = torch.stack([self._epochs(seed, epochs, per_epoch, batch) for seed in self.seeds])
        labels = torch.stack(
            [
                self._labels(i, seed, places[i], epochs, per_epoch)
                if self.fresh
                else self.train_y[i].cpu()[places[i]]
                for i, seed in enumerate(self.seeds)
            ]
        )
        cut = slice(offset, offset + stop - start)
        device = self.train_x.device
        return places[:, cut].to(device), labels[:, cut].to(device)

    def _epochs(self, seed: int, epochs: range, per_epoch: int, batch: int) -> Tensor:
        if not len(epochs):
            return torch.empty(0, batch, dtype=torch.long)
        size = self.train_x.shape[1]
        orders = [
            torch.randperm(size, generator=generator(seed, _ORDER, epoch))[: per_epoch * batch]
            for epoch in epochs
        ]
        return torch.cat(orders).view(-1, batch)

    def _labels(self, row: int, seed: int, places: Tensor, epochs: range, per_epoch: int) -> Tensor:
        """Labels with fresh noise, drawn epoch by epoch, so that they do not depend on where a run begins."""
        labels = self.train_y[row].cpu()[places]
        for i, epoch in enumerate(epochs):
            draw = generator(seed, _FRESH, epoch)
            part = labels[i * per_epoch : (i + 1) * per_epoch]
            replaced = torch.rand(part.shape, generator=draw) < self.fresh
            part.copy_(torch.where(replaced, other_label(part, draw), part))
        return labels

    def start(self, sizes: Sequence[int] = SIZES) -> dict[str, Tensor]:
        """Fresh weights of the network, name -> [S, ...], each row from its seed."""
        rows = [network(sizes, seed=seed).state_dict() for seed in self.seeds]
        return {name: torch.stack([row[name] for row in rows]).to(self.train_x.device) for name in rows[0]}

    @torch.no_grad()
    def evaluate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Test accuracy, test loss and training loss of stacked weights, [S] each, in float64.

        The training loss is taken on the labels that training sees (with `fresh`: the true ones), over all N images; losses
        in nat. Weights that are not finite give NaN in all three.
        """
        out: dict[str, Tensor] = {}
        test = logits(state, self.test_x)
        train = logits(state, self.train_x)
        accuracy = (test.argmax(-1) == self.test_y).double().mean(1)
        out["test_accuracy"] = torch.where(test.isfinite().all(-1).all(-1), accuracy, math.nan)
        out["test_loss"] = mean_loss(test, self.test_y).double()
        out["train_loss"] = mean_loss(train, self.train_y).double()
        return {name: value.cpu() for name, value in out.items()}


def other_label(labels: Tensor, draw: torch.Generator) -> Tensor:
    """A label uniform among the nine others, for each of `labels` (any shape, int64, on the CPU)."""
    return (labels + torch.randint(1, CLASSES, labels.shape, generator=draw)) % CLASSES


def network(sizes: Sequence[int] = SIZES, *, seed: int = 0) -> nn.Sequential:
    """The multi-layer perceptron, 64-48-48-10 with ReLU by default; He's initialisation from the seed's own generator.

    >>> sum(p.numel() for p in network().parameters())
    5962
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes is {list(sizes)}: give at least the width of the input and of the output.")
    draw = generator(seed, _WEIGHTS)
    layers: list[nn.Module] = []
    for i, (inner, outer) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        # Made without memory, so that torch's own initialisation does not draw from the global generator.
        linear = nn.Linear(inner, outer, device="meta").to_empty(device="cpu")
        nn.init.normal_(linear.weight, std=math.sqrt(2.0 / inner), generator=draw)
        nn.init.zeros_(linear.bias)
        layers += [linear] if i == len(sizes) - 2 else [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def logits(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Outputs [S, n, 10] of the S networks of `state`, each on its own inputs x [S, n, 64], in batched matrix products."""
    layers = sorted({int(name.partition(".")[0]) for name in state})
    for layer in layers:
        x = torch.baddbmm(state[f"{layer}.bias"].unsqueeze(1), x, state[f"{layer}.weight"].mT)
        if layer != layers[-1]:
            x = x.relu()
    return x


def mean_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy [S] of outputs [S, n, 10] against labels [S, n], in nat."""
    return (
        F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)
    )
