"""Attention on CPUs by the native kernels of bitkv/csrc, as the operator `bitkv::cpu_attend`.

The kernels read pages as they lie in memory: codes meet queries and probabilities in integer dot
products, and scales are folded into those once a group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitkv import native
from bitkv.attention.base import AttentionRequest, Backend
from bitkv.pages import LANES, AffineFormat
from bitkv.view import CacheView

_LARGEST_HEAD_DIM = 256


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
    """Output and log-sum-exp of queries `[B, Hq, Tq, D]`; arguments as in `AttentionRequest.operands`.

    Raises:
        ValueError: a length or a page number that leads outside its tensor.
    """
    q, pages = _plain(q, q.dtype), _plain(pages, torch.uint8)
    block_table, packed_len, hot_len = (
        _plain(x, torch.int32) for x in (block_table, packed_len, hot_len)
    )
    if positions is not None:
        positions = _plain(positions, torch.int64)
    if hot_k.stride() != hot_v.stride() or hot_k.stride()[2:] != (q.shape[3], 1):
        hot_k, hot_v = hot_k.contiguous(), hot_v.contiguous()
    batch, heads, queries, head_dim = q.shape
    _, kv_heads, capacity, _ = hot_k.shape
    out, lse = torch.empty_like(q), torch.empty(batch, heads, queries, dtype=torch.float32)
    last_seen = 0 if positions is None else positions.data_ptr()
    tensors = (q.data_ptr(), out.data_ptr(), lse.data_ptr(), last_seen)
    hot = (hot_k.data_ptr(), hot_v.data_ptr(), hot_len.data_ptr(), native.DTYPES[hot_k.dtype])
    native.module().attend(
        native.isa(),
        (*tensors, native.DTYPES[q.dtype]),
        (batch, heads, kv_heads, queries, head_dim),
        (tuple(key), tuple(value)),
        (pages.data_ptr(), pages.shape[0], key[1]),  # keys have a row for each token of a page
        (block_table.data_ptr(), block_table.shape[1], packed_len.data_ptr()),
        (*hot, capacity, *hot_k.stride()[:2], num_sink_tokens),
        (scale, window, softcap),
        torch.get_num_threads(),
    )
    return out, lse


def _plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor contiguous and in this dtype; torch is asked only for what must change."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


cpu_attend = torch.library.custom_op("bitkv::cpu_attend", _attend, mutates_args=(), device_types="cpu")


@cpu_attend.register_fake
def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def attend(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Softmax attention with sums in float32; see `Backend.run`."""
    # the operator's dispatch in Python takes longer than attention over a short context
    plain = type(request.q) is Tensor and not torch.compiler.is_compiling()
    return (_attend if plain else cpu_attend)(*request.operands)


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
    if not (view.key.is_plain and view.value.is_plain):
        return "it got codes of a codebook or of transformed tokens, and takes scales and zero points"
    if form.layout != "lanes":
        return f"it got pages of the layout {form.layout!r}, and takes 'lanes'"
    if form.head_dim > _LARGEST_HEAD_DIM:
        return f"it got head_dim {form.head_dim}, and takes at most {_LARGEST_HEAD_DIM}"
    for part in (form.key, form.value):
        if not isinstance(part, AffineFormat):
            return f"it got a {type(part).__name__}, and takes scales and zero points"
        if part.group_size % LANES:
            return f"it got groups of {part.group_size}, and takes multiples of {LANES}"
    return None


BACKEND = Backend("cpu", attend, _refuse)
