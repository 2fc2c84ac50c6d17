"""The backend "cpu" over codebooks, linear maps and keys before the rotary embedding.

Where codes are looked up in rounded tables the rule is that of test_cpu.py: where quantization moved the
exact output from B to A, the kernel may be off A by a tenth of that. What is computed in float32 is off
by float32's own rounding. A and B are float64.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from test_attention import dense, visible
from test_cpu import ISAS, aimed, instruction_set, rms, scores_of
from torch import Tensor

from bitkv import native
from bitkv.attention import BACKENDS, AttentionRequest, attend
from bitkv.codecs import Affine, Codec, Coupled, Sample, Spectral, Unquantized
from bitkv.codecs.clustering import nearest
from bitkv.codecs.coupled import in_groups
from bitkv.layer import PagedLayer
from bitkv.pages import CodebookFormat, CodedTensor
from bitkv.rope import Rope
from bitkv.shared import Shared
from bitkv.view import CacheView

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

FLOAT = torch.float32
ROUNDED = [isa for isa in ISAS if isa in ("amx", "avx512")]  # where tables are looked up


def rope_of(pairs: int) -> Rope:
    return Rope(10_000.0 ** (-torch.arange(pairs) / pairs), factor=1.1)


@cache
def coupled(
    channels: int, bits: int, head_dim: int, *, rope: str = "after", site: str = "value", heads: int = 2
) -> Codec:
    """A codec that has learned Gaussian tokens."""
    draw = torch.Generator().manual_seed(1)
    tokens = max(1000, 2**bits)
    x = torch.randn(heads, tokens, head_dim, generator=draw)
    places = torch.arange(tokens)
    sample = Sample(site, x, places, torch.ones_like(x), None, rope_of(head_dim // 2))
    codec = Coupled(channels, bits, "uniform", rope)
    if bits <= 8:
        return codec.calibrate(sample)
    # those are not looked up in rounded tables: tokens serve as well as their means, which take long
    entries = in_groups(x[:, : 2**bits], channels).half()
    return codec.with_learned({"codebook": entries.unflatten(0, (heads, -1))})


@cache
def spectral(bits: float, head_dim: int, site: str) -> Codec:
    """A codec whose pages are wider than the head."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1000, head_dim, generator=draw) * torch.linspace(0.2, 3, head_dim)
    gradient = torch.randn(2, 1000, head_dim, generator=draw)
    return Spectral(bits).calibrate(Sample(site, x, torch.arange(1000), gradient, None, None))


