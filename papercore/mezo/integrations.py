"""LoRA and prefix tuning through peft, with the paper's settings (section 3; table 17).

MeZO trains whatever requires a gradient, so an adapter needs nothing but its usual wrapper; what matters is
the start. A prefix starts from the keys and values of real tokens, which the paper finds crucial for
stability (table 17), and the size of the perturbation differs by adapter: `default_eps`.

peft is imported when a function is called. Install it with the extra `hf`.

Glossary
    r, alpha    LoRA: W x + (alpha / r) B A x, A [r, in] random, B [out, r] zero
    tokens      length of the prefix: keys and values prepended in every layer
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from papercore.mezo.arguments import check_choice, check_number, check_positive_integer

# Perturbation by what is trained, from the paper's grids for OPT. With LoRA on RoBERTa-large it used 1e-3.
DEFAULT_EPS = {"full": 1e-3, "lora": 1e-2, "prefix": 1e-1}


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise ImportError("adapters need peft: pip install 'papercore[hf]'") from None


@contextmanager
def _own_random_state(model: nn.Module, seed: int) -> Iterator[None]:
    """peft draws the adapter's weights from the global generators: seeded here, and put back afterwards."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    targets: Sequence[str] | str | None = None,
    *,
    seed: int = 0,
) -> Any:
    """Wraps `model` with LoRA of rank r on the named linear layers, no dropout; everything else is frozen.

    targets: names or last parts of names; None takes peft's table for known model types (query and value
    projections for OPT, RoBERTa and LLaMA, as in the paper). B starts at zero, so the wrapped model computes
    what the base does; A is drawn from `seed`, without moving the global generators. Returns the PeftModel.

    Raises ImportError without peft, ValueError if nothing is targeted.

    >>> from torch import nn
    >>> wrapped = lora(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), r=2, targets=["0"])
    >>> sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    16
    """
    peft = _peft()
    r, alpha = check_positive_integer("r", r), check_number("alpha", alpha, above=0.0)
    if targets is None and _model_type(model) is None:
        raise ValueError(
            f"targets=None needs a transformers model of a known type; name the linear layers of {type(model).__name__} to "
            f"adapt, for example {sorted(_linear_names(model))[:6]}"
        )
    # peft keeps alpha / r as it is given; an integer alpha stays one in the saved configuration.
    config = peft.LoraConfig(
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        bias="none",
    )
    with _own_random_state(model, seed), warnings.catch_warnings():
        # GPT-2 keeps its weights transposed; peft adapts to that and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        return peft.get_peft_model(model, config)


@torch.no_grad()
def prefix(model: nn.Module, tokens: int = 5, init: str = "activation", *, seed: int = 0) -> Any:
    """Wraps a causal language model of transformers with a trained prefix of keys and values in every layer.

    init: "activation" runs `tokens` random vocabulary tokens through the model and starts from their keys and
    values (appendix E.5 of the paper); "random" leaves peft's normal draws. Both use `seed` and leave the
    global generators as they were. No re-parameterisation. Returns the PeftModel, whose only trained weight
    is [tokens, layers * 2 * width].

    Raises ImportError without peft, ValueError for a model that is no causal language model with a key-value
    cache.
    """
    peft = _peft()
    tokens = check_positive_integer("tokens", tokens)
    check_choice("init", init, ("activation", "random"))
    config = getattr(model, "config", None)
    if (
        _model_type(model) is None
        or getattr(config, "is_encoder_decoder", False)
        or not hasattr(model, "generate")
    ):
        raise ValueError(
            f"prefix tuning prepends keys and values to the cache of a causal language model of transformers; "
            f"{type(model).__name__} is none: use lora() for it"
        )
    activations = _activations(model, tokens, seed) if init == "activation" else None
    with _own_random_state(model, seed):
        wrapped = peft.get_peft_model(
            model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
        )
    if activations is not None:
        weight = wrapped.prompt_encoder[wrapped.active_adapter].embedding.weight
        if activations.shape != weight.shape:
            raise ValueError(
                f"the keys and values of {type(model).__name__} have shape {tuple(activations.shape)} and peft's prefix "
                f"{tuple(weight.shape)}: pass init='random'"
            )
        weight.copy_(activations)
    return wrapped


def _activations(model: nn.Module, tokens: int, seed: int) -> Tensor:
    """Keys and values of random tokens, [tokens, layers * 2 * heads * head width], as peft unpacks them."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    ids = torch.randint(config.get_text_config().vocab_size, (1, tokens), generator=generator).to(device)
    training = model.training
    model.eval()
    try:
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    finally:
        model.train(training)
    if cache is None:
        raise ValueError(
            f"{type(model).__name__} returns no key-value cache to start a prefix from: pass init='random'"
        )
    rows = []
    for keys, values in _layers(cache):
        for part in (keys, values):  # each [1, heads, tokens, head width]
            rows.append(part[0].transpose(0, 1).reshape(tokens, -1))
    return torch.cat(rows, dim=1)


def _layers(cache: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(keys, values) of every layer, from a cache object or the tuples of older models."""
    if hasattr(cache, "layers"):
        for layer in cache.layers:
            yield layer.keys, layer.values
    else:
        for entry in cache:
            yield entry[0], entry[1]


def adapter_kind(model: nn.Module) -> str:
    """ "full", "lora" or "prefix", by the configuration that peft left on the model.

    >>> adapter_kind(nn.Linear(2, 2))
    'full'
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return "full"
    kind = str(next(iter(configs.values())).peft_type).rsplit(".", 1)[-1].upper()
    return {"LORA": "lora", "PREFIX_TUNING": "prefix"}.get(kind, "full")


def default_eps(model: nn.Module) -> float:
    """The perturbation that the paper used for what is trained here: 1e-3 full, 1e-2 LoRA, 1e-1 prefix.

    Raises ValueError for LoRA whose B is frozen: B starts at zero, so without it the loss does not depend on
    A.

    >>> default_eps(nn.Linear(2, 2))
    0.001
    """
    kind = adapter_kind(model)
    if kind == "lora":
        frozen = [n for n, p in model.named_parameters() if "lora_B" in n and not p.requires_grad]
        if frozen:
            raise ValueError(
                f"{frozen[0]} is frozen: while B is zero the loss does not depend on A, and nothing is learned"
            )
    return DEFAULT_EPS[kind]


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _linear_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name}
