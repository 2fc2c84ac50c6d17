"""How GPU kernels cut pages into tiles. Everything here is known when a kernel is compiled."""

import math
from dataclasses import dataclass

from bitkv.attention.lookups import Lookup
from bitkv.pages import WORD_BITS, AffineFormat

HOT_TOKENS = 16  # of the hot window, that a program takes at a time


def power_of_two(n: int) -> int:
    """The extent of a tile that holds n rows or words; tensor cores want 16."""
    return max(16, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Tiling:
    """One half of a page of the layout "strided": 16-bit words `[rows / folds, words]`, cut into tiles.

    A word holds `slots` codes of each of `folds` rows: code `fold * slots + slot` of word w in row r is
    column `slot * words + w` of row `fold * rows / folds + r`. A tile is a few rows of codes that share
    their scales; tiles are numbered as their rows are, so that tile t has fold `t // tiles` of the words
    in the rows of tile `t % tiles`. Unquantized values are their own words.

    Args:
        bits, rows, columns: of the codes.
        folds, slots, words: see above.
        tile, tiles: rows of a tile, tiles in a fold.
        group: elements that share a scale.
        by_row: each row has scales of its own (keys per token); else each column has.
        scale_offset, zero_offset: bytes before the scales and before the zero points.
    """

    bits: int
    rows: int
    columns: int
    folds: int
    slots: int
    words: int
    tile: int
    tiles: int
    group: int
    by_row: bool
    scale_offset: int
    zero_offset: int

    @staticmethod
    def of(part: AffineFormat, limit: int) -> "Tiling":
        """The tiling of a part into tiles of up to `limit` rows."""
        slots = 1 if part.is_raw else WORD_BITS // (part.bits * part.folds)
        by_row = part.site == "key" and part.granularity == "token"
        rows = part.rows // part.folds
        tile = rows if part.is_raw or by_row else math.gcd(part.group_size, rows, limit)
        return Tiling(
            bits=part.bits,
            rows=part.rows,
            columns=part.columns,
            folds=part.folds,
            slots=slots,
            words=part.columns // slots,
            tile=tile,
            tiles=rows // tile,
            group=part.rows if part.is_raw else part.group_size,
            by_row=by_row,
            scale_offset=part.code_bytes,
            zero_offset=part.code_bytes + 2 * part.num_groups,
        )

    is_coded = False  # by indices

    @staticmethod
    def plain(rows: int) -> "Tiling":
        """One tile of rows that no page holds."""
        return Tiling(WORD_BITS, rows, 1, 1, 1, 1, rows, 1, rows, False, 0, 0)

    @property
    def is_raw(self) -> bool:
        return self.bits >= WORD_BITS

    @property
    def all_tiles(self) -> int:
        return self.folds * self.tiles

    @property
    def padded_tile(self) -> int:
        return power_of_two(self.tile)

    @property
    def padded_words(self) -> int:
        return power_of_two(self.words)

    @property
    def padded_columns(self) -> int:
        return power_of_two(self.columns)

    @property
    def groups(self) -> int:
        """Groups along rows, or along columns where each row has scales of its own."""
        return (self.columns if self.by_row else self.rows) // self.group

    @property
    def middle(self) -> float:
        """Half-way between the smallest and the largest code."""
        return ((1 << self.bits) - 1) / 2

    @property
    def two_terms(self) -> bool:
        """Whether scaled queries need more than the eleven bits of a float16.

        Of two levels one is a zero point, a float16: attention in 16 bits knows it exactly, and rounds
        half as much as a scaled query does.
        """
        return self.bits == 1 and self.group > 32 and not self.by_row

    @property
    def uniform(self) -> bool:
        """Whether all tiles have the same scales and the same unit."""
        return self.groups == 1 and self.folds <= 2

    def scale_at(self, group: int, slot: int = 0) -> int:
        """Bytes before the scales of a group, or those that a slot's columns have there."""
        return self.scale_offset + 2 * (
            group * (self.rows if self.by_row else self.columns) + slot * self.words
        )

    def zero_at(self, group: int, slot: int = 0) -> int:
        return self.scale_at(group, slot) + self.zero_offset - self.scale_offset

    def group_of(self, tile: int) -> int:
        return tile * self.tile // self.group

    def position(self, tile: int, slot: int) -> int:
        """The lowest bit of a tile's codes in their words."""
        return (tile // self.tiles * self.slots + slot) * self.bits

    def slot_unit(self, slot: int) -> float:
        """What codes of a slot are multiples of, besides `tile_unit`, once they are masked."""
        return 2.0 ** (slot * self.bits % 8)

    def tile_unit(self, tile: int) -> float:
        """The same for a tile: a float16 with code c in its low bits is c * 2**-24."""
        return 1.0 if self.is_raw else float(2.0 ** (self.position(tile, 0) % 8 - 24))

    def meets(self, slot: int, group: int) -> bool:
        """Whether a slot's columns and a group of columns have some in common."""
        low, high = slot * self.words, (slot + 1) * self.words
        return low < (group + 1) * self.group and group * self.group < high


@dataclass(frozen=True)
class Variant:
    """What distinguishes one compiled kernel from another.

    Args:
        page_size, head_dim: tokens of a page, channels of a head.
        columns: queries of a tile.
        causal: whether queries are the newest tokens and see those up to their own.
        window, softcap: whether there is one.
        assembly: whether codes are masked by inline assembly of NVIDIA's.
        overlaps: whether the merge may start while splits end.
        interpreted: whether Triton's interpreter runs the kernel.
        maps_queries: whether pages meet other queries than the hot window.
        map_heads, map_width: of the linear map from sums over pages to sums of values; 0 for none.
    """

    keys: Tiling | Lookup
    values: Tiling | Lookup
    page_size: int
    head_dim: int
    page_bytes: int
    value_offset: int
    columns: int
    causal: bool
    window: bool
    softcap: bool
    assembly: bool
    overlaps: bool
    interpreted: bool
    maps_queries: bool = False
    map_heads: int = 0
    map_width: int = 0

    @property
    def outputs(self) -> Tiling | Lookup:
        """Tiles of the output: those of values, unless a linear map mixes their channels."""
        return Tiling.plain(self.head_dim) if self.map_width else self.values

    @property
    def map_stride(self) -> int:
        """Numbers from a head's linear map to the next one's."""
        return self.head_dim * self.map_width if self.map_heads > 1 else 0

    @property
    def padded_head_dim(self) -> int:
        return power_of_two(self.head_dim)
