"""Where the tokens of unfinished blocks are kept.

vLLM owns blocks, not sequences, and says nothing when a request ends, is preempted or aborted. So a
block that is not full has a slot of 16-bit tokens under its number:

* A request that begins a block takes a slot for it, or the one that an earlier owner of the block left:
  tokens are written from the block's first one on, so nothing of that owner is ever read.
* A block that is full is packed, and its slot is free.
* Blocks whose requests have ended keep slots until these are needed; then the one that was used
  longest ago goes. It cannot be that of a request still running: vLLM serves running requests in their
  order, so whoever waits does so behind older requests, of which there are fewer than `max_num_seqs`.

Full blocks alone are shared between requests, and they have no slot: prefix caching meets packed ones.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class StaleSlot(RuntimeError):
    """A block's tokens are not where they should be: a defect, for which no answer must be given."""


class Tails:
    """Slots of unfinished blocks.

    Args:
        slots: how many there are; one for each request that can run at once.
        page_size: tokens of a block.
    """

    def __init__(self, slots: int, page_size: int) -> None:
        self.page_size = page_size
        # of a block its slot and how many tokens it holds; the one used longest ago first
        self._held: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._free = list(range(slots))[::-1]
        self._used: set[int] = set()  # blocks of the present step
        self._leaving: list[int] = []  # slots that are free when it is over

    def begin_step(self, blocks: Iterable[int]) -> None:
        """What the step before gave up may be taken now, and nothing of the blocks that this one has."""
        self._free += self._leaving
        self._leaving, self._used = [], set(blocks)

    def advance(self, blocks: Sequence[int], start: int, stop: int) -> int:
        """The slot of a request that goes from token `start` to `stop` of its sequence.

        Args:
            blocks: those of these tokens, in order.

        Raises:
            StaleSlot: the first block should hold tokens already, and does not.
        """
        begun, left = start % self.page_size, stop % self.page_size
        held = self._held.pop(blocks[0], None)
        if begun and (held is None or held[1] != begun):
            found = "none" if held is None else str(held[1])
            raise StaleSlot(f"block {blocks[0]} should hold {begun} tokens and holds {found}")
        for block in blocks[1:]:  # which requests that ended may have left
            self._drop(block)
        slot = self._take() if held is None else held[0]
        if left:
            self._held[blocks[-1]] = slot, left
            self._used.add(blocks[-1])
        else:
            self._leaving.append(slot)
        return slot

    def check(self) -> None:
        """Raise unless every slot is free, leaving or held, once, and every held block is unfinished.

        Raises:
            StaleSlot: with what is wrong.
        """
        slots = [*self._free, *self._leaving, *(slot for slot, _ in self._held.values())]
        if len(set(slots)) != len(slots):
            raise StaleSlot("a slot is in two places")
        for block, (_, count) in self._held.items():
            if not 0 < count < self.page_size:
                raise StaleSlot(f"block {block} holds {count} tokens of a page of {self.page_size}")

    def _drop(self, block: int) -> None:
        held = self._held.pop(block, None)
        if held is not None:
            self._leaving.append(held[0])

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        for block, (slot, _) in self._held.items():
            if block not in self._used:
                del self._held[block]
                return slot
        raise StaleSlot(f"no slot is left for the {len(self._used)} blocks of this step")
