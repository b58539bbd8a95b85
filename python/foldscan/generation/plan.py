"""Decoding with everything looked up beforehand: one token a sequence, straight through the kernels.

A decode step of a small model is hundreds of small operations, and checking arguments, finding packed weights and
walking modules costs as much as the arithmetic. A plan does that once: each block becomes a function that holds packed
weights and constants and calls the same kernels, in the same order, as the block's modules do, so the bits are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from foldscan.models import HybridLM
from foldscan.nn import MLP, AttentionCache, CacheStep, MambaCache, MoE, Packing
from foldscan.ops._backend import current_backend
from foldscan.ops._library import kernels
from foldscan.ops.linear import packed_linear
from foldscan.ops.linear_joined import packed_joined
from foldscan.ops.moe import packed_experts

Cache = AttentionCache | MambaCache | None
Step = Callable[[torch.Tensor, CacheStep, Any], torch.Tensor]
"""(n, d) hidden states of one token each, the step, the block's cache: what the block adds to the residual stream."""

_linear = kernels.linear_packed.default
_rmsnorm = kernels.rmsnorm.default
_rotary = kernels.rotary.default
_attention = kernels.attention.default
_append = kernels.kv_cache_append.default
_experts = kernels.moe_mlp_packed.default
_route = kernels.moe_route.default
_ACTIVATIONS = ("silu", "relu2", "gelu")


def _norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, eps, size = module.weight.float(), module.eps, module.weight.numel()
    return lambda x: _rmsnorm(x, weight, None, None, eps, size, True)[0]


def _product(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = packed_linear(module.weight, module.weight.dtype)
    n, k = module.weight.shape
    bias = None if module.bias is None else module.bias.float()
    return lambda x: _linear(x, packed, n, k, bias)


def _attend(mixer: Any) -> Step:
    layers = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    packed = packed_joined([p.weight for p in layers], mixer.q_proj.weight.dtype)
    bias = None if mixer.q_proj.bias is None else torch.cat([p.bias.float() for p in layers])
    rows, width = sum(p.weight.shape[0] for p in layers), mixer.q_proj.weight.shape[1]
    heads, kv_heads, dim = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    norms = None if mixer.q_norm is None else (_norm(mixer.q_norm), _norm(mixer.k_norm))
    out_proj, scale, window = _product(mixer.o_proj), mixer.scale, mixer.window

    def step(x: torch.Tensor, at: CacheStep, cache: AttentionCache) -> torch.Tensor:
        n = x.shape[0]
        qkv = _linear(x, packed, rows, width, bias).view(n, -1, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if norms is not None:
            qk = torch.cat([norm(t.reshape(-1, dim)).view(n, -1, dim) for norm, t in zip(norms, _parts(qk, heads))], 1)
        if mixer.rotary is not None:
            qk = _rotary(qk, *mixer.rotary.tables(at.max_seqlen_k, x.device), at.positions, False)
        q, k = _parts(qk, heads)
        _append(k, v, cache.keys, cache.values, at.block_table, at.cu_seqlens, at.positions)
        out, _ = _attention(
            q,
            cache.keys,
            cache.values,
            at.cu_seqlens,
            at.cu_seqlens_k,
            at.block_table,
            None,
            scale,
            0.0,
            window[0],
            0,
        )
        return out_proj(out.view(n, heads * dim))

    return step


def _parts(qk: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    return qk[:, :heads], qk[:, heads:]


def _mlp(mixer: MLP) -> Step | None:
    if mixer.up_proj.bias is not None:
        return None
    gate = None if mixer.gate_proj is None else packed_experts(mixer.gate_proj.weight[None])
    up, down = packed_experts(mixer.up_proj.weight[None]), packed_experts(mixer.down_proj.weight[None])
    inner, outer = mixer.up_proj.weight.shape
    code = _ACTIVATIONS.index(mixer.activation)
    constants: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def step(x: torch.Tensor, at: CacheStep, cache: Any) -> torch.Tensor:
        n = x.shape[0]
        if n not in constants:
            constants[n] = torch.ones(n, 1), torch.zeros(n, 1, dtype=torch.int64)
        return _experts(x, *constants[n], up, down, gate, inner, outer, code)

    return step


def _moe(mixer: MoE) -> Step | None:
    gate, experts = mixer.gate, mixer.experts
    shared = None if mixer.shared_experts is None else _mlp(mixer.shared_experts)
    if mixer.fc1_latent_proj is not None or (mixer.shared_experts is not None and shared is None):
        return None
    weight = gate.weight.float()
    logits, (num_experts, hidden) = packed_linear(weight, torch.float32), weight.shape
    bias = None if gate.e_score_correction_bias is None else gate.e_score_correction_bias.float().contiguous()
    mode = (gate.score == "sigmoid", gate.pre_softmax, gate.num_groups or 1, gate.groups_topk or 1)
    mode += (float(gate.scaling), gate.normalize)
    up, down = packed_experts(experts.up_proj), packed_experts(experts.down_proj)
    w_gate = None if experts.gate_proj is None else packed_experts(experts.gate_proj)
    inner, code = experts.up_proj.shape[1], _ACTIVATIONS.index(experts.activation)

    def step(x: torch.Tensor, at: CacheStep, cache: Any) -> torch.Tensor:
        scores = _linear(x.float(), logits, num_experts, hidden, None)
        probs, chosen = _route(scores, bias, gate.top_k, *mode)
        out = _experts(x, probs, chosen, up, down, w_gate, inner, hidden, code)
        return out if shared is None else out + shared(x, at, cache)

    return step


@dataclass
class _Block:
    norm: Callable[[torch.Tensor], torch.Tensor]
    step: Step


class DecodePlan:
    """Steps of one token a sequence for a model whose weights do not change meanwhile.

    Make it inside ``torch.inference_mode()`` or ``no_grad``, and anew when weights have changed.
    """

    def __init__(self, model: HybridLM) -> None:
        self.embedding = model.embeddings.weight
        self.blocks = []
        for block in model.layers:
            make: Any = {"*": _attend, "-": _mlp, "E": _moe}.get(block.kind)
            planned = None if make is None else make(block.mixer)
            self.blocks.append(_Block(_norm(block.norm), planned or _through_module(block)))
        self.norm_f = _norm(model.norm_f)
        head = model.head_weight
        self.head, self.head_shape = packed_linear(head, head.dtype), head.shape

    @staticmethod
    def covers(model: HybridLM) -> bool:
        """True where the kernels run in the dtype of the weights."""
        weight = model.embeddings.weight
        return (
            current_backend() == "native"
            and weight.device.type == "cpu"
            and all(p.dtype == weight.dtype for p in model.parameters())
            and weight.dtype in (torch.float32, torch.bfloat16)
        )

    def hidden(self, ids: list[int], at: CacheStep) -> torch.Tensor:
        """(n, d) after the final norm for one new token of each sequence; the cache is extended."""
        x = torch.nn.functional.embedding(torch.tensor(ids), self.embedding)
        for block, cache in zip(self.blocks, at.cache.layers):
            x = x + block.step(block.norm(x), at, cache)
        at.commit()
        return self.norm_f(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, d) to (n, V)."""
        return _linear(hidden, self.head, *self.head_shape, None)


def _through_module(block: Any) -> Step:
    """A block that has no plan of its own runs its module."""

    def step(y: torch.Tensor, at: CacheStep, cache: Any) -> torch.Tensor:
        if block.kind == "E":
            return block.mixer(y)[0]
        if block.kind == "-":
            return block.mixer(y)
        return block.mixer(y, Packing(at.cu_seqlens, 1, at.positions.long(), at), cache)

    return step
