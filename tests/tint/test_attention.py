"""Attention equals torch's own; `full` equals autograd, scores included, and `value_only` autograd with constant scores."""

import re

import pytest
import torch
from torch.nn import functional as F

from papercore.tint.attention import AttentionBackward, AttentionForward, Rotary
from papercore.tint.layout import Layout

B, T, H, DH = 3, 7, 4, 4


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(groups: int):
    q, k, v = numbers(B, T, H * DH), numbers(B, T, groups * DH, seed=1), numbers(B, T, groups * DH, seed=2)
    return q, k, v, numbers(B, T, H * DH, seed=3)


def padding() -> torch.Tensor:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :2], mask[1, 5:] = False, False
    return mask


def demonstrations() -> torch.Tensor:
    """Tokens 0 to 2 and 3 to 6 do not see each other."""
    part = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    return (part[:, None] == part[None]).expand(B, T, T)


def reference(q, k, v, mask=None, rotary=None, positions=None, scale=None, detach=False, causal=True):
    """The textbook, one head and one query at a time."""
    groups = k.shape[-1] // DH
    rows = []
    for i in range(B):
        heads = []
        for h in range(H):
            g = h // (H // groups)
            query, key, value = (
                q[i, :, h * DH : (h + 1) * DH],
                *(x[i, :, g * DH : (g + 1) * DH] for x in (k, v)),
            )
            if rotary is not None:
                query, key = (turned(x, rotary, positions[i]) for x in (query, key))
            out = []
            for t in range(T):
                see = [j for j in range(T) if (j <= t or not causal)]
                if mask is not None:
                    see = [j for j in see if (mask[i, j] if mask.dim() == 2 else mask[i, t, j])]
                if not see:
                    out.append(query.new_zeros(DH))
                    continue
                weights = torch.softmax((key[see] @ query[t]) * (DH**-0.5 if scale is None else scale), 0)
                out.append((weights.detach() if detach else weights) @ value[see])
            heads.append(torch.stack(out))
        rows.append(torch.cat(heads, -1))
    return torch.stack(rows)


def turned(x, rotary, positions):
    """Complex multiplication of the pairs (i, i + half)."""
    half = len(rotary.frequencies)
    pairs = torch.complex(x[:, :half], x[:, half : 2 * half])
    angle = positions[:, None].double() * rotary.frequencies.double()
    pairs = pairs * torch.polar(torch.full_like(angle, rotary.scaling), angle)
    return torch.cat([pairs.real, pairs.imag, x[:, 2 * half :]], -1)


CASES = {
    "plain": {},
    "padding": {"mask": padding()},
    "demonstrations": {"mask": demonstrations()},
    "two groups": {"groups": 2},
    "one group, scale": {"groups": 1, "scale": 0.7},
    "rotary": {"groups": 2, "rotary": Rotary.from_base(DH, 100.0), "mask": padding()},
    "part of rotary, scaled": {"rotary": Rotary(torch.tensor([0.3], dtype=torch.float64), 1.2)},
    "not causal": {"causal": False},
}


