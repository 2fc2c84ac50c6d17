"""KVQuant: levels that are not uniform, thresholds of channels for keys, outliers beside the codes.

Coleman Hooper et al., "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache
Quantization", arXiv 2401.18079. Keys are coded before the rotary embedding (section 3.2) in units of
their channel's range on calibration text (3.1), values in units of their token's. The levels, one list
for a layer, come from k-means weighted by Fisher information (3.3). The share `outliers` of elements
is kept as 16-bit positions and values (3.4), and their thresholds leave these out. Q-Norm gives levels
the mean and the deviation that elements had.

What differs here: a page keeps one size, so that each page and head has the same number of outliers,
the elements furthest out of their channel's range (keys) or, in deviations, from their token's mean
(values); and a token is that of one head.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bitkv.codecs.arguments import require, require_between
from bitkv.codecs.base import Codec
from bitkv.codecs.clustering import kmeans, nearest
from bitkv.codecs.coupled import RopeSite
from bitkv.codecs.levels import nearest_level
from bitkv.codecs.normalizers import SCALE_LIMITS, saturated
from bitkv.codecs.sample import Sample
from bitkv.pages import CodedTensor, OutlierFormat, OutlierTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared

_POINTS = 2**17  # that levels are fitted to: a few dozen numbers need no more
_QNORM_ROUNDS = 8
_SMALLEST = 2.0**-20


@dataclass(frozen=True)
class KVQuant(Codec):
    """Learned levels, with a float16 scale and zero point for each token of values, and outliers.

    Args:
        bits: 1 to 5.
        outliers: the share of elements kept in 16 bits, with 16 more for their positions; 0 to 0.1.
        qnorm: whether levels get the mean and deviation of what they were fitted to.
        rope: whether keys are coded "before" or "after" the rotary embedding.
    """

    bits: int
    outliers: float = 0.01
    qnorm: bool = False
    rope: RopeSite = "before"

    learns = True

    def __post_init__(self) -> None:
        require(self, "bits", range(1, 6))
        require_between(self, "outliers", 0, 0.1)
        require(self, "qnorm", (False, True))
        require(self, "rope", ("before", "after"))

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> OutlierFormat:
        count, scales = self._count(page_size * head_dim), 2 * (site == "value")
        return OutlierFormat(site, self.bits, head_dim, page_size, count, scales, layout)

    def _count(self, elements: int) -> int:
        return round(self.outliers * elements)

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        levels = self.learned_tensor("levels", (2**self.bits,)).float()
        if site == "value":
            return Shared(codebook=levels.view(1, 1, -1, 1))
        center, spread = (
            self.learned_tensor(name, (heads, head_dim)).float().unsqueeze(-1)
            for name in ("center", "spread")
        )
        codebook = torch.addcmul(center, spread, levels).unsqueeze(-1)
        return Shared(codebook=codebook, rope=self.rope_of(site, self.rope, rope))

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> OutlierTensor:
        assert shared.codebook is not None
        x, levels = saturated(x), shared.codebook.squeeze(-1)  # [H or 1, D or 1, E]
        if levels.shape[1] == 1:
            return self._quantize_tokens(x, levels.flatten())
        low, high = levels[..., 0].unsqueeze(-2), levels[..., -1].unsqueeze(-2)
        distance = (x - (low + high) / 2).abs() / (high - low).clamp(min=_SMALLEST)
        position = self._furthest(distance)
        return _with_outliers(x, CodedTensor(nearest_level(x, levels.unsqueeze(-3))), position)

    def _quantize_tokens(self, x: Tensor, levels: Tensor) -> OutlierTensor:
        position = self._furthest(_deviations(x))
        center, spread = _token_range(x, position)
        spread, center = spread.clamp(*SCALE_LIMITS).half(), center.half()
        y = (x - center.float().unsqueeze(-1)) / spread.float().unsqueeze(-1)
        return _with_outliers(x, CodedTensor(nearest_level(y, levels), spread, center), position)

    def _furthest(self, distance: Tensor) -> Tensor:
        """int32 `[..., n]`, ascending: places of the outliers in `distance` `[..., T, D]`."""
        flat = distance.flatten(-2)
        return flat.topk(self._count(flat.shape[-1]), dim=-1).indices.sort(-1).values.int()

    def calibrate(self, sample: Sample) -> Self:
        x, gradient = sample.at(self.rope)
        weights = gradient.square()
        if sample.site == "value":
            position = self._furthest(_deviations(x))
            center, spread = _token_range(x, position)
            inside = torch.ones_like(x).flatten(-2).scatter(-1, position.long(), 0).view_as(x)
            learned: dict[str, Tensor] = {}
            y = (x - center.unsqueeze(-1)) / spread.clamp(min=_SMALLEST).unsqueeze(-1)
        else:
            ordered = x.sort(1).values
            cut = int(self.outliers / 2 * (x.shape[1] - 1))
            low, high = ordered[:, cut], ordered[:, -1 - cut]
            learned = {"center": ((low + high) / 2).half(), "spread": ((high - low) / 2).half()}
            center, spread = (x.float().unsqueeze(1) for x in learned.values())
            inside = ((x >= low.unsqueeze(1)) & (x <= high.unsqueeze(1))).float()
            y = (x - center) / spread.clamp(min=_SMALLEST)
        learned["levels"] = self._fit(y, weights, inside > 0, sample.seed).half()
        return self.with_learned(learned)

    def _fit(self, y: Tensor, weights: Tensor, inside: Tensor, seed: int) -> Tensor:
        """Levels `[2**bits]`, ascending, for the numbers that are no outliers."""
        y, weights = y[inside], weights[inside]
        if len(y) > _POINTS:
            draw = torch.Generator(device=y.device).manual_seed(seed)
            chosen = torch.randint(len(y), (_POINTS,), generator=draw, device=y.device)
            y, weights = y[chosen], weights[chosen]
        points = y.view(1, -1, 1)
        levels = kmeans(points, 2**self.bits, weights=weights.view(1, -1), seed=seed)
        # moved levels are nearest to other points, so that once is not enough
        for _ in range(_QNORM_ROUNDS if self.qnorm else 0):
            quantized = levels[0, nearest(points, levels).flatten().long()]
            levels = (levels - quantized.mean()) / quantized.std().clamp(min=_SMALLEST)
            levels = levels * y.std() + y.mean()
        return levels.flatten().sort().values


def _with_outliers(x: Tensor, dense: CodedTensor, position: Tensor) -> OutlierTensor:
    return OutlierTensor(dense, position, x.flatten(-2).gather(-1, position.long()).half())


def _deviations(x: Tensor) -> Tensor:
    """How far each element lies from its token's mean, in standard deviations."""
    distance = (x - x.mean(-1, keepdim=True)).abs()
    return distance / distance.square().mean(-1, keepdim=True).sqrt().clamp(min=_SMALLEST)


def _token_range(x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half the range of each token `[..., T]` without its outliers."""
    low, high = (
        x.flatten(-2).scatter(-1, position.long(), end).view_as(x) for end in (torch.inf, -torch.inf)
    )
    low, high = low.amin(-1), high.amax(-1)
    # of a token that is all outliers nothing is left
    low, high = (torch.where(low <= high, y, 0) for y in (low, high))
    return (low + high) / 2, (high - low) / 2
