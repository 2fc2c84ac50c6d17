"""The bundled model and the main job: real text, real recall, packed and not."""

import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from bitkv import evaluation
from bitkv.evaluation import tasks
from bitkv.generation.checkpoint import ASSETS
from bitkv.generation.measured import generate
from bitkv.generation.request import Request
from bitkv.integrations.transformers import PackedCache

HELD_OUT = (ASSETS / "heldout.txt").read_text(encoding="utf-8")
DOCUMENT = (ASSETS / "document.txt").read_text(encoding="utf-8")
QUESTION = (ASSETS / "question.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval()


def planted_answer() -> str:
    key = re.search(r"access code of (\w+) is", QUESTION)[1]
    return re.search(rf"access code of {key} is (\d+)", DOCUMENT)[1]


def test_the_assets_fit_a_repository():
    assert (ASSETS / "model.safetensors").stat().st_size <= 16e6


def test_every_prompt_begins_with_a_token_that_can_be_a_sink(tokenizer):
    assert tokenizer("text")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("recipe", [None, "int8", "kivi2"])
def test_the_model_answers_from_the_long_document(recipe):
    run = generate(Request(f"{DOCUMENT}\n\n{QUESTION}", recipe=recipe, max_new_tokens=8), print)
    assert run.prompt_tokens > 5000
    assert run.text.strip().startswith(planted_answer())
    if recipe == "kivi2":
        assert run.packed_bits_per_element <= 3.1
        assert run.bits_per_element < 3.6


def test_the_fp16_recipe_writes_what_the_stock_cache_does(model, tokenizer):
    ids = tokenizer(HELD_OUT[:6000], return_tensors="pt")["input_ids"]

    def write(cache):
        return model.generate(ids, past_key_values=cache, max_new_tokens=48, do_sample=False)

    ours, stock = (
        write(cache) for cache in (PackedCache(model.config, "fp16"), DynamicCache(config=model.config))
    )
    assert torch.equal(ours, stock)


def test_int8_agrees_with_the_stock_cache_on_99_percent_of_tokens(model, tokenizer):
    options = evaluation.Options(text=HELD_OUT, tasks=["agreement"], tokens=4096, window=2048)
    rows = evaluation.run(model, tokenizer, ["int8"], options)
    assert rows[-1].recipe == "int8"
    assert rows[-1].result.top1 >= 0.99


def test_searched_levels_lose_less_than_minmax_ones(model, tokenizer):
    recipes = [f"affine({bits}, 32, '{levels}')" for bits in (1, 2) for levels in ("minmax", "mse")]
    options = evaluation.Options(
        text=HELD_OUT, tasks=["agreement", "fidelity"], tokens=2048, window=2048
    )
    rows = evaluation.run(model, tokenizer, recipes, options)
    result = {(row.task, row.definition): row.result for row in rows if row.definition}
    for row in rows:
        if "'mse'" not in row.definition:
            continue
        mse, minmax = row.result, result[row.task, row.definition.replace("'mse'", "'minmax'")]
        if row.task == "agreement":
            assert mse.kl_mean < minmax.kl_mean
        else:
            assert mse.key_nmse < minmax.key_nmse
            assert mse.value_nmse < minmax.value_nmse


def test_the_stock_model_recalls_one_of_eight_needles_at_1k(model, tokenizer):
    rng = random.Random(7)
    filler = HELD_OUT[: len(HELD_OUT) // 2]
    hits = 0
    for _ in range(12):
        sample = tasks.needle(rng, filler, 8, 1024, lambda text: len(tokenizer(text)["input_ids"]))
        ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=8, do_sample=False)
        hits += tokenizer.decode(out[0, ids.shape[1] :]).strip().startswith(sample.answer)
    assert hits >= 10
