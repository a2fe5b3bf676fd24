"""Settings of the chapter's `standard` scale, in two forms: the full one for a GPU, and a reduced one that a CPU finishes.

Which form a run has is a setting (`standard_form`); "auto" is the full one on CUDA and the reduced one on a CPU. Every number of
a form can be overridden by the setting of the same name: 0, or an empty list, stands for the form's own value.
"""

from __future__ import annotations

import dataclasses

from papercore.lab.config import option, resolve_device

FORMS = ("auto", "full", "reduced")


@dataclasses.dataclass(frozen=True)
class Form:
    """All numbers of a run.

    Attributes:
        train_images, test_images: of CIFAR-10; pool: side of the squares of pixels that are averaged to one.
        depth, width: of the residual network (lab/resnet.py); workers K; local_batch B_loc.
        seeds: of weights, samples and noise.
        start_steps, start_lr: phase 1 of the post-local runs, an average a step, with crops and mirrors.
        post_steps, lr, periods: phase 2 at a constant rate, and its values of H.
        large_times: condition 1; phase 2 again at lr * large_times, for large_steps steps, at large_period.
        noise_start_steps, noise_start_lr, noise_steps, noise_lr, noise_periods, flips: label noise, no crops, with replacement.
        decay: weight decay. measure, sharpness: steps between measurements; probes of the trace.
    """

    train_images: int
    test_images: int
    pool: int
    depth: int
    width: int
    workers: int
    local_batch: int
    seeds: tuple[int, ...]
    start_steps: int
    start_lr: float
    post_steps: int
    lr: float
    periods: tuple[int, ...]
    large_times: float
    large_steps: int
    large_period: int
    noise_start_steps: int
    noise_start_lr: float
    noise_steps: int
    noise_lr: float
    noise_periods: tuple[int, ...]
    flips: float
    decay: float
    measure: int
    sharpness: int
    probes: int


# The full form follows the paper's code (K = 32, B_loc = 128, lr 0.32 and 0.1, no momentum), with a smaller network and fewer epochs.
FULL = Form(
    train_images=50_000, test_images=10_000, pool=1, depth=20, width=16, workers=32, local_batch=128, seeds=(0, 1, 2),
    start_steps=1200, start_lr=1.0, post_steps=2400, lr=0.32, periods=(10, 50, 200, 600),
    large_times=3.125, large_steps=2400, large_period=50,
    noise_start_steps=1200, noise_start_lr=0.5, noise_steps=3072, noise_lr=0.1, noise_periods=(24, 96, 384), flips=0.1,
    decay=5e-4, measure=200, sharpness=600, probes=16,
)  # fmt: skip
REDUCED = Form(
    train_images=4000, test_images=5000, pool=2, depth=8, width=8, workers=8, local_batch=4, seeds=(0, 1, 2),
    start_steps=2000, start_lr=0.2, post_steps=2000, lr=0.05, periods=(20, 100, 400),
    large_times=4.0, large_steps=1000, large_period=100,
    noise_start_steps=1000, noise_start_lr=0.2, noise_steps=1600, noise_lr=0.05, noise_periods=(20, 100, 400), flips=0.1,
    decay=5e-4, measure=200, sharpness=1000, probes=4,
)  # fmt: skip


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
    standard_probes: int = option(0, "random probes of the trace", minimum=0)

    def form(self) -> Form:
        """The numbers of this run: the form's own, with what was overridden."""
        name = self.standard_form
        if name == "auto":
            name = "full" if resolve_device(self.device) == "cuda" else "reduced"  # type: ignore[attr-defined]
        own = FULL if name == "full" else REDUCED
        given = {f.name: getattr(self, f"standard_{f.name}") for f in dataclasses.fields(Form)}
        return dataclasses.replace(own, **{k: v for k, v in given.items() if v not in (0, 0.0, ())})
