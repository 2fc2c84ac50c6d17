"""Quantizing and packing in Triton: the bytes of the Python codecs, in the interpreter."""

import itertools
import math

import pytest
import torch
from encoding import (
    DTYPES,
    SEARCHED,
    SHAPES,
    SITES,
    by_group,
    errors,
    form_of,
    pages_of,
    room_for,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitkv.codecs import Affine, Codec, Unquantized
from bitkv.pages import AffineFormat

pytest.importorskip("triton", reason="kernels for GPUs need Triton")
kernels = pytest.importorskip("bitkv.codecs.triton")


def encode(codec: Codec, x: Tensor, form: AffineFormat) -> Tensor:
    """What the kernel writes for `[pages, heads, page_size, head_dim]`, and that it writes no more."""
    out = room_for(x, form)
    kernels.encode(x, form, codec.native_levels, out[..., : form.nbytes])
    return written(out, form)


# --- min-max: the same bytes ------------------------------------------------------------------------


@pytest.mark.parametrize(("page_size", "head_dim"), SHAPES)
@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_minmax_bytes_are_those_of_the_python_codec(bits, site, granularity, page_size, head_dim):
    for group_size, dtype in zip((32, 64, 128, "page"), itertools.cycle(DTYPES), strict=False):
        codec = Affine(bits, granularity, group_size)
        x = pages_of(page_size, head_dim, dtype, pages=1)
        if form := form_of(codec, site, x):
            assert torch.equal(encode(codec, x, form), form.pack(codec.quantize(x)))


@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    site=st.sampled_from(SITES),
    page_size=st.sampled_from([64, 128]),
    head_dim=st.integers(1, 17).map(lambda n: 16 * n),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.integers(-30, 20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_minmax_bytes_are_the_same_for_any_head_and_size(
    bits, site, page_size, head_dim, dtype, magnitude, seed
):
    x = (pages_of(page_size, head_dim, torch.float32, pages=1, seed=seed) * 2.0**magnitude).to(dtype)
    x += 0.0  # which of 0 and -0 is less is left open
    codec = Affine(bits, site[1], "page")
    form = form_of(codec, site[0], x)
    mine, python = encode(codec, x, form), form.pack(codec.quantize(x))
    assert torch.equal(mine[..., : form.code_bytes], python[..., : form.code_bytes])
    # as numbers: of what rounds to 0 in float16, Triton's interpreter loses the sign
    (_, *mine, _), (_, *python, _) = form.unpack(mine), form.unpack(python)
    assert all(torch.equal(x, y) for x, y in zip(mine, python, strict=True))


@pytest.mark.parametrize(("site", "granularity"), SITES)
def test_tokens_may_lie_apart(site, granularity):
    """Models compute `[tokens, heads, head_dim]`."""
    x = torch.randn(3 * 64, 2, 80).half().unflatten(0, (3, 64)).transpose(1, 2)
    assert not x.is_contiguous()
    codec = Affine(1, granularity, "page")
    form = form_of(codec, site, x)
    assert torch.equal(encode(codec, x, form), form.pack(codec.quantize(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", ["key", "value"])
@pytest.mark.parametrize(("page_size", "head_dim"), [*SHAPES, (64, 16)])
def test_unquantized_pages_hold_the_numbers_themselves(page_size, head_dim, site, dtype):
    codec, x = Unquantized(), pages_of(page_size, head_dim, dtype, pages=1)
    x[0, 0, 0, :3] = torch.tensor([math.inf, -0.0, math.nan])
    form = form_of(codec, site, x)
    assert torch.equal(encode(codec, x, form), form.pack(codec.quantize(x)))


# --- searched levels: the same steps ----------------------------------------------------------------


@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_searched_codes_are_those_of_the_python_codec(bits, site, granularity):
    """But for the order of float32 sums, which may move a number that lies between two levels."""
    codec = Affine(bits, granularity, 32, "unbiased")  # whose codes are those of "mse"
    x = torch.randn(1, 2, 128, 128, generator=torch.Generator().manual_seed(bits))
    form = form_of(codec, site, x)
    mine, python = form.unpack(encode(codec, x, form)), codec.quantize(x)
    assert (mine.codes == python.codes).double().mean() > 0.999
    assert (mine.scale / python.scale - 1).abs().double().mean() < 1e-3


@pytest.mark.parametrize(("page_size", "head_dim"), [(64, 80), (64, 96)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_searched_error_is_that_of_the_python_codec_and_below_that_of_minmax(bits, page_size, head_dim):
    for (site, granularity), group_size in itertools.product(SITES, (32, "page")):
        codec = Affine(bits, granularity, group_size, "mse")
        x = pages_of(page_size, head_dim, torch.bfloat16, pages=1)
        x[:, :, 5] *= 40
        if form := form_of(codec, site, x):
            mine = errors(codec, x, codec.dequantize(form.unpack(encode(codec, x, form))))
            python = errors(codec, x, codec.dequantize(codec.quantize(x)))
            # few groups, and a search may end in another of two valleys
            assert mine.sum() == pytest.approx(python.sum().item(), rel=1e-2)
            minmax = Affine(bits, granularity, group_size)
            plain = errors(codec, x, minmax.dequantize(minmax.quantize(x)))
            assert (mine <= plain * (1 + 1e-5)).all()


# --- numbers that are none --------------------------------------------------------------------------


@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 4])
def test_infinities_saturate(bits, site, granularity):
    x = pages_of(64, 80, torch.float16)
    x[0, 0, 3, 7], x[1, 1, 60, 79] = math.inf, -math.inf
    codec = Affine(bits, granularity, "page")
    form = form_of(codec, site, x)
    assert torch.equal(encode(codec, x, form), form.pack(codec.quantize(x)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("levels", ["minmax", *SEARCHED])
@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2])
def test_a_nan_shows_in_its_whole_group_and_nowhere_else(bits, site, granularity, levels):
    x = pages_of(64, 96, torch.float16, pages=1)
    x[0, 0, 3, 7] = x[0, 1, 60, 95] = math.nan
    codec = Affine(bits, granularity, 32, levels)
    form = form_of(codec, site, x)
    restored = codec.dequantize(form.unpack(encode(codec, x, form)))
    expected = by_group(x, codec).isnan().any(-1, keepdim=True).expand_as(by_group(x, codec))
    assert torch.equal(by_group(restored, codec).isnan(), expected)


@pytest.mark.parametrize("levels", ["minmax", *SEARCHED])
@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("value", [0.0, 7.0, -1e-7, 65504.0])
def test_equal_numbers_come_back(value, bits, levels):
    x = torch.full((1, 1, 64, 64), value).half()
    codec = Affine(bits, "token", 32, levels)
    form = form_of(codec, "value", x)
    restored = codec.dequantize(form.unpack(encode(codec, x, form)))
    assert torch.equal(restored, x.float())
