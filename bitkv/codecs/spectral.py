"""Spectral codes: channels rotated to where the loss tells them apart, bits given to those that matter.

bitkv's own. Like coupled codes (CQ, arXiv 2405.03917) they are indices into learned codebooks, with
nothing stored beside them; unlike those, what is coded together is chosen:

* The space is stretched by the square root of the Fisher information of a head, `F = E[g gᵀ]` with g
  the gradient of the loss with respect to a key or a value: squared errors then count by what they cost.
  Only what late queries read counts (`Sample.late`): the newest tokens are in no page yet, and most of
  the whole gradient is theirs.
* In it the tokens' principal axes are taken: coordinates without correlation, sorted by variance.
* The coordinates are cut into runs, one index each. A run of n coordinates with variances v is expected
  to keep `n (Π v)^(1/n) 2^(-2b/n)` of its energy as error (reverse water-filling, for vectors), and the
  cut of least total error is found exactly: the strongest coordinate may get an index for itself, the
  weakest sixteen share one.

An index has eight bits whatever the rate: small codebooks learn from little text, and a byte looks up a
table that fits into four vector registers. The number of indices sets the rate, so any multiple of
`8 / head_dim` bits is one. In these units errors of different heads, layers, keys and values add up to a
loss, so `Allocated(Spectral(...))` lets calibration choose the rates (calibration/allocation.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
        x, gradient = sample.at(self.rope, late=True)
        heads = [self._fit(*pair, sample.seed) for pair in zip(x, gradient, strict=True)]
        codebook, project, restore = (torch.stack(parts) for parts in zip(*heads, strict=True))
        return self.with_learned({"codebook": codebook.half(), "project": project, "restore": restore})

    def rates(self, sample: Sample) -> Mapping[Self, float]:
        x, gradient = sample.at(self.rope, late=True)
        head_dim = x.shape[-1]
        fewest = -(-head_dim // _RUNS[0])
        made = [replace(self, bits=_INDEX_BITS * n / head_dim) for n in range(fewest, head_dim + 1)]
        losses = dict.fromkeys(made, 0.0)
        for pair in zip(x, gradient, strict=True):
            axes = principal_axes(*(part.double() for part in pair))
            expected = {
                run: least_errors(axes.variances.tolist(), head_dim, run, _INDEX_BITS) for run in _RUNS
            }
            for codec in made:
                count, run = codec._indices(head_dim), codec._longest_run(head_dim)
                losses[codec] += axes.scale * expected[run][count - 1]
        return losses

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
        scale: of squared errors, to make them comparable with other heads'.
    """

    project: Tensor
    restore: Tensor
    variances: Tensor
    weights: Tensor
    scale: float


def principal_axes(x: Tensor, gradient: Tensor) -> Axes:
    """The axes of tokens `x` `[N, D]` under the Fisher information of `gradient` `[N, D]`."""
    fisher = gradient.T @ gradient / len(gradient)
    mean = fisher.diagonal().mean().clamp(min=1e-30)
    fisher = fisher / mean
    # tokens' root mean square, not their mean: what is lost on few tokens, as on facts, is lost there
    information = gradient.square().sum(-1)
    scale = mean * information.square().mean().sqrt() / information.mean().clamp(min=1e-30)
    fisher += _RIDGE * torch.eye(len(fisher), dtype=fisher.dtype, device=fisher.device)
    strengths, directions = torch.linalg.eigh(fisher)
    stretch = directions @ torch.diag(strengths.sqrt()) @ directions.T
    shrink = directions @ torch.diag(strengths.rsqrt()) @ directions.T
    # the root: with the whole information a few tokens would own the codebooks
    weights = (gradient @ shrink).norm(dim=-1)
    weights = weights / weights.mean().clamp(min=1e-30)
    y = x @ stretch
    y = y - (weights[:, None] * y).mean(0)
    variances, axes = torch.linalg.eigh((weights[:, None] * y).T @ y / len(y))
    variances, axes = variances.flip(0), axes.flip(1)
    return Axes(axes.T @ stretch, shrink @ axes, variances, weights, float(scale))


def cut(variances: list[float], runs: int, longest: int, bits: int) -> list[int]:
    """Lengths of `runs` runs of sorted coordinates, with the least error that `bits` bits each leave."""
    _, starts = _cuts(variances, runs, longest, bits)
    stop, sizes = len(variances), []
    for row in reversed(starts):
        sizes.append(stop - int(row[stop]))
        stop = int(row[stop])
    return sizes[::-1]


def least_errors(variances: list[float], most: int, longest: int, bits: int) -> list[float]:
    """The error that the best cut into 1, 2, … `most` runs leaves, infinite where there is none."""
    errors, _ = _cuts(variances, most, longest, bits)
    return [float(row[-1]) for row in errors]


def _cuts(
    variances: list[float], runs: int, longest: int, bits: int
) -> tuple[list[Tensor], list[Tensor]]:
    """For 1 to `runs` runs: least errors of the first 0, 1, … coordinates, where the last run starts."""
    total = len(variances)
    logs = torch.tensor([0.0, *(max(v, 1e-12) for v in variances)], dtype=torch.float64)
    logs = torch.cat([logs[:1], logs[1:].log()]).cumsum(0)
    length = torch.arange(total + 1) - torch.arange(total + 1)[:, None]  # [start, stop]
    n = length.clamp(min=1)
    error = n * torch.exp((logs - logs[:, None] - 2 * bits * math.log(2)) / n)
    error[(length < 1) | (length > longest)] = torch.inf
    least = torch.full((total + 1,), torch.inf, dtype=torch.float64)  # with so many runs
    least[0] = 0.0
    errors, starts = [], []
    for _ in range(runs):
        least, start = (least[:, None] + error).min(0)
        errors.append(least)
        starts.append(start)
    return errors, starts


def _places(sizes: list[int], room: int) -> Tensor:
    """float64 `[room * runs, D]`: where a run's coordinates lie among those of its index."""
    place = torch.zeros(room * len(sizes), sum(sizes), dtype=torch.float64)
    first = 0
    for run, size in enumerate(sizes):
        for i in range(size):
            place[run * room + i, first + i] = 1
        first += size
    return place
