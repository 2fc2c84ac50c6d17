"""bitkv inside vLLM: the same answers whoever else is served, however prompts are cut, on any ranks.

Everything is greedy in float32, where ties are rare, and every step is checked (BITKV_CHECK): what
a new block's slot held before is overwritten with NaN, which any stale read would spread.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitkv.generation.checkpoint import ASSETS
from bitkv.recipe import as_recipe

HERE = Path(__file__).parent
RECIPE = "kivi2"
NEW = 24


def child(
    program: str,
    asked: dict[str, Any],
    options: dict[str, Any],
    recipe: str = RECIPE,
    env: dict[str, str] | None = None,
) -> Any:
    """What a program beside this file makes of a request to an engine with these options."""
    defaults = {
        "model": str(ASSETS),
        "dtype": "float32",
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "block_size": 128,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    variables = {"BITKV_RECIPE": recipe, "BITKV_CHECK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} | (env or {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "asked.json"
        path.write_text(json.dumps(asked | {"options": defaults | options}), encoding="utf-8")
        command = [sys.executable, str(HERE / program), str(path)]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout[-6000:] + done.stderr[-6000:])
        return json.loads(path.read_text(encoding="utf-8"))


def run(
    *jobs: dict[str, Any], recipe: str = RECIPE, env: dict[str, str] | None = None, **options: Any
) -> Any:
    """What an engine with these options answers, and how many blocks it had."""
    return child("engine.py", {"jobs": jobs}, options, recipe, env)


def job(prompts: list[list[int]], **options: Any) -> dict[str, Any]:
    return {"prompts": prompts, "sampling": {"max_tokens": NEW}} | options


@cache
def text() -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    return tokenizer((ASSETS / "heldout.txt").read_text(encoding="utf-8")[:60_000])["input_ids"]


@cache
def requests() -> list[list[int]]:
    """32 prompts of 1 to 900 tokens; some share their beginning, some end with a block."""
    draw = random.Random(7)
    shared = text()[:300]
    prompts = []
    for i in range(32):
        length = [1, 127, 128, 129, 256][i] if i < 5 else draw.randint(2, 900)
        start = draw.randrange(len(text()) - 900)
        own = text()[start : start + length]
        prompts.append(shared + own if i % 4 == 3 else own)
    return prompts


@cache
def first_engine() -> Any:
    """Jobs: alone; all at once; again, from the prefix cache; four answers each; choices in a text."""
    some = requests()[:8]
    return run(
        job(requests(), alone=True, sampling={"max_tokens": NEW, "logprobs": 2}),
        job(requests(), forget=True),
        job(requests()),
        job(some, sampling={"max_tokens": NEW, "n": 4, "temperature": 1.0, "top_k": 1}),
        job([text()[:4000]], sampling=CHOICES),
        max_num_batched_tokens=200,
        enable_prefix_caching=True,
    )


def tokens_of(answers: Any) -> list[list[int]]:
    return [answer["tokens"][0] for answer in answers]


# Kernels round queries and weights to bytes, and decide by a row's largest number if it needs a second
# byte. Who shares a matrix product moves float32's last bits, and with them, rarely, such a decision
TIE = 0.03  # of log-probabilities


def assert_as_alone(found: list[list[int]]) -> None:
    """Each request has the tokens it got alone, up to where the two likeliest of those were tied."""
    ties = []
    for i, (tokens, answer) in enumerate(zip(found, first_engine()["jobs"][0], strict=True)):
        expected = answer["tokens"][0]
        assert len(tokens) == len(expected)
        if tokens != expected:
            at = next(at for at in range(len(expected)) if tokens[at] != expected[at])
            second, behind = answer["seconds"][at]
            assert (tokens[at], behind < TIE) == (second, True), f"request {i}, token {at}: {behind}"
            ties.append(i)
    assert len(ties) <= 2, f"requests {ties}"


def test_32_requests_at_once_in_chunks_get_the_answers_they_get_alone():
    assert_as_alone(tokens_of(first_engine()["jobs"][1]))


def test_the_prefix_cache_changes_no_answer():
    again = first_engine()["jobs"][2]
    assert sum(answer["cached"] for answer in again) > 5_000
    assert_as_alone(tokens_of(again))


def test_four_answers_of_one_request_are_those_of_four_requests():
    answers = [answer["tokens"] for answer in first_engine()["jobs"][3]]
    rest = tokens_of(first_engine()["jobs"][0])[len(answers) :]
    for i in range(4):
        assert_as_alone([four[i] for four in answers] + rest)


@pytest.mark.slow
def test_preemption_and_whole_prompts_without_a_prefix_cache_change_no_answer():
    """18 blocks hold two long requests: those behind are preempted and computed again."""
    found = run(
        job(requests()), num_gpu_blocks_override=18, enable_prefix_caching=False, max_model_len=1280
    )
    assert found["blocks"] == 18
    assert_as_alone(tokens_of(found["jobs"][0]))


TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.mark.parametrize(
    "split",
    [
        {"tensor_parallel_size": 2},
        # vLLM's pipelines on CPUs need the rehearsal that eager engines leave out
        pytest.param({"pipeline_parallel_size": 2, "enforce_eager": False}, marks=pytest.mark.slow),
    ],
    ids=["one KV head each", "two layers each"],
)
def test_two_ranks_give_the_answers_of_one(split):
    found = run(job(requests()), env=TWO_RANKS, max_num_batched_tokens=256, **split)
    assert_as_alone(tokens_of(found["jobs"][0]))


@pytest.mark.slow
def test_packed_blocks_go_to_disk_and_come_back(tmp_path):
    """vLLM's stock connector takes blocks as bytes: 3 bits an element of 16."""
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    prompts = [text()[:1100]]
    first, second = (run(job(prompts), kv_transfer_config=connector) for _ in range(2))
    assert tokens_of(first["jobs"][0]) == tokens_of(second["jobs"][0])
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    elements = 2 * 4 * 2 * 64 * 1024  # keys and values of 4 layers, 2 heads, 64 channels, 8 whole blocks
    assert 3 / 8 <= stored / elements < 3.2 / 8
    assert second["jobs"][0][0]["cached"] >= 1024


