"""Settings of the `paper` scale and the grids of the paper's appendix, as data.

This file imports no model code, so that a chapter's config can inherit `PaperSettings` without tying its other scales to it.

Glossary
    family   "masked" (RoBERTa) or "causal" (OPT)
    trial    one point of a grid: learning rate, batch size, eps, weight decay
    steps    MeZO or Adam updates
"""

from __future__ import annotations

import dataclasses
import math

from papercore.lab.config import checked_choice, option

METHODS = ("zero_shot", "icl", "lp", "mezo", "mezo_lora", "mezo_prefix", "ft")
MEZO_METHODS = ("mezo", "mezo_lora", "mezo_prefix")
# In-context learning is a matter of causal models; the paper has no such row for RoBERTa.
METHODS_OF = {"masked": tuple(m for m in METHODS if m != "icl"), "causal": METHODS}
DTYPES = ("paper", "float32", "float16", "bfloat16")
ROBERTA_SEEDS = (13, 21, 42, 87, 100)
OPT_SEEDS = (0,)
PREFIX_TOKENS = 5
LORA_RANK, LORA_ALPHA = 8, 16


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """Fields of a chapter's config that only the `paper` scale reads. 0 or () stands for what the paper did."""

    paper_models: tuple[str, ...] = option(
        ("facebook/opt-13b", "FacebookAI/roberta-large"), "hub ids or folders of OPT- and RoBERTa-like models"
    )
    paper_tasks: tuple[str, ...] = option(
        (), "tasks by name; () = every task that the paper ran on the model's family"
    )
    paper_methods: tuple[str, ...] = option(METHODS, "rows of the table", choices=METHODS)
    paper_shots: int = option(16, "RoBERTa: examples of each class, k", minimum=1)
    paper_seeds: tuple[int, ...] = option(
        (), "seeds of samples and training; () = 13,21,42,87,100 for RoBERTa, 0 for OPT", minimum=0
    )
    paper_steps: int = option(0, "MeZO steps; 0 = 100,000 for RoBERTa, 20,000 for OPT", minimum=0)
    paper_batch: int = option(
        0, "examples in a MeZO step, over all processes; 0 = 64 for RoBERTa, 16 for OPT", minimum=0
    )
    paper_eval_every: int = option(
        0, "MeZO steps between validations; 0 = 10,000 for RoBERTa, 4,000 for OPT", minimum=0
    )
    paper_tune_steps: int = option(0, "Adam steps; 0 = 1,000 for RoBERTa, 5 epochs for OPT", minimum=0)
    paper_lr_mezo: tuple[float, ...] = option((), "learning rates of MeZO; () = the paper's grid", minimum=0)
    paper_lr_lora: tuple[float, ...] = option(
        (), "learning rates of MeZO with LoRA; () = the paper's grid", minimum=0
    )
    paper_lr_prefix: tuple[float, ...] = option(
        (), "learning rates of MeZO with prefixes; () = the paper's grid", minimum=0
    )
    paper_lr_ft: tuple[float, ...] = option(
        (), "learning rates of fine-tuning with Adam; () = the paper's grid", minimum=0
    )
    paper_train: int = option(1000, "OPT: training examples", minimum=1)
    paper_validation: int = option(
        500, "OPT: validation examples (CB and COPA never more than 100)", minimum=1
    )
    paper_test: int = option(1000, "test examples at most", minimum=1)
    paper_demonstrations: int = option(32, "OPT: demonstrations of in-context learning", minimum=1)
    paper_max_tokens: int = option(2048, "OPT: longest prompt with answer, tokens", minimum=64)
    paper_eval_batch: int = option(16, "sequences in a forward pass that needs no gradient", minimum=1)
    paper_dtype: str = option(
        "paper", "of the weights; paper = float16 for OPT, float32 for RoBERTa", choices=DTYPES
    )
    paper_mode: str = option(
        "auto",
        "how MeZO perturbs; auto = exact in half precision, else inplace",
        choices=("auto", "exact", "inplace"),
    )
    paper_placement: str = option(
        "single",
        "single = whole model on one device; auto = layers spread over all GPUs",
        choices=("single", "auto"),
    )


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of a grid.

    Fields:
        lr: learning rate; batch: examples in a step over all processes; steps: updates; every: updates between validations.
        eps: scale of the perturbation (MeZO); weight_decay: decoupled, per step.
    """

    lr: float
    batch: int
    steps: int
    every: int
    eps: float = 0.0
    weight_decay: float = 0.0

    @property
    def name(self) -> str:
        """Short and unique within a grid."""
        return f"lr{self.lr:g}-b{self.batch}"


# (family, method) -> (learning rates, eps, weight decay) for RoBERTa and OPT.
MEZO_GRIDS: dict[tuple[str, str], tuple[tuple[float, ...], float, float]] = {
    ("masked", "mezo"): ((1e-7, 1e-6, 1e-5), 1e-3, 0.0),
    ("masked", "mezo_lora"): ((1e-5, 5e-5, 1e-4), 1e-3, 0.1),
    ("masked", "mezo_prefix"): ((1e-2, 5e-3, 1e-3), 1e-1, 0.0),
    ("causal", "mezo"): ((1e-6, 1e-7), 1e-3, 0.0),
    ("causal", "mezo_lora"): ((1e-4, 5e-5), 1e-2, 0.0),
    ("causal", "mezo_prefix"): ((1e-2, 1e-3), 1e-1, 0.0),
}
# SQuAD and DROP had grids of their own.
GENERATION_RATES = {
    "mezo": (1e-6, 5e-7, 1e-7),
    "mezo_lora": (1e-4, 5e-5, 1e-5),
    "mezo_prefix": (5e-2, 1e-2, 5e-3),
}
MEZO_STEPS = {"masked": 100_000, "causal": 20_000}
MEZO_EVERY = {"masked": 10_000, "causal": 4_000}
MEZO_BATCH = {"masked": 64, "causal": 16}
FT_RATES = {"masked": (1e-5, 3e-5, 5e-5), "causal": (1e-5, 5e-5, 8e-5)}
FT_BATCHES_FEW, FT_BATCHES_MANY, FT_BATCH_OPT = (2, 4, 8), (8, 16, 32), 8
FT_STEPS_ROBERTA, FT_EVERY_ROBERTA, FT_EPOCHS_OPT = 1_000, 100, 5
# Tasks whose answers are whole texts: a linear probe has no labels there, so the output layer alone is tuned.
HEAD_RATES, HEAD_BATCH, HEAD_EPOCHS = (1e-4, 5e-4), 8, 5


def seeds_of(settings: PaperSettings, family: str, shift: int = 0) -> tuple[int, ...]:
    """Seeds of samples and training, each moved by the run's own seed."""
    seeds = settings.paper_seeds or (ROBERTA_SEEDS if family == "masked" else OPT_SEEDS)
    return tuple(seed + shift for seed in seeds)


