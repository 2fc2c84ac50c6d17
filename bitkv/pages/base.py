"""What every half of a page is: bytes that become numbers again."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Literal, Protocol, Self

from torch import Tensor

from bitkv.pages.layouts import LAYOUTS

Site = Literal["key", "value"]

PAGE_SIZES = (64, 128)


class Quantized(Protocol):
    """What a codec makes of `[..., T, D]` and what a page part holds."""

    def dequantize(self, codebook: Tensor | None = None) -> Tensor:
        """Float32 `[..., T, D]`; `codebook` is `Shared.codebook` where codes are indices into one."""
        ...


class PartFormat(ABC):
    """The bytes of the key half or the value half of a page; its kinds are frozen dataclasses.

    Args:
        site: "key" or "value".
        head_dim, page_size: channels of a head, tokens of a page.
        layout: the order of codes, a key of `LAYOUTS`.

    Raises:
        ValueError: a combination that does not pack, with the remedy.
    """

    site: Site
    head_dim: int
    page_size: int
    layout: str

    def _check_shape(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size {self.page_size} is not supported; use 64 or 128")
        if self.head_dim < 16 or self.head_dim % 16:
            raise ValueError(f"head_dim {self.head_dim} does not pack; it must be a multiple of 16")
        for name, names in (("site", ("key", "value")), ("layout", tuple(LAYOUTS))):
            if getattr(self, name) not in names:
                raise ValueError(f"no {name} {getattr(self, name)!r}; choose from {', '.join(names)}")

    @property
    @abstractmethod
    def code_bits(self) -> float:
        """Bits of codes an element, without what is stored beside them."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of a page of one KV head."""

    @property
    @abstractmethod
    def numbers(self) -> tuple[int, ...]:
        """What native kernels take."""

    @abstractmethod
    def pack(self, q: Any) -> Tensor:
        """Bytes `[..., nbytes]` of one page of codes."""

    @abstractmethod
    def unpack(self, data: Tensor) -> Quantized:
        """Inverse of `pack`."""

    @property
    def bits_per_element(self) -> float:
        """Measured from bytes: scales, zero points and whatever else a page stores included."""
        return 8 * self.nbytes / (self.page_size * self.head_dim)

    def with_layout(self, layout: str) -> Self:
        """The same part with its codes in another order."""
        same: Self = replace(self, layout=layout)  # type: ignore[type-var]
        return same
