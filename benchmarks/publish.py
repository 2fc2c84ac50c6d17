"""Make docs/results.md, the tables of README.md and the pictures from `benchmarks/results/*.json`."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bitkv.cli.recipes import list_recipes
from bitkv.evaluation.report import wilson

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")
Rows = list[dict[str, Any]]


def main() -> None:
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")
    from benchmarks import pictures

    pictures.quality([*rows("quality"), *rows("recall")], ROOT / "docs" / "quality.png")
    pictures.attention(ROOT / "docs" / "attention.png")


def rows(name: str) -> Rows:
    loaded: Rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def filled(text: str) -> str:
    """The document with every `<!-- table NAME -->` … `<!-- end -->` block made anew."""
    pattern = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", text)


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first column is left-aligned and the others right-aligned."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, rule, *lines))


def generate(name: str) -> str:
    """The stock cache beside a packed one."""
    stock, packed = rows(name)

    def line(label: str, form: str, value: Callable[[dict[str, Any]], float | None]) -> list[str]:
        pair = [value(stock), value(packed)]
        cells = ["–" if x is None else format(x, form) for x in pair]
        ratio = f"{pair[1] / pair[0]:.2f}×" if pair[0] and pair[1] is not None else ""
        return [label, *cells, ratio]

    def decode_ms(run: dict[str, Any]) -> float:
        return 1000 * float(run["decode_s"]) / (len(run["token_ids"]) - 1)

    same = [a == b for a, b in zip(stock["token_ids"], packed["token_ids"], strict=False)]
    first = "none" if all(same) else str(same.index(False) + 1)
    return markdown(
        [f"{stock['prompt_tokens']:,} prompt tokens", f"stock {stock['dtype']}", "kivi2", "ratio"],
        [
            line("cache MB", ".2f", lambda run: run["cache_bytes"] / 1e6),
            line("bits per element", ".2f", lambda run: run["bits_per_element"]),
            line("… beyond the hot window", ".2f", lambda run: run["packed_bits_per_element"]),
            line("prefill s", ".2f", lambda run: run["prefill_s"]),
            line("ms per token", ".1f", decode_ms),
            line("peak MB above the model, prefill", ".1f", lambda run: run["peak_prefill_bytes"] / 1e6),
            line("peak MB above the model, decode", ".1f", lambda run: run["peak_decode_bytes"] / 1e6),
            ["first differing token", "", first, ""],
        ],
    )


def by_task(task: str, context: int | None = None) -> dict[str, dict[str, Any]]:
    """The rows of a task by recipe, at one context where there are several."""
    found = (row for row in (*rows("quality"), *rows("recall")) if row["task"] == task)
    return {row["recipe"]: row for row in found if context in (None, row["context"])}


def quality() -> str:
    """Every recipe: bits, then what it costs."""
    loss, agreement, fidelity = map(by_task, ("perplexity", "agreement", "fidelity"))
    near, far = by_task("needle", 1024), by_task("needle", 4096)
    lines = []
    for name in loss:
        kl, errors = agreement.get(name), fidelity.get(name)
        lines.append(
            [
                f"`{name}`",
                f"{far[name]['packed_bits_per_element'] or far[name]['bits_per_element']:.2f}",
                f"{far[name]['bits_per_element']:.2f}",
                f"{loss[name]['delta_nats']:+.4f}",
                f"{kl['kl_mean']:.5f}" if kl else "–",
                f"{kl['top1']:.2%}" if kl else "–",
                f"{errors['both_error']:.3f}" if errors else "–",
                _share(near[name]),
                _share(far[name]),
            ]
        )
    headings = ["recipe", "bits", "with window", "Δ nats", "KL", "top-1", "AV error"]
    return markdown([*headings, "needle 1K", "needle 4K"], lines)


def _share(row: dict[str, Any]) -> str:
    return f"{row['exact_match']:.1%} ({row['low']:.0%}–{row['high']:.0%})"


def _pooled(recipe: str) -> str:
    """Recall over both runs of the levels: two dtypes, two sets of prompts."""
    found = [row for row in (*rows("levels"), *rows("levels16")) if row["recipe"] == recipe]
    hits, samples = (sum(row[name] for row in found) for name in ("hits", "samples"))
    low, high = wilson(hits, samples)
    return _share({"exact_match": hits / samples, "low": low, "high": high})


LEVELS = {
    (2, "minmax"): "kivi2",
    (2, "mse"): "affine(2, 32, 'mse')",
    (2, "unbiased"): "affine(2, 32, 'unbiased')",
    (1, "minmax"): "affine(1, 32)",
    (1, "mse"): "affine(1, 32, 'mse')",
    (1, "unbiased"): "affine(1, 32, 'unbiased')",
}


def levels() -> str:
    """Searched levels against min-max ones, same bytes."""
    kl, fidelity = by_task("agreement"), by_task("fidelity")
    error = {
        (row["bits"], row["levels"]): row["nmse"] for row in rows("gaussian") if row["group_size"] == 32
    }
    lines = [
        [
            f"{bits}",
            kind,
            f"{fidelity[name]['packed_bits_per_element']:.1f}",
            f"{error[bits, kind]:.3f}",
            f"{fidelity[name]['key_nmse']:.3f}",
            f"{fidelity[name]['value_nmse']:.3f}",
            f"{kl[name]['kl_mean']:.4f}",
            _pooled(name),
        ]
        for (bits, kind), name in LEVELS.items()
    ]
    headings = ["code bits", "levels", "bits", "Gaussian NMSE", "K NMSE", "V NMSE", "KL"]
    return markdown([*headings, "needle 4K"], lines)


def attention() -> str:
    """Decode attention against context, the fastest SDPA beside each recipe."""
    measured = [row for row in rows("attention") if row["operation"] == "attend"]
    contexts = sorted({row["context"] for row in measured})
    names = dict.fromkeys((row["backend"], row["recipe"]) for row in measured)
    cell = {(row["backend"], row["recipe"], row["context"]): row for row in measured}
    lines = [
        [
            f"`{backend}` {recipe}",
            f"{cell[backend, recipe, contexts[-1]]['bits_per_element']:.2f}",
            *(f"{cell[backend, recipe, c]['ms']:.3g}" for c in contexts),
            f"{cell[backend, recipe, contexts[-1]]['gbps']:.2f}",
        ]
        for backend, recipe in names
    ]
    headings = ["", "bits", *(f"{c:,}" for c in contexts), "GB/s at the longest"]
    return markdown(headings, lines)


def recipes() -> str:
    """Every preset, measured on a page."""
    lines = []
    for row in list_recipes():
        bits = " or ".join(f"{x:g}" for x in row.bits_per_element)
        lines.append([f"`{row.name}`", bits, row.summary, row.source])
    return markdown(["recipe", "bits", "what", "source"], lines).replace("---:", "---")


TABLES: dict[str, Callable[[], str]] = {
    "recipes": recipes,
    "demo": lambda: generate("generate"),
    "prefill": lambda: generate("prefill"),
    "quality": quality,
    "levels": levels,
    "attention": attention,
}


if __name__ == "__main__":
    main()
