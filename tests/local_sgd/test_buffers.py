"""Batch-norm statistics estimated anew in one process, against torch's update_bn and plain means."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from papercore.local_sgd import reestimate_batch_norm
from papercore.local_sgd.buffers import averaged_buffers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=0.3), nn.ReLU(), nn.Linear(5, 2), nn.BatchNorm1d(2)
    )


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(7, 3, generator=generator) for _ in range(4)]


def statistics(model: nn.Module) -> Tensor:
    return torch.cat([b.flatten() for name, b in model.named_buffers() if "running" in name])


def test_it_is_torchs_update_bn() -> None:
    ours, theirs = network(), network()
    for model in (ours, theirs):
        model(torch.full((4, 3), 9.0).normal_())
    assert reestimate_batch_norm(ours, batches()) == 4
    update_bn(batches(), theirs)
    assert torch.equal(statistics(ours), statistics(theirs))
    assert [ours[1].momentum, ours[4].momentum] == [0.3, 0.1]


def test_it_is_the_recursion_of_the_official_code() -> None:
    """Momentum 1 / (1 + i) at batch i."""
    ours, theirs = network().double(), network().double()
    reestimate_batch_norm(ours, [b.double() for b in batches()])
    for i, batch in enumerate(batches()):
        theirs[1].momentum = theirs[4].momentum = 1 / (1 + i)
        theirs(batch.double())
    torch.testing.assert_close(statistics(ours), statistics(theirs), rtol=1e-14, atol=1e-15)


def test_all_kinds_of_batches_give_the_same() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    found = []
    for kind in (
        lambda b: b,
        lambda b: (b, "label"),
        lambda b: [b, 1],
        lambda b: {"x": b},
    ):
        model = Named()
        reestimate_batch_norm(model, map(kind, batches()))
        found.append(statistics(model))
    model = Named()
    reestimate_batch_norm(model, enumerate(batches()), forward=lambda m, pair: m(pair[1]))
    assert all(torch.equal(f, statistics(model)) for f in found)


def test_modes_random_numbers_and_gradients_are_left_alone() -> None:
    model = nn.Sequential(nn.Dropout(0.5), *network(), nn.BatchNorm1d(2, track_running_stats=False))
    model.train()
    model[4].eval()
    weights = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    reestimate_batch_norm(model, batches())
    assert torch.equal(torch.rand(3), expected), "dropout drew nothing"
    assert [m.training for m in model] == [True, True, True, True, False, True, True]
    assert all(p.grad is None and torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_a_failure_restores_the_statistics() -> None:
    model = network()
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        reestimate_batch_norm(model, [*batches(), torch.ones(2, 9)])
    with pytest.raises(
        ValueError, match=r"batches of the ranks: \[0\]\. Batch-norm statistics need at least one batch"
    ):
        reestimate_batch_norm(model, [])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in model.modules()) and model[1].momentum == 0.3


def test_nothing_to_do_without_batch_norm() -> None:
    assert reestimate_batch_norm(nn.Sequential(nn.Linear(3, 2), nn.GroupNorm(1, 2)), batches()) == 0


def test_averaged_buffers_are_floating_and_saved() -> None:
    model = network()
    model.register_buffer("table", torch.ones(3), persistent=False)
    model.register_buffer("seen", torch.ones(2, dtype=torch.int64))
    model.register_buffer("scale", torch.ones(4, dtype=torch.bfloat16))
    found = averaged_buffers(model)
    assert [b.numel() for b in found] == [4, 5, 5, 2, 2]
