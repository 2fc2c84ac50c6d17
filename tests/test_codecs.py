"""Codecs: one contract for all, and the affine quantizer's error against what theory says."""

import dataclasses
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitkv.codecs import CODECS, Affine, Coupled, Sample, Unquantized
from bitkv.codecs.affine import tail_weights
from bitkv.recipe import parse
from bitkv.rope import Rope

AFFINE = [
    Affine(bits, granularity, group_size, levels)
    for bits, granularity, group_size, levels in itertools.product(
        (1, 2, 4, 8), ("channel", "token"), (32, "page"), ("minmax", "mse", "unbiased")
    )
]
ALL = [*AFFINE, Unquantized()]
# rate-distortion anchors, i.i.d. N(0,1): NMSE by (bits, group size)
MINMAX_NMSE = {
    (1, 32): 1.96,
    (1, 64): 2.74,
    (1, 128): 3.57,
    (2, 32): 0.154,
    (2, 64): 0.202,
    (2, 128): 0.251,
}
MSE_NMSE = {
    (1, 32): 0.333,
    (1, 64): 0.348,
    (1, 128): 0.356,
    (2, 32): 0.102,
    (2, 64): 0.113,
    (2, 128): 0.119,
}


def exactly(sentence: str) -> str:
    return f"^{re.escape(sentence)}$"


def nmse(codec: Affine, x: Tensor) -> float:
    error = codec.dequantize(codec.quantize(x)) - x
    return (error.square().mean() / x.square().mean()).item()


def by_group(x: Tensor, codec: Affine) -> Tensor:
    """`[..., T, D]` as `[..., groups, group size]`, the elements that share a scale side by side."""
    x = x.transpose(-1, -2) if codec.granularity == "channel" else x
    size = x.shape[-1] if codec.group_size == "page" else codec.group_size
    return x.unflatten(-1, (-1, size))


# --- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ALL, ids=repr)
@pytest.mark.parametrize(("page_size", "head_dim"), [(64, 64), (128, 96)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_a_codec_makes_survives_the_page_it_asks_for(codec, page_size, head_dim, dtype):
    x = torch.randn(2, page_size, head_dim).to(dtype)
    site = "key" if getattr(codec, "granularity", "") == "channel" else "value"
    form = codec.part_format(site, head_dim=head_dim, page_size=page_size, dtype=dtype)
    q = codec.quantize(x)
    data = form.pack(q)
    assert data.shape == (2, form.nbytes)
    restored = codec.dequantize(form.unpack(data))
    assert restored.shape == x.shape
    assert restored.dtype == torch.float32
    assert torch.equal(restored, codec.dequantize(q))
    assert (restored - x).norm() < 2 * x.norm()


@pytest.mark.parametrize("codec", AFFINE, ids=repr)
def test_codes_are_bytes_below_two_to_the_bits_and_scales_are_float16(codec):
    q = codec.quantize(torch.randn(3, 64, 64))
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == (3, 64, 64)
    assert q.codes.max() == 2**codec.bits - 1
    assert q.codes.min() == 0
    group = 64 if codec.group_size == "page" else codec.group_size
    shape = (3, 64 // group, 64) if codec.granularity == "channel" else (3, 64, 64 // group)
    assert q.scale.shape == q.zero_point.shape == shape
    assert q.scale.dtype == q.zero_point.dtype == torch.float16


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_every_page_is_quantized_on_its_own_and_the_input_is_left_alone(codec):
    x = torch.randn(3, 64, 64)
    before = x.clone()
    together, alone = codec.quantize(x), codec.quantize(x[1])
    assert torch.equal(x, before)
    assert torch.equal(codec.dequantize(together)[1], codec.dequantize(alone))


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_repr_is_the_text_of_a_recipe(codec):
    site = "key" if getattr(codec, "granularity", "") == "channel" else "value"
    other = "value" if site == "key" else "key"
    recipe = parse(f"Recipe({site}={codec!r}, {other}=Unquantized())")
    assert getattr(recipe, site) == codec


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_a_codec_is_frozen_hashable_registered_and_needs_no_calibration(codec):
    assert CODECS[type(codec).__name__] is type(codec)
    assert hash(codec) == hash(dataclasses.replace(codec))
    assert codec.calibrate(torch.randn(256, 64)) == codec
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec.bits = 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unquantized_is_exact_and_as_wide_as_the_model(dtype):
    x = torch.randn(64, 64).to(dtype)
    form = Unquantized().part_format("key", head_dim=64, page_size=64, dtype=dtype)
    assert form.bits_per_element == 8 * x.element_size()
    assert torch.equal(form.unpack(form.pack(Unquantized().quantize(x))).codes, x)


# --- the error of affine quantization -----------------------------------------------------------


@pytest.mark.parametrize("codec", [c for c in AFFINE if c.levels == "minmax"], ids=repr)
@pytest.mark.parametrize(("spread", "offset"), [(1.0, 0.0), (1e-3, 0.0), (100.0, 0.0), (0.01, 10.0)])
def test_minmax_is_off_by_half_a_step_and_the_rounding_of_its_scales_at_most(codec, spread, offset):
    x = torch.randn(2, 64, 64) * spread + offset
    error = by_group((codec.dequantize(codec.quantize(x)) - x).double(), codec).abs()
    groups = by_group(x.double(), codec)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**codec.bits - 1)
    # float16 moves the lowest level by 2^-11 |low| and the highest by 2^-11 (high - low) more, both
    # relative to normal numbers; below them by 2^-25 for the zero point and for each step of the scale
    rounding = 2**-11 * (low.abs() + high - low) + 2**-25 * 2**codec.bits
    assert (error <= 1.001 * (step / 2 + rounding)).all()


@pytest.mark.parametrize("codec", AFFINE, ids=repr)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3333, 2.0**-20, 60000.0])
def test_constant_groups_are_exact(codec, value):
    x = torch.full((64, 64), value).half()
    assert torch.equal(codec.dequantize(codec.quantize(x)), x.float())


