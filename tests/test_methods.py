"""Every method: one contract for all codecs, and errors on Gaussian data that theory or a paper says."""

import dataclasses
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bitkv
from bitkv.attention import attend
from bitkv.cache import PagedCache
from bitkv.codecs import (
    CODECS,
    NSN,
    QJL,
    Affine,
    Codec,
    Coupled,
    Kitty,
    KVQuant,
    QServe,
    QuaRot,
    RotateKV,
    Sample,
    Spectral,
    TaSQ,
    TurboQuant,
    Unquantized,
    VecInfer,
)
from bitkv.codecs.clustering import kmeans, nearest
from bitkv.codecs.grouping import group_channels, match
from bitkv.codecs.levels import gaussian_levels, nearest_level, sphere_levels
from bitkv.codecs.normalizers import between_extremes
from bitkv.codecs.nsn import gaussian_codebook, signed_codebook
from bitkv.codecs.tasq import query_moments
from bitkv.codecs.transforms import hadamard, magnitudes, permutation, rope_pairs, rotation, scaling
from bitkv.recipe import Calibration, Recipe, parse
from bitkv.rope import Rope

HEADS, TOKENS = 2, 512
KEYS_ONLY = (Kitty, QJL, TaSQ)
ROTATED = (QuaRot, RotateKV, NSN)
METHODS = [
    *(Affine(2, "token", "page"), Unquantized(), Coupled(4, 4, "uniform"), Coupled(8, 5)),
    *(QServe(), QServe(2, 0.3), QuaRot(4), QuaRot(1, 1.0), RotateKV(), RotateKV(4, 16, rope="after")),
    *(KVQuant(2), KVQuant(3, 0.05, qnorm=True), KVQuant(1, 0.0, rope="after"), Kitty(), Kitty(0.0)),
    *(TurboQuant(1), TurboQuant(3, seed=5), QJL(1), QJL(3, seed=1), VecInfer(4, 4), VecInfer(2, 3)),
    *(NSN(1), NSN(2, "after"), TaSQ(4, 4), TaSQ(8, 5, "after")),
    *(Spectral(1), Spectral(1.5, "before")),
]
CASES = [
    (codec, site)
    for codec in METHODS
    for site in ("key", "value")
    if site == "key" or not isinstance(codec, KEYS_ONLY)
]


def exactly(sentence: str) -> str:
    return f"^{re.escape(sentence)}$"


def rope_for(head_dim: int) -> Rope:
    return Rope(1e4 ** (-torch.arange(0, head_dim, 2) / head_dim))


def sample_of(site: str, head_dim: int, *, tokens: int = TOKENS, heads: int = HEADS) -> Sample:
    draw = torch.Generator().manual_seed(7)
    x, gradient = torch.randn(2, heads, tokens, head_dim, generator=draw)
    x = x * (0.5 + torch.rand(head_dim, generator=draw)) + torch.randn(head_dim, generator=draw)
    queries = torch.randn(2 * heads, tokens, head_dim, generator=draw)
    places = torch.arange(tokens)
    return Sample(site, x, places, gradient, queries if site == "key" else None, rope_for(head_dim))


@cache
def fitted(codec: Codec, site: str, head_dim: int = 64) -> Codec:
    return codec.calibrate(sample_of(site, head_dim))


class Bound:
    """A fitted codec with its format and what its pages share."""

    def __init__(self, codec, site, *, head_dim=64, page_size=64, dtype=torch.float32, fit=None):
        shape = {"head_dim": head_dim, "page_size": page_size}
        self.codec = fitted(codec, site, head_dim) if fit is None else codec.calibrate(fit)
        self.form = self.codec.part_format(site, **shape, dtype=dtype)
        rope = rope_for(head_dim)
        self.shared = self.codec.shared(site, heads=HEADS, head_dim=head_dim, rope=rope)

    def places(self, pages: int, first: int = 0) -> Tensor:
        stop = first + pages * self.form.page_size
        return torch.arange(first, stop).view(pages, 1, self.form.page_size)

    def encode(self, x: Tensor, first: int = 0) -> Tensor:
        return self.codec.encode(x, self.form, shared=self.shared, first_token=first)

    def decode(self, data: Tensor, first: int = 0) -> Tensor:
        y = self.form.unpack(data).dequantize(self.shared.codebook)
        return self.shared.from_pages(y, self.places(len(data), first))

    def nmse(self, x: Tensor) -> float:
        error = self.decode(self.encode(x)) - x
        return (error.square().mean() / x.square().mean()).item()


def gaussian_pages(pages: int, head_dim: int = 128, page_size: int = 128) -> Tensor:
    return torch.randn(pages, HEADS, page_size, head_dim)


