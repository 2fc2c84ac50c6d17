"""Spectral codes: channels rotated to where the loss tells them apart, bits given to those that matter.

bitkv's own. Like coupled codes (CQ, arXiv 2405.03917) they are indices into learned codebooks, with
nothing stored beside them; unlike those, what is coded together is chosen:

* The space is stretched by the square root of the Fisher information of a head, `F = E[g gᵀ]` with g
  the gradient of the loss with respect to a key or a value: squared errors then count by what they cost.
* In it the tokens' principal axes are taken: coordinates without correlation, sorted by variance.
* The coordinates are cut into runs, one index each. A run of n coordinates with variances v is expected
  to keep `n (Π v)^(1/n) 2^(-2b/n)` of its energy as error (reverse water-filling, for vectors), and the
  cut of least total error is found exactly: the strongest coordinate may get an index for itself, the
  weakest sixteen share one.

An index has eight bits whatever the rate: small codebooks learn from little text, and a byte looks up a
table that fits into four vector registers. The number of indices sets the rate, so any multiple of
`8 / head_dim` bits is one.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from bitkv.codecs.arguments import require, require_between
from bitkv.codecs.base import Codec
from bitkv.codecs.clustering import kmeans
from bitkv.codecs.coupled import RopeSite, in_groups, nearest_codes
from bitkv.codecs.sample import Sample
from bitkv.pages import CodebookFormat, CodedTensor, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared

_INDEX_BITS = 8
_RUNS = (16, 8, 4, 2, 1)  # coordinates that one index may stand for; shorter runs are padded with zeros
_WIDTH, _WHOLE = 512, 16  # the padded width that kernels take at most, and a multiple of what
_RIDGE = (
    0.3  # of the mean information, added to all: directions the text never needed cost something too
)


@dataclass(frozen=True)
class Spectral(Codec):
    """Indices of eight bits, `bits * head_dim / 8` of them a token.

    Args:
        bits: a channel, 0.5 to 8, as a multiple of `8 / head_dim`.
        rope: whether keys are coded "before" or "after" the rotary embedding. Before it they take fewer
            bits for the same error, but every key has to be rotated when it is read.
    """

    bits: float
    rope: RopeSite = "after"

    learns = True
    takes_nearest = True

    def __post_init__(self) -> None:
        require_between(self, "bits", 0.5, 8)
        require(self, "rope", ("before", "after"))

    @property
    def centroids(self) -> int:
        return 1 << _INDEX_BITS

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> CodebookFormat:
        run = self._longest_run(head_dim)
        width = run * self._indices(head_dim)
        return CodebookFormat(site, _INDEX_BITS, run, head_dim, page_size, width=width, layout=layout)

    def _indices(self, head_dim: int) -> int:
        """Of a token.

        Raises:
            ValueError: no whole number, or too few for the longest runs.
        """
        count = head_dim * self.bits / _INDEX_BITS
        if count != int(count) or not head_dim / _RUNS[0] <= count <= head_dim:
            raise ValueError(
                f"{self.bits} bits of {head_dim} channels are {count:g} indices of {_INDEX_BITS} bits; "
                f"pass a multiple of {_INDEX_BITS / head_dim:g}, {_INDEX_BITS / _RUNS[0]:g} to "
                f"{_INDEX_BITS}"
            )
        return int(count)

    def _longest_run(self, head_dim: int) -> int:
        """Coordinates that an index has room for: as many as kernels take."""
        count = self._indices(head_dim)
        fitting = (n for n in _RUNS if head_dim <= n * count <= _WIDTH and n * count % _WHOLE == 0)
        return next(fitting, _RUNS[0])

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        width = self._longest_run(head_dim) * self._indices(head_dim)
        return Shared(
            codebook=self.learned_tensor("codebook", (heads, self._indices(head_dim))).float(),
            project=self.learned_tensor("project", (heads, width, head_dim)),
            restore=self.learned_tensor("restore", (heads, head_dim, width)),
            rope=self.rope_of(site, self.rope, rope),
        )

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> CodedTensor:
        assert shared.codebook is not None
        return CodedTensor(nearest_codes(x, shared.codebook))

    def calibrate(self, sample: Sample) -> Self:
        x, gradient = sample.at(self.rope)
        heads = [self._fit(*pair, sample.seed) for pair in zip(x, gradient, strict=True)]
        codebook, project, restore = (torch.stack(parts) for parts in zip(*heads, strict=True))
        return self.with_learned({"codebook": codebook.half(), "project": project, "restore": restore})

    def _fit(self, x: Tensor, gradient: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codebook, `project` and `restore` of one head's tokens `[N, D]`."""
        axes = principal_axes(x.double(), gradient.double())
        run = self._longest_run(x.shape[1])
        sizes = cut(axes.variances.tolist(), self._indices(x.shape[1]), run, _INDEX_BITS)
        place = _places(sizes, run).to(
            x.device
        )  # [W, D]: each coordinate at its place, zeros in between
        project, restore = place @ axes.project, axes.restore @ place.T
        points = in_groups((x.double() @ project.T).float()[None], run)
        points = points[..., : max(sizes)]  # behind these there are zeros
        weights = axes.weights.float().expand(len(points), -1)
        codebook = kmeans(points, 1 << _INDEX_BITS, weights=weights, seed=seed)
        codebook = torch.nn.functional.pad(codebook, (0, run - max(sizes)))
        return codebook, project.float(), restore.float()


