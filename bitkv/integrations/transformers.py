"""bitkv inside Hugging Face Transformers (5.16 and later), without patching a model.

`PackedLayer.update` keeps the new keys and values back and returns light handles; the attention function
registered as "bitkv" recognises them, now knows the mask and so the padding, stores the real tokens and
attends to the packed cache. A handle that any other operation touches becomes the whole cache in the
model's dtype: slow but right. Layers that are not full attention keep the cache Transformers gives them.
"""

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers import PreTrainedConfig as Config
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bitkv.attention import attend
from bitkv.cache import PagedCache
from bitkv.layer import PagedLayer
from bitkv.recipe import Recipe

NAME = "bitkv"
_VOLATILE = ("transformers_version", "_name_or_path", "use_cache", "dtype", "attn_implementation")


class Handle(Tensor):
    """Stands for all keys or all values of a layer: their shape and dtype, but no memory.

    Any operation on it other than reading its shape uses the real tensor instead.
    """

    layer: "PackedLayer"
    part: Literal[0, 1]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.__name__ in ("__get__", "size", "dim", "stride", "ndimension"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_materialize, (args, kwargs or {}))
        return func(*args, **kwargs)


def _materialize(x: Any) -> Any:
    return x.layer.dense()[x.part] if isinstance(x, Handle) else x


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One full-attention layer of a Transformers cache over a `PagedLayer`.

    Transformers counts columns of a rectangular batch, padding included; pages hold real tokens only.
    `columns` `[B, T]` says which columns are real, and is None while all are.
    """

    is_sliding = False
    is_croppable = True

    length: int
    columns: Tensor | None
    _pending: tuple[Tensor, Tensor] | None
    _dense: tuple[Tensor, Tensor] | None

    def __init__(self, cache: "PackedCache", layer_idx: int) -> None:
        super().__init__()
        self.paged_cache = cache.paged
        self.layer_idx = layer_idx
        self.exact_prefill = cache.exact_prefill
        self.backend = cache.backend
        self.masks = cache.masks
        self.reset()

    @property
    def paged(self) -> PagedLayer:
        """The packed storage of this layer."""
        return self.paged_cache.layers[self.layer_idx]

    # --- what Transformers asks of a layer -----------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage appears with the first tokens; only the shapes are checked here."""
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"layer {self.layer_idx} has keys {tuple(key_states.shape)} and values "
                f"{tuple(value_states.shape)}; bitkv needs equal shapes (it does not serve MLA)"
            )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values `[B, Hkv, T, D]`; returns handles to all of them."""
        self._flush()
        self.lazy_initialization(key_states, value_states)
        self._pending = (key_states, value_states)
        self._dense = None
        self.length += key_states.shape[2]
        return self._handle(0), self._handle(1)

    def _handle(self, part: Literal[0, 1]) -> Handle:
        assert self._pending is not None
        new = self._pending[part]
        shape = (*new.shape[:2], self.length, new.shape[3])
        handle = new.new_zeros(()).expand(shape).as_subclass(Handle)
        handle.layer, handle.part = self, part
        return handle

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.paged.reset()
        self.length = 0
        self.columns = self._pending = self._dense = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns; see `PagedLayer.crop` for what stays exact.

        Raises:
            ValueError: a positive number, which meant a length before Transformers 5.16.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not supported; pass minus the number of tokens to remove"
            )
        self._flush()
        count = min(-tokens_to_remove, self.length)
        if count == 0:
            return
        lengths = self.paged.lengths
        if self.columns is None:
            self.paged.crop([n - count for n in lengths])
        else:
            removed = self.columns[:, -count:].sum(1).tolist()
            self.paged.crop([n - r for n, r in zip(lengths, removed, strict=True)])
            self.columns = self.columns[:, :-count]
        self.length -= count
        self._dense = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._gather(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._gather(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._flush()
        self._gather(torch.arange(len(self.paged.lengths)).repeat_interleave(repeats))

    def _gather(self, indices: Tensor) -> None:
        self._flush()
        self.paged.gather(indices)
        if self.columns is not None:
            self.columns = self.columns.index_select(0, indices.to(self.columns.device))
        self._dense = None

    # --- storing and attending -----------------------------------------------------------------

    def attend(
        self, module: torch.nn.Module, q: Tensor, mask: Tensor | None, scale: float, **options: Any
    ) -> Tensor:
        """Store the pending tokens and attend to the cache, output `[B, Tq, Hq, D]`."""
        assert self._pending is not None
        k, v = self._pending
        is_first = self.length == k.shape[2]
        real = self._real_columns(mask, k)
        positions = self._positions(real, q.shape[2])
        self._store_columns(real, k)
        self._pending = None
        if is_first and self.exact_prefill and options.get("softcap") is None:
            out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scale, **options)
            self.paged.append(k, v, real)
            return out  # type: ignore[no-any-return]
        self.paged.stage(k, v, real)
        if not self.exact_prefill:
            self.paged.commit()
        out, _ = attend(
            q,
            self.paged.view(),
            scale=scale,
            positions=positions,
            softcap=options.get("softcap"),
            backend=self.backend,
        )
        if self.exact_prefill:
            self.paged.commit()
        return out.transpose(1, 2).contiguous()

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values `[B, Hkv, T, D]` in the model's dtype, zeros where columns are padding."""
        if self._dense is None:
            pending, is_first = self._pending, self.paged.is_empty
            self._flush()
            if pending is not None and is_first and self.exact_prefill:
                self._dense = pending
            else:
                self._dense = self._rectangular(*self.paged.materialize())
        return self._dense

    def _flush(self) -> None:
        """Store tokens that no attention call has claimed, padding unknown."""
        if self._pending is not None:
            k, v = self._pending
            self._store_columns(None, k)
            self.paged.append(k, v)
            self._pending = None

    def _rectangular(self, *packed: Tensor) -> tuple[Tensor, Tensor]:
        if self.columns is None:
            return packed[0], packed[1]
        wide = [x.new_zeros(*x.shape[:2], self.length, x.shape[3]) for x in packed]
        for b, real in enumerate(self.columns):
            for x, y in zip(wide, packed, strict=True):
                x[b, :, real] = y[b, :, : int(real.sum())]
        return wide[0], wide[1]

    def _store_columns(self, real: Tensor | None, k: Tensor) -> None:
        if real is None and self.columns is None:
            return
        batch, new = k.shape[0], k.shape[2]
        ones = torch.ones(batch, self.length, dtype=torch.bool, device=k.device)
        old = ones[:, :-new] if self.columns is None else self.columns
        self.columns = torch.cat([old, ones[:, -new:] if real is None else real], dim=1)

    def _positions(self, real: Tensor | None, num_queries: int) -> Tensor | None:
        """The last token each query sees; None for the plain causal case."""
        if real is None:
            return None
        before = torch.tensor(self.paged.lengths or [0] * len(real), device=real.device)
        own = before[:, None] + real[:, -num_queries:].cumsum(1) - 1
        return own.masked_fill(~real, -1)

    def _real_columns(self, mask: Tensor | None, k: Tensor) -> Tensor | None:
        """Which new columns are real tokens, bool `[B, T]`; None if all and no padding so far."""
        if mask is None:
            return None if self.columns is None else torch.ones_like(k[:, 0, :, 0], dtype=torch.bool)
        known = self.masks.get(mask, self.length)
        if known is not None:
            return known[0]
        batch, _, new, _ = k.shape
        allowed = mask if mask.dtype == torch.bool else mask == 0
        allowed = allowed.expand(batch, 1, new, -1)[:, 0]
        # the newest query sees every real column, so what it does not see is padding
        visible = allowed[:, -1, -self.length :]
        self._refuse_other_masks(allowed, visible)
        real = visible[:, -new:]
        all_real = self.columns is None and bool(real.all())
        return self.masks.put(mask, self.length, None if all_real else real)

    def _refuse_other_masks(self, allowed: Tensor, visible: Tensor) -> None:
        new, length = allowed.shape[1], self.length
        old = visible[:, : length - new]
        expected_old = torch.ones_like(old) if self.columns is None else self.columns
        same = allowed.shape[2] == length and torch.equal(old, expected_old)
        column = torch.arange(length, device=visible.device)
        for start in range(0, new, 256) if same else ():
            rows = allowed[:, start : start + 256]
            own = column[length - new + start :][: rows.shape[1]]
            expected = visible[:, None] & (column <= own[:, None])
            # rows of padding queries may hold anything
            same &= bool(((rows == expected) | ~visible[:, own, None]).all())
        if not same:
            raise ValueError(
                "bitkv attends causally with padding only, and this attention mask asks for something "
                "else; pass a 2D padding mask that keeps earlier columns as they were"
            )


