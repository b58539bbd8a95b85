"""The public operators: PyTorch functions over the compiled kernels, one file a family."""

from foldscan.ops._backend import backend, current_backend
from foldscan.ops.attention import flash_attn_func, flash_attn_varlen_func, merge_attention
from foldscan.ops.attention_cache import flash_attn_with_kvcache, kv_cache_append
from foldscan.ops.linear import linear

__all__ = [
    "backend",
    "current_backend",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "kv_cache_append",
    "linear",
    "merge_attention",
]
