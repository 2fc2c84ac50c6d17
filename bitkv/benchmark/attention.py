"""Times one layer's decode attention and append of one token, beside PyTorch SDPA and vLLM.

A working set that would sit in the L3 cache is copied until the copies fill it twice, and the calls
rotate between them: in a model, the other layers and the weights pass through the cache in between.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from bitkv.attention import BACKENDS, attend, last_backend
from bitkv.benchmark import vllm
from bitkv.benchmark.environment import Environment
from bitkv.benchmark.packing import FLUSHES, append_times
from bitkv.benchmark.report import Measurement, Report, Row, make_row
from bitkv.benchmark.request import (
    Progress,
    check_contexts,
    measure_beside_bandwidth,
    measure_environments,
    name_recipes,
    silent,
)
from bitkv.benchmark.rivals import rival_calls
from bitkv.benchmark.synthetic import Shape, dtype_bytes, spread_lengths, synthetic_layer
from bitkv.benchmark.timing import (
    FULL,
    QUICK,
    Call,
    Effort,
    cold_copies,
    median_ms,
    torch_threads,
)
from bitkv.layer import PagedLayer
from bitkv.recipe import Recipe


def run(
    recipes: Sequence[Recipe | str],
    contexts: Sequence[int],
    *,
    backend: str = "auto",
    batches: Sequence[int] = (1,),
    ragged: bool = False,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    threads: Sequence[int] = (),
    quick: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Time attention of one query token, and its append, for each batch at each context.

    Args:
        recipes: recipes or their texts; a recipe with layer-wise bits is measured at its layer 0.
        contexts: tokens in the cache of each sequence, the new one included.
        backend: "auto", "all", or a key of `BACKENDS`.
        ragged: the lengths of a batch spread evenly from an eighth of the context up to it.
        heads, kv_heads, head_dim, dtype: the layer; Llama-3.1-8B's by default.
        threads: numbers of threads to measure everything with; torch's present one by default.
        quick: fewer repeats.
        command: what the rows will say made them.

    Returns:
        For each batch, context and number of threads the rivals, then the recipes. A recipe that
        cannot serve the shape, and a backend that refuses it, give a sentence in `refused` and no row.

    Raises:
        ValueError: an unknown recipe, backend or dtype, or a shape or context that cannot be.
    """
    shapes = [Shape(batch, heads, kv_heads, head_dim, dtype) for batch in dict.fromkeys(batches)]
    named = name_recipes(recipes)
    backends = _backends(backend)
    contexts = check_contexts(contexts)
    show: Progress = progress or silent
    steps = [(shape, n, text) for shape in shapes for n in contexts for text in (None, *named)]
    show("memory read bandwidth", 0, 1 + len(steps))
    effort = QUICK if quick else FULL
    environments = measure_environments(threads, effort, command)
    bench = _Bench(effort, environments, backends, ragged=ragged)
    for done, (shape, context, text) in enumerate(steps, 1):
        batch = f"batch {shape.batch}, " if len(shapes) > 1 else ""
        show(f"{batch}{context:,} tokens, {text or 'rivals'}", done, 1 + len(steps))
        if text is None:
            bench.rivals(shape, context)
        else:
            bench.recipe(shape, context, text, named[text])
    return Report(tuple(bench.rows), tuple(bench.refused), tuple(filter(None, [vllm.why_not()])))


def _backends(name: str) -> tuple[str, ...]:
    if name not in ("auto", "all", *BACKENDS):
        raise ValueError(f"no backend {name!r}; choose from auto, all, {', '.join(BACKENDS)}")
    return tuple(BACKENDS) if name == "all" else (name,)


