"""The hybrid language model and its checkpoints."""

from foldscan.models.config import HybridConfig
from foldscan.models.files import FormatError
from foldscan.models.hybrid_lm import HybridLM, LossParts
from foldscan.models.layouts import CannotExpress
from foldscan.models.pretrained import load_pretrained, save_pretrained
from foldscan.models.upcycle import upcycle

__all__ = [
    "CannotExpress",
    "FormatError",
    "HybridConfig",
    "HybridLM",
    "LossParts",
    "load_pretrained",
    "save_pretrained",
    "upcycle",
]
