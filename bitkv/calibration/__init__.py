"""Fitting a recipe to a model: what its codecs have to learn from text before they are of use."""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitkv.cache import PagedCache
from bitkv.calibration.allocation import allocated, is_allocated
from bitkv.calibration.partial import Partial
from bitkv.codecs import Codec, Sample
from bitkv.digests import digest_of
from bitkv.evaluation.protocols import cut
from bitkv.integrations.transformers.cache import decoder_config, head_dim_of, layer_config
from bitkv.integrations.transformers.fingerprint import fingerprint, weights_digest
from bitkv.integrations.transformers.gather import Gathered, gather
from bitkv.integrations.transformers.rope import rope_of
from bitkv.recipe import Calibration, Recipe
from bitkv.recipe.file import as_recipe, read, write
from bitkv.rope import Rope

__all__ = ["Reading", "TooLittleText", "calibrate", "read", "write"]

_EVERY = 2**62
_ENOUGH = 32  # tokens a centroid: CQ's own 16 texts of 2,048 tokens for 1,024 centroids


class TooLittleText(UserWarning):
    """A codebook has so many centroids that it would learn the calibration text by heart."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How calibration text is read.

    Args:
        text: what the model was or might have been trained on; not what it will be measured on.
        tokens, window: how much of it, in windows of so many tokens drawn at random.
        seed: of windows and centroids. The same arguments give the same recipe.
        name: of the text, kept in the recipe.
        memory: bytes that gathered tensors may take; with less, layers are gathered in several passes.
    """

    text: str
    tokens: int = 32768
    window: int = 2048
    seed: int = 0
    name: str = "text"
    memory: int = 2**31

    @property
    def num_windows(self) -> int:
        """How many are read."""
        return max(1, self.tokens // self.window)

    @property
    def source(self) -> str:
        """In words."""
        tokens = self.num_windows * self.window
        return f"{tokens} tokens of {self.name} in windows of {self.window}, seed {self.seed}"


def calibrate(
    model: Any,
    tokenizer: Any,
    recipes: Sequence[Recipe | str],
    reading: Reading,
    *,
    partial: Path | None = None,
    advance: Callable[[float], object] = lambda share: None,
) -> list[Recipe]:
    """Recipes with codecs that have learned from a text what they need of this model.

    Args:
        model, tokenizer: a Transformers causal language model and its tokenizer. In float32 gradients
            are finer.
        recipes: recipes or their texts; the model reads the text once for all of them.
        reading: the text.
        partial: a folder for layers that are done. Called again with the same arguments, `calibrate`
            goes on from there, and removes it in the end.
        advance: called with the share of the work that has been done since the last call.

    Raises:
        ValueError: the text is too short, or a codec cannot serve this model.
    """
    made = [as_recipe(recipe) for recipe in recipes]
    decoder = decoder_config(model.config)
    num_layers = decoder.num_hidden_layers
    longest = getattr(decoder, "max_position_embeddings", None)
    if longest is not None and reading.window > longest:
        raise ValueError(
            f"windows of {reading.window} tokens are longer than the model's {longest}; shorten them"
        )
    windows = _draw(tokenizer, reading)
    for recipe in made:
        recipe.check_layers(num_layers)
        for i, layer in enumerate(PagedCache(recipe, num_layers).layers):
            # or it would refuse its first token
            layer.page_format(head_dim_of(layer_config(decoder, i)), model.dtype)
        _check_size(recipe, num_layers, windows.numel())
    model_print = fingerprint(model.config)
    weights = weights_digest(model, 0)
    made = _with_rates(model, windows, made, reading)
    ends = _ends(made)
    read_as = f"{reading.source} {digest_of({'ids': windows})} {ends}"
    origin = f"{model_print} {weights} {model.dtype} {read_as}"
    done = [
        Partial(None if partial is None else partial / str(i), recipe, origin)
        for i, recipe in enumerate(made)
    ]
    _learn(model, windows, list(zip(made, done, strict=True)), reading, advance)
    if partial is not None:
        shutil.rmtree(partial)
    calibrations = (
        Calibration(
            tuple(x.codecs(i) if i in x else recipe.codecs(i) for i in range(num_layers)),
            *(model_print, weights, reading.source),
        )
        for recipe, x in zip(made, done, strict=True)
    )
    return [x.calibrated(y) for x, y in zip(made, calibrations, strict=True)]


def _with_rates(model: Any, windows: Tensor, recipes: list[Recipe], reading: Reading) -> list[Recipe]:
    """The recipes with the rates of `Allocated` codecs chosen; the text is read once more for it."""
    open_ones = [recipe for recipe in recipes if is_allocated(recipe)]
    if not open_ones:
        return recipes
    decoder = decoder_config(model.config)
    num_layers = decoder.num_hidden_layers
    samples = (
        (layer, *_samples(tokens, rope_of(decoder), reading.seed))
        for some in _passes(range(num_layers), decoder, windows.numel(), reading.memory)
        for layer, tokens in gather(model, windows, some, **_ends(open_ones)).items()
    )
    chosen = iter(allocated(open_ones, num_layers, samples))
    return [next(chosen) if is_allocated(recipe) else recipe for recipe in recipes]


def _ends(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """First tokens that no recipe packs, and how long a token stays unpacked in all of them."""
    return {
        "skip": max((recipe.num_sink_tokens for recipe in recipes), default=0),
        "late": min((recipe.recent_tokens for recipe in recipes), default=0),
    }


def _learn(
    model: Any,
    windows: Tensor,
    pairs: Sequence[tuple[Recipe, Partial]],
    reading: Reading,
    advance: Callable[[float], object],
) -> None:
    """Fit every layer that is open, as many at a time as fit into memory."""
    decoder = decoder_config(model.config)
    layers = range(decoder.num_hidden_layers)
    todo = [i for i in layers if any(_is_open(*pair, i) for pair in pairs)]
    rope = rope_of(decoder)
    ends = _ends([recipe for recipe, _ in pairs])
    for some in _passes(todo, decoder, windows.numel(), reading.memory):
        step = 0.5 * len(some) / max(len(todo), 1)
        found = gather(model, windows, some, **ends, advance=_by(advance, step / len(windows)))
        for layer in some:
            for recipe, done in pairs:
                if _is_open(recipe, done, layer):
                    codecs = recipe.codecs(layer)
                    tokens = found.get(layer)
                    done.add(
                        layer, codecs if tokens is None else _fit(codecs, tokens, rope, reading.seed)
                    )
            found.pop(layer, None)
            advance(step / len(some))


def _is_open(recipe: Recipe, done: Partial, layer_idx: int) -> bool:
    """Whether a layer has something to learn and has not yet."""
    return layer_idx not in done and any(codec.learns for codec in recipe.codecs(layer_idx))


def _by(advance: Callable[[float], object], share: float) -> Callable[[], object]:
    return lambda: advance(share)


def _fit(pair: tuple[Codec, Codec], x: Gathered, rope: Rope | None, seed: int) -> tuple[Codec, Codec]:
    key, value = (codec.calibrate(y) for codec, y in zip(pair, _samples(x, rope, seed), strict=True))
    return key, value


def _samples(x: Gathered, rope: Rope | None, seed: int) -> tuple[Sample, Sample]:
    """A layer's tokens for its key codec and for its value codec."""
    key = Sample("key", x.k, x.positions, x.k_gradient, x.q, rope, seed, x.k_late)
    value = Sample("value", x.v, x.positions, x.v_gradient, None, rope, seed, x.v_late)
    return key, value


def _draw(tokenizer: Any, reading: Reading) -> Tensor:
    """Ids `[n, window]` of windows of the text, drawn without repetition."""
    count = reading.num_windows
    ids = cut(tokenizer, reading.text, tokens=_EVERY, window=reading.window).ids
    if len(ids) < count:
        raise ValueError(
            f"the calibration text has {ids.numel()} tokens in windows of {reading.window}, and "
            f"{reading.tokens} were asked for; pass a longer text or fewer tokens"
        )
    draw = torch.Generator().manual_seed(reading.seed)
    return ids[torch.randperm(len(ids), generator=draw)[:count].sort().values]


def _check_size(recipe: Recipe, num_layers: int, tokens: int) -> None:
    """Warn of codebooks that would learn the text by heart."""
    codecs = {codec for i in range(num_layers) for codec in recipe.codecs(i)}
    entries = max((codec.centroids for codec in codecs), default=0)
    if tokens < _ENOUGH * entries:
        warnings.warn(
            f"{tokens} tokens for codebooks of {entries} centroids are {tokens / entries:.0f} each; "
            f"with fewer than {_ENOUGH} ({_ENOUGH * entries} tokens) they suit this text alone",
            TooLittleText,
            stacklevel=3,
        )


def _passes(layers: Sequence[int], decoder: Any, tokens: int, memory: int) -> Iterator[Sequence[int]]:
    """Layers whose tensors fit into memory together."""
    largest = 1
    for i in layers:
        config = layer_config(decoder, i)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        largest = max(largest, head_dim_of(config) * (heads + 4 * kv_heads))
    together = max(1, memory // (4 * tokens * largest))
    for i in range(0, len(layers), together):
        yield layers[i : i + together]
