"""What an attention mask says about a cache: which columns of a padded batch are real tokens."""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256


class Columns(NamedTuple):
    """What a mask says of new columns.

    Args:
        real: which are tokens, bool `[B, new]`; None if all are.
        last: the last token of its sequence that each of them sees, int64 `[B, new]`, -1 for padding;
            None if all are tokens and see as far as themselves.
    """

    real: Tensor | None = None
    last: Tensor | None = None


class MaskReader:
    """Reads each mask once, not once a layer: all layers of a model get the same tensor."""

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._length = 0
        self._read = Columns()

    def read(
        self,
        mask: Tensor | None,
        columns: Tensor | None,
        length: int,
        new: int,
        batch: int,
        *,
        as_masked: bool = False,
    ) -> Columns:
        """What a mask says of the `new` columns.

        Args:
            mask: bool (true: attend) or additive, `[B, 1, new, length]`, or wider, as for a static
                cache, with what lies beyond hidden; None is causal.
            columns: bool `[B, length - new]`, the earlier columns; None if all are real.
            as_masked: these are a prompt's first columns, and attend to one another as the mask says.
                Whatever comes after sees what the last one sees.

        Raises:
            ValueError: a mask by which a token sees others than those up to some place, which is its own
                or, as within an image, a later one; or that contradicts `columns`.
        """
        if mask is None:
            return Columns()
        if self._mask is None or self._mask() is not mask or self._length != length:
            self._read = _read(mask, columns, length, new, batch, as_masked)
            self._mask, self._length = weakref.ref(mask), length
        return self._read

    def check_step(self, mask: Tensor | None, lengths: Tensor) -> None:
        """Refuse the mask `[B, 1, 1, N]` of a step if it shows other than all tokens, `lengths` `[B]`.

        Raises:
            ValueError: it does.
        """
        if mask is None or (self._mask is not None and self._mask() is mask):
            return
        if not torch.equal(_allowed(mask, len(lengths), 1).sum((1, 2)), lengths.long()):
            raise ValueError(
                "every token of a step is real in a static cache, and this attention mask hides some "
                "or shows more; pass a 2D padding mask that keeps earlier columns, and ends with ones"
            )
        self._mask = weakref.ref(mask)


def _allowed(mask: Tensor, batch: int, new: int) -> Tensor:
    """What each query may see, bool `[B, new, N]`."""
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return allowed.expand(batch, 1, new, -1)[:, 0]


def _read(
    mask: Tensor, columns: Tensor | None, length: int, new: int, batch: int, as_masked: bool
) -> Columns:
    every = _allowed(mask, batch, new)
    allowed = every[..., :length]
    # the newest query sees every real column, so what it does not see is padding
    visible = allowed[:, -1]
    fits = (
        _is_last_widest(allowed, visible) if as_masked else _is_prefix(allowed, visible, columns, length)
    )
    if bool(every[..., length:].any()) or not fits:
        raise ValueError(
            "bitkv attends causally with padding only, and this attention mask asks for something "
            "else; pass a 2D padding mask that keeps earlier columns as they were"
        )
    real = visible[:, -new:]
    last = allowed.sum(-1) - 1
    if not bool(real.all()):
        return Columns(real, last.masked_fill(~real, -1))
    own = visible.cumsum(-1)[:, -new:] - 1
    return Columns(None, None if torch.equal(last, own) else last)


def _is_last_widest(allowed: Tensor, visible: Tensor) -> bool:
    """Whether no query of a real token sees what the last one does not."""
    hidden = ~visible[:, None]
    beyond = [(rows & hidden).any(-1) for rows in torch.split(allowed, _ROWS_AT_ONCE, dim=1)]
    return not bool((torch.cat(beyond, dim=1) & visible).any())


def _is_prefix(allowed: Tensor, visible: Tensor, columns: Tensor | None, length: int) -> bool:
    """Whether earlier columns are as they were, and each token sees the real ones up to some place not
    before its own.
    """
    new = allowed.shape[1]
    if allowed.shape[2] != length:
        return False
    old = visible[:, : length - new]
    if not torch.equal(old, torch.ones_like(old) if columns is None else columns):
        return False
    rank = visible.cumsum(-1)  # of real columns, from 1
    for start in range(0, new, _ROWS_AT_ONCE):
        rows = allowed[:, start : start + _ROWS_AT_ONCE]
        own = slice(length - new + start, length - new + start + rows.shape[1])
        reach = rows.sum(-1)
        expected = visible[:, None] & (rank[:, None] <= reach[..., None])
        fits = (rows == expected).all(-1) & (reach >= rank[:, own])
        if not bool((fits | ~visible[:, own]).all()):  # rows of padding queries may hold anything
            return False
    return True
