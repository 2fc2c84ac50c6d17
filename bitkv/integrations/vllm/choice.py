"""The recipe that was chosen, for the model that is served."""

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bitkv.integrations.transformers.rope import rope_of
from bitkv.integrations.vllm import RECIPE
from bitkv.packing import Packing, page_format
from bitkv.recipe import Recipe
from bitkv.recipe.file import as_recipe


@cache
def chosen_recipe() -> Recipe:
    """What BITKV_RECIPE names.

    Raises:
        ValueError: no recipe, or a damaged file.
    """
    return as_recipe(os.environ[RECIPE])


def page_bytes(config: Any, head_dim: int) -> int:
    """Of the layer whose pages are the largest, on whatever rank it is.

    Raises:
        ValueError: a codec that cannot serve the shape.
    """
    recipe, model = chosen_recipe(), config.model_config
    most = max(
        page_format(
            *recipe.codecs(i),
            head_dim=head_dim,
            page_size=recipe.page_size,
            dtype=model.dtype,
            device=torch.device(config.device_config.device_type),
            layout=None,
        ).page_bytes
        for i in range(model.hf_text_config.num_hidden_layers)
    )
    return -(-most // recipe.page_size) * recipe.page_size


def packing_of(config: Any, layer_idx: int, key: Tensor, rank: int) -> Packing:
    """How the tokens of a layer become pages on a rank of tensor parallelism.

    Args:
        key: `[N, Hkv, D]` like this rank's keys: its share of the heads, or one that others have too.
    """
    recipe, model = chosen_recipe(), config.model_config
    heads, ranks = model.get_total_num_kv_heads(), config.parallel_config.tensor_parallel_size
    like = key.new_empty(1, heads, 1, key.shape[2])
    packing = Packing.of(
        *recipe.codecs(layer_idx),
        like,
        page_size=recipe.page_size,
        layout=None,
        rope=rope_of(model.hf_text_config),
    )
    return packing.of_heads(rank * heads // ranks, key.shape[1])
