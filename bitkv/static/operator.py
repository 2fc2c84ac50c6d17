"""The operator `bitkv::append`: tokens of a step enter a layer of fixed size, on the device alone."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from bitkv.attention.triton import interpreted
from bitkv.packing import Packing
from bitkv.pages import PageFormat
from bitkv.static import host

NUM_WARPS = 8  # of a program


def _append(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    block_table: Tensor,
    packed_len: Tensor,
    hot_k: Tensor,
    hot_v: Tensor,
    hot_len: Tensor,
    tickets: Tensor,
    key: Sequence[int],
    value: Sequence[int],
    levels: Sequence[int],
    layout: str,
    num_sink_tokens: int,
    hot_capacity: int,
) -> None:
    """Pack each sequence's oldest recent tokens where a page is due, then add tokens `[B, Hkv, T, D]`.

    Args:
        pages, block_table, packed_len, hot_k, hot_v, hot_len: as in `CacheView`; the table names the
            pages to come.
        tickets: int32 `[B, 2]`: 0 between calls; tokens that found no room.
        key, value: `AffineFormat.numbers` of the two halves of a page, and `layout` of both.
        levels: `Codec.native_levels` of both.
        hot_capacity: a page is due when the window holds so many tokens.
    """
    form = PageFormat.of_numbers(tuple(key), tuple(value), layout, head_dim=k.shape[3])
    parts = form.affine
    if not _has_kernel(k.device, layout):
        lengths = packed_len, hot_len, tickets
        host.append(
            *((k, v), (hot_k, hot_v), pages, block_table, *lengths),
            *(form, levels, num_sink_tokens, hot_capacity),
        )
        return
    # Triton is imported with the first call
    from bitkv.codecs.triton import tiling, word_dtype
    from bitkv.static.triton_kernels import append_kernel

    tiles = [tiling(part, level) for part, level in zip(parts, levels, strict=True)]
    words = [
        x.view(word_dtype(part))
        for x, part in zip(torch.split(pages, [part.nbytes for part in parts], -1), parts, strict=True)
    ]
    batch, heads, count, head_dim = k.shape
    programs = tiles[0].num_blocks + tiles[1].num_blocks
    append_kernel[(batch * heads * programs,)](
        *(k, v, hot_k, hot_v, *words, block_table, packed_len, hot_len, tickets),
        *(count, heads, hot_k.shape[2], block_table.shape[1]),
        *(k.stride()[:3], v.stride()[:3], hot_k.stride()[:2], *(x.stride()[:2] for x in words)),
        *(num_sink_tokens, hot_capacity, head_dim, parts[0].page_size),
        *tiles,
        num_warps=NUM_WARPS,
    )


append = torch.library.custom_op(
    "bitkv::append",
    _append,
    mutates_args=("pages", "packed_len", "hot_k", "hot_v", "hot_len", "tickets"),
)


@append.register_fake
def _fake(k: Tensor, *_: object) -> None: ...


def why_not(device: torch.device, packing: Packing, levels: Sequence[int | None]) -> str | None:
    """Why no step can run on a device, as the end of a sentence; None if it can."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "on a GPU needs Triton; pip install triton"
    layout = packing.format.layout
    if device.type == "cuda" and layout != "strided":
        return f"on a GPU holds pages of the layout 'strided', not {layout!r}; pass no layout"
    if None in levels or not (packing.key_shared.is_plain and packing.value_shared.is_plain):
        return "takes codecs with kernels: Affine and Unquantized"
    return None


def _has_kernel(device: torch.device, layout: str) -> bool:
    """Whether Triton runs the step, if only in its interpreter, rather than torch."""
    return device.type == "cuda" or (interpreted() and layout == "strided")
