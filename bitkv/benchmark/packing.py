"""Times what adding tokens to a layer costs: packing a prompt, and appending tokens one by one."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from bitkv import native
from bitkv.attention import attend
from bitkv.benchmark.report import Measurement, Operation, Report, Row, make_row
from bitkv.benchmark.request import (
    Progress,
    check_contexts,
    measure_environments,
    name_recipes,
    silent,
)
from bitkv.benchmark.synthetic import Shape, new_layer
from bitkv.benchmark.timing import (
    FULL,
    QUICK,
    Call,
    cold_copies,
    evict,
    median_ms,
    torch_threads,
)
from bitkv.layer import PagedLayer
from bitkv.recipe import Recipe

FLUSHES = 4  # pages that each sequence packs while appends are timed
_STEPS_APART = 16  # appends between two that attention follows


def run(
    recipes: Sequence[Recipe | str],
    contexts: Sequence[int],
    *,
    batch: int = 1,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    threads: Sequence[int] = (),
    quick: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Time packing a prompt of one layer, as pages alone and as an empty cache that takes it whole.

    Args:
        contexts: tokens of the prompts, at least a page.
        threads, quick, command: as in `attention.run`.

    Returns:
        Rows "pack" and "prompt"; a recipe that cannot serve the shape gives a sentence in `refused`.

    Raises:
        ValueError: an unknown recipe or dtype, or a shape or context that cannot be.
    """
    shape = Shape(batch, kv_heads, kv_heads, head_dim, dtype)
    named = name_recipes(recipes)
    contexts = check_contexts(contexts)
    show = progress or silent
    steps = [(context, text) for context in contexts for text in named]
    show("memory read bandwidth", 0, 1 + len(steps))
    effort = QUICK if quick else FULL
    environments = measure_environments(threads, effort, command)
    rows: list[Row] = []
    refused: dict[str, None] = {}
    for done, (context, text) in enumerate(steps, 1):
        show(f"{context:,} tokens, {text}", done, 1 + len(steps))
        try:
            prompt = _Prompt(named[text], shape, context)
        except ValueError as error:
            refused[f"{text}: {error}"] = None
            continue
        for environment in environments:
            for operation, calls in prompt.calls().items():
                with torch_threads(environment.threads):
                    ms = median_ms(calls, effort)
                measured = prompt.measurement(operation, text, ms)
                rows.append(make_row(measured, shape, environment))
    return Report(tuple(rows), tuple(refused))


class _Prompt:
    """A prompt for one layer of a recipe's cache, in as many copies as keep it out of the L3 cache.

    Raises:
        ValueError: the recipe's codecs cannot serve the shape, or the prompt packs no page.
    """

    def __init__(self, recipe: Recipe, shape: Shape, context: int) -> None:
        self.recipe, self.shape, self.context = recipe, shape, context
        self.pairs = [
            (shape.random(shape.kv_heads, context), shape.random(shape.kv_heads, context))
            for _ in range(cold_copies(shape.nbytes(context)))
        ]
        self.layer = self._take(*self.pairs[0])
        self.tokens = int(self.layer.packed_len[0])
        if not self.tokens:
            raise ValueError(
                f"a prompt of {context} tokens packs no page; pass {self.layer.hot_capacity} or more"
            )

    def calls(self) -> dict[Operation, list[Call]]:
        """Packing the pages alone, and an empty layer that takes the whole prompt."""
        return {
            "pack": [partial(self._pack, *pair) for pair in self.pairs],
            "prompt": [partial(self._take, *pair) for pair in self.pairs],
        }

    def measurement(self, operation: Operation, text: str, ms: float) -> Measurement:
        tokens = self.tokens if operation == "pack" else self.context
        usage, layer = self.layer.usage, self.layer
        bits = 8 * (usage.page_bytes + usage.hot_bytes) / (usage.page_elements + usage.hot_elements)
        is_native = native.why_not() is None and all(
            codec.takes_nearest or codec.native_levels is not None for codec in (layer.key, layer.value)
        )
        packer = "cpu" if is_native else "torch"
        nbytes = self.shape.nbytes(tokens)
        return Measurement(operation, packer, text, self.context, ms, nbytes, bits)

    def _take(self, k: Tensor, v: Tensor) -> PagedLayer:
        layer = new_layer(self.recipe, shape=self.shape)
        self.recipe = replace(self.recipe, key=layer.key, value=layer.value)  # which learn but once
        layer.append(k, v)
        return layer

    def _pack(self, k: Tensor, v: Tensor) -> None:
        """Write the pages anew; each sequence's follow one another in the pool."""
        layer, form, size = self.layer, self.layer.format, self.layer.page_size
        parts = torch.split(layer.pool.data, [form.key.nbytes, form.value.nbytes], dim=-1)
        view, first = layer.view(), layer.num_sink_tokens
        sites = ((layer.key, form.key, view.key, k), (layer.value, form.value, view.value, v))
        for (codec, part_form, shared, x), out in zip(sites, parts, strict=True):
            for b, pages in enumerate(layer.page_lists()):
                packed = x[b, :, first:][:, : self.tokens]
                page_tokens = torch.unflatten(packed, 1, (-1, size)).transpose(0, 1)
                to = out[pages[0] : pages[-1] + 1]
                codec.encode(page_tokens, part_form, to, shared=shared, first_token=first)


def append_times(layer: PagedLayer, shape: Shape, backend: str) -> dict[Operation, float]:
    """Median milliseconds of storing a token a sequence, and of that and attending, by operation.

    Other memory is read between two tokens, as a model does. The layer needs room for `FLUSHES` pages
    a sequence: moving its pool, once its length is a multiple of the prompt's, is not measured.
    """
    q = shape.random(shape.heads, 1)
    k, v = (shape.random(shape.kv_heads, 1) for _ in range(2))
    times: dict[Operation, list[float]] = {"append": [], "step": [], "flush": [], "flush-step": []}
    for i in range(FLUSHES * layer.page_size):
        evict()
        used, start = layer.pool.num_used, time.perf_counter()
        layer.append(k, v)
        stored = time.perf_counter()
        is_flush = layer.pool.num_used > used
        times["flush" if is_flush else "append"].append(1000 * (stored - start))
        if is_flush or i % _STEPS_APART == 0:  # all of them would take minutes at 1M tokens
            attend(q, layer.view(), backend=backend)
            whole = 1000 * (time.perf_counter() - start)
            times["flush-step" if is_flush else "step"].append(whole)
    return {operation: median(each) for operation, each in times.items()}
