"""The kernel of `bitkv::append`: a page leaves the hot window if one is due, and new tokens enter it."""

import triton
import triton.language as tl

from bitkv.codecs.triton_kernels import encode_block, tile_indices


@triton.jit
def append_kernel(
    k,
    v,
    hot_k,
    hot_v,
    key_words,
    value_words,
    table,
    packed_len,
    hot_len,
    tickets,
    count,
    heads,
    capacity,
    table_width,
    k_strides,
    v_strides,
    hot_strides,
    key_strides,
    value_strides,
    sinks,
    hot_capacity,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
):
    """A program has some lanes of one half of the pages of one head of one sequence.

    Lengths are read by all programs of a sequence, and advanced by the one that finishes last.
    """
    programs = KEY.num_blocks + VALUE.num_blocks
    block = tl.program_id(0) % programs
    h = (tl.program_id(0) // programs % heads).to(tl.int64)
    b = (tl.program_id(0) // programs // heads).to(tl.int64)
    packed, hot = tl.load(packed_len + b), tl.load(hot_len + b)
    due = tl.where(hot >= hot_capacity, 1 + (hot - hot_capacity) // PAGE, 0)
    first = hot - due * PAGE  # of the new tokens' places
    fits = (packed // PAGE + due <= table_width) & (first + count <= capacity)
    if fits:
        row = table + b * table_width + packed // PAGE
        at = b * hot_strides[0] + h * hot_strides[1]
        if block < KEY.num_blocks:
            new, words = k + b * k_strides[0] + h * k_strides[1], key_words + h * key_strides[1]
            _pack_due(hot_k + at, words, key_strides[0], row, due, sinks, block, HEAD_DIM, PAGE, KEY)
            _advance(new, k_strides[2], hot_k + at, hot, due, count, sinks, block, HEAD_DIM, PAGE, KEY)
        else:
            i = block - KEY.num_blocks
            new, words = v + b * v_strides[0] + h * v_strides[1], value_words + h * value_strides[1]
            _pack_due(hot_v + at, words, value_strides[0], row, due, sinks, i, HEAD_DIM, PAGE, VALUE)
            _advance(new, v_strides[2], hot_v + at, hot, due, count, sinks, i, HEAD_DIM, PAGE, VALUE)
    tl.debug_barrier()  # every thread has read the lengths
    if tl.atomic_add(tickets + 2 * b, 1) == heads * programs - 1:
        tl.store(tickets + 2 * b, 0)
        if fits:
            tl.store(packed_len + b, packed + due * PAGE)
            tl.store(hot_len + b, first + count)
        else:
            tl.store(tickets + 2 * b + 1, tl.load(tickets + 2 * b + 1) + count)


@triton.jit
def _pack_due(
    window,
    words,
    page_stride,
    row,
    due,
    sinks,
    block,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Write the oldest `due` pages of the hot window into those that the block table's `row` names."""
    for i in range(due):
        page = tl.load(row + i).to(tl.int64)
        tokens = window + (sinks + i * PAGE) * HEAD_DIM
        encode_block(tokens, HEAD_DIM, words + page * page_stride, block, TILES)


@triton.jit
def _advance(
    new,
    new_stride,
    window,
    hot,
    due,
    count,
    sinks,
    block,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Close the gap that packed pages leave, and put the new tokens behind.

    A program writes only where it alone reads: at its channels, or at places whose distance from the
    sinks is, modulo the page size, that of its tokens. So programs need not wait for one another.
    """
    lane, group, element = tile_indices(block, TILES.outer, TILES)
    e = group * TILES.size + element
    if TILES.by_channel:
        token, channel = e, lane
    else:
        token, channel = lane, e
    gap = due * PAGE
    if due > 0:
        for start in range(sinks, hot - gap, PAGE):
            tl.debug_barrier()
            slot = start + token
            x = tl.load(window + (slot + gap) * HEAD_DIM + channel, mask=slot + gap < hot)
            tl.store(window + slot * HEAD_DIM + channel, x, mask=slot + gap < hot)
        tl.debug_barrier()
    first = hot - gap
    behind = (sinks + token + (first // PAGE + 1) * PAGE - first) % PAGE
    for start in range(0, count, PAGE):
        i = start + behind
        x = tl.load(new + i * new_stride + channel, mask=i < count)
        tl.store(window + (first + i) * HEAD_DIM + channel, x, mask=i < count)
