"""A child process with one engine: reads a list of jobs as JSON, writes what they gave.

A job: prompts (lists of tokens), how many tokens to make, and whether at once or one after the other.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


def answers(llm: LLM, job: dict[str, Any]) -> list[Any]:
    params = SamplingParams(**{"temperature": 0, "ignore_eos": True} | job["sampling"])
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in job["prompts"]]
    if job.get("forget"):
        assert llm.reset_prefix_cache()
    batches = [[prompt] for prompt in prompts] if job.get("alone") else [prompts]
    found = [result for batch in batches for result in llm.generate(batch, params, use_tqdm=False)]
    if "prompt_logprobs" in job["sampling"]:
        return [
            [max(at, key=lambda token: at[token].logprob) for at in r.prompt_logprobs[1:]] for r in found
        ]
    return [
        {
            "tokens": [list(o.token_ids) for o in r.outputs],
            "seconds": seconds(r.outputs[0]),
            "cached": r.num_cached_tokens,
        }
        for r in found
    ]


def seconds(output: Any) -> list[tuple[int, float]]:
    """Of each token the second likeliest one, and how far it is behind; none where nobody asked."""
    found = []
    for token, known in zip(output.token_ids, output.logprobs or (), strict=False):
        second = max((t for t in known if t != token), key=lambda t: known[t].logprob)
        found.append((second, known[token].logprob - known[second].logprob))
    return found


def main(path: str) -> None:
    asked = json.loads(Path(path).read_text(encoding="utf-8"))
    llm = LLM(**asked["options"])
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    result = {"blocks": blocks, "jobs": [answers(llm, job) for job in asked["jobs"]]}
    Path(path).write_text(json.dumps(result), encoding="utf-8")
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # threads of vLLM's now and then abort the interpreter's own way out


if __name__ == "__main__":
    main(sys.argv[1])
