"""Attention on GPUs by Triton kernels, as the operator `bitkv::triton_attend`.

Tokens are shared out among programs (split-KV) and their results merged by log-sum-exp. Lengths stay on
the device: the number of programs follows from shapes alone, so a captured graph stays valid while
sequences grow. The kernels are in `triton_kernels`, which is imported with the first call.
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from math import e, log2
from typing import NamedTuple

import torch
from torch import Tensor

from bitkv.attention.base import EVERY_TOKEN, AttentionRequest, Backend
from bitkv.attention.tiling import HOT_TOKENS, Variant
from bitkv.pages import RAW_DTYPES, AffineFormat, PageFormat
from bitkv.view import CacheView

_DTYPES = tuple(RAW_DTYPES.values())
_MERGED_CHANNELS, _MERGED_SPLITS = 32, 64  # of a program that merges


class Queries(NamedTuple):
    """Queries `[B, Hq, Tq, D]`, Hq = Hkv * ratio, and the last token each sees, `[B, Tq]`."""

    q: Tensor
    positions: Tensor
    stride_b: int
    stride_h: int
    stride_t: int
    last_stride_b: int
    last_stride_t: int
    ratio: int
    length: int


class Cache(NamedTuple):
    """Tensors as in `CacheView`; strides of the hot window in elements."""

    pages: Tensor
    block_table: Tensor
    packed_len: Tensor
    hot_k: Tensor
    hot_v: Tensor
    hot_len: Tensor
    kv_heads: int
    table_width: int
    stride_b: int
    stride_h: int
    sinks: int


class Score(NamedTuple):
    """The factor that takes inner products to scores of base 2, window and softcap."""

    factor: float
    softcap: float
    window: int


class Result(NamedTuple):
    """Where splits put `[splits, rows, D]` and `[splits, rows]`, rows as in `[B, Hq, Tq]`."""

    out: Tensor
    lse: Tensor
    rows: int


class Launch(NamedTuple):
    """Queries of a program, rows of its tiles of codes, its warps and stages; programs a processor."""

    columns: int
    tile: int
    warps: int
    stages: int
    programs: int


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units."""
    if device.type == "cpu":
        return 1  # of an imaginary GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch_of(form: PageFormat, rows: int, *, amd: bool = False) -> Launch:
    """Parameters for `rows` queries that share a KV head.

    Few queries leave tensor cores idle whatever one does: what counts is instructions, and programs of
    one warp need the fewest, without barriers and without an exchange of weights between warps. They
    take tiles that leave them registers. Unquantized pages and many queries need more warps.
    """
    columns = min(max(1 << (rows - 1).bit_length(), 16 if amd else 8), 32)
    key, value = form.affine
    if key.is_raw or value.is_raw:
        return Launch(columns, 128, 4, 1, 3)
    if columns > 16:
        return Launch(columns, 128, 4, 2, 2)
    bits = max(key.bits, value.bits)
    if columns * form.head_dim > 1024 or bits > 4:
        return Launch(columns, 32, 2 if form.head_dim <= 128 else 4, 2, 4)
    return Launch(columns, 32 if bits <= 2 else 16, 1, 2, 8)


