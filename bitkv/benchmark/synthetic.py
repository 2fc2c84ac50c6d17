"""Caches of any length in moments: Gaussian keys and values in real pages.

A few pages are quantized for real and their bytes repeated, each page in its own memory, so that a long
context weighs what it should and every byte of it is valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitkv.codecs import Codec, Sample
from bitkv.layer import PagedLayer
from bitkv.pages import RAW_DTYPES, Site
from bitkv.recipe import Recipe
from bitkv.rope import Rope

_DISTINCT_PAGES = 8
_DISTINCT_TOKENS = 1024
_ROPE_BASE = 500_000.0  # Llama 3's


@dataclass(frozen=True)
class Shape:
    """One layer: queries `[batch, heads, 1, head_dim]`, K and V of `kv_heads` heads.

    Raises:
        ValueError: a number below 1, heads that do not group, a dtype that is not known.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is too small; pass 1 or more")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads do not share {self.kv_heads} KV heads evenly; "
                f"pass a multiple of {self.kv_heads}"
            )
        if self.dtype not in RAW_DTYPES:
            raise ValueError(f"no dtype {self.dtype!r}; choose from {', '.join(RAW_DTYPES)}")

    @property
    def alone(self) -> "Shape":
        """The same layer for one sequence."""
        return replace(self, batch=1)

    def random(self, heads: int, tokens: int, dtype: str | None = None) -> Tensor:
        """Gaussian `[batch, heads, tokens, head_dim]`, repeated along a long context."""
        distinct = torch.randn(self.batch, heads, min(tokens, _DISTINCT_TOKENS), self.head_dim)
        values = distinct.to(RAW_DTYPES[dtype or self.dtype])
        return values[:, :, torch.arange(tokens) % values.shape[2]]

    def nbytes(self, tokens: int, dtype: str | None = None) -> int:
        """Bytes of K and V of so many tokens."""
        elements = 2 * self.batch * self.kv_heads * tokens * self.head_dim
        return elements * dtype_bytes(dtype or self.dtype)


def dtype_bytes(dtype: str) -> int:
    """Bytes of an element of a dtype by its name."""
    return RAW_DTYPES[dtype].itemsize


def spread_lengths(context: int, batch: int, *, ragged: bool) -> list[int]:
    """Tokens of each sequence: all `context`, or ragged, evenly from an eighth of it up to it."""
    if not ragged or batch == 1:
        return [context] * batch
    shortest = -(-context // 8)
    return [shortest + (context - shortest) * i // (batch - 1) for i in range(batch)]


def synthetic_layer(
    recipe: Recipe, shape: Shape, lengths: Sequence[int], *, layer_idx: int = 0, spare_pages: int = 0
) -> PagedLayer:
    """One layer of a recipe's cache with `lengths[b]` tokens, as appending them would leave it.

    Args:
        lengths: tokens of each sequence of `shape.batch`.
        layer_idx: which of the recipe's layers.
        spare_pages: room for that many more pages a sequence, so that appends need not grow the pool.

    Raises:
        ValueError: the recipe's codecs cannot serve the shape.
    """
    layer = new_layer(recipe, layer_idx, shape)
    num_pages = [max(0, 1 + (n - layer.hot_capacity) // layer.page_size) for n in lengths]
    repeated = [max(0, n - _DISTINCT_PAGES) for n in num_pages]
    tokens = [n - r * layer.page_size for n, r in zip(lengths, repeated, strict=True)]
    k, v = (shape.random(shape.kv_heads, max(tokens)) for _ in range(2))
    is_even = min(tokens) == max(tokens)
    layer.append(k, v, None if is_even else torch.arange(max(tokens)) < torch.tensor(tokens)[:, None])
    layer.pool.reserve(sum(num_pages) + shape.batch * spare_pages)
    if any(repeated):
        repeat_pages(layer, num_pages)
    return layer


def new_layer(
    recipe: Recipe, layer_idx: int = 0, shape: Shape | None = None, layout: str | None = None
) -> PagedLayer:
    """An empty layer of a recipe's cache; codecs that have to learn learn Gaussian data of `shape`."""

    def layer_of(codecs: tuple[Codec, Codec], rope: Rope | None = None) -> PagedLayer:
        return PagedLayer(
            *codecs,
            num_sink_tokens=recipe.num_sink_tokens,
            recent_tokens=recipe.recent_tokens,
            page_size=recipe.page_size,
            layout=layout,
            rope=rope,
        )

    codecs = key, value = recipe.codecs(layer_idx)
    if shape is None or not (key.learns or value.learns):
        return layer_of(codecs)
    layer_of(codecs).page_format(shape.head_dim, torch.float16)  # which refuses what cannot be learned
    half = shape.head_dim // 2
    rope = Rope(_ROPE_BASE ** (-torch.arange(half) / half))
    return layer_of((_fitted(key, "key", shape, rope), _fitted(value, "value", shape, rope)), rope)


def _fitted(codec: Codec, site: Site, shape: Shape, rope: Rope) -> Codec:
    """The codec, calibrated where it was not: speed does not depend on what it learns."""
    if not codec.learns or codec.learned:
        return codec
    tokens = max(_DISTINCT_TOKENS, codec.centroids)
    x, gradient = torch.randn(2, shape.kv_heads, tokens, shape.head_dim)
    queries = torch.randn(shape.heads, tokens, shape.head_dim) if site == "key" else None
    return codec.calibrate(Sample(site, x, torch.arange(tokens), gradient, queries, rope))


def repeat_pages(layer: PagedLayer, num_pages: Sequence[int]) -> None:
    """Copy each sequence's pages behind one another until it has `num_pages` of them."""
    tables, hot = layer.page_lists(), layer.hot_len.tolist()
    for row, wanted in zip(tables, num_pages, strict=True):
        while missing := wanted - len(row):
            row += layer.pool.store(layer.pool.data[row[:missing]])
    layer.set_sequences(tables, hot)
