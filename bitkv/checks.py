"""What tokens a layer takes."""

import torch
from torch import Tensor


def check_tokens(k: Tensor, v: Tensor, real: Tensor | None, window: Tensor | None) -> None:
    """Refuse new tokens that do not fit.

    Args:
        k, v: keys and values `[B, Hkv, T, D]`.
        real: which of them are no padding, bool `[B, T]`.
        window: the layer's own keys `[B, Hkv, …, D]`; None while it has none.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if k.shape != v.shape or k.dim() != 4:
        raise ValueError(
            f"keys {tuple(k.shape)} and values {tuple(v.shape)} must both be [B, Hkv, T, D]"
        )
    if k.device != v.device or k.dtype != v.dtype:
        raise ValueError(
            f"keys are {k.dtype} on {k.device}, values {v.dtype} on {v.device}; "
            "move them to one device and dtype"
        )
    columns = (k.shape[0], k.shape[2])
    if real is not None and (real.shape != columns or real.dtype != torch.bool):
        raise ValueError(
            f"the mask of real tokens is {real.dtype} {tuple(real.shape)}; pass torch.bool {columns}"
        )
    if window is None:
        return
    if window.device != k.device:
        raise ValueError(
            f"the cache is on {window.device}, the new tokens on {k.device}; move them there"
        )
    if k.shape[:2] != window.shape[:2] or k.shape[3] != window.shape[3] or k.dtype != window.dtype:
        expected, got = ((*x.shape[:2], x.shape[3], str(x.dtype)) for x in (window, k))
        raise ValueError(
            f"new tokens have (batch, heads, head_dim, dtype) {got}, the cache {expected}; "
            "reset the cache or pass matching tensors"
        )
