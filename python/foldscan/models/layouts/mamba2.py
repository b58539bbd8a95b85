"""The format of Mamba-2: the pattern ``M`` repeated."""

from __future__ import annotations

from typing import Any

from foldscan.models.config import HybridConfig
from foldscan.models.files import FormatError, want_field
from foldscan.models.layouts.base import (
    Plain,
    Source,
    common_fields,
    limits,
    number,
    only,
    refuse,
    require,
    write_common,
    write_limits,
)


class Mamba2(Plain):
    """``mamba2`` of transformers."""

    model_type = "mamba2"

    def read_config(self, values: dict[str, Any], where: object) -> HybridConfig:
        require(values, "hidden_act", ("silu",), where)
        heads, dim = (want_field(values, name, int, where) for name in ("num_heads", "head_dim"))
        inner = int(values.get("expand", 2) * want_field(values, "hidden_size", int, where))
        if inner != heads * dim:
            raise FormatError(
                f"{where}: field 'expand' makes {inner} channels, want num_heads * head_dim = {heads * dim}"
            )
        fields: dict[str, Any] = {
            **common_fields(values, where),
            "pattern": "M" * want_field(values, "num_hidden_layers", int, where),
            "norm_eps": number(values.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon", where),
            "mamba_num_heads": heads,
            "mamba_head_dim": dim,
            "mamba_num_groups": values.get("n_groups", 8),
            "state_size": values.get("state_size", 128),
            "conv_kernel": values.get("conv_kernel", 4),
            "conv_bias": bool(values.get("use_conv_bias", True)),
            "mamba_bias": bool(values.get("use_bias", False)),
            "time_step_min": number(values.get("time_step_min", 1e-3), "time_step_min", where),
            "time_step_max": number(values.get("time_step_max", 0.1), "time_step_max", where),
            "time_step_floor": number(values.get("time_step_floor", 1e-4), "time_step_floor", where),
            "time_step_limit": limits(values, where),
            "rescale_residual": bool(values.get("rescale_prenorm_residual", False)),
        }
        return HybridConfig.from_dict(fields, where)

    def write_config(self, config: HybridConfig) -> dict[str, Any]:
        c = config
        if set(c.pattern) != {"M"}:
            refuse("pattern", c.pattern, "M repeated", self.model_type)
        if c.mamba_inner_size % c.hidden_size:
            refuse("mamba_num_heads", c.mamba_num_heads, "a multiple of hidden_size channels", self.model_type)
        only(c, self.model_type, mamba_norm=True, mamba_norm_before_gate=False)
        return {
            **write_common(c, "Mamba2ForCausalLM", self.model_type),
            "num_hidden_layers": c.num_layers,
            "layer_norm_epsilon": c.norm_eps,
            "num_heads": c.mamba_num_heads,
            "head_dim": c.mamba_head_dim,
            "expand": c.mamba_inner_size // c.hidden_size,
            "n_groups": c.mamba_num_groups,
            "state_size": c.state_size,
            "conv_kernel": c.conv_kernel,
            "use_conv_bias": c.conv_bias,
            "use_bias": c.mamba_bias,
            "hidden_act": "silu",
            "time_step_min": c.time_step_min,
            "time_step_max": c.time_step_max,
            "time_step_floor": c.time_step_floor,
            "time_step_limit": write_limits(c),
            "rescale_prenorm_residual": c.rescale_residual,
        }

    def sources(self, name: str, config: HybridConfig) -> list[Source]:
        return [Source((name if name.startswith("lm_head.") else f"backbone.{name}",))]
