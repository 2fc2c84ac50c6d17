"""A pool of equal pages with reference counts."""

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from bitkv.memory import empty_bytes, is_lazy

_SLACK = 4  # grows by a quarter: doubling would leave half of a long prompt's memory unused
_ROOM = 4  # times what is needed, where memory that is never touched costs nothing


class PagePool:
    """Pages of one layer: uint8 `[num_pages, Hkv, page_bytes]`.

    A page is written once and never changed, so sequences that share a prefix share its pages. The pool
    grows geometrically, into room behind it where there is some, else by copying bytes as they are.
    """

    def __init__(self, num_heads: int, page_bytes: int, device: torch.device) -> None:
        self._memory = empty_bytes((0, num_heads, page_bytes), device)
        self.data = self._memory
        self._references: list[int] = []
        self._free: list[int] = []

    @property
    def num_used(self) -> int:
        """Pages that a sequence owns."""
        return len(self._references) - len(self._free)

    @property
    def nbytes(self) -> int:
        """Allocated bytes, free pages included."""
        return self.data.nbytes

    def references(self, page: int) -> int:
        """How many block-table entries name this page."""
        return self._references[page]

    def take(self, num_pages: int) -> list[int]:
        """The indices of free pages, now with one reference each; whoever takes them writes them."""
        self.make_room(num_pages)
        indices = [self._free.pop() for _ in range(num_pages)]
        for index in indices:
            self._references[index] = 1
        return indices

    def store(self, pages: Tensor) -> list[int]:
        """Copy `[n, Hkv, page_bytes]` into free pages, each with one reference; their indices."""
        indices = self.take(len(pages))
        self.data[torch.tensor(indices, device=self.data.device)] = pages
        return indices

    def make_room(self, num_pages: int) -> None:
        """Have this many free pages: exactly so for a first prompt, with slack after that."""
        missing, total = num_pages - len(self._free), len(self._references)
        if missing > 0:
            self.reserve(total + max(missing, total // _SLACK))

    def reserve(self, num_pages: int) -> None:
        """Make room for `num_pages` in all; never shrinks."""
        old = len(self._references)
        if num_pages <= old:
            return
        if num_pages > len(self._memory):
            self._move(num_pages)
        self.data = self._memory[:num_pages]
        self._references += [0] * (num_pages - old)
        # popped from the end: pages are handed out in ascending order
        self._free = [*reversed(range(old, num_pages)), *self._free]

    def _move(self, num_pages: int) -> None:
        page, device = self.data.shape[1:], self.data.device
        room = _ROOM * num_pages if is_lazy(num_pages * page.numel(), device) else num_pages
        try:
            memory = empty_bytes((room, *page), device)
        except OSError:  # more than the system lends
            memory = empty_bytes((num_pages, *page), device)
        memory[: len(self.data)] = self.data
        self._memory = memory

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Without the room, which a copy of the tensor would fill."""
        other = type(self)(self.data.shape[1], self.data.shape[2], self.data.device)
        other.reserve(len(self.data))
        other.data.copy_(self.data)
        other._references, other._free = [*self._references], [*self._free]
        return other

    def acquire(self, pages: list[int]) -> None:
        """One more reference to each page named, once per mention."""
        for page in pages:
            self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """One reference fewer to each page named; a page without any is free."""
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)


def runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours that count up by one, as first number and length."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], i - start
            start = i
