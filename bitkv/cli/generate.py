"""`bitkv generate`: text from a packed cache, or from it and the stock cache side by side."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitkv.cli import arguments, comparison
from bitkv.files import check_writable, write_json
from bitkv.generation.request import DTYPES, Request, Run

if TYPE_CHECKING:
    from rich.console import Console

SUMMARY = "generate text with a packed KV cache"
DESCRIPTION = """Generate text with a packed KV cache and stream it to standard output; figures go to
standard error. The prompt is --file, then --prompt, or standard input if neither is given."""
EXAMPLES = """examples:
  bitkv generate --demo --compare
  bitkv generate --prompt "def read_lines(path):" --max-new-tokens 40
  bitkv generate Qwen/Qwen3-0.6B --file report.txt --prompt "In short:" --recipe quick2
  bitkv generate --file report.txt --prompt "In short:" --recipe kivi2 --compare
  bitkv generate --file report.txt --save-cache report.kv --max-new-tokens 1
  bitkv generate --load-cache report.kv --prompt "In short:"
  bitkv generate --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 7
  cat notes.txt | bitkv generate --recipe "asymkv(4, 0)"
"""

_ASSETS = Path(__file__).parents[1] / "assets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory or hub id (default: the bundled model)")
    parser.add_argument(
        "--recipe", default="kivi2", metavar="TEXT|@FILE", help="see `bitkv recipes` (kivi2)"
    )
    parser.add_argument("--backend", default="auto", help="attention over packed pages (auto)")
    parser.add_argument(
        "--compare", action="store_true", help="run the stock cache too and print one table"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    _add_prompt(parser.add_argument_group("prompt"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_model(parser.add_argument_group("model and cache"))


def _add_prompt(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", metavar="TEXT", help="text, or the question about --file")
    group.add_argument("--file", metavar="PATH", help="a document")
    group.add_argument(
        "--demo", action="store_true", help="the bundled document, and its question unless --prompt"
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", type=arguments.count, default=64, metavar="N", help="(64)")
    group.add_argument(
        "--temperature", type=arguments.temperature, default=0.0, metavar="T", help="0 is greedy (0)"
    )
    group.add_argument("--top-p", type=arguments.probability, default=1.0, metavar="P", help="(1)")
    group.add_argument(
        "--top-k", type=arguments.natural, default=0, metavar="K", help="0 keeps all tokens (0)"
    )
    group.add_argument("--seed", type=arguments.natural, default=0, metavar="N", help="(0)")


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model (its own)")
    group.add_argument("--device", default="auto", help="such as cpu or cuda:0 (a GPU if there is one)")
    group.add_argument(
        "--prefill-chunk", type=arguments.count, metavar="N", help="read the prompt N tokens at a time"
    )
    group.add_argument(
        "--save-cache", metavar="FILE", help="keep the cache as it is when the prompt is read"
    )
    group.add_argument("--load-cache", metavar="FILE", help="continue from a saved cache")


def run(args: argparse.Namespace) -> None:
    if args.compare and (args.save_cache or args.load_cache):
        raise ValueError(
            "--compare reads the whole prompt in both runs; drop --save-cache, --load-cache"
        )
    check_writable(args.json)
    check_writable(Path(args.save_cache) if args.save_cache else None)
    request = _request(args)
    runs = _compare(args, request) if args.compare else [_stream(request)]
    if args.json:
        write_json(args.json, [dataclasses.asdict(run) for run in runs])


def _request(args: argparse.Namespace) -> Request:
    return Request(
        prompt=_prompt(args),
        model=args.model,
        recipe=_recipe_text(args.recipe),
        backend=arguments.backend(args.backend),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        prefill_chunk=args.prefill_chunk,
        dtype=args.dtype,
        device=args.device,
        load_cache=args.load_cache,
        save_cache=args.save_cache,
    )


def _prompt(args: argparse.Namespace) -> str:
    """Document and question, or standard input."""
    path, question = args.file, args.prompt
    if args.demo:
        if path is not None:
            raise ValueError("--demo brings its own document; drop --file")
        path = str(_ASSETS / "document.txt")
        question = arguments.read_text(str(_ASSETS / "question.txt")) if question is None else question
    parts = [] if path is None else [arguments.read_text(path)]
    parts += [] if question is None else [question]
    if not parts:
        if sys.stdin.isatty():
            raise ValueError("there is no prompt; pass --prompt, --file or text on standard input")
        parts = [sys.stdin.read()]
    prompt = arguments.paragraphs(*parts)
    if not prompt.strip():
        raise ValueError("the prompt is empty; pass a text with --prompt, --file or standard input")
    return prompt


def _stream(request: Request) -> Run:
    from rich.console import Console

    from bitkv.generation.checkpoint import quiet_transformers
    from bitkv.generation.measured import generate

    def write(text: str) -> None:
        status.stop()
        print(text, end="", flush=True)

    quiet_transformers()
    figures = Console(stderr=True)
    with figures.status("loading the model and reading the prompt") as status:
        run = generate(request, write)
    print()
    _print_figures(figures, run)
    return run


def _print_figures(console: "Console", run: Run) -> None:
    read = f"{run.prompt_tokens:,} tokens read in {run.prefill_s:.2f} s"
    speed = f" at {run.ms_per_token:.1f} ms each" if run.ms_per_token else ""
    beyond = run.packed_bits_per_element
    bits = f"{run.bits_per_element:.2f} bits an element"
    bits += f" ({beyond:.2f} beyond the hot window)" if beyond else " (all in the hot window)"
    written = f"{len(run.token_ids)} written{speed}"
    cache = f"cache {run.cache_bytes / 1e6:.2f} MB, {bits}"
    console.print(f"{read} · {written} · {cache}", style="dim", highlight=False)


def _compare(args: argparse.Namespace, request: Request) -> list[Run]:
    """Packed first: what cannot be packed is refused before anything else is run."""
    label = args.recipe if len(args.recipe) <= comparison.LONGEST_LABEL else "packed"
    packed = comparison.run_alone(label, dataclasses.replace(request, measure_memory=True))
    stock = comparison.run_alone(
        "stock cache", dataclasses.replace(request, measure_memory=True, recipe=None)
    )
    comparison.print_table(label, request, stock, packed)
    return [stock, packed]


def _recipe_text(text: str) -> str:
    """What another process can read: a recipe file by its path, else the recipe's own text."""
    recipe = arguments.recipe(text)
    return repr(recipe) if recipe.calibration is None else str(Path(text).resolve())
