"""Rotary position embedding, for codecs that keep keys as they are before it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotation of channel pairs (i, i + R/2) of the first R channels by `position * inv_freq[i]`.

    Args:
        inv_freq: float32 `[R / 2]`, radians a token.
        factor: what cos and sin are multiplied by (YaRN's attention factor).
    """

    inv_freq: Tensor
    factor: float = 1.0

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Float32 `[..., T, D]` of `x` `[..., T, D]` at integer `positions` `[..., T]`."""
        return self._turn(x, positions, self.factor, 1.0)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Inverse of `rotate`."""
        return self._turn(x, positions, 1 / self.factor, -1.0)

    def _turn(self, x: Tensor, positions: Tensor, factor: float, sign: float) -> Tensor:
        # float32 angles at a million tokens are off by 0.03 rad; double ones by nothing
        angle = positions[..., None].double() * self.inv_freq.double()
        cos, sin = (f(angle).float() * factor for f in (torch.cos, torch.sin))
        half = self.inv_freq.shape[0]
        a, b, rest = torch.split(x.float(), [half, half, x.shape[-1] - 2 * half], dim=-1)
        sin = sin * sign
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
