"""Times one layer's decode attention and append of one token, beside PyTorch SDPA.

A working set that would sit in the L3 cache is copied until the copies fill it twice, and the calls
rotate between them: in a model, the other layers and the weights pass through the cache in between.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from bitkv.attention import BACKENDS, attend, last_backend
from bitkv.benchmark.bandwidth import BUFFER_BYTES, read_bandwidth
from bitkv.benchmark.environment import Environment, environment_of_run
from bitkv.benchmark.report import Report, Row
from bitkv.benchmark.synthetic import Shape, synthetic_layer
from bitkv.benchmark.timing import FULL, QUICK, WARM_UP, Effort, cold_copies, median_ms
from bitkv.layer import PagedLayer
from bitkv.pages import RAW_DTYPES
from bitkv.recipe import Recipe, as_recipe

Progress = Callable[[str, int, int], None]
"""Called before each step with what it measures, how many steps are done, and how many there are."""

Call = Callable[[], object]

_SDPA_DTYPES = ("bfloat16", "float32")
_APPEND_EFFORT = Effort(repeats=5, seconds=0)  # each repeat fills a page: their number is fixed


def run(
    recipes: Sequence[Recipe | str],
    contexts: Sequence[int],
    *,
    backend: str = "auto",
    batch: int = 1,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    quick: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Time attention of one query token, and its append, at each context, with torch's threads.

    Args:
        recipes: recipes or their texts; a recipe with layer-wise bits is measured at its layer 0.
        contexts: tokens in the cache, the new one included.
        backend: "auto", "all", or a key of `BACKENDS`.
        batch, heads, kv_heads, head_dim, dtype: the layer; Llama-3.1-8B's by default.
        quick: fewer repeats and a smaller bandwidth buffer.
        command: what the rows will say made them.

    Returns:
        For each context the four SDPA variants, then the recipes. A recipe that cannot serve the
        shape, and a backend that refuses it, give a sentence in `refused` and no row.

    Raises:
        ValueError: an unknown recipe, backend or dtype, or a shape or context that cannot be.
    """
    shape = Shape(batch, heads, kv_heads, head_dim, dtype)
    named = {r if isinstance(r, str) else str(r): as_recipe(r) for r in recipes}
    backends = _backends(backend)
    for context in contexts:
        if context < 1:
            raise ValueError(f"a context of {context} tokens is too short; pass 1 or more")
    contexts = list(dict.fromkeys(contexts))
    report: Progress = progress or (lambda label, done, total: None)
    total = 1 + len(contexts) * (1 + len(named))
    report("memory read bandwidth", 0, total)
    effort = QUICK if quick else FULL
    bandwidth = read_bandwidth(effort, BUFFER_BYTES // (4 if quick else 1))
    bench = _Bench(shape, effort, environment_of_run(bandwidth, command))
    steps = ((context, text) for context in contexts for text in (None, *named))
    for done, (context, text) in enumerate(steps, 1):
        report(f"{context:,} tokens, {text or 'SDPA'}", done, total)
        if text is None:
            bench.sdpa(context)
        else:
            bench.recipe(text, named[text], context, backends)
    return Report(tuple(bench.rows), bench.environment, tuple(bench.refused))


def _backends(name: str) -> tuple[str, ...]:
    if name not in ("auto", "all", *BACKENDS):
        raise ValueError(f"no backend {name!r}; choose from auto, all, {', '.join(BACKENDS)}")
    return tuple(BACKENDS) if name == "all" else (name,)


class _Bench:
    """Measures step by step, and keeps rows and refusals."""

    def __init__(self, shape: Shape, effort: Effort, environment: Environment) -> None:
        self.shape, self.effort, self.environment = shape, effort, environment
        self.rows: list[Row] = []
        self.refused: list[str] = []
        self._sdpa_ms = 0.0

    def sdpa(self, context: int) -> None:
        """Both dtypes in both arrangements of heads; the fastest is what later rows compare with."""
        timed = [x for dtype in _SDPA_DTYPES for x in self._time_sdpa(context, dtype)]
        self._sdpa_ms = min(ms for _, _, ms in timed)
        for backend, dtype, ms in timed:
            bits = 8.0 * RAW_DTYPES[dtype].itemsize
            self._row("attend", backend, dtype, context, ms, self.shape.nbytes(context, dtype), bits)

    def _time_sdpa(self, context: int, dtype: str) -> list[tuple[str, str, float]]:
        """Backend, dtype and milliseconds; K and V of one dtype exist at a time."""
        variants = sdpa_calls(self.shape, context, dtype)
        return [(backend, dtype, median_ms(calls, self.effort)) for backend, calls in variants]

    def recipe(self, text: str, recipe: Recipe, context: int, backends: Sequence[str]) -> None:
        """Attention with each backend, then append, on one cache."""
        spare_pages = WARM_UP + _APPEND_EFFORT.repeats
        try:
            layer = synthetic_layer(recipe, self.shape, context, spare_pages=spare_pages)
        except ValueError as error:
            self._refuse(f"{text}: {error}")
            return
        usage = layer.usage
        nbytes = usage.page_bytes + usage.hot_bytes
        bits = 8 * nbytes / (usage.page_elements + usage.hot_elements)
        ran = []
        for backend in backends:
            try:
                attend_call(layer, self.shape, backend)()
            except ValueError as error:
                self._refuse(f"{text}: {error}")
                continue
            ran.append(name := last_backend() or backend)
            layers = [layer, *(copy.deepcopy(layer) for _ in range(cold_copies(nbytes) - 1))]
            calls = [attend_call(each, self.shape, name) for each in layers]
            self._row("attend", name, text, context, median_ms(calls, self.effort), nbytes, bits)
        if ran:
            append_ms = median_ms([append_call(layer, self.shape)], _APPEND_EFFORT) / layer.page_size
        for name in ran:  # appending is the cache's work, the same under every backend
            self._row("append", name, text, context, append_ms, self.shape.nbytes(1), bits)

    def _refuse(self, sentence: str) -> None:
        if sentence not in self.refused:
            self.refused.append(sentence)

    def _row(
        self,
        operation: Literal["attend", "append"],
        backend: str,
        recipe: str,
        context: int,
        ms: float,
        nbytes: int,
        bits: float,
    ) -> None:
        shape, gbps = self.shape, nbytes / ms / 1e6
        row = Row(
            operation=operation,
            backend=backend,
            recipe=recipe,
            context=context,
            batch=shape.batch,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype if not backend.startswith("sdpa-") else recipe,
            ms=ms,
            bytes=nbytes,
            gbps=gbps,
            bits_per_element=bits,
            fraction_of_bandwidth=gbps / self.environment.bandwidth_gbps,
            vs_sdpa=self._sdpa_ms / ms if operation == "attend" else None,
            environment=self.environment,
        )
        self.rows.append(row)


def sdpa_calls(shape: Shape, context: int, dtype: str) -> Iterator[tuple[str, list[Call]]]:
    """PyTorch SDPA with `enable_gqa`, then with the query heads of a KV head as rows of one matrix."""
    q = shape.random(shape.heads, 1, dtype)
    k, v = (shape.random(shape.kv_heads, context, dtype) for _ in range(2))
    copies = cold_copies(shape.nbytes(context, dtype))
    pairs = [(k, v), *((k.clone(), v.clone()) for _ in range(copies - 1))]
    rows = q.view(shape.batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    gqa = partial(scaled_dot_product_attention, enable_gqa=True)
    yield "sdpa-gqa", [partial(gqa, q, *pair) for pair in pairs]
    yield "sdpa-grouped", [partial(scaled_dot_product_attention, rows, *pair) for pair in pairs]


def attend_call(layer: PagedLayer, shape: Shape, backend: str) -> Call:
    """Attention of one token over the layer."""
    return partial(attend, shape.random(shape.heads, 1), layer.view(), backend=backend)


def append_call(layer: PagedLayer, shape: Shape) -> Call:
    """Appends a page's worth of tokens one by one, so that packing one page is in the time."""
    k, v = (torch.split(shape.random(shape.kv_heads, layer.page_size), 1, dim=2) for _ in range(2))

    def append_page() -> None:
        for token_k, token_v in zip(k, v, strict=True):
            layer.append(token_k, token_v)

    return append_page