def gaussian_sample(site: str, head_dim: int = 128, tokens: int = 4096) -> Sample:
    x = torch.randn(HEADS, tokens, head_dim)
    queries = torch.randn(HEADS, tokens, head_dim)
    return Sample(site, x, torch.arange(tokens), torch.ones_like(x), queries, rope_for(head_dim))


# --- the contract -------------------------------------------------------------------------------


def test_every_codec_is_among_the_methods_tested_here():
    assert {type(codec) for codec in METHODS} == set(CODECS.values())


@pytest.mark.parametrize("codec", METHODS, ids=repr)
def test_repr_is_the_text_of_a_recipe_and_a_codec_is_frozen_and_hashable(codec):
    assert parse(f"Recipe({codec!r}, Unquantized())").key == codec
    assert parse(f"Recipe({codec!s}, Unquantized())").key == codec
    assert CODECS[type(codec).__name__] is type(codec)
    assert hash(codec) == hash(dataclasses.replace(codec))
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec.bits = 3


@pytest.mark.parametrize(("codec", "site"), CASES, ids=str)
@pytest.mark.parametrize(("page_size", "head_dim"), [(64, 64), (128, 96), (64, 256)])
def test_pages_pack_exactly_and_are_as_large_as_their_format_says(codec, site, page_size, head_dim):
    bound = Bound(codec, site, head_dim=head_dim, page_size=page_size)
    x = torch.randn(3, HEADS, page_size, head_dim)
    q = bound.codec.quantize(bound.shared.to_pages(x, bound.places(3)), bound.shared)
    data = bound.form.pack(q)
    assert data.dtype == torch.uint8
    assert data.shape == (3, HEADS, bound.form.nbytes)
    assert bound.form.nbytes % 4 == 0  # whatever follows in a page stays aligned
    assert bound.form.bits_per_element == 8 * data[0, 0].numel() / (page_size * head_dim)
    restored = bound.form.unpack(data)
    codebook = bound.shared.codebook
    assert torch.equal(restored.dequantize(codebook), q.dequantize(codebook))
    assert torch.equal(bound.form.pack(restored), data)
    lanes = bound.form.with_layout("lanes")
    assert lanes.nbytes == bound.form.nbytes
    assert torch.equal(lanes.unpack(lanes.pack(restored)).dequantize(codebook), q.dequantize(codebook))


