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
    *("cq(8, 8, 'uniform')", "cq(8, 10)", "kvquant(1)", "vecinfer(4, 8)", "nsn(2)", "turboquant(1)"),
)
STRESS_COMMAND = (
    *("--dtype", "float32", "--sinks", "4", "--recent", "64", "--tokens", "4096", "--stress"),
    *("--task", "agreement", "needle", "--length", "4096", "--samples", "20"),
    *("--calibration-tokens", "16384"),
)

# recall that means something at the bits where methods differ: three seeds, 120 prompts
RECALLED = (
    *("cq(8, 8)", "cq(8, 8, 'uniform')", "cq(8, 10)", "nsn(1)", "tasq", "kvquant(1)", "cq(4, 8)"),
    *("vecinfer(4, 8)", "best2", "best1.5", "best1.25", "best1"),
)
RECALL_COMMAND = (
    *("--dtype", "float32", "--sinks", "4", "--recent", "64", "--task", "needle"),
    *("--length", "4096", "--samples", "40", "--seeds", "3"),
)

STRESS_RECALLED = ("best2", "best1.5", "best1.25", "best1", "tasq", "vecinfer(4, 8)")
STRESS_RECALL_COMMAND = (
    *("--dtype", "float32", "--sinks", "4", "--recent", "64", "--stress", "--task", "needle"),
    *("--length", "4096", "--samples", "20", "--seeds", "3", "--calibration-tokens", "16384"),
)

# drawn three times each: what calibration reads, and where k-means begins
FISHER = ("cq(8, 8)", "cq(8, 8, 'uniform')")
FISHER_COMMAND = (
    *("--dtype", "float32", "--sinks", "4", "--recent", "64", "--tokens", "16384"),
    *("--task", "agreement"),
)
SEEDS = (0, 1, 2)

# the paper's prefixes at the budgets where another allocation was found
PREFIXES = ((3, 0), (2, 1), (4, 1), (3, 2), (4, 2), (3, 3), (4, 3))


def _two_bits(keys: Sequence[int], values: Sequence[int], num_layers: int = 4) -> str:
    """AsymKV's codecs with 2 bits for the keys and the values of some layers, 1 bit elsewhere."""
    key, value = (
        ", ".join(f"Affine({2 if i in layers else 1}, '{granularity}', 32)" for i in range(num_layers))
        for layers, granularity in ((keys, "channel"), (values, "token"))
    )
    return f"Recipe(({key}), ({value}))"


