"""A child process: random requests that end or are aborted, and what some of those that ended got."""

import json
import os
import random
import sys
from pathlib import Path

import psutil
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.inputs import TokensPrompt


def memory() -> int:
    """Bytes of all processes of the engine."""
    me = psutil.Process()
    return sum(process.memory_info().rss for process in (me, *me.children(recursive=True)))


def main(path: str) -> None:
    asked = json.loads(Path(path).read_text(encoding="utf-8"))
    engine = LLMEngine.from_engine_args(EngineArgs(**asked["options"]))
    draw, text = random.Random(asked["seed"]), asked["text"]
    waiting = {str(i): draw.randint(1, 700) for i in range(asked["requests"])}
    prompts, found, running, sizes, aborted, steps = {}, {}, set(), [], 0, 0
    while waiting or running:
        steps += 1
        while waiting and len(running) < 24 and draw.random() < 0.5:
            name, length = waiting.popitem()
            begin = 0 if draw.random() < 0.3 else draw.randrange(len(text) - length)
            prompts[name] = text[begin : begin + length]
            params = SamplingParams(
                temperature=0, ignore_eos=True, max_tokens=draw.choice([1, 5, 40, 150])
            )
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompts[name]), params)
            running.add(name)
        if not running:  # a step without requests would wait for ever
            continue
        for output in engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
                running.discard(output.request_id)
        if running and draw.random() < 0.05:
            gone = draw.choice(sorted(running))
            engine.abort_request([gone])
            running.discard(gone)
            aborted += 1
        if steps % 50 == 0:
            sizes.append(memory())
    half = len(sizes) // 2
    some = draw.sample(sorted(found), 24)
    result = {
        "finished": len(found),
        "aborted": aborted,
        "grown": max(sizes[half:]) - max(sizes[:half]),
        "some": [{"prompt": prompts[name], "tokens": found[name]} for name in some],
    }
    Path(path).write_text(json.dumps(result), encoding="utf-8")
    engine.engine_core.shutdown()
    os._exit(0)  # as in engine.py


if __name__ == "__main__":
    main(sys.argv[1])