@pytest.mark.parametrize("granularity", ["channel", "token"])
@pytest.mark.parametrize(("bits", "group_size"), MINMAX_NMSE)
def test_gaussian_error_is_the_known_one(bits, group_size, granularity):
    x = torch.randn(4, 8, 128, 128)
    minmax = nmse(Affine(bits, granularity, group_size, "minmax"), x)
    mse = nmse(Affine(bits, granularity, group_size, "mse"), x)
    assert minmax == pytest.approx(MINMAX_NMSE[bits, group_size], rel=0.03)
    assert mse <= MSE_NMSE[bits, group_size]


DISTRIBUTIONS = {
    "normal": lambda x: x,
    "outliers": lambda x: torch.where(torch.rand_like(x) < 0.03, 30 * x, x),
    "uniform": torch.rand_like,
    "skewed": torch.exp,
    "bimodal": lambda x: x * 0.1 + x.sign(),
    "two values": torch.sign,
    "tiny": lambda x: x * 1e-6,
    "shifted": lambda x: x + 100,
}


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    bits=st.sampled_from([1, 2, 4, 8]),
    granularity=st.sampled_from(["channel", "token"]),
    group_size=st.sampled_from([32, 64]),
)
def test_mse_never_loses_to_minmax_in_any_group(seed, distribution, bits, granularity, group_size):
    """In the error it minimizes, which weighs elements far from the mean a little more."""
    torch.manual_seed(seed)
    x = DISTRIBUTIONS[distribution](torch.randn(64, 64))
    weights = tail_weights(by_group(x, Affine(bits, granularity, group_size)), bits)
    errors = []
    for levels in ("minmax", "mse"):
        codec = Affine(bits, granularity, group_size, levels)
        difference = (codec.dequantize(codec.quantize(x)) - x).double()
        errors.append((weights * by_group(difference, codec).square()).sum(-1))
    minmax, mse = errors
    assert (mse <= minmax * (1 + 1e-5) + 1e-30).all()


@given(seed=st.integers(0, 2**32), low=st.floats(-50, 0), gap=st.floats(1, 50))
def test_one_bit_mse_levels_are_the_means_of_two_clusters(seed, low, gap):
    torch.manual_seed(seed)
    upper = torch.rand(64, 64) < 0.5
    x = low + gap * upper + 0.05 * gap * torch.randn(64, 64)
    q = Affine(1, "token", "page", "mse").quantize(x)
    assert torch.equal(q.codes.bool(), upper)
    mean_low = (x * ~upper).sum(-1) / (~upper).sum(-1)
    mean_high = (x * upper).sum(-1) / upper.sum(-1)
    rounding = 2**-11 * (abs(low) + gap) * 1.5
    assert ((q.zero_point[:, 0] - mean_low).abs() <= rounding).all()
    assert ((q.zero_point[:, 0].float() + q.scale[:, 0].float() - mean_high).abs() <= 2 * rounding).all()


