"""MeZO: fine-tuning with forward passes alone (Malladi et al., 2023, arXiv 2305.17333).

MeZO                the optimiser                  optimizer.py, moves.py (the additions),
                                                   history.py (momentum and Adam)
ZOLog, replay       a run as a seed and scalars    log.py, seeds.py, replay.py
noise, add_noise_   noise from counters            noise.py, philox.py, _torch.py, _numba.py, _triton.py
spsa_grad, ...      estimates written out          estimators.py
memory_model, ...   memory in closed form          memory.py
lora, prefix        adapters through peft          integrations.py (peft comes with the first call)
MeZOTrainer         transformers.Trainer           trainer.py (imported on first use)
"""

from typing import TYPE_CHECKING, Any

from papercore.mezo.estimators import EffectiveRank, effective_rank, gradient_norms, one_point_grad, spsa_grad
from papercore.mezo.integrations import DEFAULT_EPS, default_eps, lora, prefix
from papercore.mezo.log import ZOLog
from papercore.mezo.memory import (
    checkpoint_bytes,
    decoder_parameters,
    devices_needed,
    lora_parameters,
    memory_model,
    prefix_parameters,
)
from papercore.mezo.noise import MissingBackend, add_noise_, noise, resolve_backend
from papercore.mezo.optimizer import MeZO
from papercore.mezo.replay import AnotherBase, replay
from papercore.mezo.seeds import draw_seed

if TYPE_CHECKING:
    from papercore.mezo.trainer import MeZOTrainer as MeZOTrainer

__all__ = [
    "DEFAULT_EPS",
    "AnotherBase",
    "EffectiveRank",
    "MeZO",
    "MissingBackend",
    "ZOLog",
    "add_noise_",
    "checkpoint_bytes",
    "decoder_parameters",
    "default_eps",
    "devices_needed",
    "draw_seed",
    "effective_rank",
    "gradient_norms",
    "lora",
    "lora_parameters",
    "memory_model",
    "noise",
    "one_point_grad",
    "prefix",
    "prefix_parameters",
    "replay",
    "resolve_backend",
    "spsa_grad",
]


def __getattr__(name: str) -> Any:
    # transformers is imported with the name that needs it, so that the kernel imports torch alone.
    if name == "MeZOTrainer":
        from papercore.mezo.trainer import MeZOTrainer

        return MeZOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
