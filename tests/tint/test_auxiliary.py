"""What is read from an auxiliary: the same tensors, in the right orientation, under the right names, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from papercore.tint import TinyGPT, read_auxiliary
from papercore.tint.dynamic import functional_logits
from tests.tint.auxiliaries import KINDS, LIBRARY, TINY, auxiliary, documents


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_references_under_their_own_names(kind: str) -> None:
    model = auxiliary(kind)
    description, parameters = read_auxiliary(model), dict(model.named_parameters())
    assert len(description.blocks) == 3
    linears = [linear for block in description.blocks for linear in block.linears()]
    for owner in [*linears, *description.norms()]:
        assert owner.weight is parameters[f"{owner.name}.weight"]
        assert owner.bias is parameters.get(f"{owner.name}.bias")
    for linear in linears:
        assert linear.matrix().untyped_storage().data_ptr() == linear.weight.untyped_storage().data_ptr()
    assert description.head.weight is (model.wte.weight if kind == "tiny_gpt" else model.lm_head.weight)
    # every parameter is somebody's
    held = {id(owner.weight) for owner in [*linears, *description.norms(), description.head]}
    held |= {id(owner.bias) for owner in [*linears, *description.norms()]}
    held |= {id(description.embedding), id(description.positions)}
    assert {id(parameter) for parameter in parameters.values()} <= held


@pytest.mark.parametrize("kind", KINDS)
def test_the_description_says_the_whole_model(kind: str) -> None:
    """The functional forward pass of the description is the model's own, masks and default positions included."""
    model, ids = auxiliary(kind, dtype=torch.float32), documents(2)
    description = read_auxiliary(model)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, :5] = False
    for given in (None, mask):
        positions = description.position_ids(ids, given)
        ours = functional_logits(description, {}, ids, positions, given)
        theirs = model(ids, attention_mask=given).logits
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-5)


def test_rows_of_a_joint_matrix_come_back_bit_by_bit() -> None:
    """GPT-2: transposed, three layers in one; read as rows, written through the same view."""
    model = auxiliary("gpt2")
    block, layer = read_auxiliary(model).blocks[1], model.transformer.h[1].attn.c_attn
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [nn.functional.linear(x, p.matrix(), p.vector()) for p in (block.query, block.key, block.value)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), rtol=0, atol=1e-13)
    rebuilt = torch.zeros_like(layer.weight)
    for part in (block.query, block.key, block.value):
        part.part_of_weight(rebuilt).copy_(part.matrix())
    assert torch.equal(rebuilt, layer.weight)
    assert torch.equal(block.output.matrix(), model.transformer.h[1].attn.c_proj.weight.T)


def test_an_opt_layer_is_not_transposed() -> None:
    model = auxiliary("opt")
    block = read_auxiliary(model).blocks[0]
    assert torch.equal(block.fc_in.matrix(), model.model.decoder.layers[0].fc1.weight)
    assert read_auxiliary(model).position_offset == 2


def test_a_change_of_the_model_is_seen() -> None:
    model = auxiliary("gpt2", dtype=torch.float32)
    value = read_auxiliary(model).blocks[0].value
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.fill_(2.0)
    assert bool((value.matrix() == 2).all())
    model.double()
    assert value.matrix().dtype == torch.float64


def test_a_head_with_a_bias() -> None:
    model = auxiliary("gpt2")
    model.lm_head = nn.Linear(16, 13).double()
    ids, description = documents(1), read_auxiliary(model)
    ours = functional_logits(description, {}, ids, description.position_ids(ids))
    torch.testing.assert_close(ours, model(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LIBRARY)
def test_dropout_in_training_mode(kind: str) -> None:
    model = auxiliary(kind).train()
    if kind == "llama":  # without dropout there is nothing to refuse
        assert read_auxiliary(model).family == "llama"
        return
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        read_auxiliary(model)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, ["pre-LN", "layers.0.self_attn_layer_norm"]),
        ("opt", {"word_embed_proj_dim": 8}, ["model.decoder.project_in"]),
        ("opt", {"_remove_final_layer_norm": True}, ["model.decoder.final_layer_norm"]),
        ("opt", {"layer_norm_elementwise_affine": False}, ["without a scale", "self_attn_layer_norm"]),
        ("gpt2", {"add_cross_attention": True}, ["cross-attention", "transformer.h.0.crossattention"]),
        ("gpt2", {"activation_function": "mish"}, ["mish", "transformer.h.0.mlp.act", "gelu_new"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ["dynamic", "model.rotary_emb"],
        ),
    ],
)
def test_parts_that_are_not_simulated_are_named(kind: str, changes: dict, words: list[str]) -> None:
    model = auxiliary(kind, **changes)
    with pytest.raises(NotImplementedError) as refused:
        read_auxiliary(model)
    for word in words:
        assert word in str(refused.value)


def test_other_models_are_named() -> None:
    transformers = pytest.importorskip("transformers")
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=13, hidden_size=16, n_layer=1, n_head=2)
    )
    with pytest.raises(NotImplementedError) as refused:
        read_auxiliary(bloom)
    for word in ("BloomForCausalLM", "transformer.h.0.self_attention", "ALiBi", "GPT2LMHeadModel"):
        assert word in str(refused.value)
    with pytest.raises(NotImplementedError, match="Linear"):
        read_auxiliary(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be an nn.Module, given 'gpt2'"):
        read_auxiliary("gpt2")  # type: ignore[arg-type]


def test_a_subclass_is_read_as_its_parent() -> None:
    class Finetuned(TinyGPT):
        pass

    assert read_auxiliary(Finetuned()).family == "tiny_gpt"


def test_the_package_does_not_import_transformers() -> None:
    code = (
        "import sys, torch, papercore.tint as t; m = t.TinyGPT(n_embd=16, n_head=4); i = torch.zeros(1, 6).long();"
        "t.TinTModel.from_auxiliary(m)(i, torch.arange(6)[None] < 3); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", TINY)
def test_small_gpts_need_no_library(kind: str) -> None:
    assert read_auxiliary(auxiliary(kind)).family == "tiny_gpt"