@pytest.mark.parametrize(("codec", "site"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_one_by_one_equal_pages_together(codec, site, dtype):
    bound = Bound(codec, site, dtype=dtype)
    x = torch.randn(5, HEADS, 64, 64).to(dtype)
    before = x.clone()
    together = bound.encode(x, first=4)
    assert torch.equal(x, before)
    for i in range(5):
        assert torch.equal(bound.encode(x[i : i + 1], first=4 + 64 * i)[0], together[i])
    direct = bound.codec.quantize(bound.shared.to_pages(x, bound.places(5, 4)), bound.shared)
    direct = bound.shared.from_pages(direct.dequantize(bound.shared.codebook), bound.places(5, 4))
    assert torch.allclose(bound.decode(together, first=4), direct, atol=1e-5)


@pytest.mark.parametrize(("codec", "site"), CASES, ids=str)
def test_a_rank_with_some_of_the_heads_makes_their_pages(codec, site):
    bound = Bound(codec, site)
    x = torch.randn(2, HEADS, 64, 64)
    every = bound.encode(x)
    for first, count in [(0, 1), (1, HEADS - 1)]:
        part = bound.shared.of_heads(first, count)
        heads = slice(first, first + count)
        found = bound.codec.encode(x[:, heads], bound.form, shared=part, first_token=0)
        assert torch.equal(found, every[:, heads])


@pytest.mark.parametrize(("codec", "site"), CASES, ids=str)
@pytest.mark.parametrize("head_dim", [80, 96, 112])
def test_odd_head_dims_work_or_are_refused_with_a_sentence(codec, site, head_dim):
    shape = {"head_dim": head_dim, "page_size": 64, "dtype": torch.float16}
    mixes = isinstance(codec, ROTATED) or (isinstance(codec, VecInfer) and site == "key")
    if head_dim == 112 and mixes:
        sentence = (
            "head_dim 112 has no Hadamard matrix here; it must be a power of two times 1, 12 or 20"
        )
        with pytest.raises(ValueError, match=exactly(sentence)):
            codec.part_format(site, **shape)
        return
    bound = Bound(codec, site, head_dim=head_dim)
    x = torch.randn(2, HEADS, 64, head_dim)
    restored = bound.decode(bound.encode(x))
    assert restored.shape == x.shape
    assert restored.isfinite().all()


@pytest.mark.parametrize(("codec", "site"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_of_any_size_stay_finite(codec, site, dtype):
    bound = Bound(codec, site, dtype=dtype)
    limit = 65504.0 if dtype == torch.float16 else torch.inf
    x = torch.randn(5, HEADS, 64, 64) * torch.tensor([0.0, 6e4, 1e30, 1e-7, 1e-30]).view(-1, 1, 1, 1)
    x = torch.cat([x, torch.full((1, HEADS, 64, 64), -0.75)]).clamp(-limit, limit).to(dtype)
    restored = bound.decode(bound.encode(x))
    assert restored.isfinite().all()
    learned = isinstance(codec, (Coupled, Spectral, VecInfer)) or (
        isinstance(codec, KVQuant) and site == "key"
    )
    if not learned:
        assert restored[0].abs().max() < 1e-4


@pytest.mark.parametrize(("codec", "site"), CASES, ids=str)
def test_bytes_that_nobody_wrote_are_read_without_an_error(codec, site):
    bound = Bound(codec, site)
    for data in (torch.full((2, HEADS, bound.form.nbytes), 0xFF), torch.randint(256, (2, HEADS, 9**5))):
        assert bound.decode(data[..., : bound.form.nbytes].byte()).shape == (2, HEADS, 64, 64)


@pytest.mark.parametrize("codec", METHODS, ids=repr)
def test_calibration_repeats_itself_and_its_lack_is_refused(codec):
    sample = sample_of("key", 64)
    first, second = codec.calibrate(sample), codec.calibrate(sample)
    assert first.learned.keys() == second.learned.keys()
    assert all(torch.equal(x, second.learned[name]) for name, x in first.learned.items())
    assert all(x.is_contiguous() for x in first.learned.values())
    assert codec.learns == bool(first.learned)
    if codec.learns:
        sentence = f"{codec!r} has learned nothing yet; pass a recipe file that `bitkv calibrate` wrote"
        with pytest.raises(ValueError, match=exactly(sentence)):
            codec.shared("key", heads=HEADS, head_dim=64, rope=rope_for(64))
        if not (isinstance(codec, KVQuant) and codec.rope == "after"):
            with pytest.raises(ValueError, match=r"calibrate it for this model$"):
                first.shared("key", heads=HEADS + 1, head_dim=64, rope=rope_for(64))


@pytest.mark.parametrize("codec", [c for c in METHODS if getattr(c, "rope", "") == "before"], ids=repr)
def test_keys_before_the_rotary_embedding_need_one_that_is_known(codec):
    with pytest.raises(ValueError, match=r"codes keys before the rotary embedding.*use rope='after'$"):
        fitted(codec, "key").shared("key", heads=HEADS, head_dim=64)


@pytest.mark.parametrize("codec", [c for c in METHODS if isinstance(c, KEYS_ONLY)], ids=repr)
def test_codecs_for_keys_refuse_values_with_a_sentence(codec):
    name = type(codec).__name__
    with pytest.raises(
        ValueError, match=rf"^{name} quantizes keys only; give values a codec of their own, as "
    ):
        codec.part_format("value", head_dim=64, page_size=64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: QServe(3), "QServe: bits 3 is not supported; use 1, 2, 4, 8"),
        (lambda: QServe(4, 2.0), "QServe: alpha 2.0 is not supported; use a number from 0 to 1"),
        (lambda: QuaRot(True), "QuaRot: bits True is not supported; use 1, 2, 4, 8"),
        (lambda: QuaRot(4, 0.0), "QuaRot: clip 0.0 is not supported; use a number from 0.01 to 1"),
        (
            lambda: RotateKV(2, 48),
            "RotateKV: group_size 48 is not supported; use 16, 32, 64, 128, 'page'",
        ),
        (
            lambda: RotateKV(2, clip="x"),
            "RotateKV: clip 'x' is not supported; use a number from 0.01 to 1",
        ),
        (
            lambda: RotateKV(rope="while"),
            "RotateKV: rope 'while' is not supported; use 'before', 'after'",
        ),
        (lambda: KVQuant(6), "KVQuant: bits 6 is not supported; use 1 to 5"),
        (lambda: KVQuant(2, 0.5), "KVQuant: outliers 0.5 is not supported; use a number from 0 to 0.1"),
        (lambda: KVQuant(2, qnorm=1), "KVQuant: qnorm 1 is not supported; use False, True"),
        (lambda: TurboQuant(2.5), "TurboQuant: bits 2.5 is not supported; use 1 to 5"),
        (lambda: TurboQuant(2, -1), "TurboQuant: seed -1 is not supported; use 0 to 2147483647"),
        (lambda: QJL(0), "QJL: sketch 0 is not supported; use 1 to 8"),
        (lambda: Kitty(2), "Kitty: promoted 2 is not supported; use a number from 0 to 1"),
        (lambda: VecInfer(1), "VecInfer: channels 1 is not supported; use 2 to 32"),
        (lambda: VecInfer(4, 13), "VecInfer: bits 13 is not supported; use 1 to 12"),
        (lambda: NSN(4), "NSN: bits 4 is not supported; use 1, 2"),
        (lambda: TaSQ(6), "TaSQ: channels 6 is not supported; use 2, 4, 8, 16, 32"),
        (lambda: TaSQ(8, 0), "TaSQ: bits 0 is not supported; use 1 to 12"),
    ],
)
def test_arguments_that_cannot_be_are_refused_with_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=exactly(sentence)):
        make()


# --- in a cache, in a model ---------------------------------------------------------------------


def recipe_of(codec: Codec, **options) -> Recipe:
    value = Unquantized() if isinstance(codec, KEYS_ONLY) else codec
    return Recipe(codec, value, num_sink_tokens=3, recent_tokens=8, page_size=64, **options)


def calibrated(codec: Codec, layers: int, *, model: str = "", weights: str = "") -> Recipe:
    recipe = recipe_of(codec)
    pair = fitted(recipe.key, "key"), fitted(recipe.value, "value")
    return recipe.calibrated(Calibration((pair,) * layers, model, weights, "random numbers"))


@pytest.mark.parametrize("codec", METHODS, ids=repr)
def test_a_cache_that_grows_equals_one_that_got_all_at_once(codec):
    k, v = torch.randn(2, 1, HEADS, 300, 64)
    once, growing = (PagedCache(calibrated(codec, 1), 1, rope=rope_for(64)) for _ in range(2))
    once.append(0, k, v)
    for start, stop in ((0, 150), (150, 151), (151, 290), (290, 300)):
        growing.append(0, k[:, :, start:stop], v[:, :, start:stop])
    tables = [cache.layers[0].page_lists()[0] for cache in (once, growing)]
    pages = [cache.layers[0].pool.data[t] for cache, t in zip((once, growing), tables, strict=True)]
    assert len(tables[0]) == 4
    assert torch.equal(*pages)
    form = once.layers[0].format
    assert once.layers[0].usage.page_bytes == 4 * HEADS * form.page_bytes
    q = torch.randn(1, 2 * HEADS, 5, 64)
    out, _ = attend(q, once.layers[0].view(), backend="reference")
    keys, values = once.layers[0].materialize()
    scores = torch.einsum("bhgqd,bhtd->bhgqt", q.unflatten(1, (HEADS, 2)), keys) / 8
    scores = scores.masked_fill(torch.arange(300) > torch.arange(295, 300)[:, None], -torch.inf)
    expected = torch.einsum("bhgqt,bhtd->bhgqd", scores.softmax(-1), values).flatten(1, 2)
    assert torch.allclose(out, expected, atol=1e-4)


def test_kernels_for_affine_codes_refuse_pages_with_something_beside():
    k, v = torch.randn(2, 1, HEADS, 300, 64)
    for layout, name in (("strided", "triton"), ("lanes", "cpu")):
        cache = PagedCache(recipe_of(Kitty()), 1, layout=layout)
        cache.append(0, k, v)
        with pytest.raises(
            ValueError, match=rf"backend '{name}' refused: it got a PromotedFormat, and takes"
        ):
            attend(k, cache.layers[0].view(), backend=name)


@pytest.fixture(scope="module")
def bundled():
    from transformers import AutoModelForCausalLM

    from bitkv.integrations.transformers.fingerprint import fingerprint, weights_digest

    path = Path(bitkv.__file__).with_name("assets")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, fingerprint(model.config), weights_digest(model, 0)


@pytest.mark.parametrize("codec", METHODS, ids=repr)
def test_every_codec_serves_the_bundled_model(codec, bundled):
    from bitkv.integrations.transformers.cache import PackedCache as Packed

    model, name, weights = bundled
    recipe = calibrated(codec, model.config.num_hidden_layers, model=name, weights=weights)
    cache = Packed(model.config, recipe, exact_prefill=False, backend="reference")
    ids = torch.randint(model.config.vocab_size, (1, 230))
    with torch.inference_mode():
        for part in ids.split([200, 30], dim=1):
            logits = model(part, past_key_values=cache, use_cache=True).logits
    assert logits.isfinite().all()
    layer = cache.paged.layers[0]
    assert layer.num_pages == 3
    assert cache.paged.bits_per_element < 32.1


# --- transforms, levels, grouping ---------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 160, 192, 256, 320])
def test_hadamard_matrices_are_orthogonal_with_entries_of_one_size(size):
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-5)
    assert torch.allclose(matrix.abs(), torch.tensor(size**-0.5))


