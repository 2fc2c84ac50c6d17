"""The page: `page_size` tokens of one KV head of one layer as self-contained bytes.

A page holds, in this order: key codes, key scales, key zero points, value codes, value scales, value
zero points. This is the only module that shifts bits in Python. Keys are stored with rows = tokens and
values with rows = channels, so that both halves of attention are one operation: rows of codes times a
few vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Granularity = Literal["channel", "token"]

CODE_BITS = (1, 2, 4, 8)
# in the order of DType in csrc/page.h
RAW_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PAGE_SIZES = (64, 128)
WORD_BITS = 16
MIN_WORDS_PER_ROW = 16  # the contraction depth of a 16-bit tensor-core instruction
LANES = 16  # rows side by side in a vector of the layout "lanes"

Numbers = tuple[int, int, int, int, int, int]
"""`PartFormat.numbers`."""
_RAW_WORDS = {16: torch.int16, 32: torch.int32}
_PAGES_AT_ONCE = 64  # converted together: bounds the temporaries


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

    def dequantize(self) -> Tensor:
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


class Layout(NamedTuple):
    """An order of codes inside a page: `pack` takes uint8 `[..., rows, columns]` to bytes and back.

    Both get the bits as well. From 16 bits on values are unquantized, and
    come back as integers of their width.
    """

    pack: Callable[[Tensor, int], Tensor]
    unpack: Callable[[Tensor, int, int, int], Tensor]


def _folds(columns: int, bits: int) -> int:
    """How many rows share a row of words: the fewest that fill `MIN_WORDS_PER_ROW` words."""
    folds = 1
    while columns * bits * folds < MIN_WORDS_PER_ROW * WORD_BITS:
        folds *= 2
    return folds


def _strided_pack(codes: Tensor, bits: int) -> Tensor:
    """Code position j of word w of a row is column `j * words + w`; folded rows take later positions.

    A masked row of words is then one contiguous slice of columns, an MMA operand as it stands.
    """
    if bits >= WORD_BITS:
        return codes.contiguous().view(torch.uint8).flatten(-2)
    rows, columns = codes.shape[-2:]
    folds = _folds(columns, bits)
    per_row = WORD_BITS // (bits * folds)
    x = torch.unflatten(codes, -2, (folds, rows // folds))
    x = torch.unflatten(x, -1, (per_row, columns // per_row))
    x = x.movedim(-2, -3).flatten(-4, -3).int()  # [..., positions, rows/folds, words]
    shifts = torch.arange(0, WORD_BITS, bits, device=codes.device, dtype=torch.int32)
    words = (x << shifts[:, None, None]).sum(-3).to(torch.int16)
    return words.contiguous().view(torch.uint8).flatten(-2)


def _strided_unpack(data: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    if bits >= WORD_BITS:
        return torch.unflatten(data.contiguous().view(_RAW_WORDS[bits]), -1, (rows, columns))
    folds = _folds(columns, bits)
    per_row = WORD_BITS // (bits * folds)
    words = torch.unflatten(data.contiguous().view(torch.int16), -1, (rows // folds, -1))
    shifts = torch.arange(0, WORD_BITS, bits, device=data.device, dtype=torch.int16)
    # the shift is arithmetic: the mask removes the sign bits it drags in
    x = (words.unsqueeze(-3) >> shifts[:, None, None]) & (2**bits - 1)
    x = torch.unflatten(x.to(torch.uint8), -3, (folds, per_row)).movedim(-3, -2)
    return x.flatten(-2).flatten(-3, -2)


def _lanes_pack(codes: Tensor, bits: int) -> Tensor:
    """Blocks of 16 rows, one in each lane of a 64-byte vector; csrc/page.h says where each code lies.

    Four neighbouring columns of 16 rows then meet four numbers in one byte dot product.
    """
    codes = torch.unflatten(codes, -2, (-1, LANES))  # [..., blocks, lanes, columns]
    if bits >= WORD_BITS:
        return codes.transpose(-1, -2).contiguous().view(torch.uint8).flatten(-3)
    whole = codes.shape[-1] * bits // 32 * 32 // bits
    x = torch.unflatten(codes[..., :whole], -1, (-1, 8 // bits, 4))
    vectors = _join_bits(x.movedim(-4, -3), bits).flatten(-4)  # of [..., blocks, n, lanes, positions, 4]
    if whole == codes.shape[-1]:
        return vectors
    # 16 columns of 1 bit are left over: two neighbouring blocks share a vector
    x = torch.unflatten(torch.unflatten(codes[..., whole:], -1, (4, 4)), -4, (-1, 2))
    tail = _join_bits(x.movedim(-4, -3).flatten(-3, -2), bits).flatten(-3)
    return torch.cat([vectors, tail], dim=-1)


def _lanes_unpack(data: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    blocks = rows // LANES
    if bits >= WORD_BITS:
        words = data.contiguous().view(_RAW_WORDS[bits])
        return torch.unflatten(words, -1, (blocks, columns, LANES)).transpose(-1, -2).flatten(-3, -2)
    whole = columns * bits // 32 * 32 // bits
    sizes = [rows * whole * bits // 8, rows * (columns - whole) * bits // 8]
    vectors, tail = torch.split(data, sizes, dim=-1)
    x = torch.unflatten(vectors, -1, (blocks, whole * bits // 32, LANES, 4))
    codes = _split_bits(x, bits).movedim(-4, -3).flatten(-3)  # [..., blocks, lanes, columns]
    if whole < columns:
        x = _split_bits(torch.unflatten(tail, -1, (blocks // 2, LANES, 4)), bits)
        x = torch.unflatten(x, -2, (2, 4)).movedim(-3, -4)  # [..., pairs, 2, lanes, positions, 4]
        codes = torch.cat([codes, x.flatten(-2).flatten(-4, -3)], dim=-1)
    return codes.flatten(-3, -2)


def _join_bits(x: Tensor, bits: int) -> Tensor:
    """Bytes `[..., k]` of codes `[..., 8 / bits, k]`, the first in the lowest bits."""
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    joined: Tensor = (x << shifts[:, None]).sum(-2, dtype=torch.uint8)
    return joined


def _split_bits(x: Tensor, bits: int) -> Tensor:
    """Inverse of `_join_bits`."""
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    codes: Tensor = (x.unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)
    return codes


LAYOUTS: dict[str, Layout] = {
    "strided": Layout(_strided_pack, _strided_unpack),
    "lanes": Layout(_lanes_pack, _lanes_unpack),
}
"""Every known order of codes. Files always hold the first one."""


def layout_for(device: torch.device) -> str:
    """The order of codes that attention on a device reads fastest."""
    return "lanes" if device.type == "cpu" else "strided"


@dataclass(frozen=True)
class PartFormat:
    """The bytes of the key half or the value half of a page.

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

    site: Literal["key", "value"]
    bits: int
    granularity: Granularity
    group_size: int
    head_dim: int
    page_size: int
    dtype: str = "float16"
    layout: str = "strided"

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size {self.page_size} is not supported; use 64 or 128")
        if self.head_dim < 16 or self.head_dim % 16:
            raise ValueError(f"head_dim {self.head_dim} does not pack; it must be a multiple of 16")
        if self.layout not in LAYOUTS:
            raise ValueError(f"no layout {self.layout!r}; choose from {', '.join(LAYOUTS)}")
        for name, names in (("site", ("key", "value")), ("granularity", ("channel", "token"))):
            if getattr(self, name) not in names:
                raise ValueError(f"no {name} {getattr(self, name)!r}; choose from {', '.join(names)}")
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
        return _folds(self.columns, self.bits)

    @property
    def code_bytes(self) -> int:
        return self.rows * self.columns * self.bits // 8

    @property
    def num_groups(self) -> int:
        """Scales (and zero points) in a page."""
        return 0 if self.is_raw else self.page_size * self.head_dim // self.group_size

    @property
    def nbytes(self) -> int:
        return self.code_bytes + 4 * self.num_groups

    @property
    def bits_per_element(self) -> float:
        """Measured from bytes: scales and zero points included."""
        return 8 * self.nbytes / (self.page_size * self.head_dim)

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


