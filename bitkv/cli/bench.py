"""`bitkv bench`: decode attention and append against context length."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitkv.cli import arguments
from bitkv.cli.progress import progress_display
from bitkv.files import check_writable

if TYPE_CHECKING:
    from bitkv.benchmark import Report

SUMMARY = "time decode attention and append against context length"
DESCRIPTION = """Time one layer's attention of a new token, and its append, against context length,
beside PyTorch SDPA and the memory bandwidth of this machine."""
EXAMPLES = """examples:
  bitkv bench
  bitkv bench --recipe kivi2 --recipe best1 --context 8192 32768
  bitkv bench --heads 16/2 --head-dim 64 --batch 4 --backend all
  bitkv bench --json bench.json --plot bench.png
"""

_RECIPES = ("kivi4", "kivi2", "best1")
_CONTEXTS = (2048, 8192)
_DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        default=list(_CONTEXTS),
        metavar="TOKENS",
        help=f"({' '.join(map(str, _CONTEXTS))})",
    )
    parser.add_argument("--batch", type=arguments.count, default=1, metavar="N", help="sequences (1)")
    parser.add_argument(
        "--heads", type=arguments.heads, default=(32, 8), metavar="Q/KV", help="of the layer (32/8)"
    )
    parser.add_argument("--head-dim", type=arguments.count, default=128, metavar="D", help="(128)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="(bfloat16)")
    parser.add_argument("--backend", default="auto", help="a backend, or all of them (auto)")
    parser.add_argument("--threads", type=arguments.count, metavar="N", help="(all cores)")
    parser.add_argument(
        "--full", action="store_true", help="more repeats, for figures that will be published"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="latency and memory, .png or .html")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from bitkv import benchmark

    check_writable(args.json)
    if args.plot:
        benchmark.check_plot(args.plot)
    report = _measure(args)
    if not report.rows:
        raise ValueError("; ".join(report.refused))
    benchmark.render(report.rows, report.bandwidth_gbps, console=Console())
    for sentence in report.refused:
        print(f"bitkv: {sentence}", file=sys.stderr)
    if args.json:
        benchmark.write_json(report.rows, args.json)
    if args.plot:
        benchmark.plot(report.rows, args.plot)


def _measure(args: argparse.Namespace) -> "Report":
    import torch

    from bitkv import benchmark

    if args.threads:
        torch.set_num_threads(args.threads)
    recipes = [arguments.named_recipe(text) for text in args.recipe or _RECIPES]
    heads, kv_heads = args.heads
    with progress_display() as display:
        bar = display.add_task("", total=None)

        def show(label: str, done: int, total: int) -> None:
            display.update(bar, description=label, completed=done, total=total)

        return benchmark.run(
            recipes,
            args.context,
            backend=args.backend,
            batch=args.batch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=args.head_dim,
            dtype=args.dtype,
            quick=not args.full,
            command=args.command,
            progress=show,
        )
