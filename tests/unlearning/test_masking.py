"""Masks, erasure, compaction and the log of all that."""

import copy
import json
from datetime import datetime

import pytest
import torch

from papercore.unlearning import AuditLog, DKVBClassifier
from tests.unlearning.bottlenecks import bottleneck, features


def some_pairs(seed: int, share: float = 0.3) -> torch.Tensor:
    return torch.rand(6, 20, generator=torch.Generator().manual_seed(seed)) < share


def test_pairs_that_a_batch_does_not_fetch_change_no_bit_of_it() -> None:
    model, z = bottleneck(), features(8, seed=3)
    before = model(z)
    model.mask_pairs(model.usage(z) == 0)
    assert torch.equal(model(z), before)


def test_masks_add_up_and_unmask_restores_every_bit() -> None:
    p, q, z = some_pairs(1), some_pairs(2), features(60, seed=3)
    one, two = bottleneck(), bottleneck()
    before = one(z)
    assert torch.equal(one.mask_pairs(p), p) and torch.equal(one.mask_pairs(q), q & ~p)
    two.mask_pairs(p | q)
    assert torch.equal(one(z), two(z)) and not torch.equal(one(z), before)
    assert torch.equal(one.unmask(q), q)
    two.unmask()
    two.mask_pairs(p & ~q)
    assert torch.equal(one(z), two(z))
    one.unmask()
    assert torch.equal(one(z), before)


def test_a_masked_pair_is_never_fetched() -> None:
    model, z = bottleneck(), features(200, seed=3)
    p = some_pairs(1, 0.7)
    model.mask_pairs(p)
    usage = model.usage(z)
    assert int(usage[p].sum()) == 0 and int(usage.sum()) == 200 * 6


def test_an_emptied_codebook_is_an_error_and_nothing_changes() -> None:
    model, p = bottleneck(), torch.zeros(6, 20, dtype=torch.bool)
    p[2, :15] = True
    model.mask_pairs(p)
    p[2, 15:] = True
    message = "the mask would leave no pair in 1 of 6 codebooks \\(the first is 2\\): mask fewer pairs, or make the bottleneck with abstain=True"
    with pytest.raises(ValueError, match=message):
        model.mask_pairs(p)
    assert int(model.mask.sum()) == 15 and len(model.audit) == 1


def test_an_emptied_codebook_abstains_where_asked() -> None:
    model, z = bottleneck(abstain=True), features(40, seed=3)
    found = model.lookup(z)
    p = torch.zeros(6, 20, dtype=torch.bool)
    p[2] = True
    model.mask_pairs(p)
    assert bool((model.lookup(z)[:, 2] == -1).all()) and int(model.usage(z).sum()) == 40 * 5
    rest = [c for c in range(6) if c != 2]
    torch.testing.assert_close(model(z), torch.stack([model.values[c, found[:, c]] for c in rest]).mean(0))
    with pytest.raises(ValueError, match="the mask would leave no pair in 6 of 6 codebooks"):
        model.mask_pairs(torch.ones(6, 20, dtype=torch.bool))


def test_erasure_keeps_the_outputs_and_cannot_be_undone() -> None:
    model, p, z = bottleneck(), some_pairs(1), features(60, seed=3)
    before = model(z)
    model.mask_pairs(p)
    masked = model(z)
    assert torch.equal(model.erase(), p)
    assert torch.equal(model(z), masked)
    assert not bool(model.values[p].any()) and not bool(model.keys[p].any())
    assert not bool(model.unmask().any()) and torch.equal(model(z), masked)
    assert not torch.equal(model(z), before)
    assert not bool((model.lookup(z, ignore_mask=True).unsqueeze(-1) == -1).any())
    with pytest.raises(
        ValueError, match=f"{int(p.sum())} of these pairs were erased: keys and values are gone"
    ):
        model.unmask(p)


