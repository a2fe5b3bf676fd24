"""ImageNet for the `paper` scale: a folder of images or the hub, random crops and mirrors, mixup, centre crops for evaluation.

Every random choice is a function of (seed, epoch, image) or (seed, step, process), so that a resumed run sees the same pixels.

Departures from the official recipes, all for want of the packages that they use: FFCV is replaced by PyTorch's DataLoader, and
RandAugment (2 operations, severity 10), which ViT-B has there besides mixup, is left out.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from papercore.lab.data import Missing

HUB = "ILSVRC/imagenet-1k"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
CROP = 224 / 256  # side of the centre crop over the shorter side, in evaluation


class Images(Dataset):
    """One split: items are (image [3, side, side] float32, label).

    Args:
        source: list of (file, label), or a hub data set with columns "image" and "label".
        side: pixels of the square that a model sees.
        seed: of the crops; None for evaluation (centre crop).

    An item is asked for by its index or, in training, by (epoch, index), which seeds its crop.
    """

    def __init__(self, source: Any, classes: int, side: int, seed: int | None = None) -> None:
        self.source, self.classes, self.side, self.seed = source, classes, side, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = place if isinstance(place, tuple) else (0, place)
        picture, label = self._picture(index)
        if self.seed is None:
            pixels = centre_crop(picture, self.side)
        else:
            draw = np.random.default_rng([self.seed, epoch, index])
            pixels = random_crop(picture, self.side, draw)
        x = torch.from_numpy(np.array(pixels, dtype=np.float32)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        return (x - mean) / std, label

    def _picture(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        row = self.source[index]
        if isinstance(row, Mapping):
            image = row["image"]
            if isinstance(image, Mapping):
                image = Image.open(io.BytesIO(image["bytes"]))
            return image.convert("RGB"), int(row["label"])
        file, label = row
        with Image.open(file) as image:
            return image.convert("RGB"), label


def load(path: str, split: str, *, side: int, seed: int | None = None) -> Images:
    """A split, "train" or "val", from a folder or from the hub.

    Raises:
        Missing: the folder lacks the split or images, or the hub's set cannot be had; the text says what to do.
    """
    if path:
        source, classes = folder_rows(path, split)
        return Images(source, classes, side, seed)
    command = f'pip install datasets && huggingface-cli login && python -c "from datasets import load_dataset; load_dataset({HUB!r})"'
    try:
        from datasets import load_dataset

        table = load_dataset(HUB, split="validation" if split == "val" else split)
    except Exception as error:  # not installed, offline, or the terms were not accepted
        tried = ["--set paper_data=FOLDER: not given", f"the hub's {HUB!r}: {type(error).__name__}"]
        raise Missing("ImageNet", tried, command) from error
    return Images(table, 1000, side, seed)


@functools.lru_cache(maxsize=4)
def folder_rows(path: str, split: str) -> tuple[list[tuple[Path, int]], int]:
    """Files and labels of <path>/<split>/<class>/<image>, classes numbered by name, and the number of classes."""
    root = Path(path).expanduser() / split
    names = sorted(place.name for place in root.iterdir() if place.is_dir()) if root.is_dir() else []
    found = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((root / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise Missing(
            f"the split {split!r} of the images in {path}",
            [f"{root}/<class>/*.jpg: none"],
            "lay the images out as FOLDER/train/<class>/ and FOLDER/val/<class>/, and give --set paper_data=FOLDER",
        )
    return found, len(names)


def random_crop(picture: Any, side: int, draw: np.random.Generator) -> Any:
    """A crop of 8 to 100 % of the area and of 3:4 to 4:3 in shape, resized; mirrored with probability one half."""
    from PIL import Image

    width, height = picture.size
    box = None
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1.0)
        shape = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            box = (left, top, left + w, top + h)
            break
    mirrored = draw.random() < 0.5
    pixels = centre_crop(picture, side) if box is None else picture.resize((side, side), Image.Resampling.BILINEAR, box)  # fmt: skip
    return pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else pixels


def centre_crop(picture: Any, side: int) -> Any:
    """The middle square of 224/256 of the shorter side, resized."""
    from PIL import Image

    width, height = picture.size
    edge = CROP * min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    return picture.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + edge, top + edge))


def mixed(
    x: Tensor, y: Tensor, alpha: float, draw: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixup: (images, labels, other labels, weight of the first labels [n]); alpha = 0 mixes nothing.

    The partner of an image is the next one of the batch, and the weight is one for the batch, as in the official code's mixup.
    """  # fmt: skip
    weight = float(draw.beta(alpha, alpha)) if alpha else 1.0
    share = torch.full((len(x),), weight)
    if not alpha:
        return x, y, y, share
    return weight * x + (1 - weight) * x.roll(-1, 0), y, y.roll(-1, 0), share
