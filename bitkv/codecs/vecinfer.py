"""VecInfer: keys scaled and rotated until they suit codebooks, then channels coded jointly.

"VecInfer: Efficient LLM Inference with Low-Bit KV Cache via Outlier-Suppressed Vector Quantization",
arXiv 2510.06175. Keys are divided by `λ_i = sqrt(max|K_i|)`, which evens out the channels, and rotated
by a Hadamard matrix, which spreads what is left of outliers; queries undo both. Both keys and values
then are product codes of k-means; values as they are. Here after the rotary embedding, where queries
meet keys. The codebooks of each head are its own.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bitkv.codecs.arguments import require
from bitkv.codecs.base import Codec
from bitkv.codecs.clustering import kmeans
from bitkv.codecs.coupled import in_groups, nearest_codes
from bitkv.codecs.normalizers import saturated
from bitkv.codecs.sample import Sample
from bitkv.codecs.transforms import hadamard, magnitudes, scaling
from bitkv.pages import CodebookFormat, CodedTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared


@dataclass(frozen=True)
class VecInfer(Codec):
    """One index of `bits` bits for each `channels` neighbouring ones, after scaling and rotation.

    Args:
        channels: that are coded together, 2 to 32; the paper's d.
        bits: of an index, 1 to 12; the paper's b.
    """

    channels: int = 4
    bits: int = 8

    learns = True
    takes_nearest = True

    def __post_init__(self) -> None:
        require(self, "channels", range(2, 33))
        require(self, "bits", range(1, 13))

    @property
    def centroids(self) -> int:
        return 1 << self.bits

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> CodebookFormat:
        if site == "key":
            hadamard(head_dim)
        return CodebookFormat(
            site, self.bits, self.channels, head_dim, page_size, width=head_dim, layout=layout
        )

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        codebook = self.learned_tensor("codebook", (heads, head_dim // self.channels)).float()
        if site == "value":
            return Shared(codebook=codebook)
        factors = self.learned_tensor("scale", (heads, head_dim)).float()
        matrix = hadamard(head_dim)
        project, restore = matrix @ scaling(1 / factors), scaling(factors) @ matrix.mT
        return Shared(codebook=codebook, project=project, restore=restore)

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> CodedTensor:
        assert shared.codebook is not None
        return CodedTensor(nearest_codes(saturated(x), shared.codebook))

    def calibrate(self, sample: Sample) -> Self:
        x, learned = sample.x.float(), {}
        if sample.site == "key":
            factors = magnitudes(x, 0.5)
            learned["scale"] = factors
            x = x / factors.unsqueeze(1) @ hadamard(x.shape[-1]).mT
        codebook = kmeans(in_groups(x, self.channels), 2**self.bits, seed=sample.seed)
        learned["codebook"] = torch.unflatten(codebook.half(), 0, (len(x), -1))
        return self.with_learned(learned)
