"""Draws charts as inline SVG; the same numbers give the same bytes.

Colours are drawn as fixed stand-ins and replaced afterwards: inside a report by CSS variables, so that light and dark
mode both work; in a picture file by real colours. Fonts are the reader's; no text is turned into paths.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_RC: dict[Any, Any] = {
    "svg.hashsalt": "macpo",  # ids inside the SVG are hashes salted with this, not random
    "svg.fonttype": "none",
    "text.parse_math": False,  # names and labels are data, never markup
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
INK, GRID, STUDENT = "#010203", "#010204", "#010205"
_SERIES = tuple(f"#0102{n:02x}" for n in range(0x10, 0x18))
_MARKERS = "os^Dv<>P"
_COLOURS = {INK: "#1f2933", GRID: "#d5dae1", STUDENT: "#d6451b"} | dict(
    zip(
        _SERIES,
        ("#2f6fde", "#12967a", "#8e44c9", "#c58a00", "#0f8fb8", "#b83280", "#5c7f1d", "#7a5c3e"),
        strict=True,
    )
)
VARIABLES = {INK: "--ink", GRID: "--grid", STUDENT: "--student"} | {c: f"--s{i}" for i, c in enumerate(_SERIES)}


@dataclass(frozen=True)
class Line:
    """One series. `error` is a standard error in y; a flat line is one value drawn across the chart.

    `crosses`: points (x, y) that stand out, each marked with a cross.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = INK
    marker: str = ""
    width: float = 1.6
    dash: str = "-"
    error: Sequence[float] | None = None
    flat: bool = False
    crosses: Sequence[tuple[float, float]] = ()


def series_style(index: int) -> tuple[str, str]:
    """Return colour and marker of the index-th teacher (or stage), distinct without colour too."""
    return _SERIES[index % len(_SERIES)], _MARKERS[index % len(_MARKERS)]


def line_panels(
    panels: Sequence[tuple[str, str, Sequence[Line]]],
    *,
    xlabel: str,
    whole_x: bool = True,
    width: float = 10.0,
    height: float = 3.3,
    inline: bool = True,
    legend_columns: int = 4,
) -> str:
    """Draw panels of (title, y label, lines) side by side with one legend below.

    `whole_x`: x ticks at whole numbers only (iterations).
    """
    with rc_context(_RC):
        figure, axes = _figure(len(panels), width, height)
        handles: dict[str, Any] = {}
        for axis, (title, ylabel, lines) in zip(axes, panels, strict=True):
            axis.set_title(title, color=INK)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            for line in lines:
                handles.setdefault(line.label, _draw(axis, line))
            if whole_x:
                ticks = sorted({x for line in lines if not line.flat for x in line.x}) or [0]
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axis.set_xlim(ticks[0] - 0.15, ticks[-1] + 0.15 + (ticks[0] == ticks[-1]) * 0.35)
            else:  # steps are whole, too, but too many to name each
                axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            _plain(axis)
        rows = -(-len(handles) // legend_columns)
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(legend_columns, len(handles)))
        left = 0.85 if any(ylabel for _, ylabel, _ in panels) else 0.62
        top = 0.4 if any(title for title, _, _ in panels) else 0.15
        _margins(figure, len(panels), left, 0.15, top, 0.62 + 0.24 * rows)
        return _svg(figure, inline)


def bars(rows: Sequence[tuple[str, float]], *, xlabel: str, width: float = 10.0, inline: bool = True) -> str:
    """Draw horizontal bars, first row on top, each with its value at the end."""
    with rc_context(_RC):
        figure, (axis,) = _figure(1, width, 0.9 + 0.24 * max(len(rows), 1))
        places = range(len(rows))
        axis.barh(places, [value for _, value in rows], color=_SERIES[0], height=0.72)
        top = max((value for _, value in rows), default=1.0) or 1.0
        for place, (_, value) in zip(places, rows, strict=True):
            axis.text(value + top * 0.008, place, _short(value), va="center", fontsize=9, color=INK)
        axis.set_yticks(places, [label for label, _ in rows], fontsize=9)
        axis.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, top * 1.08), xlabel=xlabel)
        _plain(axis, grid="x")
        axis.tick_params(axis="y", length=0)
        _margins(figure, 1, _label_width(label for label, *_ in rows), 0.15, 0.1, 0.55)
        return _svg(figure, inline)


