"""The kernel of the backend "triton": attention over a split of the tokens (`triton_merge`: the merge).

The orientation is transposed: a tile of scores is `[tokens, columns]`, a column being one query of one
of the heads that share a KV head, and outputs are `[channels, columns]`. Codes are thus the first
operand of every `tl.dot`, in registers, and eight columns suffice where queries as the first operand
would need sixteen rows at least.
"""

# ruff: noqa: RET505, RUF005 (Triton compiles what follows a return, and has no starred tuples)
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from bitkv.attention import tiling
from bitkv.attention.triton_lookups import add_coded_values, coded_scores, column_channel
from bitkv.attention.triton_merge import LN_2, LOG2_E
from bitkv.attention.triton_pages import add_values, dot, load_words, narrow, page_scores

# weights are 2**6 times probabilities: products with scales stay clear of underflow down to
# probabilities of 2**-20, and of overflow up to scales of 2**9
HEADROOM = tl.constexpr(6)
HOT_TOKENS = tl.constexpr(tiling.HOT_TOKENS)


@triton.jit
def _repeat(x, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (x,)
    return tiles


@triton.jit
def _scale(tiles, factor, COUNT: tl.constexpr):
    scaled = ()
    for t in tl.static_range(COUNT):
        scaled = scaled + (tiles[t] * factor,)
    return scaled


@triton.jit
def _soften(s, softcap, F: tl.constexpr):
    """Scores in units of log2(e), capped where there is a cap."""
    if F.softcap:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        return (1 - 2 / (tl.exp2(s * (2 / softcap)) + 1)) * softcap * LOG2_E
    return s


@triton.jit
def _hide(s, token, last, window, F: tl.constexpr):
    """Scores, minus infinity where a token `[tokens]` is none that a column sees.

    Args:
        last: the last token each column sees, `[columns]`.
    """
    seen = token[:, None] <= last[None, :]
    if F.window:
        seen &= token[:, None] > (last - window)[None, :]
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _weigh(s, a, b, high, total):
    """One step of online softmax over scores `a * s + b` `[tokens, columns]`, where a > 0.

    Args:
        high, total: greatest score and sum of weights so far, `[columns]`.

    Returns:
        Weights `[tokens, columns]`, the new `high` and `total`, what to multiply older sums with.
    """
    top = tl.maximum(high, tl.max(s, 0) * a + b)
    base = tl.where(top == float("-inf"), 0.0, top)  # of a column that has seen no token
    shift = b - (base - HEADROOM)
    p = tl.exp2(s * a[None, :] + shift[None, :])
    decay = tl.exp2(high - base)
    return p, top, total * decay + tl.sum(p, 0), decay


@triton.jit
def _channels(TILE: tl.constexpr, T: tl.constexpr):
    """Of each row of a tile of outputs the channel, and whether it is one."""
    if T.is_coded:
        return column_channel(TILE, T)
    else:
        i = tl.arange(0, T.padded_tile)
        return TILE * T.tile + i, i < T.tile


@triton.jit
def _load_queries(q, real, SLOT: tl.constexpr, K: tl.constexpr):
    """Channels `[words, columns]` that meet a slot of keys, zero where padded."""
    if K.is_coded:
        channel, inside = column_channel(SLOT, K)
    else:
        word = tl.arange(0, K.padded_words)
        channel, inside = SLOT * K.words + word, word < K.words
    mask = inside[:, None] & real[None, :]
    return tl.load(q[None, :] + channel[:, None], mask=mask, other=0).to(tl.float32)


@triton.jit
def _prepare_queries(q, real, factor, RAW: tl.constexpr, F: tl.constexpr):
    """Queries for each slot of keys `[words, columns]`, and the factor of their products `[columns]`.

    The factor is positive: queries take the sign of a negative one. For codes, each query is scaled by
    a power of two that brings its largest channel into [16, 32): a product with a scale then fits
    float16 whatever the query's size, up to scales of 2**11. The last tile is all channels, which zero
    points beside codes meet.

    Args:
        q: pointers to the first channel of each column's query, `[columns]`.
        real: which columns exist.
    """
    K: tl.constexpr = F.keys
    SLOTS: tl.constexpr = K.parts if K.is_coded else K.slots
    sign = tl.where(factor < 0, -1.0, 1.0)
    # never 0, which would make hidden scores NaN
    factor = tl.maximum(tl.full((F.columns,), tl.abs(factor), tl.float32), 1e-30)
    tiles = ()
    if K.is_raw:
        return (narrow(_load_queries(q, real, 0, K) * sign, RAW, F),), factor
    else:
        largest = tl.full((F.columns,), 0.0, tl.float32)
        for j in tl.static_range(SLOTS):
            largest = tl.maximum(largest, tl.max(tl.abs(_load_queries(q, real, j, K)), 0))
        power = largest.to(tl.int32, bitcast=True) & 0x7F800000
        unit = tl.where(power == 0, 1.0, power.to(tl.float32, bitcast=True) / 16)
        if K.is_coded:
            for j in tl.static_range(SLOTS):
                tile = _load_queries(q, real, j, K) * (sign / unit)[None, :]
                tiles = tiles + (tile if K.parts == 2 else tile.to(tl.float16),)
            return tiles, factor * unit
        else:
            for j in tl.static_range(SLOTS):
                tile = _load_queries(q, real, j, K) * (sign / (unit * K.slot_unit(j)))[None, :]
                tiles = tiles + (tile.to(tl.float16),)
            channel = tl.arange(0, K.padded_columns)
            mask = (channel < K.columns)[:, None] & real[None, :]
            whole = tl.load(q[None, :] + channel[:, None], mask=mask, other=0) * (sign / unit)[None, :]
            return tiles + (whole.to(tl.float16),), factor * unit


@triton.jit
def _score_page(page, number, tiles, factor, books, head, score, RAW: tl.constexpr, F: tl.constexpr):
    """`page_scores`, capped, of whatever keys a page has; `number` says which of its sequence it is."""
    if F.keys.is_coded:
        s, a, b = coded_scores(page, tiles, number, books, head, F), factor, 0.0
    else:
        s, a, b = page_scores(page, tiles, factor, RAW, F)
    if F.softcap:
        if F.keys.is_raw or F.keys.is_coded:
            s = s * a[None, :]
        return _soften(s, score.softcap, F), tl.full((F.columns,), 1.0, tl.float32), 0.0
    else:
        return s, a, b


@triton.jit
def _attend_pages(
    base,
    table,
    number,
    span,
    first_token,
    tiles,
    factor,
    limits,
    score,
    books,
    head,
    RAW: tl.constexpr,
    F: tl.constexpr,
):
    """Attention over the pages `span` of a sequence.

    Args:
        base, stride: the KV head's bytes in page 0 of the pool, and bytes from page to page.
        table, number: pointer to the sequence's row of the block table, and what it names at the first.
        limits: the last token each column sees, the least of them, the first token that all see.
    """
    V: tl.constexpr = F.values
    ALL_TILES: tl.constexpr = V.all_tiles
    last, low, full = limits
    pages, stride = base
    first, stop = span
    high = tl.full((F.columns,), float("-inf"), tl.float32)
    total = tl.full((F.columns,), 0.0, tl.float32)
    acc = _repeat(tl.full((V.padded_tile, F.columns), 0.0, tl.float32), V.all_tiles)
    shift = _repeat(total, V.groups)
    for i in range(first, stop):
        page = pages + number.to(tl.int64) * stride
        number = tl.load(table + i + 1, mask=i + 1 < stop, other=0)
        token = first_token + i * F.page_size
        s, a, b = _score_page(page, i, tiles, factor, books, head, score, RAW, F)
        if (token + F.page_size - 1 > low) | (token < full):  # most pages are seen by all, entirely
            s = _hide(s, token + tl.arange(0, F.page_size), last, score.window, F)
        p, high, total, decay = _weigh(s, a, b, high, total)
        acc = _scale(acc, decay[None, :], V.all_tiles)
        values = page + F.value_offset
        if V.is_raw:
            acc = (dot(load_words(values, 0, V, RAW), narrow(p, RAW, F), acc[0], F),)
        elif V.is_coded:
            shift = _scale(shift, decay, 1)
            acc, shift = add_coded_values(values, p, acc, shift, books, head, F)
        else:
            acc, shift = add_values(values, p, acc, _scale(shift, decay, V.groups), RAW, F)
    sums = ()
    for t in tl.static_range(ALL_TILES):
        sums = sums + (acc[t] * (1 / V.tile_unit(t)) + shift[V.group_of(t)][None, :],)
    if F.map_width > 0:
        sums = (_mapped(sums, books.value_map + head.to(tl.int64) * F.map_stride, F),)
    return high, total, sums


@triton.jit
def _mapped(sums, matrix, F: tl.constexpr):
    """Sums of values `[head_dim, columns]` from those of the numbers in pages: `matrix @ sums`."""
    V: tl.constexpr = F.values
    ALL_TILES: tl.constexpr = V.all_tiles
    row = tl.arange(0, F.padded_head_dim)
    acc = tl.full((F.padded_head_dim, F.columns), 0.0, tl.float32)
    for t in tl.static_range(ALL_TILES):
        column, real = _channels(t, V)
        mask = (row < F.head_dim)[:, None] & real[None, :]
        part = tl.load(matrix + row[:, None] * F.map_width + column[None, :], mask=mask, other=0)
        acc = dot(part, sums[t], acc, F)
    return acc


@triton.jit
def _attend_hot(slot, bounds, k_rows, v_rows, q, last, score, state, F: tl.constexpr):
    """Add tokens of the hot window.

    Args:
        slot: their slots, `[HOT_TOKENS]`.
        bounds: tokens in the hot window, sinks, tokens in pages.
        k_rows, v_rows, q: pointers to the first channel of each slot and of each column.
    """
    O: tl.constexpr = F.outputs  # noqa: E741
    ALL_TILES: tl.constexpr = O.all_tiles
    high, total, acc = state
    count, sinks, packed = bounds
    token = tl.where(slot < sinks, slot, slot + packed)
    real = slot < count
    channel = tl.arange(0, F.padded_head_dim)
    inside = channel < F.head_dim
    k = tl.load(k_rows[:, None] + channel[None, :], mask=real[:, None] & inside[None, :], other=0)
    x = tl.load(q[None, :] + channel[:, None], mask=inside[:, None] & (last >= 0)[None, :], other=0)
    x = narrow(x.to(tl.float32), k.dtype, F)
    s = dot(k, x, tl.full((slot.shape[0], F.columns), 0.0, tl.float32), F)
    s = _hide(_soften(s * score.factor, score.softcap, F), token, last, score.window, F)
    s, ones = tl.where(real[:, None], s, float("-inf")), tl.full((F.columns,), 1.0, tl.float32)
    p, high, total, decay = _weigh(s, ones, 0.0, high, total)
    sums = ()
    for t in tl.static_range(ALL_TILES):
        channel, inside = _channels(t, O)
        v = tl.load(v_rows[None, :] + channel[:, None], mask=real[None, :] & inside[:, None], other=0)
        sums = sums + (dot(v, narrow(p, v.dtype, F), acc[t] * decay[None, :], F),)
    return high, total, sums


@triton.jit
def _visible_pages(last, real, packed, sinks, window, F: tl.constexpr):
    """The pages `(first, stop)` that some query sees, and what all queries see entirely.

    Returns:
        `(first, stop)` and `(last, low, full)` for `_attend_pages`.
    """
    newest = tl.max(last, 0)
    low = tl.min(tl.where(real, last, 0x7FFFFFFF), 0)
    stop = tl.minimum(packed // F.page_size, tl.cdiv(tl.maximum(newest + 1 - sinks, 0), F.page_size))
    first, full = 0, 0
    if F.window:
        full = newest - window + 1
        first = tl.minimum(tl.maximum(low - window + 1 - sinks, 0) // F.page_size, stop)
    return (first, stop), (last, low, full)


@triton.jit
def _store(result, split, row, real, high, total, acc, F: tl.constexpr):
    """Write the output of a split and its log-sum-exp; `row` `[columns]` says where."""
    O: tl.constexpr = F.outputs  # noqa: E741
    ALL_TILES: tl.constexpr = O.all_tiles
    at = split.to(tl.int64) * result.rows + row
    total = tl.where(total == 0, 1.0, total)  # nothing was seen, and `high` is minus infinity
    tl.store(result.lse + at, (high - HEADROOM + tl.log2(total)) * LN_2, mask=real)
    inverse = 1 / total
    for t in tl.static_range(ALL_TILES):
        channel, inside = _channels(t, O)
        place = result.out + at[None, :] * F.head_dim + channel[:, None]
        out = narrow(acc[t] * inverse[None, :], result.out.dtype.element_ty, F)
        tl.store(place, out, mask=real[None, :] & inside[:, None])


@triton.jit
def _last_seen(queries, b, query, real, length, F: tl.constexpr):
    """The last token each column sees, -1 where there is no column."""
    if F.causal:
        return tl.where(real, length - queries.length + query, -1)
    else:
        at = b * queries.last_stride_b + query * queries.last_stride_t
        return tl.load(queries.positions + at, mask=real, other=-1).to(tl.int32)


@triton.jit
def _share(span):
    """A split's pages of the span: the first splits take one more where it does not come out even."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    share, more = (span[1] - span[0]) // splits, (span[1] - span[0]) % splits
    first = span[0] + split * share + tl.minimum(split, more)
    return first, first + share + tl.where(split < more, 1, 0)


@triton.jit(do_not_specialize=["table_width"])  # it grows with the cache, which must not compile anew
def attend_kernel(queries, cache, table_width, score, result, books, F: tl.constexpr):
    """One split of the tokens of a sequence, for `F.columns` queries that share a KV head.

    Grid (splits, KV heads * blocks of columns, sequences). A split takes its share of the sequence's
    pages and of the tiles of its hot window; lengths are read here, never by the host.

    Args: `Queries`, `Cache`, `Score`, `Result`, `Books` of the module `triton`; tensors are pointers.
        `table_width` is the length of a row of the block table.
    """
    split, splits, b = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    packed, count = tl.load(cache.packed_len + b), tl.load(cache.hot_len + b)
    rows = queries.ratio * queries.length
    blocks = tl.cdiv(rows, F.columns)
    head = tl.program_id(1) // blocks
    column = tl.program_id(1) % blocks * F.columns + tl.arange(0, F.columns)
    real, query = column < rows, column % queries.length
    q_head = head * queries.ratio + column // queries.length
    q = queries.q + b * queries.stride_b + q_head * queries.stride_h + query * queries.stride_t
    last = _last_seen(queries, b, query, real, packed + count, F)
    span, limits = _visible_pages(last, real, packed, cache.sinks, score.window, F)
    first, stop = _share(span)
    table = cache.block_table + b * table_width
    number = tl.load(table + first, mask=first < stop, other=0)  # its page waits for it

    paged = q
    if F.maps_queries:  # contiguous, as results are
        paged = books.queries + ((b * cache.kv_heads + head) * rows + column) * books.width
    tiles, factor = _prepare_queries(paged, real, score.factor, cache.hot_k.dtype.element_ty, F)
    pages = cache.pages + head * F.page_bytes, cache.kv_heads * F.page_bytes
    state = _attend_pages(
        pages,
        table,
        number,
        (first, stop),
        cache.sinks,
        tiles,
        factor,
        limits,
        score,
        books,
        head,
        cache.hot_k.dtype.element_ty,
        F,
    )
    hot = b * cache.stride_b + head * cache.stride_h
    # the last splits have fewer pages
    for i in range(splits - 1 - split, tl.cdiv(count, HOT_TOKENS), splits):
        slot = i * HOT_TOKENS + tl.arange(0, HOT_TOKENS)
        row = hot + slot.to(tl.int64) * F.head_dim
        bounds = count, cache.sinks, packed
        k, v = cache.hot_k + row, cache.hot_v + row
        state = _attend_hot(slot, bounds, k, v, q, last, score, state, F)
    high, total, acc = state
    if F.overlaps:
        gdc_launch_dependents()
    place = (b * cache.kv_heads + head) * rows + column
    _store(result, split, place, real, high, total, acc, F)
