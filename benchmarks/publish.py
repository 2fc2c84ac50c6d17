"""Make docs/results.md, the tables of README.md and the pictures from `benchmarks/results/*.json`."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import methods
from bitkv.cli.recipes import list_recipes
from bitkv.evaluation.report import wilson

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "methods", "gpu")),
)
Rows = list[dict[str, Any]]


def main() -> None:
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")
    from benchmarks import pictures

    pictures.quality([*rows("quality"), *rows("recall")], ROOT / "docs" / "quality.png")
    methods.picture(rows("methods"), rows("methods_stress"), ROOT / "docs" / "methods.png")
    pictures.attention(ROOT / "docs" / "attention.png")
    pictures.gpu(rows("gpu"), ROOT / "docs" / "gpu.png")
    if (RESULTS / "decode.json").exists():
        pictures.decode(ROOT / "docs" / "decode.png")


def rows(name: str) -> Rows:
    loaded = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    found: Rows = loaded["rows"] if isinstance(loaded, dict) else loaded
    return found


def filled(text: str) -> str:
    """The document with every `<!-- table NAME -->` … `<!-- end -->` block made anew."""
    pattern = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}{_table(m[2])}{m[3]}", text)


def _table(name: str) -> str:
    try:
        return TABLES[name]()
    except FileNotFoundError as error:
        return f"Not measured yet: `python -m benchmarks.run {Path(error.filename).stem}`.\n"


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


def attended(name: str = "attention") -> Rows:
    """Rows of attention, rivals included."""
    return [row for row in rows(name) if row["operation"] == "attend"]


def is_rival(row: dict[str, Any]) -> bool:
    return row["backend"].startswith(("vllm", "sdpa-"))


def label(row: dict[str, Any]) -> str:
    """A cache by its recipe or name, a rival of attention by its name and dtype; "cpu" is understood."""
    if row["backend"] in ("cpu", "sdpa"):
        return f"`{row['recipe']}`"
    return f"`{row['backend']}` {row['recipe']}"


def by_context(chosen: Rows, cell: Callable[[dict[str, Any]], str]) -> str:
    """A line for each recipe and rival, a column for each context."""
    contexts = sorted({row["context"] for row in chosen})
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for row in chosen:
        lines.setdefault(label(row), {})[row["context"]] = row
    cells = [
        [
            name,
            f"{line[max(line)]['bits_per_element']:.2f}",
            *(cell(line[context]) if context in line else "–" for context in contexts),
        ]
        for name, line in lines.items()
    ]
    return markdown(["", "bits", *(f"{context:,}" for context in contexts)], cells)


def times(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def attention() -> str:
    """Milliseconds against context."""
    return by_context(attended(), lambda row: f"{row['ms']:.3g}")


def line() -> str:
    """Milliseconds of recipes as a line of the context, fitted to the relative errors."""
    lines = []
    chosen = [row for row in attended() if not is_rival(row)]
    for recipe in dict.fromkeys(map(label, chosen)):
        context, ms = np.array([(r["context"], r["ms"]) for r in chosen if label(r) == recipe]).T
        columns = np.stack([1 / ms, context / ms], axis=1)
        fixed, each = np.linalg.lstsq(columns, np.ones(len(ms)), rcond=None)[0]
        ratio = ms / (fixed + each * context)
        low, high = f"{ratio.min() - 1:+.0%}", f"{ratio.max() - 1:+.0%}"
        lines.append([recipe, f"{fixed * 1e3:.0f}", f"{each * 1e6:.1f}", f"{low} to {high}"])
    return markdown(["", "µs at no tokens", "ns a token", "measured against that"], lines)


def bandwidth() -> str:
    """GB/s against context, and what part of the measured read bandwidth that is."""
    return by_context(attended(), lambda row: f"{row['gbps']:.1f} ({row['fraction_of_bandwidth']:.0%})")


def speedup() -> str:
    """Recipes against the fastest SDPA variant, and against vLLM where it was measured."""

    def cell(row: dict[str, Any]) -> str:
        beside = f" / {times(row['vs_vllm'])}" if row.get("vs_vllm") else ""
        return times(row["vs_sdpa"]) + beside

    return by_context([row for row in attended() if not is_rival(row)], cell)


def speed() -> str:
    """One context, 131,072 tokens or the longest below: recipes, SDPA's fastest variant, and vLLM.

    Where vLLM takes AMX, its kernels for CPUs without it have a column of their own.
    """
    measured = attended()
    context = max(c for c in {row["context"] for row in measured} if c <= 131072)
    plain = [row["ms"] for row in measured if row["backend"] == "vllm-vec" and row["context"] == context]
    lines = [
        [
            label(row),
            f"{row['bits_per_element']:.2f}",
            f"{row['ms']:.3g}",
            f"{row['gbps']:.1f}",
            f"{row['fraction_of_bandwidth']:.0%}",
            times(row["vs_sdpa"]),
            times(row.get("vs_vllm")),
            *(times(ms / row["ms"]) for ms in plain),
        ]
        for row in measured
        if row["context"] == context and (not is_rival(row) or row["vs_sdpa"] >= 1)
    ]
    headings = [f"{context:,} tokens", "bits", "ms", "GB/s", "of read bandwidth", "× SDPA", "× vLLM"]
    return markdown([*headings, *("× vLLM without AMX" for _ in plain)], lines)


def codebooks() -> str:
    """Milliseconds, and what part of the read bandwidth, of recipes with codebooks."""
    chosen = [row for row in attended("codebooks") if not is_rival(row)]
    return by_context(chosen, lambda row: f"{row['ms']:.3g} ({row['fraction_of_bandwidth']:.0%})")


def matrix() -> str:
    """Eight query heads a KV head, without and with the matrix unit."""
    found = [row for row in attended("matrix") if not is_rival(row)]
    without, beside = ({label(r): r for r in found if r["isa"] == isa} for isa in ("avx512", "amx"))
    lines = [
        [
            name,
            f"{without[name]['ms']:.3g}",
            f"{row['ms']:.3g}",
            times(without[name]["ms"] / row["ms"]),
            f"{row['fraction_of_bandwidth']:.0%}",
        ]
        for name, row in beside.items()
    ]
    headings = ["64/8 heads, 131,072 tokens", "avx512, ms", "amx, ms", "faster", "of read bandwidth"]
    return markdown(headings, lines)


def threads() -> str:
    """Fewest threads against most."""
    measured = attended("threads")
    low, high = (pick(row["threads"] for row in measured) for pick in (min, max))
    few, many = ({label(r): r for r in measured if r["threads"] == n} for n in (low, high))
    lines = [
        [
            name,
            f"{few[name]['ms']:.3g}",
            f"{row['ms']:.3g}",
            times(few[name]["ms"] / row["ms"]),
            f"{few[name]['fraction_of_bandwidth']:.0%}",
            f"{row['fraction_of_bandwidth']:.0%}",
        ]
        for name, row in many.items()
    ]
    rates = [f"of read bandwidth, {n}" for n in (low, high)]
    return markdown(["", f"ms, {low} thread", f"ms, {high} threads", "faster", *rates], lines)


def batch() -> str:
    """A batch of unequal lengths against one sequence, byte for byte."""
    measured = attended("batch")
    alone = {label(row): row for row in measured if row["batch"] == 1}
    lines = [
        [
            label(row),
            f"{alone[label(row)]['gbps']:.1f}",
            f"{row['gbps']:.1f}",
            f"{row['ms']:.3g}",
            times(alone[label(row)]["gbps"] / row["gbps"]),
        ]
        for row in measured
        if row["batch"] > 1
    ]
    return markdown(["", "GB/s alone", "GB/s in the batch", "ms", "time for its bytes"], lines)


def append() -> str:
    """What storing a token costs beside attending, without and with a page to pack."""
    by_recipe: dict[str, dict[str, float]] = {}
    for row in rows("append"):
        if not is_rival(row):
            by_recipe.setdefault(label(row), {})[row["operation"]] = row["ms"]
    lines = [
        [
            name,
            *(f"{ms[operation]:.3g}" for operation in ("step", "append", "flush")),
            f"{ms['append'] / ms['step']:.1%}",
            times(ms["flush-step"] / ms["step"]),
        ]
        for name, ms in by_recipe.items()
    ]
    headings = ["", "step ms", "append ms", "with a page ms", "append's share", "worst step"]
    return markdown(headings, lines)


def pack() -> str:
    """Packing a prompt, GB/s of 16-bit keys and values."""
    rates: dict[str, dict[str, float]] = {"pack": {}, "prompt": {}}
    for row in rows("pack"):
        rates[row["operation"]][f"`{row['recipe']}`"] = row["gbps"]
    lines = [[name, *(f"{rate[name]:.2f}" for rate in rates.values())] for name in rates["pack"]]
    return markdown(["", "pages alone, GB/s", "into an empty cache, GB/s"], lines)


def decode() -> str:
    """Milliseconds per token of a model, and how much faster than the stock 16-bit cache."""

    def cell(row: dict[str, Any]) -> str:
        return f"{row['ms']:.3g} ({times(row['vs_dynamic'])})"

    return by_context(rows("decode"), cell)


def decode_worst() -> str:
    """The slowest of the steps that fill a page against the median."""
    packed = [row for row in rows("decode") if row["backend"] != "sdpa"]
    return by_context(packed, lambda row: times(row["worst_ms"] / row["ms"]))


def decode_cache() -> str:
    """The part of a step that the cache takes."""
    return by_context(rows("decode"), lambda row: f"{row['cache_ms']:.3g}")


def _codes(row: dict[str, Any]) -> str:
    """What a page holds: codes with scales, or indices into codebooks."""
    if not row["channels"]:
        return f"{row['bits']} bit{'s' * (row['bits'] > 1)}, groups of {row['group']}"
    turned = ", keys to be turned" if row["shared"] == "turned" else ""
    return f"{row['channels']} channels in {row['bits']} bits{turned}"


def gpu_model() -> str:
    """What the attention kernel's main loop takes on a GPU, by its instructions."""
    lines = [
        [
            _codes(row),
            f"{row['bits_per_element']:.2f}",
            f"{row['instructions']:,}",
            "" if row["channels"] else f"{row['mma']}",
            "" if row["channels"] else f"{row['conversions_per_code']:.2f}",
            f"{row['memory_ns']:.0f}",
            *(f"{row['issue_ns'][c]:.0f} ({row['issue_fraction'][c]:.2f})" for c in row["issue_ns"]),
            "" if row["channels"] else f"{row['tensor_fraction']:.2f}",
        ]
        for row in rows("gpu_model")
    ]
    headings = ["codes", "bits", "instructions", "of tensor cores", "conversions a code"]
    times = ["memory ns", "issue ns at 1.98 GHz", "at 1.755 GHz", "tensor cores"]
    return markdown([*headings, *times], lines)


