"""What an unlearned model still knows: accuracies, linear probes on its outputs and features, and membership inference.

Zero accuracy on the forget class is easy: setting its logit to -infinity does it, too. So beside it stand

    probe_accuracy           share of the forget examples that a linear probe on the model's *outputs* puts into their class
    feature_probe_accuracy   the same, on the features that enter the head: what the frozen backbone still encodes
    membership_auc           chance that a forget example of the training set has a lower loss than one it has not seen; .5 is none

A probe is a multinomial logistic regression, fitted on a random half of the examples with true labels, judged on the other half.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from papercore.unlearning.arguments import Examples, check_generator, gather
from papercore.unlearning.classifier import DKVBClassifier

__all__ = ["evaluate_unlearning", "linear_probe", "membership_inference"]


def evaluate_unlearning(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    probe: bool = True,
    forget_train: Examples | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Accuracies, and what can still be found of the forget set.

    Args:
        model: maps inputs to logits; judged in eval mode.
        retain, forget: examples with labels that the model was not trained on.
        probe: fit the probes; takes at least 2 forget and 2 retained examples.
        forget_train: forget examples that it was trained on: adds membership inference, these against `forget`.
        generator: of the probes' halves; default: seeded with 0.

    Returns:
        dict: retain_accuracy, forget_accuracy; with probe: probe_accuracy, probe_retain_accuracy, and, where there are features (inputs
        of two axes, or a DKVBClassifier), feature_probe_accuracy; with forget_train: forget_train_accuracy, membership_auc,
        membership_advantage.

    Raises:
        ValueError: an empty set, or one without labels; too few examples for a probe.

    >>> head = nn.Linear(2, 2)
    >>> head.load_state_dict({"weight": 9 * torch.eye(2), "bias": torch.tensor([0.0, -99.0])})   # class 1 is suppressed
    <All keys matched successfully>
    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 1] > x[:, 0]).long()
    >>> found = evaluate_unlearning(head, (x[y == 0], y[y == 0]), (x[y == 1], y[y == 1]))
    >>> found["forget_accuracy"], found["probe_accuracy"] > 0.9
    (0.0, True)
    """
    kept, kept_labels = gather("retain", retain, labelled=True)
    gone, gone_labels = gather("forget", forget, labelled=True)
    assert kept_labels is not None and gone_labels is not None
    was_training = model.training
    model.eval()
    try:
        right, wrong = _outputs(model, kept), _outputs(model, gone)
        result = {
            "retain_accuracy": _accuracy(right, kept_labels),
            "forget_accuracy": _accuracy(wrong, gone_labels),
        }
        if probe:
            outputs, labels = torch.cat([right, wrong]), torch.cat([kept_labels, gone_labels])
            is_gone = torch.arange(len(labels)) >= len(kept)
            found = _probe_halves(outputs, labels, is_gone, generator)
            result["probe_accuracy"], result["probe_retain_accuracy"] = found
            if isinstance(model, DKVBClassifier):
                features = torch.cat([_outputs(model.encode, kept), _outputs(model.encode, gone)])
            else:
                features = torch.cat([kept, gone])
            if features.dim() == 2:
                result["feature_probe_accuracy"] = _probe_halves(features, labels, is_gone, generator)[0]
        if forget_train is not None:
            seen, seen_labels = gather("forget_train", forget_train, labelled=True)
            assert seen_labels is not None
            logits = _outputs(model, seen)
            result["forget_train_accuracy"] = _accuracy(logits, seen_labels)
            auc, advantage = membership_inference(
                functional.cross_entropy(logits, seen_labels.to(logits.device), reduction="none"),
                functional.cross_entropy(wrong, gone_labels.to(wrong.device), reduction="none"),
            )
            result["membership_auc"], result["membership_advantage"] = auc, advantage
    finally:
        model.train(was_training)
    return result


