"""Kernels that quantize and pack: `bitkv.codecs.triton` cuts pages for them.

Min-max bytes equal those of affine.py. Searched levels take the same steps on numbers measured from the
group's mean, as csrc/quantize.h does: a float32 sum can bear those.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(65504.0)  # the largest and the smallest float16
SMALLEST = tl.constexpr(2.0**-24)
REFITS = tl.constexpr(4)
TAIL_WEIGHT = tl.constexpr(0.15)
LARGEST_GAIN = tl.constexpr(3.0)
NO_FRACTION = tl.constexpr(1.5 * 2**23)  # a float32 this large has none


@triton.jit
def encode_pages(
    x,
    words,
    heads,
    page_stride,
    head_stride,
    token_stride,
    out_page_stride,
    out_head_stride,
    TILES: tl.constexpr,
):
    block = tl.program_id(0) % TILES.num_blocks
    head = tl.program_id(0) // TILES.num_blocks
    page, head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    x += page * page_stride + head * head_stride
    words += page * out_page_stride + head * out_head_stride
    encode_block(x, token_stride, words, block, TILES)


@triton.jit
def encode_block(x, token_stride, words, block, TILES: tl.constexpr):
    """Quantize and pack a block of lanes of the part of a page that begins at `x`, into `words`."""
    lane, group, element = tile_indices(block, TILES.outer, TILES)
    e = group * TILES.size + element
    values = tl.load(x + tile_offsets(lane, e, token_stride, TILES))
    if TILES.bits >= 16:  # unquantized: a code is the number itself
        codes = values.to(words.dtype.element_ty, bitcast=True)
    else:
        codes, scale, zero_point = _quantize(values.to(tl.float32), TILES)
        codes = codes << (lane // TILES.span * TILES.outer_shift)
        LANES: tl.constexpr = TILES.outer * TILES.span
        at = words + TILES.code_words + group * LANES + lane
        tl.store(at, scale.to(tl.float16).to(tl.int16, bitcast=True))
        tl.store(at + TILES.groups * LANES, zero_point.to(tl.float16).to(tl.int16, bitcast=True))
    _store_words(codes, words, block, TILES)


@triton.jit
def tile_indices(block, OUTER: tl.constexpr, TILES: tl.constexpr):
    """Lane `[N, 1]`, group `[N, 1]` and element within the group `[1, S]` of a program's tile.

    A row of the tile is one group of one lane. Where there are fewer than a power of two, the last one
    is there more than once: it is read, computed and written alike each time.
    """
    GROUPS: tl.constexpr = TILES.padded[0]
    SIZE: tl.constexpr = TILES.padded[1]
    LANES: tl.constexpr = OUTER * TILES.block
    row = tl.arange(0, GROUPS * LANES)[:, None]
    i = block * TILES.block + row % TILES.block
    group = row // LANES
    element = tl.arange(0, SIZE)[None, :]
    if TILES.span % TILES.block != 0:
        i = tl.minimum(i, TILES.span - 1)
    if TILES.groups != GROUPS:
        group = tl.minimum(group, TILES.groups - 1)
    if TILES.size != SIZE:
        element = tl.minimum(element, TILES.size - 1)
    return row % LANES // TILES.block * TILES.span + i, group, element


@triton.jit
def tile_offsets(lane, e, token_stride, TILES: tl.constexpr):
    """Where a tile's numbers lie behind the first one of their page."""
    if TILES.by_channel:
        return e * token_stride + lane
    return lane * token_stride + e


@triton.jit
def _store_words(codes, words, block, TILES: tl.constexpr):
    """Join the codes `[N, S]` that share words; lanes' places in a word are shifted already."""
    OUTER: tl.constexpr = TILES.outer
    SIZE: tl.constexpr = TILES.padded[1]
    if OUTER > 1:
        ROWS: tl.constexpr = TILES.padded[0] * TILES.block
        codes = tl.reshape(codes, (TILES.padded[0], OUTER, TILES.block * SIZE))
        codes = tl.reshape(tl.sum(codes, axis=1), (ROWS, SIZE))
    i, group, element = tile_indices(block, 1, TILES)
    e = group * TILES.size + element
    at = words + i * TILES.span_words + e % TILES.stretch * TILES.stretch_words
    # what shares a word along the extent lies in other rows or columns of the tile, and is added pass
    # by pass in the page itself; with 2 bits and more there is mostly one pass
    PASSES: tl.constexpr = TILES.passes
    for p in tl.static_range(PASSES):
        here = e // TILES.stretch == p
        joined = codes << (p * TILES.pass_shift)
        if p > 0:
            tl.debug_barrier()
            joined |= tl.load(at, mask=here, other=0)
        tl.store(at, joined.to(words.dtype.element_ty), mask=here)


