"""The format of Nemotron-H, Nemotron Nano 2 and Nemotron 3."""

from __future__ import annotations

import math
from typing import Any

from foldscan.models.config import HybridConfig
from foldscan.models.files import FormatError, want_field
from foldscan.models.layouts.base import Plain, Source, number, only, refuse, require

_KIND_OF_TYPE = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
}
_TYPE_OF_KIND = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


class NemotronH(Plain):
    """``nemotron_h`` of transformers, the format of Nemotron-H, Nemotron Nano 2 and Nemotron 3."""

    model_type = "nemotron_h"

    def read_config(self, values: dict[str, Any], where: object) -> HybridConfig:
        require(values, "mamba_hidden_act", ("silu",), where)
        require(values, "mlp_hidden_act", ("relu2",), where)
        types = values.get("layers_block_type") or values.get("layer_types")
        if isinstance(types, list):
            unknown = [t for t in types if t not in _KIND_OF_TYPE]
            if unknown:
                raise FormatError(
                    f"{where}: field 'layers_block_type' has {unknown[0]!r}, want {sorted(_TYPE_OF_KIND)}"
                )
            pattern = "".join(_KIND_OF_TYPE[t] for t in types)
        else:
            pattern = want_field(values, "hybrid_override_pattern", str, where)
        if "E" in pattern:
            require(values, "mlp_bias", (False,), where)
        integer = (int,)

        def get(field: str, default: int) -> int:
            return want_field(values, field, integer, where) if field in values else default

        groups, best, chosen = get("n_group", 1), get("topk_group", 1), get("num_experts_per_tok", 2)
        if groups > 1 and "E" in pattern and (chosen // max(1, best) != 2):
            raise FormatError(
                f"{where}: field 'topk_group' is {best}, want {chosen // 2}: a group is scored by its best two "
                "experts there, by its best num_experts_per_tok / topk_group here"
            )
        dt_min = number(values.get("time_step_min", 1e-3), "time_step_min", where)
        low, high = values.get("time_step_limit") or (0.0, math.inf)
        if str(values.get("transformers_version", "")).partition(".")[0] in ("5", "6"):
            # From release 5 on transformers ignores time_step_limit and clamps dt from below at time_step_min, on its
            # PyTorch path and in its kernels' arguments alike: that is the function of a model it has written.
            low, high = dt_min, math.inf
        fields: dict[str, Any] = {
            "pattern": pattern,
            "vocab_size": want_field(values, "vocab_size", integer, where),
            "hidden_size": want_field(values, "hidden_size", integer, where),
            "norm_eps": number(values.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon", where),
            "mamba_num_heads": get("mamba_num_heads", 128),
            "mamba_head_dim": get("mamba_head_dim", 64),
            "mamba_num_groups": get("n_groups", 8),
            "state_size": get("ssm_state_size", 128),
            "conv_kernel": get("conv_kernel", 4),
            "conv_bias": bool(values.get("use_conv_bias", True)),
            "mamba_bias": bool(values.get("use_bias", False)),
            # Our own files write 0 here when nothing is clamped (see write_config); it is no starting value for dt.
            "time_step_min": dt_min if dt_min > 0 else 1e-3,
            "time_step_max": number(values.get("time_step_max", 0.1), "time_step_max", where),
            "time_step_floor": number(values.get("time_step_floor", 1e-4), "time_step_floor", where),
            "time_step_limit": (
                number(low, "time_step_limit", where),
                number(high, "time_step_limit", where),
            ),
            "num_heads": get("num_attention_heads", 32),
            "num_kv_heads": get("num_key_value_heads", 8),
            "head_dim": get("head_dim", 128),
            "sliding_window": values.get("sliding_window"),
            "intermediate_size": get("intermediate_size", 21504),
            "mlp_bias": bool(values.get("mlp_bias", False)),
            "num_experts": get("n_routed_experts", 8),
            "experts_per_token": chosen,
            "moe_intermediate_size": get("moe_intermediate_size", 7688),
            "shared_expert_intermediate_size": get("moe_shared_expert_intermediate_size", 7688),
            "moe_latent_size": values.get("moe_latent_size"),
            "router_score": "sigmoid",
            "router_bias": True,
            "router_groups": groups if groups > 1 else None,
            "router_groups_topk": best if groups > 1 else None,
            "router_scaling": number(values.get("routed_scaling_factor", 1.0), "routed_scaling_factor", where),
            "router_normalize": bool(values.get("norm_topk_prob", True)),
            "max_position_embeddings": get("max_position_embeddings", 4096),
            "initializer_range": number(values.get("initializer_range", 0.02), "initializer_range", where),
            "rescale_residual": bool(values.get("rescale_prenorm_residual", True)),
            "bos_token_id": values.get("bos_token_id"),
            "eos_token_id": values.get("eos_token_id"),
        }
        return HybridConfig.from_dict(fields, where)

    def write_config(self, config: HybridConfig) -> dict[str, Any]:
        c, name = config, "nemotron_h"
        if set(c.pattern) - set(_TYPE_OF_KIND):
            refuse("pattern", c.pattern, "the letters M * - E", name)
        only(c, name, qk_norm=False, rotary_dim=None, mamba_norm=True, mamba_norm_before_gate=False)
        if "*" in c.pattern and c.rope_theta is not None:
            refuse("rope_theta", c.rope_theta, None, name)
        if "*" in c.pattern and c.attention_bias:
            refuse("attention_bias", True, False, name)
        if "-" in c.pattern and c.mlp_activation != "relu2":
            refuse("mlp_activation", c.mlp_activation, "relu2", name)
        if "M" in c.pattern and not math.isinf(c.time_step_limit[1]):
            refuse("time_step_limit", c.time_step_limit, "no upper limit", name)
        values: dict[str, Any] = {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": self.model_type,
            "dtype": "float32",
            "layers_block_type": [_TYPE_OF_KIND[k] for k in c.pattern],
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "tie_word_embeddings": False,
            "layer_norm_epsilon": c.norm_eps,
            "mamba_num_heads": c.mamba_num_heads,
            "mamba_head_dim": c.mamba_head_dim,
            "n_groups": c.mamba_num_groups,
            "ssm_state_size": c.state_size,
            "conv_kernel": c.conv_kernel,
            "use_conv_bias": c.conv_bias,
            "use_bias": c.mamba_bias,
            "mamba_proj_bias": c.mamba_bias,
            # transformers clamps dt from below at time_step_min and does not read time_step_limit.
            "time_step_min": c.time_step_limit[0],
            "time_step_max": c.time_step_max,
            "time_step_floor": c.time_step_floor,
            "time_step_limit": [c.time_step_limit[0], {"__float__": "Infinity"}],
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "sliding_window": c.sliding_window,
            "intermediate_size": c.intermediate_size,
            "mlp_hidden_act": "relu2",
            "mlp_bias": c.mlp_bias,
            "max_position_embeddings": c.max_position_embeddings,
            "initializer_range": c.initializer_range,
            "rescale_prenorm_residual": c.rescale_residual,
            "bos_token_id": c.bos_token_id,
            "eos_token_id": c.eos_token_id,
            "pad_token_id": None,
        }
        if "E" not in c.pattern:
            return values
        for field, value, want in (
            ("moe_activation", c.moe_activation, "relu2"),
            ("router_score", c.router_score, "sigmoid"),
            ("router_bias", c.router_bias, True),
            ("mlp_bias", c.mlp_bias, False),
        ):
            if value != want:
                refuse(field, value, want, name)
        if c.router_groups_topk and c.experts_per_token // c.router_groups_topk != 2:
            refuse("router_groups_topk", c.router_groups_topk, c.experts_per_token // 2, name)
        if not c.shared_expert_intermediate_size:
            refuse("shared_expert_intermediate_size", 0, "a shared expert", name)
        values.update(
            n_routed_experts=c.num_experts,
            num_experts_per_tok=c.experts_per_token,
            moe_intermediate_size=c.moe_intermediate_size,
            moe_shared_expert_intermediate_size=c.shared_expert_intermediate_size,
            moe_latent_size=c.moe_latent_size,
            n_shared_experts=1,
            n_group=c.router_groups or 1,
            topk_group=c.router_groups_topk or 1,
            routed_scaling_factor=c.router_scaling,
            norm_topk_prob=c.router_normalize,
        )
        return values

    def sources(self, name: str, config: HybridConfig) -> list[Source]:
        if name.startswith("lm_head."):
            return [Source((name,))]
        found = []
        for prefix in ("backbone.", "model."):  # on the hub and as saved; in memory
            stem, dot, matrix = name.rpartition(".experts.")
            if dot and ".shared_experts." not in name:
                each = tuple(f"{prefix}{stem}.experts.{e}.{matrix}.weight" for e in range(config.num_experts))
                found.append(Source(each, stacked=True))
            found.append(Source((prefix + name,)))
        return found

    def ignores(self, name: str) -> bool:
        return name.startswith("mtp.")  # the multi-token prediction head of Nemotron 3 is not part of the model proper
