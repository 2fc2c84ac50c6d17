"""The kernels of the backend "triton": attention over a split of the tokens, and the merge of splits.

The orientation is transposed: a tile of scores is `[tokens, columns]`, a column being one query of one
of the heads that share a KV head, and outputs are `[channels, columns]`. Codes are thus the first
operand of every `tl.dot`, in registers, and eight columns suffice where queries as the first operand
would need sixteen rows at least.

Nothing is dequantized. A masked code is a float16 as it stands (`_codes`), scales are folded into
queries and weights, and zero points add one number a column (docs/design.md, "On GPUs").
"""

# ruff: noqa: RET505, RUF005 (Triton compiles what follows a return, and has no starred tuples)
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# weights are 2**6 times probabilities: products with scales stay clear of underflow down to
# probabilities of 2**-20, and of overflow up to scales of 2**9
HEADROOM = tl.constexpr(6)
HOT_TOKENS = tl.constexpr(32)  # of the hot window at a time


@triton.jit
def _dot(a, b, acc, F: tl.constexpr):
    """`acc + a @ b`. The interpreter keeps bfloat16 as integers, and would multiply those."""
    if F.interpreted:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _narrow(x, TYPE: tl.constexpr, F: tl.constexpr):
    """Float32 in another type, rounded to nearest. The interpreter truncates to bfloat16."""
    if F.interpreted and tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def _split_rows(x, COUNT: tl.constexpr):
    """A tile `[rows, columns]` as `COUNT` tiles one below the other: registers get other names."""
    if COUNT == 1:
        return (x,)
    else:
        a, b = x.reshape(2, x.shape[0] // 2, x.shape[1]).permute(1, 2, 0).split()
        return _split_rows(a, COUNT // 2) + _split_rows(b, COUNT // 2)


@triton.jit
def _stack_rows(tiles, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Inverse of `_split_rows`, for tiles from `FIRST` on."""
    if COUNT == 1:
        return tiles[FIRST]
    else:
        a = _stack_rows(tiles, FIRST, COUNT // 2)
        b = _stack_rows(tiles, FIRST + COUNT // 2, COUNT // 2)
        return tl.join(a, b).permute(2, 0, 1).reshape(2 * a.shape[0], a.shape[1])


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
def _codes(words, POSITION: tl.constexpr, BITS: tl.constexpr, F: tl.constexpr):
    """Codes at a bit position of 16-bit words as float16: `code * 2**(POSITION % 8 - 24)`, exactly.

    A float16 is linear in its low eleven bits (subnormals and the binade above), so that codes in the
    low byte need a mask only. The compiler would take 16-bit integers apart: the assembly works on the
    two that share a register.
    """
    MASK: tl.constexpr = ((1 << BITS) - 1) << (POSITION % 8)
    if F.assembly:
        if POSITION >= 8:
            words = tl.inline_asm_elementwise("shr.u32 $0, $1, 8;", "=r,r", [words], tl.int16, True, 2)
        TEXT: tl.constexpr = f"and.b32 $0, $1, {MASK * 0x10001};"
        words = tl.inline_asm_elementwise(TEXT, "=r,r", [words], tl.int16, True, 2)
    else:
        words = (words >> (POSITION // 8 * 8)) & MASK
    return words.to(tl.float16, bitcast=True)


@triton.jit
def _load_words(part, TILE: tl.constexpr, T: tl.constexpr, TYPE: tl.constexpr):
    """Words `[tile, words]` of a part of a page, padded to powers of two with zeros."""
    row, word = tl.arange(0, T.padded_tile)[:, None], tl.arange(0, T.padded_words)[None, :]
    # the same offsets for all tiles: a program has few registers to spare for addresses
    at = part.to(tl.pointer_type(TYPE)) + TILE * T.tile * T.words + (row * T.words + word)
    if T.padded_tile == T.tile and T.padded_words == T.words:
        return tl.load(at)
    else:
        return tl.load(at, mask=(row < T.tile) & (word < T.words), other=0)


@triton.jit
def _load_numbers(part, OFFSET: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """`COUNT` scales or zero points `[PADDED]`, `OFFSET` bytes into a part of a page."""
    i = tl.arange(0, PADDED)
    at = (part + OFFSET).to(tl.pointer_type(tl.float16)) + i
    if COUNT == PADDED:
        return tl.load(at)
    else:
        return tl.load(at, mask=i < COUNT, other=0)


@triton.jit
def _lost(q, scale, product, F: tl.constexpr):
    """What rounding took from `product`, which is `q * scale[:, None]` in float16."""
    if F.interpreted:
        return (q.to(tl.float32) * scale.to(tl.float32)[:, None] - product.to(tl.float32)).to(tl.float16)
    else:
        return tl.fma(q, tl.broadcast_to(scale[:, None], q.shape), -product)


@triton.jit
def _sum_product(numbers, x, F: tl.constexpr):
    """`sum(numbers[:, None] * x, 0)` in every row of `[16, columns]`, of exact products."""
    a = tl.broadcast_to(numbers[None, :], (16, numbers.shape[0]))
    return _dot(a, x, tl.full((16, F.columns), 0.0, tl.float32), F)


@triton.jit
def _channel_scores(part, q, factor, F: tl.constexpr):
    """`_page_scores` where each channel has a scale for every group of tokens."""
    K: tl.constexpr = F.keys
    ALL_TILES: tl.constexpr = K.all_tiles
    SLOTS: tl.constexpr = K.slots
    GROUPS: tl.constexpr = K.groups
    TILES: tl.constexpr = K.tiles
    words, tiles = (), ()
    for i in tl.static_range(TILES):
        words = words + (_load_words(part, i, K, tl.int16),)
    for g in tl.static_range(GROUPS):
        scaled, rest, lost = (), (), tl.full((16, F.columns), 0.0, tl.float32)
        for j in tl.static_range(SLOTS):
            scale = _load_numbers(part, K.scale_at(g, j), K.words, K.padded_words)
            rounded = q[j] * scale[:, None]
            scaled = scaled + (rounded,)
            if K.two_terms:
                rest = rest + (_lost(q[j], scale, rounded, F),)
            else:
                lost -= _sum_product(tl.full(scale.shape, 1.0, tl.float16), rounded, F) * K.slot_unit(j)
        zero = _load_numbers(part, K.zero_at(g), K.columns, K.padded_columns)
        shift = _sum_product(zero, q[SLOTS], F)
        if not K.two_terms:
            scale = _load_numbers(part, K.scale_at(g), K.columns, K.padded_columns)
            shift += (lost + _sum_product(scale, q[SLOTS], F)) * K.middle
        shift = tl.max(shift, 0)
        for t in tl.static_range(ALL_TILES):
            if K.group_of(t) == g:
                acc = tl.full((K.tile, F.columns), 0.0, tl.float32)
                for j in tl.static_range(SLOTS):
                    code = _codes(words[t % K.tiles], K.position(t, j), K.bits, F)
                    acc = _dot(code, scaled[j], acc, F)
                    if K.two_terms:
                        acc = _dot(code, rest[j], acc, F)
                if F.softcap or not K.uniform:
                    acc = acc * (factor * (1 / K.tile_unit(t)))[None, :] + (shift * factor)[None, :]
                tiles = tiles + (acc,)
    scores = _stack_rows(tiles, 0, K.all_tiles)
    if K.uniform and not F.softcap:
        return scores, factor * (1 / K.tile_unit(0)), shift * factor
    else:
        return scores, tl.full((F.columns,), 1.0, tl.float32), 0.0


@triton.jit
def _token_scores(part, q, factor, F: tl.constexpr):
    """`_page_scores` where each token has a scale for every group of channels."""
    K: tl.constexpr = F.keys
    FOLDS: tl.constexpr = K.folds
    SLOTS: tl.constexpr = K.slots
    GROUPS: tl.constexpr = K.groups
    words = _load_words(part, 0, K, tl.int16)
    scores = tl.full((K.rows, F.columns), 0.0, tl.float32)
    for g in tl.static_range(GROUPS):
        mine, tiles, total = (), (), tl.full((F.columns,), 0.0, tl.float32)
        for j in tl.static_range(SLOTS):  # queries, zero outside of the group's channels
            channel = j * K.words + tl.arange(0, K.padded_words)
            inside = (channel >= g * K.group) & (channel < (g + 1) * K.group)
            mine = mine + (tl.where(inside[:, None], q[j], 0.0).to(tl.float16),)
            total += tl.sum(mine[j].to(tl.float32), 0) * K.slot_unit(j)
        for t in tl.static_range(FOLDS):
            acc = tl.full((K.tile, F.columns), 0.0, tl.float32)
            for j in tl.static_range(SLOTS):
                if K.meets(j, g):
                    acc = _dot(_codes(words, K.position(t, j), K.bits, F), mine[j], acc, F)
            tiles = tiles + (acc * (factor * (1 / K.tile_unit(t)))[None, :],)
        scale = _load_numbers(part, K.scale_at(g), K.rows, K.rows)
        zero = _load_numbers(part, K.zero_at(g), K.rows, K.rows)
        scores += _stack_rows(tiles, 0, K.folds) * scale.to(tl.float32)[:, None]
        scores += zero.to(tl.float32)[:, None] * (total * factor)[None, :]
    return scores, tl.full((F.columns,), 1.0, tl.float32), 0.0


@triton.jit
def _page_scores(page, q, factor, RAW: tl.constexpr, F: tl.constexpr):
    """Scores of a page's tokens, as `s, a, b` that make them `a * s + b`: `s` is `[page_size, columns]`.

    Args:
        page: pointer to the page's bytes.
        q, factor: queries for each slot of keys and a factor `[columns]`, see `_prepare_queries`.
    """
    if F.keys.is_raw:
        acc = tl.full((F.page_size, F.columns), 0.0, tl.float32)
        return _dot(_load_words(page, 0, F.keys, RAW), q[0], acc, F), factor, 0.0
    elif F.keys.by_row:
        return _token_scores(page, q, factor, F)
    else:
        return _channel_scores(page, q, factor, F)


@triton.jit
def _add_values(part, p, acc, shift, RAW: tl.constexpr, F: tl.constexpr):
    """Add a page's values with weights `p` `[page_size, columns]`.

    Args:
        part: pointer to the bytes of the page's values.
        acc: a tile `[channels, columns]` for each of V's tiles, in units of its `tile_unit`.
        shift: what zero points add to each group of channels, `[columns]`.
    """
    V: tl.constexpr = F.values
    SLOTS: tl.constexpr = V.slots
    ALL_TILES: tl.constexpr = V.all_tiles
    GROUPS: tl.constexpr = V.groups
    TILES: tl.constexpr = V.tiles
    words, shifts, sums = (), (), ()
    for i in tl.static_range(TILES):
        words = words + (_load_words(part, i, V, tl.int16),)
    for g in tl.static_range(GROUPS):
        scale = _load_numbers(part, V.scale_at(g), V.columns, V.columns)
        zero = _load_numbers(part, V.zero_at(g), V.columns, V.columns)
        middle = zero.to(tl.float32) + V.middle * scale.to(tl.float32)
        weights = _split_rows((p * scale.to(tl.float32)[:, None]).to(tl.float16), V.slots)
        rounded = tl.full((16, F.columns), 0.0, tl.float32)
        for j in tl.static_range(SLOTS):
            rounded = _dot(tl.full((16, V.words), 1.0, tl.float16), weights[j], rounded, F)
        lost = tl.sum(p * middle[:, None], 0) - tl.max(rounded, 0) * V.middle
        shifts = shifts + (shift[g] + lost,)
        for t in tl.static_range(ALL_TILES):
            if V.group_of(t) == g:
                total = acc[t]
                for j in tl.static_range(SLOTS):
                    code = _codes(words[t % V.tiles], V.position(t, j), V.bits, F)
                    weight = (weights[j] * (1 / V.slot_unit(j))).to(tl.float16)
                    total = _dot(code, weight, total, F)
                sums = sums + (total,)
    return sums, shifts


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
def _load_queries(q, real, SLOT: tl.constexpr, K: tl.constexpr):
    """Channels `[words, columns]` that meet a slot of keys, zero where padded."""
    word = tl.arange(0, K.padded_words)
    mask = (word < K.words)[:, None] & real[None, :]
    return tl.load(q[None, :] + (SLOT * K.words + word)[:, None], mask=mask, other=0).to(tl.float32)


@triton.jit
def _prepare_queries(q, real, factor, RAW: tl.constexpr, F: tl.constexpr):
    """Queries for each slot of keys `[words, columns]`, and the factor of their products `[columns]`.

    The factor is positive: queries take the sign of a negative one. For codes, each query is scaled by
    a power of two that brings its largest channel into [16, 32): a product with a scale then fits
    float16 whatever the query's size, up to scales of 2**11. The last tile is all channels.

    Args:
        q: pointers to the first channel of each column's query, `[columns]`.
        real: which columns exist.
    """
    K: tl.constexpr = F.keys
    SLOTS: tl.constexpr = K.slots
    sign = tl.where(factor < 0, -1.0, 1.0)
    # never 0, which would make hidden scores NaN
    factor = tl.maximum(tl.full((F.columns,), tl.abs(factor), tl.float32), 1e-30)
    tiles = ()
    if K.is_raw:
        return (_narrow(_load_queries(q, real, 0, K) * sign, RAW, F),), factor
    else:
        largest = tl.full((F.columns,), 0.0, tl.float32)
        for j in tl.static_range(SLOTS):
            largest = tl.maximum(largest, tl.max(tl.abs(_load_queries(q, real, j, K)), 0))
        power = largest.to(tl.int32, bitcast=True) & 0x7F800000
        unit = tl.where(power == 0, 1.0, power.to(tl.float32, bitcast=True) / 16)
        for j in tl.static_range(SLOTS):
            tile = _load_queries(q, real, j, K) * (sign / (unit * K.slot_unit(j)))[None, :]
            tiles = tiles + (tile.to(tl.float16),)
        channel = tl.arange(0, K.padded_columns)
        mask = (channel < K.columns)[:, None] & real[None, :]
        whole = tl.load(q[None, :] + channel[:, None], mask=mask, other=0) * (sign / unit)[None, :]
        return tiles + (whole.to(tl.float16),), factor * unit


@triton.jit
def _attend_pages(
    base, table, span, first_token, tiles, factor, limits, score, RAW: tl.constexpr, F: tl.constexpr
):
    """Attention over the pages `span` of a sequence.

    Args:
        base, stride: the KV head's bytes in page 0 of the pool, and bytes from page to page.
        table: pointer to the sequence's row of the block table.
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
    number = tl.load(table + first, mask=first < stop, other=0)
    for i in range(first, stop):
        page = pages + number.to(tl.int64) * stride
        number = tl.load(table + i + 1, mask=i + 1 < stop, other=0)  # now: its page waits for it
        s, a, b = _page_scores(page, tiles, factor, RAW, F)
        if F.softcap:
            if F.keys.is_raw:
                s = s * a[None, :]
            s, a, b = _soften(s, score.softcap, F), tl.full((F.columns,), 1.0, tl.float32), 0.0
        token = first_token + i * F.page_size
        if (token + F.page_size - 1 > low) | (token < full):  # most pages are seen by all, entirely
            s = _hide(s, token + tl.arange(0, F.page_size), last, score.window, F)
        p, high, total, decay = _weigh(s, a, b, high, total)
        acc = _scale(acc, decay[None, :], V.all_tiles)
        values = page + F.value_offset
        if V.is_raw:
            acc = (_dot(_load_words(values, 0, V, RAW), _narrow(p, RAW, F), acc[0], F),)
        else:
            acc, shift = _add_values(values, p, acc, _scale(shift, decay, V.groups), RAW, F)
    sums = ()
    for t in tl.static_range(ALL_TILES):
        sums = sums + (acc[t] * (1 / V.tile_unit(t)) + shift[V.group_of(t)][None, :],)
    return high, total, sums


@triton.jit
def _attend_hot(slot, bounds, k_rows, v_rows, q, last, score, state, F: tl.constexpr):
    """Add tokens of the hot window.

    Args:
        slot: their slots, `[HOT_TOKENS]`.
        bounds: tokens in the hot window, sinks, tokens in pages.
        k_rows, v_rows, q: pointers to the first channel of each slot and of each column.
    """
    V: tl.constexpr = F.values
    ALL_TILES: tl.constexpr = V.all_tiles
    high, total, acc = state
    count, sinks, packed = bounds
    token = tl.where(slot < sinks, slot, slot + packed)
    real = slot < count
    channel = tl.arange(0, F.padded_head_dim)
    inside = channel < F.head_dim
    k = tl.load(k_rows[:, None] + channel[None, :], mask=real[:, None] & inside[None, :], other=0)
    x = tl.load(q[None, :] + channel[:, None], mask=inside[:, None] & (last >= 0)[None, :], other=0)
    x = _narrow(x.to(tl.float32), k.dtype, F)
    s = _dot(k, x, tl.full((slot.shape[0], F.columns), 0.0, tl.float32), F)
    s = _hide(_soften(s * score.factor, score.softcap, F), token, last, score.window, F)
    s, ones = tl.where(real[:, None], s, float("-inf")), tl.full((F.columns,), 1.0, tl.float32)
    p, high, total, decay = _weigh(s, ones, 0.0, high, total)
    sums = ()
    for t in tl.static_range(ALL_TILES):
        i = tl.arange(0, V.padded_tile)[:, None]
        v = tl.load(v_rows[None, :] + t * V.tile + i, mask=real[None, :] & (i < V.tile), other=0)
        sums = sums + (_dot(v, _narrow(p, v.dtype, F), acc[t] * decay[None, :], F),)
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
    """Write the output of a split and its log-sum-exp to base 2; `row` `[columns]` says where."""
    V: tl.constexpr = F.values
    ALL_TILES: tl.constexpr = V.all_tiles
    at = split.to(tl.int64) * result.rows + row
    total = tl.where(total == 0, 1.0, total)  # nothing was seen, and `high` is minus infinity
    tl.store(result.lse + at, (high - HEADROOM + tl.log2(total)) * LN_2, mask=real)
    inverse = 1 / total
    for t in tl.static_range(ALL_TILES):
        i = tl.arange(0, V.padded_tile)[:, None]
        place = result.out + at[None, :] * F.head_dim + t * V.tile + i
        out = _narrow(acc[t] * inverse[None, :], result.out.dtype.element_ty, F)
        tl.store(place, out, mask=real[None, :] & (i < V.tile))


@triton.jit
def attend_kernel(queries, cache, score, result, F: tl.constexpr):
    """One split of the tokens of a sequence, for `F.columns` queries that share a KV head.

    Grid (splits, KV heads * blocks of columns, sequences). A split takes its share of the sequence's
    pages and of the tiles of its hot window; lengths are read here, never by the host.

    Args: `Queries`, `Cache`, `Score` and `Result` of the module `triton`, with tensors for pointers.
    """
    split, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows = queries.ratio * queries.length
    blocks = tl.cdiv(rows, F.columns)
    head = tl.program_id(1) // blocks
    column = tl.program_id(1) % blocks * F.columns + tl.arange(0, F.columns)
    real, query = column < rows, column % queries.length
    q_head = head * queries.ratio + column // queries.length
    q = queries.q + b * queries.stride_b + q_head * queries.stride_h + query * queries.stride_t
    tiles, factor = _prepare_queries(q, real, score.factor, cache.hot_k.dtype.element_ty, F)

    packed, count = tl.load(cache.packed_len + b), tl.load(cache.hot_len + b)
    if F.causal:
        last = tl.where(real, packed + count - queries.length + query, -1)
    else:
        at = b * queries.last_stride_b + query * queries.last_stride_t
        last = tl.load(queries.positions + at, mask=real, other=-1).to(tl.int32)
    span, limits = _visible_pages(last, real, packed, cache.sinks, score.window, F)
    share = tl.cdiv(span[1] - span[0], tl.num_programs(0))
    first = span[0] + split * share
    pages = cache.pages + head * F.page_bytes, cache.kv_heads * F.page_bytes
    state = _attend_pages(
        pages,
        cache.block_table + b * cache.table_width,
        (first, tl.minimum(first + share, span[1])),
        cache.sinks,
        tiles,
        factor,
        limits,
        score,
        cache.hot_k.dtype.element_ty,
        F,
    )
    hot = b * cache.stride_b + head * cache.stride_h
    for i in range(split, tl.cdiv(count, HOT_TOKENS), tl.num_programs(0)):
        slot = i * HOT_TOKENS + tl.arange(0, HOT_TOKENS)
        row = hot + slot.to(tl.int64) * F.head_dim
        bounds = count, cache.sinks, packed
        k, v = cache.hot_k + row, cache.hot_v + row
        state = _attend_hot(slot, bounds, k, v, q, last, score, state, F)
    high, total, acc = state
    place = (b * cache.kv_heads + head) * rows + column
    _store(result, split, place, real, high, total, acc, F)


@triton.jit
def merge_kernel(
    parts,
    part_lse,
    out,
    lse,
    rows,
    splits,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    F: tl.constexpr,
):
    """Output of a query and its natural log-sum-exp from those of its splits.

    Grid (queries, blocks of `CHANNELS` channels).

    Args:
        parts, part_lse: float32 `[splits, rows, D]` and `[splits, rows]`, to base 2; a part whose
            log-sum-exp is minus infinity was never written.
        out, lse: `[rows, D]` and float32 `[rows]`.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    high, total = float("-inf"), 0.0
    acc = tl.full((CHANNELS,), 0.0, tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        weight = tl.load(part_lse + split * rows + row, mask=split < splits, other=float("-inf"))
        weight *= LOG2_E
        top = tl.maximum(high, tl.max(weight, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(weight - base)
        mask = (weight > 0)[:, None] & (channel < D)[None, :]
        at = (split[:, None] * rows + row) * D + channel[None, :]
        part = tl.load(parts + at, mask=mask, other=0)
        decay = tl.exp2(high - base)
        acc = acc * decay + tl.sum(part * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        high = top
    total = tl.where(total == 0, 1.0, total)
    acc = acc / total
    tl.store(out + row * D + channel, _narrow(acc, out.dtype.element_ty, F), mask=channel < D)
    tl.store(lse + row, (high + tl.log2(total)) * LN_2)
