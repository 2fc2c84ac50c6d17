"""What all pages of a layer share for keys or for values; it lies beside the pool, not in pages."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitkv.rope import Rope


@dataclass(frozen=True, eq=False)
class Shared:
    """How a page's numbers y become keys or values: `x = rope(restore @ y)`.

    None stands for nothing to do. Scores need `restore` alone: `q · (restore @ y) = (restoreᵀ q) · y`.

    Args:
        codebook: float32 `[Hkv, groups, 2**bits, channels]`, 1 for what all heads or groups share.
        project: float32 `[Hkv, W, D]`, `y = project @ x`.
        restore: float32 `[Hkv, D, W]`, its inverse, or what serves as one.
        rope: the embedding that keys in pages do not have yet.
    """

    codebook: Tensor | None = None
    project: Tensor | None = None
    restore: Tensor | None = None
    rope: Rope | None = None

    def __deepcopy__(self, memo: object) -> "Shared":
        """Itself: nobody changes it, and kernels keep tables for its codebook."""
        return self

    @property
    def is_plain(self) -> bool:
        """Whether pages hold codes of the tokens themselves, so that a format says everything."""
        return self.codebook is None and self.is_direct

    @property
    def is_direct(self) -> bool:
        """Whether y is x."""
        return self.restore is None and self.rope is None

    def to_pages(self, x: Tensor, positions: Tensor) -> Tensor:
        """y, float32 `[..., Hkv, T, W]`, of tokens `[..., Hkv, T, D]` at `positions` `[..., 1, T]`."""
        if self.rope is not None:
            x = self.rope.undo(x, positions)
        if self.project is not None:
            x = x.float() @ self.project.transpose(-1, -2)
        return x

    def from_pages(self, y: Tensor, positions: Tensor) -> Tensor:
        """Inverse of `to_pages`."""
        if self.restore is not None:
            y = y @ self.restore.transpose(-1, -2)
        return y if self.rope is None else self.rope.rotate(y, positions)

    def to(self, device: torch.device) -> "Shared":
        """The same on a device."""
        rope = None if self.rope is None else replace(self.rope, inv_freq=self.rope.inv_freq.to(device))
        return self._each(lambda x: x.to(device), rope)

    def of_heads(self, first: int, count: int) -> "Shared":
        """What `count` KV heads from `first` on have of it."""
        own = slice(first, first + count)
        return self._each(lambda x: x if x.shape[0] == 1 else x[own].contiguous(), self.rope)

    def _each(self, change: Callable[[Tensor], Tensor], rope: Rope | None) -> "Shared":
        codebook, project, restore = (
            None if x is None else change(x) for x in (self.codebook, self.project, self.restore)
        )
        return Shared(codebook, project, restore, rope)


PLAIN = Shared()
