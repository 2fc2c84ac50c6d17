"""A context in which plain `generate()` uses a packed cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Cache, DynamicCache

from bitkv.integrations.transformers.cache import PackedCache, decoder_config
from bitkv.integrations.transformers.layer import PackedLayer
from bitkv.recipe import Recipe


@contextmanager
def packed(
    model: Any, recipe: Recipe | str, *, exact_prefill: bool = True, backend: str = "auto"
) -> Iterator[None]:
    """Within this context, `model.generate()`, pipelines and plain forwards use a packed cache.

    A dynamic cache that reaches the model empty gets packed layers; one that already holds tokens stays
    as it is. Nothing but this model is touched, and leaving the context restores its attention.

    Raises:
        ValueError: the recipe is wrong or cannot serve this model.
    """
    decoder = decoder_config(model.config)
    before = decoder._attn_implementation

    def new_cache() -> PackedCache:
        return PackedCache(model.config, recipe, exact_prefill=exact_prefill, backend=backend)

    def pack(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        cache: Any = kwargs.get("past_key_values")
        if cache is None and kwargs.get("use_cache", getattr(decoder, "use_cache", True)):
            return args, kwargs | {"past_key_values": new_cache()}
        if type(cache) is DynamicCache and cache.get_seq_length() == 0 and not _is_packed(cache):
            _pack_layers(cache, new_cache())
        return None

    new_cache()  # refuses before anything runs
    hook = model.register_forward_pre_hook(pack, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        decoder._attn_implementation = before


def _pack_layers(cache: Any, new: PackedCache) -> None:
    """Give an empty dynamic cache packed layers; its sliding layers may be set up already and stay."""
    old = cache.layers or new.layers
    cache.layers = [
        theirs if isinstance(theirs, PackedLayer) else mine
        for mine, theirs in zip(old, new.layers, strict=True)
    ]
    cache.layer_class_to_replicate = None


def _is_packed(cache: Cache) -> bool:
    return any(isinstance(layer, PackedLayer) for layer in cache.layers)
