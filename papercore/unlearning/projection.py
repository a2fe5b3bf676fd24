"""From a feature to one head for every codebook: h_c = R_c^T z, with R_c fixed for ever.

    random   R_c i.i.d. normal, every column scaled to unit length    any dim, any dim_key (the papers' choice)
    chunk    codebook c reads the c-th slice of z                      dim = num_codebooks * dim_key
    none     every codebook reads all of z                             dim = dim_key

Random columns of unit length give heads of variance 1 for standardised features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from papercore.unlearning.arguments import check_choice

__all__ = ["PROJECTIONS", "make_projection"]

PROJECTIONS = ("random", "chunk", "none")


def make_projection(
    kind: str, dim: int, num_codebooks: int, dim_key: int, generator: torch.Generator
) -> Tensor | None:
    """R [C, dim, dim_key] float32 for "random", else None; ValueError where the sizes do not fit."""
    check_choice("projection", kind, PROJECTIONS)
    if kind == "chunk" and dim != num_codebooks * dim_key:
        raise ValueError(
            f"projection='chunk' cuts dim={dim} into num_codebooks={num_codebooks} slices of dim_key={dim_key}: "
            f"dim must be {num_codebooks * dim_key}"
        )
    if kind == "none" and dim != dim_key:
        raise ValueError(f"projection='none' needs dim_key = dim, got dim_key={dim_key} and dim={dim}")
    if kind != "random":
        return None
    normal = torch.randn(num_codebooks, dim, dim_key, generator=generator)
    return normal / normal.norm(dim=1, keepdim=True)
