"""How GPU kernels read pages of indices into codebooks, and the tables that they need beside these."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bitkv.pages import CodebookFormat

_SMALLEST = 16  # extent of a tile that tensor cores take


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Lookup:
    """One half of a page of indices, decoded some tokens at a time; known when a kernel is compiled.

    The numbers of a token lie in `parts` tiles of columns: one, or for keys that have to be turned two,
    whose columns turn in pairs. A tile has `padded_groups` groups of `padded_channels` columns; what is
    padded is zero.

    Args:
        planes: bits of each plane of indices, see `CodebookFormat`.
        channels: that share an index.
        indices: of a token.
        entries: of a codebook.
        rows: tokens of a page.
        tile: tokens decoded at a time.
        scales: 0, 1 (a scale for each token) or 2 (a zero point too).
        book_heads, book_groups: codebooks along either axis, 1 for one that serves all.
        parts: see above.
    """

    planes: tuple[int, ...]
    channels: int
    indices: int
    entries: int
    rows: int
    tile: int
    scales: int
    book_heads: int
    book_groups: int
    parts: int

    @staticmethod
    def of(part: CodebookFormat, tile: int, codebook: Tensor, *, turned: bool) -> "Lookup":
        """Of a part with a codebook `[heads, groups, entries, channels]`, `tile` tokens at a time."""
        heads, groups, entries, _ = codebook.shape
        return Lookup(
            planes=tuple(part.planes),
            channels=part.channels,
            indices=part.groups,
            entries=entries,
            rows=part.page_size,
            tile=min(tile, part.page_size),
            scales=part.scales,
            book_heads=heads,
            book_groups=groups,
            parts=2 if turned else 1,
        )

    is_raw = False
    is_coded = True
    # of values: one tile of outputs in their own units, which zero points shift together
    all_tiles, groups = 1, 1

    @property
    def tiles(self) -> int:
        """Tiles of tokens."""
        return self.rows // self.tile

    @property
    def part_groups(self) -> int:
        return self.indices // self.parts

    @property
    def padded_channels(self) -> int:
        return _power_of_two(self.channels)

    @property
    def padded_groups(self) -> int:
        return max(_power_of_two(self.part_groups), _SMALLEST // self.padded_channels)

    @property
    def padded_tile(self) -> int:
        """Columns of a tile."""
        return self.padded_groups * self.padded_channels

    @property
    def book_stride(self) -> int:
        """Numbers from a head's codebooks to the next one's."""
        return self.book_groups * self.entries * self.padded_channels if self.book_heads > 1 else 0

    @property
    def group_stride(self) -> int:
        """Numbers from a group's codebook to the next one's."""
        return self.entries * self.padded_channels if self.book_groups > 1 else 0

    @property
    def num_planes(self) -> int:
        return len(self.planes)

    def plane_bytes(self, plane: int) -> int:
        """Of a group."""
        return self.rows * self.planes[plane] // 8

    def plane_at(self, plane: int) -> int:
        """Bytes before a plane."""
        return sum(self.indices * self.plane_bytes(i) for i in range(plane))

    def plane_shift(self, plane: int) -> int:
        """The lowest bit of an index that a plane holds."""
        return sum(self.planes[:plane])

    def scale_at(self, which: int) -> int:
        """Bytes before the scales (0) or the zero points (1)."""
        return self.plane_at(self.num_planes) + 2 * self.rows * which

    def tile_unit(self, _: int) -> float:
        return 1.0

    def group_of(self, _: int) -> int:
        return 0


_made: MutableMapping[Tensor, dict[Any, Tensor]] = WeakIdKeyDictionary()


def _made_of(x: Tensor, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """What was made of a tensor before, kept as long as it: nobody changes what pages share."""
    known = _made.setdefault(x, {})
    if key not in known:
        known[key] = make()
    return known[key]


def book_of(codebook: Tensor) -> Tensor:
    """A codebook in float16, `[heads, groups, entries, padded_channels]`."""

    def make() -> Tensor:
        channels = codebook.shape[3]
        return torch.nn.functional.pad(
            codebook.half(), (0, _power_of_two(channels) - channels)
        ).contiguous()

    return _made_of(codebook, "book", make)


def turns_of(inv_freq: Tensor, factor: float, page_size: int) -> Tensor:
    """Cosines and sines of a page's tokens seen from its first one, times a factor.

    Returns:
        Float16 `[2, page_size, pairs]`.
    """

    def make() -> Tensor:
        token = torch.arange(page_size, device=inv_freq.device)
        return (factor * _cos_sin(token, inv_freq)).half()

    return _made_of(inv_freq, ("turns", factor, page_size), make)


def starts_of(inv_freq: Tensor, num_sink_tokens: int, page_size: int, num_pages: int) -> Tensor:
    """Cosines and sines of the first tokens of a sequence's pages.

    Returns:
        Float32 `[at least num_pages, 2, pairs]`.
    """
    size = _power_of_two(max(num_pages, 1))

    def make() -> Tensor:
        token = num_sink_tokens + page_size * torch.arange(size, device=inv_freq.device)
        return _cos_sin(token, inv_freq).transpose(0, 1).float().contiguous()

    return _made_of(inv_freq, ("starts", num_sink_tokens, page_size, size), make)


def _cos_sin(token: Tensor, inv_freq: Tensor) -> Tensor:
    """In double `[2, tokens, pairs]`: a float32 angle at a million tokens is off by 0.03."""
    angle = token[:, None].double() * inv_freq.double()
    return torch.stack([angle.cos(), angle.sin()])
