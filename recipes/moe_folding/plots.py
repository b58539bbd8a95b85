"""The recipe's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Values = dict[str, Any]
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # Paul Tol's bright set
KINDS = {
    "TP": ("TP activations",),
    "CP": ("CP keys and values", "CP scan states", "CP convolution halo"),
    "EP": ("EP tokens",),
    "ETP": ("ETP tokens",),
    "vocabulary": ("vocabulary: embedding", "vocabulary: head", "vocabulary: loss"),
    "gradients, parameters": ("DP gradients, dense", "EDP gradients, experts"),
}
REST = "probabilities, counts, sums"


def per_rank(run: Values, size: float) -> float:
    """Bytes of all ranks in a run, as KB a rank and step."""
    return float(size) / run["ranks"] / len(run["steps"]) / 1e3


def write_plots(runs: list[Values], calibration: list[Values], limits: Values, out: Path) -> list[Path]:
    """``losses.png``, ``bytes.png``, ``load.png`` and ``calibration.png`` in ``out``.

    Args:
        runs: the reference first. calibration: rows of the paper's table. limits: the thresholds.
    """
    losses(runs, limits, out / "losses.png")
    sent([run for run in runs if run["ranks"] > 1], out / "bytes.png")
    load(runs[0], out / "load.png")
    published(calibration, out / "calibration.png")
    return [out / name for name in ("losses.png", "bytes.png", "load.png", "calibration.png")]


def losses(runs: list[Values], limits: Values, file: Path) -> None:
    """The curves, and how far each is from the first."""
    figure, (left, right) = _figure(1, 2, (11, 3.8))
    base = [step["loss"] for step in runs[0]["steps"]]
    numbers = [step["step"] for step in runs[0]["steps"]]
    for index, run in enumerate(runs):
        colour = "black" if run["control"] else COLOURS[index % len(COLOURS)]
        curve = [step["loss"] for step in run["steps"]]
        if index == 0:  # broad and pale below the others, so that all can be seen where they are equal
            left.plot(numbers, curve, color=colour, linewidth=7, alpha=0.3, label=run["name"])
            continue
        left.plot(numbers, curve, color=colour, linewidth=1, label=run["name"])
        apart = [max(abs(a - b), 1e-9) for a, b in zip(curve, base)]
        right.plot(numbers, apart, color=colour, marker=".", markersize=3, linewidth=1, label=run["name"])
    first = limits["loss_first_steps"]
    right.hlines(
        limits["loss"]["most"],
        0,
        numbers[-1],
        color="black",
        linestyle="--",
        linewidth=1,
        label="thresholds:\nfirst steps, all",
    )
    right.hlines(first["most"], 0, first["steps"], color="black", linestyle="--", linewidth=1)
    right.set_yscale("log")
    left.set(xlabel="step", ylabel="nats a token", title="training loss")
    right.set(xlabel="step", ylabel="difference, nats", title="difference from one process (0 drawn at 1e-9)")
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, file)


def sent(runs: list[Values], file: Path) -> None:
    """Measured bytes by collective beside the plan's, and the expert exchange in and out of the node."""
    figure, (left, right) = _figure(1, 2, (12, 3.8))
    names = [run["name"] for run in runs]
    start = [0.0] * len(runs)
    for index, kind in enumerate([*KINDS, REST]):
        sizes = [sum(per_rank(run, line["measured"]) for line in run["bytes"] if kind_of(line) == kind) for run in runs]
        left.barh(names, sizes, left=start, color=COLOURS[index], label=kind)
        start = [a + b for a, b in zip(start, sizes)]
    planned = [sum(per_rank(run, line["even"]) for line in run["bytes"]) for run in runs]
    left.scatter(planned, names, marker="|", s=260, color="black", zorder=3, label="planned, even routing")
    left.set(xlabel="KB a rank sends in a step", title="all collectives, measured")
    exchange = [[line for line in run["bytes"] if line["name"] in ("EP tokens", "ETP tokens")] for run in runs]
    off = [sum(per_rank(run, line["measured_inter"]) for line in lines) for run, lines in zip(runs, exchange)]
    whole = [sum(per_rank(run, line["measured"]) for line in lines) for run, lines in zip(runs, exchange)]
    inside = [a - b for a, b in zip(whole, off)]
    right.barh(names, inside, color=COLOURS[0], label="in the node")
    right.barh(names, off, left=inside, color=COLOURS[1], label="off the node")
    planned = [sum(per_rank(run, line["even"]) for line in lines) for run, lines in zip(runs, exchange)]
    right.scatter(planned, names, marker="|", s=260, color="black", zorder=3, label="planned, even routing")
    right.set(xlabel="KB a rank sends in a step", title="tokens to experts and back, measured")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.set_xlim(0, 1.06 * max(axes.dataLim.x1, 1e-9))
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, markerscale=0.5)
    _save(figure, file)


def kind_of(line: Values) -> str:
    return next((kind for kind, names in KINDS.items() if line["name"] in names), REST)


def load(run: Values, file: Path) -> None:
    """Each expert's share over the steps, a panel for each expert layer."""
    found = [step["expert_load"] for step in run["steps"]]
    layers, experts = len(found[0]), len(found[0][0])
    figure, panels = _figure(layers, 1, (8, 1.1 + 1.7 * layers))
    for layer, axes in enumerate(panels):
        shares = [[experts * step[layer][expert] for step in found] for expert in range(experts)]
        image = axes.imshow(
            shares,
            aspect="auto",
            cmap="cividis",
            vmin=0,
            vmax=2,
            interpolation="nearest",
            extent=(0.5, len(found) + 0.5, experts - 0.5, -0.5),
        )
        axes.set(ylabel="expert", yticks=range(experts), title=f"expert layer {layer + 1}")
    panels[-1].set_xlabel("step")
    figure.colorbar(image, ax=panels, label="load, mean = 1")
    _save(figure, file)


def published(rows: list[Values], file: Path) -> None:
    """Predicted MFU over published MFU."""
    figure, panels = _figure(1, 2, (10, 4.4))
    rows = [row for row in rows if row["published"] is not None]
    models = sorted({row["model"] for row in rows})
    for axes, name, title in zip(panels, ("hand_set", "fitted"), ("hand-set constants", "fitted on this table")):
        axes.plot([2, 60], [2, 60], color="grey", linewidth=1)
        for index, model in enumerate(models):
            for folded, marker in ((True, "*"), (False, "o")):
                chosen = [r for r in rows if r["model"] == model and (r["method"] == "folded") == folded]
                x, y = [100 * r["published"] for r in chosen], [100 * r[name] for r in chosen]
                label = model if not folded else None
                axes.scatter(x, y, color=COLOURS[index], marker=marker, s=90 if folded else 30, label=label)
        axes.set(xscale="log", yscale="log", xlabel="published MFU, %", ylabel="modelled MFU, %", title=title)
        ticks = [2, 5, 10, 20, 50]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_yticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
    panels[0].scatter([], [], color="black", marker="*", s=90, label="folded")
    panels[0].legend(fontsize=8, loc="upper left")
    _save(figure, file)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=90)
