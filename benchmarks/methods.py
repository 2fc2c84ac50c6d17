"""The table and the picture that compare all methods, on the bundled model and on its stressed twin."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

OURS = ("best4", "best2", "best1.5", "best1.25", "best1", "quick2", "quick1")
PUBLISHED = (
    *("kivi4", "kivi2", "qserve4", "quarot(4)", "quarot(2)", "rotatekv2", "kvquant(2)", "kvquant(1)"),
    *("turboquant(4)", "turboquant(2)", "turboquant(1)", "qjl", "kitty", "nsn(2)", "nsn(1)", "tasq"),
    *("vecinfer(4, 8)", "cq(2, 8)", "cq(4, 8)", "cq(8, 10)", "cq(8, 8)", "cq(8, 8, 'uniform')"),
    *("asymkv(4, 0)", "asymkv(0, 4)"),
)
SHOWN = (
    *OURS,
    *(
        "kivi4",
        "kivi2",
        "kvquant(2)",
        "turboquant(2)",
        "cq(4, 8)",
        "cq(8, 10)",
        "cq(8, 8)",
        "tasq",
        "nsn(1)",
    ),
)
LEVELS = ("affine(1, 32)", "affine(1, 32, 'mse')")
COMMAND = (
    *("--dtype", "float32", "--sinks", "4", "--recent", "64", "--tokens", "4096"),
    *("--task", "agreement", "perplexity", "ood", "fidelity", "needle"),
    *("--length", "4096", "--samples", "40"),
)
RECIPES = (*PUBLISHED, *LEVELS, *OURS)
STRESSED = (
    *("kivi4", "kivi2", "quarot(4)", "quarot(2)", "rotatekv2", "kvquant(2)", "turboquant(4)"),
    *("turboquant(2)", "kitty", "nsn(1)", "tasq", "cq(2, 8)", "cq(4, 8)", "cq(8, 8)", *OURS),
)
STRESS_COMMAND = (
    *("--dtype", "float32", "--sinks", "4", "--recent", "64", "--tokens", "4096", "--stress"),
    *("--task", "agreement", "needle", "--length", "4096", "--samples", "20"),
    *("--calibration-tokens", "16384"),
)

Rows = list[dict[str, Any]]


def table(rows: Rows, markdown: Callable[..., str]) -> str:
    """A line for each recipe, fewest bits first."""
    tasks = ("agreement", "perplexity", "ood perplexity", "ood agreement", "fidelity", "needle")
    found = {task: {row["recipe"]: row for row in rows if row["task"] == task} for task in tasks}
    kl, loss, other, other_kl, errors, needle = (found[task] for task in tasks)
    names = sorted(kl, key=lambda name: kl[name]["packed_bits_per_element"])
    lines = [
        [
            f"**`{name}`**" if name in OURS else f"`{name}`",
            f"{kl[name]['packed_bits_per_element']:.2f}",
            f"{kl[name]['codebook_bytes'] / 1e6:.2f}" if kl[name]["codebook_bytes"] else "–",
            f"{loss[name]['delta_nats']:+.3f}",
            f"{kl[name]['kl_mean']:.4f}",
            f"{kl[name]['top1']:.1%}",
            f"{errors[name]['key_error']:.3f} / {errors[name]['value_error']:.3f}",
            f"{needle[name]['exact_match']:.0%}",
            f"{other[name]['delta_nats']:+.3f} / {other_kl[name]['kl_mean']:.4f}",
        ]
        for name in names
    ]
    headings = ["recipe", "bits", "codebooks MB", "Δ nats", "KL", "top-1", "AV error, K / V"]
    return markdown([*headings, "needle 4K", "another domain: Δ nats / KL"], lines)


def short_table(rows: Rows, markdown: Callable[..., str], *, every: bool = False) -> str:
    """The README's: fewer recipes unless `every` one is wanted, fewer columns."""
    kl, needle = (
        {row["recipe"]: row for row in rows if row["task"] == task} for task in ("agreement", "needle")
    )
    names = sorted(
        (name for name in kl if every or name in SHOWN),
        key=lambda name: kl[name]["packed_bits_per_element"],
    )
    lines = [
        [
            f"**`{name}`**" if name in OURS else f"`{name}`",
            f"{kl[name]['packed_bits_per_element']:.2f}",
            f"{kl[name]['kl_mean']:.4f}",
            f"{kl[name]['top1']:.1%}",
            f"{needle[name]['exact_match']:.0%}",
        ]
        for name in names
    ]
    return markdown(["recipe", "bits", "KL", "top-1", "needle 4K"], lines)


def picture(plain: Rows, stressed: Rows, path: Path) -> None:
    """KL divergence and needle recall against measured bits, ours and all others."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    titles = ("KL to 16 bits", "The same with outlier channels", "Needle recall at 4,096 tokens")
    chosen = [
        ([row for row in plain if row["task"] == "agreement"], "kl_mean"),
        ([row for row in stressed if row["task"] == "agreement"], "kl_mean"),
        ([row for row in plain if row["task"] == "needle" and row["recipe"] != "stock"], "exact_match"),
    ]
    for axes, title, (rows, field) in zip(panels, titles, chosen, strict=True):
        _scatter(axes, rows, field)
        axes.set(xlabel="measured bits per element in pages", title=title, xlim=(0.8, 5.4))
        axes.grid(color="#eeeeee")
        if field == "kl_mean":
            axes.set(yscale="log", ylabel="nats per token")
        else:
            axes.set(ylabel="share of exact answers", ylim=(-0.05, 1.08))
    panels[0].legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _scatter(axes: Any, rows: Rows, field: str) -> None:
    ours = [row for row in rows if row["recipe"] in OURS]
    others = [row for row in rows if row["recipe"] not in OURS]
    for group, colour, marker, label in (
        (others, "#999999", "o", "published methods"),
        (ours, "#D55E00", "D", "bitkv's presets"),
    ):
        x = [row["packed_bits_per_element"] for row in group]
        y = [row[field] for row in group]
        axes.scatter(x, y, c=colour, marker=marker, s=28, label=label, zorder=3)
    for row in (*others, *ours):
        axes.annotate(
            row["recipe"],
            (row["packed_bits_per_element"], row[field]),
            textcoords="offset points",
            xytext=(4, 3),
            fontsize=6.5,
            color="#D55E00" if row["recipe"] in OURS else "#777777",
        )


def frontier(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Recipes with a lower KL divergence than every other with as many bits or fewer."""
    ordered = sorted(rows, key=lambda row: (row["packed_bits_per_element"], row["kl_mean"]))
    best, names = float("inf"), []
    for row in ordered:
        if row["kl_mean"] < best:
            best = row["kl_mean"]
            names.append(row["recipe"])
    return names