@dataclass
class Case:
    """Queries over a layer's view that holds keys and values `[B, Hkv, T, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    layer: PagedLayer
    view: CacheView
    options: dict = field(default_factory=dict)

    def run(self, isa: str = ISAS[0] if ISAS else "") -> tuple[Tensor, Tensor]:
        with instruction_set(isa):
            return attend(self.q, self.view, backend="cpu", **self.options)


def filled(key: Codec, value: Codec, k: Tensor, v: Tensor, lengths, *, rope: Rope | None = None, **rest):
    sizes = {"num_sink_tokens": 4, "recent_tokens": 64, "page_size": 128} | rest
    layer = PagedLayer(key, value, rope=rope, **sizes)
    layer.append(k, v, torch.arange(k.shape[2]) < torch.tensor(lengths)[:, None])
    return layer


def case_of(
    key: Codec,
    value: Codec,
    lengths=(900, 300),
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 128,
    queries: int = 2,
    rope: Rope | None = None,
    layer: dict | None = None,
    **options,
) -> Case:
    k, v = torch.randn(2, len(lengths), kv_heads, max(lengths), head_dim)
    q = torch.randn(len(lengths), heads, queries, head_dim)
    rope = rope_of(head_dim // 2) if rope is None else rope
    made = filled(key, value, k, v, lengths, rope=rope, **(layer or {}))
    return Case(q, k, v, made, made.view(), options)


class Truth(NamedTuple):
    """Output and log-sum-exp over the codes, in float64, and how far quantization moved outputs and
    scores (where they matter), root mean square.
    """

    out: Tensor
    lse: Tensor
    moved: float
    moved_scores: float


def truth(case: Case) -> Truth:
    lengths, softcap = torch.tensor(case.layer.lengths), case.options.get("softcap")
    count, longest = case.q.shape[2], int(lengths.max())
    back = torch.arange(count) - count if case.options.get("causal", True) else torch.tensor([-1])
    seen = visible(
        (lengths[:, None] + back).expand(-1, count), longest, case.options.get("window") or 2**62
    )
    mask = seen & (torch.arange(longest) < lengths[:, None])[:, None, None]
    k, v = held(case)
    out, lse = dense(case.q, k, v, mask, softcap)
    original = dense(case.q, case.k.double(), case.v.double(), mask, softcap)[0]
    scores, scores0 = scores_of(case.q, k, softcap), scores_of(case.q, case.k, softcap)
    p = torch.where(mask, torch.exp(scores - lse[..., None]), 0)
    return Truth(out, lse, rms(out - original), rms((p * (scores - scores0).square()).sum(-1).sqrt()))


def held(case: Case) -> tuple[Tensor, Tensor]:
    """What the view stands for: keys and values `[B, Hkv, T, D]` in float64."""
    sinks, size = case.view.num_sink_tokens, case.view.format.page_size
    both = [x.double() for x in case.layer.materialize()]
    for b, packed in enumerate(case.view.packed_len.tolist()):
        if packed:
            pages = case.view.dequantize(case.view.block_table[b, : packed // size])
            for x, page in zip(both, pages, strict=True):
                x[b, :, sinks : sinks + packed] = page.transpose(0, 1).flatten(1, 2).double()
    return both[0], both[1]


def assert_rule(case: Case, isas: list[str] = ISAS, *, coded: bool = True) -> None:
    """Rounded tables may cost a tenth of quantization's error, float32 a millionth of the output.

    Args:
        coded: the view stands for the tokens; else for others, and a quarter of the output is taken for
            quantization's error, which codes of two bits make.
    """
    a, a_lse, moved, moved_scores = truth(case)
    if not coded:
        moved, moved_scores = rms(a) / 4, 0.25
    sees = a_lse.isfinite()
    parts = case.view.format.key, case.view.format.value
    codes = [isinstance(part, CodebookFormat) for part in parts]
    looked_up = any(isinstance(part, CodebookFormat) and part.bits <= 8 for part in parts)
    for isa in isas:
        out, lse = case.run(isa)
        error = rms(out.double() - a)
        rounds = (isa in ROUNDED and looked_up) or not all(codes)
        assert error <= (0.1 * moved if rounds else 0) + 4e-6 * max(rms(a), 0.1), (isa, error, moved)
        assert (lse[~sees] == -torch.inf).all()
        lse_error = rms((lse.double() - a_lse)[sees])
        assert lse_error <= (0.1 * moved_scores if rounds else 0) + 2e-5, (isa, lse_error)


SHAPES = pytest.mark.parametrize(
    ("channels", "bits"), [(1, 4), (2, 8), (4, 8), (8, 8), (4, 5), (2, 3), (8, 10), (4, 9), (16, 12)]
)
ROPES = pytest.mark.parametrize("rope", ["before", "after"])
FAST = pytest.mark.parametrize(("channels", "bits"), [(2, 8), (4, 8), (8, 8)])


# --- the rule ----------------------------------------------------------------------------------------


@SHAPES
@ROPES
def test_gaussian_data(channels, bits, rope):
    key = coupled(channels, bits, 128, rope=rope, site="key")
    assert_rule(case_of(key, coupled(channels, bits, 128), (2400, 500), heads=8))


@FAST
@ROPES
@pytest.mark.parametrize("factor", [0.0, 4.0])
def test_flat_and_sharp_attention(channels, bits, rope, factor):
    case = case_of(
        coupled(channels, bits, 128, rope=rope, site="key"), coupled(channels, bits, 128), (2400,)
    )
    case.q *= factor
    assert_rule(case)


@FAST
@ROPES
def test_queries_with_outlying_channels(channels, bits, rope):
    case = case_of(
        coupled(channels, bits, 128, rope=rope, site="key"), coupled(channels, bits, 128), (2400,)
    )
    case.q[..., [3, 70, 90]] *= 20
    assert_rule(case)


@FAST
@pytest.mark.parametrize("tokens", [400, 4096])
@pytest.mark.parametrize("exact_keys", [False, True])
def test_needle_like_attention(channels, bits, tokens, exact_keys):
    key = Unquantized() if exact_keys else coupled(channels, bits, 128, site="key")
    case = case_of(
        key,
        coupled(channels, bits, 128),
        (tokens,),
        heads=8,
        queries=4,
        layer={"recent_tokens": 0},
        causal=False,
    )
    case.q = aimed(case.layer, 8, 4, held(case)[0]).float()
    assert_rule(case)


@FAST
@ROPES
def test_keys_and_values_far_from_zero_and_with_outliers(channels, bits, rope):
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3000, 128, generator=draw) + 6 * torch.randn(2, 1, 128, generator=draw)
    x[..., [5, 70]] *= 8
    turns = rope_of(64)
    places = torch.arange(3000)
    codecs = [
        Coupled(channels, bits, "uniform", rope).calibrate(
            Sample(site, x, places, torch.ones_like(x), None, turns)
        )
        for site in ("key", "value")
    ]
    case = case_of(*codecs, (2400,), rope=turns)
    case.k[:], case.v[:] = x[:, :2400], x[:, :2400]
    case.layer = filled(*codecs, case.k, case.v, (2400,), rope=turns)
    case.view = case.layer.view()
    assert_rule(case)


@FAST
@pytest.mark.parametrize("base", [5e5, 1e7, 1.0])
@pytest.mark.parametrize("sharp", [False, True])
def test_keys_of_which_some_or_all_pairs_hardly_turn_within_a_page(channels, bits, base, sharp):
    turns = Rope((1.0 if base > 1 else 1e-5) * base ** (-torch.arange(64) / 64), factor=1.1)
    key, value = coupled(channels, bits, 128, rope="before", site="key"), coupled(channels, bits, 128)
    case = case_of(key, value, (2400,), heads=8, queries=4, rope=turns, causal=False)
    if sharp:
        case.q = aimed(case.layer, 8, 4, held(case)[0]).float()
    assert_rule(case)


@FAST
def test_queries_whose_channels_add_up(channels, bits):
    """What rounding down takes from keys is given back; pairs turn just fast enough, most of them."""
    key, value = coupled(channels, bits, 128, rope="before", site="key"), coupled(channels, bits, 128)
    case = case_of(key, value, (2400,), heads=8, rope=Rope(torch.full((64,), 2e-3)))
    case.q = case.q.abs()
    assert_rule(case)


@FAST
@pytest.mark.parametrize("slow", [slice(32, 64), slice(33, 34)])
def test_slow_pairs_that_have_most_of_the_energy(channels, bits, slow):
    """How far a pair may turn unnoticed depends on what it is of a key, not on its angle alone."""
    turns = Rope(5e5 ** (-torch.arange(64) / 64), factor=1.1)
    scale = torch.ones(64)
    scale[slow] = 12
    x = torch.randn(2, 3000, 128, generator=torch.Generator().manual_seed(3)) * scale.repeat(2)
    sample = Sample("key", x, torch.arange(3000), torch.ones_like(x), None, turns)
    key = Coupled(channels, bits, "uniform", "before").calibrate(sample)
    case = case_of(key, coupled(channels, bits, 128), (2400,), heads=8, rope=turns)
    case.k[:] = x[:, :2400]
    case.q /= scale.repeat(2)
    case.layer = filled(key, coupled(channels, bits, 128), case.k, case.v, (2400,), rope=turns)
    case.view = case.layer.view()
    assert_rule(case)


# --- every shape -------------------------------------------------------------------------------------

PAIRS = {
    "8c8b after": lambda d: (coupled(8, 8, d, site="key"), coupled(8, 8, d)),
    "4c8b before": lambda d: (coupled(4, 8, d, rope="before", site="key"), coupled(4, 8, d)),
    "8c10b before": lambda d: (coupled(8, 10, d, rope="before", site="key"), coupled(8, 10, d)),
    "4c6b keys": lambda d: (coupled(4, 6, d, site="key"), Affine(2, "token", "page")),
    "2c8b values": lambda d: (Affine(2, "channel"), coupled(2, 8, d)),
    "spectral": lambda d: (spectral(1.5, d, "key"), spectral(1, d, "value")),
}
EACH_PAIR = pytest.mark.parametrize("pair", PAIRS)


@EACH_PAIR
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("page_size", [64, 128])
def test_pages_and_heads_of_any_size(pair, head_dim, page_size):
    assert_rule(
        case_of(
            *PAIRS[pair](head_dim), (700, 310, 20), head_dim=head_dim, layer={"page_size": page_size}
        )
    )


@EACH_PAIR
@pytest.mark.parametrize("ratio", [1, 3, 8, 32])
def test_query_heads_of_a_kv_head(pair, ratio):
    assert_rule(case_of(*PAIRS[pair](64), (1300, 5), head_dim=64, heads=2 * ratio, queries=1))


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no matrix unit")
@pytest.mark.parametrize("channels", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 16, 17, 40])
@ROPES
def test_the_matrix_unit_sums_the_same_integers(channels, head_dim, rows, rope):
    """Bit for bit, with weights of one and of two bytes, and with pairs that turn and that hardly do."""
    key, value = coupled(channels, 8, head_dim, rope=rope, site="key"), coupled(channels, 8, head_dim)
    slow = Rope(500_000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2)))
    case = case_of(
        key, value, (2500, 140), heads=2 * rows, head_dim=head_dim, queries=1, rope=slow, scale=0.02
    )
    case.q[:, 0] *= 20
    assert_same(case.run("amx"), case.run("avx512"))


def test_threads_may_attend_at_once_and_multiply_matrices_between():
    """torch multiplies bfloat16 on the matrix unit too, in the same threads."""
    case = case_of(*PAIRS["8c8b after"](64), (1500, 90), heads=16, head_dim=64, queries=1)
    matrix = torch.randn(256, 256).bfloat16()
    expected, product = case.run(), matrix @ matrix

    def work(_: int) -> None:
        for _ in range(20):
            assert_same(attend(case.q, case.view, backend="cpu"), expected)
            assert torch.equal(matrix @ matrix, product)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))


@EACH_PAIR
@pytest.mark.parametrize("lengths", [(0, 1), (127, 129, 128, 300), (2049,), (4300,), (64,) * 5])
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_batches_of_unequal_lengths(pair, lengths, queries):
    assert_rule(case_of(*PAIRS[pair](64), lengths, head_dim=64, queries=queries))


@EACH_PAIR
@pytest.mark.parametrize(
    "options", [{"window": 100}, {"window": 700}, {"softcap": 5.0}, {"causal": False}]
)
def test_windows_and_soft_caps(pair, options):
    assert_rule(case_of(*PAIRS[pair](64), (2700, 310), head_dim=64, queries=7, **options))


@EACH_PAIR
@pytest.mark.parametrize("sinks", [0, 1, 70])
def test_sinks_move_positions(pair, sinks):
    sizes = {"num_sink_tokens": sinks, "recent_tokens": 10}
    assert_rule(case_of(*PAIRS[pair](64), (1000,), head_dim=64, layer=sizes))


# --- linear maps and rotary embeddings ----------------------------------------------------------------


def rotations(heads: int, dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(heads, dim, dim)).Q


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["affine", "coupled"])
@pytest.mark.parametrize("sites", ["key", "value", "both"])
def test_linear_maps_of_pages(heads, kind, sites):
    pair = (Affine(2, "channel"), Affine(2, "token")) if kind == "affine" else PAIRS["8c8b after"](128)
    case = case_of(*pair, (1300, 310))
    for site in ("key", "value") if sites == "both" else (sites,):
        shared = replace(getattr(case.view, site), restore=rotations(heads, 128))
        case.view = replace(case.view, **{site: shared})
    assert_rule(case, coded=False)


@pytest.mark.parametrize("pairs", [64, 20, 8])
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize(
    "key", [Affine(2, "channel"), Affine(1, "token", "page"), Unquantized(), (8, 8)], ids=str
)
def test_keys_before_any_rotary_embedding(key, pairs, maps):
    key = coupled(*key, 128, site="key") if isinstance(key, tuple) else key
    case = case_of(key, coupled(8, 8, 128), (1300, 310))
    restore = rotations(2, 128) if maps else None
    case.view = replace(case.view, key=replace(case.view.key, rope=rope_of(pairs), restore=restore))
    assert_rule(case, coded=False)


class Scaled(Coupled):
    """Tokens divided by their norms, around their means: a codec with scales of its own."""

    takes_nearest = False

    def part_format(self, site, **shape):
        return replace(super().part_format(site, **shape), scales=2 if site == "key" else 1)

    def quantize(self, x, shared):
        center = x.mean(-1).half()
        scale = (x - center[..., None]).square().mean(-1).sqrt().half()
        y = (x - center.float()[..., None]) / scale.float()[..., None]
        return CodedTensor(super().quantize(y, shared).codes, scale, center)


@FAST
@ROPES
def test_codes_with_scales_and_zero_points(channels, bits, rope):
    key, value = (
        Scaled(channels, bits, "uniform", rope).with_learned(
            coupled(channels, bits, 128, rope=rope, site=site).learned
        )
        for site in ("key", "value")
    )
    assert_rule(case_of(key, value, (1300, 310)))


# --- what must not change a result -------------------------------------------------------------------


@pytest.fixture(params=ISAS)
def isa(request) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


def assert_same(got, expected) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
        assert x[x.isfinite()].any()


@EACH_PAIR
def test_memory_beyond_valid_data_is_never_used(pair, isa):
    case = case_of(*PAIRS[pair](64), (1300, 310, 20), head_dim=64)
    view = case.view
    expected = attend(case.q, view, backend="cpu")
    used = view.packed_len // view.format.page_size
    pages = torch.cat([view.pages, torch.full_like(view.pages[:3], 0xFF)])
    table = torch.nn.functional.pad(view.block_table, (0, 5))
    table[torch.arange(table.shape[1]) >= used[:, None]] = len(pages) - 1
    assert_same(attend(case.q, replace(view, pages=pages, block_table=table), backend="cpu"), expected)


@EACH_PAIR
def test_pages_may_lie_anywhere(pair, isa):
    case = case_of(*PAIRS[pair](64), (1300, 310), head_dim=64)
    order = torch.randperm(len(case.view.pages))
    moved = torch.empty_like(case.view.pages)
    moved[order] = case.view.pages
    view = replace(case.view, pages=moved, block_table=order[case.view.block_table.long()].int())
    assert_same(attend(case.q, view, backend="cpu"), attend(case.q, case.view, backend="cpu"))


@EACH_PAIR
def test_results_do_not_depend_on_the_number_of_threads(pair, isa):
    case = case_of(*PAIRS[pair](64), (20_000, 90), head_dim=64, kv_heads=2, heads=2, queries=1)
    before, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(attend(case.q, case.view, backend="cpu"))
    torch.set_num_threads(before)
    assert_same(*results)


def test_tables_follow_a_codebook_that_changes(isa):
    case = case_of(*PAIRS["8c8b after"](64), (1300,), head_dim=64)
    attend(case.q, case.view, backend="cpu")
    case.view.value.codebook.mul_(2)
    got = attend(case.q, case.view, backend="cpu")
    expected = attend(case.q, case.view, backend="reference")
    assert torch.allclose(got[0], expected[0], atol=0.02)


@pytest.mark.parametrize("shared", [(1, 16), (2, 1), (1, 1)])
@ROPES
def test_heads_and_groups_may_share_a_codebook(shared, rope, isa):
    case = case_of(coupled(8, 8, 128, rope=rope, site="key"), coupled(8, 8, 128), (1300,))
    heads, groups = shared
    codebook = case.view.key.codebook[:heads, :groups].contiguous()
    view = replace(
        case.view,
        key=replace(case.view.key, codebook=codebook),
        value=replace(case.view.value, codebook=codebook),
    )
    got, expected = (attend(case.q, view, backend=name) for name in ("cpu", "reference"))
    assert torch.allclose(got[0], expected[0], atol=0.02)
    assert torch.allclose(got[1], expected[1], atol=0.02)


# --- refusals and the operator ------------------------------------------------------------------------


def request(case: Case) -> AttentionRequest:
    return AttentionRequest(case.q, case.view, None, 128**-0.5)


def test_what_does_not_fit_is_refused_with_a_sentence():
    case = case_of(*PAIRS["8c8b after"](128), (300,))
    refuse = BACKENDS["cpu"].refuse
    assert refuse(request(case)) is None
    wide = replace(case.view, key=replace(case.view.key, rope=rope_of(65)))
    assert refuse(replace(request(case), view=wide)) == (
        "it got a rotary embedding of 130 channels, and takes at most 128"
    )
    narrow = Shared(codebook=case.view.value.codebook, restore=torch.zeros(1, 128, 64))
    sentence = refuse(replace(request(case), view=replace(case.view, value=narrow)))
    assert sentence == "it got a linear map of 64 numbers over pages of 128, and takes as many of both"


@EACH_PAIR
def test_the_operator_passes_torchs_own_checks(pair):
    made = request(case_of(*PAIRS[pair](128), (300, 20)))
    operands = [list(x) if isinstance(x, tuple) else x for x in made.operands]
    torch.library.opcheck(torch.ops.bitkv.cpu_attend, (*operands, *made.shared_operands))


@EACH_PAIR
def test_attention_compiles_into_one_graph(pair):
    made = request(case_of(*PAIRS[pair](128), (700, 20)))
    expected = BACKENDS["cpu"].run(made)

    def run(q: Tensor) -> tuple[Tensor, Tensor]:
        return BACKENDS["cpu"].run(replace(made, q=q * 1))

    assert_same(torch.compile(run, fullgraph=True, backend="aot_eager")(made.q), expected)


# --- encoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(3, 100, 7, 5), (2, 1000, 256, 8), (1, 65, 3, 1), (2, 500, 200, 32), (1, 1, 1, 1)]
)
def test_the_nearest_entry_is_found(shape, isa):
    groups, points, entries, channels = shape
    x, codebook = torch.randn(groups, points, channels), torch.randn(groups, entries, channels)
    distances = torch.cdist(x.double(), codebook.double())
    found = distances.gather(2, nearest(x, codebook).long().unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(found, distances.amin(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "bits", "head_dim"), [(8, 8, 128), (8, 10, 64), (2, 3, 80), (16, 9, 96), (1, 5, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FLOAT], ids=str)
@pytest.mark.parametrize("page_size", [64, 128])
def test_pages_are_packed_as_in_torch(channels, bits, head_dim, dtype, page_size, isa):
    codec = coupled(channels, bits, head_dim)
    shape = {"head_dim": head_dim, "page_size": page_size, "dtype": dtype, "layout": "lanes"}
    form = codec.part_format("value", **shape)
    shared = codec.shared("value", heads=2, head_dim=head_dim)
    x = torch.randn(3, page_size, 2, head_dim).to(dtype).transpose(1, 2)
    room = torch.full((3, 2, form.nbytes + 64), 0xA5, dtype=torch.uint8)
    packed = codec.encode(x, form, room[..., : form.nbytes], shared=shared)
    assert (room[..., form.nbytes :] == 0xA5).all()
    codes, expected = form.unpack(packed).codes, codec.quantize(x, shared).codes
    assert (codes != expected).float().mean() < 1e-3  # two entries may be equally near
