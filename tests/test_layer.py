"""One layer: append, crop and gather, against what a plain list of tokens would do."""

import copy
import itertools
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitkv.codecs import Affine, Coupled, Sample, Unquantized
from bitkv.layer import PagedLayer

HEADS, HEAD_DIM, PAGE, SINKS, RECENT = 2, 64, 64, 4, 32
RAGGED = (300, 171, 40, 0)  # two or more pages, one, none; and a sequence without a token


def new_layer(
    bits: int = 2, sinks: int = SINKS, recent: int = RECENT, page_size: int = PAGE
) -> PagedLayer:
    return PagedLayer(
        Affine(bits, "channel", 32),
        Affine(bits, "token", 32),
        num_sink_tokens=sinks,
        recent_tokens=recent,
        page_size=page_size,
    )


def tokens(batch: int, count: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, HEADS, count, HEAD_DIM).to(dtype)
    return k, v


def left_padded(lengths) -> Tensor:
    """Which columns of a left-padded batch are real, bool `[B, T]`."""
    longest = max(lengths)
    return torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]


def ragged_layer(lengths=RAGGED) -> PagedLayer:
    layer = new_layer()
    layer.append(*tokens(len(lengths), max(lengths)), real=left_padded(lengths))
    return layer


def contents(layer: PagedLayer, b: int) -> list[Tensor]:
    """The bytes of a sequence: its pages in order, then its hot window."""
    used, hot = int(layer.packed_len[b]) // layer.page_size, int(layer.hot_len[b])
    return [
        layer.pool.data[layer.block_table[b, :used].long()],
        layer.hot_k[b, :, :hot],
        layer.hot_v[b, :, :hot],
    ]


def assert_same_contents(a: PagedLayer, b: PagedLayer) -> None:
    assert a.lengths == b.lengths
    assert torch.equal(a.packed_len, b.packed_len)
    for i in range(len(a.lengths)):
        assert all(torch.equal(x, y) for x, y in zip(contents(a, i), contents(b, i), strict=True))


def snapshot(layer: PagedLayer) -> list[Tensor]:
    rows = [x.clone() for b in range(len(layer.lengths)) for x in contents(layer, b)]
    return [*rows, torch.tensor([layer.nbytes, layer.pool.num_used])]


# --- append -------------------------------------------------------------------------------------


def cut(total: int, cuts: list[int]) -> list[slice]:
    edges = [0, *sorted({c for c in cuts if c < total}), total]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@given(
    total=st.integers(1, 400),
    cuts=st.lists(st.integers(1, 399), max_size=8),
    sinks=st.sampled_from([0, 1, 4, 70]),
    recent=st.sampled_from([0, 1, 32, 200]),
    page_size=st.sampled_from([64, 128]),
)
def test_append_in_any_chunks_equals_one_append_byte_for_byte(total, cuts, sinks, recent, page_size):
    k, v = tokens(2, total)
    at_once, chunked = (new_layer(2, sinks, recent, page_size) for _ in range(2))
    at_once.append(k, v)
    for chunk in cut(total, cuts):
        chunked.append(k[:, :, chunk], v[:, :, chunk])
    assert_same_contents(at_once, chunked)


def test_append_of_one_token_at_a_time_equals_one_append():
    k, v = tokens(2, 250)
    at_once, stepwise = new_layer(), new_layer()
    at_once.append(k, v)
    for t in range(250):
        stepwise.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert_same_contents(at_once, stepwise)


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4).filter(any),
    cuts=st.lists(st.integers(1, 299), max_size=5),
    pad_left=st.booleans(),
)
def test_padding_is_not_stored_wherever_it_stands(lengths, cuts, pad_left):
    real = left_padded(lengths) if pad_left else left_padded(lengths).flip(1)
    k, v = tokens(*real.shape)
    batch = new_layer()
    for chunk in cut(real.shape[1], cuts):
        batch.append(k[:, :, chunk], v[:, :, chunk], real[:, chunk])
    assert batch.lengths == lengths
    for b, length in enumerate(lengths):
        alone = new_layer()
        alone.append(k[b : b + 1, :, real[b]], v[b : b + 1, :, real[b]])
        expected = contents(alone, 0)
        assert length == alone.lengths[0]
        assert all(torch.equal(x, y) for x, y in zip(contents(batch, b), expected, strict=True))


