"""Bits where they count: which codec each layer's keys and values get, for a budget of bits.

AsymKV (arXiv 2410.13212) gives more bits to keys than to values and to early layers than to late ones,
with the numbers set by hand; KVTuner (arXiv 2502.04420) searches pairs of bits a layer. Here every half
of every layer is measured by itself (sensitivity.py), errors are taken to add up, and the choice of
least total error for every number of bytes is found exactly, by dynamic programming.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

import numpy as np

from bitkv.calibration.sensitivity import SITES, Sensitivity, of_pairs
from bitkv.codecs import Codec, Unquantized
from bitkv.recipe import Calibration, Recipe

Objective = Literal["kl", "error"]


@dataclass(frozen=True)
class Allocation:
    """A codec for every half of every layer.

    Args:
        bits_per_element: of pages, scales and zero points included, without windows.
        predicted: the sum of the objective over all halves; squared errors for "error".
        choices: sorted by layer, keys before values.
        elements: keys or values that a page of one KV head holds.
    """

    bits_per_element: float
    predicted: float
    choices: tuple[Sensitivity, ...]
    elements: int

    def to_json(self) -> dict[str, object]:
        """Numbers, and the codecs as texts, keys before values in each layer."""
        codecs = [repr(x.codec) for x in self.choices]
        return {"bits": self.bits_per_element, "predicted": self.predicted, "codecs": codecs}

    def recipe(self, base: Recipe, num_layers: int, calibration: Calibration | None = None) -> Recipe:
        """The recipe that this is, with the windows of `base`; other layers stay unquantized."""
        pairs: list[tuple[Codec, Codec]] = [(Unquantized(), Unquantized())] * num_layers
        for key, value in zip(self.choices[::2], self.choices[1::2], strict=True):
            pairs[key.layer] = key.codec, value.codec
        origin = base if calibration is None else base.calibrated(calibration)
        return of_pairs(origin, pairs)


def frontier(
    measured: Sequence[Sensitivity], *, elements: int, objective: Objective = "kl"
) -> list[Allocation]:
    """The best allocation for every number of bytes at which it gets better, fewest bytes first.

    Args:
        measured: all choices; each half of each layer needs one at least.
        elements: keys or values that one page of one KV head holds.

    Raises:
        ValueError: nothing was measured.
    """
    halves = sorted({(x.layer, SITES.index(x.site)) for x in measured})
    if not halves:
        raise ValueError("nothing to allocate; pass codecs for keys and for values")
    options = [[x for x in measured if (x.layer, SITES.index(x.site)) == half] for half in halves]
    unit = gcd(*(x.nbytes for x in measured))
    most = sum(max(x.nbytes for x in row) for row in options) // unit
    best = np.full(most + 1, np.inf)  # least loss of the halves so far for exactly so many units
    best[0] = 0.0
    taken = np.zeros((len(options), most + 1), dtype=np.int64)
    for i, row in enumerate(options):
        new = np.full(most + 1, np.inf)
        for j, x in enumerate(row):
            cost = x.nbytes // unit
            candidate = np.full(most + 1, np.inf)
            candidate[cost:] = best[: most + 1 - cost] + _loss(x, objective)
            better = candidate < new
            new[better], taken[i, better] = candidate[better], j
        best = new
    found: list[Allocation] = []
    least = np.inf
    for units in np.flatnonzero(np.isfinite(best)):
        if best[units] < least:
            least = best[units]
            choices = _walk_back(options, taken, int(units), unit)
            bits = 8 * unit * int(units) / (elements * len(halves))
            found.append(Allocation(bits, float(least), choices, elements))
    return found


def within(allocations: Sequence[Allocation], bits: float) -> Allocation:
    """The best of a frontier that takes no more than `bits` bits an element.

    Raises:
        ValueError: even the smallest takes more.
    """
    fitting = [x for x in allocations if x.bits_per_element <= bits + 1e-9]
    if not fitting:
        least = allocations[0].bits_per_element
        raise ValueError(
            f"{bits:g} bits are less than these codecs' least, {least:.3f}; pass more bits, or codecs "
            "that take fewer"
        )
    return fitting[-1]


def _loss(x: Sensitivity, objective: Objective) -> float:
    return x.kl if objective == "kl" else x.error**2


def _walk_back(
    options: Sequence[Sequence[Sensitivity]], taken: np.ndarray, units: int, unit: int
) -> tuple[Sensitivity, ...]:
    choices = []
    for i in reversed(range(len(options))):
        x = options[i][taken[i, units]]
        choices.append(x)
        units -= x.nbytes // unit
    return tuple(reversed(choices))