GPU_NAMES = {
    "SDPA fp16, enable_gqa": "PyTorch SDPA, fp16",
    "FlashInfer fp16": "FlashInfer, fp16",
    "FlashInfer fp8": "FlashInfer, fp8",
    "16-bit": "pages of 16 bits",
    **{f"{b}-bit/page": f"{b} bit{'s' * (b > 1)}, groups of a page" for b in (4, 2, 1)},
    **{f"{b}-bit/32": f"{b} bit{'s' * (b > 1)}, groups of 32" for b in (4, 2, 1)},
}


def gpu(cases: Sequence[tuple[int, int, int, int]], heading: Callable[..., str], *, copy: bool) -> str:
    """Microseconds on a GPU, and how much faster than the fastest attention in 16 bits in that run.

    Args:
        cases: query heads, KV heads, context, batch.
        heading: of a case.
        copy: whether the share of the copy bandwidth is shown too.
    """
    columns = [[r for r in rows("gpu") if r["what"] == "attention" and case_of(r) == c] for c in cases]
    lines = []
    for name, label in GPU_NAMES.items():
        line = [label]
        for column in columns:
            row = next(r for r in column if r["name"] == name)
            share = f", {row['of_copy']:.0%}" if copy else ""
            line.append(f"{row['us']:.1f} ({row['speedup']:.2f}×{share})")
        lines.append(line)
    return markdown(["", *(heading(*case) for case in cases)], lines)


