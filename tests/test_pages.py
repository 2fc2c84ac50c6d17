"""Pages: every format packs and unpacks exactly, has the size it says and the order it documents."""

import itertools
import re
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitkv.pages import (
    LAYOUTS,
    RAW_DTYPES,
    AffineFormat,
    Byted,
    CenteredFormat,
    CenteredTensor,
    CodebookFormat,
    CodedTensor,
    OutlierFormat,
    OutlierTensor,
    PageFormat,
    PromotedFormat,
    PromotedTensor,
    QuantizedTensor,
    convert,
    layout_for,
)

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (64, 128)
GROUPS = (32, 64, 128, "page")
SITES = (("key", "channel"), ("key", "token"), ("value", "token"))


def exactly(sentence: str) -> str:
    return f"^{re.escape(sentence)}$"


def extent_of(granularity: str, page_size: int, head_dim: int) -> int:
    return page_size if granularity == "channel" else head_dim


def divides(site, granularity, bits, group, page_size, head_dim) -> bool:
    return group == "page" or extent_of(granularity, page_size, head_dim) % group == 0


CODED = [
    (*site, *rest)
    for site, *rest in itertools.product(SITES, (1, 2, 4, 8), GROUPS, PAGE_SIZES, HEAD_DIMS)
]
VALID = [case for case in CODED if divides(*case)]
INVALID = [case for case in CODED if not divides(*case)]


def part(site, granularity, bits, group, page_size, head_dim, layout="strided") -> AffineFormat:
    group = extent_of(granularity, page_size, head_dim) if group == "page" else group
    return AffineFormat(site, bits, granularity, group, head_dim, page_size, layout=layout)


