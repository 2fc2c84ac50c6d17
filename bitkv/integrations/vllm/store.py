"""One layer's blocks: tokens in, pages in the engine's cache, attention out."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from bitkv.attention import attend
from bitkv.integrations.vllm.step import Group, Step
from bitkv.packing import Packing
from bitkv.view import CacheView

CHECK = "BITKV_CHECK"
"""The environment variable that makes every step poison what it must not read."""


class Scoring(NamedTuple):
    """How scores are made of queries and keys."""

    scale: float
    softcap: float | None


class _Window(NamedTuple):
    group: Group
    hot_k: Tensor
    hot_v: Tensor


class LayerStore:
    """Tails of one layer, and its pages, which the engine owns.

    Args:
        packing: how this layer's tokens become pages.
        pages: uint8 `[num_blocks, Hkv, page_bytes or more]`.
        slots: of the tails.
        dtype: of tokens.
    """

    def __init__(self, packing: Packing, pages: Tensor, slots: int, dtype: torch.dtype) -> None:
        form = packing.format
        self.packing, self.pages = packing, pages[..., : form.page_bytes]
        shape = (slots, pages.shape[1], form.page_size, form.head_dim)
        self.tail_k, self.tail_v = (
            torch.empty(shape, dtype=dtype, device=pages.device) for _ in range(2)
        )
        self.poisons = bool(os.environ.get(CHECK))

    def run(self, step: Step, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scoring: Scoring) -> None:
        """Put tokens `[N, Hkv, D]` where they belong, and attention of `q` `[N, Hq, D]` into `out`."""
        windows = [
            _Window(g, self._own(g, k, self.tail_k), self._own(g, v, self.tail_v)) for g in step.pieces
        ]
        for group, hot_k, hot_v in windows:
            self._pack(group, hot_k, hot_v, None)
        for group, hot_k, hot_v in windows:
            self._attend(group, hot_k, hot_v, None, q, out, scoring)
            keep = group.keep
            self.tail_k[group.slots[keep]] = hot_k[keep]
            self.tail_v[group.slots[keep]] = hot_v[keep]
        if step.singles is not None:
            self._singles(step.singles, q, k, v, out, scoring)

    def _singles(
        self, group: Group, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scoring: Scoring
    ) -> None:
        """Of one token each: the tails are their hot window as they lie."""
        tokens = group.tokens.squeeze(1)
        if self.poisons:
            begun = group.slots[group.offsets == 0]
            self.tail_k[begun] = self.tail_v[begun] = torch.nan
        self.tail_k[group.slots, :, group.offsets] = k[tokens]
        self.tail_v[group.slots, :, group.offsets] = v[tokens]
        self._pack(group, self.tail_k, self.tail_v, group.slots)
        self._attend(group, self.tail_k, self.tail_v, group.slots, q, out, scoring)

    def _own(self, group: Group, new: Tensor, tails: Tensor) -> Tensor:
        """Each row's own block `[B, Hkv, page_size, D]`: tokens that the tails hold, then new ones."""
        size = self.packing.format.page_size
        held = tails[group.slots]
        if self.poisons:
            held[group.offsets == 0] = torch.nan
        index = torch.arange(size, device=new.device) - group.offsets.unsqueeze(1)
        fresh = (index >= 0) & (index < group.tokens.shape[1])
        token = group.tokens.gather(1, index.clamp(0, group.tokens.shape[1] - 1))
        return torch.where(fresh[:, None, :, None], new[token].transpose(1, 2), held)

    def _pack(self, group: Group, hot_k: Tensor, hot_v: Tensor, hot_rows: Tensor | None) -> None:
        """Write the blocks that are full; `hot_rows` as in `CacheView`."""
        for packed in group.packed:
            row = packed.row if hot_rows is None else int(hot_rows[packed.row])
            block = self.pages[packed.block].unsqueeze(0)
            self.packing.encode(hot_k[row], hot_v[row], block, first_token=packed.first_token)

    def _attend(
        self,
        group: Group,
        hot_k: Tensor,
        hot_v: Tensor,
        hot_rows: Tensor | None,
        q: Tensor,
        out: Tensor,
        scoring: Scoring,
    ) -> None:
        view = CacheView(
            self.packing.format,
            self.pages,
            group.block_table,
            group.packed_len,
            hot_k,
            hot_v,
            group.hot_len,
            0,
            self.packing.key_shared,
            self.packing.value_shared,
            None if hot_rows is None else hot_rows.int(),
        )
        queries = q[group.tokens].transpose(1, 2).contiguous()
        found, _ = attend(
            queries, view, scale=scoring.scale, softcap=scoring.softcap, positions=group.positions
        )
        found = found.transpose(1, 2)
        if group.positions is None:
            out[group.tokens] = found
        else:
            real = group.positions >= 0
            out[group.tokens[real]] = found[real]
