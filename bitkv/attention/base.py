"""What every backend gets and gives."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitkv.view import CacheView


@dataclass(frozen=True)
class AttentionRequest:
    """One call of attention over a layer's cache, arguments resolved.

    Args:
        q: queries `[B, Hq, Tq, D]`.
        view: the cache; it already holds the keys and values of these queries.
        positions: int `[B, Tq]`. Query i attends to tokens 0 … `positions[b, i]` of its sequence;
            -1 means to none, and its output is 0. None: the queries are the newest tokens, and each
            attends to the tokens up to its own.
        scale: factor on the scores.
        window: attend to the newest `window` of those tokens only.
        softcap: scores become `softcap * tanh(score / softcap)`.
    """

    q: Tensor
    view: CacheView
    positions: Tensor | None
    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def last_seen(self) -> Tensor:
        """`positions` as a tensor."""
        if self.positions is not None:
            return self.positions
        newest = torch.arange(-self.q.shape[2], 0, device=self.q.device)
        return self.view.lengths.unsqueeze(1) + newest


@dataclass(frozen=True)
class Backend:
    """An implementation of attention over pages.

    Args:
        run: returns the output `[B, Hq, Tq, D]` in q's dtype and the log-sum-exp of the scores,
            float32 `[B, Hq, Tq]`, minus infinity where a query attends to nothing.
        refuse: one sentence that says what it got and what it takes, or None.
    """

    name: str
    run: Callable[[AttentionRequest], tuple[Tensor, Tensor]]
    refuse: Callable[[AttentionRequest], str | None]
