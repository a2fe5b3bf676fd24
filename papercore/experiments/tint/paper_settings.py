"""Settings of the `paper` scale and the grids of the released code, as data.

Glossary
    layers x steps   trained layers times inner steps; the paper keeps the product at 12 (12x1, 6x2, 3x4)
    rate             inner rate on the sum of the losses (TinT and dynamic evaluation alike)
"""

from __future__ import annotations

import dataclasses

from papercore.lab.config import option

PARTS = ("language", "classification")
# Rates tried on language modelling, by the auxiliary's family.
LANGUAGE_RATES = {"gpt2": (1e-5, 1e-4, 5e-4, 1e-3), "opt": (1e-7, 1e-6, 1e-5)}


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """Fields that only `paper` reads; the defaults are the paper's, as far as they are known."""

    paper_parts: tuple[str, ...] = option(PARTS, "tables to make", choices=PARTS)
    paper_models: tuple[str, ...] = option(
        ("openai-community/gpt2", "facebook/opt-125m"), "auxiliaries of the perplexities: hub ids or folders"
    )
    paper_corpus: str = option("wikitext-103", "text: a name, a hub id or a folder's name; column text")
    paper_choose_split: str = option("validation", "split whose documents choose the rate")
    paper_split: str = option("test", "split that perplexity is reported on")
    paper_block: int = option(1024, "tokens of a document", minimum=4)
    paper_choose_documents: int = option(64, "documents that choose the rate, at most", minimum=1)
    paper_documents: int = option(0, "documents that are reported on, at most; 0: all", minimum=0)
    paper_fractions: tuple[float, ...] = option(
        (0.3, 0.5, 0.7, 0.9), "train fractions of a document", minimum=0.0
    )
    paper_rates: tuple[float, ...] = option(
        (), "inner rates of language modelling; () = the paper's grid of the model's family", minimum=0.0
    )  # fmt: skip
    paper_language_layers: str = option("12x1", "trained layers x inner steps of language modelling")
    paper_classifiers: tuple[str, ...] = option(
        ("facebook/opt-125m",), "auxiliaries of the classification table"
    )
    paper_baselines: tuple[str, ...] = option(
        ("facebook/opt-1.3b",), "larger models that only read the demonstrations; () for none"
    )  # fmt: skip
    paper_tasks: tuple[str, ...] = option(
        ("subj", "agnews", "sst2", "cr", "mr", "mpqa", "amazon"), "classification sets",
        choices=("subj", "agnews", "sst2", "cr", "mr", "mpqa", "amazon"),
    )  # fmt: skip
    paper_seeds: tuple[int, ...] = option((1, 2, 3), "seeds of demonstrations", minimum=0)
    paper_shots: int = option(32, "demonstrations, class-balanced", minimum=1)
    paper_held_out: int = option(64, "training examples that choose; never demonstrations", minimum=2)
    paper_queries: int = option(200, "evaluation examples, class-balanced", minimum=2)
    paper_text_tokens: int = option(
        0, "longer texts are cut, tokens; 0: as long as all demonstrations fit", minimum=0
    )  # fmt: skip
    paper_layer_steps: tuple[str, ...] = option(
        ("12x1", "6x2", "3x4"), "trained layers x inner steps of TinT"
    )
    paper_context_rates: tuple[float, ...] = option(
        (1e-7, 1e-6, 1e-5), "TinT, loss on the context", minimum=0.0
    )
    paper_label_rates: tuple[float, ...] = option(
        (1e-5, 1e-4, 1e-3), "TinT, loss on label words", minimum=0.0
    )
    paper_dynamic_layers: tuple[int, ...] = option((12, 6, 3), "last layers of dynamic evaluation", minimum=1)
    paper_dynamic_rates: tuple[float, ...] = option((1e-5, 1e-4, 1e-3), "dynamic evaluation", minimum=0.0)
    paper_fd_eps: float = option(
        1e-2, "step of the finite differences; the released code has 1e-3", minimum=1e-12
    )
    paper_batch: int = option(4, "documents, or contexts, in one pass of the simulator", minimum=1)
    paper_resamples: int = option(2000, "bootstrap resamples", minimum=100)
