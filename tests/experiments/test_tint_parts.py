"""The pieces of the TinT chapter's experiment against closed forms: language, comparisons, finite differences, choice of the rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from papercore.experiments.tint import comparing, differences, modules, perplexity
from papercore.experiments.tint.config import Config
from papercore.experiments.tint.gradients import cosines, relative_error
from papercore.experiments.tint.language import Language, pair_counts, pair_losses


@pytest.fixture(scope="module")
def language():
    return Language(5, 2, {"train": 2, "test": 3}, seed=0)


def test_names_stand_for_the_first_words(language):
    documents = language.draw(200, 20, "train", seed=1)
    ids = documents.input_ids
    assert int(ids.min()) >= 0 and int(ids.max()) < language.vocabulary == 7
    rows, places = documents.recall.nonzero(as_tuple=True)
    names = ids[rows, places - 1] - language.words
    assert (names >= 0).all() and torch.equal(ids[rows, places], ids[rows, names])
    assert (ids[:, : language.names] < language.words).all()
    # Behind every word of the body comes a name at the stated rate.
    body = ids[:, language.names - 1 : -1] < language.words
    share = (ids[:, language.names :][body] >= language.words).double().mean()
    assert float(share) == pytest.approx(
        language.name_rate, abs=4 * math.sqrt(language.name_rate / int(body.sum()))
    )


def test_the_oracle_is_the_best_and_pairs_cannot_recall(language):
    train, other = (language.draw(400, 20, "train", seed=s) for s in (1, 2))
    pairs = pair_losses(other, pair_counts(train, language.vocabulary))
    oracle = -other.oracle[:, 1:]
    assert float(oracle.mean()) < float(pairs.mean()) - 0.3
    there = other.recall[:, 1:]
    assert float(oracle[there].max()) == 0.0 and float(pairs[there].mean()) > 1.0


def test_the_oracle_is_a_probability(language):
    """The chances that it gives sum to one: by counting what came, its mean is the entropy that it claims for itself."""
    documents = language.draw(4000, 12, "test", seed=3)
    g = torch.Generator().manual_seed(3)
    topic = torch.randint(3, (4000,), generator=g)
    taste = torch.randn(4000, 5, generator=g)
    last = documents.input_ids[:, 4]
    plain = last < 5
    matrix = 0.3 * language.shared + 0.7 * language.topics["test"]
    log_p = (matrix[topic, last.clamp(max=4)] + taste).log_softmax(-1)
    p = torch.cat([(1 - language.name_rate) * log_p.exp(), torch.full((4000, 2), language.name_rate / 2)], -1)
    torch.testing.assert_close(p.sum(-1), torch.ones(4000))
    entropy = -(p * p.log()).sum(-1)[plain]
    told = -documents.oracle[:, 5][plain]
    assert abs(float((told - entropy).mean())) < 4 * float(told.std()) / len(told) ** 0.5


def test_same_seed_same_documents_and_no_global_randomness(language):
    state = torch.random.get_rng_state()
    first, second = (language.draw(7, 9, "test", seed=5).input_ids for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, language.draw(7, 9, "test", seed=6).input_ids)
    with pytest.raises(KeyError):
        language.draw(1, 9, "other", seed=0)


def test_pair_counts_are_the_shares_of_what_followed():
    class Made:
        input_ids = torch.tensor([[0, 1, 0, 1, 1]])

    log_p = pair_counts(Made(), 2, smoothing=1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(log_p.exp(), torch.tensor([[1 / 4, 3 / 4], [2 / 4, 2 / 4]]))


def test_sign_test_and_bootstrap():
    a = np.log(np.full((3, 40), 10.0))
    b = np.log(np.full((3, 40), 9.0))
    found = comparing.compare(a, b, resamples=200, seed=0)
    assert found.gain == pytest.approx(1.0) and found.low == pytest.approx(1.0) == found.high
    assert found.p == pytest.approx(2 * 0.5**120) and found.share == 1.0
    assert comparing.sign_test(a, a) == 1.0
    assert comparing.sign_test(np.array([1.0, 1, 1, 0]), np.array([0.0, 0, 0, 1])) == pytest.approx(0.625)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 500)) * 0.2
    found = comparing.compare(2 + noise, 2 + noise - 0.1 * rng.normal(size=(2, 500)), resamples=1000, seed=1)
    assert found.low < found.gain < found.high and found.low < 0.1
    with pytest.raises(ValueError, match=r"expected the same \[seeds, documents\]"):
        comparing.compare(a, b[:, :3], resamples=10, seed=0)


def test_slopes():
    eps = np.array(differences.EPSILONS)
    assert differences.slope(3 * eps**2, eps) == pytest.approx(2.0)
    flat = np.maximum(eps, 1e-2)
    assert differences.slope(flat, eps) < 0.95  # a floor within the two decades shows
    with pytest.raises(ValueError, match="no slope"):
        differences.slope(eps - 1e-2, eps)


def test_differences_err_as_taylor_says():
    """For x^2 the forward difference errs by exactly eps h^2, the central one by nothing."""
    x, h = differences.case(3, 5, 0)
    true = 2 * x * h
    for eps in (0.1, 0.01):
        forward = differences.difference(torch.square, x, h, eps, central=False)
        torch.testing.assert_close(forward - true, eps * h**2, rtol=1e-6, atol=1e-12)
        central = differences.difference(torch.square, x, h, eps, central=True)
        torch.testing.assert_close(central, true)
    torch.testing.assert_close(differences.true_gradient(torch.square, x, h), true)


def test_a_broken_bound_would_be_seen(monkeypatch):
    assert (differences.bound_share(3, cases=5) <= 1).all()
    real = differences.LayerNormBackward.forward
    monkeypatch.setattr(
        differences.LayerNormBackward, "forward", lambda self, g, m, w: 2 * real(self, g, m, w)
    )
    assert (differences.bound_share(3, cases=5) > 1).any()


def test_a_wrong_head_would_be_seen(monkeypatch):
    assert max(row[3] for row in modules.literal_linear(1) if row[2] == "fp64") < 1e-12
    real = modules.run_backward
    monkeypatch.setattr(modules, "run_backward", lambda *a: (1.001 * real(*a)[0], None))
    assert max(row[3] for row in modules.literal_linear(1) if row[2] == "fp64") > 1e-4


def test_train_masks_and_losses_of_the_rest():
    ids = torch.arange(10).view(1, 10) % 4
    mask = perplexity.train_mask(ids, 0.5)
    assert mask.tolist() == [[True] * 5 + [False] * 5]
    logits = torch.zeros(1, 10, 4)
    logits[0, 4, int(ids[0, 5])] = 50.0  # the last trained token predicts the first of the rest
    assert perplexity.rest_losses(logits, ids, 0.5).tolist() == [pytest.approx(0.8 * math.log(4))]
    for fraction in (0.1, 1.0):
        with pytest.raises(ValueError, match="expected at least 2 and fewer than all"):
            perplexity.train_mask(ids, fraction)


def test_rates_are_chosen_on_the_other_seeds():
    config = Config.quick(rates=(1.0, 2.0, 3.0), fractions=(0.5,), seeds=3)
    # Seed 0 alone likes the first rate, the others the last and the middle one.
    losses = np.array([[0.0, 5.0, 5.0], [3.0, 1.0, 0.0], [3.0, 0.5, 2.0]])
    sweeps = [{"tint": np.repeat(row[None, :, None], 4, axis=2)} for row in losses]
    chosen = [perplexity.chosen_rates(config, sweeps, seed, "tint") for seed in range(3)]
    assert chosen == [[2.0], [1.0], [1.0]]


def test_cosines_and_errors_by_hand():
    a = {"w": torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "b": torch.zeros(2, 1)}
    b = {"w": torch.tensor([[0.0, 2.0], [2.0, 2.0]]), "b": torch.zeros(2, 1)}
    found = cosines(a, b)
    assert found["w"].tolist() == pytest.approx([0.0, 1.0]) and found["b"].tolist() == [1.0, 1.0]
    assert relative_error({"w": b["w"]}, b | {"c": torch.tensor([[4.0]])}) == pytest.approx(
        4 / math.sqrt(12 + 16)
    )