def test_random_rotations_are_orthogonal_and_differ_by_seed():
    assert torch.allclose(rotation(80, 3) @ rotation(80, 3).T, torch.eye(80), atol=1e-5)
    assert not torch.equal(rotation(80, 3), rotation(80, 4))


def test_scaling_and_permutation_are_what_their_names_say():
    x, factors = torch.randn(2, 5, 16), torch.rand(2, 16) + 0.5
    assert torch.allclose(x @ scaling(factors).mT, x * factors[:, None])
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    assert torch.equal(x @ permutation(order).mT, x.gather(-1, order[:, None].expand_as(x)))


def test_channels_that_the_rotary_embedding_turns_together_get_one_factor():
    half_turned = Rope(torch.ones(4))
    pairs = rope_pairs(16, half_turned)
    assert pairs[:4].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert sorted(pairs.flatten().tolist()) == list(range(16))
    assert rope_pairs(16, None)[0].tolist() == [0, 8]
    x = torch.randn(2, 50, 16)
    factors = magnitudes(x, 0.5, pairs)
    assert torch.equal(factors[:, pairs[:, 0]], factors[:, pairs[:, 1]])
    assert torch.allclose(factors[:, 0], x[..., [0, 4]].abs().amax((1, 2)).sqrt())


@pytest.mark.parametrize(
    ("entries", "nmse"), [(2, 0.363), (3, 0.190), (4, 0.118), (8, 0.0347), (16, 0.0096)]
)
def test_lloyd_max_levels_have_the_error_of_a_gaussian(entries, nmse):
    x, levels = torch.randn(2_000_000), gaussian_levels(entries)
    error = (levels[nearest_level(x, levels).long()] - x).square().mean().item()
    assert error == pytest.approx(nmse, rel=0.03)
    assert levels.tolist() == sorted(levels.tolist())
    assert torch.allclose(levels, -levels.flip(0), atol=1e-3)
    assert torch.allclose(sphere_levels(entries, 2000), levels, atol=0.01)


