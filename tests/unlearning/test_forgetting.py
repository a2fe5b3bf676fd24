"""Choosing pairs, against counts by hand; training; the stop rule; errors and warnings as text."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from papercore.unlearning import (
    DKVBClassifier,
    KeyValueBottleneck,
    bottleneck_flops,
    forget_until,
    look_up,
    measured_flops,
    random_pairs,
    train_values,
    unlearn_by_activations,
    unlearn_by_examples,
    warn_unless_local,
)
from tests.unlearning.bottlenecks import blobs, bottleneck, features


def trained(seed: int = 0) -> tuple[KeyValueBottleneck, torch.Tensor, torch.Tensor]:
    z, labels = blobs()
    model = KeyValueBottleneck(12, 16, 16, dim_key=4, dim_value=4, seed=seed).init_keys(z, epochs=2)
    train_values(model, (z, labels), epochs=5)
    return model, z, labels


def accuracy(model: torch.nn.Module, z: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(z).argmax(1) == labels).double().mean())


def test_activations_mask_the_most_used_pairs() -> None:
    model, z = bottleneck(), features(30, seed=3)
    usage = model.usage(z)
    report = unlearn_by_activations(model, z, num_pairs=25)
    assert int(report.masked.sum()) == 25 and torch.equal(model.mask, report.masked)
    assert int(usage[report.masked].min()) >= int(usage[~report.masked].max())
    assert report.used == int((usage > 0).sum()) and report.examples == 30 and report.backward_flops == 0
    assert report.flops == bottleneck_flops(model, 30, read=False) == 30 * 2 * (12 * 6 * 5 + 6 * 20 * 5)


def test_examples_mask_all_that_they_fetch() -> None:
    model, z = bottleneck(), features(30, seed=3)
    report = unlearn_by_examples(model, z, num_examples=3, generator=torch.Generator().manual_seed(4))
    chosen = torch.randperm(30, generator=torch.Generator().manual_seed(4))[:3]
    assert torch.equal(report.masked, bottleneck().usage(z[chosen]) > 0)
    assert int(report.masked.sum()) <= 3 * 6


def test_all_examples_leave_a_disjoint_support() -> None:
    model, z, labels = trained()
    forget = z[labels == 2]
    used = model.usage(forget) > 0
    unlearn_by_examples(model, (forget, labels[labels == 2]), num_examples=len(forget))
    assert not bool(model.usage(forget)[used].any())
    assert accuracy(model, forget, labels[labels == 2]) == 0.0
    assert accuracy(model, z[labels != 2], labels[labels != 2]) > 0.97


def test_every_form_of_a_forget_set_gives_the_same_mask() -> None:
    z, labels = features(30, seed=3), torch.arange(30) % 4
    loader = DataLoader(TensorDataset(z, labels), batch_size=7)
    masks = []
    for forget in (z, (z, labels), loader, look_up(bottleneck(), loader)):
        model = bottleneck()
        report = unlearn_by_activations(model, forget, num_pairs=20)
        masks.append(model.mask)
        assert (report.flops == 0) == (forget.__class__.__name__ == "LookupLog")
    assert all(torch.equal(masks[0], mask) for mask in masks)


def test_forgetting_from_the_log_of_training_costs_nothing_and_is_the_same() -> None:
    model, z, labels = trained()
    twin = copy.deepcopy(model)
    log = train_values(copy.deepcopy(model), (z, labels), epochs=0).log
    free = unlearn_by_activations(model, log.of_class(1), share=0.5)
    paid = unlearn_by_activations(twin, z[labels == 1], share=0.5)
    assert torch.equal(model.mask, twin.mask) and free.flops == 0 < paid.flops
    assert "100 examples of class 1" in free.subject


def test_a_request_twice_changes_nothing_and_says_so() -> None:
    model, z = bottleneck(), features(30, seed=3)
    unlearn_by_activations(model, z, num_pairs=25)
    before = model.mask.clone()
    with pytest.warns(UserWarning, match="all 25 pairs of this request are masked already: nothing changed"):
        report = unlearn_by_activations(model, z, num_pairs=25)
    assert report.fresh == 0 and torch.equal(model.mask, before)


def test_the_order_of_requests_does_not_matter() -> None:
    (a, z, labels), (b, _, _) = trained(), trained()
    for model, classes in ((a, (0, 1)), (b, (1, 0))):
        for label in classes:
            unlearn_by_activations(model, z[labels == label], num_pairs=20)
    assert torch.equal(a.mask, b.mask)


def test_more_pairs_than_used_are_clipped_with_a_warning() -> None:
    model, z = bottleneck(), features(4, seed=3)
    used = int((model.usage(z) > 0).sum())
    with pytest.warns(
        UserWarning, match=f"num_pairs=100, but the forget set uses {used} pairs: {used} are masked"
    ):
        report = unlearn_by_activations(model, z, num_pairs=100)
    assert int(report.masked.sum()) == used


def test_share_of_use_spares_pairs_of_the_rest() -> None:
    model, z, labels = trained()
    log = look_up(model, (z, labels))
    rest = log.at(labels != 0).usage()
    by_count, by_share = copy.deepcopy(model), model
    unlearn_by_activations(by_count, log.of_class(0), share=0.3)
    unlearn_by_activations(by_share, log.of_class(0), share=0.3, retain_usage=rest)
    assert int(by_share.mask.sum()) == int(by_count.mask.sum())
    assert int(rest[by_share.mask].sum()) < int(rest[by_count.mask].sum())


@pytest.mark.parametrize("with_labels", [True, False])
def test_the_stop_rule_finds_the_smallest_share(with_labels: bool) -> None:
    model, z, labels = trained()
    forget = z[labels == 3]
    examples = (forget, labels[labels == 3]) if with_labels else forget
    report = forget_until(model, examples, target=0.0, step=0.1)
    pairs, shares = zip(*report.history, strict=True)
    assert shares[-1] == 0.0 and min(shares[:-1]) > 0.0 and list(pairs) == sorted(pairs)
    assert int(model.mask.sum()) == pairs[-1] == int(report.masked.sum()) < report.used
    assert accuracy(model, forget, labels[labels == 3]) == 0.0
    assert [e.action for e in model.audit] == ["mask"]
    assert report.flops > bottleneck_flops(model, 100, read=False)


def test_a_stop_rule_that_is_not_met_masks_nothing() -> None:
    model = bottleneck()
    model.values.data.zero_()
    model.values.data[..., 1] = 1.0
    with pytest.raises(
        ValueError, match=r"no mask brings the share of recognised forget examples down to 0\.005"
    ):
        forget_until(model, features(10, seed=3))
    assert not bool(model.mask.any()) and len(model.audit) == 0


def test_a_classifier_counts_its_backbone() -> None:
    backbone = torch.nn.Linear(3, 12)
    x = features(20, 3)
    cost = measured_flops(backbone, x[:1])
    model = DKVBClassifier(backbone, bottleneck(), backbone_flops=cost)
    report = unlearn_by_activations(model, x, num_pairs=10)
    assert cost == 2 * 3 * 12 and report.backbone_flops == 20 * cost
    assert torch.equal(model.bottleneck.mask, report.masked)


def test_reports_never_say_erased() -> None:
    model, z = bottleneck(), features(30, seed=3)
    text = str(unlearn_by_activations(model, z, num_pairs=25))
    assert "erase" not in text and "Keys and values are still stored, and the backbone is unchanged." in text


def test_values_train_as_autograd_with_plain_sgd() -> None:
    z, labels = blobs(40)
    fast, slow = bottleneck(random_values=False), bottleneck(random_values=False)
    train_values(fast, (z, labels), epochs=2, lr=3.0, batch_size=16, label_smoothing=0.1, clip=0.05)
    optimizer = torch.optim.SGD(slow.parameters(), lr=3.0)
    g = torch.Generator().manual_seed(0)
    for _ in range(2):
        for chosen in torch.randperm(40, generator=g).split(16):
            optimizer.zero_grad()
            functional.cross_entropy(slow(z[chosen]), labels[chosen], label_smoothing=0.1).backward()
            torch.nn.utils.clip_grad_norm_(slow.parameters(), 0.05)
            optimizer.step()
    torch.testing.assert_close(fast.values, slow.values, rtol=1e-4, atol=1e-6)
    assert bool(fast.values.any())


def test_training_under_a_mask_leaves_masked_values_alone() -> None:
    model, z, labels = trained()
    unlearn_by_activations(model, z[labels == 0], num_pairs=80)
    before = model.values.detach().clone()
    train_values(model, (z[labels != 0], labels[labels != 0]), epochs=1)
    assert torch.equal(model.values[model.mask], before[model.mask]) and not torch.equal(model.values, before)
    with pytest.raises(ValueError, match="the log holds look-ups of pairs that are masked now"):
        train_values(model, look_up(model, (z, labels)), epochs=1)


def test_random_pairs_are_a_control_of_equal_size() -> None:
    used = bottleneck().usage(features(30, seed=3)) > 0
    chosen = random_pairs(used, 10, generator=torch.Generator().manual_seed(1))
    assert int(chosen.sum()) == 10 and not bool((chosen & ~used).any())
    with pytest.raises(ValueError, match=r"count=121 is more than the \d+ marked pairs"):
        random_pairs(used, 121)


def test_optimisers_that_are_not_local_are_warned_about() -> None:
    model = bottleneck()
    assert warn_unless_local(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.warns(
        UserWarning, match="momentum and weight_decay will move values that the batch did not fetch"
    ):
        warn_unless_local(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), model)
    with pytest.warns(UserWarning, match="Adam will move values"):
        warn_unless_local(torch.optim.Adam(model.parameters()), model)


def test_requests_that_do_not_fit() -> None:
    model, z = bottleneck(), features(10, seed=3)
    for call, message in [
        (lambda: unlearn_by_activations(model, z, num_pairs=0), "num_pairs=0 must be an integer >= 1"),
        (
            lambda: unlearn_by_activations(model, z, num_pairs=121),
            "num_pairs=121 is more than the 120 pairs of the bottleneck",
        ),
        (lambda: unlearn_by_activations(model, z), "give either num_pairs"),
        (
            lambda: unlearn_by_activations(model, z[:0], num_pairs=3),
            "forget is empty: expected at least one example",
        ),
        (
            lambda: unlearn_by_examples(model, z, num_examples=11),
            "num_examples=11 is more than the 10 forget examples",
        ),
        (lambda: unlearn_by_examples(model, z, num_examples=0), "num_examples=0 must be an integer >= 1"),
        (lambda: unlearn_by_examples(model, z[:0], num_examples=1), "forget is empty"),
        (
            lambda: look_up(model, (z, torch.arange(10))).of_class(11),
            "class 11 is not among the 10 logged examples",
        ),
        (
            lambda: train_values(model, (z, torch.full((10,), 4))),
            "labels holds the class 4, but there are 4 outputs",
        ),
        (lambda: train_values(model, z), "examples needs labels"),
        (
            lambda: unlearn_by_activations(model, look_up(bottleneck(pairs=9), z), num_pairs=3),
            "the log has 6 codebooks of 9 pairs, the model 6 of 20",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert not bool(model.mask.any()) and len(model.audit) == 0
    with pytest.raises(TypeError, match="model must be a KeyValueBottleneck, or have one as .bottleneck"):
        unlearn_by_activations(torch.nn.Linear(2, 2), z, num_pairs=3)
    with pytest.raises(TypeError, match="forget must be features, a pair"):
        unlearn_by_activations(model, 3, num_pairs=3)
