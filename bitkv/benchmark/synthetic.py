"""Caches of any length in moments: Gaussian keys and values in real pages.

A few pages are quantized for real and their bytes repeated, each page in its own memory, so that a long
context weighs what it should and every byte of it is valid.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitkv.layer import PagedLayer
from bitkv.pages import RAW_DTYPES
from bitkv.recipe import Recipe

_DISTINCT_PAGES = 8
_DISTINCT_TOKENS = 1024


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

    def random(self, heads: int, tokens: int, dtype: str | None = None) -> Tensor:
        """Gaussian `[batch, heads, tokens, head_dim]`, repeated along a long context."""
        distinct = torch.randn(self.batch, heads, min(tokens, _DISTINCT_TOKENS), self.head_dim)
        values = distinct.to(RAW_DTYPES[dtype or self.dtype])
        return values[:, :, torch.arange(tokens) % values.shape[2]]

    def nbytes(self, tokens: int, dtype: str | None = None) -> int:
        """Bytes of K and V of so many tokens."""
        elements = 2 * self.batch * self.kv_heads * tokens * self.head_dim
        return elements * RAW_DTYPES[dtype or self.dtype].itemsize


def synthetic_layer(recipe: Recipe, shape: Shape, context: int, *, spare_pages: int = 0) -> PagedLayer:
    """Layer 0 of a recipe's cache with `context` tokens a sequence, as appending them would leave it.

    Args:
        spare_pages: room for that many more pages a sequence, so that appends need not grow the pool.

    Raises:
        ValueError: the recipe's codecs cannot serve the shape.
    """
    key, value = recipe.codecs(0)
    layer = PagedLayer(
        key,
        value,
        num_sink_tokens=recipe.num_sink_tokens,
        recent_tokens=recipe.recent_tokens,
        page_size=recipe.page_size,
    )
    num_pages = max(0, 1 + (context - layer.hot_capacity) // layer.page_size)
    repeated = max(0, num_pages - _DISTINCT_PAGES)
    tokens = context - repeated * layer.page_size
    layer.append(shape.random(shape.kv_heads, tokens), shape.random(shape.kv_heads, tokens))
    layer.pool.reserve(shape.batch * (num_pages + spare_pages))
    if repeated:
        _repeat_pages(layer, num_pages)
    return layer


def _repeat_pages(layer: PagedLayer, num_pages: int) -> None:
    """Copy each sequence's pages behind one another until it has `num_pages`."""
    tables, hot = layer.page_lists(), layer.hot_len.tolist()
    for row in tables:
        source = layer.pool.data[row]
        while missing := num_pages - len(row):
            row += layer.pool.store(source[:missing])
    layer.set_sequences(tables, hot)
