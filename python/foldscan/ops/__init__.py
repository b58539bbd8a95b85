"""The public operators: PyTorch functions over the compiled kernels, one file a family."""

from foldscan.ops._backend import backend, current_backend
from foldscan.ops._packed import clear_packed_weights
from foldscan.ops.attention import flash_attn_func, flash_attn_varlen_func, merge_attention
from foldscan.ops.attention_cache import flash_attn_with_kvcache, kv_cache_append
from foldscan.ops.linear import linear
from foldscan.ops.linear_joined import linear_joined
from foldscan.ops.losses import TokenStats, linear_cross_entropy, linear_kl_div, linear_logprob
from foldscan.ops.moe import grouped_mm, moe_mlp
from foldscan.ops.moe_routing import (
    Permutation,
    expert_capacity,
    load_balancing_loss,
    permute,
    router_z_loss,
    topk_route,
    unpermute,
)
from foldscan.ops.norm import rmsnorm_fn
from foldscan.ops.pruning import (
    Compressed24,
    channel_scores,
    compress_2_4,
    group_topk_mask,
    linear_2_4,
    sparsity_mask_2_4,
)
from foldscan.ops.rotary import rotary_embedding
from foldscan.ops.selective_scan import selective_scan_fn
from foldscan.ops.ssm_conv import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from foldscan.ops.ssm_extend import ScanCache, mamba_chunk_scan_extend
from foldscan.ops.ssm_scan import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined, selective_state_update

__all__ = [
    "Compressed24",
    "Permutation",
    "ScanCache",
    "TokenStats",
    "backend",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "channel_scores",
    "clear_packed_weights",
    "compress_2_4",
    "current_backend",
    "expert_capacity",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "group_topk_mask",
    "grouped_mm",
    "kv_cache_append",
    "linear",
    "linear_2_4",
    "linear_cross_entropy",
    "linear_joined",
    "linear_kl_div",
    "linear_logprob",
    "load_balancing_loss",
    "mamba_chunk_scan_combined",
    "mamba_chunk_scan_extend",
    "mamba_split_conv1d_scan_combined",
    "merge_attention",
    "moe_mlp",
    "permute",
    "rmsnorm_fn",
    "rotary_embedding",
    "router_z_loss",
    "selective_scan_fn",
    "selective_state_update",
    "sparsity_mask_2_4",
    "topk_route",
    "unpermute",
]
