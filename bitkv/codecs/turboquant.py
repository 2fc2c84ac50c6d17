"""TurboQuant: a random rotation, the norm of each token, and the best levels for what then is known.

Amir Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", arXiv
2504.19874, algorithm 1 (the form of least squared error). A coordinate of a randomly rotated unit
vector has one known distribution (lemma 1), so its Lloyd-Max levels need no data. Nothing is learned.

Its second algorithm, an unbiased residual of one bit, is left out: the paper itself finds less error
without it from 2 bits on. So are its 2.5 and 3.5 bits, which code 32 channels of outliers with a bit
more: the paper gives no rule for choosing them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitkv.codecs.arguments import require
from bitkv.codecs.base import Codec
from bitkv.codecs.levels import nearest_level, sphere_levels
from bitkv.codecs.normalizers import by_rms, saturated
from bitkv.codecs.transforms import for_heads, rotation
from bitkv.pages import CodebookFormat, CodedTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared


@dataclass(frozen=True)
class TurboQuant(Codec):
    """A float16 norm for each token of a head, and a level for each rotated channel.

    Args:
        bits: 1 to 5.
        seed: of the rotation, the same for all heads and layers.
    """

    bits: int
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "bits", range(1, 6))
        require(self, "seed", range(2**31))

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> CodebookFormat:
        return CodebookFormat(site, self.bits, 1, head_dim, page_size, head_dim, scales=1, layout=layout)

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        matrix = for_heads(rotation(head_dim, self.seed), heads)
        levels = sphere_levels(2**self.bits, head_dim)
        return Shared(codebook=levels.view(1, 1, -1, 1), project=matrix, restore=matrix.mT)

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> CodedTensor:
        assert shared.codebook is not None
        y, scale = by_rms(saturated(x))
        return CodedTensor(nearest_level(y, shared.codebook.flatten()), scale)