def test_four_lloyd_max_levels_are_those_of_the_literature():
    assert gaussian_levels(4).tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], rel=0.004)
    assert gaussian_levels(2)[1].item() == pytest.approx(math.sqrt(2 / math.pi), rel=1e-3)


def test_matching_finds_the_cheapest_pairs():
    hidden = torch.randperm(12).view(6, 2)
    costs = 1 + torch.rand(12, 12, dtype=torch.float64)
    costs = costs + costs.T
    costs[hidden[:, 0], hidden[:, 1]] = costs[hidden[:, 1], hidden[:, 0]] = 0.1
    costs.fill_diagonal_(torch.inf)
    assert {frozenset(p) for p in match(costs)} == {frozenset(p) for p in hidden.tolist()}


def test_channels_that_depend_on_each_other_are_grouped_and_pairs_stay_together():
    order = torch.randperm(16)  # of pairs: four neighbours in it share a factor
    common = torch.randn(4000, 4).repeat_interleave(4, dim=1)
    x = torch.empty(4000, 32)
    for offset in (0, 16):
        x[:, order + offset] = common + 0.3 * torch.randn(4000, 16)
    found = group_channels(x, rope_pairs(32, None), 8).view(4, 8)
    expected = {frozenset(part.tolist()) | {i + 16 for i in part.tolist()} for part in order.view(4, 4)}
    assert {frozenset(group.tolist()) for group in found} == expected


# --- known errors on Gaussian data --------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "size", "clip", "nmse"),
    [
        *((1, 32, 1.0, 1.96), (1, 64, 1.0, 2.74), (1, 128, 1.0, 3.57)),
        *((2, 32, 1.0, 0.154), (2, 64, 1.0, 0.202), (2, 128, 1.0, 0.251)),
        *((2, 32, 0.72, 0.102), (2, 64, 0.64, 0.113), (2, 128, 0.60, 0.119)),
    ],
)
def test_affine_codes_between_extremes(bits, size, clip, nmse):
    x = torch.randn(8000, 128)
    error = between_extremes(x, bits, size, clip).dequantize() - x
    assert error.square().mean().item() == pytest.approx(nmse, rel=0.03)


@pytest.mark.parametrize(
    ("channels", "bits", "tokens", "nmse"),
    [
        (2, 4, 2**15, 0.108),
        (4, 8, 2**16, 0.0989),
        (4, 9, 2**16, 0.0719),
        (4, 4, 2**15, 0.342),
        (8, 8, 2**16, 0.326),
        (8, 10, 2**16, 0.238),
    ],
)
def test_codebooks_of_kmeans(channels, bits, tokens, nmse):
    """On vectors that they were not fitted to."""
    codebook = kmeans(torch.randn(1, tokens, channels), 2**bits)
    x = torch.randn(1, 2**15, channels)
    error = codebook[0][nearest(x, codebook)[0].long()] - x[0]
    assert error.square().mean().item() == pytest.approx(nmse, rel=0.03)


