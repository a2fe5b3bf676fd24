"""One few-shot run of one method on the generated language: MeZO in its variants, and what it is compared with.

Glossary
    arm        a method with everything but its learning rate: what is trained, on which objective, with which estimator
    budget     forward passes a run may spend; every MeZO arm of a comparison gets the same
    k          labelled sentences per topic
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.experiments.mezo.language import (
    LABEL_WORDS,
    TOPICS,
    Examples,
    documents,
    examples,
    with_demonstrations,
)
from papercore.lab.decoder import Decoder
from papercore.lab.training import backward_step, train
from papercore.mezo import MeZO, add_noise_, lora
from papercore.mezo.seeds import draw_seed

PREFIX_TOKENS = 5
LORA_RANK, LORA_ALPHA = 8, 16


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method. `grid`: learning rates that the tuning run tries (for n = 1; n directions take n times as much)."""

    name: str
    grid: tuple[float, ...]
    tuned: str = "all"  # all | norms_biases | lora | prefix
    prompt: bool = True
    pretrained: bool = True
    objective: str = "loss"  # loss | accuracy
    estimator: str = "spsa"  # spsa | one_point
    n: int = 1
    dist: str = "gaussian"
    eps: float = 1e-3
    betas: tuple[float, float] | None = None
    batch: int = 0  # sentences a step; 0 = all of them
    decay: bool = False  # linear decay of the learning rate to 0
    budget: int = 1  # multiple of the config's budget


FULL = (3e-4, 1e-3, 3e-3)
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("full", FULL),
        Arm("rademacher", FULL, dist="rademacher"),
        Arm("norms_biases", (3e-3, 1e-2, 3e-2), tuned="norms_biases"),
        Arm("lora", (1e-3, 3e-3, 1e-2, 3e-2), tuned="lora", eps=1e-2),
        Arm("prefix", (3e-1, 1.0, 3.0), tuned="prefix", eps=1e-1),
        Arm("no_prompt", (3e-4, 1e-3, 2e-3, 4e-3), prompt=False),
        Arm("no_pretraining", (3e-4, 1e-3, 2e-3, 4e-3), pretrained=False, budget=2),
        Arm("accuracy", (1e-4, 3e-4, 1e-3, 3e-3), objective="accuracy", eps=1e-2),
        Arm("adam", (1e-3, 3e-3, 1e-2), betas=(0.9, 0.99)),
        Arm("n4", FULL, n=4),
        Arm("n16", FULL, n=16),
        Arm("one_point", (1e-5, 3e-5, 1e-4), estimator="one_point"),
        Arm("eps_1e-4", (), eps=1e-4),
        Arm("eps_1e-2", (), eps=1e-2),
        Arm("batch_8", (), batch=8),
        Arm("decayed", (), decay=True),
        Arm("longer", (), budget=2),
    )
}
# Arms without a grid ask what happens when one thing changes: they keep the learning rate of `full`.
FT_GRID = (3e-4, 1e-3, 3e-3)


