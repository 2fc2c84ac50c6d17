"""A model with outlier channels computes what the model did without them."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from bitkv.evaluation.stress import stressed
from bitkv.generation.checkpoint import ASSETS

SIZES = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def tiny(kind, config, **options):
    torch.manual_seed(0)
    model = kind(config(**SIZES, **options)).eval()
    for name, x in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(x)
    return model


MODELS = {
    "qwen3": lambda: AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32),
    "qwen3 in bfloat16": lambda: AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.bfloat16),
    "llama": lambda: tiny(LlamaForCausalLM, LlamaConfig),
    "qwen2": lambda: tiny(Qwen2ForCausalLM, Qwen2Config),
    "olmo2": lambda: tiny(Olmo2ForCausalLM, Olmo2Config),
    "partly rotated": lambda: tiny(StableLmForCausalLM, StableLmConfig, use_qkv_bias=True),
}


@torch.inference_mode()
def run(model):
    """Logits, and keys and values of each layer."""
    ids = torch.randint(0, 300, (1, 200), generator=torch.Generator().manual_seed(1))
    out = model(ids, use_cache=True)
    return out.logits, out.past_key_values.layers


def largest(keys):
    """The largest magnitude of each channel over the median of all channels' `[H, D]`."""
    channels = keys[0].abs().amax(1)
    return channels / channels.median(1, keepdim=True).values


@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_and_channels_grow(name):
    model = MODELS[name]()
    before = {name: x.clone() for name, x in model.named_parameters()}
    expected, plain = run(model)
    got, layers = run(stressed(model))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
    for layer, old in zip(layers, plain, strict=True):
        ratio = largest(layer.keys) / largest(old.keys)
        assert (ratio.topk(4).values > 4).all()  # two pairs at least, in every head
        assert not torch.equal(layer.values, old.values)
        assert float(largest(layer.values).max()) > 1.2 * float(largest(old.values).max())


def test_a_seed_draws_the_same_channels():
    model = MODELS["llama"]()
    first, again, other = (run(stressed(model, seed))[1][0].keys for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_models_that_would_compute_something_else_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no separate projections q_proj"):
        stressed(gpt2)
    with pytest.raises(ValueError, match="Phi3ForCausalLM has no separate projections"):
        stressed(tiny(Phi3ForCausalLM, Phi3Config, pad_token_id=0))
    gemma = tiny(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=32)  # its norms add 1 to their weights
    for name, x in gemma.named_parameters():
        if "_norm" in name:
            torch.nn.init.normal_(x)
    with pytest.raises(ValueError, match="Gemma3ForCausalLM computes logits that differ by"):
        stressed(gemma)
