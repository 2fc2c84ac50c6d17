"""k-means for many groups of channels side by side, and the nearest of learned centroids."""

import torch
from torch import Tensor

from bitkv import native

_SEEDED = 4  # points an entry among which seeds are sought, one after the other
_SCORES_AT_ONCE = 2**24  # float32 distances held together


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """int32 `[G, N]`: for each point of `x` `[G, N, c]` the closest entry of `codebook` `[G, E, c]`."""
    found = native.nearest(x, codebook)
    return _nearest(x, codebook) if found is None else found


def _nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """In torch; of entries equally near any may be chosen."""
    x, codebook = x.float(), codebook.float()
    bias = -0.5 * codebook.square().sum(-1).unsqueeze(-2)
    step = max(1, _SCORES_AT_ONCE // (codebook.shape[0] * codebook.shape[1]))
    # of the squared distance only this part differs between entries
    scores = (torch.baddbmm(bias, part, codebook.mT) for part in torch.split(x, step, dim=1))
    return torch.cat([s.argmax(-1).int() for s in scores], dim=1)


def kmeans(
    x: Tensor, entries: int, *, weights: Tensor | None = None, seed: int = 0, rounds: int = 20
) -> Tensor:
    """Centroids `[G, entries, c]` of least (weighted) squared distance to points `x` `[G, N, c]`.

    Seeding is k-means++, and an entry that no point is nearest to moves to a point drawn by its share of
    the error.

    Args:
        weights: `[G, N]`, how much a point's squared distance counts; all alike by default.

    Raises:
        ValueError: fewer points than entries.
    """
    groups, count, channels = x.shape
    if count < entries:
        raise ValueError(
            f"{count} tokens of calibration cannot make {entries} centroids; pass at least {entries}, "
            f"better {32 * entries}"
        )
    x = x.float()
    weights = torch.ones(groups, count, device=x.device) if weights is None else weights.float()
    # a group without any weight would have centroids without a mean
    weights = weights / weights.mean(-1, keepdim=True).clamp(min=1e-30) + 1e-6
    draw = torch.Generator(device=x.device).manual_seed(seed)
    centroids = _seeds(x, weights, entries, draw)
    for _ in range(rounds):
        codes = nearest(x, centroids).long()
        place = codes + torch.arange(groups, device=x.device).unsqueeze(1) * entries
        sums = x.new_zeros(groups * entries, channels)
        mass = x.new_zeros(groups * entries)
        sums.index_add_(0, place.flatten(), (x * weights.unsqueeze(-1)).flatten(0, 1))
        mass.index_add_(0, place.flatten(), weights.flatten())
        means = (sums / mass.clamp(min=1e-30).unsqueeze(-1)).view_as(centroids)
        dead = (mass == 0).view(groups, entries)
        if dead.any():
            error = (x - centroids.gather(1, codes.unsqueeze(-1).expand_as(x))).square().sum(-1)
            means = _revive(means, dead, x, error * weights, draw)
        if torch.equal(means, centroids):
            break
        centroids = means
    return centroids


def _seeds(x: Tensor, weights: Tensor, entries: int, draw: torch.Generator) -> Tensor:
    """Points of `x`, each drawn by its weighted squared distance to those before it."""
    if x.shape[1] > _SEEDED * entries:  # a sample serves as well
        chosen = torch.multinomial(weights, _SEEDED * entries, generator=draw)
        x = x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        weights = torch.ones_like(chosen, dtype=x.dtype)
    group = torch.arange(len(x), device=x.device)
    seeds = x.new_empty(len(x), entries, x.shape[2])
    distance = torch.full_like(weights, torch.inf)
    share = weights
    for i in range(entries):
        seeds[:, i] = x[group, torch.multinomial(share, 1, generator=draw).squeeze(1)]
        distance = torch.minimum(distance, (x - seeds[:, i : i + 1]).square().sum(-1))
        # where points repeat, all may be taken already
        share = torch.where(distance.sum(-1, keepdim=True) > 0, distance * weights, weights)
    return seeds


def _revive(means: Tensor, dead: Tensor, x: Tensor, error: Tensor, draw: torch.Generator) -> Tensor:
    drawn = torch.multinomial(error + 1e-30, int(dead.sum(-1).max()), generator=draw)
    for g, row in enumerate(dead):
        empty = row.nonzero().flatten()
        means[g, empty] = x[g, drawn[g, : len(empty)]]
    return means
