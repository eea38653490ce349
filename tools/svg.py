"""Figures as SVG text, for tools/report.py: lines and stacked bars over iterations, with round numbers at their axes.

Colours are CSS classes, so one figure serves a light and a dark page.  What the page's script shows under the pointer
stands in data-points, as JSON.  Every name is escaped here: callers hand in plain text.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 46, 10, 10, 34


def text(value: Any) -> str:
    """Make untrusted text fit for HTML: escaped, control characters and halves of surrogate pairs made visible."""
    visible = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), str(value))
    return html.escape(re.sub("[\x7f-\x9f\ud800-\udfff]", "\ufffd", visible))


def evenly(total: int, count: int) -> list[int]:
    """Choose `count` of `total` places at even distances, first and last among them; the last, if only one."""
    return [total - 1] if count == 1 else sorted({round(i * (total - 1) / (count - 1)) for i in range(count)})


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """List round numbers from `low` or below to `high` or above. Example: (0.1, 0.52) -> [0.0, 0.2, 0.4, 0.6]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, max(last, first + 1) + 1)]


def shown(value: float, kind: str, digits: int = 4) -> str:
    """Write a value as it stands beside an axis or in a tooltip."""
    if kind == "share":
        return f"{100 * value:.{digits}g} %" if value else "0 %"
    size = abs(value)
    if 1000 <= size < 1e6:
        return f"{value:.0f}".replace("-", "−")
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def thinned(values: dict[int, float], points: int) -> dict[int, float]:
    """Keep at most `points` of the values, at even distances."""
    at = list(values)
    return values if len(at) <= points else {at[i]: values[at[i]] for i in evenly(len(at), points)}


def chart(
    title: str,
    series: Sequence[tuple[str, str, dict[int, float]]],
    kind: str = "number",
    reference: float | None = None,
    axis: str = "iteration",
) -> str:
    """Draw a figure of lines; `series` are (name, CSS class, values by iteration)."""
    series = [(name, colour, values) for name, colour, values in series if values]
    if not series:
        return ""
    every = [value for _, _, values in series for value in values.values()]
    every += [] if reference is None else [reference]
    low, high = min(every), max(every)
    grid = ticks(min(low, 0.0) if low < 0.5 * high or kind == "share" and high < 0.3 else low, high)
    x_of, y_of = _scales([at for _, _, values in series for at in values], grid)
    parts = [_axes(grid, y_of, kind)]
    if reference is not None:
        parts.append(f'<path class="reference" d="M{LEFT} {y_of(reference):.1f}H{WIDTH - RIGHT}"/>')
    for _, colour, values in series:
        path = " ".join(f"{x_of(at):.1f},{y_of(value):.1f}" for at, value in values.items())
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        if len(values) <= 40:
            dots = "".join(f"M{x_of(at):.1f} {y_of(value):.1f}h0" for at, value in values.items())
            parts.append(f'<path class="dots {colour}" d="{dots}"/>')
    latest = (
        f'<span class="latest">{shown(list(series[0][2].values())[-1], kind, 3)}</span>' if len(series) == 1 else ""
    )
    hover = [
        [name, colour, {at: shown(value, kind) for at, value in values.items()}] for name, colour, values in series
    ]
    return _figure(title, latest, "".join(parts), hover, x_of, axis)


def stack(title: str, parts: Sequence[tuple[str, str, dict[int, float]]], kind: str, axis: str = "iteration") -> str:
    """Draw a figure of stacked bars; `parts` are (name, CSS class, values by iteration), from below."""
    parts = [(name, colour, values) for name, colour, values in parts if any(values.values())]
    if not parts:
        return ""
    at_all = sorted({at for _, _, values in parts for at in values})
    total = {at: sum(values.get(at, 0.0) for _, _, values in parts) for at in at_all}
    grid = ticks(0.0, max(total.values()))
    x_of, y_of = _scales([at_all[0] - 0.5, at_all[-1] + 0.5], grid)
    wide = max(0.5, 0.78 * (WIDTH - LEFT - RIGHT) / (at_all[-1] - at_all[0] + 1))
    if len(at_all) > 1:
        wide = max(wide, 0.6 * (WIDTH - LEFT - RIGHT) / len(at_all))
    drawn, base = [_axes(grid, y_of, kind)], dict.fromkeys(at_all, 0.0)
    for _, colour, values in parts:
        bars = ""
        for at, value in values.items():
            bars += (
                f"M{x_of(at) - wide / 2:.1f} {y_of(base[at]):.1f}V{y_of(base[at] + value):.1f}h{wide:.1f}"
                f"V{y_of(base[at]):.1f}z"
            )
            base[at] += value
        drawn.append(f'<path class="bars {colour}" d="{bars}"/>')
    unit = " s" if kind == "seconds" else ""
    hover = [[name, colour, {at: shown(v, kind) + unit for at, v in values.items()}] for name, colour, values in parts]
    key = "".join(f'<span><i class="dot {colour}"></i>{text(name)}</span>' for name, colour, _ in parts)
    return _figure(title, "", "".join(drawn), hover[::-1], x_of, axis, f'<p class="key">{key}</p>')


def _scales(at: Sequence[float], grid: Sequence[float]) -> tuple[Callable[[float], float], Callable[[float], float]]:
    first, last = min(at), max(at)
    across, up = (last - first) or 1, grid[-1] - grid[0]
    return (
        lambda x: LEFT + (x - first) / across * (WIDTH - LEFT - RIGHT) if last > first else (LEFT + WIDTH - RIGHT) / 2,
        lambda y: HEIGHT - BOTTOM - (y - grid[0]) / up * (HEIGHT - TOP - BOTTOM),
    )


def _axes(grid: Sequence[float], y_of: Callable[[float], float], kind: str) -> str:
    """Draw grid lines, and the numbers at the upright axis."""
    lines = "".join(f"M{LEFT} {y_of(y):.1f}H{WIDTH - RIGHT}" for y in grid)
    labels = "".join(
        f'<text x="{LEFT - 6}" y="{y_of(y) + 3.5:.1f}" text-anchor="end">{shown(y, kind)}</text>' for y in grid
    )
    return f'<path class="grid" d="{lines}"/>{labels}'


def _figure(
    title: str, latest: str, drawn: str, hover: list, x_of: Callable[[float], float], axis: str, key: str = ""
) -> str:
    at_all = sorted({at for _, _, values in hover for at in values})
    first, last = at_all[0], at_all[-1]
    marks = [at for at in ticks(first, last, 5) if first <= at <= last and at == int(at)]
    marks = marks or [first]
    bottom = "".join(
        f'<text x="{x_of(at):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{at:.0f}</text>' for at in marks
    )
    bottom += f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{text(axis)} →</text>'
    points = json.dumps(
        {
            "at": at_all,
            "x": [round(x_of(at), 1) for at in at_all],
            "series": [[name, colour, [values.get(at) for at in at_all]] for name, colour, values in hover],
            "axis": axis,
        },
        separators=(",", ":"),
    )
    return (
        f'<figure class="chart"><figcaption><span>{text(title)}</span>{latest}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}" '
        f'data-points="{html.escape(points)}">{drawn}{bottom}<path class="cursor" d=""/></svg>{key}</figure>'
    )
