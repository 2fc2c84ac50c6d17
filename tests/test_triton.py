"""The backend "triton" in Triton's interpreter, or on a GPU where there is one: formats, shapes, memory.

The rule is that of tests/test_attention.py: twice the error of PyTorch's attention in 16 bits over the
dequantized cache, both against float64.
"""

import dataclasses
import itertools

import pytest
import torch
from test_attention import (
    TRITON_DEVICE,
    Case,
    assert_rule,
    attend_by,
    dense,
    exact,
    exactly,
    filled,
    new_layer,
    visible,
)
from test_cpu import KEYS, SHAPES, VALUES

from bitkv.attention import AttentionRequest, attend, choose, last_backend
from bitkv.attention.tiling import Tiling
from bitkv.attention.triton import BACKEND, launch_of, splits_of, triton_attend
from bitkv.codecs import Affine, Unquantized
from bitkv.pages import AffineFormat
from bitkv.recipe import Recipe

pytest.importorskip("triton")
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
RATIOS = (1, 3, 8, 16, 32)


# --- every format ------------------------------------------------------------------------------------


def formats() -> list[tuple[int, int, Affine, Affine]]:
    """Every format of keys, each beside another one of values: every one of those comes up too."""
    values = {shape: itertools.cycle([v for *of, v in VALUES if tuple(of) == shape]) for shape in SHAPES}
    return [(page, dim, key, next(values[page, dim])) for page, dim, key in KEYS]


def test_no_format_is_left_out():
    assert {(page, dim, value) for page, dim, _, value in formats()} == set(VALUES)


@pytest.mark.parametrize(("page", "head_dim", "key", "value"), formats(), ids=str)
def test_codes_of_every_format(page, head_dim, key, value):
    number = KEYS.index((page, head_dim, key))
    recipe = Recipe(key, value, num_sink_tokens=0, recent_tokens=0, page_size=page)
    ratio = RATIOS[number % 5]  # a norm over few queries says little
    queries, dtype = -(-8 // ratio), (HALF, BF16)[number // 4 % 2]  # bits come in fours
    assert_rule(Case((page + 7,), repr(recipe), ratio, 1, head_dim, queries, dtype), "triton")


@pytest.mark.parametrize(
    ("page", "head_dim", "bits"), [(64, 16, 4), (128, 48, 1), (64, 208, 2), (128, 240, 4)]
)
@pytest.mark.parametrize("granularity", ["channel", "token"])
def test_small_and_odd_heads(page, head_dim, bits, granularity):
    recipe = Recipe(Affine(bits, granularity, "page"), Affine(1, "token", "page"), page_size=page)
    assert_rule(Case((2 * page + 7,), repr(recipe), 8, 1, head_dim, 2), "triton")


@pytest.mark.parametrize(("page", "head_dim", "bits"), [(64, 16, 2), (64, 48, 1), (128, 16, 1)])
def test_pages_with_few_codes_of_keys_are_refused(page, head_dim, bits):
    recipe = Recipe(Affine(bits, "channel", "page"), Affine(1, "token", "page"), page_size=page)
    case = Case((2 * page + 7,), repr(recipe), 8, 1, head_dim, 2)
    with pytest.raises(ValueError, match="bytes of keys' codes a head, and takes at least 512"):
        assert_rule(case, "triton")


@pytest.mark.parametrize(("page", "head_dim"), SHAPES)
def test_unquantized_pages(page, head_dim):
    recipe = repr(Recipe(Unquantized(), Unquantized(), recent_tokens=0, page_size=page))
    for dtype in (HALF, BF16, FLOAT):
        assert_rule(Case((page + 7,), recipe, 4, 1, head_dim, 2, dtype), "triton")


# --- every shape -------------------------------------------------------------------------------------

K4V1 = "Recipe(Affine(4, 'channel', 32), Affine(1, 'token', 'page', 'mse'), num_sink_tokens=70)"
RAW_KEYS = "Recipe(Unquantized(), Affine(2, 'token', 'page'), recent_tokens=0)"
RAW_VALUES = "Recipe(Affine(1, 'channel', 'page'), Unquantized(), recent_tokens=0, page_size=64)"
CASES = [
    Case((1,), heads=8, kv_heads=1),
    Case((127, 1), heads=16, kv_heads=2),
    Case((129, 128), queries=5),
    Case((1000,), "affine(4, 'page')", 8, 1, 128),
    Case((1000, 0, 300), "affine(1, 'page')", 8, 1, 128),
    Case((0, 1000, 64), "kivi4", queries=5, dtype=BF16),
    Case((500, 129), "quick2", 32, 1, 128),
    Case((400,), "affine(2, 'page')", 128, 1),
    Case((300, 0, 500), "quick1", 3, 1, 96, 5, BF16),
    Case((300,), "int8", 4, 2, 256, 2),
    Case((500,), "affine(2, 'page')", 8, 8, 80, queries=2),
    Case((300, 20, 0), heads=2, kv_heads=1, queries=150),
    Case((60, 80, 500), K4V1, queries=3, head_dim=128),
    Case((300,), RAW_KEYS, queries=3),
    Case((200,), RAW_VALUES, queries=3, dtype=BF16),
    Case((300, 129, 0), queries=5, causal=False),
    Case((1000, 129, 0), queries=5, window=100),
    Case((500, 129), queries=40, window=1),
    Case((400, 129), queries=5, softcap=5.0),
    Case((400, 0), "quick2", queries=5, window=300, softcap=2.0, dtype=BF16),
    Case((300,), "affine(1, 'page')", 8, 1, queries=2, softcap=20.0),
    Case((300,), "Recipe(Affine(2, 'token', 'page'), Affine(2, 'token', 32))", softcap=3.0, queries=2),
    Case((300, 200), queries=2, dtype=FLOAT),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_and_arguments(case):
    assert_rule(case, "triton")


@pytest.mark.parametrize("at_once", [256, 16])
def test_more_splits_than_a_merge_takes_at_once(monkeypatch, at_once):
    """As on a device of many processors; some splits have no pages, one sequence has no tokens."""
    monkeypatch.setattr("bitkv.attention.triton._processors", lambda _: 132)
    monkeypatch.setattr("bitkv.attention.triton._MERGED_MANY", (16, at_once))
    assert_rule(Case((2600, 300, 0), heads=4, kv_heads=1), "triton")


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (1, 0), (70, 64), (200, 1), (4, 300)])
def test_sinks_and_recent_tokens(sinks, recent):
    codecs = Affine(2, "channel", "page"), Affine(2, "token", "page")
    recipe = Recipe(*codecs, num_sink_tokens=sinks, recent_tokens=recent)
    assert_rule(Case((500, 310, 20), repr(recipe), 8, 1, queries=2), "triton")


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_flat_and_needle_like_attention(factor):
    layer = filled("kivi4", (500,), backend="triton")
    q = (factor * torch.randn(1, 4, 2, 64)).half()
    out, lse = attend_by("triton", q, layer)
    mask = visible(torch.tensor([[498, 499]]), 500, None)
    expected, expected_lse = dense(q, *exact(layer), mask, None)
    assert torch.allclose(out.double(), expected, atol=2**-7 if factor > 1 else 2**-10)
    assert torch.allclose(lse.double(), expected_lse, rtol=2**-11)


