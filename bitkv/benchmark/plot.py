"""Latency and memory of decode attention against context, as PNG or HTML."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from bitkv.benchmark.report import Row
from bitkv.files import check_folder, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe-Ito
_MARKERS = ("o", "s", "^", "D", "v", "P")
_SDPA_COLOR = "#444444"
_LABEL_LENGTH = 28  # a recipe written out would leave no room for the panels
_LABEL_GAP = 0.055  # between two labels, as a part of the panel's height


@dataclass(frozen=True)
class _Line:
    """One line of a panel: `contexts` and `values`, ascending. A recipe has one colour."""

    label: str
    contexts: tuple[int, ...]
    values: tuple[float, ...]
    color: str
    marker: str
    is_sdpa: bool = False


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    lines: tuple[_Line, ...]


def plot(rows: Sequence[Row], path: Path | str) -> None:
    """Draw two log-log panels side by side, a line for each recipe and backend, beside SDPA.

    Latency is drawn against the fastest SDPA variant of each context, memory against its bf16 K and V.

    Args:
        path: ends in ".png" (matplotlib) or ".html" (plotly, readable without a network).

    Raises:
        ValueError: another suffix, a missing library or folder, or no attention among the rows.
    """
    check_plot(path)
    attends = sorted((r for r in rows if r.operation == "attend"), key=lambda row: row.context)
    if not attends:
        raise ValueError("there is no attention among the rows to plot; measure at least one context")
    draw = _draw_png if Path(path).suffix.lower() == ".png" else _draw_html
    with replacing(Path(path)) as temporary:
        draw((_latency(attends), _memory(attends)), _subtitle(attends[0]), temporary)


def check_plot(path: Path | str) -> None:
    """Raises what `plot` would about the path or a missing library, before anything is measured."""
    path = Path(path)
    library = {".png": "matplotlib", ".html": "plotly"}.get(path.suffix.lower())
    if library is None:
        raise ValueError(f"cannot plot to {path.name!r}; use a name that ends in .png or .html")
    if find_spec(library) is None:
        raise ValueError(f"plotting {path.name} takes {library}; run `pip install {library}`")
    check_folder(path)


def _latency(rows: Sequence[Row]) -> _Panel:
    packed = [row for row in rows if not row.is_sdpa]
    recipes = list(dict.fromkeys(row.recipe for row in packed))
    backends = list(dict.fromkeys(row.backend for row in packed))
    lines = []
    for recipe, backend in dict.fromkeys((row.recipe, row.backend) for row in packed):
        label = _shorten(recipe) + (f" ({backend})" if len(backends) > 1 else "")
        points = {r.context: r.ms for r in packed if (r.recipe, r.backend) == (recipe, backend)}
        place = recipes.index(recipe), backends.index(backend)
        lines.append(_line(label, points, *place))
    fastest = {row.context: math.inf for row in rows if row.is_sdpa}
    for row in rows:
        if row.is_sdpa:
            fastest[row.context] = min(fastest[row.context], row.ms)
    lines += _sdpa_line("fastest SDPA", fastest)
    return _Panel("Latency of one token, one layer", "ms", tuple(lines))


def _memory(rows: Sequence[Row]) -> _Panel:
    """A recipe weighs the same under every backend."""
    recipes = dict.fromkeys(row.recipe for row in rows if not row.is_sdpa)
    lines = []
    for i, recipe in enumerate(recipes):
        points = {r.context: r.bytes / 1e6 for r in rows if not r.is_sdpa and r.recipe == recipe}
        lines.append(_line(_shorten(recipe), points, i, 0))
    wide = {r.context: r.bytes / 1e6 for r in rows if r.is_sdpa and r.recipe == "bfloat16"}
    lines += _sdpa_line("SDPA bf16", wide)
    return _Panel("Keys and values, one layer", "MB", tuple(lines))


def _line(label: str, points: Mapping[int, float], recipe: int, backend: int) -> _Line:
    again = recipe // len(_COLORS)  # beyond the palette colours come again, with other markers
    marker = _MARKERS[(recipe + again + backend) % len(_MARKERS)]
    color = _COLORS[recipe % len(_COLORS)]
    return _Line(label, tuple(points), tuple(points.values()), color, marker)


def _sdpa_line(label: str, points: Mapping[int, float]) -> list[_Line]:
    line = _Line(label, tuple(points), tuple(points.values()), _SDPA_COLOR, ".", is_sdpa=True)
    return [line] if points else []


def _shorten(recipe: str) -> str:
    return recipe if len(recipe) <= _LABEL_LENGTH else f"{recipe[: _LABEL_LENGTH - 1]}…"


def _subtitle(row: Row) -> str:
    environment = row.environment
    return (
        f"batch {row.batch}, {row.heads} query heads, {row.kv_heads} KV heads, "
        f"head_dim {row.head_dim} · {environment.device}, {environment.threads_text}"
    )


def _tokens(context: float) -> str:
    return f"{context / 1024:g}K" if context >= 1024 else f"{context:g}"


def _ticks(panel: _Panel) -> list[int]:
    """Contexts to name on the axis: all, or every second or third where there are many."""
    contexts = sorted({context for line in panel.lines for context in line.contexts})
    return contexts[:: -(-len(contexts) // 8)]


def _spread(heights: Sequence[float]) -> list[float]:
    """Label heights in 0 … 1 moved apart to `_LABEL_GAP`, their order and middle kept."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed: list[tuple[float, list[int]]] = []  # the middle of each cluster, and its labels
    for i in order:
        middle, members = heights[i], [i]
        while placed:
            below, others = placed[-1]
            total = len(others) + len(members)
            if middle - below >= _LABEL_GAP * total / 2:
                break
            placed.pop()
            middle = (below * len(others) + middle * len(members)) / total
            members = others + members
        placed.append((middle, members))
    spread = list(heights)
    for middle, members in placed:
        extent = _LABEL_GAP * (len(members) - 1)
        start = min(middle - extent / 2, 1 - extent)  # below the panel's title
        for rank, i in enumerate(members):
            spread[i] = start + _LABEL_GAP * rank
    return spread


