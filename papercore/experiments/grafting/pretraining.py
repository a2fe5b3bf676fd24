"""The pre-trained weights of the chapter and how they come to be.

    python -m papercore.experiments.grafting.pretraining

trains them (about two minutes of one core) and writes `pretrained.safetensors` beside this file, in bfloat16. A run loads that file: what it
measures is about fine-tuning, and every seed fine-tunes the same weights, as every user of a published model does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from papercore.experiments.grafting.encoder import Encoder
from papercore.experiments.grafting.world import VOCABULARY, pretraining_batch
from papercore.lab.progress import progress

WEIGHTS = Path(__file__).with_name("pretrained.safetensors")
STEPS, BATCH, LR, SEED = 3000, 48, 4e-3, 0


FIRST, LAST = (
    10,
    50,
)  # steps whose mean loss the file keeps: a test repeats the first, and measures the last again


def pretrain(
    steps: int = STEPS, batch: int = BATCH, lr: float = LR, seed: int = SEED, *, until: int | None = None
) -> tuple[Encoder, list[float]]:
    """Masked language modelling with AdamW and a one-cycle rate; the model and the loss of every step.

    until: stop after so many of the steps.
    """
    model = Encoder(generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng([seed, 1])
    losses = []
    for _ in progress(range(steps if until is None else until), "pre-training"):
        ids, targets = pretraining_batch(batch, rng)
        loss = F.cross_entropy(model(ids, at=None).view(-1, VOCABULARY), targets.view(-1), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return model, losses


def pretrained(path: Path = WEIGHTS) -> Encoder:
    """The model with the weights of the file, in float32.

    Raises:
        ValueError: the file is missing.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(
            f"{path.name} is missing: make it with `python -m papercore.experiments.grafting.pretraining`."
        )
    model = Encoder(generator=torch.Generator().manual_seed(SEED))
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval()


def recorded(path: Path = WEIGHTS) -> dict[str, float]:
    """What the file says of its own making: steps, batch, lr, seed, mean loss of the first and of the last steps."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: float(text) for name, text in (file.metadata() or {}).items()}


def save(model: Encoder, first: float, last: float, path: Path = WEIGHTS) -> None:
    """Write the weights in bfloat16 with a note on how they were made."""
    from safetensors.torch import save_file

    made = {"steps": STEPS, "batch": BATCH, "lr": LR, "seed": SEED, "first_loss": first, "last_loss": last}
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, path, metadata={k: f"{v:.6g}" for k, v in made.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained, losses_made = pretrain()
    save(trained, float(np.mean(losses_made[:FIRST])), float(np.mean(losses_made[-LAST:])))
    print(
        f"loss {np.mean(losses_made[:FIRST]):.2f} to {np.mean(losses_made[-LAST:]):.2f}, {WEIGHTS.stat().st_size / 1e3:.0f} kB"
    )
