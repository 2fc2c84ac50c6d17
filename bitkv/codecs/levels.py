"""Levels of a scalar quantizer: the best ones of a known distribution, and the nearest of given ones."""

from functools import cache

import torch
from torch import Tensor

_POINTS = 2**19  # a level moves only as its cuts reach other points
_ROUNDS = 2000
_EXTENT = 9  # standard deviations, beyond which nothing happens


@cache
def gaussian_levels(entries: int) -> Tensor:
    """float32 `[entries]`: the levels of least squared error for N(0, 1)."""
    x = torch.linspace(-_EXTENT, _EXTENT, _POINTS, dtype=torch.float64)
    return lloyd_max(x, torch.exp(-0.5 * x.square()), entries)


@cache
def sphere_levels(entries: int, dim: int) -> Tensor:
    """float32 `[entries]`: the same for a coordinate of a random vector of `dim` that has RMS one."""
    end = min(1.0, _EXTENT / dim**0.5)
    x = torch.linspace(-end, end, _POINTS + 2, dtype=torch.float64)[1:-1]
    density: Tensor = (1 - x.square()) ** ((dim - 3) / 2)
    levels: Tensor = lloyd_max(x, density, entries) * dim**0.5
    return levels


def lloyd_max(x: Tensor, density: Tensor, entries: int) -> Tensor:
    """float32 `[entries]`: ascending levels of least squared error (Lloyd 1982, Max 1960).

    Args:
        x: float64 `[n]`, ascending and dense, where the distribution is sampled.
        density: float64 `[n]` of it there, up to a factor.
    """
    nothing = torch.zeros(1, dtype=torch.float64)
    mass = torch.cat([nothing, density.cumsum(0)])
    moment = torch.cat([nothing, (density * x).cumsum(0)])
    # for many levels the best ones are as dense as the cube root of the density
    share = (density ** (1 / 3)).cumsum(0)
    middles = (torch.arange(entries, dtype=torch.float64) + 0.5) / entries
    levels = x[torch.searchsorted(share / share[-1], middles)]
    for _ in range(_ROUNDS):
        cuts = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(x))])
        moved = moment[edges].diff() / mass[edges].diff().clamp(min=1e-300)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels.float()


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """int32 codes like `x` `[..., T, D]` of the closest of ascending `levels` `[..., 1, D or 1, E]`."""
    codes = torch.zeros_like(x, dtype=torch.int32)
    for cut in ((levels[..., 1:] + levels[..., :-1]) / 2).unbind(-1):
        codes += x > cut
    return codes
