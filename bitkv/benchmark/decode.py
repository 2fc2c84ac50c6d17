"""Times decode steps of a whole model: Llama-3.1-8B's layers, few of them, with random weights.

Caches are filled synthetically, so that no prompt need be read. Weights cost the same at every context;
what a step takes beyond one with an empty cache is the cache: storing, reading, attending.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bitkv import native
from bitkv.attention import BACKENDS, last_backend
from bitkv.benchmark.decode_report import STOCK, DecodeReport, DecodeRow
from bitkv.benchmark.environment import Environment
from bitkv.benchmark.request import (
    Progress,
    check_contexts,
    measure_environments,
    name_recipes,
    silent,
)
from bitkv.benchmark.synthetic import Shape, synthetic_layer
from bitkv.benchmark.timing import FULL, QUICK, Effort, durations, torch_threads
from bitkv.recipe import Recipe

_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128
_INTERMEDIATE = 14336
_VOCABULARY = 1024  # the real one has 128,256: as much work as two layers, and no cache
_DTYPE = "bfloat16"
_QUANTO_BITS = (4, 2)
_LONGEST = 60.0  # seconds

MakeCache = Callable[[int], Any]
"""A Transformers cache that holds so many tokens."""


def run(
    recipes: Sequence[Recipe | str],
    contexts: Sequence[int],
    *,
    layers: int = 2,
    batch: int = 1,
    backend: str = "auto",
    threads: Sequence[int] = (),
    quick: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> DecodeReport:
    """Time decode steps with the stock caches, then with the recipes, at each context.

    Args:
        contexts: tokens in the cache of each sequence before the steps.
        layers: of the model, each with 436 MB of weights.
        backend: "auto", or a key of `BACKENDS`.
        threads: numbers of threads to measure everything with; torch's present one by default.
        quick: fewer repeats.
        command: what the rows will say made them.

    Returns:
        Rows; stock caches that cannot be made here give a sentence in `notes`, recipes that cannot
        serve the model one in `refused`.

    Raises:
        ValueError: an unknown recipe or backend, or a context, batch or number of layers below 1.
    """
    shape = Shape(batch, _HEADS, _KV_HEADS, _HEAD_DIM, _DTYPE)
    named = name_recipes(recipes)
    contexts = check_contexts(contexts)
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"no backend {backend!r}; choose from auto, {', '.join(BACKENDS)}")
    if layers < 1:
        raise ValueError(f"a model of {layers} layers is too small; pass 1 or more")
    show = progress or silent
    show("memory read bandwidth, weights", 0, 1)
    effort = QUICK if quick else FULL
    environments = measure_environments(threads, effort, command)
    bench = _Bench(shape, random_model(layers), effort, environments)
    caches, notes = _caches(bench.model.config, shape, named, backend)
    steps = [(context, name) for context in contexts for name in caches]
    for done, (context, name) in enumerate(steps, 1):
        show(f"{context:,} tokens, {name}", done, 1 + len(steps))
        bench.measure(name, context, caches[name])
    return DecodeReport(tuple(bench.rows), tuple(bench.refused), notes)


def random_model(layers: int) -> Any:
    """Llama-3.1-8B with fewer layers, a small vocabulary and random weights, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HEADS * _HEAD_DIM,
        intermediate_size=_INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        max_position_embeddings=1 << 21,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _caches(
    config: Any, shape: Shape, recipes: Mapping[str, Recipe], backend: str
) -> tuple[dict[str, MakeCache], tuple[str, ...]]:
    """What makes each cache, the stock ones first, and a sentence for those that cannot be made."""
    caches: dict[str, MakeCache] = {STOCK: partial(dynamic_cache, config, shape)}
    notes: tuple[str, ...] = ()
    if find_spec("optimum") and find_spec("optimum.quanto"):
        for bits in _QUANTO_BITS:
            caches[f"quanto{bits}"] = partial(quantized_cache, config, shape, bits)
    else:
        notes = (
            "the stock QuantizedCache is left out: it takes quanto; run `pip install optimum-quanto`",
        )
    for name, recipe in recipes.items():
        caches[name] = partial(packed_cache, config, shape, recipe, backend)
    return caches, notes


def dynamic_cache(config: Any, shape: Shape, context: int) -> Any:
    """The stock 16-bit cache."""
    from transformers import DynamicCache

    return _fill(DynamicCache(config=config), config, shape, context)


def quantized_cache(config: Any, shape: Shape, bits: int, context: int) -> Any:
    """The stock quantized cache with quanto's groups of 64."""
    from transformers import QuantizedCache

    return _fill(QuantizedCache("quanto", config, nbits=bits), config, shape, context)


