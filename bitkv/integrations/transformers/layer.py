"""One layer of a Transformers cache: handles go out, real tokens come to lie in pages."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.cache_utils import CacheLayerMixin

from bitkv.attention import attend
from bitkv.cache import PagedCache
from bitkv.integrations.transformers.fingerprint import check_calibration
from bitkv.integrations.transformers.masks import MaskReader
from bitkv.integrations.transformers.stock import stock_attention
from bitkv.layer import PagedLayer


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
    _pending: tuple[Tensor, Tensor] | None  # new tokens, until attention claims them
    _was_attended = False  # whether it has
    _dense: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        cache: PagedCache,
        layer_idx: int,
        masks: MaskReader,
        *,
        exact_prefill: bool,
        backend: str,
    ) -> None:
        super().__init__()
        self.cache = cache
        self.layer_idx = layer_idx
        self.masks = masks
        self.exact_prefill = exact_prefill
        self.backend = backend
        self.reset()

    @property
    def paged(self) -> PagedLayer:
        """The packed storage of this layer."""
        return self.cache.layers[self.layer_idx]

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
        self._pending, self._was_attended = (key_states, value_states), False
        self._dense = None
        self.length += key_states.shape[2]
        return self._handle(key_states, 0), self._handle(value_states, 1)

    @property
    def width(self) -> int:
        """Columns of handles and masks."""
        return self.length

    def _handle(self, new: Tensor, part: Literal[0, 1]) -> Handle:
        shape = (*new.shape[:2], self.width, new.shape[3])
        handle = new.as_strided(shape, (0, 0, 0, 0)).as_subclass(Handle)
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

    def restore(self, length: int, columns: Tensor | None) -> None:
        """Become the layer of `length` columns whose tokens `paged` now holds."""
        self.length, self.columns = length, columns
        self._pending = self._dense = None
        self.is_initialized = length > 0

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
        self._gather(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._flush()
        self._gather(torch.arange(len(self.paged.lengths)).repeat_interleave(repeats))

    def _gather(self, indices: Tensor) -> None:
        self._flush()
        self.paged.gather(indices)
        if self.columns is not None:
            self.columns = self.columns.index_select(0, indices.to(self.columns.device))
        self._dense = None

    # CacheLayerMixin has tensors by these names, which other code may read: slow but right

    @property
    def keys(self) -> Tensor | None:
        """All keys `[B, Hkv, T, D]` in the model's dtype; None while there are none."""
        return self.dense()[0] if self.length else None

    @keys.setter
    def keys(self, _: None) -> None: ...

    @property
    def values(self) -> Tensor | None:
        """All values, as `keys`."""
        return self.dense()[1] if self.length else None

    @values.setter
    def values(self, _: None) -> None: ...

    # --- storing and attending -----------------------------------------------------------------

    def can_attend(self, q: Tensor) -> bool:
        """Whether `attend` serves queries `[B, Hq, Tq, D]`: not those of a model that has read new
        tokens as tensors instead, nor a prompt's in a layer that shares the cache of an earlier one.
        """
        return self._pending is not None or (self._was_attended and q.shape[2] == 1)

    def attend(
        self, module: torch.nn.Module, q: Tensor, mask: Tensor | None, scale: float, **options: Any
    ) -> Tensor:
        """Store the pending tokens and attend to the cache, output `[B, Tq, Hq, D]`."""
        softcap = options.get("softcap")
        if self._pending is None:  # a later layer that shares this one's cache, for its newest token
            out, _ = attend(q, self.paged.view(), scale=scale, softcap=softcap, backend=self.backend)
            return out.transpose(1, 2).contiguous()
        k, v = self._pending
        is_first = self.length == k.shape[2]
        if is_first and self.layer_idx == 0:
            check_calibration(self.cache.recipe, module)
        is_exact = is_first and self.exact_prefill and softcap is None
        shape = self.length, k.shape[2], k.shape[0]
        real, positions = self.masks.read(mask, self.columns, *shape, as_masked=is_exact)
        self._store_columns(real, k)
        self._pending, self._was_attended = None, True
        if is_exact:
            mask = None if mask is None else mask[..., : self.length]
            out = stock_attention(module, q, k, v, mask, scaling=scale, **options)
            self.paged.append(k, v, real)
            return out
        self.paged.stage(k, v, real)
        if not self.exact_prefill:
            self.paged.commit()
        out, _ = attend(
            q,
            self.paged.view(),
            scale=scale,
            positions=positions,
            softcap=softcap,
            backend=self.backend,
        )
        if self.exact_prefill:
            self.paged.commit()
        return out.transpose(1, 2).contiguous()

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values `[B, Hkv, T, D]` in the model's dtype, zeros where columns are padding."""
        if self._dense is None:
            pending = self._pending
            self._flush()
            if pending is not None and pending[0].shape[2] == self.length and self.exact_prefill:
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
