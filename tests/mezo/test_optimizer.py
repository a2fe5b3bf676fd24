"""The step against the unfused one, its groups and options, and what it must not disturb."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import MeZO, draw_seed, noise
from tests.mezo.reference import curved, joined, run_unfused, split

SHAPES = [(30, 7), (5,), (3, 4, 6), (1,)]
D = 288
RULES = [
    {},
    {"weight_decay": 0.2},
    {"n": 3},
    {"n": 2, "weight_decay": 0.2, "dist": "rademacher"},
    {"momentum": 0.9},
    {"momentum": 0.7, "n": 2, "weight_decay": 0.1},
    {"betas": (0.9, 0.99)},
    {"betas": (0.8, 0.9), "dist": "rademacher"},
]


def start() -> Tensor:
    return noise(5, 0, D, dtype=torch.float64)


def trained(params: list[nn.Parameter], steps: int, **options) -> MeZO:
    optimizer = MeZO(params, **options)
    for _ in range(steps):
        optimizer.step(lambda: curved(joined(params)))
    optimizer.flush()
    return optimizer


@pytest.mark.parametrize("mode", ["inplace", "exact"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_fused_step_equals_the_unfused_one(rule: dict, mode: str) -> None:
    """In float64, each by its own losses: only the float32 scalar differs."""
    settings = {"lr": 0.05, "eps": 1e-2, "seed": 3, **rule}
    expected, scalars = run_unfused(start(), curved, 12, **settings)
    params = split(start(), SHAPES)
    optimizer = trained(params, 12, mode=mode, **settings)
    assert float((expected - start()).abs().max()) > 0.05
    torch.testing.assert_close(joined(params), expected, rtol=1e-6, atol=1e-7)
    for entry, slopes in zip(optimizer.log, scalars, strict=True):
        assert entry.projected_grads == pytest.approx(slopes, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("rule", RULES[:6], ids=str)
@pytest.mark.parametrize("pipelined", [False, True])
def test_float32_additions_equal_the_unfused_ones(rule: dict, pipelined: bool) -> None:
    """With the scalars of the log, so that only the additions are compared."""
    settings = {"lr": 0.02, "eps": 1e-2, "seed": 3, **rule}
    params = split(start(), SHAPES, torch.float32)
    optimizer = trained(params, 12, pipelined=pipelined, **settings)
    scalars = [list(entry.projected_grads) for entry in optimizer.log]
    expected, _ = run_unfused(start().float(), curved, 12, scalars=scalars, **settings)
    torch.testing.assert_close(joined(params), expected, rtol=1e-6, atol=2e-6)


def test_order_within_the_log_is_the_order_of_the_groups() -> None:
    params = split(start(), SHAPES)
    optimizer = MeZO([{"params": params[2:]}, {"params": params[:2]}], 0.0, 0.5, seed=1)
    points: list[Tensor] = []
    optimizer.step(lambda: points.append(joined(params[2:] + params[:2])) or 0.0)
    z = noise(draw_seed(1, 0), 0, D, dtype=torch.float64)
    torch.testing.assert_close(points[0] - points[1], z, rtol=0, atol=1e-12)


def test_groups_with_their_own_eps_get_the_unbiased_estimate() -> None:
    params = split(start(), SHAPES)
    slopes = noise(6, 0, D, dtype=torch.float64)
    optimizer = MeZO(
        [{"params": params[:2], "eps": 0.1}, {"params": params[2:], "eps": 0.4, "lr": 0.01}], 0.02, seed=4
    )
    before = joined(params)
    optimizer.step(lambda: slopes @ joined(params))
    z = noise(draw_seed(4, 0), 0, D, dtype=torch.float64)
    eps = torch.cat([torch.full((215,), 0.1), torch.full((73,), 0.4)]).double()
    lr = torch.cat([torch.full((215,), 0.02), torch.full((73,), 0.01)]).double()
    difference = slopes @ (eps * z)  # (l+ - l-) / 2
    assert optimizer.projected_grad == pytest.approx(float(difference) / 0.1, rel=1e-6)
    torch.testing.assert_close(joined(params), before - lr * difference / eps * z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("named", [True, False])
def test_biases_and_norms_can_be_exempt_from_decay(named: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
    params = [(n.replace("1.", "final_layer_norm."), p) for n, p in model.named_parameters()]
    optimizer = MeZO(
        params if named else [p for _, p in params],
        0.1,
        weight_decay=0.5,
        decay_filter="no_bias_norm",
        mode="exact",
    )
    optimizer.step(lambda: 1.0)
    values = [float(p.detach().mean()) for p in model.parameters()]
    assert values == pytest.approx([2.0 * (1 - 0.1 * 0.5), 2.0, 2.0, 2.0])


def test_decay_filter_may_be_a_function() -> None:
    params = split(torch.ones(D), SHAPES)
    optimizer = MeZO(params, 0.1, weight_decay=0.5, decay_filter=lambda name, p: p.dim() == 3, mode="exact")
    optimizer.step(lambda: 1.0)
    assert [float(p.detach().mean()) for p in params] == pytest.approx([1, 1, 0.95, 1])


def test_schedulers_set_the_learning_rate_of_each_step() -> None:
    params = split(start(), SHAPES)
    optimizer = MeZO(params, 0.5, 0.1, seed=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    expected = start()
    for step in range(5):
        optimizer.step(lambda: curved(joined(params)))
        scheduler.step()
        lr = 0.5 * 0.1 ** (step // 2)
        assert optimizer.log[step].settings.groups[0].lr == pytest.approx(lr)
        expected -= lr * optimizer.projected_grad * noise(draw_seed(2, step), 0, D, dtype=torch.float64)
    torch.testing.assert_close(joined(params), expected, rtol=1e-6, atol=1e-7)


def test_draws_may_change_between_steps() -> None:
    params = split(start(), SHAPES)
    optimizer = MeZO(params, 0.01, seed=2)
    calls = []
    for n in (1, 4, 2):
        optimizer.n = n
        calls.append(0)

        def closure() -> Tensor:
            calls[-1] += 1
            return curved(joined(params))

        optimizer.step(closure)
        assert len(optimizer.last_losses) == 2 * n
    assert calls == [2, 8, 4]
    assert [len(entry.seeds) for entry in optimizer.log] == [1, 4, 2]


@pytest.mark.parametrize("pipelined", [False, True])
def test_passes_over_the_weights(pipelined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three a step, two in a pipeline, where algorithm 1 makes four; 2n + 1 and 2n with n draws."""
    from papercore.mezo import weights as module

    passes = []
    true = module.add_noise_
    monkeypatch.setattr(module, "add_noise_", lambda *a, **k: (passes.append(len(a[2])), true(*a, **k)))
    for n in (1, 3):
        optimizer = MeZO(split(start(), SHAPES), 0.01, n=n, pipelined=pipelined)
        optimizer.step(lambda: 0.5)
        passes.clear()
        optimizer.step(lambda: 0.5)
        assert len(passes) == 2 * n + (0 if pipelined else 1)


