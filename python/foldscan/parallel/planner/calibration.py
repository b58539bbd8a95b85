"""The planner beside published figures: Table 3 of arXiv:2504.14960."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log, sqrt

from foldscan.parallel.planner.cluster import Cluster, Constants
from foldscan.parallel.planner.mapping import Mapping, Workload
from foldscan.parallel.planner.plan import Prediction, predict
from foldscan.parallel.planner.shapes import load_model, read_data


@dataclass(frozen=True)
class CalibrationRow:
    """One line of the table.

    Attributes:
        published: MFU, 0 to 1; None where the paper ran out of memory.
        prediction: of the same mapping.
    """

    published: float | None
    prediction: Prediction


def calibration(constants: Constants | None = None, cluster: Cluster | None = None) -> list[CalibrationRow]:
    """Every line of the table with the prediction of its mapping, in the table's order.

    Args:
        constants: the fitted set by default, whose ten numbers were fitted on these very lines.
        cluster: H100 by default, as in the paper.
    """
    data = read_data("calibration.yaml")
    work = Workload(data["gbs"], data["seq"])
    rows = []
    for line in data["rows"]:
        sizes = {axis: line.get(axis, 1) for axis in ("tp", "cp", "ep", "pp")}
        etp = 1 if line["method"] == "folded" else sizes["tp"]
        mapping = Mapping(line["gpus"], etp=etp, method=line["method"], **sizes)
        published = None if line["mfu"] is None else line["mfu"] / 100
        rows.append(CalibrationRow(published, predict(load_model(line["model"]), mapping, work, cluster, constants)))
    return rows


def pairs_in_order(rows: Sequence[CalibrationRow]) -> tuple[int, int]:
    """Pairs of methods for the same model whose order is predicted as published, and how many pairs there are."""
    right = pairs = 0
    for a, b in combinations([row for row in rows if row.published is not None], 2):
        if a.prediction.model.name == b.prediction.model.name:
            assert a.published is not None and b.published is not None
            pairs += 1
            right += (a.published < b.published) == (a.prediction.mfu < b.prediction.mfu)
    return right, pairs


def rms_log_error(rows: Sequence[CalibrationRow]) -> float:
    """Root mean square of log(predicted / published) over the lines that have an MFU: 0.15 is about 15 %."""
    logs = [log(row.prediction.mfu / row.published) for row in rows if row.published is not None]
    return sqrt(sum(x * x for x in logs) / len(logs))


def calibration_table(fitted: Sequence[CalibrationRow], hand_set: Sequence[CalibrationRow]) -> str:
    """The table in Markdown: published MFU, and predicted with either set of constants."""
    lines = [
        "| Model | GPUs | Mapping | Published MFU % | Fitted | Hand-set | Memory GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for a, b in zip(fitted, hand_set):
        p = a.prediction
        published = "out of memory" if a.published is None else f"{100 * a.published:.1f}"
        m = p.mapping
        sizes = " ".join(f"{axis}{getattr(m, axis)}" for axis in ("tp", "cp", "ep", "etp", "pp"))
        lines.append(
            f"| {p.model.name} | {m.gpus} | {m.method} {sizes} | {published} | {100 * p.mfu:.1f} | "
            f"{100 * b.prediction.mfu:.1f} | {p.memory.total / 1e9:.0f} |"
        )
    scores = []
    for rows in (fitted, hand_set):
        right, pairs = pairs_in_order(rows)
        scores.append((f"{right} of {pairs}", f"{100 * rms_log_error(rows):.1f} %"))
    lines.append(f"| pairs in published order | | | | {scores[0][0]} | {scores[1][0]} | |")
    lines.append(f"| RMS log error | | | | {scores[0][1]} | {scores[1][1]} | |")
    return "\n".join(lines)
