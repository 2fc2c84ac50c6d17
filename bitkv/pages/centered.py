"""Indices into a codebook for tokens whose norms and whose page's mean were taken out first."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bitkv.pages.base import PartFormat, Site
from bitkv.pages.codebook import CodebookFormat, CodedTensor

_LARGEST_CODE = 255
_RANGES = 6  # a lowest number and a step for norms, scales and means


class Byted(NamedTuple):
    """Numbers in a byte each: uint8 `codes` `[..., n]`, float16 `[..., 1]` lowest number and step."""

    codes: Tensor
    low: Tensor
    step: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Byted":
        """The nearest of 256 numbers between the extremes of `x` `[..., n]`."""
        low, high = x.aminmax(dim=-1, keepdim=True)
        low = low.half()
        # a step that rounds up still reaches the largest number
        step = ((high - low.float()) / _LARGEST_CODE * (1 + 2**-10)).clamp(2**-24, 65504).half()
        codes = ((x - low.float()) / step.float()).round_().clamp_(0, _LARGEST_CODE)
        return cls(codes.to(torch.uint8), low, step)

    def restore(self) -> Tensor:
        """Float32 `[..., n]`."""
        return self.codes.float() * self.step.float() + self.low.float()


class CenteredTensor(NamedTuple):
    """What a codec makes of `[..., H, T, W]`: `2**norm * (2**scale * codebook[codes] + mean)`.

    `codes` is int32 `[..., H, T, groups]`; `norm` and `scale` are of tokens, `mean` of channels.
    """

    codes: Tensor
    norm: Byted
    scale: Byted
    mean: Byted

    def dequantize(self, codebook: Tensor | None = None) -> Tensor:
        """Float32 `[..., H, T, W]`; see `CodedTensor.dequantize`."""
        x = CodedTensor(self.codes).dequantize(codebook)
        norm, scale = (torch.exp2(y.restore()).unsqueeze(-1) for y in (self.norm, self.scale))
        return norm * torch.addcmul(self.mean.restore().unsqueeze(-2), scale, x)


@dataclass(frozen=True)
class CenteredFormat(PartFormat):
    """Indices as in `CodebookFormat`, then bytes of norms, scales and means, then their six ranges.

    Args:
        bits: of an index, 1 to 16.
        channels: that share one.
    """

    site: Site
    bits: int
    channels: int
    head_dim: int
    page_size: int
    layout: str = "strided"

    def __post_init__(self) -> None:
        self._check_shape()
        self.dense  # noqa: B018  # it checks the rest

    @cached_property
    def dense(self) -> CodebookFormat:
        """The indices alone."""
        shape = (self.head_dim, self.page_size, self.head_dim)
        return CodebookFormat(self.site, self.bits, self.channels, *shape, layout=self.layout)

    @property
    def code_bits(self) -> float:
        return self.dense.code_bits

    @property
    def nbytes(self) -> int:
        return self.dense.nbytes + 2 * self.page_size + self.head_dim + 2 * _RANGES

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.dense.numbers

    def pack(self, q: CenteredTensor) -> Tensor:
        """Bytes `[..., H, nbytes]` of one page."""
        numbers = (q.norm, q.scale, q.mean)
        ranges = torch.cat([y for x in numbers for y in (x.low, x.step)], dim=-1)
        parts = [self.dense.pack(CodedTensor(q.codes)), *(x.codes for x in numbers)]
        return torch.cat([*parts, ranges.contiguous().view(torch.uint8)], dim=-1)

    def unpack(self, data: Tensor) -> CenteredTensor:
        """Inverse of `pack`."""
        sizes = [self.page_size, self.page_size, self.head_dim]
        codes, *numbers, ranges = torch.split(data, [self.dense.nbytes, *sizes, 2 * _RANGES], dim=-1)
        ends = torch.split(ranges.clone().view(torch.float16), 1, dim=-1)
        byted = (Byted(x, *ends[2 * i : 2 * i + 2]) for i, x in enumerate(numbers))
        return CenteredTensor(self.dense.unpack(codes).codes, *byted)
