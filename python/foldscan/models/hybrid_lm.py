"""The hybrid language model: embedding, a stack of mixed blocks over packed tokens, final norm, head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from foldscan import ops
from foldscan.models.config import HybridConfig
from foldscan.nn import (
    MLP,
    Attention,
    AttentionCache,
    CacheStep,
    HybridCache,
    Linear,
    Mamba2Mixer,
    MambaCache,
    MoE,
    Packing,
    RMSNorm,
    Router,
    RouterStats,
    check_cu_seqlens,
    positions_of,
)


def _mamba(c: HybridConfig) -> Mamba2Mixer:
    return Mamba2Mixer(
        c.hidden_size,
        num_heads=c.mamba_num_heads,
        head_dim=c.mamba_head_dim,
        num_groups=c.mamba_num_groups,
        state_size=c.state_size,
        conv_kernel=c.conv_kernel,
        conv_bias=c.conv_bias,
        bias=c.mamba_bias,
        norm_eps=c.norm_eps,
        norm=c.mamba_norm,
        norm_before_gate=c.mamba_norm_before_gate,
        time_step_limit=c.time_step_limit,
    )


def _attention(c: HybridConfig) -> Attention:
    return Attention(
        c.hidden_size,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        bias=c.attention_bias,
        output_bias=c.attention_output_bias,
        rope_theta=c.rope_theta,
        rotary_dim=c.rotary_dim,
        sliding_window=c.sliding_window,
        qk_norm_eps=c.norm_eps if c.qk_norm else None,
    )


def _mixer(config: HybridConfig, kind: str) -> nn.Module:
    c = config
    if kind == "M":
        return _mamba(c)
    if kind == "*":
        return _attention(c)
    if kind == "P":
        return Parallel(_mamba(c), _attention(c))
    if kind == "-":
        return MLP(c.hidden_size, c.intermediate_size, activation=c.mlp_activation, bias=c.mlp_bias)
    router = Router(
        c.hidden_size,
        c.num_experts,
        c.experts_per_token,
        score=c.router_score,
        pre_softmax=c.router_pre_softmax,
        bias=c.router_bias,
        num_groups=c.router_groups,
        groups_topk=c.router_groups_topk,
        scaling=c.router_scaling,
        normalize=c.router_normalize,
    )
    return MoE(
        c.hidden_size,
        router,
        intermediate_size=c.moe_intermediate_size,
        activation=c.moe_activation,
        shared_intermediate_size=c.shared_expert_intermediate_size,
        latent_size=c.moe_latent_size,
    )


class Parallel(nn.Module):
    """A Mamba-2 mixer and attention that read the same and add up what they write."""

    def __init__(self, mamba: Mamba2Mixer, attention: Attention) -> None:
        super().__init__()
        self.mamba, self.attention = mamba, attention

    def forward(
        self, hidden: torch.Tensor, packing: Packing, cache: tuple[MambaCache, AttentionCache] | None = None
    ) -> torch.Tensor:
        """(T, d) to (T, d)."""
        states, keys = (None, None) if cache is None else cache
        return self.mamba(hidden, packing, states) + self.attention(hidden, packing, keys)


class Block(nn.Module):
    """``x + mixer(norm(x))`` for one letter of the pattern."""

    def __init__(self, config: HybridConfig, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = _mixer(config, kind)

    def forward(
        self,
        x: torch.Tensor,
        packing: Packing,
        cache: Any = None,
        stats: bool = False,
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """(T, d) to (T, d), and the router's losses and loads when asked for and there is a router."""
        y = self.norm(x)
        if self.kind == "E":
            out, routed = self.mixer(y, stats=stats)
            return x + out, routed
        out = self.mixer(y) if self.kind == "-" else self.mixer(y, packing, cache)
        return x + out, None


def block_caches(pattern: str, cache: HybridCache) -> Iterator[Any]:
    """What of a cache belongs to each block: a layer, or a pair for a parallel block."""
    layers = iter(cache.layers)
    for kind in pattern:
        yield (next(layers), next(layers)) if kind == "P" else next(layers)


