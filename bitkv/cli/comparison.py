"""The packed cache beside the stock one: two runs, each in its own process, and one table."""

from bitkv.generation.process import generate_alone
from bitkv.generation.request import Request, Run

LONGEST_LABEL = 20
_SHOWN = 60
_NOTE = (
    "Each run in a process of its own. Peaks above the loaded model come from a first pass, times from "
    "a second one. The prompt is read with exact keys and values, which are packed afterwards."
)


def run_alone(label: str, request: Request) -> Run:
    """A run in a fresh process, its text shown as it comes if standard error is a terminal."""
    from rich.console import Console
    from rich.text import Text

    tail = ""

    def show(text: str) -> None:
        nonlocal tail
        tail = " ".join((tail + text).split())[-_SHOWN:] + (" " if text.endswith(" ") else "")
        status.update(Text(f"{label}: … {tail}"))

    with Console(stderr=True).status(Text(f"{label}: reading the prompt")) as status:
        return generate_alone(request, show)


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Number of the first token, counted from 1, in which two runs differ."""
    for i, (x, y) in enumerate(zip(a, b, strict=False), start=1):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b)) + 1


def print_table(label: str, request: Request, stock: Run, packed: Run) -> None:
    """The figures of both runs, then both texts."""
    from rich import box
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    stock_label = f"stock {stock.dtype}"
    sampled = f"temperature {request.temperature:g}" if request.temperature else "greedy"
    title = (
        f"{stock.prompt_tokens:,} prompt tokens, {request.max_new_tokens} new ({sampled}), "
        f"{stock.device}, {stock.threads} thread{'s' * (stock.threads > 1)}, {packed.backend} backend"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in (stock_label, label, "ratio"):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in _rows(stock, packed):
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(Text(title, style="bold"))
    console.print(table)
    for name, run in ((stock_label, stock), (label, packed)):
        console.print(Text(name, style="bold"))
        shown = run.text.strip("\n") if run.text.strip() else f"({len(run.token_ids)} tokens of blanks)"
        console.print(Padding(Text(shown), (0, 0, 1, 2)))
    console.print(Text(_NOTE, style="dim"))


def _rows(stock: Run, packed: Run) -> list[tuple[str, ...]]:
    difference = first_difference(stock.token_ids, packed.token_ids)
    rows = [
        _row("cache MB", _mb(stock.cache_bytes), _mb(packed.cache_bytes), 2),
        _row("bits per element", stock.bits_per_element, packed.bits_per_element, 2),
        _row("  beyond the hot window", stock.bits_per_element, packed.packed_bits_per_element, 2),
        _row("prefill s", stock.prefill_s, packed.prefill_s, 2),
        _row("ms per token", stock.ms_per_token, packed.ms_per_token, 1),
        _row(
            "peak memory MB, prefill", _mb(stock.peak_prefill_bytes), _mb(packed.peak_prefill_bytes), 1
        ),
        _row("peak memory MB, decode", _mb(stock.peak_decode_bytes), _mb(packed.peak_decode_bytes), 1),
    ]
    return [*rows, ("first differing token", "", str(difference or "none"), "")]


def _mb(nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / 1e6


def _row(name: str, stock: float | None, packed: float | None, digits: int) -> tuple[str, ...]:
    cells = ["" if x is None else f"{x:,.{digits}f}" for x in (stock, packed)]
    ratio = f"{packed / stock:.2f}×" if stock and packed is not None else ""
    return (name, *cells, ratio)
