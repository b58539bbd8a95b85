"""The public operators: PyTorch functions over the compiled kernels, one file a family."""

from foldscan.ops._backend import backend, current_backend
from foldscan.ops.attention import flash_attn_func, flash_attn_varlen_func, merge_attention
from foldscan.ops.attention_cache import flash_attn_with_kvcache, kv_cache_append
from foldscan.ops.linear import linear
from foldscan.ops.moe import (
    Permutation,
    expert_capacity,
    grouped_mm,
    load_balancing_loss,
    moe_mlp,
    permute,
    router_z_loss,
    topk_route,
    unpermute,
)

__all__ = [
    "Permutation",
    "backend",
    "current_backend",
    "expert_capacity",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "grouped_mm",
    "kv_cache_append",
    "linear",
    "load_balancing_loss",
    "merge_attention",
    "moe_mlp",
    "permute",
    "router_z_loss",
    "topk_route",
    "unpermute",
]
