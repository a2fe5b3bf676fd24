"""Settings of the chapter's `standard` scale, in two forms: the full one for a GPU, and a reduced one that a CPU finishes.

Which form a run has is a setting (`standard_form`); "auto" is the full one on CUDA and the reduced one on a CPU. Every number of
a form can be overridden by the setting of the same name: 0, or an empty list, stands for the form's own value.
"""

from __future__ import annotations

import dataclasses

from papercore.experiments.qsr.standard_forms import FULL, REDUCED, Form
from papercore.lab.config import option, resolve_device

FORMS = ("auto", "full", "reduced")


@dataclasses.dataclass(frozen=True)
class StandardSettings:
    """Fields that only `standard` reads; the chapter's Config inherits them."""

    standard_form: str = option(
        "auto", "full (for a GPU) or reduced (for a CPU); auto by the device", choices=FORMS
    )
    standard_data: str = option("cifar10", "image set: columns img and label")
    standard_parts: tuple[str, ...] = option(
        ("clean", "noisy", "shorter", "clock"),
        "what to run: the grid with clean labels, with label noise, shorter runs, real processes timed",
        choices=("clean", "noisy", "shorter", "clock"),
    )
    standard_clock_steps: int = option(120, "steps of a timed run of two processes", minimum=20)
    standard_clock_repeats: int = option(30, "times that every schedule is timed", minimum=1)
    standard_checkpoint: int = option(500, "steps between two saves inside a run", minimum=1)
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
    standard_steps: int = option(0, "steps of a run (T)", minimum=0)
    standard_warmup: int = option(0, "steps of warm-up", minimum=0)
    standard_lr: float = option(0.0, "peak learning rate", minimum=0.0)
    standard_momentum: float = option(0.0, "momentum of SGD", minimum=0.0)
    standard_decay: float = option(0.0, "weight decay, not on norms and biases", minimum=0.0)
    standard_periods: tuple[int, ...] = option((), "constant H", minimum=2)
    standard_alphas: tuple[float, ...] = option(
        (), "growth coefficients of QSR over the peak rate", minimum=0.0
    )
    standard_h_base: int = option(0, "shortest round of the rules", minimum=0)
    standard_beta: float = option(0.0, "coefficient of the 1/eta rule over the peak rate", minimum=0.0)
    standard_rho: float = option(0.0, "coefficient of the cubic rule over the peak rate", minimum=0.0)
    standard_switch: float = option(
        0.0, "share of the run before post-local SGD and SWAP go local", minimum=0.0
    )
    standard_post_h: int = option(0, "H of post-local SGD after the switch", minimum=0)
    standard_flips: float = option(0.0, "share of labels redrawn at each step (noisy part)", minimum=0.0)
    standard_short: float = option(0.0, "length of the short runs, as a share of T", minimum=0.0)
    standard_middle: float = option(0.0, "length of the middle runs, as a share of T", minimum=0.0)
    standard_measure: int = option(0, "steps between two measurements of accuracy", minimum=0)
    standard_sharpness: int = option(0, "steps between two measurements of the Hessian", minimum=0)
    standard_probes: int = option(0, "random probes of the trace", minimum=0)

    def form(self) -> Form:
        """The numbers of this run: the form's own, with what was overridden."""
        name = self.standard_form
        if name == "auto":
            name = "full" if resolve_device(self.device) == "cuda" else "reduced"  # type: ignore[attr-defined]
        own = FULL if name == "full" else REDUCED
        given = {f.name: getattr(self, f"standard_{f.name}") for f in dataclasses.fields(Form)}
        return dataclasses.replace(own, **{k: v for k, v in given.items() if v not in (0, 0.0, ())})
