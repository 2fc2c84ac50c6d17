"""The attention function that Transformers calls by the name "bitkv"."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import PreTrainedConfig as Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bitkv.integrations.transformers.layer import Handle

NAME = "bitkv"


def switch_attention(decoder: Config) -> None:
    """Make a model attend through bitkv; caches of other kinds go to SDPA from there.

    Without a mask function of the same name Transformers would pass no mask at all.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    decoder._attn_implementation = NAME


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed layer if its handle came, else SDPA; output `[B, Tq, Hq, D]`."""
    if not isinstance(key, Handle):
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"bitkv does not serve attention with {name}; use the stock cache")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {name: kwargs[name] for name in ("is_causal", "softcap") if name in kwargs}
    return key.layer.attend(module, query, attention_mask, scale, **options), None
