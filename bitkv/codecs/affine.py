"""Affine quantization with a scale and a zero point per group: KIVI's and AsymKV's quantizer.

Keys per channel over a group of tokens, values per token over a group of channels (KIVI, arXiv
2402.02750, section 3). What a group's levels are:

* "minmax": the outermost ones lie on the group's extremes, as in both papers. At 1 bit that stores
  little but the outliers.
* "mse": a searched range, refitted to the codes by least squares, which at 1 bit tends to the two
  conditional means: the same bytes with far less error. From 2 bits on an element's error weighs a
  little more the further it lies from the group's mean, because look-ups hang on outlying keys.
* "unbiased": the same codes, stretched around the mean until x regresses on its quantized self with
  slope one. Codes of least error shrink: an inner product with them is too small by the share of the
  variance they lose, which flattens the softmax. This takes that back for a little more error.

Levels are float16: values beyond ±65504 saturate.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bitkv.codecs.base import Codec
from bitkv.pages import CODE_BITS, AffineFormat, Granularity, QuantizedTensor, Site
from bitkv.shared import PLAIN, Shared

Levels = Literal["minmax", "mse", "unbiased"]
LEVELS: tuple[Levels, ...] = get_args(Levels)  # in the order of `Levels` in csrc/kernels.h

_SCALE_LIMITS = (2.0**-24, 65504.0)  # the smallest and the largest float16
_CLIPS = {1: (1.0,), 2: (0.95, 0.8, 0.65, 0.5), 4: (1.0, 0.9, 0.75), 8: (1.0,)}
_REFITS = 4
_TAIL_WEIGHT = 0.15  # per squared distance from the mean, in variances; see docs/design.md, "Levels"
_LARGEST_GAIN = 3.0


@dataclass(frozen=True)
class Affine(Codec):
    """Codes of `bits` bits with a float16 scale and zero point for each group.

    Args:
        bits: 1, 2, 4 or 8.
        granularity: "channel" (groups of tokens; keys only) or "token" (groups of channels).
        group_size: 32, 64, 128, or "page" for one group over the page's tokens or the head's channels.
        levels: "minmax", "mse" or "unbiased"; see above.
    """

    bits: int
    granularity: Granularity
    group_size: int | Literal["page"] = 32
    levels: Levels = "minmax"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("bits", CODE_BITS),
            ("granularity", ("channel", "token")),
            ("group_size", (32, 64, 128, "page")),
            ("levels", LEVELS),
        ):
            value = getattr(self, name)
            if value not in allowed or isinstance(value, (bool, float)):
                choices = ", ".join(map(repr, allowed))
                raise ValueError(f"Affine: {name} {value!r} is not one of {choices}")

    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> AffineFormat:
        extent = page_size if self.granularity == "channel" else head_dim
        group_size = extent if self.group_size == "page" else self.group_size
        return AffineFormat(
            site, self.bits, self.granularity, group_size, head_dim, page_size, layout=layout
        )

    @property
    def native_levels(self) -> int:
        return LEVELS.index(self.levels)

    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> QuantizedTensor:
        axis = -2 if self.granularity == "channel" else -1
        group_size = x.shape[axis] if self.group_size == "page" else self.group_size
        if x.shape[axis] % group_size:
            name = "token count" if axis == -2 else "head_dim"
            raise ValueError(
                f"{name} {x.shape[axis]} is not a multiple of group_size {group_size}; "
                f"pass a group_size that divides {x.shape[axis]}"
            )
        limit = _SCALE_LIMITS[1]
        groups = torch.unflatten(x.float().clamp(-limit, limit), axis, (-1, group_size)).movedim(
            axis, -1
        )
        scale, zero_point = _FITS[self.levels](groups, self.bits)
        codes = _assign(groups, scale, zero_point, self.bits).to(torch.uint8)
        if self.levels == "unbiased":
            scale, zero_point = _stretch(groups, codes.float(), scale, zero_point)
        codes = codes.movedim(-1, axis).flatten(axis - 1, axis)
        scale, zero_point = scale.squeeze(-1), zero_point.squeeze(-1)
        return QuantizedTensor(codes, scale.half(), zero_point.half(), self.granularity)


def _assign(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The nearest level of each element, as float."""
    return ((x - zero_point) / scale).round_().clamp_(0, 2**bits - 1)


