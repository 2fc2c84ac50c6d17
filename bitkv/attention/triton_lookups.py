"""Pages of indices as operands of tensor cores: entries of codebooks, gathered where they are used.

A codebook lies in float16 and stays in the first-level cache; an index brings the numbers of all
channels that share it in one load. Keys from before the rotary embedding are turned here as seen from
their page's first token, to which the query is turned back: angles stay small, and one table of cosines
and sines serves all pages.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)
import triton
import triton.language as tl

from bitkv.attention.triton_pages import dot, split_rows, stack_rows


@triton.jit
def column_channel(PART: tl.constexpr, T: tl.constexpr):
    """Of each column of a tile the channel, and whether it is one: `[padded_tile]` both."""
    column = tl.arange(0, T.padded_tile)
    group, channel = column // T.padded_channels, column % T.padded_channels
    real = (group < T.part_groups) & (channel < T.channels)
    return (PART * T.part_groups + group) * T.channels + channel, real


@triton.jit
def _indices(part, group, real, FIRST: tl.constexpr, T: tl.constexpr):
    """Indices `[tile, padded_groups]` of tokens from `FIRST` on, 0 where a group is not real."""
    PLANES: tl.constexpr = T.num_planes
    token = FIRST + tl.arange(0, T.tile)
    index = tl.full((T.tile, T.padded_groups), 0, tl.int32)
    for i in tl.static_range(PLANES):
        WIDTH: tl.constexpr = T.plane_bytes(i)
        BITS: tl.constexpr = T.planes[i]
        at = part + T.plane_at(i) + group[None, :] * WIDTH + (token % WIDTH)[:, None]
        byte = tl.load(at, mask=real[None, :], other=0).to(tl.int32)
        code = (byte >> (token // WIDTH * BITS)[:, None]) & ((1 << BITS) - 1)
        index |= code << T.plane_shift(i)
    return index


@triton.jit
def _entries(part, book, FIRST: tl.constexpr, PART: tl.constexpr, T: tl.constexpr):
    """Numbers `[tile, padded_tile]`, float16, of tokens from `FIRST` on, without their scales."""
    group = tl.arange(0, T.padded_groups)
    real = group < T.part_groups
    index = _indices(part, PART * T.part_groups + group, real, FIRST, T)
    base = (PART * T.part_groups + group) * T.group_stride
    at = (base[None, :] + index * T.padded_channels)[:, :, None] + tl.arange(0, T.padded_channels)
    x = tl.load(book + at, mask=real[None, :, None], other=0)
    return tl.reshape(x, (T.tile, T.padded_tile))


@triton.jit
def _scales(part, WHICH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, T: tl.constexpr):
    """Scales or zero points of `COUNT` tokens."""
    at = (part + T.scale_at(WHICH) + 2 * FIRST).to(tl.pointer_type(tl.float16))
    return tl.load(at + tl.arange(0, COUNT)).to(tl.float32)


@triton.jit
def _turned_queries(q, page, books, K: tl.constexpr):
    """Both halves of queries turned back by the angle of a page's first token, in float16."""
    pair, real = column_channel(0, K)
    pairs = K.part_groups * K.channels
    at = books.starts + page * 2 * pairs + pair
    cos = tl.load(at, mask=real, other=0)[:, None]
    sin = tl.load(at + pairs, mask=real, other=0)[:, None]
    first = q[0] * cos + q[1] * sin
    second = q[1] * cos - q[0] * sin
    return first.to(tl.float16), second.to(tl.float16)


@triton.jit
def _turned_keys(part, book, books, FIRST: tl.constexpr, K: tl.constexpr):
    """Both halves of keys turned as seen from the page's first token, in float16."""
    a = _entries(part, book, FIRST, 0, K)
    b = _entries(part, book, FIRST, 1, K)
    if K.scales > 0:
        scale = _scales(part, 0, FIRST, K.tile, K)[:, None].to(tl.float16)
        a, b = a * scale, b * scale
    if K.scales > 1:
        zero = _scales(part, 1, FIRST, K.tile, K)[:, None].to(tl.float16)
        a, b = a + zero, b + zero
    pair, real = column_channel(0, K)
    pairs = K.part_groups * K.channels
    at = books.turns + (FIRST + tl.arange(0, K.tile))[:, None] * pairs + pair[None, :]
    cos = tl.load(at, mask=real[None, :], other=0)
    sin = tl.load(at + K.rows * pairs, mask=real[None, :], other=0)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def coded_scores(part, q, page, books, head, F: tl.constexpr):
    """Inner products `[page_size, columns]` of queries and a page's keys.

    Args:
        part: pointer to the bytes of the page's keys.
        q: queries for each tile of columns, `[padded_tile, columns]`; float32 where keys are turned.
        page: which of its sequence's pages it is.
    """
    K: tl.constexpr = F.keys
    TILES: tl.constexpr = K.tiles
    book = books.key + head.to(tl.int64) * K.book_stride
    if K.parts == 2:
        q = _turned_queries(q, page, books, K)
    tiles = ()
    for t in tl.static_range(TILES):
        acc = tl.full((K.tile, F.columns), 0.0, tl.float32)
        if K.parts == 2:
            first, second = _turned_keys(part, book, books, t * K.tile, K)
            acc = dot(second, q[1], dot(first, q[0], acc, F), F)
        else:
            acc = dot(_entries(part, book, t * K.tile, 0, K), q[0], acc, F)
            if K.scales > 0:
                acc = acc * _scales(part, 0, t * K.tile, K.tile, K)[:, None]
            if K.scales > 1:
                zero = _scales(part, 1, t * K.tile, K.tile, K)
                acc += zero[:, None] * tl.sum(q[0].to(tl.float32), 0)[None, :]
        tiles = tiles + (acc,)
    return stack_rows(tiles, 0, K.tiles)


@triton.jit
def add_coded_values(part, p, acc, shift, books, head, F: tl.constexpr):
    """Add a page's values with weights `p` `[page_size, columns]`; see `triton_pages.add_values`."""
    V: tl.constexpr = F.values
    TILES: tl.constexpr = V.tiles
    book = books.value + head.to(tl.int64) * V.book_stride
    if V.scales > 1:
        shift = (shift[0] + tl.sum(p * _scales(part, 1, 0, V.rows, V)[:, None], 0),)
    if V.scales > 0:
        p = p * _scales(part, 0, 0, V.rows, V)[:, None]
    weights = split_rows(p.to(tl.float16), V.tiles)
    total = acc[0]
    for t in tl.static_range(TILES):
        total = dot(tl.trans(_entries(part, book, t * V.tile, 0, V)), weights[t], total, F)
    return (total,), shift
