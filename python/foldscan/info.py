"""What this installation is: versions, instruction sets, threads."""

from __future__ import annotations

import platform
from typing import Any

import torch

from foldscan import __version__, _native


def report() -> dict[str, Any]:
    """The capability report as plain data.

    Returns:
        ``version``; ``isa`` (in use), ``isa_available`` and ``isa_missing`` (what each of the others lacks here);
        ``software_tiles`` (whether ``avx512_amx`` runs on a tile unit in software, for tests); ``threads`` (of
        PyTorch's pool, which runs the kernels); ``torch``, ``python``, ``machine``, ``compiler``; ``cuda`` (whether
        this build holds CUDA kernels).
    """
    return {
        "version": __version__,
        **_native.capabilities(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
