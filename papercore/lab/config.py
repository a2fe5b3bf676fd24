"""Settings of a chapter: one frozen dataclass, three sizes, and errors that say what is allowed.

A chapter subclasses `Config`, gives every field a default and a line of help through `option`, and overrides `standard` and
`paper` where those sizes differ from `quick`. Everything that changes a result is a field, so that the digest of a config
names its result.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    import torch

SCALES = ("quick", "standard", "paper")
DEVICES = ("auto", "cpu", "cuda")


def option(
    default: Any, help: str, *, choices: Iterable[Any] | None = None, minimum: float | None = None
) -> Any:
    """A dataclass field with a help line (unit or meaning) and, optionally, the values that are allowed.

    Lists are stored as tuples, so that a config stays hashable.
    """
    metadata = {"help": help, "choices": None if choices is None else tuple(choices), "minimum": minimum}
    return dataclasses.field(default=default, metadata=metadata)


def suggest(given: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no allowed name is close."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def checked_choice(kind: str, given: Any, allowed: Iterable[Any]) -> str:
    """`given` if it is one of `allowed`; else ValueError that lists them."""
    values = list(allowed)
    if given in values:
        return str(given)
    names = [str(value) for value in values]
    raise ValueError(
        f"unknown {kind} {given!r}: expected one of {', '.join(names)}.{suggest(str(given), names)}"
    )


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda"; ValueError when CUDA is asked for and absent."""
    checked_choice("device", device, DEVICES)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device 'cuda' was asked for, but torch sees no CUDA device: use --device cpu (or auto), or install a CUDA build of torch."
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings common to every chapter; subclasses add their own with `option`.

    A chapter's class names its `slug`. A scale with other fields has a subclass of that, `class StandardConfig(Config,
    scale="standard")`, which `standard()` then returns.

    Raises:
        ValueError: an unknown scale, device or field, or a value outside what its field allows.
        TypeError: a value of the wrong kind for its field.
    """

    slug: ClassVar[str] = ""
    # Of a chapter: the class of each scale that has fields of its own.
    scale_classes: ClassVar[dict[str, type[Config]]] = {}

    scale: str = option("quick", "size of the run", choices=SCALES)
    device: str = option("auto", "where tensors live; auto takes CUDA when there is one", choices=DEVICES)
    seed: int = option(0, "added to every seed of the run", minimum=0)

    def __init_subclass__(cls, *, scale: str | None = None, **others: Any) -> None:
        super().__init_subclass__(**others)
        if "slug" in cls.__dict__:
            cls.scale_classes = {}
        if scale is not None:
            cls.scale_classes[checked_choice("scale", scale, SCALES)] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _coerced(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def quick(cls, **overrides: Any) -> Self:
        """Two CPU cores, no network, two minutes."""
        return cls._made("quick", {}, overrides)

    @classmethod
    def standard(cls, **overrides: Any) -> Self:
        """One GPU, or some CPU hours; real data."""
        return cls._made("standard", {}, overrides)

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """The paper's own models and data."""
        return cls._made("paper", {}, overrides)

    @classmethod
    def at(cls, scale: str, **overrides: Any) -> Self:
        """The config of a scale by its name."""
        return getattr(cls, checked_choice("scale", scale, SCALES))(**overrides)

    @classmethod
    def _made(cls, scale: str, settings: dict[str, Any], overrides: dict[str, Any]) -> Self:
        made: type[Any] = cls.scale_classes.get(scale, cls)
        made.check_fields(overrides)
        return made(**{**settings, **overrides, "scale": scale})

    @classmethod
    def check_fields(cls, names: Iterable[str]) -> None:
        """ValueError that names the first unknown field and the closest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in names:
            if name not in known:
                raise ValueError(
                    f"chapter {cls.slug or cls.__name__} has no setting {name!r}.{suggest(name, known)} Settings: {', '.join(known)}."
                )

    def replace(self, **overrides: Any) -> Self:
        """A copy with some fields changed, checked as at construction."""
        self.check_fields(overrides)
        return dataclasses.replace(self, **overrides)

    def as_dict(self) -> dict[str, Any]:
        """Fields as JSON-able values (tuples become lists)."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def digest(self) -> str:
        """Ten hex digits over every field, the device resolved: it names the result of a run."""
        # A device named outright is taken at its word: a record from a GPU must be recognised on a machine without one.
        fields = {
            **self.as_dict(),
            "device": resolve_device("auto") if self.device == "auto" else self.device,
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]

    def torch_device(self) -> torch.device:
        """The device that tensors of this run live on."""
        import torch

        return torch.device(resolve_device(self.device))

    def changed(self) -> dict[str, Any]:
        """Fields that differ from the defaults of this scale."""
        plain = type(self).at(self.scale).as_dict()
        return {k: v for k, v in self.as_dict().items() if plain[k] != v}

    @classmethod
    def describe(cls) -> list[tuple[str, Any, str]]:
        """(name, default, help) of every field, for `papercore list` and the notebooks."""
        return [(f.name, f.default, f.metadata.get("help", "")) for f in dataclasses.fields(cls)]


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`["steps=40", "lr=1e-3", "arms=full,lora"]` as {name: value}; literals where they parse, else text.

    >>> parse_settings(["steps=40", "arms=full,lora", "note=hello"])
    {'steps': 40, 'arms': ('full', 'lora'), 'note': 'hello'}
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set takes FIELD=VALUE, got {pair!r}: for example --set steps=40.")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parts = tuple(part.strip() for part in text.split(",") if part.strip())
            value = parts if "," in text else text
        out[name.strip()] = value
    return out


def _coerced(field: dataclasses.Field[Any], value: Any) -> Any:
    """The value in the kind of its field's default, checked against choices and minimum."""
    default, meta = field.default, field.metadata
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(default, tuple):
        kind = _kind_of_elements(field)
        several = value if isinstance(value, tuple) else (value,)
        value = tuple(_of_kind(field, one, kind) for one in several)
    elif default is not None:
        value = _of_kind(field, value, type(default))
    for one in value if isinstance(value, tuple) else (value,):
        if one is None:
            continue
        if meta.get("choices") is not None:
            checked_choice(field.name, one, meta["choices"])
        if meta.get("minimum") is not None and one < meta["minimum"]:
            raise ValueError(
                f"setting {field.name} = {value!r} is too small: expected at least {meta['minimum']} ({meta.get('help', '')})."
            )
    return value


def _kind_of_elements(field: dataclasses.Field[Any]) -> type | None:
    """The kind of a tuple field's elements, from its default or, when that is empty, from its annotation; None when mixed."""
    kinds = {type(one) for one in field.default}  # type: ignore[union-attr]
    if kinds:
        return kinds.pop() if len(kinds) == 1 else None
    written = re.fullmatch(r"tuple\[(int|float|str|bool), \.\.\.\]", str(field.type))
    return {"int": int, "float": float, "str": str, "bool": bool}[written[1]] if written else None


def _of_kind(field: dataclasses.Field[Any], value: Any, wanted: type | None) -> Any:
    """The value as a `wanted`: 3 for 3.0 and the other way round, a tuple for a list, else TypeError."""
    if wanted is tuple and isinstance(value, list):
        value = tuple(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if wanted is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    help = field.metadata.get("help", "")
    if wanted is not None and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
        raise TypeError(
            f"setting {field.name} = {value!r} is of kind {type(value).__name__}: expected {wanted.__name__} ({help})."
        )
    if isinstance(value, float) and not math.isfinite(value):
        # A digest and a record are JSON, which has no such number.
        raise ValueError(f"setting {field.name} = {value!r}: expected a finite number ({help}).")
    return value
