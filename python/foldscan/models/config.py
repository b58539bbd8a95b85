"""The shape of a hybrid language model: one dataclass, a pattern string, YAML and JSON in and out."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from foldscan.models.files import FormatError, atomic_write_text, read_json, write_json

MODEL_TYPE = "foldscan_hybrid"
LAYER_KINDS = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "Mixture of Experts", "P": "Mamba-2 beside attention"}


@dataclass
class HybridConfig:
    """A stack of pre-norm residual blocks, one per letter of ``pattern``.

    ``M`` is a Mamba-2 mixer, ``*`` grouped-query attention, ``-`` an MLP, ``E`` a Mixture of Experts (the alphabet of
    Nemotron-H's ``hybrid_override_pattern``, arXiv:2504.03624), ``P`` a Mamba-2 mixer and attention side by side
    (FalconH1). A Llama layer is ``*-``.

    Attributes:
        pattern: one letter a block.
        vocab_size, hidden_size: V and d.
        tie_embeddings: the head is the embedding.
        norm_eps: of every RMSNorm.
        mamba_num_heads, mamba_head_dim, mamba_num_groups, state_size, conv_kernel: H, P, G, N, W of a Mamba-2 mixer.
        conv_bias, mamba_bias: biases of the convolution; of the two projections.
        mamba_norm: the mixer ends in a gated RMSNorm; without, the gate multiplies the scan's output (FalconH1).
        mamba_norm_before_gate: the gate multiplies the normed output, not what is normed.
        time_step_min, time_step_max, time_step_floor: dt starts log-uniform in [min, max], and at least at floor.
        time_step_limit: clamp of softplus(dt + dt_bias), at every step.
        num_heads, num_kv_heads, head_dim: of attention.
        attention_bias: biases of q, k, v and o.
        attention_output_bias: of o, where it differs (Qwen2); None for the same.
        qk_norm: RMSNorm of every query and key head (Qwen3).
        rope_theta: base of the rotary embedding (rotate-half layout); None for no positional encoding (Nemotron-H).
        rotary_dim: features of a head that it turns; None for all.
        sliding_window: keys a query sees, itself included; None for all before it.
        intermediate_size, mlp_activation, mlp_bias: of ``-``: ``"relu2"`` (squared ReLU, no gate), ``"silu"`` (SwiGLU).
        num_experts, experts_per_token, moe_intermediate_size, moe_activation: of ``E``.
        shared_expert_intermediate_size: width of the expert that sees every token; 0 for none.
        moe_latent_size: experts work in this dimension behind a shared down and up projection (Nemotron 3); None for d.
        router_score: ``"softmax"`` or ``"sigmoid"``.
        router_pre_softmax: softmax over all experts before the top k, not over the chosen k.
        router_bias: a learning-free score correction that steers only the choice (DeepSeek-V3).
        router_groups, router_groups_topk: choose experts only within the best groups.
        router_scaling, router_normalize: probabilities sum to ``router_scaling``, or are scaled only.
        load_balancing_coef, router_z_coef: weights of the auxiliary losses in `HybridLM.loss`.
        router_bias_rate: how far `HybridLM.update_router_bias` moves the score correction a step.
        max_position_embeddings: longest sequence the model is meant for.
        initializer_range: standard deviation of normal initialisation.
        rescale_residual: the projections that write to the residual stream start divided by sqrt(layers), a letter
            being one addition to the stream.
        bos_token_id, eos_token_id: for generation.
    """

    pattern: str
    vocab_size: int
    hidden_size: int
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    mamba_num_heads: int = 8
    mamba_head_dim: int = 64
    mamba_num_groups: int = 1
    state_size: int = 64
    conv_kernel: int = 4
    conv_bias: bool = True
    mamba_bias: bool = False
    mamba_norm: bool = True
    mamba_norm_before_gate: bool = False
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    qk_norm: bool = False
    rope_theta: float | None = None
    rotary_dim: int | None = None
    sliding_window: int | None = None
    intermediate_size: int = 1024
    mlp_activation: str = "relu2"
    mlp_bias: bool = False
    num_experts: int = 8
    experts_per_token: int = 2
    moe_intermediate_size: int = 256
    moe_activation: str = "relu2"
    shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    router_score: str = "softmax"
    router_pre_softmax: bool = False
    router_bias: bool = False
    router_groups: int | None = None
    router_groups_topk: int | None = None
    router_scaling: float = 1.0
    router_normalize: bool = True
    load_balancing_coef: float = 0.0
    router_z_coef: float = 0.0
    router_bias_rate: float = 0.0
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rescale_residual: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        limit = self.time_step_limit
        if not isinstance(limit, (tuple, list)) or len(limit) != 2:
            raise ValueError(f"time_step_limit: got {limit!r}, want two numbers")
        self.time_step_limit = (float(limit[0]), float(limit[1]))
        self.validate()

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    @property
    def mamba_inner_size(self) -> int:
        """H * P, the width between in_proj and out_proj."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_conv_dim(self) -> int:
        """H * P + 2 * G * N, the channels x|B|C of the convolution."""
        return self.mamba_inner_size + 2 * self.mamba_num_groups * self.state_size

    @property
    def stop_ids(self) -> frozenset[int]:
        """``eos_token_id`` as a set."""
        eos = self.eos_token_id
        return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: names the first field that is wrong, what it is and what it should be.
        """
        unknown = sorted(set(self.pattern) - set(LAYER_KINDS))
        if not self.pattern or unknown:
            raise ValueError(f"pattern: got {self.pattern!r}, want one or more of the letters M * - E P")

        def positive(*names: str) -> None:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"{name}: got {value!r}, want a positive integer")

        def choice(name: str, *allowed: str) -> None:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want {' or '.join(map(repr, allowed))}")

        positive("vocab_size", "hidden_size", "max_position_embeddings")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps: got {self.norm_eps!r}, want a positive number")
        if "M" in self.pattern or "P" in self.pattern:
            positive("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "state_size")
            if self.mamba_num_heads % self.mamba_num_groups:
                raise ValueError(
                    f"mamba_num_groups: got {self.mamba_num_groups}, want a divisor of mamba_num_heads = "
                    f"{self.mamba_num_heads}"
                )
            if self.conv_kernel not in (2, 3, 4):
                raise ValueError(f"conv_kernel: got {self.conv_kernel!r}, want 2, 3 or 4")
            if not 0 < self.time_step_min <= self.time_step_max:
                raise ValueError(
                    f"time_step_min, time_step_max: got {self.time_step_min!r}, {self.time_step_max!r}, "
                    "want 0 < min <= max"
                )
            low, high = self.time_step_limit
            if not 0 <= low <= high:
                raise ValueError(f"time_step_limit: got {self.time_step_limit}, want 0 <= low <= high")
        if "*" in self.pattern or "P" in self.pattern:
            positive("num_heads", "num_kv_heads", "head_dim")
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"num_kv_heads: got {self.num_kv_heads}, want a divisor of num_heads = {self.num_heads}"
                )
            if self.head_dim > 256:
                raise ValueError(f"head_dim: got {self.head_dim}, want at most 256")
            if self.rope_theta is not None and (self.head_dim % 2 or not self.rope_theta > 0):
                raise ValueError(
                    f"rope_theta: got {self.rope_theta!r} with head_dim {self.head_dim}, want > 0 and an even head_dim"
                )
            if self.rotary_dim is not None and not (0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0):
                raise ValueError(f"rotary_dim: got {self.rotary_dim}, want an even number up to {self.head_dim}")
            if self.sliding_window is not None:
                positive("sliding_window")
        if "-" in self.pattern:
            positive("intermediate_size")
            choice("mlp_activation", "relu2", "silu")
            if self.mlp_activation == "silu" and self.mlp_bias:
                raise ValueError("mlp_bias: got True with mlp_activation 'silu', want False")
        if "E" in self.pattern:
            positive("num_experts", "experts_per_token", "moe_intermediate_size")
            choice("moe_activation", "relu2", "silu")
            choice("router_score", "softmax", "sigmoid")
            if self.experts_per_token > self.num_experts:
                raise ValueError(
                    f"experts_per_token: got {self.experts_per_token}, want at most num_experts = {self.num_experts}"
                )
            if self.shared_expert_intermediate_size < 0:
                raise ValueError(
                    f"shared_expert_intermediate_size: got {self.shared_expert_intermediate_size}, want 0 or more"
                )
            if self.moe_latent_size is not None:
                positive("moe_latent_size")
            if (self.router_groups is None) != (self.router_groups_topk is None):
                raise ValueError("router_groups, router_groups_topk: got only one of them, want both or none")
            if self.router_groups is not None and self.router_groups_topk is not None:
                positive("router_groups", "router_groups_topk")
                if self.num_experts % self.router_groups or self.router_groups_topk > self.router_groups:
                    raise ValueError(
                        f"router_groups: got {self.router_groups} (best {self.router_groups_topk}) for num_experts = "
                        f"{self.num_experts}, want a divisor and at most that many best"
                    )
            if self.router_bias_rate and not self.router_bias:
                raise ValueError(f"router_bias_rate: got {self.router_bias_rate} without router_bias, want 0")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary: ``model_type`` and all fields; an infinite time step limit is written as null."""
        values = dataclasses.asdict(self)
        low, high = self.time_step_limit
        values["time_step_limit"] = [low, None if math.isinf(high) else high]
        return {"model_type": MODEL_TYPE, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: object = "config") -> HybridConfig:
        """The inverse of `to_dict`.

        Raises:
            FormatError: an unknown, missing, mistyped or impossible field; the message begins with ``where``.
        """
        values = dict(values)
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise FormatError(f"{where}: field 'model_type' is {model_type!r}, want {MODEL_TYPE!r}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise FormatError(f"{where}: field {name!r} is not a field of HybridConfig")
        for name in ("pattern", "vocab_size", "hidden_size"):
            if name not in values:
                raise FormatError(f"{where}: field {name!r} is missing")
        for name, value in values.items():
            _check_type(name, value, str(known[name].type), where)
        limit = values.get("time_step_limit")
        if isinstance(limit, (list, tuple)):
            values["time_step_limit"] = tuple(math.inf if v is None else v for v in limit)
        for name in (n for n, f in known.items() if f.type == "float" and isinstance(values.get(n), int)):
            values[name] = float(values[name])
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise FormatError(f"{where}: field {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write YAML (``.yaml``, ``.yml``) or JSON (anything else), atomically."""
        file = Path(path)
        if file.suffix in (".yaml", ".yml"):
            atomic_write_text(file, yaml.safe_dump(self.to_dict(), sort_keys=False))
        else:
            write_json(file, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HybridConfig:
        """Read what `save` wrote.

        Raises:
            FormatError: unreadable file, or a field that is wrong.
        """
        file = Path(path)
        if file.suffix in (".yaml", ".yml"):
            return cls.from_dict(read_yaml(file), file)
        return cls.from_dict(read_json(file), file)


def _check_type(name: str, value: Any, annotation: str, where: object) -> None:
    """Check a value from a file against the field's annotation, given as its source text."""
    if value is None and "None" in annotation:
        return
    base = annotation.replace(" | None", "")
    if base == "bool":
        good = isinstance(value, bool)
    elif base == "int":
        good = isinstance(value, int) and not isinstance(value, bool)
    elif base == "float":
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif base == "str":
        good = isinstance(value, str)
    elif base == "int | list[int]":
        good = isinstance(value, int) or (isinstance(value, list) and all(isinstance(v, int) for v in value))
    else:
        good = isinstance(value, (list, tuple)) and all(v is None or isinstance(v, (int, float)) for v in value)
    if not good:
        raise FormatError(f"{where}: field {name!r} is {value!r}, want {annotation}")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        FormatError: the file is missing, is not YAML, or holds something other than a mapping.
    """
    file = Path(path)
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{file}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file}: got a YAML {type(value).__name__}, want a mapping")
    return value