@given(
    total=st.integers(1, 400), sinks=st.sampled_from([0, 4, 70]), recent=st.sampled_from([0, 32, 200])
)
def test_sinks_and_recent_tokens_stay_exact_and_only_full_pages_are_packed(total, sinks, recent):
    k, v = tokens(1, total)
    layer = new_layer(sinks=sinks, recent=recent)
    layer.append(k, v)
    packed, hot = int(layer.packed_len[0]), int(layer.hot_len[0])
    assert packed % PAGE == 0
    assert packed + hot == total
    assert hot < sinks + recent + PAGE
    assert hot >= min(total, sinks + recent)
    for stored, given_ in ((layer.hot_k, k), (layer.hot_v, v)):
        assert torch.equal(stored[0, :, : min(sinks, hot)], given_[0, :, :sinks])
        assert torch.equal(stored[0, :, sinks:hot], given_[0, :, sinks + packed :])


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (4, 0), (0, 32), (4, 32)])
def test_a_page_is_packed_as_soon_as_sinks_recent_tokens_and_a_page_have_gathered(sinks, recent):
    layer = new_layer(sinks=sinks, recent=recent)
    layer.append(*tokens(1, sinks + recent + PAGE - 1))
    assert (layer.packed_len.tolist(), layer.pool.num_used) == ([0], 0)
    layer.append(*tokens(1, 1))
    assert (layer.packed_len.tolist(), layer.pool.num_used) == ([PAGE], 1)
    assert layer.hot_len.tolist() == [sinks + recent]


def test_pages_hold_what_the_codecs_make_of_their_tokens():
    k, v = tokens(1, 300)
    layer = new_layer()
    layer.append(k, v)
    assert layer.packed_len.tolist() == [256]
    for i in range(4):
        span = slice(SINKS + i * PAGE, SINKS + (i + 1) * PAGE)
        page = layer.format.pack(layer.key.quantize(k[0, :, span]), layer.value.quantize(v[0, :, span]))
        assert torch.equal(layer.pool.data[layer.block_table[0, i]], page)


def test_materialize_is_exact_in_the_window_and_dequantized_between():
    k, v = tokens(1, 300)
    layer = new_layer()
    layer.append(k, v)
    keys, values = layer.materialize()
    assert torch.equal(keys[:, :, :SINKS], k[:, :, :SINKS])
    assert torch.equal(values[:, :, SINKS + 256 :], v[:, :, SINKS + 256 :])
    page = k[0, :, SINKS : SINKS + PAGE]
    expected = layer.key.quantize(page).dequantize().half()
    assert torch.equal(keys[0, :, SINKS : SINKS + PAGE], expected)
    assert 0.1 < (keys - k).norm() / k.norm() < 0.5  # 2 bits are not exact, nor are they noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_unquantized_layer_gives_back_every_token_exactly(dtype):
    k, v = tokens(2, 300, dtype)
    layer = PagedLayer(
        Unquantized(), Unquantized(), num_sink_tokens=SINKS, recent_tokens=RECENT, page_size=PAGE
    )
    layer.append(k, v)
    keys, values = layer.materialize()
    assert layer.packed_len.tolist() == [256, 256]
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


def test_staged_tokens_are_read_exactly_until_they_are_committed():
    k, v = tokens(1, 300)
    layer = new_layer()
    layer.stage(k, v)
    assert torch.equal(layer.materialize()[0], k)
    layer.commit()
    assert layer.packed_len.tolist() == [256]
    assert layer.hot_k.shape[2] == layer.hot_capacity


