"""Two softmax heads with a heavy dummy key act as a linear head: error of order epsilon, down to a floor of order 1 / M."""

import re

import pytest
import torch

from papercore.tint.layout import Layout
from papercore.tint.linear import LinearBackward, LinearDescent, LinearForward
from papercore.tint.literal import linear_attention
from papercore.tint.softmax import SoftmaxAttention


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QUERY, KEY, VALUE = numbers(1, 3, 9, 6), numbers(1, 3, 16, 6, seed=1), numbers(1, 3, 16, 5, seed=2)
ALLOWED = torch.rand(1, 1, 1, 16, generator=torch.Generator().manual_seed(4)) > 0.4


def error(epsilon: float, mass: float = 1e10, allowed=None, dtype=torch.float64, **options) -> float:
    tensors = [t.to(dtype) for t in (QUERY, KEY, VALUE)]
    found = SoftmaxAttention(epsilon, mass, **options)(*tensors, allowed)[0].double()
    exact = linear_attention(QUERY, KEY, VALUE, allowed)[0]
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["all keys", "some keys"])
@pytest.mark.parametrize(("difference", "order"), [("forward", 1), ("central", 2)])
def test_the_slope_over_two_decades(difference: str, order: int, allowed) -> None:
    errors = torch.tensor([error(e, allowed=allowed, difference=difference) for e in (1e-1, 1e-2, 1e-3)])
    slopes = -errors.log10().diff() / order
    assert float((slopes - 1).abs().max()) < 0.15
    assert float(errors[-1]) < 1e-2


def test_the_floor_falls_with_the_weight_of_the_dummy() -> None:
    floors = torch.tensor([error(1e-4, mass, difference="central") for mass in (1e2, 1e3, 1e4)])
    assert float((floors.log10().diff() + 1).abs().max()) < 0.15


def test_a_dummy_of_equal_weight_does_not_converge() -> None:
    assert min(error(e, mass=1.0) for e in (1e-1, 1e-2, 1e-3, 1e-4)) > 0.1


def test_float32_has_a_best_step() -> None:
    steps = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    errors = [error(e, 1e4, dtype=torch.float32) for e in steps]
    best = errors.index(min(errors))
    assert 0 < best < len(steps) - 1 and errors[-1] > 10 * errors[best]


def test_the_weights_are_those_of_a_softmax_over_one_key_more() -> None:
    query, key, value = QUERY[0, 0], KEY[0, 0], VALUE[0, 0]
    epsilon, mass = 0.3, 50.0
    scores = torch.exp(epsilon * query @ key.t())
    by_hand = (mass + 16) / epsilon * (scores / (mass + scores.sum(-1, keepdim=True)) - 1 / (mass + 16))
    output, linear = SoftmaxAttention(epsilon, mass)(query, key, value)
    torch.testing.assert_close(linear, by_hand, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output, by_hand @ value, rtol=1e-10, atol=1e-12)


def test_a_linear_layer_made_of_softmax_heads() -> None:
    layout = Layout(12, 3, 2, context=8)
    x, grad, weight, bias = (
        0.3 * numbers(*s, seed=i) for i, s in enumerate([(2, 8, 12), (2, 8, 12), (12, 12), (12,)])
    )
    mask = torch.rand(2, 8, generator=torch.Generator().manual_seed(9)) > 0.5
    errors = []
    for epsilon in (1e-2, 1e-3):
        heads = {"backend": "literal", "layout": layout, "attention": SoftmaxAttention(epsilon, 1e10)}
        pairs = [
            (LinearForward(**heads)(x, weight, bias), LinearForward()(x, weight, bias)),
            (LinearBackward(**heads)(grad, weight), LinearBackward()(grad, weight)),
            (LinearDescent(**heads)(x, grad, mask, 0.1)[0], LinearDescent()(x, grad, mask, 0.1)[0]),
        ]
        errors.append(torch.tensor([float((a - b).norm() / b.norm()) for a, b in pairs]))
    assert float(errors[1].max()) < 1e-2
    assert float((errors[0] / errors[1] / 10 - 1).abs().max()) < 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "epsilon = 0.0: expected a positive finite number."),
        ((1e-3, 0.5), "mass = 0.5: expected at least 1, the weight of one ordinary key."),
        ((1e-3, 1e4, "both"), "difference = 'both': expected one of 'forward', 'central'."),
    ],
)
def test_errors_say_what_is_wrong(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SoftmaxAttention(*arguments)