def _draw_png(panels: Sequence[_Panel], subtitle: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Decode attention: {subtitle}", fontsize=11, color="#333333")
    for panel, axes in zip(panels, figure.subplots(1, 2), strict=True):
        _draw_axes(panel, axes)
    figure.savefig(path, format="png", dpi=150)


def _draw_axes(panel: _Panel, axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("context (tokens)", fontsize=11)
    axes.set_title(f"{panel.title} ({panel.unit})", loc="left", fontsize=12, fontweight="bold")
    for line in panel.lines:
        style = "--" if line.is_sdpa else "-"
        axes.plot(line.contexts, line.values, style, marker=line.marker, color=line.color, lw=2)
    ticks = _ticks(panel)
    axes.set_xticks(ticks, [_tokens(context) for context in ticks])
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] / 2, ticks[0] * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=11, length=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _label_ends(panel, axes)


def _label_ends(panel: _Panel, axes: "Axes") -> None:
    """Names beside the right ends of the lines, instead of a legend."""
    low, high = map(math.log, axes.get_ylim())
    heights = _spread([(math.log(line.values[-1]) - low) / (high - low) for line in panel.lines])
    for line, height in zip(panel.lines, heights, strict=True):
        place = {"va": "center", "transform": axes.transAxes}
        axes.text(1.01, height, line.label, color=line.color, fontsize=11, **place)


def _draw_html(panels: Sequence[_Panel], subtitle: str, path: Path) -> None:
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    titles = [f"<b>{panel.title} ({panel.unit})</b>" for panel in panels]
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.08)
    for column, panel in enumerate(panels, 1):
        for line in panel.lines:
            trace = Scatter(
                x=line.contexts,
                y=line.values,
                name=line.label,
                legendgroup=line.label,
                showlegend=column == 1 or line.is_sdpa,
                mode="lines+markers",
                line={"color": line.color, "dash": "dash" if line.is_sdpa else "solid"},
                hovertemplate=f"%{{x:,}} tokens: %{{y:.3g}} {panel.unit}",
            )
            figure.add_trace(trace, row=1, col=column)
        names = [_tokens(context) for context in _ticks(panel)]
        axis = {"type": "log", "title": "context (tokens)", "ticktext": names}
        figure.update_xaxes(axis, tickvals=_ticks(panel), row=1, col=column)
    figure.update_yaxes(type="log", dtick="D2", minor_showgrid=False)
    title = {"text": f"Decode attention: {subtitle}", "font": {"size": 14}}
    figure.update_layout(title=title, template="plotly_white", font={"size": 14}, height=560)
    figure.write_html(path, include_plotlyjs=True)