class _Bench:
    """Measures step by step, and keeps rows and refusals."""

    def __init__(
        self,
        effort: Effort,
        environments: Sequence[Environment],
        backends: Sequence[str],
        *,
        ragged: bool,
    ) -> None:
        self.effort, self.environments, self.backends = effort, environments, backends
        self.ragged = ragged
        self.rows: list[Row] = []
        self.refused: list[str] = []
        self._rivals: list[Row] = []  # of the present shape and context

    def rivals(self, shape: Shape, context: int) -> None:
        """SDPA in both dtypes and arrangements of heads, and vLLM: what later rows are compared with."""
        measured: list[Row] = []
        for backend, dtype, nbytes, calls in rival_calls(shape, self._lengths(shape, context)):
            bits = 8.0 * dtype_bytes(dtype)
            for environment, ms in self._time(calls):
                timed = Measurement("attend", backend, dtype, context, ms, nbytes, bits)
                measured.append(make_row(timed, shape, environment, ragged=self.ragged))
            calls.clear()  # or two rivals' copies of a million tokens are in memory at once
        self._rivals = sorted(measured, key=lambda row: self._order(row.environment))
        self.rows += map(self._compared, self._rivals)

    def recipe(self, shape: Shape, context: int, text: str, recipe: Recipe) -> None:
        """Attention with each backend, then append, on one cache."""
        spare = FLUSHES * len(self.environments) * len(self.backends)
        try:
            layer = synthetic_layer(recipe, shape, self._lengths(shape, context), spare_pages=spare)
        except ValueError as error:
            self._refuse(f"{text}: {error}")
            return
        usage = layer.usage
        nbytes = usage.page_bytes + usage.hot_bytes
        bits = 8 * nbytes / (usage.page_elements + usage.hot_elements)
        ran = self._runnable(layer, shape, text)
        if not ran:
            return
        layers = [layer, *(copy.deepcopy(layer) for _ in range(cold_copies(nbytes) - 1))]
        rows: list[Row] = []
        for name in ran:
            calls = [attend_call(each, shape, name) for each in layers]
            for environment, ms in self._time(calls):
                measured = Measurement("attend", name, text, context, ms, nbytes, bits)
                row = make_row(measured, shape, environment, ragged=self.ragged)
                rows.append(self._compared(row))
        for name, environment in product(ran, self.environments):
            with torch_threads(environment.threads):
                times = append_times(layer, shape, name)
            for operation, ms in times.items():
                read = shape.nbytes(1) + (nbytes if "step" in operation else 0)
                measured = Measurement(operation, name, text, context, ms, read, bits)
                rows.append(make_row(measured, shape, environment, ragged=self.ragged))
        self.rows += sorted(rows, key=lambda row: self._order(row.environment))

    def _time(self, calls: Sequence[Call]) -> Iterator[tuple[Environment, float]]:
        """Median milliseconds with each number of threads, and the bandwidth beside them."""
        for environment in self.environments:
            yield measure_beside_bandwidth(environment, partial(median_ms, calls, self.effort))

    def _compared(self, row: Row) -> Row:
        """The row beside the rivals that ran with as many threads."""
        threads = row.environment.threads
        rivals = [r for r in self._rivals if r.environment.threads == threads]
        sdpa = min(r.ms for r in rivals if r.is_sdpa)
        others = [r.ms for r in rivals if r.backend == vllm.NAME]
        return replace(row, vs_sdpa=sdpa / row.ms, vs_vllm=others[0] / row.ms if others else None)

    def _runnable(self, layer: PagedLayer, shape: Shape, text: str) -> list[str]:
        """The backends that serve this layer, by their own names."""
        ran = []
        for backend in self.backends:
            try:
                attend_call(layer, shape, backend)()
            except ValueError as error:
                self._refuse(f"{text}: {error}")
            else:
                ran.append(last_backend() or backend)
        return ran

    def _lengths(self, shape: Shape, context: int) -> list[int]:
        return spread_lengths(context, shape.batch, ragged=self.ragged)

    def _order(self, environment: Environment) -> int:
        return [each.threads for each in self.environments].index(environment.threads)

    def _refuse(self, sentence: str) -> None:
        if sentence not in self.refused:
            self.refused.append(sentence)


def attend_call(layer: PagedLayer, shape: Shape, backend: str) -> Call:
    """Attention of one token over the layer."""
    return partial(attend, shape.random(shape.heads, 1), layer.view(), backend=backend)
