"""The small residual network: sizes in closed form, the shortcut by hand, weights from a generator alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from papercore.lab.resnet import Block, SmallResNet


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def count_by_hand(depth, width, classes, channels=3):
    """Convolutions without bias, two numbers a channel for each norm, and the last layer."""
    convolutions, norms, inputs = channels * width * 9, width, width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            convolutions += 9 * outputs * (inputs + outputs)
            norms += 2 * outputs
            inputs = outputs
    return convolutions + 2 * norms + classes * (inputs + 1)


@pytest.mark.parametrize(("depth", "width"), [(8, 8), (14, 4), (20, 16), (56, 16)])
def test_number_of_weights(depth, width):
    net = SmallResNet(depth, width=width, generator=draw())
    assert sum(p.numel() for p in net.parameters()) == count_by_hand(depth, width, 10)


def test_the_original_network_of_56_layers_has_its_known_size():
    # He et al. 2016, table 6: 0.85 million for 56 layers.
    net = SmallResNet(56, norm="batch", generator=draw())
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 0.85
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules()) == 56


def test_a_block_whose_convolutions_are_zero_is_its_shortcut():
    block = Block(4, 8, 2, "group", 4)
    with torch.no_grad():
        block.conv1.weight.zero_()
        block.conv2.weight.zero_()
    x = torch.rand(2, 4, 6, 6, generator=draw())
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_weights_come_from_the_generator_and_the_global_one_is_left_alone():
    before = torch.random.get_rng_state()
    one, same, other = (SmallResNet(8, width=4, generator=draw(seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.stem.weight, other.stem.weight)


def test_initial_weights_have_hes_variance():
    net = SmallResNet(8, width=32, generator=draw())
    weight = net.blocks[2].conv2.weight  # 128 to 128 channels: 147,456 numbers, so 1 % is far beyond chance
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.01)


def test_group_norm_gives_each_image_its_own_answer():
    net = SmallResNet(8, width=4, generator=draw()).eval()
    x = torch.randn(5, 3, 16, 16, generator=draw(1))
    alone = torch.cat([net(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(net(x), alone, rtol=1e-4, atol=1e-5)
    batched = copy.deepcopy(SmallResNet(8, width=4, norm="batch", generator=draw())).train()
    assert not torch.allclose(batched(x)[:1], batched(x[:2])[:1], atol=1e-3)


def test_errors():
    with pytest.raises(ValueError, match="depth is 9: a residual network of this kind has 6n \\+ 2 layers"):
        SmallResNet(9)
    with pytest.raises(ValueError, match="unknown norm 'layer': expected one of group, batch"):
        SmallResNet(8, norm="layer")