# --- crop ---------------------------------------------------------------------------------------


@given(
    cuts=st.lists(st.integers(0, 300), min_size=len(RAGGED), max_size=len(RAGGED)),
    extra=st.integers(0, 200),
)
def test_crop_keeps_a_prefix_and_append_goes_on_from_it(cuts, extra):
    layer = ragged_layer()
    before = layer.materialize()
    lengths = [min(c, n) for c, n in zip(cuts, RAGGED, strict=True)]
    layer.crop(lengths)
    assert layer.lengths == lengths
    assert sum(layer.pool._references) == int(layer.packed_len.sum()) // PAGE
    kept = layer.materialize() if any(lengths) else None
    for b, n in enumerate(lengths):
        assert n == 0 or all(
            torch.equal(x[b, :, :n], y[b, :, :n]) for x, y in zip(kept, before, strict=True)
        )
    k, v = tokens(len(RAGGED), extra)
    layer.append(k, v)
    assert layer.lengths == [n + extra for n in lengths]
    newest = min(extra, RECENT)
    for b, n in enumerate(layer.lengths):
        window = layer.hot_k[b, :, : layer.hot_len[b]]
        assert newest == 0 or torch.equal(window[:, -newest:], k[b, :, -newest:])
        assert n == lengths[b] + extra


def test_a_cut_inside_the_window_is_exact():
    k, v = tokens(1, 300)
    layer = new_layer()
    layer.append(k, v)
    pages = layer.pool.num_used
    layer.crop([290])
    assert layer.pool.num_used == pages
    assert torch.equal(layer.materialize()[0][:, :, 260:], k[:, :, 260:290])


def test_a_cut_inside_a_page_brings_its_kept_tokens_back_as_their_codes_have_them():
    layer = ragged_layer((300,))
    before = layer.materialize()[0]
    layer.crop([SINKS + PAGE + 10])
    assert layer.packed_len.tolist() == [PAGE]
    assert layer.hot_len.tolist() == [SINKS + 10]
    assert layer.pool.num_used == 1
    assert torch.equal(layer.materialize()[0], before[:, :, : SINKS + PAGE + 10])


def test_values_at_the_edge_of_float16_stay_finite_when_they_come_back():
    layer = new_layer()
    k = (6e4 * torch.randn(1, HEADS, 300, HEAD_DIM)).clamp(-65504, 65504).half()
    layer.append(k, k)
    assert layer.materialize()[0].isfinite().all()
    layer.crop([SINKS + PAGE + 10])
    assert layer.hot_k[:, :, : SINKS + 10].isfinite().all()


def test_a_cut_at_a_page_edge_dequantizes_nothing():
    layer = ragged_layer((300,))
    layer.crop([SINKS + 2 * PAGE])
    assert (layer.packed_len.tolist(), layer.hot_len.tolist()) == ([2 * PAGE], [SINKS])


def test_a_cut_inside_the_sinks_frees_all_pages():
    k, v = tokens(1, 300)
    layer = new_layer()
    layer.append(k, v)
    layer.crop([3])
    assert layer.pool.num_used == 0
    assert torch.equal(layer.materialize()[0], k[:, :, :3])


def test_after_a_crop_to_nothing_append_starts_anew():
    layer, fresh = ragged_layer(), new_layer()
    layer.crop([0] * len(RAGGED))
    assert layer.pool.num_used == 0
    k, v = tokens(len(RAGGED), 200)
    layer.append(k, v)
    fresh.append(k, v)
    assert_same_contents(layer, fresh)


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ([300, 171, 41, 0], "cannot crop sequence 2 of 40 tokens to 41 tokens"),
        ([300, -1, 40, 0], "cannot crop sequence 1 of 171 tokens to -1 tokens"),
        ([10, 10], "crop got 2 lengths for a batch of 4"),
    ],
)
def test_a_crop_to_what_is_not_there_is_refused_and_changes_nothing(lengths, sentence):
    layer = ragged_layer()
    before = snapshot(layer)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        layer.crop(lengths)
    assert all(torch.equal(x, y) for x, y in zip(before, snapshot(layer), strict=True))


