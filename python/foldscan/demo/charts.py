"""Charts as inline SVG, coloured by the page's CSS variables: lines, bars, heat maps. No script and no library."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """One line: points in data coordinates. ``style`` is a CSS class: ``line-a``, ``line-b``, ``faint``, ``dots-b``."""

    points: Sequence[tuple[float, float]]
    style: str
    label: str = ""


@dataclass(frozen=True)
class Level:
    """A horizontal reference line with a label."""

    value: float
    label: str


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``, about ``count`` of them."""
    span = max(high - low, 1e-12)
    raw = span / max(1, count)
    magnitude = 10 ** math.floor(math.log10(raw))
    step = magnitude * min((m for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw), default=10)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def compact(value: float) -> str:
    """A number for an axis: 1200000 as 1.2M, 0.25 as 0.25."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def smooth(points: Sequence[tuple[float, float]], weight: float = 0.85) -> list[tuple[float, float]]:
    """Exponential moving average without the start's bias."""
    out, average, mass = [], 0.0, 0.0
    for x, y in points:
        average = weight * average + (1 - weight) * y
        mass = weight * mass + (1 - weight)
        out.append((x, average / mass))
    return out


def _open(width: int, height: int, title: str) -> list[str]:
    return [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}" '
        'preserveAspectRatio="xMidYMid meet">'
    ]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    levels: Sequence[Level] = (),
    width: int = 640,
    height: int = 300,
    format_y: Callable[[float], str] = compact,
) -> str:
    """Lines over a common x axis from 0, with reference levels; ranges are chosen to fit."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + [v.value for v in levels]
    if not xs:
        return f'<p class="empty">{html.escape(title)}: no data</p>'
    low, high = min(ys), max(ys)
    pad = 0.08 * (high - low or 1.0)
    low, high, right = low - pad, high + pad, max(xs)
    left, top, bottom, edge = 46, 12, height - 34, width - 14

    def px(x: float) -> float:
        return left + (edge - left) * x / (right or 1.0)

    def py(y: float) -> float:
        return bottom - (bottom - top) * (y - low) / (high - low)

    out = _open(width, height, title)
    for tick in nice_ticks(low, high):
        out.append(f'<line class="grid" x1="{left}" x2="{edge}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        out.append(
            f'<text class="tick" x="{left - 8}" y="{py(tick) + 4:.1f}" text-anchor="end">{format_y(tick)}</text>'
        )
    for tick in nice_ticks(0, right, 6):
        out.append(
            f'<text class="tick" x="{px(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{compact(tick)}</text>'
        )
    out.append(f'<text class="tick" x="{edge}" y="{height - 3}" text-anchor="end">{html.escape(x_label)}</text>')
    for level, y in zip(levels, _spread([py(v.value) for v in levels], 15)):
        at = py(level.value)
        out.append(f'<line class="level" x1="{left}" x2="{edge}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text class="level-label" x="{left + 4}" y="{y - 5:.1f}">{html.escape(level.label)}</text>')
    for item in series:
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in item.points)
        if item.style.startswith("dots"):
            out.append(f'<polyline class="{item.style}" points="{points}"/>')
            out += [f'<circle class="{item.style}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.2"/>' for x, y in item.points]
        else:
            out.append(f'<polyline class="{item.style}" points="{points}"/>')
    out.append("</svg>")
    return "".join(out)


def _spread(positions: list[float], gap: float) -> list[float]:
    """Move labels apart that would overlap, keeping their order."""
    order = sorted(range(len(positions)), key=positions.__getitem__, reverse=True)
    out, limit = list(positions), math.inf
    for index in order:
        out[index] = min(positions[index], limit - gap)
        limit = out[index]
    return out


def bar_chart(groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], *, title: str, unit: str) -> str:
    """Horizontal bars: groups of (label, value, CSS class), each group on its own scale."""
    width, row, label_width = 640, 38, 124
    height = sum(40 + row * len(bars) for _, bars in groups)
    out, y = _open(width, height, title), 0.0
    for name, bars in groups:
        out.append(f'<text class="bar-group" x="0" y="{y + 14}">{html.escape(name)}</text>')
        y += 24
        largest = max((v for _, v, _ in bars), default=0.0) or 1.0
        for label, value, style in bars:
            length = max(2.0, (width - label_width - 110) * value / largest)
            out.append(f'<text class="bar-label" x="0" y="{y + 21}">{html.escape(label)}</text>')
            out.append(
                f'<rect class="{style}" x="{label_width}" y="{y + 3}" width="{length:.1f}" height="{row - 12}" rx="4"/>'
            )
            text = f"{value:,.0f} {unit}"
            out.append(f'<text class="bar-value" x="{label_width + length + 8:.1f}" y="{y + 21}">{text}</text>')
            y += row
        y += 16
    out.append("</svg>")
    return "".join(out)


def heatmap(rows: Sequence[Sequence[float]], *, title: str, x_end: str, ideal: float) -> str:
    """Rows of shares over time. A cell's colour is its share against ``ideal``: none at 0, full at twice the ideal."""
    if not rows or not rows[0]:
        return f'<p class="empty">{html.escape(title)}: no data</p>'
    width, left, cell_height = 640, 34, 17
    columns = len(rows[0])
    cell_width = (width - left) / columns
    height = cell_height * len(rows) + 20
    out = _open(width, height, title)
    for index, row in enumerate(rows):
        y = index * cell_height
        out.append(f'<text class="tick" x="{left - 8}" y="{y + 12.5}" text-anchor="end">{index}</text>')
        for column, share in enumerate(row):
            strength = min(1.0, share / (2 * ideal)) if ideal else 0.0
            out.append(
                f'<rect class="heat" x="{left + column * cell_width:.2f}" y="{y + 1}" width="{cell_width + 0.3:.2f}" '
                f'height="{cell_height - 2}" style="fill-opacity:{0.04 + 0.96 * strength:.3f}">'
                f"<title>expert {index}: {share:.1%}</title></rect>"
            )
    out.append(f'<text class="tick" x="{left}" y="{height - 4}">0</text>')
    out.append(f'<text class="tick" x="{width - 2}" y="{height - 4}" text-anchor="end">{html.escape(x_end)}</text>')
    out.append("</svg>")
    return "".join(out)


def condense(rows: Sequence[Sequence[float]], columns: int) -> list[list[float]]:
    """Average neighbouring values so that each row has at most ``columns``."""
    out = []
    for row in rows:
        n = min(columns, len(row))
        edges = [round(i * len(row) / n) for i in range(n + 1)] if n else []
        out.append([sum(row[a:b]) / (b - a) for a, b in itertools.pairwise(edges)])
    return out
