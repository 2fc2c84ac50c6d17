"""Memory for a pool of pages, and small numbers on their way to a device.

On a CPU a pool lies in huge pages of 2 MB, where the system has them: attention reads it once from end
to end. In memory pages of 4 KB it waits for the address translation and loses the hardware prefetcher at
every end; in pages of 2 MB it is a tenth faster.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

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


def integers(values: Sequence[Any], device: torch.device) -> Tensor:
    """int32 on a device, queued behind the work under way: nobody waits for it."""
    numbers = torch.tensor(values, dtype=torch.int32)
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)
