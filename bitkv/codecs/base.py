"""What a codec is: a frozen dataclass that turns a tensor into codes and back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from bitkv.codecs.compiled import encode_natively
from bitkv.pages import PartFormat, QuantizedTensor

_PAGES_AT_ONCE = 16  # quantized together: bounds the float32 temporaries of a long prompt


@dataclass(frozen=True)
class Codec(ABC):
    """A quantization method for keys or values. Its `repr` is its text in recipes and results."""

    @abstractmethod
    def part_format(
        self,
        site: Literal["key", "value"],
        *,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        layout: str = "strided",
    ) -> PartFormat:
        """The bytes this codec makes of a page of a model whose tensors are `dtype`.

        Raises:
            ValueError: the codec cannot serve this shape.
        """

    @abstractmethod
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """Codes of `x`, shape `[..., page_size, head_dim]`."""

    def encode(self, x: Tensor, form: PartFormat, out: Tensor | None = None) -> Tensor:
        """Bytes `[n, H, nbytes]` of pages of tokens `x` `[n, H, page_size, head_dim]`.

        Args:
            form: the codec's own `part_format`.
            out: where to write them.
        """
        if out is None:
            out = x.new_empty(*x.shape[:2], form.nbytes, dtype=torch.uint8)
        if not encode_natively(x, form, self.native_levels, out):
            for i in range(0, len(x), _PAGES_AT_ONCE):
                span = slice(i, i + _PAGES_AT_ONCE)
                out[span] = form.pack(self.quantize(x[span]))
        return out

    @property
    def native_levels(self) -> int | None:
        """Its levels as native kernels count them (`Levels` in csrc/kernels.h); None: they have none."""
        return None

    def dequantize(self, q: QuantizedTensor) -> Tensor:
        """Float32 values `[..., page_size, head_dim]`."""
        return q.dequantize()

    def calibrate(self, sample: Tensor) -> Self:
        """A codec fitted to `sample` `[..., T, D]`; itself where there is nothing to learn."""
        return self
