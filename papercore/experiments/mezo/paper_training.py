"""What a cell of the paper's table is: one method on one sample, trained where it trains, chosen by validation, then tested.

Every function returns a flat dict: "test" (percent), what a table shows beside it, and for trained methods "validation" (percent,
at the best check), "best_step", "checks" and "checked" (steps and scores of all checks) and "losses" (means over windows).

Glossary
    check   an evaluation on the validation examples during training
    joint   training examples of one step over all processes; a process computes the loss of its share
    log     (seed, projected gradient) of every MeZO step: the run's checkpoint, and its best weights by replay
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papercore.experiments.mezo.paper_models import LanguageModel, untie_output_layer
from papercore.experiments.mezo.paper_settings import Trial
from papercore.experiments.mezo.problems import CausalProblem, Problem
from papercore.experiments.mezo.prompts import Row
from papercore.experiments.mezo.tasks import demonstrations
from papercore.lab.training import Checkpoint, backward_step, train, warmup_linear
from papercore.mezo import MeZO, ZOLog, replay

LOSS_WINDOWS = 100
PROBE_ITERATIONS, PROBE_TOLERANCE, PROBE_FOLDS = 5000, 1e-4, 5
PROBE_PENALTIES = np.logspace(-4, 4, 10)

Result = dict[str, Any]


def zero_shot(model: LanguageModel, problem: Problem) -> Result:
    """The pretrained model with the prompt alone."""
    return _tested(problem.evaluate(model.untouched(), "test", model.processes), problem.metric)


def in_context(model: LanguageModel, problem: CausalProblem, pool: Sequence[Row], count: int) -> Result:
    """`count` answered examples in front of each test question, drawn anew for each from `pool`."""
    tests = problem.questions["test"]
    drawn = demonstrations(pool, len(tests), count=count)
    questions = [
        q.after([problem.prompt.question(row) for row in rows]) for q, rows in zip(tests, drawn, strict=True)
    ]
    return _tested(problem.score(model.untouched(), questions, model.processes, "test"), problem.metric)


def linear_probe(model: LanguageModel, problem: Problem) -> Result:
    """Logistic regression on what the output layer sees, its penalty chosen by cross-validation on the training examples.

    Like the released code: an intercept for RoBERTa, whose output layer has one, none for OPT.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    x, y = problem.features(model.untouched(), "train", model.processes)
    tests, labels = problem.features(model.untouched(), "test", model.processes)
    probe: Any = LogisticRegression(
        max_iter=PROBE_ITERATIONS, tol=PROBE_TOLERANCE, fit_intercept=model.family == "masked"
    )
    folds = min(PROBE_FOLDS, int(np.unique(y, return_counts=True)[1].min()))
    if folds > 1:
        probe = GridSearchCV(probe, {"C": PROBE_PENALTIES}, scoring="accuracy", cv=StratifiedKFold(folds))
    with warnings.catch_warnings():
        # The weakest penalties need not converge to be compared.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(x, y)
    return {"test": 100 * float((probe.predict(tests) == labels).mean()), "folds": folds}


def tune_mezo(
    model: LanguageModel, problem: Problem, method: str, trial: Trial, *, seed: int, folder: Path
) -> Result:
    """MeZO on all weights, LoRA or a prefix; constant learning rate, best check kept.

    An interrupted run goes on from its log in `folder`: replayed on the pretrained weights it gives the very weights that the run
    had. The best check's weights come from the log as well, so no copy of the model is ever stored.
    """
    try:
        log, curve, losses, last = _mezo_run(model, problem, method, trial, seed, folder)
    except FloatingPointError as error:
        return _diverged(error)
    best = curve.best
    if best == trial.steps:
        tuned = last
    else:
        del last
        tuned = replay(model.adapted(method, seed), log, best)
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    scores = problem.evaluate(tuned, "test", model.processes)
    return {
        **_tested(scores, problem.metric),
        **curve.as_dict(losses),
        "log_bytes": log.nbytes,
        "trained_weights": trained,
    }


def _mezo_run(
    model: LanguageModel, problem: Problem, method: str, trial: Trial, seed: int, folder: Path
) -> tuple[ZOLog, Curve, list[float], nn.Module]:
    processes = model.processes
    tuned = model.adapted(method, seed)
    optimizer = MeZO(
        tuned.named_parameters(),
        lr=trial.lr,
        eps=trial.eps,
        weight_decay=trial.weight_decay,
        decay_filter="no_bias_norm",
        seed=seed,
        mode=model.mode,
        process_group=processes.group,
    )
    curve = Curve()

    def step(index: int) -> float:
        joint = batch_of(problem.train_examples, index, trial.batch, seed)
        mine = processes.share(joint, "a MeZO step")
        loss = optimizer.step(lambda: problem.loss(tuned, mine, joint))
        if curve.due(index + 1, trial):
            curve.add(index + 1, problem.evaluate(tuned, "validation", processes)[problem.metric])
        return loss

    # All processes read the first one's checkpoint: their logs are the same, and none may be a check ahead of another.
    every = trial.every if processes.rank == 0 else trial.steps
    checkpoint = Checkpoint(folder / "run.pt", every, {"run": _Replayed(tuned, optimizer, curve)})
    losses = train(step, trial.steps, text=f"{model.label} {method} {trial.name}", checkpoint=checkpoint)
    return optimizer.log, curve, processes.mean_of(losses), tuned


