"""Predictions as text: the ranking, what a step consists of, what is sent, and why the first mapping wins."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from foldscan.parallel.planner.plan import Prediction, ScalePoint, compare, reasons
from foldscan.parallel.planner.step_time import TERMS

MODELLED = "Modelled, not measured"
SENT = {
    "ep": "EP dispatch, combine",
    "etp": "ETP gather, scatter",
    "probs": "probabilities",
    "metadata": "choices and counts",
    "tp": "TP gather, scatter",
    "vocabulary": "embedding, head",
    "cp": "CP exchange",
    "pp": "PP activations",
    "dp": "DP dense",
    "edp": "EDP experts",
}


def print_ranking(console: Console, ranked: Sequence[Prediction], top: int) -> None:
    """The quickest mappings, and the best without folding where it is not among them."""
    shown = list(ranked[:top])
    unfolded = next((p for p in ranked if p.mapping.method != "folded"), None)
    if unfolded is not None and unfolded not in shown:
        shown.append(unfolded)
    place = {id(p): i + 1 for i, p in enumerate(ranked)}
    table = Table(title=f"{MODELLED}: {len(ranked)} mappings fit", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("method")
    for name in (
        "tp",
        "cp",
        "dp",
        "pp",
        "ep",
        "etp",
        "edp",
        "step s",
        "MFU %",
        "TFLOP/s",
        "memory GB",
        "GB sent",
        "off node",
    ):
        table.add_column(name, justify="right")
    for p in shown:
        m, sent = p.mapping, [volume.total for volume in p.volumes.values()]
        table.add_row(
            str(place[id(p)]),
            m.method,
            *(str(size) for size in (m.tp, m.cp, m.dp, m.pp, m.ep, m.etp, m.edp)),
            f"{p.seconds:.4g}",
            f"{100 * p.mfu:.1f}",
            f"{p.tflops:.0f}",
            f"{p.memory.total / 1e9:.1f}",
            _gigabytes(sum(t.total for t in sent)),
            _gigabytes(sum(t.inter for t in sent)),
        )
    console.print(table)


def print_details(console: Console, p: Prediction) -> None:
    """One mapping: where its step goes, what a rank sends, memory, and the dispatcher that suits it."""
    console.print(f"\n{p.mapping}, {p.dispatcher}: modelled {p.seconds:.4g} s a step, MFU {100 * p.mfu:.1f} %")
    table = Table(title="Step", title_justify="left")
    table.add_column("term")
    table.add_column("ms", justify="right")
    table.add_column("%", justify="right")
    for term, about in TERMS.items():
        if p.terms[term]:
            table.add_row(about, f"{1e3 * p.terms[term]:.4g}", f"{100 * p.terms[term] / p.seconds:.1f}")
    console.print(table)

    table = Table(title="GB a rank sends in a step", title_justify="left")
    table.add_column("collective")
    for name in ("forward in node", "off node", "backward in node", "off node"):
        table.add_column(name, justify="right")
    for name, volume in p.volumes.items():
        if volume.total.total:
            both = (volume.forward.intra, volume.forward.inter, volume.backward.intra, volume.backward.inter)
            table.add_row(SENT[name], *map(_gigabytes, both))
    console.print(table)

    m, limit = p.memory, p.machine.cluster.memory
    console.print(
        f"Memory {m.total / 1e9:.1f} of {limit / 1e9:.1f} GB: "
        f"dense {m.dense / 1e9:.1f}, experts {m.experts / 1e9:.1f}, "
        f"activations {m.activations / 1e9:.1f}, buffers {m.buffers / 1e9:.1f}" + ("" if p.fits else "; does not fit")
    )
    if p.advice is not None:
        console.print(f"Dispatcher: {p.advice.dispatcher}. {p.advice.reason[0].upper()}{p.advice.reason[1:]}.")


def print_reasons(console: Console, ranked: Sequence[Prediction], asked: Prediction | None = None) -> None:
    """Why the winner wins: against the runner-up and the best without folding, or against the mapping asked for."""
    winner = ranked[0]
    texts = reasons(ranked) if asked is None else []
    if asked is not None and asked.mapping != winner.mapping:
        texts = [compare(winner, asked)]
    for text in texts:
        console.print(f"The best, {winner.mapping}, is {text}.")


def print_scale(console: Console, points: Sequence[ScalePoint]) -> None:
    """The best mappings over GPU counts."""
    table = Table(title=f"{MODELLED}: the best mapping of each GPU count", title_justify="left")
    for name in ("GPUs", "GBS", "MFU %", "step s"):
        table.add_column(name, justify="right")
    table.add_column("mapping")
    table.add_column("unfolded MFU %", justify="right")
    table.add_column("unfolded mapping")
    for point in points:
        best, other = point.folded, point.unfolded
        table.add_row(
            f"{point.gpus:,}",
            f"{point.gbs:,}",
            f"{100 * best.mfu:.1f}" if best else "-",
            f"{best.seconds:.4g}" if best else "-",
            str(best.mapping) if best else "none fits",
            f"{100 * other.mfu:.1f}" if other else "-",
            str(other.mapping) if other else "none fits",
        )
    console.print(table)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}" if size else "0"
