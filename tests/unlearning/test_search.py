"""The search against distances one by one, torch.cdist, and itself in other pieces."""

import pytest
import torch

from papercore.unlearning.search import nearest_keys, search_table
from tests.unlearning.bottlenecks import bottleneck, brute_force, features


def draw(
    codebooks: int, rows: int, pairs: int, width: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, codebooks, width, generator=g), torch.randn(codebooks, pairs, width, generator=g)


def search(
    heads: torch.Tensor, keys: torch.Tensor, masked: torch.Tensor | None = None, block: int | None = None
):
    masked = torch.zeros(keys.shape[:2], dtype=torch.bool) if masked is None else masked
    table, mean = search_table(keys, masked)
    ones = heads.new_ones(*heads.shape[:2], 1)
    return nearest_keys(torch.cat([heads - mean, ones], -1), table, block=block)


# Sizes on both sides of the switch to groups, and some that fill no group.
@pytest.mark.parametrize(
    ("pairs", "width"), [(1, 3), (7, 4), (128, 8), (511, 2), (512, 14), (700, 3), (1024, 8)]
)
def test_equals_cdist_without_the_matrix_product(pairs: int, width: int) -> None:
    heads, keys = draw(5, 40, pairs, width)
    exact = (
        torch.cdist(heads.transpose(0, 1), keys, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1).t()
    )
    assert torch.equal(search(heads, keys), exact)


@pytest.mark.parametrize("pairs", [9, 600])
def test_masked_pairs_are_skipped_and_the_next_nearest_is_found(pairs: int) -> None:
    heads, keys = draw(4, 50, pairs, 5)
    masked = torch.rand(4, pairs, generator=torch.Generator().manual_seed(1)) < 0.6
    distance = torch.cdist(heads.transpose(0, 1), keys, compute_mode="donot_use_mm_for_euclid_dist")
    exact = distance.masked_fill(masked.unsqueeze(1), torch.inf).argmin(-1).t()
    assert torch.equal(search(heads, keys, masked), exact)
    assert not torch.equal(search(heads, keys), exact)


@pytest.mark.parametrize("block", [1, 40, 97, 5_000, 10**7])
@pytest.mark.parametrize("pairs", [33, 640])
def test_every_chunk_size_gives_the_same_indices(block: int, pairs: int) -> None:
    heads, keys = draw(6, 37, pairs, 4)
    assert torch.equal(search(heads, keys, block=block), search(heads, keys))


@pytest.mark.parametrize("pairs", [10, 700])
def test_ties_go_to_the_lowest_index(pairs: int) -> None:
    keys = torch.zeros(2, pairs, 3)
    keys[:, 4:] = 1.0
    heads = torch.tensor([[[0.0] * 3] * 2, [[1.0] * 3] * 2])
    assert search(heads, keys).tolist() == [[0, 0], [4, 4]]


def test_a_common_offset_costs_no_digits() -> None:
    heads, keys = draw(3, 60, 50, 4)
    offset = 2.0**12  # exact to add in float32 up to rounding of the inputs themselves
    far_heads, far_keys = heads + offset, keys + offset
    exact = torch.cdist(
        far_heads.double().transpose(0, 1),
        far_keys.double(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    found = search(far_heads, far_keys)
    chosen = exact.gather(2, found.t().unsqueeze(-1)).squeeze(-1)
    # Up to the rounding of float32 at distances of order 1, not of order offset.
    assert float((chosen - exact.amin(-1)).max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lookup_equals_brute_force_with_and_without_a_mask(dtype: torch.dtype) -> None:
    model = bottleneck().to(dtype)
    z = features(80, seed=3, dtype=dtype)
    assert torch.equal(model.lookup(z), brute_force(model, z))
    masked = model.usage(z[:40]) > 1
    model.mask_pairs(masked)
    assert torch.equal(model.lookup(z), brute_force(model, z, masked))
    assert torch.equal(model.lookup(z, ignore_mask=True), brute_force(model, z))


def test_half_precision_features_are_searched_in_float32() -> None:
    model, z = bottleneck(), features(50, seed=4).bfloat16()
    assert torch.equal(model.lookup(z), model.lookup(z.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.lookup(features(50, seed=4)), brute_force(model, features(50, seed=4)))


@pytest.mark.parametrize(
    ("kind", "dim", "dim_key"), [("chunk", 12, 3), ("none", 5, 5)], ids=["chunk", "none"]
)
def test_other_projections(kind: str, dim: int, dim_key: int) -> None:
    model = bottleneck(dim=dim, codebooks=4, dim_key=dim_key, projection=kind)
    z = features(30, dim, seed=5)
    heads = z.view(30, 4, 3) if kind == "chunk" else z.unsqueeze(1).expand(-1, 4, -1)
    exact = (heads.unsqueeze(2) - model.keys).square().sum(-1).argmin(-1)
    assert torch.equal(model.lookup(z), exact)


def test_random_projection_has_columns_of_length_one() -> None:
    projection = bottleneck().projection
    assert projection is not None and projection.shape == (6, 12, 5)
    torch.testing.assert_close(projection.norm(dim=1), torch.ones(6, 5))


def test_rotating_projection_and_keys_together_changes_no_index() -> None:
    model, z = bottleneck(), features(60, seed=6)
    before = model.lookup(z)
    rotation, _ = torch.linalg.qr(torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(0)))
    model.projection = model.projection @ rotation
    model.keys.copy_(model.keys @ rotation)
    assert torch.equal(model.lookup(z), before)


def test_permuting_pairs_changes_no_output() -> None:
    model, z = bottleneck(), features(60, seed=6)
    before = model(z)
    order = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(c)) for c in range(6)])
    model.keys.copy_(model.keys.gather(1, order.unsqueeze(-1).expand(-1, -1, 5)))
    model.values.data = model.values.data.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    torch.testing.assert_close(model(z), before, rtol=0, atol=1e-6)