@pytest.mark.parametrize(("positive", "nmse"), [(True, 0.0962), (False, 0.326)])
def test_the_universal_codebook(positive, nmse):
    """At 2 bits its magnitudes under all signs, at 1 bit itself."""
    torch.manual_seed(1)  # others than the codebook is made of
    x = torch.randn(1, 2**14, 8)
    codebook = gaussian_codebook(positive=positive)[None]
    y = x.abs() if positive else x
    error = codebook[0][nearest(y, codebook)[0].long()] - y[0]
    assert error.square().mean().item() == pytest.approx(nmse, rel=0.03)


def test_signs_and_magnitudes_together_are_an_index_of_16_bits():
    codebook = signed_codebook()
    x = torch.randn(1, 1, 4, 8)
    code = NSN(2)._codes(x, codebook[None, None]).flatten()
    distance = (x.view(4, 1, 8) - codebook).square().sum(-1)
    assert torch.allclose(distance[range(4), code.long()], distance.amin(1))


@pytest.mark.parametrize(
    ("codec", "site", "bits", "nmse"),
    [
        (QServe(4), "value", 4.25, 0.0100),
        (QServe(2), "value", 2.25, 0.251),
        (QuaRot(2, 1.0), "key", 2.25, 0.251),
        (QuaRot(2, 0.6), "key", 2.25, 0.119),
        (RotateKV(2, 32, 0.72), "key", 3.0, 0.102),
        (RotateKV(2, clip=0.6), "value", 2.25, 0.119),
        # D_mse of the paper, theorem 1
        (TurboQuant(1), "key", 1.125, 0.36),
        (TurboQuant(2), "key", 2.125, 0.117),
        (TurboQuant(4), "key", 4.125, 0.0095),
        (QJL(1), "key", 1.125, math.pi / 2 - 1),
        (QJL(2), "key", 2.125, (math.pi / 2 - 1) / 2),
        (NSN(2), "key", 2.1934, 0.0962 / (1 - 0.0962)),
        (NSN(1), "value", 1.1934, 0.326 / (1 - 0.326)),
    ],
    ids=str,
)
def test_methods_on_gaussian_tokens(codec, site, bits, nmse):
    bound = Bound(codec, site, head_dim=128, page_size=128, fit=gaussian_sample(site))
    assert bound.form.bits_per_element == pytest.approx(bits, abs=1e-4)
    assert bound.nmse(gaussian_pages(16)) == pytest.approx(nmse, rel=0.03)


# --- what each method is about ------------------------------------------------------------------


def outlier_sample() -> Sample:
    """Keys of which two channels, a pair of the rotary embedding, are thirty times as large."""
    sample = gaussian_sample("key", tokens=2048)
    sample.x[..., [5, 69]] *= 30
    return sample


@pytest.mark.parametrize(
    ("codec", "share"), [(QServe(4), 0.2), (QuaRot(4), 0.5), (TurboQuant(4), 0.5)], ids=str
)
def test_outlier_channels_leave_levels_to_the_others(codec, share):
    """Scaled, the others err far less; rotated, all together err less than all others did."""
    sample = outlier_sample()
    pages = sample.x[:, :512].unflatten(1, (4, 128)).transpose(0, 1)
    shape = {"head_dim": 128, "page_size": 128, "fit": sample}

    def error(codec: Codec) -> Tensor:
        bound = Bound(codec, "key", **shape)
        return (bound.decode(bound.encode(pages)) - pages).square().mean((0, 1, 2))

    others = [i for i in range(128) if i not in (5, 69)]
    channels = others if isinstance(codec, QServe) else range(128)
    assert error(codec)[channels].mean() < share * error(Affine(4, "token", "page"))[others].mean()


def test_vecinfer_evens_keys_out_before_it_rotates_them():
    sample = outlier_sample()
    codec = VecInfer(4, 4).calibrate(sample)
    y = codec.shared("key", heads=HEADS, head_dim=128).to_pages(sample.x, sample.positions)
    assert y.std((0, 1)).max() < 1.5 * y.std((0, 1)).min()
    assert codec.learned["scale"].square()[:, 5].tolist() == pytest.approx(
        sample.x[..., 5].abs().amax(1).tolist(), rel=1e-4
    )
    values = codec.with_learned({"codebook": codec.learned["codebook"]})
    assert values.shared("value", heads=HEADS, head_dim=128).is_direct