def test_global_random_states_stay_as_they_are() -> None:
    params = split(start(), SHAPES)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    trained(params, 3, lr=0.01, n=2, momentum=0.9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


def test_step_inside_inference_mode_leaves_ordinary_weights() -> None:
    params = split(start(), SHAPES)
    optimizer = MeZO(params, 0.01, mode="exact")
    with torch.inference_mode():
        optimizer.step(lambda: curved(joined(params)))
    assert not any(p.is_inference() for p in params)
    (params[0] ** 2).sum().backward()
    optimizer.step(lambda: curved(joined(params)))


def test_weights_that_move_are_followed() -> None:
    """model.to() and .data = ... give the parameter other memory between steps."""
    params, again = split(start(), SHAPES), split(start(), SHAPES)
    optimizer, other = MeZO(params, 0.05, seed=1), MeZO(again, 0.05, seed=1)
    for step in range(4):
        if step == 2:
            for p in params:
                p.data = p.data.clone()
        optimizer.step(lambda: curved(joined(params)))
        other.step(lambda: curved(joined(again)))
    assert torch.equal(joined(params), joined(again))


def test_pipeline_stands_at_the_minus_side_until_it_is_flushed() -> None:
    params = split(start(), SHAPES)
    optimizer = MeZO(params, 0.0, 0.1, pipelined=True, seed=7)
    optimizer.step(lambda: curved(joined(params)))
    z = noise(draw_seed(7, 0), 0, D, dtype=torch.float64)
    torch.testing.assert_close(joined(params), start() - 0.1 * z, rtol=0, atol=1e-12)
    with optimizer.parameters_at_center():
        torch.testing.assert_close(joined(params), start(), rtol=0, atol=1e-12)


def test_attached_model_flushes_before_it_is_called_or_saved() -> None:
    model = nn.Linear(6, 2).double()
    before = model.weight.detach().clone()
    optimizer = MeZO(model.parameters(), 0.0, 0.1, pipelined=True)
    handles = optimizer.attach(model)
    x = torch.ones(3, 6).double()
    optimizer.step(lambda: model(x).sum())
    assert not torch.allclose(model.weight, before)
    model(x)
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=1e-12)
    optimizer.step(lambda: model(x).sum())
    torch.testing.assert_close(model.state_dict()["weight"], before, rtol=0, atol=1e-12)
    for handle in handles:
        handle.remove()
    optimizer.step(lambda: model(x).sum())
    assert not torch.allclose(model.state_dict()["weight"], before)


