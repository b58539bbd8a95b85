"""Formats of the Llama kind, a row each: Llama (SmolLM2), Qwen2, Qwen3, Mixtral, Qwen3-MoE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from foldscan.models.config import HybridConfig
from foldscan.models.files import FormatError, want_field
from foldscan.models.layouts.base import (
    Plain,
    Source,
    attention_fields,
    common_fields,
    number,
    only,
    refuse,
    require,
    write_attention,
    write_common,
)

_DENSE = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertNames:
    """What a format calls its expert layers.

    Attributes:
        number: field of how many experts there are; then other names it is read by.
        width: field of how wide they are.
        module: on disk; in memory it is ``mlp`` everywhere.
        matrices: gate, up and down of an expert on disk.
        normalizes: the field that says whether probabilities are normalised; None where they always are.
    """

    number: tuple[str, ...]
    width: str
    module: str
    matrices: tuple[str, str, str]
    normalizes: str | None = None


@dataclass(frozen=True)
class LlamaLike(Plain):
    """Pre-norm attention and a SwiGLU MLP or experts in each layer: the patterns ``*-`` and ``*E``.

    Attributes:
        bias: which of attention's projections have one: as ``attention_bias`` says, always q, k and v, or none.
        qk_norm: heads of queries and keys are normed.
    """

    model_type: str
    architecture: str
    bias: Literal["field", "qkv", "none"] = "field"
    qk_norm: bool = False
    experts: ExpertNames | None = None

    def _kinds(self, values: dict[str, Any], layers: int) -> str:
        if self.experts is None:
            return "-" * layers
        dense = set(values.get("mlp_only_layers") or ())
        every = values.get("decoder_sparse_step", 1)
        return "".join("-" if i in dense or (i + 1) % every else "E" for i in range(layers))

    def _window(self, values: dict[str, Any], where: object) -> int | None:
        window: int | None = values.get("sliding_window")
        kinds = set(values.get("layer_types") or ())
        if window is None or values.get("use_sliding_window") is False or kinds == {"full_attention"}:
            return None
        if len(kinds) > 1:
            raise FormatError(f"{where}: field 'layer_types' has {sorted(kinds)}, want one of them in all layers")
        return window

    def read_config(self, values: dict[str, Any], where: object) -> HybridConfig:
        require(values, "hidden_act", ("silu",), where)
        require(values, "mlp_bias", (False, None), where)
        require(values, "pretraining_tp", (1, None), where)
        layers = want_field(values, "num_hidden_layers", int, where)
        biased = {"field": bool(values.get("attention_bias", False)), "qkv": True, "none": False}[self.bias]
        kinds = self._kinds(values, layers)
        fields: dict[str, Any] = {
            **common_fields(values, where),
            **attention_fields(values, where),
            "pattern": "".join("*" + kind for kind in kinds),
            "norm_eps": number(values.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
            "attention_bias": biased,
            "attention_output_bias": False if self.bias == "qkv" else None,
            "qk_norm": self.qk_norm,
            "sliding_window": self._window(values, where),
            "mlp_activation": "silu",
        }
        if "-" in kinds:
            fields["intermediate_size"] = want_field(values, "intermediate_size", int, where)
        if self.experts is not None:
            e = self.experts
            fields |= {
                "num_experts": want_field(values, next((n for n in e.number if n in values), e.number[0]), int, where),
                "experts_per_token": want_field(values, "num_experts_per_tok", int, where),
                "moe_intermediate_size": want_field(values, e.width, int, where),
                "moe_activation": "silu",
                "router_pre_softmax": True,
                "router_normalize": e.normalizes is None or bool(values.get(e.normalizes, False)),
            }
        return HybridConfig.from_dict(fields, where)

    def write_config(self, config: HybridConfig) -> dict[str, Any]:
        c, name = config, self.model_type
        kinds = c.pattern[1::2]
        mixed = "-" if self.experts is None else "-E" if self.experts.normalizes else "E"
        if c.pattern != "".join("*" + kind for kind in kinds) or set(kinds) - set(mixed):
            refuse("pattern", c.pattern, f"* and one of {mixed} repeated", name)
        if c.rope_theta is None:
            refuse("rope_theta", None, "a number", name)
        only(c, name, qk_norm=self.qk_norm, rotary_dim=None)
        if "-" in kinds:
            only(c, name, mlp_activation="silu")
        if self.bias != "field":
            only(c, name, attention_bias=self.bias == "qkv")
        if (c.attention_output_bias, c.attention_bias) == (False, True) and self.bias != "qkv":
            refuse("attention_output_bias", False, "the same as attention_bias", name)
        if self.bias == "qkv" and c.attention_output_bias is not False:
            refuse("attention_output_bias", c.attention_output_bias, False, name)
        if self.model_type == "llama":
            only(c, name, sliding_window=None)
        values = {
            **write_common(c, self.architecture, name),
            **write_attention(c),
            "intermediate_size": c.intermediate_size,
            "num_hidden_layers": len(kinds),
            "hidden_act": "silu",
            "rms_norm_eps": c.norm_eps,
            "sliding_window": c.sliding_window,
            "use_sliding_window": c.sliding_window is not None,
            "max_window_layers": 0,
            "mlp_bias": False,
        }
        if self.bias == "field":
            values["attention_bias"] = c.attention_bias
        if self.experts is not None:
            values |= self._write_experts(c, kinds)
        return values

    def _write_experts(self, c: HybridConfig, kinds: str) -> dict[str, Any]:
        e = self.experts
        assert e is not None
        only(
            c,
            self.model_type,
            moe_activation="silu",
            router_score="softmax",
            router_pre_softmax=True,
            router_bias=False,
            router_groups=None,
            router_scaling=1.0,
            shared_expert_intermediate_size=0,
            moe_latent_size=None,
        )
        values: dict[str, Any] = {
            e.number[0]: c.num_experts,
            "num_experts_per_tok": c.experts_per_token,
            e.width: c.moe_intermediate_size,
        }
        if e.normalizes is None:
            only(c, self.model_type, router_normalize=True)
        else:
            values[e.normalizes] = c.router_normalize
            values["mlp_only_layers"] = [i for i, kind in enumerate(kinds) if kind == "-"]
            values["decoder_sparse_step"] = 1
        return values

    def sources(self, name: str, config: HybridConfig) -> list[Source]:
        fixed = {"embeddings.weight": "model.embed_tokens.weight", "norm_f.weight": "model.norm.weight"}
        if not name.startswith("layers."):
            return [Source((fixed.get(name, name),))]
        _, index, rest = name.split(".", 2)
        stem, kind = f"model.layers.{int(index) // 2}.", config.pattern[int(index)]
        if rest == "norm.weight":
            norm = "input_layernorm" if kind == "*" else "post_attention_layernorm"
            return [Source((f"{stem}{norm}.weight",))]
        rest = rest.removeprefix("mixer.")
        if kind == "*":
            return [Source((f"{stem}self_attn.{rest}",))]
        if kind == "-":
            return [Source((f"{stem}mlp.{rest}",))]
        e = self.experts
        assert e is not None
        if rest == "gate.weight":
            return [Source((f"{stem}{e.module}.gate.weight",)), Source((f"{stem}mlp.gate.weight",))]
        which = _DENSE.index(rest.removeprefix("experts."))
        each = tuple(f"{stem}{e.module}.experts.{i}.{e.matrices[which]}.weight" for i in range(config.num_experts))
        memory = f"{stem}mlp.experts."
        fused = Source((memory + "down_proj",)) if which == 2 else Source((memory + "gate_up_proj",), half=which)
        return [Source(each, stacked=True), fused]


LLAMA_LIKE = (
    LlamaLike("llama", "LlamaForCausalLM"),
    LlamaLike("qwen2", "Qwen2ForCausalLM", bias="qkv"),
    LlamaLike("qwen3", "Qwen3ForCausalLM", qk_norm=True),
    LlamaLike(
        "mixtral",
        "MixtralForCausalLM",
        bias="none",
        experts=ExpertNames(("num_local_experts",), "intermediate_size", "block_sparse_moe", ("w1", "w3", "w2")),
    ),
    LlamaLike(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        experts=ExpertNames(
            ("num_experts", "num_local_experts"), "moe_intermediate_size", "mlp", _DENSE, "norm_topk_prob"
        ),
    ),
)