# --- gather -------------------------------------------------------------------------------------

GATHERS = {
    "reorder": [2, 0, 3, 1],
    "repeat": [0, 0, 1, 1, 2, 2, 3, 3],
    "select": [1],
    "beams": [0, 0, 0, 1],
}


@pytest.mark.parametrize("indices", GATHERS.values(), ids=GATHERS)
def test_gather_moves_tables_and_copies_no_page(indices):
    layer = ragged_layer()
    before = [contents(layer, b) for b in range(len(RAGGED))]
    address = layer.pool.data.data_ptr()
    layer.gather(torch.tensor(indices))
    kept = {b: RAGGED[b] for b in set(indices)}
    assert layer.pool.data.data_ptr() == address
    assert layer.pool.num_used == sum(max(n - SINKS - RECENT, 0) // PAGE for n in kept.values())
    assert layer.lengths == [RAGGED[b] for b in indices]
    for new, old in enumerate(indices):
        assert all(torch.equal(x, y) for x, y in zip(contents(layer, new), before[old], strict=True))


@pytest.mark.parametrize("indices", GATHERS.values(), ids=GATHERS)
def test_sequences_that_share_pages_go_separate_ways(indices):
    k, v = tokens(len(RAGGED), 300)
    more = tokens(len(indices), 150)
    moved, built = new_layer(), new_layer()
    moved.append(k, v)
    moved.gather(torch.tensor(indices))
    moved.append(*more)
    built.append(k[indices], v[indices])
    built.append(*more)
    assert_same_contents(moved, built)


def test_references_return_to_zero_when_sequences_go():
    layer = ragged_layer()
    layer.gather(torch.tensor([0, 0, 1, 0]))
    shared = int(layer.block_table[0, 0])
    assert layer.pool.references(shared) == 3
    layer.crop([300, 0, 171, 0])
    assert layer.pool.references(shared) == 1
    layer.gather(torch.tensor([1, 3]))
    assert layer.pool.num_used == 0
    assert not any(layer.pool._references)


def test_cropping_one_sequence_leaves_the_page_of_the_other_alone():
    layer = ragged_layer()
    layer.gather(torch.tensor([0, 0]))
    before = contents(layer, 1)
    layer.crop([100, 300])
    layer.append(*tokens(2, 200))
    pages = layer.pool.data[layer.block_table[1, :4].long()]
    assert torch.equal(pages, before[0])


@pytest.mark.parametrize("indices", [[4], [0, -1]])
def test_an_index_outside_the_batch_is_refused_and_changes_nothing(indices):
    layer = ragged_layer()
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"^cannot gather sequences .* of a batch of 4; pass 0 to 3$"):
        layer.gather(torch.tensor(indices))
    assert all(torch.equal(x, y) for x, y in zip(before, snapshot(layer), strict=True))


# --- bytes, reset, refusals ---------------------------------------------------------------------


def test_nbytes_counts_every_tensor_and_usage_what_tokens_occupy():
    layer = ragged_layer((300, 171))
    tensors = (
        layer.pool.data,
        layer.block_table,
        layer.packed_len,
        layer.hot_len,
        layer.hot_k,
        layer.hot_v,
    )
    assert layer.nbytes == sum(x.numel() * x.element_size() for x in tensors)
    usage = layer.usage
    assert usage.page_bytes == (4 + 2) * HEADS * layer.format.page_bytes
    assert usage.page_elements == (4 + 2) * PAGE * HEADS * HEAD_DIM * 2
    assert usage.hot_elements == (44 + 43) * HEADS * HEAD_DIM * 2
    assert usage.hot_bytes == 2 * usage.hot_elements


