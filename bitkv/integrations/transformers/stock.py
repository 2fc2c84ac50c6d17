"""What a model does without bitkv: its code, and attention over tensors for whatever is not packed."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig as Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def modeling_of(decoder: Config) -> ModuleType | None:
    """The module that holds the code of a config's model."""
    name = type(decoder).__module__.replace("configuration_", "modeling_")
    if name == type(decoder).__module__:
        return None
    try:
        return sys.modules.get(name) or import_module(name)
    except ImportError:
        return None


def asks_by_name(decoder: Config) -> bool:
    """Whether the model's code looks for its attention by name, as far as bitkv can know."""
    code = modeling_of(decoder)
    return code is None or hasattr(code, "ALL_ATTENTION_FUNCTIONS")


def stock_attention(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """Output `[B, Tq, Hq, D]` of queries `[B, Hq, Tq, D]` over `[B, Hkv, T, D]`.

    PyTorch's fused attention, or plain products where scores have a soft cap (Gemma 2), which it lacks.

    Args:
        mask: as Transformers makes it for SDPA: bool, added to scores, or None for causal.
        options: of Transformers' attention functions.
    """
    if softcap is None:
        out, _ = sdpa_attention_forward(module, q, k, v, mask, **options)
        return out  # type: ignore[no-any-return]
    scale = options.get("scaling") or q.shape[-1] ** -0.5
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = capped(q @ k.mT * scale, softcap)
    if mask is None:  # of a prompt's first tokens, or of a token that sees all
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        mask = causal if q.shape[2] > 1 else causal.new_ones(1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = torch.nn.functional.dropout(weights, options.get("dropout", 0.0), module.training)
    return (weights @ v).transpose(1, 2).contiguous()


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores, between -softcap and softcap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