@pytest.mark.parametrize("backend", ["kept", "recomputed", "literal", "literal, unrestricted"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_both_gradients_equal_the_textbook(name: str, backend: str) -> None:
    options = {"groups": H, "mask": None, "rotary": None, "scale": None, "causal": True, **CASES[name]}
    groups, mask = options.pop("groups"), options.pop("mask")
    q, k, v, grad = case(groups)
    positions = torch.arange(T).expand(B, T) + torch.arange(B)[:, None]
    if options["rotary"] is None:
        positions = None
    heads = {"layout": Layout(H * DH, 4, context=T), "restrict": backend == "literal"}
    heads = {"backend": "literal", **heads} if "literal" in backend else {}
    forward = AttentionForward(H, groups, keep_probabilities=backend == "kept", **options, **heads)
    o, memory = forward(q, k, v, mask, positions)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = reference(*leaves, mask, positions=positions, **options)
    torch.testing.assert_close(o, expected.detach(), rtol=1e-12, atol=1e-13)
    full = torch.autograd.grad((expected * grad).sum(), leaves)
    for found, true in zip(AttentionBackward("full", **heads)(grad, memory), full, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-12)
    constant = reference(*leaves, mask, positions=positions, detach=True, **options)
    through_values = torch.autograd.grad((constant * grad).sum(), leaves[2])[0]
    dq, dk, dv = AttentionBackward("value_only", **heads)(grad, memory)
    assert dq is None and dk is None
    torch.testing.assert_close(dv, through_values, rtol=1e-12, atol=1e-13)


def test_torch_agrees_and_so_does_float32() -> None:
    q, k, v, _ = case(H)
    split = [x.view(B, T, H, DH).transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(AttentionForward(H)(q, k, v)[0], expected, rtol=1e-12, atol=1e-13)
    for keep in (True, False):
        o = AttentionForward(H, keep_probabilities=keep)(q.float(), k.float(), v.float())[0]
        torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_same_position_only() -> None:
    q, k, v, grad = case(2)
    dq, dk, dv = AttentionBackward("same_position")(grad, AttentionForward(H, 2)(q, k, v)[1])
    assert dq is None and dk is None
    torch.testing.assert_close(dv, grad.view(B, T, 2, 2, DH).sum(3).flatten(2))


def test_what_value_only_drops_goes_with_the_softness_of_the_rows() -> None:
    """The paper's theorem: with rows that give 1 - epsilon to one key, the part left out is of the order of epsilon."""
    q = k = torch.eye(8, dtype=torch.float64)[None, :T]
    v, grad = numbers(1, T, 8), numbers(1, T, 8, seed=1)
    dropped, bounds = [], []
    for scale in (4.0, 8.0, 16.0):
        _, memory = AttentionForward(1, scale=scale)(q, k, v)
        dq, dk, _ = AttentionBackward("full")(grad, memory)
        softness = 1 - float(memory.attend().amax(-1).min())
        dropped.append(float(dq.norm() + dk.norm()))
        bounds.append(softness * scale)  # the slope of the scores is scaled as they are
    ratios = [d / b for d, b in zip(dropped, bounds, strict=True)]
    assert dropped[2] < 1e-4 * dropped[0] and max(ratios) < 2 * min(ratios)


def test_rotary_is_transformers_llama() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rotary = Rotary.from_base(8, 500.0)
    x, positions = numbers(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    angle = positions[..., None] * torch.cat([rotary.frequencies.double()] * 2)
    expected, _ = apply_rotary_pos_emb(x, x, angle.cos(), angle.sin())
    torch.testing.assert_close(rotary(x, positions), expected, rtol=1e-12, atol=1e-13)
    y = numbers(2, 3, 5, 8, seed=1)
    torch.testing.assert_close(
        (rotary(x, positions) * y).sum(), (x * rotary(y, positions, transpose=True)).sum()
    )


def test_the_heads_can_be_looked_at() -> None:
    q, k, v, grad = case(2)
    layout = Layout(H * DH, 4, context=T)
    o, memory = AttentionForward(H, 2)(q, k, v, padding())
    heads = memory.heads(layout, signal=grad, restrict=False)
    out, trace = heads.forward()
    prefix = layout.n_prefix
    torch.testing.assert_close(out, o, rtol=1e-12, atol=1e-13)
    assert trace.scores.shape == (B, H, prefix + T, prefix + T) and trace.asks == "all"
    assert not trace.scores[..., :prefix].any() and not trace.scores[..., :prefix, :].any()
    torch.testing.assert_close(
        trace.scores[..., prefix:, prefix:], memory.probabilities, rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(trace.query[:, 1, prefix:], q[..., DH : 2 * DH])
    torch.testing.assert_close(trace.key[:, 1, prefix:], k[..., :DH])
    back = heads.backward_value()[1]
    torch.testing.assert_close(back.scores, trace.scores.mT)


def test_a_query_without_keys_gets_zeros_and_gives_none() -> None:
    q, k, v, grad = case(H)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for keep in (True, False):
        o, memory = AttentionForward(H, keep_probabilities=keep)(q, k, v, mask)
        assert not o.any()
        assert not any(g.any() for g in AttentionBackward("full")(grad, memory))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttentionForward(4, 3), "n_head = 4, n_kv_head = 3: expected n_kv_head to divide n_head."),
        (lambda: AttentionBackward("values"), "grad = 'values': expected one of 'value_only', 'full', 'same_position'."),
        (lambda: AttentionForward(2, backend="literal"), "backend = 'literal' needs a layout: pass layout=Layout(d_model, stack=3 or more"),
        (lambda: AttentionForward(3)(*[numbers(1, 2, 8)] * 3), "q has shape (1, 2, 8): expected [B, T, D], D a multiple of 3 heads."),
        (lambda: AttentionForward(4, 2)(*[numbers(1, 2, 8)] * 3), "k has shape (1, 2, 8), v (1, 2, 8): expected (1, 2, 4), 2 heads of 2."),
        (lambda: AttentionForward(2)(*[numbers(1, 2, 8)] * 3, torch.ones(1, 2)), "attention_mask is torch.float32 (1, 2): expected torch.bool (1, 2) or (1, 2, 2)."),
        (lambda: AttentionForward(2, backend="literal", layout=Layout(8, 2))(*[numbers(1, 2, 8)] * 3), "stack = 2 leaves room for 2 memories of 8 numbers beside the signal, 3 are needed"),
        (lambda: AttentionForward(2)(*[numbers(1, 2, 8)] * 3)[1].heads(None), "heads stand in a layout"),
        (lambda: Rotary(torch.ones(2, 2)), "frequencies has shape (2, 2): expected [d / 2], one a pair."),
        (lambda: Rotary.from_base(3), "d_rotary = 3: expected an even number of at least 2."),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
