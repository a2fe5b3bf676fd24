"""The small decoder beside attention written out by hand: causal, positions, prefixes, and no global randomness."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from papercore.lab.decoder import Decoder, DecoderConfig

SIZES = DecoderConfig(vocabulary=11, width=16, layers=3, heads=4, context=12)


def _decoder(config=SIZES, seed=0):
    """Weights large enough for attention to be far from uniform."""
    made = Decoder(config, generator=torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.add_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + i), dtype=p.dtype),
                alpha=0.3,
            )
    return made


def _ids(batch, n, seed=5):
    return torch.randint(SIZES.vocabulary, (batch, n), generator=torch.Generator().manual_seed(seed))


def _by_hand(model, input_ids, prefixes=None):
    """Logits [B, n, V], token by token and head by head, from the formulas alone; `prefixes`: (keys, values) [p, d] by layer."""
    d, heads = model.config.width, model.config.heads
    size = d // heads
    out = []
    for ids in input_ids:
        x = model.embedding.weight[ids] + model.position.weight[: len(ids)]
        for layer, block in enumerate(model.blocks):
            h = F.layer_norm(x, (d,), block.norm_attention.weight, block.norm_attention.bias)
            q, k, v = (h @ part.weight.T + part.bias for part in (block.q, block.k, block.v))
            mixed = torch.zeros_like(x)
            for t in range(len(ids)):
                keys, values = k[: t + 1], v[: t + 1]
                if prefixes is not None:
                    keys, values = (
                        torch.cat([prefixes[layer][0], keys]),
                        torch.cat([prefixes[layer][1], values]),
                    )
                for head in range(heads):
                    part = slice(head * size, (head + 1) * size)
                    weights = torch.softmax(keys[:, part] @ q[t, part] / math.sqrt(size), dim=0)
                    mixed[t, part] = weights @ values[:, part]
            x = x + mixed @ block.out.weight.T + block.out.bias
            h = F.layer_norm(x, (d,), block.norm_mlp.weight, block.norm_mlp.bias)
            x = x + F.gelu(h @ block.up.weight.T + block.up.bias) @ block.down.weight.T + block.down.bias
        x = F.layer_norm(x, (d,), model.norm.weight, model.norm.bias)
        out.append(x @ model.embedding.weight.T)
    return torch.stack(out)


def test_the_decoder_is_the_formula():
    model, ids = _decoder(), _ids(3, 7)
    with torch.no_grad():
        logits = model(ids)
        assert logits.shape == (3, 7, SIZES.vocabulary)
        torch.testing.assert_close(logits, _by_hand(model, ids))
        torch.testing.assert_close(model.next_logits(ids), logits[:, -1])


@pytest.mark.parametrize("prefix", [0, 3])
def test_what_comes_later_changes_nothing_before(prefix):
    model = _decoder(DecoderConfig(vocabulary=11, width=16, layers=3, heads=4, context=12, prefix=prefix))
    ids = _ids(2, 9)
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % SIZES.vocabulary
    with torch.no_grad():
        before, after = model(ids), model(other)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-13)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-3  # and everything from there on


def test_a_prefix_is_keys_and_values_that_every_token_sees():
    model = _decoder(DecoderConfig(vocabulary=11, width=16, layers=3, heads=4, context=12, prefix=3))
    ids = _ids(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), _by_hand(model, ids, [b.prefix for b in model.blocks]))


def test_a_prefix_that_starts_from_tokens_is_what_those_tokens_attend_with():
    """Brute force: keys and values of each layer, taken from a run over the tokens, stand before those of the sentence."""
    model, tokens, ids = _decoder(), torch.tensor([4, 1, 7]), _ids(2, 6)
    caught: list[list[torch.Tensor]] = []

    def catch(block, inputs):
        h = F.layer_norm(inputs[0], (SIZES.width,), block.norm_attention.weight, block.norm_attention.bias)
        caught.append([(h[0] @ part.weight.T + part.bias) for part in (block.k, block.v)])

    with torch.no_grad():
        hooks = [block.register_forward_pre_hook(catch) for block in model.blocks]
        model(tokens[None])
        for hook in hooks:
            hook.remove()
        tuned = model.with_prefix(tokens)
        torch.testing.assert_close(tuned(ids), _by_hand(model, ids, caught))
        # The two halves of one sequence: with the positions shifted by p, the second half sees the first as its prefix.
        shifted = model.with_prefix(tokens)
        shifted.position.weight[: SIZES.context - 3] = model.position.weight[3:]
        torch.testing.assert_close(shifted(ids), model(torch.cat([tokens.expand(2, -1), ids], dim=1))[:, 3:])


def test_the_model_that_a_prefix_was_taken_from_is_left_as_it_was():
    model, ids = _decoder(), _ids(1, 4)
    with torch.no_grad():
        before = model(ids)
        tuned = model.with_prefix(torch.tensor([1, 2]))
        assert torch.equal(model(ids), before) and model.config.prefix == 0 and tuned.config.prefix == 2
        for p in tuned.parameters():
            p.add_(1.0)
        assert torch.equal(model(ids), before)
    assert tuned.embedding.weight.dtype == model.embedding.weight.dtype == torch.float64
    prefixes = [p for name, p in tuned.named_parameters() if name.endswith("prefix")]
    assert len(prefixes) == SIZES.layers and all(p.requires_grad and p.shape == (2, 2, 16) for p in prefixes)


def test_no_global_randomness_is_used_and_the_seed_decides():
    before = torch.get_rng_state()
    first = Decoder(SIZES, generator=torch.Generator().manual_seed(1))
    first.with_prefix(torch.tensor([1]))(_ids(1, 3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    second = Decoder(SIZES, generator=torch.Generator().manual_seed(1))
    other = Decoder(SIZES, generator=torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    torch.set_rng_state(before)


def test_the_first_weights_are_those_of_a_language_model():
    model = Decoder(
        DecoderConfig(vocabulary=400, width=128, layers=4, heads=4, context=64, prefix=5),
        generator=torch.Generator().manual_seed(0),
    )
    assert not any(p.is_meta for p in model.parameters())
    spread = {name: p.std().item() for name, p in model.named_parameters() if p.dim() > 1}
    for name, value in spread.items():
        expected = 0.02 / math.sqrt(8) if ".out." in name or ".down." in name else 0.02
        assert value == pytest.approx(expected, rel=0.06), name
    ids = torch.randint(400, (4, 64), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(400), rel=0.02)  # it begins by knowing nothing


@pytest.mark.parametrize("prefix", [0, 2])
def test_sequences_that_are_too_long_are_refused(prefix):
    model = _decoder(DecoderConfig(vocabulary=11, width=16, layers=1, heads=4, context=12, prefix=prefix))
    assert model(_ids(1, 12)).shape == (1, 12, 11)
    for call in (model, model.next_logits, model.hidden):
        with pytest.raises(ValueError, match="13 tokens, but this decoder was built for at most 12"):
            call(_ids(1, 13))


def test_impossible_sizes_and_prefixes_are_refused():
    with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
        DecoderConfig(vocabulary=3, width=10, heads=4)
    model = _decoder()
    for tokens, shape in (
        (torch.zeros(0), r"\(0,\)"),
        (torch.zeros(13), r"\(13,\)"),
        (torch.zeros(1, 2), r"\(1, 2\)"),
    ):
        with pytest.raises(
            ValueError, match=rf"a prefix starts from 1 to 12 token ids \[p\], got shape {shape}"
        ):
            model.with_prefix(tokens.long())
    with pytest.raises(ValueError, match="this decoder has a prefix of 2 already"):
        model.with_prefix(torch.tensor([1, 2])).with_prefix(torch.tensor([3]))


@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "prefix"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_the_last_state_alone_is_that_of_the_whole(prefixed, n):
    model = _decoder()
    if prefixed:
        model = model.with_prefix(torch.tensor([3, 1, 4]))
    ids = _ids(2, n)
    torch.testing.assert_close(model.last_hidden(ids), model.hidden(ids)[:, -1])
