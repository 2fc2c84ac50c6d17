"""QServe's KV4: affine codes of each token, after SmoothAttention has taken outliers out of the keys.

Yujun Lin et al., "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", arXiv
2405.04532, section 4.2. A few channels of keys are far larger than the others, and in a token's group
they take all levels. SmoothAttention divides channel i by `λ_i = max|K_i| ** alpha` and multiplies the
query's by it. A pair of channels that the rotary embedding turns together gets one λ, so that the
paper can fold λ into the model's weights; here it lies beside the pages and the model stays as it is.
Values have no such outliers and are coded as they are.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bitkv.codecs.arguments import require, require_between
from bitkv.codecs.base import Codec
from bitkv.codecs.normalizers import between_extremes
from bitkv.codecs.sample import Sample
from bitkv.codecs.transforms import magnitudes, rope_pairs, scaling
from bitkv.pages import CODE_BITS, AffineFormat, QuantizedTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared


@dataclass(frozen=True)
class QServe(Codec):
    """A float16 scale and zero point for each token of a head; keys in units of their channels' λ.

    Args:
        bits: 1, 2, 4 or 8.
        alpha: the power in λ, 0 to 1.
    """

    bits: int = 4
    alpha: float = 0.5

    learns = True

    def __post_init__(self) -> None:
        require(self, "bits", CODE_BITS)
        require_between(self, "alpha", 0, 1)

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> AffineFormat:
        return AffineFormat(site, self.bits, "token", head_dim, head_dim, page_size, layout=layout)

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        if site == "value":
            return PLAIN
        factors = self.learned_tensor("scale", (heads, head_dim)).float()
        return Shared(project=scaling(1 / factors), restore=scaling(factors))

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> QuantizedTensor:
        return between_extremes(x, self.bits)

    def calibrate(self, sample: Sample) -> Self:
        if sample.site == "value":
            return self
        pairs = rope_pairs(sample.x.shape[-1], sample.rope)
        return self.with_learned({"scale": magnitudes(sample.x, self.alpha, pairs)})
