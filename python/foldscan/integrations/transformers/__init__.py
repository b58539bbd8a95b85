"""Hugging Face transformers on foldscan's kernels: `accelerate` a model in place, `restore` it."""

from foldscan.integrations.transformers.accelerate import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