@pytest.mark.parametrize("recipe", ["affine(2, 'page')", "fp16"])
def test_a_negative_scale_and_no_scale(recipe):
    layer = filled(recipe, (300,), backend="triton")
    q = torch.randn(1, 4, 1, 64).half()
    negative, _ = attend_by("triton", q, layer, scale=-0.125)
    flipped, _ = attend_by("triton", -q, layer, scale=0.125)
    assert torch.equal(negative, flipped)
    flat, lse = attend_by("triton", q, layer, scale=0.0)
    mean = exact(layer)[1].mean(2, keepdim=True).repeat_interleave(2, 1)
    assert torch.allclose(flat.double(), mean, atol=2**-10)
    assert torch.allclose(lse, torch.tensor(300.0).log())


def test_queries_of_any_size_fit_float16():
    layer = filled("affine(1, 'page')", (300,), dtype=BF16, backend="triton")
    q = torch.randn(1, 4, 1, 64)
    expected, _ = attend_by("triton", q.bfloat16(), layer)
    assert expected.any()
    for size in (2.0**-40, 2.0**40):
        out, _ = attend_by("triton", (size * q).bfloat16(), layer, scale=0.125 / size)
        assert torch.allclose(out, expected, rtol=2**-7, atol=2**-9)


# --- memory ------------------------------------------------------------------------------------------


def test_memory_beyond_valid_data_is_never_used():
    layer = filled("affine(2, 'page')", (500, 0, 150), backend="triton")
    q, view = torch.randn(3, 4, 1, 64).half(), layer.view()
    q = q.to(view.hot_k.device)
    expected = attend(q, view, backend="triton")
    assert expected[0][0].any()
    used = view.packed_len // view.format.page_size
    pages = torch.cat([view.pages, torch.full_like(view.pages[:2], 0xFF)])
    table = view.block_table.clone()
    beyond = torch.arange(table.shape[1], device=table.device) >= used[:, None]
    table[beyond] = 2**30  # not even read
    hot = {name: getattr(view, name).clone() for name in ("hot_k", "hot_v")}
    for b, length in enumerate(view.hot_len.tolist()):
        for x in hot.values():
            x[b, :, length:] = torch.nan
    poisoned = dataclasses.replace(view, pages=pages, block_table=table, **hot)
    for x, y in zip(attend(q, poisoned, backend="triton"), expected, strict=True):
        assert torch.equal(x, y)


