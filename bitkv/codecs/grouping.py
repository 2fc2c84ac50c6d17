"""Which channels are coded together: those that depend on each other."""

import torch
from torch import Tensor

_RIDGE = 1e-4  # of the mean variance
_SWEEPS = 20


def group_channels(x: Tensor, atoms: Tensor, size: int) -> Tensor:
    """int64 `[D]`: an order of the channels of `x` `[N, D]` in which each `size` neighbours are a group.

    Groups double from atoms on by matching those whose union has a small `det(Cov) ** (1 / n)`.

    Args:
        atoms: `[D / a, a]`, channels that stay together.
    """
    covariance = torch.cov(x.double().T)
    variance = covariance.diagonal().mean().clamp(min=1e-30)
    covariance += _RIDGE * variance * torch.eye(len(covariance), dtype=torch.float64)
    groups = atoms
    while groups.shape[1] < size:
        first, second = zip(*match(_union_costs(covariance, groups)), strict=True)
        groups = torch.cat([groups[list(first)], groups[list(second)]], dim=1)
    return groups.flatten()


def _union_costs(covariance: Tensor, groups: Tensor) -> Tensor:
    """float64 `[n, n]`: `det(Cov) ** (1 / channels)` of the union of each two groups."""
    n = len(groups)
    both = torch.cat([groups[:, None].expand(-1, n, -1), groups[None].expand(n, -1, -1)], dim=-1)
    parts = covariance[both.unsqueeze(-1), both.unsqueeze(-2)]
    costs: Tensor = (torch.linalg.slogdet(parts).logabsdet / both.shape[-1]).exp()
    return costs.fill_diagonal_(torch.inf)


def match(costs: Tensor) -> list[tuple[int, int]]:
    """Pairs of `[n, n]` of a small sum of costs: greedily, then exchanged while that helps."""
    n, free, pairs = len(costs), set(range(len(costs))), []
    # two groups that save much against what they would cost on average come first
    usual = costs.masked_fill(costs.isinf(), 0).sum(1) / (n - 1)
    for place in (costs - (usual[:, None] + usual) / 2).flatten().argsort().tolist():
        i, j = divmod(place, n)
        if i != j and i in free and j in free:
            pairs.append((i, j))
            free -= {i, j}
    cost = costs.tolist()
    for _ in range(_SWEEPS):
        if not _exchange(pairs, cost):
            break
    return pairs


def _exchange(pairs: list[tuple[int, int]], cost: list[list[float]]) -> bool:
    """Improve each two pairs by another pairing of their four; whether any was."""
    improved = False
    for m in range(len(pairs)):
        for n in range(m):
            (a, b), (c, d) = pairs[m], pairs[n]
            now = cost[a][b] + cost[c][d]
            for left, right in (((a, c), (b, d)), ((a, d), (b, c))):
                then = cost[left[0]][left[1]] + cost[right[0]][right[1]]
                if then < now * (1 - 1e-9):
                    pairs[m], pairs[n], now, improved = left, right, then, True
    return improved
