"""How each family of models spells the parts of a pre-LN decoder (read by papercore.tint.auxiliary).

A reader turns a model into an Auxiliary: GPT-2 keeps queries, keys and values in one transposed matrix (Conv1D), OPT
offsets its positions by two and counts them along the attention mask, Llama has RMS norms, a gated MLP, rotary positions
and fewer key heads than query heads.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from papercore.tint.activation import ACTIVATIONS
from papercore.tint.attention import Rotary
from papercore.tint.auxiliary import Auxiliary, BlockWeights, LinearWeights, NormWeights

# Rotary scalings whose frequencies do not depend on the length of the input.
_STEADY_ROTARY = ("default", "linear", "llama3", "yarn")


def _linear(name: str, module: Any, **how: Any) -> LinearWeights:
    return LinearWeights(name, module.weight, module.bias, **how)


def _norm(name: str, module: Any, kind: str, eps: float) -> NormWeights:
    if module.weight is None:
        raise NotImplementedError(f"TinT does not simulate a norm without a scale: {name}")
    return NormWeights(name, module.weight, getattr(module, "bias", None), kind, eps)


def _activation(name: str, module_name: str) -> str:
    if name not in ACTIVATIONS:
        raise NotImplementedError(
            f"TinT does not simulate the activation {name!r} of {module_name}; it simulates "
            f"{', '.join(ACTIVATIONS)}"
        )
    return name


def _names(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in model.named_modules() if name)


def read_tiny_gpt(model: Any) -> Auxiliary:
    config = model.config
    blocks = []
    for i, block in enumerate(model.h):
        at, mlp = f"h.{i}", block.mlp
        blocks.append(
            BlockWeights(
                name=at,
                norm_1=_norm(f"{at}.ln_1", block.ln_1, config.norm, config.norm_eps),
                query=_linear(f"{at}.attn.q_proj", block.attn.q_proj),
                key=_linear(f"{at}.attn.k_proj", block.attn.k_proj),
                value=_linear(f"{at}.attn.v_proj", block.attn.v_proj),
                output=_linear(f"{at}.attn.out_proj", block.attn.out_proj),
                norm_2=_norm(f"{at}.ln_2", block.ln_2, config.norm, config.norm_eps),
                fc_in=_linear(f"{at}.mlp.fc_in", mlp.fc_in),
                fc_gate=None if mlp.fc_gate is None else _linear(f"{at}.mlp.fc_gate", mlp.fc_gate),
                fc_out=_linear(f"{at}.mlp.fc_out", mlp.fc_out),
                scale=config.head_size**-0.5,
                attention_name=f"{at}.attn",
                activation_name=f"{at}.mlp.act",
            )
        )
    head = LinearWeights("wte", model.wte.weight, None) if model.lm_head is None else None
    return Auxiliary(
        family="tiny_gpt",
        width=config.n_embd,
        n_head=config.n_head,
        n_kv_head=config.kv_heads,
        head_size=config.head_size,
        vocab_size=config.vocab_size,
        n_positions=config.n_positions,
        activation=config.activation,
        embedding=model.wte.weight,
        positions=None if model.wpe is None else model.wpe.weight,
        position_offset=0,
        positions_follow_mask=False,
        rotary=Rotary(model.inv_freq) if config.rotary else None,
        blocks=tuple(blocks),
        final_norm=_norm("ln_f", model.ln_f, config.norm, config.norm_eps),
        head=head or _linear("lm_head", model.lm_head),
        module_names=_names(model),
    )


def read_gpt2(model: Any) -> Auxiliary:
    config, body = model.config, model.transformer
    width, eps = config.n_embd, config.layer_norm_epsilon
    blocks = []
    for i, block in enumerate(body.h):
        at = f"transformer.h.{i}"
        if hasattr(block, "crossattention"):
            raise NotImplementedError(f"TinT does not simulate cross-attention: {at}.crossattention")
        query, key, value = (
            _linear(
                f"{at}.attn.c_attn", block.attn.c_attn, is_transposed=True, rows=(j * width, (j + 1) * width)
            )
            for j in range(3)
        )
        blocks.append(
            BlockWeights(
                name=at,
                norm_1=_norm(f"{at}.ln_1", block.ln_1, "layernorm", eps),
                query=query,
                key=key,
                value=value,
                output=_linear(f"{at}.attn.c_proj", block.attn.c_proj, is_transposed=True),
                norm_2=_norm(f"{at}.ln_2", block.ln_2, "layernorm", eps),
                fc_in=_linear(f"{at}.mlp.c_fc", block.mlp.c_fc, is_transposed=True),
                fc_gate=None,
                fc_out=_linear(f"{at}.mlp.c_proj", block.mlp.c_proj, is_transposed=True),
                scale=float(block.attn.scaling),
                attention_name=f"{at}.attn",
                activation_name=f"{at}.mlp.act",
            )
        )
    return Auxiliary(
        family="gpt2",
        width=width,
        n_head=config.n_head,
        n_kv_head=config.n_head,
        head_size=width // config.n_head,
        vocab_size=body.wte.weight.shape[0],
        n_positions=config.n_positions,
        activation=_activation(config.activation_function, "transformer.h.0.mlp.act"),
        embedding=body.wte.weight,
        positions=body.wpe.weight,
        position_offset=0,
        positions_follow_mask=False,
        rotary=None,
        blocks=tuple(blocks),
        final_norm=_norm("transformer.ln_f", body.ln_f, "layernorm", eps),
        head=_linear("lm_head", model.lm_head),
        module_names=_names(model),
    )


def read_opt(model: Any) -> Auxiliary:
    config, body = model.config, model.model.decoder
    if not config.do_layer_norm_before:
        raise NotImplementedError(
            "TinT simulates pre-LN blocks; this OPT normalises after each branch "
            "(do_layer_norm_before=False): model.decoder.layers.0.self_attn_layer_norm"
        )
    if body.final_layer_norm is None:
        raise NotImplementedError(
            "TinT needs a final layer norm; this OPT has none: model.decoder.final_layer_norm"
        )
    if body.project_in is not None:
        raise NotImplementedError("TinT does not simulate projected embeddings: model.decoder.project_in")
    blocks = []
    for i, block in enumerate(body.layers):
        at, attention = f"model.decoder.layers.{i}", block.self_attn
        first, second = block.self_attn_layer_norm, block.final_layer_norm
        blocks.append(
            BlockWeights(
                name=at,
                norm_1=_norm(f"{at}.self_attn_layer_norm", first, "layernorm", first.eps),
                query=_linear(f"{at}.self_attn.q_proj", attention.q_proj),
                key=_linear(f"{at}.self_attn.k_proj", attention.k_proj),
                value=_linear(f"{at}.self_attn.v_proj", attention.v_proj),
                output=_linear(f"{at}.self_attn.out_proj", attention.out_proj),
                norm_2=_norm(f"{at}.final_layer_norm", second, "layernorm", second.eps),
                fc_in=_linear(f"{at}.fc1", block.fc1),
                fc_gate=None,
                fc_out=_linear(f"{at}.fc2", block.fc2),
                scale=float(attention.scaling),
                attention_name=f"{at}.self_attn",
                activation_name=f"{at}.activation_fn",
            )
        )
    return Auxiliary(
        family="opt",
        width=config.hidden_size,
        n_head=config.num_attention_heads,
        n_kv_head=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        vocab_size=body.embed_tokens.weight.shape[0],
        n_positions=config.max_position_embeddings,
        activation=_activation(config.activation_function, "model.decoder.layers.0.activation_fn"),
        embedding=body.embed_tokens.weight,
        positions=body.embed_positions.weight,
        position_offset=body.embed_positions.offset,
        positions_follow_mask=True,
        rotary=None,
        blocks=tuple(blocks),
        final_norm=_norm(
            "model.decoder.final_layer_norm", body.final_layer_norm, "layernorm", body.final_layer_norm.eps
        ),
        head=_linear("lm_head", model.lm_head),
        module_names=_names(model),
    )


def read_llama(model: Any) -> Auxiliary:
    config, body = model.config, model.model
    if body.rotary_emb.rope_type not in _STEADY_ROTARY:
        raise NotImplementedError(
            f"TinT does not simulate rotary positions that depend on the length ({body.rotary_emb.rope_type!r}): "
            "model.rotary_emb"
        )
    blocks = []
    for i, block in enumerate(body.layers):
        at, attention, mlp = f"model.layers.{i}", block.self_attn, block.mlp
        first, second = block.input_layernorm, block.post_attention_layernorm
        blocks.append(
            BlockWeights(
                name=at,
                norm_1=_norm(f"{at}.input_layernorm", first, "rmsnorm", first.variance_epsilon),
                query=_linear(f"{at}.self_attn.q_proj", attention.q_proj),
                key=_linear(f"{at}.self_attn.k_proj", attention.k_proj),
                value=_linear(f"{at}.self_attn.v_proj", attention.v_proj),
                output=_linear(f"{at}.self_attn.o_proj", attention.o_proj),
                norm_2=_norm(f"{at}.post_attention_layernorm", second, "rmsnorm", second.variance_epsilon),
                fc_in=_linear(f"{at}.mlp.up_proj", mlp.up_proj),
                fc_gate=_linear(f"{at}.mlp.gate_proj", mlp.gate_proj),
                fc_out=_linear(f"{at}.mlp.down_proj", mlp.down_proj),
                scale=float(attention.scaling),
                attention_name=f"{at}.self_attn",
                activation_name=f"{at}.mlp.act_fn",
            )
        )
    return Auxiliary(
        family="llama",
        width=config.hidden_size,
        n_head=config.num_attention_heads,
        n_kv_head=config.num_key_value_heads,
        head_size=blocks[0].value.weight.shape[0] // config.num_key_value_heads,
        vocab_size=body.embed_tokens.weight.shape[0],
        n_positions=config.max_position_embeddings,
        activation=_activation(config.hidden_act, "model.layers.0.mlp.act_fn"),
        embedding=body.embed_tokens.weight,
        positions=None,
        position_offset=0,
        positions_follow_mask=False,
        rotary=Rotary(body.rotary_emb.inv_freq, float(body.rotary_emb.attention_scaling)),
        blocks=tuple(blocks),
        final_norm=_norm("model.norm", body.norm, "rmsnorm", body.norm.variance_epsilon),
        head=_linear("lm_head", model.lm_head),
        module_names=_names(model),
    )
