"""Indices into a codebook that all pages of a layer share: several channels of a token in one code."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitkv.pages.base import PartFormat, Site
from bitkv.pages.layouts import join_bits, split_bits

INDEX_BITS = range(1, 17)


class CodedTensor(NamedTuple):
    """What a codec makes of `[..., H, T, W]`: one index for each `channels` of a token.

    `codes` is int32 `[..., H, T, W / channels]`; `scale` and `zero_point` are float16 `[..., H, T]` or
    None.
    """

    codes: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    def dequantize(self, codebook: Tensor | None = None) -> Tensor:
        """`codebook[head, group, code] * scale + zero_point` in float32, shape `[..., H, T, W]`.

        Args:
            codebook: `[H, groups, entries, channels]`; a 1 for H or groups serves all of them.
        """
        if codebook is None:
            raise ValueError("codes of a codebook mean nothing without it; pass the layer's codebook")
        heads, groups = (
            torch.arange(n, device=self.codes.device) % size
            for n, size in zip(
                (self.codes.shape[-3], self.codes.shape[-1]), codebook.shape, strict=False
            )
        )
        x = codebook[heads[:, None, None], groups, self.codes.long()].float().flatten(-2)
        if self.scale is not None:
            x = x * self.scale.float().unsqueeze(-1)
        if self.zero_point is not None:
            x = x + self.zero_point.float().unsqueeze(-1)
        return x


@dataclass(frozen=True)
class CodebookFormat(PartFormat):
    """Indices of any width from 1 to 16 bits, packed exactly.

    An index is cut into planes of 8, 4, 2 and 1 bits, the lowest bits and the widest plane first: 10
    bits are a byte and a plane of two bits. A plane holds one group of channels after the other, and of
    a group all tokens, so that a table of that group serves a whole vector of codes. In a plane with W
    bytes a group, position j of byte w is token `j * W + w`. Scales follow, then zero points.

    Args:
        bits: of an index.
        channels: that share an index.
        width: numbers of a token that are coded; head_dim, unless a transform changes it.
        scales: 0, 1 (a scale for each token) or 2 (a zero point too).
    """

    site: Site
    bits: int
    channels: int
    head_dim: int
    page_size: int
    width: int
    scales: int = 0
    layout: str = "strided"

    def __post_init__(self) -> None:
        self._check_shape()
        if self.bits not in INDEX_BITS:
            raise ValueError(f"an index of {self.bits} bits is not supported; use 1 to 16")
        if self.channels < 1 or self.width % self.channels:
            raise ValueError(
                f"{self.width} channels of a head are not a multiple of {self.channels} coupled ones; "
                f"couple a number that divides {self.width}"
            )
        if self.scales not in (0, 1, 2):
            raise ValueError(f"{self.scales} scales a token are not supported; use 0, 1 or 2")

    @property
    def groups(self) -> int:
        """Indices of a token."""
        return self.width // self.channels

    @property
    def planes(self) -> list[int]:
        """Bits of each plane."""
        whole = [8] * (self.bits // 8)
        return whole + [p for p in (4, 2, 1) if self.bits % 8 & p]

    @property
    def code_bytes(self) -> int:
        return self.groups * self.page_size * self.bits // 8

    @property
    def code_bits(self) -> float:
        return 8 * self.code_bytes / (self.page_size * self.head_dim)

    @property
    def nbytes(self) -> int:
        return self.code_bytes + 2 * self.scales * self.page_size

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.bits, self.channels, self.width, self.page_size, self.scales

    def pack(self, q: CodedTensor) -> Tensor:
        """Bytes `[..., H, nbytes]` of one page of codes `[..., H, page_size, groups]`."""
        codes, parts, shift = q.codes.transpose(-1, -2), [], 0
        for bits in self.planes:
            plane = ((codes >> shift) & (2**bits - 1)).to(torch.uint8)
            parts.append(join_bits(torch.unflatten(plane, -1, (8 // bits, -1)), bits).flatten(-2))
            shift += bits
        for x in (q.scale, q.zero_point)[: self.scales]:
            assert x is not None
            parts.append(x.to(torch.float16).contiguous().view(torch.uint8))
        return torch.cat(parts, dim=-1)

    def unpack(self, data: Tensor) -> CodedTensor:
        sizes = [self.groups * self.page_size * bits // 8 for bits in self.planes]
        *planes, meta = torch.split(data, [*sizes, 2 * self.scales * self.page_size], dim=-1)
        codes = torch.zeros((), dtype=torch.int32, device=data.device)
        shift = 0
        for bits, plane in zip(self.planes, planes, strict=True):
            x = split_bits(torch.unflatten(plane, -1, (self.groups, -1)), bits).flatten(-2)
            codes = codes + (x.to(torch.int32) << shift)
            shift += bits
        halves = torch.unflatten(
            meta.contiguous().view(torch.float16), -1, (self.scales, self.page_size)
        )
        return CodedTensor(codes.transpose(-1, -2), *halves.unbind(-2))
