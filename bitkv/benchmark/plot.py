"""Latency and memory of decode attention, and of a model's decode steps, against context."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitkv.benchmark.decode_report import STOCK, DecodeRow
from bitkv.benchmark.drawing import Line, Panel, check_plot, draw
from bitkv.benchmark.report import Row

_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#6a3d9a",
    "#8c564b",
)  # Okabe-Ito
_MARKERS = ("o", "s", "^", "D", "v", "P")
_RIVAL_COLORS = ("#444444", "#999999", "#bbbbbb")
_LABEL_LENGTH = 28  # a recipe written out would leave no room for the panels


def plot(rows: Sequence[Row], path: Path | str) -> None:
    """Draw two log-log panels side by side, a line for each recipe and backend, beside SDPA and vLLM.

    Latency is drawn against the fastest SDPA variant of each context, memory against its bf16 K and V;
    of several batches and numbers of threads the first batch and the most threads.

    Args:
        path: ends in ".png" (matplotlib) or ".html" (plotly, readable without a network).

    Raises:
        ValueError: another suffix, a missing library or folder, or no attention among the rows.
    """
    check_plot(path)
    attends = [row for row in rows if row.operation == "attend"]
    if not attends:
        raise ValueError("there is no attention among the rows to plot; measure at least one context")
    threads = max(row.environment.threads for row in attends)
    first = next(row for row in attends if row.environment.threads == threads)
    chosen = (row for row in attends if (row.environment, row.batch) == (first.environment, first.batch))
    shown = sorted(chosen, key=lambda row: row.context)
    title = (
        f"Decode attention: batch {first.batch}, {first.heads} query heads, {first.kv_heads} KV heads, "
        f"head_dim {first.head_dim} · {first.environment.device}, {first.environment.threads_text}"
    )
    draw((_latency(shown), _memory(shown)), title, Path(path))


def plot_decode(rows: Sequence[DecodeRow], path: Path | str) -> None:
    """Draw milliseconds per token and the memory of keys and values, a line for each cache.

    Args, Raises: as `plot`.
    """
    check_plot(path)
    if not rows:
        raise ValueError("there is no decode step among the rows to plot; measure at least one context")
    threads = max(row.environment.threads for row in rows)
    shown = sorted((r for r in rows if r.environment.threads == threads), key=lambda row: row.context)
    first = shown[0]
    title = (
        f"Decode: {first.layers} layers of Llama-3.1-8B's shape, batch {first.batch} · "
        f"{first.environment.device}, {first.environment.threads_text}"
    )
    latency, memory = _decode_lines(shown, "ms"), _decode_lines(shown, "bytes", 1e-6)
    panels = (Panel("Latency of one token", "ms", latency), Panel("Keys and values", "MB", memory))
    draw(panels, title, Path(path))


def _decode_lines(rows: Sequence[DecodeRow], field: str, factor: float = 1) -> tuple[Line, ...]:
    stock = list(dict.fromkeys(row.recipe for row in rows if row.is_stock))
    recipes = list(dict.fromkeys(row.recipe for row in rows if not row.is_stock))
    lines = []
    for name in (*recipes, *stock):
        points = {r.context: factor * float(getattr(r, field)) for r in rows if r.recipe == name}
        if name in stock:
            label = "stock bf16" if name == STOCK else f"stock {name}"
            lines += _rival_line(label, points, stock.index(name))
        else:
            lines.append(_line(_shorten(name), points, recipes.index(name), 0))
    return tuple(lines)


def _latency(rows: Sequence[Row]) -> Panel:
    packed = [row for row in rows if not row.is_rival]
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
    lines += _rival_line("fastest SDPA", fastest)
    lines += _rival_line("vLLM bf16", {r.context: r.ms for r in rows if r.backend == "vllm"}, 1)
    return Panel("Latency of one token, one layer", "ms", tuple(lines))


def _memory(rows: Sequence[Row]) -> Panel:
    """A recipe weighs the same under every backend."""
    recipes = dict.fromkeys(row.recipe for row in rows if not row.is_rival)
    lines = []
    for i, recipe in enumerate(recipes):
        points = {r.context: r.bytes / 1e6 for r in rows if not r.is_rival and r.recipe == recipe}
        lines.append(_line(_shorten(recipe), points, i, 0))
    wide = {r.context: r.bytes / 1e6 for r in rows if r.is_sdpa and r.recipe == "bfloat16"}
    lines += _rival_line("SDPA bf16", wide)
    return Panel("Keys and values, one layer", "MB", tuple(lines))


def _line(label: str, points: Mapping[int, float], recipe: int, backend: int) -> Line:
    again = recipe // len(_COLORS)  # beyond the palette colours come again, with other markers
    marker = _MARKERS[(recipe + again + backend) % len(_MARKERS)]
    color = _COLORS[recipe % len(_COLORS)]
    return Line(label, tuple(points), tuple(points.values()), color, marker)


def _rival_line(label: str, points: Mapping[int, float], rank: int = 0) -> list[Line]:
    color = _RIVAL_COLORS[rank % len(_RIVAL_COLORS)]
    line = Line(label, tuple(points), tuple(points.values()), color, ".", is_rival=True)
    return [line] if points else []


def _shorten(recipe: str) -> str:
    return recipe if len(recipe) <= _LABEL_LENGTH else f"{recipe[: _LABEL_LENGTH - 1]}…"
