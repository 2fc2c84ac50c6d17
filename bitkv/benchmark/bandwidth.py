"""The rate at which memory can be read: the ceiling of decode attention."""

from functools import partial

import torch

from bitkv.benchmark.timing import Effort, durations

BUFFER_BYTES = 512 << 20


def read_bandwidth(effort: Effort, nbytes: int = BUFFER_BYTES) -> float:
    """GB/s of the fastest plain reduction over a buffer larger than any cache, with torch's threads.

    The best repeat counts, not the median: this is a ceiling.
    """
    buffer = torch.ones(nbytes // 4)  # written, so that every page is its own memory
    reductions = (partial(torch.amax, buffer), partial(torch.sum, buffer))
    fastest = min(min(durations([reduction], effort)) for reduction in reductions)
    return buffer.nbytes / fastest / 1e6
