"""The attention function that Transformers calls by the name "bitkv"."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import PreTrainedConfig as Config
from transformers.masking_utils import sdpa_mask

from bitkv.integrations.transformers.layer import Handle
from bitkv.integrations.transformers.stock import asks_by_name, stock_attention

NAME = "bitkv"


def switch_attention(decoder: Config) -> None:
    """Make a model attend through bitkv; caches of other kinds go to stock attention from there.

    Without a mask function of the same name Transformers would pass no mask at all. Models whose code
    does not ask for attention by name (GPT-J, Bloom, Falcon) stay as they are, masks included: they read
    the cached tensors.
    """
    if not asks_by_name(decoder):
        warnings.warn(
            f"{decoder.model_type} computes attention in its own code: bitkv packs its cache, and "
            "unpacks all of it at every step",
            stacklevel=3,
        )
        return
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
    """Attention over a packed layer if its handles came, else over tensors; output `[B, Tq, Hq, D]`.

    A model that has read the cached tensors itself (DiffLlama, Doge) goes on with those.
    """
    if not (isinstance(key, Handle) and isinstance(value, Handle) and key.layer.can_attend(query)):
        options = kwargs | {"dropout": dropout, "scaling": scaling}
        return stock_attention(module, query, key, value, attention_mask, **options), None
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"bitkv does not serve attention with {name}; use the stock cache")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {name: kwargs[name] for name in ("is_causal", "softcap") if name in kwargs}
    return key.layer.attend(module, query, attention_mask, scale, **options), None
