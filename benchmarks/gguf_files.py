"""GGUF files of transformers models, for the comparison with llama.cpp: Llama, Qwen3-MoE and Mamba-2, in F32 or BF16.

Norms, biases, routers and everything of the state space stay F32, as llama.cpp's own converter has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

Tensors = list[tuple[str, torch.Tensor]]


def _halves_to_interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection from the rotate-half order to the interleaved order of GGUF's llama."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _attention(state: dict[str, torch.Tensor], i: int) -> Tensors:
    stem = f"model.layers.{i}."
    found = [
        (f"blk.{i}.attn_norm", state[stem + "input_layernorm.weight"]),
        (f"blk.{i}.ffn_norm", state[stem + "post_attention_layernorm.weight"]),
    ]
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
        found.append((f"blk.{i}.attn_{ours}", state[f"{stem}self_attn.{theirs}.weight"]))
    return found


def _llama(writer: GGUFWriter, config: Any, state: dict[str, torch.Tensor]) -> Tensors:
    _common(writer, config)
    writer.add_rope_dimension_count(config.head_dim)
    tensors: Tensors = []
    for i in range(config.num_hidden_layers):
        tensors += _attention(state, i)
        for name in ("gate", "up", "down"):
            tensors.append((f"blk.{i}.ffn_{name}", state[f"model.layers.{i}.mlp.{name}_proj.weight"]))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return [
        (name, _halves_to_interleaved(t, heads[name.split(".")[-1]]) if name.split(".")[-1] in heads else t)
        for name, t in tensors
    ]


def _qwen3_moe(writer: GGUFWriter, config: Any, state: dict[str, torch.Tensor]) -> Tensors:
    _common(writer, config)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    tensors: Tensors = []
    for i in range(config.num_hidden_layers):
        stem = f"model.layers.{i}."
        tensors += _attention(state, i)
        for name in ("q_norm", "k_norm"):
            tensors.append((f"blk.{i}.attn_{name}", state[f"{stem}self_attn.{name}.weight"]))
        gate, up = state[stem + "mlp.experts.gate_up_proj"].chunk(2, dim=1)
        tensors += [
            (f"blk.{i}.ffn_gate_inp", state[stem + "mlp.gate.weight"]),
            (f"blk.{i}.ffn_gate_exps", gate),
            (f"blk.{i}.ffn_up_exps", up),
            (f"blk.{i}.ffn_down_exps", state[stem + "mlp.experts.down_proj"]),
        ]
    return tensors


def _mamba2(writer: GGUFWriter, config: Any, state: dict[str, torch.Tensor]) -> Tensors:
    inner = config.expand * config.hidden_size
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.num_heads)
    writer.add_ssm_group_count(config.n_groups)
    tensors: Tensors = []
    for i in range(config.num_hidden_layers):
        stem = f"backbone.layers.{i}."
        mixer = stem + "mixer."
        tensors += [
            (f"blk.{i}.attn_norm", state[stem + "norm.weight"]),
            (f"blk.{i}.ssm_in", state[mixer + "in_proj.weight"]),
            (f"blk.{i}.ssm_conv1d", state[mixer + "conv1d.weight"].squeeze(1).float()),
            (f"blk.{i}.ssm_conv1d.bias", state[mixer + "conv1d.bias"]),
            (f"blk.{i}.ssm_dt.bias", state[mixer + "dt_bias"]),
            (f"blk.{i}.ssm_a*", -torch.exp(state[mixer + "A_log"].float())[:, None]),
            (f"blk.{i}.ssm_d*", state[mixer + "D"].float()[:, None]),
            (f"blk.{i}.ssm_norm", state[mixer + "norm.weight"].reshape(config.n_groups, -1)),
            (f"blk.{i}.ssm_out", state[mixer + "out_proj.weight"]),
        ]
    return tensors


def _common(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


_KINDS = {"llama": ("llama", _llama), "qwen3_moe": ("qwen3moe", _qwen3_moe), "mamba2": ("mamba2", _mamba2)}
_F32_PARTS = ("norm", "ssm_conv1d", "ssm_dt", "ssm_a", "ssm_d", "gate_inp")


def write_gguf(model: Any, path: Path, dtype: torch.dtype) -> None:
    """Write a transformers model (Llama, Qwen3-MoE, Mamba-2) without a tokenizer."""
    config, state = model.config, model.state_dict()
    architecture, build = _KINDS[config.model_type]
    writer = GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    tensors = build(writer, config, state)
    stem = "backbone" if config.model_type == "mamba2" else "model"
    embed, norm = ("embeddings", "norm_f") if config.model_type == "mamba2" else ("embed_tokens", "norm")
    tensors.append(("token_embd", state[f"{stem}.{embed}.weight"]))
    tensors.append(("output_norm", state[f"{stem}.{norm}.weight"]))
    if not config.tie_word_embeddings:
        tensors.append(("output", state["lm_head.weight"]))
    for name, tensor in tensors:
        full = name.removesuffix("*") if name.endswith((".bias", "*")) else name + ".weight"
        array = np.ascontiguousarray(tensor.detach().float().numpy())
        if dtype == torch.bfloat16 and tensor.dim() >= 2 and not any(part in name for part in _F32_PARTS):
            writer.add_tensor(
                full, quantize(array, GGMLQuantizationType.BF16), raw_dtype=GGMLQuantizationType.BF16
            )
        else:
            writer.add_tensor(full, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
