"""A pool of equal pages with reference counts."""

import torch
from torch import Tensor

from bitkv.memory import empty_bytes

_SLACK = 4  # grows by a quarter: doubling would leave half of a long prompt's memory unused


class PagePool:
    """Pages of one layer: uint8 `[num_pages, Hkv, page_bytes]`.

    A page is written once and never changed, so sequences that share a prefix share its pages. The pool
    grows geometrically and copies bytes as they are.
    """

    def __init__(self, num_heads: int, page_bytes: int, device: torch.device) -> None:
        self.data = empty_bytes((0, num_heads, page_bytes), device)
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
        grown = empty_bytes((num_pages, *self.data.shape[1:]), self.data.device)
        grown[:old] = self.data
        self.data = grown
        self._references += [0] * (num_pages - old)
        # popped from the end: pages are handed out in ascending order
        self._free = [*reversed(range(old, num_pages)), *self._free]

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