def test_rotatekv_orders_channels_by_their_sums():
    codec = fitted(RotateKV(2, 16, rope="after"), "key")
    x = sample_of("key", 64).x @ hadamard(64).T
    sums = x.sum(1).gather(-1, codec.learned["order"].long())
    assert (sums.diff(dim=-1) >= 0).all()
    assert codec.learns
    assert not RotateKV(2).learns


def test_rotatekv_gains_from_order_where_channels_have_means():
    x = (torch.randn(HEADS, 4096, 64) + 4 * torch.randn(64)) @ hadamard(64)  # after it means differ
    sample = Sample("value", x, torch.arange(4096), torch.ones_like(x), None, None)
    ordered = RotateKV(2, 16).calibrate(sample)
    shuffled = ordered.with_learned({"order": torch.arange(64).expand(HEADS, -1)})
    pages = x.view(HEADS, 64, 64, 64).transpose(0, 1)
    errors = []
    for codec in (ordered, shuffled):
        shared = codec.shared("value", heads=HEADS, head_dim=64)
        y = codec.quantize(shared.to_pages(pages, torch.zeros(64, 1, 64)), shared).dequantize()
        errors.append((shared.from_pages(y, None) - pages).square().mean())
    assert errors[0] < 0.5 * errors[1]


def test_kvquant_stores_its_share_of_outliers_exactly():
    bound = Bound(KVQuant(2, 0.01, rope="after"), "key")
    x = 0.1 * torch.randn(1, HEADS, 64, 64)
    spikes = torch.randperm(64 * 64)[:41]  # 1 % of the page
    x.flatten(2)[..., spikes] = 500 * torch.randn(1, HEADS, 41).sign()
    restored = bound.decode(bound.encode(x))
    assert torch.equal(restored.flatten(2)[..., spikes], x.flatten(2)[..., spikes])
    assert bound.form.outliers == 41
    assert bound.form.nbytes == 64 * 64 * 2 // 8 + 4 * 41


def test_kvquant_beats_uniform_levels_and_outliers_help():
    def error(outliers: float) -> float:
        codec = KVQuant(2, outliers)
        bound = Bound(codec, "value", head_dim=128, page_size=128, fit=gaussian_sample("value"))
        return bound.nmse(gaussian_pages(8))

    assert error(0.01) < error(0.0) < 0.251  # min-max of a token


def test_kvquant_with_qnorm_keeps_mean_and_deviation():
    x = gaussian_pages(16)
    codec = KVQuant(2, 0.01, qnorm=True, rope="after")
    bound = Bound(codec, "key", head_dim=128, page_size=128, fit=gaussian_sample("key"))
    restored = bound.decode(bound.encode(x))
    assert restored.std().item() == pytest.approx(1, rel=0.02)


def test_turboquant_levels_lie_as_the_paper_has_them():
    shared = TurboQuant(2).shared("key", heads=1, head_dim=128)
    assert shared.codebook.flatten().tolist() == pytest.approx([-1.51, -0.453, 0.453, 1.51], rel=0.01)


def test_qjl_estimates_inner_products_without_bias_and_with_the_paper_s_variance():
    k, q = torch.randn(2, 1, 1, 64, 64)
    exact = (q * k).sum(-1)
    estimates = []
    for seed in range(200):
        codec = QJL(2, seed)
        shared = codec.shared("key", heads=1, head_dim=64)
        y = codec.quantize(shared.to_pages(k, None), shared).dequantize(shared.codebook)
        estimates.append((q * shared.from_pages(y, None)).sum(-1))
    errors = torch.stack(estimates) - exact
    size = (q.norm(dim=-1) * k.norm(dim=-1)).square()
    variance = (errors.square().mean(0) / size).mean().item()
    assert errors.mean(0).div(size.sqrt()).abs().mean() < 0.012  # of 200 draws with a deviation of 0.09
    # lemma 3.5: at most pi / 2 / m; orthogonal rows halve it, nearly
    assert 0.3 * math.pi / 2 / 128 < variance < math.pi / 2 / 128
    slope = (torch.stack(estimates).mean(0) * exact).sum() / exact.square().sum()
    assert slope.item() == pytest.approx(1, abs=0.01)


def test_kitty_promotes_the_channels_of_the_largest_mean_magnitude():
    x = torch.randn(1, HEADS, 64, 64)
    x[..., [3, 60]] *= 10
    q = Kitty(2 / 64).quantize(x)
    assert q.channels.tolist() == [[[3, 60]] * HEADS]
    assert q.dense.codes[..., [3, 60]].max() == 15
    assert q.dense.codes[..., [i for i in range(64) if i not in (3, 60)]].max() == 3
    error = (q.dequantize() - x).square().mean(-2)
    four_bits = Affine(4, "channel", 64)
    exact = (four_bits.dequantize(four_bits.quantize(x)) - x).square().mean(-2)
    assert torch.allclose(error[..., [3, 60]], exact[..., [3, 60]])