@triton.jit
def _quantize(x, TILES: tl.constexpr):
    """Codes `[N, S]`, scale and zero point `[N, 1]` of groups `x` `[N, S]`: `Affine.quantize`."""
    TOP: tl.constexpr = float(2**TILES.bits - 1)
    x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    nan = tl.sum(x * 0.0, axis=1, keep_dims=True)  # 0, or NaN where the group has one
    x = tl.where(x == x, x, 0.0)
    low, high = tl.min(x, axis=1, keep_dims=True), tl.max(x, axis=1, keep_dims=True)
    scale, zero_point = _stored(tl.div_rn(high - low, TOP), low)
    if TILES.levels == 0:
        codes = _nearest(tl.div_rn(x - zero_point, scale), TOP)
    else:
        # what a group's last element stands in for counts nothing
        counts = tl.where(tl.arange(0, x.shape[1])[None, :] < TILES.size, 1.0, 0.0)
        mean = low + tl.sum(counts * (x - low), axis=1, keep_dims=True) / TILES.size
        deviation = x - mean
        squares = tl.sum(counts * deviation * deviation, axis=1, keep_dims=True)
        center = -0.0 * mean if TILES.bits == 1 else (low + high) * 0.5 - mean
        scale, zero_point = _search(
            deviation, counts, squares, mean, high - low, center, scale, zero_point, TILES
        )
        codes = _nearest(tl.div_rn(x - zero_point, scale), TOP)
        if TILES.levels == 2:
            covariance = tl.sum(counts * deviation * codes, axis=1, keep_dims=True) * scale
            gain = tl.where(covariance > 1e-12, squares / tl.maximum(covariance, 1e-12), 1.0)
            gain = tl.clamp(gain, 1.0, LARGEST_GAIN)
            scale, zero_point = _stored(scale * gain, mean + (zero_point - mean) * gain)
    return codes.to(tl.int32), scale + nan, zero_point + nan


@triton.jit
def _search(
    x,
    counts,
    squares,
    mean,
    extent,
    center,
    scale,
    zero_point,
    TILES: tl.constexpr,
):
    """The best of a few ranges, each refitted by least squares: affine.py's `_fit_mse`.

    Args:
        x: deviations from the group's `mean`.
        counts: 1, or 0 for what is not in the group.
        squares: the sum of the squared deviations.
        extent, center: of the group's range; the center is a deviation.
        scale, zero_point: the min-max fit, to be bettered.
    """
    TOP: tl.constexpr = float(2**TILES.bits - 1)
    weights = counts
    if TILES.bits > 1:
        alpha = TAIL_WEIGHT / tl.maximum(squares / TILES.size, 1e-30)
        weights = counts * (1.0 + alpha * x * x) * (1.0 / (1.0 + TAIL_WEIGHT))
    mean_x = tl.sum(weights * x, axis=1, keep_dims=True) / TILES.size
    best_error = _squared_error(x, weights, scale, zero_point - mean, TOP)
    for n in tl.static_range(len(TILES.clips)):
        s = tl.maximum(extent * TILES.clips[n] / TOP, SMALLEST)
        z = center - s * (TOP / 2)
        for _ in range(REFITS):
            s, z = _refit(x, weights, mean_x, s, z, TOP, TILES.size)
        s, z = _stored(s, z + mean)
        error = _squared_error(x, weights, s, z - mean, TOP)
        scale = tl.where(error < best_error, s, scale)
        zero_point = tl.where(error < best_error, z, zero_point)
        best_error = tl.minimum(error, best_error)
    return scale, zero_point


@triton.jit
def _refit(x, weights, mean_x, scale, zero_point, TOP: tl.constexpr, SIZE: tl.constexpr):
    """The weighted least-squares line through (code, x); unchanged scale where all codes are equal."""
    codes = _nearest((x - zero_point) * (1.0 / scale), TOP)
    weighted = weights * codes
    total = tl.sum(weighted, axis=1, keep_dims=True)
    mean_code = total / SIZE
    variance = tl.sum(weighted * codes, axis=1, keep_dims=True) - mean_code * total
    covariance = tl.sum(weighted * x, axis=1, keep_dims=True) - mean_x * total
    slope = covariance / tl.maximum(variance, 1e-6)
    scale = tl.maximum(tl.where(variance > 0.25 / SIZE, slope, scale), SMALLEST)
    return scale, mean_x - scale * mean_code


@triton.jit
def _squared_error(x, weights, scale, zero_point, TOP: tl.constexpr):
    miss = _nearest((x - zero_point) * (1.0 / scale), TOP) * scale + (zero_point - x)
    return tl.sum(weights * miss * miss, axis=1, keep_dims=True)


@triton.jit
def _nearest(x, TOP: tl.constexpr):
    """The nearest code, ties to even."""
    return tl.clamp(x, 0.0, TOP) + NO_FRACTION - NO_FRACTION


@triton.jit
def _stored(scale, zero_point):
    """As a page stores them, so that codes are chosen against the numbers they will meet."""
    scale = tl.clamp(scale, SMALLEST, LARGEST)
    zero_point = tl.clamp(zero_point, -LARGEST, LARGEST)
    return scale.to(tl.float16).to(tl.float32), zero_point.to(tl.float16).to(tl.float32)
