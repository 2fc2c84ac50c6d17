"""What bitkv in vLLM does not serve is refused at start, with a sentence."""

from types import SimpleNamespace

import pytest

from bitkv.integrations.vllm import refusals
from bitkv.recipe import parse

PLAIN = {
    "alibi_slopes": None,
    "sliding_window": None,
    "kv_cache_dtype": "auto",
    "attn_type": "decoder",
    "shared_with": None,
    "sinks": None,
    "other": {},
}


def engine(**changed):
    parallel = SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1)
    return SimpleNamespace(**{"speculative_config": None, "parallel_config": parallel} | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sliding_window": 4096}, "a sliding window of 4096 tokens"),
        ({"sinks": object()}, "learned attention sinks"),
        ({"alibi_slopes": [1.0]}, "ALiBi slopes"),
        ({"attn_type": "encoder_only"}, "attention of the type encoder_only"),
        ({"shared_with": "model.layers.3"}, "shares the cache of model.layers.3"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"other": {"rotary_dim": 3}}, "the argument rotary_dim"),
    ],
)
def test_layers_other_than_plain_causal_attention(changed, said):
    refusals.check_layer(**PLAIN)
    with pytest.raises(ValueError, match="bitkv in vLLM got") as caught:
        refusals.check_layer(**PLAIN | changed)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "block_size", "said"),
    [
        ({"speculative_config": object()}, 128, "speculative decoding"),
        (
            {"parallel_config": SimpleNamespace(decode_context_parallel_size=2)},
            128,
            "context parallelism",
        ),
        ({}, 64, "--block-size 64"),
    ],
)
def test_engine_options(changed, block_size, said):
    refusals.check_engine(engine(), 128, parse("kivi2"))
    with pytest.raises(ValueError, match=said):
        refusals.check_engine(engine(**changed), block_size, parse("kivi2"))


def model(layers=4):
    return SimpleNamespace(
        hf_text_config=SimpleNamespace(num_hidden_layers=layers), model="bitkv/assets"
    )


def test_recipes_for_another_model():
    two = "Recipe(key=(Unquantized(), Unquantized()), value=(Unquantized(), Unquantized()))"
    refusals.check_recipe(engine(model_config=model(2)), parse(two))
    with pytest.raises(ValueError, match="codecs for 2 layers, and the model has 4"):
        refusals.check_recipe(engine(model_config=model()), parse(two))
    with pytest.raises(ValueError, match="bitkv calibrate"):
        refusals.check_recipe(engine(model_config=model()), parse("best2"))
