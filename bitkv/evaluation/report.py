"""Rows of results: what was measured, under which protocol; JSON files and tables of them."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Self, get_type_hints

from rich.table import Table

from bitkv import files


class Column(NamedTuple):
    """The heading of a value in tables and its format."""

    heading: str
    form: str


@dataclass(frozen=True)
class Perplexity:
    """Mean loss over held-out tokens, and how much of it is not the stock cache's."""

    nats_per_token: Annotated[float, Column("nats", ".4f")]
    perplexity: Annotated[float, Column("ppl", ".3f")]
    bits_per_byte: Annotated[float, Column("bits/byte", ".4f")]
    delta_nats: Annotated[float, Column("Δ nats", "+.4f")]


@dataclass(frozen=True)
class Agreement:
    """Next-token distributions against the stock cache's on the same tokens.

    Args:
        kl_mean, kl_p99: KL(stock ‖ recipe) per token in nats: mean and 99th percentile.
        top1: share of tokens whose most likely successor is the same.
        kl_windows: the mean of each window. Texts differ more than recipes do: compare window by window.
    """

    kl_mean: Annotated[float, Column("KL mean", ".5f")]
    kl_p99: Annotated[float, Column("KL p99", ".4f")]
    top1: Annotated[float, Column("top-1", ".2%")]
    kl_windows: tuple[float, ...] = ()


@dataclass(frozen=True)
class Recall:
    """Exact matches among generated answers, with the 95 % Wilson interval of their share."""

    hits: Annotated[int, Column("hits", "d")]
    exact_match: Annotated[float, Column("exact", ".1%")]
    low: Annotated[float, Column("95%: from", ".1%")]
    high: Annotated[float, Column("to", ".1%")]
    seed: int
    seeds: int = 1

    @classmethod
    def of(cls, hits: int, samples: int, seed: int, seeds: int = 1) -> Self:
        return cls(hits, hits / samples, *wilson(hits, samples), seed, seeds)


@dataclass(frozen=True)
class Copy:
    """Long exact copies from the context.

    Args:
        hits, exact_match, low, high: copies without a mistake, as in `Recall`.
        right: mean number of tokens before the first mistake.
        asked: mean number of tokens to copy.
        seed, seeds: the first seed, and how many.
    """

    hits: Annotated[int, Column("hits", "d")]
    exact_match: Annotated[float, Column("exact", ".1%")]
    low: Annotated[float, Column("95%: from", ".1%")]
    high: Annotated[float, Column("to", ".1%")]
    right: Annotated[float, Column("right tokens", ".1f")]
    asked: Annotated[float, Column("of", ".1f")]
    seed: int
    seeds: int = 1


@dataclass(frozen=True)
class Divergence:
    """Greedy text against the stock cache's.

    Args:
        mean, median: tokens in common before the first difference.
        unchanged: share of prompts without a difference in `steps` tokens.
        steps: tokens generated; none is compared beyond.
    """

    mean: Annotated[float, Column("tokens in common", ".1f")]
    median: Annotated[float, Column("median", ".1f")]
    unchanged: Annotated[float, Column("unchanged", ".1%")]
    steps: Annotated[int, Column("of steps", "d")]


@dataclass(frozen=True)
class Fidelity:
    """Errors on keys, values and queries of held-out text.

    Args:
        key_nmse, value_nmse: ‖x - x̂‖² / ‖x‖² over the tokens in pages.
        key_error, value_error, both_error: ‖AV - Â V̂‖ / ‖AV‖ of attention outputs with only keys, only
            values and both packed, hot window included.
        layers: the same for each layer; empty in a layer's own entry.
    """

    key_nmse: Annotated[float, Column("K NMSE", ".1e")]
    value_nmse: Annotated[float, Column("V NMSE", ".1e")]
    key_error: Annotated[float, Column("AV: K", ".4f")]
    value_error: Annotated[float, Column("AV: V", ".4f")]
    both_error: Annotated[float, Column("AV: both", ".4f")]
    layers: tuple["Fidelity", ...] = ()


