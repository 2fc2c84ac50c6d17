"""Recipes: which codec for keys and for values at each layer, and how many tokens stay in 16 bits.

A recipe has one text form, the same in Python, on the command line, in files and in results:
`parse(repr(recipe)) == recipe`, and a preset's text such as `kivi2` or `asymkv(16, 0)` parses too. What
its codecs have learned of a model is in a recipe file (file.py).
"""

from bitkv.recipe.base import Allocated, Calibration, Recipe, Split
from bitkv.recipe.file import as_recipe
from bitkv.recipe.presets import PRESETS, Preset
from bitkv.recipe.text import load, parse, without_comments

__all__ = [
    "PRESETS",
    "Allocated",
    "Calibration",
    "Preset",
    "Recipe",
    "Split",
    "as_recipe",
    "load",
    "parse",
    "without_comments",
]
