"""Overlaps, localisation and curves against dense computations."""

from __future__ import annotations

import math

import pytest
import torch

from papercore.grafting import (
    Graft,
    Mask,
    chance_overlap,
    interpolated,
    interpolation_curve,
    localize,
    magnitude_mask,
    overlap,
    random_mask,
    sparsity_curve,
    task_vector,
)
from tests.grafting.reference import accuracy, batches, copies, finetuned, network, same, seeded


def masks_of(count: int, k: int = 40) -> list[Mask]:
    base = network()
    delta = task_vector(base, finetuned(base))
    return [random_mask(delta, k=k + 10 * s, generator=s) for s in range(count)]


def test_overlaps_are_those_of_dense_masks() -> None:
    masks = masks_of(3)
    flat = [torch.cat([m[n].reshape(-1) for n in m]) for m in masks]
    contained, iou, lift = (overlap(masks, kind=kind) for kind in ("containment", "iou", "lift"))
    for i, a in enumerate(flat):
        for j, b in enumerate(flat):
            both = float((a & b).sum())
            assert float(contained[i, j]) == pytest.approx(both / float(b.sum()))
            assert float(iou[i, j]) == pytest.approx(both / float((a | b).sum()))
            assert float(lift[i, j]) == pytest.approx(both / float(b.sum()) / float(a.double().mean()))
    assert contained.diagonal().tolist() == [1.0] * 3
    counts = torch.tensor([float(m.count) for m in masks], dtype=torch.float64)
    torch.testing.assert_close(contained * counts[None, :], (contained * counts[None, :]).t())
    torch.testing.assert_close(chance_overlap(masks), counts / masks[0].total)
    assert torch.equal(overlap({"a": masks[0], "b": masks[1]}), overlap(masks[:2]))
    assert torch.equal(overlap([{n: m[n] for n in m} for m in masks]), contained)


def test_random_masks_overlap_by_their_density() -> None:
    n, k, pairs = 2000, 200, 40
    delta = {"w": torch.ones(n)}
    values = []
    for seed in range(pairs):
        pair = [random_mask(delta, k=k, generator=seeded(2 * seed + i)) for i in range(2)]
        values.append(float(overlap(pair)[0, 1]))
    s = k / n
    # hypergeometric: variance s (1 - s) / k (1 - (k - 1) / (n - 1)); 4 standard errors are a false alarm in 16,000
    spread = math.sqrt(s * (1 - s) / k * (1 - (k - 1) / (n - 1)) / pairs)
    assert abs(sum(values) / pairs - s) < 4 * spread


def test_overlap_refusals() -> None:
    with pytest.raises(ValueError, match="kind='jaccard' is not one of 'containment', 'iou', 'lift'"):
        overlap(masks_of(2), kind="jaccard")
    with pytest.raises(ValueError, match="mask 1 is of other tensors than mask 0"):
        overlap([{"a": torch.ones(2, dtype=torch.bool)}, {"b": torch.ones(2, dtype=torch.bool)}])


def test_localisation_counts_by_layer_and_module() -> None:
    mask = {
        "embed.weight": torch.zeros(4, 2, dtype=torch.bool),
        "layers.0.attn.weight": torch.tensor([[True, True], [True, False]]),
        "layers.0.norm.bias": torch.tensor([True, False]),
        "layers.1.attn.weight": torch.tensor([[True, False], [False, False]]),
        "layers.1.norm.bias": torch.tensor([False, False]),
    }
    rows = {r.key: r for r in localize(mask)}
    assert {key: (r.count, r.size) for key, r in rows.items()} == {
        (None, "embed.weight"): (0, 8),
        (0, "attn.weight"): (3, 4),
        (0, "norm.bias"): (1, 2),
        (1, "attn.weight"): (1, 4),
        (1, "norm.bias"): (0, 2),
    }
    assert rows[(0, "attn.weight")].share == 0.6
    assert rows[(0, "attn.weight")].enrichment == pytest.approx(0.6 / (4 / 20))
    assert [(r.key, r.count) for r in localize(mask, by="module")] == [
        (("embed.weight",), 0),
        (("attn.weight",), 4),
        (("norm.bias",), 1),
    ]
    assert [r.key for r in localize(mask, by=lambda n: "bias" in n)] == [(False,), (True,)]
    everything = {n: torch.ones_like(t) for n, t in mask.items()}
    assert all(r.enrichment == pytest.approx(1.0) for r in localize(everything, by="tensor"))
    assert sum(r.share for r in rows.values()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="by='head' must be some of 'layer', 'module', 'tensor'"):
        localize(mask, by="head")
    with pytest.raises(ValueError, match="the mask is empty"):
        localize({"w": torch.zeros(3, dtype=torch.bool)})


