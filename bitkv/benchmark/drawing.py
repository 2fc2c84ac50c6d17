"""Panels of lines over context, drawn as PNG (matplotlib) or HTML (plotly)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from bitkv.files import check_folder, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL_GAP = 0.055  # between two labels, as a part of the panel's height


@dataclass(frozen=True)
class Line:
    """One line of a panel: `contexts` and `values`, ascending. A recipe has one colour."""

    label: str
    contexts: tuple[int, ...]
    values: tuple[float, ...]
    color: str
    marker: str
    is_rival: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines over contexts, both axes logarithmic."""

    title: str
    unit: str
    lines: tuple[Line, ...]


def draw(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Two panels side by side in a file whose name ends in ".png" or ".html", whole or not at all."""
    check_plot(path)
    draw_to = _draw_png if path.suffix.lower() == ".png" else _draw_html
    with replacing(path) as temporary:
        draw_to(panels, title, temporary)


def check_plot(path: Path | str) -> None:
    """Raises what `draw` would about the path or a missing library, before anything is measured."""
    path = Path(path)
    library = {".png": "matplotlib", ".html": "plotly"}.get(path.suffix.lower())
    if library is None:
        raise ValueError(f"cannot plot to {path.name!r}; use a name that ends in .png or .html")
    if find_spec(library) is None:
        raise ValueError(f"plotting {path.name} takes {library}; run `pip install {library}`")
    check_folder(path)


def _tokens(context: float) -> str:
    return f"{context / 1024:g}K" if context >= 1024 else f"{context:g}"


def _ticks(panel: Panel) -> list[int]:
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


def _draw_png(panels: Sequence[Panel], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, color="#333333")
    for panel, axes in zip(panels, figure.subplots(1, 2), strict=True):
        _draw_axes(panel, axes)
    figure.savefig(path, format="png", dpi=150)


def _draw_axes(panel: Panel, axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("context (tokens)", fontsize=11)
    axes.set_title(f"{panel.title} ({panel.unit})", loc="left", fontsize=12, fontweight="bold")
    for line in panel.lines:
        style = "--" if line.is_rival else "-"
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


def _label_ends(panel: Panel, axes: "Axes") -> None:
    """Names beside the right ends of the lines, instead of a legend."""
    low, high = map(math.log, axes.get_ylim())
    heights = _spread([(math.log(line.values[-1]) - low) / (high - low) for line in panel.lines])
    for line, height in zip(panel.lines, heights, strict=True):
        place = {"va": "center", "transform": axes.transAxes}
        axes.text(1.01, height, line.label, color=line.color, fontsize=11, **place)


def _draw_html(panels: Sequence[Panel], title: str, path: Path) -> None:
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
                showlegend=column == 1 or line.is_rival,
                mode="lines+markers",
                line={"color": line.color, "dash": "dash" if line.is_rival else "solid"},
                hovertemplate=f"%{{x:,}} tokens: %{{y:.3g}} {panel.unit}",
            )
            figure.add_trace(trace, row=1, col=column)
        names = [_tokens(context) for context in _ticks(panel)]
        axis = {"type": "log", "title": "context (tokens)", "ticktext": names}
        figure.update_xaxes(axis, tickvals=_ticks(panel), row=1, col=column)
    figure.update_yaxes(type="log", dtick="D2", minor_showgrid=False)
    heading = {"text": title, "font": {"size": 14}}
    figure.update_layout(title=heading, template="plotly_white", font={"size": 14}, height=560)
    figure.write_html(path, include_plotlyjs=True)
