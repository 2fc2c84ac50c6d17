"""Measure everything that README and docs/results.md show: `python -m benchmarks.run`.

Each measurement is a `bitkv` command anyone can repeat; its rows go to `benchmarks/results/`. Tables and
pictures are made from those files by `benchmarks.publish`.
"""

import argparse
import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import methods, publish
from bitkv import Affine, native
from bitkv.cli import main as bitkv
from bitkv.files import write_json
from bitkv.generation import checkpoint

# relative: the commands are written into the results
RESULTS = Path(os.path.relpath(Path(__file__).parent / "results"))
ASSETS = Path(__file__).parents[1] / "bitkv" / "assets"
RECIPES = (
    "fp16",
    "int8",
    "kivi4",
    "kivi2",
    "affine(2, 32, 'mse')",
    "affine(2, 32, 'unbiased')",
    "quick2",
    "quick1",
    "asymkv(2, 0)",
    "affine(1, 32)",
    "affine(1, 32, 'mse')",
    "affine(1, 32, 'unbiased')",
)
# one group a page and groups of 32, at 4, 2 and 1 bits; then the recipes chosen for quality
SPEED = (
    "affine(4, 'page')",
    "affine(2, 'page')",
    "affine(1, 'page')",
    "kivi4",
    "kivi2",
    "affine(1, 32)",
    "quick2",
    "quick1",
)
CODEBOOKS = (
    *(f"Recipe(Coupled({c}, 8, rope='after'), Coupled({c}, 8))" for c in (2, 4, 8)),
    *("cq(2, 8)", "cq(4, 8)", "cq(8, 8)", "best2", "best1.25", "affine(2, 'page')"),
)
PACKING = (*SPEED, "fp16", "affine(4, 32, 'mse')", "affine(2, 32, 'mse')", "affine(1, 32, 'mse')")


def _named(recipes: Sequence[str]) -> list[str]:
    return [word for recipe in recipes for word in ("--recipe", recipe)]


_LEVELS = [
    *("eval", *_named([*publish.LEVELS.values()])),
    *("--task", "needle", "--length", "4096", "--samples", "200"),
]

COMMANDS: dict[str, list[str]] = {
    "generate": ["generate", "--demo", "--compare"],
    "prefill": ["generate", "--compare", "--file"],
    # in float32 the stock cache has no rounding of its own to be mistaken for a recipe's
    "quality": [
        *("eval", *_named(RECIPES), "--dtype", "float32", "--tokens", "16384"),
        *("--task", "perplexity", "agreement", "fidelity"),
    ],
    "methods": ["eval", *_named(methods.RECIPES), *methods.COMMAND],
    "methods_stress": ["eval", *_named(methods.STRESSED), *methods.STRESS_COMMAND],
    "methods_recall": ["eval", *_named(methods.RECALLED), *methods.RECALL_COMMAND],
    "methods_stress_recall": [
        *("eval", *_named(methods.STRESS_RECALLED), *methods.STRESS_RECALL_COMMAND),
    ],
    "fisher": ["eval", *_named(methods.FISHER), *methods.FISHER_COMMAND],
    "fisher_stress": ["eval", *_named(methods.FISHER), *methods.FISHER_COMMAND, "--stress"],
    "allocation": ["eval", *_named(methods.ALLOCATED), *methods.ALLOCATION_COMMAND],
    "recall": ["eval", *_named(RECIPES), "--task", "needle", "--samples", "60"],
    "levels": [*_LEVELS, "--dtype", "float32"],
    "levels16": [*_LEVELS, "--seed", "1"],
    # with a Python that has vLLM, this one compares with it too
    "attention": [
        *("bench", "attention", "--full", *_named(SPEED)),
        *("--context", "4096", "16384", "131072", "1048576"),
    ],
    # codecs that learn have learned Gaussian data here: speed does not depend on it
    "codebooks": [
        *("bench", "attention", "--full", *_named(CODEBOOKS), "--context", "32768", "131072"),
    ],
    # eight query heads a KV head, as in a model of 70 billion parameters, with each of INSTRUCTION_SETS
    "matrix": [
        *("bench", "attention", "--full", *_named(CODEBOOKS[:-1])),
        *("--heads", "64/8", "--context", "131072"),
    ],
    "threads": [
        *("bench", "attention", "--full", *_named(SPEED)),
        *("--context", "131072", "--threads", "1", "2"),
    ],
    "batch": [
        *("bench", "attention", "--full", *_named(SPEED)),
        *("--context", "65536", "--batch", "1", "8", "--ragged"),
    ],
    "append": ["bench", "attention", "--full", *_named(PACKING), "--context", "32768"],
    "pack": ["bench", "pack", "--full", *_named(PACKING), "--context", "32768"],
    "decode": [
        *("bench", "decode", "--full", *_named(("kivi4", "kivi2", "quick2", "quick1"))),
        *("--context", "4096", "16384", "32768", "65536", "131072"),
    ],
}
# measured with each of these
INSTRUCTION_SETS = {"matrix": ("avx512", "amx")}
SEEDS = {"fisher": methods.SEEDS, "fisher_stress": methods.SEEDS}
PREFILL_TOKENS = 8000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of gaussian, {', '.join(COMMANDS)} (all)")
    for name in parser.parse_args().names or ("gaussian", *COMMANDS):
        target = RESULTS / f"{name}.json"
        if name == "gaussian":
            target.write_text(json.dumps(gaussian(), indent=1) + "\n")
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [*COMMANDS[name], "--json", str(target)]
            if name == "prefill":
                command.insert(3, str(held_out_prompt(Path(folder) / "prompt.txt", PREFILL_TOKENS)))
            isas, seeds = INSTRUCTION_SETS.get(name, (None,)), SEEDS.get(name, (None,))
            code = measure(command, target, isas, seeds)
        if code:
            return code
    publish.main()
    return 0


