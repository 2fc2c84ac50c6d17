"""Recipes: which codec for keys and for values at each layer, and how many tokens stay in 16 bits.

A recipe has one text form, the same in Python, on the command line, in files and in results:
`parse(repr(recipe)) == recipe`, and a preset's text such as `kivi2` or `asymkv(16, 0)` parses too.
"""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitkv.codecs import CODECS, Affine, Codec, Unquantized
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


@dataclass(frozen=True)
class Recipe:
    """How a cache is quantized.

    Args:
        key, value: a codec for all layers, or a `Split`.
        num_sink_tokens: first tokens of a sequence that stay in 16 bits.
        recent_tokens: newest tokens that always stay in 16 bits. A page is packed when
            `recent_tokens + page_size` of them have gathered.
        page_size: tokens of a page, 64 or 128.
    """

    key: Codec | Split
    value: Codec | Split
    num_sink_tokens: int = 4
    recent_tokens: int = 64
    page_size: int = 128

    def __post_init__(self) -> None:
        for name in ("num_sink_tokens", "recent_tokens"):
            _check_count("Recipe", name, getattr(self, name), "count")
        if self.page_size not in PAGE_SIZES or not isinstance(self.page_size, int):
            raise ValueError(f"Recipe: page_size {self.page_size} is not supported; use 64 or 128")
        for name in ("key", "value"):
            codecs = getattr(self, name)
            parts = (codecs.before, codecs.after) if isinstance(codecs, Split) else (codecs,)
            for codec in parts:
                if not isinstance(codec, Codec):
                    raise ValueError(f"Recipe: {name} {codec!r} is not a codec; see `bitkv recipes`")
                if name == "value" and getattr(codec, "granularity", "token") != "token":
                    raise ValueError(
                        "Recipe: values are quantized per token; give the value codec "
                        "granularity='token'"
                    )

    def codecs(self, layer_idx: int) -> tuple[Codec, Codec]:
        """The key codec and the value codec of a layer."""
        key, value = (
            codec
            if isinstance(codec, Codec)
            else (codec.before if layer_idx < codec.layer else codec.after)
            for codec in (self.key, self.value)
        )
        return key, value

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
    lines = path.read_text(encoding="utf-8").splitlines()
    return parse("\n".join(line for line in lines if not line.lstrip().startswith("#")))


def as_recipe(recipe: "Recipe | str") -> Recipe:
    """A recipe as it is, or the one that a text names."""
    return recipe if isinstance(recipe, Recipe) else parse(recipe)


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
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"recipe {text!r}: {ast.unparse(node)!r} is not a literal") from None
