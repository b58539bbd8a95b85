"""`accelerate` and `restore`: which modules of which models run which of our forwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foldscan.integrations.transformers import attention, experts, layers, mamba1, mamba2
from foldscan.integrations.transformers.attention import NAME
from foldscan.integrations.transformers.swap import faster, is_swapped, original, runs_here

ALL_ATTENTION_FUNCTIONS.register(NAME, attention.attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, attention.mask)
ALL_EXPERTS_FUNCTIONS.register(NAME, experts.experts_forward)

_RECORD = "_foldscan_before"


@dataclass(frozen=True)
class _Change:
    """A forward for a class of modules, what it is called in reports, and what it does not cover."""

    forward: Callable[..., Any]
    by: str
    covers: Callable[[Any], str | None] = lambda module: None


def _weight_here(module: Any) -> str | None:
    weight = module.weight
    return None if runs_here(weight) else f"weights of dtype {weight.dtype} on {weight.device}"


def _groups_here(module: Any) -> str | None:
    if module.num_group > 1 and max(1, module.top_k // module.topk_group) != 2:
        return "groups of experts are scored by their best two, with another number chosen from each"
    return _weight_here(module)


_LINEAR = _Change(layers.linear, "ops.linear", _weight_here)
_NORM = _Change(layers.rmsnorm, "ops.rmsnorm_fn", _weight_here)
_GATED_NORM = _Change(layers.gated_rmsnorm, "ops.rmsnorm_fn", _weight_here)
_MLP = _Change(layers.mlp, "ops.moe_mlp with one expert")
_ATTENTION = _Change(attention.layer, "ops.rotary_embedding, a cache that grows in place", attention.covers)
_SOFTMAX_ROUTER = _Change(experts.softmax_router, "ops.topk_route", _weight_here)
_MIXER = _Change(mamba2.mixer, "ops.mamba_chunk_scan_combined, selective_state_update, causal_conv1d", mamba2.covers)

CHANGES: dict[str, dict[str, _Change]] = {
    "mamba": {
        "MambaMixer": _Change(
            mamba1.mixer, "ops.selective_scan_fn, selective_state_update, causal_conv1d", mamba2.covers
        ),
        "MambaRMSNorm": _NORM,
    },
    "mamba2": {"Mamba2Mixer": _MIXER, "MambaRMSNormGated": _GATED_NORM, "Mamba2RMSNorm": _NORM},
    "nemotron_h": {
        "NemotronHMamba2Mixer": _MIXER,
        "NemotronHRMSNormGated": _GATED_NORM,
        "NemotronHRMSNorm": _NORM,
        "NemotronHMLP": _MLP,
        "NemotronHAttention": _ATTENTION,
        "NemotronHTopkRouter": _Change(experts.sigmoid_router, "ops.topk_route", _groups_here),
    },
    "bamba": {
        "BambaMixer": _MIXER,
        "BambaRMSNormGated": _GATED_NORM,
        "BambaRMSNorm": _NORM,
        "BambaMLP": _MLP,
        "BambaAttention": _ATTENTION,
    },
    "falcon_h1": {
        "FalconH1Mixer": _MIXER,
        "FalconH1RMSNormGated": _GATED_NORM,
        "FalconH1RMSNorm": _NORM,
        "FalconH1Attention": _ATTENTION,
    },
    "zamba2": {"Zamba2MambaMixer": _MIXER, "Zamba2RMSNormGated": _GATED_NORM, "Zamba2RMSNorm": _NORM},
    "granitemoehybrid": {
        "GraniteMoeHybridMambaLayer": _MIXER,
        "GraniteMoeHybridRMSNormGated": _GATED_NORM,
        "GraniteMoeHybridRMSNorm": _NORM,
        "GraniteMoeHybridMLP": _Change(layers.fused_gate_mlp, "ops.moe_mlp with one expert"),
        "GraniteMoeHybridTopKRouter": _Change(experts.chosen_softmax_router, "ops.topk_route", _weight_here),
        "GraniteMoeHybridAttention": _ATTENTION,
    },
    "mixtral": {
        "MixtralRMSNorm": _NORM,
        "MixtralTopKRouter": _SOFTMAX_ROUTER,
        "MixtralAttention": _ATTENTION,
    },
    "qwen2_moe": {
        "Qwen2MoeRMSNorm": _NORM,
        "Qwen2MoeTopKRouter": _SOFTMAX_ROUTER,
        "Qwen2MoeAttention": _ATTENTION,
        "Qwen2MoeMLP": _MLP,
    },
    "qwen3_moe": {
        "Qwen3MoeRMSNorm": _NORM,
        "Qwen3MoeTopKRouter": _SOFTMAX_ROUTER,
        "Qwen3MoeAttention": _ATTENTION,
        "Qwen3MoeMLP": _MLP,
    },
}
"""What is replaced, by model family (the folder below ``transformers.models``) and class name."""


@dataclass
class Report:
    """What `accelerate` did.

    Attributes:
        replaced: (what, by what) to how often.
        left: (what, why) to how often: what it knows but did not replace.
    """

    replaced: Counter[tuple[str, str]] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"replaced {sum(self.replaced.values())} modules and settings"]
        lines += [f"  {count:4} x {what} by {by}" for (what, by), count in self.replaced.items()]
        if self.left:
            lines.append(f"left {sum(self.left.values())} alone")
            lines += [f"  {count:4} x {what}: {why}" for (what, why), count in self.left.items()]
        return "\n".join(lines)


def _family(cls: type) -> str:
    """``mixtral`` for a class of ``transformers.models.mixtral``; empty for others."""
    parts = cls.__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else ""


def _change_for(module: nn.Module) -> _Change | None:
    cls = type(module)
    return _LINEAR if cls is nn.Linear else CHANGES.get(_family(cls), {}).get(cls.__name__)


def accelerate(model: PreTrainedModel) -> Report:
    """Make a transformers model run on foldscan's kernels, in place.

    Known are Mamba, Mamba2, NemotronH, Bamba, FalconH1, Zamba2, GraniteMoeHybrid, Mixtral, Qwen2-MoE and Qwen3-MoE;
    of other models only attention, experts and ``nn.Linear`` change. A module that meets what our forward does not
    cover (another dtype or device, packed sequences, assisted decoding, attention masks that are not causal ...) runs
    its own. Parameters, ``state_dict``, names, hooks and configuration files stay as they are. Calling it again looks
    at the modules that came since.

    Without gradients each weight is also kept packed, beside the original: memory for weights doubles
    (`foldscan.ops.clear_packed_weights` frees the packed ones).

    Args:
        model: in fp32 or bf16, on the CPU.

    Returns:
        What was replaced by what, and what was left alone and why; ``print`` it.

    Raises:
        TypeError: not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, want a transformers model")
    report = Report()
    before = model.__dict__.setdefault(_RECORD, [])
    for module in model.modules():
        change = None if is_swapped(module) else _change_for(module)
        if change is None:
            continue
        why = "a forward of its own" if "forward" in module.__dict__ else change.covers(module)
        if why is not None:
            report.left[type(module).__name__, why] += 1
            continue
        report.replaced[type(module).__name__, change.by] += 1
        module.__class__ = faster(type(module), change.forward)
    for config in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        _set_implementations(model, config, before, report)
    return report


