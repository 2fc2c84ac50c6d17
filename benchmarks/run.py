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
from pathlib import Path

import torch

from benchmarks import publish
from bitkv import Affine
from bitkv.cli import main as bitkv
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
    "best2",
    "best1",
    "asymkv(2, 0)",
    "affine(1, 32)",
    "affine(1, 32, 'mse')",
    "affine(1, 32, 'unbiased')",
)
_NAMED = [word for recipe in RECIPES for word in ("--recipe", recipe)]

_LEVELS = [
    *("eval", *(word for name in publish.LEVELS.values() for word in ("--recipe", name))),
    *("--task", "needle", "--length", "4096", "--samples", "200"),
]

COMMANDS: dict[str, list[str]] = {
    "generate": ["generate", "--demo", "--compare"],
    "prefill": ["generate", "--compare", "--file"],
    # in float32 the stock cache has no rounding of its own to be mistaken for a recipe's
    "quality": [
        *("eval", *_NAMED, "--dtype", "float32", "--tokens", "16384"),
        *("--task", "perplexity", "agreement", "fidelity"),
    ],
    "recall": ["eval", *_NAMED, "--task", "needle", "--samples", "60"],
    "levels": [*_LEVELS, "--dtype", "float32"],
    "levels16": [*_LEVELS, "--seed", "1"],
    "attention": ["bench", "--full", "--context", "1024", "4096", "16384", "65536"],
}
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
            print("$ bitkv", shlex.join(command), flush=True)
            code = bitkv(command)
        if code:
            return code
    publish.main()
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
