"""Quantization methods: one file each. A new one is its file and its entry in `CODECS`."""

from bitkv.codecs.affine import Affine
from bitkv.codecs.base import Codec
from bitkv.codecs.coupled import Coupled
from bitkv.codecs.sample import Sample
from bitkv.codecs.unquantized import Unquantized

CODECS: dict[str, type[Codec]] = {codec.__name__: codec for codec in (Affine, Coupled, Unquantized)}

__all__ = ["CODECS", "Affine", "Codec", "Coupled", "Sample", "Unquantized"]
