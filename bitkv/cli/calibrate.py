"""`bitkv calibrate`: fit a recipe to a model and write a recipe file."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitkv.cli import arguments
from bitkv.cli.progress import progress_display
from bitkv.files import check_writable
from bitkv.generation.request import DTYPES

if TYPE_CHECKING:
    from rich.progress import Progress

    from bitkv.recipe import Recipe

SUMMARY = "fit a recipe to a model: learn its codebooks, transforms and scales"
DESCRIPTION = """Stream text through a model, gather keys, values, queries and gradients of each layer,
and write what the recipe's codecs learn from them to one file, which `--recipe` takes wherever it takes
a text. An interrupted calibration goes on where it stopped when it is called again."""
EXAMPLES = """examples:
  bitkv calibrate --recipe 'cq(8, 8)' --output cq8.safetensors
  bitkv generate --demo --recipe cq8.safetensors --compare
  bitkv calibrate Qwen/Qwen3-0.6B --recipe 'cq(8, 10)' --calibration-text wiki.txt \\
      --output cq10.safetensors
"""

ASSETS = Path(__file__).parents[1] / "assets"
TOKENS, WINDOW = 32768, 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory or hub id (default: the bundled model)")
    parser.add_argument("--recipe", required=True, metavar="TEXT|@FILE", help="what to fit")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="ends in .safetensors"
    )
    add_text_arguments(parser)
    parser.add_argument("--seed", type=arguments.natural, default=0, metavar="N", help="(0)")
    parser.add_argument(
        "--memory", type=arguments.count, default=2, metavar="GIB", help="for gathered tensors (2)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (float32)")
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0 (a GPU if there is one)")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """What a calibration reads."""
    parser.add_argument(
        "--calibration-text",
        metavar="FILE",
        help="to learn from; not what is measured later (default: the bundled model's own)",
    )
    parser.add_argument(
        "--calibration-tokens", type=arguments.count, default=TOKENS, metavar="N", help=f"({TOKENS})"
    )


def read_calibration_text(args: argparse.Namespace) -> tuple[str, str]:
    """The text that arguments name, and its name.

    Raises:
        ValueError: no file, or none named for a model that is not the bundled one.
    """
    if args.calibration_text is None and args.model is not None:
        raise ValueError(
            "a recipe that learns needs text that is like what the model will read; "
            "pass --calibration-text FILE"
        )
    path = args.calibration_text or str(ASSETS / "calibration.txt")
    return arguments.read_text(path), Path(path).name


def run(args: argparse.Namespace) -> None:
    check_writable(args.output)
    if args.output.suffix != ".safetensors":
        raise ValueError(f"{args.output} does not end in .safetensors; name the recipe file so")
    recipe = arguments.recipe(args.recipe)
    text, name = read_calibration_text(args)

    from bitkv.calibration import write
    from bitkv.generation import checkpoint

    checkpoint.quiet_transformers()
    location = checkpoint.locate(args.model)
    checkpoint.load_config(location)
    tokenizer = checkpoint.load_tokenizer(location)
    model = checkpoint.load_model(location, args.dtype, args.device)
    partial = args.output.with_suffix(".partial")
    with progress_display() as display:
        fitted, *_ = calibrated(
            model, tokenizer, [recipe], args, text, name, display=display, partial=partial
        )
    write(fitted, args.output)
    assert fitted.calibration is not None
    print(f"{args.output}: {recipe}, {fitted.calibration.source}")
    print(f"{fitted.calibration.nbytes / 1e6:.2f} MB beside the pages")


def calibrated(
    model: Any,
    tokenizer: Any,
    recipes: "Sequence[Recipe]",
    args: argparse.Namespace,
    text: str,
    name: str,
    *,
    display: "Progress",
    partial: Path | None = None,
) -> "list[Recipe]":
    """`calibration.calibrate` with a bar, and with warnings as lines.

    Args:
        args: holds what `add_text_arguments` adds, and a seed.
        text, name: of `read_calibration_text`.
    """
    from bitkv.calibration import Reading, TooLittleText, calibrate

    memory = getattr(args, "memory", 2) * 2**30
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    window = min(WINDOW, context or WINDOW, args.calibration_tokens)
    options = {"window": window, "seed": args.seed, "memory": memory}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TooLittleText)
        bar = display.add_task("calibrating", total=1.0)
        reading = Reading(text=text, name=name, tokens=args.calibration_tokens, **options)
        fitted = calibrate(
            *(model, tokenizer, recipes, reading),
            partial=partial,
            advance=lambda share: display.advance(bar, share),
        )
    for warning in caught:
        if issubclass(warning.category, TooLittleText):
            print(f"bitkv: warning: {warning.message}", file=sys.stderr)
    return fitted
