"""A static cache inside Transformers: the growing cache's tokens, from one compiled step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers import Prompt, build, padded_prompt, repetitive_prompt
from torch import Tensor
from transformers import CompileConfig, StaticCache

from bitkv.attention import last_backend
from bitkv.generation import checkpoint
from bitkv.integrations.transformers import PackedCache, StaticPackedLayer

RECIPES = ["kivi2", "quick1", "fp16"]
ROOM = 800


@pytest.fixture(scope="module")
def bundled() -> Any:
    return checkpoint.load_model(checkpoint.locate(None), "float32", "cpu")


@pytest.fixture
def text() -> Tensor:
    """500 tokens that the bundled model has not seen."""
    name = checkpoint.locate(None)
    words = (Path(name) / "heldout.txt").read_text(encoding="utf-8")[:4000]
    return checkpoint.load_tokenizer(name)(words, return_tensors="pt")["input_ids"][:, :500]


def batches(ids: Tensor) -> Iterator[Prompt]:
    """One sequence; two, of which one is padded on the left."""
    yield Prompt(ids, torch.ones_like(ids))
    padded = torch.cat([ids.new_zeros(1, 200), ids[:, :300]], 1)
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[0, :200] = 0
    yield Prompt(torch.cat([padded, ids]), mask)


def decode(model: Any, prompt: Prompt, cache: PackedCache, step: Any, count: int) -> Tensor:
    """Greedy tokens `[B, count]`: the prompt goes through the model, what follows through `step`."""
    place = (prompt.mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": prompt.mask, "position_ids": place}
    tokens = [model(prompt.ids, past_key_values=cache, **inputs).logits[:, -1:].argmax(-1)]
    for i in range(count - 1):
        now = place[:, -1:] + 1 + i
        tokens.append(step(tokens[-1], position_ids=now, past_key_values=cache).logits.argmax(-1))
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_static_cache_generates_what_a_growing_one_does(bundled, text, recipe):
    for prompt in batches(text):
        options = {"max_new_tokens": 200, "min_new_tokens": 200, "pad_token_id": 0}
        grows = PackedCache(bundled.config, recipe)
        expected = prompt.generate(bundled, past_key_values=grows, **options)
        cache = PackedCache(bundled.config, recipe, max_cache_len=ROOM)
        assert torch.equal(prompt.generate(bundled, past_key_values=cache, **options), expected)
        assert last_backend() == "cpu"
        assert all(isinstance(layer, StaticPackedLayer) for layer in cache.layers)
        assert cache.is_compileable
        assert cache.get_seq_length() == 699 == grows.get_seq_length()
        assert cache.get_max_length() == cache.max_cache_len == ROOM


@pytest.mark.parametrize("recipe", ["kivi2", "quick1"])
def test_a_compiled_step_serves_all_lengths_and_caches(bundled, text, recipe):
    count = 420  # pages are packed by four steps at least
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(bundled, fullgraph=True, backend="aot_eager")
    prompt, _ = batches(text)
    with torch.no_grad():
        eager = PackedCache(bundled.config, recipe)
        expected = decode(bundled, prompt, eager, bundled, count)
        for _ in range(2):
            cache = PackedCache(bundled.config, recipe, max_cache_len=1000)
            packed = cache.layers[0].paged
            assert torch.equal(decode(bundled, prompt, cache, compiled, count), expected)
            before = (500 - packed.hot_capacity) // 128 + 1
            assert packed.packed_len.tolist()[0] >= 128 * (before + 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_generate_compiles_it_as_on_a_gpu(bundled, text):
    """With the settings that `generate` has there, except for the code generator."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    vars(bundled).pop("_compiled_call", None)
    config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    _, prompt = batches(text)
    options = {"max_new_tokens": 140, "min_new_tokens": 140, "pad_token_id": 0}
    expected = prompt.generate(bundled, past_key_values=PackedCache(bundled.config, "kivi2"), **options)
    for _ in range(2):
        cache = PackedCache(bundled.config, "kivi2", max_cache_len=ROOM)
        out = prompt.generate(bundled, past_key_values=cache, compile_config=config, **options)
        assert torch.equal(out, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_step_after_a_short_prompt_can_be_compiled(bundled, text):
    """No page was packed before that could have prepared anything."""
    torch._dynamo.reset()
    compiled = torch.compile(bundled, fullgraph=True, backend="aot_eager")
    prompt = Prompt(text[:, :9], torch.ones(1, 9, dtype=torch.long))
    with torch.no_grad():
        caches = (PackedCache(bundled.config, "kivi2", max_cache_len=n) for n in (None, 20))
        out = [decode(bundled, prompt, *x, 3) for x in zip(caches, (bundled, compiled), strict=True)]
    assert torch.equal(*out)


def test_only_steps_can_be_compiled(bundled, text):
    torch._dynamo.reset()
    compiled = torch.compile(bundled, backend="aot_eager")
    cache = PackedCache(bundled.config, "kivi2", max_cache_len=ROOM)
    with pytest.raises(ValueError, match=r"^only steps of a static cache can be compiled"):
        compiled(text, past_key_values=cache)


@pytest.mark.parametrize("name", ["Qwen3", "Gemma3", "GPTNeoX"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 64}], ids=["greedy", "beam", "chunked"]
)
def test_fp16_recipe_is_token_identical_to_the_stock_static_cache(name, options):
    model, prompt = build(name), padded_prompt()
    model.set_attn_implementation("sdpa")
    stock = StaticCache(model.config, max_cache_len=300)
    expected = prompt.generate(model, past_key_values=stock, **options)
    cache = PackedCache(model.config, "fp16", max_cache_len=300)
    assert torch.equal(prompt.generate(model, past_key_values=cache, **options), expected)


