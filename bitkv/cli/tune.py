"""`bitkv tune`: give bits to the layers that need them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitkv.cli import arguments
from bitkv.cli.calibrate import add_text_arguments, calibrated, read_calibration_text
from bitkv.cli.progress import progress_display
from bitkv.files import check_writable
from bitkv.generation.request import DTYPES

if TYPE_CHECKING:
    from bitkv.calibration.tune import Allocation
    from bitkv.evaluation.protocols import Subject, Windows
    from bitkv.recipe import Recipe

SUMMARY = "find which codec each layer's keys and values should get, for a budget of bits"
DESCRIPTION = """Measure what each layer loses under each codec, for keys and for values alone, and find
the allocation of least total loss for a budget, exactly, by dynamic programming. Writes a recipe: a
text, or a recipe file if a codec has learned something."""
EXAMPLES = """examples:
  bitkv tune --bits 2.25 --output mine.txt
  bitkv tune --bits 1.5 --codecs coupled --output mine.safetensors --plot frontier.png
  bitkv tune --bits 2 --key "Affine(2, 'channel', 32)" --key "Affine(1, 'channel', 32)" \\
      --value "Affine(1, 'token', 32)" --output mine.txt
  bitkv generate --demo --recipe @mine.txt --compare
"""

FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "asymkv": (
        ("Affine(1, 'channel', 32)", "Affine(2, 'channel', 32)"),
        ("Affine(1, 'token', 32)", "Affine(2, 'token', 32)"),
    ),
    "kvtuner": (
        tuple(f"Affine({bits}, 'channel', 32)" for bits in (2, 4, 8)),
        tuple(f"Affine({bits}, 'token', 32)" for bits in (2, 4, 8)),
    ),
    "levels": (
        tuple(f"Affine({bits}, 'channel', 'page', 'unbiased')" for bits in (1, 2, 4)),
        tuple(f"Affine({bits}, 'token', 'page', 'mse')" for bits in (1, 2, 4)),
    ),
    "coupled": (
        tuple(f"Coupled({c}, {b})" for c, b in ((8, 8), (8, 10), (4, 8), (4, 10), (2, 8))),
        tuple(f"Coupled({c}, {b})" for c, b in ((8, 8), (8, 10), (4, 8), (4, 10), (2, 8))),
    ),
}
"""Codecs for keys and for values to choose among."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory or hub id (default: the bundled model)")
    parser.add_argument("--bits", type=float, required=True, metavar="B", help="per element, in pages")
    parser.add_argument(
        "--codecs", choices=FAMILIES, default="levels", help="to choose among (levels)", metavar="NAME"
    )
    for site in ("key", "value"):
        parser.add_argument(
            f"--{site}", action="append", metavar="CODEC", help="instead of --codecs; repeat"
        )
    parser.add_argument("--objective", choices=("kl", "error"), default="kl", help="(kl)")
    add_text_arguments(parser)
    parser.add_argument(
        "--tokens", type=arguments.count, default=8192, metavar="N", help="to measure on (8192)"
    )
    parser.add_argument(
        "--window", type=arguments.count, default=2048, metavar="N", help="tokens read at once (2048)"
    )
    parser.add_argument("--seed", type=arguments.natural, default=0, metavar="N", help="(0)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (float32)")
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0 (a GPU if there is one)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the recipe")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write what was measured, and the frontier"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the frontier (.png)")


def run(args: argparse.Namespace) -> None:
    for path in (args.output, args.json, args.plot):
        check_writable(path)
    recipes = _recipes(args)
    _check_output(args.output, any(recipe.learns for recipe in recipes))
    text, name = read_calibration_text(args)

    from bitkv.calibration.sensitivity import sensitivities
    from bitkv.calibration.tune import frontier, within
    from bitkv.integrations.transformers.cache import PackedCache, head_dim_of, layer_config

    stock, windows, recipes = _prepare(args, recipes, text, name)
    config = stock.model.config.get_text_config(decoder=True)
    layers = PackedCache(stock.model.config, recipes[0]).packed_layers
    with progress_display() as progress:
        total = 2 * len(layers) * len(recipes)
        task = progress.add_task("layers × codecs", total=total)
        measured = sensitivities(stock, recipes, windows, advance=lambda: progress.advance(task))
    elements = recipes[0].page_size * head_dim_of(layer_config(config, layers[0]))
    allocations = frontier(measured, elements=elements, objective=args.objective)
    chosen = within(allocations, args.bits)
    _report(allocations, chosen)
    _write(args, allocations, chosen, recipes, config.num_hidden_layers)


