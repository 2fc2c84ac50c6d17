"""With unquantized pages, models of every architecture that was tried compute what they always do.

Tiny ones with random weights; the sizes that a config cannot do without stand beside its name.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from bitkv.integrations.transformers import PackedCache

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 1024}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"num_hidden_layers": 4, "mamba_n_heads": 8, "mamba_d_head": 16}
MIXED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}

ARCHITECTURES = {
    "apertus": {},
    "arcee": {},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3], "mamba_n_groups": 1, "mamba_d_state": 16},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": GPT2 | {"rotary_dim": 8},
    "cohere": {},
    "cohere2": MIXED | {"sliding_window": 32},
    "diffllama": {},
    "doge": {},
    "dots1": ROUTED | {"n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": MIXED,
    "falcon": {},
    "flex_olmo": EXPERTS,
    "gemma": {},
    "gemma2": MIXED | {"head_dim": 16, "sliding_window": 32},
    "gemma3_text": MIXED | {"head_dim": 16, "sliding_window": 32},
    "gemma3n_text": {
        "num_hidden_layers": 10,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 160,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 10,
        "head_dim": 16,
    },
    "gemma4_text": MIXED
    | {
        "num_kv_shared_layers": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": 160,
        "hidden_size_per_layer_input": 16,
        "sliding_window": 32,
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": ROUTED,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": {},
    "gptj": GPT2 | {"rotary_dim": 8},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": MAMBA
    | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 2, "num_experts_per_tok": 1},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "use_mamba_kernels": False,
    },
    "lfm2": {},
    "llama": {},
    "llama4_text": {"num_hidden_layers": 4},
    "ministral3": {},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": EXPERTS,
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {"head_dim": 16},
    "qwen3_5_text": LINEAR,
    "qwen3_moe": {"head_dim": 16},
    "qwen3_next": LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {"head_dim": 16},
    "xglm": {},
}
IMAGE = 150  # the token that stands for a part of an image
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
PARTS = {"image_token_index": IMAGE, "image_token_id": IMAGE}
WITH_IMAGES = {
    "gemma3": {
        "text_config": SIZES | MIXED | {"head_dim": 16, "sliding_window": 32},
        "vision_config": TOWER,
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": SIZES | {"model_type": "llama"},
        "vision_config": TOWER | {"model_type": "clip_vision_model", "projection_dim": 64},
        "vision_feature_layer": -1,
    },
    "paligemma": {
        "text_config": SIZES | {"head_dim": 16, "model_type": "gemma"},
        "vision_config": TOWER | {"model_type": "siglip_vision_model"},
        "projection_dim": 64,
    },
}
# they compute attention in code of their own, instead of asking for it by name
OWN_CODE = ("bloom", "codegen", "falcon", "gptj", "xglm")
RECIPE = "Recipe(Unquantized(), Unquantized(), num_sink_tokens=4, recent_tokens=16, page_size=64)"


def logits_of(model, prompt, mask, cache, **inputs) -> torch.Tensor:
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    options |= {"past_key_values": cache, "max_new_tokens": 6}
    return torch.cat(model.generate(prompt * mask, attention_mask=mask, **options, **inputs).logits)


def assert_close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.std().item())


@pytest.mark.filterwarnings("ignore:.*in its own code")
@pytest.mark.parametrize("mode", ["plain", "left-padded", "static"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_the_stock_cache(name, mode):
    if (name, mode) == ("doge", "static"):
        pytest.skip("its own code makes masks that do not fit a static cache")
    config = AutoConfig.for_model(name, **(SIZES | ARCHITECTURES[name]))
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.randint(1, 160, (2 if mode == "left-padded" else 1, 200))
    mask = torch.ones_like(prompt)
    mask[1:, :70] = 0

    expected = logits_of(model, prompt, mask, DynamicCache(config=config))
    cache = PackedCache(config, RECIPE, max_cache_len=256 if mode == "static" else None)
    assert_close(logits_of(model, prompt, mask, cache), expected)
    assert cache.paged.usage.page_bytes


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_images_in_a_prompt_may_look_ahead(name):
    config = AutoConfig.for_model(name, **(PARTS | WITH_IMAGES[name]))
    model = AutoModelForImageTextToText.from_config(config).eval()
    prompt = torch.randint(1, 140, (1, 200))
    prompt[:, 20:24] = IMAGE
    images = {"pixel_values": torch.randn(1, 3, 28, 28)}
    if name != "llava":
        images["token_type_ids"] = (prompt == IMAGE).long()
    mask = torch.ones_like(prompt)
    expected = logits_of(model, prompt, mask, DynamicCache(config=config), **images)
    cache = PackedCache(config, RECIPE)
    assert_close(logits_of(model, prompt, mask, cache, **images), expected)
    assert cache.paged.usage.page_bytes


@pytest.mark.parametrize("name", OWN_CODE)
def test_attention_in_a_models_own_code_is_warned_of_and_stays(name):
    config = AutoConfig.for_model(name, **(SIZES | ARCHITECTURES[name]))
    before = config._attn_implementation
    with pytest.warns(UserWarning, match=rf"^{name} computes attention in its own code: bitkv packs"):
        PackedCache(config, RECIPE)
    assert config._attn_implementation == before != "bitkv"


@pytest.mark.parametrize(("name", "sizes"), [("mistral", {"sliding_window": 32}), ("falcon_h1", {})])
def test_a_model_none_of_whose_layers_is_packed_is_warned_of(name, sizes):
    config = AutoConfig.for_model(name, **(SIZES | sizes))
    with pytest.warns(UserWarning, match=rf"^no layer of {name} has full attention and nothing else; "):
        cache = PackedCache(config, RECIPE)
    assert not cache.packed_layers


def test_the_readme_counts_them():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"[{len(ARCHITECTURES)} architectures](tests/test_architectures.py)" in readme
