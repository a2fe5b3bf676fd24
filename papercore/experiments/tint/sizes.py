"""How large the simulator is: the paper's formula for the auxiliary models of its table, and without its saving.

Glossary
    split      projections cut into one head-wise and one coordinate-wise part, as the paper does it: D_sim^2 / H_sim + H_sim D_sim numbers
    unsplit    each of query, key, value and output a whole D_sim x D_sim matrix
    prefix     weights of the auxiliary that the prefix tokens hold: input of the simulator, not counted in its size
"""

from __future__ import annotations

from typing import Any

from papercore.tint.counting import TinTCount, count_parameters

# Label -> layers, width, heads, context.
AUXILIARIES: dict[str, tuple[int, int, int, int]] = {
    "GPT-2": (12, 768, 12, 1024),
    "OPT-125M": (12, 768, 12, 2048),
    "OPT-350M": (24, 1024, 16, 2048),
    "OPT-1.3B": (24, 2048, 32, 2048),
    "OPT-2.7B": (32, 2560, 32, 2048),
}
COLUMNS = ["auxiliary", "weights", "D_sim", "H_sim", "prefix tokens", "forward", "backward", "descent", "total", "not shared", "unsplit"]  # fmt: skip
REPORTED_350M = 3.4e9  # recalled, and doubtful: no choice of H_sim gives it


def metric_name(label: str) -> str:
    """A label as part of a metric's name: "OPT-1.3B" -> "opt_1_3b"."""
    return label.lower().replace("-", "_").replace(".", "_")


def count(label: str, *, share_forward: bool = True) -> TinTCount:
    """The count of a model of AUXILIARIES."""
    n_layer, d_model, n_head, n_ctx = AUXILIARIES[label]
    return count_parameters(
        n_layer=n_layer, d_model=d_model, n_head=n_head, n_ctx=n_ctx, share_forward=share_forward
    )


def unsplit_total(label: str) -> int:
    """The total with whole projections: D_sim^2 in place of Q_split, all else as counted."""
    found, layers = count(label), AUXILIARIES[label][0]
    more = found.d_sim**2 - found.Q_split
    # 21 modules of 4 projections each and one split projection for the activation, in every layer.
    return found.total + layers * (21 * 4 + 1) * more


def size_rows() -> list[list[Any]]:
    """Rows of COLUMNS. Weights: those of the auxiliary's blocks, 12 D^2 a layer, which are the prefix."""
    rows: list[list[Any]] = []
    for label in AUXILIARIES:
        found = count(label)
        rows.append([
            label, found.prefix, found.d_sim, found.heads, found.n_prefix, found.forward, found.backward, found.descent, found.total,
            count(label, share_forward=False).total, unsplit_total(label),
        ])  # fmt: skip
    return rows
