"""What every backend gets and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitkv.view import CacheView

EVERY_TOKEN = 2**30
"""A window that hides nothing, for kernels."""


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

    @property
    def operands(self) -> tuple[Any, ...]:
        """The arguments of an operator: tensors and plain numbers, which torch.compile understands.

        q, pages, block_table, packed_len, hot_k, hot_v, hot_len, positions; `PartFormat.numbers` of keys
        and of values; num_sink_tokens, scale, window (`EVERY_TOKEN` for none), softcap (0 for none).
        """
        view, form = self.view, self.view.format
        window = EVERY_TOKEN if self.window is None else min(self.window, EVERY_TOKEN)
        pages = (view.pages, view.block_table, view.packed_len)
        hot = (view.hot_k, view.hot_v, view.hot_len)
        numbers = (form.key.numbers, form.value.numbers, view.num_sink_tokens)
        return (self.q, *pages, *hot, self.positions, *numbers, self.scale, window, self.softcap or 0.0)

    @property
    def shared_operands(self) -> tuple[Tensor | float | None, ...]:
        """What pages share, as further arguments of an operator that takes more than formats say.

        Of keys codebook, restore, the frequencies of the rotary embedding they lack and its factor; of
        values codebook and restore.
        """
        key, value = self.view.key, self.view.value
        turns = (None, 1.0) if key.rope is None else (key.rope.inv_freq, key.rope.factor)
        return (key.codebook, key.restore, *turns, value.codebook, value.restore)


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
