"""Measure the bundled model: held-out loss against a 3-gram, recall by length.

Writes ``training/results.json`` and the model card of the assets, made from it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitkv.evaluation import tasks
from bitkv.evaluation.report import wilson
from training.data import Lines, load_corpus

LOSS_CONTEXTS = (512, 8192)
#: Samples by prompt length; any_values lets values begin with the same digits (harder).
SAMPLES = {
    "needle": {512: 60, 1024: 120, 2048: 40, 4096: 40, 8192: 10},
    "needle_any_values": {1024: 40, 4096: 12},
    "key_value_recall": {1024: 20, 4096: 8},
    "variable_tracking": {1024: 20, 4096: 8},
    "long_copy": {1024: 20, 4096: 8},
}
FLOAT32_SAMPLES = {"needle": {1024: 30, 4096: 10}}
NUM_KEYS = 8


class TriGram:
    """Interpolated (Witten-Bell) 3-gram over token ids."""

    def __init__(self, tokens: np.ndarray, vocab: int) -> None:
        """Count ``tokens``."""
        self.vocab = vocab
        tokens = tokens.astype(np.int64)
        self.counts: list[tuple[np.ndarray, np.ndarray]] = []
        self.contexts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for order in (1, 2, 3):
            codes, counts = np.unique(self._codes(tokens, order), return_counts=True)
            self.counts.append((codes, counts))
            heads, first, kinds = np.unique(codes // vocab, return_index=True, return_counts=True)
            self.contexts.append((heads, np.add.reduceat(counts, first), kinds))

    def _codes(self, tokens: np.ndarray, order: int) -> np.ndarray:
        """One number for each run of ``order`` tokens."""
        total = np.zeros(len(tokens) - order + 1, dtype=np.int64)
        for place in range(order):
            total = total * self.vocab + tokens[place : len(tokens) - order + 1 + place]
        return total

    def nats(self, tokens: np.ndarray) -> float:
        """Mean negative log probability of ``tokens`` from the third on."""
        tokens = tokens.astype(np.int64)
        chance = np.full(len(tokens) - 2, 1.0 / self.vocab)
        for order in (1, 2, 3):
            codes = self._codes(tokens, order)[3 - order :]
            seen = _look_up(*self.counts[order - 1], codes)
            heads, totals, kinds = self.contexts[order - 1]
            total = _look_up(heads, totals, codes // self.vocab)
            kind = _look_up(heads, kinds, codes // self.vocab)
            known = total > 0
            chance[known] = ((seen + kind * chance) / np.maximum(total + kind, 1))[known]
        return float(-np.log(chance).mean())


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """``values`` at ``wanted`` in sorted ``keys``; 0 where missing."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