def case_of(row: dict[str, Any]) -> tuple[int, int, int, int]:
    return row["heads"], row["kv_heads"], row["context"], row["batch"]


def gpu_contexts() -> str:
    """By context: 32 query heads, 8 KV heads, one sequence."""
    contexts = (4096, 16384, 32768, 131072, 262144, 1048576)
    return gpu([(32, 8, n, 1) for n in contexts], lambda *case: f"{case[2]:,}", copy=False)


def gpu_shapes() -> str:
    """By heads and batch."""
    cases = [(64, 8, 131072, 1), (32, 32, 131072, 1), (32, 8, 32768, 8), (32, 8, 32768, 32)]
    return gpu(cases, lambda h, kv, n, b: f"{h}/{kv} heads, {b} × {n:,}", copy=True)


def gpu_codebooks() -> str:
    """Codebooks at 131,072 tokens, as `launch_of` launches them."""
    launch = "tile 128, 4 warps, 1 stages, 0 registers, 2 programs"
    found = [r for r in rows("gpu") if r["what"] == "launch" and r["note"] == launch]
    best = min(
        r["us"]
        for r in rows("gpu")
        if r["name"] in ("16-bit", "SDPA fp16, enable_gqa")
        and r["what"] == "attention"
        and case_of(r) == (32, 8, 131072, 1)
    )
    lines = [[r["name"], f"{r['us']:.0f}", times(best / r["us"])] for r in found]
    return markdown(["", "µs", "× 16 bits"], lines)


