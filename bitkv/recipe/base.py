"""What a recipe is: which codec for keys and for values at each layer, and what stays in 16 bits."""

import inspect
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from bitkv.codecs import Codec, Unquantized
from bitkv.digests import digest_of
from bitkv.pages import PAGE_SIZES


def check_count(owner: str, name: str, value: object, noun: str) -> None:
    """Refuse what is no number of something; ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{owner}: {name} {value!r} is not a {noun}; pass 0 or more")


@dataclass(frozen=True)
class Split:
    """One codec for the layers before `layer`, another from there on (AsymKV's layer-wise bits)."""

    before: Codec
    layer: int
    after: Codec

    def __post_init__(self) -> None:
        check_count("Split", "layer", self.layer, "layer count")


@dataclass(frozen=True)
class Allocated:
    """A codec whose rate calibration chooses for each layer.

    Keys and values that are allocated share the bits which their codecs have together as written.
    """

    codec: Codec


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


Codecs = Codec | Split | Allocated | tuple[Codec, ...]


def _parts(codecs: Any) -> tuple[Any, ...]:
    """Every codec that a field of a recipe names."""
    if isinstance(codecs, Split):
        return codecs.before, codecs.after
    if isinstance(codecs, Allocated):
        return (codecs.codec,)
    return codecs if isinstance(codecs, tuple) else (codecs,)


def _codec(codecs: Codecs, layer_idx: int) -> Codec:
    if isinstance(codecs, Split):
        return codecs.before if layer_idx < codecs.layer else codecs.after
    if isinstance(codecs, Allocated):
        return codecs.codec
    return codecs[layer_idx] if isinstance(codecs, tuple) else codecs


@dataclass(frozen=True)
class Recipe:
    """How a cache is quantized.

    Args:
        key, value: a codec for all layers, a `Split`, an `Allocated`, or a tuple with a codec a layer.
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
            check_count("Recipe", name, getattr(self, name), "count")
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
        from bitkv.recipe.presets import PRESETS  # which are recipes themselves

        for name, preset in PRESETS.items():
            if not inspect.signature(preset.make).parameters and preset.make() == self:
                return name
        return repr(self)
