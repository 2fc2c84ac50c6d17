"""The paged cache of one layer: packed pages, a block table and a 16-bit hot window.

The order of a sequence's tokens is sinks, pages, recent tokens. Sinks and recent tokens lie in the hot
window; full pages only are packed, once, and never re-quantized.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitkv.codecs import Codec
from bitkv.pages import PageFormat, layout_for
from bitkv.pool import PagePool
from bitkv.view import CacheView

_TENSORS = ("pool", "block_table", "packed_len", "hot_len", "hot_k", "hot_v")
_CPU = torch.device("cpu")
_PAGES_AT_ONCE = 16  # quantized together: bounds the float32 temporaries of a long prompt


class Usage(NamedTuple):
    """Bytes, and elements of K and V they stand for, in pages and in the hot window."""

    page_bytes: int
    page_elements: int
    hot_bytes: int
    hot_elements: int


class PagedLayer:
    """The cache of one layer: append, crop, gather; tensors appear with the first tokens.

    Sequences of a batch may differ in length. `stage` and `commit` together are `append`: between
    the two, attention sees new tokens exactly, however many they are.

    Args:
        key, value: codecs of this layer.
        num_sink_tokens, recent_tokens, page_size: see `Recipe`.
        layout: order of codes inside pages, a key of `bitkv.pages.LAYOUTS`; by default the one that
            suits the device of the first tokens.
    """

    def __init__(
        self,
        key: Codec,
        value: Codec,
        *,
        num_sink_tokens: int,
        recent_tokens: int,
        page_size: int,
        layout: str | None = None,
    ) -> None:
        self.key, self.value = key, value
        self.num_sink_tokens = num_sink_tokens
        self.recent_tokens = recent_tokens
        self.page_size = page_size
        self.layout = layout
        self.reset()

    def reset(self) -> None:
        """Forget everything, shapes included, and free its memory."""
        self._format: PageFormat | None = None
        for name in _TENSORS:
            vars(self).pop(name, None)

    @property
    def is_empty(self) -> bool:
        """Whether no tensor exists yet."""
        return self._format is None

    @property
    def format(self) -> PageFormat:
        """The page format, known from the first tokens on."""
        if self._format is None:
            raise ValueError("the cache is empty and has no page format yet; append tokens first")
        return self._format

    def page_format(self, head_dim: int, dtype: torch.dtype, device: torch.device = _CPU) -> PageFormat:
        """The format that tensors of this shape would get.

        Raises:
            ValueError: a codec cannot serve the shape.
        """
        shape = {"head_dim": head_dim, "page_size": self.page_size}
        layout = self.layout or layout_for(device)
        return PageFormat(
            self.key.part_format("key", **shape, dtype=dtype, layout=layout),
            self.value.part_format("value", **shape, dtype=dtype, layout=layout),
        )

    @property
    def hot_capacity(self) -> int:
        """Tokens the hot window holds between two calls of `append`."""
        return self.num_sink_tokens + self.recent_tokens + self.page_size

    def allocate(self, k: Tensor) -> None:
        """Make the tensors of an empty cache for tokens like `k` `[B, Hkv, T, D]`."""
        batch, heads, _, head_dim = k.shape
        self._format = self.page_format(head_dim, k.dtype, k.device)
        self.pool = PagePool(heads, self._format.page_bytes, k.device)
        self.block_table = torch.zeros(batch, 0, dtype=torch.int32, device=k.device)
        self.packed_len = torch.zeros(batch, dtype=torch.int32, device=k.device)
        self.hot_len = torch.zeros_like(self.packed_len)
        self.hot_k = k.new_empty(batch, heads, self.hot_capacity, head_dim)
        self.hot_v = torch.empty_like(self.hot_k)

    # --- growing -------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Add tokens `[B, Hkv, T, D]` and pack what has left the hot window.

        Args:
            real: bool `[B, T]`, false for padding, which is not stored; all real by default.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; nothing is changed.
        """
        self.stage(k, v, real)
        self.commit()

    def stage(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Put new tokens into the hot window, widening it as needed; see `append`."""
        self._check(k, v, real)
        if self.is_empty:
            self.allocate(k)
        k, v = k.detach(), v.detach()
        old = self.hot_len.tolist()
        counts = [k.shape[2]] * len(old) if real is None else real.sum(1).tolist()
        needed = max((a + b for a, b in zip(old, counts, strict=True)), default=0)
        if needed > self.hot_k.shape[2]:
            self._resize_hot(needed)
        for b, (start, count) in enumerate(zip(old, counts, strict=True)):
            rows = slice(None) if real is None else real[b]
            self.hot_k[b, :, start : start + count] = k[b, :, rows]
            self.hot_v[b, :, start : start + count] = v[b, :, rows]
        self.hot_len += torch.tensor(counts, dtype=torch.int32, device=self.hot_len.device)

    def commit(self) -> None:
        """Pack the oldest recent tokens into pages where a full page has left the window."""
        limit = self.hot_capacity
        for b, length in enumerate(self.hot_len.tolist()):
            if length >= limit:
                num_pages = 1 + (length - limit) // self.page_size
                self._pack_oldest(b, length, num_pages)
        if self.hot_k.shape[2] > limit:
            self._resize_hot(limit)

    def _pack_oldest(self, b: int, length: int, num_pages: int) -> None:
        start = self.num_sink_tokens
        stop = start + num_pages * self.page_size
        table: list[int] = []
        self.pool.make_room(num_pages)
        for i in range(0, num_pages, _PAGES_AT_ONCE):
            span = slice(start + i * self.page_size, stop)
            tokens = min(_PAGES_AT_ONCE, num_pages - i) * self.page_size
            k, v = (x[b, :, span][:, :tokens] for x in (self.hot_k, self.hot_v))
            table += self.pool.store(self._quantize(k, v))
        used = int(self.packed_len[b]) // self.page_size
        self._widen_table(used + num_pages)
        self.block_table[b, used : used + num_pages] = torch.tensor(table, dtype=torch.int32)
        for hot in (self.hot_k, self.hot_v):
            hot[b, :, start : start + length - stop] = hot[b, :, stop:length].clone()
        self.packed_len[b] += num_pages * self.page_size
        self.hot_len[b] -= num_pages * self.page_size

    def _quantize(self, k: Tensor, v: Tensor) -> Tensor:
        """Page bytes `[n, Hkv, page_bytes]` of tokens `[Hkv, n * page_size, D]`."""
        k, v = (torch.unflatten(x, 1, (-1, self.page_size)).transpose(0, 1) for x in (k, v))
        return self.format.pack(self.key.quantize(k), self.value.quantize(v))

    def _widen_table(self, num_pages: int) -> None:
        width = self.block_table.shape[1]
        if num_pages > width:
            extra = max(num_pages - width, width)
            self.block_table = torch.nn.functional.pad(self.block_table, (0, extra))

    def _resize_hot(self, capacity: int) -> None:
        keep = min(capacity, self.hot_k.shape[2])
        for name in ("hot_k", "hot_v"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :keep] = old[:, :, :keep]
            setattr(self, name, new)

    def _check(self, k: Tensor, v: Tensor, real: Tensor | None) -> None:
        if k.shape != v.shape or k.dim() != 4:
            raise ValueError(
                f"keys {tuple(k.shape)} and values {tuple(v.shape)} must both be [B, Hkv, T, D]"
            )
        if k.device != v.device or k.dtype != v.dtype:
            raise ValueError(
                f"keys are {k.dtype} on {k.device}, values {v.dtype} on {v.device}; "
                "move them to one device and dtype"
            )
        columns = (k.shape[0], k.shape[2])
        if real is not None and (real.shape != columns or real.dtype != torch.bool):
            raise ValueError(
                f"the mask of real tokens is {real.dtype} {tuple(real.shape)}; pass torch.bool {columns}"
            )
        if self.is_empty:
            return
        mine, other = self.hot_k, k
        if mine.device != other.device:
            raise ValueError(
                f"the cache is on {mine.device}, the new tokens on {other.device}; move them there"
            )
        expected, got = ((x.shape[0], x.shape[1], x.shape[3], str(x.dtype)) for x in (mine, other))
        if expected != got:
            raise ValueError(
                f"new tokens have (batch, heads, head_dim, dtype) {got}, the cache {expected}; "
                "reset the cache or pass matching tensors"
            )

    # --- shrinking, moving ---------------------------------------------------------------------

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep the first `lengths[b]` tokens of each sequence.

        Exact while the cut lies in the hot window. A cut inside a page brings that page's kept tokens
        back into the hot window as their codes have them, and the page is released.

        Raises:
            ValueError: a length that is negative or longer than the sequence; nothing is changed.
        """
        if self.is_empty:
            return
        old = (self.packed_len + self.hot_len).tolist()
        if len(lengths) != len(old):
            raise ValueError(f"crop got {len(lengths)} lengths for a batch of {len(old)}")
        for b, (new, now) in enumerate(zip(lengths, old, strict=True)):
            if not 0 <= new <= now:
                raise ValueError(f"cannot crop sequence {b} of {now} tokens to {new} tokens")
        for b, new in enumerate(lengths):
            self._crop_sequence(b, new)

    def _crop_sequence(self, b: int, length: int) -> None:
        sinks, packed = self.num_sink_tokens, int(self.packed_len[b])
        if length >= sinks + packed or packed == 0:
            self.hot_len[b] = length - packed
            return
        in_pages = max(length - sinks, 0)
        keep, partial = divmod(in_pages, self.page_size)
        pages = self.block_table[b, : packed // self.page_size].tolist()
        if partial:
            k, v = self._dequantize([pages[keep]])
            self.hot_k[b, :, sinks : sinks + partial] = k[0, :, :partial]
            self.hot_v[b, :, sinks : sinks + partial] = v[0, :, :partial]
        self.pool.release(pages[keep:])
        self.packed_len[b] = keep * self.page_size
        self.hot_len[b] = min(length, sinks) + partial

    def gather(self, indices: Tensor) -> None:
        """Make the batch `indices` `[B']` of the present one: reorder, repeat or select.

        Tables move and shared pages are counted; no page is copied.

        Raises:
            ValueError: an index outside the batch; nothing is changed.
        """
        if self.is_empty:
            return
        indices = indices.to(self.hot_k.device)
        old = self.page_lists()
        if not all(0 <= b < len(old) for b in indices.tolist()):
            raise ValueError(
                f"cannot gather sequences {indices.tolist()} of a batch of {len(old)}; "
                f"pass 0 to {len(old) - 1}"
            )
        pages = [page for b in indices.tolist() for page in old[b]]
        self.pool.acquire(pages)
        self.pool.release([page for row in old for page in row])
        for name in ("block_table", "packed_len", "hot_len", "hot_k", "hot_v"):
            setattr(self, name, getattr(self, name).index_select(0, indices))

    def page_lists(self) -> list[list[int]]:
        """The pages of each sequence, in order."""
        counts = (self.packed_len // self.page_size).tolist()
        return [row[:n] for row, n in zip(self.block_table.tolist(), counts, strict=True)]

    # --- reading -------------------------------------------------------------------------------

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [] if self.is_empty else (self.packed_len + self.hot_len).tolist()

    def view(self) -> CacheView:
        """The tensors that attention reads."""
        return CacheView(
            format=self.format,
            pages=self.pool.data,
            block_table=self.block_table,
            packed_len=self.packed_len,
            hot_k=self.hot_k,
            hot_v=self.hot_v,
            hot_len=self.hot_len,
            num_sink_tokens=self.num_sink_tokens,
        )

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, T, D]` of all tokens, in the cache's dtype; zeros after the end."""
        longest = max(self.lengths)
        batch, heads, _, head_dim = self.hot_k.shape
        k, v = (self.hot_k.new_zeros(batch, heads, longest, head_dim) for _ in range(2))
        for b, pages in enumerate(self.page_lists()):
            packed, hot = int(self.packed_len[b]), int(self.hot_len[b])
            sinks = min(hot, self.num_sink_tokens)
            bodies = self._dequantize(pages)
            for out, store, body in zip((k, v), (self.hot_k, self.hot_v), bodies, strict=True):
                out[b, :, :sinks] = store[b, :, :sinks]
                out[b, :, sinks : sinks + packed] = body.transpose(0, 1).flatten(1, 2)
                out[b, :, sinks + packed : packed + hot] = store[b, :, sinks:hot]
        return k, v

    def _dequantize(self, pages: list[int]) -> Iterator[Tensor]:
        """Keys, then values `[n, Hkv, page_size, D]` of some pages, in the cache's dtype."""
        largest = torch.finfo(self.hot_k.dtype).max
        for x in self.format.dequantize(self.pool.data[pages]):
            # a level may lie just above the largest float16, where rounding would make it infinite
            yield x.clamp(-largest, largest).to(self.hot_k.dtype)

    @property
    def nbytes(self) -> int:
        """Allocated bytes: pool with its free pages, table, lengths, hot window."""
        if self.is_empty:
            return 0
        tensors = (self.block_table, self.packed_len, self.hot_len, self.hot_k, self.hot_v)
        return self.pool.nbytes + sum(x.nbytes for x in tensors)

    @property
    def usage(self) -> Usage:
        """What tokens occupy, without free pages and unused window; a shared page counts once."""
        if self.is_empty:
            return Usage(0, 0, 0, 0)
        _, heads, _, head_dim = self.hot_k.shape
        per_token = 2 * heads * head_dim
        hot_elements = int(self.hot_len.sum()) * per_token
        return Usage(
            page_bytes=self.pool.num_used * heads * self.format.page_bytes,
            page_elements=self.pool.num_used * self.page_size * per_token,
            hot_bytes=hot_elements * self.hot_k.dtype.itemsize,
            hot_elements=hot_elements,
        )
