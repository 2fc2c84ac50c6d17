"""The second kernel of the backend "triton": one result from those of splits."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from bitkv.attention.triton_pages import narrow

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    parts,
    result,
    splits,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    F: tl.constexpr,
):
    """Output of a query and its log-sum-exp from those of its splits.

    Grid (queries, blocks of `CHANNELS` channels); `SPLITS` at a time.

    Args: two `Result`s of the module `triton`. The output of a split whose log-sum-exp is minus
    infinity has no weight, whatever it is.
    """
    if F.overlaps:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    high = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    acc = tl.full((CHANNELS,), 0.0, tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        at = split * result.rows + row
        real = split < splits
        lse = tl.load(parts.lse + at, mask=real, other=float("-inf")) * LOG2_E
        mask = real[:, None] & (channel < F.head_dim)[None, :]
        part = tl.load(parts.out + at[:, None] * F.head_dim + channel[None, :], mask=mask, other=0)
        top = tl.maximum(high, tl.max(lse, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        weight, decay = tl.exp2(lse - base), tl.exp2(high - base)
        part = tl.where((weight > 0)[:, None], part, 0.0)
        acc = acc * decay + tl.sum(part * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        high = top
    total = tl.where(total == 0, 1.0, total)
    out = narrow(acc / total, result.out.dtype.element_ty, F)
    tl.store(result.out + row * F.head_dim + channel, out, mask=channel < F.head_dim)
    tl.store(result.lse + row, (high + tl.log2(total)) * LN_2)
