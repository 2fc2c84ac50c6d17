"""Types of command-line arguments; each says in one sentence what it takes."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from bitkv.recipe import Recipe

N = TypeVar("N", int, float)


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _number(text, int, lambda x: x >= 1, "a whole number from 1 on")


def natural(text: str) -> int:
    """A whole number from 0 on."""
    return _number(text, int, lambda x: x >= 0, "a whole number from 0 on")


def temperature(text: str) -> float:
    """A number from 0 on."""
    return _number(text, float, lambda x: 0 <= x < float("inf"), "a number from 0 (greedy) on")


def probability(text: str) -> float:
    """A number above 0 and at most 1."""
    return _number(text, float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")


def heads(text: str) -> tuple[int, int]:
    """Query heads and KV heads, such as 32/8."""
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        query, kv = map(int, parts)
        if kv and query and query % kv == 0:
            return query, kv
    raise argparse.ArgumentTypeError(
        f"{text!r} is not query heads over KV heads, such as 32/8, the first a multiple of the second"
    )


def _number(text: str, make: type[N], accept: Callable[[N], bool], what: str) -> N:
    try:
        number = make(text)
    except ValueError:
        pass
    else:
        if accept(number):
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")


def recipe(text: str) -> "Recipe":
    """The recipe of `TEXT`, `@FILE` or a recipe file.

    Raises:
        ValueError: a file that is not there, or a text that names no recipe.
    """
    from bitkv.recipe import parse, without_comments
    from bitkv.recipe.file import as_recipe

    return parse(without_comments(read_text(text[1:]))) if text.startswith("@") else as_recipe(text)


def named_recipe(text: str) -> "Recipe | str":
    """As `recipe`, but a text stays what results will call it."""
    made = recipe(text)
    return made if text.startswith("@") else text


def backend(name: str) -> str:
    """The name of a backend; ValueError with the choices if there is none."""
    from bitkv.attention import BACKENDS

    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"no backend {name!r}; choose from auto, {', '.join(BACKENDS)}")
    return name


def read_text(path: str) -> str:
    """The UTF-8 text of a file; ValueError with one sentence if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory; pass a text file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; convert it first") from None


def paragraphs(*texts: str) -> str:
    """Texts one after the other, each on a line of its own."""
    joined = ""
    for text in texts:
        joined += ("\n\n" if joined and not joined.endswith("\n") else "") + text
    return joined