def test_compaction_keeps_the_outputs_and_drops_the_pairs() -> None:
    model, p, z = bottleneck(), some_pairs(1, 0.5), features(60, seed=3)
    model.mask_pairs(p)
    whole = copy.deepcopy(model)
    kept = model.compact()
    left = int((~p).sum(1).max())
    assert model.num_pairs == left < 20 and model.values.shape == (6, left, 4) and kept.shape == (6, left)
    torch.testing.assert_close(model(z), whole(z), rtol=0, atol=1e-6)
    back = torch.gather(kept, 1, model.lookup(z).t()).t()
    assert torch.equal(back, whole.lookup(z))
    stored = torch.zeros(6, 20, dtype=torch.bool)
    for c in range(6):
        stored[c, kept[c][kept[c] >= 0]] = True
    assert torch.equal(stored, ~p)
    model.unmask()
    torch.testing.assert_close(model(z), whole(z), rtol=0, atol=1e-6)


def test_the_status_calls_nothing_erased_that_is_only_masked() -> None:
    model = bottleneck()
    assert model.status == "no pair of 120 is masked"
    model.mask_pairs(some_pairs(1))
    n = int(some_pairs(1).sum())
    assert model.status == (
        f"{n} of 120 pairs are masked: their votes are suppressed, but keys and values are still stored and unmask() restores them. "
        "The backbone is unchanged and may still encode what was forgotten."
    )
    assert "erase" not in str(model.audit)
    model.erase()
    assert model.status.startswith(f"{n} pairs were erased from this module. The backbone is unchanged")
    model.compact()
    assert model.status.startswith(f"{n} pairs were erased from this module.")


def test_the_log_says_who_when_and_by_what() -> None:
    model, p, q = bottleneck(), some_pairs(1), some_pairs(2)
    model.mask_pairs(p, by="request 17", subject="class 3")
    model.mask_pairs(q, by="request 18", subject="class 1")
    model.unmask(model.audit[0].changed(), by="appeal")
    first, second, third = model.audit
    assert (first.action, first.by, first.subject, first.pairs) == (
        "mask",
        "request 17",
        "class 3",
        int(p.sum()),
    )
    assert torch.equal(first.changed(), p) and torch.equal(second.changed(), q & ~p)
    assert third.action == "unmask" and third.masked == int((q & ~p).sum())
    assert datetime.fromisoformat(first.time).utcoffset().total_seconds() == 0
    assert f"mask of {int(p.sum())} pairs by request 17 to forget class 3" in str(model.audit)
    assert AuditLog.from_json(model.audit.to_json())[0] == first


def test_a_damaged_log_is_refused() -> None:
    model = bottleneck()
    model.mask_pairs(some_pairs(1))
    entries = json.loads(model.audit.to_json())
    entries[0]["digest"] = "0" * 64
    with pytest.raises(ValueError, match="the pairs of the entry of .* do not match its digest"):
        AuditLog.from_json(json.dumps(entries))
    with pytest.raises(ValueError, match="not an audit log, or damaged"):
        AuditLog.from_json("[1, 2]")


def test_masks_that_do_not_fit() -> None:
    model = bottleneck()
    with pytest.raises(TypeError, match=r"pairs must be a BoolTensor that marks pairs, got torch\.int64"):
        model.mask_pairs(torch.zeros(6, 20, dtype=torch.long))
    with pytest.raises(ValueError, match=r"pairs has the shape \(20, 6\), expected \[C, K\] = \[6, 20\]"):
        model.mask_pairs(torch.zeros(20, 6, dtype=torch.bool))


def test_the_backbone_stays_in_eval_mode_and_frozen() -> None:
    backbone = torch.nn.Sequential(torch.nn.Linear(3, 12), torch.nn.BatchNorm1d(12))
    model = DKVBClassifier(backbone, bottleneck(), num_classes=4).train()
    assert not backbone.training and model.bottleneck.training
    before = copy.deepcopy(backbone.state_dict())
    x = features(20, 3)
    backbone.train()
    model(x).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
    with pytest.raises(TypeError, match="bottleneck must be a KeyValueBottleneck, got Linear"):
        DKVBClassifier(backbone, torch.nn.Linear(2, 2))
