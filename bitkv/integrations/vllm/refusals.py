"""What is not served, said at start: never a wrong answer later."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from bitkv.integrations.transformers.fingerprint import fingerprint
from bitkv.recipe import Recipe

LATENT = (
    "bitkv packs keys and values, and this model's latent attention (MLA) keeps neither; unset "
    "BITKV_RECIPE to serve it"
)


def _refuse(got: str, takes: str) -> None:
    raise ValueError(
        f"bitkv in vLLM got {got}, and takes {takes}; unset BITKV_RECIPE to serve without it"
    )


def check_layer(
    *,
    alibi_slopes: Any,
    sliding_window: int | None,
    kv_cache_dtype: str,
    attn_type: str,
    shared_with: str | None,
    sinks: Any,
    other: Mapping[str, Any],
) -> None:
    """Refuse attention that is not causal over all tokens.

    Raises:
        ValueError: with what it got and what it takes.
    """
    if attn_type != "decoder":
        _refuse(f"attention of the type {attn_type}", "causal self-attention")
    if sliding_window is not None:
        _refuse(f"a sliding window of {sliding_window} tokens", "attention over all tokens")
    if sinks is not None:
        _refuse("learned attention sinks", "a plain softmax")
    if alibi_slopes is not None:
        _refuse("ALiBi slopes", "scores without a bias")
    if shared_with is not None:
        _refuse(f"a layer that shares the cache of {shared_with}", "layers with caches of their own")
    if kv_cache_dtype != "auto":
        _refuse(f"--kv-cache-dtype {kv_cache_dtype}", "auto, the recipe saying how the cache is kept")
    unknown = [name for name, value in other.items() if value is not None]
    if unknown:
        _refuse(f"the argument {unknown[0]} of a layer", "plain causal attention")


def check_engine(config: Any, block_size: int, recipe: Recipe) -> None:
    """Refuse options of the engine under which blocks would not be what they are taken for.

    Raises:
        ValueError: with what it got and what it takes.
    """
    if config.speculative_config is not None:
        _refuse("speculative decoding", "one token a sequence and step")
    if config.parallel_config.decode_context_parallel_size > 1:
        _refuse("decode context parallelism", "sequences that lie on one rank")
    if block_size != recipe.page_size:
        _refuse(f"--block-size {block_size}", f"the page size of the recipe, {recipe.page_size}")


def check_recipe(config: Any, recipe: Recipe) -> None:
    """Refuse a recipe for another model.

    Raises:
        ValueError: it was calibrated for another model, or has to be calibrated first, or has codecs for
            another number of layers.
    """
    if recipe.learns:
        raise ValueError(
            f"the recipe {recipe} has codecs that learn; run `bitkv calibrate` and pass the file in "
            "BITKV_RECIPE"
        )
    model = config.model_config
    recipe.check_layers(model.hf_text_config.num_hidden_layers)
    calibration = recipe.calibration
    if calibration is None:
        return
    # vLLM's own copy of the config has been changed by then
    if calibration.model != fingerprint(AutoConfig.from_pretrained(model.model)):
        raise ValueError(
            "the recipe in BITKV_RECIPE was calibrated for another model; calibrate it for this one"
        )
