"""Attention on GPUs by Triton kernels, as the operator `bitkv::triton_attend`.

Tokens are shared out among programs (split-KV) and their results merged by log-sum-exp. Lengths stay on
the device: the number of programs follows from shapes alone, so a captured graph stays valid while
sequences grow. The kernels are in `triton_kernels` and `triton_merge`, imported with the first call.
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from math import e, log2
from typing import NamedTuple

import torch
from torch import Tensor

from bitkv.attention.base import EVERY_TOKEN, AttentionRequest, Backend
from bitkv.attention.lookups import Lookup, book_of, starts_of, turns_of
from bitkv.attention.tiling import HOT_TOKENS, Tiling, Variant
from bitkv.pages import RAW_DTYPES, AffineFormat, CodebookFormat, PageFormat, PartFormat
from bitkv.shared import Shared
from bitkv.view import CacheView

_DTYPES = tuple(RAW_DTYPES.values())
_MERGED_FEW, _MERGED_MANY = (128, 16), (16, 256)  # channels and splits of a program that merges
_LARGEST_WIDTH = 512
_LEAST_KEY_BYTES = (
    512  # below, codes that lie in different bits of a word are of fewer than 16 tokens each
)


class Queries(NamedTuple):
    """Queries `[B, Hq, Tq, D]`, Hq = Hkv * ratio, and the last token each sees, `[B, Tq]`."""

    q: Tensor
    positions: Tensor
    stride_b: int
    stride_h: int
    stride_t: int
    last_stride_b: int
    last_stride_t: int
    ratio: int
    length: int


class Cache(NamedTuple):
    """Tensors as in `CacheView`; strides of the hot window in elements."""

    pages: Tensor
    block_table: Tensor
    packed_len: Tensor
    hot_k: Tensor
    hot_v: Tensor
    hot_len: Tensor
    kv_heads: int
    stride_b: int
    stride_h: int
    sinks: int


class Score(NamedTuple):
    """The factor that takes inner products to scores of base 2, window and softcap."""

    factor: float
    softcap: float
    window: int


class Given(NamedTuple):
    """What pages share, as in `AttentionRequest.shared_operands`."""

    key_codebook: Tensor | None = None
    key_map: Tensor | None = None
    inv_freq: Tensor | None = None
    turn_factor: float = 1.0
    value_codebook: Tensor | None = None
    value_map: Tensor | None = None


class Books(NamedTuple):
    """The same for a kernel, and queries `[B, Hq, Tq, width]` mapped; any tensor for what it leaves."""

    key: Tensor
    value: Tensor
    value_map: Tensor
    starts: Tensor
    turns: Tensor
    queries: Tensor
    width: int


class Result(NamedTuple):
    """Where splits put `[splits, rows, D]` and `[splits, rows]`, rows as in `[B, Hq, Tq]`."""

    out: Tensor
    lse: Tensor
    rows: int


class Launch(NamedTuple):
    """Queries of a program, rows of its tiles of codes, its warps and stages; programs a processor."""

    columns: int
    tile: int
    warps: int
    stages: int
    programs: int


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units."""
    if device.type == "cpu":
        return 1  # of an imaginary GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _machine(device: torch.device) -> dict[str, bool]:
    """What of a `Variant` follows from where it runs. Kernels of NVIDIA's overlap from Hopper on."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    overlaps = nvidia and _capability(device) >= (9, 0)
    return {"assembly": nvidia, "overlaps": overlaps, "interpreted": interpreted()}


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def launch_of(form: PageFormat, rows: int, *, amd: bool = False) -> Launch:
    """Parameters for `rows` queries that share a KV head; measured on an H200 (docs/gpu.md).

    Few queries leave tensor cores idle whatever one does: what counts is instructions, and programs of
    one warp need the fewest, without barriers and without an exchange of weights between warps. Eight
    queries are the least a product takes, and with more a program would not have the registers: they are
    other programs' work, which find the page in the second-level cache.
    """
    columns = min(max(1 << (rows - 1).bit_length(), 16 if amd else 8), 32)
    if any(isinstance(part, CodebookFormat) for part in (form.key, form.value)):
        return Launch(columns, 128, 4, 1, 2)
    key, value = form.affine
    if key.is_raw or value.is_raw:
        return Launch(columns, 128, 4, 1, 3)
    columns, bits = min(columns, 16 if amd else 8), max(key.bits, value.bits)
    if columns * form.head_dim > 1024 or bits > 4:
        return Launch(columns, 32, 2 if form.head_dim <= 128 else 4, 2, 4)
    return Launch(columns, 32 if bits <= 2 else 16, 1, 2, 8)


def splits_of(grid: int, max_pages: int, hot_capacity: int, slots: int) -> int:
    """Programs that share a sequence's tokens: as many as a device runs at once, none without work."""
    return max(1, min(slots // max(grid, 1), max(max_pages, -(-hot_capacity // HOT_TOKENS))))


def _attend(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    packed_len: Tensor,
    hot_k: Tensor,
    hot_v: Tensor,
    hot_len: Tensor,
    positions: Tensor | None,
    key: Sequence[int],
    value: Sequence[int],
    num_sink_tokens: int,
    scale: float,
    window: int,
    softcap: float,
    key_codebook: Tensor | None = None,
    key_map: Tensor | None = None,
    inv_freq: Tensor | None = None,
    turn_factor: float = 1.0,
    value_codebook: Tensor | None = None,
    value_map: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of `q` `[B, Hq, Tq, D]`; arguments as in `AttentionRequest.operands`, then
    `AttentionRequest.shared_operands`.
    """
    q = q if q.stride(3) == 1 else q.contiguous()
    pages = pages.contiguous()
    block_table, packed_len, hot_len = (x.contiguous() for x in (block_table, packed_len, hot_len))
    if hot_k.stride() != hot_v.stride() or hot_k.stride()[2:] != (q.shape[3], 1):
        hot_k, hot_v = hot_k.contiguous(), hot_v.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    last = hot_len.unsqueeze(1) if positions is None else positions  # where it is None, nobody looks
    queries = Queries(
        *(q, last, q.stride(0), q.stride(1), q.stride(2), last.stride(0), last.stride(1)),
        *(q.shape[1] // hot_k.shape[1], q.shape[2]),
    )
    cache = Cache(
        *(pages, block_table, packed_len, hot_k, hot_v, hot_len),
        *(hot_k.shape[1], *hot_k.stride()[:2], num_sink_tokens),
    )
    if lse.numel():
        form = PageFormat.of_numbers(tuple(key), tuple(value), head_dim=q.shape[3])
        given = Given(key_codebook, key_map, inv_freq, turn_factor, value_codebook, value_map)
        launch = launch_of(form, queries.ratio * queries.length, amd=torch.version.hip is not None)
        variant = variant_of(
            form,
            launch,
            given,
            causal=positions is None,
            window=window < EVERY_TOKEN,
            softcap=softcap > 0,
            **_machine(q.device),
        )
        books = _books(given, q, cache, form.page_size)
        score = Score(scale * log2(e), softcap, window)
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            _launch(launch, variant, queries, cache, score, Result(out, lse, lse.numel()), books)
    return out, lse


def variant_of(form: PageFormat, launch: Launch, given: Given, **flags: bool) -> Variant:
    """The kernel for pages of a format; `flags` are those of `Variant`."""
    value_map = given.value_map
    return Variant(
        _reading(form.key, launch.tile, given.key_codebook, turned=given.inv_freq is not None),
        _reading(form.value, launch.tile, given.value_codebook),
        form.page_size,
        form.head_dim,
        form.page_bytes,
        form.key.nbytes,
        launch.columns,
        **flags,
        maps_queries=given.key_map is not None,
        map_heads=0 if value_map is None else value_map.shape[0],
        map_width=0 if value_map is None else value_map.shape[2],
    )


def _reading(
    part: PartFormat, tile: int, codebook: Tensor | None, *, turned: bool = False
) -> Tiling | Lookup:
    if isinstance(part, CodebookFormat):
        assert codebook is not None
        return Lookup.of(part, tile, codebook, turned=turned)
    assert isinstance(part, AffineFormat)
    return Tiling.of(part, tile)


def _books(given: Given, q: Tensor, cache: Cache, page_size: int) -> Books:
    table_width = cache.block_table.shape[1]
    inv_freq, nothing = given.inv_freq, cache.packed_len
    mapped = nothing if given.key_map is None else _mapped(q, given.key_map)
    return Books(
        nothing if given.key_codebook is None else book_of(given.key_codebook),
        nothing if given.value_codebook is None else book_of(given.value_codebook),
        nothing if given.value_map is None else given.value_map.float().contiguous(),
        nothing if inv_freq is None else starts_of(inv_freq, cache.sinks, page_size, table_width),
        nothing if inv_freq is None else turns_of(inv_freq, given.turn_factor, page_size),
        *(mapped, mapped.shape[-1]),
    )


def _mapped(q: Tensor, key_map: Tensor) -> Tensor:
    """Queries `[B, Hq, Tq, W]` for keys that are `key_map` `[Hkv, D, W]` times the numbers in pages."""
    heads = q.shape[1]
    by_head = torch.unflatten(q.float(), 1, (-1, heads // key_map.shape[0]))
    return torch.matmul(by_head, key_map.float().unsqueeze(1)).flatten(1, 2).contiguous()


def _launch(
    launch: Launch,
    variant: Variant,
    queries: Queries,
    cache: Cache,
    score: Score,
    result: Result,
    books: Books,
) -> None:
    """Run the kernels; with one split the first one writes the result itself."""
    from bitkv.attention.triton_kernels import attend_kernel
    from bitkv.attention.triton_merge import merge_kernel

    q = queries.q
    columns = queries.ratio * queries.length
    grid = cache.kv_heads * -(-columns // launch.columns), q.shape[0]
    slots = _processors(q.device) * launch.programs
    table_width = cache.block_table.shape[1]
    splits = splits_of(grid[0] * grid[1], table_width, cache.hot_k.shape[2], slots)
    parts = result
    if splits > 1:
        out = q.new_empty(splits, result.rows, variant.head_dim, dtype=torch.float32)
        parts = Result(out, q.new_empty(out.shape[:2], dtype=torch.float32), result.rows)
    attend_kernel[splits, *grid](
        queries,
        cache,
        table_width,
        score,
        parts,
        books,
        variant,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
    )
    if splits > 1:
        block = _MERGED_FEW if splits <= _MERGED_FEW[1] else _MERGED_MANY
        blocks = -(-variant.head_dim // block[0])
        options = {"launch_pdl": True} if variant.overlaps else {}
        merge_kernel[result.rows, blocks](parts, result, splits, *block, variant, **options)


triton_attend = torch.library.custom_op("bitkv::triton_attend", _attend, mutates_args=())


@triton_attend.register_fake
def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def attend(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Softmax attention with sums in float32; see `Backend.run`."""
    # the operator's dispatch in Python takes longer than launching a kernel
    plain = type(request.q) is Tensor and not torch.compiler.is_compiling()
    ordered = replace(request, view=request.view.in_order())
    return (_attend if plain else triton_attend)(*ordered.operands, *ordered.shared_operands)


def _refuse(request: AttentionRequest) -> str | None:
    q, view = request.q, request.view
    if q.device.type != "cuda" and not (q.device.type == "cpu" and interpreted()):
        return f"it got tensors on {q.device}, and takes tensors on a CUDA device"
    if find_spec("triton") is None:
        return "it needs the package triton, which is not installed"
    for x in (q, view.hot_k):
        if x.dtype not in _DTYPES:
            return f"it got {x.dtype}, and takes float16, bfloat16 and float32"
    return _refuse_format(view)


def _refuse_format(view: CacheView) -> str | None:
    form = view.format
    if form.layout != "strided":
        return f"it got pages of the layout {form.layout!r}, and takes 'strided'"
    if form.head_dim > 256:
        return f"it got head_dim {form.head_dim}, and takes at most 256"
    key = form.key
    if isinstance(key, AffineFormat) and not key.is_raw and key.code_bytes < _LEAST_KEY_BYTES:
        return (
            f"it got pages with {key.code_bytes} bytes of keys' codes a head, and takes at least "
            f"{_LEAST_KEY_BYTES}: more bits or a larger page_size"
        )
    return _refuse_part(form.key, view.key) or _refuse_part(form.value, view.value)


def _refuse_part(part: PartFormat, shared: Shared) -> str | None:
    if not isinstance(part, AffineFormat | CodebookFormat):
        return f"it got a {type(part).__name__}, and takes affine codes and codebooks"
    if isinstance(part, CodebookFormat) and part.width > _LARGEST_WIDTH:
        return f"it got {part.width} numbers of a token, and takes at most {_LARGEST_WIDTH}"
    if shared.rope is None:
        return None
    channels = 2 * shared.rope.inv_freq.shape[0]
    if not isinstance(part, CodebookFormat) or shared.restore is not None:
        return (
            "it got keys before the rotary embedding that are no plain indices, and takes those after it"
        )
    if channels != part.head_dim or channels // 2 % part.channels:
        return (
            f"it got a rotary embedding of {channels} channels of {part.head_dim} in codes of "
            f"{part.channels}, and takes one of all channels, no code spanning its halves"
        )
    return None


BACKEND = Backend("triton", attend, _refuse)
