"""What the benchmark of a whole model's decode steps measured: rows and a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bitkv.benchmark.environment import Environment
from bitkv.benchmark.report import short

STOCK = "dynamic"
"""The recipe of rows of the stock 16-bit cache."""


@dataclass(frozen=True)
class DecodeRow:
    """Decode steps of a model with one kind of cache at one context.

    Args:
        recipe: the recipe's text; "dynamic" for the stock 16-bit cache, "quanto4" and "quanto2" for the
            stock quantized one.
        backend: a key of `bitkv.attention.BACKENDS`, or "sdpa" for stock caches.
        context: tokens in the cache of each sequence before the steps.
        layers: of the model; a whole Llama-3.1-8B has 32.
        dtype: of weights, activations and the hot window.
        ms: median milliseconds of a step.
        worst_ms: the slowest step's; with `--full`, packed caches take enough steps to pack a page.
        cache_ms: `ms` beyond that of steps with an empty cache, which took turns with these.
        bytes: of keys and values, all layers.
        bits_per_element: of K and V, measured from those bytes.
        vs_dynamic: the stock 16-bit cache's `ms` over this one.
        isa: the instruction set of the native kernels, where they ran.
        environment: what rows of a run with as many threads share; in JSON its fields stand here too.
    """

    recipe: str
    backend: str
    context: int
    batch: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    ms: float
    worst_ms: float
    cache_ms: float
    bytes: int
    bits_per_element: float
    vs_dynamic: float
    isa: str | None
    environment: Environment

    @property
    def is_stock(self) -> bool:
        return self.backend == "sdpa"


@dataclass(frozen=True)
class DecodeReport:
    """Rows, a sentence for each recipe that was refused, and one for each cache that was left out."""

    rows: tuple[DecodeRow, ...]
    refused: tuple[str, ...]
    notes: tuple[str, ...] = ()


def render_decode(rows: Sequence[DecodeRow], *, console: Console | None = None) -> None:
    """Print a table for each number of threads; the fastest of each context in bold."""
    console = console or Console()
    for threads in dict.fromkeys(row.environment.threads for row in rows):
        group = [row for row in rows if row.environment.threads == threads]
        console.print(_title(group[0]), highlight=False, soft_wrap=True)
        console.print(_table(group))


def _title(row: DecodeRow) -> str:
    environment = row.environment
    return (
        f"One token of {row.layers} layers of Llama-3.1-8B's shape, random weights, {row.dtype}, "
        f"batch {row.batch}\n{environment.device}, {environment.threads_text}, "
        f"{environment.bandwidth_text}\n"
    )


def _table(rows: Sequence[DecodeRow]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")
    for name in ("context", "cache", "bits", "MB", "ms", "worst\nms", "cache\nms", "vs\ndynamic"):
        side = "left" if name == "cache" else "right"
        table.add_column(name, justify=side, overflow="fold", vertical="top")  # type: ignore[arg-type]
    for context in dict.fromkeys(row.context for row in rows):
        group = [row for row in rows if row.context == context]
        fastest = min(group, key=lambda row: row.ms)
        for row in group:
            first = f"{context:,}" if row is group[0] else ""
            style = "bold" if row is fastest else ""
            table.add_row(first, row.recipe, *_numbers(row), style=style)
        table.add_row()
    return table


def _numbers(row: DecodeRow) -> tuple[str, ...]:
    return (
        f"{row.bits_per_element:.2f}",
        short(row.bytes / 1e6),
        short(row.ms),
        short(row.worst_ms),
        short(row.cache_ms),
        f"{row.vs_dynamic:.2f}x",
    )
