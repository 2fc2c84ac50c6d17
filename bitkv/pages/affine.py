"""Codes with a float16 scale and zero point a group; and values kept as they are."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bitkv.pages.base import PartFormat, Site
from bitkv.pages.layouts import LAYOUTS, folds_of

Granularity = Literal["channel", "token"]

CODE_BITS = (1, 2, 4, 8)
# in the order of DType in csrc/page.h
RAW_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Numbers = tuple[int, int, int, int, int, int]
"""`AffineFormat.numbers`."""


class QuantizedTensor(NamedTuple):
    """What a codec makes of `[..., T, D]`: codes, and the affine map back.

    `codes` is uint8 `[..., T, D]`. With granularity "channel" a group is `g` tokens of one channel and
    `scale`, `zero_point` are float16 `[..., T/g, D]`; with "token" a group is `g` channels of one token
    and they are `[..., T, D/g]`. An unquantized tensor has its values as `codes` and no scale.
    """

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    granularity: Granularity

    def dequantize(self, codebook: Tensor | None = None) -> Tensor:
        """`codes * scale + zero_point` in float32, shape `[..., T, D]`."""
        if self.scale is None or self.zero_point is None:
            return self.codes.float()
        axis = -2 if self.granularity == "channel" else -1
        num_groups = self.scale.shape[axis]
        codes = torch.unflatten(self.codes.float(), axis, (num_groups, -1))
        scale, zero_point = (x.float().unsqueeze(axis) for x in (self.scale, self.zero_point))
        if axis == -2:  # codes [..., T/g, g, D]
            return torch.addcmul(zero_point, codes, scale).flatten(-3, -2)
        return torch.addcmul(zero_point, codes, scale).flatten(-2)  # codes [..., T, D/g, g]


@dataclass(frozen=True)
class AffineFormat(PartFormat):
    """Codes with a scale and a zero point a group, or the values themselves.

    Keys are stored with rows = tokens and values with rows = channels, so that both halves of attention
    are one operation: rows of codes times a few vectors. Scales follow the codes, then zero points.

    Args:
        site: "key" (rows = tokens) or "value" (rows = channels).
        bits: 1, 2, 4 or 8 for codes; 16 or 32 for unquantized values of `dtype`.
        granularity: "channel" or "token" (values: "token" only).
        group_size: elements that share a scale: tokens for "channel", channels for "token".
        head_dim, page_size: channels of a head, tokens of a page.
        dtype: what unquantized values are; unused below 16 bits.
        layout: a key of `LAYOUTS`.

    Raises:
        ValueError: a combination that does not pack into whole words, with the remedy.
    """

    site: Site
    bits: int
    granularity: Granularity
    group_size: int
    head_dim: int
    page_size: int
    dtype: str = "float16"
    layout: str = "strided"

    def __post_init__(self) -> None:
        self._check_shape()
        if self.granularity not in ("channel", "token"):
            raise ValueError(f"no granularity {self.granularity!r}; choose from channel, token")
        if self.is_raw:
            if self.dtype not in RAW_DTYPES or RAW_DTYPES[self.dtype].itemsize * 8 != self.bits:
                raise ValueError(f"{self.bits} bits cannot hold {self.dtype}; use its own width")
            return
        if self.bits not in CODE_BITS:
            raise ValueError(f"bits {self.bits} is not supported; use 1, 2, 4, 8, or 16 (unquantized)")
        if self.site == "value" and self.granularity != "token":
            raise ValueError("values are quantized per token; use granularity='token' for values")
        name, extent = (
            ("page_size", self.page_size)
            if self.granularity == "channel"
            else ("head_dim", self.head_dim)
        )
        if self.group_size < 1 or extent % self.group_size:
            raise ValueError(
                f"{name} {extent} is not a multiple of group_size {self.group_size}; "
                f"pass a group_size that divides {extent}, or 'page' for one group"
            )

    @property
    def is_raw(self) -> bool:
        """Whether values are stored unquantized."""
        return self.bits >= 16

    @property
    def rows(self) -> int:
        return self.page_size if self.site == "key" else self.head_dim

    @property
    def columns(self) -> int:
        return self.head_dim if self.site == "key" else self.page_size

    @property
    def folds(self) -> int:
        """Rows of codes that share a row of words in the layout "strided"."""
        return folds_of(self.columns, self.bits)

    @property
    def code_bytes(self) -> int:
        return self.rows * self.columns * self.bits // 8

    @property
    def num_groups(self) -> int:
        """Scales (and zero points) in a page."""
        return 0 if self.is_raw else self.page_size * self.head_dim // self.group_size

    @property
    def code_bits(self) -> float:
        return self.bits

    @property
    def nbytes(self) -> int:
        return self.code_bytes + 4 * self.num_groups

    @cached_property
    def numbers(self) -> Numbers:
        """What native kernels take: `Part` in csrc/page.h, field by field."""
        row_scales = int(self.site == "key" and self.granularity == "token")
        dtype = list(RAW_DTYPES).index(self.dtype)
        return self.bits, self.rows, self.columns, self.group_size, row_scales, dtype

    def pack(self, q: QuantizedTensor) -> Tensor:
        """Bytes `[..., nbytes]` of one page of codes `[..., page_size, head_dim]`."""
        codes = q.codes if self.site == "key" else q.codes.transpose(-1, -2)
        packed = LAYOUTS[self.layout].pack(codes, self.bits)
        if q.scale is None or q.zero_point is None:
            return packed
        return torch.cat([packed, *(self._store_scales(x) for x in (q.scale, q.zero_point))], dim=-1)

    def unpack(self, data: Tensor) -> QuantizedTensor:
        """Inverse of `pack`."""
        codes, *meta = torch.split(data, [self.code_bytes, *[2 * self.num_groups] * 2], dim=-1)
        codes = LAYOUTS[self.layout].unpack(codes, self.rows, self.columns, self.bits)
        codes = codes.view(RAW_DTYPES[self.dtype]) if self.is_raw else codes
        codes = codes if self.site == "key" else codes.transpose(-1, -2)
        scale, zero_point = (None, None) if self.is_raw else (self._load_scales(x) for x in meta)
        return QuantizedTensor(codes, scale, zero_point, self.granularity)

    def _store_scales(self, x: Tensor) -> Tensor:
        """Per-token scales lie group by group, so that a group's tokens are contiguous."""
        x = x.transpose(-1, -2) if self.granularity == "token" else x
        return x.to(torch.float16).contiguous().view(torch.uint8).flatten(-2)

    def _load_scales(self, data: Tensor) -> Tensor:
        x = data.contiguous().view(torch.float16)
        if self.granularity == "channel":
            return torch.unflatten(x, -1, (-1, self.head_dim))
        return torch.unflatten(x, -1, (-1, self.page_size)).transpose(-1, -2)

    @staticmethod
    def of_numbers(site: Site, numbers: Numbers, layout: str) -> "AffineFormat":
        """Inverse of `numbers`."""
        bits, rows, columns, group_size, row_scales, dtype = numbers
        page_size, head_dim = (rows, columns) if site == "key" else (columns, rows)
        granularity: Granularity = "token" if row_scales or site == "value" else "channel"
        name = list(RAW_DTYPES)[dtype]
        return AffineFormat(site, bits, granularity, group_size, head_dim, page_size, name, layout)
