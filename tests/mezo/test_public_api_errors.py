"""Refused input: the kind of the error, and that its text names the argument and the value that was given."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import MeZO, ZOLog, memory_model, noise, replay, spsa_grad


def weight(numel: int = 8, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, numel).to(dtype))


def says(error: pytest.ExceptionInfo, *words: str) -> None:
    for word in words:
        assert word in str(error.value), f"{word!r} is missing in: {error.value}"


# ---- arguments -----------------------------------------------------------------------------------------------------

WRONG_VALUES = [
    ("lr", -0.25, "-0.25"),
    ("lr", float("nan"), "nan"),
    ("eps", 0.0, "0"),
    ("eps", -0.5, "-0.5"),
    ("eps", float("inf"), "inf"),
    ("n", 0, "0"),
    ("n", -3, "-3"),
    ("dist", "cauchy", "cauchy"),
    ("weight_decay", -0.125, "-0.125"),
    ("momentum", -0.5, "-0.5"),
    ("momentum", 1.5, "1.5"),
    ("betas", (0.9, 1.25), "1.25"),
    ("betas", (-0.75, 0.9), "-0.75"),
    ("mode", "sideways", "sideways"),
    ("backend", "fortran", "fortran"),
]
WRONG_KINDS = [
    ("lr", "fast", "fast"),
    ("eps", None, "None"),
    ("n", 2.5, "2.5"),
    ("seed", "seven", "seven"),
    ("seed", 1.5, "1.5"),
    ("betas", 0.9, "0.9"),
    ("momentum", "heavy", "heavy"),
]


@pytest.mark.parametrize(("name", "value", "text"), WRONG_VALUES)
def test_wrong_values(name: str, value: object, text: str) -> None:
    with pytest.raises(ValueError) as error:
        MeZO([weight()], **{"lr": 1e-3, name: value})
    says(error, name, text)


@pytest.mark.parametrize(("name", "value", "text"), WRONG_KINDS)
def test_wrong_kinds(name: str, value: object, text: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        MeZO([weight()], **{"lr": 1e-3, name: value})
    says(error, name)
    assert text in str(error.value) or type(value).__name__ in str(error.value)


@pytest.mark.parametrize(
    ("name", "allowed"), [("dist", "rademacher"), ("mode", "exact"), ("backend", "numba")]
)
def test_unknown_names_come_with_the_known_ones(name: str, allowed: str) -> None:
    with pytest.raises(ValueError) as error:
        MeZO([weight()], 1e-3, **{name: "unheard"})
    says(error, allowed)


@pytest.mark.parametrize(("name", "value"), [("lr", -0.25), ("weight_decay", -0.5)])
def test_wrong_values_in_a_group(name: str, value: float) -> None:
    with pytest.raises(ValueError) as error:
        MeZO([{"params": [weight()]}, {"params": [weight()], name: value}], 1e-3)
    says(error, name, str(value))


@pytest.mark.parametrize("params", [[], [weight().requires_grad_(False)]], ids=["empty", "all frozen"])
def test_nothing_to_train(params: list[nn.Parameter]) -> None:
    with pytest.raises(ValueError, match="param|requires_grad"):
        MeZO(params, 1e-3)


# ---- parameters that cannot be stepped -----------------------------------------------------------------------------


def overlapping() -> list[nn.Parameter]:
    base = torch.zeros(10)
    return [nn.Parameter(base[:6]), nn.Parameter(base[4:])]


IMPOSSIBLE: dict[str, Callable[[], list[Tensor]]] = {
    "meta": lambda: [nn.Parameter(torch.empty(5, device="meta"))],
    "expand": lambda: [nn.Parameter(torch.zeros(1).expand(5))],
    "overlap": overlapping,
    "int": lambda: [nn.Parameter(torch.zeros(5, dtype=torch.int8), requires_grad=False)],
    "sparse": lambda: [nn.Parameter(torch.eye(3).to_sparse())],
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_impossible_parameters(kind: str) -> None:
    params = IMPOSSIBLE[kind]()
    with pytest.raises((TypeError, ValueError) if kind == "int" else TypeError):
        MeZO(params, 1e-3).step(lambda: 0.5)


# ---- closures ------------------------------------------------------------------------------------------------------


def spoiled(at: int, value: float, param: nn.Parameter) -> Callable[[], Tensor]:
    """A loss whose evaluation number ``at`` gives ``value``."""
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        return torch.tensor(value) if count - 1 == at else (param.float() ** 2).sum()

    return closure


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("mode", ["inplace", "exact"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite(backend: str, mode: str, at: int, value: float) -> None:
    param = weight(300)
    optimizer = MeZO([param], 1e-3, 1e-2, n=2, mode=mode, backend=backend)
    optimizer.step(spoiled(-1, value, param))
    start = param.detach().clone()
    with pytest.raises(FloatingPointError) as error:
        optimizer.step(spoiled(at, value, param))
    says(error, str(value).lstrip("-"))
    torch.testing.assert_close(param.detach(), start, rtol=0, atol=0 if mode == "exact" else 2e-6)
    assert len(optimizer.log) == 1, "a step that was not taken is not in the log"
    optimizer.step(spoiled(-1, value, param))
    assert len(optimizer.log) == 2 and bool(param.isfinite().all())


@pytest.mark.parametrize("at", [0, 1])
def test_a_loss_that_is_not_finite_in_a_pipeline(at: int) -> None:
    param = weight(300)
    optimizer = MeZO([param], 0.0, 1e-2, pipelined=True)
    start = param.detach().clone()
    optimizer.step(spoiled(-1, 0.0, param))
    with pytest.raises(FloatingPointError):
        optimizer.step(spoiled(at, float("nan"), param))
    optimizer.flush()
    torch.testing.assert_close(param.detach(), start, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (torch.zeros(3), ("3",)),
        (None, ("None",)),
        ("low", ("str", "low")),
        (torch.tensor(1 + 2j), ("complex",)),
    ],
    ids=["vector", "None", "string", "complex"],
)
def test_a_closure_that_gives_no_scalar(value: object, texts: tuple[str, ...]) -> None:
    param = weight()
    start = param.detach().clone()
    with pytest.raises((TypeError, ValueError)) as error:
        MeZO([param], 1e-3, mode="exact").step(lambda: value)
    says(error, "closure")
    assert any(text in str(error.value) for text in texts)
    assert torch.equal(param, start)


def test_step_needs_a_closure() -> None:
    with pytest.raises((TypeError, ValueError), match="closure"):
        MeZO([weight()], 1e-3).step(None)
    with pytest.raises((TypeError, ValueError), match="closure"):
        MeZO([weight()], 1e-3).step(0.5)


# ---- warnings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inplace", "exact"])
def test_a_discrete_loss_that_never_moves_warns_once(mode: str) -> None:
    optimizer = MeZO([weight()], 1e-3, dist="rademacher", mode=mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(300):
            optimizer.step(lambda: 0.5)
    about = [w for w in caught if "eps" in str(w.message)]
    assert len(about) == 1
    assert "batch" in str(about[0].message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eps_below_the_resolution_of_the_weights_warns(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(500, dtype=dtype))  # half a unit in the last place of 1: 4e-3 or 5e-4
    with pytest.warns(match=r"eps") as caught:
        MeZO([param], 1e-3, 1e-4).step(lambda: param.float().sum())
    assert any("%" in str(w.message) or "fraction" in str(w.message) for w in caught)


def test_eps_above_the_resolution_does_not_warn() -> None:
    param = weight(500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = MeZO([param], 1e-3, 1e-3)
        for _ in range(60):
            optimizer.step(lambda: (param**2).sum())


def test_a_loss_that_soon_rises_warns_about_lr() -> None:
    param = weight(50)
    optimizer = MeZO([param], 0.2, backend="torch")
    with pytest.warns(match="lr"):
        for _ in range(8):
            optimizer.step(lambda: (param.double() ** 2).sum())


# ---- the functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((1, 0, 10), {"dist": "cauchy"}, ("dist", "cauchy", "rademacher")),
        ((1, -4, 10), {}, ("start", "-4")),
        ((1, 0, -10), {}, ("numel", "-10")),
        ((1, 0, 10), {"dtype": torch.int32}, ("dtype", "int32")),
    ],
)
def test_noise_refuses(arguments: tuple, options: dict, words: tuple[str, ...]) -> None:
    with pytest.raises((ValueError, TypeError) if "dtype" in options else ValueError) as error:
        noise(*arguments, **options)
    says(error, *words)


@pytest.mark.parametrize("arguments", [("one", 0, 10), (1, 0.5, 10), (1, 0, 2.5)])
def test_noise_refuses_wrong_kinds(arguments: tuple) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        noise(*arguments)
    assert any(name in str(error.value) for name in ("seed", "start", "numel"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": 0.0}, ("eps", "0")),
        ({"eps": -0.5}, ("eps", "-0.5")),
        ({"n": 0}, ("n", "0")),
        ({"dist": "cauchy"}, ("dist", "cauchy")),
        ({"params": []}, ("param",)),
    ],
)
def test_spsa_grad_refuses(options: dict, words: tuple[str, ...]) -> None:
    param = weight()
    with pytest.raises(ValueError) as error:
        spsa_grad(lambda: (param**2).sum(), **{"params": [param], "eps": 1e-3, **options})
    says(error, *words)


@pytest.mark.parametrize("at", [0, 1])
def test_spsa_grad_of_a_loss_that_is_not_finite(at: int) -> None:
    param = weight()
    start = param.detach().clone()
    with pytest.raises(FloatingPointError):
        spsa_grad(spoiled(at, float("nan"), param), [param], 1e-3)
    torch.testing.assert_close(param.detach(), start, rtol=0, atol=1e-6)


def logged() -> tuple[nn.Module, ZOLog]:
    base, model = nn.Linear(3, 1), nn.Linear(3, 1)
    model.load_state_dict(base.state_dict())
    optimizer = MeZO(model.parameters(), 1e-3)
    for _ in range(4):
        optimizer.step(lambda: (model.weight**2).sum())
    return base, optimizer.log


@pytest.mark.parametrize("steps", [5, -1])
def test_replay_to_a_step_that_is_not_there(steps: int) -> None:
    base, log = logged()
    with pytest.raises((ValueError, IndexError)) as error:
        replay(base, log, steps=steps)
    says(error, "steps", str(steps), "4")


def test_replay_of_something_else() -> None:
    base, log = logged()
    with pytest.raises(TypeError, match="list|log"):
        replay(base, [(1, 0.5)])
    with pytest.raises(TypeError, match="dict|model|odule"):
        replay({}, log)


def test_replay_with_steps_of_a_wrong_kind() -> None:
    base, log = logged()
    with pytest.raises(TypeError, match="steps"):
        replay(base, log, steps=1.5)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((1000, "magic"), {}, ("method", "magic", "mezo", "adam", "lora", "prefix", "inference")),
        ((-5, "mezo"), {}, ("n_params", "-5")),
        ((1000, "mezo"), {"dtype_bytes": 0}, ("dtype_bytes", "0")),
    ],
)
def test_memory_model_refuses(arguments: tuple, options: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        memory_model(*arguments, **options)
    says(error, *words)
