"""The rate at which memory can be read: the ceiling of decode attention."""

from functools import cache, partial

import torch

from bitkv.benchmark.timing import Effort, durations
from bitkv.memory import empty_bytes

BUFFER_BYTES = 512 << 20


def read_bandwidth(effort: Effort, nbytes: int = BUFFER_BYTES, *, huge_pages: bool = False) -> float:
    """GB/s of the fastest plain reduction over a buffer larger than any cache, with torch's threads.

    The best repeat counts, not the median: this is a ceiling.

    Args:
        huge_pages: read memory like that of a pool of pages; otherwise like that of any tensor.
    """
    buffer = _buffer(nbytes, huge_pages)
    reductions = (partial(torch.amax, buffer), partial(torch.sum, buffer))
    fastest = min(min(durations([reduction], effort)) for reduction in reductions)
    return buffer.nbytes / fastest / 1e6


@cache
def _buffer(nbytes: int, huge_pages: bool) -> torch.Tensor:
    if huge_pages:
        buffer = empty_bytes((nbytes,), torch.device("cpu")).view(torch.float32)
    else:
        buffer = torch.empty(nbytes // 4)
    return buffer.fill_(1)  # written, so that every page is its own memory