@pytest.mark.parametrize("group_size", [32, 128])
def test_one_bit_mse_levels_are_conditional_means_of_gaussian_data_within_one_percent(group_size):
    x = torch.randn(8, 128, 128)
    codec = Affine(1, "token", group_size, "mse")
    q = codec.quantize(x)
    groups, upper = by_group(x, codec), by_group(q.codes.float(), codec)
    mean_high = (groups * upper).sum(-1) / upper.sum(-1)
    mean_low = (groups * (1 - upper)).sum(-1) / (1 - upper).sum(-1)
    zero_point, scale = q.zero_point.float(), q.scale.float()
    assert (zero_point - mean_low).abs().mean() < 0.01
    assert (zero_point + scale - mean_high).abs().mean() < 0.01


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("granularity", ["channel", "token"])
def test_unbiased_levels_do_not_shrink_inner_products(bits, granularity):
    """The slope of x̂ on x is the factor by which a random query's score comes out too small."""
    x = torch.randn(8, 128, 128)

    def slope(levels):
        codec = Affine(bits, granularity, 32, levels)
        return ((codec.dequantize(codec.quantize(x)) * x).sum() / x.square().sum()).item()

    assert slope("unbiased") == pytest.approx(1, abs=2**-9)
    # plain least squares loses just what it errs; the weights of 2 and more bits win a part of it back
    error = nmse(Affine(bits, granularity, 32, "mse"), x)
    assert 1 - error - 0.01 < slope("mse") < 1 - error / 2


@pytest.mark.parametrize("codec", AFFINE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [6e4, 1e6, 1e30, 1e-7, 1e-30])
def test_values_of_any_size_stay_finite(codec, dtype, size):
    limit = 65504.0 if dtype == torch.float16 else torch.inf
    x = (torch.randn(2, 64, 64) * size).clamp(-limit, limit).to(dtype)
    q = codec.quantize(x)
    assert q.scale.isfinite().all()
    assert (q.scale > 0).all()
    assert q.zero_point.isfinite().all()
    assert codec.dequantize(q).isfinite().all()


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((3, "channel"), "Affine: bits 3 is not one of 1, 2, 4, 8"),
        ((True, "channel"), "Affine: bits True is not one of 1, 2, 4, 8"),
        ((2.0, "channel"), "Affine: bits 2.0 is not one of 1, 2, 4, 8"),
        ((2, "row"), "Affine: granularity 'row' is not one of 'channel', 'token'"),
        ((2, "token", 48), "Affine: group_size 48 is not one of 32, 64, 128, 'page'"),
        ((2, "token", 32, "best"), "Affine: levels 'best' is not one of 'minmax', 'mse', 'unbiased'"),
    ],
)
def test_arguments_outside_the_tables_are_refused_with_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=exactly(sentence)):
        Affine(*arguments)


def test_a_group_that_does_not_divide_the_tensor_is_refused_with_a_sentence():
    sentence = "^head_dim 80 is not a multiple of group_size 32; pass a group_size that divides 80$"
    with pytest.raises(ValueError, match=sentence):
        Affine(2, "token", 32).quantize(torch.zeros(64, 80))
    with pytest.raises(ValueError, match=r"^token count 100 is not a multiple of group_size 64; "):
        Affine(2, "channel", 64).quantize(torch.zeros(100, 64))


# --- coupled channels ---------------------------------------------------------------------------

ROPE = Rope(1e4 ** (-torch.arange(0, 64, 2) / 64))


def coupled_sample(site: str = "key", tokens: int = 1024) -> Sample:
    """Channels that follow their neighbour, with gradients that see only a quarter of the tokens."""
    x = torch.randn(2, tokens, 64)
    x[..., 1::2] = x[..., ::2] + 0.1 * x[..., 1::2]
    places = torch.arange(tokens)
    gradient = torch.randn_like(x) * (places % 4 == 0).view(-1, 1)
    keys = ROPE.rotate(x, places) if site == "key" else x
    gradient = ROPE.rotate(gradient, places) if site == "key" else gradient
    return Sample(site, keys, places, gradient, None, ROPE)


