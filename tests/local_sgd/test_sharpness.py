"""Top eigenvalue and trace against the dense Hessian."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from papercore.local_sgd import sharpness

# torch.func loads its decompositions with torch.jit.script on first use, which torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator, dtype=dtype), torch.randint(0, 3, (n,), generator=generator)


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(data[0]), data[1])


def dense(model: nn.Module, loss_fn: Callable, data: object) -> Tensor:
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parts = [p.detach() for p in model.parameters() if p.requires_grad]

    def of(flat: Tensor) -> Tensor:
        pieces = [
            piece.view_as(p) for piece, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        ]

        class Called:
            def __call__(self, x: Tensor) -> Tensor:
                return torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (x,))

        return loss_fn(Called(), data)

    return torch.autograd.functional.hessian(of, torch.cat([p.reshape(-1) for p in parts]))


class Quadratic(nn.Module):
    """Loss w^T A w / 2 with the eigenvalues given, in a random basis."""

    def __init__(self, eigenvalues: Tensor) -> None:
        super().__init__()
        n, generator = len(eigenvalues), torch.Generator().manual_seed(0)
        q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        self.matrix = q @ torch.diag(eigenvalues) @ q.T
        self.w = nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.w @ self.matrix @ self.w / 2


def value_of(model: nn.Module, data: object) -> Tensor:
    return model()


def test_top_is_the_largest_eigenvalue_and_its_vector() -> None:
    model, data = network(), batch(40, 1)
    hessian = dense(model, loss, data)
    values, vectors = torch.linalg.eigh(hessian)
    result = sharpness(model, loss, data, tol=1e-7)
    assert result.value == float(result) == pytest.approx(float(values[-1]), rel=1e-9)
    assert result.se == 0 and result.residual <= 1e-7 * result.value and result.products <= len(values)
    assert abs(float(result.vector @ vectors[:, -1])) == pytest.approx(1, abs=1e-9)
    rest = hessian @ result.vector - result.value * result.vector
    assert float(rest.norm()) == pytest.approx(result.residual, abs=1e-9)


def test_trace_is_unbiased_with_the_standard_error_that_it_states() -> None:
    model, data = network(), batch(40, 1)
    hessian = dense(model, loss, data)
    result = sharpness(
        model, loss, data, kind="trace", n_probe=500, generator=torch.Generator().manual_seed(3)
    )
    # For Rademacher probes the variance is twice the sum of squares off the diagonal.
    sd = math.sqrt(2 * float((hessian - torch.diag(hessian.diagonal())).square().sum()))
    assert result.se == pytest.approx(sd / math.sqrt(500), rel=0.15)
    assert result.value == pytest.approx(float(hessian.trace()), abs=4 * result.se)
    assert result.products == 500 and result.vector is None


@pytest.mark.parametrize("kind", ["top", "trace"])
def test_batches_count_as_one_batch(kind: str) -> None:
    model, (x, y) = network(), batch(40, 1)
    whole = sharpness(model, loss, (x, y), kind=kind, n_probe=10, tol=1e-6)
    parts = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 40, 10)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
    for data in (parts, iter(parts), loader):
        result = sharpness(model, loss, data, kind=kind, n_probe=10, tol=1e-6)
        assert result.value == pytest.approx(whole.value, rel=1e-9)
        assert result.products == whole.products


def test_the_largest_eigenvalue_is_meant_not_the_largest_in_size() -> None:
    eigenvalues = torch.cat((torch.tensor([-9.0, 1.0]), torch.linspace(0, 0.5, 20))).double()
    assert sharpness(Quadratic(eigenvalues), value_of, ()).value == pytest.approx(1.0, rel=1e-4)
    assert sharpness(Quadratic(-1 - eigenvalues.abs()), value_of, ()).value == pytest.approx(-1.0, rel=1e-3)


def test_restarts_when_the_basis_is_full() -> None:
    eigenvalues = torch.linspace(0, 1, 300, dtype=torch.float64) ** 0.5  # crowded at the top
    result = sharpness(Quadratic(eigenvalues), value_of, (), tol=1e-3, max_products=2000)
    assert result.products > 24 and result.residual <= 1e-3
    assert result.value == pytest.approx(1.0, abs=1e-3)
    cut = sharpness(Quadratic(eigenvalues), value_of, (), tol=1e-6, max_products=5)
    assert cut.products == 5 and cut.residual > 1e-6


def test_frozen_and_unused_parameters_and_a_linear_loss() -> None:
    model, data = network(), batch(40, 1)
    model[0].weight.requires_grad_(False)
    model.register_parameter("idle", nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    result = sharpness(model, loss, data, tol=1e-7)
    assert len(result.vector) == 6 + 18 + 3 + 2
    assert result.value == pytest.approx(float(torch.linalg.eigvalsh(dense(model, loss, data))[-1]), rel=1e-9)

    linear = nn.Linear(4, 1)
    flat = sharpness(linear, lambda m, x: m(x).mean(), torch.ones(3, 4), kind="trace")
    assert flat.value == 0 and sharpness(linear, lambda m, x: m(x).mean(), torch.ones(3, 4)).value == 0


def test_mode_gradients_buffers_and_the_global_generator_are_left_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    data = batch(20, 2, torch.float32)
    model[1].eval()  # a mixture of modes
    modes = [m.training for m in model.modules()]
    loss(model, data).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    state = torch.random.get_rng_state()
    with torch.no_grad():
        first, second = (sharpness(model, loss, data) for _ in range(2))
    assert first.value == second.value > 0  # dropout is off
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_float32_and_one_probe() -> None:
    model, data = network(dtype=torch.float32), batch(40, 1, torch.float32)
    reference = sharpness(network(), loss, batch(40, 1))
    assert sharpness(model, loss, data).value == pytest.approx(
        reference.value, rel=0.3
    )  # other draws of the data
    hessian = dense(model, loss, data)
    assert sharpness(model, loss, data).value == pytest.approx(
        float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-4
    )
    assert math.isnan(sharpness(model, loss, data, kind="trace", n_probe=1).se)


def test_errors_say_what_to_do() -> None:
    model, data = network(), batch(8, 1)
    for change, message in [
        ({"kind": "max"}, "kind must be 'top' or 'trace', got 'max'"),
        ({"n_probe": 0}, "n_probe = 0: expected a whole number >= 1"),
        ({"max_products": 0}, "max_products = 0"),
        ({"tol": 0.0}, "tol must lie between 0 and 1, got 0.0"),
        ({"data": []}, "data holds no batch"),
        ({"loss_fn": lambda m, b: loss(m, b) * math.nan}, "the loss is nan: there is no Hessian"),
        ({"model": nn.Tanh()}, "no parameter with requires_grad"),
    ]:
        arguments = {"model": model, "loss_fn": loss, "data": data} | change
        with pytest.raises(ValueError, match=message):
            sharpness(**arguments)
    for change, message in [
        ({"model": lambda x: x}, "model must be a torch.nn.Module, got function"),
        ({"data": 3}, "data must be a batch .* got int"),
        ({"generator": 3}, "generator must be a torch.Generator on the CPU"),
        ({"loss_fn": lambda m, b: m(b[0])}, r"loss_fn must return a scalar tensor, got \(8, 3\)"),
        ({"loss_fn": lambda m, b: loss(m, b).item()}, "loss_fn must return a scalar tensor, got float"),
        (
            {"loss_fn": lambda m, b: loss(m, b).detach()},
            "does not depend on the model's trainable parameters",
        ),
    ]:
        arguments = {"model": model, "loss_fn": loss, "data": data} | change
        with pytest.raises(TypeError, match=message):
            sharpness(**arguments)
    assert model.training
