"""Attention on CPUs by the native kernels of bitkv/csrc, as the operator `bitkv::cpu_attend`.

The kernels read pages as they lie in memory: codes meet queries and probabilities in integer dot
products, and scales are folded into those once a group.
"""

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from bitkv import native
from bitkv.attention.base import AttentionRequest, Backend
from bitkv.pages import LANES, AffineFormat, CodebookFormat, PartFormat, Site
from bitkv.shared import Shared
from bitkv.view import CacheView

_LARGEST_HEAD_DIM, _LARGEST_WIDTH = 256, 512  # kColumns and kWidth in csrc/rows.h
_PAGE_SIZE_AT = {6: 1, 5: 3}  # in `AffineFormat.numbers` and `CodebookFormat.numbers`
_Numbers = tuple[tuple[int, ...], tuple[int, int, int], tuple[int, int, float], int]


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
    key_codebook: Tensor | None = None,
    key_restore: Tensor | None = None,
    inv_freq: Tensor | None = None,
    factor: float = 1.0,
    value_codebook: Tensor | None = None,
    value_restore: Tensor | None = None,
    hot_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries `[B, Hq, Tq, D]`; arguments as in `AttentionRequest.operands`,
    then `AttentionRequest.shared_operands` and `CacheView.hot_rows`.

    Raises:
        ValueError: a length or a page number that leads outside its tensor.
    """
    q, pages = _plain(q, q.dtype), _pages(pages)
    block_table, packed_len, hot_len = (
        _plain(x, torch.int32) for x in (block_table, packed_len, hot_len)
    )
    positions, hot_rows = _plain(positions, torch.int64), _plain(hot_rows, torch.int32)
    if hot_k.stride() != hot_v.stride() or hot_k.stride()[2:] != (q.shape[3], 1):
        hot_k, hot_v = hot_k.contiguous(), hot_v.contiguous()
    batch, heads, queries, head_dim = q.shape
    num_rows, kv_heads, capacity, _ = hot_k.shape
    key_shared = _Shared.of("key", q.shape[3], key_codebook, key_restore, inv_freq)
    value_shared = _Shared.of("value", q.shape[3], value_codebook, value_restore)
    page_size = key[_PAGE_SIZE_AT[len(key)]]
    out, lse = torch.empty_like(q), torch.empty(batch, heads, queries, dtype=torch.float32)
    hot = (*map(_address, (hot_k, hot_v, hot_len, hot_rows)), num_rows)
    native.module().attend(
        native.isa(),
        (*map(_address, (q, out, lse, positions)), native.DTYPES[q.dtype]),
        (batch, heads, kv_heads, queries, head_dim),
        (list(key), list(value)),
        (key_shared.numbers(factor), value_shared.numbers()),
        (pages.data_ptr(), pages.shape[0], pages.stride(1), page_size),
        (block_table.data_ptr(), block_table.shape[1], packed_len.data_ptr()),
        (*hot, native.DTYPES[hot_k.dtype], capacity, *hot_k.stride()[:2], num_sink_tokens),
        (scale, window, softcap),
        torch.get_num_threads(),
    )
    return out, lse


class _Shared(NamedTuple):
    """What pages share, as kernels read it: contiguous float32, or None."""

    codebook: Tensor | None = None
    restore: Tensor | None = None
    inv_freq: Tensor | None = None
    tables: Tensor | None = None

    @classmethod
    def of(
        cls,
        site: Site,
        head_dim: int,
        codebook: Tensor | None,
        restore: Tensor | None,
        inv_freq: Tensor | None = None,
    ) -> "_Shared":
        if codebook is None and restore is None and inv_freq is None:
            return _NOTHING
        tables = None
        if codebook is not None and (restore is None or inv_freq is None):
            width = head_dim if restore is None else restore.shape[2]
            tables = native.tables(codebook, width, inv_freq, values=site == "value")
        codebook, restore, inv_freq = (_plain(x, torch.float32) for x in (codebook, restore, inv_freq))
        return cls(codebook, restore, inv_freq, tables)

    def numbers(self, factor: float = 1.0) -> _Numbers:
        """The tensors' addresses and sizes, zeros for None."""
        codebook, restore, inv_freq, tables = self
        return (
            (0, 1, 1, 1, 1) if codebook is None else (codebook.data_ptr(), *codebook.shape),
            (0, 1, 0) if restore is None else (restore.data_ptr(), restore.shape[0], restore.shape[2]),
            (0, 0, factor) if inv_freq is None else (inv_freq.data_ptr(), inv_freq.shape[0], factor),
            0 if tables is None else tables.data_ptr(),
        )


_NOTHING = _Shared()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@overload
def _plain(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def _plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor contiguous and in this dtype; torch is asked only for what must change."""
    if x is None or (x.dtype == dtype and x.is_contiguous()):
        return x
    return x.to(dtype).contiguous()


def _pages(x: Tensor) -> Tensor:
    """Pages whose bytes are contiguous; those of heads may have room between them."""
    dense = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if dense and x.dtype == torch.uint8 else x.to(torch.uint8).contiguous()


cpu_attend = torch.library.custom_op("bitkv::cpu_attend", _attend, mutates_args=(), device_types="cpu")


@cpu_attend.register_fake
def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def attend(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Softmax attention with sums in float32; see `Backend.run`."""
    # the operator's dispatch in Python takes longer than attention over a short context
    plain = type(request.q) is Tensor and not torch.compiler.is_compiling()
    operands = (*request.operands, *request.shared_operands, request.view.hot_rows)
    return (_attend if plain else cpu_attend)(*operands)


def _refuse(request: AttentionRequest) -> str | None:
    q, view = request.q, request.view
    if q.device.type != "cpu":
        return f"it got tensors on {q.device}, and takes tensors on the CPU"
    return native.why_not() or _refuse_dtypes(q, view.hot_k) or _refuse_format(view)


def _refuse_dtypes(*tensors: Tensor) -> str | None:
    for x in tensors:
        if x.dtype not in native.DTYPES:
            return f"it got {x.dtype}, and takes float16, bfloat16 and float32"
    return None


def _refuse_format(view: CacheView) -> str | None:
    form = view.format
    if form.layout != "lanes":
        return f"it got pages of the layout {form.layout!r}, and takes 'lanes'"
    if form.head_dim > _LARGEST_HEAD_DIM:
        return f"it got head_dim {form.head_dim}, and takes at most {_LARGEST_HEAD_DIM}"
    pairs = 0 if view.key.rope is None else 2 * view.key.rope.inv_freq.shape[0]
    if pairs > form.head_dim:
        return f"it got a rotary embedding of {pairs} channels, and takes at most {form.head_dim}"
    return _refuse_part(form.key, view.key) or _refuse_part(form.value, view.value)


def _refuse_part(part: PartFormat, shared: Shared) -> str | None:
    width = part.head_dim if shared.restore is None else shared.restore.shape[2]
    if isinstance(part, AffineFormat):
        if part.group_size % LANES:
            return f"it got groups of {part.group_size}, and takes multiples of {LANES}"
        held = part.head_dim
    elif isinstance(part, CodebookFormat):
        held = part.width
    else:
        return f"it got a {type(part).__name__}, and takes affine codes and codebooks"
    if width != held:
        return f"it got a linear map of {width} numbers over pages of {held}, and takes as many of both"
    if width % LANES or width > _LARGEST_WIDTH:
        limits = f"multiples of {LANES} up to {_LARGEST_WIDTH}"
        return f"it got {width} numbers of a token, and takes {limits}"
    return None


BACKEND = Backend("cpu", attend, _refuse)
