"""How much each layer minds each codec, for keys and for values, all else unquantized."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitkv.codecs import Codec, Unquantized
from bitkv.evaluation.agreement import kl_divergence
from bitkv.evaluation.fidelity import fidelity
from bitkv.evaluation.protocols import Protocol, Subject, Windows, next_token_logits
from bitkv.evaluation.report import Fidelity
from bitkv.integrations.transformers.cache import PackedCache, decoder_config
from bitkv.pages import Site
from bitkv.recipe import Calibration, Recipe

# as in generation: where recent tokens are packed too, losses are so large that they hide the layers
_PROTOCOL: Protocol = "streamed"


@dataclass(frozen=True)
class Sensitivity:
    """One codec for the keys or the values of one layer.

    Args:
        layer: its index.
        site: "key" or "value".
        codec: as it was calibrated for this layer.
        nbytes: of a page of one KV head, for this half.
        kl: mean KL divergence in nats per token from the unquantized model when nothing else is
            quantized; every chunk of 64 tokens reads what was packed before it.
        error: relative error of this layer's attention outputs.
    """

    layer: int
    site: Site
    codec: Codec
    nbytes: int
    kl: float
    error: float


def sensitivities(
    stock: Subject,
    recipes: Sequence[Recipe],
    windows: Windows,
    *,
    advance: Callable[[], object] = lambda: None,
) -> list[Sensitivity]:
    """Measure each packed layer under the key codec and the value codec of each recipe, once each codec.

    Args:
        stock: the model without a recipe.
        recipes: calibrated where they learn; windows and page size are theirs.
        advance: called after each measurement of a layer on all windows.
    """
    expected = [next_token_logits(stock, ids, _PROTOCOL)[0] for ids in windows.ids]
    found: list[Sensitivity] = []
    seen: set[tuple[Site, Codec, int]] = set()
    config = stock.model.config
    num_layers = decoder_config(config).num_hidden_layers
    for recipe in recipes:
        subject = Subject(stock.model, recipe, str(recipe), stock.model_name)
        layers = PackedCache(config, recipe).packed_layers
        found_errors: Sequence[Fidelity] = fidelity(stock, [subject], windows)[0].result.layers  # type: ignore[union-attr]
        errors = dict(zip(layers, found_errors, strict=True))
        for layer in layers:
            for place, site in enumerate(SITES):
                codec = recipe.codecs(layer)[place]
                if (site, codec, layer) in seen:
                    continue
                seen.add((site, codec, layer))
                alone = alone_in(recipe, layer, site, num_layers)
                kl, nbytes = _measure(stock, alone, windows, expected, layer, place)
                error = errors[layer].key_error if site == "key" else errors[layer].value_error
                found.append(Sensitivity(layer, site, codec, nbytes, kl, error))
                advance()
    return found


SITES: tuple[Site, Site] = ("key", "value")


def alone_in(recipe: Recipe, layer: int, site: Site, num_layers: int) -> Recipe:
    """The recipe with one half of one layer quantized and everything else not."""
    plain: Codec = Unquantized()
    pairs = [(plain, plain)] * num_layers
    key, value = recipe.codecs(layer)
    pairs[layer] = (key, plain) if site == "key" else (plain, value)
    return of_pairs(recipe, pairs)


def of_pairs(recipe: Recipe, pairs: Sequence[tuple[Codec, Codec]]) -> Recipe:
    """The recipe with these codecs, layer by layer, and what they have learned."""
    keys, values = zip(*pairs, strict=True)
    windows = {name: getattr(recipe, name) for name in ("num_sink_tokens", "recent_tokens", "page_size")}
    # one codec for all layers is written once
    key, value = (x[0] if len(set(x)) == 1 else x for x in (keys, values))
    made = Recipe(key, value, **windows)
    origin = recipe.calibration
    if origin is None and not any(codec.learned for pair in pairs for codec in pair):
        return made
    # of another recipe of the same model, if not of this one
    texts = ("", "", "") if origin is None else (origin.model, origin.weights, origin.source)
    return made.calibrated(Calibration(tuple(pairs), *texts))


def _measure(
    stock: Subject, recipe: Recipe, windows: Windows, expected: Sequence[Any], layer: int, place: int
) -> tuple[float, int]:
    """KL divergence, and bytes of the half page."""
    subject = Subject(stock.model, recipe)
    parts, cache = [], None
    for ids, logits in zip(windows.ids, expected, strict=True):
        mine, cache = next_token_logits(subject, ids, _PROTOCOL)
        parts.append(kl_divergence(logits, mine))
    assert cache is not None
    form = cache.layers[layer].format
    return float(torch.cat(parts).mean()), (form.key, form.value)[place].nbytes
