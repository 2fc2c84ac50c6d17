"""Codes with a scale and zero point a channel, of which some channels have twice the bits."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bitkv.pages.affine import AffineFormat, QuantizedTensor
from bitkv.pages.base import PartFormat, Site
from bitkv.pages.layouts import join_bits, split_bits

_ALIGNMENT = 4  # bytes: the parts of a page hold numbers of up to 32 bits


class PromotedTensor(NamedTuple):
    """What a codec makes of `[..., T, D]`: an affine tensor of channels of two widths.

    `dense` has codes of twice the bits in promoted channels; `channels` is uint8 `[..., n]`, ascending.
    """

    dense: QuantizedTensor
    channels: Tensor

    def dequantize(self, codebook: Tensor | None = None) -> Tensor:
        """Float32 `[..., T, D]`."""
        return self.dense.dequantize()


@dataclass(frozen=True)
class PromotedFormat(PartFormat):
    """A dense plane with the low bits of all codes, a compact plane with the high bits of promoted ones.

    After the dense plane, its scales and zero points (see `AffineFormat`) come the channels that are
    promoted, a byte each and up to a multiple of four bytes, then their high bits: one channel after the
    other, position j of byte w being token `j * W + w` of a channel's W bytes.

    Args:
        bits: of a code; twice as many in promoted channels.
        promoted: channels of a page and head.
    """

    site: Site
    bits: int
    head_dim: int
    page_size: int
    promoted: int
    layout: str = "strided"

    def __post_init__(self) -> None:
        self._check_shape()
        if self.bits not in (1, 2, 4):
            raise ValueError(f"bits {self.bits} cannot be doubled to at most 8; use 1, 2 or 4")
        if self.head_dim > 256:
            raise ValueError(
                f"head_dim {self.head_dim} has channels that no byte can name; use at most 256"
            )
        if not 0 <= self.promoted <= self.head_dim:
            raise ValueError(f"{self.promoted} promoted channels; use 0 to {self.head_dim}")

    @cached_property
    def dense(self) -> AffineFormat:
        """The low bits with scales and zero points."""
        shape = (self.page_size, self.head_dim, self.page_size)
        return AffineFormat(self.site, self.bits, "channel", *shape, layout=self.layout)

    @property
    def map_bytes(self) -> int:
        """Bytes that name channels."""
        return -(-self.promoted // _ALIGNMENT) * _ALIGNMENT

    @property
    def high_bytes(self) -> int:
        """Bytes of the high bits."""
        return self.promoted * self.page_size * self.bits // 8

    @property
    def code_bits(self) -> float:
        return self.bits * (1 + self.promoted / self.head_dim)

    @property
    def nbytes(self) -> int:
        return self.dense.nbytes + self.map_bytes + self.high_bytes

    @property
    def numbers(self) -> tuple[int, ...]:
        return *self.dense.numbers, self.promoted

    def pack(self, q: PromotedTensor) -> Tensor:
        """Bytes `[..., nbytes]` of one page."""
        codes, scale, zero_point, granularity = q.dense
        low = QuantizedTensor(codes & (2**self.bits - 1), scale, zero_point, granularity)
        index = q.channels.long().unsqueeze(-2).expand(*codes.shape[:-1], -1)
        high = (codes.gather(-1, index) >> self.bits).transpose(-1, -2)
        high = join_bits(torch.unflatten(high, -1, (8 // self.bits, -1)), self.bits).flatten(-2)
        named = torch.nn.functional.pad(q.channels, (0, self.map_bytes - self.promoted))
        return torch.cat([self.dense.pack(low), named, high], dim=-1)

    def unpack(self, data: Tensor) -> PromotedTensor:
        """Inverse of `pack`."""
        sizes = [self.dense.nbytes, self.map_bytes, self.high_bytes]
        low, named, high = torch.split(data, sizes, dim=-1)
        # bytes of a page that nobody has written may name any channel
        channels = named[..., : self.promoted].clamp(max=self.head_dim - 1)
        width = self.page_size * self.bits // 8
        high = split_bits(torch.unflatten(high, -1, (self.promoted, width)), self.bits).flatten(-2)
        dense = self.dense.unpack(low)
        index = channels.long().unsqueeze(-2).expand(*dense.codes.shape[:-1], -1)
        codes = dense.codes.scatter_add(-1, index, high.transpose(-1, -2) << self.bits)
        return PromotedTensor(dense._replace(codes=codes), channels)
