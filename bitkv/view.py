"""What a layer shows of itself. Attention backends know this and page formats, never codecs."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from bitkv.pages import PageFormat


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
        num_sink_tokens: the first hot tokens precede the pages, the others follow them.
    """

    format: PageFormat
    pages: Tensor
    block_table: Tensor
    packed_len: Tensor
    hot_k: Tensor
    hot_v: Tensor
    hot_len: Tensor
    num_sink_tokens: int

    @property
    def lengths(self) -> Tensor:
        """int32 `[B]`: all tokens of each sequence."""
        return self.packed_len + self.hot_len


class Usage(NamedTuple):
    """Bytes, and elements of K and V they stand for, in pages and in the hot window."""

    page_bytes: int
    page_elements: int
    hot_bytes: int
    hot_elements: int
