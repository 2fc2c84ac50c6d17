"""`bitkv eval`: what a recipe costs in quality."""

import argparse
from pathlib import Path

from bitkv.cli import arguments
from bitkv.cli.progress import progress_display
from bitkv.files import check_writable
from bitkv.generation.request import DTYPES

SUMMARY = "measure what recipes cost in quality"
DESCRIPTION = """Measure held-out perplexity with a quantized prefill, agreement with the stock cache,
recall from long prompts, and errors on keys, values and attention outputs."""
EXAMPLES = """examples:
  bitkv eval
  bitkv eval --recipe kivi2 --recipe best1 --task needle --length 1024 4096 --samples 100
  bitkv eval Qwen/Qwen3-0.6B --text wiki.txt --task perplexity agreement --tokens 32768
  bitkv eval --json eval.json
"""

_RECIPES = ("int8", "kivi4", "kivi2", "best2", "best1")
TASKS = (
    "perplexity",
    "agreement",
    "fidelity",
    "needle",
    "key_value_recall",
    "variable_tracking",
    "long_copy",
)
DEFAULT_TASKS = ("perplexity", "agreement", "needle", "fidelity")
_HELD_OUT = Path(__file__).parents[1] / "assets" / "heldout.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory or hub id (default: the bundled model)")
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="TEXT|@FILE",
        help=f"repeat for several ({', '.join(_RECIPES)})",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        choices=TASKS,
        default=list(DEFAULT_TASKS),
        metavar="TASK",
        help=f"of {', '.join(TASKS)} ({' '.join(DEFAULT_TASKS)})",
    )
    parser.add_argument(
        "--tokens", type=arguments.count, default=8192, metavar="N", help="of held-out text (8192)"
    )
    parser.add_argument(
        "--window", type=arguments.count, default=2048, metavar="N", help="tokens read at once (2048)"
    )
    parser.add_argument(
        "--samples", type=arguments.count, default=50, metavar="N", help="recall prompts a length (50)"
    )
    parser.add_argument(
        "--length",
        type=arguments.count,
        nargs="+",
        default=[1024, 4096],
        metavar="N",
        help="tokens of a recall prompt (1024 4096)",
    )
    parser.add_argument("--text", metavar="FILE", help="held-out text (default: the bundled one)")
    parser.add_argument("--seed", type=arguments.natural, default=0, metavar="N", help="(0)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model (its own)")
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0 (a GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file")


def run(args: argparse.Namespace) -> None:
    check_writable(args.json)
    recipes = [arguments.named_recipe(text) for text in args.recipe or _RECIPES]
    text = arguments.read_text(args.text or str(_HELD_OUT))

    from rich.console import Console

    from bitkv import evaluation
    from bitkv.generation import checkpoint

    checkpoint.quiet_transformers()
    name = checkpoint.locate(args.model)
    checkpoint.load_config(name)
    tokenizer = checkpoint.load_tokenizer(name)
    with progress_display() as progress:
        rows = evaluation.run(
            checkpoint.load_model(name, args.dtype, args.device),
            tokenizer,
            recipes,
            text=text,
            tasks=args.task,
            tokens=args.tokens,
            window=args.window,
            samples=args.samples,
            lengths=args.length,
            seed=args.seed,
            name=None if args.model else "bundled",
            progress=progress,
        )
    console = Console()
    for table in evaluation.tables(rows):
        console.print(table, "")
    if args.json:
        evaluation.write_json(rows, args.json)
