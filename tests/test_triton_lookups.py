"""The backend "triton" over codebooks, linear maps and keys before the rotary embedding.

The rule is that of tests/test_attention.py: twice the error of PyTorch's attention in 16 bits over the
dequantized cache, both against float64.
"""

import dataclasses

import pytest
import torch
from test_attention import TRITON_DEVICE, dense, pytorch, visible
from test_cpu_codebooks import Case, Scaled, case_of, coupled, held, rope_of, spectral

from bitkv.attention import AttentionRequest, attend, choose, last_backend
from bitkv.attention.lookups import Lookup
from bitkv.attention.triton import triton_attend
from bitkv.codecs import Affine, Codec, QuaRot, RotateKV, TurboQuant
from bitkv.pages import CodebookFormat
from bitkv.rope import Rope
from bitkv.shared import Shared
from bitkv.view import CacheView

pytest.importorskip("triton")
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
VALUES = Affine(2, "token", 32)
KEYS = Affine(2, "channel", 32)


def moved(view: CacheView, device: str) -> CacheView:
    """The view on a device, the tensors that pages share included."""
    tensors = {f.name: getattr(view, f.name) for f in dataclasses.fields(view)}
    return CacheView(
        **{
            name: x.to(device) if isinstance(x, torch.Tensor | Shared) else x
            for name, x in tensors.items()
        }
    )


def made(key: Codec, value: Codec, lengths=(300, 129, 0), *, layer=None, **options) -> Case:
    """A case whose pages are in the order that GPUs read."""
    return case_of(key, value, lengths, layer={"layout": "strided"} | (layer or {}), **options)


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = attend(
        case.q.to(TRITON_DEVICE), moved(case.view, TRITON_DEVICE), backend="triton", **case.options
    )
    assert last_backend() == "triton"
    return out.cpu(), lse.cpu()


def assert_rule(case: Case, dtype: torch.dtype = HALF) -> None:
    hot = {"hot_k": case.view.hot_k.to(dtype), "hot_v": case.view.hot_v.to(dtype)}
    case = dataclasses.replace(case, q=case.q.to(dtype), view=dataclasses.replace(case.view, **hot))
    k, v = held(case)
    lengths, queries = torch.tensor(case.layer.lengths), case.q.shape[2]
    last = (lengths[:, None] - queries + torch.arange(queries)).clamp(min=-1)
    mask = visible(last, k.shape[2], case.options.get("window"))
    expected, expected_lse = dense(case.q, k, v, mask, case.options.get("softcap"))
    out, lse = run(case)
    # 16-bit attention knows no soft cap: its error without one
    plain = expected if not case.options.get("softcap") else dense(case.q, k, v, mask, None)[0]
    short = case.q.half() if dtype == FLOAT else case.q
    allowed = (torch.nan_to_num(pytorch(short, k, v, mask).double()) - plain).norm()
    assert (out.double() - expected).norm() <= 2 * allowed + 1e-6 * expected.norm()
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert torch.allclose(lse[seen].double(), expected_lse[seen], rtol=2**-9, atol=2**-8)


# --- indices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["before", "after"])
@pytest.mark.parametrize(
    ("channels", "bits", "head_dim", "page"),
    [
        *[(2, 8, 128, 128), (4, 8, 128, 128), (8, 8, 128, 64), (8, 8, 64, 128)],
        *[(8, 10, 128, 128), (4, 9, 64, 64), (1, 4, 64, 128), (2, 3, 96, 64), (3, 8, 96, 128)],
    ],
)
def test_indices_of_every_width(channels, bits, head_dim, page, rope):
    key = coupled(channels, bits, head_dim, rope=rope, site="key")
    value = coupled(channels, bits, head_dim)
    if rope == "before" and head_dim // 2 % channels:
        pytest.skip("an index has channels of both halves")
    case = made(key, value, head_dim=head_dim, layer={"page_size": page})
    assert_rule(case)


@pytest.mark.parametrize("ratio", [1, 3, 8, 16, 32])
@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT])
def test_ratios_and_dtypes(ratio, dtype):
    key = coupled(8, 8, 64, rope="before", site="key")
    case = made(key, coupled(8, 8, 64), (257, 0, 70), heads=2 * ratio, head_dim=64, queries=3)
    assert_rule(case, dtype)


@pytest.mark.parametrize("lengths", [(1,), (127,), (129,), (1000, 3)])
def test_odd_lengths(lengths):
    assert_rule(made(coupled(4, 8, 64, site="key"), coupled(8, 8, 64), lengths, head_dim=64))


def test_indices_beside_affine_codes():
    assert_rule(made(coupled(8, 8, 64, rope="before", site="key"), VALUES, head_dim=64))
    assert_rule(made(KEYS, coupled(8, 8, 64), head_dim=64))


class Shifted(Scaled):
    """With a scale and a zero point for each token, values included."""

    def part_format(self, site, **shape):
        return dataclasses.replace(super().part_format(site, **shape), scales=2)


@pytest.mark.parametrize("rope", ["before", "after"])
@pytest.mark.parametrize("kind", [Scaled, Shifted])
def test_indices_with_scales_and_zero_points(kind, rope):
    key, value = (
        kind(4, 8, "uniform", rope).with_learned(coupled(4, 8, 64, rope=rope, site=site).learned)
        for site in ("key", "value")
    )
    assert_rule(made(key, value, head_dim=64, queries=3))


