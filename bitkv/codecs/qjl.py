"""QJL: the signs of a random projection of each key, and its norm.

Amir Zandieh, Majid Daliri, Insu Han, "QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with
Zero Overhead", arXiv 2406.03482, definition 3.1. From `sign(S k)` and `|k|` the inner product with any
query is estimated without bias as `sqrt(pi / 2) / m · |k| · <S q, sign(S k)>`, which makes `S` the
projection into pages and its scaled transpose the way back. Rows of S are orthogonal in blocks of
head_dim, as in its experiments, which lessens the variance; they are then uniform on a sphere instead
of Gaussian, and the factor is the exact one for those, of which the paper's is the limit. Its separate
sketches for channels with outliers are left out. Keys only: values are not met by a query.
"""

from dataclasses import dataclass
from math import exp, lgamma, pi, sqrt

import torch
from torch import Tensor

from bitkv.codecs.arguments import require, require_keys
from bitkv.codecs.base import Codec
from bitkv.codecs.normalizers import by_rms, saturated
from bitkv.codecs.transforms import for_heads, rotation
from bitkv.pages import CodebookFormat, CodedTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared


@dataclass(frozen=True)
class QJL(Codec):
    """`sketch * head_dim` signs and a float16 norm for each key of a head.

    Args:
        sketch: signs for each channel, 1 to 8: bits, that is.
        seed: of the projection, the same for all heads and layers.
    """

    sketch: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "sketch", range(1, 9))
        require(self, "seed", range(2**31))

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> CodebookFormat:
        require_keys(self, site, "Affine(2, 'token', 32)")
        width = self.sketch * head_dim
        return CodebookFormat(site, 1, 1, head_dim, page_size, width, scales=1, layout=layout)

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        require_keys(self, site, "Affine(2, 'token', 32)")
        seeds = range(self.sketch * self.seed, self.sketch * (self.seed + 1))
        rows = torch.cat([rotation(head_dim, seed) for seed in seeds])
        # for u on the sphere E <q, u> sign <u, k> is <q, k> / |k| · E|u_1|; a page has |k| / sqrt(D)
        back = sqrt(head_dim) / (len(rows) * _mean_coordinate(head_dim))
        project = for_heads(rows, heads)
        signs = torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1)
        return Shared(codebook=signs, project=project, restore=back * project.mT)

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> CodedTensor:
        # blocks of orthogonal rows keep the norm
        y, scale = by_rms(saturated(x))
        return CodedTensor((y > 0).int(), scale)


def _mean_coordinate(dim: int) -> float:
    """The mean magnitude of a coordinate of a random unit vector, near `sqrt(2 / (pi * dim))`."""
    return exp(lgamma(dim / 2) - lgamma((dim + 1) / 2)) / sqrt(pi)
