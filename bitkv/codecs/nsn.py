"""NSNQuant: tokens normalised until one codebook serves all models, with nothing to learn.

Donghyun Son, Euntae Choi, Sungjoo Yoo, "NSNQuant: A Double Normalization Approach for Calibration-Free
Low-Bit Vector Quantization of KV Cache", arXiv 2505.18231. Each token is divided by its norm, each
page loses its channels' means, each token is divided by its norm again, and a Hadamard matrix makes it
nearly Gaussian. Eight channels then have one index into a codebook of 256 Gaussian vectors; at 2 bits
eight signs and an index for the magnitudes. The scale is such that the error is orthogonal to the
token. Norms, scales and means have a byte each, norms and scales on a logarithmic scale. Keys before
the rotary embedding.

What differs here: the codebook is that of k-means alone, without the paper's refinement by a cosine
loss, and in float32; norms are those of a head's token.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitkv.codecs.arguments import require
from bitkv.codecs.base import Codec
from bitkv.codecs.clustering import kmeans
from bitkv.codecs.coupled import RopeSite, nearest_codes
from bitkv.codecs.normalizers import SCALE_LIMITS, saturated
from bitkv.codecs.transforms import for_heads, hadamard
from bitkv.pages import Byted, CenteredFormat, CenteredTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared

CHANNELS = 8
_INDEX_BITS = 8
_SAMPLES = 2**15
_LARGEST_GAIN = 3.0


@dataclass(frozen=True)
class NSN(Codec):
    """Indices into one codebook for all, and a byte for each norm, scale and mean.

    Args:
        bits: 1 (an index of 8 bits for 8 channels) or 2 (their signs too).
        rope: whether keys are coded "before" or "after" the rotary embedding.
    """

    bits: int = 2
    rope: RopeSite = "before"

    def __post_init__(self) -> None:
        require(self, "bits", (1, 2))
        require(self, "rope", ("before", "after"))

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> CenteredFormat:
        hadamard(head_dim)
        return CenteredFormat(site, CHANNELS * self.bits, CHANNELS, head_dim, page_size, layout)

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        matrix = for_heads(hadamard(head_dim), heads)
        codebook = signed_codebook() if self.bits == 2 else gaussian_codebook(positive=False)
        rope = self.rope_of(site, self.rope, rope)
        return Shared(codebook=codebook[None, None], project=matrix, restore=matrix.mT, rope=rope)

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> CenteredTensor:
        """Each number is measured against what the page keeps of those before it.

        Norms commute with the rotation, so that it may come first.
        """
        assert shared.codebook is not None
        x = saturated(x)
        norm = Byted.of(_log_rms(x))
        x = x / torch.exp2(norm.restore()).unsqueeze(-1)
        mean = Byted.of(x.mean(-2))
        x = x - mean.restore().unsqueeze(-2)
        size = _log_rms(x)
        x = x / torch.exp2(size).unsqueeze(-1)
        codes = self._codes(x, shared.codebook)
        gain = _orthogonal_gain(x, shared.codebook[0, 0, codes.long()].flatten(-2))
        return CenteredTensor(codes, norm, Byted.of(size + gain.log2()), mean)

    def _codes(self, x: Tensor, codebook: Tensor) -> Tensor:
        if self.bits == 1:
            return nearest_codes(x, codebook)
        # an entry is as far from a vector as their magnitudes are
        entries = codebook[:, :, : 2**_INDEX_BITS]
        negative = torch.unflatten(x < 0, -1, (-1, CHANNELS)).int()
        places = torch.arange(CHANNELS, device=x.device, dtype=torch.int32)
        signs = (negative << places).sum(-1, dtype=torch.int32)
        return nearest_codes(x.abs(), entries) + (signs << _INDEX_BITS)


@cache
def gaussian_codebook(*, positive: bool) -> Tensor:
    """float32 `[256, 8]`: k-means of Gaussian vectors, or of their magnitudes."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, _SAMPLES, CHANNELS, generator=draw)
    return kmeans(x.abs() if positive else x, 2**_INDEX_BITS)[0]


@cache
def signed_codebook() -> Tensor:
    """float32 `[65536, 8]`: magnitudes by the low byte, signs by the bits of the high one."""
    signs = torch.arange(2**CHANNELS).unsqueeze(1) >> torch.arange(CHANNELS) & 1
    return ((1 - 2 * signs).unsqueeze(1) * gaussian_codebook(positive=True)).flatten(0, 1)


def _log_rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt().clamp(*SCALE_LIMITS).log2()


def _orthogonal_gain(x: Tensor, y: Tensor) -> Tensor:
    """The factor on y `[..., D]` that leaves an error orthogonal to x."""
    product = (x * y).sum(-1)
    gain = x.square().sum(-1) / product.clamp(min=1e-12)
    return torch.where(product > 1e-12, gain, 1.0).clamp(1 / _LARGEST_GAIN, _LARGEST_GAIN)
