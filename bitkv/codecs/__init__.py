"""Quantization methods: one file each. A new one is its file and its entry in `CODECS`."""

from bitkv.codecs.affine import Affine
from bitkv.codecs.base import Codec
from bitkv.codecs.unquantized import Unquantized

CODECS: dict[str, type[Codec]] = {codec.__name__: codec for codec in (Affine, Unquantized)}

__all__ = ["CODECS", "Affine", "Codec", "Unquantized"]
