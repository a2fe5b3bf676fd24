"""Grafts: bit-exact on both sides of the mask, in and out any number of times, on the right base only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papercore.grafting import (
    Graft,
    GraftMismatchError,
    GraftStackError,
    Mask,
    entries,
    magnitude_mask,
    random_mask,
    task_vector,
    union,
)
from papercore.grafting import (
    graft as graft_module,
)
from tests.grafting.reference import batches, copies, finetuned, network, same, seeded

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def made(
    dtype: torch.dtype = torch.float32, *, k: int = 20, seed: int = 0
) -> tuple[nn.Module, nn.Module, Mask, Graft]:
    base = network(dtype=dtype)
    tuned = finetuned(base, seed + 1)
    mask = random_mask(task_vector(base, tuned), k=k, generator=seed)
    return base, tuned, mask, Graft.from_mask(tuned, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_inside_the_mask_fine_tuned_outside_pretrained_to_the_bit(dtype: torch.dtype, strided: bool) -> None:
    base, tuned, mask, graft = made(dtype)
    if strided:
        for model in (base, tuned):
            model[4].weight = nn.Parameter(model[4].weight.detach().t().contiguous().t())
    before = copies(base)
    handle = graft.apply_(base)
    for name, p in base.named_parameters():
        assert torch.equal(p[mask[name]], tuned.get_parameter(name)[mask[name]])
        assert torch.equal(p[~mask[name]], before[name][~mask[name]])
    assert not same(base, before)
    handle.remove()
    assert same(base, before)


def test_the_whole_mask_is_the_fine_tuned_model() -> None:
    base, tuned, _, _ = made()
    everything = Mask.of({n: torch.ones_like(p, dtype=torch.bool) for n, p in base.named_parameters()})
    before = copies(base)
    with Graft.from_mask(tuned, everything, pretrained=base).applied(base):
        assert same(base, copies(tuned))
    assert same(base, before)
    with pytest.raises(ValueError, match="the mask is empty: nothing to graft"):
        Graft.from_mask(tuned, everything - everything)


def test_in_and_out_any_number_of_times_also_from_a_file(tmp_path: Path) -> None:
    base, _, _, graft = made(torch.bfloat16)
    before = copies(base)
    graft.save(tmp_path / "skill.safetensors")
    loaded = Graft.load(tmp_path / "skill.safetensors")
    assert loaded == graft and len(loaded) == len(graft) == 20
    assert loaded.fingerprint == graft.fingerprint is not None
    for patch in (graft, loaded, graft, loaded):
        handle = patch.apply_(base)
        assert not same(base, before)
        handle.remove()
        assert same(base, before)


def test_sparse_and_dense_give_the_same_outputs() -> None:
    base, tuned, mask, graft = made()
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in dense.named_parameters():
            p.copy_(torch.where(mask[name], tuned.get_parameter(name), p))
    x, _ = batches()[0]
    with graft.applied(base) as model:
        assert torch.equal(model(x), dense(x))


def test_a_mask_without_a_base_takes_it_from_the_pretrained_model() -> None:
    base, tuned, mask, graft = made()
    plain = {n: mask[n] for n in mask}
    assert Graft.from_mask(tuned, plain).base is None
    assert Graft.from_mask(tuned, plain, pretrained=base).base == graft.base
    assert Graft.from_mask(tuned.state_dict(), mask, pretrained=base.state_dict()) == graft
    with pytest.raises(
        GraftMismatchError, match="pretrained is not the base that the mask was made for: 0.weight differs"
    ):
        Graft.from_mask(tuned, mask, pretrained=tuned)
    with pytest.raises(ValueError, match="finetuned lacks 2 tensors of the mask: 0.weight, 0.bias"):
        Graft.from_mask(nn.Identity(), {n: mask[n] for n in ("0.weight", "0.bias")})
    with pytest.raises(
        ValueError, match=r"finetuned has other shapes than the mask: 0.bias: \(3,\) instead of \(16,\)"
    ):
        Graft.from_mask({"0.bias": torch.ones(3)}, {"0.bias": torch.ones(16, dtype=torch.bool)})


# ---- the right base only


def test_one_changed_entry_anywhere_is_another_base() -> None:
    base, _, mask, graft = made(k=1)
    touched = [n for n, c in mask.counts().items() if c]
    assert len(touched) == 1
    for name, p in base.named_parameters():
        other = copy.deepcopy(base)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1e-6
        before = copies(other)
        with pytest.raises(
            GraftMismatchError,
            match=f"was made for another base, 1 of 6 tensors differ: {name}: other values",
        ):
            graft.apply_(other)
        assert same(other, before)
        assert p.shape == other.get_parameter(name).shape


def test_a_base_that_was_checked_is_checked_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from papercore.grafting import fingerprint

    base, _, _, graft = made()
    passes = []
    real = fingerprint.checksum
    monkeypatch.setattr(fingerprint, "checksum", lambda t: passes.append(1) or real(t))
    for _ in range(3):
        graft.apply_(base).remove()
    assert len(passes) == 6  # once for each tensor, then never again
    with torch.no_grad():
        base[4].bias.add_(1.0)
    with pytest.raises(GraftMismatchError, match="1 of 6 tensors differ: 4.bias"):
        graft.apply_(base)
    assert len(passes) == 7


def test_writes_through_data_are_seen_at_the_grafts_own_entries() -> None:
    base, _, _, graft = made()
    graft.apply_(base).remove()
    for p in base.parameters():
        p.data.add_(1.0)  # no version counter moves
    with pytest.raises(GraftMismatchError, match="6 of 6 tensors differ"):
        graft.apply_(base)


def test_wrong_models_are_refused_and_force_overrides_values() -> None:
    base, tuned, mask, graft = made()
    with pytest.raises(GraftMismatchError, match="the model lacks parameters that the graft changes"):
        graft.apply_(nn.Linear(4, 16))
    with pytest.raises(GraftMismatchError, match=r"has shape \(8, 4\), the graft was made for \(16, 4\)"):
        graft.apply_(network(width=8), force=True)
    with pytest.raises(
        GraftMismatchError, match="has dtype torch.float64, the graft torch.float32: .*force=True"
    ):
        graft.apply_(network(dtype=torch.float64))
    other = network(3)
    before = copies(other)
    with pytest.raises(GraftMismatchError, match="4 of 6 tensors differ"):  # LayerNorms begin alike
        graft.apply_(other)
    with graft.applied(other, force=True):
        for name, p in other.named_parameters():
            assert torch.equal(p[mask[name]], tuned.get_parameter(name)[mask[name]])
    assert same(other, before)
    wide = network(dtype=torch.float64)
    with graft.applied(wide, force=True):
        name = next(n for n, c in mask.counts().items() if c)
        assert torch.equal(
            wide.get_parameter(name)[mask[name]], tuned.get_parameter(name)[mask[name]].double()
        )
    with pytest.raises(TypeError, match="model must be an nn.Module, got dict"):
        graft.apply_({})  # type: ignore[arg-type]


# ---- several grafts on one model


def test_grafts_form_a_stack() -> None:
    base, tuned, _, first = made(seed=0)
    before = copies(base)
    second = Graft.from_mask(tuned, random_mask(task_vector(base, tuned), k=90, generator=8))
    one = first.apply_(base)
    middle = copies(base)
    two = second.apply_(base)  # overlaps with the first
    assert len(first & second) > 0
    with pytest.raises(
        GraftStackError,
        match="cannot remove Graft.20 entries.*Graft.90 entries.* was applied later; remove that first",
    ):
        one.remove()
    with pytest.raises(GraftStackError, match="is already applied to this model: remove it first"):
        first.apply_(base)
    two.remove()
    assert same(base, middle)
    one.remove()
    assert same(base, before)
    with pytest.raises(GraftStackError, match="is not applied any more"):
        one.remove()
    assert issubclass(GraftStackError, ValueError)


def test_the_base_beneath_is_seen_through_grafts_that_somebody_wrote_around() -> None:
    base, tuned, _, first = made(seed=0)
    second = Graft.from_mask(tuned, random_mask(task_vector(base, tuned), k=30, generator=8))
    before = copies(base)
    handle = first.apply_(base)
    with torch.no_grad():  # the same values, but PyTorch's version counters move on
        for p in base.parameters():
            p.add_(0.0)
    inner = second.apply_(base)
    inner.remove()
    with torch.no_grad():
        base[4].bias.add_(1.0)
    with pytest.raises(GraftMismatchError, match="4.bias"):
        second.apply_(base)
    handle.remove(force=True)
    with torch.no_grad():
        base[4].bias.copy_(before["4.bias"])
    assert same(base, before)


def test_changes_while_applied_are_not_lost_silently() -> None:
    base, _, mask, graft = made()
    before = copies(base)
    handle = graft.apply_(base)
    name = next(n for n, c in mask.counts().items() if c)
    with torch.no_grad():
        base.get_parameter(name).add_(1.0)
    with pytest.raises(
        GraftStackError, match=r"was changed while the graft was applied: remove\(force=True\)"
    ):
        handle.remove()
    assert handle.active
    handle.remove(force=True)
    assert torch.equal(base.get_parameter(name)[mask[name]], before[name][mask[name]])
    with graft.applied(other := network()), pytest.raises(GraftMismatchError):
        graft.apply_(copy.deepcopy(other))  # a copy holds the grafted weights and no stack


def test_keeping_and_merging() -> None:
    base, tuned, mask, graft = made()
    handle = graft.apply_(base)
    handle.keep()
    assert not handle.active
    with pytest.raises(GraftMismatchError):
        graft.apply_(base)  # it is no longer the base
    merged = graft.merge_and_unload(network())
    assert same(merged, copies(base))
    with graft.apply_(network()) as handle:
        assert handle.active
    assert not handle.active


class Interrupted(BaseException):
    pass


def test_an_interrupted_apply_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, _, graft = made(k=60)
    before = copies(base)
    for stop_at in range(1, len(graft.index) + 1):
        calls = 0

        def fragile(tensor: Tensor, index: Tensor, values: Tensor, stop_at: int = stop_at) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Interrupted
            entries.put(tensor, index, values)

        monkeypatch.setattr(graft_module, "put", fragile)
        with pytest.raises(Interrupted):
            graft.apply_(base)
        monkeypatch.setattr(graft_module, "put", entries.put)
        assert same(base, before)
        graft.apply_(base).remove()  # nothing is left on the stack
    with pytest.raises(Interrupted), graft.applied(base):
        raise Interrupted
    assert same(base, before)


def test_tied_weights_are_written_once_and_seen_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    base = Tied()
    tuned = finetuned(base)
    graft = Graft.from_mask(tuned, magnitude_mask(task_vector(base, tuned), k=4))
    before = base.embed.weight.detach().clone()
    with graft.applied(base):
        assert base.head.weight is base.embed.weight
        assert int((base.head.weight != before).sum()) == 4
    assert torch.equal(base.head.weight, before)


# ---- files


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_is_a_header_and_k_times_index_and_value(dtype: torch.dtype, tmp_path: Path) -> None:
    _, _, _, graft = made(dtype, k=100)
    item = torch.empty(0, dtype=dtype).element_size()
    assert graft.nbytes == 100 * (4 + item)
    path = tmp_path / "skill.safetensors"
    graft.save(path)
    assert graft.nbytes < path.stat().st_size < graft.nbytes + 3000
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name, index in graft.index.items():
            assert file.get_tensor(f"{name}.idx").dtype == torch.int32
            assert torch.equal(file.get_tensor(f"{name}.idx").long(), index)
            assert torch.equal(file.get_tensor(f"{name}.val"), graft.values[name])
        assert file.metadata()["fingerprint"] == graft.fingerprint
        assert file.metadata()["entries"] == "100"


def test_folders_and_metadata(tmp_path: Path) -> None:
    base, tuned, mask, _ = made()
    graft = Graft.from_mask(tuned, mask, metadata={"task": "signs", "rule": "random"})
    graft.save_pretrained(tmp_path / "new" / "folder")
    loaded = Graft.from_pretrained(tmp_path / "new" / "folder")
    assert loaded == graft and loaded.metadata == {"task": "signs", "rule": "random"}
    with loaded.applied(base):
        pass
    with pytest.raises(ValueError, match="metadata must map names other than format, version"):
        Graft.from_mask(tuned, mask, metadata={"base": "x"}).save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_files_that_are_no_grafts(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, _, _, graft = made()
    with pytest.raises(FileNotFoundError, match="no such file"):
        Graft.load(tmp_path / "none.safetensors")
    text = tmp_path / "notes.txt"
    text.write_text("not a graft")
    with pytest.raises(ValueError, match="not a safetensors file, or damaged"):
        Graft.load(text)
    with pytest.raises(ValueError, match="exists and is not a graft: it is not replaced"):
        graft.save(text)
    assert text.read_text() == "not a graft"
    model = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, model)
    with pytest.raises(ValueError, match="a safetensors file, but not a graft"):
        Graft.load(model)
    with pytest.raises(ValueError, match="exists and is not a graft"):
        graft.save(model)
    good = tmp_path / "good.safetensors"
    graft.save(good)
    graft.save(good)  # an earlier graft is replaced
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged"):
        Graft.load(cut)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cut.safetensors",
        "good.safetensors",
        "model.safetensors",
        "notes.txt",
    ]


# ---- unions of grafts


def test_the_union_of_masks_is_the_patches_in_any_order() -> None:
    base, tuned, _, _ = made()
    delta = task_vector(base, tuned)
    masks = [random_mask(delta, k=60, generator=s) for s in range(3)]
    grafts = [Graft.from_mask(tuned, m) for m in masks]
    joined = Graft.from_mask(tuned, union(masks))
    assert grafts[0] | grafts[1] | grafts[2] == joined == grafts[2] | grafts[0] | grafts[1]
    assert grafts[0] & grafts[1] == Graft.from_mask(tuned, masks[0] & masks[1])
    assert (grafts[0] | grafts[0]) == grafts[0]
    with joined.applied(base):
        wanted = copies(base)
    for order in ((0, 1, 2), (2, 0, 1)):
        model = network()
        for i in order:
            grafts[i].apply_(model)
        assert same(model, wanted)


def dense_stitch(base: nn.Module, models: list[nn.Module], masks: list[Mask], rule: str) -> dict[str, Tensor]:
    """Entry by entry in plain loops."""
    result = {}
    for name, p in base.named_parameters():
        out = p.detach().clone().view(-1)
        for i in range(out.numel()):
            claims = [
                m.get_parameter(name).view(-1)[i]
                for m, k in zip(models, masks, strict=True)
                if bool(k[name].view(-1)[i])
            ]
            if claims:
                out[i] = {
                    "mean": torch.stack(claims).sum() / len(claims),
                    "first": claims[0],
                    "last": claims[-1],
                }[rule]
        result[name] = out.view(p.shape)
    return result


@pytest.mark.parametrize("rule", ["mean", "first", "last"])
def test_stitching_models_of_different_deltas(rule: str) -> None:
    from papercore.grafting import collisions, stitch

    base = network()
    models = [finetuned(base, s) for s in (1, 2, 3)]
    masks = [random_mask(task_vector(base, m), k=70, generator=s) for s, m in enumerate(models)]
    grafts = [Graft.from_mask(m, k) for m, k in zip(models, masks, strict=True)]
    shared = sum(int((sum(k[n].int() for k in masks) > 1).sum()) for n in masks[0])  # type: ignore[union-attr,arg-type]
    assert collisions(grafts) == shared > 10
    with stitch(grafts, collisions=rule).applied(base):
        after = copies(base)
    wanted = dense_stitch(base, models, masks, rule)
    for name in wanted:
        torch.testing.assert_close(after[name], wanted[name], rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"entries of .* have different values in the grafts: use stitch"):
        _ = grafts[0] | grafts[1]
    with pytest.raises(ValueError, match="the grafts have different values at shared entries of"):
        _ = grafts[0] & grafts[1]
    apart = Graft.from_mask(models[1], masks[1] - masks[0])
    assert collisions([grafts[0], apart]) == 0
    assert stitch([grafts[0], apart], collisions=rule) == grafts[0] | apart


def test_stitching_refusals() -> None:
    from papercore.grafting import stitch

    _, _, _, graft = made()
    other = network(5)
    odd = Graft.from_mask(
        finetuned(other), random_mask(task_vector(other, finetuned(other)), k=9, generator=1)
    )
    with pytest.raises(
        GraftMismatchError, match="the grafts belong to different bases: their 0.weight differs"
    ):
        stitch([graft, odd])
    with pytest.raises(ValueError, match="collisions='sum' is not one of 'mean', 'first', 'last', 'error'"):
        stitch([graft], collisions="sum")
    with pytest.raises(ValueError, match="grafts is empty"):
        stitch([])
    with pytest.raises(TypeError, match="it holds a int"):
        stitch([graft, 3])  # type: ignore[list-item]
    assert stitch({"only": graft}) == graft


def test_grafting_needs_safetensors_only_for_files() -> None:
    import subprocess
    import sys

    code = "import sys, papercore.grafting; print(sorted({'safetensors', 'transformers', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_checksums_see_every_entry_and_its_place() -> None:
    from papercore.grafting.fingerprint import checksum

    for dtype in DTYPES:
        t = torch.randn(300, 7, generator=seeded()).to(dtype)
        seen = {
            checksum(t),
            checksum(t.reshape(-1).flip(0)),
            checksum(-t),
            checksum(t[:-1]),
            checksum(torch.zeros_like(t)),
        }
        for i in range(0, t.numel(), 97):
            changed = t.clone()
            changed.view(-1)[i] = -changed.view(-1)[i]
            seen.add(checksum(changed))
            changed.view(-1)[(i + 1) % t.numel()] *= -1  # two signs
            seen.add(checksum(changed))
        assert len(seen) == 5 + 2 * len(range(0, t.numel(), 97))
        assert checksum(t.t().contiguous().t()) == checksum(t)
    long = torch.zeros((1 << 18) + 5)
    assert checksum(long) != checksum(long[:-1])
    swapped = long.clone()
    swapped[0], other = 1.0, long.clone()
    other[1 << 18] = 1.0  # the first entry of the second chunk
    assert checksum(swapped) != checksum(other)
