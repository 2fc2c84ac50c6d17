"""Pictures made from committed results."""

from pathlib import Path
from typing import Any

import matplotlib

from bitkv import benchmark

RESULTS = Path(__file__).parent / "results"
COLOURS = {"min–max levels": "#D55E00", "searched levels": "#0072B2"}
MARKS = {"min–max levels": "o", "searched levels": "D"}
SHOWN = ("int8", "kivi4", "kivi2", "asymkv(2, 0)", "affine(1, 32)", "quick2", "quick1")
# labels stand on the outer side of their point: (offset in points, alignment)
SIDES = {"min–max levels": ((8, -11), "left"), "searched levels": ((-8, 4), "right")}


def attention(path: Path) -> None:
    """Latency and memory against context."""
    benchmark.plot(benchmark.read_json(RESULTS / "attention.json", benchmark.Row), path)


def decode(path: Path) -> None:
    """Milliseconds per token of a model, and its keys and values, against context."""
    benchmark.plot_decode(benchmark.read_json(RESULTS / "decode.json", benchmark.DecodeRow), path)


GPU_LINES = {  # names in gpu.json: label, colour, style, where the label stands in points
    "FlashInfer fp16": ("FlashInfer fp16", "#999999", "--", 8),
    "16-bit": ("16 bits", "#000000", "-", -7),
    "FlashInfer fp8": ("FlashInfer fp8", "#CC79A7", "--", 0),
    "4-bit/page": ("4 bits", "#D55E00", "-", 0),
    "1-bit/page": ("1 bit", "#009E73", "-", 6),
    "2-bit/page": ("2 bits", "#0072B2", "-", -7),
}


def gpu(rows: list[dict[str, Any]], path: Path) -> None:
    """Microseconds of attention on a GPU against context: 32 query heads, 8 KV heads, one sequence."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = {"what": "attention", "heads": 32, "kv_heads": 8, "batch": 1}
    shown = [row for row in rows if shape.items() <= row.items() and row["us"]]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, (label, colour, style, height) in GPU_LINES.items():
        points = sorted((row["context"], row["us"]) for row in shown if row["name"] == name)
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colour)
        axes.annotate(
            label,
            points[-1],
            xytext=(8, height),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    contexts = sorted({row["context"] for row in shown})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds", xlim=(3600, 2.4e6))
    axes.set_xticks(contexts, [f"{n >> 10}K" if n < 1 << 20 else "1M" for n in contexts])
    axes.set_yticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1000"])
    axes.minorticks_off()
    axes.grid(color="#eeeeee")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def quality(rows: list[dict[str, Any]], path: Path) -> None:
    """What is lost against measured bits: KL divergence, and needle recall at the longest length."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kl = [row for row in rows if row["task"] == "agreement" and row["recipe"] in SHOWN]
    needle = [row for row in rows if row["task"] == "needle"]
    longest = max(row["context"] for row in needle)
    needle = [row for row in needle if row["context"] == longest]
    stock = next(row for row in needle if row["recipe"] == "stock")
    needle = [row for row in needle if row["recipe"] in SHOWN]

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _scatter(left, kl, "kl_mean")
    left.set(
        yscale="log", ylim=(5e-7, 10), ylabel="KL to 16 bits, nats per token", title="Lower is better"
    )
    _scatter(right, needle, "exact_match")
    right.axhline(stock["exact_match"], color="#999999", linewidth=1, linestyle=":")
    right.annotate("16 bits", (1.02, stock["exact_match"]), va="bottom", color="#777777")
    right.set(
        ylabel=f"needle recall at {longest:,} tokens", title="Higher is better", ylim=(-0.12, 1.08)
    )
    for axes in (left, right):
        axes.set(xlabel="measured bits per element beyond the hot window", xscale="log", xlim=(1, 11))
        axes.set_xticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
        axes.minorticks_off()
        axes.grid(color="#eeeeee")
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles, labels, frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _scatter(axes: Any, rows: list[dict[str, Any]], field: str) -> None:
    for kind, colour in COLOURS.items():
        chosen = [row for row in rows if _kind(row) == kind]
        if chosen:
            x = [row["packed_bits_per_element"] for row in chosen]
            y = [row[field] for row in chosen]
            axes.scatter(x, y, color=colour, marker=MARKS[kind], s=46, label=kind, zorder=3)
    for row in rows:
        offset, side = SIDES[_kind(row)]
        axes.annotate(
            row["recipe"],
            (row["packed_bits_per_element"], row[field]),
            textcoords="offset points",
            xytext=offset,
            ha=side,
            fontsize=9,
            color=COLOURS[_kind(row)],
        )


def _kind(row: dict[str, Any]) -> str:
    searched = "'mse'" in row["definition"] or "'unbiased'" in row["definition"]
    return "searched levels" if searched else "min–max levels"
