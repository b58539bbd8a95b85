"""Hardware, and how much of it kernels and collectives reach."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from foldscan.parallel.planner.shapes import read_data

T = TypeVar("T", "Cluster", "Constants")


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs.

    Attributes:
        gpus_per_node: GPUs that NVLink joins.
        peak: dense BF16 FLOP/s of a GPU.
        nvlink, infiniband: B/s a GPU, one way, inside a node and out of it.
        hbm: B/s of a GPU's memory that kernels reach.
        nvlink_latency, infiniband_latency: s a collective takes whatever its size; the second where bytes cross nodes.
        memory: B of a GPU that a job may use.
        source: where the numbers are from.
    """

    gpus_per_node: int
    peak: float
    nvlink: float
    infiniband: float
    hbm: float
    nvlink_latency: float
    infiniband_latency: float
    memory: float
    source: str = ""

    def __post_init__(self) -> None:
        _check_numbers(self, zero=("nvlink_latency", "infiniband_latency"), shares=())
        if not isinstance(self.gpus_per_node, int):
            raise ValueError(f"gpus_per_node: got {self.gpus_per_node!r}, want an integer")


@dataclass(frozen=True)
class Constants:
    """The ten tunable constants of the step-time model.

    Attributes:
        gemm_efficiency: share of the peak that a large GEMM reaches.
        rows_half, columns_half: rows, and columns or depth, at which a GEMM has half of its efficiency.
        attention_efficiency: share of the peak that fused attention reaches.
        nvlink_share, infiniband_share: share of a link's speed that collectives reach.
        fixed: s a layer and micro-batch, forward and backward, that nothing else explains.
        tp_overlap, dp_overlap: share of these collectives that compute hides.
        fsdp_overlap: share of a layer's compute that hides FSDP's collectives.
        source: where the numbers are from.
    """

    gemm_efficiency: float
    rows_half: float
    columns_half: float
    attention_efficiency: float
    nvlink_share: float
    infiniband_share: float
    fixed: float
    tp_overlap: float
    dp_overlap: float
    fsdp_overlap: float
    source: str = ""

    def __post_init__(self) -> None:
        overlaps = ("tp_overlap", "dp_overlap", "fsdp_overlap")
        shares = ("gemm_efficiency", "attention_efficiency", "nvlink_share", "infiniband_share", *overlaps)
        _check_numbers(self, zero=("rows_half", "columns_half", "fixed", *overlaps), shares=shares)


def load_cluster(source: str | os.PathLike[str] = "h100") -> Cluster:
    """A cluster by name (``h100``), or from a YAML file with the fields of `Cluster`.

    Raises:
        ValueError: no such name or file, or a field that is missing, unknown or impossible.
    """
    return _load(Cluster, source, read_data("constants.yaml")["clusters"], "cluster")


def load_constants(source: str | os.PathLike[str] | None = None) -> Constants:
    """Constants by name (``fitted``, ``hand-set``), or from a YAML file with the fields of `Constants`.

    None is the fitted set, which has the smaller error on the calibration table (see `calibration`).

    Raises:
        ValueError: no such name or file, or a field that is missing, unknown or impossible.
    """
    data = read_data("constants.yaml")
    return _load(Constants, data["default"] if source is None else source, data["constants"], "constants")


def _load(kind: type[T], source: str | os.PathLike[str], known: dict[str, Any], argument: str) -> T:
    if str(source) in known:
        return kind(**known[str(source)])
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{argument}: got {str(source)!r}, want a YAML file or {' or '.join(known)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: {path} is no YAML ({' '.join(str(error).split())})") from None
    names = [f.name for f in fields(kind)]
    given = set(values) if isinstance(values, dict) else set()
    wrong = sorted(given - set(names)) + [n for n in names if n not in given and n != "source"]
    if not isinstance(values, dict) or wrong:
        raise ValueError(
            f"{argument}: {path} has {', '.join(wrong)} missing or unknown, want the fields {', '.join(names)}"
        )
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{argument}: {path}: {error}") from None


def _check_numbers(values: Cluster | Constants, zero: tuple[str, ...], shares: tuple[str, ...]) -> None:
    for field in fields(values):
        value = getattr(values, field.name)
        if field.name == "source":
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"{field.name}: got {value!r}, want a number (YAML wants 1.0e+9, not 1e9)")
        if value == 0 and field.name not in zero:
            raise ValueError(f"{field.name}: got 0, want more")
        if field.name in shares and value > 1:
            raise ValueError(f"{field.name}: got {value}, want at most 1")
