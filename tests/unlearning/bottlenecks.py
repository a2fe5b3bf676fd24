"""Small bottlenecks and data that the tests share."""

import torch
from torch import Tensor

from papercore.unlearning import KeyValueBottleneck


def features(rows: int = 120, dim: int = 12, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def blobs(rows: int = 400, classes: int = 4, dim: int = 12, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Well separated Gaussian classes, in a random order."""
    g = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % classes
    labels = labels[torch.randperm(rows, generator=g)]
    return centres[labels] + torch.randn(rows, dim, generator=g), labels


def bottleneck(
    *,
    dim: int = 12,
    codebooks: int = 6,
    pairs: int = 20,
    dim_key: int = 5,
    dim_value: int = 4,
    seed: int = 0,
    random_values: bool = True,
    **options: object,
) -> KeyValueBottleneck:
    """Keys at the features of `features()`, values drawn at random."""
    model = KeyValueBottleneck(
        dim, codebooks, pairs, dim_key=dim_key, dim_value=dim_value, seed=seed, **options
    )
    model.init_keys(features(dim=dim, seed=7), epochs=2)
    if random_values:
        model.values.data.normal_(generator=torch.Generator().manual_seed(seed + 1))
    return model


def brute_force(model: KeyValueBottleneck, z: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Nearest pair by the definition: distances one by one, in float64; [B, C]."""
    heads = torch.einsum("bd,cdk->bck", z.double(), model.projection.double())
    distance = (heads.unsqueeze(2) - model.keys.double().unsqueeze(0)).square().sum(-1)
    if hidden is not None:
        distance = distance.masked_fill(hidden, torch.inf)
    return distance.argmin(-1)
