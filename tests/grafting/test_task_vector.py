"""Task vectors: what is subtracted, what counts as graftable, and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from papercore.grafting import NonFiniteError, TaskVector, task_vector
from tests.grafting.reference import finetuned, network


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_base_plus_delta_is_the_fine_tuned_model_within_a_rounding(dtype: torch.dtype) -> None:
    base = network(dtype=dtype)
    tuned = finetuned(base)
    delta = task_vector(base, tuned)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, p in base.named_parameters():
        assert delta[name].dtype == wide
        rebuilt = (p.detach().to(wide) + delta[name]).to(dtype)
        torch.testing.assert_close(
            rebuilt,
            tuned.get_parameter(name).detach(),
            rtol=2**-7 if dtype == torch.bfloat16 else 1e-3,
            atol=1e-6,
        )
    assert delta.total == sum(p.numel() for p in base.parameters())
    pairs = zip(base.parameters(), tuned.parameters(), strict=True)
    assert delta.moved == sum(int((p != q).sum()) for p, q in pairs)


def test_only_tensors_that_moved_count() -> None:
    base = network()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight[0, 0] += 1.0
    delta = task_vector(base, tuned)
    assert list(delta) == ["0.weight"]
    assert (delta.total, delta.moved) == (64, 1)
    everything = task_vector(base, tuned, select=".*")
    assert list(everything) == [n for n, _ in base.named_parameters()]


def test_select_by_pattern_list_and_function() -> None:
    base = network()
    tuned = finetuned(base)
    assert list(task_vector(base, tuned, select="bias$")) == ["0.bias", "1.bias", "4.bias"]
    assert list(task_vector(base, tuned, select=["4.weight", "0.bias"])) == ["0.bias", "4.weight"]
    assert list(task_vector(base, tuned, select=lambda n: n.startswith("1."))) == ["1.weight", "1.bias"]
    with pytest.raises(
        ValueError, match=r"select='encoder' matches none of the 6 tensors \(0.weight, 0.bias"
    ):
        task_vector(base, tuned, select="encoder")
    with pytest.raises(ValueError, match="select='\\(' is not a regular expression"):
        task_vector(base, tuned, select="(")
    with pytest.raises(TypeError, match="select must be a regular expression, a list of names or a function"):
        task_vector(base, tuned, select=3)  # type: ignore[arg-type]


def test_state_dicts_give_the_same_as_modules_and_buffers_are_left_out() -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tuned = finetuned(base)
    with torch.no_grad():
        tuned[1].running_mean.add_(1.0)
    wanted = task_vector(base, tuned)
    assert "1.running_mean" not in wanted
    for pre, ft in ((base, tuned.state_dict()), (base.state_dict(), tuned)):
        mixed = task_vector(pre, ft)
        assert list(mixed) == list(wanted)
        assert all(torch.equal(mixed[n], wanted[n]) for n in wanted)
        assert mixed.fingerprint == wanted.fingerprint


def test_tied_weights_are_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    base = Tied()
    tuned = finetuned(base)
    assert list(task_vector(base, tuned)) == ["embed.weight"]
    assert list(task_vector(base.state_dict(), tuned.state_dict())) == ["embed.weight"]
    assert list(task_vector(base, tuned.state_dict())) == ["embed.weight"]


def test_neither_model_is_touched_or_kept() -> None:
    base = network()
    tuned = finetuned(base)
    delta = task_vector(base, tuned)
    kept = {n: t.clone() for n, t in delta.items()}
    with torch.no_grad():
        for p in tuned.parameters():
            p.zero_()
    assert all(torch.equal(delta[n], kept[n]) for n in kept)


def test_names_and_shapes_that_differ_are_listed() -> None:
    base, tuned = nn.Linear(3, 4), nn.Linear(3, 5)
    message = "the models differ in 2 tensors: weight: (4, 3) before and (5, 3) after; bias: (4,) before and (5,) after"
    with pytest.raises(ValueError, match=re.escape(message)):
        task_vector(base, tuned)
    with pytest.raises(
        ValueError, match=r"0.weight \(only in the fine-tuned model\).*copy_missing_from='ft'"
    ):
        task_vector(nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"head.weight \(only in the pre-trained model\)"):
        task_vector({"a": torch.ones(2), "head.weight": torch.ones(2)}, {"a": torch.zeros(2)})


def test_a_new_head_can_be_taken_from_the_fine_tuned_model() -> None:
    pre = {"body": torch.zeros(3)}
    ft = {"body": torch.ones(3), "head": torch.arange(2.0)}
    delta = task_vector(pre, ft, copy_missing_from="ft")
    assert list(delta) == ["body"]
    assert delta.copied["head"].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="copy_missing_from='pre' is not one of None, 'ft'"):
        task_vector(pre, ft, copy_missing_from="pre")


def test_equal_models_are_refused() -> None:
    base = network()
    message = "fine-tuned weights equal the pre-trained ones: nothing to graft"
    with pytest.raises(ValueError, match=message):
        task_vector(base, base)
    with pytest.raises(ValueError, match=message):
        task_vector(base, copy.deepcopy(base))
    with pytest.raises(ValueError, match=message):
        TaskVector({"w": torch.zeros(3)})


def test_bad_numbers_and_kinds_are_refused() -> None:
    base = network()
    tuned = finetuned(base)
    with torch.no_grad():
        tuned[4].bias[1] = torch.nan
    with pytest.raises(NonFiniteError, match="the fine-tuned 4.bias has NaN or infinite entries"):
        task_vector(base, tuned)
    with pytest.raises(NonFiniteError, match="the pre-trained 4.bias has NaN or infinite entries"):
        task_vector(tuned, base)
    with pytest.raises(TypeError, match="pretrained must be an nn.Module or a state dict, got list"):
        task_vector([1], tuned)
    with pytest.raises(TypeError, match=r"delta must come from task_vector\(pretrained, finetuned\)"):
        TaskVector.of([torch.ones(2)])
    with pytest.raises(KeyError, match="'nope' is not among the 6 tensors"):
        task_vector(base, finetuned(base))["nope"]


def test_quantised_and_unloaded_weights_are_refused() -> None:
    pre = {"q": torch.zeros(3, dtype=torch.int8), "w": torch.zeros(2)}
    ft = {"q": torch.ones(3, dtype=torch.int8), "w": torch.ones(2)}
    with pytest.raises(
        NotImplementedError, match="q has dtype torch.int8: quantised weights are not grafted.*select="
    ):
        task_vector(pre, ft)
    assert list(task_vector(pre, ft, select="w")) == ["w"]
    with pytest.raises(NotImplementedError, match="w is on the meta device"):
        task_vector({"w": torch.zeros(2)}, {"w": torch.ones(2, device="meta")})
    counters = {"steps": torch.tensor(3), "w": torch.zeros(2)}
    assert list(task_vector(counters, {"steps": torch.tensor(3), "w": torch.ones(2)})) == ["w"]