def gpu_storing() -> str:
    """A step of a static cache, and packing a prompt, one layer of 8 KV heads."""
    found = rows("gpu_storing")
    lines = []
    for name in dict.fromkeys(r["name"] for r in found if r["what"] == "pack"):
        mine = [r for r in found if r["name"] == name]
        steps = [r["us"] for r in mine if r["what"] == "step"]
        pack = next(r for r in mine if r["what"] == "pack")
        lines.append([name, *(f"{us:.1f}" for us in steps), f"{pack['us']:.0f}", f"{pack['gbps']:,.0f}"])
    headings = [
        "",
        "adds a token",
        "packs a page",
        "32 sequences: add",
        "pack",
        "32,768 tokens packed",
        "GB/s",
    ]
    return markdown(headings, lines)


def serving() -> str:
    """Decode steps and capacity inside vLLM, beside its own cache in the same run."""
    found = rows("serving")
    contexts = list(dict.fromkeys((r["sequences"], r["context"]) for r in found))
    headings = ["", "tokens a GiB", "× bfloat16"]
    for sequences, context in contexts:
        headings += [f"{sequences} × {context:,}: attention ms", "×", "step ms", "×"]
    lines = []
    for recipe in dict.fromkeys(r["recipe"] for r in found):
        of = {r["context"]: r for r in found if r["recipe"] == recipe}
        first = of[contexts[0][1]]
        per_gib = first["cache_tokens_beside_tails"] // first["gib"]
        line = [f"`{recipe}`", f"{per_gib:,}", times(first["capacity_ratio"])]
        for _, context in contexts:
            row = of[context]
            for name in ("attention_ms_per_step", "ms_per_step"):
                line += [f"{row[name]:.1f}", times(row[f"{name}_ratio"])]
        lines.append(line)
    return markdown(headings, lines)


def recipes() -> str:
    """Every preset, measured on a page."""
    lines = []
    for row in list_recipes():
        bits = " or ".join(f"{x:g}" for x in row.bits_per_element)
        lines.append([f"`{row.name}`", bits, row.summary, row.source])
    return markdown(["recipe", "bits", "what", "source"], lines).replace("---:", "---")


TABLES: dict[str, Callable[[], str]] = {
    "serving": serving,
    "recipes": recipes,
    "methods": lambda: methods.table(rows("methods"), markdown),
    "methods_short": lambda: methods.short_table(rows("methods"), markdown),
    "methods_stress": lambda: methods.short_table(rows("methods_stress"), markdown, every=True),
    "methods_recall": lambda: methods.recall_table(rows("methods_recall"), markdown),
    "methods_stress_recall": lambda: methods.recall_table(rows("methods_stress_recall"), markdown),
    "fisher": lambda: methods.fisher_table(
        {"bundled": rows("fisher"), "with outlier channels": rows("fisher_stress")}, markdown
    ),
    "allocation": lambda: methods.allocation_table(rows("allocation"), markdown),
    "demo": lambda: generate("generate"),
    "prefill": lambda: generate("prefill"),
    "quality": quality,
    "levels": levels,
    "speed": speed,
    "attention": attention,
    "line": line,
    "bandwidth": bandwidth,
    "speedup": speedup,
    "codebooks": codebooks,
    "matrix": matrix,
    "threads": threads,
    "batch": batch,
    "append": append,
    "pack": pack,
    "decode": decode,
    "decode_cache": decode_cache,
    "decode_worst": decode_worst,
    "gpu_model": gpu_model,
    "gpu_contexts": gpu_contexts,
    "gpu_shapes": gpu_shapes,
    "gpu_codebooks": gpu_codebooks,
    "gpu_storing": gpu_storing,
}


if __name__ == "__main__":
    main()
