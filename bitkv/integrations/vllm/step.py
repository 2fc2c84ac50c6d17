"""What one step of the engine asks of attention, as tensors that all layers share.

A query sees the tokens of earlier blocks packed and those of its own block exactly. So what it sees
depends on its place in the sequence alone: not on how a prompt was cut into chunks, nor on who else is
served, nor on whether blocks were found in the prefix cache or computed again after a preemption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bitkv.integrations.vllm.tails import Tails


@dataclass(frozen=True)
class Packed:
    """A block that is full, and the place of its first token in its sequence."""

    row: int  # of the group
    block: int
    first_token: int


@dataclass(frozen=True)
class Group:
    """Queries that attention takes at once: some of a block for each of B rows.

    Args:
        tokens: int64 `[B, Tq]`, which tokens of the step; rows with fewer repeat their first.
        positions: int64 `[B, Tq]`, their places in sequences, -1 behind a row's last; None: all there.
        slots: int64 `[B]`, of the tails.
        offsets: int64 `[B]`, of the first query in its block.
        packed_len, hot_len: int32 `[B]`, tokens in earlier blocks, and in the own one with queries.
        block_table: int32 `[B, width]`.
        packed: blocks that these tokens make full.
        keep: rows whose blocks stay unfinished.
    """

    tokens: Tensor
    positions: Tensor | None
    slots: Tensor
    offsets: Tensor
    packed_len: Tensor
    hot_len: Tensor
    block_table: Tensor
    packed: tuple[Packed, ...]
    keep: Tensor


@dataclass(frozen=True)
class Step:
    """Groups of one step: of single tokens, whose blocks lie in the tails, and of pieces of prompts."""

    singles: Group | None
    pieces: tuple[Group, ...]


@dataclass(frozen=True)
class _Piece:
    request: int
    token: int  # of the step
    first: int  # place in the sequence
    count: int
    slot: int
    block: int


def plan(starts: Sequence[int], lengths: Sequence[int], table: Tensor, tails: Tails) -> Step:
    """Cut the tokens of a step at the bounds of blocks.

    Args:
        starts: `[B + 1]`, where in the step each request's tokens begin.
        lengths: `[B]`, tokens of each sequence when the step is over.
        table: int32 `[B, width]`, the blocks of each sequence.
        tails: takes the step's slots.

    Raises:
        StaleSlot: a block that a request goes on with has lost its tokens.
    """
    size = tails.page_size
    counts = [end - begin for begin, end in pairwise(starts)]
    firsts = [(stop - count) // size for stop, count in zip(lengths, counts, strict=True)]
    tails.begin_step(int(table[i, first]) for i, first in enumerate(firsts) if counts[i])
    singles: list[_Piece] = []
    pieces: list[_Piece] = []
    for request, (stop, count) in enumerate(zip(lengths, counts, strict=True)):
        if not count:
            continue
        token, start = starts[request], stop - count
        blocks = table[request, firsts[request] : (stop - 1) // size + 1].tolist()
        slot = tails.advance(blocks, start, stop)
        for block in blocks:
            many = min(size - start % size, stop - start)
            piece = _Piece(request, token, start, many, slot, block)
            (singles if count == 1 else pieces).append(piece)
            token, start = token + many, start + many
    full = [p for p in pieces if p.count == size]
    rest = [p for p in pieces if p.count < size]
    groups = tuple(_group(some, table, size) for some in (full, rest) if some)
    return Step(_group(singles, table, size) if singles else None, groups)


def _group(pieces: Sequence[_Piece], table: Tensor, size: int) -> Group:
    most = max(p.count for p in pieces)
    index = torch.arange(most)
    count, token, first = (
        torch.tensor([getattr(p, name) for p in pieces]).unsqueeze(1)
        for name in ("count", "token", "first")
    )
    real = index < count
    offsets = first.squeeze(1) % size
    hot_len = offsets + count.squeeze(1)
    return Group(
        tokens=token + torch.where(real, index, 0),
        positions=None if bool(real.all()) else torch.where(real, first + index, -1),
        slots=torch.tensor([p.slot for p in pieces]),
        offsets=offsets,
        packed_len=(first.squeeze(1) - offsets).int(),
        hot_len=hot_len.int(),
        block_table=table[[p.request for p in pieces]].int(),
        packed=tuple(
            Packed(row, p.block, p.first // size * size)
            for row, p in enumerate(pieces)
            if (p.first + p.count) % size == 0
        ),
        keep=(hot_len < size).nonzero().squeeze(1),
    )
