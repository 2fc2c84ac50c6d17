"""Kitty: 2-bit keys per channel, of which each page's largest channels have 4 bits.

Haojun Xia et al., "Kitty: Accurate and Efficient 2-bit KV Cache Quantization with Dynamic Channel-wise
Precision Boost", arXiv 2511.18643. In each page and head the channels of the largest mean magnitude
get twice the bits, as a second plane of two bits beside the one that all channels have, so that pages
keep one size. Values are coded per token by another codec; the paper keeps 32 sinks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitkv.codecs.arguments import require_between, require_keys
from bitkv.codecs.base import Codec
from bitkv.codecs.normalizers import SCALE_LIMITS, saturated
from bitkv.pages import PromotedFormat, PromotedTensor, QuantizedTensor, Site
from bitkv.shared import PLAIN, Shared

_BITS = 2


@dataclass(frozen=True)
class Kitty(Codec):
    """2-bit codes with a float16 scale and zero point for each channel of a page, 4-bit ones for some.

    Args:
        promoted: the share of channels that get 4 bits: 0.125 is Kitty, 0.25 Kitty-Pro.
    """

    promoted: float = 0.125

    def __post_init__(self) -> None:
        require_between(self, "promoted", 0, 1)

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> PromotedFormat:
        require_keys(self, site, "Affine(2, 'token', 'page')")
        return PromotedFormat(site, _BITS, head_dim, page_size, self._count(head_dim), layout)

    def _count(self, head_dim: int) -> int:
        return round(self.promoted * head_dim)

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> PromotedTensor:
        x = saturated(x)
        low, high = x.aminmax(dim=-2, keepdim=True)
        size = x.abs().mean(-2)
        channels = size.topk(self._count(x.shape[-1]), dim=-1).indices.sort(-1).values
        largest_code = torch.full_like(size, 2**_BITS - 1)
        largest_code.scatter_(-1, channels, 2 ** (2 * _BITS) - 1)
        largest_code = largest_code.unsqueeze(-2)
        scale = ((high - low) / largest_code).clamp(*SCALE_LIMITS).half()
        zero_point = low.half()
        codes = ((x - zero_point.float()) / scale.float()).round_()
        codes = torch.minimum(codes.clamp_(min=0), largest_code).to(torch.uint8)
        dense = QuantizedTensor(codes, scale, zero_point, "channel")
        return PromotedTensor(dense, channels.to(torch.uint8))