def random_codes(form: AffineFormat, *lead: int) -> QuantizedTensor:
    """Codes that use every level, and scales that are all different."""
    tokens, channels = form.page_size, form.head_dim
    codes = torch.randint(0, 2**form.bits, (*lead, tokens, channels), dtype=torch.uint8)
    if form.granularity == "channel":
        shape = (*lead, tokens // form.group_size, channels)
    else:
        shape = (*lead, tokens, channels // form.group_size)
    return QuantizedTensor(codes, torch.randn(shape).half(), torch.randn(shape).half(), form.granularity)


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    for x, y in zip(a[:3], b[:3], strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y))
    assert a.granularity == b.granularity


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", VALID, ids=str)
def test_unpack_is_the_exact_inverse_of_pack(case, layout):
    form = part(*case, layout=layout)
    q = random_codes(form)
    data = form.pack(q)
    assert data.dtype == torch.uint8
    assert data.shape == (form.nbytes,)
    assert_same(form.unpack(data), q)


@pytest.mark.parametrize("case", INVALID, ids=str)
def test_groups_that_do_not_divide_are_refused(case):
    _, granularity, _, group, page_size, head_dim = case
    name = "page_size" if granularity == "channel" else "head_dim"
    extent = extent_of(granularity, page_size, head_dim)
    sentence = (
        f"{name} {extent} is not a multiple of group_size {group}; "
        f"pass a group_size that divides {extent}, or 'page' for one group"
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        part(*case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", RAW_DTYPES)
@pytest.mark.parametrize("site", ["key", "value"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_unquantized_values_come_back_bit_for_bit(dtype, site, head_dim, page_size, layout):
    x = torch.randn(page_size, head_dim).to(RAW_DTYPES[dtype])
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, -0.0, torch.nan])
    form = AffineFormat(
        site, 8 * x.element_size(), "token", head_dim, head_dim, page_size, dtype, layout
    )
    data = form.pack(QuantizedTensor(x, None, None, "token"))
    back = form.unpack(data).codes
    assert data.numel() == form.nbytes == x.nbytes
    assert torch.equal(back.contiguous().view(torch.uint8), x.view(torch.uint8))


@given(
    seed=st.integers(0, 2**32),
    site=st.sampled_from(SITES),
    bits=st.sampled_from([1, 2, 4, 8]),
    page_size=st.sampled_from(PAGE_SIZES),
    head_dim=st.integers(1, 20).map(lambda n: 16 * n),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_any_head_dim_that_is_a_multiple_of_16_packs(seed, site, bits, page_size, head_dim, layout):
    torch.manual_seed(seed)
    form = part(*site, bits, "page", page_size, head_dim, layout)
    q = random_codes(form, 2)
    assert_same(form.unpack(form.pack(q)), q)


@pytest.mark.parametrize(
    ("bits", "group", "page_bytes", "bits_per_element"),
    [
        (4, 128, 17_408, 4.25),
        (2, 128, 9_216, 2.25),
        (1, 128, 5_120, 1.25),
        (8, 128, 33_792, 8.25),
        (2, 32, 12_288, 3.0),
        (1, 32, 8_192, 2.0),
    ],
)
def test_a_page_of_128_tokens_and_128_channels_has_this_size(bits, group, page_bytes, bits_per_element):
    form = PageFormat(
        part("key", "channel", bits, group, 128, 128), part("value", "token", bits, group, 128, 128)
    )
    page = form.pack(random_codes(form.key), random_codes(form.value))
    assert page.nbytes == form.page_bytes == page_bytes
    assert form.bits_per_element == bits_per_element


def strided_bytes(codes: list[list[int]], bits: int) -> bytes:
    """The definition, element by element: code j of word w of a row is column j * words + w.

    Where a row is too short for 16 words, the rows r, r + rows / folds, ... share one row of words.
    """
    rows, columns = len(codes), len(codes[0])
    folds = next(f for f in (1, 2, 4, 8, 16) if columns * bits * f >= 16 * 16)
    codes_per_word = 16 // (bits * folds)
    words = columns // codes_per_word
    data = bytearray(rows * columns * bits // 8)
    for row, column in itertools.product(range(rows), range(columns)):
        fold, word_row = divmod(row, rows // folds)
        j, word = divmod(column, words)
        bit = bits * (fold * codes_per_word + j)
        byte = 2 * (word_row * words + word) + bit // 8
        data[byte] |= codes[row][column] << bit % 8
    return bytes(data)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("site", "page_size"), [("key", 64), ("value", 64), ("value", 128)])
def test_the_strided_layout_is_what_it_says(site, bits, head_dim, page_size):
    form = part(site, "token", bits, "page", page_size, head_dim)
    q = random_codes(form)
    rows = q.codes if site == "key" else q.codes.T
    stored = bytes(form.pack(q)[: form.code_bytes].tolist())
    assert stored == strided_bytes(rows.tolist(), bits)


def lanes_bytes(codes: list[list[int]], bits: int) -> bytes:
    """The definition, element by element: 16 rows in the lanes of 64-byte vectors of 32 / bits columns.

    The code at bit position p * bits of byte k of vector n is column n * (32 / bits) + 4p + k. Where 16
    columns are left over (1 bit), two neighbouring blocks of rows share a vector after all others.
    """
    rows, columns = len(codes), len(codes[0])
    per_vector = 32 // bits
    vectors = columns // per_vector
    data = bytearray(rows * columns * bits // 8)
    for row, column in itertools.product(range(rows), range(columns)):
        block, lane = divmod(row, 16)
        n, place = divmod(column, per_vector)
        p, k = divmod(place, 4)
        vector = block * vectors + n
        if n == vectors:
            pair, second = divmod(block, 2)
            vector, p = rows // 16 * vectors + pair, p + 4 * second
        data[64 * vector + 4 * lane + k] |= codes[row][column] << p * bits
    return bytes(data)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("site", "page_size"), [("key", 64), ("value", 64), ("value", 128)])
@pytest.mark.parametrize("granularity", ["channel", "token"])
def test_the_lanes_layout_is_what_it_says(site, granularity, bits, head_dim, page_size):
    if site == "value" and granularity == "channel":
        pytest.skip("values are quantized per token")
    form = part(site, granularity, bits, "page", page_size, head_dim, "lanes")
    q = random_codes(form)
    rows = q.codes if site == "key" else q.codes.T
    stored = bytes(form.pack(q)[: form.code_bytes].tolist())
    assert stored == lanes_bytes(rows.tolist(), bits)


@pytest.mark.parametrize("site", ["key", "value"])
def test_unquantized_lanes_are_columns_of_16_rows(site):
    form = AffineFormat(site, 16, "token", 80, 80, 64, layout="lanes")
    x = torch.randn(64, 80).half()
    rows = x if site == "key" else x.T
    expected = b"".join(half_bytes(block.T) for block in rows.split(16))
    assert bytes(form.pack(QuantizedTensor(x, None, None, "token")).tolist()) == expected


@pytest.mark.parametrize("case", VALID[::7], ids=str)
def test_pages_convert_exactly_between_layouts(case):
    _, _, *rest = case
    value = part("value", "token", *rest) if divides("value", "token", *rest) else None
    key = part(*case) if case[0] == "key" else part("key", "token", *rest)
    strided = PageFormat(key, value or part("value", "token", 2, "page", key.page_size, key.head_dim))
    lanes = strided.with_layout("lanes")
    assert lanes.page_bytes == strided.page_bytes
    pages = strided.pack(random_codes(strided.key, 3, 2), random_codes(strided.value, 3, 2))
    moved = convert(pages, strided, lanes)
    assert not torch.equal(moved, pages)
    for x, y in zip(strided.unpack(pages), lanes.unpack(moved), strict=True):
        assert_same(x, y)
    assert torch.equal(convert(moved, lanes, strided), pages)
    assert convert(pages[:0], strided, lanes).shape == pages[:0].shape


def test_cpus_read_lanes_and_other_devices_the_layout_of_files():
    assert layout_for(torch.device("cpu")) == "lanes"
    assert layout_for(torch.device("cuda", 0)) == next(iter(LAYOUTS)) == "strided"


def test_native_kernels_get_a_part_as_the_numbers_of_csrc_page_h():
    assert part("key", "channel", 2, 32, 64, 96).numbers == (2, 64, 96, 32, False, 0)
    assert part("key", "token", 4, 32, 64, 96).numbers == (4, 64, 96, 32, True, 0)
    assert part("value", "token", 1, "page", 128, 80).numbers == (1, 80, 128, 80, False, 0)
    raw = AffineFormat("value", 16, "token", 96, 96, 64, "bfloat16")
    assert raw.numbers == (16, 96, 64, 96, False, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("granularity", ["channel", "token"])
def test_a_format_follows_from_its_numbers(granularity, layout):
    value = part("value", "token", 1, "page", 64, 80, layout)
    raw = AffineFormat("value", 16, "token", 80, 80, 64, "bfloat16", layout)
    for form in (PageFormat(part("key", granularity, 4, 16, 64, 80, layout), v) for v in (value, raw)):
        assert (
            PageFormat.of_numbers(form.key.numbers, form.value.numbers, layout, head_dim=form.head_dim)
            == form
        )


def half_bytes(x: Tensor) -> bytes:
    return b"".join(struct.pack("<e", value) for value in x.flatten().tolist())


def test_a_page_is_key_codes_scales_zero_points_then_the_same_of_values():
    form = PageFormat(part("key", "channel", 2, 32, 64, 96), part("value", "token", 4, 32, 64, 96))
    k, v = random_codes(form.key), random_codes(form.value)
    expected = (
        strided_bytes(k.codes.tolist(), 2)
        + half_bytes(k.scale)  # [T/g, D]
        + half_bytes(k.zero_point)
        + strided_bytes(v.codes.T.tolist(), 4)
        + half_bytes(v.scale.T)  # [D/g, T]: a group's tokens are neighbours
        + half_bytes(v.zero_point.T)
    )
    assert bytes(form.pack(k, v).tolist()) == expected


def test_dequantize_is_code_times_scale_plus_zero_point_of_its_group():
    form = PageFormat(part("key", "channel", 4, 32, 64, 96), part("value", "token", 2, 32, 64, 96))
    k, v = random_codes(form.key), random_codes(form.value)
    keys, values = form.dequantize(form.pack(k, v))
    for t, c in ((0, 0), (31, 5), (32, 5), (63, 95), (40, 64)):
        key = k.codes[t, c].item() * k.scale[t // 32, c].item() + k.zero_point[t // 32, c].item()
        value = v.codes[t, c].item() * v.scale[t, c // 32].item() + v.zero_point[t, c // 32].item()
        assert keys[t, c].item() == pytest.approx(key, rel=1e-6, abs=1e-6)
        assert values[t, c].item() == pytest.approx(value, rel=1e-6, abs=1e-6)


def test_pages_pack_alike_alone_and_together():
    form = part("key", "channel", 1, 64, 128, 64)
    q = random_codes(form, 3, 2)
    together = form.pack(q)
    alone = form.pack(QuantizedTensor(q.codes[2, 1], q.scale[2, 1], q.zero_point[2, 1], "channel"))
    assert together.shape == (3, 2, form.nbytes)
    assert torch.equal(together[2, 1], alone)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("key", 2, "token", 32, 64, 32), "page_size 32 is not supported; use 64 or 128"),
        (("key", 2, "token", 72, 72, 64), "head_dim 72 does not pack; it must be a multiple of 16"),
        (("key", 2, "token", 0, 0, 64), "head_dim 0 does not pack; it must be a multiple of 16"),
        (("keys", 2, "token", 32, 64, 64), "no site 'keys'; choose from key, value"),
        (("key", 2, "row", 32, 64, 64), "no granularity 'row'; choose from channel, token"),
        (
            ("key", 2, "token", 0, 64, 64),
            "head_dim 64 is not a multiple of group_size 0; "
            "pass a group_size that divides 64, or 'page' for one group",
        ),
        (
            ("key", 3, "token", 32, 64, 64),
            "bits 3 is not supported; use 1, 2, 4, 8, or 16 (unquantized)",
        ),
        (
            ("value", 2, "channel", 32, 64, 64),
            "values are quantized per token; use granularity='token' for values",
        ),
        (
            ("key", 16, "token", 64, 64, 64, "float32"),
            "16 bits cannot hold float32; use its own width",
        ),
        (("key", 16, "token", 64, 64, 64, "int16"), "16 bits cannot hold int16; use its own width"),
        (
            ("key", 2, "token", 32, 64, 64, "float16", "zigzag"),
            f"no layout 'zigzag'; choose from {', '.join(LAYOUTS)}",
        ),
    ],
)
def test_a_format_that_cannot_be_is_refused_with_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=exactly(sentence)):
        AffineFormat(*arguments)


def test_both_halves_of_a_page_agree_on_its_shape():
    with pytest.raises(
        ValueError, match=r"^head_dim differs within a page: 64 for keys, 128 for values$"
    ):
        PageFormat(part("key", "token", 2, 32, 64, 64), part("value", "token", 2, 32, 64, 128))


# --- indices into a codebook --------------------------------------------------------------------


def random_indices(form: CodebookFormat, *lead: int) -> CodedTensor:
    """Indices that use every bit, and scales that are all different."""
    codes = torch.randint(2**form.bits, (*lead, form.page_size, form.groups), dtype=torch.int32)
    halves = (torch.randn(*lead, form.page_size).half() for _ in range(form.scales))
    return CodedTensor(codes, *halves)


def plane_bytes(codes: list[list[int]], bits: int) -> bytes:
    """The definition, element by element: planes of 8, 4, 2 and 1 bits of groups of tokens."""
    data, shift = b"", 0
    for plane in [8] * (bits // 8) + [p for p in (4, 2, 1) if bits % 8 & p]:
        for group in zip(*codes, strict=True):  # all tokens of a group
            width = len(group) * plane // 8
            row = bytearray(width)
            for token, code in enumerate(group):
                j, byte = divmod(token, width)
                row[byte] |= (code >> shift) % 2**plane << j * plane
            data += bytes(row)
        shift += plane
    return data


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize(("channels", "scales", "page_size"), [(1, 2, 64), (4, 0, 128), (8, 1, 64)])
def test_indices_of_any_width_are_packed_exactly_in_planes(bits, channels, scales, page_size):
    form = CodebookFormat("key", bits, channels, 64, page_size, 64, scales)
    q = random_indices(form, 3, 2)
    data = form.pack(q)
    assert data.shape == (3, 2, form.nbytes)
    assert form.nbytes == page_size * (64 // channels * bits + 16 * scales) / 8
    assert form.code_bits == bits / channels
    back = form.unpack(data)
    for x, y in zip(back, q, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y))
    halves = b"".join(half_bytes(x[2, 1]) for x in (q.scale, q.zero_point)[:scales])
    assert bytes(data[2, 1].tolist()) == plane_bytes(q.codes[2, 1].tolist(), bits) + halves
    assert torch.equal(form.pack(random := form.unpack(noise(form))), noise(form))
    assert random.codes.max() < 2**bits


def noise(form) -> Tensor:
    """Damaged bytes of two heads, always the same."""
    draw = torch.Generator().manual_seed(3)
    return torch.randint(256, (2, form.nbytes), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize(("heads", "groups"), [(2, 16), (1, 16), (2, 1), (1, 1)])
def test_codebooks_of_one_head_or_group_serve_all(heads, groups):
    codebook = torch.randn(heads, groups, 32, 4)
    form = CodebookFormat("value", 5, 4, 64, 64, 64, scales=2)
    q = random_indices(form, 3, 2)
    x = q.dequantize(codebook)
    assert x.shape == (3, 2, 64, 64)
    for page, head, token, channel in ((0, 0, 0, 0), (2, 1, 63, 63), (1, 1, 17, 30)):
        group, c = divmod(channel, 4)
        entry = codebook[head % heads, group % groups, q.codes[page, head, token, group], c]
        scale, zero = (y[page, head, token].float() for y in (q.scale, q.zero_point))
        assert x[page, head, token, channel].item() == pytest.approx(
            (entry * scale + zero).item(), abs=1e-6
        )
    with pytest.raises(ValueError, match=r"^codes of a codebook mean nothing without it; "):
        q.dequantize(None)


def test_a_width_that_is_not_head_dim_packs():
    form = CodebookFormat("key", 1, 1, 64, 64, 192, scales=1)
    assert form.nbytes == 64 * (192 // 8 + 2)
    assert form.bits_per_element == 3 + 16 / 64
    q = random_indices(form, 2)
    assert torch.equal(form.unpack(form.pack(q)).codes, q.codes)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: CodebookFormat("key", 17, 4, 64, 64, 64),
            "an index of 17 bits is not supported; use 1 to 16",
        ),
        (
            lambda: CodebookFormat("key", 8, 5, 64, 64, 64),
            "64 channels of a head are not a multiple of 5 coupled ones; "
            "couple a number that divides 64",
        ),
        (
            lambda: CodebookFormat("key", 8, 4, 64, 64, 64, 3),
            "3 scales a token are not supported; use 0, 1 or 2",
        ),
        (
            lambda: OutlierFormat("key", 2, 1024, 128, 10),
            "a page of 128 tokens of 1024 channels has 131072 elements, and outliers have positions "
            "below 65536; use page_size 64",
        ),
        (
            lambda: OutlierFormat("key", 2, 64, 64, 4097),
            "4097 outliers do not fit a page; use 0 to 4096",
        ),
        (
            lambda: PromotedFormat("key", 8, 64, 64, 4),
            "bits 8 cannot be doubled to at most 8; use 1, 2 or 4",
        ),
        (lambda: PromotedFormat("key", 2, 64, 64, 65), "65 promoted channels; use 0 to 64"),
        (
            lambda: PromotedFormat("key", 2, 320, 64, 4),
            "head_dim 320 has channels that no byte can name; use at most 256",
        ),
        (
            lambda: CenteredFormat("key", 8, 5, 64, 64),
            "64 channels of a head are not a multiple of 5 coupled ones; "
            "couple a number that divides 64",
        ),
    ],
)
def test_formats_beside_affine_ones_refuse_with_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=exactly(sentence)):
        make()


# --- what lies beside codes ---------------------------------------------------------------------


@pytest.mark.parametrize(("page_size", "head_dim"), [(64, 64), (128, 256), (128, 512)])
@pytest.mark.parametrize("outliers", [0, 1, 40])
def test_outliers_replace_what_codes_stand_for(page_size, head_dim, outliers):
    form = OutlierFormat("key", 3, head_dim, page_size, outliers, scales=1)
    elements = page_size * head_dim
    position = torch.stack([torch.randperm(elements)[:outliers].sort().values for _ in range(2)]).int()
    if outliers:
        position[1, -1] = elements - 1  # up to 65535
    q = OutlierTensor(random_indices(form.dense, 2), position, torch.randn(2, outliers).half())
    data = form.pack(q)
    assert data.shape == (2, form.nbytes)
    assert form.nbytes == form.dense.nbytes + 4 * outliers
    back = form.unpack(data)
    assert torch.equal(back.position, position)
    assert torch.equal(back.value, q.value)
    codebook = torch.randn(2, head_dim, 8, 1)
    x, dense = back.dequantize(codebook).flatten(1), q.dense.dequantize(codebook).flatten(1)
    expected = dense.scatter(1, position.long(), q.value.float())
    assert torch.equal(x, expected)
    tail = form.unpack(noise(form)).dequantize(codebook)
    assert tail.shape == (2, page_size, head_dim)


@pytest.mark.parametrize(("promoted", "head_dim"), [(0, 64), (8, 64), (10, 80), (256, 256)])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_promoted_channels_have_their_high_bits_in_a_plane_of_their_own(
    promoted, head_dim, bits, layout
):
    form = PromotedFormat("key", bits, head_dim, 64, promoted, layout)
    channels = torch.stack([torch.randperm(head_dim)[:promoted].sort().values for _ in range(2)]).byte()
    limit = torch.full((2, 1, head_dim), 2**bits)
    limit.scatter_(-1, channels.long().unsqueeze(-2), 4**bits)
    codes = torch.randint(256, (2, 64, head_dim)).remainder(limit).byte()
    scale, zero_point = (torch.randn(2, 1, head_dim).half() for _ in range(2))
    q = PromotedTensor(QuantizedTensor(codes, scale, zero_point, "channel"), channels)
    data = form.pack(q)
    assert data.shape == (2, form.nbytes)
    assert form.nbytes == 64 * head_dim * bits // 8 + 4 * head_dim + -(-promoted // 4) * 4 + (
        promoted * 64 * bits // 8
    )
    back = form.unpack(data)
    assert_same(back.dense, q.dense)
    assert torch.equal(back.channels, channels)
    assert torch.equal(back.dequantize(), codes * scale.float() + zero_point.float())
    assert form.unpack(noise(form)).dequantize().shape == (2, 64, head_dim)


@pytest.mark.parametrize("bits", [8, 16])
def test_centered_tensors_come_back_and_cost_a_byte_a_norm_a_scale_and_a_mean(bits):
    form = CenteredFormat("value", bits, 8, 96, 64)
    norm, scale = (Byted.of(torch.randn(2, 64)) for _ in range(2))
    mean = Byted.of(torch.randn(2, 96))
    q = CenteredTensor(random_indices(form.dense, 2).codes, norm, scale, mean)
    data = form.pack(q)
    assert data.shape == (2, form.nbytes)
    assert form.nbytes == 64 * 12 * bits // 8 + 64 + 64 + 96 + 12
    back = form.unpack(data)
    codebook = torch.randn(1, 1, 2**bits, 8)
    assert torch.equal(back.dequantize(codebook), q.dequantize(codebook))
    entry = codebook[0, 0, q.codes[1, 5, 2], 3]
    expected = 2 ** norm.restore()[1, 5] * (2 ** scale.restore()[1, 5] * entry + mean.restore()[1, 19])
    assert back.dequantize(codebook)[1, 5, 19].item() == pytest.approx(expected.item(), rel=1e-5)
    assert form.unpack(noise(form)).dequantize(codebook).shape == (2, 64, 96)


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1.0, 1e4])
def test_numbers_in_a_byte_are_off_by_half_a_step(spread):
    x = 3 + spread * torch.randn(5, 100)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    error = (Byted.of(x).restore() - x).abs()
    rounding = 2**-11 * x.abs().amax(-1, keepdim=True) + 2**-24
    assert (error <= 0.51 * step + rounding).all()
