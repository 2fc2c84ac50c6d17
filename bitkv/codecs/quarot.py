"""QuaRot's KV cache: keys and values rotated by a Hadamard matrix, affine codes of each token.

Saleh Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456,
section 4, and section 5 for the numbers: groups of 128 channels, which is a head, and ranges clipped
to 0.95. The matrix spreads an outlier over all channels. Keys are rotated after the rotary embedding.
Values, which the paper also mixes across heads, are rotated within theirs: pages are of one head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitkv.codecs.arguments import require, require_between
from bitkv.codecs.base import Codec
from bitkv.codecs.normalizers import between_extremes
from bitkv.codecs.transforms import for_heads, hadamard
from bitkv.pages import CODE_BITS, AffineFormat, QuantizedTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared


@dataclass(frozen=True)
class QuaRot(Codec):
    """A float16 scale and zero point for each rotated token of a head.

    Args:
        bits: 1, 2, 4 or 8.
        clip: the share of a token's range that levels span, above 0 and up to 1.
    """

    bits: int = 4
    clip: float = 0.95

    def __post_init__(self) -> None:
        require(self, "bits", CODE_BITS)
        require_between(self, "clip", 0.01, 1)

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> AffineFormat:
        hadamard(head_dim)
        return AffineFormat(site, self.bits, "token", head_dim, head_dim, page_size, layout=layout)

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        matrix = for_heads(hadamard(head_dim), heads)
        return Shared(project=matrix, restore=matrix.mT)

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> QuantizedTensor:
        return between_extremes(x, self.bits, clip=self.clip)
