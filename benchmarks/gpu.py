"""Measure everything on an NVIDIA GPU in one call: `PYTHONPATH=. python3 -m benchmarks.gpu`.

Correctness comes first: every format against float64 on random data, in as many processes as there are
processors, since most of it is compiling (and what one has compiled, all find compiled). Then times with
nothing in the L2 cache, important rows first, until the time budget is spent. Whatever fails is a row
too: the run goes on, and its exit status says so. Rows go to a JSON file, a short table comes last.
`--dry-run` goes the same way on a CPU, in Triton's interpreter and with tiny shapes, and times nothing.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from torch import Tensor

from bitkv.attention import attend, last_backend
from bitkv.attention import triton as kernels
from bitkv.attention.triton import Launch
from bitkv.benchmark.synthetic import Shape, new_layer, repeat_pages
from bitkv.layer import PagedLayer
from bitkv.pages import AffineFormat
from bitkv.recipe import Recipe, parse
from bitkv.static import StaticLayer
from bitkv.view import CacheView

ROOT = Path(__file__).parents[1]
LEARNED = Path(os.environ.get("BITKV_LEARNED", tempfile.gettempdir()))  # where codecs that learned lie
SHAPES = ((32, 8), (32, 32), (64, 8))  # query heads, KV heads; head_dim 128
CONTEXTS = (4096, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)
BATCHES = (1, 8, 32, 64)
FORMATS = {
    "16-bit": "fp16",
    "4-bit/page": "affine(4, 'page')",
    "2-bit/page": "affine(2, 'page')",
    "1-bit/page": "affine(1, 'page')",
    "4-bit/32": "kivi4",
    "2-bit/32": "kivi2",
    "1-bit/32": "affine(1, 32)",
}
CODEBOOKS = {
    "2-bit codebook, turned keys": "cq(4, 8)",
    "1-bit codebook, turned keys": "cq(8, 8)",
    "2-bit codebook": "Recipe(Coupled(4, 8, 'uniform', 'after'), Coupled(4, 8, 'uniform'))",
    "1-bit codebook": "Recipe(Coupled(8, 8, 'uniform', 'after'), Coupled(8, 8, 'uniform'))",
    "1-bit codebook, mapped": "Recipe(Spectral(1.0), Spectral(1.0))",
}
CHECKED = (
    *FORMATS.values(),
    "int8",
    "quick2",
    "quick1",
    "affine(2, 64)",
    "asymkv(0, 0)",
    *CODEBOOKS.values(),
)
MAIN = (32, 8, 131072, 1)  # query heads, KV heads, context, batch
LARGEST_BYTES = 40 << 30  # of one measurement's caches, all copies together
GENERATED = 200
GENERATED_RECIPES = os.environ.get("BITKV_RECIPES", "kivi2 quick1 kivi4 quick2 fp16").split()


@dataclass
class Row:
    """One measurement.

    Args:
        what: "check", "copy", "attention", "launch", "step", "pack", "generate" or "failure".
        name: a format, or another library.
        us: median microseconds; None in a dry run.
        gbps: bytes that must be read (and written) over that time.
        of_copy: `gbps` as a fraction of the copy bandwidth measured in the same run.
        speedup: over the fastest 16-bit attention of the same shape.
        error: of the result; what it is measured in depends on the row.
    """

    what: str
    name: str
    heads: int = 0
    kv_heads: int = 0
    context: int = 0
    batch: int = 0
    us: float | None = None
    gbps: float | None = None
    of_copy: float | None = None
    speedup: float | None = None
    error: float | None = None
    note: str = ""


class Bench:
    """One run: the device, the clock, the rows."""

    def __init__(self, budget: float, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.stop = time.monotonic() + budget
        self.rows: list[Row] = []
        self.copy_gbps: float | None = None
        self.failures: list[str] = []
        self.start = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.stop - time.monotonic()

    def add(self, row: Row, nbytes: int = 0) -> Row:
        """Keep a row, with the rates that follow from its time."""
        if row.us and nbytes:
            row.gbps = nbytes / row.us / 1e3
            row.of_copy = row.gbps / self.copy_gbps if self.copy_gbps else None
        self.rows.append(row)
        print(f"{time.monotonic() - self.start:5.0f} s", line(row), flush=True)
        return row

    def fail(self, what: str) -> None:
        """Keep the exception that is being handled, in whatever it came up, as a row."""
        trace = traceback.format_exc()
        print(trace, flush=True)
        self.failures.append(f"{what}: {trace.strip().splitlines()[-1]}")
        self.add(Row("failure", what, note=trace.strip().splitlines()[-1][:200]))

    def time(self, calls: list[Callable[[], object]], repeats: int = 20) -> float | None:
        """Median microseconds of a call. The calls, in turn, find nothing of theirs in the L2 cache.

        All are captured in one CUDA graph, so that launches cost what they cost in a served model.
        """
        for call in calls[:2] if self.dry else calls:
            call()
        if self.dry:
            return None
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(1000 * start.elapsed_time(stop) / len(calls))
        return median(times)

    def copies(self, nbytes: int) -> int:
        """Copies of a working set that together pass the L2 cache four times."""
        if self.dry:
            return 2
        cached = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, min(64, -(-4 * cached // max(nbytes, 1))))


# --- caches -----------------------------------------------------------------------------------------


def settings(recipe: Recipe) -> dict[str, Any]:
    return {
        "num_sink_tokens": recipe.num_sink_tokens,
        "recent_tokens": recipe.recent_tokens,
        "page_size": recipe.page_size,
        "layout": "strided",
    }


def filled(
    bench: Bench, text: str, kv_heads: int, context: int, batch: int, head_dim: int = 128
) -> PagedLayer:
    """A layer of `context` tokens: a few pages are packed for real, their bytes repeated."""
    layer = deepcopy(empty_layer(text, kv_heads, head_dim))
    pages = max(0, 1 + (context - layer.hot_capacity) // layer.page_size)
    distinct = context - max(0, pages - 8) * layer.page_size
    k, v = gaussian(bench, 2, batch, kv_heads, distinct, head_dim)
    layer.append(k, v)
    layer.pool.reserve(batch * pages)
    if pages > 8:
        repeat_pages(layer, [pages] * batch)
    return layer


@cache
def empty_layer(text: str, kv_heads: int, head_dim: int) -> PagedLayer:
    """A layer whose codecs have learned what they have to, which takes a while: a file keeps it."""
    recipe, shape = parse(text), Shape(1, kv_heads, kv_heads, head_dim, "float16")
    if not any(codec.learns for codec in recipe.codecs(0)):
        return new_layer(recipe, shape=shape, layout="strided")
    name = hashlib.sha1(f"{text} {kv_heads} {head_dim}".encode()).hexdigest()[:16]
    path = LEARNED / f"bitkv-{name}.pt"
    if not path.exists():
        LEARNED.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        torch.save(new_layer(recipe, shape=shape, layout="strided"), own)
        own.replace(path)
    layer: PagedLayer = torch.load(path, weights_only=False)
    return layer


def gaussian(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=torch.float16)


def read_bytes(layer: PagedLayer) -> int:
    """What attention has to read."""
    usage = layer.usage
    return usage.page_bytes + usage.hot_bytes


# --- correctness ------------------------------------------------------------------------------------


def exact(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention of the newest queries `[B, Hq, Tq, D]` over all tokens, computed in a dtype."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    queries, tokens = scores.shape[-2:]
    hidden = torch.ones(queries, tokens, dtype=torch.bool, device=q.device).triu(tokens - queries + 1)
    return torch.softmax(scores.masked_fill(hidden, -torch.inf).float().to(dtype), -1) @ v


Check = tuple[str, int, int, int, int]
"""A recipe, query heads, KV heads, head_dim, queries."""


def check_main(bench: Bench) -> None:
    """Every format at the shape that matters, and many queries that share keys; see `check_format`."""
    shapes = [(2, 1, 64, 1)] if bench.dry else [(32, 8, 128, 1), (64, 1, 128, 1)]
    texts = CHECKED[::6] if bench.dry else CHECKED[::-1]
    check_all(bench, [(text, *shape) for shape in shapes for text in texts])


def check_rest(bench: Bench) -> None:
    """Other shapes, and several queries; see `check_format`."""
    shapes = [(2, 1, 64)] if bench.dry else [(32, 8, 128), (8, 8, 64), (16, 2, 96)]
    recipes = ("kivi2",) if bench.dry else CHECKED
    cases = [(*case, queries) for queries in (3, 1) for case in itertools.product(recipes, shapes)]
    check_all(bench, [(text, *shape, queries) for text, shape, queries in cases])


def check_all(bench: Bench, checks: Sequence[Check]) -> None:
    for row in in_parallel(bench, check_format, checks):
        bench.add(row)
        if row.note.startswith("WRONG"):
            bench.failures.append(f"{row.name}: {row.note}")


def in_parallel(bench: Bench, function: Callable[..., Any], tasks: Sequence[Any]) -> Iterator[Any]:
    """Results of a function of a task, as they come; what is not done when the budget ends is left."""
    workers = 2 if bench.dry else max(1, min(len(tasks), (os.cpu_count() or 2) - 1))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    )
    futures: list[Future[Any]] = [pool.submit(function, task, bench.dry) for task in tasks]
    try:
        for future in as_completed(futures, timeout=None if bench.dry else max(1.0, bench.left - 10)):
            try:
                if (result := future.result()) is not None:
                    yield result
            except Exception:
                bench.fail(function.__name__)
    except TimeoutError:
        print("no time left for what follows", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def check_format(check: Check, dry: bool) -> Row | None:
    """The error against float64 is at most twice that of 16-bit attention over the same cache.

    Returns:
        None where the format does not fit the shape.
    """
    text, heads, kv_heads, head_dim, queries = check
    bench = Bench(0, dry)
    try:
        layer = filled(bench, text, kv_heads, 300 if dry else 2500, 1, head_dim)
    except ValueError as error:
        if "is not a multiple of group_size" in str(error):
            return None
        raise ValueError(f"{check}: {error}") from error
    q = gaussian(bench, 1, heads, queries, head_dim)
    out, _ = attend(q, layer.view(), backend="triton")
    k, v = layer.materialize()
    truth = exact(q, k, v, torch.float64)
    plain = exact(q, k, v, torch.float16)
    mine, theirs = (((x.double() - truth).norm() / truth.norm()).item() for x in (out, plain))
    note = f"D {head_dim}, {queries} queries; 16-bit attention {theirs:.1e}"
    if not mine <= 2 * theirs + 1e-6:
        note = f"WRONG: {note}"
    return Row("check", text, heads, kv_heads, layer.lengths[0], 1, error=mine, note=note)


def check_steps(bench: Bench) -> None:
    """Replays of one captured step across pages leave the cache that eager appends leave.

    Raises:
        RuntimeError: they differ.
    """
    for text in ("kivi2",) if bench.dry else ("affine(4, 'page')", "kivi2", "quick1", "fp16"):
        recipe = parse(text)
        common = settings(recipe)
        grows = PagedLayer(*recipe.codecs(0), **common)
        fixed = StaticLayer(*recipe.codecs(0), max_tokens=1024, **common)
        prompt = gaussian(bench, 2, 2, 2, grows.hot_capacity - 2, 128)
        for layer in (grows, fixed):
            layer.append(*prompt)
        k, v, q = (gaussian(bench, 2, heads, 1, 128) for heads in (2, 2, 8))
        replay, result = captured(bench, fixed, q, k, v)
        for _ in range(4 if bench.dry else 300):
            for x in (k, v, q):
                x.copy_(gaussian(bench, *x.shape))
            grows.stage(k, v)
            replay()
            expected, _ = attend(q, grows.view(), backend="triton")
            close = torch.allclose(result[0], expected, atol=2**-9, rtol=2**-7)
            if not close or fixed.view().lengths.tolist() != grows.lengths:
                raise RuntimeError(
                    f"{text}: a replayed step differs from an eager one at {grows.lengths}"
                )
            grows.commit()
        bench.add(Row("check", text, 8, 2, grows.lengths[0], 2, note="replayed steps equal eager ones"))


def captured(
    bench: Bench, layer: StaticLayer, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Callable[[], object], list[Tensor]]:
    """A step and attention as one CUDA graph, and the list its output stands in."""
    result: list[Tensor] = []

    def call() -> None:
        layer.step(k, v)
        result[:] = [attend(q, layer.view(), backend="triton")[0]]

    if bench.dry:
        return call, result
    lengths = layer.lengths
    call()  # compiles; taken back
    torch.cuda.synchronize()
    layer.crop(lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay, result


# --- times ------------------------------------------------------------------------------------------


def measure_copy(bench: Bench) -> None:
    """The bandwidth of a large copy on the device, read and written bytes, by the faster way."""
    size = 1 << 14 if bench.dry else 1 << 29
    source = torch.randn(size, device=bench.device)
    target = torch.empty_like(source)
    ways = {
        "memcpy": lambda: target.copy_(source),
        "kernel": lambda: torch.neg(source, out=target),
    }
    times = {name: bench.time([call]) for name, call in ways.items()}
    for name, us in times.items():
        row = bench.add(Row("copy", name, us=us), 8 * size)
        row.of_copy = None
        bench.copy_gbps = max(bench.copy_gbps or 0, row.gbps or 0) or None


def measure_main(bench: Bench) -> None:
    """The shape of the targets, a short context, and a batch."""
    heads, kv_heads, _, _ = MAIN
    measure_cases(bench, [MAIN, (heads, kv_heads, 4096, 1), (heads, kv_heads, 32768, 32)])


def measure_rest(bench: Bench) -> None:
    """Contexts, shapes and batches, as far as the time goes."""
    heads, kv_heads, _, _ = MAIN
    cases = [(heads, kv_heads, context, 1) for context in CONTEXTS]
    cases += [(*shape, context, 1) for shape in SHAPES[1:] for context in (4096, 32768, 131072)]
    cases += [(*shape, 32768, batch) for shape in SHAPES for batch in BATCHES]
    cases += [(*shape, 4096, batch) for shape in SHAPES for batch in BATCHES]
    done = {(row.heads, row.kv_heads, row.context, row.batch) for row in bench.rows}
    measure_cases(bench, [case for case in dict.fromkeys(cases) if case not in done])


def measure_cases(bench: Bench, cases: list[tuple[int, int, int, int]]) -> None:
    for case in [(2, 1, 300, 1)] if bench.dry else cases:
        if bench.left < 30:
            print(f"no time left for {case} and what follows", flush=True)
            return
        rows = [*measure_rivals(bench, *case), *measure_formats(bench, *case)]
        sixteen = [r.us for r in rows if r.us and ("fp16" in r.name or r.name == "16-bit")]
        for row in rows:
            row.speedup = min(sixteen) / row.us if row.us and sixteen else None


def formats(bench: Bench) -> dict[str, str]:
    """Formats to time; three will do where nothing is timed."""
    return dict([*FORMATS.items()][::3]) if bench.dry else FORMATS


def measure_formats(bench: Bench, heads: int, kv_heads: int, context: int, batch: int) -> Iterator[Row]:
    case = (heads, kv_heads, context, batch)
    for name, text in (formats(bench) | ({} if bench.dry else CODEBOOKS)).items():
        try:
            views, nbytes = copied_views(bench, text, kv_heads, context, batch)
            q = gaussian(bench, batch, heads, 1, 128)
            us = bench.time([partial(attend, q, view, backend="triton") for view in views])
            assert last_backend() == "triton"
            yield bench.add(Row("attention", name, *case, us=us), nbytes)
        except torch.cuda.OutOfMemoryError:
            bench.add(Row("attention", name, *case, note="out of memory"))
        except Exception:
            bench.fail(name)
        release()


Choice = tuple[int, int, int]
"""Tile, warps and stages of a `Launch`."""

LAUNCHES: dict[str, list[Choice]] = {  # what else those of `launch_of` could be
    "affine": [(16, 1, 2), (32, 1, 2), (32, 1, 3), (32, 2, 2), (64, 2, 2), (64, 4, 2)],
    "raw": [(128, 4, 1), (128, 4, 2), (128, 4, 3)],
    "coded": [(64, 4, 1), (128, 4, 1), (128, 8, 1)],
}
PROGRAMS = (1, 2, 3, 4, 8)  # on a processor; its four schedulers share out warps and registers evenly


def kind_of(text: str) -> str:
    keys = empty_layer(text, 8, 128).page_format(128, torch.float16).key
    return "coded" if not isinstance(keys, AffineFormat) else "raw" if keys.is_raw else "affine"


def warm_launch(task: tuple[str, Choice], dry: bool) -> tuple[str, Choice]:
    """Compile a kernel for a launch."""
    text, choice = task
    kernels.launch_of = lambda *_, **__: Launch(8, *choice, 4)
    bench = Bench(0, dry)
    attend(gaussian(bench, 1, 32, 1, 128), filled(bench, text, 8, 2500, 1).view(), backend="triton")
    return task


def measure_launches(bench: Bench) -> None:
    """The main shape with other launches than `launch_of` chooses; compiled in parallel first."""
    if bench.dry:
        return
    heads, kv_heads, context, batch = MAIN
    names = formats(bench) | CODEBOOKS
    tasks = [(text, choice) for text in names.values() for choice in LAUNCHES[kind_of(text)]]
    ready = {*in_parallel(bench, warm_launch, tasks)}
    for name, text in names.items():
        views, nbytes = copied_views(bench, text, kv_heads, context, batch)
        q = gaussian(bench, batch, heads, 1, 128)
        calls = [partial(attend, q, view, backend="triton") for view in views]
        for choice, programs in itertools.product(LAUNCHES[kind_of(text)], PROGRAMS):
            known = (text, choice) in ready and bench.left > 20
            if known and 8 <= choice[1] * programs <= 16:
                measure_launch(bench, name, Launch(8, *choice, programs), calls, nbytes)
        release()


def measure_launch(
    bench: Bench, name: str, launch: Launch, calls: list[Callable[[], object]], nbytes: int
) -> None:
    note = (
        f"tile {launch.tile}, {launch.warps} warps, {launch.stages} stages, {launch.programs} programs"
    )
    own = kernels.launch_of
    kernels.launch_of = lambda *_, **__: launch
    try:
        bench.add(Row("launch", name, *MAIN, us=bench.time(calls, repeats=9), note=note), nbytes)
    except Exception:
        bench.fail(f"{name}, {note}")
    finally:
        kernels.launch_of = own


def copied_views(
    bench: Bench, text: str, kv_heads: int, context: int, batch: int
) -> tuple[list[CacheView], int]:
    """Views of one cache and of copies, which together do not fit the L2 cache, and the bytes of one."""
    layer = filled(bench, text, kv_heads, context, batch)
    view, nbytes = layer.view(), read_bytes(layer)
    count = min(bench.copies(nbytes), max(1, LARGEST_BYTES // nbytes))

    def copy() -> CacheView:
        return replace(
            view, pages=view.pages.clone(), hot_k=view.hot_k.clone(), hot_v=view.hot_v.clone()
        )

    return [view, *(copy() for _ in range(count - 1))], nbytes


def measure_rivals(bench: Bench, heads: int, kv_heads: int, context: int, batch: int) -> Iterator[Row]:
    """PyTorch's attention and, where it is installed, FlashInfer's."""
    case = (heads, kv_heads, context, batch)
    nbytes = 2 * 2 * batch * kv_heads * context * 128
    for name, make, share in rivals(bench):
        if nbytes > LARGEST_BYTES // 2:
            bench.add(Row("attention", name, *case, note="too large"))
            continue
        try:
            count = min(bench.copies(nbytes), max(1, LARGEST_BYTES // nbytes))
            calls = [make(*case) for _ in range(count)]
            yield bench.add(Row("attention", name, *case, us=bench.time(calls)), int(nbytes * share))
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            bench.add(Row("attention", name, *case, note=str(error).splitlines()[0][:80]))
        release()


Maker = Callable[[int, int, int, int], Callable[[], object]]


def rivals(bench: Bench) -> Iterator[tuple[str, Maker, float]]:
    """Name, maker of a call, and bytes as a share of those of 16 bits."""

    def sdpa(heads: int, kv_heads: int, context: int, batch: int) -> Callable[[], object]:
        q = gaussian(bench, batch, heads, 1, 128)
        k, v = (gaussian(bench, batch, kv_heads, context, 128) for _ in range(2))
        run = torch.nn.functional.scaled_dot_product_attention
        return lambda: run(q, k, v, enable_gqa=True)

    def rows(heads: int, kv_heads: int, context: int, batch: int) -> Callable[[], object]:
        """Heads that share a KV head as rows of one matrix, which reads keys once."""
        q = gaussian(bench, batch, kv_heads, heads // kv_heads, 128)
        k, v = (gaussian(bench, batch, kv_heads, context, 128) for _ in range(2))
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)

    yield "SDPA fp16, enable_gqa", sdpa, 1.0
    yield "SDPA fp16, heads as rows", rows, 1.0
    try:
        import flashinfer
    except ImportError:
        return
    workspace = torch.zeros(16 << 20, dtype=torch.uint8, device=bench.device)  # calls follow one another

    def flash(dtype: torch.dtype) -> Maker:
        def make(heads: int, kv_heads: int, context: int, batch: int) -> Callable[[], object]:
            pages = -(-context // 16)
            indptr = torch.arange(batch + 1, dtype=torch.int32, device=bench.device) * pages
            cache = gaussian(bench, batch * pages, 2, kv_heads, 16, 128).to(dtype)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=True
            )
            wrapper.plan(
                indptr,
                torch.arange(batch * pages, dtype=torch.int32, device=bench.device),
                torch.full((batch,), context - (pages - 1) * 16, dtype=torch.int32, device=bench.device),
                *(heads, kv_heads, 128, 16),
                q_data_type=torch.float16,
                kv_data_type=dtype,
            )
            q = gaussian(bench, batch, heads, 128)
            return lambda: wrapper.run(q, cache)

        return make

    yield "FlashInfer fp16", flash(torch.float16), 1.0
    yield "FlashInfer fp8", flash(torch.float8_e4m3fn), 0.5


def release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_storing(bench: Bench) -> None:
    """A step that only adds a token, one that packs a page, and packing a prompt."""
    searched = {} if bench.dry else {"quick2": "quick2", "quick1": "quick1"}
    for name, text in (formats(bench) | searched).items():
        if bench.left < 30:
            print(f"no time left to store {name} and what follows", flush=True)
            return
        for batch in (1,) if bench.dry else (1, 32):
            measure_steps(bench, name, parse(text), batch)
        measure_packing(bench, name, parse(text))


def measure_steps(bench: Bench, name: str, recipe: Recipe, batch: int) -> None:
    heads = 1 if bench.dry else 8
    layer = StaticLayer(*recipe.codecs(0), max_tokens=4096, **settings(recipe))
    capacity = layer.hot_capacity
    layer.append(*gaussian(bench, 2, batch, heads, capacity - 1, 128))
    k, v = gaussian(bench, 2, batch, heads, 1, 128)
    for note, length in (("adds a token", capacity - 100), ("packs a page", capacity)):

        def step(length: int = length) -> None:
            layer.hot_len.fill_(length)
            layer.packed_len.zero_()
            layer.step(k, v)

        us = bench.time([step] * (1 if bench.dry else 10))
        note += "; two fills of lengths included"
        bench.add(Row("step", name, heads, heads, length, batch, us=us, note=note))


def measure_packing(bench: Bench, name: str, recipe: Recipe) -> None:
    """Keys and values of a prompt, one layer."""
    heads, tokens = (1, 256) if bench.dry else (8, 32768)
    x = gaussian(bench, tokens // recipe.page_size, heads, recipe.page_size, 128)
    calls, nbytes = [], 2 * x.nbytes
    for codec, site in zip(recipe.codecs(0), ("key", "value"), strict=True):
        form = codec.part_format(site, head_dim=128, page_size=recipe.page_size, dtype=x.dtype)
        out = torch.empty(*x.shape[:2], form.nbytes, dtype=torch.uint8, device=bench.device)
        calls.append(lambda codec=codec, form=form, out=out: codec.encode(x, form, out))
        nbytes += out.nbytes
    us = bench.time([lambda: [call() for call in calls]])
    bench.add(Row("pack", name, heads, heads, tokens, 1, us=us), nbytes)


def measure_generation(bench: Bench) -> None:
    """Greedy tokens of the bundled model: backend "auto" against the reference.

    A difference is a tie of logits if the two best were closer there than 16 bits can tell apart.
    """
    from bitkv.integrations.transformers import PackedCache

    if bench.left < 40:
        print("no time left to generate", flush=True)
        return
    model, ids = bundled(bench)
    for text in generated_recipes(bench):
        if bench.left < 40:
            print(f"no time left to generate from {text}", flush=True)
            return
        theirs, _ = greedy(bench, model, ids, PackedCache(model.config, text, backend="reference"))
        greedy(bench, model, ids, PackedCache(model.config, text), count=2)  # compiles kernels
        mine, us = greedy(bench, model, ids, PackedCache(model.config, text))
        backend = last_backend()
        if not bench.dry and backend != "triton":
            raise RuntimeError(f"generation on a GPU ran on backend {backend}, not on triton")
        note = f"backend {backend}: {agreement(mine, theirs, ids.shape[1])} as the reference's"
        bench.add(Row("generate", text, batch=1, context=ids.shape[1], us=us, note=note))


def measure_static_generation(bench: Bench) -> None:
    """The same from a static cache, whose step `generate` compiles on a GPU and replays as a CUDA graph.

    The first call compiles and captures, the second is timed; both against a growing cache.

    Raises:
        RuntimeError: steps were compiled anew while the cache grew.
    """
    from torch._dynamo.utils import counters

    from bitkv.integrations.transformers import PackedCache

    model, ids = bundled(bench)
    for text in generated_recipes(bench):
        if bench.left < 40:
            print(f"no time left to compile generation from {text}", flush=True)
            return
        expected, _ = greedy(bench, model, ids, PackedCache(model.config, text))
        cache = PackedCache(model.config, text, max_cache_len=ids.shape[1] + GENERATED)
        counters.clear()
        torch._dynamo.reset()
        greedy(bench, model, ids, cache)
        cache.reset()
        mine, us = greedy(bench, model, ids, cache)
        graphs, skips = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
        note = f"static, {graphs} graph compiled, {skips} not captured: "
        note += f"{agreement(mine, expected, ids.shape[1])} as a growing cache's"
        bench.add(Row("generate", text, batch=1, context=ids.shape[1], us=us, note=note))
        if graphs != 1:
            raise RuntimeError(
                f"{text}: {graphs} graphs were compiled for the steps of one static cache"
            )


def bundled(bench: Bench) -> tuple[Any, Tensor]:
    """The bundled model and a prompt `[1, T]` that it has not seen."""
    from bitkv.generation import checkpoint

    name = checkpoint.locate(None)
    model = checkpoint.load_model(name, "float32" if bench.dry else "float16", bench.device.type)
    text = (Path(name) / "heldout.txt").read_text(encoding="utf-8")[:4000]
    ids = checkpoint.load_tokenizer(name)(text, return_tensors="pt")["input_ids"]
    return model, ids[:, : 40 if bench.dry else 800].to(bench.device)


def generated_recipes(bench: Bench) -> Sequence[str]:
    return GENERATED_RECIPES[:1] if bench.dry else GENERATED_RECIPES


def greedy(
    bench: Bench, model: Any, ids: Tensor, cache: Any, count: int = GENERATED
) -> tuple[Any, float | None]:
    """What `generate` returns, with logits, and microseconds a token, the prompt included.

    In a dry run static caches are compiled too, though by no code generator.
    """
    from transformers import CompileConfig

    options: dict[str, Any] = {}
    if bench.dry and cache.is_compileable:
        options["compile_config"] = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
        options["compile_config"]._compile_all_devices = True
    count = 4 if bench.dry else count
    start = time.perf_counter()
    out = model.generate(
        ids,
        past_key_values=cache,
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out, None if bench.dry else 1e6 * (time.perf_counter() - start) / count


def agreement(mine: Any, theirs: Any, prompt: int) -> str:
    """How many tokens come before the first that differs, and how close a choice it was."""
    a, b = (x.sequences[0, prompt:].tolist() for x in (mine, theirs))
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(b))
    note = f"{same} of {len(b)} tokens"
    if same < len(b):
        top = theirs.logits[same][0].float().topk(2).values
        note += f" (its two best logits there are {float(top[0] - top[1]):.1e} apart)"
    return note


# --- reporting --------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """A row as text."""
    shape = f"{row.heads}/{row.kv_heads} {row.context} x{row.batch}" if row.heads else ""
    numbers = [f"{row.what:9} {row.name:26} {shape:22}"]
    for value, form in (
        (row.us, "{:9.1f} us"),
        (row.gbps, "{:6.0f} GB/s"),
        (row.of_copy, "{:5.2f} of copy"),
        (row.speedup, "{:5.2f}x"),
        (row.error, "error {:.1e}"),
    ):
        numbers.append("" if value is None else form.format(value))
    return " ".join([*filter(None, numbers), row.note]).rstrip()


def environment(bench: Bench) -> dict[str, object]:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "device": "cpu, interpreted" if bench.dry else torch.cuda.get_device_name(),
        "commit": done.stdout.strip() or os.environ.get("BITKV_COMMIT"),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
        "copy_gbps": bench.copy_gbps,
    }


def report(bench: Bench, path: Path | None) -> None:
    if path is not None:
        record = {"environment": environment(bench), "rows": [asdict(row) for row in bench.rows]}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n== in short:", environment(bench)["device"], f"copy {bench.copy_gbps or 0:.0f} GB/s")
    for row in bench.rows:
        if row.what not in ("check", "copy", "launch") or (
            row.what == "check" and "replayed" in row.note
        ):
            print(line(row))
    for name in dict.fromkeys(row.name for row in bench.rows if row.what == "launch"):
        tried = [row for row in bench.rows if row.what == "launch" and row.name == name and row.us]
        for row in sorted(tried, key=lambda row: row.us or 0)[:4]:
            print(line(row))
    for failure in bench.failures:
        print("FAILED", failure[:300])


STAGES: dict[str, Callable[[Bench], None]] = {
    "check": check_main,
    "copy": measure_copy,
    "attention": measure_main,
    "launches": measure_launches,
    "replay": check_steps,
    "generate": measure_generation,
    "static": measure_static_generation,
    "storing": measure_storing,
    "more": measure_rest,
    "checks": check_rest,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, on the CPU")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds (480)")
    parser.add_argument("--json", type=Path, help="where rows go")
    parser.add_argument("--stages", nargs="*", default=[*STAGES], choices=STAGES, help="of what (all)")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run goes through the motions on a CPU")
    torch.manual_seed(0)
    bench = Bench(arguments.budget, arguments.dry_run)
    try:
        for name, stage in STAGES.items():
            if name in arguments.stages and bench.left > 0:
                print(f"-- {name}, {bench.left:.0f} s left", flush=True)
                try:
                    stage(bench)
                except Exception:
                    bench.fail(name)
    finally:
        report(bench, arguments.json)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
