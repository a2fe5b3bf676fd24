"""What may go wrong and what is said about it: the rows that the argument tests do not cover."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import (
    MeZO,
    effective_rank,
    gradient_norms,
    memory_model,
    noise,
    one_point_grad,
    spsa_grad,
)
from papercore.mezo.memory import devices_needed

ROOT = Path(__file__).resolve().parents[2]


def weight(numel: int = 6, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.linspace(0.5, 1, numel).to(dtype))


# ---- arguments that exclude each other, or that are not what they seem ----------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dist": "sphere"}, "rademacher' has the same length"),
        ({"momentum": 0.9, "betas": (0.9, 0.99)}, "give one of them"),
        ({"momentum": 1.0}, "momentum=1 must be finite and >= 0 and < 1"),
        ({"pipelined": True, "mode": "exact"}, "needs mode='inplace'"),
        ({"pipelined": True, "betas": (0.9, 0.99)}, "cannot be combined with betas"),
        ({"on_nonfinite": "ignore"}, "'raise', 'skip'"),
        ({"split": "sign"}, "'batch', 'directions'"),
        ({"decay_filter": "bias"}, "no_bias_norm"),
        ({"window": 0}, "window=0 must be an integer >= 1"),
        ({"check_every": -1}, "check_every=-1"),
        ({"zero_patience": 0}, "zero_patience=0"),
        ({"adam_eps": -1.0}, "adam_eps=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
    ],
    ids=str,
)
def test_refused_options(options: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        MeZO([weight()], 0.1, **options)
    assert text in str(error.value)


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay"])
def test_a_group_setting_is_checked_at_every_step(key: str) -> None:
    p = weight()
    optimizer = MeZO([p], 0.1)
    optimizer.param_groups[0][key] = -1.0
    before = p.detach().clone()
    with pytest.raises(ValueError, match=key):
        optimizer.step(lambda: p.sum())
    assert torch.equal(p, before) and len(optimizer.log) == 0


def test_params_of_a_wrong_kind() -> None:
    with pytest.raises(TypeError, match="single tensor"):
        MeZO(weight(), 0.1)
    with pytest.raises(ValueError, match="empty"):
        MeZO([], 0.1)
    with pytest.raises(ValueError, match="2 given, none of which requires a gradient"):
        MeZO([weight().requires_grad_(False), torch.ones(3)], 0.1)


def test_names_are_in_the_messages() -> None:
    with pytest.raises(TypeError, match="head.bias is on the meta device"):
        MeZO([("body", weight()), ("head.bias", nn.Parameter(torch.empty(3, device="meta")))], 0.1)
    with pytest.raises(TypeError, match="lazy module"):
        MeZO(nn.LazyLinear(3).named_parameters(), 0.1)
    both = weight()
    with pytest.raises(TypeError, match="a and b overlap"):
        MeZO([("a", nn.Parameter(both.data[:4])), ("b", nn.Parameter(both.data[3:]))], 0.1)
    with torch.inference_mode():
        inside = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="inference mode"):
        MeZO([inside], 0.1)
    with pytest.raises(TypeError, match="complex64"):
        MeZO([nn.Parameter(torch.ones(2, dtype=torch.complex64))], 0.1)


def test_interleaved_views_are_apart() -> None:
    """Two views of one storage that take turns in memory have no element in common."""
    storage = torch.zeros(4, 6)
    views = [nn.Parameter(storage[:, ::2]), nn.Parameter(storage[:, 1::2])]
    MeZO(views, 0.0, 1.0, dist="rademacher").step(lambda: 0.0)
    with pytest.raises(TypeError, match="parameter 0 and parameter 1 overlap"):
        MeZO([nn.Parameter(storage[:, ::2]), nn.Parameter(storage[:, 2::2])], 0.1)
    with pytest.raises(TypeError, match="overlap"):
        MeZO([nn.Parameter(storage), nn.Parameter(storage[1:2, :2]), nn.Parameter(storage[3])], 0.1)


def test_a_parameter_given_twice_is_stepped_once_or_refused() -> None:
    p, other = weight(), weight()
    for given in ([p, p], [("a", p), ("b", p)]):
        optimizer = MeZO(given, 0.1, seed=3)
        assert optimizer._weights.numel == 6
    with pytest.raises(ValueError, match="more than one"):
        MeZO([{"params": [p, other]}, {"params": [p]}], 0.1)


# ---- changes during a run ------------------------------------------------------------------------------------------


def test_groups_cannot_come_late() -> None:
    p = weight()
    optimizer = MeZO([p], 0.1)
    optimizer.add_param_group({"params": [weight()], "lr": 0.0})
    optimizer.step(lambda: p.sum())
    with pytest.raises(RuntimeError, match="after the first step"):
        optimizer.add_param_group({"params": [weight()]})


def test_freezing_during_a_run_is_noticed() -> None:
    p, q = weight(), weight()
    optimizer = MeZO([p, q], 0.1)
    q.requires_grad_(False)
    optimizer.step(lambda: p.sum() + q.sum())  # before the first step it is simply what the run starts with
    assert torch.equal(q, weight())
    q.requires_grad_(True)
    with pytest.raises(RuntimeError, match="requires_grad"):
        optimizer.step(lambda: p.sum())


def test_another_dtype_during_a_run_is_noticed() -> None:
    model = nn.Linear(3, 2)
    optimizer = MeZO(model.parameters(), 0.1)
    optimizer.step(lambda: model.weight.sum())
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        optimizer.step(lambda: model.weight.sum())


def test_loading_weights_into_a_perturbed_pipeline_is_noticed() -> None:
    model = nn.Linear(3, 2)
    optimizer = MeZO(model.parameters(), 0.1, pipelined=True, backend="torch")
    optimizer.step(lambda: model.weight.sum())
    model.load_state_dict(nn.Linear(3, 2).state_dict())
    for action in (optimizer.flush, lambda: optimizer.step(lambda: model.weight.sum())):
        with pytest.raises(RuntimeError, match="flush"):
            action()


def test_copying_an_optimiser_says_what_to_do() -> None:
    import copy

    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(MeZO([weight()], 0.1))


# ---- debug ---------------------------------------------------------------------------------------------------------


def test_debug_finds_dropout() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    optimizer = MeZO(model.parameters(), 0.01, debug=True)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="dropout off"):
        optimizer.step(lambda: model(torch.ones(4, 8)).sum())
    model.eval()
    assert math.isfinite(optimizer.step(lambda: model(torch.ones(4, 8)).sum()))


def test_debug_finds_another_batch() -> None:
    p, batches = weight(), iter(range(99))
    with pytest.raises(RuntimeError, match="same batch"):
        MeZO([p], 0.01, debug=True).step(lambda: p.sum() * next(batches))


@pytest.mark.parametrize("kind", ["changes", "replaces", "differentiates"])
def test_debug_finds_a_closure_that_does_more_than_evaluate(kind: str) -> None:
    p = weight()
    before = p.detach().clone()

    def closure() -> Tensor:
        if kind == "changes":
            p.mul_(1.0)
        elif kind == "replaces":
            p.data = p.data.clone()
        else:
            with torch.enable_grad():
                p.sum().backward()
        return p.sum()

    with pytest.raises(RuntimeError, match="gradient" if kind == "differentiates" else "modified"):
        MeZO([("w", p)], 0.01, debug=True).step(closure)
    if kind != "replaces":
        torch.testing.assert_close(p.detach(), before, rtol=1e-6, atol=1e-6)


def test_debug_of_an_ordinary_closure_changes_nothing_but_the_number_of_calls() -> None:
    ends = []
    for debug in (False, True):
        p, calls = weight(), []
        optimizer = MeZO([p], 0.01, debug=debug)
        optimizer.step(lambda: calls.append(1) or p.square().sum())  # noqa: B023
        ends.append(p.detach())
        assert len(calls) == (4 if debug else 2)
    assert torch.equal(*ends)


# ---- losses that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inplace", "exact"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skipping(mode: str, value: float) -> None:
    p = weight()
    optimizer = MeZO([p], 0.1, 0.01, n=2, mode=mode, weight_decay=0.5, on_nonfinite="skip")
    optimizer.step(lambda: p.sum())
    before, losses = p.detach().clone(), iter([0.1, value, 0.1, 0.2])
    assert not math.isfinite(optimizer.step(lambda: next(losses)))
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=0 if mode == "exact" else 1e-6)
    assert len(optimizer.log) == 2 and optimizer.log.skipped == [1]
    assert math.isnan(optimizer.projected_grad)


def test_infinite_losses_of_one_sign_have_no_difference() -> None:
    with pytest.raises(FloatingPointError, match="inf"):
        MeZO([weight()], 0.1).step(lambda: math.inf)


def test_a_slope_beyond_float32_counts_as_not_finite() -> None:
    p, losses = weight(), iter([1e38, -1e38])
    with pytest.raises(FloatingPointError, match="step 0.*projected gradient inf"):
        MeZO([p], 0.1, 1e-3, mode="exact").step(lambda: next(losses))
    assert torch.equal(p, weight())


# ---- warnings ------------------------------------------------------------------------------------------------------


def caught(run) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return found


def test_warnings_point_at_the_users_line() -> None:
    def run() -> None:
        p = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
        optimizer = MeZO([p], 1e-3, 1e-4, zero_patience=3)
        for _ in range(5):
            optimizer.step(lambda: 0.5)

    found = caught(run)
    assert [Path(w.filename).name for w in found] == ["test_errors.py"] * 2


def test_share_of_unchanged_weights_is_measured() -> None:
    """bfloat16, |z| = 1, eps 1e-3: half a unit in the last place exceeds eps above |w| = 0.5 or so."""
    values = torch.cat([torch.full((300,), 0.75), torch.full((700,), 0.1)])
    p = nn.Parameter(values.to(torch.bfloat16))
    found = caught(lambda: MeZO([p], 0.0, 1e-3, dist="rademacher").step(lambda: p.float().sum()))
    assert len(found) == 1 and "30 % of the bfloat16 weights" in str(found[0].message)
    p = nn.Parameter(values.to(torch.float16))
    assert caught(lambda: MeZO([p], 0.0, 1e-3, dist="rademacher").step(lambda: p.float().sum())) == []


def test_identical_losses_warn_once_after_so_many_steps_in_a_row() -> None:
    p = weight()
    optimizer = MeZO([p], 0.0, zero_patience=4)
    flat = [True, True, True, False, True, True, True, True, True]
    said = []
    for is_flat in flat:
        said.append(len(caught(lambda: optimizer.step(lambda: 9.0 if is_flat else p.sum()))))  # noqa: B023
    assert said == [0, 0, 0, 0, 0, 0, 0, 1, 0]


def test_a_rise_counts_only_early_and_from_a_positive_loss() -> None:
    def run(losses: list[float]) -> int:
        optimizer, values = MeZO([weight()], 0.0, zero_patience=999), iter(losses)
        return len(caught(lambda: [optimizer.step(lambda: v) for v in values]))  # noqa: B023

    assert run([1.0, 1.9, 2.1, 5.0]) == 1
    assert run([1.0] * 50 + [5.0]) == 0
    assert run([-1.0, -0.5, 1.0]) == 0


# ---- functions -----------------------------------------------------------------------------------------------------


def test_functions_refuse() -> None:
    p = weight()
    with pytest.raises(ValueError, match="dist"):
        spsa_grad(lambda: 0.0, [p], 0.1, dist="uniform")
    with pytest.raises(ValueError, match="modified"):
        spsa_grad(lambda: 0.0, [p], 0.1, modified="both")
    with pytest.raises(TypeError, match="n must be an integer"):
        spsa_grad(lambda: 0.0, [p], 0.1, n=1.5)
    with pytest.raises(FloatingPointError):
        one_point_grad(lambda: math.nan, [p], 0.1, None)
    with pytest.raises(ValueError, match="sphere"):
        gradient_norms(lambda: 0.0, [p], 0.1, dist="sphere")
    with pytest.raises(ValueError, match="probes=0"):
        effective_rank(lambda: p.square().sum(), [p], probes=0)
    with pytest.raises(ValueError, match="leaves nothing"):
        devices_needed(1.0, device_gib=2, overhead_gib=2)
    with pytest.raises(ValueError, match="activation_bytes"):
        memory_model(10, "lora", activation_bytes=-1)
    assert torch.equal(p, weight())


def test_numpy_and_tensor_scalars_are_numbers() -> None:
    import numpy as np

    p = weight()
    optimizer = MeZO([p], np.float64(0.1), torch.tensor(0.01), n=np.int64(2), seed=np.int64(3))
    assert optimizer.step(lambda: np.float32(0.5)) == 0.5
    assert optimizer.step(lambda: torch.tensor([[0.25]])) == 0.25
    assert optimizer.step(lambda: torch.tensor(True)) == 1.0
    assert noise(np.int64(3), 0, 2).shape == (2,)


def test_import_needs_torch_alone() -> None:
    """No adapter library, compiler or trainer comes with the kernel."""
    code = (
        "import sys, papercore.mezo; "
        "print(sorted({'peft', 'transformers', 'accelerate', 'numba', 'triton', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
