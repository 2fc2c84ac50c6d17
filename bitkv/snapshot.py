"""A layer as plain tensors and back: what a cache file holds of it."""

import torch
from torch import Tensor

from bitkv.layer import PagedLayer
from bitkv.pages import LAYOUTS, convert

_LAYOUT = next(iter(LAYOUTS))  # of files, whatever the layer's own


def state(layer: PagedLayer) -> dict[str, Tensor]:
    """Tensors that hold a layer: used pages only, the table renumbered to match."""
    if layer.is_empty:
        return {}
    lists = layer.page_lists()
    used = sorted({page for row in lists for page in row})
    number = {page: i for i, page in enumerate(used)}
    longest = int(layer.hot_len.max())
    # what lies beyond a sequence's end is stale or was never written, and stays out of files
    beyond = torch.arange(longest, device=layer.hot_k.device) >= layer.hot_len[:, None]
    hot_k, hot_v = (
        x[:, :, :longest].masked_fill(beyond[:, None, :, None], 0) for x in (layer.hot_k, layer.hot_v)
    )
    return {
        "pages": convert(layer.pool.data[used], layer.format, layer.format.with_layout(_LAYOUT)),
        "block_table": _table([[number[page] for page in row] for row in lists]),
        "packed_len": layer.packed_len,
        "hot_len": layer.hot_len,
        "hot_k": hot_k,
        "hot_v": hot_v,
    }


def restore(layer: PagedLayer, state: dict[str, Tensor]) -> None:
    """Make a layer what `state` describes.

    Raises:
        ValueError: the tensors do not fit this layer's recipe or one another.
    """
    layer.reset()
    if not state:
        return
    hot_k, pages = state["hot_k"], state["pages"]
    counts = (state["packed_len"] // layer.page_size).tolist()
    rows = [row[:n] for row, n in zip(state["block_table"].tolist(), counts, strict=True)]
    page_bytes = layer.page_format(hot_k.shape[3], hot_k.dtype).page_bytes
    consistent = (
        state["hot_v"].shape == hot_k.shape
        and pages.shape[1:] == (hot_k.shape[1], page_bytes)
        and hot_k.shape[2] <= layer.hot_capacity
        and max(state["hot_len"].tolist(), default=0) <= hot_k.shape[2]
        and all(len(row) == n for row, n in zip(rows, counts, strict=True))
        and all(0 <= page < len(pages) for row in rows for page in row)
    )
    if not consistent:
        raise ValueError("the saved tensors do not fit this recipe's pages; the file is damaged")
    layer.allocate(hot_k)
    _fill(layer, state, rows)


def _fill(layer: PagedLayer, state: dict[str, Tensor], rows: list[list[int]]) -> None:
    pages = convert(state["pages"], layer.format.with_layout(_LAYOUT), layer.format)
    numbers = layer.pool.store(pages)
    layer.pool.acquire([numbers[page] for row in rows for page in row])
    layer.pool.release(numbers)  # the table now holds the only references
    layer.set_sequences([[numbers[page] for page in row] for row in rows], state["hot_len"].tolist())
    longest = state["hot_k"].shape[2]
    layer.hot_k[:, :, :longest] = state["hot_k"]
    layer.hot_v[:, :, :longest] = state["hot_v"]


def _table(rows: list[list[int]]) -> Tensor:
    """Rows of page numbers, padded with 0: int32 `[B, max_pages]`."""
    table = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int32)
    for b, row in enumerate(rows):
        table[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return table
