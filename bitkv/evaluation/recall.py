"""Exact recall from long documents: needles, key-value pairs, variables, copied passages."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitkv.cache import PagedCache
from bitkv.evaluation import tasks
from bitkv.evaluation.protocols import Advance, Subject, ignore
from bitkv.evaluation.report import Recall, Row
from bitkv.evaluation.tasks import CountTokens, Sample
from bitkv.integrations.transformers import PackedCache, PackedLayer

RecallProtocol = Literal["document first", "whole prompt"]

_NUM_KEYS = 8
_ROOM = 16  # tokens of a length that are left for BOS and the answer

MAKERS: dict[str, Callable[[random.Random, str, int, CountTokens], Sample]] = {
    "needle": lambda rng, text, n, count: tasks.needle(rng, text, _NUM_KEYS, n, count),
    "key_value_recall": lambda rng, text, n, count: tasks.key_value_recall(
        rng, text, _NUM_KEYS, n, count
    ),
    "variable_tracking": lambda rng, text, n, count: tasks.variable_tracking(rng, text, 2, 3, n, count),
    "long_copy": lambda rng, text, n, count: tasks.long_copy(rng, text, 100, 8, n, count),
}
"""Recall tasks by name: what makes a sample of at most so many tokens out of a filler text."""


class Prompt(NamedTuple):
    """Ids `[T]` of a document and of the question after it, and the text that should follow."""

    document: Tensor
    question: Tensor
    answer: str


def recall(
    stock: Subject,
    subjects: Sequence[Subject],
    tokenizer: Any,
    text: str,
    *,
    task: str,
    length: int,
    samples: int,
    seed: int = 0,
    protocol: RecallProtocol = "document first",
    advance: Advance = ignore,
) -> list[Row]:
    """A row for the stock cache and for each subject, all on the same prompts, decoded greedily.

    Args:
        text: the facts are hidden in lines of its first half, which in the bundled text is prose.
        task: a key of `MAKERS`.
        length: tokens of a prompt and its answer, at most.
        advance: called once a row and sample.
    """
    everyone = [stock, *subjects]
    hits = [0] * len(everyone)
    caches: list[PagedCache | None] = [None] * len(everyone)
    answer_tokens = 0
    for prompt in prompts(tokenizer, text, task=task, length=length, samples=samples, seed=seed):
        for subject in everyone:
            subject.check_context(len(prompt.document))
        answer_tokens += len(tokenizer(prompt.answer, add_special_tokens=False)["input_ids"])
        shared = _prefill(stock, prompt.document) if protocol == "document first" else None
        for i, subject in enumerate(everyone):
            if shared is None:
                past, ids = subject.new_cache(exact_prefill=True), torch.cat(prompt[:2])
            else:
                past, ids = _resume(subject, prompt.document, shared), prompt.question
            hits[i] += answers(subject.model, tokenizer, past, ids, prompt.answer)
            caches[i] = past.paged if isinstance(past, PackedCache) else None
            advance()
    return [
        subject.row(
            task,
            Recall.of(hit, samples, seed),
            cache=cache,
            protocol=protocol,
            context=length,
            tokens=answer_tokens,
            samples=samples,
        )
        for subject, hit, cache in zip(everyone, hits, caches, strict=True)
    ]


def prompts(
    tokenizer: Any, text: str, *, task: str, length: int, samples: int, seed: int
) -> Iterator[Prompt]:
    """Samples of a task as ids, the same for the same arguments.

    Raises:
        ValueError: no such task.
    """
    if task not in MAKERS:
        raise ValueError(f"no recall task {task!r}; choose from {', '.join(MAKERS)}")

    @cache
    def count_tokens(line: str) -> int:
        return len(tokenizer(line, add_special_tokens=False)["input_ids"])

    for index in range(samples):
        rng = random.Random(f"{seed} {task} {length} {index}")
        sample = MAKERS[task](rng, text[: len(text) // 2], length - _ROOM, count_tokens)
        document, question = split_question(task, sample.prompt)
        yield Prompt(
            torch.tensor(tokenizer(document)["input_ids"]),
            torch.tensor(tokenizer(question, add_special_tokens=False)["input_ids"]),
            sample.answer,
        )


def split_question(task: str, prompt: str) -> tuple[str, str]:
    """The document and the question at its end: the last line, or the passage begun again."""
    last = prompt.rindex(tasks.COPY_AGAIN) if task == "long_copy" else prompt.rfind("\n") + 1
    return prompt[:last], prompt[last:]


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, past: Any, ids: Tensor, expected: str) -> bool:
    """Whether the greedy continuation of `ids` `[T]`, leading blanks aside, begins with `expected`."""
    ids, said, text = ids.to(model.device), [], ""
    for _ in range(len(expected.encode()) + 2):
        out = model(ids[None], past_key_values=past, use_cache=True, logits_to_keep=1)
        past, ids = out.past_key_values, out.logits[0, -1:].argmax(-1)
        said.append(int(ids))
        text = tokenizer.decode(said).lstrip().rstrip("\ufffd")  # half a character at the end
        if len(text) >= len(expected) or not expected.startswith(text):
            break
    return text.startswith(expected)


@torch.inference_mode()
def _prefill(subject: Subject, document: Tensor, past: Any = None) -> Any:
    ids = document[None].to(subject.model.device)
    out = subject.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
    return out.past_key_values


@torch.inference_mode()
def _resume(subject: Subject, document: Tensor, shared: Any) -> Any:
    """The subject's cache after the document; exact prefill gives every recipe the same K and V."""
    if subject.recipe is None:
        return copy.deepcopy(shared)
    past: Any = subject.new_cache(exact_prefill=True)
    if not all(isinstance(layer, PackedLayer) for layer in past.layers):
        return _prefill(subject, document, past)
    for i, layer in enumerate(shared.layers):
        past.update(layer.keys, layer.values, i)
    return past
