"""The peak memory of a stretch of a program: of this process, or of a CUDA device.

On Linux the kernel keeps the high-water mark of resident memory and can be told to start anew; elsewhere
a thread samples. The marks are as honest as the allocator, hence `process.RETURN_FREED_MEMORY`.
"""

import contextlib
import ctypes
import gc
import threading
from pathlib import Path
from typing import Protocol

import psutil
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SAMPLING_SECONDS = 0.001


class PeakMemory(Protocol):
    """`reset` starts a stretch; `read` gives its peak in bytes since then."""

    def reset(self) -> None: ...

    def read(self) -> int: ...


def peak_memory(device: torch.device) -> PeakMemory:
    """What measures peaks best for a program that computes on this device."""
    if device.type == "cuda":
        return _CudaPeak(device)
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        return _KernelPeak()
    except OSError:
        return _SampledPeak()


def keep_freed_memory() -> None:
    """Give glibc the thresholds that it grows to by itself in a program with large blocks.

    A process started with `process.RETURN_FREED_MEMORY` calls it before it takes times: to map and
    unmap each block costs time that no ordinary program spends.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def _collect() -> None:
    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class _CudaPeak:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


class _KernelPeak:
    def reset(self) -> None:
        _collect()
        _CLEAR_REFS.write_text(_RESET_PEAK)

    def read(self) -> int:
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


class _SampledPeak:
    def __init__(self) -> None:
        self._process = psutil.Process()
        self._peak = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def reset(self) -> None:
        _collect()
        self._peak = self._process.memory_info().rss

    def read(self) -> int:
        return max(self._peak, self._process.memory_info().rss)

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(_SAMPLING_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)
