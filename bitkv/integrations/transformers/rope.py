"""A model's rotary embedding as bitkv knows it, read from its config and checked against its code."""

import inspect
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedConfig as Config

from bitkv.integrations.transformers.stock import modeling_of
from bitkv.rope import Rope

KINDS = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length


def rope_of(decoder: Config) -> Rope | None:
    """The rotary embedding of a decoder, None if it has none of a kind that bitkv can undo.

    The model's own module says what the frequencies are, and its own function is tried on random
    numbers: some models rotate neighbouring channels instead of halves.
    """
    parameters = getattr(decoder, "rope_parameters", None) or {}
    if parameters.get("rope_type") not in KINDS:
        return None
    code = modeling_of(decoder)
    if code is None or not hasattr(code, "apply_rotary_pos_emb"):
        return None
    embeddings: list[Any] = [
        cls
        for name, cls in inspect.getmembers(code, inspect.isclass)
        if name.endswith("RotaryEmbedding") and cls.__module__ == code.__name__
    ]
    if len(embeddings) != 1:
        return None
    try:
        with torch.device("cpu"):
            embedding: Any = embeddings[0](decoder)
    except (AttributeError, KeyError, TypeError):  # made for another part of the model
        return None
    inv_freq = getattr(embedding, "inv_freq", None)
    if inv_freq is None:
        return None
    rope = Rope(inv_freq.detach().float().clone(), float(embedding.attention_scaling))
    return rope if _agrees(rope, embedding, code) else None


def _agrees(rope: Rope, embedding: Any, code: ModuleType) -> bool:
    positions = torch.tensor([[0, 1, 5, 77]])
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 4, 2 * len(rope.inv_freq), generator=draw)
    try:
        _, expected = code.apply_rotary_pos_emb(x, x, *embedding(x, positions))
    except (TypeError, ValueError, RuntimeError):  # another signature or shape
        return False
    return torch.allclose(rope.rotate(x, positions[:, None]), expected, atol=1e-4)