def test_memory_beyond_valid_data_is_never_used():
    key = coupled(8, 8, 64, rope="before", site="key")
    case = made(key, spectral(1.0, 64, "value"), (300, 0, 150), head_dim=64)
    case = dataclasses.replace(case, q=case.q.half())
    view, expected = case.view, run(case)
    assert expected[0][0].any()
    used = view.packed_len // view.format.page_size
    table = view.block_table.clone()
    table[torch.arange(table.shape[1]) >= used[:, None]] = 2**30  # not even read
    hot = {name: getattr(view, name).clone() for name in ("hot_k", "hot_v")}
    for b, length in enumerate(view.hot_len.tolist()):
        for x in hot.values():
            x[b, :, length:] = torch.nan
    poisoned = dataclasses.replace(view, block_table=table, **hot)
    for x, y in zip(run(dataclasses.replace(case, view=poisoned)), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("options", [{"window": 100}, {"softcap": 3.0}, {"window": 40, "softcap": 9.0}])
def test_windows_and_caps(options):
    key = coupled(8, 8, 64, rope="before", site="key")
    assert_rule(made(key, coupled(8, 8, 64), head_dim=64, queries=5, **options))


def test_angles_stay_exact_far_into_a_sequence():
    """A page with a million tokens before it, as seen by its own rotary embedding."""
    key = coupled(8, 8, 64, rope="before", site="key")
    case = made(key, coupled(8, 8, 64), (200,), head_dim=64, layer={"num_sink_tokens": 0})
    far = 7813  # pages before it, which a window hides
    table = torch.zeros(1, far + case.view.block_table.shape[1], dtype=torch.int32)
    table[:, far:] = case.view.block_table
    view = dataclasses.replace(case.view, block_table=table, packed_len=case.view.packed_len + far * 128)
    rope = view.key.rope
    assert isinstance(rope, Rope)
    size, hot = view.format.page_size, int(view.hot_len)
    page = view.dequantize(table[:, far : far + 1], far)
    k, v = (
        torch.cat([p[0, 0], h[0, :, :hot].float()], 1)
        for p, h in zip(page, (view.hot_k, view.hot_v), strict=True)
    )
    q = case.q[:1].half()
    case = dataclasses.replace(case, q=q, view=view, options={"window": size + hot - 1})
    last = torch.tensor([[size + hot - 2, size + hot - 1]])
    mask = visible(last, size + hot, size + hot - 1)
    expected, _ = dense(q, k[None].double(), v[None].double(), mask, None)
    assert (run(case)[0].double() - expected).norm() < 2e-3 * expected.norm()


# --- linear maps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1.0, 1.25, 2.0])
def test_pages_wider_than_a_head(bits):
    case = made(spectral(bits, 64, "key"), spectral(bits, 64, "value"), head_dim=64, queries=3)
    assert case.view.format.value.width >= 64
    assert_rule(case)


@pytest.mark.parametrize("key", [QuaRot(4), TurboQuant(3)], ids=str)
def test_rotations(key):
    assert_rule(made(key, key, head_dim=64, queries=3))


def test_a_map_of_one_side_only():
    assert_rule(made(spectral(1.5, 64, "key"), VALUES, head_dim=64))
    assert_rule(made(KEYS, spectral(1.5, 64, "value"), head_dim=64))


# --- the operator, refusals --------------------------------------------------------------------------


def test_the_operator_has_a_fake_that_agrees():
    key = coupled(8, 8, 64, rope="before", site="key")
    case = made(key, spectral(1.0, 64, "value"), (150,), head_dim=64)
    request = AttentionRequest(case.q.half(), case.view, None, 0.125)
    arguments = *request.operands, *request.shared_operands
    torch.library.opcheck(triton_attend, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("key", "pairs", "sentence"),
    [
        (coupled(8, 8, 64, rope="before", site="key"), 16, "a rotary embedding of 32 channels of 64"),
        (coupled(8, 8, 64, rope="before", site="key"), 32, None),
        (RotateKV(4), 32, "keys before the rotary embedding that are no plain indices"),
    ],
    ids=["half of the channels turn", "all turn", "scales and zero points"],
)
def test_which_keys_before_the_rotary_embedding_it_takes(key, pairs, sentence):
    case = made(key, VALUES, (150,), head_dim=64, rope=rope_of(pairs))
    request = AttentionRequest(case.q.half(), case.view, None, 0.125)
    if sentence is None:
        assert choose(request, "triton").name == "triton"
        return
    with pytest.raises(ValueError, match=sentence):
        choose(request, "triton")


def test_every_index_is_read_once():
    part = CodebookFormat("value", 10, 8, 128, 128, 128)
    lookup = Lookup.of(part, 32, torch.zeros(2, 16, 1024, 8), turned=False)
    assert lookup.planes == (8, 2)
    assert [lookup.plane_at(i) for i in range(3)] == [0, 16 * 128, part.nbytes]
    assert (lookup.padded_groups, lookup.padded_tile, lookup.tiles) == (16, 128, 4)
    assert (lookup.book_stride, lookup.group_stride) == (16 * 1024 * 8, 1024 * 8)
