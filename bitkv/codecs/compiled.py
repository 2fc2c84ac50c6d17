"""Quantize and pack by a kernel, where there is one: native on a CPU, Triton on a GPU."""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bitkv import native
from bitkv.pages import LANES, RAW_DTYPES, AffineFormat


def encode_natively(x: Tensor, form: Any, levels: int | None, out: Tensor) -> bool:
    """Write pages `x` `[n, H, page_size, head_dim]` as bytes `[n, H, nbytes]`; False if it cannot."""
    if levels is None or not isinstance(form, AffineFormat) or not _fits(x, form, out):
        return False
    if x.is_cuda:
        return form.layout == "strided" and _encode_on_gpu(x, form, levels, out)
    return form.layout == "lanes" and _encode_on_cpu(x, form, levels, out)


def _encode_on_cpu(x: Tensor, form: AffineFormat, levels: int, out: Tensor) -> bool:
    if native.why_not() or not (form.is_raw or form.group_size % LANES == 0):
        return False
    pages, heads, page_size, head_dim = x.shape
    native.module().encode(
        native.isa(),
        x.data_ptr(),
        native.DTYPES[x.dtype],
        x.stride()[:3],
        (pages, heads, page_size, head_dim),
        form.numbers,
        form.site == "key",
        levels,
        out.data_ptr(),
        out.stride()[:2],
        torch.get_num_threads(),
    )
    return True


def _encode_on_gpu(x: Tensor, form: AffineFormat, levels: int, out: Tensor) -> bool:
    if (kernels := _triton()) is not None:
        kernels.encode(x, form, levels, out)
    return kernels is not None


@cache
def _triton() -> ModuleType | None:
    """The kernels in Triton; None where it is not installed."""
    try:
        from bitkv.codecs import triton
    except ImportError:
        return None
    return triton


def _fits(x: Tensor, form: AffineFormat, out: Tensor) -> bool:
    known = not form.is_raw or x.dtype == RAW_DTYPES[form.dtype]
    one_device = x.device == out.device and x.device.type in ("cpu", "cuda")
    return known and one_device and x.dtype in native.DTYPES and x.stride(3) == 1 and out.stride(2) == 1
