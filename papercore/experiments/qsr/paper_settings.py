"""Settings of the chapter's `paper` scale: the recipes of the official scripts at B = 4,096, and what may be changed about them."""

from __future__ import annotations

import dataclasses
from typing import Any

from papercore.lab.config import option

MODELS = ("vit-b", "resnet-152")
METHODS = ("parallel", "constant", "qsr")
DECAYS = ("cosine", "linear", "step", "cosine in powers of 2")


@dataclasses.dataclass(frozen=True)
class PaperRecipe:
    """One model's recipe.

    Attributes:
        epochs, batch: of the run; batch is the global one.
        warmup_steps: of the learning rate; 0 with `warmup_epochs` instead.
        peak: learning rate; alpha, h_base: of QSR, and the constant H that it is compared with.
        decay_parallel, decay_local: weight decay, on all parameters.
        smoothing: of labels; mixup: parameter of its beta distribution, 0 for none.
        clip: largest gradient norm of data parallel training (the local recipe has none).
        micro_batch: samples that go through the model at once; for batch norm also the samples of one estimate.
    """

    optimizer: str
    epochs: int
    batch: int
    warmup_steps: int
    warmup_epochs: int
    peak: float
    alpha: float
    h_base: int
    decay_parallel: float
    decay_local: float
    smoothing: float
    mixup: float
    clip: float
    micro_batch: int


# Seen in the official code and scripts, but for ResNet-152's alpha, which was picked so that a recalled volume comes out.
RECIPES = {
    "vit-b": PaperRecipe("adamw", 300, 4096, 10_000, 0, 0.008, 0.0175, 4, 0.1, 0.05, 0.0, 0.2, 1.0, 128),
    "resnet-152": PaperRecipe("sgd", 200, 4096, 0, 5, 0.8, 0.25, 4, 1e-4, 1e-4, 0.1, 0.0, 0.0, 32),
}


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """Fields that only `paper` reads; the chapter's Config inherits them. 0 and "" stand for the recipe's own value."""

    paper_model: str = option("vit-b", "ViT-B/16 with AdamW, or ResNet-152 with SGD", choices=MODELS)
    paper_size: str = option(
        "full", "tiny: a few thousand weights and small images, to try the path", choices=("full", "tiny")
    )
    paper_data: str = option(
        "",
        "folder with train/<class>/ and val/<class>/ images; empty: ILSVRC/imagenet-1k from the hub (gated)",
    )
    paper_methods: tuple[str, ...] = option(METHODS, "what to train", choices=METHODS)
    paper_seeds: tuple[int, ...] = option((0, 1, 2), "seeds of weights and samples", minimum=0)
    paper_decay: str = option("cosine", "decay of the learning rate", choices=DECAYS)
    paper_epochs: int = option(0, "epochs", minimum=0)
    paper_batch: int = option(0, "global batch, a multiple of the number of processes", minimum=0)
    paper_warmup_steps: int = option(0, "steps of warm-up", minimum=0)
    paper_peak: float = option(0.0, "peak learning rate", minimum=0.0)
    paper_alpha: float = option(0.0, "growth coefficient of QSR", minimum=0.0)
    paper_h_base: int = option(0, "shortest round of QSR, and the constant H", minimum=0)
    paper_micro_batch: int = option(0, "samples that go through the model at once", minimum=0)
    paper_batch_norm_batches: int = option(
        128, "micro-batches, over all processes, that batch-norm statistics are estimated from", minimum=1
    )
    paper_loaders: int = option(8, "loader processes of each process; 0: none", minimum=0)
    paper_precision: str = option(
        "bfloat16", "of the forward pass on CUDA (autocast)", choices=("bfloat16", "float32")
    )
    paper_evaluate_epochs: int = option(1, "epochs between two evaluations, made at averages", minimum=1)
    paper_checkpoint_steps: int = option(312, "steps between two checkpoints", minimum=1)
    paper_minutes: float = option(
        0.0, "stop after so many minutes, at an average, with the state kept; 0: never", minimum=0.0
    )

    def recipe(self) -> PaperRecipe:
        """The model's recipe with what was overridden."""
        given: dict[str, Any] = {
            "epochs": self.paper_epochs, "batch": self.paper_batch, "warmup_steps": self.paper_warmup_steps,
            "peak": self.paper_peak, "alpha": self.paper_alpha, "h_base": self.paper_h_base, "micro_batch": self.paper_micro_batch,
        }  # fmt: skip
        return dataclasses.replace(RECIPES[self.paper_model], **{k: v for k, v in given.items() if v})
