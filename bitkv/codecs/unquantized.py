"""No quantization: pages hold the model's own values, through the same path as every codec."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitkv.codecs.base import Codec
from bitkv.pages import AffineFormat, QuantizedTensor, Site
from bitkv.shared import PLAIN, Shared


@dataclass(frozen=True)
class Unquantized(Codec):
    """The model's dtype, bit for bit: 16 bits for fp16 and bf16 models, 32 for float32 ones."""

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> AffineFormat:
        name = str(dtype).removeprefix("torch.")
        bits = 8 * dtype.itemsize
        return AffineFormat(site, bits, "token", head_dim, head_dim, page_size, name, layout)

    @property
    def native_levels(self) -> int:
        return 0  # pages hold the values themselves

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> QuantizedTensor:
        return QuantizedTensor(x, None, None, "token")
