"""RotateKV: keys rotated before the rotary embedding, channels reordered, affine codes of each token.

Zunhai Su et al., "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware
Adaptive Rotations", arXiv 2501.16383. What differs here: the paper rotates four heads together, and a
page is of one KV head, so each head is rotated on its own; its groups of 128 channels are then a whole
head, inside which order means nothing. With smaller groups channels are reordered by their sums over
calibration text, so that a group holds channels of one level. Scales are float16 where the paper has 8
bits. Its tokens with massive activations are the first ones: keep them as `num_sink_tokens`. Values
are rotated alike.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from bitkv.codecs.arguments import require, require_between
from bitkv.codecs.base import Codec
from bitkv.codecs.coupled import RopeSite
from bitkv.codecs.normalizers import between_extremes
from bitkv.codecs.sample import Sample
from bitkv.codecs.transforms import for_heads, hadamard, permutation
from bitkv.pages import CODE_BITS, AffineFormat, QuantizedTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared

_CLIP_AT_2_BITS = 0.8


@dataclass(frozen=True)
class RotateKV(Codec):
    """A float16 scale and zero point for each group of a rotated token's channels.

    Args:
        bits: 1, 2, 4 or 8.
        group_size: 16, 32, 64, 128, or "page" for all channels of a head.
        clip: the share of a group's range that levels span; None for the paper's 0.8 at 2 bits, else 1.
        rope: whether keys are coded "before" or "after" the rotary embedding.
    """

    bits: int = 2
    group_size: int | Literal["page"] = "page"
    clip: float | None = None
    rope: RopeSite = "before"

    def __post_init__(self) -> None:
        require(self, "bits", CODE_BITS)
        require(self, "group_size", (16, 32, 64, 128, "page"))
        if self.clip is not None:
            require_between(self, "clip", 0.01, 1)
        require(self, "rope", ("before", "after"))

    @property
    def learns(self) -> bool:  # type: ignore[override]
        """An order, where there is more than one group."""
        return self.group_size != "page"

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> AffineFormat:
        hadamard(head_dim)
        size = head_dim if self.group_size == "page" else self.group_size
        return AffineFormat(site, self.bits, "token", size, head_dim, page_size, layout=layout)

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        matrix = for_heads(hadamard(head_dim), heads)
        if self.learns:
            matrix = permutation(self.learned_tensor("order", (heads, head_dim))) @ matrix
        return Shared(project=matrix, restore=matrix.mT, rope=self.rope_of(site, self.rope, rope))

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> QuantizedTensor:
        clip = self.clip
        if clip is None:
            clip = _CLIP_AT_2_BITS if self.bits == 2 else 1.0
        return between_extremes(x, self.bits, self.group_size, clip)

    def calibrate(self, sample: Sample) -> Self:
        if not self.learns:
            return self
        x, _ = sample.at(self.rope)
        sums = (x @ hadamard(x.shape[-1]).mT).sum(1)
        return self.with_learned({"order": sums.argsort(-1).to(torch.int16)})
