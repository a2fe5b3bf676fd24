"""The chapter at `standard` scale: GPTs of our own on real text, perplexity on WikiText-2, and few-shot classification.

The auxiliary models are trained here on NLTK's free corpora. Inner rates are chosen for each model, method and train fraction on
WikiText-2's validation text; perplexities are of its test text. Classification chooses on training examples that are no
demonstrations. The models are small: what this scale shows of classification is a direction, not the paper's accuracies.

Every model, search and table is a stage: a killed run resumes after its last finished stage, training after its last checkpoint.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from papercore.experiments.tint.adapting import METHODS, Way, document_losses, search
from papercore.experiments.tint.config import StandardConfig
from papercore.experiments.tint.few_shot_report import report_few_shot
from papercore.experiments.tint.perplexity_report import report_perplexity
from papercore.experiments.tint.standard_few_shot import few_shot_part
from papercore.experiments.tint.standard_forms import Form
from papercore.experiments.tint.standard_model import model_from, new_model, trained_part
from papercore.experiments.tint.standard_text import documents, tokenizer_from, tokens_part
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.statistics import summarize

HALF = 0.5  # train fraction of the table of layers and steps
Part = dict[str, Any]


def run_standard(config: StandardConfig, record: Record, stages: Stages) -> None:
    """Run every stage that is not on disk yet and fill `record`.

    Raises:
        papercore.lab.data.Missing: a corpus or WikiText-2 is not on this machine.
        FloatingPointError: a training loss is not finite.
        ValueError: settings that do not fit each other.
    """
    form = config.form()
    _check(form)
    tokens = stages.get("tokens", lambda: tokens_part(config.standard_corpora, form.vocabulary))
    device, seeds = config.torch_device(), [config.seed + seed for seed in form.seeds]
    trained = [
        stages.get(
            f"auxiliary {seed}",
            partial(
                trained_part, form, seed, tokens["train"], device,
                folder=stages.folder(f"auxiliary {seed}"), every=config.standard_checkpoint,
            ),
        )
        for seed in seeds
    ]  # fmt: skip
    _models(record, form, tokens, trained)
    choosing = documents(tokens["validation"], form.context, form.choose_documents)
    testing = documents(tokens["test"], form.context, form.documents)
    found = []
    for seed, part in zip(seeds, trained, strict=True):
        model = model_from(form, part, device)
        rates = {
            method: stages.get(f"rates, {method}, {seed}", partial(_search, config, form, model, choosing, method))
            for method in ("tint", "dynamic")
        }  # fmt: skip
        tested = stages.get(f"test, {seed}", partial(_test, config, form, model, testing, rates))
        more = {
            shape: stages.get(f"{shape}, {seed}", partial(_shape, config, form, model, choosing, testing, shape))
            for shape in form.layer_steps
        }  # fmt: skip
        found.append((rates, tested, more))
    _perplexity(config, record, form, found)
    if config.standard_few_shot:
        tokenizer = tokenizer_from(tokens)
        parts: dict[str, list[Part]] = {}
        for task in form.tasks:
            for seed, part in zip(seeds, trained, strict=True):
                model = model_from(form, part, device)
                parts.setdefault(task, []).append(
                    stages.get(f"{task}, {seed}", partial(few_shot_part, config, form, model, tokenizer, task, seed))
                )  # fmt: skip
        report_few_shot(record, parts, resamples=config.standard_resamples, seed=config.seed)


def _models(record: Record, form: Form, tokens: Part, trained: list[Part]) -> None:
    """Sizes of text and models, and how far training got."""
    record.table("corpora", ["corpus", "texts", "characters"], tokens["corpora"])
    record.metric("train_tokens", len(tokens["train"]), "rel:0.02")
    record.metric("seen_tokens", form.train_steps * form.batch * form.context, "exact")
    weights = sum(p.numel() for p in new_model(form, 0, torch.device("cpu")).parameters())
    record.metric("weights", weights, "exact")
    record.metric("seeds", len(trained), "exact")
    for split in ("validation", "test"):
        record.metric(f"{split}_tokens", len(tokens[split]), "rel:0.02")
    record.metric(
        "test_characters_a_token", tokens["test_characters"] / max(1, len(tokens["test"])), "rel:0.02"
    )
    curves = np.stack([part["losses"] for part in trained])
    record.array("training_losses", curves)
    last = max(1, len(curves[0]) // 10)
    record.metric("training_loss_end", float(curves[:, -last:].mean()), "abs:0.1")


def _ways(config: StandardConfig, method: str, **more: Any) -> partial[Way]:
    return partial(Way, method, fd_eps=config.standard_fd_eps, **more)


def _search(
    config: StandardConfig, form: Form, model: Any, ids: NDArray[np.int64], method: str, *,
    fractions: tuple[float, ...] = (), **more: Any,
) -> Part:  # fmt: skip
    """The best rate of each fraction on the choosing documents, and every perplexity that the search saw (nan: not asked for)."""
    way, device = _ways(config, method, **more), config.torch_device()
    fractions = fractions or form.fractions
    tried = np.full((len(fractions), len(form.rates)), np.nan)
    chosen: list[int] = []
    for number, fraction in enumerate(fractions):

        def score(rate: float, fraction: float = fraction) -> float:
            losses = document_losses(model, ids, fraction, way(rate), batch=form.eval_batch, device=device)
            return float(losses.mean())

        best, scores = search(form.rates, score, chosen[-1] if chosen else None)
        chosen.append(best)
        for index, value in scores.items():
            tried[number, index] = np.exp(min(value, 50.0))
    return {"chosen": chosen, "tried": tried}


def _test(
    config: StandardConfig, form: Form, model: Any, ids: NDArray[np.int64], rates: dict[str, Part]
) -> Part:
    """Losses [fractions, documents] of every method on the test documents, at the chosen rates."""
    out: Part = {}
    for method in METHODS:
        chosen = rates[method]["chosen"] if method in rates else [0] * len(form.fractions)
        out[method] = np.stack([
            document_losses(
                model, ids, fraction, _ways(config, method)(form.rates[index]),
                batch=form.eval_batch, device=config.torch_device(),
            )
            for fraction, index in zip(form.fractions, chosen, strict=True)
        ])  # fmt: skip
    return out


def _shape(
    config: StandardConfig, form: Form, model: Any, choosing: NDArray[np.int64], testing: NDArray[np.int64], shape: str
) -> Part:  # fmt: skip
    """TinT on the last layers, several steps: its own rate, and the test losses at it."""
    layers, steps = (int(number) for number in shape.split("x"))
    more = {"layers": layers, "steps": steps}
    found = _search(config, form, model, choosing, "tint", fractions=(HALF,), **more)
    rate = form.rates[found["chosen"][0]]
    way = _ways(config, "tint", **more)(rate)
    losses = document_losses(
        model, testing, HALF, way, batch=form.eval_batch, device=config.torch_device()
    )  # fmt: skip
    return {"losses": losses, "rate": rate}


def _perplexity(
    config: StandardConfig, record: Record, form: Form, found: list[tuple[dict[str, Part], Part, dict[str, Part]]]
) -> None:  # fmt: skip
    record.array("fractions", np.array(form.fractions))
    record.array("rates", np.array(form.rates))
    at_edge = 0
    for method in ("tint", "dynamic"):
        chosen = np.array([rates[method]["chosen"] for rates, _, _ in found])
        record.array(f"chosen_{method}", np.array(form.rates)[chosen])
        record.array(f"sweep_{method}", np.stack([rates[method]["tried"] for rates, _, _ in found]))
        at_edge += int(((chosen == 0) | (chosen == len(form.rates) - 1)).sum())
    record.metric("rates_at_the_edge", at_edge, "abs:24")
    losses = {m: np.stack([tested[m] for _, tested, _ in found]) for m in METHODS}
    report_perplexity(
        record, form.fractions, losses, resamples=config.standard_resamples, seed=config.seed
    )  # fmt: skip
    rows = []
    for shape in form.layer_steps:
        values = [float(np.exp(more[shape]["losses"].mean())) for _, _, more in found]
        se = summarize(values).se if len(values) > 1 else float("nan")
        rows.append([shape, float(np.mean(values)), se, [more[shape]["rate"] for _, _, more in found]])
    if rows:
        record.table("layer steps", ["layers x steps", "perplexity", "standard error", "rates"], rows)


def _check(form: Form) -> None:
    """Refuse settings that would fail, or mislead, after hours."""
    if len(form.seeds) < 2 or len(set(form.seeds)) < len(form.seeds):
        raise ValueError(f"standard_seeds = {form.seeds}: expected at least two different seeds.")
    for fraction in form.fractions:
        if not 2 <= int(fraction * form.context) < form.context:
            raise ValueError(
                f"standard_fractions has {fraction}: of {form.context} tokens that leaves nothing to train on or nothing to test."
            )
    if not all(a < b for a, b in zip(form.rates, form.rates[1:], strict=False)):
        raise ValueError(f"standard_rates = {form.rates}: expected rates that rise.")
    for shape in form.layer_steps:
        layers, times, steps = shape.partition("x")
        if not (times and layers.isdigit() and steps.isdigit()) or not 1 <= int(layers) <= form.layers:
            raise ValueError(
                f"standard_layer_steps has {shape!r}: expected LAYERSxSTEPS, such as {form.layers}x1, of at most {form.layers} layers."
            )
