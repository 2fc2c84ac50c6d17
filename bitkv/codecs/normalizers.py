"""What codes are relative to: a token's root mean square, or its smallest and largest channel."""

from typing import Literal

import torch
from torch import Tensor

from bitkv.pages import QuantizedTensor

SCALE_LIMITS = (2.0**-24, 65504.0)  # the smallest and the largest float16


def saturated(x: Tensor) -> Tensor:
    """Float32 numbers within what a float16 scale can reach, so that no square or sum overflows."""
    return x.float().nan_to_num().clamp(-SCALE_LIMITS[1], SCALE_LIMITS[1])


def by_rms(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` `[..., T, D]` in units of each token's root mean square, and that as float16 `[..., T]`."""
    scale = x.square().mean(-1).sqrt().clamp(*SCALE_LIMITS).half()
    return x / scale.float().unsqueeze(-1), scale


def between_extremes(
    x: Tensor, bits: int, group_size: int | Literal["page"] = "page", clip: float = 1.0
) -> QuantizedTensor:
    """Affine codes of groups of channels of a token `[..., T, D]`.

    Args:
        group_size: channels; "page" for all of a head.
        clip: the share of the range that levels span, around its middle, so that a constant group
            stays what it is.
    """
    size = x.shape[-1] if group_size == "page" else group_size
    if x.shape[-1] % size:
        raise ValueError(
            f"head_dim {x.shape[-1]} is not a multiple of group_size {size}; "
            f"pass a group_size that divides {x.shape[-1]}"
        )
    groups = torch.unflatten(saturated(x), -1, (-1, size))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    margin = (1 - clip) / 2 * (high - low)
    scale = ((high - low - 2 * margin) / (2**bits - 1)).clamp(*SCALE_LIMITS).half()
    zero_point = (low + margin).half()
    codes = ((groups - zero_point.float()) / scale.float()).round_().clamp_(0, 2**bits - 1)
    return QuantizedTensor(
        codes.flatten(-2).to(torch.uint8), scale.squeeze(-1), zero_point.squeeze(-1), "token"
    )