def membership_inference(member_losses: Tensor, other_losses: Tensor) -> tuple[float, float]:
    """(AUC, advantage) of guessing "was in the training set" by a low loss.

    AUC = P(member < other) + P(equal) / 2; advantage = the largest true minus false positive rate over all thresholds.

    >>> membership_inference(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.2, 0.9]))
    (0.75, 0.5)
    """
    if member_losses.numel() == 0 or other_losses.numel() == 0:
        raise ValueError(
            f"{member_losses.numel()} members and {other_losses.numel()} others: expected at least one of each"
        )
    members, others = member_losses.double().flatten(), other_losses.double().flatten()
    if bool(members.isnan().any() | others.isnan().any()):
        raise ValueError("a loss is NaN")
    ordered = others.sort().values
    below = len(others) - torch.searchsorted(ordered, members, right=True)
    equal = torch.searchsorted(ordered, members, right=True) - torch.searchsorted(ordered, members)
    auc = float((below + equal / 2).mean() / len(others))
    thresholds = torch.cat([members, others]).unique()
    caught = torch.searchsorted(members.sort().values, thresholds, right=True) / len(members)
    accused = torch.searchsorted(ordered, thresholds, right=True) / len(others)
    return auc, max(0.0, float((caught.double() - accused.double()).max()))


def linear_probe(features: Tensor, labels: Tensor, *, penalty: float = 1e-4, steps: int = 200) -> nn.Module:
    """Multinomial logistic regression on standardised features, by L-BFGS in float64 from zero: no randomness.

    Args:
        features: [N, D]; columns that hold infinity or NaN are left out.
        labels: LongTensor [N].
        penalty: of the squared weights.
        steps: at most.
    """
    x = features.detach().double()
    used = torch.isfinite(x).all(0)
    x = x[:, used]
    mean, scale = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-12)
    classes = int(labels.max()) + 1
    weight = torch.zeros(x.shape[1] + 1, classes, dtype=torch.float64, device=x.device, requires_grad=True)
    standard = torch.cat([(x - mean) / scale, torch.ones_like(x[:, :1])], 1)
    known = labels.to(x.device)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(standard @ weight, known) + penalty * weight[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return _Probe(used, mean, scale, weight.detach())


class _Probe(nn.Module):
    def __init__(self, used: Tensor, mean: Tensor, scale: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.used, self.mean, self.scale, self.weight = used, mean, scale, weight

    def forward(self, features: Tensor) -> Tensor:
        x = (features.double()[:, self.used] - self.mean) / self.scale
        return x @ self.weight[:-1] + self.weight[-1]


def _probe_halves(
    features: Tensor, labels: Tensor, is_gone: Tensor, generator: torch.Generator | None
) -> tuple[float, float]:
    """Accuracy of a probe on the held-out half of the forget and of the retained examples."""
    gone, kept = int(is_gone.sum()), int((~is_gone).sum())
    if min(gone, kept) < 2:
        raise ValueError(
            f"a probe needs at least 2 forget and 2 retained examples, got {gone} and {kept}: give more, or probe=False"
        )
    # The caller's generator is left where it stands, so that both probes see the same halves.
    draw = (
        check_generator(None)
        if generator is None
        else torch.Generator().manual_seed(generator.initial_seed())
    )
    fit = torch.zeros(len(labels), dtype=torch.bool)
    for group in (is_gone, ~is_gone):
        places = group.nonzero().flatten()
        fit[places[torch.randperm(len(places), generator=draw)[: len(places) // 2]]] = True
    labels = labels.cpu()
    probe = linear_probe(features[fit.to(features.device)], labels[fit])
    guess = probe(features[(~fit).to(features.device)]).argmax(1).cpu()
    right = guess == labels[~fit]
    part = is_gone[~fit]
    return float(right[part].double().mean()), float(right[~part].double().mean())


@torch.no_grad()
def _outputs(model: object, inputs: Tensor, batch_size: int = 1024) -> Tensor:
    return torch.cat([model(some) for some in inputs.split(batch_size)])  # type: ignore[operator]


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())
