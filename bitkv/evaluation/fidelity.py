"""Errors that a recipe makes on real keys, values and attention outputs.

Keys, values and queries are captured from an unquantized run over held-out text; each recipe then packs
the same keys and values, and the newest queries attend to them again.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bitkv.attention import BACKENDS, AttentionRequest, Backend
from bitkv.attention.reference import attend
from bitkv.cache import PagedCache
from bitkv.evaluation.protocols import Advance, Subject, Windows, ignore
from bitkv.evaluation.report import Fidelity, Row
from bitkv.integrations.transformers import PackedCache
from bitkv.view import CacheView

NUM_QUERIES = 64  # as many as recent tokens: later queries all see a realistic hot window
_RECORDER = "recorder"


@dataclass(frozen=True)
class Captured:
    """What one layer attended with: `k`, `v` `[1, Hkv, T, D]`, the request of the newest queries, and
    their float32 output `[1, Hq, NUM_QUERIES, D]`."""

    layer_idx: int
    k: Tensor
    v: Tensor
    request: AttentionRequest
    out: Tensor


@torch.inference_mode()
def capture(stock: Subject, ids: Tensor) -> list[Captured]:
    """Keys, values and queries of every packable layer after a window of ids `[T]`."""
    requests: list[AttentionRequest] = []
    with _recorder(requests):
        cache = PackedCache(stock.model.config, "fp16", exact_prefill=False, backend=_RECORDER)
        stock.model(ids[None].to(stock.model.device), past_key_values=cache, use_cache=True)
    filled = [(i, layer) for i, layer in enumerate(cache.paged.layers) if not layer.is_empty]
    if len(requests) != len(filled):
        raise ValueError(
            f"{stock.model.config.model_type} computes attention in its own code, where bitkv cannot "
            "look on; measure agreement and perplexity instead"
        )
    return [
        Captured(i, *layer.materialize(), request, attend(request)[0])
        for (i, layer), request in zip(filled, requests, strict=True)
    ]


@contextmanager
def _recorder(requests: list[AttentionRequest]) -> Iterator[None]:
    """A backend that attends as the reference does and keeps the newest queries of each call."""

    def run(request: AttentionRequest) -> tuple[Tensor, Tensor]:
        q, positions = request.q[:, :, -NUM_QUERIES:].float(), request.last_seen[:, -NUM_QUERIES:]
        requests.append(dataclasses.replace(request, q=q, positions=positions))
        return attend(request)

    BACKENDS[_RECORDER] = Backend(_RECORDER, run, lambda request: None)
    try:
        yield
    finally:
        del BACKENDS[_RECORDER]


def fidelity(
    stock: Subject, subjects: Sequence[Subject], windows: Windows, *, advance: Advance = ignore
) -> list[Row]:
    """A row for each subject, its result the mean over layers, each over all windows."""
    sums: list[Tensor | float] = [0.0] * len(subjects)
    caches: list[PagedCache | None] = [None] * len(subjects)
    for ids in windows.ids:
        captured = capture(stock, ids)
        for i, subject in enumerate(subjects):
            energies, caches[i] = _energies(subject, captured)
            sums[i] = sums[i] + energies
            advance()
    window = windows.ids.shape[1]
    return [
        subject.row(
            "fidelity",
            _result(torch.as_tensor(energies)),
            cache=cache,
            protocol="captured",
            context=window,
            tokens=min(NUM_QUERIES, window) * len(windows.ids),
            samples=len(windows.ids),
        )
        for subject, energies, cache in zip(subjects, sums, caches, strict=True)
    ]


@torch.inference_mode()
def _energies(subject: Subject, captured: Sequence[Captured]) -> tuple[Tensor, PagedCache]:
    """Squared errors and squared norms, float64 `[layers, 8]`, and the cache with both parts packed."""
    recipe = subject.packing()
    key_only, value_only, both = (
        _pack(dataclasses.replace(subject, recipe=variant), captured)
        for variant in (recipe.only("key"), recipe.only("value"), recipe)
    )
    rows = []
    for layer in captured:
        i, sinks = layer.layer_idx, recipe.num_sink_tokens
        k, v = _in_pages(both.layers[i].view())
        span = slice(sinks, sinks + k.shape[1])
        row = [*_error(layer.k[0, :, span], k), *_error(layer.v[0, :, span], v)]
        for cache in (key_only, value_only, both):
            request = dataclasses.replace(layer.request, view=cache.layers[i].view())
            row.append(_error(layer.out, attend(request)[0])[0])
        rows.append(torch.stack([*row, layer.out.double().square().sum()]))
    return torch.stack(rows), both


def _pack(subject: Subject, captured: Sequence[Captured]) -> PagedCache:
    new = subject.new_cache(exact_prefill=True)
    assert new is not None
    cache = new.paged
    for layer in captured:
        cache.append(layer.layer_idx, layer.k, layer.v)
    return cache


def _in_pages(view: CacheView) -> tuple[Tensor, Tensor]:
    """Float32 keys and values `[Hkv, T, D]` of the packed tokens of a single sequence."""
    pages = view.block_table[0, : int(view.packed_len[0]) // view.format.page_size]
    k, v = view.dequantize(pages)
    return k.transpose(0, 1).flatten(1, 2), v.transpose(0, 1).flatten(1, 2)


def _error(expected: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """The squared norms, float64, of the difference and of what was expected."""
    expected = expected.double()
    return (got - expected).square().sum(), expected.square().sum()


def _result(energies: Tensor) -> Fidelity:
    """Of `_energies` summed over windows."""
    key, key_norm, value, value_norm, *errors, norm = energies.unbind(1)
    columns = [key / key_norm, value / value_norm, *((error / norm).sqrt() for error in errors)]
    per_layer = torch.stack(columns, dim=1)
    layers = tuple(_fidelity(row) for row in per_layer.tolist())
    return _fidelity(per_layer.mean(0).tolist(), layers)


def _fidelity(values: list[float], layers: tuple[Fidelity, ...] = ()) -> Fidelity:
    key_nmse, value_nmse, key_error, value_error, both_error = values
    return Fidelity(key_nmse, value_nmse, key_error, value_error, both_error, layers)
