"""The page: `page_size` tokens of one KV head of one layer as self-contained bytes, keys then values.

The two halves have formats of their own: affine.py (scales and zero points beside the codes, or values
as they are) and codebook.py (indices into a codebook); with something beside these outliers.py (elements
as they are), promoted.py (more bits for some channels) and centered.py (norms and means).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitkv.pages.affine import (
    CODE_BITS,
    RAW_DTYPES,
    AffineFormat,
    Granularity,
    Numbers,
    QuantizedTensor,
)
from bitkv.pages.base import PAGE_SIZES, PartFormat, Quantized, Site
from bitkv.pages.centered import Byted, CenteredFormat, CenteredTensor
from bitkv.pages.codebook import CodebookFormat, CodedTensor
from bitkv.pages.layouts import LANES, LAYOUTS, WORD_BITS, Layout, layout_for
from bitkv.pages.outliers import OutlierFormat, OutlierTensor
from bitkv.pages.promoted import PromotedFormat, PromotedTensor
from bitkv.shared import PLAIN, Shared

__all__ = [
    "CODE_BITS",
    "LANES",
    "LAYOUTS",
    "PAGE_SIZES",
    "RAW_DTYPES",
    "WORD_BITS",
    "AffineFormat",
    "Byted",
    "CenteredFormat",
    "CenteredTensor",
    "CodebookFormat",
    "CodedTensor",
    "Granularity",
    "Layout",
    "Numbers",
    "OutlierFormat",
    "OutlierTensor",
    "PageFormat",
    "PartFormat",
    "PromotedFormat",
    "PromotedTensor",
    "Quantized",
    "QuantizedTensor",
    "Site",
    "convert",
    "layout_for",
]

_PAGES_AT_ONCE = 64  # converted together: bounds the temporaries


def _of_numbers(site: Site, numbers: tuple[int, ...], layout: str, head_dim: int) -> PartFormat:
    if len(numbers) == 5:
        bits, channels, width, page_size, scales = numbers
        return CodebookFormat(site, bits, channels, head_dim, page_size, width, scales, layout)
    return AffineFormat.of_numbers(site, numbers, layout)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PageFormat:
    """The bytes of a page: a key part, then a value part. All that a kernel knows about a codec."""

    key: PartFormat
    value: PartFormat

    @staticmethod
    @cache
    def of_numbers(
        key: tuple[int, ...], value: tuple[int, ...], layout: str = "strided", *, head_dim: int
    ) -> "PageFormat":
        """The format whose parts have these `numbers`, `AffineFormat`'s or `CodebookFormat`'s."""
        return PageFormat(
            _of_numbers("key", key, layout, head_dim), _of_numbers("value", value, layout, head_dim)
        )

    def __post_init__(self) -> None:
        for name in ("head_dim", "page_size", "layout"):
            mine, other = getattr(self.key, name), getattr(self.value, name)
            if mine != other:
                raise ValueError(f"{name} differs within a page: {mine} for keys, {other} for values")

    @property
    def affine(self) -> tuple[AffineFormat, AffineFormat]:
        """Both parts, for kernels that take no other kind.

        Raises:
            ValueError: one of them is another.
        """
        key, value = self.key, self.value
        if not (isinstance(key, AffineFormat) and isinstance(value, AffineFormat)):
            names = f"{type(key).__name__} and {type(value).__name__}"
            raise ValueError(f"this kernel takes scales and zero points, not {names}")
        return key, value

    @property
    def head_dim(self) -> int:
        return self.key.head_dim

    @property
    def page_size(self) -> int:
        return self.key.page_size

    @property
    def layout(self) -> str:
        return self.key.layout

    @property
    def page_bytes(self) -> int:
        return self.key.nbytes + self.value.nbytes

    @property
    def bits_per_element(self) -> float:
        """Mean over keys and values, scales and zero points included."""
        return 8 * self.page_bytes / (2 * self.page_size * self.head_dim)

    def pack(self, key: Quantized, value: Quantized) -> Tensor:
        """Bytes `[..., page_bytes]` of pages of codes `[..., page_size, head_dim]`."""
        return torch.cat([self.key.pack(key), self.value.pack(value)], dim=-1)

    def unpack(self, pages: Tensor) -> tuple[Quantized, Quantized]:
        """Inverse of `pack`."""
        key, value = torch.split(pages, [self.key.nbytes, self.value.nbytes], dim=-1)
        return self.key.unpack(key), self.value.unpack(value)

    def dequantize(
        self,
        pages: Tensor,
        key: Shared = PLAIN,
        value: Shared = PLAIN,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Float32 keys and values `[..., Hkv, page_size, head_dim]` of pages `[..., Hkv, page_bytes]`.

        Args:
            key, value: what the pages share; formats alone say everything without it.
            positions: int `[..., page_size]`, the tokens' places in their sequence.
        """
        if positions is None:
            positions = torch.arange(self.page_size, device=pages.device)
        k, v = (
            shared.from_pages(q.dequantize(shared.codebook), positions.unsqueeze(-2))
            for q, shared in zip(self.unpack(pages), (key, value), strict=True)
        )
        return k, v

    def with_layout(self, layout: str) -> "PageFormat":
        """The same page with its codes in another order."""
        return PageFormat(self.key.with_layout(layout), self.value.with_layout(layout))


def convert(pages: Tensor, source: PageFormat, target: PageFormat) -> Tensor:
    """Pages `[n, ..., page_bytes]` of one layout in another, exactly."""
    if source == target or not pages.numel():
        return pages
    parts = torch.split(pages, _PAGES_AT_ONCE)
    return torch.cat([target.pack(*source.unpack(part)) for part in parts])
