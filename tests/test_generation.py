"""A measured run: the stock cache's tokens, figures that add up, peaks that see what was freed."""

import dataclasses
import os
import subprocess
import sys

import pytest

from bitkv import native
from bitkv.generation.checkpoint import locate
from bitkv.generation.measured import generate
from bitkv.generation.process import RETURN_FREED_MEMORY, generate_alone
from bitkv.generation.request import Request

DOCUMENT = "".join(f"{i}: the key of room {i} is {i * i % 97}.\n" for i in range(20))
MB = 1 << 20
PEAKS = """
import torch
from bitkv.generation.peak_memory import peak_memory
peak = peak_memory(torch.device("cpu"))
peak.reset()
start = peak.read()
for blocks in (64, 0, 24):  # of 1 MB, freed at once
    [torch.ones(1 << 18) for _ in range(blocks)]
    print(peak.read() - start)
    peak.reset()
"""


@pytest.fixture
def request_kivi2(saved_model):
    return Request(DOCUMENT, str(saved_model), "kivi2", max_new_tokens=24)


def run(request, **changes):
    return generate(dataclasses.replace(request, **changes), lambda text: None)


def test_fp16_writes_what_the_stock_cache_writes(request_kivi2):
    packed, stock = (run(request_kivi2, recipe=recipe, dtype="float32") for recipe in ("fp16", None))
    assert packed.token_ids == stock.token_ids
    assert packed.text == stock.text
    assert len(stock.token_ids) == 24
    assert len(set(stock.token_ids)) > 3


def test_figures_of_a_packed_run(request_kivi2):
    pieces = []
    result = generate(request_kivi2, pieces.append)
    assert "".join(pieces) == result.text
    assert result.prompt_tokens == len(DOCUMENT) + 1
    assert result.cached_tokens == 0
    assert result.packed_bits_per_element == 3.0
    assert 3.0 < result.bits_per_element < 16
    assert result.backend == ("reference" if native.why_not() else "cpu")
    assert (result.dtype, result.device) == ("bfloat16", "cpu")
    assert result.prefill_s > 0
    assert result.ms_per_token == 1000 * result.decode_s / 23
    assert result.peak_prefill_bytes is None


def test_figures_of_a_stock_run(request_kivi2):
    result = run(request_kivi2, recipe=None)
    elements = 2 * 2 * 2 * 64 * (len(DOCUMENT) + 1 + 23)  # layers, K and V, heads, head_dim, tokens
    assert result.cache_bytes == 2 * elements
    assert (result.bits_per_element, result.packed_bits_per_element) == (16, None)
    assert result.backend is None


def test_a_short_prompt_packs_nothing(request_kivi2):
    result = run(request_kivi2, prompt="room", max_new_tokens=1)
    assert result.packed_bits_per_element is None
    assert result.ms_per_token is None


def test_a_prompt_read_in_chunks(request_kivi2):
    exact = dataclasses.replace(request_kivi2, recipe="fp16", dtype="float32")
    whole, chunked = (run(exact, prefill_chunk=n) for n in (None, 100))
    assert whole.token_ids == chunked.token_ids


def test_sampling_depends_on_the_seed_alone(request_kivi2):
    first, again, other = (run(request_kivi2, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids


@pytest.mark.parametrize("recipe", ["fp16", "kivi2"])
def test_a_saved_cache_continues(request_kivi2, tmp_path, recipe):
    question = "the key of room 7 is"
    file = str(tmp_path / "document.kv")
    request = dataclasses.replace(request_kivi2, recipe=recipe, dtype="float32")
    run(request, save_cache=file, max_new_tokens=5)
    result = run(request, prompt=question, load_cache=file)
    assert result.cached_tokens == len(DOCUMENT) + 1
    assert result.prompt_tokens == len(question)
    if recipe == "fp16":
        assert result.token_ids == run(request, recipe=None, prompt=DOCUMENT + question).token_ids


def test_a_context_overrun_counts_cached_tokens(request_kivi2, tmp_path):
    file = str(tmp_path / "document.kv")
    run(request_kivi2, save_cache=file, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"1,500 tokens after \d+ cached ones and 24 new"):
        run(request_kivi2, prompt="x" * 1500, load_cache=file)


def test_peak_memory_sees_what_was_freed():
    done = subprocess.run(
        [sys.executable, "-c", PEAKS],
        env=os.environ | RETURN_FREED_MEMORY,
        capture_output=True,
        text=True,
        check=True,
    )
    first, idle, second = (int(peak) / MB for peak in done.stdout.split())
    # the kernel counts pages in batches, one for each processor
    assert first == pytest.approx(64, abs=2)
    assert idle == pytest.approx(0, abs=2)
    assert second == pytest.approx(24, abs=2)


def test_a_fresh_process_sends_its_error(tmp_path):
    with pytest.raises(ValueError, match="no model directory"):
        generate_alone(Request("x", str(tmp_path / "none")), lambda text: None)


def test_hub_ids_and_paths(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("owner/model") == "owner/model"
    assert locate("gpt2") == "gpt2"
    for path in ("./model", "/a/b", "a/b/c", "~/model", "model/", "runs/model", "..", ""):
        with pytest.raises(ValueError, match="pass"):
            locate(path)
