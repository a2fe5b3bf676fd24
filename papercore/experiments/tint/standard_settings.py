"""Settings of the chapter's `standard` scale, in two forms: the full one for a GPU, and a reduced one that a CPU finishes.

Which form a run has is a setting (`standard_form`); "auto" is the full one on CUDA and the reduced one on a CPU. Every number of
a form can be overridden by the setting of the same name: 0, or an empty list, stands for the form's own value.
"""

from __future__ import annotations

import dataclasses

from papercore.experiments.tint.standard_forms import FULL, REDUCED, Form
from papercore.lab.config import option, resolve_device

FORMS = ("auto", "full", "reduced")
CORPORA = ("brown", "inaugural", "movie_reviews", "shakespeare", "state_union", "webtext")


@dataclasses.dataclass(frozen=True)
class StandardSettings:
    """Fields that only `standard` reads; the chapter's Config inherits them."""

    standard_form: str = option(
        "auto", "full (for a GPU) or reduced (for a CPU); auto by the device", choices=FORMS
    )
    standard_corpora: tuple[str, ...] = option(
        CORPORA, "NLTK corpora that the auxiliary models are trained on", choices=CORPORA
    )
    standard_few_shot: bool = option(True, "classify with demonstrations too, behind the perplexities")
    standard_fd_eps: float = option(1e-2, "step of the finite differences", minimum=1e-12)
    standard_resamples: int = option(2000, "bootstrap resamples", minimum=100)
    standard_checkpoint: int = option(100, "training steps between two saves", minimum=1)
    standard_vocabulary: int = option(
        0, "tokens of the vocabulary; 0: the form's own, as in all fields below", minimum=0
    )
    standard_context: int = option(0, "tokens of a document, and positions of a model", minimum=0)
    standard_layers: int = option(0, "layers of an auxiliary model", minimum=0)
    standard_width: int = option(0, "numbers of its hidden state", minimum=0)
    standard_heads: int = option(0, "attention heads of a layer", minimum=0)
    standard_train_steps: int = option(0, "AdamW steps that train an auxiliary model", minimum=0)
    standard_batch: int = option(0, "documents a step", minimum=0)
    standard_lr: float = option(0.0, "peak learning rate of AdamW", minimum=0.0)
    standard_warmup: int = option(0, "steps of warm-up", minimum=0)
    standard_seeds: tuple[int, ...] = option(
        (), "seeds of auxiliary models, and of demonstrations", minimum=0
    )
    standard_fractions: tuple[float, ...] = option((), "train fractions of a document", minimum=0.0)
    standard_rates: tuple[float, ...] = option(
        (), "inner rates of perplexity; the search begins in the middle and stops beside the best", minimum=0.0
    )  # fmt: skip
    standard_choose_documents: int = option(0, "validation documents that choose the inner rate", minimum=0)
    standard_documents: int = option(0, "test documents, at most", minimum=0)
    standard_eval_batch: int = option(0, "documents in one pass of the simulator", minimum=0)
    standard_layer_steps: tuple[str, ...] = option((), "trained layers x inner steps, such as 6x1")
    standard_tasks: tuple[str, ...] = option(
        (), "classification sets", choices=("mr", "subj", "cr", "trec")
    )  # fmt: skip
    standard_shots: int = option(0, "demonstrations, a multiple of every set's number of classes", minimum=0)
    standard_text_tokens: int = option(0, "longer texts are cut, tokens", minimum=0)
    standard_held_out: int = option(
        0, "training examples that choose rate, format and loss; never demonstrations", minimum=0
    )  # fmt: skip
    standard_queries: int = option(0, "test examples of a set", minimum=0)
    standard_context_rates: tuple[float, ...] = option(
        (), "inner rates for loss on the whole context", minimum=0.0
    )
    standard_label_rates: tuple[float, ...] = option((), "inner rates for loss on label words", minimum=0.0)

    def form(self) -> Form:
        """The numbers of this run: the form's own, with what was overridden."""
        name = self.standard_form
        if name == "auto":
            name = "full" if resolve_device(self.device) == "cuda" else "reduced"  # type: ignore[attr-defined]
        own = FULL if name == "full" else REDUCED
        given = {f.name: getattr(self, f"standard_{f.name}") for f in dataclasses.fields(Form)}
        return dataclasses.replace(own, **{k: v for k, v in given.items() if v not in (0, 0.0, ())})
