"""Formats whose layers mix (Mamba-2, attention or both), then an MLP: Bamba (``M-``, ``*-``), FalconH1 (``P-``)."""

from __future__ import annotations

from typing import Any

import torch

from foldscan.models.config import HybridConfig
from foldscan.models.files import want_field
from foldscan.models.layouts.base import (
    Plain,
    Source,
    attention_fields,
    common_fields,
    limits,
    number,
    only,
    refuse,
    require,
    write_attention,
    write_common,
    write_limits,
)

_LETTERS = {"M": "mamba", "*": "self_attn"}


def _read(values: dict[str, Any], where: object) -> dict[str, Any]:
    require(values, "hidden_act", ("silu",), where)
    require(values, "mlp_bias", (False, None), where)
    return {
        **common_fields(values, where),
        **attention_fields(values, where),
        "norm_eps": number(values.get("rms_norm_eps", 1e-5), "rms_norm_eps", where),
        "attention_bias": bool(values.get("attention_bias", False)),
        "intermediate_size": want_field(values, "intermediate_size", int, where),
        "mlp_activation": "silu",
        "mamba_num_heads": want_field(values, "mamba_n_heads", int, where),
        "mamba_head_dim": want_field(values, "mamba_d_head", int, where),
        "mamba_num_groups": values.get("mamba_n_groups", 1),
        "state_size": values.get("mamba_d_state", 256),
        "conv_kernel": values.get("mamba_d_conv", 4),
        "conv_bias": bool(values.get("mamba_conv_bias", True)),
        "mamba_bias": bool(values.get("mamba_proj_bias", False)),
        "time_step_limit": limits(values, where),
    }


def _write(c: HybridConfig, architecture: str, model_type: str) -> dict[str, Any]:
    only(c, model_type, mlp_activation="silu", mlp_bias=False, qk_norm=False, sliding_window=None)
    if c.attention_output_bias not in (None, c.attention_bias):
        refuse("attention_output_bias", c.attention_output_bias, c.attention_bias, model_type)
    if c.rope_theta is None:
        refuse("rope_theta", None, "a number", model_type)
    return {
        **write_common(c, architecture, model_type),
        **write_attention(c),
        "rms_norm_eps": c.norm_eps,
        "attention_bias": c.attention_bias,
        "intermediate_size": c.intermediate_size,
        "hidden_act": "silu",
        "mlp_bias": False,
        "num_hidden_layers": len(c.pattern) // 2,
        "mamba_n_heads": c.mamba_num_heads,
        "mamba_d_head": c.mamba_head_dim,
        "mamba_n_groups": c.mamba_num_groups,
        "mamba_d_state": c.state_size,
        "mamba_d_conv": c.conv_kernel,
        "mamba_conv_bias": c.conv_bias,
        "mamba_proj_bias": c.mamba_bias,
        "time_step_limit": write_limits(c),
    }


def _sources(name: str, config: HybridConfig) -> list[Source]:
    fixed = {"embeddings.weight": "model.embed_tokens.weight", "norm_f.weight": "model.final_layernorm.weight"}
    if not name.startswith("layers."):
        return [Source((fixed.get(name, name),))]
    _, index, rest = name.split(".", 2)
    stem, kind = f"model.layers.{int(index) // 2}.", config.pattern[int(index)]
    if rest == "norm.weight":
        return [Source((f"{stem}{'pre_ff_layernorm' if kind == '-' else 'input_layernorm'}.weight",))]
    rest = rest.removeprefix("mixer.")
    if kind == "-":
        return [Source((f"{stem}feed_forward.{rest}",))]
    if kind == "P":
        return [Source((stem + rest.replace("attention.", "self_attn."),))]
    return [Source((f"{stem}{_LETTERS[kind]}.{rest}",))]


class Bamba(Plain):
    """``bamba`` of transformers: each layer has a Mamba-2 mixer or attention."""

    model_type = "bamba"

    def read_config(self, values: dict[str, Any], where: object) -> HybridConfig:
        layers = want_field(values, "num_hidden_layers", int, where)
        attention = set(values.get("attn_layer_indices") or ())
        pattern = "".join("*-" if i in attention else "M-" for i in range(layers))
        return HybridConfig.from_dict({"pattern": pattern, **_read(values, where)}, where)

    def write_config(self, config: HybridConfig) -> dict[str, Any]:
        c = config
        mixers = c.pattern[::2]
        if c.pattern != "".join(kind + "-" for kind in mixers) or set(mixers) - {"M", "*"}:
            refuse("pattern", c.pattern, "M- and *- in any order", self.model_type)
        if c.mamba_inner_size % c.hidden_size:
            refuse("mamba_num_heads", c.mamba_num_heads, "a multiple of hidden_size channels", self.model_type)
        only(c, self.model_type, mamba_norm=True, mamba_norm_before_gate=False)
        return {
            **_write(c, "BambaForCausalLM", self.model_type),
            "mamba_expand": c.mamba_inner_size // c.hidden_size,
            "attn_layer_indices": [i for i, kind in enumerate(mixers) if kind == "*"],
        }

    def sources(self, name: str, config: HybridConfig) -> list[Source]:
        return _sources(name, config)


