"""The paper's runs as its code sets them (train_cifar and train_imagenet of the official repository), and their networks.

Accuracies of these runs stand in figures of the paper, so the book compares directions. What the settings at hand do not say is
the learning rate of phase 1, and how long the runs with label noise went on; both are ours and can be set.

Glossary
    start_epochs    epochs of phase 1, with an average every step; epochs: of phase 2, with an average every `period` steps
    flips           share of labels redrawn at each step
    autocast        train in bfloat16 where the device is a GPU
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.lab.resnet import SmallResNet


@dataclasses.dataclass(frozen=True)
class PaperRun:
    """Settings of one run; B = workers * local_batch."""

    data: str
    network: str
    workers: int
    local_batch: int
    lr: float
    period: int
    start_epochs: int
    epochs: int
    weight_decay: float
    augment: bool = True
    replacement: bool = False
    flips: float = 0.0
    autocast: bool = False


RUNS = {
    "cifar-post": PaperRun("cifar10", "resnet-batch", 32, 128, 0.32, 600, 250, 250, 5e-4),
    "cifar-noise": PaperRun("cifar10", "resnet-group", 32, 128, 0.1, 384, 500, 2000, 5e-4, False, True, 0.1),
    "cifar-noise-vgg": PaperRun("cifar10", "vgg", 32, 128, 0.1, 384, 500, 2000, 0.0, False, True, 0.1),
    "imagenet-post": PaperRun("imagenet", "resnet-50", 256, 32, 0.16, 26, 100, 50, 1e-4, autocast=True),
}


class VGG16(nn.Module):
    """VGG-16 without batch norm: SiLU in place of ReLU, average pooling in place of maximum pooling, one linear layer at the end."""

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(
        self, classes: int = 10, *, channels: int = 3, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        convolutions, inputs = [], channels
        # torch's own initialisation draws from the global generator; its state is put back.
        with torch.random.fork_rng(devices=[]):
            for stage in self.STAGES:
                layers = []
                for outputs in stage:
                    layers.append(nn.Conv2d(inputs, outputs, 3, 1, 1))
                    inputs = outputs
                convolutions.append(nn.ModuleList(layers))
            self.stages = nn.ModuleList(convolutions)
            self.head = nn.Linear(inputs, classes)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.weight.normal_(0.0, (2.0 / module.weight[0].numel()) ** 0.5, generator=generator)
                    module.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, channels, H, W], sides of at least 32 pixels -> logits [N, classes]."""
        for stage in self.stages:
            for convolution in stage:  # type: ignore[attr-defined]
                x = F.silu(convolution(x))
            x = F.avg_pool2d(x, 2)
        return self.head(x.mean(dim=(2, 3)))


class HubResNet50(nn.Module):
    """transformers' ResNet-50 with random weights; forward gives logits alone, as the other networks do."""

    def __init__(self, classes: int, *, seed: int, small: bool = False) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetForImageClassification

        settings: dict[str, Any] = {"num_labels": classes}
        if small:
            settings |= {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = ResNetForImageClassification(ResNetConfig(**settings))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, classes]."""
        return self.net(x).logits


def make_network(name: str, classes: int, *, seed: int, depth: int = 0) -> nn.Module:
    """The network of a run, its weights from `seed`: the same on every process.

    Args:
        name: "resnet-batch" (ResNet-56), "resnet-group" (with 8 groups), "vgg" or "resnet-50".
        depth: of the small residual networks; 0 is 56. For "resnet-50" any other number stands for a tiny one.
    """
    draw = torch.Generator().manual_seed(seed)
    if name == "vgg":
        return VGG16(classes, generator=draw)
    if name == "resnet-50":
        return HubResNet50(classes, seed=seed, small=depth > 0)
    return SmallResNet(
        depth or 56, classes=classes, norm=name.removeprefix("resnet-"), groups=8, generator=draw
    )