def test_pipeline_in_an_attached_model_equals_one_that_is_not() -> None:
    ends = []
    for attach in (False, True):
        model = nn.Linear(6, 2).double()
        with torch.no_grad():
            model.weight.fill_(0.5), model.bias.fill_(0.1)
        optimizer = MeZO(model.parameters(), 1e-3, 0.1, pipelined=True)
        if attach:
            optimizer.attach(model)
        for _ in range(4):
            optimizer.step(lambda: model(torch.ones(3, 6).double()).square().sum())  # noqa: B023
        optimizer.flush()
        ends.append(model.weight.detach())
        assert optimizer.log.flushes == [4]
    assert torch.equal(*ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_mode_rounds_nothing_but_the_update(dtype: torch.dtype) -> None:
    params = split(start(), SHAPES, dtype)
    centre = joined(params)
    optimizer = MeZO(params, 0.05, 0.05, mode="exact", seed=9)
    points: list[Tensor] = []
    for step in range(4):
        optimizer.step(lambda: points.append(joined(params)) or curved(points[-1]))
        z = noise(draw_seed(9, step), 0, D)
        for point, sign in zip(points[-2:], (1, -1), strict=True):
            assert torch.equal(point, (centre.float() + sign * 0.05 * z).to(dtype).double())
        centre = (centre.float() + -0.05 * optimizer.projected_grad * z).to(dtype).double()
        assert torch.equal(joined(params), centre)
    assert optimizer.extra_nbytes == 2 * D


def test_zero_difference_leaves_exact_weights_bit_for_bit() -> None:
    params = split(torch.cat([start()[: D - 1], torch.tensor([-0.0])]), SHAPES, torch.float32)
    before = [p.detach().clone() for p in params]
    optimizer = MeZO(params, 0.1, mode="exact")
    optimizer.step(lambda: 3)
    assert all(
        torch.equal(p.view(torch.int32), b.view(torch.int32)) for p, b in zip(params, before, strict=True)
    )


@pytest.mark.parametrize("mode", ["inplace", "exact"])
@pytest.mark.parametrize("at", range(4))
def test_an_exception_in_the_closure_restores_the_weights(mode: str, at: int) -> None:
    params = split(start(), SHAPES, torch.float32)
    before = joined(params)
    calls = iter(range(4))

    def closure() -> float:
        if next(calls) == at:
            raise KeyboardInterrupt
        return 0.5

    optimizer = MeZO(params, 0.1, 0.01, n=2, mode=mode)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    torch.testing.assert_close(joined(params), before, rtol=0, atol=0 if mode == "exact" else 1e-6)
    assert len(optimizer.log) == 0


def test_strided_and_split_weights_take_the_same_step() -> None:
    """Channels-last and transposed parameters: elements count in the order of the shape, not of the memory."""
    plain = split(start(), [(2, 3, 4, 6), (12, 12)], torch.float32)
    strided = [
        nn.Parameter(plain[0].detach().clone().contiguous(memory_format=torch.channels_last)),
        nn.Parameter(plain[1].detach().T.contiguous().T),
    ]
    assert not any(p.is_contiguous() for p in strided)
    for options in ({"momentum": 0.5}, {"mode": "exact"}, {"betas": (0.5, 0.9)}):
        a, b = copy.deepcopy(plain), copy.deepcopy(strided)
        trained(a, 3, lr=0.1, **options), trained(b, 3, lr=0.1, **options)
        assert torch.equal(joined(a), joined(b))
        assert b[0].stride() == strided[0].stride()


def test_an_empty_parameter_is_no_obstacle() -> None:
    params = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(4))]
    optimizer = MeZO(params, 0.1)
    optimizer.step(lambda: params[1].sum())
    assert not torch.equal(params[1], torch.ones(4))


def test_averaging_over_micro_batches_is_the_closures_business() -> None:
    x = noise(8, 0, 96, dtype=torch.float64).reshape(24, 4)
    ends = []
    for parts in (1, 3):
        model = nn.Linear(4, 1).double()
        with torch.no_grad():
            model.weight.fill_(0.3), model.bias.fill_(0.1)
        optimizer = MeZO(model.parameters(), 0.05, seed=2)
        for _ in range(3):
            optimizer.step(lambda: sum(model(c).square().mean() for c in x.chunk(parts)) / parts)  # noqa: B023
        ends.append(joined(list(model.parameters())))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_no_warning_in_an_ordinary_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(split(start(), SHAPES, torch.float32), 60, lr=0.01)
