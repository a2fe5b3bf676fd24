"""The paper's models as this run uses them: which family, in which dtype, where, and with which adapter.

Glossary
    family    "masked" (RoBERTa) or "causal" (OPT), read off the architecture that config.json names
    label     short name of a model in metrics and tables: "opt-13b", "roberta-large-k16"
    adapter   what a MeZO row trains beside the frozen model: LoRA or a prefix

Half precision. The paper ran OPT in float16 and perturbed the weights in place. Each addition rounds there: in a measurement on
synthetic weights the rounding of +eps, -2 eps, +eps was larger than the updates themselves. So half-precision weights are
perturbed in MeZO's exact mode by default: the centre is copied aside, only the update rounds, and a replayed log gives the
trained weights bit for bit. The price is one more copy of the trained weights (24 GiB for 13 billion parameters in float16);
`paper_mode=inplace` does without, as the paper did.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from papercore.experiments.mezo.attention_prefix import prefix_encoder
from papercore.experiments.mezo.paper_settings import LORA_ALPHA, LORA_RANK, PREFIX_TOKENS, PaperSettings
from papercore.experiments.mezo.processes import Processes
from papercore.lab import models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = {"masked": "AutoModelForMaskedLM", "causal": "AutoModelForCausalLM"}
PAPER_DTYPES = {"masked": torch.float32, "causal": torch.float16}


@dataclass
class LanguageModel:
    """A pretrained model on disk, loaded afresh for every run that changes it.

    Fields:
        place: folder in the layout of save_pretrained.
        dtype: of the weights in forward-only methods; Adam keeps float32 weights.
        mode: how MeZO perturbs them.
    """

    label: str
    family: str
    place: Path
    dtype: torch.dtype
    mode: str
    placement: str
    processes: Processes
    _untouched: nn.Module | None = None

    @classmethod
    def find(cls, name: str, settings: PaperSettings, processes: Processes) -> LanguageModel:
        """The model of this name: a folder, a name under $PAPERCORE_MODELS, or a hub id.

        Raises:
            Missing: it is nowhere; the message says how to get it.
            ValueError: neither a masked nor a causal language model.
        """
        place = models.folder(name, path=name if Path(name).is_dir() else None)
        family = family_of(place)
        dtype = (
            PAPER_DTYPES[family] if settings.paper_dtype == "paper" else getattr(torch, settings.paper_dtype)
        )
        mode = settings.paper_mode
        if mode == "auto":
            mode = "inplace" if dtype == torch.float32 else "exact"
        label = Path(name).name.lower() + (f"-k{settings.paper_shots}" if family == "masked" else "")
        return cls(label, family, place, dtype, mode, settings.paper_placement, processes)

    @property
    def longest_prompt(self) -> int:
        """Tokens that the position table has room for beside a prefix, so that every method reads the same prompts."""
        return int(_config(self.place).get("max_position_embeddings", sys.maxsize)) - PREFIX_TOKENS

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model."""
        return models.tokenizer(self.place.name, path=self.place)

    def untouched(self) -> nn.Module:
        """The pretrained model for methods that only read it; kept until `fresh` or `adapted` is called."""
        if self._untouched is None:
            self._untouched = self._load(self.dtype)
        return self._untouched

    def fresh(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The pretrained model, to be changed by the caller; dropout is off (eval mode)."""
        self._untouched = None
        return self._load(dtype or self.dtype)

    def adapted(self, method: str, seed: int) -> nn.Module:
        """The model of a MeZO row, where exactly the trained parameters require a gradient.

        Args:
            method: "mezo" (all weights), "mezo_lora" or "mezo_prefix".
            seed: of the adapter's starting values; the same seed gives the same bits, so that a log can be replayed on it.
        """
        model = self.fresh()
        if method == "mezo":
            return model.requires_grad_(True)
        from papercore.mezo import lora, prefix

        if method == "mezo_lora":
            return lora(model, r=LORA_RANK, alpha=LORA_ALPHA, seed=seed).eval()
        if self.family == "masked":
            return prefix_encoder(model, PREFIX_TOKENS, seed=seed)
        return prefix(model, PREFIX_TOKENS, seed=seed).eval()

    def _load(self, dtype: torch.dtype) -> nn.Module:
        kind, device = KINDS[self.family], self.processes.device
        _quiet_unless_watched()
        if self.placement == "single":
            return models.load(self.label, kind=kind, path=self.place, dtype=dtype, device=device)
        if self.processes.world > 1:
            raise ValueError(
                "paper_placement='auto' spreads one model over all GPUs: run it as one process, without torchrun."
            )
        import transformers

        options: dict[str, Any] = {"dtype": dtype, "device_map": "auto"}
        return getattr(transformers, kind).from_pretrained(self.place, **options).eval()


def family_of(place: Path) -> str:
    """ "masked" or "causal", by the architecture in config.json.

    Raises:
        ValueError: another architecture.
    """
    names = _config(place).get("architectures") or []
    for name in names:
        if name.endswith("ForMaskedLM"):
            return "masked"
        if name.endswith("ForCausalLM"):
            return "causal"
    raise ValueError(
        f"{place} holds {', '.join(names) or 'no named architecture'}: expected a masked or a causal language model, such as roberta-large or opt-1.3b."
    )


def _config(place: Path) -> dict[str, Any]:
    return json.loads((place / "config.json").read_text(encoding="utf-8"))


def untie_output_layer(model: nn.Module) -> nn.Parameter:
    """Give the output layer weights of its own and return them: tuned alone, they must not move the embeddings."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    return head.weight


def _quiet_unless_watched() -> None:
    """transformers draws a bar for every load, also into log files."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
