"""The auxiliary models of the `standard` scale: GPTs of the project's own, trained here on free text, one a seed.

Glossary
    stream    the training tokens behind one another
    window    `context` consecutive tokens of the stream; a step sees `batch` of them, drawn from (seed, step) alone
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papercore.experiments.tint.standard_forms import Form
from papercore.lab.training import Checkpoint, backward_step, train, warmup_linear
from papercore.tint import TinyGPT, TinyGPTConfig

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1  # on matrices alone


def new_model(form: Form, seed: int, device: torch.device) -> TinyGPT:
    """An untrained model in eval mode."""
    config = TinyGPTConfig(
        vocab_size=form.vocabulary, n_positions=form.context, n_layer=form.layers, n_embd=form.width, n_head=form.heads
    )  # fmt: skip
    return TinyGPT(config, generator=torch.Generator().manual_seed(seed)).to(device).eval()


def model_from(form: Form, part: dict[str, Any], device: torch.device) -> TinyGPT:
    """The trained model of a finished part, in float32: finite differences need it."""
    model = new_model(form, 0, device)
    model.load_state_dict(
        {k.removeprefix("w:"): torch.from_numpy(v) for k, v in part.items() if k.startswith("w:")}
    )
    return model.eval()


def windows(stream: NDArray[np.uint16], form: Form, seed: int, step: int) -> Tensor:
    """The windows [batch, context] of one step."""
    starts = np.random.default_rng([seed, step]).integers(len(stream) - form.context + 1, size=form.batch)
    return torch.from_numpy(
        np.stack([stream[start : start + form.context] for start in starts]).astype(np.int64)
    )


def trained_part(
    form: Form, seed: int, stream: NDArray[np.uint16], device: torch.device, *, folder: Path, every: int
) -> dict[str, Any]:
    """Train one model: weights under "w:", the training losses; a stopped run goes on from `folder`.

    Raises:
        ValueError: the stream is shorter than one window.
        FloatingPointError: a loss is not finite.
    """
    if len(stream) < form.context:
        raise ValueError(
            f"{len(stream)} training tokens are fewer than one window of {form.context}: add corpora."
        )
    model = new_model(form, seed, device).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=form.lr, betas=BETAS)

    def loss(step: int) -> Tensor:
        ids = windows(stream, form, seed, step).to(device)
        half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
        with half:
            value = model(ids, labels=ids).loss
        assert value is not None
        return value

    lr = warmup_linear(form.lr, form.train_steps, warmup=form.warmup)
    checkpoint = Checkpoint(folder / "state.pt", every, {"model": model, "optimizer": optimizer})
    losses = train(
        backward_step(loss, optimizer, lr=lr, clip=1.0),
        form.train_steps,
        text=f"auxiliary {seed}",
        checkpoint=checkpoint,
    )
    weights = {f"w:{k}": v.float().cpu().numpy() for k, v in model.state_dict().items()}
    return {"losses": np.array(losses, dtype=np.float32), **weights}
