"""What a benchmark of one layer measured: rows and a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from bitkv import native
from bitkv.benchmark.environment import Environment
from bitkv.benchmark.synthetic import Shape
from bitkv.pages import RAW_DTYPES

_COLUMNS = ("bits", "MB", "ms", "GB/s", "of\nread", "vs\nSDPA", "vs\nvLLM", "append\nms", "flush\nms")

Operation = Literal["attend", "append", "flush", "step", "flush-step", "pack", "prompt"]
_LINES: tuple[Operation, ...] = ("attend", "pack", "prompt")  # of a table
_BESIDE: tuple[Operation, ...] = ("append", "flush")  # shown beside the attention they come with


@dataclass(frozen=True)
class Row:
    """One measurement of one layer.

    Args:
        operation: "attend": one new token attends. "append": one new token is stored, where no page
            is packed; "flush": where one is. "step" and "flush-step": the same, and it attends, other
            memory having been read before. "pack": all pages of a prompt are quantized and packed.
            "prompt": an empty cache takes a whole prompt, packing included.
        backend: a key of `bitkv.attention.BACKENDS`; "sdpa-gqa", "sdpa-grouped", "vllm" or "vllm-vec"
            (its kernels for CPUs without a matrix unit, where it would take one); for "pack" and
            "prompt" "cpu" or "torch", whichever packs.
        recipe: the recipe's text; for SDPA and vLLM the dtype of K and V.
        context: tokens of the longest sequence, the new one included; those there before where one is
            appended; those of the prompt for "pack" and "prompt".
        dtype: of the queries and the hot window.
        ms: median milliseconds.
        bytes: what the operation must read: for "attend" pages in use and hot window, or K and V;
            otherwise the K and V that are added, in the model's dtype.
        gbps: `bytes` over `ms`, GB/s.
        bits_per_element: of K and V, measured from bytes, hot window included.
        fraction_of_bandwidth: `gbps` over `bandwidth_gbps`.
        vs_sdpa: the fastest SDPA variant's time over this one; None but for "attend".
        environment: what rows of a run with as many threads share; in JSON its fields stand here too.
        vs_vllm: vLLM's time over this one; None but for "attend", and where vLLM is not installed.
        isa: the instruction set of the native kernels, where they ran.
        ragged: whether the sequences' lengths spread from `context / 8` to `context`.
    """

    operation: Operation
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
    vs_vllm: float | None = None
    isa: str | None = None
    ragged: bool = False

    @property
    def is_sdpa(self) -> bool:
        return self.backend.startswith("sdpa-")

    @property
    def is_rival(self) -> bool:
        return self.is_sdpa or self.backend.startswith("vllm")


class Measurement(NamedTuple):
    """The fields of a `Row` by the same names that one timing gives."""

    operation: Operation
    backend: str
    recipe: str
    context: int
    ms: float
    bytes: int
    bits_per_element: float


def make_row(
    measured: Measurement, shape: Shape, environment: Environment, *, ragged: bool = False
) -> Row:
    """The row of a measurement, compared with no rival."""
    gbps = measured.bytes / measured.ms / 1e6
    is_rival_dtype = measured.recipe in RAW_DTYPES
    return Row(
        **measured._asdict(),
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=measured.recipe if is_rival_dtype else shape.dtype,
        gbps=gbps,
        fraction_of_bandwidth=gbps / environment.bandwidth_gbps,
        vs_sdpa=None,
        environment=environment,
        isa=native.isa() if measured.backend == "cpu" else None,
        ragged=ragged and shape.batch > 1,
    )


@dataclass(frozen=True)
class Report:
    """Rows, a sentence for each combination that was refused, and one for what was left out."""

    rows: tuple[Row, ...]
    refused: tuple[str, ...]
    notes: tuple[str, ...] = ()


def render(rows: Sequence[Row], *, console: Console | None = None) -> None:
    """Print a table for each number of threads and batch; the fastest of each context in bold."""
    console = console or Console()
    groups: dict[tuple[int, int, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.environment.threads, row.batch, row.ragged), []).append(row)
    for group in groups.values():
        console.print(title(group[0]), highlight=False, soft_wrap=True)
        console.print(_table(group))


def title(row: Row) -> str:
    """The shape and the machine of a table's rows."""
    environment, packing = row.environment, row.operation in ("pack", "prompt")
    lengths = f" of {row.context // 8:,} to {row.context:,} tokens" if row.ragged else ""
    return (
        f"{'A prompt' if packing else 'One new token'}, one layer: batch {row.batch}{lengths}, "
        f"{row.heads} query heads, {row.kv_heads} KV heads, head_dim {row.head_dim}\n"
        f"{environment.device}, {environment.threads_text}, "
        f"{environment.bandwidth_text}\n"
    )


def _table(rows: Sequence[Row]) -> Table:
    """A line for each measurement; append and flush stand beside the attention they come with."""
    beside = {(row.operation, *_key(row)): row for row in rows if row.operation in _BESIDE}
    lines = [row for row in rows if row.operation in _LINES]
    cells = [[*_numbers(row), *_added(row, beside)] for row in lines]
    kept = [i for i in range(len(_COLUMNS)) if any(line[i] for line in cells)]
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")
    for name in ("context", "backend", "recipe", *(_COLUMNS[i] for i in kept)):
        text = name in ("backend", "recipe")
        table.add_column(name, justify="left" if text else "right", overflow="fold", vertical="top")
    for i, (row, line) in enumerate(zip(lines, cells, strict=True)):
        peers = [r.ms for r in lines if (r.context, r.operation) == (row.context, row.operation)]
        is_new = i == 0 or lines[i - 1].context != row.context
        if is_new and i:
            table.add_row()
        first = f"{row.context:,}" if is_new else ""
        name = row.backend if row.operation == "attend" else f"{row.operation} ({row.backend})"
        style = "bold" if row.ms == min(peers) else ""
        table.add_row(first, name, row.recipe, *(line[j] for j in kept), style=style)
    table.add_row()
    return table


def _key(row: Row) -> tuple[str, str, int]:
    return row.backend, row.recipe, row.context


def _numbers(row: Row) -> tuple[str, ...]:
    return (
        f"{row.bits_per_element:.2f}",
        short(row.bytes / 1e6),
        short(row.ms),
        short(row.gbps),
        f"{row.fraction_of_bandwidth:.0%}",
        _ratio(row.vs_sdpa),
        _ratio(row.vs_vllm),
    )


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def _added(row: Row, beside: Mapping[tuple[Operation, str, str, int], Row]) -> tuple[str, ...]:
    added = (beside.get((operation, *_key(row))) for operation in _BESIDE)
    return tuple("" if each is None else short(each.ms) for each in added)


def short(number: float) -> str:
    """Three digits, more for whole numbers from 100 on."""
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"
