"""The compiled kernels `bitkv._native`: loaded on first use, for one instruction set of this CPU.

The environment variable BITKV_CPU_ISA, read on first use, names another instruction set than the best.
"""

import os
from collections.abc import MutableMapping
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_MOST_ENTRIES, _LANES = 256, 16  # of a table; numbers in a vector

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""The numbers of dtypes that kernels take: `DType` in csrc/page.h."""


@cache
def _load() -> ModuleType | str:
    """The module, or why there is none."""
    try:
        return import_module("bitkv._native")
    except ModuleNotFoundError:
        reason = "are not built"
    except ImportError as error:
        reason = f"do not load ({error})"
    return (
        f"the native kernels {reason}; install a C++ compiler (Debian: apt install g++) "
        "and reinstall bitkv"
    )


def why_not() -> str | None:
    """Why no kernel can run, with the remedy; None if one can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def module() -> ModuleType:
    """`bitkv._native`, whose functions bitkv/_native.pyi describes.

    Raises:
        ValueError: it is not built.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise ValueError(loaded)
    return loaded


@cache
def isa() -> str:
    """The instruction set in use: the first argument of every kernel.

    Raises:
        ValueError: no kernel can run, or BITKV_CPU_ISA names an instruction set this CPU lacks.
    """
    choices: list[str] = module().isas()
    asked = os.environ.get("BITKV_CPU_ISA", choices[0])
    if asked not in choices:
        raise ValueError(
            f"BITKV_CPU_ISA={asked} is not an instruction set of this CPU; "
            f"choose from {', '.join(choices)}, or unset it"
        )
    return asked


def nearest(x: Tensor, codebook: Tensor) -> Tensor | None:
    """int32 `[G, N]`, for each point of `x` `[G, N, c]` the closest of `codebook` `[G, E, c]`, the first
    of several; None where no kernel can say.
    """
    if x.device.type != "cpu" or codebook.device.type != "cpu" or why_not():
        return None
    x, codebook = x.float().contiguous(), codebook.float().contiguous()
    groups, points, channels = x.shape
    out = torch.empty(groups, points, dtype=torch.int32)
    module().nearest(
        isa(),
        x.data_ptr(),
        codebook.data_ptr(),
        out.data_ptr(),
        (groups, points, channels, codebook.shape[1]),
        torch.get_num_threads(),
    )
    return out


_tables: MutableMapping[Tensor, dict[tuple[object, ...], Tensor | None]] = WeakIdKeyDictionary()


def tables(codebook: Tensor, width: int, inv_freq: Tensor | None, *, values: bool) -> Tensor | None:
    """What kernels look codes up in, made of a codebook `[H, groups, entries, channels]` on first use.

    Args:
        width: numbers of a token that the groups cover.
        inv_freq: of the rotary embedding that keys lack.
        values: for values, else for keys.

    Returns:
        Bytes, kept as long as the codebook; None where codes become float32 instead.
    """
    pairs = 0 if inv_freq is None else inv_freq.shape[0]
    if codebook.shape[2] > _MOST_ENTRIES or (pairs and (2 * pairs != width or pairs % _LANES)):
        return None
    kind = 0 if values else 2 if pairs else 1
    # tensors made in inference mode count no versions, nor does anyone change a layer's codebook
    version = 0 if codebook.is_inference() else codebook._version
    key = (isa(), version, width, kind)
    known = _tables.setdefault(codebook, {})
    if key not in known:
        known[key] = _tabulate(codebook.float().contiguous(), width, kind, pairs)
    return known[key]


def _tabulate(codebook: Tensor, width: int, kind: int, pairs: int) -> Tensor | None:
    shape = (codebook.data_ptr(), *codebook.shape)
    threads = torch.get_num_threads()
    size = module().tabulate(isa(), shape, width, kind, pairs, 0, threads)
    if not size:
        return None
    out = torch.empty(size, dtype=torch.uint8)
    module().tabulate(isa(), shape, width, kind, pairs, out.data_ptr(), threads)
    return out


def append(k: Tensor, v: Tensor, hot_k: Tensor, hot_v: Tensor, hot_len: Tensor, start: int) -> bool:
    """Put tokens `[B, H, T, D]` into a hot window from token `start` on; False if it cannot."""
    strides, hot_strides = k.stride(), hot_k.stride()
    alike = strides == v.stride() and hot_strides == hot_v.stride()
    if not alike or strides[3] != 1 or k.device.type != "cpu" or isinstance(_load(), str):
        return False
    batch, heads, count, head_dim = k.shape
    size = k.itemsize
    module().append(
        (hot_k.data_ptr(), hot_v.data_ptr(), hot_len.data_ptr()),
        (hot_strides[0] * size, hot_strides[1] * size, hot_strides[2] * size),
        (k.data_ptr(), v.data_ptr()),
        (strides[0] * size, strides[1] * size, strides[2] * size),
        (batch, heads, count, head_dim * size),
        start,
    )
    return True