class Measurer:
    """A model, its tokenizer and held-out filler."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        """Load everything from ``folder``."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.device = device
        text = (folder / "heldout.txt").read_text(encoding="utf-8")
        self.text = text
        # The prose comes first in the file; facts are hidden in it.
        self.filler = text[: len(text) // 2]
        self.known: dict[str, int] = {}

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` without BOS."""
        if text not in self.known:
            self.known[text] = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self.known[text]

    @torch.no_grad()
    def loss(self, context: int) -> dict[str, float]:
        """Held-out loss in windows of ``context`` tokens, each with BOS first."""
        ids = self.tokenizer(self.text, add_special_tokens=False)["input_ids"]
        bytes_per_token = len(self.text.encode()) / len(ids)
        total, count = 0.0, 0
        for start in range(0, len(ids) - context + 2, context - 1):
            row = [self.tokenizer.bos_token_id, *ids[start : start + context - 1]]
            x = torch.tensor([row], device=self.device)
            logits = self.model(input_ids=x, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum"))
            count += len(row) - 1
        nats = total / count
        return {
            "nats_per_token": round(nats, 4),
            "bits_per_byte": round(nats / math.log(2) / bytes_per_token, 4),
            "tokens": count,
        }

    @torch.no_grad()
    def answers(self, sample: tasks.Sample) -> tuple[bool, int]:
        """Whether greedy decoding gives the answer, and the length of the prompt."""
        x = self.tokenizer(sample.prompt, return_tensors="pt")["input_ids"].to(self.device)
        want = self.count_tokens(" " + sample.answer) + 2
        out = self.model.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=want, do_sample=False
        )
        said = self.tokenizer.decode(out[0, x.shape[1] :])
        return said.strip().startswith(sample.answer), x.shape[1]

    def recall(self, task: str, length: int, count: int) -> dict[str, Any]:
        """Exact match of one task at one length."""
        hits, lengths = 0, []
        for index in range(count):
            sample = self.make(task, random.Random(f"{task}-{length}-{index}"), length)
            hit, used = self.answers(sample)
            hits += hit
            lengths.append(used)
        low, high = wilson(hits, count)
        return {
            "hits": hits,
            "samples": count,
            "exact_match": round(hits / count, 4),
            "wilson_95": [round(low, 4), round(high, 4)],
            "mean_prompt_tokens": round(sum(lengths) / count),
        }

    def make(self, task: str, rng: random.Random, length: int) -> tasks.Sample:
        """One sample of a task."""
        count: Callable[[str], int] = self.count_tokens
        if task.startswith("needle"):
            easy = task == "needle"
            return tasks.needle(rng, self.filler, NUM_KEYS, length, count, easy)
        if task == "key_value_recall":
            return tasks.key_value_recall(rng, self.filler, NUM_KEYS, length, count)
        if task == "variable_tracking":
            return tasks.variable_tracking(rng, self.filler, 2, 3, length, count)
        return tasks.long_copy(rng, self.filler, 100, 8, length, count)


def three_gram(folder: Path) -> dict[str, float]:
    """The baseline: counted on the same training text, measured on the same held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, _ = load_corpus()
    model = TriGram(Lines(train, tokenizer).tokens, len(tokenizer))
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    nats = model.nats(ids)
    return {
        "nats_per_token": round(nats, 4),
        "bits_per_byte": round(nats / math.log(2) * len(ids) / len(text.encode()), 4),
    }


def card(results: dict[str, Any]) -> str:
    """The model card; every number in it comes from ``results``."""
    made = results["training"]
    config = made["config"]
    low = results["bfloat16"]
    gram = results["three_gram"]
    losses = [
        f"| {context} | {x['nats_per_token']:.3f} | {x['bits_per_byte']:.3f} |"
        for context, x in low["loss"].items()
    ]
    recall = [
        f"| {dtype} | {task} | {length} | {x['hits']} of {x['samples']} "
        f"| {100 * x['exact_match']:.1f} % "
        f"| {100 * x['wilson_95'][0]:.1f}-{100 * x['wilson_95'][1]:.1f} % |"
        for dtype in ("bfloat16", "float32")
        for task, by_length in results[dtype]["recall"].items()
        for length, x in by_length.items()
    ]
    return CARD.format(
        parameters=made["parameters"] / 1e6,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        mlp=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=config["vocab_size"],
        theta=config["rope_parameters"]["rope_theta"],
        positions=config["max_position_embeddings"],
        tokens=made["tokens"] / 1e6,
        minutes=made["seconds"] / 60,
        steps=made["steps"],
        longest=made["longest_rows"],
        python=made["python"],
        gram_nats=gram["nats_per_token"],
        gram_bits=gram["bits_per_byte"],
        losses="\n".join(losses),
        recall="\n".join(recall),
        keys=NUM_KEYS,
    )


CARD = """---
license: apache-2.0
library_name: transformers
---

# The bundled model

A small language model for trying out and testing KV-cache compression without a download. It was
trained from scratch by the scripts in `training/`.

* **Architecture**: `Qwen3ForCausalLM`, {parameters:.2f}M parameters (tied embeddings),
  {layers} layers, width {hidden}, MLP {mlp}, {heads} query heads and {kv_heads} key-value heads
  of size {head_dim}, QK-norm, RoPE with base {theta:g}, {positions} positions, bfloat16.
* **Tokenizer**: byte-level BPE, {vocab} entries, digits single, line ends single, `<|bos|>` put
  first.
* **Data**: the source of Python {python}'s standard library and its documentation topics
  (`pydoc_data`) and docstrings, and generated recall tasks (`bitkv/evaluation/tasks.py`). One
  document in ten was held out by a checksum of its name; `heldout.txt` and `document.txt` are such
  text, which the model has not seen. `calibration.txt` is from the documents it was trained on.
  `prose.txt`, the GNU General Public License 3 as Debian ships it, is prose from another world.
* **Cost**: {tokens:.1f}M tokens in {steps} steps, {minutes:.0f} minutes of wall time on two
  shared CPU cores (no GPU), in several runs that resumed from each other while the curriculum was
  being worked out; the longest training rows had {longest} tokens.
* **Licence**: weights and tokenizer Apache-2.0; the texts are part of Python, PSF-2.0,
  but for `prose.txt`, © Free Software Foundation, whose verbatim copying is permitted.

## Loss on held-out text

An interpolated (Witten-Bell) 3-gram over the same tokens, counted on the same training text, has
{gram_nats:.3f} nats per token ({gram_bits:.3f} bits per byte).

| Context | Nats per token | Bits per byte |
| ---: | ---: | ---: |
{losses}

## Recall

Greedy decoding, exact match of the whole answer, facts in held-out text; `needle` and
`key_value_recall` hold {keys} keys and ask for one. The values of a prompt begin with different
digits, except in `needle_any_values`: two values that begin alike are what the model confuses
most. Intervals are 95 % Wilson intervals.

| Weights | Task | Prompt tokens | Right | Share | Interval |
| --- | --- | ---: | ---: | ---: | ---: |
{recall}

## Use

    prompt = document.txt + question.txt     # the answer is the code planted in the document

The question has the form the model was taught, `The access code of aurora is`; the answer is five
digits. It does not follow instructions.

## Limits

It knows nothing but Python documentation and the task formats, and writes text that is only
locally sensible. Only look-up by key was learned: chains of assignments and copying of passages
were in the training data but not learned, as the table shows; do not measure compression by them.
Recall holds for the formats above; other wordings are not understood. Positions
beyond {positions} were never seen.
"""


def main() -> None:
    """Measure and write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("bitkv/assets"))
    parser.add_argument("--out", type=Path, default=Path("training/results.json"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples to run")
    parser.add_argument("--max-length", type=int, default=8192)
    args = parser.parse_args()

    started = time.monotonic()
    results: dict[str, Any] = {"three_gram": three_gram(args.assets)}
    print(results, flush=True)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        measurer = Measurer(args.assets, dtype, args.device)
        part: dict[str, Any] = {"loss": {}, "recall": {}}
        results[name] = part
        full = name == "bfloat16"
        for context in LOSS_CONTEXTS if full else LOSS_CONTEXTS[:1]:
            if context <= args.max_length:
                part["loss"][str(context)] = measurer.loss(context)
                print(name, context, part["loss"][str(context)], flush=True)
        plan = SAMPLES if full else FLOAT32_SAMPLES
        for task, samples in plan.items():
            for length, count in samples.items():
                if length <= args.max_length:
                    # The prompt leaves room for the answer inside the context.
                    score = measurer.recall(task, length - 16, max(10, int(count * args.scale)))
                    part["recall"].setdefault(task, {})[str(length)] = score
                    print(name, task, length, score, flush=True)
    results["seconds"] = round(time.monotonic() - started)
    provenance = args.assets / "training.json"
    results["training"] = json.loads(provenance.read_text(encoding="utf-8"))
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.assets / "README.md").write_text(card(results), encoding="utf-8")


if __name__ == "__main__":
    main()
