"""What the tests of quantizing and packing have in common, whoever runs the kernels."""

import torch
from torch import Tensor

from bitkv.codecs import Affine, Codec
from bitkv.codecs.affine import tail_weights
from bitkv.pages import AffineFormat

SITES = (("key", "channel"), ("key", "token"), ("value", "token"))
SHAPES = ((64, 64), (128, 80), (64, 96), (128, 128), (128, 256))  # page_size, head_dim
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SEARCHED = ("mse", "unbiased")
UNTOUCHED = 0xA5  # in memory behind a page


def form_of(codec: Codec, site: str, x: Tensor, layout: str = "strided") -> AffineFormat | None:
    """The part of pages `x`; None where the group does not divide."""
    page_size, head_dim = x.shape[-2:]
    shape = {"head_dim": head_dim, "page_size": page_size}
    try:
        return codec.part_format(site, **shape, dtype=x.dtype, layout=layout)
    except ValueError:
        return None


def room_for(x: Tensor, form: AffineFormat) -> Tensor:
    """Bytes for pages `[pages, heads, page_size, head_dim]`, and 64 behind each."""
    return torch.full((*x.shape[:2], form.nbytes + 64), UNTOUCHED, dtype=torch.uint8)


def written(out: Tensor, form: AffineFormat) -> Tensor:
    """What a kernel wrote into `room_for` pages, and that it wrote no more."""
    assert (out[..., form.nbytes :] == UNTOUCHED).all()
    return out[..., : form.nbytes].contiguous()


def pages_of(
    page_size: int, head_dim: int, dtype: torch.dtype, *, pages: int = 2, seed: int = 0
) -> Tensor:
    """Two heads of pages whose channels differ in size and mean, as keys do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(pages, 2, page_size, head_dim, generator=generator)
    spread = 3 * torch.rand(head_dim, generator=generator)
    return (x * spread + torch.randn(head_dim, generator=generator)).to(dtype)


def by_group(x: Tensor, codec: Affine) -> Tensor:
    x = x.transpose(-1, -2) if codec.granularity == "channel" else x
    size = x.shape[-1] if codec.group_size == "page" else codec.group_size
    return x.unflatten(-1, (-1, size))


def errors(codec: Affine, x: Tensor, restored: Tensor) -> Tensor:
    """The error that a search minimizes, of each group."""
    weights = tail_weights(by_group(x.float(), codec), codec.bits)
    return (weights * by_group(restored - x.float(), codec).square()).double().sum(-1)
