"""How close next-token distributions stay to the stock cache's: KL divergence and top-1."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitkv.cache import PagedCache
from bitkv.evaluation.protocols import Advance, Protocol, Subject, Windows, ignore, next_token_logits
from bitkv.evaluation.report import Agreement, Row


def agreement(
    stock: Subject,
    subjects: Sequence[Subject],
    windows: Windows,
    *,
    protocol: Protocol = "streamed",
    advance: Advance = ignore,
) -> list[Row]:
    """A row for each subject; the stock cache runs once a window, `advance` once a row and window."""
    divergences: list[list[Tensor]] = [[] for _ in subjects]
    matches = [0] * len(subjects)
    caches: list[PagedCache | None] = [None] * len(subjects)
    for ids in windows.ids:
        expected, _ = next_token_logits(stock, ids, protocol)
        for i, subject in enumerate(subjects):
            logits, caches[i] = next_token_logits(subject, ids, protocol)
            divergences[i].append(kl_divergence(expected, logits))
            matches[i] += int((expected.argmax(-1) == logits.argmax(-1)).sum())
            advance()
    return [
        subject.row(
            "agreement",
            _result(parts, matched),
            cache=cache,
            protocol=protocol,
            context=windows.ids.shape[1],
            tokens=windows.num_predicted,
            samples=len(windows.ids),
        )
        for subject, parts, matched, cache in zip(subjects, divergences, matches, caches, strict=True)
    ]


def kl_divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """KL(expected ‖ other) in nats, float32 `[T]`, of the softmax of two logits `[T, vocab]`."""
    log_p, log_q = (x.float().log_softmax(-1) for x in (expected, logits))
    # rounding makes equal distributions differ by about -1e-8
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_(min=0)


def _result(windows: Sequence[Tensor], matched: int) -> Agreement:
    divergence = torch.cat([*windows])
    return Agreement(
        kl_mean=float(divergence.mean()),
        kl_p99=float(divergence.quantile(0.99)),
        top1=matched / len(divergence),
        kl_windows=tuple(float(x.mean()) for x in windows),
    )
