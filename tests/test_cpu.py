"""The backend "cpu": its error on any data, format, shape and instruction set; threads and memory.

Codes of 1, 2 and 4 bits meet queries and probabilities that were rounded to int8. The rule: where
quantization moved the exact output from B (over the original keys and values) to A (over the codes), the
kernel may be off A by a tenth of that, in root mean square. What needs no int8 (8 bits, unquantized, the
hot window) may be off by twice the error of PyTorch's attention in 16 bits. A and B are float64.
"""

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import dense, exact, new_layer, pytorch, visible
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitkv import native
from bitkv.attention import attend, last_backend
from bitkv.codecs import Affine, Unquantized
from bitkv.evaluation.fidelity import capture
from bitkv.evaluation.protocols import Subject
from bitkv.generation.checkpoint import ASSETS
from bitkv.layer import PagedLayer
from bitkv.recipe import Recipe, parse
from bitkv.view import CacheView

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

ISAS = [] if native.why_not() else native.module().isas()
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITKV_CPU_ISA", name)
        native.isa.cache_clear()
        assert native.isa() == name
        yield
    native.isa.cache_clear()


def layer_of(recipe: Recipe | str, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> PagedLayer:
    """A layer that holds the first `lengths[b]` of these tokens `[B, Hkv, T, D]`."""
    layer = new_layer(repr(recipe) if isinstance(recipe, Recipe) else recipe)
    layer.append(k, v, torch.arange(k.shape[2]) < torch.tensor(lengths)[:, None])
    return layer


def scores_of(q: Tensor, k: Tensor, softcap: float | None = None) -> Tensor:
    """Scores `[B, Hq, Tq, T]` in float64."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


@dataclass
class Case:
    """Queries `[B, Hq, Tq, D]` over a layer that holds keys and values `[B, Hkv, T, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    layer: PagedLayer
    options: dict = field(default_factory=dict)  # of `attend`

    def run(self, isa: str = ISAS[0] if ISAS else "") -> tuple[Tensor, Tensor]:
        with instruction_set(isa):
            return attend(self.q, self.layer.view(), backend="cpu", **self.options)

    @property
    def positions(self) -> Tensor:
        """The last token each query sees, `[B, Tq]`."""
        if "positions" in self.options:
            return self.options["positions"]
        count = self.q.shape[2]
        back = torch.arange(count) - count if self.options.get("causal", True) else torch.tensor([-1])
        return (torch.tensor(self.layer.lengths)[:, None] + back).expand(-1, count)

    @property
    def mask(self) -> Tensor:
        """Which tokens each query sees, bool `[B, 1, Tq, T]`."""
        lengths = torch.tensor(self.layer.lengths)
        longest, window = int(lengths.max()), self.options.get("window")
        exists = torch.arange(longest) < lengths[:, None]
        # a window counts from its position, be that beyond the end
        seen = visible(self.positions, longest, window or 2**62)
        return seen & exists[:, None, None]


@dataclass(frozen=True)
class Error:
    """A kernel's error, root mean square, and what the rule allows."""

    error: float
    allowed: float


def errors(case: Case, isas: list[str] = ISAS) -> dict[str, Error]:
    """Of every instruction set: "output" of queries that see rounded codes, "exact output" of the others
    (whatever needs no int8) and "log-sum-exp". The last bits of float32, 2**-22, are no error."""
    q, layer, softcap, mask = case.q, case.layer, case.options.get("softcap"), case.mask
    k, v = exact(layer)
    k0, v0 = (x[:, :, : k.shape[2]].double() for x in (case.k, case.v))
    a, a_lse = dense(q, k, v, mask, softcap)
    b, _ = dense(q, k0, v0, mask, softcap)
    half = q.half() if q.dtype == FLOAT else q
    sixteen_bits = pytorch(half, k, v, mask).double() - dense(half, k, v, mask, None)[0]
    shape = a_lse.shape
    sees = mask.any(-1).expand(shape)
    token, first = torch.arange(k.shape[2]), layer.num_sink_tokens
    in_pages = (token >= first) & (token < first + layer.packed_len[:, None])
    few_bits = min(layer.format.key.bits, layer.format.value.bits) < 8
    rounded = (mask & in_pages[:, None, None] & few_bits).any(-1).expand(shape)
    scores, scores0 = scores_of(q, k, softcap), scores_of(q, k0, softcap)
    p = torch.where(mask, torch.exp(scores - a_lse[..., None]), 0)
    moved = (p * (scores - scores0).square()).sum(-1).sqrt()
    if layer.format.key.bits >= 8:
        moved = torch.zeros_like(moved)
    largest = (scores.abs() * mask).amax().item() if scores.numel() else 0.0
    found = {}
    for isa in isas:
        out, lse = case.run(isa)
        assert out.dtype == q.dtype
        assert lse.dtype == FLOAT
        assert (out[~sees] == 0).all()
        assert (lse[~sees] == -torch.inf).all()
        error = out.double() - a
        found |= {
            f"output {isa}": Error(
                rms(error[rounded]), 0.1 * rms((a - b)[rounded]) + 2**-22 * rms(a[rounded])
            ),
            f"exact output {isa}": Error(
                rms(error[sees & ~rounded]),
                2 * rms(sixteen_bits[sees & ~rounded]) + 2**-22 * rms(a[sees & ~rounded]),
            ),
            f"log-sum-exp {isa}": Error(
                rms((lse.double() - a_lse)[sees]), 0.1 * rms(moved[sees]) + 2**-20 * (1 + largest)
            ),
        }
    return found


def assert_rule(case: Case, isas: list[str] = ISAS) -> None:
    """Each error is allowed.

    The log-sum-exp is off by the mean of what scores are off by, weighted with probabilities. So it gets
    a tenth of how far quantization moved scores, in root mean square with those weights, and the
    rounding of float32 sums.
    """
    broken = {what: e for what, e in errors(case, isas).items() if not e.error <= e.allowed}
    assert not broken


def case_of(
    recipe: Recipe | str,
    lengths: tuple[int, ...] = (400, 150),
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    queries: int = 2,
    dtype: torch.dtype = HALF,
    **options,
) -> Case:
    """Gaussian queries, keys and values."""
    k, v = torch.randn(2, len(lengths), kv_heads, max(lengths), head_dim).to(dtype)
    q = torch.randn(len(lengths), heads, queries, head_dim).to(dtype)
    return Case(q, k, v, layer_of(recipe, k, v, lengths), options)


# --- the rule, on the data that caches hold ----------------------------------------------------------

CODES = [
    (bits, key, group) for bits in (1, 2, 4) for key in ("channel", "token") for group in (32, "page")
]
EACH_CODE = pytest.mark.parametrize(("bits", "key", "group"), CODES)
LEVELS = pytest.mark.parametrize("levels", ["minmax", "mse"])


def same_bits(bits, key, group, levels="mse", page_size=128, **rest) -> Recipe:
    codecs = Affine(bits, key, group, levels), Affine(bits, "token", group, levels)
    return Recipe(*codecs, page_size=page_size, **rest)


@EACH_CODE
@LEVELS
def test_gaussian_data(bits, key, group, levels):
    assert_rule(case_of(same_bits(bits, key, group, levels), (2000, 500), heads=8, head_dim=128))


@EACH_CODE
@LEVELS
def test_keys_with_outlying_channels(bits, key, group, levels):
    k, v = torch.randn(2, 1, 2, 1500, 128)
    k[..., [5, 70, 71]] *= 20
    q = torch.randn(1, 8, 4, 128).half()
    k, v = k.half(), v.half()
    assert_rule(Case(q, k, v, layer_of(same_bits(bits, key, group, levels), k, v, (1500,))))


@EACH_CODE
def test_keys_and_values_far_from_zero(bits, key, group):
    k, v = torch.randn(2, 1, 2, 1500, 128) + 8 * torch.randn(2, 1, 2, 1, 128)
    q = torch.randn(1, 8, 4, 128).half()
    k, v = k.half(), v.half()
    assert_rule(Case(q, k, v, layer_of(same_bits(bits, key, group), k, v, (1500,))))


def aimed(layer: PagedLayer, heads: int, queries: int, k: Tensor | None = None) -> Tensor:
    """Queries that give half of their attention to one packed token each, the rest being diffuse; `k` is
    what the layer holds.
    """
    k = exact(layer)[0] if k is None else k
    k = k.repeat_interleave(heads // layer.hot_k.shape[1], 1)
    tokens = layer.num_sink_tokens + torch.randint(
        int(layer.packed_len.min()), (*k.shape[:2], queries, 1)
    )
    target = k.gather(2, tokens.expand(-1, -1, -1, k.shape[3]))
    aimless = torch.randn_like(target)
    diffuse, pull = (x @ k.mT / k.shape[3] ** 0.5 for x in (aimless, target))
    low, high = torch.zeros_like(target[..., :1]), torch.full_like(target[..., :1], 16)
    for _ in range(40):
        middle = (low + high) / 2
        enough = torch.softmax(diffuse + middle * pull, -1).gather(-1, tokens) > 0.5
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return aimless + high * target


@EACH_CODE
@pytest.mark.parametrize("tokens", [260, 4096])
@pytest.mark.parametrize("exact_keys", [False, True])
def test_needle_like_attention(bits, key, group, tokens, exact_keys):
    """With exact keys B has the needle too, and only the values' error is there to hide behind."""
    recipe = same_bits(bits, key, group, recent_tokens=0)
    if exact_keys:
        recipe = dataclasses.replace(recipe, key=Unquantized())
    k, v = torch.randn(2, 1, 2, tokens, 128).half()
    layer = layer_of(recipe, k, v, (tokens,))
    q = aimed(layer, heads=8, queries=4).half()
    p = torch.softmax(scores_of(q, exact(layer)[0]), -1).amax(-1)
    assert ((p > 0.49) & (p < 0.51)).all()
    assert_rule(Case(q, k, v, layer, {"causal": False}))


@pytest.fixture(scope="module")
def captured():
    """Queries, keys and values of the bundled model over a window of its held-out text, by layer."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=FLOAT).eval()
    text = (ASSETS / "heldout.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(ASSETS)(text[:9000], return_tensors="pt")["input_ids"]
    return capture(Subject(model), ids[0, :1500])


@EACH_CODE
@LEVELS
@pytest.mark.parametrize("layer_idx", [0, 2])
def test_real_caches(captured, layer_idx, bits, key, group, levels):
    real = captured[layer_idx]
    k, v = real.k.half(), real.v.half()
    q = real.request.q[:, :, ::2].repeat_interleave(4, 1)
    assert q.shape[1] // k.shape[1] == 8
    layer = layer_of(same_bits(bits, key, group, levels), k, v, (k.shape[2],))
    assert_rule(Case(q, k, v, layer, {"positions": real.request.positions[:, ::2]}))


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("layer_idx", [0, 2])
@pytest.mark.parametrize("recipe", ["fp16", "int8", "affine(8, 32)"])
def test_real_caches_in_8_and_16_bits(captured, layer_idx, recipe, dtype):
    real = captured[layer_idx]
    k, v, q = (x.to(dtype) for x in (real.k, real.v, real.request.q[:, :, ::8]))
    layer = layer_of(recipe, k, v, (k.shape[2],))
    assert_rule(Case(q, k, v, layer, {"positions": real.request.positions[:, ::8]}))


@pytest.mark.parametrize("factor", [0.0, 1e-3, 100.0])
@pytest.mark.parametrize("recipe", ["kivi4", "quick1", "int8", "fp16"])
def test_flat_and_sharp_attention(recipe, factor):
    case = case_of(recipe, dtype=FLOAT)
    case.q *= factor
    assert_rule(case)


@pytest.mark.parametrize("recipe", ["kivi4", "kivi2", "affine(1)", "quick1", "int8", "fp16"])
@pytest.mark.parametrize("constant", [0.0, 1.0, -1e4])
def test_constant_keys_and_values_are_no_special_case(recipe, constant):
    k = torch.full((1, 2, 300, 64), constant).half()
    case = Case(torch.randn(1, 4, 1, 64).half(), k, k, layer_of(recipe, k, k, (300,)))
    for isa in ISAS:
        out, lse = case.run(isa)
        assert torch.allclose(out.float(), torch.tensor(constant), rtol=2**-9)
        assert lse.isfinite().all()


# --- every format ------------------------------------------------------------------------------------


def groups_of(extent: int) -> list[int | str]:
    """Group sizes that divide an extent; "page" is the extent itself."""
    return [*(g for g in (32, 64, 128) if extent % g == 0 and g < extent), "page"]


SHAPES = [(page, head_dim) for page in (64, 128) for head_dim in (64, 80, 96, 128, 256)]
KEYS = [
    (page, head_dim, Affine(bits, granularity, group))
    for page, head_dim in SHAPES
    for granularity, extent in (("channel", page), ("token", head_dim))
    for group in groups_of(extent)
    for bits in (1, 2, 4, 8)
]
VALUES = [
    (page, head_dim, Affine(bits, "token", group))
    for page, head_dim in SHAPES
    for group in groups_of(head_dim)
    for bits in (1, 2, 4, 8)
]


@pytest.mark.parametrize(("page", "head_dim", "key"), KEYS, ids=str)
def test_every_format_of_keys(page, head_dim, key):
    recipe = Recipe(key, Unquantized(), recent_tokens=0, page_size=page)
    assert_rule(case_of(recipe, (3 * page + 9, page + 5), head_dim=head_dim, queries=6))


@pytest.mark.parametrize(("page", "head_dim", "value"), VALUES, ids=str)
def test_every_format_of_values(page, head_dim, value):
    recipe = Recipe(Unquantized(), value, recent_tokens=0, page_size=page)
    assert_rule(case_of(recipe, (3 * page + 9, page + 5), head_dim=head_dim, queries=6, dtype=BF16))


@pytest.mark.parametrize(("page", "head_dim"), SHAPES)
@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT], ids=str)
@pytest.mark.parametrize("codec", [Unquantized(), Affine(8, "token", "page")], ids=repr)
def test_every_dtype_in_8_16_and_32_bits(page, head_dim, dtype, codec):
    recipe = Recipe(codec, codec, page_size=page)
    assert_rule(case_of(recipe, head_dim=head_dim, dtype=dtype))


def affine(bits, granularity, extent):
    groups = st.sampled_from(groups_of(extent))
    return st.builds(Affine, bits, st.just(granularity), groups, st.sampled_from(["minmax", "mse"]))


@st.composite
def mixtures(draw) -> Case:
    """Any two formats, any shape, any of the arguments of `attend`."""
    page, head_dim = draw(st.sampled_from([64, 128])), 16 * draw(st.integers(1, 16))
    bits = st.sampled_from([1, 2, 4, 8])
    channel, token = affine(bits, "channel", page), affine(bits, "token", head_dim)
    unquantized = st.just(Unquantized())
    recipe = Recipe(
        draw(st.one_of(channel, token, unquantized)),
        draw(st.one_of(token, unquantized)),
        num_sink_tokens=draw(st.sampled_from([0, 1, 4, 70, 200])),
        recent_tokens=draw(st.sampled_from([0, 1, 64, 130])),
        page_size=page,
    )
    lengths = draw(st.lists(st.sampled_from([0, 1, 64, 129, 333, 600]), min_size=1, max_size=3))
    queries = draw(st.sampled_from([1, 2, 5, 33]))
    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        rows = st.lists(st.integers(-1, 700), min_size=queries, max_size=queries)
        options["positions"] = torch.tensor([draw(rows) for _ in lengths])
    if draw(st.booleans()):
        options["window"] = draw(st.sampled_from([1, 50, 300]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([2.0, 30.0]))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    # a root mean square over few rows says little
    ratio = draw(st.sampled_from([24, 32] if queries < 5 else [7, 8]))
    return case_of(
        recipe,
        tuple(lengths),
        heads=kv_heads * ratio,
        kv_heads=kv_heads,
        head_dim=head_dim,
        queries=queries,
        dtype=draw(st.sampled_from([HALF, BF16, FLOAT])),
        **options,
    )


@settings(max_examples=80)
@given(case=mixtures())
def test_any_mixture(case):
    assert_rule(case)


@pytest.mark.parametrize("recipe", ["kivi4", "kivi2", "affine(1)", "int8", "fp16"])
@pytest.mark.parametrize("queries", [1, 20])
def test_instruction_sets_agree(recipe, queries):
    case = case_of(recipe, (1000, 300), head_dim=128, heads=8, queries=queries, dtype=FLOAT)
    (out, lse), *others = (case.run(isa) for isa in ISAS)
    # where a number lies half-way between two int8 values, it may become either; some of many queries
    # get a second term because one beside them needs it, and eight are multiplied at once, or four
    rounded = min(case.layer.format.key.bits, case.layer.format.value.bits) < 8
    rounding = (2**-12 if queries == 1 else 2**-6) if rounded else 2**-18
    for other, other_lse in others:
        assert rms(other - out) <= rounding * rms(out)
        assert torch.allclose(other_lse, lse, rtol=rounding, atol=rounding)


# --- every shape -------------------------------------------------------------------------------------

RECIPES = pytest.mark.parametrize("recipe", ["kivi2", "quick1", "int8", "fp16"])


@RECIPES
@pytest.mark.parametrize("tokens", [0, 1, 127, 129, 1000])
@pytest.mark.parametrize("queries", [1, 5])
def test_one_sequence_of_any_length(recipe, tokens, queries):
    assert_rule(case_of(recipe, (tokens,), queries=queries))


@RECIPES
@pytest.mark.parametrize("lengths", [(0, 0), (1, 0, 1000), (127, 129, 128, 300), (64,) * 5])
def test_batches_of_unequal_lengths(recipe, lengths):
    assert_rule(case_of(recipe, lengths, queries=3))


@pytest.mark.parametrize("recipe", ["affine(4, 'page')", "affine(2, 'page')", "affine(1, 'page')"])
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_heads_of_any_width(recipe, head_dim):
    assert_rule(case_of(recipe, head_dim=head_dim, heads=16))


@RECIPES
@pytest.mark.parametrize("ratio", [1, 3, 7, 8, 16, 32, 128])
def test_query_heads_of_a_kv_head(recipe, ratio):
    assert_rule(case_of(recipe, heads=2 * ratio, queries=1))
    assert_rule(case_of(recipe, heads=ratio, kv_heads=1, queries=3))


@RECIPES
@pytest.mark.parametrize("queries", [1, 2, 5, 33, 300])
@pytest.mark.parametrize("causal", [True, False])
def test_a_chunk_of_a_prompt_over_packed_history(recipe, queries, causal):
    assert_rule(case_of(recipe, (700, 310, 20), queries=queries, causal=causal))


@RECIPES
@pytest.mark.parametrize("queries", [1, 40])
def test_positions_say_the_last_token_each_query_sees(recipe, queries):
    lengths = (700, 310, 20)
    positions = torch.stack([torch.randint(-1, n, (queries,)) for n in lengths])
    positions[1, 0], positions[0, 0] = -1, 10**6  # beyond the end: everything
    assert_rule(case_of(recipe, lengths, queries=queries, positions=positions))


@RECIPES
@pytest.mark.parametrize("window", [1, 60, 129, 500, 10**6])
@pytest.mark.parametrize("queries", [1, 40])
def test_sliding_windows(recipe, window, queries):
    assert_rule(case_of(recipe, (700, 310, 20), queries=queries, window=window))


@RECIPES
@pytest.mark.parametrize("softcap", [1.0, 20.0])
def test_soft_caps(recipe, softcap):
    assert_rule(case_of(recipe, (700, 310, 20), queries=3, softcap=softcap))


@RECIPES
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (1, 0), (70, 64), (200, 1), (4, 500)])
@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT], ids=str)
def test_sinks_and_recent_tokens(recipe, sinks, recent, dtype):
    windows = dataclasses.replace(parse(recipe), num_sink_tokens=sinks, recent_tokens=recent)
    assert_rule(case_of(windows, (700, 310, 20), queries=3, dtype=dtype))


# --- what must not change a result -------------------------------------------------------------------


def ragged(recipe: str = "kivi2", queries: int = 3) -> Case:
    return case_of(recipe, (700, 0, 310, 20), queries=queries, head_dim=96, heads=6, dtype=FLOAT)


def attend_to(case: Case, view: CacheView, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return attend(case.q if q is None else q, view, backend="cpu", **case.options)


def assert_same(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(result, expected, strict=True):
        assert torch.equal(x, y)


@pytest.fixture(params=ISAS)
def isa(request) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


@RECIPES
def test_memory_beyond_valid_data_is_never_used(recipe, isa):
    case = ragged(recipe)
    view = case.layer.view()
    expected = attend_to(case, view)
    used = view.packed_len // view.format.page_size
    pages = torch.cat([view.pages, torch.full_like(view.pages[:3], 0xFF)])
    table = torch.nn.functional.pad(view.block_table, (0, 5))
    table[torch.arange(table.shape[1]) >= used[:, None]] = len(pages) - 1
    hot = {}
    for name in ("hot_k", "hot_v"):
        hot[name] = torch.nn.functional.pad(getattr(view, name), (0, 0, 0, 9))
        for b, length in enumerate(view.hot_len.tolist()):
            hot[name][b, :, length:] = torch.nan
    assert_same(
        attend_to(case, dataclasses.replace(view, pages=pages, block_table=table, **hot)), expected
    )


@RECIPES
def test_pages_may_lie_anywhere_and_be_shared(recipe, isa):
    case = ragged(recipe)
    view = case.layer.view()
    out, lse = attend_to(case, view)
    order = torch.randperm(len(view.pages))
    moved = torch.empty_like(view.pages)
    moved[order] = view.pages
    table = order[view.block_table.long()].int()
    assert_same(attend_to(case, dataclasses.replace(view, pages=moved, block_table=table)), (out, lse))
    chosen = torch.tensor([2, 0, 0, 2, 3])
    case.layer.gather(chosen)
    assert_same(attend_to(case, case.layer.view(), case.q[chosen]), (out[chosen], lse[chosen]))


@RECIPES
def test_strides_of_queries_and_of_the_hot_window(recipe, isa):
    case = ragged(recipe)
    view, q = case.layer.view(), case.q
    expected = attend_to(case, view)
    assert_same(attend_to(case, view, q.transpose(1, 2).contiguous().transpose(1, 2)), expected)
    assert_same(attend_to(case, view, torch.stack([q, -q], -1)[..., 0]), expected)
    batch, heads, capacity, head_dim = view.hot_k.shape
    wide = torch.full((2, 2 * batch, heads + 1, capacity + 3, head_dim), torch.nan)
    slices = [x[::2, 1:, 2 : capacity + 2] for x in wide]
    transposed = [torch.empty(batch, capacity, heads, head_dim).transpose(1, 2) for _ in range(2)]
    channels = [torch.empty(batch, heads, capacity, head_dim + 1)[..., 1:] for _ in range(2)]
    for hot_k, hot_v in (slices, transposed, channels, (slices[0], transposed[1])):
        hot_k.copy_(view.hot_k)
        hot_v.copy_(view.hot_v)
        assert_same(attend_to(case, dataclasses.replace(view, hot_k=hot_k, hot_v=hot_v)), expected)


def test_the_dtype_of_queries_need_not_be_that_of_the_cache(isa):
    for cache, queries in itertools.product((HALF, BF16, FLOAT), repeat=2):
        case = case_of("kivi2", (300,), dtype=cache)
        case.q = case.q.to(queries)
        assert_rule(case, [isa])


# --- threads -----------------------------------------------------------------------------------------

THREADED = [
    {"lengths": (3000,), "queries": 1},
    {"lengths": (700, 0, 310, 20), "queries": 2},
    {"lengths": (500, 90), "queries": 150},
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@RECIPES
@pytest.mark.parametrize("shape", THREADED, ids=str)
@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads(recipe, shape, isa):
    case = case_of(recipe, **shape, dtype=FLOAT)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(attend_to(case, case.layer.view()))
    assert all(x.any() for x in results[0])
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("threads")
def test_calls_from_several_python_threads_get_what_they_get_alone(isa):
    torch.set_num_threads(2)
    cases = [case_of(r, **shape) for r in ("kivi2", "fp16") for shape in THREADED[:2]]
    views = [case.layer.view() for case in cases]
    alone = [attend_to(*pair) for pair in zip(cases, views, strict=True)]
    assert all(out.any() for out, _ in alone)
    start = threading.Barrier(len(cases))

    def repeatedly(i: int) -> list[tuple[Tensor, Tensor]]:
        torch.set_num_threads(2)  # of this Python thread
        start.wait()
        return [attend_to(cases[i], views[i]) for _ in range(25)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for i, results in enumerate(pool.map(repeatedly, range(len(cases)))):
            for result in results:
                assert_same(result, alone[i])


def test_other_python_threads_run_during_a_call():
    case = case_of("kivi2", (2000,), heads=32, queries=128)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-3)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    case.run("portable")
    end = time.perf_counter()
    done.set()
    ticker.join()
    assert end - begin > 0.05
    assert sum(begin < t < end for t in ticks) > 10


# --- the backend in use ------------------------------------------------------------------------------


def test_auto_prefers_it_and_by_name_it_runs():
    case = case_of("kivi2", (300,))
    for backend in ("cpu", "auto"):
        attend(case.q, case.layer.view(), backend="reference")
        assert last_backend() == "reference"
        attend(case.q, case.layer.view(), backend=backend)
        assert last_backend() == "cpu"


def test_no_queries_and_no_sequences_are_fine(isa):
    case = ragged()
    out, lse = attend_to(case, case.layer.view(), case.q[:, :, :0])
    assert (out.shape, lse.shape) == ((4, 6, 0, 96), (4, 6, 0))
    case.layer.gather(torch.tensor([], dtype=torch.int64))
    out, lse = attend_to(case, case.layer.view(), case.q[:0])
    assert (out.shape, lse.shape) == ((0, 6, 3, 96), (0, 6, 3))


def test_ten_thousand_decode_steps_leak_nothing():
    """A leak of 500 bytes a step would be 5 MB."""
    case = case_of("kivi2", (400,), queries=1)
    layer, memory = case.layer, psutil.Process().memory_info
    k, v = case.k[:, :, :1], case.v[:, :, :1]

    def decode(steps: int) -> None:
        for _ in range(steps):
            layer.append(k, v)
            attend(case.q, layer.view(), backend="cpu")
            if layer.lengths[0] == 800:
                layer.crop([400])

    decode(1000)
    before = memory().rss
    decode(10_000)
    assert memory().rss - before < 3e6
