"""The paper's models by transformers, with random weights, and what each sees.

ViT-B/16 here has a class token and learned positions, where the paper's SimpleViT averages over patches and has fixed positions.
ResNet-152 is the same network as torchvision's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 3, side, side] -> logits [n, classes]."""
        return self.net(x).logits


def image_side(size: str) -> int:
    """Pixels of the square that the model sees."""
    return 32 if size == "tiny" else 224


def make_model(name: str, size: str, classes: int, seed: int) -> Classifier:
    """ "vit-b" or "resnet-152", "full" or "tiny", its weights from `seed`: the same in every process.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        import transformers as hf
    except ImportError:
        raise ValueError("the paper scale needs transformers: pip install 'papercore[hf]'.") from None
    # The library draws from the global generator, whose state is put back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "vit-b":
            small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}  # fmt: skip
            chosen: Any = {
                "image_size": image_side(size),
                "num_labels": classes,
                **(small if size == "tiny" else {}),
            }
            config = hf.ViTConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **chosen)
            return Classifier(hf.ViTForImageClassification(config))
        sizes: dict[str, Any] = {
            "embedding_size": 64,
            "hidden_sizes": [256, 512, 1024, 2048],
            "depths": [3, 8, 36, 3],
        }
        if size == "tiny":
            sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        settings: Any = {"num_labels": classes, "layer_type": "bottleneck", **sizes}
        return Classifier(hf.ResNetForImageClassification(hf.ResNetConfig(**settings)))