def test_reset_keeps_the_tensors_and_another_batch_gets_its_own():
    model, prompt = build(), padded_prompt()
    cache = PackedCache(model.config, "kivi2", max_cache_len=400)
    expected = prompt.generate(model, past_key_values=cache)
    before = [x.data_ptr() for x in cache.layers[0].paged.tensors()]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(prompt.generate(model, past_key_values=cache), expected)
    assert [x.data_ptr() for x in cache.layers[0].paged.tensors()] == before
    cache.reset()
    alone = Prompt(prompt.ids[:1], prompt.mask[:1])
    assert torch.equal(alone.generate(model, past_key_values=cache), expected[:1])


def test_a_crop_and_a_saved_cache_go_on_from_what_steps_have_left(tmp_path):
    model, prompt = build(), padded_prompt()
    cache = PackedCache(model.config, "fp16", max_cache_len=400)
    text = prompt.generate(model, past_key_values=cache)
    cache.save(tmp_path / "cache")
    restored = PackedCache(model.config, "fp16", max_cache_len=500)
    restored.load(tmp_path / "cache")
    for kept in (cache, restored):
        kept.crop(-10)
        assert kept.get_seq_length() == text.shape[1] - 11
        mask = torch.cat([prompt.mask, prompt.mask.new_ones(3, text.shape[1] - 260)], 1)
        again = model.generate(
            text[:, :-10], attention_mask=mask, past_key_values=kept, do_sample=False, max_new_tokens=10
        )
        assert torch.equal(again, text)


def test_eager_models_get_the_right_answer_through_materialised_handles():
    model, prompt = build(), padded_prompt()
    model.set_attn_implementation("eager")
    expected = prompt.generate(model)
    cache = PackedCache(model.config, "fp16", max_cache_len=300)
    model.set_attn_implementation("eager")
    assert torch.equal(prompt.generate(model, past_key_values=cache), expected)


def test_what_does_not_fit_is_refused():
    model, prompt = build(), repetitive_prompt()
    cache = PackedCache(model.config, "kivi2", max_cache_len=260)
    with pytest.raises(ValueError, match=r"^1 new columns after 260 are more than max_cache_len 260"):
        prompt.generate(model, past_key_values=cache)
    cache = PackedCache(model.config, "kivi2", max_cache_len=100)
    with pytest.raises(ValueError, match=r"^250 new columns after 0 are more than max_cache_len 100"):
        prompt.generate(model, past_key_values=cache)


def test_a_mask_that_hides_tokens_from_a_step_is_refused():
    model, prompt = build(), repetitive_prompt()
    cache = PackedCache(model.config, "kivi2", max_cache_len=300)
    with torch.no_grad():
        model(prompt.ids, past_key_values=cache)
        mask = torch.ones(1, 251)
        mask[0, 7] = 0
        with pytest.raises(ValueError, match=r"^every token of a step is real in a static cache"):
            model(prompt.ids[:, :1], attention_mask=mask, past_key_values=cache)
