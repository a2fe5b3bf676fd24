"""ImageNet as it usually lies on a disk: `<root>/train/<class>/<image>` and `<root>/val/<class>/<image>`, read as it is needed.

Training images get a random resized crop and are mirrored half of the time; both come from (seed, epoch, index) alone, so that a
resumed run, and a run with another number of loader processes, sees the same pictures. Test images get the middle square.

Glossary
    side     pixels of the square that the network sees (224)
    resize   shorter side of a test image before the middle is cut out (256)
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from papercore.lab import data

# Means and standard deviations of ImageNet's channels, as everybody uses them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpeg", ".jpg", ".png")
TRIES = 10  # of a crop that fits, before the middle is taken


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images in one folder a class; items are (float32 [3, side, side], class).

    Args:
        root: the folder of the data set; split: "train" or "val".
        augment: random crops and mirrors; items are then asked for by (epoch, index).

    Raises:
        ValueError: the split or its images are not there.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        side: int = 224,
        resize: int = 256,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        folder = Path(root) / split
        if not folder.is_dir():
            there = (
                sorted(item.name for item in Path(root).iterdir())
                if Path(root).is_dir()
                else "no such folder"
            )
            raise ValueError(f"{root} has no folder {split!r} with one folder a class; it has {there}")
        self.classes = sorted(item.name for item in folder.iterdir() if item.is_dir())
        self.files = [
            (path, place)
            for place, name in enumerate(self.classes)
            for path in sorted((folder / name).iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise ValueError(
                f"{folder} has no images in folders of classes (looked for {', '.join(SUFFIXES)})"
            )
        self.side, self.resize, self.augment, self.seed = side, resize, augment, seed

    @classmethod
    def named(cls, name: str, split: str, *, path: str | None = None, **options: object) -> ImageFolder:
        """By the name of the set (see lab/data.py for where it is looked for)."""
        return cls(data.folder(name, path=path or None), split, **options)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        from PIL import Image

        epoch, index = key if isinstance(key, tuple) else (0, key)
        path, label = self.files[index]
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        if self.augment:
            rng = np.random.default_rng([self.seed, epoch, index])
            picture = picture.resize(
                (self.side, self.side), Image.Resampling.BILINEAR, box=random_box(*picture.size, rng)
            )
            if rng.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            scale = self.resize / min(picture.size)
            width, height = (max(self.side, round(scale * length)) for length in picture.size)
            left, top = (width - self.side) // 2, (height - self.side) // 2
            picture = picture.resize((width, height), Image.Resampling.BILINEAR).crop(
                (left, top, left + self.side, top + self.side)
            )
        pixels = (np.asarray(picture, dtype=np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(
            STD, np.float32
        )
        return torch.from_numpy(pixels).permute(2, 0, 1), label


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A box of 8 to 100 % of the area and a ratio of sides between 3/4 and 4/3, as (left, top, right, bottom).

    >>> left, top, right, bottom = random_box(100, 60, np.random.default_rng(0))
    >>> 0 <= left < right <= 100 and 0 <= top < bottom <= 60
    True
    """
    for _ in range(TRIES):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    least = min(width, height)
    left, top = (width - least) // 2, (height - least) // 2
    return left, top, left + least, top + least
