"""What a codec is: a frozen dataclass that turns a tensor into codes and back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from bitkv.pages import PartFormat, QuantizedTensor


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

    def dequantize(self, q: QuantizedTensor) -> Tensor:
        """Float32 values `[..., page_size, head_dim]`."""
        return q.dequantize()

    def calibrate(self, sample: Tensor) -> Self:
        """A codec fitted to `sample` `[..., T, D]`; itself where there is nothing to learn."""
        return self
