"""The public operators: PyTorch functions over the compiled kernels, one file a family."""

from foldscan.ops._backend import backend, current_backend
from foldscan.ops.linear import linear

__all__ = ["backend", "current_backend", "linear"]
