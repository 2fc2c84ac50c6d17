"""No quantization: pages hold the model's own values, through the same path as every codec."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitkv.codecs.base import Codec
from bitkv.pages import PartFormat, QuantizedTensor


@dataclass(frozen=True)
class Unquantized(Codec):
    """The model's dtype, bit for bit: 16 bits for fp16 and bf16 models, 32 for float32 ones."""

    def part_format(
        self,
        site: Literal["key", "value"],
        *,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        layout: str = "strided",
    ) -> PartFormat:
        name = str(dtype).removeprefix("torch.")
        bits = 8 * dtype.itemsize
        return PartFormat(site, bits, "token", head_dim, head_dim, page_size, name, layout)

    @property
    def native_levels(self) -> int:
        return 0  # pages hold the values themselves

    def quantize(self, x: Tensor) -> QuantizedTensor:
        return QuantizedTensor(x, None, None, "token")
