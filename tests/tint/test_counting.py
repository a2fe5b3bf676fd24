"""Parameters against the paper's table and against modules that are built; FLOP against torch's own counter."""

from __future__ import annotations

import itertools

import pytest
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from papercore.tint import count_parameters, dynamic_eval, flops
from tests.tint.auxiliaries import auxiliary, build, documents, first

SIZES = {
    "OPT-125M": {"n_layer": 12, "d_model": 768, "n_head": 12, "n_ctx": 2048},
    "OPT-350M": {"n_layer": 24, "d_model": 1024, "n_head": 16, "n_ctx": 2048},
    "OPT-1.3B": {"n_layer": 24, "d_model": 2048, "n_head": 32, "n_ctx": 2048},
    "OPT-2.7B": {"n_layer": 32, "d_model": 2560, "n_head": 32, "n_ctx": 2048},
    "GPT-2": {"n_layer": 12, "d_model": 768, "n_head": 12, "n_ctx": 1024},
}


@pytest.mark.parametrize(
    ("name", "q", "billions"),
    [
        ("OPT-125M", 5_013_504, 1.276),
        ("OPT-350M", 6_225_920, 3.174),
        ("OPT-1.3B", 21_233_664, 10.824),
        ("OPT-2.7B", 32_030_720, 21.771),
        ("GPT-2", 4_227_072, 1.078),
    ],
)
def test_totals(name: str, q: int, billions: float) -> None:
    count = count_parameters(**SIZES[name])
    assert q == count.Q
    assert round(count.total / 1e9, 3) == billions
    assert count.total == count.forward + count.backward + count.descent
    for role in ("forward", "backward", "descent"):
        assert SIZES[name]["n_layer"] * sum(count.parts[role].values()) == getattr(count, role)


def test_what_holds_of_the_papers_sizes_and_what_does_not() -> None:
    totals = {name: count_parameters(**sizes).total for name, sizes in SIZES.items()}
    assert totals["OPT-125M"] < 2e9 and abs(totals["OPT-125M"] / 1.2e9 - 1) < 0.1
    assert abs(totals["OPT-1.3B"] / 10.8e9 - 1) < 0.01 and abs(totals["OPT-2.7B"] / 21.8e9 - 1) < 0.01
    assert 0.06 < 1 - totals["OPT-350M"] / 3.4e9 < 0.08  # the paper's row is not what its formula gives


def test_forward_blocks_that_are_not_shared_are_counted_for_each_pass() -> None:
    shared = count_parameters(**SIZES["OPT-125M"])
    for steps in (1, 2):
        apart = count_parameters(**SIZES["OPT-125M"], share_forward=False, n_steps=steps)
        assert apart.total == shared.total + steps * shared.forward


class Split(nn.Module):
    """A projection of width D_sim over H heads: one D_sim/H x D_sim/H map a head, and one H x H map a coordinate of a head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.over_heads = nn.Conv1d(width, width, 1, groups=heads, bias=False)
        self.over_coordinates = nn.Conv1d(width, width, 1, groups=width // heads, bias=False)


class Attention(nn.Module):
    """Query, key, value and output split, and three projections of one-hot positions, without biases."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(Split(width, heads) for _ in range(4))
        self.positions = nn.ModuleList(nn.Linear(tokens, width // heads, bias=False) for _ in range(3))


@pytest.mark.parametrize(
    ("d_model", "n_head", "stack", "n_ctx"), [(32, 4, 2, 24), (48, 6, 4, 96), (64, 16, 4, 40)]
)
def test_the_count_is_the_number_of_numbers_in_modules(
    d_model: int, n_head: int, stack: int, n_ctx: int
) -> None:
    count = count_parameters(n_layer=1, d_model=d_model, n_head=n_head, n_ctx=n_ctx, stack=stack)
    width, heads = count.d_sim, count.heads
    assert (width, heads, count.t_sim) == (stack * d_model, min(stack**2, n_head), n_ctx + d_model // stack)

    def numbers(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert numbers(Split(width, heads)) == count.Q_split
    assert numbers(Attention(width, heads, count.t_sim)) == count.Q
    up_and_down = nn.ModuleList(
        [nn.Conv1d(heads * width, width, 1, groups=width, bias=False) for _ in range(2)]
    )
    assert numbers(up_and_down) == count.parts["backward"]["activation"]


def test_prefix_weights_are_counted_apart() -> None:
    count = count_parameters(**SIZES["OPT-125M"])
    assert count.prefix == 12 * 12 * 768 * 768  # twelve D x D matrices in each of twelve layers


@pytest.mark.parametrize(
    ("n_layers", "steps", "full"), list(itertools.product([1, 2, 3], [1, 2], [False, True]))
)
@pytest.mark.parametrize("kind", ["tiny_gpt", "tiny_llama"])
def test_products_are_those_that_torch_counts(kind: str, n_layers: int, steps: int, full: bool) -> None:
    model, ids, mask = auxiliary(kind), documents(1), first(9)
    sizes = {"n_layer": 3, "d_model": 16, "n_head": 4, "length": 14, "n_train": 8, "vocab_size": 13}
    if kind == "tiny_llama":
        sizes |= {"n_kv_head": 2, "is_gated": True, "trains_norms": False}  # RMS norms have no bias
    sizes |= {"n_layers": n_layers, "n_steps": steps, "full_attention": full}
    tint = build(
        model, n_layers=n_layers, n_steps=steps, attn_grad="full" if full else "value_only", inner_lr=1e-4
    )
    with FlopCounterMode(display=False) as counted:
        tint(ids, mask)
    assert counted.get_total_flops() == flops(**sizes).total
    # the counter knows the plain attention kernel
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        dynamic_eval(model, ids, mask, lr=1e-4, steps=steps, n_layers=n_layers, detach_scores=not full)
    found = flops("dynamic", **sizes)
    assert counted.get_total_flops() == found.total + found.report


def test_the_construction_costs_several_times_as_much() -> None:
    sizes = {"n_layer": 12, "d_model": 768, "n_head": 12, "length": 1024, "n_train": 511, "vocab_size": 50257}
    fused, literal, unsplit = (flops(method, **sizes) for method in ("fused", "literal", "unsplit"))
    assert 5 < literal.times(fused) < 12 < unsplit.times(fused)
    assert literal.loss == fused.loss
    two = flops("literal", **sizes, n_steps=2)
    assert two.descent == 2 * literal.descent and two.forward == literal.forward


def test_a_document_needs_a_target_to_evaluate() -> None:
    sizes = {"n_layer": 1, "d_model": 16, "n_head": 4, "length": 8, "vocab_size": 13}
    with pytest.raises(ValueError, match=r"n_train = 8: a document of 8 tokens has 7 targets"):
        flops(**sizes, n_train=8)
    with pytest.raises(ValueError, match="method = 'fuse'.*Did you mean 'fused'"):
        flops("fuse", **sizes, n_train=4)
    with pytest.raises(ValueError, match="length = 0"):
        flops(**(sizes | {"length": 0}), n_train=4)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"stack = 5 does not divide d_model = 768: .* 4 or 6"):
        count_parameters(**SIZES["OPT-125M"], stack=5)
    with pytest.raises(ValueError, match="n_ctx = 0: expected a whole number"):
        count_parameters(**(SIZES["OPT-125M"] | {"n_ctx": 0}))
