"""The Transformers cache: token-identical without quantization, and every cache operation.

Models are tiny and random; weights are scaled up so that attention is peaked and generated text varies.
"""

import gc
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import DynamicCache

from bitkv.attention import last_backend
from bitkv.integrations.transformers import Handle, PackedCache, PackedLayer, fingerprint, packed

NEW_TOKENS = 24
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = {"sliding_window": 32}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 64},
    "Mistral": {"sliding_window": None},
    "Gemma2": {**WINDOW, **MIXED, "head_dim": 64},  # a soft cap on scores
    "Gemma3": {**WINDOW, **MIXED, "head_dim": 64},
    "Gemma4": {  # heads of two widths, and layers that share the cache of earlier ones
        **WINDOW,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 16,
    },
    "Phi3": {},
    "GPTNeoX": {},
    "Olmo2": {},
    "DiffLlama": {},  # reads the cached values itself
}
MODES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "beam returning all": {"num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    "chunked prefill": {"prefill_chunk_size": 50},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "assisted": {},
    "left-padded": {},
    "left-padded beam": {"num_beams": 2},
    "left-padded chunked": {"prefill_chunk_size": 64},
}


def build(name: str = "Qwen3", seed: int = 1) -> transformers.PreTrainedModel:
    config_name, model_name = f"{name}Config", f"{name}ForCausalLM"
    if name in ("Gemma3", "Gemma4"):
        config_name = f"{name}TextConfig"
    shape = {k: v for k, v in SHAPE.items() if name != "GPTNeoX" or k != "num_key_value_heads"}
    config = getattr(transformers, config_name)(**(shape | ARCHITECTURES[name]))
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@dataclass(frozen=True)
class Prompt:
    ids: torch.Tensor
    mask: torch.Tensor

    def generate(self, model, **options) -> torch.Tensor:
        torch.manual_seed(5)
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
        return model.generate(input_ids=self.ids, attention_mask=self.mask, **options)