def _fill(cache: Any, config: Any, shape: Shape, context: int) -> Any:
    config._attn_implementation = "sdpa"
    for i in range(config.num_hidden_layers if context else 0):
        cache.update(*(shape.random(shape.kv_heads, context) for _ in range(2)), i)
    return cache


def packed_cache(config: Any, shape: Shape, recipe: Recipe, backend: str, context: int) -> Any:
    """A packed cache with synthetic pages.

    Raises:
        ValueError: the recipe's codecs cannot serve the model.
    """
    from bitkv.integrations.transformers import PackedCache

    cache = PackedCache(config, recipe, backend=backend)
    for i, layer in enumerate(cache.layers):
        cache.paged.layers[i] = synthetic_layer(recipe, shape, [context] * shape.batch, layer_idx=i)
        layer.length, layer.is_initialized = context, True
    return cache


class _Bench:
    """A model whose steps are timed with one cache after the other; keeps rows and refusals."""

    def __init__(
        self, shape: Shape, model: Any, effort: Effort, environments: Sequence[Environment]
    ) -> None:
        self.shape, self.model, self.effort, self.environments = shape, model, effort, environments
        self.rows: list[DecodeRow] = []
        self.refused: list[str] = []
        self.ids = torch.zeros(shape.batch, 1, dtype=torch.long)
        self.empty = dynamic_cache(model.config, shape, 0)
        self._stock_ms: dict[int, float] = {}  # by threads, beside the present context

    def measure(self, name: str, context: int, make: MakeCache) -> None:
        """Steps with a cache of its own for each number of threads."""
        for environment in self.environments:
            try:
                cache = make(context)
                times, empty_ms = self._steps(cache, environment)
            except ValueError as error:
                self.refused.append(f"{name}: {error}")
                return
            if name == STOCK:
                self._stock_ms[environment.threads] = median(times)
            self.rows.append(self._row(name, context, times, empty_ms, cache, environment))

    def _steps(self, cache: Any, environment: Environment) -> tuple[list[float], float]:
        """Milliseconds of each step, which adds a token; and the median of steps with an empty cache.

        They take turns, so that a machine that is busy for a while slows both.
        """
        effort = self.effort
        if effort is FULL and hasattr(cache, "paged"):
            # as many steps as fill a page: one of them packs it
            effort = Effort(cache.recipe.page_size, seconds=0, limit=_LONGEST)
        step = partial(self.model, self.ids, past_key_values=cache)
        with torch_threads(environment.threads), torch.inference_mode():
            both = durations([step, self._empty_step], replace(effort, repeats=2 * effort.repeats))
            # one step of a slow cache may have used up the time
            empty = both[1::2] or durations([self._empty_step], effort)
        return both[::2], median(empty)

    def _empty_step(self) -> None:
        self.model(self.ids, past_key_values=self.empty)
        self.empty.reset()

    def _row(
        self,
        name: str,
        context: int,
        times: list[float],
        empty_ms: float,
        cache: Any,
        environment: Environment,
    ) -> DecodeRow:
        ms, shape, layers = median(times), self.shape, len(cache.layers)
        is_packed = hasattr(cache, "paged")
        backend = str(last_backend()) if is_packed else "sdpa"
        nbytes, elements = _bytes_and_elements(cache, shape)
        return DecodeRow(
            recipe=name,
            backend=backend,
            context=context,
            batch=shape.batch,
            layers=layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            ms=ms,
            worst_ms=max(times),
            cache_ms=ms - empty_ms,
            bytes=nbytes,
            bits_per_element=8 * nbytes / elements,
            vs_dynamic=self._stock_ms[environment.threads] / ms,
            isa=native.isa() if backend == "cpu" else None,
            environment=environment,
        )


def _bytes_and_elements(cache: Any, shape: Shape) -> tuple[int, int]:
    """Of keys and values of all layers."""
    if hasattr(cache, "paged"):
        usage = cache.paged.usage
        return usage.page_bytes + usage.hot_bytes, usage.page_elements + usage.hot_elements
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    nbytes = sum(_nbytes(getattr(layer, name, None)) for layer in cache.layers for name in names)
    per_token = 2 * shape.batch * shape.kv_heads * shape.head_dim * len(cache.layers)
    return nbytes, cache.get_seq_length() * per_token


def _nbytes(x: Tensor | None) -> int:
    """Bytes of a tensor; a quantized one says which tensors it consists of."""
    if x is None:
        return 0
    if hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()
        return sum(_nbytes(getattr(x, name)) for name in names)
    return int(x.nbytes)