class FalconH1(Plain):
    """``falcon_h1`` of transformers: each layer has both mixers side by side, and multipliers all over.

    The multipliers scale outputs of linear maps, so they are multiplied into the weights when a model is read; a model
    that we write has multipliers of 1.
    """

    model_type = "falcon_h1"

    def read_config(self, values: dict[str, Any], where: object) -> HybridConfig:
        require(values, "projectors_bias", (bool(values.get("mamba_proj_bias", False)),), where)
        fields = _read(values, where)
        layers = want_field(values, "num_hidden_layers", int, where)
        # A tied head would have to be scaled by one multiplier and embed with another.
        scales = {values.get(f"{name}_multiplier", 1.0) for name in ("embedding", "lm_head")}
        tied = fields["tie_embeddings"] and len(scales) == 1
        fields |= {
            "pattern": "P-" * layers,
            "tie_embeddings": tied,
            "mamba_norm": bool(values.get("mamba_rms_norm", False)),
            "mamba_norm_before_gate": bool(values.get("mamba_rms_norm", False))
            and bool(values.get("mamba_norm_before_gate", True)),
        }
        return HybridConfig.from_dict(fields, where)

    def write_config(self, config: HybridConfig) -> dict[str, Any]:
        c = config
        if c.pattern != "P-" * (len(c.pattern) // 2):
            refuse("pattern", c.pattern, "P- repeated", self.model_type)
        only(c, self.model_type, rotary_dim=None)
        return {
            **_write(c, "FalconH1ForCausalLM", self.model_type),
            "mamba_d_ssm": c.mamba_inner_size,
            "projectors_bias": c.mamba_bias,
            "mamba_rms_norm": c.mamba_norm,
            "mamba_norm_before_gate": c.mamba_norm_before_gate,
            "mlp_multipliers": [1.0, 1.0],
            "ssm_multipliers": [1.0] * 5,
            **dict.fromkeys(
                (
                    "embedding_multiplier",
                    "lm_head_multiplier",
                    "key_multiplier",
                    "attention_in_multiplier",
                    "attention_out_multiplier",
                    "ssm_in_multiplier",
                    "ssm_out_multiplier",
                ),
                1.0,
            ),
        }

    def sources(self, name: str, config: HybridConfig) -> list[Source]:
        found = _sources(name, config)
        if name == "lm_head.weight":  # where the file ties what we cannot
            found.append(Source(("model.embed_tokens.weight",)))
        return found

    def read_tensor(self, name: str, value: torch.Tensor, values: dict[str, Any]) -> torch.Tensor:
        return value * self._scale(name, value, values)

    def _scale(self, name: str, value: torch.Tensor, values: dict[str, Any]) -> float | torch.Tensor:
        def get(field: str) -> float:
            return float(values.get(f"{field}_multiplier", 1.0))

        gate, down = values.get("mlp_multipliers") or (1.0, 1.0)
        weight = name.endswith(".weight")
        if name == "embeddings.weight":
            return get("embedding")
        if name == "lm_head.weight":
            return get("lm_head")
        part = name.split(".")[-2]
        if part == "in_proj":
            return self._in_proj(value, values) * (get("ssm_in") if weight else 1.0)
        if part == "out_proj":
            return get("ssm_out")
        if part in ("q_proj", "k_proj", "v_proj"):
            return (get("attention_in") if weight else 1.0) * (get("key") if part == "k_proj" else 1.0)
        if part == "o_proj":
            return get("attention_out")
        return {"gate_proj": float(gate), "down_proj": float(down)}.get(part, 1.0)

    @staticmethod
    def _in_proj(value: torch.Tensor, values: dict[str, Any]) -> torch.Tensor:
        """A factor for each row: one multiplier for each of z, x, B, C and dt."""
        heads = int(values["mamba_n_heads"])
        inner, group = heads * int(values["mamba_d_head"]), values.get("mamba_n_groups", 1) * values["mamba_d_state"]
        sizes = torch.tensor([inner, inner, group, group, heads])
        factors = torch.tensor([float(m) for m in values.get("ssm_multipliers") or [1.0] * 5])
        rows = torch.repeat_interleave(factors, sizes)
        return rows if value.dim() == 1 else rows[:, None]
