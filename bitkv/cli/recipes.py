"""`bitkv recipes`: what exists."""

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from bitkv.recipe import Preset

SUMMARY = "list the recipes that exist, with their bits and sources"
DESCRIPTION = """The recipes that have a name. Bits per element are measured on a page at head_dim 128,
scales and zero points included; the hot window comes on top and depends on the context."""
EXAMPLES = """examples:
  bitkv recipes
  bitkv recipes --json

a recipe is a name, a call such as "asymkv(16, 0)", a Recipe(...) expression,
or @FILE, a file that holds one
"""

T = TypeVar("T")

_HEAD_DIM = 128
_MANY_LAYERS = 32


@dataclass(frozen=True)
class Row:
    """A preset; lists hold one entry per distinct kind of layer."""

    name: str
    text: str
    key_bits: list[float]
    value_bits: list[float]
    bits_per_element: list[float]
    source: str
    summary: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    rows = list_recipes()
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print(rows)


def list_recipes() -> list[Row]:
    """Every preset, measured; one that takes arguments by its example."""
    from bitkv.recipe import PRESETS

    return [_measure(preset.example or name, preset) for name, preset in PRESETS.items()]


def _measure(name: str, preset: "Preset") -> Row:
    import torch

    from bitkv.cache import PagedCache
    from bitkv.recipe import Split, parse

    recipe = parse(name)
    splits = [x.layer for x in (recipe.key, recipe.value) if isinstance(x, Split)]
    layers = PagedCache(recipe, max(splits, default=0) + 1).layers
    formats = [layer.page_format(_HEAD_DIM, torch.float16) for layer in layers]
    return Row(
        name=name,
        text=repr(recipe),
        key_bits=_distinct([f.key.code_bits for f in formats]),
        value_bits=_distinct([f.value.code_bits for f in formats]),
        bits_per_element=_distinct([f.bits_per_element for f in formats]),
        source=preset.source,
        summary=preset.summary,
    )


def _distinct(values: list[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _print(rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("recipe", "K/V bits", "bits/\nelement", "what, and source"):
        table.add_column(heading, no_wrap=heading == "recipe", vertical="top")
    for row in rows:
        codes = "/".join(", ".join(map(str, bits)) for bits in (row.key_bits, row.value_bits))
        measured = ", ".join(f"{bits:.2f}" for bits in row.bits_per_element)
        what = Text.assemble(row.summary, "\n", (row.source, "dim"))
        table.add_row(Text(row.name), codes, measured, what)
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        # a text to copy, so never wrapped by the console
        console.print(Text(f"{row.name} = {row.text}"), soft_wrap=True)
