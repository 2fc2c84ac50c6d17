"""Recipes: which codec for keys and for values at each layer, and how many tokens stay in 16 bits.

A recipe has one text form, the same in Python, on the command line, in files and in results:
`parse(repr(recipe)) == recipe`, and a preset's text such as `kivi2` or `asymkv(16, 0)` parses too.
"""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bitkv import codecs as methods
from bitkv.codecs import CODECS, Affine, Codec, Unquantized
from bitkv.digests import digest_of
from bitkv.pages import PAGE_SIZES


def _check_count(owner: str, name: str, value: object, noun: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{owner}: {name} {value!r} is not a {noun}; pass 0 or more")


@dataclass(frozen=True)
class Split:
    """One codec for the layers before `layer`, another from there on (AsymKV's layer-wise bits)."""

    before: Codec
    layer: int
    after: Codec

    def __post_init__(self) -> None:
        _check_count("Split", "layer", self.layer, "layer count")


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the codecs of a recipe have learned of one model.

    Args:
        codecs: the key codec and the value codec of each layer.
        model: fingerprint of the model's config.
        weights: digest of some of its weights.
        source: the text they learned from, its tokens and the seed, in words.
    """

    codecs: tuple[tuple[Codec, Codec], ...]
    model: str
    weights: str
    source: str

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All that was learned, as `layer.key.name` and `layer.value.name`."""
        return {
            f"{i}.{site}.{name}": x
            for i, pair in enumerate(self.codecs)
            for site, codec in zip(("key", "value"), pair, strict=True)
            for name, x in codec.learned.items()
        }

    @cached_property
    def digest(self) -> str:
        """Of all that was learned."""
        return digest_of(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all that was learned: they are no part of any page."""
        return sum(x.nbytes for x in self.tensors.values())


Codecs = Codec | Split | tuple[Codec, ...]


def _parts(codecs: Any) -> tuple[Any, ...]:
    """Every codec that a field of a recipe names."""
    if isinstance(codecs, Split):
        return codecs.before, codecs.after
    return codecs if isinstance(codecs, tuple) else (codecs,)


def _codec(codecs: Codecs, layer_idx: int) -> Codec:
    if isinstance(codecs, Split):
        return codecs.before if layer_idx < codecs.layer else codecs.after
    return codecs[layer_idx] if isinstance(codecs, tuple) else codecs


@dataclass(frozen=True)
class Recipe:
    """How a cache is quantized.

    Args:
        key, value: a codec for all layers, a `Split`, or a tuple with a codec for each layer.
        num_sink_tokens: first tokens of a sequence that stay in 16 bits.
        recent_tokens: newest tokens that always stay in 16 bits. A page is packed when
            `recent_tokens + page_size` of them have gathered.
        page_size: tokens of a page, 64 or 128.
        calibration: what its codecs have learned of a model; not part of the text.
    """

    key: Codecs
    value: Codecs
    num_sink_tokens: int = 4
    recent_tokens: int = 64
    page_size: int = 128
    calibration: Calibration | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("num_sink_tokens", "recent_tokens"):
            _check_count("Recipe", name, getattr(self, name), "count")
        if self.page_size not in PAGE_SIZES or not isinstance(self.page_size, int):
            raise ValueError(f"Recipe: page_size {self.page_size} is not supported; use 64 or 128")
        for name in ("key", "value"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            for codec in _parts(getattr(self, name)):
                if not isinstance(codec, Codec):
                    raise ValueError(f"Recipe: {name} {codec!r} is not a codec; see `bitkv recipes`")
                if name == "value" and getattr(codec, "granularity", "token") != "token":
                    raise ValueError(
                        "Recipe: values are quantized per token; give the value codec "
                        "granularity='token'"
                    )

    def codecs(self, layer_idx: int) -> tuple[Codec, Codec]:
        """The key codec and the value codec of a layer, with what they have learned."""
        if self.calibration is not None:
            return self.calibration.codecs[layer_idx]
        key, value = (_codec(part, layer_idx) for part in (self.key, self.value))
        return key, value

    def check_layers(self, num_layers: int) -> None:
        """Refuse a model with another number of layers than the recipe names.

        Raises:
            ValueError: it has.
        """
        for name in ("key", "value"):
            part = getattr(self, name)
            if isinstance(part, tuple) and len(part) != num_layers:
                raise ValueError(
                    f"the recipe has {name} codecs for {len(part)} layers, and the model has "
                    f"{num_layers}; pass a recipe for this model"
                )

    @property
    def learns(self) -> bool:
        """Whether a codec has to be calibrated and was not."""
        parts = (*_parts(self.key), *_parts(self.value))
        return self.calibration is None and any(codec.learns for codec in parts)

    def only(self, name: Literal["key", "value"]) -> "Recipe":
        """The recipe with its keys alone, or its values alone; the others stay unquantized."""
        other = "value" if name == "key" else "key"
        calibration = self.calibration
        if calibration is not None:
            plain = Unquantized()
            pairs = ((k, plain) if name == "key" else (plain, v) for k, v in calibration.codecs)
            calibration = replace(calibration, codecs=tuple(pairs))
        changed: dict[str, Any] = {other: Unquantized(), "calibration": calibration}
        return replace(self, **changed)

    def calibrated(self, calibration: Calibration) -> "Recipe":
        """The recipe with what its codecs have learned."""
        return replace(self, calibration=calibration)

    @property
    def identity(self) -> str:
        """Its text, and a digest of what was learned: pages of equal identity mean the same."""
        return repr(self) if self.calibration is None else f"{self!r} {self.calibration.digest}"

    def __str__(self) -> str:
        """The name of a preset that equals this recipe, else its `repr`."""
        for name, preset in PRESETS.items():
            if not inspect.signature(preset.make).parameters and preset.make() == self:
                return name
        return repr(self)


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
        _check_count("asymkv", name, layers, "layer count")
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
        lambda channels, bits: _of(methods.Coupled(channels, bits)),
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
    "best2": Preset(
        lambda: Recipe(
            key=Affine(2, "channel", 32, "unbiased"), value=Affine(2, "token", "page", "mse")
        ),
        "bitkv",
        "2 bits: unbiased keys in groups of 32, one group a token for values, sinks kept",
    ),
    "best1": Preset(
        lambda: Recipe(
            key=Affine(2, "channel", "page", "unbiased"), value=Affine(1, "token", "page", "mse")
        ),
        "bitkv",
        "1-bit values, 2-bit unbiased keys (1-bit ones lose retrieval), sinks kept",
    ),
}

_CONSTRUCTORS: dict[str, Callable[..., object]] = {
    "Recipe": Recipe,
    "Split": Split,
    **CODECS,
    **{name: preset.make for name, preset in PRESETS.items()},
}


def parse(text: str) -> Recipe:
    """The recipe that a text names: a preset, a preset call, or a `Recipe(...)` expression.

    Raises:
        ValueError: one sentence that says what is wrong and what exists.
    """
    if text.strip() in PRESETS and not text.strip().isidentifier():  # best1.5 is a name too
        return PRESETS[text.strip()].make()
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # as `ast.parse` documents
        raise ValueError(f"recipe {text!r} is not a recipe expression; {_choices()}") from None
    made = _build(tree, text)
    if isinstance(made, Codec):
        raise ValueError(f"recipe {text!r} is a codec; write Recipe(key=..., value=...)")
    if not isinstance(made, Recipe):
        raise ValueError(f"recipe {text!r} is not a recipe; {_choices()}")
    return made


def load(path: Path) -> Recipe:
    """The recipe written in a text file; lines that begin with `#` are comments."""
    return parse(without_comments(path.read_text(encoding="utf-8")))


def without_comments(text: str) -> str:
    """A text without its lines that begin with `#`."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _choices() -> str:
    return f"choose from {', '.join(PRESETS)} or write Recipe(key=..., value=...)"


def _build(node: ast.expr, text: str) -> object:
    """Calls of known names with literal arguments; nothing is ever evaluated as Python."""
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        make = _CONSTRUCTORS.get(node.func.id)
        if make is None:
            raise ValueError(f"recipe {text!r}: no {node.func.id!r}; {_choices()}")
        args = [_build(arg, text) for arg in node.args]
        keywords = {k.arg: _build(k.value, text) for k in node.keywords if k.arg}
        if len(keywords) < len(node.keywords):
            raise ValueError(f"recipe {text!r}: write each argument as name=value, once")
        try:
            inspect.signature(make).bind(*args, **keywords)
        except TypeError as error:
            raise ValueError(f"recipe {text!r}: {node.func.id}: {error}") from None
        return make(*args, **keywords)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_build(item, text) for item in node.elts)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"recipe {text!r}: {ast.unparse(node)!r} is not a literal") from None
