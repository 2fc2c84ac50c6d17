"""What arguments of a codec have to be; each refusal is one sentence."""

from collections.abc import Sequence

from bitkv.pages import Site


def require(codec: object, name: str, allowed: Sequence[object]) -> None:
    """Refuse an argument that is not one of these, type included: True and 2.0 are no bits.

    Raises:
        ValueError: it is not.
    """
    value = getattr(codec, name)
    if isinstance(allowed, range):
        fits = type(value) is int and value in allowed
        choices = f"{allowed[0]} to {allowed[-1]}"
    else:
        fits = any(type(value) is type(one) and value == one for one in allowed)
        choices = ", ".join(map(repr, allowed))
    if not fits:
        name = f"{type(codec).__name__}: {name}"
        raise ValueError(f"{name} {value!r} is not supported; use {choices}")


def require_between(codec: object, name: str, low: float, high: float) -> None:
    """Refuse an argument that is no number from `low` to `high`.

    Raises:
        ValueError: it is none.
    """
    value = getattr(codec, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(
            f"{type(codec).__name__}: {name} {value!r} is not supported; "
            f"use a number from {low} to {high}"
        )


def require_keys(codec: object, site: Site, instead: str) -> None:
    """Refuse values, for codecs that are made for keys alone.

    Raises:
        ValueError: these are values.
    """
    if site != "key":
        name = type(codec).__name__
        raise ValueError(f"{name} quantizes keys only; give values a codec of their own, as {instead}")
