"""Images on a device, ready for many small training steps: what step t draws is a function of the seed and of t alone.

Nothing here holds the state of a generator. The samples, the crops and the noisy labels of step t come from a generator that
is seeded with (seed, purpose, t), so that runs that average at different times see the same samples in the same order, a run
that was interrupted goes on with the same samples, and a second phase of training can begin at any step.

Glossary
    N          training images
    B          samples of one step, over all workers
    flips      the share of labels that are replaced, afresh at each draw ("label noise"); uniform among the other classes
    epoch      a permutation of the training images, cut into steps of B samples; the rest of the images is dropped
"""

from __future__ import annotations

import dataclasses
import functools
import os

import numpy as np
import torch
from torch import Tensor

from papercore.lab import data
from papercore.local_sgd import LabelNoise

MARGIN = 4  # pixels of the original picture that a random crop may shift it, on each side

_SUBSET, _ORDER, _CROP, _FLIPS = range(4)


def seeded(seed: int, purpose: int, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` for one purpose of one step."""
    word = np.random.SeedSequence([seed, purpose, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(word) >> 1)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A labelled set of images, kept as bytes; batches come as float32 with mean 0 and variance 1 a channel.

    Attributes:
        train_x: uint8 [N, H + 8, W + 8, C], with a margin (here of 4 pixels) in the mean colour; train_y: int64 [N].
        test_x: uint8 [M, H, W, C]; test_y: int64 [M].
        mean, std: [C] of the training images, on the scale of the bytes.
        classes: number of classes.
        margin: width of the margin, pixels.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    std: Tensor
    classes: int
    margin: int = MARGIN

    @classmethod
    def of(
        cls,
        train: tuple[np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
        *,
        device: torch.device | str = "cpu",
        train_images: int = 0,
        test_images: int = 0,
        pool: int = 1,
        seed: int = 0,
    ) -> ImageSet:
        """From arrays: images uint8 [N, H, W, C] and labels [N].

        Args:
            train_images, test_images: how many of each to keep, drawn by `seed`; 0 keeps all.
            pool: side of the squares of pixels that are averaged to one; 2 makes 16 x 16 of 32 x 32.

        Raises:
            ValueError: more images are asked for than there are, or `pool` does not divide the sides.
        """
        parts = []
        for index, ((x, y), keep) in enumerate(((train, train_images), (test, test_images))):
            if keep < 0 or keep > len(x):
                raise ValueError(
                    f"{keep} images were asked for, and there are {len(x)}: expected 0 (all) to {len(x)}."
                )
            if pool < 1 or x.shape[1] % pool or x.shape[2] % pool:
                raise ValueError(
                    f"pool is {pool}: expected a divisor of the sides, {x.shape[1]} x {x.shape[2]} pixels."
                )
            if keep:
                chosen = torch.randperm(len(x), generator=seeded(seed, _SUBSET, index))[:keep].numpy()
                x, y = x[chosen], y[chosen]
            parts.append(
                (
                    _pooled(torch.from_numpy(np.ascontiguousarray(x)), pool),
                    torch.from_numpy(np.asarray(y)).long(),
                )
            )
        (train_x, train_y), (test_x, test_y) = parts
        pixels = train_x.reshape(-1, train_x.shape[-1]).float()
        mean, std = pixels.mean(0), pixels.std(0)
        margin = max(1, MARGIN // pool)
        sides = (side + 2 * margin for side in train_x.shape[1:3])
        wide = mean.round().to(torch.uint8).repeat(len(train_x), *sides, 1)
        wide[:, margin:-margin, margin:-margin] = train_x
        classes = int(max(train_y.max(), test_y.max())) + 1
        on = [tensor.to(device) for tensor in (wide, train_y, test_x, test_y, mean, std)]
        return cls(on[0], on[1], on[2], on[3], on[4], on[5], classes, margin)

    @classmethod
    def load(
        cls, name: str = "cifar10", *, path: str | os.PathLike[str] | None = None, **options: object
    ) -> ImageSet:
        """A set by its name (see lab/data.py for where it is looked for), with the options of `of`.

        Raises:
            papercore.lab.data.Missing: the set is not on this machine; the text says how to get it.
        """
        return cls.of(data.images(name, "train", path=path), data.images(name, "test", path=path), **options)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self.train_x.device

    def places(self, step: int, batch: int, *, seed: int, replacement: bool = False) -> Tensor:
        """Which training images step `step` draws: [B], int64.

        Without replacement an epoch is one permutation, and its steps share no image; with it, every draw is independent.

        Raises:
            ValueError: a batch of less than 1 or, without replacement, of more images than there are.
        """
        size = len(self.train_x)
        if batch < 1 or (batch > size and not replacement):
            raise ValueError(f"a batch of {batch} from {size} images: expected 1 to {size}.")
        if replacement:
            return torch.randint(
                size, (batch,), generator=seeded(seed, _ORDER, step, self.device), device=self.device
            )
        epoch, place = divmod(step, size // batch)
        order = _permutation(size, seed, epoch, str(self.device))
        return order[place * batch : (place + 1) * batch]

    def batch(
        self,
        step: int,
        batch: int,
        *,
        seed: int,
        augment: bool = True,
        flips: float = 0.0,
        replacement: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] (float32, channels last in memory) and labels [B] of one step.

        Args:
            augment: shift by up to the margin and mirror half of the images, each image by its own draw.
            flips: share of labels replaced at this draw.
            rank, world: of `world` equal slices of the batch give only number `rank`, as one of so many processes needs it.

        Raises:
            ValueError: as `places`; also a batch that does not divide over `world`.
        """
        if batch % world:
            raise ValueError(f"a batch of {batch} does not divide over {world} processes.")
        places = self.places(step, batch, seed=seed, replacement=replacement)
        labels = self.train_y[places]
        if flips:
            noise = LabelNoise(flips, self.classes)
            labels = noise(labels, seeded(seed, _FLIPS, step, self.device))
        own = slice(rank * (batch // world), (rank + 1) * (batch // world))
        draw = seeded(seed, _CROP, step, self.device) if augment else None
        return self.pictures(places, draw, own), labels[own]

    def pictures(
        self, places: Tensor, draw: torch.Generator | None = None, own: slice = slice(None)
    ) -> Tensor:
        """Training images [n, C, H, W]; cropped and mirrored where a generator is given.

        `own` takes a part of them, each with the crop that it has among all.
        """
        n, device = len(places), self.device
        height, width = (side - 2 * self.margin for side in self.train_x.shape[1:3])
        rows = torch.arange(height, device=device).expand(n, -1)
        columns = torch.arange(width, device=device).expand(n, -1)
        if draw is None:
            rows, columns = rows + self.margin, columns + self.margin
        else:
            down, right = torch.randint(2 * self.margin + 1, (2, n, 1), generator=draw, device=device)
            mirrored = torch.rand(n, 1, generator=draw, device=device) < 0.5
            rows, columns = rows + down, torch.where(mirrored, columns.flip(1), columns) + right
        places, rows, columns = places[own], rows[own], columns[own]
        return self._scaled(self.train_x[places[:, None, None], rows[:, :, None], columns[:, None, :]])

    def test_pictures(self, start: int, stop: int) -> Tensor:
        """Test images [n, C, H, W]."""
        return self._scaled(self.test_x[start:stop])

    def _scaled(self, pixels: Tensor) -> Tensor:
        return ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int, device: str) -> Tensor:
    """The order of an epoch; kept, since the steps of an epoch all ask for it. Drawn on the CPU: the same on every device."""
    return torch.randperm(size, generator=seeded(seed, _ORDER, epoch)).to(device)


def _pooled(pixels: Tensor, side: int) -> Tensor:
    if side == 1:
        return pixels
    n, height, width, channels = pixels.shape
    small = torch.empty(n, height // side, width // side, channels, dtype=torch.uint8)
    # In parts: fifty thousand images as floats would take gigabytes.
    for start in range(0, n, 5000):
        part = (
            pixels[start : start + 5000].float().view(-1, height // side, side, width // side, side, channels)
        )
        small[start : start + 5000] = part.mean(dim=(2, 4)).round().to(torch.uint8)
    return small
