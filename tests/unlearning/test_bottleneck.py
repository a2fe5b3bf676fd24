"""Reading, gradients, keys and usage against definitions; errors as text."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from papercore.unlearning import KeyValueBottleneck, count_usage
from papercore.unlearning.key_learning import MovingAverage
from tests.unlearning.bottlenecks import bottleneck, brute_force, features


def test_output_is_the_mean_of_the_fetched_values() -> None:
    model, z = bottleneck(), features(40, seed=3)
    found = brute_force(model, z)
    expected = torch.stack([model.values[c, found[:, c]] for c in range(6)]).mean(0)
    torch.testing.assert_close(model(z), expected)


def test_tokens_are_averaged() -> None:
    model = bottleneck()
    z = features(30, seed=3).view(10, 3, 12)
    torch.testing.assert_close(model(z), model(z.reshape(30, 12)).view(10, 3, 4).mean(1))
    assert model.lookup(z).shape == (10, 3, 6)
    assert int(model.usage(z).sum()) == 10 * 3 * 6


def test_gradients_reach_the_fetched_values_alone_and_equal_one_over_c() -> None:
    model, z = bottleneck(), features(1, seed=3)
    model(z)[0, 2].backward()
    expected = torch.zeros(6, 20, 4)
    expected[torch.arange(6), model.lookup(z)[0], 2] = 1 / 6
    torch.testing.assert_close(model.values.grad, expected)


def test_gradients_equal_finite_differences() -> None:
    model = bottleneck(codebooks=2, pairs=3, dim_value=2).double()
    z, labels = features(5, seed=3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    found = model.lookup(z)

    def loss(values: torch.Tensor) -> torch.Tensor:
        rows = found + torch.arange(2) * 3
        logits = functional.embedding_bag(rows, values.flatten(0, 1), mode="mean")
        return functional.cross_entropy(logits, labels)

    assert torch.autograd.gradcheck(loss, [model.values.detach().clone().requires_grad_()])
    functional.cross_entropy(model(z), labels).backward()
    values = model.values.detach().clone().requires_grad_()
    loss(values).backward()
    torch.testing.assert_close(model.values.grad, values.grad)


def test_usage_counts_every_lookup_once() -> None:
    model, z = bottleneck(), features(70, seed=3)
    usage = model.usage(z)
    assert usage.dtype == torch.long and usage.shape == (6, 20) and int(usage.sum()) == 70 * 6
    expected = torch.zeros(6, 20, dtype=torch.long)
    for row in brute_force(model, z).tolist():
        for book, pair in enumerate(row):
            expected[book, pair] += 1
    assert torch.equal(usage, expected)
    loader = DataLoader(TensorDataset(z, torch.zeros(70, dtype=torch.long)), batch_size=13)
    assert torch.equal(model.usage(loader), usage)
    assert torch.equal(count_usage(model.lookup(z), 20), usage)


def test_an_empty_batch_gives_no_rows() -> None:
    model = bottleneck()
    assert model(torch.empty(0, 12)).shape == (0, 4) and model.lookup(torch.empty(0, 12)).shape == (0, 6)


def test_seed_alone_decides_and_the_global_state_stays() -> None:
    state = torch.get_rng_state()
    a, b, c = bottleneck(seed=5), bottleneck(seed=5), bottleneck(seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.keys, b.keys) and torch.equal(a.projection, b.projection)
    assert not torch.equal(a.keys, c.keys)


@pytest.mark.parametrize("start", ["data", "normal"])
def test_init_keys_lowers_the_distance_and_leaves_no_key_unused(start: str) -> None:
    z = features(400, seed=8)
    model = KeyValueBottleneck(12, 4, 16, dim_key=3, dim_value=2)
    model.init_keys(z, epochs=1, batch_size=400, dead_threshold=0.0, start=start)
    heads = torch.einsum("bd,cdk->cbk", z, model.projection)
    early = torch.cdist(heads, model.keys).amin(-1).square().mean()
    model.init_keys(z, epochs=10, batch_size=100, start=start)
    late = torch.cdist(heads, model.keys).amin(-1).square().mean()
    assert float(late) < float(early)
    assert int((model.usage(z) == 0).sum()) == 0


def test_moving_average_by_hand() -> None:
    vq = MovingAverage(torch.tensor([[[0.0], [10.0]]]), decay=0.9, dead_threshold=0.0, eps=0.0)
    g = torch.Generator()
    vq.step(torch.tensor([[[1.0]], [[3.0]], [[9.0]]]), g)
    torch.testing.assert_close(vq.keys, torch.tensor([[[2.0], [9.0]]]))
    vq.step(torch.tensor([[[2.5]], [[2.5]], [[2.5]]]), g)
    # size 0.9 * (0.2, 0.1) + 0.1 * (3, 0); total 0.9 * (0.4, 0.9) + 0.1 * (7.5, 0)
    torch.testing.assert_close(vq.size, torch.tensor([[0.48, 0.09]]))
    torch.testing.assert_close(vq.keys, torch.tensor([[[1.11 / 0.48], [9.0]]]))


def test_sizes_add_up_to_the_geometric_series() -> None:
    heads, g = features(64, 6, seed=2).view(64, 2, 3), torch.Generator().manual_seed(0)
    vq = MovingAverage(heads[:8].transpose(0, 1), decay=0.95, dead_threshold=0.0)
    for t in range(1, 6):
        vq.step(heads, g)
        torch.testing.assert_close(vq.size.sum(1), torch.full((2,), (1 - 0.95**t) * 64))


def test_dead_keys_come_back_to_the_data_and_stay() -> None:
    heads, g = features(64, 2, seed=2).view(64, 1, 2), torch.Generator().manual_seed(0)
    start = torch.cat([heads[:3, 0], torch.full((1, 2), 1e3)]).unsqueeze(0)
    vq = MovingAverage(start, dead_threshold=0.1)
    assert vq.step(heads, g).tolist() == [[False, False, False, True]]
    assert any(torch.equal(vq.keys[0, 3], head) for head in heads[:, 0])
    assert not bool(vq.step(heads, g).any())


def test_keys_are_frozen_once_values_depend_on_them() -> None:
    model = bottleneck(random_values=False)
    model.init_keys(features(), epochs=1)
    model.values.data[0, 0, 0] = 1.0
    with pytest.raises(
        RuntimeError, match="the keys are frozen: values were trained, or pairs masked, with them"
    ):
        model.init_keys(features(), epochs=1)
    assert not model.keys.requires_grad and [name for name, _ in model.named_parameters()] == ["values"]


def test_state_dict_pickle_and_copy_carry_mask_keys_and_log() -> None:
    model, z = bottleneck(), features(40, seed=3)
    model.mask_pairs(model.usage(z[:9]) > 1, by="a test", subject="nine examples")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = KeyValueBottleneck(12, 6, 20, dim_key=5, dim_value=4, seed=77)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(z), model(z)) and torch.equal(twin.mask, model.mask)
        assert [e.subject for e in twin.audit] == ["nine examples"]
    other.unmask()
    assert bool(model.mask.any()) and not torch.equal(other(z), model(z))


def test_edits_of_keys_and_mask_are_seen_by_the_next_lookup() -> None:
    model, z = bottleneck(), features(40, seed=3)
    model.lookup(z)
    model.keys.add_(torch.randn(model.keys.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(model.lookup(z), brute_force(model, z))
    model.mask[:, :10] = True
    assert int(model.lookup(z).min()) >= 10
    model.double()
    assert torch.equal(model.lookup(z.double()), brute_force(model, z, model.mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim=0 must be an integer >= 1"),
        ({"num_pairs": -1}, "num_pairs=-1 must be an integer >= 1"),
        ({"projection": "learned"}, "projection='learned' is not one of 'random', 'chunk', 'none'"),
        (
            {"projection": "chunk"},
            "projection='chunk' cuts dim=12 into num_codebooks=3 slices of dim_key=5: dim must be 15",
        ),
        ({"projection": "none"}, "projection='none' needs dim_key = dim, got dim_key=5 and dim=12"),
    ],
)
def test_sizes_that_do_not_fit(arguments: dict, message: str) -> None:
    settings = {"dim": 12, "num_codebooks": 3, "num_pairs": 4, "dim_key": 5, "dim_value": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        KeyValueBottleneck(**settings)


def test_types_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match=r"num_codebooks must be an integer, got 2\.5 of type float"):
        KeyValueBottleneck(3, 2.5, 4, dim_key=2, dim_value=2)
    model = bottleneck()
    with pytest.raises(TypeError, match=r"features must be floating-point features, got torch\.int64"):
        model(torch.zeros(2, 12, dtype=torch.long))
    with pytest.raises(TypeError, match="features must be a tensor of features, got list"):
        model([[0.0] * 12])


def test_features_that_do_not_fit() -> None:
    model = bottleneck()
    with pytest.raises(ValueError, match="features has 7 features, but the bottleneck was made for dim=12"):
        model(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"features has the shape \(12,\), expected \[B, 12\]"):
        model(torch.zeros(12))
    bad = features(5)
    bad[3, 2] = torch.nan
    with pytest.raises(
        ValueError, match=r"features: 1 of 5 examples hold NaN or infinity \(the first is 3\)"
    ):
        model(bad)
    with pytest.raises(ValueError, match="features: 1 of 5 examples hold NaN"):
        KeyValueBottleneck(12, 2, 3, dim_key=2, dim_value=2).init_keys(bad)
    with pytest.raises(ValueError, match="features is empty: expected at least one example"):
        KeyValueBottleneck(12, 2, 3, dim_key=2, dim_value=2).init_keys(torch.empty(0, 12))
    with pytest.raises(ValueError, match=r"indices has the shape \(4, 5\), expected \[B, 6\] or \[B, T, 6\]"):
        model.read(torch.zeros(4, 5, dtype=torch.long))


def test_labels_of_a_wrong_kind() -> None:
    model, z = bottleneck(), features(8)
    with pytest.raises(
        ValueError,
        match=r"features gave a tensor of shape \(8,\) and type torch\.float32: labels must be a LongTensor",
    ):
        model.usage((z, torch.zeros(8)))
    with pytest.raises(
        ValueError,
        match=r"features's labels has the shape \(7,\), expected \[8\], one label for each example",
    ):
        model.usage((z, torch.zeros(7, dtype=torch.long)))


def test_no_lookup_before_the_keys_have_a_place() -> None:
    model = KeyValueBottleneck(12, 2, 3, dim_key=2, dim_value=2)
    with pytest.raises(RuntimeError, match=r"the keys have no place yet: call init_keys\(features\) first"):
        model(features())
