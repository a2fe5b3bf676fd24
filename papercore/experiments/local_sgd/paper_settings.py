"""Settings of the chapter's `paper` scale: which of the paper's runs, and what may be changed about it."""

from __future__ import annotations

import dataclasses

from papercore.lab.config import option

RUNS = ("cifar-post", "cifar-noise", "cifar-noise-vgg", "imagenet-post")


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """Fields that only `paper` reads; the chapter's Config inherits them. 0 or "" stands for what the paper did."""

    paper_run: str = option("cifar-post", "which run of the paper", choices=RUNS)
    paper_data: str = option("", "folder of the data; empty: looked for by name (cifar10, imagenet)")
    paper_checkpoint: str = option(
        "", "weights to start phase 2 from (.pt, a state dict); empty: train phase 1 first"
    )
    paper_workers: int = option(0, "workers K, one a process", minimum=0)
    paper_local_batch: int = option(0, "images of one worker and step", minimum=0)
    paper_lr: float = option(0.0, "constant learning rate of phase 2", minimum=0.0)
    paper_start_lr: float = option(
        0.0, "learning rate of phase 1; 0: ten times that of phase 2, our choice", minimum=0.0
    )
    paper_period: int = option(0, "local steps H", minimum=0)
    paper_start_epochs: int = option(0, "epochs of phase 1", minimum=0)
    paper_epochs: int = option(0, "epochs of phase 2", minimum=0)
    paper_evaluate_epochs: int = option(
        10, "epochs between two evaluations; each is made at an average", minimum=1
    )
    paper_checkpoint_steps: int = option(500, "steps between two saves", minimum=1)
    paper_batch_norm_batches: int = option(
        100, "batches that batch norm's statistics are estimated from at an average", minimum=1
    )
    paper_depth: int = option(0, "layers of the residual network on CIFAR-10", minimum=0)
    paper_seconds: float = option(
        0.0, "stop an arm after so many seconds, with its state kept; 0: never", minimum=0.0
    )
    paper_side: int = option(224, "ImageNet: pixels of the square that the network sees", minimum=32)
    paper_readers: int = option(
        8, "ImageNet: loader processes of each worker; 0 reads in the worker itself", minimum=0
    )