def dots(
    rows: Sequence[tuple[str, float, tuple[float, float] | None, Sequence[float]]],
    *,
    xlabel: str,
    zero: float | None = None,
    highlight: Mapping[str, str] | None = None,
    width: float = 10.0,
    inline: bool = True,
) -> str:
    """Draw one dot per row with its interval (lower, upper), and small marks for its single values.

    `zero`: a vertical line at this value; `highlight`: label -> stand-in colour of its dot.
    """
    with rc_context(_RC):
        figure, (axis,) = _figure(1, width, 0.9 + 0.3 * max(len(rows), 1))
        if zero is not None:
            axis.axvline(zero, color=INK, linewidth=1)
        for place, (label, value, interval, points) in enumerate(rows):
            colour = (highlight or {}).get(label, _SERIES[0])
            axis.plot(points, [place] * len(points), "|", color=colour, markersize=9, alpha=0.55)
            if interval:
                axis.plot(interval, [place, place], color=colour, linewidth=2, solid_capstyle="butt")
            axis.plot([value], [place], "o", color=colour, markersize=6)
        axis.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=9)
        axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel)
        _plain(axis, grid="x")
        axis.tick_params(axis="y", length=0)
        _margins(figure, 1, _label_width(label for label, *_ in rows), 0.15, 0.1, 0.55)
        return _svg(figure, inline)


def smooth(values: Sequence[float], most: int = 120) -> tuple[list[float], list[float]]:
    """Return at most `most` (position, mean) points, each the mean of consecutive values."""
    stretch = max(1, -(-len(values) // most))
    starts = range(0, len(values), stretch)
    chunks = [values[start : start + stretch] for start in starts]
    middles = [start + (len(chunk) - 1) / 2 for start, chunk in zip(starts, chunks, strict=True)]
    return middles, [sum(chunk) / len(chunk) for chunk in chunks]


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height))
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def _margins(figure: Figure, columns: int, left: float, right: float, top: float, bottom: float) -> None:
    """Set fixed margins in inches: fitting them to the drawn text takes most of a report's time and gains nothing."""
    width, height = figure.get_size_inches()
    inner = (width - left - right - (columns - 1) * left) / columns
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=left / inner,
    )


def _label_width(labels: Iterable[str]) -> float:
    """Return the inches that the longest label takes in 9 point type, at most half of a chart."""
    return min(0.25 + 0.073 * max(map(len, labels), default=0), 5.0)


def _draw(axis: Axes, line: Line) -> Any:
    if line.flat:
        axis.axhline(line.y[-1], color=line.colour, linewidth=line.width, linestyle=line.dash)
        return axis.plot([], [], color=line.colour, linewidth=line.width, linestyle=line.dash)[0]
    if line.error is not None:
        low = [y - e for y, e in zip(line.y, line.error, strict=True)]
        high = [y + e for y, e in zip(line.y, line.error, strict=True)]
        axis.fill_between(line.x, low, high, color=line.colour, alpha=0.13, linewidth=0)
    if line.crosses:
        x, y = zip(*line.crosses, strict=True)
        axis.plot(x, y, "x", color=line.colour, markersize=7, markeredgewidth=1.8, zorder=3)
    return axis.plot(
        line.x,
        line.y,
        color=line.colour,
        linewidth=line.width,
        linestyle=line.dash,
        marker=line.marker or None,
        markersize=5,
    )[0]


def _plain(axis: Axes, grid: str = "y") -> None:
    axis.grid(True, axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axis.tick_params(colors=INK, labelcolor=INK, length=3, color=GRID)
    for spine in axis.spines.values():
        spine.set_color(GRID)
    for text in (axis.xaxis.label, axis.yaxis.label):
        text.set_color(INK)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _svg(figure: Figure, inline: bool) -> str:
    for legend in figure.legends:
        for entry in legend.get_texts():
            entry.set_color(INK)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=inline, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # the style element would reach the whole page, numbered ids would be there once a chart
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(
        r" font-family: '[^;\"]*;?", " font-family: inherit;" if inline else " font-family: sans-serif;", text
    )
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, f"var({VARIABLES[stand_in]})" if inline else colour)
    if inline:
        text = re.sub(r'<svg [^>]*?width="[\d.]+pt" height="[\d.]+pt"', '<svg class="chart" role="img"', text, count=1)
    return re.sub(r"[ \t]*\n", "\n", text).strip()
