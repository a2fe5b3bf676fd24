"""Settings: what is refused and in which words, what a digest sees, and how words of the command line are read."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch

from papercore.lab import config as lab
from papercore.lab.config import Config, checked_choice, option, parse_settings, resolve_device


@dataclasses.dataclass(frozen=True)
class Small(Config):
    slug: ClassVar[str] = "small"

    steps: int = option(40, "updates", minimum=1)
    lr: float = option(1e-3, "learning rate, per step", minimum=0.0)
    arm: str = option("full", "what is trained", choices=("full", "lora"))
    shots: tuple[int, ...] = option((4, 16), "examples per class", minimum=1)
    arms: tuple[str, ...] = option(("full",), "arms that are run", choices=("full", "lora", "prefix"))
    rates: tuple[float, ...] = option((), "rates; () = the paper's grid", minimum=0)
    size: int = option(2, "width in tens", choices=(2, 4))
    verbose: bool = option(False, "print every step")
    limit: int | None = option(None, "most examples; None = all")

    @classmethod
    def standard(cls, **overrides):
        return cls._made("standard", {"steps": 400}, overrides)


CHANGES = {
    "scale": "paper",
    "device": "cuda",
    "seed": 1,
    "steps": 41,
    "lr": 2e-3,
    "arm": "lora",
    "shots": (4,),
    "arms": ("full", "lora"),
    "rates": (1e-4,),
    "size": 4,
    "verbose": True,
    "limit": 10,
}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Small.at("stadard"), "unknown scale 'stadard': expected one of quick, standard, paper. Did you mean 'standard'?"),
        (lambda: Small.quick(device="gpu"), "unknown device 'gpu': expected one of auto, cpu, cuda."),
        (lambda: Small.quick(device="cud"), "unknown device 'cud': expected one of auto, cpu, cuda. Did you mean 'cuda'?"),
        (lambda: Small.quick(stepz=3), "chapter small has no setting 'stepz'. Did you mean 'steps'? Settings: scale, device, seed, steps, lr, "),
        (lambda: Small.quick(xyzzy=3), "chapter small has no setting 'xyzzy'. Settings: scale, device, "),
        (lambda: Small().replace(shotz=(1,)), "chapter small has no setting 'shotz'. Did you mean 'shots'?"),
        (lambda: Small.quick(arm="lorra"), "unknown arm 'lorra': expected one of full, lora. Did you mean 'lora'?"),
        (lambda: Small.quick(arms=("full", "prefixes")), "unknown arms 'prefixes': expected one of full, lora, prefix. Did you mean 'prefix'?"),
        (lambda: Small.quick(size=3), "unknown size 3: expected one of 2, 4."),
        (lambda: Small.quick(steps=0), "setting steps = 0 is too small: expected at least 1 (updates)."),
        (lambda: Small.quick(shots=(4, 0)), "setting shots = (4, 0) is too small: expected at least 1 (examples per class)."),
        (lambda: Small.quick(rates=(-1.0,)), "setting rates = (-1.0,) is too small: expected at least 0"),
        (lambda: Small.quick(seed=-1), "setting seed = -1 is too small: expected at least 0"),
        (lambda: Small.quick(lr=float("nan")), "setting lr = nan: expected a finite number (learning rate, per step)."),
        (lambda: Small.quick(rates=(1.0, float("inf"))), "setting rates = inf: expected a finite number"),
    ],
)  # fmt: skip
def test_values_that_are_not_allowed_are_refused_with_those_that_are(make, message):
    with pytest.raises(ValueError) as refused:
        make()
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("field", "value", "found", "wanted"),
    [
        ("steps", "many", "str", "int"),
        ("steps", 1.5, "float", "int"),
        ("steps", True, "bool", "int"),
        ("steps", (1, 2), "tuple", "int"),
        ("lr", "1e-3x", "str", "float"),
        ("lr", True, "bool", "float"),
        ("lr", None, "NoneType", "float"),
        ("arm", 3, "int", "str"),
        ("verbose", "true", "str", "bool"),
        ("verbose", 1, "int", "bool"),
        ("shots", ("a",), "str", "int"),
        ("shots", (4, 1.5), "float", "int"),
        ("shots", "few", "str", "int"),
        ("rates", ("fast",), "str", "float"),  # the default is empty: the annotation says what belongs there
        ("arms", (1,), "int", "str"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(field, value, found, wanted):
    with pytest.raises(TypeError, match=rf"setting {field} = .* is of kind {found}: expected {wanted} \("):
        Small.quick(**{field: value})


def test_kinds_that_mean_the_same_are_made_equal():
    given = Small.quick(steps=41.0, lr=1, shots=[8, 16.0], arms="lora", rates=(1,))
    assert (given.steps, given.lr, given.shots, given.arms, given.rates) == (
        41,
        1.0,
        (8, 16),
        ("lora",),
        (1.0,),
    )
    assert type(given.steps) is int and type(given.lr) is float and type(given.rates[0]) is float
    same = Small.quick(steps=41, lr=1.0, shots=(8, 16), arms=("lora",), rates=(1.0,))
    assert given == same and given.digest() == same.digest() and hash(given) == hash(same)


def test_every_scale_has_its_own_settings_and_overrides_win():
    assert (Small.quick().steps, Small.standard().steps, Small.standard(steps=7).steps) == (40, 400, 7)
    assert [Small.at(scale).scale for scale in lab.SCALES] == ["quick", "standard", "paper"]
    assert Small.standard(steps=400).changed() == {}
    assert Small.standard(steps=7, seed=2, shots=(1,)).changed() == {"steps": 7, "seed": 2, "shots": [1]}


def test_a_config_is_frozen_and_describes_itself():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Small().steps = 3
    described = {name: (default, help) for name, default, help in Small.describe()}
    assert set(described) == {field.name for field in dataclasses.fields(Small)}
    assert described["lr"] == (1e-3, "learning rate, per step")
    assert all(help for _, help in described.values())


def test_the_digest_changes_with_every_field():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Small)}
    plain = Small(device="cpu")
    digests = [
        plain.digest(),
        *(dataclasses.replace(plain, **{name: value}).digest() for name, value in CHANGES.items()),
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(d) == 10 and set(d) <= set("0123456789abcdef") for d in digests)


@pytest.mark.parametrize("cuda", [False, True])
def test_the_digest_sees_the_device_that_auto_stands_for(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    same, other = ("cuda", "cpu") if cuda else ("cpu", "cuda")
    assert Small.quick(device="auto").digest() == Small.quick(device=same).digest()
    assert Small.quick(device="auto").digest() != Small.quick(device=other).digest()


def test_cuda_without_cuda_is_refused_when_it_is_needed_and_not_before(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = Small.quick(device="cuda")
    assert (
        config.digest() == Small.quick(device="cuda", steps=40).digest()
    )  # a record of a GPU is recognised here
    for asked in (config.torch_device, lambda: resolve_device("cuda")):
        with pytest.raises(
            ValueError,
            match=r"device 'cuda' was asked for, but torch sees no CUDA device: use --device cpu \(or auto\)",
        ):
            asked()
    assert Small.quick().torch_device() == torch.device("cpu")


def test_the_digest_is_the_same_in_every_process_and_version():
    # Written down: a change of this number makes every committed record stale.
    assert Config(device="cpu").digest() == "a97dacc354"


def test_checked_choice_lists_what_there_is():
    assert checked_choice("method", "a", ("a", "b")) == "a"
    with pytest.raises(
        ValueError, match=r"unknown method 'fulll': expected one of full, lora\. Did you mean 'full'\?"
    ):
        checked_choice("method", "fulll", ("full", "lora"))
    with pytest.raises(ValueError, match=r"unknown method None: expected one of aa\."):
        checked_choice("method", None, ("aa",))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("x=40", 40),
        ("x=1e-3", 1e-3),
        ("x=-2", -2),
        ("x=True", True),
        ("x=None", None),
        ("x=full", "full"),
        ("x=1,4,16", (1, 4, 16)),
        ("x=1e-3,1e-2", (1e-3, 1e-2)),
        ("x=full,lora", ("full", "lora")),
        ("x=full,", ("full",)),
        ("x=(1, 4)", (1, 4)),
        ("x='1'", "1"),
        ("x=a=b", "a=b"),
        ("x= 3 ", 3),
        ("x=", ""),
        ("x=__import__('os')", "__import__('os')"),  # text, never run
    ],
)
def test_settings_are_literals_where_they_parse_and_text_elsewhere(word, value):
    assert parse_settings([word]) == {"x": value}


@pytest.mark.parametrize("word", ["steps", "=4", " =4", ""])
def test_a_setting_without_name_or_value_is_refused(word):
    with pytest.raises(ValueError, match="--set takes FIELD=VALUE, got .*: for example --set steps=40"):
        parse_settings([word])
