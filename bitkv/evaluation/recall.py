"""Exact recall from long documents: needles, key-value pairs, variables, copied passages and tables."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitkv.cache import PagedCache
from bitkv.evaluation.prompts import Prompt, lessons, prompts
from bitkv.evaluation.protocols import Advance, Subject, ignore, prefilled, resumed, right_until
from bitkv.evaluation.report import Copy, Recall, Row, wilson
from bitkv.integrations.transformers import PackedCache

RecallProtocol = Literal["document first", "whole prompt"]


class _Answered(NamedTuple):
    """A prompt, the tokens of its answer, and who gave it."""

    prompt: Prompt
    tokens: int
    hits: list[bool]


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
    seeds: int = 1,
    keys: int | None = None,
    depths: int = 1,
    protocol: RecallProtocol = "document first",
    advance: Advance = ignore,
) -> list[Row]:
    """A row for the stock cache and for each subject, all on the same prompts, decoded greedily.

    Args:
        text, task, keys, depths: see `prompts`; with several depths, rows of each depth follow.
        length: tokens of a prompt and its answer, at most.
        samples, seeds: prompts a seed, and how many seeds from `seed` on; hits are pooled.
        advance: called once a row and sample.
    """
    everyone = [stock, *subjects]
    caches: list[PagedCache | None] = [None] * len(everyone)
    answered: list[_Answered] = []
    options: dict[str, Any] = {"task": task, "length": length, "samples": samples, "keys": keys}
    for prompt in chain.from_iterable(
        prompts(tokenizer, text, seed=seed + i, depths=depths, **options) for i in range(seeds)
    ):
        for subject in everyone:
            subject.check_context(len(prompt.document))
        expected = tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]
        hits = []
        shared = prefilled(stock, prompt.document) if protocol == "document first" else None
        for i, subject in enumerate(everyone):
            hit, caches[i] = _ask(subject, tokenizer, prompt, shared)
            hits.append(hit)
            advance()
        answered.append(_Answered(prompt, len(expected), hits))
    rows = []
    for depth, chosen in _by_depth(answered, depths):
        for i, (subject, cache) in enumerate(zip(everyone, caches, strict=True)):
            rows.append(
                subject.row(
                    task,
                    Recall.of(sum(x.hits[i] for x in chosen), len(chosen), seed, seeds),
                    cache=cache,
                    protocol=protocol,
                    context=length,
                    tokens=sum(x.tokens for x in chosen),
                    samples=len(chosen),
                    depth=depth,
                )
            )
    return rows


def _by_depth(
    answered: Sequence[_Answered], depths: int
) -> list[tuple[float | None, Sequence[_Answered]]]:
    """Everything, and with several depths the part of each, with the middle of its range."""
    bins = range(depths) if depths > 1 else ()
    parts = (((i + 0.5) / depths, [x for x in answered if x.prompt.depth_bin == i]) for i in bins)
    return [(None, answered), *parts]


def _ask(
    subject: Subject, tokenizer: Any, prompt: Prompt, shared: Any
) -> tuple[bool, PagedCache | None]:
    """Whether a subject answers, and the cache it then has; `shared` is the stock cache, if any."""
    if shared is None:
        past, ids = subject.new_cache(exact_prefill=True), torch.cat(prompt[:2])
    else:
        past, ids = resumed(subject, prompt.document, shared), prompt.question
    hit = answers(subject.model, tokenizer, past, ids, prompt.answer)
    return hit, past.paged if isinstance(past, PackedCache) else None


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


def table_copy(
    stock: Subject,
    subjects: Sequence[Subject],
    tokenizer: Any,
    text: str,
    *,
    length: int,
    samples: int,
    seed: int = 0,
    seeds: int = 1,
    keys: int | None = None,
    advance: Advance = ignore,
) -> list[Row]:
    """A row for the stock cache and for each subject: a table told again, its keys given, its values
    generated, and each value read again with what comes after it. Arguments as of `recall`."""
    everyone = [stock, *subjects]
    right: list[list[int]] = [[] for _ in everyone]
    asked: list[int] = []
    caches: list[PagedCache | None] = [None] * len(everyone)
    options: dict[str, Any] = {"length": length, "samples": samples, "keys": keys}
    for lesson in chain.from_iterable(
        lessons(tokenizer, text, seed=seed + i, **options) for i in range(seeds)
    ):
        asked.append(int(lesson.scored.sum()))
        shared = prefilled(stock, lesson.document)
        for i, subject in enumerate(everyone):
            past = resumed(subject, lesson.document, shared)
            right[i].append(right_until(subject.model, past, lesson.text, lesson.scored))
            caches[i] = past.paged if isinstance(past, PackedCache) else None
            advance()
    return [
        subject.row(
            "table_copy",
            _copied(counts, asked, seed, seeds),
            cache=cache,
            protocol="followed",
            context=length,
            tokens=sum(asked),
            samples=len(asked),
        )
        for subject, counts, cache in zip(everyone, right, caches, strict=True)
    ]


def _copied(right: Sequence[int], asked: Sequence[int], seed: int, seeds: int) -> Copy:
    hits, samples = sum(map(int.__eq__, right, asked)), len(asked)
    means = sum(right) / samples, sum(asked) / samples
    return Copy(hits, hits / samples, *wilson(hits, samples), *means, seed, seeds)
