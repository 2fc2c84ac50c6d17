"""Recall tasks by name, and their prompts as ids."""

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitkv.evaluation import tasks
from bitkv.evaluation.tasks import CountTokens, Depth, Retelling, Sample

ROOM = 16  # tokens of a length that are left for BOS and the answer

Maker = Callable[[random.Random, str, int, CountTokens, int, Depth | None], Sample]


class RecallTask(NamedTuple):
    """What makes a sample of at most so many tokens out of a filler text.

    Args:
        make: of a generator, filler, tokens, what counts them, keys and the depth of the asked fact.
        keys: facts of a prompt unless told otherwise; 0 where that is no choice.
        has_depth: whether the asked fact can be put anywhere.
    """

    make: Maker
    keys: int = 0
    has_depth: bool = False


RECALL: dict[str, RecallTask] = {
    "needle": RecallTask(
        lambda rng, text, n, count, keys, depth: tasks.needle(rng, text, keys, n, count, depth=depth),
        keys=8,
        has_depth=True,
    ),
    "needle_similar": RecallTask(
        lambda rng, text, n, count, keys, depth: tasks.needle_similar(rng, text, keys, n, count, depth),
        keys=16,
        has_depth=True,
    ),
    "key_value_recall": RecallTask(
        lambda rng, text, n, count, keys, _: tasks.key_value_recall(rng, text, keys, n, count), keys=8
    ),
    "variable_tracking": RecallTask(
        lambda rng, text, n, count, *_: tasks.variable_tracking(rng, text, 2, 3, n, count)
    ),
    "long_copy": RecallTask(
        lambda rng, text, n, count, *_: tasks.long_copy(rng, text, 100, 8, n, count)
    ),
}
TABLE_KEYS = 16  # of the task `table_copy` unless told otherwise


class Prompt(NamedTuple):
    """Ids `[T]` of a document and of the question after it, the text that should follow, and the bin of
    depths that the asked fact lies in (0 without bins)."""

    document: Tensor
    question: Tensor
    answer: str
    depth_bin: int = 0


class Lesson(NamedTuple):
    """Ids `[T]` of a document and of the text after it, and which of these `[T]` have to be known."""

    document: Tensor
    text: Tensor
    scored: Tensor


def prompts(
    tokenizer: Any,
    text: str,
    *,
    task: str,
    length: int,
    samples: int,
    seed: int,
    keys: int | None = None,
    depths: int = 1,
) -> Iterator[Prompt]:
    """Samples of a task as ids, the same for the same arguments.

    Args:
        text: facts are hidden in lines of its first half, which in the bundled text is prose.
        keys: facts of a prompt; None is the task's own number.
        depths: the asked fact lies in each of so many equal parts of the prompt in turn.

    Raises:
        ValueError: no such task, or more keys than there are names or room.
    """
    if task not in RECALL:
        raise ValueError(f"no recall task {task!r}; choose from {', '.join(RECALL)}")
    make, default, has_depth = RECALL[task]
    num_keys = default if keys is None else keys
    _check_keys(num_keys)
    count_tokens = counter(tokenizer)
    for index in range(samples):
        rng = random.Random(f"{seed} {task} {length} {index}")
        at = index % depths
        depth = (at / depths, (at + 1) / depths) if has_depth and depths > 1 else None
        sample = make(rng, text[: len(text) // 2], length - ROOM, count_tokens, num_keys, depth)
        document, question = split_question(task, sample.prompt)
        prompt = Prompt(
            torch.tensor(tokenizer(document)["input_ids"]),
            torch.tensor(tokenizer(question, add_special_tokens=False)["input_ids"]),
            sample.answer,
            at,
        )
        _check_room(len(prompt.document) + len(prompt.question), length, num_keys)
        yield prompt


def lessons(
    tokenizer: Any, text: str, *, length: int, samples: int, seed: int, keys: int | None = None
) -> Iterator[Lesson]:
    """Samples of the task `table_copy` as ids; arguments and errors as of `prompts`."""
    num_keys = TABLE_KEYS if keys is None else keys
    _check_keys(num_keys)
    count_tokens = counter(tokenizer)
    for index in range(samples):
        rng = random.Random(f"{seed} table_copy {length} {index}")
        told = tasks.table_copy(rng, text[: len(text) // 2], num_keys, length - ROOM, count_tokens)
        document = torch.tensor(tokenizer(told.document)["input_ids"])
        lesson = Lesson(document, *_marked(tokenizer, told))
        _check_room(len(document) + len(lesson.text), length, num_keys)
        yield lesson


def _marked(tokenizer: Any, told: Retelling) -> tuple[Tensor, Tensor]:
    """Ids of what is told again, piece by piece, and which of them are of values."""
    ids: list[int] = []
    scored: list[bool] = []
    for frame, value in told.parts:
        for piece, counts in ((frame, False), (f" {value}", True)):
            new = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += new
            scored += [counts] * len(new)
    return torch.tensor(ids), torch.tensor(scored)


def counter(tokenizer: Any) -> CountTokens:
    """What counts the tokens of a text, and remembers it."""

    @cache
    def count_tokens(line: str) -> int:
        return len(tokenizer(line, add_special_tokens=False)["input_ids"])

    return count_tokens


def split_question(task: str, prompt: str) -> tuple[str, str]:
    """The document and the question at its end: the last line, or the passage begun again."""
    last = prompt.rindex(tasks.COPY_AGAIN) if task == "long_copy" else prompt.rfind("\n") + 1
    return prompt[:last], prompt[last:]


def _check_keys(keys: int) -> None:
    if keys > len(tasks.KEYS):
        raise ValueError(f"{keys} keys are more than the {len(tasks.KEYS)} names there are; pass fewer")


def _check_room(tokens: int, length: int, keys: int) -> None:
    if tokens > length:
        raise ValueError(
            f"a prompt with {keys} keys has {tokens:,} tokens, more than {length:,}; pass fewer keys or "
            "a greater length"
        )
