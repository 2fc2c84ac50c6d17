"""Recipes with names: those of the papers, with their own defaults, and bitkv's."""

from collections.abc import Callable
from dataclasses import dataclass

from bitkv import codecs as methods
from bitkv.codecs import Affine, Codec, Unquantized
from bitkv.recipe.base import Allocated, Recipe, Split, check_count


@dataclass(frozen=True)
class Preset:
    """A named recipe: what makes it, where it comes from, and a call of it if it takes arguments."""

    make: Callable[..., Recipe]
    source: str
    summary: str
    example: str = ""


def _affine(bits: int, group_size: int | str = 32, levels: str = "minmax", sinks: int = 0) -> Recipe:
    return Recipe(
        key=Affine(bits, "channel", group_size, levels),  # type: ignore[arg-type]
        value=Affine(bits, "token", group_size, levels),  # type: ignore[arg-type]
        num_sink_tokens=sinks,
    )


def _asymkv(lk: int, lv: int) -> Recipe:
    for name, layers in (("lk", lk), ("lv", lv)):
        check_count("asymkv", name, layers, "layer count")
    two, one = _affine(2), _affine(1)
    return Recipe(
        key=Split(two.key, lk, one.key),  # type: ignore[arg-type]
        value=Split(two.value, lv, one.value),  # type: ignore[arg-type]
        num_sink_tokens=0,
    )


def _of(key: Codec, value: Codec | None = None, sinks: int = 0) -> Recipe:
    """A method's codec, for values too unless they have another, and the sinks its paper keeps."""
    return Recipe(key, key if value is None else value, num_sink_tokens=sinks)


_TOKEN2, _TOKEN4 = (Affine(bits, "token", "page") for bits in (2, 4))


def _best(key_bits: float, value_bits: float) -> Preset:
    """Spectral codes; calibration gives the bits to the layers, keys and values that need them."""
    return Preset(
        lambda: Recipe(Allocated(methods.Spectral(key_bits)), Allocated(methods.Spectral(value_bits))),
        "bitkv",
        f"spectral codes, {(key_bits + value_bits) / 2:g} bits on average where late queries need them",
    )


_KIVI, _ASYMKV = "KIVI, arXiv 2402.02750", "AsymKV, arXiv 2410.13212"

PRESETS: dict[str, Preset] = {
    "fp16": Preset(
        lambda: Recipe(Unquantized(), Unquantized()),
        "none",
        "the model's own dtype in pages: no quantization",
    ),
    "int8": Preset(
        lambda: _affine(8, "page", sinks=4),
        "bitkv",
        "8 bits, one group a page: agrees with 16 bits almost everywhere",
    ),
    "kivi4": Preset(lambda: _affine(4), _KIVI, "4-bit min-max, groups of 32"),
    "kivi2": Preset(lambda: _affine(2), _KIVI, "2-bit min-max, groups of 32"),
    "asymkv": Preset(
        _asymkv,
        _ASYMKV,
        "2-bit keys in the first lk layers, 2-bit values in the first lv, 1 bit elsewhere",
        "asymkv(16, 0)",
    ),
    "affine": Preset(
        _affine,
        "bitkv",
        "keys per channel, values per token, any bits, group size, levels and sinks",
        "affine(2, 32, 'mse')",
    ),
    "cq": Preset(
        lambda channels, bits, weights="fisher": _of(methods.Coupled(channels, bits, weights)),
        "CQ, arXiv 2405.03917",
        "channels coupled under one learned index; keys before the rotary embedding",
        "cq(8, 8)",
    ),
    "qserve4": Preset(
        lambda: _of(methods.QServe(4), _TOKEN4),
        "QServe, arXiv 2405.04532",
        "4 bits a token; keys after SmoothAttention",
    ),
    "quarot": Preset(
        lambda bits: _of(methods.QuaRot(bits)),
        "QuaRot, arXiv 2404.00456",
        "Hadamard rotation",
        "quarot(4)",
    ),
    "rotatekv2": Preset(
        lambda: _of(methods.RotateKV(2), sinks=20),
        "RotateKV, arXiv 2501.16383",
        "2 bits a token, Hadamard before the rotary embedding, clipped",
    ),
    "kvquant": Preset(
        lambda bits: _of(methods.KVQuant(bits), sinks=1),
        "KVQuant, arXiv 2401.18079",
        "learned levels and 1 % of outliers in 16 bits; keys before the rotary embedding",
        "kvquant(2)",
    ),
    "turboquant": Preset(
        lambda bits: _of(methods.TurboQuant(bits)),
        "TurboQuant, arXiv 2504.19874",
        "random rotation and Lloyd-Max levels, nothing learned",
        "turboquant(3)",
    ),
    "qjl": Preset(
        lambda: _of(methods.QJL(2), Affine(2, "token", 32)),
        "QJL, arXiv 2406.03482",
        "two random signs a channel for keys, 2-bit values in groups of 32",
    ),
    "kitty": Preset(
        lambda: _of(methods.Kitty(), _TOKEN2, sinks=32),
        "Kitty, arXiv 2511.18643",
        "2 bits, and 4 for the largest eighth of a page's key channels",
    ),
    "vecinfer": Preset(
        lambda channels, bits: _of(methods.VecInfer(channels, bits)),
        "VecInfer, arXiv 2510.06175",
        "scaled and rotated keys, channels coupled under one learned index",
        "vecinfer(4, 8)",
    ),
    "nsn": Preset(
        lambda bits: _of(methods.NSN(bits)),
        "NSNQuant, arXiv 2505.18231",
        "norms and means taken out, one codebook for all models",
        "nsn(2)",
    ),
    "tasq": Preset(
        lambda: _of(methods.TaSQ(8, 10), methods.Coupled(8, 10)),
        "TaSQ, arXiv 2610.03027",
        "keys weighted by queries and grouped by dependence, coupled codes",
    ),
    "quick2": Preset(
        lambda: Recipe(
            key=Affine(2, "channel", 32, "unbiased"), value=Affine(2, "token", "page", "mse")
        ),
        "bitkv",
        "2 bits, nothing learned: unbiased keys in groups of 32, one group a token for values",
    ),
    "quick1": Preset(
        lambda: Recipe(
            key=Affine(2, "channel", "page", "unbiased"), value=Affine(1, "token", "page", "mse")
        ),
        "bitkv",
        "1-bit values, 2-bit unbiased keys, nothing learned",
    ),
    "best4": _best(4.75, 3.25),
    "best2": _best(2.625, 1.375),
    "best1.5": _best(2, 1),
    "best1.25": _best(1.75, 0.75),
    "best1": _best(1.375, 0.625),
}
