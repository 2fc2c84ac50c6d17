"""Quantizing and packing in Triton: the bytes of the Python codecs, in the interpreter."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitkv.codecs import Affine, Codec, Unquantized
from bitkv.codecs.affine import tail_weights
from bitkv.pages import PartFormat

pytest.importorskip("triton", reason="kernels for GPUs need Triton")
kernels = pytest.importorskip("bitkv.codecs.triton")

SITES = (("key", "channel"), ("key", "token"), ("value", "token"))
SHAPES = ((128, 128), (64, 64), (128, 80), (64, 96), (128, 256))  # page_size, head_dim
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SEARCHED = ("mse", "unbiased")
UNTOUCHED = 0xA5


def form_of(codec: Codec, site: str, x: Tensor) -> PartFormat | None:
    """The part of pages `x`; None where the group does not divide."""
    page_size, head_dim = x.shape[-2:]
    try:
        return codec.part_format(site, head_dim=head_dim, page_size=page_size, dtype=x.dtype)
    except ValueError:
        return None


def encode(codec: Codec, x: Tensor, form: PartFormat) -> Tensor:
    """What the kernel writes for `[pages, heads, page_size, head_dim]`, and that it writes no more."""
    out = torch.full((*x.shape[:2], form.nbytes + 64), UNTOUCHED, dtype=torch.uint8)
    kernels.encode(x, form, codec.native_levels, out[..., : form.nbytes])
    assert (out[..., form.nbytes :] == UNTOUCHED).all()
    return out[..., : form.nbytes].contiguous()


def pages_of(page_size: int, head_dim: int, dtype: torch.dtype, *, pages: int = 1) -> Tensor:
    """Two heads of pages whose channels differ in size and mean, as keys do."""
    x = torch.randn(pages, 2, page_size, head_dim)
    return (x * 3 * torch.rand(head_dim) + torch.randn(head_dim)).to(dtype)


# --- min-max: the same bytes ------------------------------------------------------------------------


@pytest.mark.parametrize(("page_size", "head_dim"), SHAPES)
@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_minmax_bytes_are_those_of_the_python_codec(bits, site, granularity, page_size, head_dim):
    for group_size, dtype in zip((32, 64, 128, "page"), itertools.cycle(DTYPES), strict=False):
        codec = Affine(bits, granularity, group_size)
        x = pages_of(page_size, head_dim, dtype)
        if form := form_of(codec, site, x):
            assert torch.equal(encode(codec, x, form), form.pack(codec.quantize(x)))


@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    site=st.sampled_from(SITES),
    page_size=st.sampled_from([64, 128]),
    head_dim=st.integers(1, 17).map(lambda n: 16 * n),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.integers(-30, 20),
)
@settings(max_examples=25)
def test_minmax_bytes_are_the_same_for_any_head_and_size(
    bits, site, page_size, head_dim, dtype, magnitude
):
    x = (pages_of(page_size, head_dim, torch.float32) * 2.0**magnitude).to(dtype)
    x += 0.0  # which of 0 and -0 is less is left open
    codec = Affine(bits, site[1], "page")
    form = form_of(codec, site[0], x)
    assert torch.equal(encode(codec, x, form), form.pack(codec.quantize(x)))


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
    codec, x = Unquantized(), pages_of(page_size, head_dim, dtype)
    x[0, 0, 0, :3] = torch.tensor([math.inf, -0.0, math.nan])
    form = form_of(codec, site, x)
    assert torch.equal(encode(codec, x, form), form.pack(codec.quantize(x)))


# --- searched levels: the same steps ----------------------------------------------------------------


def by_group(x: Tensor, codec: Affine) -> Tensor:
    x = x.transpose(-1, -2) if codec.granularity == "channel" else x
    size = x.shape[-1] if codec.group_size == "page" else codec.group_size
    return x.unflatten(-1, (-1, size))


def errors(codec: Affine, x: Tensor, restored: Tensor) -> Tensor:
    """The error that a search minimizes, of each group."""
    weights = tail_weights(by_group(x.float(), codec), codec.bits)
    return (weights * by_group(restored - x.float(), codec).square()).double().sum(-1)


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
        x = pages_of(page_size, head_dim, torch.bfloat16)
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
    x = pages_of(64, 80, torch.float16, pages=2)
    x[0, 0, 3, 7], x[1, 1, 60, 79] = math.inf, -math.inf
    codec = Affine(bits, granularity, "page")
    form = form_of(codec, site, x)
    assert torch.equal(encode(codec, x, form), form.pack(codec.quantize(x)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("levels", ["minmax", *SEARCHED])
@pytest.mark.parametrize(("site", "granularity"), SITES)
@pytest.mark.parametrize("bits", [1, 2])
def test_a_nan_shows_in_its_whole_group_and_nowhere_else(bits, site, granularity, levels):
    x = pages_of(64, 96, torch.float16)
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
