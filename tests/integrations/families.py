"""Tiny transformers models with random weights, one a family, that use every branch the family has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

_COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_ATTENTION: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_BAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}


def mamba(**extra: Any) -> Any:
    return transformers.MambaConfig(**_COMMON, num_hidden_layers=2, state_size=8, **extra)


def mamba2(**extra: Any) -> Any:
    return transformers.Mamba2Config(
        **_COMMON,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=8,
        expand=2,
        n_groups=2,
        chunk_size=16,
        **extra,
    )


def nemotron_h(**extra: Any) -> Any:
    options = {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "routed_scaling_factor": 1.5,
        "time_step_min": 0.05,
    }
    return transformers.NemotronHConfig(**_COMMON, **_ATTENTION, **(options | extra))


def bamba(**extra: Any) -> Any:
    return transformers.BambaConfig(
        **_COMMON, **_ATTENTION, **_BAMBA, num_hidden_layers=3, attn_layer_indices=[1], intermediate_size=48, **extra
    )


def falcon_h1(**extra: Any) -> Any:
    options = {
        "mamba_d_ssm": 64,
        "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 1.05],
        "mlp_multipliers": [0.7, 1.3],
        "embedding_multiplier": 1.7,
        "lm_head_multiplier": 0.6,
        "key_multiplier": 0.8,
        "attention_out_multiplier": 0.9,
        "attention_in_multiplier": 1.1,
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.7,
    }
    return transformers.FalconH1Config(
        **_COMMON, **_ATTENTION, **_BAMBA, num_hidden_layers=2, intermediate_size=48, **(options | extra)
    )


def zamba2(**extra: Any) -> Any:
    return transformers.Zamba2Config(
        **_COMMON,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        mamba_d_state=8,
        mamba_ngroups=2,
        mamba_expand=2,
        n_mamba_heads=8,
        mamba_headdim=8,
        chunk_size=16,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_mem_blocks=1,
        intermediate_size=48,
        adapter_rank=4,
        use_mem_rope=True,
        **extra,
    )


def granite(**extra: Any) -> Any:
    return transformers.GraniteMoeHybridConfig(
        **_COMMON,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **_BAMBA,
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        intermediate_size=24,
        shared_intermediate_size=40,
        num_local_experts=6,
        num_experts_per_tok=2,
        position_embedding_type="rope",
        attention_multiplier=0.2,
        **extra,
    )


def mixtral(**extra: Any) -> Any:
    return transformers.MixtralConfig(
        **_COMMON, **_ATTENTION, num_hidden_layers=2, intermediate_size=24, num_local_experts=6, **extra
    )


def qwen2_moe(**extra: Any) -> Any:
    return transformers.Qwen2MoeConfig(
        **_COMMON,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        num_hidden_layers=2,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=6,
        num_experts_per_tok=3,
        decoder_sparse_step=2,
        **extra,
    )


def qwen3_moe(**extra: Any) -> Any:
    return transformers.Qwen3MoeConfig(
        **_COMMON,
        **_ATTENTION,
        num_hidden_layers=2,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        **extra,
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (mamba, mamba2, nemotron_h, bamba, falcon_h1, zamba2, granite, mixtral, qwen2_moe, qwen3_moe)
}


def build(family: str, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A model in evaluation mode whose every parameter is drawn, so that none is zero or one by chance."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](**extra))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2 and not name.endswith("A_log"):
                parameter.copy_(noise * (0.5 if "conv1d" in name else 0.2))
            elif name.endswith("A_log"):
                parameter.copy_(noise.abs() * 0.5)
            elif name.endswith("dt_bias") or "dt_proj.bias" in name:
                parameter.copy_(noise * 0.5 - 2)
            else:
                parameter.copy_((1 if "norm" in name or name.endswith(".D") else 0) + noise * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # the default, grouped_mm, has no fp64
    return model.to(dtype).eval()
