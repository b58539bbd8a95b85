"""Decoding with everything looked up beforehand: one token a sequence, straight through the _ops.

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
from foldscan.models.hybrid_lm import block_caches
from foldscan.nn import MLP, AttentionCache, CacheStep, MambaCache, MoE
from foldscan.ops._backend import current_backend
from foldscan.ops.linear import packed_linear
from foldscan.ops.linear_joined import packed_joined
from foldscan.ops.moe import packed_experts

Step = Callable[[torch.Tensor, CacheStep, Any], torch.Tensor]
"""(n, d) hidden states of one token each, the step, the block's cache: what the block adds to the residual stream."""

_ops = torch.ops.foldscan  # without the detour past autograd that kernels take: a plan runs in inference mode
_linear = _ops.linear_packed.default
_rmsnorm = _ops.rmsnorm.default
_rotary = _ops.rotary.default
_attention = _ops.attention.default
_append = _ops.kv_cache_append.default
_experts = _ops.moe_mlp_packed.default
_route = _ops.moe_route.default
_conv = _ops.causal_conv1d_update.default
_extend = _ops.scan_extend.default
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


def _mamba(mixer: Any) -> Step:
    in_proj, out_proj = _product(mixer.in_proj), _product(mixer.out_proj)
    heads, dim, groups, states = mixer.num_heads, mixer.head_dim, mixer.num_groups, mixer.state_size
    inner, width = mixer.inner_size, groups * states
    sizes = [inner, mixer.conv_dim, heads]
    weight, bias = mixer.conv1d.weight.squeeze(1).float().contiguous(), mixer.conv1d.bias
    bias = None if bias is None else bias.float()
    A, D, dt_bias = -torch.exp(mixer.A_log.float()), mixer.D.float(), mixer.dt_bias.float()
    norm = mixer.norm
    norm_weight = None if norm is None else norm.weight.float()

    def step(x: torch.Tensor, at: CacheStep, cache: MambaCache) -> torch.Tensor:
        n = x.shape[0]
        z, xbc, dt = in_proj(x).split(sizes, 1)
        xbc = _conv(xbc[:, :, None], cache.conv, weight, bias, None, at.slots, True)[:, :, 0]
        values, B, C = xbc.split([inner, width, width], 1)
        scan = cache.scan
        y = _extend(
            values.contiguous().view(n, heads, dim),
            dt.float().contiguous(),
            A,
            B.contiguous().view(n, groups, states),
            C.contiguous().view(n, groups, states),
            D,
            z.contiguous().view(n, heads, dim) if norm is None else None,
            dt_bias,
            True,
            *mixer.time_step_limit,
            scan.state,
            scan.x,
            scan.B,
            scan.dt,
            at.slots,
            at.positions,
            at.cu_seqlens,
        ).view(n, inner)
        if norm is not None:
            y = _rmsnorm(y, norm_weight, None, z, norm.eps, norm.group_size, norm.before_gate)[0]
        return out_proj(y)

    return step


def _parallel(mixer: Any) -> Step:
    mamba, attend = _mamba(mixer.mamba), _attend(mixer.attention)

    def step(x: torch.Tensor, at: CacheStep, cache: tuple[MambaCache, AttentionCache]) -> torch.Tensor:
        return mamba(x, at, cache[0]) + attend(x, at, cache[1])

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
    mode: tuple[Any, ...] = (gate.score == "sigmoid", gate.pre_softmax, gate.num_groups or 1, gate.groups_topk or 1)
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

    Make it inside ``torch.no_grad()``, and anew when weights have changed.
    """

    def __init__(self, model: HybridLM) -> None:
        self.embedding = model.embeddings.weight
        self.blocks, self.pattern = [], model.config.pattern
        for block in model.layers:
            kind = str(block.kind)
            make: Any = {"*": _attend, "-": _mlp, "E": _moe, "M": _mamba, "P": _parallel}[kind]
            planned = make(block.mixer)
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
        for block, cache in zip(self.blocks, block_caches(self.pattern, at.cache)):
            x = x + block.step(block.norm(x), at, cache)
        at.commit()
        return self.norm_f(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, d) to (n, V)."""
        return _linear(hidden, self.head, *self.head_shape, None)


def _through_module(block: Any) -> Step:
    """An MLP with biases, or experts behind a latent projection, has no plan of its own and runs its module."""

    def step(y: torch.Tensor, at: CacheStep, cache: Any) -> torch.Tensor:
        out = block.mixer(y)
        return out[0] if block.kind == "E" else out

    return step