def test_strides_of_queries_and_of_the_hot_window():
    layer = filled("affine(2, 'page')", (200, 150), backend="triton")
    view = layer.view()
    q = torch.randn(2, 4, 3, 64, device=view.hot_k.device).half()
    expected = attend(q, view, backend="triton")
    assert expected[0].any()
    rows = q.transpose(1, 2).contiguous().transpose(1, 2)
    batch, heads, capacity, head_dim = view.hot_k.shape
    wide = torch.full((2, 2 * batch, heads + 1, capacity + 3, head_dim), torch.nan).to(view.hot_k)
    hot_k, hot_v = (x[::2, 1:, 2 : capacity + 2] for x in wide)
    hot_k.copy_(view.hot_k)
    hot_v.copy_(view.hot_v)
    moved = dataclasses.replace(view, hot_k=hot_k, hot_v=hot_v)
    for queries, cache in ((rows, view), (torch.stack([q, -q], -1)[..., 0], view), (q, moved)):
        for x, y in zip(attend(queries, cache, backend="triton"), expected, strict=True):
            assert torch.equal(x, y)


# --- the operator ------------------------------------------------------------------------------------


def test_the_operator_has_a_fake_that_agrees():
    layer = filled("affine(2, 'page')", (150,), backend="triton")
    view = layer.view()
    q = torch.randn(1, 4, 1, 64, device=view.hot_k.device).half()
    arguments = AttentionRequest(q, view, None, 0.125).operands
    torch.library.opcheck(triton_attend, arguments, test_utils=("test_schema", "test_faketensor"))
    for x, y in zip(triton_attend(*arguments), attend(q, view, backend="triton"), strict=True):
        assert torch.equal(x, y)


def test_no_queries_and_no_sequences_are_fine():
    layer = filled("kivi2", (150, 20), backend="triton")
    out, lse = attend_by("triton", torch.zeros(2, 4, 0, 64).half(), layer)
    assert (out.shape, lse.shape) == ((2, 4, 0, 64), (2, 4, 0))
    layer.gather(torch.tensor([], dtype=torch.int64))
    out, lse = attend_by("triton", torch.zeros(0, 4, 1, 64).half(), layer)
    assert (out.shape, lse.shape) == ((0, 4, 1, 64), (0, 4, 1))


def test_auto_takes_it_for_the_pages_of_a_gpu():
    layer = filled("kivi2", (150,), backend="triton")
    attend(torch.zeros(1, 2, 1, 64, device=TRITON_DEVICE).half(), layer.view())
    assert last_backend() == "triton"


def test_it_says_what_it_got_and_what_it_takes(monkeypatch):
    layer = new_layer("kivi2", "lanes")
    layer.append(*torch.zeros(2, 1, 2, 150, 64).half())
    q = torch.zeros(1, 2, 1, 64).half()
    request = AttentionRequest(q, layer.view(), torch.zeros(1, 1, dtype=torch.int64), 1.0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="it got pages of the layout 'lanes', and takes 'strided'"):
        choose(request, "triton")
    monkeypatch.setattr("bitkv.attention.triton.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="it needs the package triton, which is not installed"):
        choose(request, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    sentence = "backend 'triton' refused: it got tensors on cpu, and takes tensors on a CUDA device"
    with pytest.raises(ValueError, match=exactly(sentence)):
        choose(request, "triton")
    assert BACKEND.name == "triton"


# --- how work is cut ---------------------------------------------------------------------------------


def test_programs_fill_the_device_and_none_is_without_work():
    assert splits_of(grid=8, max_pages=1024, hot_capacity=260, slots=1056) == 132
    assert splits_of(grid=8, max_pages=2, hot_capacity=260, slots=1056) == 17
    assert splits_of(grid=4096, max_pages=1024, hot_capacity=260, slots=1056) == 1
    assert splits_of(grid=0, max_pages=0, hot_capacity=0, slots=1056) == 1


def test_one_warp_serves_up_to_eight_queries_of_codes():
    form = new_layer("kivi2").page_format(128, HALF)
    assert launch_of(form, 1)[:3:2] == launch_of(form, 8)[:3:2] == (8, 1)
    assert launch_of(form, 4, amd=True).columns == 16
    assert launch_of(form, 1000) == launch_of(form, 8)
    assert launch_of(new_layer("fp16").page_format(128, HALF), 1000).columns == 32


@pytest.mark.parametrize(("bits", "head_dim"), [(1, 64), (1, 128), (2, 96), (4, 80), (8, 256)])
def test_tiles_cover_each_row_once_and_slots_each_column(bits, head_dim):
    part = AffineFormat("value", bits, "token", head_dim, head_dim, 128)
    t = Tiling.of(part, 32)
    assert t.tile * t.all_tiles == t.rows == head_dim
    assert t.slots * t.words == t.columns == 128
    positions = {t.position(tile, slot) for tile in range(t.all_tiles) for slot in range(t.slots)}
    assert positions == set(range(0, 16, bits))
