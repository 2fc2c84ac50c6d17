"""Coupled quantization (CQ): neighbouring channels share one index into a learned codebook.

Tianyi Zhang et al., "KV Cache is 1 Bit Per Channel", arXiv 2405.03917. Channels of a head depend on each
other, so coding `channels` of them jointly takes fewer bits than coding each alone: 8 channels in 8 bits
are 1 bit a channel, and there is no scale and no zero point to store beside it. Centroids come from
k-means on calibration text (section 3.3), where a token counts by the squared gradient of the loss
(Fisher information, section 3.4), and keys are taken before the rotary embedding.
"""

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from bitkv.codecs.arguments import require
from bitkv.codecs.base import Codec
from bitkv.codecs.clustering import kmeans, nearest
from bitkv.codecs.sample import Sample
from bitkv.pages import CodebookFormat, CodedTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared

Weights = Literal["fisher", "uniform"]
RopeSite = Literal["before", "after"]


@dataclass(frozen=True)
class Coupled(Codec):
    """One index of `bits` bits for each `channels` neighbouring channels: `bits / channels` bits each.

    Args:
        channels: that are coded together; 1 to 32, dividing the head.
        bits: of an index, 1 to 12.
        weights: what a token of the calibration text counts: "fisher" or "uniform".
        rope: whether keys are coded "before" or "after" the rotary embedding.
    """

    channels: int
    bits: int
    weights: Weights = "fisher"
    rope: RopeSite = "before"

    learns = True
    takes_nearest = True

    def __post_init__(self) -> None:
        require(self, "channels", range(1, 33))
        require(self, "bits", range(1, 13))
        require(self, "weights", get_args(Weights))
        require(self, "rope", get_args(RopeSite))

    @property
    def centroids(self) -> int:
        return 1 << self.bits

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> CodebookFormat:
        return CodebookFormat(
            site, self.bits, self.channels, head_dim, page_size, width=head_dim, layout=layout
        )

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        codebook = self.learned_tensor("codebook", (heads, head_dim // self.channels))
        return Shared(codebook=codebook.float(), rope=self.rope_of(site, self.rope, rope))

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> CodedTensor:
        assert shared.codebook is not None
        return CodedTensor(nearest_codes(x, shared.codebook))

    def calibrate(self, sample: Sample) -> Self:
        x, gradient = sample.at(self.rope)
        points = in_groups(x, self.channels)
        weights = None
        if self.weights == "fisher":
            weights = in_groups(gradient, self.channels).square().sum(-1)
        codebook = kmeans(points, 2**self.bits, weights=weights, seed=sample.seed)
        return self.with_learned({"codebook": torch.unflatten(codebook.half(), 0, (len(x), -1))})


def in_groups(x: Tensor, channels: int) -> Tensor:
    """Points `[H * groups, N, channels]` of tokens `[H, N, D]`."""
    return torch.unflatten(x, -1, (-1, channels)).transpose(1, 2).flatten(0, 1)


def nearest_codes(x: Tensor, codebook: Tensor) -> Tensor:
    """int32 `[..., H, T, groups]` of tokens `[..., H, T, D]`; `codebook` as in `Shared`."""
    *lead, heads, tokens, width = x.shape
    channels = codebook.shape[-1]
    flat = x.reshape(-1, heads, tokens, width).transpose(0, 1).flatten(1, 2)
    groups = width // channels
    wide = codebook.expand(heads, groups, -1, -1).flatten(0, 1)
    codes = nearest(in_groups(flat, channels), wide)  # [H * groups, n * T]
    codes = codes.view(heads, groups, -1, tokens).permute(2, 0, 3, 1)
    return codes.reshape(*lead, heads, tokens, groups)
