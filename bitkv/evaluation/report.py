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
    """

    kl_mean: Annotated[float, Column("KL mean", ".5f")]
    kl_p99: Annotated[float, Column("KL p99", ".4f")]
    top1: Annotated[float, Column("top-1", ".2%")]


@dataclass(frozen=True)
class Recall:
    """Exact matches among generated answers, with the 95 % Wilson interval of their share."""

    hits: Annotated[int, Column("hits", "d")]
    exact_match: Annotated[float, Column("exact", ".1%")]
    low: Annotated[float, Column("95%: from", ".1%")]
    high: Annotated[float, Column("to", ".1%")]
    seed: int

    @classmethod
    def of(cls, hits: int, samples: int, seed: int) -> Self:
        return cls(hits, hits / samples, *wilson(hits, samples), seed)


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


Result = Perplexity | Agreement | Recall | Fidelity


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Args:
        task: what was measured: "perplexity", "agreement", "fidelity" or a recall task.
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
    "captured": "keys, values and the newest 64 queries of an exact run meet again in a packed cache",
}
"""What each protocol name in a row means."""


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
        groups.setdefault((row.model, row.task, row.protocol, row.context), []).append(row)
    return [_table(group) for group in groups.values()]


def _table(rows: Sequence[Row]) -> Table:
    first, columns = rows[0], _columns(type(rows[0].result))
    table = Table(
        title=f"{first.task} of {first.model} ({first.dtype}): context {first.context}, "
        f"{first.samples} samples, {first.tokens} tokens",
        caption=f"{first.protocol}: {PROTOCOLS[first.protocol]}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("recipe", overflow="fold")
    for heading in ("bits", "with hot", *(column.heading for column in columns.values())):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.recipe,
            f"{row.packed_bits_per_element:.2f}",
            f"{row.bits_per_element:.2f}",
            *(format(getattr(row.result, name), column.form) for name, column in columns.items()),
        )
    return table


def _columns(result: type[Result]) -> dict[str, Column]:
    """The fields of a result that tables show."""
    hints = get_type_hints(result, include_extras=True)
    found = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: metadata[0] for name, metadata in found.items() if metadata}