@dataclass
class LossParts:
    """What `HybridLM.loss` is made of.

    Attributes:
        total: what to differentiate.
        cross_entropy: mean over the labels that count, in nats.
        load_balancing, router_z: means over expert layers (before their coefficients); zero without expert layers.
        expert_counts: (expert layers, experts) tokens that each expert got; None without expert layers.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    load_balancing: torch.Tensor
    router_z: torch.Tensor
    expert_counts: torch.Tensor | None


class HybridLM(nn.Module):
    """A causal language model of Mamba-2, attention, MLP and MoE blocks in any order.

    Sequences are packed inside: every layer works on (T, d) with boundaries, so a token's values are the same bits
    whether its sequence runs alone, in a batch, or through a cache in pieces.

    Args:
        config: the shape; see `HybridConfig`.
        init: draw initial weights (from torch's global generator); False leaves them for a checkpoint to fill.

    Attributes:
        activation_checkpointing: recompute blocks in backward instead of keeping what is inside them.
    """

    def __init__(self, config: HybridConfig, *, init: bool = True) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        if init:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as Nemotron-H and Mamba-2 do: normal weights, residual projections divided by sqrt(layers), the
        convolution uniform in +-1/sqrt(W), A, dt and D as in `Mamba2Mixer.reset_state_space`."""
        c = self.config
        residual = (
            "out_proj.weight",
            "o_proj.weight",
            "down_proj.weight",
            "experts.down_proj",
            "fc2_latent_proj.weight",
        )
        for name, parameter in self.named_parameters():
            if name.endswith("bias") and "dt_bias" not in name and "conv1d" not in name:
                parameter.zero_()
            elif "conv1d" in name:
                bound = 1 / math.sqrt(c.conv_kernel)
                parameter.uniform_(-bound, bound)
            elif parameter.dim() >= 2:
                scale = 1 / math.sqrt(c.num_layers) if c.rescale_residual and name.endswith(residual) else 1.0
                parameter.normal_(0.0, c.initializer_range * scale)
            elif name.endswith(("norm.weight", "norm_f.weight")):
                parameter.fill_(1.0)
        for module in self.modules():
            if isinstance(module, Mamba2Mixer):
                module.reset_state_space(c.time_step_min, c.time_step_max, c.time_step_floor)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, d), the embedding when tied."""
        return self.embeddings.weight if self.lm_head is None else self.lm_head.weight

    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(p.numel() for p in self.parameters())

    def new_cache(
        self,
        slots: int,
        max_length: int,
        *,
        dtype: torch.dtype | None = None,
        page_size: int = 64,
        total_pages: int | None = None,
    ) -> HybridCache:
        """An empty cache for ``slots`` sequences of up to ``max_length`` tokens.

        Args:
            dtype: of the activations; by default that of the weights (pass bfloat16 when running under autocast).
        """
        weight, c = self.embeddings.weight, self.config
        cache = HybridCache(
            slots,
            max_length,
            dtype=dtype or weight.dtype,
            device=weight.device,
            page_size=page_size,
            total_pages=total_pages,
        )
        for kind in c.pattern:
            if kind == "M":
                cache.add_mamba(c.mamba_num_heads, c.mamba_head_dim, c.mamba_num_groups, c.state_size, c.conv_kernel)
            elif kind == "*":
                cache.add_attention(c.num_kv_heads, c.head_dim)
            elif kind == "P":
                cache.add_mamba(c.mamba_num_heads, c.mamba_head_dim, c.mamba_num_groups, c.state_size, c.conv_kernel)
                cache.add_attention(c.num_kv_heads, c.head_dim)
            else:
                cache.add_stateless()
        return cache

    def _pack(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: HybridCache | CacheStep | None,
    ) -> tuple[torch.Tensor, Packing]:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids: got dtype {input_ids.dtype}, want torch.int64 or torch.int32")
        if input_ids.dim() not in (1, 2):
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, want (batch, length) or (tokens,)")
        flat, device = input_ids.reshape(-1), input_ids.device
        total = flat.numel()
        if cu_seqlens is None:
            if isinstance(cache, CacheStep):
                cu_seqlens = cache.cu_seqlens
            else:
                rows, length = (1, total) if input_ids.dim() == 1 else input_ids.shape
                cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
        elif input_ids.dim() == 2 and input_ids.shape[0] != 1:
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)} with cu_seqlens, want (1, T) or (T,)")
        check_cu_seqlens(cu_seqlens, total)
        if total and not 0 <= int(flat.min()) <= int(flat.max()) < self.config.vocab_size:
            raise ValueError(
                f"input_ids: got ids from {int(flat.min())} to {int(flat.max())}, want [0, {self.config.vocab_size})"
            )
        step = cache
        if isinstance(step, HybridCache):
            lengths = cu_seqlens.diff().tolist()
            step = step.step(range(len(lengths)), lengths)
        elif step is not None and not torch.equal(step.cu_seqlens, cu_seqlens):
            raise ValueError("cu_seqlens: differ from those of the cache step")
        if position_ids is None:
            position_ids = positions_of(cu_seqlens, total, None if step is None else step.positions)
        elif position_ids.numel() != total:
            raise ValueError(f"position_ids: got shape {tuple(position_ids.shape)}, want {total} values")
        longest = int(cu_seqlens.diff().max())
        return flat, Packing(cu_seqlens, longest, position_ids.reshape(-1), step)

    def _run(self, flat: torch.Tensor, packing: Packing, stats: bool) -> tuple[torch.Tensor, list[RouterStats]]:
        x = nn.functional.embedding(flat, self.embeddings.weight)
        found: list[RouterStats] = []
        step = packing.cache
        caches = iter(()) if step is None else block_caches(self.config.pattern, step.cache)
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled() and step is None:
                x, routed = _checkpointed(block, x, packing, stats)
            else:
                x, routed = block(x, packing, next(caches, None), stats)
            if routed is not None:
                found.append(routed)
        if step is not None:
            step.commit()
        return self.norm_f(x), found

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: HybridCache | CacheStep | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm: what `logits` and the losses of `foldscan.ops` take.

        Args:
            input_ids: (B, L), or packed (T,) or (1, T), int64 or int32.
            cu_seqlens: (n + 1,) int32 boundaries of packed sequences; without it every row is a sequence.
            position_ids: as many as tokens, for the rotary embedding; by default counted from each sequence's start.
            cache: a step of a cache (`HybridCache.step`), or a whole cache whose slots 0..n-1 the sequences extend.

        Returns:
            The shape of ``input_ids`` with d appended, in the dtype of the weights.

        Raises:
            TypeError, ValueError: name the argument.
        """
        flat, packing = self._pack(input_ids, cu_seqlens, position_ids, cache)
        hidden, _ = self._run(flat, packing, stats=False)
        return hidden.view(*input_ids.shape, self.config.hidden_size)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) to (..., V). For a loss prefer `foldscan.ops.linear_cross_entropy`, which makes no logits."""
        return ops.linear(hidden, self.head_weight)

    def loss_parts(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> LossParts:
        """`loss` with its parts and the load of the experts."""
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, want {tuple(input_ids.shape)} as input_ids")
        flat, packing = self._pack(input_ids, cu_seqlens, position_ids, None)
        hidden, routed = self._run(flat, packing, stats=True)
        cross_entropy = ops.linear_cross_entropy(hidden, self.head_weight, labels.reshape(-1))
        zero = cross_entropy.new_zeros(())
        if not routed:
            return LossParts(cross_entropy, cross_entropy.detach(), zero, zero, None)
        balance = torch.stack([r.load_balancing for r in routed]).mean()
        z = torch.stack([r.z for r in routed]).mean()
        total = cross_entropy + self.config.load_balancing_coef * balance + self.config.router_z_coef * z
        counts = torch.stack([r.counts for r in routed])
        return LossParts(total, cross_entropy.detach(), balance.detach(), z.detach(), counts)

    def loss(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean cross entropy in nats, plus the router losses with the config's coefficients. Logits never exist.

        Args:
            input_ids: (B, L), (T,) or (1, T).
            labels: same shape; ``labels[t]`` is the token to predict at ``input_ids[t]`` (already shifted: the token
                that follows it), or -100 where nothing is to be predicted.
            cu_seqlens, position_ids: as in `forward`.
        """
        return self.loss_parts(input_ids, labels, cu_seqlens=cu_seqlens, position_ids=position_ids).total

    def update_router_bias(self, expert_counts: torch.Tensor) -> None:
        """Shift every router's score correction by ``config.router_bias_rate`` towards an even load.

        Args:
            expert_counts: (expert layers, experts), as in `LossParts`.
        """
        experts = [m for m in self.modules() if isinstance(m, MoE)]
        if expert_counts.shape[0] != len(experts):
            raise ValueError(f"expert_counts: got {expert_counts.shape[0]} rows, want {len(experts)}")
        for module, counts in zip(experts, expert_counts):
            module.shift_bias(counts, self.config.router_bias_rate)


def _checkpointed(
    block: nn.Module, x: torch.Tensor, packing: Packing, stats: bool
) -> tuple[torch.Tensor, RouterStats | None]:
    """Run a block under activation checkpointing; the router's tensors travel as plain outputs."""

    def run(value: torch.Tensor) -> Any:
        out, routed = block(value, packing, None, stats)
        return (out,) if routed is None else (out, routed.load_balancing, routed.z, routed.counts)

    # Nothing in a block draws random numbers, so their state need not be saved.
    result = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    return result[0], RouterStats(*result[1:]) if len(result) > 1 else None
