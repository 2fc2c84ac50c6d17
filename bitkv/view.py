"""What a layer shows of itself. Attention backends know this and page formats, never codecs."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bitkv.pages import PageFormat
from bitkv.shared import Shared


@dataclass(frozen=True)
class CacheView:
    """What attention reads: tensors of one layer, no codec.

    Args:
        format: the bytes of a page.
        pages: uint8 `[num_pages, Hkv, page_bytes]`.
        block_table: int32 `[B, max_pages]`, the pages of each sequence in order; entries beyond a
            sequence's packed length name any page of the pool, or 0.
        packed_len: int32 `[B]`, tokens in pages.
        hot_k, hot_v: `[B, Hkv, capacity, D]`, sinks and then recent tokens.
        hot_len: int32 `[B]`, tokens in the hot window.
        hot_rows: int32 `[B]`, where of the hot window's first axis each sequence is; None: in order, and
            B is its size.
        num_sink_tokens: the first hot tokens precede the pages, the others follow them.
        key, value: what the pages share beside their format.
    """

    format: PageFormat
    pages: Tensor
    block_table: Tensor
    packed_len: Tensor
    hot_k: Tensor
    hot_v: Tensor
    hot_len: Tensor
    num_sink_tokens: int
    key: Shared
    value: Shared
    hot_rows: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """int32 `[B]`: all tokens of each sequence."""
        return self.packed_len + self.hot_len

    def in_order(self) -> "CacheView":
        """The same with the hot window's rows copied into the order of the sequences."""
        if self.hot_rows is None:
            return self
        rows = self.hot_rows.long()
        return replace(self, hot_k=self.hot_k[rows], hot_v=self.hot_v[rows], hot_rows=None)

    def dequantize(self, table: Tensor, first_page: int = 0) -> tuple[Tensor, Tensor]:
        """Float32 keys and values `[..., n, Hkv, page_size, D]` of pages by their numbers.

        Args:
            table: int `[..., n]`, consecutive pages of a sequence.
            first_page: which of its pages the first one is.
        """
        size, count = self.format.page_size, table.shape[-1]
        first = self.num_sink_tokens + first_page * size
        positions = torch.arange(first, first + count * size, device=table.device).view(count, size)
        return self.format.dequantize(self.pages[table.long()], self.key, self.value, positions)


class Usage(NamedTuple):
    """Bytes, and elements of K and V they stand for, in pages and in the hot window."""

    page_bytes: int
    page_elements: int
    hot_bytes: int
    hot_elements: int
