"""The paged cache of one layer: packed pages, a block table and a 16-bit hot window.

The order of a sequence's tokens is sinks, pages, recent tokens. Sinks and recent tokens lie in the hot
window; full pages only are packed, once, and never re-quantized.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitkv import native
from bitkv.checks import check_tokens
from bitkv.codecs import Codec
from bitkv.memory import integers
from bitkv.packing import Packing, page_format
from bitkv.pages import PageFormat
from bitkv.pool import PagePool, runs
from bitkv.rope import Rope
from bitkv.view import CacheView, Usage

_TENSORS = ("pool", "block_table", "packed_len", "hot_len", "hot_k", "hot_v")  # none while empty
_CPU = torch.device("cpu")
_FEW_TOKENS = 16  # as many are put into the window without torch's operations, which take microseconds


class PagedLayer:
    """The cache of one layer: append, crop, gather; tensors appear with the first tokens.

    Sequences of a batch may differ in length. `stage` and `commit` together are `append`: between
    the two, attention sees new tokens exactly, however many they are.

    Args:
        key, value: codecs of this layer.
        num_sink_tokens, recent_tokens, page_size: see `Recipe`.
        layout: order of codes inside pages, a key of `bitkv.pages.LAYOUTS`; by default the one that
            suits the device of the first tokens.
        rope: the model's rotary embedding, for codecs that keep keys as they are before it.
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
        rope: Rope | None = None,
    ) -> None:
        self.key, self.value = key, value
        self.num_sink_tokens = num_sink_tokens
        self.recent_tokens = recent_tokens
        self.page_size = page_size
        self.layout, self.rope = layout, rope
        self.reset()

    def reset(self) -> None:
        """Forget everything, shapes included, and free its memory."""
        self._packing: Packing | None = None
        # the truth about each sequence: its pages and its hot tokens; reading tensors would take longer
        self._tables: list[list[int]] = []
        self._hot: list[int] = []
        for name in _TENSORS:
            vars(self).pop(name, None)

    @property
    def is_empty(self) -> bool:
        """Whether no tensor exists yet."""
        return self._packing is None

    @property
    def packing(self) -> Packing:
        """How tokens become pages, known from the first ones on."""
        if self._packing is None:
            raise ValueError("the cache is empty and has no page format yet; append tokens first")
        return self._packing

    @property
    def format(self) -> PageFormat:
        """The page format, known from the first tokens on."""
        return self.packing.format

    def page_format(self, head_dim: int, dtype: torch.dtype, device: torch.device = _CPU) -> PageFormat:
        """The format that tensors of this shape would get; see `packing.page_format`."""
        shape = {"head_dim": head_dim, "page_size": self.page_size}
        options = {"dtype": dtype, "device": device, "layout": self.layout}
        return page_format(self.key, self.value, **shape, **options)  # type: ignore[arg-type]

    def _packing_of(self, k: Tensor) -> Packing:
        options = {"page_size": self.page_size, "layout": self.layout, "rope": self.rope}
        return Packing.of(self.key, self.value, k, **options)  # type: ignore[arg-type]

    @property
    def hot_capacity(self) -> int:
        """Tokens the hot window holds between two calls of `append`."""
        return self.num_sink_tokens + self.recent_tokens + self.page_size

    @property
    def window_capacity(self) -> int:
        """Tokens its tensors have room for, except while a long chunk is staged."""
        return self.hot_capacity

    def allocate(self, k: Tensor) -> None:
        """Make the tensors of an empty cache for tokens like `k` `[B, Hkv, T, D]`."""
        batch, heads, _, head_dim = k.shape
        self._packing = self._packing_of(k)
        self.pool = PagePool(heads, self.format.page_bytes, k.device)
        self.hot_k = k.new_empty(batch, heads, self.window_capacity, head_dim)
        self.hot_v = torch.empty_like(self.hot_k)
        self.set_sequences([[] for _ in range(batch)], [0] * batch)

    def set_sequences(self, tables: Sequence[Sequence[int]], hot: Sequence[int]) -> None:
        """Make these the pages and the number of hot tokens of each sequence; the tensors follow."""
        self._tables, self._hot = [list(row) for row in tables], list(hot)
        rows = self._table_rows()
        width = max(map(len, rows), default=0)
        rows = [row + [0] * (width - len(row)) for row in rows]
        self.block_table = integers(rows, self.hot_k.device).view(len(rows), width)
        self._set_lengths()

    def _table_rows(self) -> list[list[int]]:
        """What the block table names."""
        return self._tables

    def _set_lengths(self) -> None:
        packed = [len(row) * self.page_size for row in self._tables]
        self.packed_len, self.hot_len = (integers(x, self.hot_k.device) for x in (packed, self._hot))

    def _refresh(self) -> None:
        """Before lists are read: nothing, they are the truth."""

    # --- growing -------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Add tokens `[B, Hkv, T, D]` and pack what has left the hot window.

        Args:
            real: bool `[B, T]`, false for padding, which is not stored; all real by default.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; nothing is changed.
        """
        if real is None and k.shape[2] >= self.hot_capacity and not any(self.lengths):
            self._append_prompt(k, v)
            return
        self.stage(k, v, real)
        self.commit()

    def _append_prompt(self, k: Tensor, v: Tensor) -> None:
        """A first prompt goes into pages from where it is: the hot window never holds it."""
        check_tokens(k, v, None, None if self.is_empty else self.hot_k)
        if self.is_empty:
            self.allocate(k)
        k, v = k.detach(), v.detach()
        sinks, tokens = self.num_sink_tokens, k.shape[2]
        num_pages = 1 + (tokens - self.hot_capacity) // self.page_size
        stop = sinks + num_pages * self.page_size
        for b in range(k.shape[0]):
            self._pack(b, k[b, :, sinks:stop], v[b, :, sinks:stop])
        self._put(k[:, :, :sinks], v[:, :, :sinks], 0)
        self._put(k[:, :, stop:], v[:, :, stop:], sinks)
        self._hot = [sinks + tokens - stop] * len(self._hot)
        self._set_lengths()

    def stage(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Put new tokens into the hot window, widening it as needed; see `append`."""
        check_tokens(k, v, real, None if self.is_empty else self.hot_k)
        if self.is_empty:
            self.allocate(k)
        self._refresh()
        if k.requires_grad or v.requires_grad:
            k, v = k.detach(), v.detach()
        count, starts = k.shape[2], self._hot
        counts = [count] * len(starts) if real is None else real.sum(1).tolist()
        lengths = [a + b for a, b in zip(starts, counts, strict=True)]
        needed = max(lengths, default=0)
        if needed > self.hot_k.shape[2]:
            self._resize_hot(needed)
        is_even = real is None and starts.count(needed - count) == len(starts)
        if is_even or (real is None and k.is_cuda):
            self._put(k, v, needed - count) if is_even else self._put_ragged(k, v)
            self._hot = lengths
            return
        for b, (start, stop) in enumerate(zip(starts, lengths, strict=True)):
            rows = slice(None) if real is None else real[b]
            self.hot_k[b, :, start:stop] = k[b, :, rows]
            self.hot_v[b, :, start:stop] = v[b, :, rows]
        self._hot = lengths
        self._set_lengths()

    def _put(self, k: Tensor, v: Tensor, start: int) -> None:
        """New tokens of all sequences at one place of the hot window."""
        count = k.shape[2]
        if count <= _FEW_TOKENS and native.append(k, v, self.hot_k, self.hot_v, self.hot_len, start):
            return
        self.hot_k.narrow(2, start, count).copy_(k)
        self.hot_v.narrow(2, start, count).copy_(v)
        self.hot_len.add_(count)

    def _put_ragged(self, k: Tensor, v: Tensor) -> None:
        """New tokens of all sequences, each behind its own; on a CPU a loop is faster."""
        slots = self.hot_len[:, None] + torch.arange(k.shape[2], device=k.device)
        slots = slots[:, None, :, None].expand_as(k)
        self.hot_k.scatter_(2, slots, k)
        self.hot_v.scatter_(2, slots, v)
        self.hot_len.add_(k.shape[2])

    def commit(self) -> None:
        """Pack the oldest recent tokens into pages where a full page has left the window."""
        self._refresh()
        limit = self.hot_capacity
        if max(self._hot, default=0) >= limit:
            for b, length in enumerate(self._hot):
                if length >= limit:
                    self._pack_oldest(b, 1 + (length - limit) // self.page_size)
            self._set_lengths()
        if self.hot_k.shape[2] > self.window_capacity:
            self._resize_hot(self.window_capacity)

    def _pack_oldest(self, b: int, num_pages: int) -> None:
        start, length = self.num_sink_tokens, self._hot[b]
        stop = start + num_pages * self.page_size
        self._pack(b, self.hot_k[b, :, start:stop], self.hot_v[b, :, start:stop])
        for hot in (self.hot_k, self.hot_v):
            hot[b, :, start : start + length - stop] = hot[b, :, stop:length].clone()
        self._hot[b] = start + length - stop

    def _pack(self, b: int, k: Tensor, v: Tensor) -> None:
        """Write tokens `[Hkv, n * page_size, D]` into pages behind those of a sequence."""
        used, num_pages = len(self._tables[b]), k.shape[1] // self.page_size
        pages, stop = self._take_pages(b, num_pages), 0
        for first, count in runs(pages):
            tokens = slice(stop, stop := stop + count * self.page_size)
            place = self.num_sink_tokens + used * self.page_size + tokens.start
            out = self.pool.data[first : first + count]
            self.packing.encode(k[:, tokens], v[:, tokens], out, first_token=place)
        self._widen_table(used + num_pages)
        self.block_table[b, used : used + num_pages] = integers(pages, self.block_table.device)
        self._tables[b] += pages

    def _take_pages(self, b: int, num_pages: int) -> list[int]:
        """Free pages for a sequence to write."""
        return self.pool.take(num_pages)

    def _widen_table(self, num_pages: int) -> None:
        if (width := self.block_table.shape[1]) < num_pages:
            extra = max(num_pages - width, width)
            self.block_table = torch.nn.functional.pad(self.block_table, (0, extra))

    def _resize_hot(self, capacity: int) -> None:
        keep = min(capacity, self.hot_k.shape[2])
        for name in ("hot_k", "hot_v"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :keep] = old[:, :, :keep]
            setattr(self, name, new)

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
        old = self.lengths
        if len(lengths) != len(old):
            raise ValueError(f"crop got {len(lengths)} lengths for a batch of {len(old)}")
        for b, (new, now) in enumerate(zip(lengths, old, strict=True)):
            if not 0 <= new <= now:
                raise ValueError(f"cannot crop sequence {b} of {now} tokens to {new} tokens")
        for b, new in enumerate(lengths):
            self._crop_sequence(b, new)
        self.set_sequences(self._tables, self._hot)

    def _crop_sequence(self, b: int, length: int) -> None:
        sinks, pages = self.num_sink_tokens, self._tables[b]
        packed = len(pages) * self.page_size
        if length >= sinks + packed or packed == 0:
            self._hot[b] = length - packed
            return
        in_pages = max(length - sinks, 0)
        keep, partial = divmod(in_pages, self.page_size)
        if partial:
            k, v = self._dequantize([pages[keep]], keep)
            self.hot_k[b, :, sinks : sinks + partial] = k[0, :, :partial]
            self.hot_v[b, :, sinks : sinks + partial] = v[0, :, :partial]
        self.pool.release(pages[keep:])
        self._tables[b] = pages[:keep]
        self._hot[b] = min(length, sinks) + partial

    def gather(self, indices: Tensor) -> None:
        """Make the batch `indices` `[B']` of the present one: reorder, repeat or select.

        Tables move and shared pages are counted; no page is copied.

        Raises:
            ValueError: an index outside the batch; nothing is changed.
        """
        if self.is_empty:
            return
        self._refresh()
        chosen, old = indices.tolist(), self._tables
        if not all(0 <= b < len(old) for b in chosen):
            raise ValueError(
                f"cannot gather sequences {chosen} of a batch of {len(old)}; pass 0 to {len(old) - 1}"
            )
        self.pool.acquire([page for b in chosen for page in old[b]])
        self.pool.release([page for row in old for page in row])
        indices = indices.to(self.hot_k.device)
        self.hot_k, self.hot_v = (x.index_select(0, indices) for x in (self.hot_k, self.hot_v))
        self.set_sequences([old[b] for b in chosen], [self._hot[b] for b in chosen])

    def page_lists(self) -> list[list[int]]:
        """The pages of each sequence, in order."""
        self._refresh()
        return [list(row) for row in self._tables]

    # --- reading -------------------------------------------------------------------------------

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        self._refresh()
        pairs = zip(self._tables, self._hot, strict=True)
        return [len(pages) * self.page_size + hot for pages, hot in pairs]

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
            key=self.packing.key_shared,
            value=self.packing.value_shared,
        )

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, T, D]` of all tokens, in the cache's dtype; zeros after the end."""
        longest = max(self.lengths)
        batch, heads, _, head_dim = self.hot_k.shape
        k, v = (self.hot_k.new_zeros(batch, heads, longest, head_dim) for _ in range(2))
        for b, (pages, hot) in enumerate(zip(self._tables, self._hot, strict=True)):
            packed = len(pages) * self.page_size
            sinks = min(hot, self.num_sink_tokens)
            bodies = self._dequantize(pages)
            for out, store, body in zip((k, v), (self.hot_k, self.hot_v), bodies, strict=True):
                out[b, :, :sinks] = store[b, :, :sinks]
                out[b, :, sinks : sinks + packed] = body.transpose(0, 1).flatten(1, 2)
                out[b, :, sinks + packed : packed + hot] = store[b, :, sinks:hot]
        return k, v

    def _dequantize(self, pages: list[int], first_page: int = 0) -> Iterator[Tensor]:
        """Keys, then values `[n, Hkv, page_size, D]` of a sequence's pages, in the cache's dtype."""
        largest = torch.finfo(self.hot_k.dtype).max
        for x in self.view().dequantize(integers(pages, self.hot_k.device), first_page):
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
    def num_pages(self) -> int:
        """Pages that hold tokens; a shared one counts once."""
        return self.pool.num_used

    @property
    def usage(self) -> Usage:
        """What tokens occupy, without free pages and unused window; a shared page counts once."""
        if self.is_empty:
            return Usage(0, 0, 0, 0)
        self._refresh()
        _, heads, _, head_dim = self.hot_k.shape
        per_token = 2 * heads * head_dim
        hot_elements = sum(self._hot) * per_token
        return Usage(
            page_bytes=self.num_pages * heads * self.format.page_bytes,
            page_elements=self.num_pages * self.page_size * per_token,
            hot_bytes=hot_elements * self.hot_k.dtype.itemsize,
            hot_elements=hot_elements,
        )
