"""ImageNet for the `paper` scale, from a folder of images or from the hub, and mixup.

Every random choice is a function of (seed, epoch, image) or (seed, step, process), so that a resumed run sees the same pixels.

Departures from the official recipes, all for want of the packages that they use: FFCV is replaced by PyTorch's DataLoader, and
RandAugment (2 operations, severity 10), which ViT-B has there besides mixup, is left out.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from papercore.lab.data import Missing
from papercore.lab.image_folder import ImageFolder

HUB = "ILSVRC/imagenet-1k"
CLASSES = 1000


class HubImages(ImageFolder):
    """A split of the hub's data set, with the crops of `ImageFolder`.

    Args:
        table: rows {"image": a picture or {"bytes": ...}, "label": int}.
    """

    def __init__(self, table: Any, classes: int, *, side: int, resize: int, augment: bool, seed: int) -> None:
        self.table, self.classes = table, [str(i) for i in range(classes)]
        # ImageFolder opens what stands here; PIL opens bytes as it opens a file.
        self.files = _Rows(table)  # type: ignore[assignment]
        self.side, self.resize, self.augment, self.seed = side, resize, augment, seed


class _Rows:
    """The rows of a table as (something that PIL opens, label)."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        row = self.table[index]
        image = row["image"]
        if isinstance(image, Mapping):
            return io.BytesIO(image["bytes"]), int(row["label"])
        kept = io.BytesIO()
        image.convert("RGB").save(kept, "PNG", compress_level=0)
        kept.seek(0)
        return kept, int(row["label"])


def load(path: str, split: str, *, side: int, seed: int | None = None) -> ImageFolder:
    """A split, "train" or "val"; with a seed its images are cropped at random, without one from the middle.

    Raises:
        Missing: the folder lacks the split or images, or the hub's set cannot be had; the text says what to do.
    """
    options: Any = {
        "side": side,
        "resize": round(side * 256 / 224),
        "augment": seed is not None,
        "seed": seed or 0,
    }
    if path:
        try:
            return ImageFolder(Path(path).expanduser(), split, **options)
        except ValueError as error:
            raise Missing(
                f"the split {split!r} of the images",
                [str(error)],
                "lay the images out as FOLDER/train/<class>/ and FOLDER/val/<class>/, and give --set paper_data=FOLDER",
            ) from error
    try:
        from datasets import Image, load_dataset

        table = load_dataset(HUB, split="validation" if split == "val" else split)
        table = table.cast_column("image", Image(decode=False))
    except Exception as error:  # not installed, offline, or its terms were not accepted: one class for each
        tried = ["--set paper_data=FOLDER: not given", f"the hub's {HUB!r}: {type(error).__name__}"]
        command = (
            f'hf auth login && python -c "from datasets import load_dataset; load_dataset({HUB!r})"'
            "   # after accepting its terms"
        )
        raise Missing("ImageNet", tried, command) from error
    return HubImages(table, CLASSES, **options)


def mixed(
    x: Tensor, y: Tensor, alpha: float, draw: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixup: (images, labels, other labels, weight of the first labels [n]); alpha = 0 mixes nothing.

    The partner of an image is the next one of the batch; one weight, from the beta distribution, serves the whole batch.
    """  # fmt: skip
    weight = float(draw.beta(alpha, alpha)) if alpha else 1.0
    share = torch.full((len(x),), weight)
    if not alpha:
        return x, y, y, share
    return weight * x + (1 - weight) * x.roll(-1, 0), y, y.roll(-1, 0), share