def streamed_choices(prompt: list[int], recipe: str, backend: str) -> list[int]:
    """The likeliest token behind each of a prompt's, by Transformers on the packed cache.

    With the window that vLLM serves: earlier blocks packed, the own one exact.
    """
    from bitkv.integrations.transformers import PackedCache

    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32)
    windowless = replace(as_recipe(recipe), num_sink_tokens=0, recent_tokens=0)
    cache = PackedCache(model.config, windowless, backend=backend)
    model.set_attn_implementation("bitkv")
    found: list[int] = []
    with torch.inference_mode():
        for i in range(0, len(prompt), 128):
            chunk = torch.tensor([prompt[i : i + 128]])
            found += model(chunk, past_key_values=cache).logits[0].argmax(-1).tolist()
    return found[:-1]


LAYERWISE = (
    "Recipe(key=Split(Affine(2, 'channel', 32, 'mse'), 2, Affine(1, 'channel', 'page', 'mse')), "
    "value=Split(Affine(4, 'token', 32), 1, Affine(1, 'token', 'page', 'mse')))"
)
CHOICES = {"max_tokens": 1, "prompt_logprobs": 1}


def assert_alike(found: list[int], recipe: str) -> None:
    """Both engines call the same kernels, which round weights to 8 bits; the reference does not.

    Its looser bound is for what the engines could have wrong in common.
    """
    for backend, bound in [("cpu", 0.995), ("reference", 0.98)]:
        expected = streamed_choices(text()[:4000], recipe, backend)
        assert len(found) == len(expected) == 3999
        agree = sum(a == b for a, b in zip(found, expected, strict=True)) / len(found)
        assert agree >= bound, f"{agree:.2%} of the choices are those of the {backend} backend"


def test_pages_mean_the_same_in_transformers():
    assert_alike(first_engine()["jobs"][4][0], RECIPE)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "ranks"), [(LAYERWISE, 1), ("cq(8, 8)", 1), ("best1.25", 2)])
def test_pages_of_layerwise_and_calibrated_recipes_mean_the_same_too(recipe, ranks, tmp_path):
    if recipe != LAYERWISE:
        path = str(tmp_path / "recipe.safetensors")
        bitkv = Path(sys.executable).parent / "bitkv"
        command = ["calibrate", "--recipe", recipe, "--output", path, "--calibration-tokens", "8192"]
        subprocess.run([str(bitkv), *command], check=True)
        recipe = path
    found = run(
        job([text()[:4000]], sampling=CHOICES),
        recipe=recipe,
        env=TWO_RANKS if ranks == 2 else None,
        tensor_parallel_size=ranks,
        max_num_batched_tokens=640,
    )
    assert_alike(found["jobs"][0][0], recipe)