class _Masks:
    """The last mask read, so that a model's layers read it once and not once each."""

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._length = 0
        self._real: Tensor | None = None

    def get(self, mask: Tensor, length: int) -> tuple[Tensor | None] | None:
        if self._mask is not None and self._mask() is mask and self._length == length:
            return (self._real,)
        return None

    def put(self, mask: Tensor, length: int, real: Tensor | None) -> Tensor | None:
        self._mask, self._length, self._real = weakref.ref(mask), length, real
        return real


class PackedCache(Cache):  # type: ignore[misc]
    """A Transformers cache that keeps full-attention layers packed; pass it as `past_key_values`.

    Building one sets the model's attention to "bitkv" through its config. Other caches still work under
    that setting: their layers go to SDPA as before.

    Args:
        config: `model.config`.
        recipe: a `Recipe` or its text, such as "kivi2".
        exact_prefill: the first forward attends to exact keys and values and packs them afterwards.
            False: all attention reads the packed cache, as a quantized cache's perplexity needs.
        backend: "auto" or a backend's name; see `bitkv.attend`.

    Raises:
        ValueError: the recipe is wrong or cannot serve this model.
    """

    def __init__(
        self,
        config: Config,
        recipe: Recipe | str,
        *,
        exact_prefill: bool = True,
        backend: str = "auto",
    ) -> None:
        decoder = _decoder_config(config)
        stock = DynamicCache(config=decoder).layers
        self.paged = PagedCache(recipe, len(stock))
        self.exact_prefill = exact_prefill
        self.backend = backend
        self.masks = _Masks()
        self.fingerprint = fingerprint(config)
        full = [type(layer) is DynamicLayer for layer in stock]
        if not any(isinstance(layer, DynamicLayer) for layer in stock):
            raise ValueError(f"{decoder.model_type} has no KV cache for bitkv to pack")
        _check_head_dim(decoder, [self.paged.layers[i] for i, is_full in enumerate(full) if is_full])
        _switch_attention(decoder)
        super().__init__(
            layers=[
                PackedLayer(self, i) if is_full else layer
                for i, (layer, is_full) in enumerate(zip(stock, full, strict=True))
            ]
        )

    @property
    def recipe(self) -> Recipe:
        return self.paged.recipe

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all layers, those Transformers keeps included."""
        others = (x for layer in self._other_layers().values() for x in (layer.keys, layer.values))
        return self.paged.nbytes + sum(int(x.nbytes) for x in others if x is not None)

    @property
    def bits_per_element(self) -> float:
        """Measured bits per element of the packed layers, hot window included."""
        return self.paged.bits_per_element

    def save(self, path: Path | str) -> None:
        """Write the cache to a safetensors file, whole or not at all.

        Raises:
            ValueError: a layer of a kind that cannot be saved.
        """
        extra: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, PackedLayer):
                layer._flush()
                extra[f"{i}.length"] = torch.tensor(layer.length)
                if layer.columns is not None:
                    extra[f"{i}.columns"] = layer.columns
            elif type(layer) is not DynamicSlidingWindowLayer:
                raise ValueError(f"layer {i} is a {type(layer).__name__}, which bitkv cannot save")
            elif layer.is_initialized:
                extra[f"{i}.length"] = torch.tensor(layer.cumulative_length)
                extra |= {f"{i}.keys": layer.keys, f"{i}.values": layer.values}
        self.paged.save(path, model=self.fingerprint, extra=extra)

    def load(self, path: Path | str) -> None:
        """Become the cache in a file that `save` wrote.

        Raises:
            ValueError: the file is damaged, or of another model or recipe; nothing is changed.
            FileNotFoundError: there is no such file.
        """
        extra = self.paged.load(path, model=self.fingerprint)
        for i, layer in enumerate(self.layers):
            length = int(extra.get(f"{i}.length", 0))
            if isinstance(layer, PackedLayer):
                layer.length, layer.columns = length, extra.get(f"{i}.columns")
                layer._pending = layer._dense = None
                layer.is_initialized = length > 0
            elif length:
                layer.lazy_initialization(extra[f"{i}.keys"], extra[f"{i}.values"])
                layer.keys, layer.values = extra[f"{i}.keys"], extra[f"{i}.values"]
                layer.cumulative_length = length

    def _other_layers(self) -> dict[int, Any]:
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, DynamicLayer)}


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that Transformers calls by the name "bitkv"."""
    if not isinstance(key, Handle):
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"bitkv does not serve attention with {name}; use the stock cache")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {name: kwargs[name] for name in ("is_causal", "softcap") if name in kwargs}
    return key.layer.attend(module, query, attention_mask, scale, **options), None


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
    decoder = _decoder_config(model.config)
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


def fingerprint(config: Config) -> str:
    """A digest of everything in a config that decides what a cache means."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _decoder_config(config: Config) -> Config:
    """The text decoder's config, if it is one that bitkv can serve."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type} is an encoder-decoder model; bitkv serves decoder-only models"
        )
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "kv_lora_rank", None):
        raise ValueError(
            f"{decoder.model_type} uses multi-head latent attention (MLA), whose cache is already "
            "compressed; bitkv serves models with keys and values per head"
        )
    return decoder


def _check_head_dim(decoder: Config, layers: list[PagedLayer]) -> None:
    """Refuse a recipe that cannot pack this model's heads now, not at the first token."""
    heads = getattr(decoder, "num_attention_heads", None)
    head_dim = getattr(decoder, "head_dim", None) or (heads and decoder.hidden_size // heads)
    if head_dim:
        for layer in layers:
            layer.page_format(int(head_dim), torch.float16)


def _switch_attention(decoder: Config) -> None:
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    decoder._attn_implementation = NAME
