"""Other people's model formats as patterns of the same blocks."""

from foldscan.models.layouts.bamba import Bamba, FalconH1
from foldscan.models.layouts.base import CannotExpress, Layout, Source
from foldscan.models.layouts.llama import LLAMA_LIKE
from foldscan.models.layouts.mamba2 import Mamba2
from foldscan.models.layouts.native import Native
from foldscan.models.layouts.nemotron_h import NemotronH

LAYOUTS: dict[str, Layout] = {
    layout.model_type: layout for layout in (NemotronH(), *LLAMA_LIKE, Mamba2(), Bamba(), FalconH1(), Native())
}
"""By ``model_type``, in the order in which `save_pretrained` tries them; our own comes last and takes every model."""

__all__ = ["LAYOUTS", "CannotExpress", "Layout", "Source"]
