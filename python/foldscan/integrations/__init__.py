"""foldscan's kernels inside other libraries' models."""
