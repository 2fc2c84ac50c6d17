"""Quantization methods: one file each. A new one is its file and its entry in `CODECS`."""

from bitkv.codecs.affine import Affine
from bitkv.codecs.base import Codec
from bitkv.codecs.coupled import Coupled
from bitkv.codecs.kitty import Kitty
from bitkv.codecs.kvquant import KVQuant
from bitkv.codecs.nsn import NSN
from bitkv.codecs.qjl import QJL
from bitkv.codecs.qserve import QServe
from bitkv.codecs.quarot import QuaRot
from bitkv.codecs.rotatekv import RotateKV
from bitkv.codecs.sample import Sample
from bitkv.codecs.spectral import Spectral
from bitkv.codecs.tasq import TaSQ
from bitkv.codecs.turboquant import TurboQuant
from bitkv.codecs.unquantized import Unquantized
from bitkv.codecs.vecinfer import VecInfer

_ALL: tuple[type[Codec], ...] = (
    *(Affine, Coupled, Kitty, KVQuant, NSN, QJL, QServe),
    *(QuaRot, RotateKV, Spectral, TaSQ, TurboQuant, Unquantized, VecInfer),
)

CODECS: dict[str, type[Codec]] = {codec.__name__: codec for codec in _ALL}

__all__ = [
    "CODECS",
    "NSN",
    "QJL",
    "Affine",
    "Codec",
    "Coupled",
    "KVQuant",
    "Kitty",
    "QServe",
    "QuaRot",
    "RotateKV",
    "Sample",
    "Spectral",
    "TaSQ",
    "TurboQuant",
    "Unquantized",
    "VecInfer",
]
