"""Pages as operands of tensor cores: codes by masks, products with keys, weighted sums of values.

Nothing is dequantized. A masked code is a float16 as it stands (`_codes`), scales are folded into
queries and weights, and zero points add one number a column (docs/design.md, "On GPUs").
"""

# ruff: noqa: RET505, RUF005 (Triton compiles what follows a return, and has no starred tuples)
import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, F: tl.constexpr):
    """`acc + a @ b`. The interpreter keeps bfloat16 as integers, and would multiply those."""
    if F.interpreted:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, TYPE: tl.constexpr, F: tl.constexpr):
    """Float32 in another type, rounded to nearest. The interpreter truncates to bfloat16."""
    if F.interpreted and tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def split_rows(x, COUNT: tl.constexpr):
    """A tile `[rows, columns]` as `COUNT` tiles one below the other: registers get other names."""
    if COUNT == 1:
        return (x,)
    else:
        a, b = x.reshape(2, x.shape[0] // 2, x.shape[1]).permute(1, 2, 0).split()
        return split_rows(a, COUNT // 2) + split_rows(b, COUNT // 2)


@triton.jit
def stack_rows(tiles, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Inverse of `split_rows`, for tiles from `FIRST` on."""
    if COUNT == 1:
        return tiles[FIRST]
    else:
        a = stack_rows(tiles, FIRST, COUNT // 2)
        b = stack_rows(tiles, FIRST + COUNT // 2, COUNT // 2)
        return tl.join(a, b).permute(2, 0, 1).reshape(2 * a.shape[0], a.shape[1])


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
def load_words(part, TILE: tl.constexpr, T: tl.constexpr, TYPE: tl.constexpr):
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
    return dot(a, x, tl.full((16, F.columns), 0.0, tl.float32), F)


@triton.jit
def _channel_scores(part, q, factor, F: tl.constexpr):
    """`page_scores` where each channel has a scale for every group of tokens."""
    K: tl.constexpr = F.keys
    ALL_TILES: tl.constexpr = K.all_tiles
    SLOTS: tl.constexpr = K.slots
    GROUPS: tl.constexpr = K.groups
    TILES: tl.constexpr = K.tiles
    words, tiles = (), ()
    for i in tl.static_range(TILES):
        words = words + (load_words(part, i, K, tl.int16),)
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
                    acc = dot(code, scaled[j], acc, F)
                    if K.two_terms:
                        acc = dot(code, rest[j], acc, F)
                if F.softcap or not K.uniform:
                    acc = acc * (factor * (1 / K.tile_unit(t)))[None, :] + (shift * factor)[None, :]
                tiles = tiles + (acc,)
    scores = stack_rows(tiles, 0, K.all_tiles)
    if K.uniform and not F.softcap:
        return scores, factor * (1 / K.tile_unit(0)), shift * factor
    else:
        return scores, tl.full((F.columns,), 1.0, tl.float32), 0.0


@triton.jit
def _token_scores(part, q, factor, F: tl.constexpr):
    """`page_scores` where each token has a scale for every group of channels."""
    K: tl.constexpr = F.keys
    FOLDS: tl.constexpr = K.folds
    SLOTS: tl.constexpr = K.slots
    GROUPS: tl.constexpr = K.groups
    words = load_words(part, 0, K, tl.int16)
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
                    acc = dot(_codes(words, K.position(t, j), K.bits, F), mine[j], acc, F)
            tiles = tiles + (acc * (factor * (1 / K.tile_unit(t)))[None, :],)
        scale = _load_numbers(part, K.scale_at(g), K.rows, K.rows)
        zero = _load_numbers(part, K.zero_at(g), K.rows, K.rows)
        scores += stack_rows(tiles, 0, K.folds) * scale.to(tl.float32)[:, None]
        scores += zero.to(tl.float32)[:, None] * (total * factor)[None, :]
    return scores, tl.full((F.columns,), 1.0, tl.float32), 0.0


@triton.jit
def page_scores(page, q, factor, RAW: tl.constexpr, F: tl.constexpr):
    """Scores of a page's tokens, as `s, a, b` that make them `a * s + b`: `s` is `[page_size, columns]`.

    Args:
        page: pointer to the page's bytes.
        q, factor: queries for each slot of keys and a factor `[columns]`, see `_prepare_queries`.
    """
    K: tl.constexpr = F.keys
    if K.is_raw:
        acc = tl.full((F.page_size, F.columns), 0.0, tl.float32)
        return dot(load_words(page, 0, K, RAW), q[0], acc, F), factor, 0.0
    elif K.by_row:
        return _token_scores(page, q, factor, F)
    else:
        return _channel_scores(page, q, factor, F)


@triton.jit
def add_values(part, p, acc, shift, RAW: tl.constexpr, F: tl.constexpr):
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
        words = words + (load_words(part, i, V, tl.int16),)
    for g in tl.static_range(GROUPS):
        scale = _load_numbers(part, V.scale_at(g), V.columns, V.columns)
        zero = _load_numbers(part, V.zero_at(g), V.columns, V.columns)
        middle = zero.to(tl.float32) + V.middle * scale.to(tl.float32)
        weights = split_rows((p * scale.to(tl.float32)[:, None]).to(tl.float16), V.slots)
        rounded = tl.full((16, F.columns), 0.0, tl.float32)
        for j in tl.static_range(SLOTS):
            rounded = dot(tl.full((16, V.words), 1.0, tl.float16), weights[j], rounded, F)
        lost = tl.sum(p * middle[:, None], 0) - tl.max(rounded, 0) * V.middle
        shifts = shifts + (shift[g] + lost,)
        for t in tl.static_range(ALL_TILES):
            if V.group_of(t) == g:
                total = acc[t]
                for j in tl.static_range(SLOTS):
                    code = _codes(words[t % V.tiles], V.position(t, j), V.bits, F)
                    weight = (weights[j] * (1 / V.slot_unit(j))).to(tl.float16)
                    total = dot(code, weight, total, F)
                sums = sums + (total,)
    return sums, shifts
