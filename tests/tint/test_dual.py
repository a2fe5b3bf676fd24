"""The dual is the linear layer after its steps, forward, backward and in its change, without ever forming it."""

import re

import pytest
import torch

from papercore.tint.dual import DualWeight
from papercore.tint.linear import LinearBackward, LinearDescent, LinearForward
from papercore.tint.literal import linear_attention

B, T, IN, OUT = 3, 7, 5, 4


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
@pytest.mark.parametrize(
    "rate", [0.1, torch.tensor([0.1, 0.0, 0.3], dtype=torch.float64)], ids=["one", "own"]
)
def test_three_steps_equal_three_formed_steps(mask, rate) -> None:
    weight, bias = numbers(OUT, IN), numbers(OUT, seed=1)
    dual = DualWeight(weight, bias)
    formed, formed_bias = weight.expand(B, OUT, IN), bias.expand(B, OUT)
    for step in range(4):
        x, grad = numbers(B, T, IN, seed=10 + step), numbers(B, T, OUT, seed=20 + step)
        torch.testing.assert_close(
            dual.forward(x), LinearForward()(x, formed, formed_bias), rtol=1e-12, atol=1e-13
        )
        torch.testing.assert_close(
            dual.backward(grad), LinearBackward()(grad, formed), rtol=1e-12, atol=1e-13
        )
        change, change_bias = LinearDescent()(x, grad, mask, rate)
        formed, formed_bias = formed + change, formed_bias + change_bias
        dual = dual.descent(x, grad, mask, rate)
    change, change_bias = dual.change()
    torch.testing.assert_close(weight + change, formed, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(bias + change_bias, formed_bias, rtol=1e-12, atol=1e-13)


def test_only_tokens_that_count_are_kept() -> None:
    dual = DualWeight(numbers(OUT, IN)).descent(numbers(B, T, IN), numbers(B, T, OUT), MASK, 0.1)
    assert dual.keys.shape == (B, 4, IN)  # the second document has four
    assert dual.numbers == 4 * (IN + OUT)
    none = DualWeight(numbers(OUT, IN)).descent(
        numbers(B, T, IN), numbers(B, T, OUT), torch.zeros_like(MASK), 0.1
    )
    assert none.numbers == 0 and not none.change()[0].any()
    assert torch.equal(
        none.forward(numbers(B, T, IN)), DualWeight(numbers(OUT, IN)).forward(numbers(B, T, IN))
    )


def test_reading_it_is_linear_attention_over_the_trained_tokens() -> None:
    weight, trained, grad, x = (
        numbers(OUT, IN),
        numbers(1, 6, IN, seed=1),
        numbers(1, 6, OUT, seed=2),
        numbers(1, 3, IN, seed=3),
    )
    dual = DualWeight(weight).descent(trained, grad, None, 0.2)
    attended, _ = linear_attention(x, trained, -0.2 * grad)
    torch.testing.assert_close(dual.forward(x) - x @ weight.t(), attended, rtol=1e-12, atol=1e-14)


def test_nothing_is_changed_in_place_and_a_bias_can_stay() -> None:
    weight, bias = numbers(OUT, IN), numbers(OUT, seed=1)
    first = DualWeight(weight, bias)
    second = first.descent(numbers(B, T, IN), numbers(B, T, OUT), None, 0.1, update_bias=False)
    assert first.numbers == 0 and first.keys is None
    assert torch.equal(weight, numbers(OUT, IN)) and torch.equal(bias, numbers(OUT, seed=1))
    assert second.change()[1] is None
    assert DualWeight(weight).descent(numbers(B, T, IN), numbers(B, T, OUT), None, 0.1).change()[1] is None


def test_its_cost_is_counted_by_the_numbers() -> None:
    for d_in, d_out, trained, read in (
        (768, 768, 300, 1024),
        (768, 768, 300, 383),
        (768, 768, 384, 384),
        (48, 192, 30, 96),
    ):
        formed = 2 * trained * d_in * d_out
        attended = 2 * trained * read * (d_in + d_out)
        assert DualWeight.is_cheaper(d_in, d_out, trained=trained, read=read) == (
            attended < formed,
            trained * (d_in + d_out) < d_in * d_out,
        )  # fmt: skip


def test_errors_say_what_is_wrong() -> None:
    for call, message in (
        (lambda: DualWeight(numbers(B, OUT, IN)), "weight has shape (3, 4, 5): expected [D_out, D_in], shared by all documents"),
        (lambda: DualWeight.is_cheaper(4, 4, trained=0, read=1), "d_in = 4, d_out = 4, trained = 0, read = 1: expected at least 1 each."),
        (lambda: DualWeight(numbers(OUT, IN)).forward(numbers(B, T, OUT)), "x has shape (3, 7, 4): expected [B, T, 5]."),
        (lambda: DualWeight(numbers(OUT, IN)).backward(numbers(B, T, IN)), "grad has shape (3, 7, 5): expected [B, T, 4]."),
        (lambda: DualWeight(numbers(OUT, IN)).descent(numbers(B, T, OUT), numbers(B, T, OUT), None, 0.1), "x has shape (3, 7, 4): expected [B, T, 5]."),
        (lambda: DualWeight(numbers(OUT, IN)).descent(numbers(B, T, IN), numbers(B, 6, OUT), None, 0.1), "grad has shape (3, 6, 4): expected [3, 7, 4]."),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
