"""Native quantize-and-pack: the bytes of the Python codecs, from every instruction set."""

import itertools
import math
from functools import partial

import encoding
import pytest
import torch
from encoding import (
    DTYPES,
    SEARCHED,
    SHAPES,
    SITES,
    by_group,
    errors,
    pages_of,
    room_for,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitkv import native
from bitkv.codecs import Affine, Codec, Unquantized
from bitkv.pages import AffineFormat

if native.why_not():
    pytest.skip(native.why_not(), allow_module_level=True)

ISAS = native.module().isas()
form_of = partial(encoding.form_of, layout="lanes")


def encode(isa: str, codec: Codec, x: Tensor, form: AffineFormat, *, threads: int = 2) -> Tensor:
    """What the kernel writes for `[pages, heads, page_size, head_dim]`, and that it writes no more."""
    out = room_for(x, form)
    native.module().encode(
        isa,
        x.data_ptr(),
        native.DTYPES[x.dtype],
        x.stride()[:3],
        tuple(x.shape),
        form.numbers,
        form.site == "key",
        codec.native_levels,
        out.data_ptr(),
        out.stride()[:2],
        threads,
    )
    return written(out, form)


# --- min-max: the same bytes ------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("page_size", "head_dim"), SHAPES)
@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_minmax_bytes_are_those_of_the_python_codec(bits, site, granularity, page_size, head_dim, isa):
    for group_size, dtype in itertools.product((32, 64, 128, "page"), DTYPES):
        codec = Affine(bits, granularity, group_size)
        x = pages_of(page_size, head_dim, dtype)
        if form := form_of(codec, site, x):
            assert torch.equal(encode(isa, codec, x, form), form.pack(codec.quantize(x)))


@pytest.mark.parametrize("isa", ISAS)
@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    site=st.sampled_from(SITES),
    page_size=st.sampled_from([64, 128]),
    head_dim=st.integers(1, 17).map(lambda n: 16 * n),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.integers(-30, 20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_minmax_bytes_are_the_same_for_any_head_and_size(
    isa, bits, site, page_size, head_dim, dtype, magnitude, seed
):
    x = (pages_of(page_size, head_dim, torch.float32, seed=seed) * 2.0**magnitude).to(dtype)
    x += 0.0  # which of 0 and -0 is less is left open
    codec = Affine(bits, site[1], "page")
    form = form_of(codec, site[0], x)
    assert torch.equal(encode(isa, codec, x, form), form.pack(codec.quantize(x)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("site", "granularity"), SITES)
def test_tokens_may_lie_apart(site, granularity, isa):
    """Models compute `[tokens, heads, head_dim]`."""
    x = torch.randn(3 * 128, 2, 80).bfloat16().unflatten(0, (3, 128)).transpose(1, 2)
    assert not x.is_contiguous()
    codec = Affine(1, granularity, "page")
    form = form_of(codec, site, x)
    assert torch.equal(encode(isa, codec, x, form), form.pack(codec.quantize(x)))


# --- searched levels: the same steps ----------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("levels", SEARCHED)
@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_searched_codes_are_those_of_the_python_codec(bits, site, granularity, levels, isa):
    """But for the order of float32 sums, which may move a number that lies between two levels."""
    codec = Affine(bits, granularity, 32, levels)
    x = torch.randn(8, 4, 128, 128, generator=torch.Generator().manual_seed(bits))
    form = form_of(codec, site, x)
    mine, python = form.unpack(encode(isa, codec, x, form)), codec.quantize(x)
    assert (mine.codes == python.codes).double().mean() > 0.999
    assert (mine.scale / python.scale - 1).abs().double().mean() < 1e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("levels", SEARCHED)
@pytest.mark.parametrize(("page_size", "head_dim"), [(64, 80), (128, 128)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_searched_error_is_that_of_the_python_codec(bits, page_size, head_dim, levels, isa):
    for (site, granularity), dtype in itertools.product(SITES, DTYPES):
        codec = Affine(bits, granularity, "page", levels)
        x = pages_of(page_size, head_dim, dtype, pages=8)
        form = form_of(codec, site, x)
        restored = codec.dequantize(form.unpack(encode(isa, codec, x, form)))
        mine = errors(codec, x, restored).sum()
        python = errors(codec, x, codec.dequantize(codec.quantize(x))).sum()
        # a few groups of 8 bits lie between two float16 scales
        assert mine == pytest.approx(python.item(), rel=1e-3 if bits < 8 else 1e-2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group_size", [32, "page"])
@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_no_group_is_worse_than_with_minmax(bits, site, granularity, group_size, isa):
    x = pages_of(128, 128, torch.float16)
    x[:, :, 5] *= 40
    codec, minmax = Affine(bits, granularity, group_size, "mse"), Affine(bits, granularity, group_size)
    form = form_of(codec, site, x)
    searched, plain = (
        errors(codec, x, c.dequantize(form.unpack(encode(isa, c, x, form)))) for c in (codec, minmax)
    )
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < plain.sum()


# --- what is not quantized --------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", ["key", "value"])
@pytest.mark.parametrize(("page_size", "head_dim"), [*SHAPES, (64, 16)])
def test_unquantized_pages_hold_the_numbers_themselves(page_size, head_dim, site, dtype, isa):
    codec, x = Unquantized(), pages_of(page_size, head_dim, dtype)
    x[0, 0, 0, :3] = torch.tensor([math.inf, -0.0, math.nan])
    form = form_of(codec, site, x)
    assert torch.equal(encode(isa, codec, x, form), form.pack(codec.quantize(x)))


# --- numbers that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_infinities_saturate(bits, site, granularity, isa):
    x = pages_of(64, 80, torch.float16)
    x[0, 0, 3, 7], x[1, 1, 60, 79] = math.inf, -math.inf
    codec = Affine(bits, granularity, "page")
    form = form_of(codec, site, x)
    assert torch.equal(encode(isa, codec, x, form), form.pack(codec.quantize(x)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("levels", ["minmax", *SEARCHED])
@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_nan_shows_in_its_whole_group_and_nowhere_else(bits, site, granularity, levels, isa):
    x = pages_of(64, 96, torch.bfloat16)
    x[0, 0, 3, 7] = x[1, 1, 60, 95] = math.nan
    codec = Affine(bits, granularity, 32, levels)
    form = form_of(codec, site, x)
    restored = codec.dequantize(form.unpack(encode(isa, codec, x, form)))
    expected = by_group(x, codec).isnan().any(-1, keepdim=True).expand_as(by_group(x, codec))
    assert torch.equal(by_group(restored, codec).isnan(), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("levels", ["minmax", *SEARCHED])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 7.0, -1e-7, 65504.0])
def test_equal_numbers_come_back(value, bits, levels, isa):
    x = torch.full((1, 1, 64, 64), value).half()
    codec = Affine(bits, "token", 32, levels)
    form = form_of(codec, "value", x)
    restored = codec.dequantize(form.unpack(encode(isa, codec, x, form)))
    assert torch.equal(restored, x.float())


# --- threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pages", [1, 9])
@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2, 16])
def test_threads_do_not_change_a_byte(bits, site, granularity, pages, isa):
    """Few pages are shared out in slices, many whole; two blocks of 1-bit rows may share a vector."""
    codec = Unquantized() if bits == 16 else Affine(bits, granularity, "page", "mse")
    x = pages_of(128, 80, torch.bfloat16, pages=pages)
    form = form_of(codec, site, x)
    one, *others = (encode(isa, codec, x, form, threads=n) for n in (1, 2, 3, 16))
    assert all(torch.equal(one, other) for other in others)