def repetitive_prompt() -> Prompt:
    """One sequence that repeats itself, so that prompt lookup finds candidates."""
    part = torch.randint(2, 128, (1, 100), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([part, part, part[:, :50]], 1)
    return Prompt(ids, torch.ones_like(ids))


def padded_prompt(pads: tuple[int, ...] = (0, 60, 200)) -> Prompt:
    ids = torch.randint(2, 128, (len(pads), 250), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return Prompt(ids * mask, mask)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mode", MODES)
def test_fp16_recipe_is_token_identical_to_the_stock_cache(name, mode):
    model = build(name)
    prompt = padded_prompt() if mode.startswith("left") else repetitive_prompt()
    options = dict(MODES[mode])
    if mode == "assisted":
        options["assistant_model"] = build(name, seed=2)  # its drafts are mostly rejected
    model.set_attn_implementation("eager" if name == "Gemma2" else "sdpa")
    expected = prompt.generate(model, **options)
    with packed(model, "fp16"):
        assert torch.equal(prompt.generate(model, **options), expected)
    cache = PackedCache(model.config, "fp16")
    assert torch.equal(prompt.generate(model, past_key_values=cache, **options), expected)
    assert len(expected.unique()) > 20, "the text is too dull to prove anything"


def test_attention_really_runs_on_pages():
    model = build()
    cache = PackedCache(model.config, "kivi2", backend="reference")
    repetitive_prompt().generate(model, past_key_values=cache)
    assert last_backend() == "reference"
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers)
    assert cache.paged.packed_bits_per_element == 3.0
    assert cache.paged.layers[0].pool.num_used == 1


def test_quantized_recipes_change_the_logits_and_less_with_more_bits():
    model, prompt = build(), repetitive_prompt()
    stock = model(prompt.ids).logits

    def error(recipe):
        cache = PackedCache(model.config, recipe, exact_prefill=False)
        with torch.no_grad():
            return (model(prompt.ids, past_key_values=cache).logits - stock).square().mean().item()

    errors = [error(recipe) for recipe in ("fp16", "int8", "kivi4", "kivi2")]
    assert errors == sorted(errors)
    assert errors[0] < 1e-6 < errors[1]


def test_exact_prefill_leaves_prompt_logits_untouched():
    model, prompt = build(), repetitive_prompt()
    with torch.no_grad():
        stock = model(prompt.ids).logits
        cache = PackedCache(model.config, "kivi2")
        assert torch.equal(model(prompt.ids, past_key_values=cache).logits, stock)


@pytest.mark.parametrize("recipe", ["fp16", "kivi2", "quick1"])
def test_a_batch_generates_what_its_sequences_do_alone(recipe):
    model, prompt = build(), padded_prompt()
    together = prompt.generate(model, past_key_values=PackedCache(model.config, recipe))
    for row, mask in enumerate(prompt.mask.bool()):
        alone = Prompt(prompt.ids[row : row + 1, mask], prompt.mask[row : row + 1, mask])
        text = alone.generate(model, past_key_values=PackedCache(model.config, recipe))
        assert torch.equal(text[0, -NEW_TOKENS:], together[row, -NEW_TOKENS:])


def test_sinks_are_the_first_real_tokens_of_a_left_padded_sequence():
    model, prompt = build(), padded_prompt()
    places = (prompt.mask.cumsum(1) - 1).clamp(min=0)
    with packed(model, "quick2"):
        cache = model(prompt.ids, attention_mask=prompt.mask, position_ids=places).past_key_values
    alone = prompt.ids[1:2, 60:]
    with packed(model, "quick2"):
        expected = model(alone).past_key_values
    for layer, own in zip(cache.layers, expected.layers, strict=True):
        sinks = slice(0, layer.paged.num_sink_tokens)
        torch.testing.assert_close(layer.paged.hot_k[1, :, sinks], own.paged.hot_k[0, :, sinks])
        assert layer.paged.lengths == [250, 190, 50]


@pytest.mark.parametrize("recipe", ["fp16", "kivi2"])
def test_a_crop_inside_the_hot_window_can_be_generated_again(recipe):
    model, prompt = build(), repetitive_prompt()
    cache = PackedCache(model.config, recipe)
    text = prompt.generate(model, past_key_values=cache)
    assert cache.get_seq_length() == text.shape[1] - 1
    cache.crop(-(NEW_TOKENS - 4))
    kept = text[:, : cache.get_seq_length() + 1]
    again = model.generate(
        kept, past_key_values=cache, do_sample=False, max_new_tokens=text.shape[1] - kept.shape[1]
    )
    assert torch.equal(again, text)


def test_a_crop_of_a_left_padded_batch_counts_columns():
    model, prompt = build(), padded_prompt()
    cache = PackedCache(model.config, "fp16")
    text = prompt.generate(model, past_key_values=cache)
    cache.crop(-10)
    assert cache.layers[0].paged.lengths == [263, 203, 63]
    kept = text[:, :264]
    mask = torch.cat([prompt.mask, prompt.mask.new_ones(3, kept.shape[1] - 250)], 1)
    again = model.generate(
        kept, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=10
    )
    assert torch.equal(again, text)


@pytest.mark.parametrize("name", ["Qwen3", "Gemma3", "Gemma4"])
def test_a_saved_cache_continues_as_if_never_interrupted(name, tmp_path):
    model, prompt = build(name), padded_prompt()
    whole = prompt.generate(model, past_key_values=PackedCache(model.config, "kivi2"))
    cache = PackedCache(model.config, "kivi2")
    half = prompt.generate(model, past_key_values=cache, max_new_tokens=NEW_TOKENS // 2)
    cache.save(tmp_path / "cache.safetensors")
    restored = PackedCache(model.config, "kivi2")
    restored.load(tmp_path / "cache.safetensors")
    assert restored.bits_per_element == cache.bits_per_element
    mask = torch.cat([prompt.mask, prompt.mask.new_ones(3, NEW_TOKENS // 2)], 1)
    rest = model.generate(
        half,
        attention_mask=mask,
        past_key_values=restored,
        do_sample=False,
        max_new_tokens=NEW_TOKENS // 2,
    )
    assert torch.equal(rest, whole)


def test_a_saved_cache_of_another_model_is_refused(tmp_path):
    model = build()
    cache = PackedCache(model.config, "kivi2")
    repetitive_prompt().generate(model, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    other = PackedCache(build("Llama").config, "kivi2")
    with pytest.raises(ValueError, match="was saved with model"):
        other.load(tmp_path / "cache.safetensors")
    assert other.get_seq_length() == 0


def test_the_fingerprint_ignores_how_a_model_is_run():
    model = build()
    before = fingerprint(model.config)
    PackedCache(model.config, "fp16")
    assert fingerprint(model.config) == before != fingerprint(build("Llama").config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_chat_continued_on_the_same_cache_is_token_identical(name):
    model = build(name)
    turns = torch.randint(2, 128, (3, 1, 150), generator=torch.Generator().manual_seed(2))

    def chat(cache):
        text = turns[0, :, :0]
        for turn in turns:
            text = torch.cat([text, turn], 1)
            text = model.generate(
                text, past_key_values=cache, do_sample=False, max_new_tokens=NEW_TOKENS
            )
        return text

    stock = chat(DynamicCache(config=model.config))
    assert torch.equal(chat(PackedCache(model.config, "fp16")), stock)
    assert chat(PackedCache(model.config, "kivi2")).shape == stock.shape


def test_reset_makes_a_cache_new():
    model, prompt = build(), padded_prompt()
    cache = PackedCache(model.config, "kivi2")
    first = prompt.generate(model, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert torch.equal(prompt.generate(model, past_key_values=cache), first)


def test_repeat_and_select_share_pages():
    model, prompt = build(), repetitive_prompt()
    cache = PackedCache(model.config, "fp16")
    with torch.no_grad():
        model(prompt.ids[:, :-1], past_key_values=cache)
        pages = cache.layers[0].paged.pool.num_used
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.batch_select_indices(torch.tensor([1, 0]))
        logits = model(prompt.ids[:, -1:].repeat(2, 1), past_key_values=cache).logits
        expected = model(prompt.ids).logits[:, -1:]
    assert pages == cache.layers[0].paged.pool.num_used == 1
    torch.testing.assert_close(logits, expected.expand_as(logits), rtol=1e-4, atol=1e-4)


def test_the_context_manager_restores_the_model():
    model = build()
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError), packed(model, "kivi2"):
        raise RuntimeError
    assert model.config._attn_implementation == "eager"
    assert not model._forward_pre_hooks
    assert type(model(torch.tensor([[5, 6]])).past_key_values.layers[0]) is not PackedLayer


def test_pipelines_use_the_packed_cache_in_the_context():
    model, prompt = build(), repetitive_prompt()
    seen = []
    model.register_forward_hook(lambda _m, _a, out: seen.append(out.past_key_values.layers[0]))
    with packed(model, "kivi2"):
        prompt.generate(model)
    assert len(seen) == NEW_TOKENS
    assert all(isinstance(layer, PackedLayer) for layer in seen)
    assert len({id(layer) for layer in seen}) == 1


def test_stock_caches_still_work_on_a_switched_model():
    model, prompt = build(), padded_prompt()
    model.set_attn_implementation("sdpa")
    expected = prompt.generate(model)
    PackedCache(model.config, "kivi2")
    assert model.config._attn_implementation == "bitkv"
    assert torch.equal(prompt.generate(model), expected)


def test_a_handle_that_other_code_touches_becomes_the_real_tensor():
    model, prompt = build(), padded_prompt()
    stock = DynamicCache(config=model.config)
    cache = PackedCache(model.config, "fp16")
    with torch.no_grad():
        for keys in (prompt.ids[:, :200], prompt.ids[:, 200:]):
            k = torch.randn(3, 2, keys.shape[1], 64)
            expected = stock.layers[0].update(k, -k)
            handles = cache.layers[0].update(k, -k)
            assert all(isinstance(h, Handle) for h in handles)
            assert handles[0].shape == expected[0].shape
            assert set(handles[0].stride()) == {0}, "a handle holds no memory"
            for handle, tensor in zip(handles, expected, strict=True):
                torch.testing.assert_close(handle * 1, tensor)


def test_a_dynamic_cache_made_packed_still_yields_its_tensors():
    model, prompt = build(), padded_prompt()
    expected = model(prompt.ids, attention_mask=prompt.mask).past_key_values
    with packed(model, "fp16"):
        cache = model.generate(
            prompt.ids, attention_mask=prompt.mask, max_new_tokens=1, return_dict_in_generate=True
        ).past_key_values
    assert type(cache) is DynamicCache
    assert cache.get_seq_length() == expected.get_seq_length()
    for (keys, values, _), layer in zip(cache, cache.layers, strict=True):
        real = layer.columns[:, None, :, None].float()
        assert keys.shape == values.shape == expected.layers[0].keys.shape
        assert torch.equal(keys, keys * real), "padding is not stored"
        assert keys[layer.columns[:, None].expand(-1, 2, -1)].abs().min() > 0


def test_training_through_a_packed_cache_keeps_no_graph_in_it():
    model = build().train()
    with packed(model, "kivi2"):
        out = model(torch.randint(2, 128, (1, 300)), labels=torch.randint(2, 128, (1, 300)))
    out.loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
    assert not out.past_key_values.layers[0].paged.hot_k.requires_grad


def test_eager_models_get_the_right_answer_through_materialised_handles():
    model, prompt = build(), padded_prompt()
    model.set_attn_implementation("eager")
    expected = prompt.generate(model)
    cache = PackedCache(model.config, "fp16")
    model.set_attn_implementation("eager")
    assert torch.equal(prompt.generate(model, past_key_values=cache), expected)


def test_a_cache_is_freed_with_its_last_reference():
    model = build()
    cache = PackedCache(model.config, "kivi2")
    repetitive_prompt().generate(model, past_key_values=cache)
    pool = cache.layers[0].paged.pool
    before = len(gc.get_referrers(pool))
    del cache
    gc.collect()
    assert len(gc.get_referrers(pool)) < before


REFUSALS = {
    "an encoder-decoder": (
        lambda: transformers.T5Config(),
        "kivi2",
        "t5 is an encoder-decoder model; bitkv serves decoder-only models",
    ),
    "multi-head latent attention": (
        lambda: transformers.DeepseekV3Config(num_hidden_layers=2),
        "kivi2",
        "deepseek_v3 uses multi-head latent attention (MLA), whose cache is already compressed; "
        "bitkv serves models with keys and values per head",
    ),
    "no KV cache": (
        lambda: transformers.MambaConfig(num_hidden_layers=2),
        "kivi2",
        "mamba has no KV cache for bitkv to pack",
    ),
    "a group that does not divide the heads": (
        lambda: transformers.Qwen3Config(**SHAPE, head_dim=80),
        "kivi2",
        "head_dim 80 is not a multiple of group_size 32; "
        "pass a group_size that divides 80, or 'page' for one group",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_served_is_refused_with_a_sentence(case):
    config, recipe, sentence = REFUSALS[case]
    with pytest.raises(ValueError, match=r"bitkv|group_size") as error:
        PackedCache(config(), recipe)
    assert str(error.value) == sentence


@pytest.mark.parametrize("exact_prefill", [True, False])
@pytest.mark.parametrize("pads", [(0,), (0, 70)])
def test_tokens_may_look_ahead_as_those_of_images_do(exact_prefill, pads):
    model, prompt = build(), padded_prompt(pads)
    causal = torch.ones(250, 250, dtype=torch.bool).tril()
    causal[30:60, 30:60] = causal[180:240, 180:240] = True
    mask = causal & prompt.mask[:, None, None].bool()
    chunks = [slice(0, 160), slice(160, 250)]

    def logits(cache):
        with torch.no_grad():
            return [
                model(
                    prompt.ids[:, x], attention_mask=mask[:, :, x, : x.stop], past_key_values=cache
                ).logits
                for x in chunks
            ]

    cache = PackedCache(model.config, "fp16", exact_prefill=exact_prefill)
    for mine, theirs, x in zip(logits(cache), logits(DynamicCache()), chunks, strict=True):
        real = prompt.mask[:, x].bool()
        torch.testing.assert_close(mine[real], theirs[real], rtol=1e-3, atol=1e-3)


def holes(rows: int, columns: int) -> torch.Tensor:
    """Causal, but only the last token sees the third."""
    mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    mask[:-1, 2] = False
    return mask[None, None]


@pytest.mark.parametrize("exact_prefill", [True, False])
def test_masks_other_than_causal_with_padding_are_refused(exact_prefill):
    model, ids = build(), torch.arange(2, 8)[None]
    cache = PackedCache(model.config, "fp16", exact_prefill=exact_prefill)
    with torch.no_grad():
        if exact_prefill:  # a prompt attends as its mask says
            model(ids, attention_mask=holes(6, 6), past_key_values=cache)
        mask = holes(6, 12 if exact_prefill else 6)
        with pytest.raises(ValueError, match="bitkv attends causally with padding only"):
            model(ids, attention_mask=mask, past_key_values=cache)


def test_a_prompt_whose_last_token_sees_less_than_others_is_refused():
    model, mask = build(), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., 5, 2] = False
    cache = PackedCache(model.config, "fp16")
    with pytest.raises(ValueError, match="bitkv attends causally with padding only"):
        model(torch.arange(2, 8)[None], attention_mask=mask, past_key_values=cache)


def test_a_mask_that_hides_stored_tokens_later_is_refused():
    model, prompt = build(), repetitive_prompt()
    cache = PackedCache(model.config, "fp16")
    with torch.no_grad():
        model(prompt.ids, past_key_values=cache)
        mask = torch.cat([prompt.mask, prompt.mask[:, :1]], 1)
        mask[:, :5] = 0
        with pytest.raises(ValueError, match="keeps earlier columns as they were"):
            model(prompt.ids[:, :1], attention_mask=mask, past_key_values=cache)
