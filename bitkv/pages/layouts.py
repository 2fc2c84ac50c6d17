"""Orders of codes inside a page: with codebook.py the only place that shifts bits in Python."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BITS = 16
MIN_WORDS_PER_ROW = 16  # the contraction depth of a 16-bit tensor-core instruction
LANES = 16  # rows side by side in a vector of the layout "lanes"

_RAW_WORDS = {16: torch.int16, 32: torch.int32}


class Layout(NamedTuple):
    """An order of codes inside a page: `pack` takes uint8 `[..., rows, columns]` to bytes and back.

    Both get the bits as well. From 16 bits on values are unquantized, and
    come back as integers of their width.
    """

    pack: Callable[[Tensor, int], Tensor]
    unpack: Callable[[Tensor, int, int, int], Tensor]


def folds_of(columns: int, bits: int) -> int:
    """How many rows share a row of words: the fewest that fill `MIN_WORDS_PER_ROW` words."""
    folds = 1
    while columns * bits * folds < MIN_WORDS_PER_ROW * WORD_BITS:
        folds *= 2
    return folds


def _strided_pack(codes: Tensor, bits: int) -> Tensor:
    """Code position j of word w of a row is column `j * words + w`; folded rows take later positions.

    A masked row of words is then one contiguous slice of columns, an MMA operand as it stands.
    """
    if bits >= WORD_BITS:
        return codes.contiguous().view(torch.uint8).flatten(-2)
    rows, columns = codes.shape[-2:]
    folds = folds_of(columns, bits)
    per_row = WORD_BITS // (bits * folds)
    x = torch.unflatten(codes, -2, (folds, rows // folds))
    x = torch.unflatten(x, -1, (per_row, columns // per_row))
    x = x.movedim(-2, -3).flatten(-4, -3).int()  # [..., positions, rows/folds, words]
    shifts = torch.arange(0, WORD_BITS, bits, device=codes.device, dtype=torch.int32)
    words = (x << shifts[:, None, None]).sum(-3).to(torch.int16)
    return words.contiguous().view(torch.uint8).flatten(-2)


def _strided_unpack(data: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    if bits >= WORD_BITS:
        return torch.unflatten(data.contiguous().view(_RAW_WORDS[bits]), -1, (rows, columns))
    folds = folds_of(columns, bits)
    per_row = WORD_BITS // (bits * folds)
    words = torch.unflatten(data.contiguous().view(torch.int16), -1, (rows // folds, -1))
    shifts = torch.arange(0, WORD_BITS, bits, device=data.device, dtype=torch.int16)
    # the shift is arithmetic: the mask removes the sign bits it drags in
    x = (words.unsqueeze(-3) >> shifts[:, None, None]) & (2**bits - 1)
    x = torch.unflatten(x.to(torch.uint8), -3, (folds, per_row)).movedim(-3, -2)
    return x.flatten(-2).flatten(-3, -2)


def _lanes_pack(codes: Tensor, bits: int) -> Tensor:
    """Blocks of 16 rows, one in each lane of a 64-byte vector; csrc/page.h says where each code lies.

    Four neighbouring columns of 16 rows then meet four numbers in one byte dot product.
    """
    codes = torch.unflatten(codes, -2, (-1, LANES))  # [..., blocks, lanes, columns]
    if bits >= WORD_BITS:
        return codes.transpose(-1, -2).contiguous().view(torch.uint8).flatten(-3)
    whole = codes.shape[-1] * bits // 32 * 32 // bits
    x = torch.unflatten(codes[..., :whole], -1, (-1, 8 // bits, 4))
    vectors = join_bits(x.movedim(-4, -3), bits).flatten(-4)  # of [..., blocks, n, lanes, positions, 4]
    if whole == codes.shape[-1]:
        return vectors
    # 16 columns of 1 bit are left over: two neighbouring blocks share a vector
    x = torch.unflatten(torch.unflatten(codes[..., whole:], -1, (4, 4)), -4, (-1, 2))
    tail = join_bits(x.movedim(-4, -3).flatten(-3, -2), bits).flatten(-3)
    return torch.cat([vectors, tail], dim=-1)


def _lanes_unpack(data: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    blocks = rows // LANES
    if bits >= WORD_BITS:
        words = data.contiguous().view(_RAW_WORDS[bits])
        return torch.unflatten(words, -1, (blocks, columns, LANES)).transpose(-1, -2).flatten(-3, -2)
    whole = columns * bits // 32 * 32 // bits
    sizes = [rows * whole * bits // 8, rows * (columns - whole) * bits // 8]
    vectors, tail = torch.split(data, sizes, dim=-1)
    x = torch.unflatten(vectors, -1, (blocks, whole * bits // 32, LANES, 4))
    codes = split_bits(x, bits).movedim(-4, -3).flatten(-3)  # [..., blocks, lanes, columns]
    if whole < columns:
        x = split_bits(torch.unflatten(tail, -1, (blocks // 2, LANES, 4)), bits)
        x = torch.unflatten(x, -2, (2, 4)).movedim(-3, -4)  # [..., pairs, 2, lanes, positions, 4]
        codes = torch.cat([codes, x.flatten(-2).flatten(-4, -3)], dim=-1)
    return codes.flatten(-3, -2)


def join_bits(x: Tensor, bits: int) -> Tensor:
    """Bytes `[..., k]` of codes `[..., 8 / bits, k]`, the first in the lowest bits."""
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    joined: Tensor = (x << shifts[:, None]).sum(-2, dtype=torch.uint8)
    return joined


def split_bits(x: Tensor, bits: int) -> Tensor:
    """Inverse of `join_bits`."""
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    codes: Tensor = (x.unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)
    return codes


LAYOUTS: dict[str, Layout] = {
    "strided": Layout(_strided_pack, _strided_unpack),
    "lanes": Layout(_lanes_pack, _lanes_unpack),
}
"""Every known order of codes. Files always hold the first one."""


def layout_for(device: torch.device) -> str:
    """The order of codes that attention on a device reads fastest."""
    return "lanes" if device.type == "cpu" else "strided"
