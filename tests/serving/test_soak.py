"""Hundreds of requests on few blocks, some aborted: no leak, no stale slot, each one's own answers."""

import os

import pytest
from test_engine import child, job, run, text, tokens_of

REQUESTS = int(os.environ.get("BITKV_SOAK", "400"))


@pytest.mark.slow
def test_many_random_requests():
    options = {"num_gpu_blocks_override": 40, "max_model_len": 1280, "max_num_batched_tokens": 300}
    found = child("soak.py", {"seed": 5, "requests": REQUESTS, "text": text()[:20_000]}, options)
    assert found["finished"] + found["aborted"] == REQUESTS
    assert found["aborted"] > REQUESTS // 40
    assert found["grown"] < 96 << 20  # vLLM on its own pages grows by 75 MB over 3,000 requests
    prompts = [each["prompt"] for each in found["some"]]
    alone = tokens_of(run(job(prompts, alone=True, sampling={"max_tokens": 150}))["jobs"][0])
    for each, expected in zip(found["some"], alone, strict=True):
        assert each["tokens"] == expected[: len(each["tokens"])]
