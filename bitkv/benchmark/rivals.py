"""What packed attention is compared with: PyTorch SDPA and, where it is installed, vLLM on the CPU."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bitkv.benchmark import vllm
from bitkv.benchmark.synthetic import Shape
from bitkv.benchmark.timing import Call, cold_copies

SDPA_DTYPES = ("bfloat16", "float32")


def rival_calls(shape: Shape, lengths: Sequence[int]) -> Iterator[tuple[str, str, int, list[Call]]]:
    """Backend, dtype of K and V, their bytes, and calls that rotate between cold copies."""
    for dtype in SDPA_DTYPES:
        nbytes = cache_bytes(shape, lengths, dtype)
        for backend, calls in sdpa_calls(shape, lengths, dtype):
            yield backend, dtype, nbytes, calls
    if vllm.why_not() is None:
        nbytes = cache_bytes(shape, lengths, vllm.DTYPE)
        for name, isa in vllm.variants(shape).items():
            yield name, vllm.DTYPE, nbytes, vllm.attend_calls(shape, lengths, cold_copies(nbytes), isa)


def cache_bytes(shape: Shape, lengths: Sequence[int], dtype: str) -> int:
    """Bytes of K and V of all sequences."""
    return shape.nbytes(sum(lengths), dtype) // shape.batch


def sdpa_calls(shape: Shape, lengths: Sequence[int], dtype: str) -> Iterator[tuple[str, list[Call]]]:
    """PyTorch SDPA with `enable_gqa`, then with the query heads of a KV head as rows of one matrix.

    Sequences of unequal lengths get a call each: SDPA would read padding in one batch.
    """
    q = shape.random(shape.heads, 1, dtype)
    copies = cold_copies(cache_bytes(shape, lengths, dtype))
    pairs = _keys_and_values(shape, lengths, dtype)
    sets = [pairs, *([(k.clone(), v.clone()) for k, v in pairs] for _ in range(copies - 1))]
    rows = q.view(shape.batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    yield "sdpa-gqa", [partial(_attend, q, each, enable_gqa=True) for each in sets]
    yield "sdpa-grouped", [partial(_attend, rows, each, enable_gqa=False) for each in sets]


def _keys_and_values(shape: Shape, lengths: Sequence[int], dtype: str) -> list[tuple[Tensor, Tensor]]:
    """One pair for a batch of one length, else one a sequence."""
    is_even = min(lengths) == max(lengths)
    one, counts = (shape, lengths[:1]) if is_even else (shape.alone, lengths)
    random = partial(one.random, shape.kv_heads, dtype=dtype)
    return [(random(n), random(n)) for n in counts]


def _attend(q: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], *, enable_gqa: bool) -> Tensor:
    parts = torch.split(q, len(q) // len(pairs))
    outputs = [
        scaled_dot_product_attention(part, *pair, enable_gqa=enable_gqa)
        for part, pair in zip(parts, pairs, strict=True)
    ]
    return torch.cat(outputs)
