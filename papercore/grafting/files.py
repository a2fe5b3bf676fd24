"""Grafts as safetensors files.

One file holds for each tensor that the graft touches

    NAME.idx    int32 [k_name] flat indices, ascending (int64 for a tensor of more than 2^31 entries)
    NAME.val    [k_name] values, the dtype of the weights

and as metadata: format, version, entries, shapes, fingerprint (16 hexadecimal digits), base (shape, dtype and checksum
of each of the base's tensors) and what the caller adds. Shapes and base are JSON, deflated, in base64.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from papercore.grafting.fingerprint import Print, digest

if TYPE_CHECKING:
    from papercore.grafting.graft import Graft

FILE_NAME = "graft.safetensors"
_FORMAT, _VERSION = "papercore.grafting", "1"
_OURS = ("format", "version", "entries", "shapes", "fingerprint", "base")


def save_graft(graft: Graft, path: str | os.PathLike[str]) -> None:
    """Writes the graft, whole or not at all; an earlier graft at `path` is replaced, anything else is refused."""
    save_file = _safetensors().torch.save_file
    target = Path(path)
    _check_replaceable(target)
    clash = [key for key in graft.metadata if key in _OURS]
    if clash or not all(isinstance(v, str) for v in graft.metadata.values()):
        raise ValueError(
            f"metadata must map names other than {', '.join(_OURS)} to strings, got {graft.metadata!r}"
        )
    tensors = {}
    for name, index in graft.index.items():
        small = prod(graft.shapes[name]) <= 2**31
        tensors[f"{name}.idx"] = index.to("cpu", torch.int32 if small else torch.int64).contiguous()
        tensors[f"{name}.val"] = graft.values[name].detach().cpu().contiguous()
    metadata = {
        **graft.metadata,
        "format": _FORMAT,
        "version": _VERSION,
        "entries": str(len(graft)),
        "shapes": _pack({n: list(s) for n, s in graft.shapes.items()}),
    }
    if graft.base is not None:
        metadata["fingerprint"] = digest(graft.base)
        metadata["base"] = _pack(
            {n: [list(p.shape), p.dtype, f"{p.checksum:x}"] for n, p in graft.base.items()}
        )
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, draft, metadata=metadata)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def load_graft(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Graft:
    """The graft in a file; FileNotFoundError, or ValueError for a file that is none or is damaged."""
    from papercore.grafting.graft import Graft

    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    library = _safetensors()
    try:
        with library.safe_open(source, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{source}: not a safetensors file, or damaged ({error})") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{source}: a safetensors file, but not a graft (its metadata has no format={_FORMAT!r})"
        )
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{source}: a graft of format version {metadata.get('version')!r}, this one reads {_VERSION!r}"
        )
    shapes = {n: tuple(s) for n, s in _unpack(metadata["shapes"]).items()}
    index, values = {}, {}
    for name, shape in shapes.items():
        places, kept = tensors[f"{name}.idx"].long(), tensors[f"{name}.val"]
        ascending = bool((places[1:] > places[:-1]).all())
        if (
            len(places) != len(kept)
            or not ascending
            or (len(places) and not 0 <= int(places[0]) <= int(places[-1]) < prod(shape))
        ):
            raise ValueError(f"{source}: damaged, the indices of {name} do not fit its shape {shape}")
        index[name], values[name] = places.to(device), kept.to(device)
    base = None
    if "base" in metadata:
        base = {n: Print(tuple(s), d, int(c, 16)) for n, (s, d, c) in _unpack(metadata["base"]).items()}
    extra = {k: v for k, v in metadata.items() if k not in _OURS}
    return Graft(index, values, shapes, base=base, metadata=extra)


def _check_replaceable(path: Path) -> None:
    """ValueError if something stands at `path` that is no graft: nothing that was not written here is lost."""
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    if path.is_file():
        library = _safetensors()
        try:
            with library.safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") == _FORMAT:
                    return
        except library.SafetensorError:
            pass
    raise ValueError(f"{path} exists and is not a graft: it is not replaced; give the path of a new file")


def _pack(content: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)).decode()


def _unpack(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(text)))


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("grafts are stored as safetensors files: pip install safetensors") from None
    return safetensors
