"""Settings of the chapter's `standard` scale: a real pretrained encoder on real questions. Apart from the code that uses them,
so that reading them loads nothing."""

from __future__ import annotations

import dataclasses

from papercore.lab.config import option


@dataclasses.dataclass(frozen=True)
class StandardSettings:
    """Fields that only `standard` reads; the chapter's Config inherits them."""

    standard_model: str = option("all-MiniLM-L6-v2", "pretrained BERT encoder: a name, a hub id or a folder")
    standard_corpus: str = option("trec", "text classification set", choices=("trec", "mr", "subj", "cr"))
    standard_seeds: tuple[int, ...] = option(
        (0, 1, 2), "seeds of few-shot samples, batches and noise", minimum=0
    )
    standard_k: int = option(
        16, "training examples a class; as many are held out to choose checkpoints", minimum=1
    )
    standard_arms: tuple[str, ...] = option(
        ("full", "norms_biases", "lora", "no_prompt"),
        "what MeZO tunes at k examples a class",
        choices=("full", "norms_biases", "lora", "no_prompt"),
    )
    standard_large_n: int = option(1000, "training examples of the larger regime; 0 leaves it out", minimum=0)
    standard_large_held_out: int = option(500, "held-out training examples of the larger regime", minimum=1)
    standard_large_arms: tuple[str, ...] = option(
        ("full", "norms_biases"),
        "what MeZO tunes in the larger regime, with the first seed alone",
        choices=("full", "norms_biases", "lora", "no_prompt"),
    )
    standard_steps: int = option(400, "MeZO steps of a run", minimum=1)
    standard_batch: int = option(32, "examples a step", minimum=1)
    standard_eps: float = option(1e-3, "perturbation scale", minimum=1e-9)
    standard_dist: str = option("rademacher", "noise", choices=("gaussian", "rademacher"))
    standard_check_every: int = option(50, "steps between two evaluations", minimum=1)
    standard_tuning_seeds: tuple[int, ...] = option(
        (100, 101, 102), "seeds that choose learning rates; never reported ones"
    )
    standard_tuning_steps: int = option(
        200,
        "MeZO steps of a run that chooses a learning rate; checkpoints are held against a choice that is too large later",
        minimum=1,
    )
    standard_lr_full: tuple[float, ...] = option(
        (1e-5, 2.5e-5, 5e-5, 1e-4, 2e-4),
        "learning rates for all weights; the search begins in the middle of a grid and stops beside the best",
    )
    standard_lr_norms_biases: tuple[float, ...] = option(
        (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "for LayerNorm and biases"
    )
    standard_lr_lora: tuple[float, ...] = option((5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "for LoRA")
    standard_lr_no_prompt: tuple[float, ...] = option((2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4), "for no prompt")
    standard_lr_adam: tuple[float, ...] = option(
        (1.25e-5, 2.5e-5, 5e-5, 1e-4, 2e-4), "for Adam by backpropagation, all weights"
    )
    standard_adam_steps: int = option(60, "Adam steps at k examples a class", minimum=1)
    standard_adam_large_steps: int = option(200, "Adam steps in the larger regime", minimum=1)
    standard_probe_c: tuple[float, ...] = option(
        (0.1, 1.0, 10.0, 100.0), "inverse penalties of the linear probe", minimum=0
    )
    standard_probe_layer: int = option(4, "layer whose first word is the second probe's feature", minimum=1)
    standard_rank: int = option(8, "LoRA rank", minimum=1)
    standard_alpha: float = option(16.0, "LoRA alpha")
    standard_max_tokens: int = option(48, "longer texts are cut, tokens", minimum=3)
    standard_logit_scale: float = option(20.0, "logits are this times the cosine")
    standard_decoder: str = option(
        "opt-1.3b",
        "size of the random-weight decoder whose memory and step time are measured on CUDA",
        choices=("opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b"),
    )
