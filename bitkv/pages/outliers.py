"""Indices into a codebook, and beside them the few elements that it would serve worst, as they are."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bitkv.pages.base import PartFormat, Site
from bitkv.pages.codebook import CodebookFormat, CodedTensor

_POSITIONS = 2**16  # that a position of 16 bits can name


class OutlierTensor(NamedTuple):
    """What a codec makes of `[..., H, T, W]`: codes, and elements that replace what these stand for.

    `position` is int32 `[..., H, n]`, `token * W + channel`; `value` is float16 `[..., H, n]`.
    """

    dense: CodedTensor
    position: Tensor
    value: Tensor

    def dequantize(self, codebook: Tensor | None = None) -> Tensor:
        """Float32 `[..., H, T, W]`; see `CodedTensor.dequantize`."""
        x = self.dense.dequantize(codebook)
        flat = x.flatten(-2)
        # bytes of a page that nobody has written may name any position
        place = self.position.long() % flat.shape[-1]
        return flat.scatter(-1, place, self.value.float()).view_as(x)


@dataclass(frozen=True)
class OutlierFormat(PartFormat):
    """Scalar codes of a `CodebookFormat`, then 16-bit positions of outliers, then their float16 values.

    Every page and head has the same number of outliers: a page has one size.

    Args:
        bits: of an index; each channel has its own.
        scales: 0, 1 (a scale for each token) or 2 (a zero point too).
        outliers: of a page and head.
    """

    site: Site
    bits: int
    head_dim: int
    page_size: int
    outliers: int
    scales: int = 0
    layout: str = "strided"

    def __post_init__(self) -> None:
        self._check_shape()
        elements = self.page_size * self.head_dim
        if elements > _POSITIONS:
            raise ValueError(
                f"a page of {self.page_size} tokens of {self.head_dim} channels has {elements} "
                f"elements, and outliers have positions below {_POSITIONS}; use page_size 64"
            )
        if not 0 <= self.outliers <= elements:
            raise ValueError(f"{self.outliers} outliers do not fit a page; use 0 to {elements}")
        self.dense  # noqa: B018  # it checks the rest

    @cached_property
    def dense(self) -> CodebookFormat:
        """The codes without the outliers."""
        shape = (self.head_dim, self.page_size, self.head_dim)
        return CodebookFormat(self.site, self.bits, 1, *shape, self.scales, self.layout)

    @property
    def code_bits(self) -> float:
        return self.bits

    @property
    def nbytes(self) -> int:
        return self.dense.nbytes + 4 * self.outliers

    @property
    def numbers(self) -> tuple[int, ...]:
        return *self.dense.numbers, self.outliers

    def pack(self, q: OutlierTensor) -> Tensor:
        """Bytes `[..., H, nbytes]` of one page."""
        # int16 has no number for the upper half of the positions, but the same bits
        position = q.position.to(torch.int16).contiguous().view(torch.uint8)
        value = q.value.contiguous().view(torch.uint8)
        return torch.cat([self.dense.pack(q.dense), position, value], dim=-1)

    def unpack(self, data: Tensor) -> OutlierTensor:
        """Inverse of `pack`."""
        sizes = [self.dense.nbytes, *[2 * self.outliers] * 2]
        dense, position, value = torch.split(data, sizes, dim=-1)
        places = position.clone().view(torch.int16).to(torch.int32) & (_POSITIONS - 1)
        return OutlierTensor(self.dense.unpack(dense), places, value.clone().view(torch.float16))