def methods_of(settings: PaperSettings, family: str) -> list[str]:
    """The rows that this family has, in the order of the table.

    Raises:
        ValueError: none of the methods asked for applies.
    """
    chosen = [m for m in METHODS_OF[family] if m in settings.paper_methods]
    if not chosen:
        raise ValueError(
            f"none of paper_methods = {settings.paper_methods} applies to {family} models: choose from {', '.join(METHODS_OF[family])}."
        )
    return chosen


def mezo_trials(settings: PaperSettings, family: str, method: str, *, generates: bool) -> list[Trial]:
    """The grid of one MeZO row.

    Args:
        generates: True for SQuAD and DROP.
    """
    checked_choice("MeZO method", method, MEZO_METHODS)
    rates, eps, decay = MEZO_GRIDS[family, method]
    if generates:
        rates = GENERATION_RATES[method]
    asked = {
        "mezo": settings.paper_lr_mezo,
        "mezo_lora": settings.paper_lr_lora,
        "mezo_prefix": settings.paper_lr_prefix,
    }[method]
    steps = settings.paper_steps or MEZO_STEPS[family]
    every = min(settings.paper_eval_every or MEZO_EVERY[family], steps)
    batch = settings.paper_batch or MEZO_BATCH[family]
    return [Trial(lr, batch, steps, every, eps, decay) for lr in asked or rates]


def ft_trials(settings: PaperSettings, family: str, train_examples: int) -> list[Trial]:
    """The grid of fine-tuning with Adam; other k than 16 and 512 take the batch sizes of the nearer one (in ratio)."""
    rates = settings.paper_lr_ft or FT_RATES[family]
    if family == "causal":
        return [_epochs(settings, lr, FT_BATCH_OPT, FT_EPOCHS_OPT, train_examples) for lr in rates]
    batches = FT_BATCHES_FEW if settings.paper_shots < math.sqrt(16 * 512) else FT_BATCHES_MANY
    steps = settings.paper_tune_steps or FT_STEPS_ROBERTA
    return [Trial(lr, batch, steps, min(FT_EVERY_ROBERTA, steps)) for lr in rates for batch in batches]


def head_trials(settings: PaperSettings, train_examples: int) -> list[Trial]:
    """The grid of tuning the output layer alone."""
    return [_epochs(settings, lr, HEAD_BATCH, HEAD_EPOCHS, train_examples) for lr in HEAD_RATES]


def _epochs(settings: PaperSettings, lr: float, batch: int, epochs: int, examples: int) -> Trial:
    """A trial of whole epochs, validated after each."""
    epoch = math.ceil(examples / batch)
    steps = settings.paper_tune_steps or epochs * epoch
    return Trial(lr, batch, steps, min(epoch, steps))
