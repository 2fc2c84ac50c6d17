"""Quantize and pack by a native kernel, where there is one."""

import torch
from torch import Tensor

from bitkv import native
from bitkv.pages import LANES, RAW_DTYPES, PartFormat


def encode_natively(x: Tensor, form: PartFormat, levels: int | None, out: Tensor) -> bool:
    """Write pages `x` `[n, H, page_size, head_dim]` as bytes `[n, H, nbytes]`; False if it cannot."""
    if levels is None or form.layout != "lanes" or not _fits(x, form, out) or native.why_not():
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


def _fits(x: Tensor, form: PartFormat, out: Tensor) -> bool:
    known = x.dtype == RAW_DTYPES[form.dtype] if form.is_raw else not form.group_size % LANES
    on_cpu = x.device.type == out.device.type == "cpu"
    return known and on_cpu and x.dtype in native.DTYPES and x.stride(3) == 1 and out.stride(2) == 1
