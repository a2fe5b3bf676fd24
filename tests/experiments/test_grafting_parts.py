"""The grafting chapter's world, model, masks and controls, on sizes of a second."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from papercore.experiments.grafting import multitask, pretraining, report, trust, world
from papercore.experiments.grafting.config import Config
from papercore.experiments.grafting.continual import forgetting
from papercore.experiments.grafting.curves import smallest, wrong_entries
from papercore.experiments.grafting.encoder import Encoder, graftable
from papercore.experiments.grafting.finetuning import fine_tune, label_logits, loss
from papercore.experiments.grafting.masks import RULES, grafted_probabilities, mask_of, moved, retrained
from papercore.grafting import Graft, union

TASK = world.TASKS["sentiment"]


@pytest.fixture(scope="module")
def model():
    return pretraining.pretrained()


@pytest.fixture(scope="module")
def train():
    return TASK.batch(world.few_shot(TASK, 8, 77))


@pytest.fixture(scope="module")
def tuned(model, train):
    return fine_tune(model, train, optimizer="adamw", lr=1e-3, steps=6, size=8, seed=1)


def test_documents_have_what_was_asked_for():
    docs = world.documents(4000, 3, spurious=0.9)
    assert docs.words.shape == (4000, world.WORDS) and int(docs.words.max()) < world.VOCABULARY
    equal = (docs.values["style"] == docs.values["sentiment"]).double().mean()
    assert abs(float(equal) - 0.9) < 4 * math.sqrt(0.09 / 4000)
    again = world.documents(4000, 3, spurious=0.9)
    assert torch.equal(docs.words, again.words)
    assert not torch.equal(docs.words, world.documents(4000, 4, spurious=0.9).words)
    # A word of a list shows its value with probability purity + (1 - purity) / classes; read off the ids.
    start = world._STARTS["sentiment"]
    inside = (docs.words >= start) & (docs.words < world._STARTS["topic"])
    shown = (docs.words - start) // world.LIST % 2
    right = (shown == docs.values["sentiment"][:, None])[inside].double()
    assert abs(float(right.mean()) - 0.95) < 4 * math.sqrt(0.05 / len(right))
    with pytest.raises(ValueError, match="domain is 'C': expected A, B or both"):
        world.documents(3, 0, domain="C")


def test_tasks_ask_in_ways_that_pretraining_did_not():
    for task in world.TASKS.values():
        assert task.template not in world.PRETRAINING.values()
        assert (
            task.labels != world.LABEL[task.attribute]
            and len(task.labels) == world.ATTRIBUTES[task.attribute]
        )
    topic = world.TASKS["topic"]
    assert all(own != shown for own, shown in zip(world.LABEL["topic"], topic.labels, strict=True))
    docs = world.few_shot(topic, 5, 0)
    assert torch.bincount(docs.values["topic"]).tolist() == [5, 5, 5, 5] and not bool(docs.domain.any())


def test_sequences_show_words_template_and_a_masked_label(train):
    assert train.ids.shape == (16, world.LENGTH) and bool((train.ids[:, world.AT] == world.MASK).all())
    assert train.ids[0, world.WORDS + 1 : world.AT].tolist() == [world.TEMPLATE[t] for t in TASK.template]
    ids, targets = world.pretraining_batch(200, np.random.default_rng(0))
    asked = targets != -100
    assert bool((ids[asked] == world.MASK).all()) and bool((targets[~asked] == -100).all())
    assert 0.4 < float(asked[:, world.AT].double().mean()) < 0.6


def test_joined_tasks_score_their_own_labels_alone(model):
    parts = [task.batch(world.documents(4, 1)) for task in world.TASKS.values()]
    every = label_logits(model, world.joined(parts))
    for i, part in enumerate(parts):
        own = label_logits(model, part)
        rows = every[4 * i : 4 * i + 4]
        torch.testing.assert_close(rows[:, : own.shape[1]], own)
        assert bool(torch.isinf(rows[:, own.shape[1] :]).all())


def test_one_position_is_the_same_as_all(model):
    ids = TASK.batch(world.documents(5, 2)).ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids), model(ids, at=None)[:, world.AT], rtol=1e-4, atol=1e-5)


def test_the_model_has_the_sizes_that_the_page_names(model):
    counts = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(counts.values()) == 109_884
    assert sum(size for n, size in counts.items() if graftable(n)) == 99_968
    state = torch.random.get_rng_state()
    Encoder(generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_weights_come_from_the_script(model):
    """The first steps give the loss that the file recorded, and the stored weights have the loss of the last ones."""
    made = pretraining.recorded()
    assert (made["steps"], made["batch"], made["seed"]) == (
        pretraining.STEPS,
        pretraining.BATCH,
        pretraining.SEED,
    )
    assert made["lr"] == pretraining.LR and pretraining.WEIGHTS.stat().st_size < 300_000
    _, losses = pretraining.pretrain(until=pretraining.FIRST)
    assert np.mean(losses) == pytest.approx(made["first_loss"], rel=1e-3)
    ids, targets = world.pretraining_batch(400, np.random.default_rng(5))
    with torch.no_grad():
        value = torch.nn.functional.cross_entropy(
            model(ids, at=None).flatten(0, 1), targets.flatten(), ignore_index=-100
        )
    assert float(value) == pytest.approx(made["last_loss"], abs=0.1)
    assert float(value) < made["first_loss"] - 1


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="x.safetensors is missing: make it with `python -m"):
        pretraining.pretrained(tmp_path / "x.safetensors")


def test_saved_weights_come_back_as_bfloat16_allows(model, tmp_path):
    pretraining.save(model, 4.0, 3.0, tmp_path / "w.safetensors")
    back = pretraining.pretrained(tmp_path / "w.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True)
    )
    assert pretraining.recorded(tmp_path / "w.safetensors")["last_loss"] == 3.0


def test_fine_tuning_moves_the_layers_and_nothing_else(model, tuned, train):
    before = dict(model.named_parameters())
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(graftable(n) for n in changed)
    assert float(loss(tuned, train).detach()) < float(loss(model, train).detach())
    again = fine_tune(model, train, optimizer="adamw", lr=1e-3, steps=6, size=8, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))


def test_frozen_entries_stay_and_training_can_be_stopped(model, train):
    name = "layers.0.query.weight"
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, :32] = True
    seen: list[int] = []

    def check(now, step):
        seen.append(step)
        return True

    out = fine_tune(
        model, train, optimizer="sgd", lr=0.5, steps=60, size=8, seed=0, frozen={name: mask}, check=check
    )
    old, new = (dict(m.named_parameters())[name] for m in (model, out))
    assert torch.equal(old[mask], new[mask]) and not torch.equal(old[~mask], new[~mask])
    assert seen == [20]


def test_what_cannot_be_trained_is_refused(model, train):
    with pytest.raises(ValueError, match="optimizer is 'lion': expected sgd or adamw"):
        fine_tune(model, train, optimizer="lion", lr=1.0, steps=1, size=4, seed=0)
    with pytest.raises(FloatingPointError, match="at step"):
        fine_tune(model, train, optimizer="sgd", lr=float("inf"), steps=3, size=4, seed=0)


@pytest.mark.parametrize("rule", RULES)
def test_masks_have_k_entries_and_grafts_are_exact(model, tuned, train, rule):
    delta = moved(model, tuned)
    mask = mask_of(rule, model, delta, train, 50, steps=3, seed=0)
    assert mask.count == 50 and wrong_entries(model, tuned, mask) == 0
    p = grafted_probabilities(model, tuned, mask, train)
    torch.testing.assert_close(p.sum(1), torch.ones(len(train)))


def test_wrong_entries_can_be_wrong(model, tuned, train):
    mask = mask_of("movement", model, moved(model, tuned), train, 10, steps=1, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        whole = mask_of("movement", model, moved(model, tuned), train, 11, steps=1, seed=0)
        patch.setattr(Graft, "from_mask", classmethod(lambda cls, t, m, **k: _graft(t, whole)))
        assert wrong_entries(model, tuned, mask) == 1


_graft = Graft.from_mask


def test_unknown_rules_are_named(model, tuned, train):
    with pytest.raises(ValueError, match="unknown rule 'best': expected one of learned"):
        mask_of("best", model, moved(model, tuned), train, 5, steps=1, seed=0)


def test_training_anew_stays_in_the_region(model, tuned, train):
    mask = mask_of("movement", model, moved(model, tuned), train, 30, steps=1, seed=0)
    out = retrained(model, mask, train, optimizer="adamw", lr=1e-3, steps=3, size=8, seed=0)
    old = dict(model.named_parameters())
    for name, p in out.named_parameters():
        outside = ~mask[name] if name in mask else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(p[outside], old[name][outside])
    assert sum(int((p != old[n]).sum()) for n, p in out.named_parameters()) > 0


def test_grafts_kept_as_arrays_are_the_same_grafts(model, tuned, train):
    delta = moved(model, tuned)
    a, b = (mask_of(rule, model, delta, train, 40, steps=1, seed=0) for rule in ("movement", "random"))
    mask = union([a, b])
    index, values = multitask.flat_entries(tuned, mask)
    graft = multitask.from_entries(model, list(mask), index, values)
    assert len(graft) == mask.count == len(index)
    with graft.applied(model):
        one = label_logits(model, train).detach()
    with Graft.from_mask(tuned, mask).applied(model):
        assert torch.equal(one, label_logits(model, train).detach())
    assert multitask.by_tensor(mask).sum() == mask.count


def test_the_smallest_mask_that_is_enough():
    assert smallest((1, 2, 3), np.array([0.5, 0.96, 0.9]), 1.0) == 2
    assert smallest((1, 2), np.array([0.5, 0.6]), 1.0) is None


def test_forgetting_is_measured_from_the_own_stage():
    scores = np.array([[0.5, 0.5, 0.5], [0.9, 0.5, 0.5], [0.7, 1.0, 0.5], [0.6, 0.8, 1.0]])
    assert forgetting(scores) == pytest.approx((0.3 + 0.2) / 2)


def test_the_over_fitting_world_is_what_it_says():
    config = Config.quick(noise=0.4, spurious=0.9)
    home, away = (
        trust.noisy(trust.OVERFIT["sentiment"], 3000, 5, config, away=away) for away in (False, True)
    )
    docs = world.documents(3000, 5, domain="A", spurious=0.9)
    wrong = float((home.targets != docs.values["sentiment"]).double().mean())
    assert abs(wrong - 0.2) < 4 * math.sqrt(0.16 / 3000)
    assert not torch.equal(home.ids, away.ids)


def test_every_control_is_measured(model):
    config = Config.quick(tests=60, over_train=16, over_steps=20, over_k=20, mask_steps=3, size=8)
    found = trust.trust_seed(config, model, trust.OVERFIT["style"], 3)
    rows = found["rows"]
    assert rows.shape == (len(trust.METHODS), len(trust.MEASURES)) and bool(np.isfinite(rows).all())
    at = {name: i for i, name in enumerate(trust.METHODS)}
    # A temperature changes no answer, and both are of the same model.
    np.testing.assert_array_equal(rows[at["temperature"], :3], rows[at["fine-tuned"], :3])
    np.testing.assert_array_equal(rows[at["graft + temperature"], :3], rows[at["graft, learned"], :3])
    assert found["bins_fine-tuned"].shape == (3, trust.BINS) and found["bins_fine-tuned"][0].sum() == 60
    assert found["alpha"] in trust.ALPHAS
    json.dumps({k: v for k, v in found.items() if not isinstance(v, np.ndarray)})


def test_the_sign_test_counts_coins():
    assert report.sign_test(6, 6) == 2 / 64 and report.sign_test(0, 6) == 2 / 64
    assert report.sign_test(5, 6) == pytest.approx(2 * 7 / 64) and report.sign_test(2, 4) == 1.0