def tune_adam(
    model: LanguageModel, problem: Problem, trial: Trial, *, seed: int, head_only: bool = False
) -> Result:
    """Adam by backpropagation in float32 with linear decay, best check kept; on CUDA the arithmetic is bfloat16 where MeZO's is half.

    Args:
        head_only: train the output layer alone, dropout off: the linear probe of tasks whose answers are texts.

    The paper used float16 autocast with loss scaling; bfloat16 needs none. With several processes each takes its share of a batch
    and gradients are averaged, so every process holds the whole model: 16 bytes a weight.
    """
    processes = model.processes
    tuned = model.fresh(torch.float32)
    if head_only:
        tuned.requires_grad_(False)
        untie_output_layer(tuned)
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer, best = torch.optim.Adam(weights, lr=trial.lr), BestWeights(weights)
    optimizer.register_step_pre_hook(
        lambda *_: processes.mean_([p.grad for p in weights if p.grad is not None])
    )
    curve, half = Curve(), model.dtype != torch.float32
    device = processes.device.type

    def loss_of(index: int) -> Tensor:
        joint = batch_of(problem.train_examples, index, trial.batch, seed)
        mine = processes.share(joint, "an Adam step")
        tuned.train(not head_only)
        with torch.autocast(device, torch.bfloat16, enabled=half and device == "cuda"):
            loss = problem.loss(tuned, mine, joint)
        tuned.eval()
        return _same_finiteness(loss, processes.mean_)

    update = backward_step(loss_of, optimizer, lr=warmup_linear(trial.lr, trial.steps))

    def step(index: int) -> float:
        loss = update(index)
        if np.isfinite(loss) and curve.due(index + 1, trial):
            curve.add(index + 1, problem.evaluate(tuned, "validation", processes)[problem.metric])
            if curve.best == index + 1:
                best.keep()
        return loss

    # Dropout draws from torch's own generator: seeded here, and given back as it was.
    with torch.random.fork_rng([processes.device] if device == "cuda" else []):
        torch.manual_seed(seed * processes.world + processes.rank)
        try:
            losses = train(
                step, trial.steps, text=f"{model.label} {'head' if head_only else 'ft'} {trial.name}"
            )
        except FloatingPointError as error:
            return _diverged(error)
    best.restore()
    scores = problem.evaluate(tuned, "test", processes)
    return {
        **_tested(scores, problem.metric),
        **curve.as_dict(losses),
        "trained_weights": sum(p.numel() for p in weights),
    }


def _same_finiteness(loss: Tensor, mean_: Callable[[list[Tensor]], None]) -> Tensor:
    """The loss, not finite on every process when it is so on one: all stop together."""
    seen = loss.detach().clone()
    mean_([seen])
    return loss if torch.isfinite(seen) else seen


def batch_of(examples: int, step: int, size: int, seed: int) -> list[int]:
    """Training examples of a step: consecutive pieces of an endless row of epochs, each in an order drawn from (seed, epoch).

    All examples when there are no more than `size`. A pure function of its arguments, so that a resumed run sees the same.

    >>> batch_of(3, step=0, size=8, seed=1)
    [0, 1, 2]
    """
    if examples <= size:
        return list(range(examples))
    chosen: list[int] = []
    at = step * size
    while len(chosen) < size:
        epoch, place = divmod(at + len(chosen), examples)
        order = np.random.default_rng([seed, epoch]).permutation(examples)
        chosen += order[place : place + size - len(chosen)].tolist()
    return chosen


class Curve:
    """Validation scores of a run, and which of them is best (the earliest of equals)."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.scores: list[float] = []

    def due(self, done: int, trial: Trial) -> bool:
        """Whether to check after `done` steps: every `trial.every`, and at the end."""
        return done % trial.every == 0 or done == trial.steps

    def add(self, done: int, score: float) -> None:
        self.steps.append(done)
        self.scores.append(score)

    @property
    def best(self) -> int:
        """Steps done at the best check."""
        return self.steps[int(np.argmax(self.scores))]

    def as_dict(self, losses: list[float]) -> Result:
        """What a stage keeps."""
        windows = [float(np.mean(part)) for part in np.array_split(losses, min(LOSS_WINDOWS, len(losses)))]
        kept = {
            "validation": max(self.scores),
            "best_step": self.best,
            "checks": self.steps,
            "checked": self.scores,
        }
        return {**kept, "losses": np.array(windows), "diverged": ""}


class BestWeights:
    """A copy of the trained weights in main memory, for Adam, whose steps cannot be replayed."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.kept: list[Tensor] = []

    def keep(self) -> None:
        self.kept = [w.detach().to("cpu", copy=True) for w in self.weights]

    @torch.no_grad()
    def restore(self) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.copy_(kept)


class _Replayed:
    """A MeZO run as `Checkpoint` wants it: the optimizer's log and the curve; the weights follow from the log."""

    def __init__(self, model: nn.Module, optimizer: MeZO, curve: Curve) -> None:
        self.model, self.optimizer, self.curve = model, optimizer, curve

    def state_dict(self) -> Result:
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.curve.steps,
            "scores": self.curve.scores,
        }

    def load_state_dict(self, state: Result) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        replay(self.model, self.optimizer.log)
        self.curve.steps, self.curve.scores = list(state["steps"]), list(state["scores"])


def _tested(scores: dict[str, float], metric: str) -> Result:
    return {"test": scores[metric], **{name: value for name, value in scores.items() if name != metric}}


def _diverged(error: FloatingPointError) -> Result:
    """A result, not an accident: this learning rate is too large, and the grid goes on without it."""
    return {
        "test": float("nan"),
        "validation": float("-inf"),
        "best_step": 0,
        "checks": [],
        "checked": [],
        "diverged": str(error),
    }
