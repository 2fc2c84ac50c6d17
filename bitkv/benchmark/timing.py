"""How long calls take, with data coming from memory and not from the last-level cache."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch

Call = Callable[[], object]

_L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_L3_FALLBACK = 32 << 20
_MAX_COPIES = 128


@dataclass(frozen=True)
class Effort:
    """When to stop repeating: once there were `repeats` calls and `seconds` went by, or at `limit`."""

    repeats: int
    seconds: float
    limit: float = float("inf")


FULL = Effort(repeats=5, seconds=1.0, limit=10.0)
QUICK = Effort(repeats=3, seconds=0.2, limit=2.0)
WARM_UP = 2


def durations(calls: Iterable[Call], effort: Effort) -> list[float]:
    """Milliseconds of each call, taken in turn; the first `WARM_UP` are not counted."""
    turns = cycle(calls)
    for call in islice(turns, WARM_UP):
        call()
    times: list[float] = []
    begin = time.perf_counter()
    for call in turns:
        start = time.perf_counter()
        call()
        stop = time.perf_counter()
        times.append(1000 * (stop - start))
        enough = len(times) >= effort.repeats and stop - begin >= effort.seconds
        if enough or stop - begin >= effort.limit:
            break
    return times


def median_ms(calls: Sequence[Call], effort: Effort) -> float:
    """Median milliseconds of a call."""
    return median(durations(calls, effort))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads within this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def evict() -> None:
    """Read other memory until nothing that came before is left in the L3 cache."""
    torch.sum(_other_memory())


@cache
def _other_memory() -> torch.Tensor:
    return torch.ones(2 * last_level_cache() // 4)


def cold_copies(nbytes: int) -> int:
    """How many copies of a working set to rotate between so that none is found in the L3 cache.

    Together they fill it twice; at most 128, so a working set under 1/64 of the L3 may stay in it.
    """
    return max(1, min(_MAX_COPIES, -(-2 * last_level_cache() // nbytes)))


def last_level_cache() -> int:
    """Bytes of the L3 cache; 32 MB where the system does not say."""
    try:
        return int(_L3.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return _L3_FALLBACK