def pretrain(
    model: Decoder,
    steps: int,
    batch: int,
    lr: float,
    segments: int,
    rng: np.random.Generator,
    keep: Sequence[int],
) -> tuple[list[float], dict[int, dict[str, Tensor]]]:
    """Language modelling on fresh documents; returns the losses and the weights after each of the steps in `keep`."""
    device = next(model.parameters()).device
    kept: dict[int, dict[str, Tensor]] = {0: _weights(model)} if 0 in keep else {}

    def loss_fn(step: int) -> Tensor:
        ids = documents(batch, segments, rng).to(device)
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    warmup = min(50, steps // 2)

    def schedule(step: int) -> float:
        return lr * min((step + 1) / max(1, warmup), max(0.02, (steps - step) / max(1, steps - warmup)))

    update = backward_step(loss_fn, optimizer, lr=schedule, clip=1.0)

    def step_and_keep(step: int) -> float:
        loss = update(step)
        if step + 1 in keep:
            kept[step + 1] = _weights(model)
        return loss

    losses = train(step_and_keep, steps, text="pretraining")
    return losses, kept


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


class Task:
    """A model with the way to read a topic out of it: logits [N, 4] of a set of examples."""

    def __init__(self, model: Decoder, arm: Arm, rng: np.random.Generator) -> None:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        device = next(model.parameters()).device
        self.arm, self.head = arm, None
        self.model: Any = copy.deepcopy(model)
        if arm.tuned == "prefix":
            self.model = self.model.with_prefix(
                torch.randint(0, 160, (PREFIX_TOKENS,), generator=generator).to(device)
            )
            self.trained = [block.prefix for block in self.model.blocks]
        elif arm.tuned == "lora":
            # peft's own random half of the adapter, drawn from this run's seed.
            self.model = lora(
                self.model, LORA_RANK, LORA_ALPHA, targets=("q", "v"), seed=int(rng.integers(2**31))
            )
            self.trained = [p for name, p in self.model.named_parameters() if "lora_" in name]
        elif arm.tuned == "norms_biases":
            self.trained = [
                p for name, p in self.model.named_parameters() if "norm" in name or name.endswith("bias")
            ]
        else:
            self.trained = list(self.model.parameters())
        if not arm.prompt:
            self.head = nn.Linear(model.config.width, TOPICS, device=device)
            with torch.no_grad():
                self.head.weight.normal_(0.0, model.config.width**-0.5, generator=generator)
                self.head.bias.zero_()
            self.trained = [*self.trained, *self.head.parameters()]
        chosen = {id(p) for p in self.trained}
        for p in self.model.parameters():
            p.requires_grad_(id(p) in chosen)
        self.labels = LABEL_WORDS.to(device)

    def inputs(self, data: Examples) -> Tensor:
        return data.prompted() if self.head is None else data.unprompted()

    def logits(self, ids: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(self.model.last_hidden(ids))
        # Only four words are asked about, so only their four columns of the output layer are computed.
        return self.model.last_hidden(ids) @ self.model.embedding.weight[self.labels].T

    @torch.no_grad()
    def accuracy(self, ids: Tensor, topics: Tensor) -> float:
        return float((self.logits(ids).argmax(dim=1) == topics).float().mean())

    def objective(self, ids: Tensor, topics: Tensor) -> Tensor | float:
        logits = self.logits(ids)
        if self.arm.objective == "accuracy":
            return -float((logits.argmax(dim=1) == topics).float().mean())
        return F.cross_entropy(logits, topics)

    @property
    def n_trained(self) -> int:
        return sum(p.numel() for p in self.trained)


def run_mezo(
    model: Decoder,
    arm: Arm,
    lr: float,
    data: Examples,
    test: Examples,
    *,
    steps: int,
    seed: int,
    eval_at: Sequence[int],
) -> dict[str, Any]:
    """Train one arm for `2 * steps` forward passes and test it on the way.

    Returns: curve (test accuracy at each of `at`, counted in units of two forward passes), area (its mean without the start:
    how fast and how far), losses (training objective at each update), trained (number of weights), final.
    """
    rng = np.random.default_rng([seed, 1])
    task = Task(model, arm, rng)
    ids, topics = task.inputs(data), data.topics
    test_ids = task.inputs(test)
    order = np.random.default_rng([seed, 2])
    per_update = 0.5 if arm.estimator == "one_point" else float(arm.n)
    updates = max(1, int(arm.budget * steps / per_update))
    stops = {round(at / per_update): at for at in eval_at if at <= arm.budget * steps}
    chosen = torch.arange(len(data))

    def closure() -> Tensor | float:
        return task.objective(ids[chosen], topics[chosen])

    if arm.estimator == "one_point":
        update = _one_point(task, lr, arm.eps, seed, closure)
    else:
        optimizer = MeZO(
            task.trained, lr=lr * arm.n, eps=arm.eps, n=arm.n, dist=arm.dist, betas=arm.betas, seed=seed
        )

        def update(step: int) -> float:
            if arm.decay:
                optimizer.param_groups[0]["lr"] = lr * (1 - step / updates)
            return float(optimizer.step(closure))

    curve = {0: task.accuracy(test_ids, test.topics)} if 0 in eval_at else {}

    def step(index: int) -> float:
        nonlocal chosen
        if arm.batch:
            chosen = torch.from_numpy(order.choice(len(data), size=min(arm.batch, len(data)), replace=False))
        loss = update(index)
        if index + 1 in stops:
            curve[stops[index + 1]] = task.accuracy(test_ids, test.topics)
        return loss

    with torch.no_grad(), warnings.catch_warnings():
        # Arms that fail (no prompt, no pretraining, a rate that is too large, accuracy at its best) are the point here.
        warnings.filterwarnings("ignore", message="the loss rose from|the losses at theta")
        losses = train(step, updates, text=arm.name)
    at_the_end = arm.budget * steps
    final = curve[at_the_end] if at_the_end in curve else task.accuracy(test_ids, test.topics)
    on_the_way = [curve[at] for at in sorted(curve) if at > 0] or [final]
    return {
        "curve": [curve[at] for at in sorted(curve)],
        "area": float(np.mean(on_the_way)),
        "at": sorted(curve),
        "losses": losses,
        "trained": task.n_trained,
        "final": final,
    }


def _one_point(task: Task, lr: float, eps: float, seed: int, closure: Any) -> Any:
    """Residual-feedback estimator with one forward pass a step (the paper's Definition 8, with the factor z that its formula omits)."""
    previous: list[float] = []
    starts = np.cumsum([0, *(p.numel() for p in task.trained)])[:-1].tolist()

    def shift(draw: int, scale: float) -> None:
        add_noise_(task.trained, starts, [(draw, scale)])

    def update(step: int) -> float:
        draw = draw_seed(seed, step)
        shift(draw, eps)
        loss = float(closure())
        shift(draw, -eps - (lr * (loss - previous[-1]) / eps if previous else 0.0))
        previous.append(loss)
        return loss

    return update


def fine_tune(
    model: Decoder,
    lr: float,
    data: Examples,
    test: Examples,
    *,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Adam by backpropagation on the same prompt and examples: accuracy after `steps`, and the training losses."""
    task = Task(model, ARMS["full"], np.random.default_rng([seed, 1]))
    ids = task.inputs(data)
    optimizer = torch.optim.Adam(task.trained, lr=lr)

    def loss_fn(step: int) -> Tensor:
        return F.cross_entropy(task.logits(ids), data.topics)

    losses = train(backward_step(loss_fn, optimizer), steps, text="fine-tuning")
    return {"final": task.accuracy(task.inputs(test), test.topics), "losses": losses}


@torch.no_grad()
def zero_shot(model: Decoder, test: Examples) -> float:
    """Accuracy of the prompt alone."""
    task = Task(model, ARMS["full"], np.random.default_rng(0))
    return task.accuracy(task.inputs(test), test.topics)


@torch.no_grad()
def in_context(model: Decoder, data: Examples, test: Examples, *, seed: int) -> float:
    """Accuracy with one demonstration per topic in front of each question, their order drawn from the seed."""
    rng = np.random.default_rng([seed, 3])
    shown = rng.permutation(
        [int(rng.choice(np.flatnonzero(data.topics.numpy() == t))) for t in range(TOPICS)]
    )
    ids = with_demonstrations(test, Examples(data.words[shown], data.topics[shown]))
    logits = model.next_logits(ids)[:, LABEL_WORDS.to(ids.device)]
    return float((logits.argmax(dim=1) == test.topics).float().mean())


@torch.no_grad()
def linear_probe(model: Decoder, data: Examples, test: Examples) -> float:
    """Logistic regression on the last hidden state of the prompt."""
    from sklearn.linear_model import LogisticRegression

    features, targets = model.last_hidden(data.prompted()).cpu().numpy(), data.topics.cpu().numpy()
    probe = LogisticRegression(max_iter=5000, C=10.0).fit(features, targets)
    return float(probe.score(model.last_hidden(test.prompted()).cpu().numpy(), test.topics.cpu().numpy()))


def few_shot(k: int, seed: int) -> Examples:
    """The k labelled sentences per topic of one seed."""
    return examples(k, np.random.default_rng([seed, 4, k]))


def test_sentences(n: int, seed: int) -> Examples:
    """Test sentences, drawn apart from every few-shot sample."""
    return examples(n // TOPICS, np.random.default_rng([seed, 5]))
