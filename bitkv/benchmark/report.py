"""What a benchmark measured: rows, a table, a JSON file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from bitkv import files
from bitkv.benchmark.environment import Environment

_COLUMNS = ("bits", "MB", "attend\nms", "\nGB/s", "of\nread", "vs\nSDPA", "append\nms")


@dataclass(frozen=True)
class Row:
    """One measurement: one new token, one layer.

    Args:
        operation: "attend", or "append" with its share of packing a page.
        backend: a key of `bitkv.attention.BACKENDS`, or "sdpa-gqa" and "sdpa-grouped".
        recipe: the recipe's text; for SDPA the dtype of K and V.
        context: tokens attended to, the new one included; for "append" those there before.
        dtype: of the queries and the hot window.
        ms: median milliseconds.
        bytes: what the operation must read: pages in use and hot window; for SDPA K and V; for
            "append" the new token.
        gbps: `bytes` over `ms`, GB/s.
        bits_per_element: of K and V, measured from bytes, hot window included.
        fraction_of_bandwidth: `gbps` over the run's `bandwidth_gbps`.
        vs_sdpa: the fastest SDPA variant's time over this one; None for "append".
        environment: what the rows of a run share; in JSON its fields stand beside these.
    """

    operation: Literal["attend", "append"]
    backend: str
    recipe: str
    context: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    ms: float
    bytes: int
    gbps: float
    bits_per_element: float
    fraction_of_bandwidth: float
    vs_sdpa: float | None
    environment: Environment

    @property
    def is_sdpa(self) -> bool:
        return self.backend.startswith("sdpa-")


@dataclass(frozen=True)
class Report:
    """Rows, the bandwidth of the same run, and a sentence for each combination that was refused."""

    rows: tuple[Row, ...]
    environment: Environment
    refused: tuple[str, ...]

    @property
    def bandwidth_gbps(self) -> float:
        return self.environment.bandwidth_gbps


def render(rows: Sequence[Row], bandwidth_gbps: float, *, console: Console | None = None) -> None:
    """Print a table: a line for each context, backend and recipe, each context's fastest in bold."""
    console = console or Console()
    attends = [row for row in rows if row.operation == "attend"]
    appends = {_key(row): row for row in rows if row.operation == "append"}
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")
    for name in ("context", "backend", "recipe", *_COLUMNS):
        text = name in ("backend", "recipe")
        table.add_column(name, justify="left" if text else "right", overflow="fold", vertical="top")
    for context in dict.fromkeys(row.context for row in attends):
        group = [row for row in attends if row.context == context]
        fastest = min(group, key=lambda row: row.ms)
        for row in group:
            first = f"{context:,}" if row is group[0] else ""
            cells = (row.backend, row.recipe, *_numbers(row, appends.get(_key(row))))
            table.add_row(first, *cells, style="bold" if row is fastest else "")
        table.add_row()
    console.print(_title(attends, bandwidth_gbps), highlight=False, soft_wrap=True)
    console.print(table)


def _key(row: Row) -> tuple[str, str, int]:
    return row.backend, row.recipe, row.context


def _title(rows: Sequence[Row], bandwidth_gbps: float) -> str:
    read = f"memory read {bandwidth_gbps:.1f} GB/s"
    if not rows:
        return read
    row, environment = rows[0], rows[0].environment
    return (
        f"One new token, one layer: batch {row.batch}, {row.heads} query heads, "
        f"{row.kv_heads} KV heads, head_dim {row.head_dim}\n"
        f"{environment.device}, {environment.threads_text}, {read}\n"
    )


def _numbers(row: Row, append: Row | None) -> tuple[str, ...]:
    return (
        f"{row.bits_per_element:.2f}",
        _short(row.bytes / 1e6),
        _short(row.ms),
        _short(row.gbps),
        f"{row.fraction_of_bandwidth:.1%}",
        "" if row.vs_sdpa is None else f"{row.vs_sdpa:.2f}x",
        "" if append is None else _short(append.ms),
    )


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"


def write_json(rows: Sequence[Row], path: Path | str) -> None:
    """Write a JSON list of rows, whole or not at all. Each row carries its run's fields.

    Raises:
        ValueError: the folder does not exist.
    """
    flat = [asdict(row) for row in rows]
    records = [record | record.pop("environment") for record in flat]
    files.write_json(Path(path), records)


def read_json(path: Path | str) -> list[Row]:
    """The rows in a file that `write_json` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    shared = [field.name for field in fields(Environment)]
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        environments = [Environment(**{name: r.pop(name) for name in shared}) for r in records]
        return [Row(**r, environment=e) for r, e in zip(records, environments, strict=True)]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{path} holds no benchmark rows; pass a file of `bitkv bench --json`"
        ) from None
