"""Short texts that tell one model from another."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedConfig as Config

from bitkv.digests import digest_of
from bitkv.recipe import Recipe

_VOLATILE = ("transformers_version", "_name_or_path", "use_cache", "dtype", "attn_implementation")
_SOME = 1024  # numbers of each weight: enough to tell, and read in no time


def fingerprint(config: Config) -> str:
    """A digest of everything in a config that decides what a cache means."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def attention_digest(module: torch.nn.Module) -> str:
    """A digest of an attention module's weights, the same in every dtype above bfloat16."""
    return digest_of(
        {name: x.detach().flatten()[:_SOME].bfloat16() for name, x in module.named_parameters()}
    )


def weights_digest(model: Any, layer_idx: int) -> str:
    """`attention_digest` of a layer of a model; "" if its attention cannot be found."""
    for module in model.modules():
        is_attention = type(module).__name__.endswith("Attention")
        if is_attention and getattr(module, "layer_idx", None) == layer_idx:
            return attention_digest(module)
    return ""


def check_calibration(recipe: Recipe, module: torch.nn.Module) -> None:
    """Refuse a recipe that was calibrated for a model of the same shape with other weights.

    Args:
        module: the attention of the model's first layer.

    Raises:
        ValueError: it was.
    """
    calibration = recipe.calibration
    if calibration is not None and calibration.weights not in ("", attention_digest(module)):
        raise ValueError(
            "the recipe was calibrated for a model with other weights; calibrate it for this one with "
            "`bitkv calibrate`"
        )
