"""A layer of fixed size: its step runs on the device alone and can be replayed as a CUDA graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitkv.checks import check_tokens
from bitkv.codecs import Codec
from bitkv.layer import PagedLayer
from bitkv.rope import Rope
from bitkv.static.operator import append, why_not

__all__ = ["StaticLayer"]

_FIXED = ("block_table", "packed_len", "hot_len", "hot_k", "hot_v", "tickets")


class StaticLayer(PagedLayer):
    """A `PagedLayer` with room for `max_tokens` a sequence from its first tokens on.

    Every sequence owns the pages it will fill, named in its block table beforehand, and no tensor moves
    again while the batch stays the same. `step` reads and advances the lengths on the device, so the
    tensors are the truth here: operations of the host (append, crop, gather, save) read them back first.

    Args:
        key, value, num_sink_tokens, recent_tokens, page_size, layout, rope: see `PagedLayer`.
        max_tokens: room of each sequence.
        step_tokens: the most tokens `step` will be given at a time.

    Raises:
        ValueError: a number below 1, or with the first tokens: no step can run where they are.
    """

    def __init__(
        self,
        key: Codec,
        value: Codec,
        *,
        num_sink_tokens: int,
        recent_tokens: int,
        page_size: int,
        max_tokens: int,
        step_tokens: int = 1,
        layout: str | None = None,
        rope: Rope | None = None,
    ) -> None:
        for name, number in (("max_tokens", max_tokens), ("step_tokens", step_tokens)):
            if number < 1:
                raise ValueError(f"{name} {number} leaves no room; pass 1 or more")
        self.max_tokens = max_tokens
        self.step_tokens = step_tokens
        super().__init__(
            key,
            value,
            num_sink_tokens=num_sink_tokens,
            recent_tokens=recent_tokens,
            page_size=page_size,
            layout=layout,
            rope=rope,
        )

    def reset(self) -> None:
        super().reset()
        self._homes: dict[str, Tensor] = {}
        self._spare: list[list[int]] = []
        vars(self).pop("tickets", None)

    def clear(self) -> None:
        """Forget all tokens; the tensors stay, and no step that was refused is told of."""
        if not self.is_empty:
            self.pool.release([page for row in self._tables for page in row])
            batch = len(self._tables)
            self.set_sequences([[]] * batch, [0] * batch)

    @property
    def window_capacity(self) -> int:
        """A page that is due waits for the next step, whose tokens need room behind it until then."""
        return self.hot_capacity - 1 + self.step_tokens

    @property
    def max_pages(self) -> int:
        """Pages of a full sequence."""
        return max(0, 1 + (self.max_tokens - self.hot_capacity) // self.page_size)

    def __setattr__(self, name: str, value: Any) -> None:
        """New contents of a fixed tensor go to where it lies; one for another batch replaces it."""
        if name in _FIXED:
            home = self._homes.get(name)
            if home is not None and home.shape == value.shape:
                value = home.copy_(value)
            elif home is None or len(home) != len(value):
                self._homes[name] = value
        super().__setattr__(name, value)

    def allocate(self, k: Tensor) -> None:
        """Make the tensors of an empty cache for tokens like k `[B, Hkv, T, D]`.

        Raises:
            ValueError: no step can run on their device, or writes these codecs' pages.
        """
        packing = self._packing_of(k)
        levels = (self.key.native_levels, self.value.native_levels)
        if reason := why_not(k.device, packing, levels):
            raise ValueError(f"a static cache {reason}")
        super().allocate(k)
        # properties that are computed once are computed here, where no compiler looks on
        form = self.format
        self._numbers = form.key.numbers, form.value.numbers, levels, form.key.layout

    def set_sequences(self, tables: Sequence[Sequence[int]], hot: Sequence[int]) -> None:
        self.pool.release([page for row in self._spare for page in row])
        shared = {page for row in tables for page in row}
        self.pool.reserve(len(shared) + sum(self.max_pages - len(row) for row in tables))
        self._spare = [self.pool.take(self.max_pages - len(row)) for row in tables]
        super().set_sequences(tables, hot)
        self.tickets = self.hot_len.new_zeros(len(tables), 2)

    def _table_rows(self) -> list[list[int]]:
        return [row + spare for row, spare in zip(self._tables, self._spare, strict=True)]

    def _take_pages(self, b: int, num_pages: int) -> list[int]:
        pages = self._spare[b][:num_pages]
        del self._spare[b][:num_pages]
        return pages

    def _refresh(self) -> None:
        """Lists as steps have left the tensors, which waits for the device.

        Raises:
            ValueError: a step found no room.
        """
        if self.is_empty:
            return
        packed, self._hot, refused = torch.stack(
            [self.packed_len, self.hot_len, self.tickets[:, 1]]
        ).tolist()
        if any(refused):
            raise ValueError(
                f"steps went {max(refused)} tokens beyond the room for {self.max_tokens}, and those are "
                "lost; make the cache anew with more max_tokens"
            )
        for b, tokens in enumerate(packed):
            filled = tokens // self.page_size - len(self._tables[b])
            self._tables[b] += self._take_pages(b, filled)

    # --- growing -------------------------------------------------------------------------------

    def step(self, k: Tensor, v: Tensor) -> None:
        """Add tokens `[B, Hkv, T, D]` to every sequence: on a GPU one kernel, and nothing is read back.

        A page that became due with the step before is packed first, so that attention sees what it sees
        between `stage` and `commit`. Lengths advance on the device: replayed as a CUDA graph, the step
        serves any length. Tokens beyond `max_tokens` may find no room: they are not stored then, and the
        next operation of the host says so.

        Raises:
            ValueError: tokens that do not fit, or more than `step_tokens`; nothing is changed.
        """
        if self.is_empty:
            self.allocate(k)
        check_tokens(k, v, None, self.hot_k)
        if k.shape[2] > self.step_tokens:
            raise ValueError(
                f"a step of {k.shape[2]} tokens is longer than step_tokens {self.step_tokens}; "
                "append them instead, or make the cache with more"
            )
        append(
            k,
            v,
            self.pool.data,
            self.block_table,
            self.packed_len,
            self.hot_k,
            self.hot_v,
            self.hot_len,
            self.tickets,
            *self._numbers,
            self.num_sink_tokens,
            self.hot_capacity,
        )

    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        self._check_room(k, real)
        super().append(k, v, real)

    def stage(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        self._check_room(k, real)
        super().stage(k, v, real)

    def _check_room(self, k: Tensor, real: Tensor | None) -> None:
        count = k.shape[2] if real is None else int(real.sum(1).max())
        longest = max(self.lengths, default=0) + count
        if longest > self.max_tokens:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than max_tokens {self.max_tokens}; "
                "make the cache with more"
            )

    # --- reading -------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step or attention names: they stay where they are while the batch does."""
        return [self.pool.data, *(getattr(self, name) for name in _FIXED)]

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.is_empty else self.tickets.nbytes)

    @property
    def num_pages(self) -> int:
        return self.pool.num_used - sum(map(len, self._spare))