def measure(
    command: list[str], target: Path, isas: Sequence[str | None], seeds: Sequence[int | None]
) -> int:
    """Run a command that writes rows to `target`, with each instruction set and each seed."""
    rows: list[dict[str, object]] = []
    for isa, seed in itertools.product(isas, seeds):
        words = command if seed is None else [*command, "--seed", str(seed)]
        print("$", f"BITKV_CPU_ISA={isa}" if isa else "", "bitkv", shlex.join(words), flush=True)
        if isa:
            os.environ["BITKV_CPU_ISA"] = isa
        native.isa.cache_clear()
        code = bitkv(words)
        os.environ.pop("BITKV_CPU_ISA", None)
        if code:
            return code
        marks = {} if seed is None else {"seed": seed}
        rows += [row | marks for row in json.loads(target.read_text())]
    write_json(target, rows)
    return 0


def gaussian() -> list[dict[str, object]]:
    """Normalised squared error on independent Gaussian data; the bits include scales."""
    x = torch.randn(4096, 8, 128, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    rows: list[dict[str, object]] = []
    for bits, group, levels in itertools.product(
        (1, 2, 4), (32, 64, 128), ("minmax", "mse", "unbiased")
    ):
        codec = Affine(bits, "token", group, levels)
        error = codec.dequantize(codec.quantize(x)) - x
        part = codec.part_format("value", head_dim=128, page_size=128, dtype=torch.float16)
        rows.append(
            {
                "codec": repr(codec),
                "bits": bits,
                "group_size": group,
                "levels": levels,
                "bits_per_element": part.bits_per_element,
                "nmse": (error.square().sum() / x.square().sum()).item(),
            }
        )
    return rows


def held_out_prompt(path: Path, tokens: int) -> Path:
    """Held-out text of so many tokens, in a file."""
    tokenizer = checkpoint.load_tokenizer(checkpoint.locate(None))
    text = (ASSETS / "heldout.txt").read_text(encoding="utf-8")[: 8 * tokens]
    ids = tokenizer(text, verbose=False)["input_ids"][1:tokens]
    path.write_text(tokenizer.decode(ids), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
