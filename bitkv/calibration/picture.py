"""A frontier as a picture: predicted loss against bits, and what each half of each layer got."""

from collections.abc import Sequence
from pathlib import Path

from bitkv.calibration.tune import Allocation
from bitkv.files import replacing


def draw(allocations: Sequence[Allocation], chosen: Allocation, path: Path) -> None:
    """A PNG, whole or not at all.

    Raises:
        ValueError: there is no folder to write to.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    bits = [x.bits_per_element for x in allocations]
    left.plot(bits, [x.predicted for x in allocations], color="#0072B2", marker=".", markersize=3)
    left.plot([chosen.bits_per_element], [chosen.predicted], "o", color="#D55E00")
    left.set(yscale="log", ylabel="sum of losses, each half alone", title="Best for every budget")
    left.set_xlabel("bits per element, beyond the hot window")
    for place, (site, colour) in enumerate((("keys", "#0072B2"), ("values", "#E69F00"))):
        halves = chosen.choices[place::2]
        width, layers = 0.4, [x.layer + (place - 0.5) * 0.4 for x in halves]
        heights = [8 * x.nbytes / chosen.elements for x in halves]
        right.bar(layers, heights, width=width, color=colour, label=site)
    right.set_xticks([x.layer for x in chosen.choices[::2]])
    right.set(xlabel="layer", ylabel="bits per element", title=f"At {chosen.bits_per_element:.2f} bits")
    right.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
