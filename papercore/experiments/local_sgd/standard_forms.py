"""The numbers of the chapter's `standard` scale, in two forms: the full one for a GPU, a reduced one that a CPU finishes.

Apart from the settings, because these numbers count as source: a record made with others is stale.
"""

from __future__ import annotations

import dataclasses


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
        decay: weight decay. measure, sharpness: steps between measurements; probes of the trace; most products of the Hessian
            with a vector for its largest eigenvalue.
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
    products: int


# The full form follows the paper's code (K = 32, B_loc = 128, lr 0.32 and 0.1, no momentum), with a smaller network and fewer epochs.
FULL = Form(
    train_images=50_000, test_images=10_000, pool=1, depth=20, width=16, workers=32, local_batch=128, seeds=(0, 1, 2),
    start_steps=1200, start_lr=1.0, post_steps=2400, lr=0.32, periods=(10, 50, 200, 600),
    large_times=3.125, large_steps=2400, large_period=50,
    noise_start_steps=1200, noise_start_lr=0.5, noise_steps=3072, noise_lr=0.1, noise_periods=(24, 96, 384), flips=0.1,
    decay=5e-4, measure=200, sharpness=600, probes=16, products=100,
)  # fmt: skip
# Few images and many epochs: after 1,800 steps on 4,000 images this network was still far from any minimiser (training loss 1.6).
REDUCED = Form(
    train_images=1000, test_images=5000, pool=2, depth=8, width=8, workers=8, local_batch=4, seeds=(0, 1, 2),
    start_steps=4000, start_lr=0.2, post_steps=4000, lr=0.05, periods=(20, 100, 400),
    large_times=4.0, large_steps=2000, large_period=100,
    noise_start_steps=3000, noise_start_lr=0.2, noise_steps=3200, noise_lr=0.05, noise_periods=(20, 100, 400), flips=0.1,
    decay=5e-4, measure=400, sharpness=2000, probes=4, products=30,
)  # fmt: skip
