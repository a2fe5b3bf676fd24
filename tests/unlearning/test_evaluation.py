"""Accuracies, probes and membership inference against definitions and scikit-learn; files."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from papercore.unlearning import (
    DKVBClassifier,
    KeyValueBottleneck,
    evaluate_unlearning,
    linear_probe,
    load_bottleneck,
    membership_inference,
    save_bottleneck,
    train_values,
    unlearn_by_activations,
)
from tests.unlearning.bottlenecks import blobs, bottleneck, features


class Suppressed(nn.Module):
    """The trivial control: a class's logit is -infinity."""

    def __init__(self, model: nn.Module, label: int) -> None:
        super().__init__()
        self.model, self.label = model, label

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        logits = self.model(z).clone()
        logits[:, self.label] = -torch.inf
        return logits


def trained() -> tuple[KeyValueBottleneck, tuple, tuple]:
    z, labels = blobs()
    model = KeyValueBottleneck(12, 16, 16, dim_key=4, dim_value=4).init_keys(z, epochs=2)
    train_values(model, (z, labels), epochs=5)
    test, known = blobs(seed=1)
    gone = known == 0
    return model, (test[~gone], known[~gone]), (test[gone], known[gone])


def test_a_mask_and_a_suppressed_logit_look_alike_in_outputs_and_the_probe_finds_the_class_in_both() -> None:
    model, retain, forget = trained()
    before = evaluate_unlearning(model, retain, forget)
    assert before["forget_accuracy"] > 0.95 and before["retain_accuracy"] > 0.95
    control = evaluate_unlearning(Suppressed(model, 0), retain, forget)
    z, labels = blobs()
    unlearn_by_activations(model, z[labels == 0], share=1.0)
    after = evaluate_unlearning(model, retain, forget)
    assert after["forget_accuracy"] == control["forget_accuracy"] == 0.0
    assert after["retain_accuracy"] > before["retain_accuracy"] - 0.02
    assert after["feature_probe_accuracy"] > 0.95 and control["probe_accuracy"] > 0.5
    assert set(after) == {
        "retain_accuracy", "forget_accuracy", "probe_accuracy", "probe_retain_accuracy", "feature_probe_accuracy",
    }  # fmt: skip


def test_outputs_that_say_nothing_leave_nothing_to_probe() -> None:
    _, retain, forget = trained()
    silent = nn.Linear(12, 4)
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    found = evaluate_unlearning(silent, (retain[0], retain[1]), (forget[0][:40], forget[1][:40]))
    assert found["probe_accuracy"] == 0.0 and found["feature_probe_accuracy"] > 0.9


def test_accuracies_are_shares_and_the_mode_is_put_back() -> None:
    model, retain, forget = trained()
    model.train()
    found = evaluate_unlearning(model, retain, forget, probe=False)
    assert found["retain_accuracy"] == float((model(retain[0]).argmax(1) == retain[1]).double().mean())
    assert set(found) == {"retain_accuracy", "forget_accuracy"} and model.training


def test_a_classifier_is_probed_at_its_backbone() -> None:
    model, retain, forget = trained()
    whole = DKVBClassifier(nn.Flatten(), model)
    shaped = [(z.view(-1, 3, 4), labels) for z, labels in (retain, forget)]
    a, b = evaluate_unlearning(whole, *shaped), evaluate_unlearning(model, retain, forget)
    assert a == pytest.approx(b)


