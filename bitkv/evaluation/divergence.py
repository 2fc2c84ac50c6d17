"""How long greedy text stays what the stock cache would write."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bitkv.cache import PagedCache
from bitkv.evaluation.protocols import Advance, Subject, ignore, prefilled, resumed, right_until
from bitkv.evaluation.report import Divergence, Row
from bitkv.integrations.transformers import PackedCache


def divergence(
    stock: Subject,
    subjects: Sequence[Subject],
    tokenizer: Any,
    text: str,
    *,
    length: int,
    samples: int,
    steps: int,
    advance: Advance = ignore,
) -> list[Row]:
    """A row for the stock cache and for each subject.

    The stock cache follows its own text: in 16-bit dtypes its row shows what rounding alone changes when
    tokens are read in chunks.

    Args:
        length: tokens of a prompt and what is generated.
        samples: prompts, from places spread evenly over the text.
        steps: tokens to generate.
        advance: called once a row and sample.

    Raises:
        ValueError: the text is shorter than a prompt.
    """
    everyone = [stock, *subjects]
    common: list[list[int]] = [[] for _ in everyone]
    caches: list[PagedCache | None] = [None] * len(everyone)
    for ids in starts(tokenizer, text, length=length - steps, samples=samples):
        document, last = ids[:-1], ids[-1:]
        shared = prefilled(stock, document)
        said = _greedy(stock.model, resumed(stock, document, shared), last, steps)
        follow, scored = torch.cat([last, said]), torch.ones(steps + 1, dtype=torch.bool)
        for i, subject in enumerate(everyone):
            past = resumed(subject, document, shared)
            common[i].append(right_until(subject.model, past, follow, scored))
            caches[i] = past.paged if isinstance(past, PackedCache) else None
            advance()
    return [
        subject.row(
            "divergence",
            _result(counts, steps),
            cache=cache,
            protocol="followed",
            context=length,
            tokens=steps * len(counts),
            samples=len(counts),
        )
        for subject, counts, cache in zip(everyone, common, caches, strict=True)
    ]


def starts(tokenizer: Any, text: str, *, length: int, samples: int) -> Iterator[Tensor]:
    """Ids `[length]` of pieces of a text, with BOS where the tokenizer has one; they may overlap.

    Raises:
        ValueError: the text is shorter than one.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    slack = len(ids) - length + len(start)
    if slack < 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, less than a prompt of {length}; pass a longer text or "
            "a smaller length"
        )
    for i in range(samples):
        begin = i * slack // max(samples - 1, 1)
        yield torch.tensor(start + ids[begin : begin + length - len(start)])


@torch.inference_mode()
def _greedy(model: Any, past: Any, ids: Tensor, steps: int) -> Tensor:
    """The `steps` tokens `[steps]` that follow ids `[T]`, the end of a text included."""
    ids, said = ids.to(model.device), []
    for _ in range(steps):
        out = model(ids[None], past_key_values=past, use_cache=True, logits_to_keep=1)
        past, ids = out.past_key_values, out.logits[0, -1:].argmax(-1)
        said.append(ids)
    return torch.cat(said).cpu()


def _result(counts: Sequence[int], steps: int) -> Divergence:
    unchanged = sum(count == steps for count in counts) / len(counts)
    return Divergence(statistics.fmean(counts), statistics.median(counts), unchanged, steps)
