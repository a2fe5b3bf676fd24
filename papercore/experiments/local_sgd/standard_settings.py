"""Settings of the chapter's `standard` scale, in two forms: the full one for a GPU, and a reduced one that a CPU finishes.

Which form a run has is a setting (`standard_form`); "auto" is the full one on CUDA and the reduced one on a CPU. Every number of
a form can be overridden by the setting of the same name: 0, or an empty list, stands for the form's own value.
"""

from __future__ import annotations

import dataclasses

from papercore.experiments.local_sgd.standard_forms import FULL, REDUCED, Form
from papercore.lab.config import option, resolve_device

FORMS = ("auto", "full", "reduced")


@dataclasses.dataclass(frozen=True)
class StandardSettings:
    """Fields that only `standard` reads; the chapter's Config inherits them."""

    standard_form: str = option(
        "auto", "full (for a GPU) or reduced (for a CPU); auto by the device", choices=FORMS
    )
    standard_data: str = option("cifar10", "image set: columns img and label")
    standard_tuning: bool = option(
        False, "only the first H of each part, on seeds from 100: for choosing settings"
    )
    standard_checkpoint: int = option(200, "steps between two saves inside a run", minimum=1)
    standard_train_images: int = option(
        0, "training images; 0: the form's own, as in all fields below", minimum=0
    )
    standard_test_images: int = option(0, "test images", minimum=0)
    standard_pool: int = option(0, "side of the squares of pixels averaged to one", minimum=0)
    standard_depth: int = option(0, "layers of the residual network, 6n + 2", minimum=0)
    standard_width: int = option(0, "channels of its first stage", minimum=0)
    standard_workers: int = option(0, "workers K", minimum=0)
    standard_local_batch: int = option(0, "images of one worker and step", minimum=0)
    standard_seeds: tuple[int, ...] = option((), "seeds of weights, samples and noise", minimum=0)
    standard_start_steps: int = option(0, "steps of phase 1", minimum=0)
    standard_start_lr: float = option(0.0, "learning rate of phase 1", minimum=0.0)
    standard_post_steps: int = option(0, "steps of phase 2", minimum=0)
    standard_lr: float = option(0.0, "learning rate of phase 2", minimum=0.0)
    standard_periods: tuple[int, ...] = option((), "local steps H of phase 2", minimum=2)
    standard_large_times: float = option(
        0.0, "condition 1: phase 2 at a rate so many times larger", minimum=0.0
    )
    standard_large_steps: int = option(0, "its steps", minimum=0)
    standard_large_period: int = option(0, "its H", minimum=0)
    standard_noise_start_steps: int = option(0, "label noise: steps of phase 1", minimum=0)
    standard_noise_start_lr: float = option(0.0, "label noise: learning rate of phase 1", minimum=0.0)
    standard_noise_steps: int = option(0, "label noise: steps of phase 2", minimum=0)
    standard_noise_lr: float = option(0.0, "label noise: learning rate of phase 2", minimum=0.0)
    standard_noise_periods: tuple[int, ...] = option((), "label noise: local steps H", minimum=2)
    standard_flips: float = option(0.0, "label noise: share of labels redrawn at each step", minimum=0.0)
    standard_decay: float = option(0.0, "weight decay, not on norms and biases", minimum=0.0)
    standard_measure: int = option(0, "steps between two measurements of accuracy", minimum=0)
    standard_sharpness: int = option(0, "steps between two measurements of the Hessian", minimum=0)
    standard_sharpness_images: int = option(0, "training images for the Hessian", minimum=0)
    standard_probes: int = option(0, "random probes of the trace", minimum=0)
    standard_products: int = option(0, "most Hessian products for the largest eigenvalue", minimum=0)

    def form(self) -> Form:
        """The numbers of this run: the form's own, with what was overridden."""
        name = self.standard_form
        if name == "auto":
            name = "full" if resolve_device(self.device) == "cuda" else "reduced"  # type: ignore[attr-defined]
        own = FULL if name == "full" else REDUCED
        given = {f.name: getattr(self, f"standard_{f.name}") for f in dataclasses.fields(Form)}
        return dataclasses.replace(own, **{k: v for k, v in given.items() if v not in (0, 0.0, ())})