def test_reset_forgets_tokens_and_shapes_and_gives_the_memory_back():
    layer = ragged_layer()
    held = [weakref.ref(x) for x in (layer.pool.data, layer.hot_k, layer.hot_v)]
    layer.reset()
    assert layer.is_empty
    assert (layer.nbytes, layer.lengths) == (0, [])
    assert [ref() for ref in held] == [None] * 3
    layer.append(torch.zeros(1, 3, 5, 128), torch.zeros(1, 3, 5, 128))
    assert layer.lengths == [5]


def test_an_empty_layer_takes_crop_and_gather_and_has_no_view():
    layer = new_layer()
    layer.crop([])
    layer.gather(torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"^the cache is empty and has no page format yet; append"):
        layer.view()


def zeros(batch=4, heads=HEADS, count=3, head_dim=HEAD_DIM, dtype=torch.float16, device="cpu") -> Tensor:
    return torch.zeros(batch, heads, count, head_dim, dtype=dtype, device=device)


MISFITS = {
    "other head_dim": (zeros(head_dim=128), zeros(head_dim=128), None, "new tokens have"),
    "other batch": (zeros(batch=2), zeros(batch=2), None, "new tokens have"),
    "other heads": (zeros(heads=1), zeros(heads=1), None, "new tokens have"),
    "other dtype": (zeros(dtype=torch.float32), zeros(dtype=torch.float32), None, "new tokens have"),
    "other device": (zeros(device="meta"), zeros(device="meta"), None, "the cache is on cpu, the new"),
    "two devices": (zeros(), zeros(device="meta"), None, "keys are torch.float16 on cpu, values"),
    "two dtypes": (zeros(), zeros(dtype=torch.float32), None, "keys are torch.float16 on cpu, values"),
    "two shapes": (zeros(), zeros(count=4), None, "keys .* and values .* must both be"),
    "three axes": (zeros()[0], zeros()[0], None, "keys .* and values .* must both be"),
    "mask shape": (zeros(), zeros(), torch.ones(4, 2, dtype=torch.bool), "the mask of real tokens is"),
    "mask dtype": (zeros(), zeros(), torch.ones(4, 3), "the mask of real tokens is"),
}


@pytest.mark.parametrize(("k", "v", "real", "sentence"), MISFITS.values(), ids=MISFITS)
def test_tokens_that_do_not_fit_are_refused_and_change_nothing(k, v, real, sentence):
    layer = ragged_layer()
    before = snapshot(layer)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        layer.append(k, v, real)
    assert all(torch.equal(x, y) for x, y in zip(before, snapshot(layer), strict=True))


def test_a_head_dim_that_the_codec_cannot_group_is_refused_and_the_layer_stays_empty():
    layer = new_layer()
    k = torch.zeros(1, 1, 5, 80)
    with pytest.raises(ValueError, match=r"^head_dim 80 is not a multiple of group_size 32; "):
        layer.append(k, k)
    assert layer.is_empty
    assert layer.nbytes == 0


def test_copies_of_a_layer_share_what_its_pages_share():
    x = torch.randn(2, 600, 64)
    sample = Sample("value", x, torch.arange(600), torch.ones_like(x), None, None)
    layer = PagedLayer(
        Affine(2, "channel"),
        Coupled(4, 4, "uniform").calibrate(sample),
        num_sink_tokens=4,
        recent_tokens=64,
        page_size=64,
    )
    layer.append(*torch.randn(2, 1, 2, 300, 64))
    other = copy.deepcopy(layer)
    assert other.view().value.codebook is layer.view().value.codebook
    assert other.value is layer.value
    assert other.pool.data.data_ptr() != layer.pool.data.data_ptr()
    assert torch.equal(other.materialize()[1], layer.materialize()[1])
