"""TaSQ: coupled codes of keys in a space where what counts is what queries will see.

"TaSQ", arXiv 2610.03027. Keys before the rotary embedding are multiplied by `w = sqrt(diag M / mean)`,
where M is the second moment of the queries that meet a key, turned back by the key's position; so
squared errors count as errors of scores. Each token is divided by its root mean square. Channels are
then permuted so that those coded together depend on each other: pairs that the rotary embedding turns
stay together, and groups are matched, pairs first, to make `det(Cov) ** (1 / n)` small.

What differs here: the root mean square is that of a head, not of all heads of a token (16 bits for
head_dim channels); and matchings are improved by exchanges until none helps instead of solved. Values
are plain coupled codes in the paper: give them `Coupled`.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bitkv.codecs.arguments import require, require_keys
from bitkv.codecs.base import Codec
from bitkv.codecs.clustering import kmeans
from bitkv.codecs.coupled import RopeSite, in_groups, nearest_codes
from bitkv.codecs.grouping import group_channels
from bitkv.codecs.normalizers import by_rms, saturated
from bitkv.codecs.sample import Sample
from bitkv.codecs.transforms import permutation, rope_pairs, scaling
from bitkv.pages import CodebookFormat, CodedTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared

_SMALLEST_SHARE = 1e-4  # of the mean second moment
_INSTEAD = "Coupled(8, 10)"


@dataclass(frozen=True)
class TaSQ(Codec):
    """One index of `bits` bits for each `channels` channels of a key, and a float16 norm a token.

    Args:
        channels: that are coded together: 2, 4, 8, 16 or 32.
        bits: of an index, 1 to 12.
        rope: whether keys are coded "before" or "after" the rotary embedding.
    """

    channels: int = 8
    bits: int = 10
    rope: RopeSite = "before"

    learns = True

    def __post_init__(self) -> None:
        require(self, "channels", (2, 4, 8, 16, 32))
        require(self, "bits", range(1, 13))
        require(self, "rope", ("before", "after"))

    @property
    def centroids(self) -> int:
        return 1 << self.bits

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> CodebookFormat:
        require_keys(self, site, _INSTEAD)
        shape = (head_dim, page_size, head_dim)
        return CodebookFormat(site, self.bits, self.channels, *shape, scales=1, layout=layout)

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        require_keys(self, site, _INSTEAD)
        codebook = self.learned_tensor("codebook", (heads, head_dim // self.channels)).float()
        weight = self.learned_tensor("weight", (heads, head_dim)).float()
        order = permutation(self.learned_tensor("order", (heads, head_dim)))
        return Shared(
            codebook=codebook,
            project=order @ scaling(weight),
            restore=scaling(1 / weight) @ order.mT,
            rope=self.rope_of(site, self.rope, rope),
        )

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> CodedTensor:
        assert shared.codebook is not None
        y, scale = by_rms(saturated(x))
        return CodedTensor(nearest_codes(y, shared.codebook), scale)

    def calibrate(self, sample: Sample) -> Self:
        require_keys(self, sample.site, _INSTEAD)
        x, _ = sample.at(self.rope)
        moments = query_moments(sample, before=self.rope == "before")
        share = moments / moments.mean(-1, keepdim=True).clamp(min=1e-30)
        weight = share.clamp(min=_SMALLEST_SHARE).sqrt()
        y, _ = by_rms(saturated(x * weight.unsqueeze(1)))
        pairs = rope_pairs(x.shape[-1], sample.rope)
        order = torch.stack([group_channels(head, pairs, self.channels) for head in y])
        y = y.gather(-1, order.unsqueeze(1).expand_as(y))
        codebook = kmeans(in_groups(y, self.channels), 2**self.bits, seed=sample.seed)
        return self.with_learned(
            {
                "weight": weight,
                "order": order.to(torch.int16),
                "codebook": torch.unflatten(codebook.half(), 0, (len(x), -1)),
            }
        )


def query_moments(sample: Sample, *, before: bool) -> Tensor:
    """`[Hkv, D]`: mean squares of the queries that keys meet, a key's own and all later positions.

    Args:
        before: whether queries are turned back by each key's position, as keys before the rotary
            embedding meet them. Sums over positions of squared cosines do all keys of a query at once.
    """
    assert sample.queries is not None
    heads = len(sample.x)
    q = torch.unflatten(sample.queries.float(), 0, (heads, -1))  # [Hkv, G, N, D]
    seen = (sample.positions + 1).double()  # keys that a query meets
    total = (q.square().mean(1) * (seen / seen.sum()).float().unsqueeze(-1)).sum(1)
    if not before or sample.rope is None:
        return total
    pairs = rope_pairs(q.shape[-1], sample.rope)[: sample.rope.inv_freq.shape[0]]
    a, b = q[..., pairs[:, 0]], q[..., pairs[:, 1]]
    angle = (
        torch.arange(int(sample.positions.max()) + 1).double()[:, None] * sample.rope.inv_freq.double()
    )
    cos, sin = angle.cos(), angle.sin()
    cc, ss, cs = (
        (y.cumsum(0)[sample.positions] / seen.sum()).float() for y in (cos * cos, sin * sin, cos * sin)
    )
    aa, bb, ab = (y.mean(1) for y in (a * a, b * b, a * b))
    total[:, pairs[:, 0]] = (aa * cc + bb * ss + 2 * ab * cs).sum(1)
    total[:, pairs[:, 1]] = (bb * cc + aa * ss - 2 * ab * cs).sum(1)
    return total
