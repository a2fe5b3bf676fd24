"""Memory and step time of a large decoder with random weights: two forward passes, a MeZO step, an Adam step.

Memory and time of a step do not depend on what the weights are, so nothing is downloaded. Measured on CUDA by torch's own
allocator (`max_memory_allocated`, which leaves out the CUDA context); on a CPU only times and the closed form are filled in.

    inference   half-precision weights, two forward passes without gradients
    mezo        the same weights, one step of MeZO (which makes two forward passes)
    adam        float32 weights, gradients and two moments, forward and backward under bfloat16 autocast
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from papercore.mezo import MeZO, memory_model

if TYPE_CHECKING:
    from transformers import OPTConfig, OPTForCausalLM

METHODS = ("inference", "mezo", "adam")

# layers, width, heads of the OPT family; vocabulary 50,272 and 2,050 positions throughout
SIZES: dict[str, tuple[int, int, int]] = {
    "opt-1.3b": (24, 2048, 32),
    "opt-2.7b": (32, 2560, 32),
    "opt-6.7b": (32, 4096, 32),
    "opt-13b": (40, 5120, 40),
}

# Sequences and tokens: one long text, as the paper measures memory; a batch of short ones, as its classification tasks have.
SHAPES = ((1, 400), (16, 64))


def decoder_config(size: str) -> OPTConfig:
    """The `transformers` configuration of one size of the OPT family, dropout off."""
    from transformers import OPTConfig

    if size not in SIZES:
        raise ValueError(f"unknown decoder {size!r}: expected one of {', '.join(SIZES)}")
    layers, width, heads = SIZES[size]
    return OPTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_attention_heads=heads,
        dropout=0.0,
        attention_dropout=0.0,
    )


def measure_footprint(
    decoder: str | OPTConfig,
    device: torch.device,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    methods: Sequence[str] = METHODS,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """One row for each method and shape: method, batch, tokens, parameters, bytes (None on a CPU), modelled, seconds.

    Seconds are the median of `repeats` steps after two that are not counted.
    """
    config = decoder_config(decoder) if isinstance(decoder, str) else decoder
    rows = []
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: expected some of {', '.join(METHODS)}")
        dtype = (
            torch.float32
            if method == "adam"
            else (torch.float16 if device.type == "cuda" else torch.bfloat16)
        )
        for batch, tokens in shapes:
            _reset(device)
            model = _random_decoder(config, dtype, device)
            parameters = sum(p.numel() for p in model.parameters())
            ids = torch.randint(
                4, config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0)
            ).to(device)
            step = _stepper(method, model, ids)
            seconds = _seconds(step, device, repeats)
            rows.append(
                {
                    "method": method,
                    "batch": batch,
                    "tokens": tokens,
                    "parameters": parameters,
                    "bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
                    "modelled": float(memory_model(parameters, method, dtype_bytes=2)),
                    "seconds": seconds,
                }
            )
            del model, step
    _reset(device)
    return rows


def _random_decoder(config: OPTConfig, dtype: torch.dtype, device: torch.device) -> OPTForCausalLM:
    """Made on the device in its final dtype: a detour over float32 would set the peak."""
    from transformers import OPTForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            return OPTForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _stepper(method: str, model: OPTForCausalLM, ids: torch.Tensor) -> Callable[[], Any]:
    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    if method == "inference":

        @torch.no_grad()
        def forwards() -> tuple[float, float]:
            return float(loss()), float(loss())

        return forwards
    if method == "mezo":
        mezo = MeZO(model.parameters(), lr=1e-7, eps=1e-3)
        return lambda: mezo.step(loss)
    adam = torch.optim.Adam(model.parameters(), lr=1e-6)

    def backward() -> float:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            value = loss()
        value.backward()
        adam.step()
        return float(value.detach())

    return backward


def _seconds(step: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return sorted(times[2:])[repeats // 2]


def _reset(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
