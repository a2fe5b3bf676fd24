"""The loss gradient equals autograd of the loss, for every kind; each document's loss is a sum; bad targets are refused."""

import re

import pytest
import torch
from torch.nn import functional as F

from papercore.tint import output
from papercore.tint.output import loss_gradient, output_loss

V, D = 11, 6


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case():
    mask = torch.tensor([[True, False, True, True], [False, False, False, False], [True, True, True, True]])
    targets = torch.randint(V, (3, 4), generator=torch.Generator().manual_seed(5))
    return numbers(3, 4, D), numbers(V, D, seed=1), targets.masked_fill(~mask, -100), mask


def truth(kind: str, h, head, bias, y):
    """The loss of one token, written out."""
    z = head @ h + (0 if bias is None else bias)
    if kind == "prediction":
        return F.cross_entropy(z, y)
    if kind == "quadratic":
        return 0.5 * (z - F.one_hot(y, V)).square().sum()
    return z.mean() - z[y]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["prediction", "quadratic", "linear"])
@pytest.mark.parametrize("at_once", [None, 2 * V])
def test_gradient_and_loss_equal_autograd(kind: str, with_bias: bool, at_once, monkeypatch) -> None:
    if at_once is not None:
        monkeypatch.setattr(output, "_LOGITS_AT_ONCE", at_once)
    h, head, targets, mask = case()
    bias = numbers(V, seed=2) if with_bias else None
    leaf = h.clone().requires_grad_()
    losses = torch.stack([
        sum((truth(kind, leaf[i, t], head, bias, targets[i, t]) for t in range(4) if mask[i, t]), torch.zeros(()).double())
        for i in range(3)
    ])  # fmt: skip
    expected = torch.autograd.grad(losses.sum(), leaf)[0]
    grad = loss_gradient(h, head, targets, mask, kind, bias)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)
    assert not grad[~mask].any()
    torch.testing.assert_close(output_loss(h, head, targets, mask, kind, bias), losses.detach(), rtol=1e-12, atol=1e-13)  # fmt: skip


def test_the_embeddings_alone_make_the_gradient() -> None:
    """E^T p - E[y], E^T E h - E[y], mean(E) - E[y], as the paper states them."""
    h, head, targets, mask = case()
    y = head[targets.clamp_min(0)]
    closed = {
        "prediction": (h @ head.t()).softmax(-1) @ head - y,
        "quadratic": h @ (head.t() @ head) - y,
        "linear": head.mean(0) - y,
    }
    for kind, value in closed.items():
        torch.testing.assert_close(loss_gradient(h, head, targets, mask, kind)[mask], value[mask], rtol=1e-12, atol=1e-13)  # fmt: skip


def test_no_counted_target_no_gradient() -> None:
    h, head, targets, mask = case()
    assert not loss_gradient(h, head, targets, torch.zeros_like(mask)).any()
    assert not output_loss(h, head, targets, torch.zeros_like(mask)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "predicted"}, "kind = 'predicted': expected one of 'prediction', 'quadratic', 'linear'. Did you mean 'prediction'?"),
        ({"targets": torch.full((3, 4), 11)}, "targets from 11 to 11: expected ids of 0 to 10 where mask is True."),
        ({"targets": torch.full((3, 4), -100)}, "targets from -100 to -100: expected ids"),
        ({"targets": torch.zeros(3, 5, dtype=torch.long)}, "targets has shape (3, 5), mask is torch.bool (3, 4)"),
        ({"mask": torch.ones(3, 4)}, "mask is torch.float32 (3, 4): expected ids and torch.bool of shape (3, 4)."),
        ({"head_weight": numbers(11, 5)}, "h has shape (3, 4, 6), head_weight (11, 5): expected [B, T, D] and [V, D]."),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(change: dict, message: str) -> None:
    h, head, targets, mask = case()
    arguments = {"h": h, "head_weight": head, "targets": targets, "mask": mask, **change}
    for call in (loss_gradient, output_loss):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**arguments)
