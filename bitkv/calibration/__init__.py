"""Fitting a recipe to a model: what its codecs have to learn from text before they are of use."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitkv.calibration.partial import Partial
from bitkv.codecs import Codec, Sample
from bitkv.digests import digest_of
from bitkv.evaluation.protocols import cut
from bitkv.integrations.transformers.cache import decoder_config
from bitkv.integrations.transformers.fingerprint import fingerprint, weights_digest
from bitkv.integrations.transformers.gather import Gathered, gather
from bitkv.integrations.transformers.rope import rope_of
from bitkv.recipe import Calibration, Recipe
from bitkv.recipe.file import as_recipe, read, write
from bitkv.rope import Rope

__all__ = ["TooLittleText", "calibrate", "read", "write"]

_EVERY = 2**62
_ENOUGH = 32  # tokens a centroid: CQ's own 16 texts of 2,048 tokens for 1,024 centroids


class TooLittleText(UserWarning):
    """A codebook has so many centroids that it would learn the calibration text by heart."""


def calibrate(
    model: Any,
    tokenizer: Any,
    recipe: Recipe | str,
    text: str,
    *,
    tokens: int = 32768,
    window: int = 2048,
    seed: int = 0,
    name: str = "text",
    memory: int = 2**31,
    partial: Path | None = None,
    advance: Callable[[float], object] = lambda share: None,
) -> Recipe:
    """The recipe with codecs that have learned from a text what they need of this model.

    Args:
        model, tokenizer: a Transformers causal language model and its tokenizer. In float32 gradients
            are finer.
        text: what the model was or might have been trained on; not what it will be measured on.
        tokens, window: how much of it, in windows of so many tokens drawn at random.
        seed: of windows and centroids. The same arguments give the same recipe.
        name: of the text, kept in the recipe.
        memory: bytes that gathered tensors may take; with less, layers are gathered in several passes.
        partial: a folder for layers that are done. Called again with the same arguments, `calibrate`
            goes on from there, and removes it in the end.
        advance: called with the share of the work that has been done since the last call.

    Raises:
        ValueError: the text is too short, or a codec cannot serve this model.
    """
    recipe = as_recipe(recipe)
    decoder = decoder_config(model.config)
    num_layers = decoder.num_hidden_layers
    recipe.check_layers(num_layers)
    windows = _draw(tokenizer, text, tokens=tokens, window=window, seed=seed)
    _check_size(recipe, num_layers, windows.numel())
    source = f"{windows.numel()} tokens of {name} in windows of {window}, seed {seed}"
    model_print = fingerprint(model.config)
    done = Partial(partial, recipe, f"{model_print} {source} {digest_of({'ids': windows})}")
    todo = [i for i in range(num_layers) if i not in done and any(c.learns for c in recipe.codecs(i))]
    rope = rope_of(decoder)
    for layers in _passes(todo, decoder, windows.numel(), memory):
        step = 0.5 * len(layers) / max(len(todo), 1)

        def gathered_one(share: float = step / len(windows)) -> None:
            advance(share)

        found = gather(model, windows, layers, skip=recipe.num_sink_tokens, advance=gathered_one)
        for layer in layers:
            pair = recipe.codecs(layer)
            if layer in found:
                pair = _fit(pair, found.pop(layer), rope, seed)
            done.add(layer, pair)
            advance(step / len(layers))
    codecs = tuple(done.codecs(i) if i in done else recipe.codecs(i) for i in range(num_layers))
    done.remove()
    weights = weights_digest(model, 0)
    return recipe.calibrated(Calibration(codecs, model_print, weights, source))


def _fit(pair: tuple[Codec, Codec], x: Gathered, rope: Rope | None, seed: int) -> tuple[Codec, Codec]:
    key, value = pair
    places = {"positions": x.positions, "rope": rope, "seed": seed}
    return (
        key.calibrate(Sample("key", x.k, gradient=x.k_gradient, queries=x.q, **places)),  # type: ignore[arg-type]
        value.calibrate(Sample("value", x.v, gradient=x.v_gradient, queries=None, **places)),  # type: ignore[arg-type]
    )


def _draw(tokenizer: Any, text: str, *, tokens: int, window: int, seed: int) -> Tensor:
    """Ids `[n, window]` of windows of the text, drawn without repetition."""
    count = max(1, tokens // window)
    ids = cut(tokenizer, text, tokens=_EVERY, window=window).ids
    if len(ids) < count:
        raise ValueError(
            f"the calibration text has {ids.numel()} tokens in windows of {window}, and {tokens} were "
            "asked for; pass a longer text or fewer tokens"
        )
    draw = torch.Generator().manual_seed(seed)
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
    heads = decoder.num_attention_heads
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // heads
    kv_heads = getattr(decoder, "num_key_value_heads", None) or heads
    per_layer = tokens * head_dim * 4 * (heads + 4 * kv_heads)
    together = max(1, memory // per_layer)
    for i in range(0, len(layers), together):
        yield layers[i : i + together]
