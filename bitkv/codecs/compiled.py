"""Quantize and pack by a kernel, where there is one: native on a CPU, Triton on a GPU."""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bitkv import native
from bitkv.pages import LANES, RAW_DTYPES, AffineFormat, CodebookFormat


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


def encode_codes_natively(x: Tensor, form: Any, codebook: Tensor, out: Tensor) -> bool:
    """Write the nearest entries for pages `x` `[n, H, page_size, W]`; False if it cannot.

    Args:
        codebook: `[H, groups, entries, channels]`, a 1 for H or groups serving all of them.
    """
    alike = x.device.type == out.device.type == codebook.device.type == "cpu"
    dense = x.stride(3) == out.stride(2) == 1 and x.dtype in native.DTYPES
    if not isinstance(form, CodebookFormat) or form.scales or form.width % LANES:
        return False
    if not (alike and dense) or native.why_not():
        return False
    codebook = codebook.float().contiguous()
    native.module().encode_codes(
        native.isa(),
        x.data_ptr(),
        native.DTYPES[x.dtype],
        x.stride()[:3],
        tuple(x.shape[:2]),
        form.numbers,
        (codebook.data_ptr(), *codebook.shape),
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
