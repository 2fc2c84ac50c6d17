"""Attention over pages in plain torch: the definition every other backend is held to.

Tiles of a few pages are dequantized to float32, used and dropped (online softmax), so that the whole
cache never exists in 16 bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bitkv.attention.base import AttentionRequest, Backend
from bitkv.view import CacheView

_TOKENS_PER_TILE = 1024
_QUERIES_PER_TILE = 128


def attend(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Softmax attention with float32 inside; see `Backend.run`."""
    q, view = request.q, request.view.in_order()
    batch, heads, num_queries, _ = q.shape
    kv_heads = view.hot_k.shape[1]
    # query heads that share a KV head become rows of one matrix
    grouped = torch.unflatten(q.float() * request.scale, 1, (kv_heads, heads // kv_heads))
    shape = grouped.shape[:-1]
    high = grouped.new_full(shape, -torch.inf)
    total = grouped.new_zeros(shape)
    out = grouped.new_zeros(*shape, view.hot_v.shape[-1])
    last_seen = request.last_seen
    for k, v, token, valid in _tiles(view):
        for i in range(0, num_queries, _QUERIES_PER_TILE):
            rows = slice(i, i + _QUERIES_PER_TILE)
            visible = _visible(last_seen[:, rows, None], request.window, token, valid)
            if not visible.any():
                continue
            scores = torch.einsum("bhgqd,bhtd->bhgqt", grouped[..., rows, :], k)
            if request.softcap is not None:
                scores = torch.tanh(scores / request.softcap) * request.softcap
            scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
            top = torch.maximum(high[..., rows], scores.amax(-1))
            base = top.masked_fill(top == -torch.inf, 0)  # exp(-inf - -inf) would be NaN
            weights = torch.exp(scores - base[..., None])
            decay = torch.exp(high[..., rows] - base)
            high[..., rows] = top
            total[..., rows] = total[..., rows] * decay + weights.sum(-1)
            update = torch.einsum("bhgqt,bhtd->bhgqd", weights, v)
            out[..., rows, :] = out[..., rows, :] * decay[..., None] + update
    lse = (high + total.log()).flatten(1, 2)
    out = out / total.masked_fill(total == 0, 1)[..., None]
    return out.flatten(1, 2).to(q.dtype), lse


def _visible(last: Tensor, window: int | None, token: Tensor, valid: Tensor) -> Tensor:
    """Which of a tile's tokens each query sees, bool `[B, Tq, T]`; `last` is `[B, Tq, 1]`."""
    visible = valid[:, None] & (token[:, None] <= last)
    if window is not None:
        visible &= token[:, None] > last - window
    return visible


def _tiles(view: CacheView) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Float32 keys and values `[B, Hkv, T, D]`, token numbers and validity `[B, T]`, tile by tile."""
    sinks, size = view.num_sink_tokens, view.format.page_size
    device = view.hot_k.device
    num_pages = int(view.packed_len.max()) // size if view.packed_len.numel() else 0
    step = _TOKENS_PER_TILE // size
    for i in range(0, num_pages, step):
        table = view.block_table[:, i : min(i + step, num_pages)]
        k, v = (x.transpose(1, 2).flatten(2, 3) for x in view.dequantize(table, i))
        offset = torch.arange(k.shape[2], device=device) + i * size
        valid = offset < view.packed_len[:, None]
        yield k, _zero(v, valid), (offset + sinks).expand_as(valid), valid
    longest = int(view.hot_len.max()) if view.hot_len.numel() else 0
    for start in range(0, longest, _TOKENS_PER_TILE):
        span = slice(start, min(start + _TOKENS_PER_TILE, longest))
        slot = torch.arange(longest, device=device)[span]
        valid = slot < view.hot_len[:, None]
        token = torch.where(slot < sinks, slot, slot + view.packed_len[:, None])
        k, v = view.hot_k[:, :, span].float(), view.hot_v[:, :, span].float()
        yield k, _zero(v, valid), token, valid


def _zero(v: Tensor, valid: Tensor) -> Tensor:
    """Values outside a sequence may be anything, and 0 times NaN is NaN."""
    return v if bool(valid.all()) else v.masked_fill(~valid[:, None, :, None], 0)


def _refuse(request: AttentionRequest) -> str | None:
    return None


BACKEND = Backend("reference", attend, _refuse)
