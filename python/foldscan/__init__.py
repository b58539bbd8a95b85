"""foldscan: kernels and systems for hybrid language models (Mamba-2, attention, MLP, Mixture of Experts)."""

__version__ = "0.1.0"
