"""Rates of `Allocated` codecs: bits where errors cost, from the losses that codecs expect.

Reverse water-filling over a whole model. `bitkv tune` measures every codec in every half of every layer
and takes any codecs; here nothing is measured but the text's gradients, which calibration gathers too.
Both solve for the budget with the same dynamic programme (tune.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from bitkv.calibration.sensitivity import SITES, Sensitivity
from bitkv.calibration.tune import frontier, within
from bitkv.codecs import Codec, Sample
from bitkv.pages import Site
from bitkv.recipe import Recipe
from bitkv.recipe.base import Allocated


def is_allocated(recipe: Recipe) -> bool:
    """Whether calibration has rates to choose."""
    return any(isinstance(getattr(recipe, site), Allocated) for site in SITES)


def allocated(
    recipes: Sequence[Recipe], num_layers: int, layers: Iterable[tuple[int, Sample, Sample]]
) -> list[Recipe]:
    """The recipes with a codec for each layer where theirs is `Allocated`.

    Args:
        num_layers: of the model.
        layers: a layer's number, its keys and its values; others keep their codec as written.
    """
    choices: list[list[Sensitivity]] = [[] for _ in recipes]
    budgets = [0] * len(recipes)
    for layer, *samples in layers:
        for site, sample in zip(SITES, samples, strict=True):
            losses: dict[Codec, Any] = {}  # recipes that differ in their bits alone expect the same
            for i, recipe in enumerate(recipes):
                part = getattr(recipe, site)
                if not isinstance(part, Allocated):
                    continue
                known = next((found for found in losses.values() if part.codec in found), None)
                found = losses[part.codec] = known or part.codec.rates(sample)
                budgets[i] += _nbytes(part.codec, site, sample, recipe)
                for codec, loss in found.items():
                    nbytes = _nbytes(codec, site, sample, recipe)
                    choices[i].append(Sensitivity(layer, site, codec, nbytes, loss, loss**0.5))
    return [_chosen(*row, num_layers) for row in zip(recipes, choices, budgets, strict=True)]


def _nbytes(codec: Codec, site: Site, sample: Sample, recipe: Recipe) -> int:
    """Bytes of this half of a page."""
    shape: dict[str, Any] = {"head_dim": sample.x.shape[-1], "page_size": recipe.page_size}
    return codec.part_format(site, **shape, dtype=sample.x.dtype).nbytes


def _chosen(recipe: Recipe, choices: list[Sensitivity], budget: int, num_layers: int) -> Recipe:
    halves = len({(x.layer, x.site) for x in choices})
    best = within(frontier(choices, elements=1), 8 * budget / halves).choices
    found = {(x.layer, x.site): x.codec for x in best}
    changed: dict[str, Any] = {}
    for site in SITES:
        part = getattr(recipe, site)
        if isinstance(part, Allocated):
            changed[site] = tuple(found.get((i, site), part.codec) for i in range(num_layers))
    return replace(recipe, **changed)