def _set_implementations(model: PreTrainedModel, config: Any, before: list[Any], report: Report) -> None:
    """Point a configuration at our attention and experts, remembering what it said."""
    owned = [m for m in model.modules() if getattr(m, "config", None) is config]
    chosen, chosen_experts = config._attn_implementation, config._experts_implementation
    attends = any("Attention" in type(m).__name__ for m in owned)
    if attends and chosen not in ("sdpa", NAME):
        why = "it can return attention weights" if chosen == "eager" else "it was chosen"
        report.left[f"attention implementation {chosen}", why] += 1
    elif attends and chosen == "sdpa":
        report.replaced["attention implementation sdpa", "ops.flash_attn_func"] += 1
        config._attn_implementation = NAME
    found = [m for m in owned if hasattr(m, "_is_expert_parallel")]
    if chosen_experts != NAME:
        reasons = [(type(m).__name__, why) for m in found if (why := experts.covers(m)) is not None]
        report.left.update(reasons)
        if len(reasons) < len(found):
            report.replaced[f"experts implementation {chosen_experts}", "ops.moe_mlp"] += len(found) - len(reasons)
            config._experts_implementation = NAME
    if (config._attn_implementation, config._experts_implementation) != (chosen, chosen_experts):
        before.append((config, chosen, chosen_experts))


def restore(model: PreTrainedModel) -> None:
    """Undo `accelerate`: every module computes what it did before. The packed weights go with `clear_packed_weights`.

    Raises:
        TypeError: not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, want a transformers model")
    for module in model.modules():
        if is_swapped(module):
            module.__class__ = original(module)
    for config, attention_name, experts_name in reversed(model.__dict__.pop(_RECORD, [])):
        if config._attn_implementation == NAME:
            config._attn_implementation = attention_name
        if config._experts_implementation == NAME:
            config._experts_implementation = experts_name