def test_a_curve_is_the_metric_at_each_graft() -> None:
    base = network()
    tuned = finetuned(base)
    delta = task_vector(base, tuned)
    data = batches()[0]
    scores = {n: t.abs() for n, t in delta.items()}
    sizes = [50, 3, 163, 10]
    before = copies(base)
    curve = sparsity_curve(base, delta, scores, lambda m: m(data[0]).norm(), ks=sizes)
    assert same(base, before)
    assert [p.k for p in curve] == sizes
    for point in curve:
        with torch.no_grad(), Graft.from_mask(tuned, magnitude_mask(delta, k=point.k)).applied(base):
            assert point.value == pytest.approx(float(base(data[0]).norm()), rel=1e-5)
        assert point.sparsity == point.k / 163
    shares = sparsity_curve(base, delta, scores, lambda m: accuracy(m, data), [0.1, 0.5])
    assert [p.k for p in shares] == [16, 81]
    assert shares[0].gain(0.25, 0.75) == pytest.approx((shares[0].value - 0.25) / 0.5)
    assert shares[0].rel(0.8) == pytest.approx(shares[0].value / 0.8)
    tied = {n: torch.zeros_like(t) for n, t in delta.items()}
    by_ties = sparsity_curve(base, delta, tied, lambda m: m[0].bias.sum(), ks=[5, 40])
    from papercore.grafting import top_mask

    for point in by_ties:
        with torch.no_grad(), Graft.from_mask(tuned, top_mask(tied, delta, k=point.k)).applied(base):
            assert point.value == pytest.approx(float(base[0].bias.sum()), abs=1e-6)
    with pytest.raises(ValueError, match="give either sparsities .* or ks"):
        sparsity_curve(base, delta, scores, lambda m: 0.0)
    with pytest.raises(ValueError, match="sparsities is empty"):
        sparsity_curve(base, delta, scores, lambda m: 0.0, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolation_runs_from_base_to_fine_tuned(dtype: torch.dtype) -> None:
    base = network(dtype=dtype)
    tuned = finetuned(base)
    delta = task_vector(base, tuned)
    before, after = copies(base), copies(tuned)
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-6, "atol": 1e-7}
    with interpolated(base, delta, 0.0):
        assert same(base, before)
    with interpolated(base, delta, 1.0):
        for name, p in base.named_parameters():
            torch.testing.assert_close(p.detach(), after[name], **tolerance)
    with interpolated(base, delta, 0.25) as model:
        for name, p in model.named_parameters():
            wanted = (before[name].float() + 0.25 * delta[name]).to(dtype)
            torch.testing.assert_close(p.detach(), wanted, **tolerance)
    assert same(base, before)
    norms = interpolation_curve(
        base, delta, lambda m: (m[0].weight - before["0.weight"]).float().norm(), [0.0, 0.5, 1.0, 2.0]
    )
    assert norms[0] == (0.0, 0.0)
    assert norms[3][1] == pytest.approx(4 * norms[1][1], rel=0.05)
    assert same(base, before)
    with pytest.raises(ValueError, match="alpha=nan must be finite"), interpolated(base, delta, float("nan")):
        pass
