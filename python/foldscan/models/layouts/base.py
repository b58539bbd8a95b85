"""What a format is: its config fields and tensor names, and how they become ours, in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from foldscan.models.config import HybridConfig
from foldscan.models.files import FormatError, want_field


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: one tensor, or several to be stacked along a new first axis.

    Attributes:
        half: 0 or 1 where ours is one half of theirs (along the last but one axis); None for the whole.
    """

    names: tuple[str, ...]
    stacked: bool = False
    half: int | None = None


class Layout(Protocol):
    """A format: how its ``config.json`` maps to `HybridConfig`, and its tensor names to ours.

    ``sources`` lists where a tensor may be; the first is how it is written. ``read_tensor`` gets a tensor of the file,
    our name for it, and the values of ``config.json``; what it returns is kept.
    """

    @property
    def model_type(self) -> str: ...

    def read_config(self, values: dict[str, Any], where: object) -> HybridConfig: ...

    def write_config(self, config: HybridConfig) -> dict[str, Any]: ...

    def sources(self, name: str, config: HybridConfig) -> list[Source]: ...

    def read_tensor(self, name: str, value: torch.Tensor, values: dict[str, Any]) -> torch.Tensor: ...

    def ignores(self, name: str) -> bool: ...


class Plain:
    """What most formats share: tensors as they are, none left over."""

    def read_tensor(self, name: str, value: torch.Tensor, values: dict[str, Any]) -> torch.Tensor:
        return value

    def ignores(self, name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq")


class CannotExpress(ValueError):
    """The format has no words for this model. The message names the field."""


def refuse(field: str, value: object, want: object, format_name: str) -> None:
    """Raise `CannotExpress`."""
    raise CannotExpress(f"{field}: got {value!r}, but the {format_name} format only has {want!r}")


def only(config: HybridConfig, format_name: str, **wanted: object) -> None:
    """Refuse a configuration with other values than these."""
    for field, want in wanted.items():
        if getattr(config, field) != want:
            refuse(field, getattr(config, field), want, format_name)


def require(values: dict[str, Any], field: str, allowed: tuple[object, ...], where: object) -> None:
    """Refuse a file with another value; a missing one counts as the first that is allowed."""
    value = values.get(field, allowed[0])
    if value not in allowed:
        raise FormatError(f"{where}: field {field!r} is {value!r}, want {' or '.join(map(repr, allowed))}")


def number(value: Any, field: str, where: object) -> float:
    """A JSON number; transformers writes infinity as {"__float__": "Infinity"}."""
    if isinstance(value, dict) and "__float__" in value:
        value = value["__float__"]
    try:
        return float(value)
    except (TypeError, ValueError):
        raise FormatError(f"{where}: field {field!r} is {value!r}, want a number") from None


def limits(values: dict[str, Any], where: object) -> tuple[float, float]:
    """The clamp of dt."""
    low, high = values.get("time_step_limit") or (0.0, "inf")
    return number(low, "time_step_limit", where), number(high, "time_step_limit", where)


def write_limits(config: HybridConfig) -> list[Any]:
    """The inverse of `limits`."""
    low, high = config.time_step_limit
    return [low, {"__float__": "Infinity"} if high == float("inf") else high]


def rope_theta(values: dict[str, Any], where: object) -> tuple[float, float]:
    """Base of the rotary embedding, and the part of a head that it turns; other kinds than the default are refused."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise FormatError(f"{where}: field 'rope_type' is {kind!r}, want 'default'")
    part = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    return number(theta, "rope_theta", where), number(1.0 if part is None else part, "partial_rotary_factor", where)


def common_fields(values: dict[str, Any], where: object) -> dict[str, Any]:
    """Our names and values of what nearly every format writes alike."""
    fields = {
        "vocab_size": want_field(values, "vocab_size", int, where),
        "hidden_size": want_field(values, "hidden_size", int, where),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "initializer_range": number(values.get("initializer_range", 0.02), "initializer_range", where),
        "bos_token_id": values.get("bos_token_id"),
        "eos_token_id": values.get("eos_token_id"),
    }
    if "max_position_embeddings" in values:
        fields["max_position_embeddings"] = values["max_position_embeddings"]
    return fields


def attention_fields(values: dict[str, Any], where: object) -> dict[str, Any]:
    """Our names and values of grouped-query attention with a rotary embedding."""
    heads = want_field(values, "num_attention_heads", int, where)
    hidden = want_field(values, "hidden_size", int, where)
    theta, part = rope_theta(values, where)
    dim = values.get("head_dim") or hidden // heads
    return {
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": dim,
        "rope_theta": theta,
        "rotary_dim": None if part == 1.0 else int(dim * part),
    }


def write_common(config: HybridConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """The inverse of `common_fields`."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "max_position_embeddings": config.max_position_embeddings,
    }


def write_attention(config: HybridConfig) -> dict[str, Any]:
    """The inverse of `attention_fields`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_dim is not None:
        rope["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    return {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
    }