class Axes(NamedTuple):
    """Coordinates of a head in which errors cost what their squares say.

    Args:
        project, restore: float64 `[D, D]`, to them and back; the strongest coordinate first.
        variances: of the coordinates.
        weights: `[N]`, how much a token's error counts.
    """

    project: Tensor
    restore: Tensor
    variances: Tensor
    weights: Tensor


def principal_axes(x: Tensor, gradient: Tensor) -> Axes:
    """The axes of tokens `x` `[N, D]` under the Fisher information of `gradient` `[N, D]`."""
    fisher = gradient.T @ gradient
    fisher = fisher / fisher.diagonal().mean().clamp(min=1e-30)
    fisher += _RIDGE * torch.eye(len(fisher), dtype=fisher.dtype, device=fisher.device)
    information, directions = torch.linalg.eigh(fisher)
    stretch = directions @ torch.diag(information.sqrt()) @ directions.T
    shrink = directions @ torch.diag(information.rsqrt()) @ directions.T
    # the root: with the whole information a few tokens would own the codebooks
    weights = (gradient @ shrink).norm(dim=-1)
    weights = weights / weights.mean().clamp(min=1e-30)
    y = x @ stretch
    y = y - (weights[:, None] * y).mean(0)
    variances, axes = torch.linalg.eigh((weights[:, None] * y).T @ y / len(y))
    variances, axes = variances.flip(0), axes.flip(1)
    return Axes(axes.T @ stretch, shrink @ axes, variances, weights)


def cut(variances: list[float], runs: int, longest: int, bits: int) -> list[int]:
    """Lengths of `runs` runs of sorted coordinates, with the least error that `bits` bits each leave."""
    total = len(variances)
    logs = [0.0]
    for v in variances:
        logs.append(logs[-1] + math.log(max(v, 1e-12)))

    def error(start: int, stop: int) -> float:
        n = stop - start
        return n * math.exp((logs[stop] - logs[start] - 2 * bits * math.log(2)) / n)

    least = [0.0] + [math.inf] * total  # error of the first coordinates in so many runs
    starts: list[list[int]] = []
    for _ in range(runs):
        found = [
            min(
                ((least[i] + error(i, stop), i) for i in range(max(0, stop - longest), stop)),
                default=(math.inf, 0),
            )
            for stop in range(total + 1)
        ]
        least, row = [x for x, _ in found], [i for _, i in found]
        starts.append(row)
    stop, sizes = total, []
    for row in reversed(starts):
        sizes.append(stop - row[stop])
        stop = row[stop]
    return sizes[::-1]


def _places(sizes: list[int], room: int) -> Tensor:
    """float64 `[room * runs, D]`: where a run's coordinates lie among those of its index."""
    place = torch.zeros(room * len(sizes), sum(sizes), dtype=torch.float64)
    first = 0
    for run, size in enumerate(sizes):
        for i in range(size):
            place[run * room + i, first + i] = 1
        first += size
    return place
