"""A bottleneck as one safetensors file: projection, keys, values, masks, the audit log, and as metadata the sizes to rebuild it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from papercore.unlearning.bottleneck import KeyValueBottleneck

__all__ = ["load_bottleneck", "save_bottleneck"]

_FORMAT, _VERSION = "papercore.unlearning", "1"
_SIZES = ("dim", "num_codebooks", "num_pairs", "dim_key", "dim_value", "seed", "abstain")


def save_bottleneck(model: KeyValueBottleneck, path: str | os.PathLike[str]) -> None:
    """Writes the bottleneck, whole or not at all. A file that is there is replaced if it is a bottleneck, else ValueError.

    A masked pair is stored as it is, with its key and value, and can be unmasked after loading; so call `erase` or `compact`
    before sharing a file from which something is to be gone.
    """
    library = _safetensors()
    target = Path(path)
    if target.exists() and not (target.is_file() and _metadata(target).get("format") == _FORMAT):
        raise ValueError(
            f"{target} exists and is not a bottleneck: it is not replaced; give the path of a new file"
        )
    settings = {name: getattr(model, name) for name in _SIZES} | {"projection": model.projection_kind}
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "settings": json.dumps(settings),
        "status": model.status,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        library.torch.save_file(tensors, draft, metadata=metadata)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def load_bottleneck(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> KeyValueBottleneck:
    """The bottleneck in a file; FileNotFoundError, or ValueError for a file that is none or is damaged."""
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    library = _safetensors()
    metadata = _metadata(source)
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{source}: not a bottleneck's safetensors file (its metadata has no format={_FORMAT!r}), or damaged"
        )
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{source}: a bottleneck of format version {metadata.get('version')!r}, this one reads {_VERSION!r}"
        )
    try:
        tensors = library.torch.load_file(source)
        model = KeyValueBottleneck(**json.loads(metadata["settings"]))
        dtype = tensors["values"].dtype
        model.to(dtype).load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError, library.SafetensorError) as error:
        raise ValueError(f"{source}: damaged ({error})") from None
    return model.to(device)


def _metadata(path: Path) -> dict[str, str]:
    library = _safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except library.SafetensorError:
        return {}


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("bottlenecks are stored as safetensors files: pip install safetensors") from None
    return safetensors
