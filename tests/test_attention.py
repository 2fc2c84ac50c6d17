"""Attention over pages against float64 over the same dequantized cache.

The allowed error is twice that of PyTorch's attention in the cache's own dtype over the dequantized keys
and values, both measured against float64. The backend "cpu" rounds queries and probabilities to bytes
for codes below 8 bits: it has a rule of its own, in tests/test_cpu.py. The backend "triton" is held to
this rule in tests/test_triton.py, with cases that its interpreter can go through.
"""

import logging
import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bitkv.attention import BACKENDS, attend, last_backend
from bitkv.layer import PagedLayer
from bitkv.recipe import parse

BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EXACT_BACKEND = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"])
DENSE_BACKEND = pytest.mark.parametrize("backend", ["reference"])
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def exactly(sentence: str) -> str:
    return f"^{re.escape(sentence)}$"


def new_layer(recipe: str, layout: str | None = None) -> PagedLayer:
    settings = parse(recipe)
    return PagedLayer(
        *settings.codecs(0),
        num_sink_tokens=settings.num_sink_tokens,
        recent_tokens=settings.recent_tokens,
        page_size=settings.page_size,
        layout=layout,
    )


def layer_of(recipe: str, k: Tensor, v: Tensor, backend: str, lengths=None) -> PagedLayer:
    """A layer where a backend wants it, with the first `lengths[b]` of tokens `[B, Hkv, T, D]`."""
    on_gpu = backend == "triton"
    device = TRITON_DEVICE if on_gpu else "cpu"
    real = None if lengths is None else torch.arange(k.shape[2]) < torch.tensor(lengths)[:, None]
    layer = new_layer(recipe, "strided" if on_gpu else None)
    layer.append(k.to(device), v.to(device), real if real is None else real.to(device))
    return layer


def filled(
    recipe, lengths, kv_heads=2, head_dim=64, dtype=torch.float16, backend="reference"
) -> PagedLayer:
    """A layer of sequences of these lengths, some perhaps empty."""
    k, v = torch.randn(2, len(lengths), kv_heads, max(lengths), head_dim).to(dtype)
    return layer_of(recipe, k, v, backend, lengths)


