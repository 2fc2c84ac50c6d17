"""`bitkv bench attention | decode | pack`: how fast a cache is, beside what else could be used."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitkv.cli import arguments
from bitkv.cli.progress import progress_display
from bitkv.files import check_writable

if TYPE_CHECKING:
    from bitkv.recipe import Recipe

SUMMARY = "time decode attention, whole decode steps, or packing"
DESCRIPTION = """Time one layer's attention of a new token, a model's decode steps, or the packing of
prompts, against context length, beside the memory bandwidth of this machine."""
EXAMPLES = """examples:
  bitkv bench attention --recipe kivi2 --recipe quick1 --context 8192 32768
  bitkv bench attention --batch 1 8 --ragged --threads 1 2 --json bench.json --plot bench.png
  bitkv bench attention --heads 16/2 --head-dim 64 --backend all
  bitkv bench decode --context 4096 32768 --plot decode.html
  bitkv bench pack --recipe "affine(2, 32, 'mse')" --context 32768
"""

_RECIPES = ("kivi4", "kivi2", "quick1")
_DTYPES = ("bfloat16", "float16", "float32")

Measure = Callable[[argparse.Namespace, Any], Any]
"""Runs a benchmark with a progress callback; returns its report."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what to time", metavar="WHAT", required=True)
    for name, summary, add, measure, contexts in (
        ("attention", "one layer's attention and append", _add_attention, _attention, (2048, 8192)),
        ("decode", "decode steps of a model", _add_decode, _decode, (4096, 32768)),
        ("pack", "quantizing and packing prompts", _add_pack, _pack, (8192,)),
    ):
        kind = kinds.add_parser(name, help=summary, description=f"Time {summary}.", allow_abbrev=False)
        _add_common(kind, contexts)
        add(kind)
        kind.set_defaults(measure=measure, what=name)


def _add_common(parser: argparse.ArgumentParser, contexts: Sequence[int]) -> None:
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="TEXT|@FILE",
        help=f"repeat for several ({', '.join(_RECIPES)})",
    )
    parser.add_argument(
        "--context",
        type=arguments.count,
        nargs="+",
        default=list(contexts),
        metavar="TOKENS",
        help=f"({' '.join(map(str, contexts))})",
    )
    parser.add_argument(
        "--threads",
        type=arguments.count,
        nargs="+",
        default=[],
        metavar="N",
        help="measure with each number of threads (all cores)",
    )
    parser.add_argument(
        "--full", action="store_true", help="more repeats, for figures that will be published"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file")


def _add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=arguments.count, nargs="+", default=[1], metavar="N", help="sequences (1)"
    )
    parser.add_argument(
        "--ragged", action="store_true", help="lengths of a batch spread from context / 8 to context"
    )
    parser.add_argument(
        "--heads", type=arguments.heads, default=(32, 8), metavar="Q/KV", help="of the layer (32/8)"
    )
    _add_layer(parser)
    parser.add_argument("--backend", default="auto", help="a backend, or all of them (auto)")
    _add_plot(parser)


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers", type=arguments.count, default=2, metavar="N", help="of the model (2)"
    )
    parser.add_argument("--batch", type=arguments.count, default=1, metavar="N", help="sequences (1)")
    parser.add_argument("--backend", default="auto", help="a backend (auto)")
    _add_plot(parser)


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=arguments.count, default=1, metavar="N", help="sequences (1)")
    parser.add_argument(
        "--kv-heads", type=arguments.count, default=8, metavar="N", help="of the layer (8)"
    )
    _add_layer(parser)
    parser.set_defaults(plot=None)


def _add_layer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dim", type=arguments.count, default=128, metavar="D", help="(128)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="(bfloat16)")


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE", help="latency and memory, .png or .html")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from bitkv import benchmark

    check_writable(args.json)
    if args.plot:
        benchmark.check_plot(args.plot)
    with progress_display() as display:
        bar = display.add_task("", total=None)

        def show(label: str, done: int, total: int) -> None:
            display.update(bar, description=label, completed=done, total=total)

        report = args.measure(args, show)
    if not report.rows:
        raise ValueError("; ".join(report.refused))
    is_decode = args.what == "decode"
    (benchmark.render_decode if is_decode else benchmark.render)(report.rows, console=Console())
    for sentence in report.notes:
        print(sentence)
    for sentence in report.refused:
        print(f"bitkv: {sentence}", file=sys.stderr)
    if args.json:
        benchmark.write_json(report.rows, args.json)
    if args.plot:
        (benchmark.plot_decode if is_decode else benchmark.plot)(report.rows, args.plot)


def _recipes(args: argparse.Namespace) -> "list[Recipe | str]":
    return [arguments.named_recipe(text) for text in args.recipe or _RECIPES]


def _attention(args: argparse.Namespace, show: Any) -> Any:
    from bitkv import benchmark

    heads, kv_heads = args.heads
    return benchmark.run_attention(
        _recipes(args),
        args.context,
        backend=args.backend,
        batches=args.batch,
        ragged=args.ragged,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=args.head_dim,
        dtype=args.dtype,
        threads=args.threads,
        quick=not args.full,
        command=args.command,
        progress=show,
    )


def _decode(args: argparse.Namespace, show: Any) -> Any:
    from bitkv import benchmark

    return benchmark.run_decode(
        _recipes(args),
        args.context,
        layers=args.layers,
        batch=args.batch,
        backend=args.backend,
        threads=args.threads,
        quick=not args.full,
        command=args.command,
        progress=show,
    )


def _pack(args: argparse.Namespace, show: Any) -> Any:
    from bitkv import benchmark

    return benchmark.run_packing(
        _recipes(args),
        args.context,
        batch=args.batch,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        dtype=args.dtype,
        threads=args.threads,
        quick=not args.full,
        command=args.command,
        progress=show,
    )