def coupled_error(codec: Coupled, x: Tensor, site: str = "value") -> Tensor:
    """Squared errors of tokens `[H, N, D]` at places 0 and on."""
    shared = codec.shared(site, heads=2, head_dim=64, rope=ROPE)
    places = torch.arange(x.shape[1])
    y = codec.quantize(shared.to_pages(x, places), shared).dequantize(shared.codebook)
    return (shared.from_pages(y, places) - x).square()


@pytest.mark.parametrize(
    ("channels", "bits", "width"),
    [(2, 8, 4), (4, 8, 2), (8, 8, 1), (8, 10, 1.25), (4, 9, 2.25), (16, 12, 0.75)],
)
def test_coupled_codes_have_the_bits_of_their_name_and_nothing_beside(channels, bits, width):
    form = Coupled(channels, bits).part_format("key", head_dim=128, page_size=128, dtype=torch.float16)
    assert form.bits_per_element == form.code_bits == width
    assert Coupled(channels, bits).centroids == 2**bits


def test_coupling_gains_where_channels_depend_on_each_other():
    sample = coupled_sample("value", 4096)
    errors = [
        coupled_error(Coupled(channels, 2 * channels, "uniform").calibrate(sample), sample.x).mean()
        for channels in (2, 4)
    ]
    # an almost common value in 4 and 8 bits: far below two values of 2 bits each, 0.118
    assert errors[1] < errors[0] < 0.03


def test_keys_before_the_rotary_embedding_depend_and_after_it_less():
    sample = coupled_sample("key", 4096)
    before, after = (
        coupled_error(Coupled(2, 6, "uniform", rope).calibrate(sample), sample.x, "key").mean()
        for rope in ("before", "after")
    )
    assert before < 0.5 * after


def test_fisher_weights_serve_the_tokens_that_the_loss_sees():
    sample = coupled_sample("value", 2048)
    seen = torch.arange(2048) % 4 == 0
    sample.x[:, seen] += 2
    fisher, uniform = (
        coupled_error(Coupled(4, 4, weights).calibrate(sample), sample.x)
        for weights in ("fisher", "uniform")
    )
    assert fisher[:, seen].mean() < 0.9 * uniform[:, seen].mean()
    assert uniform.mean() < fisher.mean()


def test_each_index_names_the_nearest_entry():
    sample = coupled_sample("value", 256)
    codec = Coupled(8, 4, "uniform").calibrate(sample)
    shared = codec.shared("value", heads=2, head_dim=64)
    codes = codec.quantize(sample.x, shared).codes
    points = sample.x.unflatten(-1, (8, 8))
    distance = (points.unsqueeze(-2) - shared.codebook.unsqueeze(1)).square().sum(-1)
    assert codes.shape == (2, 256, 8)
    chosen = distance.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(chosen, distance.amin(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 8), "Coupled: channels 0 is not supported; use 1 to 32"),
        ((8, 13), "Coupled: bits 13 is not supported; use 1 to 12"),
        ((8, True), "Coupled: bits True is not supported; use 1 to 12"),
        ((8, 8, "hessian"), "Coupled: weights 'hessian' is not supported; use 'fisher', 'uniform'"),
        ((8, 8, "fisher", "within"), "Coupled: rope 'within' is not supported; use 'before', 'after'"),
    ],
)
def test_couplings_that_cannot_be_are_refused_with_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=exactly(sentence)):
        Coupled(*arguments)


def test_a_coupling_that_does_not_divide_the_head_or_lacks_tokens_is_refused():
    shape = {"head_dim": 80, "page_size": 64, "dtype": torch.float16}
    with pytest.raises(
        ValueError, match=r"^80 channels of a head are not a multiple of 32 coupled ones"
    ):
        Coupled(32, 8).part_format("key", **shape)
    with pytest.raises(ValueError, match=r"^100 tokens of calibration cannot make 256 centroids; "):
        Coupled(8, 8).calibrate(coupled_sample("value", 100))
