"""bitkv keeps the key/value cache of a language model in 1 to 4 bits and attends to the packed bits."""

from bitkv.attention import attend
from bitkv.cache import PagedCache
from bitkv.codecs import Affine, Codec, Unquantized
from bitkv.layer import CacheView, PagedLayer
from bitkv.pages import PageFormat, PartFormat
from bitkv.recipe import PRESETS, Recipe, Split, parse

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Affine",
    "CacheView",
    "Codec",
    "PageFormat",
    "PagedCache",
    "PagedLayer",
    "PartFormat",
    "Recipe",
    "Split",
    "Unquantized",
    "attend",
    "parse",
]