Result = Perplexity | Agreement | Recall | Copy | Divergence | Fidelity


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Args:
        task: what was measured: "perplexity", "agreement", "ood perplexity", "ood agreement",
            "fidelity", "divergence" or a recall task.
        model, dtype: whose cache.
        recipe: the text that named the recipe; "stock" is the cache that Transformers uses.
        definition: `repr` of the recipe, "" for the stock cache.
        protocol: how tokens reached the cache, a key of `PROTOCOLS`.
        num_sink_tokens, recent_tokens, page_size: of the recipe, 0 for the stock cache.
        context: tokens in the cache at the end of a sample; for recall, the length asked for.
        tokens: tokens (for fidelity: queries) that the result is a mean over.
        samples: windows or prompts.
        bits_per_element: measured on the last sample's cache, hot window included.
        packed_bits_per_element: the same beyond the hot window.
        codebook_bytes: what a calibrated recipe keeps beside the pages, for all layers.
        depth: where in the prompt the asked fact lies: the middle of a range of shares, None
            if anywhere.
    """

    task: str
    model: str
    dtype: str
    recipe: str
    definition: str
    protocol: str
    num_sink_tokens: int
    recent_tokens: int
    page_size: int
    context: int
    tokens: int
    samples: int
    bits_per_element: float
    packed_bits_per_element: float
    codebook_bytes: int = 0
    depth: float | None = None
    result: Result

    def to_json(self) -> dict[str, object]:
        """One flat object; the result's fields follow the row's."""
        values: dict[str, object] = dataclasses.asdict(self)
        del values["result"]
        return values | dataclasses.asdict(self.result)


PROTOCOLS = {
    "packed": "one forward over each window; every query attends to the packed cache, "
    "even to recent tokens once their page is full",
    "streamed": "each window in chunks of 64 tokens, the first exact; "
    "queries see recent tokens exactly, as in generation",
    "document first": "the document is prefilled and packed, then the question reads the packed cache",
    "whole prompt": "document and question are prefilled together, "
    "so the answer's first token comes from exact keys and values",
    "followed": "the document is prefilled and packed, then the expected text is read in chunks of 16 "
    "tokens up to the first that would not have been generated",
    "captured": "keys, values and the newest 64 queries of an exact run meet again in a packed cache",
}
"""What each protocol name in a row means."""

RELIABLE = 0.9  # share of answers that the stock cache must give for a task to measure recipes


def wilson(hits: int, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share; 95 % with the default `z`.

    Raises:
        ValueError: hits not between 0 and samples, or no samples.
    """
    if not 0 <= hits <= samples or samples == 0:
        raise ValueError(f"{hits} hits of {samples} samples is no share; pass 0 <= hits <= samples")
    share = hits / samples
    middle = share + z * z / (2 * samples)
    half = z * math.sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2)
    scale = 1 + z * z / samples
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def write_json(rows: Sequence[Row], path: Path | str) -> None:
    """Write a JSON list of rows, whole or not at all."""
    files.write_json(Path(path), [row.to_json() for row in rows])


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each measurement; its title says on how much, its caption under which protocol."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        by_depth = row.depth is not None
        key = (row.model, row.task, row.protocol, row.context, by_depth)
        groups.setdefault(key, []).append(row)
    return [
        _depth_table(group) if by_depth else _table(group) for (*_, by_depth), group in groups.items()
    ]


def _empty(rows: Sequence[Row], what: str, samples: str) -> Table:
    """A table with the columns that every measurement has."""
    first = rows[0]
    table = Table(
        title=f"{what} of {first.model} ({first.dtype}): context {first.context}, {samples}",
        caption=f"{first.protocol}: {PROTOCOLS[first.protocol]}{_doubt(rows)}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("recipe", overflow="fold")
    for heading in ("bits", "with hot"):
        table.add_column(heading, justify="right")
    return table


def _doubt(rows: Sequence[Row]) -> str:
    """What to say of a task that the model fails without any packing."""
    stock = [
        row.result for row in rows if row.definition == "" and isinstance(row.result, Recall | Copy)
    ]
    if not stock or stock[0].exact_match >= RELIABLE:
        return ""
    return (
        f"; the stock cache itself is right in {stock[0].exact_match:.1%}: "
        "this says more about the model than about recipes"
    )


def _begin(row: Row) -> tuple[str, str, str]:
    return row.recipe, f"{row.packed_bits_per_element:.2f}", f"{row.bits_per_element:.2f}"


def _table(rows: Sequence[Row]) -> Table:
    first, columns = rows[0], _columns(type(rows[0].result))
    table = _empty(rows, first.task, f"{first.samples} samples, {first.tokens} tokens")
    with_codebooks = any(row.codebook_bytes for row in rows)
    for heading in ("codebooks kB",) * with_codebooks + tuple(c.heading for c in columns.values()):
        table.add_column(heading, justify="right")
    for row in rows:
        codebooks = (f"{row.codebook_bytes / 1000:.1f}",) * with_codebooks
        values = (format(getattr(row.result, name), column.form) for name, column in columns.items())
        table.add_row(*_begin(row), *codebooks, *values)
    return table


def _depth_table(rows: Sequence[Row]) -> Table:
    """A column for each depth instead of a table for each."""
    depths = sorted({row.depth for row in rows if row.depth is not None})
    table = _empty(rows, f"{rows[0].task} by depth", f"{rows[0].samples} samples a depth")
    for depth in depths:
        table.add_column(f"at {depth:.0%}", justify="right")
    recipes: dict[str, list[Row]] = {}
    for row in rows:
        recipes.setdefault(row.recipe, []).append(row)
    for group in recipes.values():
        found = {row.depth: row.result for row in group if isinstance(row.result, Recall)}
        shares = (f"{found[depth].exact_match:.1%}" for depth in depths)
        table.add_row(*_begin(group[0]), *shares)
    return table


def _columns(result: type[Result]) -> dict[str, Column]:
    """The fields of a result that tables show."""
    hints = get_type_hints(result, include_extras=True)
    found = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: metadata[0] for name, metadata in found.items() if metadata}
