"""Decoding and capacity inside vLLM beside its own 16-bit cache: `make results-serve`.

A model of the layer shape of Llama-3.1-8B with few layers and random weights. Prompts are not read: a KV
connector says that they were, and all blocks hold copies of a real one. Engines run one after the other,
each in its own process; ratios are of one run.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "serving.json"
RECIPES = ("", "affine(4, 'page')", "affine(2, 'page')", "affine(1, 'page')")
LOADS = ((8, 16_384), (2, 65_536))  # sequences, tokens of each
LAYERS, VOCABULARY, BLOCK, SEQUENCES = 2, 1536, 128, 8
GIB = 3
STEPS = BLOCK  # in which every sequence packs a block
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "dtype": "bfloat16",
}


def time_attention(worker: Any) -> None:
    """Make attention of every layer add up its seconds."""
    worker.attention_seconds = 0.0

    def timed(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = method(*args, **kwargs)
            worker.attention_seconds += time.perf_counter() - begin
            return result

        return call

    for layer in worker.model_runner.compilation_config.static_forward_context.values():
        layer.impl.forward = timed(layer.impl.forward)
        if not layer.attn_backend.forward_includes_kv_cache_update:
            layer.impl.do_kv_cache_update = timed(layer.impl.do_kv_cache_update)


def fill(worker: Any) -> int:
    """Copy a block that was written to all others; how many there are."""
    for layer in worker.model_runner.compilation_config.static_forward_context.values():
        cache = layer.kv_cache
        written = int(cache.flatten(1).any(1).nonzero()[0])
        cache[:] = cache[written].clone()
    return len(cache)


def seconds(worker: Any) -> float:
    """Of attention since the last call."""
    found, worker.attention_seconds = worker.attention_seconds, 0.0
    return found


def child(folder: str) -> None:
    """Measure one engine, and print a line of JSON."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    connector = {
        "kv_connector": "SyntheticConnector",
        "kv_connector_module_path": "benchmarks.synthetic_connector",
        "kv_role": "kv_both",
    }
    llm = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(n for _, n in LOADS) + 2 * BLOCK,
        max_num_seqs=SEQUENCES,
        block_size=BLOCK,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_transfer_config=connector,
    )

    def steps(count: int, tokens: int, made: int) -> tuple[float, float]:
        prompt = [(7 * i) % VOCABULARY for i in range(tokens - BLOCK // 2)]
        prompts = [TokensPrompt(prompt_token_ids=prompt)] * count
        begin = time.perf_counter()
        sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=made)
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin, llm.collective_rpc(seconds)[0]

    llm.collective_rpc(time_attention)
    steps(1, 5 * BLOCK, 2)
    blocks = llm.collective_rpc(fill)[0]
    rows = []
    for count, tokens in LOADS:
        steps(count, tokens, 3)
        # a step is what a long answer takes beyond a short one: both begin alike
        short, short_attention = steps(count, tokens, 2)
        long, long_attention = steps(count, tokens, 2 + STEPS)
        rows.append(
            {
                "sequences": count,
                "context": tokens,
                "ms_per_step": 1000 * (long - short) / STEPS,
                "attention_ms_per_step": 1000 * (long_attention - short_attention) / STEPS,
            }
        )
    print("RESULT " + json.dumps({"blocks": blocks, "rows": rows}), flush=True)


def tail_tokens(recipe: str) -> int:
    """16-bit tokens that the tails have room for."""
    return (SEQUENCES + 2) * BLOCK if recipe else 0


def measure(recipe: str, folder: str) -> list[dict[str, Any]]:
    env = os.environ | {
        "BITKV_RECIPE": recipe,
        "VLLM_CPU_KVCACHE_SPACE": str(GIB),
        "PYTHONPATH": os.getcwd(),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to the worker
    }
    command = [sys.executable, "-m", "benchmarks.serving", "--child", folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    found = json.loads(lines[-1])
    token_bytes = 2 * 8 * 128 * 2 * LAYERS  # in 16 bits
    share = 1 - tail_tokens(recipe) * token_bytes / (GIB << 30)
    rest = {
        "recipe": recipe or "bfloat16",
        "cache_tokens": found["blocks"] * BLOCK,
        "cache_tokens_beside_tails": int(found["blocks"] * BLOCK * share),
    }
    return [rest | row for row in found["rows"]]


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
        return 0
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
    ).stdout.strip()
    about = {
        "layers": LAYERS,
        "gib": GIB,
        "device": platform.processor() or platform.machine(),
        "command": "python -m benchmarks.serving",
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        for recipe in RECIPES:
            for row in measure(recipe, folder):
                stock = next((r for r in rows if r["context"] == row["context"]), row)
                ratios = {
                    f"{name}_ratio": stock[name] / row[name]
                    for name in ("ms_per_step", "attention_ms_per_step")
                }
                ratios["capacity_ratio"] = row["cache_tokens_beside_tails"] / stock["cache_tokens"]
                rows.append(row | ratios | about)
                print(
                    f"{row['recipe']:<20} {row['sequences']} x {row['context']:>6,}: "
                    f"{row['ms_per_step']:.1f} ms a step, attention {row['attention_ms_per_step']:.1f}, "
                    + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()),
                    flush=True,
                )
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