def _part(site: Literal["key", "value"], numbers: Numbers, layout: str) -> PartFormat:
    """Inverse of `PartFormat.numbers`."""
    bits, rows, columns, group_size, row_scales, dtype = numbers
    page_size, head_dim = (rows, columns) if site == "key" else (columns, rows)
    granularity: Granularity = "token" if row_scales or site == "value" else "channel"
    name = list(RAW_DTYPES)[dtype]
    return PartFormat(site, bits, granularity, group_size, head_dim, page_size, name, layout)


@dataclass(frozen=True)
class PageFormat:
    """The bytes of a page: a key part, then a value part. All that a kernel knows about a codec."""

    key: PartFormat
    value: PartFormat

    @staticmethod
    @cache
    def of_numbers(key: Numbers, value: Numbers, layout: str = "strided") -> "PageFormat":
        """The format whose parts have these `PartFormat.numbers`."""
        return PageFormat(_part("key", key, layout), _part("value", value, layout))

    def __post_init__(self) -> None:
        for name in ("head_dim", "page_size", "layout"):
            mine, other = getattr(self.key, name), getattr(self.value, name)
            if mine != other:
                raise ValueError(f"{name} differs within a page: {mine} for keys, {other} for values")

    @property
    def head_dim(self) -> int:
        return self.key.head_dim

    @property
    def page_size(self) -> int:
        return self.key.page_size

    @property
    def page_bytes(self) -> int:
        return self.key.nbytes + self.value.nbytes

    @property
    def bits_per_element(self) -> float:
        """Mean over keys and values, scales and zero points included."""
        return 8 * self.page_bytes / (2 * self.page_size * self.head_dim)

    def pack(self, key: QuantizedTensor, value: QuantizedTensor) -> Tensor:
        """Bytes `[..., page_bytes]` of pages of codes `[..., page_size, head_dim]`."""
        return torch.cat([self.key.pack(key), self.value.pack(value)], dim=-1)

    def unpack(self, pages: Tensor) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Inverse of `pack`."""
        key, value = torch.split(pages, [self.key.nbytes, self.value.nbytes], dim=-1)
        return self.key.unpack(key), self.value.unpack(value)

    def dequantize(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 keys and values `[..., page_size, head_dim]` of pages `[..., page_bytes]`."""
        key, value = self.unpack(pages)
        return key.dequantize(), value.dequantize()

    def with_layout(self, layout: str) -> "PageFormat":
        """The same page with its codes in another order."""
        return PageFormat(replace(self.key, layout=layout), replace(self.value, layout=layout))


def convert(pages: Tensor, source: PageFormat, target: PageFormat) -> Tensor:
    """Pages `[n, ..., page_bytes]` of one layout in another, exactly."""
    if source == target or not pages.numel():
        return pages
    parts = torch.split(pages, _PAGES_AT_ONCE)
    return torch.cat([target.pack(*source.unpack(part)) for part in parts])