def attend_by(backend: str, q: Tensor, layer: PagedLayer, **options) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp on the CPU, computed by this backend wherever the layer is."""
    device = layer.hot_k.device
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    out, lse = attend(q.to(device), layer.view(), backend=backend, **moved)
    assert last_backend() == backend
    return out.cpu(), lse.cpu()


def exact(layer: PagedLayer) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, T, D]` in float64 on the CPU, computed from codes without rounding."""
    sinks, size = layer.num_sink_tokens, layer.page_size
    k, v = (x.double() for x in layer.materialize())
    for b, packed in enumerate(layer.packed_len.tolist()):
        for i in range(packed // size):
            page = layer.pool.data[layer.block_table[b, i]]
            for out, q in zip((k, v), layer.format.unpack(page), strict=True):
                out[b, :, sinks + i * size :][:, :size] = q.codes.double()
                if q.scale is not None:
                    axis = -2 if q.granularity == "channel" else -1
                    repeats = q.codes.shape[axis] // q.scale.shape[axis]
                    scale, zero = (
                        x.double().repeat_interleave(repeats, axis) for x in (q.scale, q.zero_point)
                    )
                    out[b, :, sinks + i * size :][:, :size] = q.codes.double() * scale + zero
    return k.cpu(), v.cpu()


def visible(positions: Tensor, longest: int, window: int | None) -> Tensor:
    """Which tokens each query sees, bool `[B, 1, Tq, T]`."""
    token, last = torch.arange(longest), positions[:, None, :, None]
    return (token <= last) & (token > last - (window or longest + 1))


def dense(q, k, v, mask, softcap) -> tuple[Tensor, Tensor]:
    """Attention in float64 and its log-sum-exp; a query that sees nothing gets 0 and -inf."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(mask, torch.exp(scores - lse[..., None]), 0)
    return weights @ v, lse


def pytorch(q, k, v, mask) -> Tensor:
    """PyTorch's attention in q's dtype."""
    k, v = (x.to(q.dtype).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (300, 129, 0)
    recipe: str = "kivi2"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    queries: int = 1
    dtype: torch.dtype = torch.float16
    causal: bool = True
    window: int | None = None
    softcap: float | None = None


ONE_BIT = "Recipe(key=Affine(1, 'channel', 'page'), value=Affine(1, 'token', 'page'), page_size=64)"
TOKEN_KEYS = (
    "Recipe(key=Affine(4, 'token', 64), value=Affine(2, 'token', 32), recent_tokens=0, page_size=64)"
)
K4V1 = "Recipe(Affine(4, 'channel', 32), Affine(1, 'token', 'page', 'mse'), num_sink_tokens=70)"

CASES = [
    Case(lengths=(1,)),
    Case(lengths=(127, 1)),
    Case(lengths=(129, 128), queries=5),
    Case(lengths=(1000, 400, 0)),
    Case(lengths=(0, 1000, 64), recipe="kivi4", queries=5, dtype=torch.bfloat16),
    Case(lengths=(1000, 300), recipe="int8", heads=8, kv_heads=1, head_dim=128),
    Case(recipe="fp16", heads=3, kv_heads=1, head_dim=80, queries=5),
    Case(recipe="fp16", heads=16, kv_heads=1, dtype=torch.bfloat16, queries=130),
    Case(recipe="fp16", lengths=(700, 0, 250), dtype=torch.float32, queries=300),
    Case(recipe="quick2", lengths=(1000, 129, 300), heads=32, kv_heads=1, head_dim=128),
    Case(recipe="quick1", lengths=(500, 0, 700), head_dim=96, queries=5, dtype=torch.bfloat16),
    Case(recipe="quick2", lengths=(500, 300), head_dim=256, queries=2),
    Case(recipe=ONE_BIT, lengths=(200, 1000, 64), head_dim=80, heads=8, kv_heads=1, queries=3),
    Case(recipe=ONE_BIT, lengths=(333,), head_dim=128, dtype=torch.float32, queries=130),
    Case(recipe=TOKEN_KEYS, lengths=(500, 127, 0), queries=130),
    Case(recipe=TOKEN_KEYS, lengths=(64, 128, 192), dtype=torch.float32, causal=False),
    Case(recipe=K4V1, lengths=(60, 80, 500), queries=5, head_dim=128),
    Case(lengths=(300, 20, 0), queries=300, kv_heads=1, heads=2),
    Case(lengths=(300, 129, 0), queries=5, causal=False),
    Case(lengths=(1000, 129, 0), queries=5, window=100),
    Case(lengths=(1000, 129, 0), queries=130, window=1),
    Case(lengths=(500, 129), queries=5, softcap=5.0),
    Case(recipe="quick2", lengths=(500, 0), queries=5, window=300, softcap=2.0, dtype=torch.bfloat16),
]


def assert_rule(case: Case, backend: str) -> None:
    """At most twice the error of PyTorch in the same dtype; "triton" has none above 16 bits."""
    layer = filled(case.recipe, case.lengths, case.kv_heads, case.head_dim, case.dtype, backend)
    q = torch.randn(len(case.lengths), case.heads, case.queries, case.head_dim).to(case.dtype)
    lengths = torch.tensor(case.lengths)[:, None]
    back = torch.arange(case.queries) - case.queries if case.causal else torch.tensor([-1])
    mask = visible((lengths + back).expand(-1, case.queries), max(case.lengths), case.window)
    options = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    out, lse = attend_by(backend, q, layer, **options)
    k, v = exact(layer)
    exact_out, exact_lse = dense(q, k, v, mask, case.softcap)
    # PyTorch's attention has no softcap: its error without one is the measure with one too
    half = q.half() if backend == "triton" and q.dtype == torch.float32 else q
    torch_error = pytorch(half, k, v, mask).double() - dense(half, k, v, mask, None)[0]
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    sees = mask.any(-1).expand(lse.shape)
    assert (out[~sees] == 0).all()
    assert (lse[~sees] == -torch.inf).all()
    error, allowed = (out.double() - exact_out)[sees].norm(), 2 * torch_error[sees].norm()
    assert allowed < 0.05 * exact_out[sees].norm()
    assert error <= allowed
    # the scores of unit Gaussian data stay below 8, where one rounding to 16 bits moves them by 2^-8
    assert (lse.double() - exact_lse)[sees].abs().max() < 2**-8


@DENSE_BACKEND
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_error_is_at_most_twice_that_of_pytorch_in_the_same_dtype(case, backend):
    assert_rule(case, backend)


@EXACT_BACKEND
def test_positions_say_the_last_token_each_query_sees(backend):
    layer = filled("kivi2", (300, 129), backend=backend)
    q = torch.randn(2, 4, 4, 64).half()
    positions = torch.tensor([[299, 0, 150, -1], [128, 5, 64, 0]])
    out, lse = attend_by(backend, q, layer, positions=positions)
    k, v = exact(layer)
    expected, expected_lse = dense(q, k, v, visible(positions, 300, None), None)
    assert (out[0, :, 3] == 0).all()
    assert torch.allclose(out.double(), expected, rtol=2**-9, atol=2**-9)
    assert torch.allclose(lse.double(), expected_lse, atol=2**-8)


@EXACT_BACKEND
def test_chunks_of_queries_see_what_they_would_see_one_by_one(backend):
    layer = filled("quick2", (300, 40), backend=backend)
    q = torch.randn(2, 4, 5, 64).half()
    together, _ = attend_by(backend, q, layer)
    for i in range(5):
        last = torch.tensor([[295 + i], [35 + i]])
        alone, _ = attend_by(backend, q[:, :, i : i + 1], layer, positions=last)
        assert torch.allclose(alone, together[:, :, i : i + 1], rtol=2**-9, atol=2**-9)


@BACKEND
def test_the_log_sum_exp_merges_two_halves_of_a_cache(backend):
    k, v = torch.randn(2, 1, 2, 500, 64).half()
    q = torch.randn(1, 4, 3, 64).half()
    parts = []
    for span in (slice(0, 500), slice(0, 320), slice(320, 500)):
        layer = layer_of("fp16", k[:, :, span], v[:, :, span], backend)
        parts.append(attend_by(backend, q, layer, causal=False))
    (whole, whole_lse), *halves = parts
    lse = torch.stack([lse for _, lse in halves])
    weights = torch.softmax(lse, 0)[..., None]
    merged = sum(w * out.float() for w, (out, _) in zip(weights, halves, strict=True))
    assert torch.allclose(torch.logsumexp(lse, 0), whole_lse, atol=2**-8)
    assert torch.allclose(merged, whole.float(), atol=2**-9)


@BACKEND
def test_sequences_that_share_pages_get_what_their_own_copies_would_get(backend):
    layer = filled("kivi2", (400, 200), backend=backend)
    q = torch.randn(2, 4, 1, 64).half()
    alone, _ = attend_by(backend, q, layer)
    layer.gather(torch.tensor([1, 0, 1]))
    shared, _ = attend_by(backend, q[[1, 0, 1]], layer)
    if backend == "triton":  # another batch is cut into other parts
        assert torch.allclose(shared, alone[[1, 0, 1]], rtol=2**-10, atol=2**-10)
    else:
        assert torch.equal(shared, alone[[1, 0, 1]])


@DENSE_BACKEND
@pytest.mark.parametrize("factor", [1e-3, 100.0])
def test_flat_and_needle_like_attention_stay_finite_and_right(factor, backend):
    layer = filled("kivi4", (500,), dtype=torch.float32)
    q = factor * torch.randn(1, 4, 2, 64)
    out, lse = attend(q, layer.view(), backend=backend)
    positions = torch.tensor([[498, 499]])
    expected, expected_lse = dense(q, *exact(layer), visible(positions, 500, None), None)
    assert torch.allclose(out.double(), expected, atol=1e-3)
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-4)


@BACKEND
def test_scale_replaces_the_square_root_of_head_dim_even_when_it_is_zero(backend):
    layer = filled("fp16", (300,), backend=backend)
    q = torch.randn(1, 2, 1, 64).half()
    by_scale, _ = attend_by(backend, q, layer, scale=0.25)
    by_query, _ = attend_by(backend, 2 * q, layer)
    assert torch.equal(by_scale, by_query)
    mean, _ = attend_by(backend, q, layer, scale=0.0)
    assert torch.allclose(
        mean, layer.materialize()[1].cpu().float().mean(2, keepdim=True).half(), atol=2**-10
    )


def test_auto_takes_a_backend_that_does_not_refuse_and_logs_it_once(caplog):
    layer, q = filled("kivi2", (200,)), torch.randn(1, 2, 1, 64).half()
    attend(q, layer.view(), backend="reference")
    with caplog.at_level(logging.INFO, logger="bitkv"):
        for _ in range(3):
            attend(q, layer.view())
    assert last_backend() in BACKENDS
    assert len(caplog.records) <= 1


QUERIES = torch.zeros(2, 4, 1, 64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("q", "options", "sentence"),
    [
        (QUERIES, {"backend": "cuda"}, f"no backend 'cuda'; choose from auto, {', '.join(BACKENDS)}"),
        (
            QUERIES[:1],
            {},
            "queries (1, 4, 1, 64) do not fit a cache of batch 2, 2 KV heads and head_dim 64; "
            "pass [B, Hq, Tq, D] with Hq a multiple of 2",
        ),
        (
            QUERIES[:, :3],
            {},
            "queries (2, 3, 1, 64) do not fit a cache of batch 2, 2 KV heads and head_dim 64; "
            "pass [B, Hq, Tq, D] with Hq a multiple of 2",
        ),
        (
            QUERIES[..., 0],
            {},
            "queries (2, 4, 1) do not fit a cache of batch 2, 2 KV heads and head_dim 64; "
            "pass [B, Hq, Tq, D] with Hq a multiple of 2",
        ),
        (
            QUERIES.to("meta"),
            {},
            "queries are on meta, the cache on cpu; move them to one device",
        ),
        (
            QUERIES,
            {"positions": torch.zeros(2, 3, dtype=torch.int64)},
            "positions (2, 3) do not fit queries (2, 4, 1, 64); pass [B, Tq]",
        ),
        (QUERIES, {"window": 0}, "window 0 hides every token; pass 1 or more, or None"),
        (
            QUERIES,
            {"softcap": 0.0},
            "softcap 0.0 does not bound scores; pass a positive number, or None",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(q, options, sentence):
    layer = filled("kivi2", (200, 10))
    with pytest.raises(ValueError, match=exactly(sentence)):
        attend(q, layer.view(), **options)
