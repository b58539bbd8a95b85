"""Predictions as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foldscan.parallel.planner.plan import Prediction, ScalePoint
from foldscan.parallel.planner.step_time import TERMS

COLOURS = {
    "folded": "tab:blue",
    "unfolded": "tab:orange",
    "tp-ep-dp": "tab:green",
    "fsdp": "tab:red",
    "fsdp-ep": "tab:purple",
}
BARS = 8


def plot_mappings(ranked: Sequence[Prediction], file: str | Path) -> None:
    """MFU against memory of every mapping, and what the step of the best ones consists of.

    Args:
        ranked: as `plan` returns it, not empty.
        file: where to, ``.png``, ``.svg`` or ``.pdf``.
    """
    figure, (left, right) = _figure(file, columns=2, width=14)
    for method, colour in COLOURS.items():
        chosen = [p for p in ranked if p.mapping.method == method]
        memory, share = [p.memory.total / 1e9 for p in chosen], [100 * p.mfu for p in chosen]
        if chosen:
            left.scatter(memory, share, s=12, color=colour, alpha=0.6, label=f"{method} ({len(chosen)})")
    best, work = ranked[0], ranked[0].work
    left.scatter([best.memory.total / 1e9], [100 * best.mfu], s=120, facecolors="none", edgecolors="black")
    left.axvline(best.machine.cluster.memory / 1e9, color="grey", linestyle=":")
    left.set(xlabel="memory, GB", ylabel="modelled MFU, %", ylim=(0, None))
    left.set_title(f"{best.model.name}, {best.mapping.gpus} GPUs, GBS {work.gbs}, {work.seq} tokens")
    left.legend()

    unfolded = next((i for i, p in enumerate(ranked) if p.mapping.method != "folded"), 0)
    places = sorted({*range(min(BARS, len(ranked))), unfolded})
    shown = [ranked[i] for i in places]
    labels = [f"{place + 1}. {p.mapping}".replace(" pp", "\npp") for place, p in zip(places, shown)]
    start = [0.0] * len(shown)
    palette = _palette()
    for index, term in enumerate(TERMS):
        seconds = [p.terms[term] for p in shown]
        if any(seconds):
            right.barh(labels, seconds, left=start, label=term, color=palette[index % len(palette)])
            start = [a + b for a, b in zip(start, seconds)]
    right.invert_yaxis()
    right.set(xlabel="modelled seconds a step", title="the best, and the best without folding")
    right.legend(fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, file)


def plot_scale(points: Sequence[ScalePoint], file: str | Path) -> None:
    """MFU over GPU counts: the best mapping, and the best without folding.

    Raises:
        ValueError: no GPU count has a mapping.
    """
    first = next((point.folded for point in points if point.folded), None)
    if first is None:
        raise ValueError("scale: got no GPU count with a mapping that fits, want at least one")
    figure, (axes,) = _figure(file, columns=1, width=8)
    for label, name, colour in (
        ("best mapping", "folded", COLOURS["folded"]),
        ("best without folding", "unfolded", COLOURS["unfolded"]),
    ):
        found = [(point.gpus, getattr(point, name)) for point in points if getattr(point, name)]
        axes.plot([g for g, _ in found], [100 * p.mfu for _, p in found], marker="o", color=colour, label=label)
        above = name == "folded"
        for gpus, p in found:
            m = p.mapping
            axes.annotate(
                f"tp{m.tp} cp{m.cp} pp{m.pp}\nep{m.ep} etp{m.etp}",
                (gpus, 100 * p.mfu),
                xytext=(0, 8 if above else -8),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=7,
            )
    counts = [point.gpus for point in points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.margins(x=0.08)
    axes.set(xlabel="GPUs", ylabel="modelled MFU, %", title=f"{first.model.name}, {first.work.seq} tokens a sequence")
    top = max(100 * p.mfu for point in points for p in (point.folded, point.unfolded) if p)
    axes.set_ylim(0, 1.2 * top)
    axes.legend(loc="lower left")
    _save(figure, file)


def _figure(file: str | Path, columns: int, width: float) -> tuple[Any, list[Any]]:
    if Path(file).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"plot: got {str(file)!r}, want a file name that ends in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot: needs matplotlib (pip install foldscan[train])") from None
    figure = Figure(figsize=(width, 5), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _palette() -> list[Any]:
    from matplotlib import colormaps

    return list(colormaps["tab20"].colors)  # type: ignore[attr-defined]


def _save(figure: Any, file: str | Path) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches="tight")
