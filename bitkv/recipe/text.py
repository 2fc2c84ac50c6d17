"""Texts that name recipes; nothing in them is ever evaluated as Python."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path

from bitkv.codecs import CODECS, Codec
from bitkv.recipe.base import Allocated, Recipe, Split
from bitkv.recipe.presets import PRESETS

_CONSTRUCTORS: dict[str, Callable[..., object]] = {
    "Recipe": Recipe,
    "Allocated": Allocated,
    "Split": Split,
    **CODECS,
    **{name: preset.make for name, preset in PRESETS.items()},
}


def parse(text: str) -> Recipe:
    """The recipe that a text names: a preset, a preset call, or a `Recipe(...)` expression.

    Raises:
        ValueError: one sentence that says what is wrong and what exists.
    """
    name = text.strip().removesuffix("()")
    if name in PRESETS and not name.isidentifier():  # best1.5 is a name too
        return PRESETS[name].make()
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
