"""The step of a static layer in plain torch, for tensors on a CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitkv.codecs import Affine, Codec, Unquantized
from bitkv.codecs.affine import LEVELS
from bitkv.pages import AffineFormat, PageFormat


def append(
    new: tuple[Tensor, Tensor],
    hot: tuple[Tensor, Tensor],
    pages: Tensor,
    block_table: Tensor,
    packed_len: Tensor,
    hot_len: Tensor,
    tickets: Tensor,
    form: PageFormat,
    levels: Sequence[int],
    num_sink_tokens: int,
    hot_capacity: int,
) -> None:
    """Keys and values of a step enter the window; `bitkv.static.operator` says what the rest is."""
    count, capacity, page = new[0].shape[2], hot[0].shape[2], form.page_size
    start = num_sink_tokens
    for b, (packed, length) in enumerate(zip(packed_len.tolist(), hot_len.tolist(), strict=True)):
        due = 1 + (length - hot_capacity) // page if length >= hot_capacity else 0
        first, used = length - due * page, packed // page
        if used + due > block_table.shape[1] or first + count > capacity:
            tickets[b, 1] += count
            continue
        if due:
            stop = start + due * page
            places = block_table[b, used : used + due].long()
            tokens = [torch.unflatten(x[b, :, start:stop], 1, (due, page)).transpose(0, 1) for x in hot]
            parts = zip(tokens, form.affine, levels, strict=True)
            encoded = [_codec(part, level).encode(x, part) for x, part, level in parts]
            pages[places, :, : form.key.nbytes], pages[places, :, form.key.nbytes :] = encoded
            packed_len[b] = packed + due * page
            for x in hot:
                x[b, :, start:first] = x[b, :, stop:length].clone()
        for x, window in zip(new, hot, strict=True):
            window[b, :, first : first + count] = x[b]
        hot_len[b] = first + count


def _codec(part: AffineFormat, level: int) -> Codec:
    """The codec that makes pages of this format, with levels as kernels count them."""
    if part.is_raw:
        return Unquantized()
    extent = part.page_size if part.granularity == "channel" else part.head_dim
    is_page = part.group_size == extent
    return Affine(part.bits, part.granularity, "page" if is_page else part.group_size, LEVELS[level])
