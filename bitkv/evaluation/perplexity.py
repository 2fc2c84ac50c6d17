"""Held-out loss with a quantized cache.

With an exact first prefill the whole window would be read from exact keys and values, and every recipe
would score like 16 bits; hence the protocols.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bitkv.cache import PagedCache
from bitkv.evaluation.protocols import Advance, Protocol, Subject, Windows, ignore, next_token_logits
from bitkv.evaluation.report import Perplexity, Row


def perplexity(
    stock: Subject,
    subjects: Sequence[Subject],
    windows: Windows,
    *,
    protocol: Protocol = "packed",
    advance: Advance = ignore,
) -> list[Row]:
    """A row for the stock cache and for each subject; `advance` is called once a row and window."""
    everyone = [stock, *subjects]
    totals = [0.0] * len(everyone)
    caches: list[PagedCache | None] = [None] * len(everyone)
    for ids in windows.ids:
        for i, subject in enumerate(everyone):
            logits, caches[i] = next_token_logits(subject, ids, protocol)
            totals[i] += float(token_losses(logits, ids[1:]).sum())
            advance()
    losses = [total / windows.num_predicted for total in totals]
    return [
        subject.row(
            "perplexity",
            _result(loss, losses[0], windows),
            cache=cache,
            protocol=protocol,
            context=windows.ids.shape[1],
            tokens=windows.num_predicted,
            samples=len(windows.ids),
        )
        for subject, loss, cache in zip(everyone, losses, caches, strict=True)
    ]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, float32 `[T]`, of targets `[T]` under logits `[T, vocab]`."""
    return torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


def _result(loss: float, stock_loss: float, windows: Windows) -> Perplexity:
    return Perplexity(
        nats_per_token=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss * windows.num_predicted / math.log(2) / windows.num_bytes,
        delta_nats=loss - stock_loss,
    )