def test_the_probe_is_logistic_regression() -> None:
    z, labels = blobs(150)
    ours = linear_probe(z * torch.linspace(0.1, 9, 12) + 5, labels, penalty=1e-2)
    standard = ((z - z.mean(0)) / z.std(0, unbiased=False)).double().numpy()
    # Their objective: C * sum of losses + |w|^2 / 2; ours: mean of losses + penalty |w|^2.
    theirs = LogisticRegression(C=1 / (2 * 1e-2 * 150), tol=1e-8, max_iter=2000).fit(standard, labels.numpy())
    expected = torch.from_numpy(theirs.predict_log_proba(standard))
    found = ours(z * torch.linspace(0.1, 9, 12) + 5).log_softmax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_membership_inference_against_scikit_learn_and_all_thresholds() -> None:
    g = torch.Generator().manual_seed(0)
    members = torch.rand(40, generator=g).mul(20).round() / 20  # with ties
    others = (torch.rand(30, generator=g).mul(20).round() / 20) + 0.2
    auc, advantage = membership_inference(members, others)
    truth = [1] * 40 + [0] * 30
    assert auc == pytest.approx(roc_auc_score(truth, (-torch.cat([members, others])).tolist()))
    all_thresholds = [
        float((members <= t).double().mean() - (others <= t).double().mean())
        for t in torch.cat([members, others])
    ]
    assert advantage == pytest.approx(max(all_thresholds))


def test_a_memorised_class_is_found_and_the_untrained_is_not() -> None:
    z, labels = blobs(200, dim=12)
    g = torch.Generator().manual_seed(3)
    noise = torch.randint(4, (200,), generator=g)  # nothing to learn, only to memorise
    wide = KeyValueBottleneck(12, 16, 64, dim_key=8, dim_value=4).init_keys(z, epochs=2)
    train_values(wide, (z, noise), epochs=30, label_smoothing=0.0)
    held, other = blobs(200, seed=9)[0], torch.randint(4, (200,), generator=g)
    found = evaluate_unlearning(wide, (z, labels), (held, other), probe=False, forget_train=(z, noise))
    assert found["membership_auc"] > 0.8 and found["membership_advantage"] > 0.4
    wide.values.data.zero_()
    blank = evaluate_unlearning(wide, (z, labels), (held, other), probe=False, forget_train=(z, noise))
    assert blank["membership_auc"] == 0.5 and blank["membership_advantage"] == 0.0


def test_evaluations_that_do_not_fit() -> None:
    model, retain, forget = trained()
    with pytest.raises(ValueError, match="forget is empty"):
        evaluate_unlearning(model, retain, (forget[0][:0], forget[1][:0]))
    with pytest.raises(ValueError, match="retain needs labels: give a pair"):
        evaluate_unlearning(model, retain[0], forget)
    with pytest.raises(
        ValueError, match="a probe needs at least 2 forget and 2 retained examples, got 1 and 300"
    ):
        evaluate_unlearning(model, retain, (forget[0][:1], forget[1][:1]))
    with pytest.raises(ValueError, match="0 members and 3 others"):
        membership_inference(torch.empty(0), torch.ones(3))


def test_files_carry_everything(tmp_path) -> None:
    model, z = bottleneck(abstain=True), features(40, seed=3)
    model.mask_pairs(model.usage(z[:9]) > 1, by="a test", subject="nine examples")
    path = tmp_path / "model.safetensors"
    save_bottleneck(model, path)
    twin = load_bottleneck(path)
    assert torch.equal(twin(z), model(z)) and twin.audit[0] == model.audit[0] and twin.abstain
    twin.unmask()
    assert torch.equal(twin(z), bottleneck()(z))  # a mask hides, and a file of it still holds everything
    model.compact()
    save_bottleneck(model, path)
    small = load_bottleneck(path)
    assert torch.equal(small(z), model(z)) and small.num_pairs == model.num_pairs < 20
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    double = bottleneck().double()
    save_bottleneck(double, tmp_path / "d.safetensors")
    assert load_bottleneck(tmp_path / "d.safetensors").values.dtype == torch.float64


def test_files_that_are_no_bottlenecks(tmp_path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a bottleneck: it is not replaced"):
        save_bottleneck(bottleneck(), other)
    assert other.read_text() == "mine"
    with pytest.raises(ValueError, match="not a bottleneck's safetensors file"):
        load_bottleneck(other)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_bottleneck(tmp_path / "none.safetensors")
