"""Residual networks for small images: depth 6n + 2, three stages of n blocks, widths w, 2w, 4w (He et al. 2016, section 4.2).

Group normalisation by default, because a batch norm's running statistics belong to one worker and cannot be averaged as
weights are; `norm="batch"` gives the original network.

Glossary
    n        residual blocks a stage, (depth - 2) / 6
    w        width, channels of the first stage
    shortcut where a stage halves the image: every second pixel, new channels filled with zeros ("option A", no weights)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.lab.config import checked_choice

NORMS = ("group", "batch")


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut: [N, in, H, W] -> [N, out, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = _norm(norm, outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, outputs, groups)
        self.stride, self.grown = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = x
        if self.stride != 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if self.grown:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.grown // 2, self.grown - self.grown // 2))
        return F.relu(y + shortcut)


class SmallResNet(nn.Module):
    """A residual network of the CIFAR kind.

    Args:
        depth: 6n + 2: 8, 14, 20, 56, ...
        width: channels of the first stage; the original has 16.
        classes: outputs.
        norm: "group" or "batch".
        groups: groups of a group norm; fewer where a layer has fewer channels.
        channels: of the images.
        generator: draws the weights (He's normal initialisation, fan out); None takes torch's global one.

    Raises:
        ValueError: a depth that is not 6n + 2, or an unknown norm.

    >>> net = SmallResNet(8, width=8, generator=torch.Generator().manual_seed(0))
    >>> net(torch.zeros(2, 3, 32, 32)).shape, sum(p.numel() for p in net.parameters())
    (torch.Size([2, 10]), 19218)
    """

    def __init__(
        self,
        depth: int = 20,
        *,
        width: int = 16,
        classes: int = 10,
        norm: str = "group",
        groups: int = 8,
        channels: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        checked_choice("norm", norm, NORMS)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"depth is {depth}: a residual network of this kind has 6n + 2 layers, such as 8, 14, 20 or 56"
            )
        # torch's own initialisation draws from the global generator; its state is put back.
        with torch.random.fork_rng(devices=[]):
            self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
            self.stem_norm = _norm(norm, width, groups)
            blocks, inputs = [], width
            for stage, outputs in enumerate((width, 2 * width, 4 * width)):
                for i in range((depth - 2) // 6):
                    stride = 2 if stage and not i else 1
                    blocks.append(Block(inputs, outputs, stride, norm, groups))
                    inputs = outputs
            self.blocks = nn.Sequential(*blocks)
            self.head = nn.Linear(inputs, classes)
        self._draw(generator)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, channels, H, W] -> logits [N, classes]."""
        x = F.relu(self.stem_norm(self.stem(x)))
        x = self.blocks(x)
        return self.head(x.mean(dim=(2, 3)))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                module.weight.normal_(0.0, (2.0 / fan_out) ** 0.5, generator=generator)
            elif isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.zero_()


def _norm(kind: str, channels: int, groups: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(
            next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0), channels
        )
    return nn.BatchNorm2d(channels)
