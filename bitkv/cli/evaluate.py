"""`bitkv eval`: what a recipe costs in quality."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitkv.cli import arguments
from bitkv.cli.calibrate import add_text_arguments, calibrated, read_calibration_text
from bitkv.cli.progress import progress_display
from bitkv.files import check_writable
from bitkv.generation.request import DTYPES

if TYPE_CHECKING:
    from bitkv.evaluation import Options
    from bitkv.recipe import Recipe

SUMMARY = "measure what recipes cost in quality"
DESCRIPTION = """Measure held-out perplexity with a quantized prefill, agreement with the stock cache,
both on a text of another domain (ood), how long greedy text stays the same (divergence), recall from
long prompts, and errors on keys, values and attention outputs."""
EXAMPLES = """examples:
  bitkv eval
  bitkv eval --recipe kivi2 --recipe quick1 --task needle --length 1024 4096 --samples 100
  bitkv eval --stress --task agreement needle_similar --depths 5 --seeds 3 --dtype float32
  bitkv eval Qwen/Qwen3-0.6B --text wiki.txt --task perplexity agreement --tokens 32768
  bitkv eval --json eval.json
"""

_RECIPES = ("int8", "kivi4", "kivi2", "quick2", "quick1")
TASKS = (
    "perplexity",
    "agreement",
    "ood",
    "fidelity",
    "divergence",
    "needle",
    "needle_similar",
    "key_value_recall",
    "variable_tracking",
    "long_copy",
    "table_copy",
)
DEFAULT_TASKS = ("perplexity", "agreement", "needle", "fidelity")
_ASSETS = Path(__file__).parents[1] / "assets"


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
        "--samples", type=arguments.count, default=50, metavar="N", help="prompts a length (50)"
    )
    parser.add_argument(
        "--length",
        type=arguments.count,
        nargs="+",
        default=[1024, 4096],
        metavar="N",
        help="tokens of a prompt (1024 4096)",
    )
    parser.add_argument("--text", metavar="FILE", help="held-out text (default: the bundled one)")
    parser.add_argument(
        "--ood", metavar="FILE", help="text for the task ood (default: a licence, for the bundled model)"
    )
    _add_recall_arguments(parser)
    parser.add_argument(
        "--steps", type=arguments.count, default=128, metavar="N", help="tokens of divergence (128)"
    )
    parser.add_argument(
        "--stress", action="store_true", help="an equal model with outlier channels (name+stress)"
    )
    for name, what in (("sinks", "first"), ("recent", "newest")):
        parser.add_argument(
            f"--{name}",
            type=arguments.natural,
            metavar="N",
            help=f"{what} tokens in 16 bits, in all recipes",
        )
    add_text_arguments(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model (its own)")
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0 (a GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file")


def _add_recall_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keys", type=arguments.count, metavar="N", help="facts of a recall prompt (the task's own)"
    )
    parser.add_argument(
        "--depths",
        type=arguments.count,
        default=1,
        metavar="N",
        help="needles by place in the prompt, in so many parts (1: anywhere)",
    )
    parser.add_argument("--seed", type=arguments.natural, default=0, metavar="N", help="(0)")
    parser.add_argument(
        "--seeds",
        type=arguments.count,
        default=1,
        metavar="N",
        help="draw recall prompts of so many seeds, from --seed on (1)",
    )


def _options(args: argparse.Namespace) -> "Options":
    """What to measure.

    Raises:
        ValueError: a text that cannot be read or that is missing, or numbers that do not fit.
    """
    text = arguments.read_text(args.text or str(_ASSETS / "heldout.txt"))
    ood = args.ood or (None if args.model else str(_ASSETS / "prose.txt"))
    if "ood" in args.task and ood is None:
        raise ValueError("the task ood needs a text of another domain; pass one with --ood FILE")

    from bitkv.evaluation import Options

    return Options(
        text=text,
        ood_text=arguments.read_text(ood) if ood and "ood" in args.task else None,
        tasks=args.task,
        tokens=args.tokens,
        window=args.window,
        samples=args.samples,
        lengths=args.length,
        seed=args.seed,
        seeds=args.seeds,
        keys=args.keys,
        depths=args.depths,
        steps=args.steps,
        stress=args.stress,
        num_sink_tokens=args.sinks,
        recent_tokens=args.recent,
    )


def run(args: argparse.Namespace) -> None:
    check_writable(args.json)
    recipes = [arguments.named_recipe(text) for text in args.recipe or _RECIPES]
    options = _options(args)
    learns = any(arguments.recipe(text).learns for text in args.recipe or _RECIPES)
    calibration = read_calibration_text(args) if learns else ("", "")

    from rich.console import Console

    from bitkv import evaluation
    from bitkv.generation import checkpoint

    checkpoint.quiet_transformers()
    name = checkpoint.locate(args.model)
    checkpoint.load_config(name)
    tokenizer = checkpoint.load_tokenizer(name)

    def fit(model: Any, recipes: "Sequence[Recipe]") -> "list[Recipe]":
        return calibrated(model, tokenizer, recipes, args, *calibration, display=progress)

    with progress_display() as progress:
        rows = evaluation.run(
            checkpoint.load_model(name, args.dtype, args.device),
            tokenizer,
            recipes,
            options,
            name=None if args.model else "bundled",
            fit=fit if learns else None,
            progress=progress,
        )
    console = Console()
    for table in evaluation.tables(rows):
        console.print(table, "")
    if args.json:
        evaluation.write_json(rows, args.json)