@pytest.mark.parametrize(("promoted", "bits"), [(0.125, 2.25), (0.25, 2.5)])
def test_kitty_has_the_bits_of_the_paper(promoted, bits):
    form = Kitty(promoted).part_format("key", head_dim=128, page_size=128, dtype=torch.float16)
    assert form.code_bits == bits
    # a scale and zero point of 32 bits a channel of 128 tokens, a byte a promoted channel
    assert form.bits_per_element == pytest.approx(bits + 32 / 128 + 8 * promoted / 128)


def test_nsn_errors_are_orthogonal_to_what_they_are_errors_of():
    """Of tokens less their page's mean; up to the byte in which a scale is stored."""
    bound = Bound(NSN(1, "after"), "value", head_dim=128, page_size=128)
    x = gaussian_pages(2) * (1 + 5 * torch.rand(2, HEADS, 128, 1))
    restored = bound.decode(bound.encode(x))
    norm = x.square().mean(-1, keepdim=True).sqrt()
    centered = x / norm - (x / norm).mean(-2, keepdim=True)
    cosine = ((restored - x) / norm * centered).sum(-1) / centered.square().sum(-1)
    assert cosine.abs().mean() < 0.01


def test_nsn_does_not_care_how_large_tokens_and_means_are():
    x = gaussian_pages(4)
    bound = Bound(NSN(2, "after"), "value", head_dim=128, page_size=128)
    shifted = (x + 3 * torch.randn(128)) * torch.exp(torch.randn(4, HEADS, 128, 1))
    error = bound.decode(bound.encode(shifted)) - shifted
    unit = shifted.square().mean(-1, keepdim=True).sqrt()
    ratio = (error / unit).square().mean() / (x.square().mean() / 10)  # mean has 9 parts of 10
    assert ratio < 1.6 * 0.0962 / (1 - 0.0962)


def test_tasq_weights_are_the_second_moments_of_the_queries_that_meet_a_key():
    sample = sample_of("key", 16, tokens=40)
    expected = torch.zeros(HEADS, 16)
    pairs = 0
    for t in range(40):
        for p in range(t + 1):
            turned = sample.rope.undo(sample.queries[:, t : t + 1], torch.tensor([p]))
            expected += turned.square().view(HEADS, 2, 16).mean(1)
            pairs += 1
    assert torch.allclose(query_moments(sample, before=True), expected / pairs, rtol=1e-3)
    after = sum(sample.queries[:, t].square() * (t + 1) for t in range(40)).view(HEADS, 2, 16).mean(1)
    assert torch.allclose(query_moments(sample, before=False), after / pairs, rtol=1e-4)


def test_tasq_spends_its_bits_where_queries_look():
    draw = gaussian_sample("key", 64, 2048)
    loud = torch.ones(64)
    loud[[1, 33]] = 6.0  # a pair of the rotary embedding
    sample = dataclasses.replace(draw, queries=draw.queries * loud)
    codec = TaSQ(4, 8, "after").calibrate(sample)
    shared = codec.shared("key", heads=HEADS, head_dim=64)
    restored = shared.from_pages(
        codec.quantize(shared.to_pages(draw.x, None), shared).dequantize(shared.codebook), None
    )
    error = (restored - draw.x).square().mean((0, 1))
    assert error[[1, 33]].mean() < 0.25 * error.mean()
    assert codec.learned["weight"].dtype == torch.float32
    assert codec.learned["codebook"].shape == (HEADS, 16, 256, 4)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_spectral_codes_expect_less_loss_of_more_bits_and_gather_what_concentrates(head_dim):
    draw = torch.Generator().manual_seed(0)
    x, late = (torch.randn(2, 5000, head_dim, generator=draw) for _ in range(2))
    sample = Sample("value", x, torch.arange(5000), torch.ones_like(x), None, None, late=late)
    losses = Spectral(1).rates(sample)
    counts = range(head_dim // 16, head_dim + 1)
    assert [codec.bits for codec in losses] == [8 * n / head_dim for n in counts]
    ordered = list(losses.values())
    assert ordered[0] > ordered[len(ordered) // 2] > ordered[-1] > 0
    few = late.clone()
    few[:, 500:] = 0  # the same information on a tenth of the tokens
    few *= (late.square().sum() / few.square().sum()).sqrt()
    assert Spectral(1).rates(replace(sample, late=few))[Spectral(1)] > 2 * losses[Spectral(1)]
