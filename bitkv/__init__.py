"""bitkv keeps the key/value cache of a language model in 1 to 4 bits and attends to the packed bits.

The names below are imported on first use, so that `import bitkv` and `bitkv --help` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitkv.attention import attend
    from bitkv.cache import PagedCache
    from bitkv.codecs import Affine, Codec, Unquantized
    from bitkv.layer import PagedLayer
    from bitkv.pages import PageFormat, PartFormat
    from bitkv.recipe import PRESETS, Allocated, Recipe, Split, parse
    from bitkv.view import CacheView

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Affine",
    "Allocated",
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

_HOMES = {
    "attention": ("attend",),
    "cache": ("PagedCache",),
    "codecs": ("Affine", "Codec", "Unquantized"),
    "layer": ("PagedLayer",),
    "pages": ("PageFormat", "PartFormat"),
    "recipe": ("PRESETS", "Allocated", "Recipe", "Split", "parse"),
    "view": ("CacheView",),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"bitkv.{module}"), name)
    raise AttributeError(f"module 'bitkv' has no attribute {name!r}")
