"""Quantize and pack on GPUs, in Triton: the bytes of affine.py and `AffineFormat.pack` in one pass.

A program takes some lanes of one part of one page: it fits their groups, turns them into codes and
writes words. The layout is "strided" (`bitkv.pages`), so a program's lanes are one piece of each stretch
of columns that share words.

Importing this module needs Triton; `bitkv.codecs.compiled` does so when it meets tensors on a GPU.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from bitkv.codecs.triton_kernels import encode_pages
from bitkv.pages import WORD_BITS, AffineFormat

_ELEMENTS = 4096  # of a program's tile; a search keeps weights and codes beside it, and gets half
_CLIPS = {1: (1.0,), 2: (0.95, 0.8, 0.65, 0.5), 4: (1.0, 0.9, 0.75), 8: (1.0,)}  # affine.py's


@dataclass(frozen=True)
class Tiling:
    """How programs cut one part of a page: the constants that a kernel is compiled for.

    Numbers that share a scale run along the *extent*, and *lanes* lie across it. Keys per channel have
    tokens as extent and channels as lanes; what has scales per token has them the other way round.

    Args:
        bits, levels, size, groups: of codes; 0 minmax, 1 mse, 2 unbiased; a group's elements; groups
            along the extent.
        by_channel: lanes are channels.
        outer, span: lanes `o * span + i` share words for all `o < outer`.
        block: how many `i` a program takes.
        passes, stretch: elements `p * stretch + e` of the extent share words for all `p < passes`.
        outer_shift, pass_shift: bits by which `o` and `p` move a code within its word.
        span_words, stretch_words: words between neighbouring `i`, and neighbouring `e`.
        code_words: 16-bit words of codes in the part, where its scales begin.
    """

    bits: int
    levels: int
    size: int
    groups: int
    by_channel: bool
    outer: int
    span: int
    block: int
    passes: int
    stretch: int
    outer_shift: int
    pass_shift: int
    span_words: int
    stretch_words: int
    code_words: int

    @property
    def num_blocks(self) -> int:
        """Programs a part needs."""
        return -(-self.span // self.block)

    @property
    def padded(self) -> tuple[int, int]:
        """Groups and a group's elements as a tile has them: powers of two."""
        return triton.next_power_of_2(self.groups), triton.next_power_of_2(self.size)

    @property
    def num_warps(self) -> int:
        """Eight numbers of a search a thread, or 32 that are only rounded."""
        return 8 if self.levels else 4

    @property
    def clips(self) -> tuple[float, ...]:
        """Ranges that a search starts from."""
        return _CLIPS[self.bits]


@cache
def tiling(form: AffineFormat, levels: int) -> Tiling:
    """The tiling of a part in the layout "strided"."""
    row_scales = form.site == "key" and form.granularity == "token"
    positions = max(1, WORD_BITS // (form.bits * form.folds))
    by_fold = (form.folds, form.rows // form.folds, positions * form.bits)
    by_position = (positions, form.columns // positions, form.bits)
    outer, inner = (by_fold, by_position) if row_scales else (by_position, by_fold)
    extent = form.columns if row_scales else form.rows
    size = extent if form.is_raw else form.group_size
    words = form.columns // positions
    elements = _ELEMENTS // 2 if levels else _ELEMENTS
    group, element = triton.next_power_of_2(extent // size), triton.next_power_of_2(size)
    return Tiling(
        bits=form.bits,
        levels=levels,
        size=size,
        groups=extent // size,
        by_channel=form.site == "key" and not row_scales,
        outer=outer[0],
        span=outer[1],
        block=max(1, min(triton.next_power_of_2(outer[1]), elements // (outer[0] * group * element))),
        passes=inner[0],
        stretch=inner[1],
        outer_shift=outer[2],
        pass_shift=inner[2],
        span_words=words if row_scales else 1,
        stretch_words=1 if row_scales else words,
        code_words=form.code_bytes // 2,
    )


def encode(x: Tensor, form: AffineFormat, levels: int, out: Tensor) -> None:
    """Write pages `x` `[n, H, page_size, head_dim]` as bytes `out` `[n, H, nbytes]`.

    Args:
        x: its channels lie side by side.
        form: of the layout "strided".
        levels: `Codec.native_levels`.
    """
    tiles = tiling(form, levels)
    words = out.view(word_dtype(form))
    encode_pages[(x.shape[0] * x.shape[1] * tiles.num_blocks,)](
        x,
        words,
        x.shape[1],
        *x.stride()[:3],
        *words.stride()[:2],
        tiles,
        num_warps=tiles.num_warps,
    )


def word_dtype(form: AffineFormat) -> torch.dtype:
    """What kernels write a part in: values of 32 bits are words of their own."""
    return torch.int32 if form.bits > WORD_BITS else torch.int16
