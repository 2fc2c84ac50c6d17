"""Memory for a pool of pages: on a CPU in huge pages of 2 MB, where the system has them.

Attention reads a pool once from end to end. In memory pages of 4 KB it waits for the address translation
and loses the hardware prefetcher at every end; in pages of 2 MB it is a tenth faster.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_HUGE = 2**21


def is_lazy(nbytes: int, device: torch.device) -> bool:
    """Whether memory of `empty_bytes` costs nothing until it is touched."""
    return device.type == "cpu" and nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE")  # Linux


def empty_bytes(shape: Sequence[int], device: torch.device) -> Tensor:
    """An uninitialised uint8 tensor."""
    size = math.prod(shape)
    if not is_lazy(size, device):
        return torch.empty(shape, dtype=torch.uint8, device=device)
    # its own mapping: the allocator's memory may have been touched already. The part before the first
    # huge page is never touched, and so costs nothing
    mapping = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE, start, size // _HUGE * _HUGE)
    return whole[start : start + size].view(tuple(shape))
