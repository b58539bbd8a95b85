"""Modules over packed token lists (T, d). Each calls one foldscan op per computation and holds only parameters."""

from foldscan.nn.attention import Attention
from foldscan.nn.cache import AttentionCache, CacheStep, HybridCache, MambaCache
from foldscan.nn.linear import Linear, RMSNorm
from foldscan.nn.mamba2 import GatedRMSNorm, Mamba2Mixer
from foldscan.nn.mlp import MLP
from foldscan.nn.moe import Experts, MoE, Router, RouterStats
from foldscan.nn.packing import Context, Packing, check_cu_seqlens, positions_of
from foldscan.nn.rotary import RotaryEmbedding

__all__ = [
    "MLP",
    "Attention",
    "AttentionCache",
    "CacheStep",
    "Context",
    "Experts",
    "GatedRMSNorm",
    "HybridCache",
    "Linear",
    "Mamba2Mixer",
    "MambaCache",
    "MoE",
    "Packing",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "RouterStats",
    "check_cu_seqlens",
    "positions_of",
]
