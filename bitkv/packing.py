"""How the tokens of one layer become pages: its two codecs, the page format, what pages share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitkv.codecs import Codec
from bitkv.pages import PageFormat, layout_for
from bitkv.rope import Rope
from bitkv.shared import Shared


def page_format(
    key: Codec,
    value: Codec,
    *,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    layout: str | None,
) -> PageFormat:
    """The format of pages of a layer; see `Packing`.

    Raises:
        ValueError: a codec cannot serve the shape.
    """
    layout = layout or layout_for(device)
    return PageFormat(
        key.part_format("key", head_dim=head_dim, page_size=page_size, dtype=dtype, layout=layout),
        value.part_format("value", head_dim=head_dim, page_size=page_size, dtype=dtype, layout=layout),
    )


@dataclass(frozen=True, eq=False)
class Packing:
    """Codecs bound to tensors of one shape, dtype and device."""

    key: Codec
    value: Codec
    format: PageFormat
    key_shared: Shared
    value_shared: Shared

    @classmethod
    def of(
        cls,
        key: Codec,
        value: Codec,
        k: Tensor,
        *,
        page_size: int,
        layout: str | None,
        rope: Rope | None,
    ) -> "Packing":
        """For tokens like `k` `[B, Hkv, T, D]`.

        Args:
            layout: order of codes; None for the one that suits the device.
            rope: the model's rotary embedding, where it is known.

        Raises:
            ValueError: a codec cannot serve the shape, or was not calibrated for it.
        """
        _, heads, _, head_dim = k.shape
        form = page_format(
            key,
            value,
            head_dim=head_dim,
            page_size=page_size,
            dtype=k.dtype,
            device=k.device,
            layout=layout,
        )
        key_shared = key.shared("key", heads=heads, head_dim=head_dim, rope=rope).to(k.device)
        value_shared = value.shared("value", heads=heads, head_dim=head_dim, rope=rope).to(k.device)
        return cls(key, value, form, key_shared, value_shared)

    def of_heads(self, first: int, count: int) -> "Packing":
        """For `count` of these KV heads from `first` on, as a rank of tensor parallelism has them."""
        key, value = (x.of_heads(first, count) for x in (self.key_shared, self.value_shared))
        return Packing(self.key, self.value, self.format, key, value)

    def encode(self, k: Tensor, v: Tensor, out: Tensor, *, first_token: int) -> None:
        """Write tokens `[Hkv, n * page_size, D]` as pages `[n, Hkv, page_bytes]`.

        Args:
            first_token: the place of the first one in its sequence.
        """
        form = self.format
        parts = torch.split(out, [form.key.nbytes, form.value.nbytes], dim=-1)
        for codec, part_form, shared, x, part in (
            (self.key, form.key, self.key_shared, k, parts[0]),
            (self.value, form.value, self.value_shared, v, parts[1]),
        ):
            tokens = torch.unflatten(x, 1, (-1, form.page_size)).transpose(0, 1)
            codec.encode(tokens, part_form, part, shared=shared, first_token=first_token)