def _round_to_half(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Codes are chosen against the scale and zero point as they are stored, in float16."""
    low, high = _SCALE_LIMITS
    return scale.clamp(low, high).half().float(), zero_point.clamp(-high, high).half().float()


def _fit_minmax(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[..., 1]` that put the outer levels on the extremes of `x` `[..., g]`."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    return _round_to_half((high - low) / (2**bits - 1), low)


def _fit_mse(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The best of a few starting ranges, each improved by alternating codes and least squares.

    It starts from the group's mean at 1 bit, where the range only sets the threshold, and keeps the
    min-max fit where nothing is better, so its weighted error never exceeds that of min-max.
    """
    weights = tail_weights(x, bits)
    best_scale, best_zero = _fit_minmax(x, bits)
    best_error = _squared_error(x, weights, best_scale, best_zero, bits)
    low, high = x.aminmax(dim=-1, keepdim=True)
    center = x.mean(-1, keepdim=True) if bits == 1 else (low + high) / 2
    for clip in _CLIPS[bits]:
        scale = (clip * (high - low) / (2**bits - 1)).clamp(min=_SCALE_LIMITS[0])
        zero_point = center - scale * (2**bits - 1) / 2
        for _ in range(_REFITS):
            scale, zero_point = _refit(x, weights, scale, zero_point, bits)
        scale, zero_point = _round_to_half(scale, zero_point)
        error = _squared_error(x, weights, scale, zero_point, bits)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
        best_error = torch.where(better, error, best_error)
    return best_scale, best_zero


def tail_weights(x: Tensor, bits: int) -> Tensor:
    """How much each element's squared error counts in its group `[..., g]`; the mean is 1.

    At 1 bit all count alike: two levels cannot follow a tail.
    """
    deviation = (x - x.mean(-1, keepdim=True)).square_()
    variance = deviation.mean(-1, keepdim=True)
    alpha = 0.0 if bits == 1 else _TAIL_WEIGHT
    share = deviation / variance.clamp(min=1e-30)
    return (1 + alpha * share) / (1 + alpha)


def _refit(
    x: Tensor, weights: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The least-squares line through (code, value); unchanged scale where all codes are equal."""
    codes = _assign(x, scale, zero_point, bits)
    mean_x, mean_code = ((weights * y).mean(-1, keepdim=True) for y in (x, codes))
    spread = weights * (codes - mean_code)
    variance = (spread * codes).sum(-1, keepdim=True)
    slope = (spread * x).sum(-1, keepdim=True) / variance.clamp(min=1e-6)
    scale = torch.where(variance > 0.25 / x.shape[-1], slope, scale).clamp(min=_SCALE_LIMITS[0])
    return scale, mean_x - scale * mean_code


def _stretch(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Levels stretched around the group's mean by var(x) / cov(x, x̂); codes stay as they are."""
    mean = x.mean(-1, keepdim=True)
    deviation = x - mean
    covariance = (deviation * codes).sum(-1, keepdim=True) * scale
    gain = deviation.square().sum(-1, keepdim=True) / covariance.clamp(min=1e-12)
    gain = torch.where(covariance > 1e-12, gain, 1.0).clamp(1, _LARGEST_GAIN)
    return _round_to_half(scale * gain, mean + (zero_point - mean) * gain)


def _squared_error(x: Tensor, weights: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    codes = _assign(x, scale, zero_point, bits)
    errors = torch.addcmul(zero_point - x, codes, scale).square_()
    return (weights * errors).sum(-1, keepdim=True)


_FITS = {"minmax": _fit_minmax, "mse": _fit_mse, "unbiased": _fit_mse}