def splits_of(grid: int, max_pages: int, hot_capacity: int, slots: int) -> int:
    """Programs that share a sequence's tokens: as many as a device runs at once, none without work."""
    return max(1, min(slots // max(grid, 1), max(max_pages, -(-hot_capacity // HOT_TOKENS))))


def _attend(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    packed_len: Tensor,
    hot_k: Tensor,
    hot_v: Tensor,
    hot_len: Tensor,
    positions: Tensor | None,
    key: Sequence[int],
    value: Sequence[int],
    num_sink_tokens: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of `q` `[B, Hq, Tq, D]`; arguments as in `AttentionRequest.operands`."""
    q = q if q.stride(3) == 1 else q.contiguous()
    pages = pages.contiguous()
    block_table, packed_len, hot_len = (x.contiguous() for x in (block_table, packed_len, hot_len))
    if hot_k.stride() != hot_v.stride() or hot_k.stride()[2:] != (q.shape[3], 1):
        hot_k, hot_v = hot_k.contiguous(), hot_v.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    last = hot_len.unsqueeze(1) if positions is None else positions  # where it is None, nobody looks
    queries = Queries(
        *(q, last, q.stride(0), q.stride(1), q.stride(2), last.stride(0), last.stride(1)),
        *(q.shape[1] // hot_k.shape[1], q.shape[2]),
    )
    cache = Cache(
        *(pages, block_table, packed_len, hot_k, hot_v, hot_len),
        *(hot_k.shape[1], block_table.shape[1], *hot_k.stride()[:2], num_sink_tokens),
    )
    if lse.numel():
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            form = PageFormat.of_numbers(tuple(key), tuple(value))
            score = Score(scale * log2(e), softcap, window)
            _launch(form, queries, cache, score, Result(out, lse, lse.numel()), positions is None)
    return out, lse


def _launch(
    form: PageFormat, queries: Queries, cache: Cache, score: Score, result: Result, causal: bool
) -> None:
    """Run the kernels; with one split the first one writes the result itself."""
    from bitkv.attention import triton_kernels as kernels

    q, amd = queries.q, torch.version.hip is not None
    columns = queries.ratio * queries.length
    chosen = launch_of(form, columns, amd=amd)
    grid = cache.kv_heads * -(-columns // chosen.columns), q.shape[0]
    slots = _processors(q.device) * chosen.programs
    splits = splits_of(grid[0] * grid[1], cache.table_width, cache.hot_k.shape[2], slots)
    variant = Variant.of(
        form,
        chosen.tile,
        chosen.columns,
        causal=causal,
        window=score.window < EVERY_TOKEN,
        softcap=score.softcap > 0,
        assembly=q.is_cuda and not amd,
        interpreted=interpreted(),
    )
    parts = result
    if splits > 1:
        out = q.new_empty(splits, result.rows, form.head_dim, dtype=torch.float32)
        parts = Result(out, q.new_empty(out.shape[:2], dtype=torch.float32), result.rows)
    kernels.attend_kernel[splits, *grid](
        queries,
        cache,
        score,
        parts,
        variant,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        enable_fp_fusion=True,
    )
    if splits > 1:
        blocks = -(-form.head_dim // _MERGED_CHANNELS)
        block = _MERGED_CHANNELS, _MERGED_SPLITS
        kernels.merge_kernel[result.rows, blocks](parts, result, splits, *block, variant)


triton_attend = torch.library.custom_op("bitkv::triton_attend", _attend, mutates_args=())


@triton_attend.register_fake
def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def attend(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Softmax attention with sums in float32; see `Backend.run`."""
    # the operator's dispatch in Python takes longer than launching a kernel
    plain = type(request.q) is Tensor and not torch.compiler.is_compiling()
    ordered = replace(request, view=request.view.in_order())
    return (_attend if plain else triton_attend)(*ordered.operands)


def _refuse(request: AttentionRequest) -> str | None:
    q, view = request.q, request.view
    if q.device.type != "cuda" and not (q.device.type == "cpu" and interpreted()):
        return f"it got tensors on {q.device}, and takes tensors on a CUDA device"
    if find_spec("triton") is None:
        return "it needs the package triton, which is not installed"
    for x in (q, view.hot_k):
        if x.dtype not in _DTYPES:
            return f"it got {x.dtype}, and takes float16, bfloat16 and float32"
    return _refuse_format(view)


def _refuse_format(view: CacheView) -> str | None:
    form = view.format
    if not (view.key.is_plain and view.value.is_plain):
        return "it got codes of a codebook or of transformed tokens, and takes scales and zero points"
    for part in (form.key, form.value):
        if not isinstance(part, AffineFormat):
            return f"it got a {type(part).__name__}, and takes scales and zero points"
    if form.layout != "strided":
        return f"it got pages of the layout {form.layout!r}, and takes 'strided'"
    if form.head_dim > 256:
        return f"it got head_dim {form.head_dim}, and takes at most 256"
    return None


BACKEND = Backend("triton", attend, _refuse)