def _recipes(args: argparse.Namespace) -> "list[Recipe]":
    """One recipe a rank: the first key codec with the first value codec, and so on."""
    keys, values = FAMILIES[args.codecs]
    keys, values = args.key or keys, args.value or values
    count = max(len(keys), len(values))
    pairs = [(keys[min(i, len(keys) - 1)], values[min(i, len(values) - 1)]) for i in range(count)]
    return [arguments.recipe(f"Recipe(key={key}, value={value})") for key, value in pairs]


def _check_output(output: Path | None, learns: bool) -> None:
    """Refuse a name that would say another kind of file."""
    if output is None or (output.suffix == ".safetensors") == learns:
        return
    if learns:
        raise ValueError(f"{output} will hold what codecs have learned; end its name in .safetensors")
    raise ValueError(f"{output} will be a text, as no codec learns; end its name in .txt")


def _prepare(
    args: argparse.Namespace, recipes: "list[Recipe]", text: str, name: str
) -> "tuple[Subject, Windows, list[Recipe]]":
    """The model, text to measure on, and recipes that have learned, from other text."""
    from bitkv.evaluation.protocols import Subject, cut
    from bitkv.generation import checkpoint

    checkpoint.quiet_transformers()
    location = checkpoint.locate(args.model)
    checkpoint.load_config(location)
    tokenizer = checkpoint.load_tokenizer(location)
    model = checkpoint.load_model(location, args.dtype, args.device)
    border = text.rfind("\n", 0, len(text) * 3 // 4) + 1
    fitted = recipes
    if any(recipe.learns for recipe in recipes):
        with progress_display() as display:
            fitted = calibrated(model, tokenizer, recipes, args, text[:border], name, display=display)
    stock = Subject(model)
    for recipe in fitted:
        Subject(model, recipe, str(recipe)).check_context(args.window)
    return stock, cut(tokenizer, text[border:], tokens=args.tokens, window=args.window), fitted


def _report(allocations: "Sequence[Allocation]", chosen: "Allocation") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{chosen.bits_per_element:.3f} bits per element", title_justify="left")
    for heading in ("layer", "keys", "values", "KL keys", "KL values"):
        table.add_column(heading, justify="right" if heading.startswith(("KL", "layer")) else "left")
    for key, value in zip(chosen.choices[::2], chosen.choices[1::2], strict=True):
        kl = (f"{x.kl:.5f}" for x in (key, value))
        table.add_row(str(key.layer), str(key.codec), str(value.codec), *kl)
    console = Console()
    console.print(table)
    best = Table(title="The best for other budgets", title_justify="left")
    for heading in ("bits", "predicted loss"):
        best.add_column(heading, justify="right")
    for x in _some(allocations):
        best.add_row(f"{x.bits_per_element:.3f}", f"{x.predicted:.5f}")
    console.print(best)


def _some(allocations: "Sequence[Allocation]") -> "list[Allocation]":
    """The last below each eighth of a bit."""
    kept = {int(x.bits_per_element * 8 + 1e-9): x for x in allocations}
    return list(kept.values())


def _write(
    args: argparse.Namespace,
    allocations: "Sequence[Allocation]",
    chosen: "Allocation",
    recipes: "Sequence[Recipe]",
    num_layers: int,
) -> None:
    from bitkv.calibration import write
    from bitkv.calibration.picture import draw
    from bitkv.files import replacing, write_json

    calibrations = [x.calibration for x in recipes if x.calibration]
    recipe = chosen.recipe(recipes[0], num_layers, calibrations[0] if calibrations else None)
    if args.output and recipe.calibration is not None:
        write(recipe, args.output)
    elif args.output:
        with replacing(args.output) as temporary:
            temporary.write_text(f"# {args.command}\n{recipe!r}\n", encoding="utf-8")
    if args.plot:
        draw(allocations, chosen, args.plot)
    if args.json:
        write_json(args.json, [x.to_json() for x in allocations])