# `bitkv tune --codecs asymkv --tokens 4096` with --bits 2.375, 2.625, 2.75 and 2.875
FOUND = {
    _two_bits(*layers): f"keys {layers[0]}, values {layers[1]}"
    for layers in (
        ((0, 1, 3), ()),
        ((0, 1, 2, 3), (1,)),
        ((0, 1, 2, 3), (1, 3)),
        ((0, 1, 2, 3), (0, 1, 3)),
    )
}
ALLOCATED = (*(f"asymkv({lk}, {lv})" for lk, lv in PREFIXES), *FOUND)
ALLOCATION_COMMAND = (
    *("--dtype", "float32", "--sinks", "4", "--recent", "64", "--tokens", "4096"),
    *("--task", "agreement", "needle", "--length", "4096", "--samples", "20", "--seeds", "3"),
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
            _name(name),
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
    chosen = [row for row in rows if every or row["recipe"] in SHOWN]
    return _of_kl_and_needles(chosen, markdown, _name, digits=2)


def _of_kl_and_needles(
    rows: Rows, markdown: Callable[..., str], name: Callable[[str], str], digits: int
) -> str:
    """A line a recipe, in the order of bits, which get so many digits."""
    kl, needle = (
        {row["recipe"]: row for row in rows if row["task"] == task} for task in ("agreement", "needle")
    )
    lines = [
        [
            name(recipe),
            f"{row['packed_bits_per_element']:.{digits}f}",
            f"{row['kl_mean']:.4f}",
            f"{row['top1']:.1%}",
            f"{needle[recipe]['exact_match']:.0%}",
        ]
        for recipe, row in sorted(kl.items(), key=lambda item: item[1]["packed_bits_per_element"])
    ]
    return markdown(["recipe", "bits", "KL", "top-1", "needle 4K"], lines)


def recall_table(rows: Rows, markdown: Callable[..., str]) -> str:
    """Needles found, with intervals."""
    ordered = sorted(rows, key=lambda row: row["packed_bits_per_element"])
    lines = [
        [
            "16 bits" if row["recipe"] == "stock" else _name(row["recipe"]),
            "–" if row["recipe"] == "stock" else f"{row['packed_bits_per_element']:.2f}",
            f"{row['hits']} of {row['samples']}",
            f"{row['exact_match']:.1%}",
            f"{row['low']:.0%}–{row['high']:.0%}",
        ]
        for row in ordered
    ]
    return markdown(["recipe", "bits", "found", "needle 4K", "95 % interval"], lines)


def fisher_table(models: dict[str, Rows], markdown: Callable[..., str]) -> str:
    """Codebooks of weighted and of plain k-means, and the windows of text where the former is closer."""
    lines = []
    for model, rows in models.items():
        weighted, plain = ([row for row in rows if row["recipe"] == name] for name in FISHER)
        means = (", ".join(f"{row['kl_mean']:.4f}" for row in drawn) for drawn in (weighted, plain))
        closer = [
            a < b
            for one, other in zip(weighted, plain, strict=True)
            for a, b in zip(one["kl_windows"], other["kl_windows"], strict=True)
        ]
        lines.append([model, *means, f"{sum(closer)} of {len(closer)}"])
    return markdown(["model", *(f"`{name}`: KL" for name in FISHER), "closer in windows"], lines)


def allocation_table(rows: Rows, markdown: Callable[..., str]) -> str:
    """AsymKV's prefixes and what `bitkv tune` found, budget by budget."""

    def name(recipe: str) -> str:
        return f"**2 bits: {FOUND[recipe]}**" if recipe in FOUND else f"`{recipe}`"

    return _of_kl_and_needles(rows, markdown, name, digits=3)


def _name(recipe: str) -> str:
    return f"**`{recipe}`**" if recipe in OURS else f"`{recipe}`"


def picture(plain: Rows, stressed: Rows, path: Path) -> None:
    """KL divergence and needle recall against measured bits, ours and all others."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, grid = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    panels = list(grid.flat)
    titles = ("KL to 16 bits", "Needle recall at 4,096 tokens")
    titles = (*titles, *(f"{title}, with outlier channels" for title in titles))
    chosen = [
        ([row for row in rows if row["task"] == task and row["recipe"] != "stock"], field)
        for rows in (plain, stressed)
        for task, field in (("agreement", "kl_mean"), ("needle", "exact_match"))
    ]
    for axes, title, (rows, field) in zip(panels, titles, chosen, strict=True):
        axes.set(xlabel="measured bits per element in pages", title=title, xlim=(0.8, 5.4))
        axes.grid(color="#eeeeee")
        if field == "kl_mean":
            axes.set(yscale="log", ylabel="nats per token")
        else:
            axes.set(ylabel="share of exact answers", ylim=(-0.05, 1.08))
        _scatter(axes, rows, field)
    panels[0].legend(frameon=False, loc="upper right")
    figure.canvas.draw()  # from here on places are final
    figure.set_layout_engine("none")
    for axes, (rows, field) in zip(panels, chosen, strict=True):
        taken: list[Any] = []
        for row in sorted(rows, key=lambda row: (row["recipe"] not in OURS, row[field])):
            _label(axes, row, field, taken)
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


def _label(axes: Any, row: dict[str, Any], field: str, taken: list[Any]) -> None:
    """Write a recipe's name where it covers no other, or not at all: the tables have it."""
    point = row["packed_bits_per_element"], row[field]
    colour = "#D55E00" if row["recipe"] in OURS else "#777777"
    for offset, side in (((5, 3), "left"), ((5, -9), "left"), ((-5, 3), "right"), ((-5, -9), "right")):
        label = axes.annotate(
            row["recipe"],
            point,
            textcoords="offset points",
            xytext=offset,
            ha=side,
            fontsize=6.5,
            color=colour,
        )
        box = label.get_window_extent(axes.figure.canvas.get_renderer())
        inside = axes.get_window_extent().x0 < box.x0
        if inside and not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return
        label.remove()


def frontier(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Recipes with a lower KL divergence than every other with as many bits or fewer."""
    ordered = sorted(rows, key=lambda row: (row["packed_bits_per_element"], row["kl_mean"]))
    best, names = float("inf"), []
    for row in ordered:
        if row["kl_mean"] < best:
            best = row["kl_mean"]
            names.append(row["recipe"])
    return names
